"""``python -m train.plan``: compile the real training step for a TPU without one, and say what it takes and costs.

    python -m train.plan CONFIG --topology v5e:4x4 [--fsdp N ...] [--model-shape NAME|FILE] [--out DIR|FILE.json]

CONFIG and all flags of a run are those of ``python -m train``. No weights and no data are read: with ``--model-shape`` the
model is a name of a table or a config.json. The compiler is libtpu's (``pip install "ntk-prefix[tpu]"``), on this machine's
processor; nothing runs.

Exit status: 0 if it fits, 1 if it does not, 2 for what a user can mend; above 128 where the compiler ended by a signal.
"""

from __future__ import annotations

from train.plan.topology import Topology, set_environment
from train.plan.watch import watched

if __name__ == "__main__":
    watched("train.plan")
    set_environment()

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console

from ntk_prefix.artifacts import json_text, write_figure, write_whole
from ntk_prefix.checks import expected
from train.__main__ import parse_command
from train.command import Terminal, at_least, ended
from train.config import TrainConfig
from train.plan.plan import DOES_NOT_FIT, plan
from train.plan.report import show

__all__ = ["Command", "main"]


@dataclasses.dataclass(frozen=True)
class Command:
    """Plan one run."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    topology: str = "v5e:4x4"
    """What to compile for: a kind of chip and how many of them, such as v5e:4x4, v5p:2x2x2 or v6e:4x4."""
    model_shape: str | None = None
    """In place of the run's model: Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B, Gemma-2-9B, ViT-L/16, BERT-large, a config.json or
    its folder."""
    num_labels: int = 2
    """Classes of a classifier; no data is read to count them."""
    search: int = 3
    """Other batch sizes that may be compiled to find the largest that fits; 0 does not look for it."""
    out: Path | None = None
    """Where plan.json and plan.png go: a folder, or a file that ends in .json."""


def _plan(console: Console) -> int:
    about = "Say what a training run would take and cost on a TPU: its step is compiled for one, here."
    command = parse_command(Command, sys.argv[1:], "python -m train.plan", about)
    topology = Topology(command.topology)
    at_least("num_labels", command.num_labels, 1)
    at_least("search", command.search, 0)
    files = _files(command.out)
    result = plan(
        command.config,
        topology,
        shape=command.model_shape,
        num_labels=command.num_labels,
        search=command.search,
        console=console,
    )
    show(result, console)
    if files is not None:
        from train.plan.figure import draw

        document, picture = files
        write_whole(document, json_text(result).encode())
        write_figure(picture, draw(result), dpi=150)
        console.print(f"{document}, {picture}", markup=False, highlight=False, soft_wrap=True)
    return 0 if result["fits"] else DOES_NOT_FIT


def _files(out: Path | None) -> tuple[Path, Path] | None:
    """Return where the result and its figure go, the folder made: found out before anything long.

    Raises:
        UsageError: it cannot be.
    """
    if out is None:
        return None
    document = out if out.suffix == ".json" else out / "plan.json"
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise expected("--out", "a folder that can be made", f"{out}: {error.strerror}") from None
    if document.is_dir():
        raise expected("--out", "a file or a folder for plan.json", f"{document}, which is a folder")
    return document, document.with_suffix(".png")


def main() -> int:
    """Parse, compile, print."""
    console = Terminal()
    return ended(lambda: _plan(console), console)


if __name__ == "__main__":
    sys.exit(main())
