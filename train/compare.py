"""``python -m train.compare``: methods x tasks x seeds, one table and one figure; run it again to go on.

Each cell is one run of ``python -m train`` in a folder and a process of its own: a crash costs one cell, memory is
measured for each, and a finished cell is never run again. Every row gets the same tuning budget: the same grid of
learning rates, one run each with the first seed; the rate with the best *validation* score is then run with the other
seeds. The test split is looked at for the chosen rate only.

Two processes may fill one folder with different tasks or rows; the table is then written by running it once more for all.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ntk_prefix.artifacts import CHECKOUT, json_text, provenance, write_whole
from ntk_prefix.checks import UsageError
from train.command import typed_changes
from train.confidence import BINS
from train.config import CONFIGS, FIELD_TYPES, TrainConfig
from train.profiles import PROFILES, Name, Row
from train.sources import find_folder

MIN_ROWS = 10
"""Bins of fewer rows are left out of the reliability diagram: their accuracy is chance."""

LABEL_DECADES = 2
"""How far a label of the figure reaches to its side."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    row: Row
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies, in the table's folder."""
        return Path("cells", self.task, self.row[0].replace(" ", "_"), f"{self.learning_rate:g}-seed{self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods x tasks x seeds, one table, one figure."""

    profile: Name = "small"
    """small: samples sized for four hours of two cores; confirm: its rows of equal count on test rows that it has not
    read; full: all data and two more tasks, for a GPU; ablation: parts of NTK-Attention; math and math_short: SmolLM2 on
    all kinds of generated problems and on eight short ones; long and long_full: small and full for long documents, sized
    for three hours."""
    tasks: tuple[str, ...] = ()
    """Some of the profile's tasks; all for none."""
    rows: tuple[str, ...] = ()
    """Some of the rows, by label; all for none."""
    seeds: int | None = None
    """How many; the profile's own (3, or 1 for mathematics) if None."""
    grid: tuple[float, ...] = ()
    """Learning rates that every row is tuned over; the profile's own for none."""
    data_dir: Path | None = None
    """A folder with data sets; tasks that are not in it come from the assets."""
    set: tuple[str, ...] = ()
    """field=value pairs of TrainConfig that every cell gets, such as steps=20."""
    out: Path = Path("runs/compare")
    """Folder of the table and its cells."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, before the first cell."""
        tasks = PROFILES[self.profile].tasks
        if unknown := set(self.tasks) - set(tasks):
            raise UsageError(f"--tasks: expected some of {', '.join(tasks)}, got {', '.join(sorted(unknown))}.")
        labels = {row[0] for task in self.chosen_tasks() for row in PROFILES[self.profile].rows_of(task)}
        if unknown := set(self.rows) - labels:
            raise UsageError(f"--rows: expected some of {sorted(labels)}, got {sorted(unknown)}.")
        if self.seeds is not None and self.seeds < 1:
            raise UsageError(f"--seeds: expected at least one, got {self.seeds}.")
        typed_changes("--set", self.set, FIELD_TYPES)
        for task in self.chosen_tasks():
            for row in self.rows_of(task):
                self.config(Cell(task, row, self.rates[0], 0))

    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks of this table."""
        return self.tasks or tuple(PROFILES[self.profile].tasks)

    def rows_of(self, task: str) -> list[Row]:
        """The rows of a task."""
        return [row for row in PROFILES[self.profile].rows_of(task) if not self.rows or row[0] in self.rows]

    @property
    def repeats(self) -> int:
        """The number of seeds."""
        return self.seeds or PROFILES[self.profile].seeds

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid."""
        return self.grid or PROFILES[self.profile].grid

    def fields(self, cell: Cell) -> dict[str, Any]:
        """The configuration of a cell, beyond its task's own."""
        here = self.data_dir is not None and find_folder(CONFIGS[cell.task][1].task, self.data_dir) is not None
        return {
            **PROFILES[self.profile].shared,
            **PROFILES[self.profile].tasks[cell.task],
            "method": cell.row[1],
            "adapter": cell.row[2],
            "learning_rate": cell.learning_rate,
            # where the head is all there is, it is what is tuned
            **({"head_learning_rate": cell.learning_rate} if cell.row[1] == "head" else {}),
            "seed": cell.seed,
            **({"data_dir": str(self.data_dir)} if here else {}),
            **typed_changes("--set", self.set, FIELD_TYPES),
        }

    def config(self, cell: Cell) -> TrainConfig:
        """Return the configuration of a cell."""
        return CONFIGS[cell.task][1].changed(**self.fields(cell))


def compare(comparison: Comparison, console: Console) -> list[dict[str, Any]]:
    """Run what is not there yet, write table and figure after every row, and return the table's lines.

    Raises:
        ValueError: the folder has a cell of another configuration; before any cell is run.
        RuntimeError: a cell that ended without a result and did not diverge.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    pairs = [(task, row) for task in comparison.chosen_tasks() for row in comparison.rows_of(task)]
    for (task, row), rate, seed in itertools.product(pairs, comparison.rates, range(comparison.repeats)):
        _check(comparison, Cell(task, row, rate, seed))
    each = len(comparison.rates) + comparison.repeats
    lines: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=each * len(pairs))
        for task, row in pairs:
            finished: dict[Cell, dict[str, Any]] = {}
            for cell, test in _cells(comparison, task, row, finished):
                progress.update(bar, description=f"{task} {row[0]} {cell.learning_rate:g} seed {cell.seed}")
                finished[cell] = _run(comparison, cell, progress.console, test=test)
                progress.advance(bar)
            lines.append(_line(task, row, finished, _best_rate(comparison, finished)))
            write_whole(comparison.out / "table.json", json_text(_document(comparison, lines)).encode())
            write_whole(comparison.out / "table.md", _markdown(comparison, lines).encode())
            draw(lines).savefig(comparison.out / "table.png", dpi=150)
            if any(line["reliability"] for line in lines):
                draw_reliability(lines).savefig(comparison.out / "reliability.png", dpi=150)
    return lines


def _cells(
    comparison: Comparison, task: str, row: Row, finished: dict[Cell, dict[str, Any]]
) -> Iterator[tuple[Cell, bool]]:
    """The grid with the first seed, then the best rate with all seeds; whether the test split is looked at."""
    for rate in comparison.rates:
        yield Cell(task, row, rate, 0), False
    best = _best_rate(comparison, finished)
    for seed in range(comparison.repeats):
        yield Cell(task, row, best, seed), True


def _best_rate(comparison: Comparison, finished: dict[Cell, dict[str, Any]]) -> float:
    """The rate that is best by what also says which step of a run is kept."""
    tuned = {cell: summary for cell, summary in finished.items() if cell.seed == 0}

    def worth(cell: Cell) -> float:
        judge = comparison.config(cell).eval
        return judge.selection_metric(tuned[cell]["validation_score"], tuned[cell]["validation_loss"])

    return max(tuned, key=worth).learning_rate


def _check(comparison: Comparison, cell: Cell) -> None:
    """Refuse a cell, finished or diverged, that this table would have run in another way: whatever says so, a field of
    the table or a default that has changed since.
    """
    path = comparison.out / cell.folder / "config.json"
    if not path.is_file():
        return
    stored, wanted = TrainConfig.from_file(path).flat(), comparison.config(cell).flat()
    del wanted["test"]  # read when the rate is chosen
    if differs := sorted(name for name, value in wanted.items() if stored[name] != value):
        raise UsageError(
            f"--out: expected a new folder, or one of this table, got {cell.folder} in {comparison.out}, which was run with "
            f"{', '.join(f'{name}={stored[name]}' for name in differs)}. Name another folder."
        )


def _run(comparison: Comparison, cell: Cell, console: Console, *, test: bool) -> dict[str, Any]:
    """Run a cell, or read it; a run that diverged counts as a score of 0, said in the table."""
    folder = comparison.out / cell.folder
    summary, failed = folder / "summary.json", folder / "diverged.txt"

    def finished() -> bool:
        return summary.is_file() and (not test or json.loads(summary.read_text())["test_score"] is not None)

    if not finished() and not failed.is_file():
        arguments = ["--test" if test else "--no-test"]
        for name, value in comparison.fields(cell).items():
            values = [str(entry) for entry in value] if isinstance(value, tuple) else [str(value)]
            if values:
                arguments += [f"--{name.replace('_', '-')}", *values]
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "train", cell.task, *arguments, "--workdir", str(folder)],
            cwd=CHECKOUT,
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": str((comparison.out / "compiled").resolve()),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # Ctrl-C comes to us alone: a run that is asked to stop twice does not wait to save
        ) as process:
            try:
                output, _ = process.communicate()
            except KeyboardInterrupt:
                console.print(f"{cell.folder} saves, then all stops")
                process.terminate()
                process.communicate()
                raise
        if process.returncode and "finite loss" in output:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(failed, output.encode())
        elif not finished():
            raise RuntimeError(f"{cell.folder}: the run ended with {process.returncode}:\n{output[-2000:]}")
        console.print(f"{cell.folder}: {time.perf_counter() - begun:.0f} s")
    if failed.is_file():
        return {"validation_score": 0.0, "validation_loss": float("inf"), "test_score": 0.0, "diverged": True}
    return json.loads(summary.read_text())


def _line(task: str, row: Row, finished: dict[Cell, dict[str, Any]], rate: float) -> dict[str, Any]:
    """One line of the table: the runs of the chosen rate."""
    runs = [
        summary for cell, summary in sorted(finished.items(), key=lambda i: i[0].seed) if cell.learning_rate == rate
    ]
    scores = [run["test_score"] for run in runs]
    whole = [run for run in runs if not run.get("diverged")] or [{}]

    def median(name: str) -> Any:
        values = [run[name] for run in whole if run.get(name) is not None]
        return statistics.median(values) if values else None

    def mean(name: str) -> float | None:
        values = [run[name] for run in whole if run.get(name) is not None]
        return statistics.fmean(values) if values else None

    return {
        "task": task,
        "row": row[0],
        "method": row[1],
        "scores": scores,
        "mean": statistics.fmean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "diverged": sum(bool(run.get("diverged")) for run in runs),
        "learning_rate": rate,
        "grid": {f"{c.learning_rate:g}": s["validation_score"] for c, s in finished.items() if c.seed == 0},
        "trainable_parameters": median("trainable_parameters"),
        "test_rows": median("test_rows"),
        "before": mean("test_score_before"),
        "last_number_before": mean("test_last_number_before"),
        "last_number": mean("test_last_number"),
        "loss_before": mean("test_loss_before"),
        "loss": mean("test_loss"),
        "seconds_a_step": median("seconds_a_step"),
        "peak_memory_bytes": median("peak_memory_bytes"),
        "adapter_bytes": median("adapter_bytes"),
        **{name: mean(name) for name in ("macro_f1", "calibration_error", "calibration_error_scaled", "temperature")},
        # of all seeds together: the bins add up
        "reliability": [[*b.values()] for run in whole for b in run.get("reliability", ())],
    }


def _document(comparison: Comparison, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "comparison": dataclasses.asdict(comparison),
        "lines": lines,
        **provenance("orbax-checkpoint", sources=("ntk_prefix/**/*.py", "train/*.py")),
    }


def _markdown(comparison: Comparison, lines: list[dict[str, Any]]) -> str:
    """The table, for people."""
    seeds = (
        f"Test score, mean and standard deviation over {comparison.repeats} seeds (each draws its own training sample, order "
        "and start)"
        if comparison.repeats > 1
        else "Test score of one seed"
    )
    about = (
        f"{seeds}; learning rate chosen on validation out of {', '.join(f'{r:g}' for r in comparison.rates)} with "
        "seed 0, marked * at an end of these: one beyond might be better; the head's is that of the task's configuration, "
        "but for the row that trains nothing else. Parameters include the head. Before: at the start, of language; the "
        "score is that of generated answers, right if the number marked ####, and last number if the last one, is; the "
        "loss is that of the true answers. Ahead by: the difference of the means and its "
        "standard error, the seeds of both rows taken as independent. Loss: mean cross entropy on the test rows. F1: macro; "
        f"ECE: expected calibration error, {BINS} bins of equal width; scaled: with a temperature from validation.\n"
    )
    ours = {line["task"]: line for line in lines if line["row"] == "ntk"}
    ends = (min(comparison.rates), max(comparison.rates))
    columns = {
        "task": [line["task"] for line in lines],
        "method": [line["row"] for line in lines],
        "before": [_number(line["before"], 0.01, 1) for line in lines],
        "score": [_number(line["mean"], 0.01, 1) for line in lines],
        "spread": [_number(line["spread"], 0.01, 1) for line in lines],
        "ntk is ahead by": [_lead(ours.get(line["task"]), line) for line in lines],
        "last number before": [_number(line["last_number_before"], 0.01, 1) for line in lines],
        "last number": [_number(line["last_number"], 0.01, 1) for line in lines],
        "loss before": [_number(line["loss_before"], 1, 3) for line in lines],
        "loss": [_number(line["loss"], 1, 3) for line in lines],
        "F1": [_number(line["macro_f1"], 0.01, 1) for line in lines],
        "ECE": [_number(line["calibration_error"], 0.01, 1) for line in lines],
        "ECE, scaled": [_number(line["calibration_error_scaled"], 0.01, 1) for line in lines],
        "parameters": [_whole(line["trainable_parameters"]) for line in lines],
        "learning rate": [f"{line['learning_rate']:g}{'*' * (line['learning_rate'] in ends)}" for line in lines],
        "s / step": [_number(line["seconds_a_step"], 1, 2) for line in lines],
        "peak memory, MiB": [_number(line["peak_memory_bytes"], 2**20, 0) for line in lines],
        "adapter, KiB": [_number(line["adapter_bytes"], 2**10, 0) for line in lines],
    }
    known = {name: values for name, values in columns.items() if set(values) != {"-"}}
    rows = [list(known), ["---"] * len(known), *map(list, zip(*known.values(), strict=True))]
    return "\n".join([about, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _lead(ours: dict[str, Any] | None, line: dict[str, Any]) -> str:
    """By how much the row "ntk" of the same task is better, in percentage points."""
    if ours is None or ours is line:
        return "-"
    lead = f"{100 * (ours['mean'] - line['mean']):+.1f}"
    if ours["spread"] is None or line["spread"] is None:
        return lead
    error = sum(each["spread"] ** 2 / len(each["scores"]) for each in (ours, line)) ** 0.5
    return f"{lead} ± {100 * error:.1f}"


def _whole(value: Any) -> str:
    return "-" if value is None else f"{int(value):,}"


def _number(value: Any, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Accuracy against trainable parameters, a panel a task; bars are one standard error."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for panel, task in zip(panels, tasks, strict=True):
        labels: list[tuple[float, float, str, str]] = []
        for line in (line for line in lines if line["task"] == task and line["trainable_parameters"]):
            error = 0.0 if line["spread"] is None else line["spread"] / len(line["scores"]) ** 0.5
            color = f"C{methods.index(line['method'])}"
            x, y = line["trainable_parameters"], 100 * line["mean"]
            panel.errorbar(x, y, 100 * error, fmt="o", color=color, capsize=3)
            labels.append((y, x, line["row"], color))
        counts = [x for _, x, _, _ in labels]
        # whole decades, so that methods of nearly equal size do not get an axis of their own, and room
        # for the labels on both sides
        lowest, highest = np.log10(min(counts, default=1)), np.log10(max(counts, default=1))
        limits = (10 ** np.floor(lowest - 0.7), 10 ** np.ceil(highest + 0.5))
        panel.set(
            title=task, xscale="log", xlim=limits, xlabel="trained parameters", ylabel="test score, %; bars: one SE"
        )
        panel.xaxis.set_minor_formatter(NullFormatter())
        # on the side where there is no other point; from below, one that would lie on another moves up
        line_height, placed = 0.04 * np.ptp(panel.get_ylim()), list[tuple[float, float, bool]]()
        for height, x, text, color in sorted(labels):
            left = any(1.1 * x < other < 10 * x for other in counts)
            for below, at, side in placed:
                if side == left and abs(np.log10(x / at)) < LABEL_DECADES:
                    height = max(height, below + line_height)
            placed.append((height, x, left))
            at, alignment = (x / 1.3, "right") if left else (1.3 * x, "left")
            panel.annotate(text, (at, height), ha=alignment, va="center", fontsize=8, color=color)
    return figure


def draw_reliability(lines: list[dict[str, Any]]) -> Figure:
    """Accuracy against confidence, a panel a task, all seeds together; the diagonal is what one would want."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", lw=1)
        for line in (line for line in lines if line["task"] == task and line["reliability"]):
            rows, confidence, accuracy = np.array(line["reliability"]).T
            # bins of the seeds lie side by side; merged again by where they are
            where = np.ceil(confidence * BINS)
            points = [
                [np.average(x[where == b], weights=rows[where == b]) for x in (confidence, accuracy)]
                for b in np.unique(where)
                if rows[where == b].sum() >= MIN_ROWS
            ]
            label = f"{line['row']}, ECE {100 * line['calibration_error']:.1f} %"
            panel.plot(*np.array(points).reshape(-1, 2).T, "o-", ms=4, lw=1, label=label)
        panel.set(title=task, xlabel="confidence", ylabel=f"accuracy; bins of {MIN_ROWS} rows or more")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    return figure


def main() -> int:
    """Parse, run, print the table."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the cell that is running saves
    try:
        comparison = tyro.cli(Comparison, prog="python -m train.compare")
        lines = compare(comparison, console)
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 2
    except KeyboardInterrupt:
        console.print("[yellow]stopped; what is finished is kept, and the same command goes on[/]")
        return 130
    table = Table("task", "method", "score", "spread", "parameters", "rate", "s / step")
    for line in lines:
        spread = "" if line["spread"] is None else f"{100 * line['spread']:.1f}"
        parameters = _whole(line["trainable_parameters"])
        seconds = _number(line["seconds_a_step"], 1, 2)
        table.add_row(
            line["task"],
            line["row"],
            f"{100 * line['mean']:.1f}",
            spread,
            parameters,
            f"{line['learning_rate']:g}",
            seconds,
        )
    console.print(table)
    console.print(f"{comparison.out / 'table.md'}, {comparison.out / 'table.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
