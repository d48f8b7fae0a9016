"""``python -m train``: fine-tune a pretrained transformer; run the same command again to go on.

    python -m train NAME [--flag value ...]             a named configuration
    python -m train --config FILE [--flag value ...]    the config.json of a run, or of a cell of a table

Exit status: 0, also of a run that was asked to stop and saved; 2 for what a user can mend; 3 for a run that diverged.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

from ntk_prefix.checks import UsageError, expected
from train import hub
from train.command import Terminal, ended, parsed
from train.config import CONFIGS, SECTION_OF, TrainConfig
from train.loop import Interrupted, run
from train.trackers import Log, check_installed
from train.unread import unread


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
    log: Log = "jsonl"
    """Where measurements go beside metrics.jsonl, which is always written: event files of TensorBoard, or Weights & Biases."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, owner/name, that the adapter and its model card are put into at the end."""
    job: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def without_sections(arguments: list[str]) -> list[str]:
    """Return a command line in which ``--optim.learning-rate`` is ``--learning-rate``: a field's name says its section."""

    def plain(argument: str) -> str:
        section, dot, rest = argument.removeprefix("--").partition(".")
        field = rest.partition("=")[0].removeprefix("no-").replace("-", "_")
        known = argument.startswith("--") and dot and SECTION_OF.get(field) == section
        return f"--{rest}" if known else argument

    return [plain(argument) for argument in arguments]


Parsed = TypeVar("Parsed")


def with_policy(arguments: list[str]) -> list[str]:
    """Return a command line in which ``--remat`` and ``--no-remat`` have a value: ``--remat dots`` has its own."""
    words = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        alone = argument in ("--remat", "--no-remat") and following.startswith("-")
        words.append(f"--remat={argument == '--remat'}" if alone else argument)
    return words


def refuse_meaningless(arguments: list[str], config: TrainConfig) -> None:
    """Refuse a flag that was given and that this task or this method would never look at.

    Raises:
        UsageError: naming the flag.
    """
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for field, what in unread(config).items():
        name = field.replace("_", "-")
        for flag in (f"--{name}", f"--no-{name}"):
            if flag in given:
                raise expected(flag, f"it left alone, since it means nothing to the {what}", "it")


def parse_command(kind: type[Parsed], arguments: list[str], prog: str, about: str) -> Parsed:
    """Return what a command line asks for, of a program that begins with a configuration's name or ``--config FILE``.

    Args:
        kind: a dataclass whose field ``config`` is a :class:`~train.config.TrainConfig`, the others with defaults.
        arguments: of the command line.
        prog, about: what --help calls the program, and says of it.

    Raises:
        UsageError: a value that cannot be meant.
        SystemExit: tyro's, for flags that it does not know and for --help.
    """
    arguments = with_policy(without_sections(arguments))
    make: Any = kind
    no_subcommands: Any = tyro.conf.AvoidSubcommands
    if arguments and arguments[0].partition("=")[0] == "--config":
        option, equals, file = arguments.pop(0).partition("=")
        if not equals:
            if not arguments:
                raise expected(option, "a config.json", "nothing")
            file = arguments.pop(0)
        base = make(TrainConfig.from_file(Path(file)))
        command: Any = parsed(
            lambda: tyro.cli(
                no_subcommands[kind],
                default=base,
                args=arguments,
                prog=f"{prog} --config FILE",
            )
        )
    else:
        choices = {name: (text, make(config)) for name, (text, config) in CONFIGS.items()}
        command = parsed(
            lambda: tyro.extras.overridable_config_cli(choices, prog=prog, args=arguments, description=about)
        )
    command.config.check()
    refuse_meaningless(arguments, command.config)
    return command


def parse(arguments: list[str]) -> Command:
    """Return what a command line asks for.

    Raises:
        UsageError: a value that cannot be meant.
        SystemExit: tyro's, for flags that it does not know and for --help.
    """
    about = (
        "Fine-tune a pretrained transformer; the same command goes on. --config FILE in place of a name: a config.json."
    )
    command = parse_command(Command, arguments, "python -m train", about)
    for name in ("coordinator", "processes", "process"):
        if not command.job.distributed and (value := getattr(command.job, name)) is not None:
            raise expected(f"--{name}", "--distributed beside it", value)
    return command


def _train(console: Console) -> int:
    command = parse(sys.argv[1:])
    config, job = command.config, command.job
    check_installed(command.log)
    if command.push_to_hub is not None:
        if config.method == "full":
            raise expected("--push-to-hub", "a method with an adapter", "full, which leaves none")
        hub.check(command.push_to_hub)
    workdir = command.workdir or Path("runs") / f"{config.task}-{config.method}-{config.seed}"
    if job.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for processes without accelerators
        try:
            jax.distributed.initialize(job.coordinator, job.processes, job.process)
        except (RuntimeError, ValueError) as error:  # JAX's ways of saying that the others were not found
            raise UsageError(f"--distributed: expected to find the other processes, got: {error}") from error
    try:
        summary = run(config, workdir, console, command.log)
    except Interrupted as stop:
        console.print(str(stop), style="yellow", markup=False)
        return 0
    score = "test split not read"
    if summary["test_score"] is not None:
        score = f"{summary['metric']} {summary['test_score']:.4f} on {summary['test_rows']} test rows"
    if "calibration_error" in summary:
        score += f", calibration error {summary['calibration_error']:.3f}"
    console.print(score, style="green", markup=False, end=" ")
    console.print(
        f"(validation {summary['validation_score']:.4f}); {summary['trainable_parameters']:,} of "
        f"{summary['parameters']:,} parameters trained; {workdir / 'summary.json'}",
        markup=False,
        soft_wrap=True,
    )
    if command.push_to_hub is not None and jax.process_index() == 0:
        said = f"{config.method} for {config.task}: {summary['metric']} {summary['validation_score']:.4f} on validation"
        console.print(hub.push(workdir / "adapter", command.push_to_hub, said), markup=False, soft_wrap=True)
    return 0


def main() -> int:
    """Parse, train, print what came out."""
    console = Terminal()
    return ended(lambda: _train(console), console)


if __name__ == "__main__":
    sys.exit(main())
