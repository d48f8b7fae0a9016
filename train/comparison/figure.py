"""The figures of a table: score against trained parameters, and how far confidence can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from train.confidence import BINS

__all__ = ["draw", "draw_reliability"]

MIN_ROWS = 10
"""Bins of fewer rows are left out of the reliability diagram: their accuracy is chance."""

LABEL_DECADES = 2
"""How far a label of the figure reaches to its side."""


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Return accuracy against trainable parameters, a panel for each task; bars are one standard error."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for panel, task in zip(panels, tasks, strict=True):
        labels: list[tuple[float, float, str, str]] = []
        # a line whose runs all diverged has none
        for line in (line for line in lines if line["task"] == task and line["trainable_parameters"]):
            count = len(line["scores"]) - line["diverged"]
            error = 0.0 if line["spread"] is None else line["spread"] / count**0.5
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
    """Return accuracy against confidence, a panel for each task, all seeds together; the diagonal is perfect calibration."""
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
