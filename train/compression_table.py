"""The results of ``python -m train.compare_compression``: a file of rows, a table, and one figure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.artifacts import json_text, read_bytes, write_whole
from ntk_prefix.checks import expected
from train.comparison.table import as_number, as_whole

__all__ = ["Results", "Row", "draw", "lines_of", "markdown"]

LARGEST = 2**28
"""Bytes of a file of rows."""


class Row(TypedDict):
    """One measurement: a method at a budget, on a prompt and a draw of texts."""

    prompt: str
    method: str
    budget: int
    """Anchors a key head; 0 of a method without one."""
    seed: int
    settings: str
    """A hash of all else that it depends on."""
    seconds: float
    cpu_seconds: float
    git: str
    numbers: NotRequired[int]
    numbers_a_head: NotRequired[float]
    """Per layer and key head, on average."""
    kl: NotRequired[float]
    """Mean over tokens; of an encoder, the relative square error of hidden states."""
    kl_error: NotRequired[float]
    """Standard error, texts being what is drawn."""
    kl_median: NotRequired[float]
    agreement: NotRequired[float | None]
    unrelated: NotRequired[float]
    unrelated_error: NotRequired[float]
    failed: NotRequired[str]
    """Why there are no numbers."""


class Results:
    """A file of rows, one a line: what is in it is there after a crash, but for a line that was being written.

    Args:
        file: that there is, or will be.

    Raises:
        UsageError: a line in it, other than the last, is no row.
    """

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[tuple[str, str, int, int, str], Row] = {}
        if not file.is_file():
            return
        whole, _, rest = read_bytes(file, LARGEST).rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=Row)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise expected(f"{file}, line {number}", "a row of results", error, "Name another folder") from None
            self.rows[_key(row)] = row
        if rest:  # the process ended within it
            write_whole(file, whole + b"\n" if whole else b"")

    def find(self, prompt: str, method: str, budget: int, seed: int, settings: str) -> Row | None:
        """Return a finished row."""
        return self.rows.get((prompt, method, budget, seed, settings))

    def add(self, row: Row) -> None:
        """Write a row down, onto the disk; one of the same key is replaced."""
        with self.file.open("ab") as file:
            file.write(json_text(dict(row), indent=None).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows[_key(row)] = row


def _key(row: Row) -> tuple[str, str, int, int, str]:
    return row["prompt"], row["method"], row["budget"], row["seed"], row["settings"]


def lines_of(rows: list[Row], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return the table's lines: means over the seeds, prompt by prompt, small budgets first.

    Args:
        rows: finished ones.
        labels: of the methods, in their order.
    """
    groups: dict[tuple[str, int, str], list[Row]] = {}
    order = list(labels)
    for row in sorted(rows, key=lambda row: (row["budget"], order.index(row["method"]), row["seed"])):
        groups.setdefault((row["prompt"], row["budget"], row["method"]), []).append(row)
    lines = []
    for (prompt, budget, method), each in groups.items():
        done: list[dict[str, Any]] = [dict(row) for row in each if "kl" in row]

        def mean(name: str, done: list[dict[str, Any]] = done) -> float | None:
            values: list[float] = [row[name] for row in done if row.get(name) is not None]
            return statistics.fmean(values) if values else None

        def error(name: str, done: list[dict[str, Any]] = done) -> float | None:
            """Return the standard error over seeds, or over texts if there is one."""
            if len(done) > 1:
                return statistics.stdev(row[name] for row in done) / len(done) ** 0.5
            return mean(f"{name}_error")

        lines.append(
            {
                "prompt": prompt,
                "method": method,
                "label": labels[method],
                "budget": budget,
                "seeds": len(done),
                "failed": [row["failed"] for row in each if "failed" in row],
                **{
                    name: mean(name)
                    for name in ("numbers", "numbers_a_head", "kl", "kl_median", "agreement", "unrelated")
                },
                **{f"{name}_error": error(name) for name in ("kl", "unrelated")},
                **{name: statistics.median(row[name] for row in each) for name in ("seconds", "cpu_seconds")},
            }
        )
    for line in lines:
        line["on_front"] = _on_front(line, lines)
    return sorted(lines, key=lambda line: list(dict.fromkeys(row["prompt"] for row in rows)).index(line["prompt"]))


def _on_front(line: dict[str, Any], lines: list[dict[str, Any]]) -> bool:
    """Return whether nothing of the same prompt is as small, to 2 %, and better: a token is that much less than an anchor."""
    if line["kl"] is None:
        return False
    rivals = [each for each in lines if each["prompt"] == line["prompt"] and each["kl"] is not None]
    return not any(each["numbers"] <= 1.02 * line["numbers"] and each["kl"] < line["kl"] for each in rivals)


def markdown(lines: list[dict[str, Any]], about: str, *, language: bool) -> str:
    """Return the table for people.

    Args:
        lines: of :func:`lines_of`.
        about: what was run, a sentence or more.
        language: whether the model has logits.
    """
    distance = "KL" if language else "error"

    def plus_minus(line: dict[str, Any], name: str, digits: int) -> str:
        spread = line[f"{name}_error"]
        return as_number(line[name], 1, digits) + ("" if spread is None else f" ± {spread:.{digits}f}")

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "prompt": lambda line: line["prompt"],
        "budget": lambda line: f"{line['budget'] or '-'}",
        "method": lambda line: f"**{line['label']}**" if line["on_front"] else line["label"],
        "numbers per head": lambda line: as_number(line["numbers_a_head"], 1, 0),
        "KiB": lambda line: as_whole(None if line["numbers"] is None else line["numbers"] / 256),
        distance: lambda line: plus_minus(line, "kl", 4) if line["kl"] is not None else "failed",
        "median": lambda line: as_number(line["kl_median"], 1, 4),
        "same first, %": lambda line: as_number(line["agreement"], 0.01, 1),
        "unrelated": lambda line: plus_minus(line, "unrelated", 3),
        "CPU s": lambda line: as_number(line["cpu_seconds"], 1, 0),
    }
    if not language:
        del columns["same first, %"]
    table = [list(columns), ["---"] * len(columns), *([of(line) for of in columns.values()] for line in lines)]
    failed = [
        f"{line['label']} at {line['budget']}, {line['prompt']}: {why}" for line in lines for why in line["failed"]
    ]
    text = [about, "", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join([*text, *(["", "Failed:", "", *(f"- {each}" for each in failed)] if failed else [])]) + "\n"


def draw(lines: list[dict[str, Any]], *, language: bool) -> Figure:
    """Return the figure: distance against KiB, a panel for each prompt, a line for each method, named at its end."""
    prompts = list(dict.fromkeys(line["prompt"] for line in lines))
    figure = Figure(figsize=(7.2 * len(prompts), 5.4), layout="constrained")
    panels = figure.subplots(1, len(prompts), squeeze=False)[0]
    methods = list(dict.fromkeys(line["method"] for line in lines if line["budget"]))
    for panel, prompt in zip(panels, prompts, strict=True):
        own = [line for line in lines if line["prompt"] == prompt and line["kl"]]
        ends: list[tuple[float, float, str, str]] = []
        for index, method in enumerate(methods):
            points = sorted(
                (4 * x["numbers_a_head"], x["kl"], x["kl_error"] or 0) for x in own if x["method"] == method
            )
            if not points:
                continue
            size, kl, error = np.array(points).T
            ours = method.startswith("ours")
            color = "black" if ours else f"C{index % 10}"
            style = {"color": color, "lw": 2.2 if ours else 1.1, "ls": "-" if index < 10 else "--"}
            panel.errorbar(
                size, kl, np.minimum(error, 0.9 * kl), marker="os^Dv"[index % 5], ms=6 if ours else 4, **style
            )
            ends.append((kl[-1], size[-1], next(x["label"] for x in own if x["method"] == method), color))
        largest = max((size for _, size, *_ in ends), default=1)
        for line in own:
            if not line["budget"] and line["kl"] > 1e-6:  # the prompt itself is at no height
                panel.axhline(line["kl"], color="0.5", lw=1, ls=":")
                ends.append((line["kl"], largest, line["label"], "0.4"))
        panel.set(
            yscale="log",
            title=prompt,
            xlabel="KiB for each layer's key head (float32)",
            ylabel="KL to the prompt, nats per token" if language else "relative square error of hidden states",
        )
        # powers of two: few enough to be labeled, and none has a label between
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}")
        _name_ends(panel, ends)
    return figure


def _name_ends(panel: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names at the right side and lead a thin line to each, moved apart where they would lie on one another."""
    bottom, top = np.log(panel.get_ylim())
    step = 0.045 * (top - bottom)
    heights: list[float] = []
    for height, *_ in sorted(ends):
        wanted = float(np.log(height))
        heights.append(max(wanted, heights[-1] + step) if heights else wanted)
    if heights and heights[-1] > top:  # pushed beyond the top: down again, all that are in the way
        heights[-1] = top
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - step)
    for height, (kl, size, name, color) in zip(heights, sorted(ends), strict=True):
        panel.annotate(
            name,
            (size, kl),
            (1.05, (height - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=color,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )
