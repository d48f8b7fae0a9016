"""The kernel view: what it says of a linear model, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from train import lazy
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
    seen = view(Options(**TINY, out=tmp_path), "head", 0, Console(quiet=True))
    assert seen.joint_score == seen.regression_score
    assert seen.eigenvalues.shape == (600,)
    blocks = seen.eigenvalues.reshape(60, 10)
    np.testing.assert_allclose(blocks, blocks[:, :1] + np.zeros(10), atol=1e-6 * seen.eigenvalues[0])
    assert seen.eigenvalues.sum() == pytest.approx(1)


def test_a_look_ends_in_a_figure_and_the_rate_that_validation_prefers(tmp_path: Path) -> None:
    main(Options(**TINY, methods=("lora",), seeds=1, out=tmp_path))
    document = json.loads((tmp_path / "lazy.json").read_text())
    (lora,) = document["views"]
    losses = {
        rate: json.loads((tmp_path / "runs" / f"tiny-lora-{rate:g}-0" / "summary.json").read_text())["validation_loss"]
        for rate in TINY["learning_rates"]
    }
    assert lora["learning_rate"] == min(losses, key=losses.get)
    assert len(set(losses.values())) == 2
    # control: blocks of equal eigenvalues are the head's alone
    assert np.ptp(np.reshape(lora["eigenvalues"], (60, 10)), axis=1).max() > 1e-3 * lora["eigenvalues"][0]
    assert (tmp_path / "lazy.png").stat().st_size > 1000


def test_looks_that_were_made_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def made(options: Options, method: str, seed: int, console: Console) -> lazy.View:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((method, seed))
        score = 0.5 + 0.1 * seed
        return lazy.View(method, seed, 7, np.array([3.0, 1.0]), 1e-3, score, score, 1e-2, score + 0.1)

    monkeypatch.setattr(lazy, "view", made)
    options = {**TINY, "methods": ("head", "lora"), "seeds": 2, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        main(Options(**options))
    asked_before = asked.copy()
    asked.clear()
    main(Options(**options))
    assert (asked_before, asked) == ([("head", 0), ("lora", 0), ("head", 1)], [("lora", 1)])
    assert len(json.loads((tmp_path / "lazy.json").read_text())["views"]) == 4
    with pytest.raises(ValueError, match="--out: expected a new folder"):
        main(Options(**options | {"steps": 5}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("lora", "magic")}, "--methods: expected some of .* got magic"),
        ({"seeds": 0}, "--seeds: expected at least one, got 0"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
