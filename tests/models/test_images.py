"""Models of images beside what transformers made of the same tiny files: ``tests/fixtures/images``.

Tolerance: 1e-5 of the largest number in float32, tens of roundings; theirs is computed in float64.
"""

import json
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
from ntk_prefix.models.vit import antialiased_bicubic_matrix, bicubic_matrix
from ntk_prefix.peft import AdapterParam
from tests.models.calling import quick
from tests.models.recording import recorded

FIXTURES = Path(__file__).parents[1] / "fixtures" / "images"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
POOLING = {"deit-distilled": "cls+distillation", "dinov2": "cls+mean", "dinov2-registers": "cls+mean"}


pytestmark = pytest.mark.parametrize("x64", [False], indirect=True)


def error(ours: Any, theirs: np.ndarray) -> float:
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


# a distilled DeiT has all that these have
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("vit", "deit") else n for n in FAMILIES]
)
def test_families_are_those_of_transformers_and_ntk_attention_trains_two_steps(name: str) -> None:
    """Hidden states, and logits by the head in the file, of an image that wants new positions: before the first step."""
    theirs = recorded(FIXTURES / name)
    classify = "logits" in theirs
    options: dict[str, Any] = {} if classify else {"num_labels": 3}
    model = models.from_pretrained(FIXTURES / name, "image-classification", **options)
    assert model.pooling == POOLING.get(name, "cls")
    peft.apply(model, peft.NTKAttentionConfig())
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=AdapterParam)
    pixels, labels = jnp.asarray(theirs["pixel_values"], jnp.float32), jnp.asarray([0, 2])

    @quick
    def step(state: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)

        def loss(model: Any) -> Any:
            output = model(pixels)
            return optax.softmax_cross_entropy_with_integer_labels(output.logits, labels).mean(), output

        (value, output), grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam), has_aux=True)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value, output, grads

    graph, state = nnx.split((model, optimizer))
    state, first, output, grads = step(state)
    assert error(output.last_hidden_state, theirs["last_hidden_state"]) <= 1e-5
    assert error(output.last_hidden_state, np.roll(theirs["last_hidden_state"], 1, axis=1)) > 0.1  # the control
    if classify:
        assert error(output.logits, theirs["logits"]) <= 1e-5
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)
    state, second, output, _ = step(state)
    assert second < first
    assert error(output.last_hidden_state, theirs["last_hidden_state"]) > 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_are_normalized_as_the_folders_preprocessor_does(name: str) -> None:
    found, theirs = models.image_normalization(FIXTURES / name), recorded(FIXTURES / name)
    assert found is not None
    ours = (theirs["image"] / 255 - np.asarray(found.mean)) / np.asarray(found.std)
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6)


def changed(folder: Path, name: str, drop: str = "", **config: Any) -> Path:
    tensors = {key: value for key, value in load_file(FIXTURES / name / "model.safetensors").items() if key != drop}
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((FIXTURES / name / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deit-distilled", {"drop": "distillation_classifier.bias"}, "two heads with a bias each"),
        ("deit", {"drop": "deit.embeddings.distillation_token"}, "missing: embeddings.distillation_token"),
        ("deit", {"model_type": "vit"}, r"missing: embeddings\.cls_token"),
        ("dinov2-registers", {"num_register_tokens": 4}, r"register_tokens expected \(1, 4, 16\), got \(1, 3, 16\)"),
        ("dinov2-registers", {"num_register_tokens": -1}, "num_register_tokens"),
        ("dinov2-giant", {"use_swiglu_ffn": False}, "missing"),
        ("dinov2-giant", {"mlp_ratio": 3}, r"config's shapes"),
    ],
)
def test_files_that_do_not_fit_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        models.from_pretrained(changed(tmp_path, name, **change))


def test_a_head_on_two_states_is_for_models_that_have_them_and_another_is_new() -> None:
    with pytest.raises(UsageError, match="pooling: expected one of"):
        models.from_pretrained(FIXTURES / "vit", "image-classification", num_labels=3, pooling="cls+distillation")
    model = models.from_pretrained(FIXTURES / "dinov2", "image-classification", num_labels=3, pooling="cls")
    assert model.head.kernel.shape == (16, 3)
    peft.apply(model, peft.PrefixPropagationConfig(num_prefix_tokens=2))
    assert jax.eval_shape(model, jnp.ones((1, 8, 8, 3))).logits.shape == (1, 3)
    model = peft.apply(
        models.from_pretrained(FIXTURES / "dinov2", "image-classification"),
        peft.PrefixPropagationConfig(num_prefix_tokens=2),
    )
    with pytest.raises(UsageError, match="a head on one state beside leading rows"):
        jax.eval_shape(model, jnp.ones((1, 8, 8, 3)))


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 7), (9, 4), (5, 1)])
def test_antialiased_resampling_keeps_constants_and_is_another_map(old: int, new: int) -> None:
    matrix = antialiased_bicubic_matrix(old, new)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert np.allclose(matrix, bicubic_matrix(old, new)) == (old == new)
