"""The folder of a run: what stands in it, read by schema, and whose it is.

config.json      what was asked for          checkpoints/     adapter, optimizer, step; the last two
metrics.jsonl    what was seen on the way    adapter/         the best adapter, in Hugging Face form
summary.json     the result, with versions and commit
data.json        what tells its rows from others under the same name: see train.fingerprint
answers.jsonl    of a language task: what was generated, before and after
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import msgspec

from ntk_prefix.artifacts import append, decode_json, held, json_text, read_json, write_whole
from ntk_prefix.checks import NonFiniteError, UsageError, expected
from train.config import TrainConfig

__all__ = ["Metrics", "RunFolder", "Summary", "other_rows", "read_summary"]

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1.001)]  # means of float32 numbers, rounded
Loss = Annotated[float, msgspec.Meta(ge=0)]


class Summary(TypedDict):
    """What of a summary.json the programs read; more stands in it, for people and for the record."""

    metric: str
    test_score: Share | None
    test_rows: Count | None
    validation_score: Share
    validation_loss: Loss
    steps: Count
    trainable_parameters: Count
    parameters: Count
    peak_memory_bytes: Count
    config: dict[str, Any]
    test_loss: NotRequired[Loss | None]
    test_score_before: NotRequired[Share | None]
    test_loss_before: NotRequired[Loss | None]
    test_last_number: NotRequired[Share | None]
    test_last_number_before: NotRequired[Share | None]
    forgetting: NotRequired[float | None]
    seconds_a_step: NotRequired[Loss | None]
    adapter_bytes: NotRequired[Count | None]
    macro_f1: NotRequired[Share | None]
    calibration_error: NotRequired[Share | None]
    calibration_error_scaled: NotRequired[Share | None]
    temperature: NotRequired[Loss | None]
    reliability: NotRequired[list[Reliability]]
    identification: NotRequired[dict[str, Share]]
    right: NotRequired[dict[str, str]]
    agreement: NotRequired[Agreement | None]


class Agreement(TypedDict):
    """Of a ranker with people, as :func:`train.ranking_measures.agreement`."""

    agree: Count
    of: Count


class Reliability(TypedDict):
    """Rows of like confidence, as :class:`train.confidence.Bin`."""

    rows: Count
    confidence: Share
    accuracy: Share


def read_summary(path: Path) -> dict[str, Any]:
    """Return a summary.json, all of it, checked.

    Raises:
        NonFiniteError: a number was not finite, which older versions wrote as text.
        UsageError: it is not there, or is not one.
    """
    whole = read_json(path, dict[str, Any])
    for name, value in whole.items():
        if name in Summary.__annotations__ and value in ("nan", "inf", "-inf"):
            raise NonFiniteError(f"{path}: expected a finite {name}, got {value}.")
    try:
        msgspec.convert(whole, Summary)
    except msgspec.ValidationError as error:
        raise expected(str(path), "the summary of a run", f"this: {error}") from None
    return whole


ROWS = "data.json"


class _Rows(TypedDict):
    """What tells a run's rows from others."""

    sha256: str


def other_rows(folder: Path, rows: str | None) -> bool:
    """Return whether a folder's run is known to have read other rows.

    Args:
        folder: of a run.
        rows: :func:`~train.fingerprint.fingerprint` of those that there are now, None where that cannot be told.

    Raises:
        UsageError: a file that is damaged.
    """
    file = folder / ROWS
    return rows is not None and file.is_file() and read_json(file, _Rows)["sha256"] != rows


class RunFolder:
    """The folder of one run.

    Args:
        path: made if need be.

    Raises:
        UsageError: its path is no text, which checkpoints cannot be written to.
    """

    def __init__(self, path: Path):
        try:
            os.fspath(path.absolute()).encode()
        except UnicodeEncodeError:
            raise expected(
                "--workdir",
                "a path that is UTF-8",
                repr(os.fspath(path)),
                "Rename it, or set PYTHONUTF8=1 if it is UTF-8",
            ) from None
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.summary = path / "summary.json"
        self.config = path / "config.json"
        self.metrics = Metrics(path / "metrics.jsonl")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, which ends with this process however it ends; of several processes of a job the first does.

        Raises:
            UsageError: another run holds it.
        """
        if jax.process_index() != 0:
            yield
            return
        with held(self.path / ".lock", "--workdir"):
            yield

    def finished(self, config: TrainConfig, rows: str | None = None) -> dict[str, Any] | None:
        """Return the summary if this run is finished here, test split included if that is asked for.

        More steps than the folder's run had are no other run: it goes on from its last checkpoint.

        Args:
            config: of the run.
            rows: :func:`~train.fingerprint.fingerprint` of its data, None where that cannot be told.

        Raises:
            UsageError: the folder has another configuration's run, or one on other rows, or a file that is damaged.
        """
        ran = summary = None
        if self.summary.is_file():
            summary = read_summary(self.summary)
            ran = TrainConfig.from_dict(summary["config"], str(self.summary))
        there = TrainConfig.from_file(self.config) if self.config.is_file() else ran
        if there is not None:
            # whether the test split is read changes nothing of what is trained
            before, wanted = there.flat(), config.changed(test=there.eval.test).flat()
            if config.optim.steps > there.optim.steps:
                before["steps"] = config.optim.steps
            if changed := sorted(name for name in wanted if before[name] != wanted[name]):
                raise expected(
                    "--workdir",
                    "a new folder, or one of this configuration",
                    f"{self.path}, which differs in {', '.join(changed)}",
                    "Name another folder",
                )
            if other_rows(self.path, rows):
                raise expected(
                    "--workdir",
                    "a new folder, or one of a run on these rows",
                    f"{self.path}, whose run read {config.data.data_dir} before it changed",
                    "Name another folder",
                )
        if summary is None or ran is None or ran.optim.steps < config.optim.steps:
            return None
        return None if config.eval.test and summary["test_score"] is None else summary

    def earlier_peak_memory(self) -> int:
        """Return the peak memory of a process that trained and left the rest, such as the test split, to this one."""
        return read_summary(self.summary)["peak_memory_bytes"] if self.summary.is_file() else 0

    def write_config(self, config: TrainConfig, rows: str | None = None) -> None:
        """Take the folder for a configuration, and for its rows if they can be told from others."""
        if rows is not None:
            write_whole(self.path / ROWS, json_text({"sha256": rows}).encode())
        write_whole(self.config, json_text(config.as_dict()).encode())

    def write_answers(self, columns: dict[str, Any]) -> None:
        """Write a line for each row of a language task."""
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        text = "".join(json_text(row, indent=None) for row in rows)
        write_whole(self.path / "answers.jsonl", text.encode())


class Metrics:
    """A metrics.jsonl: appended on the way, on disk when a checkpoint says so, cut back to it when a run goes on.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, **values: float) -> None:
        """Write a line.

        Raises:
            NonFiniteError: naming the value.
        """
        append(self.path, json_text(values, indent=None))

    def sync(self) -> int:
        """Put all lines onto the disk and return their length in bytes."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut(self, length: int, step: int) -> str | None:
        """Cut back to what a checkpoint saw, never lengthen; of a damaged file keep the whole lines.

        Args:
            length: bytes, as :meth:`sync` returned them.
            step: of the checkpoint; later lines are left out.

        Returns:
            What was found damaged, for a person; None where nothing was.
        """
        if not self.path.exists():
            return None if length == 0 else f"{self.path} is gone: it is begun anew"
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            content = file.read(min(length, size))
        lines = content.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and _line(line, step) is not None]
        if size >= length and len(whole) == len(lines):
            with self.path.open("r+b") as file:
                file.truncate(length)
            return None
        write_whole(self.path, b"".join(whole))
        return f"{self.path} is damaged, or shorter than at the checkpoint: {len(whole)} whole lines of it are kept"

    def clear(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)

    def seconds_a_step(self) -> float | None:
        """Return the median of all that was logged, by earlier processes too; None without any."""
        if not self.path.exists():  # not the first process, which alone writes
            return None
        lines = [_line(line, None) for line in self.path.read_bytes().splitlines()]
        seconds = [line["seconds_a_step"] for line in lines if line and "seconds_a_step" in line]
        return statistics.median(seconds) if seconds else None


class _Line(TypedDict):
    step: Count
    seconds_a_step: NotRequired[Loss]


def _line(content: bytes, last: int | None) -> _Line | None:
    """Return a line of a metrics.jsonl up to a step, None for anything else."""
    try:
        decode_json(content, dict[str, float], "metrics.jsonl")
        found = decode_json(content, _Line, "metrics.jsonl")
    except UsageError:
        return None
    return None if last is not None and found["step"] > last else found
