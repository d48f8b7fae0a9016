"""One look for every figure of the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def panels(count: int = 1, *, width: float = 4.2, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def label(axis: Axes, *, title: str, x: str, y: str, log: str = "") -> None:
    """Set title, axis labels and scales ("x", "y" or "xy" for logarithmic), and the legend."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if "x" in log:
        axis.set_xscale("log")
    if "y" in log:
        axis.set_yscale("log")
    if axis.get_legend_handles_labels()[0]:
        # below the panel, where it hides no data
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=1 if len(axis.figure.axes) > 1 else 2)


def power_law(axis: Axes, errors: dict[int, np.ndarray], name: str, color: str, fitted: Exponent | None = None) -> None:
    """Draw repeated measurements by size: median, band between the extremes, the fitted exponent in the legend."""
    sizes, values = list(errors), list(errors.values())
    axis.fill_between(sizes, [v.min() for v in values], [v.max() for v in values], color=color, alpha=0.15, linewidth=0)
    text = name if fitted is None else f"{name}: slope {fitted.value:.2f} [{fitted.low:.2f}, {fitted.high:.2f}]"
    axis.plot(sizes, [np.median(v) for v in values], "o-", color=color, label=text)


def guide(axis: Axes, sizes: Iterable[float], start: float, power: float, name: str) -> None:
    """Draw a dashed line of slope ``power`` through (first size, start)."""
    sizes = np.asarray(list(sizes), float)
    axis.plot(sizes, start * (sizes / sizes[0]) ** power, "--", color="black", linewidth=0.9, label=name)
