"""One look for every figure of the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from theory.fits import Exponent

COLORS = {"tied": "#1f5fa8", "fixed": "#c8531c", "control": "#8a8a8a", "bound": "#2a7f4f", "real": "#6b3fa0"}
"""The same model has the same color in every figure; controls are gray, bounds green."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
mpl.rcParams.update(STYLE)


def panels(count: int = 1, *, width: float = 4.2, height: float = 3.9, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels side by side, in each of ``rows`` rows, and its panels row by row."""
    figure = Figure(figsize=(width * count, height * rows), layout="constrained", dpi=150)
    return figure, list(figure.subplots(rows, count, squeeze=False).ravel())


def label(axis: Axes, *, title: str, x: str, y: str, log: str = "", direct: bool = False) -> None:
    """Set title, axis labels and scales ("x", "y" or "xy" for logarithmic), and the names of what is drawn.

    They stand in a legend, or ``direct`` at the ends of lines, of which limits are to be set before.
    """
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if "x" in log:
        axis.set_xscale("log")
    if "y" in log:
        axis.set_yscale("log")
    if direct:
        _name_at_ends(axis)
    elif axis.get_legend_handles_labels()[0]:
        # below the panel, where it hides no data
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=1 if len(axis.figure.axes) > 1 else 2)


SPACE = 0.055
"""Least distance of two names at the ends of lines, over the height of a panel."""


def _name_at_ends(axis: Axes) -> None:
    """Write each line's name behind its last point inside of the panel; where names would overlap they move apart."""
    axis.autoscale_view()
    within = axis.transData + axis.transAxes.inverted()
    ends: list[tuple[float, float, Line2D]] = []
    for line in axis.lines:
        with np.errstate(invalid="ignore"):
            places = within.transform(np.asarray(line.get_xydata(), float))
            seen = places[np.isfinite(places).all(1) & (np.abs(places - 0.5) <= 0.5 + 1e-6).all(1)]
        if not str(line.get_label()).startswith("_") and len(seen):
            ends.append((*seen[-1], line))
    for x in {round(end[0], 1) for end in ends}:
        column = sorted((end for end in ends if round(end[0], 1) == x), key=lambda end: end[1])
        heights = np.array([end[1] for end in column])
        for _ in range(200):  # neighbors that are too near share the correction
            short = np.maximum(SPACE - np.diff(heights), 0) / 2
            heights[:-1] -= short
            heights[1:] += short
        for (right, _, line), height in zip(column, heights, strict=True):
            axis.annotate(
                str(line.get_label()), (right, height), xycoords="axes fraction", xytext=(5, 0), annotation_clip=False,
                textcoords="offset points", va="center", fontsize=8, color=line.get_color(),
            )  # fmt: skip


def power_law(axis: Axes, errors: dict[int, np.ndarray], name: str, color: str, fitted: Exponent | None = None) -> None:
    """Draw repeated measurements by size: median, band between the extremes, the fitted exponent in the legend."""
    sizes, values = list(errors), list(errors.values())
    least, most = [v.min() for v in values], [v.max() for v in values]
    axis.fill_between(sizes, least, most, color=color, alpha=0.15, linewidth=0, label=f"_{name}, all draws")
    text = name if fitted is None else f"{name}: slope {fitted.value:.2f} [{fitted.low:.2f}, {fitted.high:.2f}]"
    axis.plot(sizes, [np.median(v) for v in values], "o-", color=color, label=text)


def guide(axis: Axes, sizes: Iterable[float], start: float, power: float, name: str) -> None:
    """Draw a dashed line of slope ``power`` through (first size, start)."""
    sizes = np.asarray(list(sizes), float)
    axis.plot(sizes, start * (sizes / sizes[0]) ** power, "--", color="black", linewidth=0.9, label=name)
