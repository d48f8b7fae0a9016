"""What a claim that was tested leaves: its entry in claims.json, its figure in three formats, and the curves behind it."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntk_prefix.artifacts import finite_or_none, json_text
from theory.claim import Check, Result

FORMATS = ("png", "svg", "pdf", "csv")
"""What is written of a figure: the picture, and as ``csv`` what it draws."""


class Row(TypedDict):
    """A check; numbers that are not finite are None."""

    what: str
    measured: float | None
    bound: float | None
    at_least: bool
    margin: float | None
    holds: bool


class ControlRecord(TypedDict):
    """A control."""

    name: str
    statement: str
    failed: bool
    checks: list[Row]


class Record(TypedDict):
    """A claim's entry; ``tightest`` is the check whose numbers stand at the top, ``undecided`` why there are none."""

    name: str
    statement: str
    source: str
    holds: bool
    undecided: str | None
    measured: float | None
    bound: float | None
    margin: float | None
    tightest: int | None
    control: str
    control_failed: bool
    controls: list[ControlRecord]
    seconds: float
    parameters: dict[str, int | float | str | list[int | float | None] | None]
    checks: list[Row]


def record_of(result: Result) -> Record:
    """Return the entry of a claim that was tested."""
    claim, evidence = result.claim, result.evidence
    checks = [_row(check) for check in evidence.checks]
    shown = None if evidence.tightest is None else checks[evidence.tightest]
    return {
        "name": claim.name,
        "statement": claim.statement,
        "source": claim.source + ("; inputs drawn from the seed, not those of --data" if result.drawn else ""),
        "holds": result.holds,
        "undecided": result.undecided,
        "measured": shown and shown["measured"],
        "bound": shown and shown["bound"],
        "margin": shown and shown["margin"],
        "tightest": evidence.tightest,
        "control": "; ".join(control.statement for control in claim.controls),
        "control_failed": result.controls_failed,
        "controls": [
            {
                "name": found.control.name,
                "statement": found.control.statement,
                "failed": found.failed,
                "checks": [_row(check) for check in found.checks],
            }
            for found in result.controls
        ],
        "seconds": result.seconds,
        "parameters": {name: _finite(value) for name, value in evidence.parameters.items()},
        "checks": checks,
    }


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the report takes from a claim that was tested: bytes, which any process may have made.

    Args:
        record: its :class:`Record`, as JSON.
        figure: by :data:`FORMATS`; empty if it is undecided.
    """

    record: bytes
    figure: dict[str, bytes]


def finish(result: Result) -> Finished:
    """Draw a claim that was tested and write it down."""
    record = json_text(record_of(result)).encode()
    if result.undecided is not None:
        return Finished(record, {})
    figure = result.claim.draw(result.evidence, result.drawn_from)
    found = {"csv": curves(figure).encode()}
    for kind, same in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        file = io.BytesIO()
        # names of clip paths come from it, at random unless it is set
        with mpl.rc_context({"svg.hashsalt": "ntk_prefix"}):
            figure.savefig(file, format=kind, metadata=same)
        found[kind] = file.getvalue()
    return Finished(record, found)


def curves(figure: Figure) -> str:
    """Return what a figure draws, as CSV: panel, curve, x and y; of bars their middle and height, of bands their outline."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["panel", "curve", "x", "y"])
    for number, axis in enumerate(figure.axes):
        panel = axis.get_title() or f"{number + 1}"
        for curve, points in _drawn(axis):
            write.writerows([panel, curve, f"{x:.10g}", f"{y:.10g}"] for x, y in points)
    return text.getvalue()


def _drawn(axis: Axes) -> Iterator[tuple[str, Any]]:
    for line in axis.lines:
        yield _name(line), np.asarray(line.get_xydata(), float)
    for bars in axis.containers:
        if patches := [bar for bar in bars if hasattr(bar, "get_height")]:
            yield _name(bars), [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in patches]
    for marks in axis.collections:
        offsets = np.ma.getdata(marks.get_offsets())
        if len(offsets) > 1:
            yield _name(marks), offsets
        else:
            for path in marks.get_paths():
                yield f"{_name(marks)}, outline", path.vertices
    for image in axis.images:
        values = np.asarray(image.get_array())
        for row, entries in enumerate(values if values.ndim == 2 else ()):
            yield f"row {row}", list(enumerate(entries))


def _name(artist: Any) -> str:
    """Return the legend's word for it, which Matplotlib makes up with an underscore in front where there is none."""
    return str(artist.get_label()).lstrip("_")


def _row(check: Check) -> Row:
    return {
        "what": check.what,
        "measured": finite_or_none(float(check.measured)),
        "bound": finite_or_none(float(check.bound)),
        "at_least": check.at_least,
        "margin": finite_or_none(float(check.margin)),
        "holds": check.holds,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return finite_or_none(value) if isinstance(value, float) else value
