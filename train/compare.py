"""``python -m train.compare``: methods x tasks x seeds, one table and one figure; run it again to go on.

Each cell is one run of ``python -m train`` in a folder and a process of its own: a crash costs one cell, memory is
measured for each, and a finished cell is never run again. Every row gets the same tuning budget, unless the profile says
otherwise: the same grid of learning rates, one run each with the first seed; the rate with the best *validation* score is
then run with the other seeds. The test split is read for the chosen rate only. A run that diverged has no score, and the
table says so.

Two processes may fill one folder with different tasks or rows; the table is then written by running it once more for all.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ntk_prefix.artifacts import json_text, write_figure, write_whole
from train.command import Terminal, ended, parsed, resumable
from train.comparison import run
from train.comparison.figure import draw, draw_reliability
from train.comparison.plan import Cell, Comparison
from train.comparison.table import UNTRAINED, as_number, as_whole, document, markdown, table_line
from train.fingerprint import fingerprint
from train.profiles import PROFILES, Row

__all__ = ["Cell", "Comparison", "compare"]


def compare(comparison: Comparison, console: Console) -> list[dict[str, Any]]:
    """Run what is not there yet, write table and figure after every row, and return the table's lines.

    Raises:
        UsageError: the folder has a cell of another configuration, before any cell is run; or a cell ended without a
            result and did not diverge.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str | None], str | None] = {}
    for cell in comparison.grid_cells(seeds=comparison.repeats):
        config = comparison.config(cell)
        source = config.task, config.data.data_dir
        if source not in rows:
            rows[source] = fingerprint(*source)
        run.check_folder(comparison, cell, rows[source])
    pairs = comparison.pairs()
    untrained = [task for task in comparison.chosen_tasks if task in PROFILES[comparison.profile].references]
    lines: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=sum(_count(comparison, row) for _, row in pairs))
        for task, row in pairs:
            finished: dict[Cell, dict[str, Any]] = {}
            for cell, test in _cells(comparison, task, row, finished):
                name = escape(f"{task} {row[0]} {cell.learning_rate:g} seed {cell.seed}")
                progress.update(bar, description=name)
                finished[cell] = run.run_cell(comparison, cell, progress.console, test=test)
                progress.advance(bar)
            lines.append(table_line(task, row, finished, _best_rate(comparison, finished)))
            _write(comparison, lines)
        for task in untrained:
            progress.update(bar, description=f"references of {escape(task)}")
            for name, found in run.run_references(comparison, task, progress.console).items():
                row = (name, UNTRAINED, ())
                lines.append(table_line(task, row, {Cell(task, row, 0.0, 0): found}, 0.0))
            _write(comparison, lines)
    return lines


def _write(comparison: Comparison, lines: list[dict[str, Any]]) -> None:
    write_whole(comparison.out / "table.json", json_text(document(comparison, lines)).encode())
    write_whole(comparison.out / "table.md", markdown(comparison, lines).encode())
    write_figure(comparison.out / "table.png", draw(lines), dpi=150)
    if any(line["reliability"] for line in lines):
        write_figure(comparison.out / "reliability.png", draw_reliability(lines), dpi=150)


def _cells(
    comparison: Comparison, task: str, row: Row, finished: dict[Cell, dict[str, Any]]
) -> Iterator[tuple[Cell, bool]]:
    """Yield the grid with the first seed, then the best rate with all seeds; and whether the test split is read."""
    rates = comparison.rates_of(row)
    if len(rates) > 1:
        for rate in rates:
            yield Cell(task, row, rate, 0), False
    best = rates[0] if len(rates) == 1 else _best_rate(comparison, finished)
    for seed in range(comparison.repeats):
        yield Cell(task, row, best, seed), True


def _count(comparison: Comparison, row: Row) -> int:
    """Return how many cells a line is made of."""
    rates = len(comparison.rates_of(row))
    return comparison.repeats + (rates if rates > 1 else 0)


def _best_rate(comparison: Comparison, finished: dict[Cell, dict[str, Any]]) -> float:
    """Return the rate that is best by what also says which step of a run is kept; the lowest if all diverged."""
    tuned = {cell: summary for cell, summary in finished.items() if cell.seed == 0 and not summary.get("diverged")}
    if not tuned:
        return min(cell.learning_rate for cell in finished)

    def metric(cell: Cell) -> float:
        score, loss = tuned[cell]["validation_score"], tuned[cell]["validation_loss"]
        return comparison.config(cell).eval.selection_metric(score, loss)

    return max(tuned, key=metric).learning_rate


def _compare(console: Console) -> int:
    comparison = parsed(lambda: tyro.cli(Comparison, prog="python -m train.compare"))
    comparison.check()
    comparison.check_sources()
    return resumable(lambda: _show(compare(comparison, console), comparison.out, console), console)


def _show(lines: list[dict[str, Any]], out: Path, console: Console) -> None:
    table = Table("task", "method", "score", "spread", "parameters", "rate", "s / step")
    for line in lines:
        table.add_row(
            line["task"],
            escape(line["row"]),
            as_number(line["mean"], 0.01, 1) + (f", {line['diverged']} diverged" if line["diverged"] else ""),
            as_number(line["spread"], 0.01, 1),
            as_whole(line["trainable_parameters"]),
            f"{line['learning_rate']:g}",
            as_number(line["seconds_a_step"], 1, 2),
        )
    console.print(table)
    written = f"{out / 'table.md'}, {out / 'table.png'}"
    console.print(written, markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    """Parse, run, print the table."""
    console = Terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the cell that is running saves
    return ended(lambda: _compare(console), console)


if __name__ == "__main__":
    sys.exit(main())
