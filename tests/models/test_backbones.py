"""Each backbone against its formula in float64, and what all of them promise: hook, remat, dtypes, names."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import models
from ntk_prefix.models.backbone import check_tokens
from ntk_prefix.models.run import jit_reading
from ntk_prefix.models.vit import bicubic_matrix
from tests.models import formulas
from tests.models.calling import call, quick

KINDS = tuple(formulas.CONFIGS)
RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 31, (3, 9))
TYPES = RNG.integers(0, 2, (3, 9))
MASK = np.arange(9) < np.array([9, 4, 6])[:, None]
LEFT = MASK[:, ::-1]
PIXELS = RNG.normal(size=(2, 30, 18, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    configs = formulas.CONFIGS.items()
    return {kind: formulas.write(root / kind, config, formulas.draw(config)) for kind, config in configs}


def load(folders: dict[str, Path], kind: str, dtype: Any = None) -> models.Backbone:
    return models.from_pretrained(folders[kind], "causal-lm" if "llama" in kind else None, dtype=dtype)


def inputs_of(kind: str, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """A batch with padding where there can be any, and an image size that wants new positions."""
    if kind == "bert":
        return jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(TYPES)
    if "llama" in kind:
        return jnp.asarray(IDS), jnp.asarray(LEFT.astype(np.int32))
    return (jnp.asarray(PIXELS, dtype),)


def formula(kind: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Hidden states, logits, and which tokens are real."""
    config = formulas.CONFIGS[kind]
    tensors = formulas.draw(config)
    if kind == "bert":
        return formulas.bert(config, tensors, IDS, MASK, TYPES, offset), None, MASK
    if "llama" in kind:
        return *formulas.llama(config, tensors, IDS, LEFT, offset), LEFT
    return formulas.vit(config, tensors, PIXELS), None, np.array(True)


def relative(ours: Any, theirs: Any, real: np.ndarray) -> float:
    keep = np.broadcast_to(real, ours.shape[:2])
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.abs(ours - theirs)[keep].max() / np.abs(theirs[keep]).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_formula(folders: dict[str, Path], kind: str, dtype: Any) -> None:
    """float32: some tens of roundings of 6e-8; float64: the same of 1e-16 on the same float32 weights."""
    output = call(load(folders, kind, dtype), *inputs_of(kind, dtype))
    hidden, logits, real = formula(kind)
    limit = 1e-5 if dtype == jnp.float32 else 1e-12
    # under x64, so a float64 constant that leaks into a float32 model would show
    assert output.last_hidden_state.dtype == dtype
    assert relative(output.last_hidden_state, hidden, real) < limit
    assert (output.logits is None) == (logits is None)
    if logits is not None:
        assert output.logits.dtype == dtype
        assert relative(output.logits, logits, real) < limit
    assert output.cache is None


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_images_of_the_checkpoints_size_need_no_resampling(folders: dict[str, Path], kind: str) -> None:
    pixels = RNG.normal(size=(1, 24, 24, 3))
    wanted = formulas.vit(formulas.CONFIGS[kind], formulas.draw(formulas.CONFIGS[kind]), pixels)
    ours = call(load(folders, kind), jnp.asarray(pixels, jnp.float32)).last_hidden_state
    assert relative(ours, wanted, np.array(True)) < 1e-5


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 7), (37, 16), (37, 4), (5, 1)])
def test_bicubic_resampling(old: int, new: int) -> None:
    grid = RNG.normal(size=(old, old, 2))
    matrix = bicubic_matrix(old, new)
    np.testing.assert_allclose(
        np.einsum("ih,hwd,jw->ijd", matrix, grid, matrix), formulas.resample(grid, new, new), atol=1e-12
    )
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    if old == new:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_position_offset(folders: dict[str, Path], kind: str) -> None:
    """As an argument, as one number a row, and as an attribute beside an argument: one meaning."""
    model = load(folders, kind)
    hidden, _, real = formula(kind, offset=5)
    shifted = {
        "argument": call(model, *inputs_of(kind), position_offset=5),
        "rows": call(model, *inputs_of(kind), position_offset=jnp.asarray([5, 5, 5])),
    }
    model.position_offset = 3
    shifted["both"] = call(model, *inputs_of(kind), position_offset=2)
    for output in shifted.values():
        assert relative(output.last_hidden_state, hidden, real) < 1e-5
    # rotary positions are relative: there only a prefix or a cache can tell
    moved = relative(hidden, formula(kind)[0], real)
    assert moved > 1e-2 if kind == "bert" else moved < 1e-10


def test_rows_may_be_shifted_differently(folders: dict[str, Path]) -> None:
    model = load(folders, "bert")
    mixed = call(model, *inputs_of("bert"), position_offset=jnp.asarray([0, 5, 11])).last_hidden_state
    for row, offset in enumerate((0, 5, 11)):
        assert relative(mixed[row : row + 1], formula("bert", offset)[0][row : row + 1], MASK[row : row + 1]) < 1e-5


# ----------------------------------------------------------------------------------------- the hook


class Recorder(nnx.Module):
    """A core around a core that scales its output by a parameter and counts its calls in a variable."""

    def __init__(self, core: nnx.Module):
        self.core = core
        self.weight = nnx.Param(jnp.ones((), jnp.float32))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        self.calls[...] = self.calls[...] + 1
        heads = query.shape[2] // key.shape[2]
        assert query.shape[2] == heads * key.shape[2]
        assert key.shape == value.shape
        return self.weight[...].astype(query.dtype) * self.core(query, key, value, **options)


def hook(model: models.Backbone) -> models.Backbone:
    for layer in model.layers:
        layer.attention.core = Recorder(layer.attention.core)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_core_is_called_in_every_layer(folders: dict[str, Path], kind: str) -> None:
    plain, hooked = load(folders, kind), hook(load(folders, kind))
    inputs = inputs_of(kind)
    np.testing.assert_array_equal(
        call(hooked, *inputs).last_hidden_state, call(plain, *inputs).last_hidden_state, strict=True
    )
    assert [int(layer.attention.core.calls[...]) for layer in hooked.layers] == [1, 1]
    # what a core returns is all that attention contributes
    for layer in hooked.layers:
        layer.attention.core.weight.set_value(jnp.zeros((), jnp.float32))
        layer.attention.query.kernel.set_value(layer.attention.query.kernel[...] + 1)
    silent = call(hooked, *inputs).last_hidden_state
    for layer in hooked.layers:
        layer.attention.key.kernel.set_value(layer.attention.key.kernel[...] * 3)
    np.testing.assert_array_equal(call(hooked, *inputs).last_hidden_state, silent)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_remat_changes_no_number(folders: dict[str, Path], kind: str) -> None:
    model = hook(load(folders, kind))
    inputs = inputs_of(kind)
    weights = jnp.asarray(formula(kind)[2][:, :, None] * np.arange(24.0))

    def loss(trained: nnx.State, rest: nnx.State, graph: Any) -> tuple[jax.Array, nnx.State]:
        # variables belong to the trace that they were made in: make them again in that of the gradient
        model = nnx.merge(graph, trained, jax.tree.map(jnp.asarray, rest))
        hidden = model(*inputs).last_hidden_state
        return jnp.sum(jnp.square(hidden) * weights), nnx.state(model)

    results, calls, programs = [], [], []
    for remat in (False, True):
        model.remat = remat
        graph, trained, rest = nnx.split(model, nnx.Param, ...)
        programs.append(str(jax.make_jaxpr(functools.partial(loss, graph=graph))(trained, rest)))
        (value, state), gradients = quick(jax.value_and_grad(functools.partial(loss, graph=graph), has_aux=True))(
            trained, rest
        )
        nnx.update(model, state)
        results.append((value, gradients))
        calls.append([int(layer.attention.core.calls[...]) for layer in model.layers])
    (value, gradients), (value_again, gradients_again) = results
    np.testing.assert_allclose(value_again, value, rtol=1e-6)
    # of the largest gradient: that of a key's bias is nothing but rounding, softmax cannot see it
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    assert scale > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), gradients, gradients_again)
    # state held in the layers survives, and the layers were in fact put under jax.checkpoint
    assert calls == [[1, 1], [2, 2]]
    assert [program.count("checkpoint") > 0 or program.count("remat") > 0 for program in programs] == [False, True]


@pytest.mark.parametrize("kind", ["bert", "dinov2", "llama_tied"])
def test_bfloat16(folders: dict[str, Path], kind: str) -> None:
    """Eight bits of mantissa: 4e-3 a rounding, a few tens of them on the way."""
    model = load(folders, kind, jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    output = call(model, *inputs_of(kind))
    hidden, logits, real = formula(kind)
    assert output.last_hidden_state.dtype == jnp.bfloat16
    assert 1e-4 < relative(output.last_hidden_state, hidden, real) < 5e-2
    if logits is not None:
        assert output.logits.dtype == jnp.float32
        assert relative(output.logits, logits, real) < 5e-2


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_norms_are_in_float32(folders: dict[str, Path], kind: str) -> None:
    """A scale that bfloat16 cannot hold (1 + 2^-10) is not rounded away before it is used."""
    layer = load(folders, kind, jnp.bfloat16).layers[0]
    x = jnp.asarray(RNG.normal(size=(1, 2, 24)) * 100 + 300, jnp.bfloat16)
    norm = layer.mlp_norm
    norm.scale.set_value(jnp.full(24, 1 + 2**-10, jnp.float32))
    wide = np.asarray(x, np.float64)
    if kind != "llama":
        norm.bias.set_value(jnp.zeros(24, jnp.float32))
        wide = wide - wide.mean(-1, keepdims=True)
    eps = norm.epsilon
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * (1 + 2**-10)
    ours = norm(x)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_one_compilation_for_one_shape(folders: dict[str, Path], kind: str) -> None:
    model = load(folders, kind)
    traced = 0

    @quick
    def run(state: nnx.State, inputs: tuple[jax.Array, ...]) -> jax.Array:
        nonlocal traced
        traced += 1
        return nnx.merge(graph, state)(*inputs).last_hidden_state

    graph, state = nnx.split(model)
    first = inputs_of(kind)
    run(state, first)
    run(jax.tree.map(lambda p: 2 * p, state), tuple(jnp.flip(x, axis=0) for x in first))
    assert traced == 1
    # and the same checkpoint, loaded again, is the same program
    assert nnx.split(load(folders, kind))[0] == graph


# ---------------------------------------------------------------------------------- names and heads


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_uniform_and_go_both_ways(folders: dict[str, Path], kind: str) -> None:
    model = load(folders, kind)
    names = models.module_names(model)
    for i in range(2):
        for part in ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down"):
            assert f"layers.{i}.{part}" in names
    assert len(set(names.values())) == len(names)
    covered = {"/".join(path.split(".")) for path in names}
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        whole = "/".join(map(str, path))
        assert whole in covered or whole.rpartition("/")[0] in covered
    tensors = formulas.draw(formulas.CONFIGS[kind])
    assert {n.removesuffix(".weight").removesuffix(".bias") for n in tensors} == set(names.values())


POOLED = {
    "mean": lambda h, m: (h * m[:, :, None]).sum(1) / m.sum(1)[:, None],
    "cls": lambda h, m: h[:, 0],
    "last": lambda h, m: np.stack([row[np.flatnonzero(keep)[-1]] for row, keep in zip(h, m, strict=True)]),
}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("masked", [False, True])
def test_classifier(folders: dict[str, Path], pooling: Any, masked: bool) -> None:
    model = models.from_pretrained(
        folders["bert"], "sequence-classification", num_labels=5, pooling=pooling, rngs=nnx.Rngs(3)
    )
    assert isinstance(model, models.Classifier)
    mask = MASK if masked else np.ones_like(MASK)
    options = {"attention_mask": jnp.asarray(MASK)} if masked else {}
    output = call(model, jnp.asarray(IDS), token_type_ids=jnp.asarray(TYPES), **options)
    config = formulas.CONFIGS["bert"]
    hidden = formulas.bert(config, formulas.draw(config), IDS, mask, TYPES)
    kernel = np.asarray(model.head.kernel[...], np.float64)
    np.testing.assert_allclose(output.logits, POOLED[pooling](hidden, mask) @ kernel, atol=1e-6)
    assert relative(output.last_hidden_state, hidden, mask) < 1e-5


def test_classifier_passes_settings_on(folders: dict[str, Path]) -> None:
    model = models.from_pretrained(folders["bert"], "sequence-classification", num_labels=2)
    assert isinstance(model, models.Classifier)
    before = call(model, jnp.asarray(IDS)).logits
    model.remat = True
    assert model.backbone.remat
    assert model.remat
    model.position_offset, model.remat = 5, False
    assert (model.backbone.position_offset, model.position_offset) == (5, 5)
    assert model.config is model.backbone.config
    assert np.abs(call(model, jnp.asarray(IDS)).logits - before).max() > 1e-4


def test_images_are_classified_by_the_same_class(folders: dict[str, Path]) -> None:
    model = models.from_pretrained(folders["dinov2"], "image-classification", num_labels=4, dtype=jnp.bfloat16)
    output = call(model, *inputs_of("dinov2"))
    assert output.logits.shape == (2, 4)
    assert output.logits.dtype == jnp.float32


def test_output_is_a_pytree() -> None:
    output = models.Output(last_hidden_state=jnp.ones((1, 2, 3)))
    assert jax.tree.map(jnp.shape, output).last_hidden_state == (1, 2, 3)
    assert len(jax.tree.leaves(output)) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = jnp.ones(1)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------- errors


def test_too_many_positions(folders: dict[str, Path]) -> None:
    model = load(folders, "bert")
    ids = jnp.zeros((1, 41), jnp.int32)
    for arguments in ((ids, 0), (ids[:, :38], 3), (ids[:, :40], 1)):
        with pytest.raises(ValueError, match="expected at most 40 positions"):
            model(arguments[0], position_offset=arguments[1])


@pytest.mark.parametrize("shape", [(1, 24, 25, 3), (1, 24, 24, 1), (1, 0, 24, 3)])
def test_images_that_do_not_fit(folders: dict[str, Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .* divisible by the patch size 6"):
        load(folders, "vit")(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (functools.partial(models.BertConfig, num_attention_heads=5), "expected a divisor of hidden_size 24, got 5"),
        (functools.partial(models.BertConfig, hidden_act="swish2"), "hidden_act: expected one of"),
        (functools.partial(models.LlamaConfig, num_key_value_heads=3), "expected a divisor of the 4 query heads"),
        (functools.partial(models.LlamaConfig, head_dim=7), "expected an even number, got 7"),
    ],
)
def test_configs_that_cannot_be(config: Any, problem: str) -> None:
    sizes = {k: v for k, v in formulas.TEXT.items() if k not in config.keywords}
    with pytest.raises(ValueError, match=problem):
        config(**sizes)


@pytest.mark.usefixtures("without_annotations")
def test_classifiers_that_cannot_be(folders: dict[str, Path]) -> None:
    backbone = load(folders, "bert")
    with pytest.raises(ValueError, match="pooling: expected one of"):
        models.Classifier(backbone, 2, pooling="max", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least 1"):
        models.Classifier(backbone, 0, rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------- how a model is called and run


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_a_classifier_passes_its_inputs_on_by_name(folders: dict[str, Path], kind: str) -> None:
    """First, by the backbone's own name, or as ``inputs``: one call. Twice, not at all, or by another's name: an error."""
    model = models.Classifier(models.from_pretrained(folders[kind]), 2, rngs=nnx.Rngs(1))
    batch: dict[str, Any] = {"pixel_values": jnp.ones((2, 12, 12, 3))}
    if kind != "vit":
        batch = {"input_ids": jnp.arange(6).reshape(2, 3), "attention_mask": jnp.array([[1, 1, 0], [1, 1, 1]])}
    if kind == "bert":
        batch["token_type_ids"] = jnp.array([[0, 1, 1]] * 2)
    assert tuple(batch) == model.input_names
    first, *rest = batch
    others = {name: batch[name] for name in rest}
    want = call(model, **batch).logits
    np.testing.assert_array_equal(call(model, batch[first], **others).logits, want)
    np.testing.assert_array_equal(call(model, inputs=batch[first], **others).logits, want)
    for wrong in ({}, {"inputs": batch[first], **batch}, {"pixels": batch[first]}):
        with pytest.raises(TypeError):
            model(**wrong)


@pytest.mark.usefixtures("without_annotations")
def test_run_options_are_one_record(folders: dict[str, Path]) -> None:
    backbone = load(folders, "bert")
    model = models.Classifier(backbone, 2, rngs=nnx.Rngs(1))
    assert model.run == models.RunOptions() == models.RunOptions(remat=False, window=None, position_offset=0)
    model.window = 4
    backbone.remat = True
    model.position_offset = 2
    want = models.RunOptions(remat=True, window=4, position_offset=2)
    assert backbone.run == model.run == want
    assert (backbone.window, model.remat, backbone.position_offset) == (4, True, 2)
    model.run = models.RunOptions()
    assert not backbone.remat
    for wrong in ({"window": 0}, {"window": 2.5}, {"position_offset": -1}, {"position_offset": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            models.RunOptions(**wrong)
    assert nnx.split(model)[0] == nnx.split(nnx.clone(model))[0]  # static: another option is another program


def test_what_only_reads_a_model_leaves_its_weights_where_they_lie() -> None:
    """``nnx.jit`` returned a new copy of each with every call."""
    model, x, sums = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.arange(3.0), jnp.ones(2)
    before = model.kernel[...].unsafe_buffer_pointer()
    run = jit_reading(lambda model, x, sums: sums + model(x), donate=2)
    np.testing.assert_allclose(run(model, x, sums), 1 + x @ model.kernel[...], rtol=1e-6)
    assert model.kernel[...].unsafe_buffer_pointer() == before
    assert sums.is_deleted()
    assert not x.is_deleted()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(
    ("ids", "mask", "problem"),
    [
        ([[0, 31]], None, "input_ids: expected numbers from 0 to 30, the model's vocabulary, got 31"),
        ([[0, -1]], None, "input_ids: expected numbers from 0 to 30, .* got -1"),
        ([[0.0, 1.0]], None, "input_ids: expected integers"),
        ([0, 1], None, "input_ids: expected integers"),
        (np.zeros((0, 2), int), None, r"input_ids: expected at least one token a row, and a row, got shape \(0, 2\)"),
        ([[0, 1]], [[1, 1, 0]], r"attention_mask: expected \[1, 2\]"),
        ([[0, 1]], [[1.0, 0.0]], r"attention_mask: expected integers or booleans.*mask\.astype\(bool\)"),
        ([[0, 1]], [[0.0, -1e9]], r"attention_mask: expected integers or booleans.*mask > -1"),
    ],
)
def test_tokens_that_a_model_has_not(folders: dict[str, Path], kind: str, ids: Any, mask: Any, problem: str) -> None:
    """One beyond the vocabulary would be NaN, a negative one another token, and a mask to be added the opposite."""
    model: Any = load(folders, kind)
    given = jnp.asarray(ids), None if mask is None else jnp.asarray(mask)
    with pytest.raises(ValueError, match=problem):
        check_tokens(*given, model.config.vocab_size)
    if given[0].dtype == jnp.int32 and given[0].ndim == 2 and (mask is None or given[1].dtype == jnp.int32):
        # the others the annotations catch in a test, before the model does
        with pytest.raises(ValueError, match=problem):
            model(*given)


def test_lists_are_no_arrays(folders: dict[str, Path]) -> None:
    ids = jnp.asarray([[0, 1]])
    with pytest.raises(ValueError, match="input_ids: expected an array, got list"):
        check_tokens([[0, 1]], None, 31)
    with pytest.raises(ValueError, match="attention_mask: expected an array, got list"):
        check_tokens(ids, [[1, 1]], 31)


@pytest.mark.parametrize(
    ("types", "problem"),
    [
        ([[0, 2]], "token_type_ids: expected numbers from 0 to 1, the model's token types, got 2"),
        ([[0, -1]], "token_type_ids: expected numbers from 0 to 1, .* got -1"),
        ([[0]], r"token_type_ids: expected \[1, 2\], the ids' shape"),
        ([[0.0, 1.0]], "token_type_ids: expected integers"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_token_types_that_a_bert_has_not(folders: dict[str, Path], types: Any, problem: str) -> None:
    """One beyond the table was NaN in all that it returned, a negative one another type."""
    with pytest.raises(ValueError, match=problem):
        load(folders, "bert")(jnp.asarray([[0, 1]]), token_type_ids=jnp.asarray(types))


@pytest.mark.parametrize(
    ("kind", "offset", "problem"),
    [
        (
            "bert",
            np.array([0, 39]),
            "input_ids: expected at most 40 positions, got 2 tokens with a position offset of 39",
        ),
        ("bert", np.int64(39), "input_ids: expected at most 40 positions"),
        ("bert", -1, "position_offset: expected no position before the first, got -1"),
        (
            "bert",
            np.array([0, 1, 2]),
            r"position_offset: expected a whole number, or integers \[2\], .* got int64 \[3\]",
        ),
        ("llama", 0.5, "position_offset: expected a whole number, .* got 0.5"),
        ("llama", 2**40, "position_offset: expected less than 2147483648"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_offsets_that_a_model_has_no_positions_for(
    folders: dict[str, Path], kind: str, offset: Any, problem: str
) -> None:
    """Beyond BERT's table a row was NaN, before it one of the last positions; where only differences count, they pass."""
    model: Any = load(folders, kind)
    ids = jnp.asarray([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=problem):
        model(ids, position_offset=offset)
    model(ids, position_offset=np.array([0, 1]))


def test_pixels_are_floating_point(folders: dict[str, Path]) -> None:
    model: Any = load(folders, "vit")
    with pytest.raises(Exception, match="pixel_values"):
        model(jnp.zeros((1, 24, 24, 3), jnp.uint8))


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
def test_a_model_computes_in_floating_point(folders: dict[str, Path], dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype: expected floating point numbers of .*got {dtype}"):
        load(folders, "bert", dtype)


def test_the_mean_counts_every_token_once(folders: dict[str, Path]) -> None:
    """A mask says where there are tokens, whatever nonzero numbers it is made of."""
    model = models.Classifier(models.from_pretrained(folders["bert"]), 2, rngs=nnx.Rngs(1))
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK.astype(np.int32))
    want = call(model, ids, mask).logits
    np.testing.assert_array_equal(call(model, ids, mask * jnp.asarray(1 + IDS % 3)).logits, want)
