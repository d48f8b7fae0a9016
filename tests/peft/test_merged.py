"""A model with its adapter merged, as a Hugging Face folder: what is in it is what the adapter computed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file, save_file

from ntk_prefix import models, peft
from tests.models import formulas
from tests.models.calling import call

ENCODERS = Path(__file__).parents[1] / "fixtures" / "encoders"

IDS = np.random.default_rng(0).integers(3, 20, (2, 7))
LORA = peft.LoraConfig(r=2, alpha=4)


def folder(kind: str, path: Path) -> Path:
    """Return a checkpoint of a kind: decoders in two shards, the others as Hugging Face wrote them."""
    if kind != "llama":
        return ENCODERS / kind
    config = formulas.CONFIGS["llama"]
    return formulas.write(path / "base", config, formulas.draw(config), shards=2)


def adapted(base: Path, task: str | None, config: peft.AdapterConfig = LORA, **options: object):
    model = models.from_pretrained(base, task, **options)
    peft.apply(model, config)
    for _, module in nnx.iter_modules(model):
        for name, x in vars(module).items():
            if isinstance(x, peft.AdapterParam):
                x[...] = x[...] + 0.1 * np.random.default_rng(len(name)).normal(size=x.shape).astype(np.float32)
    return model


def answer(model):
    result = call(model, IDS, np.ones_like(IDS))
    logits = getattr(result, "logits", None)
    return np.asarray(result.last_hidden_state if logits is None else logits)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for file in path.glob("model*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "causal-lm"), ("roberta", "sequence-classification"), ("modernbert", None), ("distilbert", None)],
)
def test_a_folder_is_the_model_with_its_adapter(kind: str, task: str | None, tmp_path: Path) -> None:
    base, out = folder(kind, tmp_path), tmp_path / "out"
    model = adapted(base, task)
    wanted = answer(model)
    bare = answer(models.from_pretrained(base, task))
    written = peft.save_merged(model, base, out)
    found = answer(models.from_pretrained(out, task))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(found - bare).max() > 1e-2 * np.abs(wanted).max()  # the control: the adapter does something
    before, after = tensors(base), tensors(out)
    same = {name for name in before.keys() & after.keys() if np.array_equal(before[name], after[name])}
    assert same == before.keys() & after.keys() - set(written)
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    if kind == "llama":
        places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert places == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_weights_stay_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    base, out = folder("llama", tmp_path), tmp_path / "out"
    for file in base.glob("*.safetensors"):
        save_file({name: x.astype(jnp.bfloat16) for name, x in load_file(file).items()}, file)
    model = adapted(base, "causal-lm")
    wanted = answer(model)
    peft.save_merged(model, base, out)
    assert {x.dtype for file in out.glob("*.safetensors") for x in load_file(file).values()} == {jnp.dtype("bfloat16")}
    # a changed weight is rounded once
    np.testing.assert_allclose(
        answer(models.from_pretrained(out, "causal-lm")), wanted, atol=2**-6 * np.abs(wanted).max()
    )


def test_a_head_that_hugging_face_has_no_place_for_has_a_file(tmp_path: Path) -> None:
    base, out = folder("bert", tmp_path), tmp_path / "out"
    model = adapted(base, "sequence-classification", num_labels=2, pooling="mean")
    wanted = answer(model)
    peft.save_merged(model, base, out)
    head = load_file(out / peft.HEAD_FILE)
    hidden = answer(models.from_pretrained(out))
    np.testing.assert_allclose(
        hidden.mean(1) @ np.asarray(head["weight"]).T + np.asarray(head["bias"]), wanted, atol=1e-4
    )


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    base = folder("llama", tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError, match="directory: expected a new folder"):
        peft.save_merged(adapted(base, "causal-lm"), base, tmp_path / "used")
    with pytest.raises(ValueError, match="base: expected a Hugging Face folder"):
        peft.save_merged(adapted(base, "causal-lm"), tmp_path / "used", tmp_path / "out")
    with pytest.raises(ValueError, match="expected an adapter that is an addition to weights"):
        peft.save_merged(adapted(base, "causal-lm", peft.NTKAttentionConfig()), base, tmp_path / "out")
    other = ENCODERS / "distilbert"
    with pytest.raises(ValueError, match="base: expected the folder that the model was loaded from"):
        peft.save_merged(adapted(base, "causal-lm"), other, tmp_path / "other")
