"""The kernel view: what it says of a linear model, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from train.lazy import Options, main, view

TINY = {
    "config": "tiny",
    "train_size": 60,
    "validation_size": 40,
    "test_size": 60,
    "steps": 4,
    "learning_rates": (1e-4, 1e-2),
}


def test_of_the_head_alone_there_is_one_kernel(tmp_path: Path) -> None:
    """Logits are linear in the head, each in its own weights: ten equal kernels, and nothing beside them."""
    seen = view(Options(**TINY, out=tmp_path), "head", Console(quiet=True))
    assert seen.joint_score == seen.regression_score
    assert seen.eigenvalues.shape == (600,)
    blocks = seen.eigenvalues.reshape(60, 10)
    np.testing.assert_allclose(blocks, blocks[:, :1] + np.zeros(10), atol=1e-6 * seen.eigenvalues[0])
    assert seen.eigenvalues.sum() == pytest.approx(1)


def test_a_look_ends_in_a_figure_and_the_rate_that_validation_prefers(tmp_path: Path) -> None:
    main(Options(**TINY, methods=("lora",), out=tmp_path))
    document = json.loads((tmp_path / "lazy.json").read_text())
    (lora,) = document["views"]
    losses = {
        rate: json.loads((tmp_path / "runs" / f"tiny-lora-{rate:g}" / "summary.json").read_text())["validation_loss"]
        for rate in TINY["learning_rates"]
    }
    assert lora["learning_rate"] == min(losses, key=losses.get)
    assert len(set(losses.values())) == 2
    # control: blocks of equal eigenvalues are the head's alone
    assert np.ptp(np.reshape(lora["eigenvalues"], (60, 10)), axis=1).max() > 1e-3 * lora["eigenvalues"][0]
    assert (tmp_path / "lazy.png").stat().st_size > 1000
