"""The figure of a plan: a chip's memory by kind, what is sent, and what the time of a step is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from train.plan.report import size

__all__ = ["draw"]


def draw(result: dict[str, Any]) -> Figure:
    """Return three panels; of a step that could not be compiled, what it would need."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    memory, sent, time = figure.subplots(1, 3)
    config, step = result["config"], result["step"]
    figure.suptitle(
        f"{result['model_shape'] or config['model']}, {config['method']}: {result['rows']} rows of "
        f"{result['tokens_a_row']} tokens on {result['topology']}"
    )
    limit = result["chip"]["memory"] / 2**30
    kinds = (
        {k: v for k, v in step["memory"].items() if k != "total" and v} if step else {"needed": result["needed"] or 0}
    )
    _bars(memory, kinds, "memory of a chip", _BYTES, size)
    total = (result["needed"] or 0) / 2**30
    memory.set_title(f"{total:.3g} of {limit:.3g} GiB" + ("" if result["fits"] else ": does not fit"))
    if step is None:
        for panel in (sent, time):
            panel.set_axis_off()
        return figure
    moved = {
        f"{contents}\n{kind}": row["bytes"]
        for contents, kinds_of in step["collectives"].items()
        for kind, row in kinds_of.items()
        if row["bytes"] >= 2**20
    }
    largest = dict(sorted(moved.items(), key=lambda item: -item[1])[:8])
    _bars(sent, largest, "collectives of a step", _BYTES, size)
    sent.set_title("sent between chips" if largest else "less than 1 MiB is sent between chips")
    seconds = step["seconds"]
    names = {"compute": "matrix units", "memory": "main memory", "links": "links"}
    _bars(time, {label: seconds[name] for name, label in names.items()}, "of a step, at least", _SECONDS, _seconds)
    time.set_title(f"roofline: {_seconds(seconds['least'])} to {_seconds(seconds['most'])}")
    return figure


_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def _seconds(value: float) -> str:
    name, unit = _unit(value, _SECONDS)
    return f"{value / unit:.3g} {name}"


def _unit(largest: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    return next((each for each in units if largest >= each[1]), units[-1])


def _bars(
    panel: Any, values: dict[str, float], label: str, units: tuple[tuple[str, float], ...], text: Callable[[float], str]
) -> None:
    if not values:
        panel.set_axis_off()
        return
    name, unit = _unit(max(values.values()), units)
    places = range(len(values))
    panel.barh(places, [value / unit for value in values.values()], color="C0")
    panel.set_yticks(places, list(values))
    panel.invert_yaxis()
    panel.set_xlabel(f"{label}, {name}")
    panel.spines[["top", "right"]].set_visible(False)
    for place, value in zip(places, values.values(), strict=True):
        panel.annotate(f" {text(value)}", (value / unit, place), va="center", fontsize=8)
    panel.margins(x=0.25)
