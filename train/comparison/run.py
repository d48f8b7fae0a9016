"""The cells of a table: each is ``python -m train --config FILE`` in a folder and a process of its own."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console

from ntk_prefix.artifacts import CHECKOUT, json_text, read_json, write_whole
from ntk_prefix.checks import NonFiniteError, UsageError, expected
from train.command import DIVERGED
from train.comparison.plan import Cell, Comparison
from train.config import TrainConfig
from train.folder import other_rows, read_summary

__all__ = ["CellError", "check_folder", "run_cell", "run_references"]

NOTHING: dict[str, Any] = {"validation_score": None, "validation_loss": None, "test_score": None, "diverged": True}
"""What a run that diverged has to say."""

CACHE_BYTES = 2**34
"""Of compiled programs that cells share. JAX writes its entries in place; only where there is a limit does it hold a lock
while it reads or writes, which keeps the cells of two concurrent tables from meeting halves of them."""


class CellError(UsageError):
    """A cell ended without a result, and did not diverge."""


def check_folder(comparison: Comparison, cell: Cell, rows: str | None = None) -> None:
    """Refuse a cell, finished or diverged, that this table would have run in another way.

    What differs may be a field of the table, or a default that has changed since, or the files of the rows.

    Args:
        comparison: whose it is.
        cell: of it.
        rows: :func:`~train.fingerprint.fingerprint` of its task's.

    Raises:
        UsageError: naming the fields.
    """
    folder = comparison.out / cell.folder
    begun = any((folder / name).exists() for name in ("summary.json", "diverged.txt", "checkpoints", "metrics.jsonl"))
    if not begun or not (folder / "config.json").is_file():
        return
    stored, wanted = TrainConfig.from_file(folder / "config.json").flat(), comparison.config(cell).flat()
    del wanted["test"]  # read when the rate is chosen
    if differs := sorted(name for name, value in wanted.items() if stored[name] != value):
        raise expected(
            "--out",
            "a new folder, or one of this table",
            f"{cell.folder} in {comparison.out}, which was run with "
            f"{', '.join(f'{name}={stored[name]}' for name in differs)}",
            "Name another folder",
        )
    if other_rows(folder, rows):
        found = f"{cell.folder} in {comparison.out}, which read {stored['data_dir']} before it changed"
        raise expected("--out", "a new folder, or one of a table of these rows", found, "Name another folder")


def run_cell(comparison: Comparison, cell: Cell, console: Console, *, test: bool) -> dict[str, Any]:
    """Run a cell, or read it.

    Args:
        comparison: whose it is.
        cell: of it.
        console: for what is said on the way.
        test: whether the test split is wanted.

    Returns:
        The summary of the run; :data:`NOTHING` of one that diverged.

    Raises:
        CellError: the run ended in another way; with the end of what it said.
        UsageError: a file of the cell is damaged.
    """
    folder = comparison.out / cell.folder
    diverged = folder / "diverged.txt"
    if not diverged.is_file() and _summary(comparison, cell, test) is None:
        begun = time.perf_counter()
        status, output = _train(comparison, cell, console, test=test)
        if status == DIVERGED:
            write_whole(diverged, output.encode())
        elif _summary(comparison, cell, test) is None:
            raise CellError(f"{cell.folder}: the run ended with {status}:\n{output[-2000:]}")
        console.print(f"{cell.folder}: {time.perf_counter() - begun:.0f} s", markup=False, highlight=False)
    found = None if diverged.is_file() else _summary(comparison, cell, test)
    return dict(NOTHING) if found is None else found


def _summary(comparison: Comparison, cell: Cell, test: bool) -> dict[str, Any] | None:
    """Return the cell's summary, None if it is not there or does not have the test split that is wanted."""
    path = comparison.out / cell.folder / "summary.json"
    if not path.is_file():
        return None
    try:
        found = read_summary(path)
    except NonFiniteError:  # an older version took a run for finished whose last update was not finite
        return dict(NOTHING)
    return None if test and found["test_score"] is None else found


def run_references(comparison: Comparison, task: str, console: Console) -> dict[str, dict[str, Any]]:
    """Return the rows of a task for which nothing is trained, as summaries by their names; what is finished is only read.

    Raises:
        CellError: they ended without a result; with the end of what was said.
    """
    folder = comparison.out / "references" / task
    folder.mkdir(parents=True, exist_ok=True)
    row = comparison.rows_of(task)[0]
    config = comparison.config(Cell(task, row, comparison.rates_of(row)[0], 0))
    write_whole(folder / "config.json", json_text(config.as_dict()).encode())
    paths = ["--config", str(folder / "config.json"), "--out", str(folder)]
    status, output = _process(comparison, ["train.ranking_references", *paths], f"references of {task}", console)
    if status:
        raise CellError(f"references of {task}: they ended with {status}:\n{output[-2000:]}")
    return {
        name: {
            "test_score": statistics.fmean(found["identification"].values()),
            "test_rows": found["rows"],
            "validation_score": None,
            **found,
        }
        for name, found in read_json(folder / "references.json", dict[str, Any])["rows"].items()
    }


def _train(comparison: Comparison, cell: Cell, console: Console, *, test: bool) -> tuple[int, str]:
    """Train a cell in a process of its own; return its exit status and what it said."""
    folder = comparison.out / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = comparison.config(cell)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, test=test))
    write_whole(folder / "config.json", json_text(config.as_dict()).encode())
    paths = ["--config", str(folder / "config.json"), "--workdir", str(folder)]
    return _process(comparison, ["train", *paths], str(cell.folder), console)


def _process(comparison: Comparison, module: list[str], name: str, console: Console) -> tuple[int, str]:
    """Run a module with its arguments in a process of its own; return its exit status and what it said."""
    command = [sys.executable, "-m", *module]
    # in the user's own folder, so that a path means there what it means here
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONSAFEPATH": "1",  # and a train.py there is not run in the place of this package
            "JAX_COMPILATION_CACHE_DIR": str((comparison.out / "compiled").resolve()),
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(CACHE_BYTES),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",  # whatever a library prints: what ended the run must not be lost to it
        process_group=0,  # Ctrl-C comes to us alone: a run that is asked to stop twice does not wait to save
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            console.print(f"{name} saves, then all stops", markup=False, highlight=False)
            process.terminate()
            process.communicate()
            raise
    return process.returncode, output
