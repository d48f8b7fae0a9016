"""Every method with every flag through a whole run: two steps of a tiny encoder on four devices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from train.config import METHODS, TrainConfig
from train.loop import run

KEPT = Path(__file__).parents[1] / "fixtures" / "a340712"

FLAGS: dict[str, dict[str, Any]] = {
    "remat, accumulate, fsdp": {"remat": True, "accumulate": 2, "fsdp": 2, "devices": 4},
    "bfloat16, pmap": {"precision": "bfloat16", "parallel": "pmap", "devices": 4},
    "window, remat": {"window": 3, "remat": True, "devices": 1},
}
"""Together they have every flag; a program is compiled for each."""


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("method", METHODS)
def test_runs(method: str, flags: str, tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(KEPT / "bert"),
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
        **FLAGS[flags],
    )
    summary = run(config, tmp_path)
    assert summary["steps"] == 2
    assert np.isfinite(summary["validation_loss"])
    assert summary["config"]["method"] == method
