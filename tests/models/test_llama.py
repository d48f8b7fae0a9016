"""The cache and greedy generation: padding, ends, and agreement with a full pass over the whole text."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import flash, models, peft
from ntk_prefix.models import generation, rotary
from ntk_prefix.peft.methods.ntk_attention import State, StateCore
from tests.models import formulas
from tests.models.calling import call

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 31, n) for n in (6, 2, 4)]
IDS = np.stack([np.concatenate([np.full(6 - len(p), 30), p]) for p in PROMPTS])
MASK = np.arange(6) >= 6 - np.array([len(p) for p in PROMPTS])[:, None]
NEW = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Llama:
    config = formulas.CONFIGS["llama"]
    folder = formulas.write(tmp_path_factory.mktemp("llama"), config, formulas.draw(config))
    loaded = models.from_pretrained(folder, "causal-lm")
    assert isinstance(loaded, models.Llama)
    return loaded


@pytest.fixture(scope="module")
def greedy() -> np.ndarray:
    """The formula's own continuation: a full causal pass, in float64 and without a cache, for every token."""
    config = formulas.CONFIGS["llama"]
    tensors = formulas.draw(config)
    rows = []
    for prompt in PROMPTS:
        text = prompt
        for _ in range(NEW):
            _, logits = formulas.llama(config, tensors, text[None], np.ones((1, len(text)), bool))
            text = np.append(text, logits[0, -1].argmax())
        rows.append(text[len(prompt) :])
    return np.stack(rows)


def generate(model: models.Llama, **options: Any) -> np.ndarray:
    tokens = models.generate(model, jnp.asarray(IDS), jnp.asarray(MASK), NEW, **options)
    assert tokens.shape == (3, NEW)
    assert tokens.dtype == IDS.dtype
    return np.asarray(tokens)


def test_generation_is_the_full_pass_token_by_token(model: models.Llama, greedy: np.ndarray) -> None:
    """Three prompts of different lengths, padded on the left: each as if it were alone."""
    np.testing.assert_array_equal(generate(model), greedy)
    assert len({tuple(row) for row in greedy.tolist()}) == 3


def test_a_single_row_and_a_state_change_no_token(model: models.Llama) -> None:
    """One row takes its weights as they lie, several do not; an adapter's coordinates are multiplied in before the loop."""
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    adapted = peft.apply(nnx.clone(model), peft.PRESETS["ntk_attention"], calibration={"input_ids": ids})
    for _, state in nnx.iter_modules(adapted):
        if isinstance(state, State):
            state.z[...] = 3 * jax.random.normal(jax.random.key(0), state.z.shape)
            state.k[...] = jnp.full(state.k.shape, 0.1)
    before = jax.tree.map(np.asarray, nnx.state(adapted, ...))
    together = np.asarray(models.generate(adapted, ids, mask, NEW))
    alone = models.generate(adapted, ids[1:2], mask[1:2], NEW)
    assert alone[0].tolist() == together[1].tolist()
    text = jnp.append(jnp.asarray(PROMPTS[1]), alone[0])[None]
    assert call(adapted, text, None).logits[0, -NEW - 1 : -1].argmax(axis=-1).tolist() == alone[0].tolist()
    assert (together != generate(model)).any()
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(adapted, ...))


def test_rows_of_a_mixed_batch_are_continued_as_if_each_were_alone(
    model: models.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a prompt is continued several times, and a single one, which a GPU decodes as two rows."""
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    names, rows = ["first", "second"], jnp.array([1, -1, 1])
    own = nnx.clone(model)
    for seed, name in enumerate(names):
        peft.apply(own, peft.NTKAttentionConfig(), name=name)
        for _, state in nnx.iter_modules(own):
            if isinstance(state, StateCore):
                z, k = state.adapters[name].z, state.adapters[name].k
                z[...], k[...] = 3 * jax.random.normal(jax.random.key(seed), z.shape), jnp.full(k.shape, 0.1)
    drawn = {"sampling": models.Sampling(top_k=5), "key": jax.random.key(0)}
    peft.activate(own, "second")
    alone = np.array(models.generate(own, ids, mask, NEW))
    alone[1] = generate(model)[1]
    with peft.mixed(own, rows, names):
        greedy = np.asarray(models.generate(own, ids, mask, NEW))
        several = np.asarray(models.generate(own, ids, mask, NEW, samples=2, **drawn))
        for samples in (2, 3):
            with pytest.raises(ValueError, match="rows: expected one for each of the 2 rows of the batch, got 3"):
                models.generate(own, ids[:2], mask[:2], NEW, samples=samples, **drawn)
    with peft.mixed(own, jnp.repeat(rows, 2), names):
        twice = [jnp.repeat(x, 2, axis=0) for x in (ids, mask)]
        np.testing.assert_array_equal(models.generate(own, *twice, NEW, **drawn), several.reshape(6, NEW))
    monkeypatch.setattr(generation, "_platform", lambda _: "gpu")
    with peft.mixed(own, rows[:1], names):
        single = np.asarray(models.generate(own, ids[:1], mask[:1], NEW))
    np.testing.assert_array_equal(greedy, alone)
    np.testing.assert_array_equal(single, greedy[:1])
    assert (alone != generate(model)).any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rows", [1, generation.FEW_ROWS + 1])
def test_rows_give_the_linear_maps_numbers(dtype: Any, rows: int) -> None:
    linear = nnx.Linear(8, 5, dtype=dtype, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(5, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, rows, 8)).astype(dtype)
    got = generation._Rows(linear.kernel[...].astype(dtype).T, linear.bias[...])(x)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, linear(x), atol=8 * float(jnp.finfo(dtype).eps))


def test_half_precision_is_computed_in_single_on_a_cpu_with_rounded_weights(
    model: models.Llama, tmp_path: Path
) -> None:
    """What is decoded is what a float32 model of weights rounded to bfloat16 says; the model itself is left alone."""
    config, tensors = formulas.CONFIGS["llama"], formulas.draw(formulas.CONFIGS["llama"])
    rounded = {k: v if "norm" in k else np.asarray(jnp.asarray(v, jnp.bfloat16), v.dtype) for k, v in tensors.items()}
    wide = models.from_pretrained(formulas.write(tmp_path / "rounded", config, rounded), "causal-lm")
    folder = formulas.write(tmp_path / "exact", config, tensors)
    narrow = models.from_pretrained(folder, "causal-lm", dtype=jnp.bfloat16)
    assert isinstance(wide, models.Llama)
    assert isinstance(narrow, models.Llama)
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    widened = nnx.clone(narrow)
    generation._widen(widened)
    expected = call(wide, ids, mask).logits
    np.testing.assert_allclose(call(widened, ids, mask).logits, expected, rtol=0, atol=1e-6)
    assert np.abs(call(model, ids, mask).logits - expected).max() > 1e-4  # the control: weights that are not rounded
    np.testing.assert_array_equal(generate(narrow), generate(wide))
    one = (ids[1:2], mask[1:2], NEW)
    np.testing.assert_array_equal(models.generate(narrow, *one), models.generate(wide, *one))
    assert narrow.dtype == narrow.layers[0].mlp.up.dtype == jnp.bfloat16


def test_tied_embeddings_are_the_table_of_logits_in_a_batch_too(tmp_path: Path) -> None:
    config = formulas.CONFIGS["llama_tied"]
    tied = models.from_pretrained(formulas.write(tmp_path, config, formulas.draw(config)), "causal-lm")
    assert isinstance(tied, models.Llama)
    tokens = models.generate(tied, jnp.asarray(IDS), jnp.asarray(MASK), 2)
    assert tied.lm_head is None
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        text = np.append(prompt, row[0])[None]
        _, logits = formulas.llama(config, formulas.draw(config), text, np.ones_like(text, bool))
        assert logits[0, -2:].argmax(axis=-1).tolist() == row.tolist()


def test_a_single_prompt_is_one_row_on_any_platform(
    model: models.Llama, greedy: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is decoded as two rows, of which one is returned."""
    shapes, program = [], generation._generate

    def seen(graph: Any, new: int, on_cpu: bool, state: Any, prompts: Any, *rest: Any) -> Any:
        shapes.append((on_cpu, prompts.shape[0]))
        return program(graph, new, on_cpu, state, prompts, *rest)

    monkeypatch.setattr(generation, "_generate", seen)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(generation, "_platform", lambda _, platform=platform: platform)
        tokens = models.generate(model, jnp.asarray(IDS[1:2]), jnp.asarray(MASK[1:2]), NEW)
        np.testing.assert_array_equal(tokens, greedy[1:2])
    assert shapes == [(True, 1), (False, 2)]


def test_generation_compiles_once(model: models.Llama) -> None:
    generate(model)
    before = generation._generate._cache_size()
    models.generate(model, jnp.asarray(IDS[::-1].copy()), jnp.asarray(MASK[::-1].copy()), NEW)
    assert generation._generate._cache_size() == before


def test_generation_ends(model: models.Llama, greedy: np.ndarray) -> None:
    """A row ends with its first end token and is padded from there on; the others go on."""
    end = int(greedy[0, 3])
    others = int(greedy[1, 5])
    for ends, padding in ((end, None), ((end, others), 29)):
        tokens = generate(model, eos_token_id=ends, pad_token_id=padding)
        for ours, free in zip(tokens, greedy, strict=True):
            stops = np.flatnonzero(np.isin(free, ends))
            kept = stops[0] + 1 if len(stops) else NEW
            np.testing.assert_array_equal(ours[:kept], free[:kept])
            assert (ours[kept:] == (end if padding is None else padding)).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_cache_gives_the_full_passs_logits(model: models.Llama, masked: bool) -> None:
    """Four tokens at once, then token by token, into a buffer that is too long."""
    mask = jnp.asarray(MASK) if masked else None
    whole = call(model, jnp.asarray(IDS), mask).logits
    wide = None if mask is None else jnp.concatenate([mask, jnp.ones((3, 4), bool)], axis=1)
    cache: Any = model.empty_cache(3, 10)
    pieces, start = [], 0
    for length in (4, 1, 1):
        output = call(model, jnp.asarray(IDS[:, start : start + length]), wide, cache, jnp.int32(start))
        cache = output.cache
        pieces.append(output.logits)
        start += length
    real = MASK if masked else np.ones_like(MASK)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[real], np.asarray(whole)[real], atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, model.empty_cache(3, 10))
    assert not np.asarray(cache[0].key)[:, 6:].any()


def test_the_cache_is_looked_at_without_a_mask_of_queries_and_slots(monkeypatch: Any, model: models.Llama) -> None:
    """Six tokens into forty slots, beside padding: [B, 1, 1, S] stays that, and a block of scores is the largest there is."""
    cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=3, keys=8)
    monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)
    mask = jnp.ones((3, 40), bool).at[0, 0].set(False)

    def hidden(ids: Any, mask: Any, cache: Any, start: Any) -> Any:
        return model.hidden(ids, mask, cache, start)[0]

    program = jax.jit(hidden).lower(jnp.asarray(IDS), mask, model.empty_cache(3, 40), jnp.int32(20)).as_text()
    assert "6x40x" not in program
    assert "x3x8xi1>" in program  # the control: of a block there is one


def test_padding_changes_nothing(model: models.Llama) -> None:
    padded = np.asarray(call(model, jnp.asarray(IDS), jnp.asarray(MASK)).logits)
    right = np.stack([np.concatenate([p, np.full(6 - len(p), 30)]) for p in PROMPTS])
    padded_right = np.asarray(call(model, jnp.asarray(right), jnp.asarray(MASK[:, ::-1].copy())).logits)
    config = formulas.CONFIGS["llama"]
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        _, alone = formulas.llama(config, formulas.draw(config), prompt[None], np.ones((1, n), bool))
        np.testing.assert_allclose(padded[row, -n:], alone[0], atol=1e-5)
        np.testing.assert_allclose(padded_right[row, :n], alone[0], atol=1e-5)


def test_logits_only_where_wanted(model: models.Llama) -> None:
    output = call(model, jnp.asarray(IDS), jnp.asarray(MASK))
    last = model.logits(output.last_hidden_state[:, -1:])
    assert last.shape == (3, 1, 31)
    np.testing.assert_allclose(last, output.logits[:, -1:], atol=1e-5)


def test_texts_beyond_the_trained_positions_are_warned_of_once(
    model: models.Llama, caplog: pytest.LogCaptureFixture
) -> None:
    """Padding has no position: six places, of which the longest row has six tokens and the second two."""
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)

    def warned(trained: int, run: Any, **changes: Any) -> bool:
        rotary._warn_beyond.cache_clear()
        caplog.clear()
        before = model.config
        try:
            model.config = dataclasses.replace(before, max_position_embeddings=trained, **changes)
            for _ in range(2):
                run()
        finally:
            model.config = before
        assert len(caplog.messages) <= 1
        return any(f"at most the {trained} tokens" in line for line in caplog.messages)

    assert [warned(n, lambda: models.generate(model, ids, mask, 3)) for n in (8, 9)] == [True, False]
    assert [warned(n, lambda: models.generate(model, ids[1:2], mask[1:2], 3)) for n in (4, 5)] == [True, False]
    assert [warned(n, lambda: model(ids, mask)) for n in (5, 6)] == [True, False]
    assert [warned(n, lambda: model(ids[1:2], mask[1:2])) for n in (1, 2)] == [True, False]
    cache = model.empty_cache(3, 8)
    assert [warned(n, lambda: model(ids[:, :2], None, cache, 6)) for n in (7, 8)] == [True, False]
    assert not warned(3, lambda: model(ids, mask), rope_dynamic_factor=2.0)


@pytest.mark.usefixtures("without_annotations")
def test_errors(model: models.Llama, tmp_path: Path) -> None:
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    with pytest.raises(ValueError, match="attention_mask: expected at least one token a row, got a row of padding"):
        models.generate(model, ids, mask.at[1].set(False))
    with pytest.raises(ValueError, match="max_new_tokens: expected a whole number >= 1, got 0"):
        models.generate(model, ids, mask, 0)
    with pytest.raises(ValueError, match="expected at least one token"):
        models.generate(model, ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 6\]"):
        model(ids, mask[:, :5])
    with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 8\]"):
        model(ids, mask, model.empty_cache(3, 8))
    config = formulas.CONFIGS["llama"]
    bare = models.from_pretrained(formulas.write(tmp_path, config, formulas.draw(config)))
    assert isinstance(bare, models.Llama)
    assert bare(ids).logits is None
    assert bare.lm_head is None
    with pytest.raises(ValueError, match="causal_lm=True"):
        bare.logits(bare(ids).last_hidden_state)
    others: list[Any] = [bare, models.Classifier(bare, 2, rngs=nnx.Rngs(0))]
    for other in others:
        with pytest.raises(ValueError, match="causal_lm=True"):
            models.generate(other, ids)
