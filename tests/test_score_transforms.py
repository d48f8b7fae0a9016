"""Soft-capped scores and local windows, of every verb: against the formula, written here, and its autodiff.

Tolerances, in float64: 1e-12 for values and 1e-8 for gradients through two layers, relative to the largest entry of each
array: thousands of roundings.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import flash
from ntk_prefix.attention import attention_with_lse, ntk_attention, prefix_attention, softmax_attention
from ntk_prefix.feature_maps import feature_map
from ntk_prefix.prefix_state import PrefixState
from tests.models.calling import quick

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, SIZE, PREFIX = 2, 7, 13, 4, 2, 4, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows and columns, so that several meet and several do not."""
    cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=3, keys=4)
    monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def arrays(queries=QUERIES, keys=KEYS):
    return dict(
        query=2 * normal(0, BATCH, queries, HEADS, SIZE),
        key=normal(1, BATCH, keys, KEY_HEADS, SIZE),
        value=normal(2, BATCH, keys, KEY_HEADS, SIZE),
    )


def state(seed=3):
    return dict(z=0.3 * normal(seed, HEADS, SIZE, SIZE), k=abs(normal(seed + 1, HEADS, SIZE)))


def capped(scores, cap):
    return scores if cap is None else cap * jnp.tanh(scores / cap)


@jax.custom_jvp
def tanh_with_the_slope_of_a_line(x):
    return jnp.tanh(x)


tanh_with_the_slope_of_a_line.defjvp(lambda x, dx: (jnp.tanh(x[0]), dx[0]))


def formula(query, key, value, *, z=None, k=None, prefix_key=None, prefix_value=None, cap_of=capped, **options):
    """All scores, as they are written; the output and the log of what it was divided by."""
    cap, scale = options.get("logits_soft_cap"), options.get("scale") or SIZE**-0.5
    repeat = functools.partial(jnp.repeat, repeats=query.shape[2] // key.shape[2], axis=2)
    scores = cap_of(scale * jnp.einsum("btnh,bsnh->bnts", query, repeat(key)), cap)
    place = jnp.arange(query.shape[1])[:, None] + options.get("query_offset", 0)
    column = jnp.arange(key.shape[1])[None]
    left, right = options.get("local_window_size") or (99, 99)
    seen = (column >= place - left) & (column <= place + (0 if options.get("is_causal") else right))
    seen = seen[None, None] & options.get("mask", True)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores + options.get("bias", 0), 0)), 0)
    above, below = jnp.einsum("bnts,bsnh->btnh", weights, repeat(value)), weights.sum(-1).transpose(0, 2, 1)
    if prefix_key is not None:
        of_prefix = cap_of(scale * jnp.einsum("btnh,mnh->bntm", query, jnp.repeat(prefix_key, 2, axis=1)), cap)
        weights = jnp.exp(of_prefix + options.get("prefix_bias", 0))
        above = above + jnp.einsum("bntm,mnh->btnh", weights, jnp.repeat(prefix_value, 2, axis=1))
        below = below + weights.sum(-1).transpose(0, 2, 1)
    if z is not None:
        phi = feature_map("elu1")(query * math.sqrt(scale))
        above, below = above + jnp.einsum("btnr,nrh->btnh", phi, z), below + jnp.einsum("btnr,nr->btn", phi, k)
    empty = below == 0
    below = jnp.where(empty, 1, below)
    return above / below[..., None], jnp.where(empty, -jnp.inf, jnp.log(below))


def worst(got, wanted):
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, wanted)
    return max(jax.tree.leaves(errors))


MASK = jnp.asarray(np.random.default_rng(5).random((BATCH, 1, 1, KEYS)) < 0.8)
BIASES = {"lower": normal(6, 1, HEADS, QUERIES, KEYS), "upper": normal(7, BATCH, 1, QUERIES, 1)}
CASES = {
    "a soft cap": dict(logits_soft_cap=1.5),
    "a window to both sides": dict(local_window_size=(1, 2), mask=MASK),
    "both, causal, behind a cache": dict(
        logits_soft_cap=0.7, local_window_size=(3, 5), is_causal=True, query_offset=4, scale=0.3
    ),
}


def two_layers(layer, options, offset, a):
    """A scalar of two layers of NTK-Attention: the lower feeds the upper, which sees in the same way what came out."""
    where = {} if offset is None else {"query_offset": offset}
    x = layer(**a["lower"], **options, **where)
    upper = {name: option for name, option in options.items() if name != "mask"} | where
    rows = jnp.concatenate([a["lower"]["value"][:, : KEYS - QUERIES], x[:, :, ::2]], axis=1)
    y = layer(query=jnp.sin(x), key=rows, value=jnp.cos(rows), **a["upper"], **upper)
    return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size)


class TestTwoLayers:
    @pytest.mark.parametrize("case", CASES)
    def test_gradients_are_those_of_the_formula(self, case):
        a = {
            "lower": arrays() | state() | {"bias": BIASES["lower"]},
            "upper": state(8) | {"bias": BIASES["upper"]},
        }
        options = dict(CASES[case])
        offset = options.pop("query_offset", None)

        def grads(layer, offset=offset):
            run = quick(jax.value_and_grad(functools.partial(two_layers, layer, options), argnums=1))
            return run(offset, a)

        wanted = grads(lambda **xs: formula(**xs)[0])
        for implementation in ("reference", "xla"):
            layer = functools.partial(ntk_attention, implementation=implementation)
            assert worst(grads(layer, None if offset is None else jnp.int32(offset)), wanted) <= 1e-8, implementation
        if offset is not None:  # known before the program runs
            known = quick(jax.value_and_grad(functools.partial(two_layers, layer, options, offset)))(a)
            assert worst(known, wanted) <= 1e-8
        if (
            "logits_soft_cap" in options
        ):  # the control: without the factor 1 - tanh^2 the loss is right and the rest is not
            line = lambda scores, cap: cap * tanh_with_the_slope_of_a_line(scores / cap)  # noqa: E731
            loss, wrong = grads(lambda **xs: formula(**xs, cap_of=line)[0])
            assert abs(loss - wanted[0]) <= 1e-12 * abs(loss)
            assert worst(wrong["lower"]["query"], wanted[1]["lower"]["query"]) > 0.1


OPTIONS = dict(logits_soft_cap=1.2, local_window_size=(2, 1), query_offset=3)


class TestEveryVerb:
    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    def test_is_the_formula_in_value_and_gradient(self, implementation):
        a, prefix = (
            arrays(),
            {"prefix_key": normal(3, PREFIX, KEY_HEADS, SIZE), "prefix_value": normal(4, PREFIX, 2, SIZE)},
        )
        prefix["prefix_bias"] = normal(5, 1, HEADS, 1, PREFIX)

        def both(prefixed, plain, options):
            def loss(a, prefix):
                output = prefixed(**a, **prefix, **options)
                own, lse = plain(**a, **options)
                return jnp.sum(jnp.sin(3 * output)) + jnp.sum(own * lse[..., None]), (output, own, lse)

            return quick(jax.grad(loss, (0, 1), has_aux=True))(a, prefix)

        named = OPTIONS | {"implementation": implementation}
        wanted = both(lambda **xs: formula(**xs)[0], formula, OPTIONS)
        got = both(prefix_attention, attention_with_lse, named)
        assert worst(got, wanted) <= 1e-8
        assert worst(quick(lambda a: softmax_attention(**a, **named))(a), got[1][1]) <= 1e-12

    def test_a_state_passes_both_on_and_its_features_are_not_capped(self):
        a, s = arrays(), state()
        held = PrefixState(s["z"], s["k"])
        options = dict(logits_soft_cap=0.5, local_window_size=2)
        plain = functools.partial(formula, logits_soft_cap=0.5, local_window_size=(2, 2))
        wanted, own = quick(lambda a, s: (plain(**a, **s)[0], plain(**a)[0]))(a, s)
        assert worst(quick(lambda a: held.attend(**a, **options))(a), wanted) <= 1e-12
        relative = quick(lambda a: held.attend(**a, **options, mass="relative"))(a)
        phi = feature_map("elu1")(a["query"] / SIZE**0.25)
        mass = 1 + jnp.einsum("btnr,nr->btn", phi, s["k"])[..., None]
        assert worst(relative, (own + jnp.einsum("btnr,nrh->btnh", phi, s["z"])) / mass) <= 1e-12

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_windows_are_those_of_jax_nn(self, x64, is_causal):
        a = jax.tree.map(jnp.float32, arrays(KEYS))
        options = dict(is_causal=is_causal, local_window_size=(3, 2))
        with jax.numpy_rank_promotion("allow"):
            wanted = jax.nn.dot_product_attention(**a, **options)
        assert worst(softmax_attention(**a, **options), wanted) <= 2e-6


class TestExtremes:
    @pytest.mark.parametrize(("implementation", "dtype"), [("reference", "float32"), ("xla", "bfloat16")])
    def test_scores_of_1e9_and_empty_windows_have_no_nan(self, implementation, dtype):
        """Queries 5 and 6 see no key: zeros without a prefix, and the prefix alone with one."""
        a = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays(keys=4))
        a["query"] = a["query"].at[:, 1:3].multiply(1e9)
        s = jax.tree.map(jnp.float32, state())

        @quick
        def run(a, s):
            options = dict(logits_soft_cap=30.0, local_window_size=1, implementation=implementation)

            def loss(a, s):
                plain, lse = attention_with_lse(**a, **options)
                output = ntk_attention(**a, **s, **options)
                return jnp.sum(jnp.sin(output.astype("f4"))) + jnp.sum(jnp.sin(plain.astype("f4"))) + jnp.sum(
                    lse[:, :5]
                ), (
                    output,
                    plain,
                    lse,
                )

            return jax.grad(loss, (0, 1), has_aux=True)(a, s)

        grads, (output, plain, lse) = run(a, s)
        assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves((grads, output, plain)))
        assert np.all(plain[:, 5:] == 0)
        assert np.all(lse[:, 5:] == -np.inf)
        assert np.any(output[:, 5:] != 0)
        assert np.abs(lse[:, :5]).max() <= 30 + math.log(3)  # with the cap; 1e9 without

    @pytest.mark.parametrize("cap", [1e-30, 1e30])
    def test_caps_of_any_size(self, cap):
        a = jax.tree.map(jnp.float32, arrays())
        grads = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(softmax_attention(**a, logits_soft_cap=cap)))))(a)
        assert all(np.isfinite(x).all() for x in grads.values())


class TestSchedule:
    def blocks(self, length, window, offset=0, queries=None):
        shape = lambda n: jnp.zeros((1, n, 1, 2), jnp.float32)  # noqa: E731
        dynamic = None if isinstance(offset, int) else offset
        how = flash.Flash("xla", 1.0, True, offset if dynamic is None else 0, (window, None))
        source = flash.Source(shape(length), shape(length), query_offset=dynamic)
        return flash.xla._Blocks.of(how, shape(queries or length), source)

    def test_work_grows_with_length_times_window(self, monkeypatch):
        monkeypatch.setitem(flash.xla.TUNINGS, "cpu", flash.xla._Tuning(512, 512, 2**21, long=False, narrow=False))
        computed = {
            (length, window): len(blocks.pairs()) * blocks.rows * blocks.columns
            for length, window in ((2048, 64), (16384, 64), (16384, 1024), (16384, None))
            for blocks in [self.blocks(length, window)]
        }
        assert computed[16384, 64] <= 8.5 * computed[2048, 64]
        assert computed[16384, 64] <= 16384 * (64 + 3 * 128)
        assert computed[16384, 1024] <= 16384 * (1024 + 2 * 512)
        assert computed[16384, None] > 16384**2 / 2  # the control: causal alone

    def test_a_token_decoded_with_a_cache_looks_at_its_window_only(self):
        """Wherever it stands, which the program does not know: no NaN before the window or behind the token is read."""
        assert len(self.blocks(4096, 6, jnp.int32(2000), queries=1).pairs()) <= 3
        a = arrays(queries=1, keys=48)

        @quick
        def run(a, offset):
            return softmax_attention(
                **a, is_causal=True, local_window_size=6, query_offset=offset, implementation="xla"
            )

        whole = quick(lambda a, offset: formula(**a, is_causal=True, local_window_size=(6, 0), query_offset=offset)[0])
        for offset in (0, 3, 20, 47):
            first, last = max(offset - 6, 0) // 4 * 4, offset // 4 * 4 + 4  # in whole blocks
            near = ((np.arange(48) >= first) & (np.arange(48) < last))[None, :, None, None]
            hidden = {n: x if n == "query" else np.where(near, x, np.nan) for n, x in a.items()}
            assert worst(run(hidden, offset), whole(a, offset)) <= 1e-12, offset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logits_soft_cap=0.0), "logits_soft_cap: expected a number > 0, from 1e-30 to 1e30, got 0.0"),
        (dict(logits_soft_cap=-1.0), "logits_soft_cap: expected a number > 0"),
        (dict(logits_soft_cap=math.nan), "logits_soft_cap: expected a number > 0, from 1e-30 to 1e30, got nan"),
        (dict(logits_soft_cap=math.inf), "logits_soft_cap: expected a number > 0"),
        (dict(logits_soft_cap=True), "logits_soft_cap: expected a number > 0"),
        (dict(local_window_size=-1), "local_window_size: expected a whole number >= 0 of tokens"),
        (dict(local_window_size=(1, -2)), r"or \(left, right\), got \(1, -2\). Use None for no window"),
        (dict(local_window_size=(1, 2, 3)), "local_window_size: expected"),
        (dict(local_window_size=1.5), "local_window_size: expected"),
        (dict(local_window_size=(1, None)), "local_window_size: expected"),
        (dict(query_offset=1), "query_offset: expected 0 without is_causal or a window, got 1"),
    ],
)
def test_what_does_not_fit_is_named(without_annotations, options, message):
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arrays(), **options)
