"""Layers as a loop over one: the numbers of layers one after another, the program of one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import models, peft, sharding
from ntk_prefix.checks import UsageError
from ntk_prefix.models.families.modernbert import ModernBert, ModernBertConfig
from ntk_prefix.models.scan import check_alike
from ntk_prefix.training import Trainer, TrainState

EXACT = 1e-6
"""Of the largest weight, and of the loss: two steps are some ten products in a row, each rounded to 6e-8 in float32, added in
another order. A step is 1e-2 of the largest weight and more."""

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
METHODS: dict[str, tuple[str, Any]] = {
    "lora_ntk": ("llama", (peft.LoraConfig(r=2), peft.NTKAttentionConfig())),
    "prefix_tuning": ("llama", peft.PrefixTuningConfig(num_tokens=3)),
    "full": ("llama", peft.FullConfig()),
    "bitfit": ("bert", peft.BitFitConfig()),
    # a first layer of another build, and of the others every third without a window
    "modernbert": ("modernbert", (peft.LoraConfig(r=2), peft.NTKAttentionConfig())),
    "prefix_propagation": ("bert", peft.PrefixPropagationConfig(num_prefix_tokens=2, dropout=0.5)),
}
QUICK = ("lora_ntk", "full")


def shapes_of(kind: str, config: Any = None, layers: int = 2, **run: Any) -> Any:
    """Return a model with an adapter, of shapes only."""

    def build() -> Any:
        rngs = nnx.Rngs(0)
        if kind == "llama":
            sizes = models.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2)
            model: Any = models.Llama(sizes, rngs=rngs)
        elif kind == "modernbert":
            model = ModernBert(ModernBertConfig(**SIZES, num_hidden_layers=2 * layers, local_attention=4), rngs=rngs)
        else:
            bert = models.Bert(models.BertConfig(**SIZES, num_hidden_layers=layers, type_vocab_size=2), rngs=rngs)
            model = models.Classifier(bert, 3, rngs=rngs)
        return model if config is None else peft.apply(model, config)

    model = nnx.eval_shape(build)
    model.run = dataclasses.replace(model.run, **run)
    return model


def model_of(*args: Any, **run: Any) -> Any:
    """Return such a model with random numbers; what is trained is anywhere but at its start, and >= 0."""
    model, draw = shapes_of(*args, **run), np.random.default_rng(0)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf.set_value(jax.random.key(0))
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            drawn = 0.3 * draw.normal(size=leaf.shape).astype(leaf.dtype)
            leaf.set_value(jnp.asarray(abs(drawn) if isinstance(leaf, peft.AdapterParam) else drawn))
        else:
            leaf.set_value(jnp.zeros(leaf.shape, leaf.dtype))
    return model


def batch() -> dict[str, jax.Array]:
    ids = np.random.default_rng(0).integers(1, 32, (8, 6)).astype(np.int32)
    mask = (np.arange(6) < 5 + (ids[:, :1] & 1)).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def loss(model: Any, batch: Any) -> jax.Array:
    output = model(**batch)
    return jnp.square(output.last_hidden_state if output.logits is None else output.logits).mean(axis=-1).sum()


def trainer(mesh: bool = False) -> Trainer:
    devices = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES) if mesh else None
    return Trainer(loss=loss, optimizer=optax.sgd(0.1), wrt=peft.AdapterParam, mesh=devices)


def stepped(way: Trainer, model: Any, state: TrainState | None = None, steps: int = 2) -> tuple[TrainState, float]:
    """Return the state after some steps, and the last one's loss."""
    step, state, measured = way.stepper(model), way.init(model) if state is None else state, {}
    for _ in range(steps):
        state, measured = step(state, way.place(batch()))
    return state, float(measured["loss"])


def check_same(found: tuple[TrainState, float], wanted: tuple[TrainState, float], start: Any) -> None:
    """Hold a run against another one, which went somewhere from its start."""
    assert jax.tree.structure(found[0]) == jax.tree.structure(wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=EXACT)
    leaves, others, first = (jax.tree.leaves(tree) for tree in (found[0].trained, wanted[0].trained, start))
    scale = max(float(jnp.abs(leaf).max()) for leaf in others)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=0, atol=EXACT * scale)
    assert max(float(jnp.abs(leaf - was).max()) for leaf, was in zip(others, first, strict=True)) > 1000 * EXACT * scale


@functools.cache
def one_after_another(method: str) -> tuple[Any, TrainState, tuple[TrainState, float]]:
    """Return what is trained at the start, after one step and after two, without a loop."""
    model, way = model_of(*METHODS[method]), trainer()
    first, _ = stepped(way, model, steps=1)
    kept = jax.tree.map(jnp.copy, first)
    return nnx.state(model, peft.AdapterParam), kept, stepped(way, model, first, steps=1)


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_loop_goes_on_from_the_state_of_layers_one_after_another_as_they_do(method: str) -> None:
    start, first, wanted = one_after_another(method)
    way, model = trainer(), model_of(*METHODS[method], scan_layers=True)
    check_same(stepped(way, model, jax.tree.map(jnp.copy, first), steps=1), wanted, start)


@pytest.mark.parametrize("method", QUICK)
def test_a_loop_that_recomputes_over_a_mesh_trains_as_one_device(method: str) -> None:
    start, _, wanted = one_after_another(method)
    model = model_of(*METHODS[method], scan_layers=True, remat=True)
    check_same(stepped(trainer(mesh=True), model), wanted, start)


def text(layers: int, method: str = "lora_ntk", **run: Any) -> str:
    """Return the program of a step."""
    way, model = trainer(), shapes_of(*METHODS[method], layers, **run)
    trained = nnx.state(model, way.wrt)
    state = jax.eval_shape(lambda t: TrainState(jnp.zeros((), jnp.int32), t, way.optimizer.init(t)), trained)
    return way.program(model).lower(state, way.frozen(model), batch()).as_text()


def test_the_program_is_that_of_one_layer_and_no_frozen_weights_are_stacked_or_kept() -> None:
    def products(program: str) -> int:
        return program.count("dot_general")

    few, many = text(2, scan_layers=True), text(3, scan_layers=True)
    assert products(few) == products(many) > 0
    assert products(text(2)) > products(few) + 7  # the control: another layer has at least its seven linear maps
    assert "stablehlo.while" in many
    of_all_layers = "tensor<3x16x24x"
    assert of_all_layers not in many
    assert of_all_layers in text(3, "full", scan_layers=True)  # the other control: trained ones are


def half(model: Any) -> None:
    kernel = model.layers[1].mlp.up.kernel
    kernel.set_value(jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16))


def other_activation(model: Any) -> None:
    model.layers[1].mlp.hidden_act = "gelu"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            (peft.LoraConfig(r=2, target=r"layers\.0.*query"), peft.LoraConfig(r=3, target=r"layers\.1.*query")),
            None,
            r" in attention\.query\.adapters\.default\.a, got layers\.1 with .*16, 3.* where layers\.0 has .*16, 2",
        ),
        (
            peft.NTKAttentionConfig(target=r"layers\.0"),
            None,
            r" in attention\.core\.adapters\.default\.k, got layers\.1 with none where layers\.0 has AdapterParam",
        ),
        (None, other_activation, r", got layers\.1 with other options than layers\.0"),
        (None, half, r" in mlp\.up\.kernel, got layers\.1 with Param bfloat16.* where layers\.0 has Param float32"),
    ],
)
def test_layers_that_differ_are_refused_by_name(
    config: Any, change: Callable[[Any], None] | None, message: str
) -> None:
    model = shapes_of("llama", config)
    if change is not None:
        change(model)
    with pytest.raises(UsageError, match=f"^scan_layers: expected layers that are alike{message}"):
        check_alike(model.layers)


class Counting(models.attention.AttentionCore):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        self.calls[...] += 1
        return super().__call__(*arrays, **options)


def test_a_layer_that_changes_state_is_refused() -> None:
    def run(scan_layers: bool) -> Any:
        model = shapes_of("llama", scan_layers=scan_layers)
        for layer in model.layers:
            layer.attention.core = Counting()
        graph, state = nnx.split(model)
        return jax.eval_shape(lambda state: nnx.merge(graph, state, copy=True)(**batch()), state)

    with pytest.raises(UsageError, match=r"one that writes attention\.core\.calls"):
        run(True)
    run(False)


def test_a_cache_and_a_calibration_batch_see_every_layer_and_leave_the_option_as_it_is() -> None:
    model = model_of("llama", scan_layers=True)
    seen = peft.record(model, batch())
    cached = model(**batch(), cache=model.empty_cache(8, 6)).cache
    assert len(seen) == len(cached) == 2
    assert model.scan_layers
