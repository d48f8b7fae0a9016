"""Drawn tokens: each filter is its definition, draws have its probabilities, and a row does not depend on its neighbors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ntk_prefix import models
from ntk_prefix.checks import UsageError
from ntk_prefix.models.generation import _seen
from ntk_prefix.models.sampling import Sampling
from tests.models import formulas
from tests.models.test_llama import IDS, MASK, NEW
from tests.models.test_llama import model as model  # the fixture

WORDS = 12


def definition(logits: np.ndarray, seen: np.ndarray, **options: Any) -> np.ndarray:
    """Return the distribution by sorting: for each filter the set of the paper that it is from, for logits without ties."""
    logits = logits.copy()
    if penalty := options.get("repetition_penalty"):
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    p = scipy.special.softmax(logits / options.get("temperature", 1.0))

    def kept(tokens: np.ndarray) -> np.ndarray:
        left = np.where(np.isin(np.arange(len(p)), tokens), p, 0)
        return left / left.sum()

    def lightest(order: np.ndarray, mass: float) -> np.ndarray:
        return order[: 1 + np.searchsorted(np.cumsum(p[order]), mass)]

    if count := options.get("top_k"):
        p = kept(np.argsort(-p)[:count])
    if mass := options.get("top_p"):
        p = kept(lightest(np.argsort(-p), mass))
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(p)
        if mass := options.get("typical"):
            p = kept(lightest(np.argsort(np.abs(surprise - scipy.stats.entropy(p)), kind="stable"), mass))
    if least := options.get("eta"):
        enough = p >= min(least, least**0.5 * np.exp(-scipy.stats.entropy(p)))
        p = kept(np.flatnonzero(enough) if enough.any() else np.argmax(p))
    return p


OPTIONS = (
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.8},
    {"typical": 0.6},
    {"eta": 0.1},
    {"repetition_penalty": 1.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "typical": 0.8, "eta": 0.02, "repetition_penalty": 1.2},
)


@jax.jit
def drawn_from(sampling: Sampling, logits: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the distribution, and 20,000 draws."""
    keys = jax.random.split(jax.random.key(1), 20_000)
    draws = jax.vmap(lambda key: sampling.draw(key[None], logits, seen)[0])(keys)
    return jnp.exp(sampling.log_probabilities(logits, seen))[0], draws


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_a_filter_is_its_definition_and_draws_have_its_probabilities(options: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    logits, seen = 2 * draw.normal(size=WORDS), draw.random(WORDS) < 0.4
    expected = definition(logits, seen, **options)
    found, draws = drawn_from(Sampling(**options), jnp.asarray(logits)[None], jnp.asarray(seen)[None])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    counts = np.bincount(np.asarray(draws), minlength=WORDS)
    assert counts[expected == 0].sum() == 0
    there = expected > 0

    def likely(expected: np.ndarray) -> float:
        return float(
            scipy.stats.chisquare(counts[there], expected[there] / expected[there].sum() * counts.sum()).pvalue
        )

    assert likely(expected) > 1e-4
    if there.sum() > 1:  # a distribution that is a little off is told apart
        assert likely(expected * np.where(np.arange(WORDS) == np.argmax(expected), 1.15, 1)) < 1e-4


def test_a_filter_keeps_its_set_in_float32_too() -> None:
    """Whatever the logits: kept is a set of the likeliest that weighs enough, and would not without its last."""
    call = jax.jit(lambda sampling, logits: sampling.log_probabilities(logits))

    @given(st.lists(st.floats(-80, 80, width=32), min_size=WORDS, max_size=WORDS), st.floats(2**-6, 1, width=32))
    def check(logits: list[float], mass: float) -> None:
        array = np.asarray(logits, np.float32)
        found = np.asarray(call(Sampling(top_p=mass), jnp.asarray(array)))
        kept, p = np.isfinite(found), scipy.special.softmax(array.astype(np.float64))
        assert kept.any()
        assert np.isclose(np.exp(found[kept]).sum(), 1, atol=1e-5)
        rounded = 1e-4  # of log probabilities down to -160: what is nearer than that may be taken for equal
        assert array[kept].min() >= array[~kept].max(initial=-np.inf) - rounded
        assert p[kept].sum() >= mass - 1e-5
        last = array > array[kept].min() + rounded  # without those that are as likely as the last
        assert p[last].sum() <= mass + 1e-5

    check()


def test_no_number_is_nan_however_large_logits_and_numbers_are() -> None:
    call = jax.jit(lambda sampling, *inputs: jnp.exp(sampling.log_probabilities(*inputs)))
    seen, rest = jnp.array([True, True, False, False]), {"top_p": 1.0, "typical": 1.0, "eta": 1e-9}
    for logits, temperature, penalty, wanted in (
        ([5.0, 1.0, -3.0, -1e4], 1e-38, 1.0, [1, 0, 0, 0]),
        ([5.0, 5.0, -3.0, -1e4], 1e-300, 1.0, [0.5, 0.5, 0, 0]),  # no number of float32
        ([1e4, 1e4, 1e4, 1e4], 1e-38, 1.0, [0.25] * 4),
        ([3e38, -3e38, 0.0, 1.0], 1e-3, 1.0, [1, 0, 0, 0]),
        ([-1e10, -2e10, -np.inf, -np.inf], 1.0, 1e30, [0.5, 0.5, 0, 0]),
        ([1e10, 2e10, 0.0, -np.inf], 1.0, 1e-38, [0.5, 0.5, 0, 0]),
        ([-np.inf, 1.0, -np.inf, 1.0], 1.0, 1.0, [0, 0.5, 0, 0.5]),
    ):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty, **rest)
        found = call(sampling, jnp.asarray(logits, jnp.float32), seen)
        np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=f"{logits} {temperature} {penalty}")


def test_numbers_change_without_a_new_program() -> None:
    call = jax.jit(lambda sampling, logits: sampling.log_probabilities(logits))
    for sampling in (Sampling(top_k=2, temperature=0.5), Sampling(top_k=5, temperature=2.0)):
        call(sampling, jnp.zeros(WORDS))
    assert call._cache_size() == 1


def test_one_token_is_greedy_and_a_row_draws_alone(model: models.Llama) -> None:
    ids, mask, key = jnp.asarray(IDS), jnp.asarray(MASK), jax.random.key(0)
    greedy = models.generate(model, ids, mask, NEW)
    np.testing.assert_array_equal(models.generate(model, ids, mask, NEW, sampling=Sampling(top_k=1), key=key), greedy)
    # the same program: flat enough that a draw of the likeliest alone is as good as impossible
    flat = Sampling(top_k=formulas.CONFIGS["llama"]["vocab_size"], temperature=50.0)
    drawn = np.asarray(models.generate(model, ids, mask, NEW, sampling=flat, key=key))
    assert (drawn != np.asarray(greedy)).any(axis=1).all()
    # so flat that a key used twice would draw one token twice
    assert (drawn != drawn[:, :1]).any(axis=1).all()
    np.testing.assert_array_equal(models.generate(model, ids, mask, NEW, sampling=flat, key=key), drawn)
    others = models.generate(model, ids, mask, NEW, sampling=flat, key=jax.random.key(1))
    assert (drawn != np.asarray(others)).any(axis=1).all()
    replaced = ids.at[0].set(ids[1]), mask.at[0].set(mask[1])
    np.testing.assert_array_equal(models.generate(model, *replaced, NEW, sampling=flat, key=key)[1:], drawn[1:])


def test_samples_are_rows_of_their_own_and_a_penalty_keeps_tokens_from_coming_back(model: models.Llama) -> None:
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    strict, free = Sampling(repetition_penalty=1e9, temperature=1e-3), Sampling(repetition_penalty=1.0, temperature=9.0)
    key = jax.random.key(0)
    new = np.asarray(models.generate(model, ids, mask, NEW, sampling=strict, key=key, samples=2))
    assert new.shape == (3, 2, NEW)
    # a prompt that is read once for its samples is the same as one that is there twice
    drawn = np.asarray(models.generate(model, ids, mask, NEW, sampling=free, key=key, samples=2))
    assert (drawn[:, 0] != drawn[:, 1]).any(axis=1).all()
    twice = (jnp.repeat(x, 2, axis=0) for x in (ids, mask))
    np.testing.assert_array_equal(models.generate(model, *twice, NEW, sampling=free, key=key), drawn.reshape(6, NEW))
    for row, prompt, real in zip(new, IDS, MASK, strict=True):
        for sample in row:
            assert len(set(sample.tolist())) == NEW
            assert not set(sample.tolist()) & set(prompt[real > 0].tolist())


def test_padding_is_no_token_that_a_row_has() -> None:
    seen = jax.jit(_seen, static_argnums=2)(jnp.array([[0, 3], [2, 2]]), jnp.array([[False, True], [True, True]]), 4)
    np.testing.assert_array_equal(seen, [[False, False, False, True], [False, False, True, False]])


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"top_k": 0}, "top_k: expected a whole number"),
        ({"top_k": 2.5}, "top_k: expected a whole number"),
        ({"top_k": 2**40}, "top_k: expected a whole number from 1 to 2147483647"),
        ({"temperature": "1"}, "temperature: expected a finite number > 0, got '1'"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\]"),
        ({"typical": 0.0}, "typical: expected"),
        ({"eta": 1.0}, "eta: expected"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: expected"),
    ],
)
def test_numbers_out_of_range_are_refused(model: models.Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.generate(model, jnp.asarray(IDS), sampling=Sampling(**options), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((0, 3), np.int32), r"input_ids: expected at least one token a row, and a row, got shape \(0, 3\)"),
        (np.zeros((2, 0), np.int32), "input_ids: expected at least one token a row"),
        (np.zeros(3, np.int32), r"input_ids: expected integers \[B, T\]"),
        (jnp.zeros((1, 3), jnp.int4), "input_ids: expected a dtype that holds all"),
        ([[1, 2, 3]], "input_ids: expected an array, got list"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_prompts_that_are_none_are_refused(model: models.Llama, ids: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.generate(model, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling()}, "key: expected a key"),
        ({"key": jax.random.key(0)}, "sampling: expected a Sampling"),
        ({"samples": 2}, "sampling: expected a Sampling"),
        ({"sampling": Sampling(), "key": jax.random.key(0), "samples": 0}, "samples: expected"),
        ({"sampling": {"top_k": 1}, "key": jax.random.key(0)}, "sampling: expected a Sampling, got dict"),
        ({"sampling": Sampling(), "key": 0}, "key: expected a key"),
        (
            {"sampling": Sampling(), "key": jax.random.split(jax.random.key(0))},
            r"key: expected a key .* got shape \[2\]",
        ),
        ({"eos_token_id": 31}, "eos_token_id: expected tokens from 0 to 30"),
        ({"eos_token_id": [3, -1]}, "eos_token_id: expected tokens from 0 to 30"),
        ({"eos_token_id": 2.5}, "eos_token_id: expected tokens"),
        ({"pad_token_id": 2**63}, r"pad_token_id: expected a whole number that int\d\d holds"),
        ({"max_new_tokens": 2**31}, "max_new_tokens: expected less than 2147483648"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_what_does_not_go_together_is_refused(model: models.Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.generate(model, jnp.asarray(IDS), **options)
