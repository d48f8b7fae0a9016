"""Where a run's measurements go beside its ``metrics.jsonl``: a tracker is a class and a line of :data:`TRACKERS`.

``metrics.jsonl`` is always written, and is what a run goes on from. A tracker gets the same numbers under the same names, and
no number decides anything by it.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ntk_prefix.artifacts import write_whole
from ntk_prefix.checks import expected

__all__ = ["TRACKERS", "Log", "Tracker", "check_installed", "tracker"]

Log = Literal["jsonl", "tensorboard", "wandb"]
"""The names of :data:`TRACKERS`, for the command line."""


class Tracker(Protocol):
    """Takes what a run measures."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured at a step."""

    def close(self, result: Mapping[str, float] | None) -> None:
        """End; with the result of a run that is finished."""


class Nothing:
    """``metrics.jsonl`` is enough."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take nothing."""

    def close(self, result: Mapping[str, float] | None) -> None:
        """End."""


class TensorBoard:
    """Event files in the run's folder ``tensorboard``: ``tensorboard --logdir runs`` shows all runs beside one another."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        from tensorboardX import SummaryWriter

        # what an interrupted run logged after its last checkpoint is taken back
        purge = {"purge_step": step + 1} if step else {}
        self.writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".from-{step}", **purge)
        self.config = {name: x for name, x in config.items() if isinstance(x, bool | int | float | str)}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, result: Mapping[str, float] | None) -> None:
        """Put the configuration beside the result, for TensorBoard's table of runs."""
        if result:
            self.writer.add_hparams(self.config, dict(result), name="result")
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, called as its folder; WANDB_PROJECT, WANDB_MODE=offline and so on are wandb's own."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        import wandb

        # the same folder is the same run, also for a process that goes on with it
        kept = folder / "wandb-id"
        if not kept.is_file():
            write_whole(kept, uuid.uuid4().hex.encode())
        self.run = wandb.init(
            dir=str(folder), name=folder.name, config=dict(config), id=kept.read_text().strip(), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self.run.log(dict(values), step=step)

    def close(self, result: Mapping[str, float] | None) -> None:
        """Put the result into the run's summary."""
        self.run.summary.update(dict(result or {}))
        self.run.finish(exit_code=0 if result else 1)


TRACKERS: dict[str, tuple[Callable[[Path, Mapping[str, Any], int], Tracker], str | None]] = {
    "jsonl": (Nothing, None),
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
}
"""By name: what is made of a run's folder, its configuration and the step that it goes on from; the package it needs."""


def check_installed(name: str) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        UsageError: naming the command that installs it.
    """
    package = TRACKERS[name][1]
    try:
        importlib.import_module(package or "json")
    except ModuleNotFoundError:
        raise expected("--log", f"{package} for {name}", "no such package", f"pip install {package}") from None


def tracker(name: str, folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Return a tracker for a run that goes on from a step.

    Args:
        name: of :data:`TRACKERS`.
        folder: of the run.
        config: field -> value.
        step: the last one that is done.

    Raises:
        UsageError: its package is not installed.
    """
    check_installed(name)
    return TRACKERS[name][0](folder, config, step)
