"""What surgery, files and training know of a method they know from its hooks: a new one is one file and one line."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import models, peft
from ntk_prefix.models.window import windowed
from ntk_prefix.peft import hugging_face
from ntk_prefix.peft.base import Adapter, Host, InactiveParam
from ntk_prefix.training import Trainer
from tests.peft.cases import bits, frozen, inputs, put, same, train, trained
from tests.peft.tiny import LABELS, tiny

TIMES = {"x": inputs()[0], "attention_mask": inputs()[1]}
"""A calibration batch."""


def fitted(preset: str, model: Any = None, **batch: Any) -> Any:
    return peft.apply(model or tiny(), peft.PRESETS[preset], calibration=batch or TIMES)


# ------------------------------------------------------------------------------------- a method from outside


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescaleConfig(peft.AdapterConfig):
    """``s * x W`` with s >= 0 trained, as in (IA)^3."""

    method: ClassVar[str] = "rescale"
    target: str = r"\.(key|value)$"
    start: float = 1.0

    def hosts(self, module: nnx.Module) -> bool:
        return isinstance(module, (nnx.Linear, RescaledLinear))

    def inject(self, module: Any, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        host = module if isinstance(module, RescaledLinear) else RescaledLinear(module)
        return host.add(name, Scales(host.base.out_features, self.start))


class Scales(Adapter):
    file_names: ClassVar = {"s": "scales"}

    def __init__(self, width: int, start: float):
        self.s = peft.AdapterParam(jnp.full(width, start), non_negative=True)


class RescaledLinear(Host):
    def __init__(self, base: nnx.Linear):
        super().__init__()
        self.base = base

    def bare(self) -> nnx.Linear:
        return self.base

    def __call__(self, x: jax.Array) -> jax.Array:
        current = self.current()
        return self.base(x) if current is None else self.base(x) * current.s[...][None, None]


class TestAMethodFromOutside:
    """It is nowhere but here and, for files, in the registry."""

    def test_is_put_on_trained_switched_off_and_taken_off(self) -> None:
        model = peft.apply(tiny(), RescaleConfig())
        np.testing.assert_allclose(model(*inputs()), frozen(), rtol=1e-5, atol=1e-5)
        train(model)
        moved = np.asarray(model(*inputs()))
        assert np.abs(moved - frozen()).max() > 1e-3
        put(model, "lora", name="second")
        assert {path[-1] for path in bits(model, InactiveParam)} == {"s", "kernel", "bias"}
        peft.activate(model, "default")
        np.testing.assert_array_equal(model(*inputs()), moved)
        with peft.disable_adapter(model):
            np.testing.assert_array_equal(model(*inputs()), frozen())
        peft.delete_adapter(model, "default")
        peft.delete_adapter(model, "second")
        assert same(bits(model), bits(tiny()))

    def test_keeps_at_or_above_zero_what_it_marks(self) -> None:
        model = peft.apply(tiny(), RescaleConfig(start=0.01, train_head=False))
        optimizer = nnx.Optimizer(model, peft.non_negative(optax.sgd(1.0)), wrt=peft.AdapterParam)
        gradients = jax.tree.map(jnp.ones_like, nnx.state(model, peft.AdapterParam))
        optimizer.update(model, gradients)
        assert all((value == 0).all() for value in bits(model, peft.AdapterParam).values())

    def test_is_saved_and_loaded_once_it_is_registered(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = train(peft.apply(tiny(), RescaleConfig()), 1)
        peft.save_pretrained(model, tmp_path)
        with pytest.raises(ValueError, match=r"a method among .*, got 'rescale'"):
            peft.load_adapter(tiny(), tmp_path)
        monkeypatch.setitem(hugging_face.METHODS, "rescale", RescaleConfig)
        np.testing.assert_allclose(peft.load_adapter(tiny(), tmp_path)(*inputs()), model(*inputs()), atol=1e-6)

    def test_cannot_be_merged_or_mixed_unless_it_says_how(self) -> None:
        with pytest.raises(ValueError, match=r"got \['RescaledLinear'\]: no matrix"):
            peft.merge(peft.apply(tiny(), RescaleConfig()))


# --------------------------------------------------------------------------------------- all that there are


@pytest.mark.parametrize("preset", peft.PRESETS)
def test_recomputed_layers_have_the_same_gradients_beside_narrow_weights(preset: str) -> None:
    """With every method of the registry, through the train step; in float32 it is a line of tests/train/test_grid.py."""
    weights = []
    for remat in (False, True):
        model = peft.narrow_frozen(fitted(preset, tiny(dtype=jnp.dtype(jnp.bfloat16))))
        model.remat = remat
        trainer = Trainer(loss=loss, optimizer=optax.sgd(1.0), wrt=peft.AdapterParam)
        state = trainer.init(model)
        start = state.trained
        # not compiled as a whole: the same operations for all methods
        state, _ = trainer.update(model)(state, trainer.frozen(model), inputs())
        weights.append(jax.tree.map(jnp.subtract, state.trained, start))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(weights[0]))
    for plain, again in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(again, plain, atol=0.02 * largest, rtol=0)  # of bfloat16
    assert largest > 1e-3


def loss(model: Any, batch: Any) -> jax.Array:
    x, mask = batch
    return jnp.sum((model(x, mask).astype(jnp.float32) - jnp.arange(LABELS, dtype=jnp.float32)[None]) ** 2)


def test_presets_name_the_methods_of_the_registry() -> None:
    used = {type(config).method for configs in peft.PRESETS.values() for config in configs}
    assert used == set(peft.METHODS)
    assert set(peft.METHODS) <= set(peft.PRESETS)
    assert all(getattr(peft, kind.__name__) is kind for kind in peft.METHODS.values())


# -------------------------------------------------------------------------------------- several in one adapter


@pytest.mark.parametrize("first", ["lora", "bitfit"])
def test_biases_inside_wrapped_maps_are_trained_in_either_order(first: str, tmp_path: Any) -> None:
    chosen = [peft.LoraConfig(), peft.BitFitConfig()]
    model = peft.apply(tiny(), chosen if first == "lora" else chosen[::-1])
    biases = {path[:-1] for path in bits(model, peft.AdapterParam) if path[-1] == "bias"}
    assert {("layers", 0, "attention", name, "base") for name in ("query", "value")} <= biases
    alone = peft.apply(tiny(), peft.BitFitConfig())
    assert len(biases) == len([path for path in bits(alone, peft.AdapterParam) if path[-1] == "bias"])
    with pytest.raises(ValueError, match="changed the weights themselves"):
        peft.activate(model, None)
    peft.save_pretrained(train(model, 1), tmp_path)
    np.testing.assert_allclose(peft.load_adapter(tiny(), tmp_path)(*inputs()), model(*inputs()), atol=1e-6)


def test_an_adapter_that_cannot_be_put_on_leaves_the_model_as_it_was() -> None:
    model, before = tiny(), bits(tiny())
    with pytest.raises(ValueError, match="matches none"):
        peft.apply(model, [peft.BitFitConfig(), peft.LoraConfig(target="nothing")])
    assert same(bits(model), before)
    assert not jax.tree.leaves(nnx.state(model, peft.AdapterParam))


def test_a_second_adapter_is_measured_on_the_frozen_model() -> None:
    alone = fitted("ntk_attention").layers[1].attention.core.adapters["default"].basis[...]
    model = trained("lora")
    peft.apply(model, peft.PRESETS["ntk_attention"], name="second", calibration=TIMES)
    np.testing.assert_array_equal(model.layers[1].attention.core.adapters["second"].basis[...], alone)
    # the control: through the first one it is another
    seen = peft.record(trained("lora"), TIMES)["layers.1.attention"]
    assert np.abs(peft.PRESETS["ntk_attention"][0].measure(seen).basis - alone).max() > 1e-4


# --------------------------------------------------------------------------------------- positions, windows


def test_what_a_user_sets_of_positions_stays() -> None:
    model = tiny()
    model.position_offset = 2
    put(model, "lora")
    assert model.position_offset == 2
    put(model, "shifting prefix", name="second")
    assert model.position_offset == 7
    with peft.disable_adapter(model):
        assert model.position_offset == 2
    assert model.position_offset == 7
    model.position_offset = 3
    peft.activate(model, "default")
    assert model.position_offset == 3
    peft.delete_adapter(model, "second")
    peft.delete_adapter(model, "default")
    assert model.position_offset == 3


@pytest.mark.parametrize("config", [peft.PRESETS["ntk_attention"][0], peft.NTKAttentionConfig(whiten=True)])
def test_a_windowed_encoder_is_measured_over_what_its_tokens_see(config: peft.AdapterConfig) -> None:
    def measured(window: int | None) -> Any:
        model = tiny()
        model.window = window
        return peft.apply(model, config, calibration=TIMES).layers[1].attention.core.adapters["default"]

    whole, wide, narrow = measured(None), measured(5), measured(2)
    np.testing.assert_array_equal(wide.basis[...], whole.basis[...])
    np.testing.assert_array_equal(wide.unit[...], whole.unit[...])
    assert np.abs(narrow.basis[...] - whole.basis[...]).max() > 1e-4


def test_a_windowed_layer_is_recorded_as_whole_sequences() -> None:
    model = tiny()
    model.window = 2
    seen = peft.record(model, TIMES)["layers.0.attention"]
    x, padding = inputs()
    assert seen.query.shape[:2] == x.shape[:2]
    core = models.AttentionCore()
    mask = padding[:, None, None, :].astype(bool)
    by_blocks = windowed(core, seen.query, seen.key, seen.value, mask=mask, window=2)
    np.testing.assert_allclose(core(seen.query, seen.key, seen.value, mask=seen.mask), by_blocks, atol=1e-6)
    np.testing.assert_array_equal(seen.output, by_blocks)


# --------------------------------------------------------------------------------------------- mixed batches


@pytest.mark.usefixtures("without_annotations")
def test_a_row_that_names_no_adapter_is_refused_and_traced_goes_through_none() -> None:
    model = put(trained("lora"), "lora", name="second", seed=1)
    x, mask = inputs(2)
    for rows in ([0, 2], [0, -2], [0.0, 1.0], [[0, 1]]):
        with (
            pytest.raises(ValueError, match="rows: expected"),
            peft.mixed(model, jnp.array(rows), ["default", "second"]),
        ):
            pass

    @jax.jit
    def mixed(rows: jax.Array) -> jax.Array:
        own = nnx.clone(model)  # what is set on it is traced
        with peft.mixed(own, rows, ["default", "second"]):
            return own(x, mask)

    np.testing.assert_array_equal(mixed(jnp.array([0, 2])), mixed(jnp.array([0, -1])))
    np.testing.assert_array_equal(mixed(jnp.array([-2, 1])), mixed(jnp.array([-1, 1])))


@pytest.mark.parametrize(
    "config",
    [
        peft.NTKAttentionConfig(whiten=True),
        peft.NTKAttentionConfig(init="from_prefix"),
        peft.NTKAttentionConfig(feature_map="anchors", feature_map_options=(("features", 3),)),
    ],
    ids=["whiten", "from_prefix", "anchors"],
)
def test_a_calibration_batch_that_measures_nothing_is_refused(config: peft.AdapterConfig) -> None:
    model, (x, mask) = tiny(), inputs()
    for batch, said in (
        (
            {"x": x, "attention_mask": 0 * mask},
            "at least one token that is not masked, got none that layers.0.attention",
        ),
        (
            {"x": x.at[0, 0, 0].set(jnp.nan), "attention_mask": mask},
            "finite queries, keys and values in layers.0.attention",
        ),
    ):
        with pytest.raises(ValueError, match=f"calibration: expected {said}"):
            peft.apply(model, config, calibration=batch)
    np.testing.assert_array_equal(model(x, mask), frozen())


class TestWithinAMixedBatch:
    def test_no_adapter_is_none_for_any_row_and_the_rows_are_back_afterwards(self) -> None:
        model = put(trained("prefix"), "shifting prefix", name="second")
        with peft.mixed(model, jnp.zeros(8, int), ["default"]):
            mixed = model(*inputs())
            with peft.disable_adapter(model):
                np.testing.assert_array_equal(model(*inputs()), frozen())
            np.testing.assert_array_equal(model(*inputs()), mixed)
            assert model.position_offset == 0
        assert model.position_offset == 5

    def test_another_may_stand(self) -> None:
        model, rows = trained("ntk"), jnp.arange(8) % 2 - 1
        with peft.mixed(model, rows, ["default"]):
            outer = model(*inputs())
            with peft.mixed(model, jnp.full(8, -1), ["default"]):
                np.testing.assert_allclose(model(*inputs()), frozen(), atol=1e-6)
            np.testing.assert_array_equal(model(*inputs()), outer)

    @pytest.mark.parametrize("method", ["lora", "ntk", "prefix", "head"])
    @pytest.mark.parametrize("rows", [1, 4, 16])
    def test_rows_are_those_of_the_batch(self, method: str, rows: int) -> None:
        model = trained(method)
        with (
            pytest.raises(ValueError, match=f"rows: expected one for each of the 8 rows of the batch, got {rows}"),
            peft.mixed(model, jnp.zeros(rows, int), ["default"]),
        ):
            model(*inputs())

    def test_there_are_adapters(self) -> None:
        with pytest.raises(ValueError, match=r"names: expected at least one adapter of \['default'\], got none"):
            peft.mixed(trained("lora"), jnp.full(8, -1), []).__enter__()
