"""LoRA adapters as Hugging Face peft writes them, of every family it has: ``tests/fixtures/peft``.

Tolerance: 1e-5 of the largest logit in float32; theirs are computed in float64.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ntk_prefix import models, peft
from ntk_prefix.peft import AdapterParam
from tests.models.calling import call
from tests.models.drawing import draw_tensor

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures" / "peft"
ADAPTERS = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
QUICK = {"roberta", "modernbert", "vit", "llama-llama3"}


@pytest.fixture(autouse=True, params=[False], ids=["float32"])
def single_precision(request):
    with jax.enable_x64(request.param):
        yield


def base(name: str, folder: Path) -> Any:
    """Return the model that the adapter is of."""
    for kind, task in (("encoders", "sequence-classification"), ("images", "image-classification")):
        if (found := TESTS / "fixtures" / kind / name).is_dir():
            return models.from_pretrained(found, task)
    case = name.replace("-", " ")
    with np.load(TESTS / "models" / "decoders.npz") as file:
        config, shapes = str(file[f"{case}/config"]), json.loads(str(file[f"{case}/shapes"]))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    save_file({key: draw_tensor(key, tuple(shape)) for key, shape in shapes.items()}, folder / "model.safetensors")
    return models.from_pretrained(folder, "causal-lm")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ADAPTERS])
def test_an_adapter_of_peft_computes_the_same_here_and_is_written_as_peft_wrote_it(name: str, tmp_path: Path) -> None:
    """Names, shapes and numbers; a map that is several here is one adapter of a higher rank and the same product."""
    with np.load(FIXTURES / name / "recorded.npz") as file:
        recorded = dict(file)
    logits, frozen = recorded.pop("logits"), recorded.pop("frozen")
    given = {key: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32) for key, x in recorded.items()}
    model = peft.load_adapter(base(name, tmp_path / "model"), FIXTURES / name)
    largest = np.abs(logits).max()
    output = call(model, **given).logits
    np.testing.assert_allclose(output, logits, rtol=0, atol=1e-5 * largest)
    assert np.abs(output - frozen).max() > 1e-2 * largest  # the control

    peft.save_pretrained(model, tmp_path)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, FIXTURES / name))
    fused = {key for key in theirs if ".Wqkv." in key or ".Wi." in key}
    assert ours.keys() == theirs.keys()
    assert bool(fused) == (name == "modernbert")
    for key in theirs.keys() - fused:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    if not fused:
        return
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in (key for key in fused if ".lora_A." in key):
        module, other = (
            key.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight"),
            key.replace("A", "B"),
        )
        scale = fields["alpha_pattern"][module] / fields["rank_pattern"][module]
        np.testing.assert_allclose(scale * ours[other] @ ours[key], 1.5 * theirs[other] @ theirs[key], atol=1e-6)
    again = peft.load_adapter(base(name, tmp_path / "model"), tmp_path)
    first, second = (nnx.to_flat_state(nnx.state(m, AdapterParam)) for m in (model, again))
    assert [path for path, _ in first] == [path for path, _ in second]
    for (path, one), (_, two) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[...], two[...], err_msg=str(path))
