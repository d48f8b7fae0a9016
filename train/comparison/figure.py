"""The figures of a table: the scores of its rows, and how far confidence can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.confidence import BINS

__all__ = ["draw", "draw_reliability"]

MIN_ROWS = 10
"""Bins of fewer rows are left out of the reliability diagram: their accuracy is chance."""


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Return each row's score with its standard error, a panel for each task, best on top; names say the trained numbers.

    Rows of equally many trained numbers are the rule: over an axis of these they would lie on one another.
    """
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    # a line whose runs all diverged has none
    panels_of = {
        task: sorted(
            (line for line in lines if line["task"] == task and line["trainable_parameters"]),
            key=lambda line: line["mean"],
        )
        for task in tasks
    }
    most = max((len(some) for some in panels_of.values()), default=1)
    figure = Figure(figsize=(4.2 * len(tasks), 1.2 + 0.32 * max(most, 4)), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for panel, (task, some) in zip(panels, panels_of.items(), strict=True):
        for place, line in enumerate(some):
            count = len(line["scores"]) - line["diverged"]
            error = 0.0 if line["spread"] is None else line["spread"] / count**0.5
            color = f"C{methods.index(line['method'])}"
            panel.errorbar(100 * line["mean"], place, xerr=100 * error, fmt="o", color=color, capsize=3)
        names = [f"{line['row']}\n{line['trainable_parameters']:,}" for line in some]
        panel.set_yticks(range(len(some)), names, fontsize=8)
        panel.set(title=task, xlabel="test score, %; bars: one SE", ylim=(-0.7, len(some) - 0.3))
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_ylabel("row, trained parameters")
    return figure


def draw_reliability(lines: list[dict[str, Any]]) -> Figure:
    """Return how far accuracy is from confidence, a panel for each task, all seeds together; 0 is perfect calibration.

    Over confidence itself all rows would lie on the diagonal, and on one another.
    """
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.2 * len(tasks), 5.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        panel.axhline(0, color="0.7", lw=1)
        for line in (line for line in lines if line["task"] == task and line["reliability"]):
            rows, confidence, accuracy = np.array(line["reliability"]).T
            # bins of the seeds lie side by side; merged again by where they are
            where = np.ceil(confidence * BINS)
            points = [
                [np.average(x[where == b], weights=rows[where == b]) for x in (confidence, accuracy - confidence)]
                for b in np.unique(where)
                if rows[where == b].sum() >= MIN_ROWS
            ]
            label = f"{line['row']}, ECE {100 * line['calibration_error']:.1f} %"
            panel.plot(*np.array(points).reshape(-1, 2).T, "o-", ms=4, lw=1, label=label)
        panel.set(title=task, xlabel="confidence", ylabel=f"accuracy - confidence; bins of {MIN_ROWS} rows or more")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12))  # hides no line
    return figure
