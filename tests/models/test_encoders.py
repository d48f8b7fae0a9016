"""Encoder families beside what transformers made of the same tiny files: ``tests/fixtures/encoders``.

Tolerance: 1e-5 of the largest number in float32, tens of roundings; theirs is computed in float64.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.peft import AdapterParam
from tests.models.calling import call, quick

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


@pytest.fixture(autouse=True, params=[False], ids=["float32"])
def single_precision(request):
    with jax.enable_x64(request.param):
        yield


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "recorded.npz") as file:
        return dict(file)


def inputs(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(recorded(name)[key], jnp.int32) for key in ("input_ids", "attention_mask")}


def loaded(name: str, **options: Any) -> Any:
    task = "sequence-classification" if "logits" in recorded(name) or options else None
    return models.from_pretrained(FIXTURES / name, task, **options)


def error(ours: Any, theirs: np.ndarray, where: np.ndarray) -> float:
    return np.abs(np.asarray(ours, np.float64) - theirs)[where].max() / np.abs(theirs[where]).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_logits_are_those_of_transformers(name: str) -> None:
    """Whole, padded on the right and on the left, longer than any window; a head of two layers as it stands in the file."""
    model, theirs = loaded(name), recorded(name)
    output = call(model, **inputs(name))
    real = theirs["attention_mask"].astype(bool)
    assert error(output.last_hidden_state, theirs["last_hidden_state"], real) <= 1e-5
    if "logits" in theirs:
        # what a first token that is padding sees in a window of padding is nobody's business
        rows = real[:, 0] if model.pooling == "cls" else np.ones(len(real), bool)
        assert error(output.logits, theirs["logits"], rows) <= 1e-5
    shifted = np.roll(theirs["last_hidden_state"], 1, axis=1)  # the control
    assert error(output.last_hidden_state, shifted, real) > 0.1


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"xlm-roberta", "modernbert-mean"}))
def test_ntk_attention_trains_two_steps(name: str) -> None:
    model = peft.apply(loaded(name, num_labels=3, pooling="mean"), peft.NTKAttentionConfig())
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=AdapterParam)
    labels = jnp.asarray([0, 1, 2, 1])

    @quick
    def step(state: Any, x: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)

        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(**x).logits, labels).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value, grads

    graph, state = nnx.split((model, optimizer))
    losses = []
    for _ in range(2):
        state, value, grads = step(state, inputs(name))
        losses.append(value)
        for leaf in jax.tree.leaves(grads):
            assert np.isfinite(leaf).all()
            assert np.any(leaf != 0)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_has_hugging_faces_names_and_goes_there_and_back(name: str, tmp_path: Path) -> None:
    target = r"layers\.\d\.(attention\.out|mlp\.down)$"
    model = peft.apply(loaded(name), peft.LoraConfig(target=target, r=2, train_head=False))
    draw = np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, AdapterParam):
            leaf.set_value(jnp.asarray(draw.normal(size=leaf.shape), jnp.float32))
    peft.save_pretrained(model, tmp_path)
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in load_file(_only(tmp_path))}
    in_file = {key.rpartition(".")[0] for key in load_file(FIXTURES / name / "model.safetensors")}
    prefix = getattr(model, "backbone", model).hugging_face_prefix
    bare = {name.removeprefix(prefix) for name in in_file}
    assert len(names) == 2 * len(getattr(model, "backbone", model).layers)
    assert {name.removeprefix(prefix) for name in names} <= bare
    again = peft.load_adapter(loaded(name), tmp_path)
    ours, theirs = (nnx.to_flat_state(nnx.state(m, AdapterParam)) for m in (again, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[...], other[...])


def _only(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_has_beyond_the_model_is_named(name: str, tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / name / "model.safetensors")
    model = loaded(name)
    prefix = getattr(model, "backbone", model).hugging_face_prefix
    save_file({**tensors, f"{prefix}rogue.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    with pytest.raises(UsageError, match=r"tensors left over: rogue\.weight"):
        models.from_pretrained(tmp_path)
