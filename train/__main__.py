"""``python -m train``: fine-tune a pretrained transformer; run the same command again to go on."""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import sys
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.markup import escape

from train.config import CONFIGS, TrainConfig
from train.loop import Interrupted, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes, one job; on a TPU pod or under SLURM, --distributed is enough."""

    distributed: bool = False
    """Join the other processes before anything else."""
    coordinator: str | None = None
    """Address of process 0, such as 127.0.0.1:8476; found by itself where the platform tells."""
    processes: int | None = None
    """How many."""
    process: int | None = None
    """Which one this is."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Fine-tune one model on one task with one method."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    workdir: Path | None = None
    """Where the run's files go; runs/<task>-<method>-<seed> if not given."""
    job: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def main() -> int:
    """Parse, train, print what came out."""
    choices = {name: (text, Command(config)) for name, (text, config) in CONFIGS.items()}
    command = tyro.extras.overridable_config_cli(choices, prog="python -m train")
    config, job, console = command.config, command.job, Console()
    workdir = command.workdir or Path("runs") / f"{config.task}-{config.method}-{config.seed}"
    try:
        if job.distributed:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for processes without accelerators
            jax.distributed.initialize(job.coordinator, job.processes, job.process)
        summary = run(config, workdir, console)
    except Interrupted as stop:
        console.print(f"[yellow]{escape(str(stop))}[/]")
        return 0
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 2
    score = "test split not looked at"
    if summary["test_score"] is not None:
        score = f"{summary['metric']} {summary['test_score']:.4f} on {summary['test_rows']} test rows"
    if "calibration_error" in summary:
        score += f", calibration error {summary['calibration_error']:.3f}"
    console.print(
        f"[green]{score}[/] (validation {summary['validation_score']:.4f}); "
        f"{summary['trainable_parameters']:,} of {summary['parameters']:,} parameters trained; {workdir / 'summary.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
