"""Every method with every flag through a whole run: two steps of a tiny encoder on four devices."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from train.config import METHODS, TrainConfig
from train.loop import run

KEPT = Path(__file__).parents[1] / "fixtures" / "a340712"

FLAGS: dict[str, dict[str, Any]] = {
    "remat, accumulate, window, fsdp": {"remat": True, "accumulate": 2, "window": 3, "fsdp": 2},
    "bfloat16, pmap": {"precision": "bfloat16", "parallel": "pmap"},
}
"""Together they have every flag: most of the time is compilation, of a program for each."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BERT of one layer: the first of the one that is kept."""
    folder = shutil.copytree(KEPT / "bert", tmp_path_factory.mktemp("grid") / "bert")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    first = {name: value for name, value in tensors.items() if "layer.1." not in name}
    assert len(first) < len(tensors)
    save_file(first, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("method", METHODS)
def test_runs(method: str, flags: str, encoder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(encoder),
        task="sst2",
        method=method,
        data_dir=str(KEPT / "data" / "sst2"),
        # one length of text, so one program
        max_length=8,
        train_size=16,
        validation_size=8,
        batch_size=8,
        steps=2,
        evaluate_every=2,
        checkpoint_every=2,
        test=False,
        devices=4,
        **FLAGS[flags],
    )
    summary = run(config, tmp_path)
    assert summary["steps"] == 2
    assert np.isfinite(summary["validation_loss"])
    assert summary["config"]["method"] == method
