"""``python -m theory.sweep certificate``: what is certified over a grid of sigma, d and n, as a table and a figure.

Every cell is a line of OUT/rows.jsonl as soon as it is known, and a run that was stopped goes on behind the last one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from pathlib import Path
from typing import Literal, TypedDict

import jax
import numpy as np
import tyro
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ntk_prefix.artifacts import decode_json, finite_or_none, held, json_text, provenance, read_bytes, write_whole
from ntk_prefix.certificate import Certificate, find_m
from ntk_prefix.certificate.length import Progress
from ntk_prefix.checks import UsageError, check_count, expected
from ntk_prefix.random_prefix import ModelName
from theory import figures
from theory.command import counted, ended
from theory.page import number
from theory.problem import Problem, load

START, RESOLUTION = 512, 0.1
"""Of the search for the shortest certified prefix."""

ACCURACY = 0.01
"""The share of the first loss up to which steps are counted and curves are drawn."""

POINTS = 48
"""Of a curve."""

LARGEST_FILE = 2**26

STYLES = ("-", "--", ":", "-.")


class Row(TypedDict):
    """A cell of the grid.

    ``of`` is what the numbers depend on beside the cell. Where nothing is certified, ``refused`` says by which inequality,
    and what follows is None or empty. Losses are over the first one.
    """

    of: str
    model: str
    sigma: float
    d: int
    n: int
    refused: str | None
    m: int | None
    rate: float | None
    margin: float | None
    steps: int | None
    times: list[float]
    lower: list[float]
    upper: list[float]


Cell = tuple[str, float, int, int]


def cell_of(row: Row) -> Cell:
    """Return which cell it is."""
    return row["model"], row["sigma"], row["d"], row["n"]


class Rows:
    """The file of finished cells, held by one process at a time."""

    def __init__(self, folder: Path, of: str) -> None:
        self.path, self.of = folder / "rows.jsonl", of
        self._others: list[Row] = []

    def finished(self) -> dict[Cell, Row]:
        """Return the cells of this configuration; what is cut off or broken is not there, those of others stay in the file."""
        self._others = []
        if not self.path.is_file():
            return {}
        found = {}
        for line in read_bytes(self.path, LARGEST_FILE).splitlines():
            with contextlib.suppress(UsageError):
                row = decode_json(line, Row, str(self.path))
                if row["of"] == self.of:
                    found[cell_of(row)] = row
                else:
                    self._others.append(row)
        return found

    def keep(self, rows: dict[Cell, Row]) -> None:
        """Write all of them beside those of other configurations, whole or not at all."""
        lines = (json_text(row, indent=None) for row in (*self._others, *rows.values()))
        write_whole(self.path, "".join(lines).encode())


def certified(problem: Problem, model: ModelName, longest: int, of: str, tried: Progress = lambda *_: None) -> Row:
    """Search for the shortest certified prefix of a problem, in float64; ``tried`` is told of each length."""
    found = find_m(
        problem.inputs,
        problem.targets,
        sigma=problem.sigma,
        model=model,
        key=problem.key("certificate", model),
        start=min(START, longest),
        largest=longest,
        resolution=RESOLUTION,
        progress=tried,
    )
    row: Row = {
        "of": of, "model": model, "sigma": problem.sigma, "d": problem.d, "n": problem.n, "refused": None, "m": None,
        "rate": None, "margin": None, "steps": None, "times": [], "lower": [], "upper": [],
    }  # fmt: skip
    if not found.holds:
        row["refused"] = _refused(found)
        return row
    steps = found.steps_to(ACCURACY)
    times = np.unique(np.floor(np.geomspace(1, max(steps, 2), POINTS)))
    curve = found.curve(np.append(0.0, times))
    return row | {
        "m": found.m,
        "rate": found.rate,
        "margin": finite_or_none(found.margin),
        "steps": steps,
        "times": times.tolist(),
        "lower": (curve.lower[1:] / curve.kernel[0]).tolist(),
        "upper": (curve.upper[1:] / curve.kernel[0]).tolist(),
    }


def _refused(certificate: Certificate) -> str:
    failing = next(step.what for step in certificate.steps if not step.holds)
    return f"m = {certificate.m:,}: {failing.split(':')[0]}"


def table(rows: list[Row]) -> Table:
    """Return the table, for the terminal."""
    shown = Table("model", "sigma", "d", "n", "certified m", "rate", f"steps to {ACCURACY:.0%}", "refused at")
    for row in rows:
        shown.add_row(*map(escape, _cells(row)))
    return shown


def _cells(row: Row) -> list[str]:
    first = [row["model"], f"{row['sigma']:g}", str(row["d"]), str(row["n"])]
    return [*first, number(row["m"]), number(row["rate"]), number(row["steps"]), row["refused"] or "-"]


def markdown(rows: list[Row]) -> str:
    """Return the same as Markdown."""
    lines = [f"| model | sigma | d | n | certified m | rate | steps to {ACCURACY:.0%} | refused at |", "|---" * 8 + "|"]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows]) + "\n"


def picture(rows: list[Row], longest: int) -> bytes:
    """Return the figure: a row of panels for a model, with lengths and rates over n, and the curves of the largest n."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    sigmas, widths = sorted({row["sigma"] for row in rows}), sorted({row["d"] for row in rows})
    shades = ("#1f5fa8", "#c8531c", "#2a7f4f", "#6b3fa0", "#8a8a8a")
    figure = figures.Figure(figsize=(13, 4.2 * len(models)), layout="constrained", dpi=150)
    panels = figure.subplots(len(models), 3, squeeze=False)
    for model, (lengths, rates, curves) in zip(models, panels, strict=True):
        for (place, sigma), (style, d) in itertools.product(enumerate(sigmas), enumerate(widths)):
            some = [row for row in rows if (row["model"], row["sigma"], row["d"]) == (model, sigma, d)]
            line = {"color": shades[place % len(shades)], "linestyle": STYLES[style % len(STYLES)]}
            held = sorted((row for row in some if row["m"]), key=lambda row: row["n"])
            name = f"sigma = {sigma:g}, d = {d}"
            lengths.plot([row["n"] for row in held], [row["m"] for row in held], marker="o", label=name, **line)
            none = [row["n"] for row in some if not row["m"]]
            lengths.plot(none, [longest * 1.15 ** (1 + place)] * len(none), "x", color=line["color"])
            rates.plot([row["n"] for row in held], [row["rate"] for row in held], marker="o", **line)
            if held:
                last = held[-1]
                curves.fill_between(last["times"], last["lower"], last["upper"], color=line["color"], alpha=0.15)
                curves.plot(last["times"], last["upper"], label=f"{name}, n = {last['n']}", **line)
        lengths.axhline(longest, color="black", linewidth=0.7)
        figures.label(
            lengths, title=f"{model}: certified length (crosses: none to the line)", x="inputs n", y="m", log="xy"
        )
        # nothing at all cannot be drawn over logarithms
        log = "xy" if any(row["m"] for row in rows if row["model"] == model) else ""
        figures.label(rates, title=f"{model}: certified rate of a step", x="inputs n", y="rate", log=log)
        figures.label(curves, title=f"{model}: certified loss, largest n", x="step t", y="L(t) / L(0)", log=log)
        curves.set_ylim(ACCURACY / 3, 1.5)
        counts = sorted({row["n"] for row in rows})
        for axis in (lengths, rates):
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlim(counts[0] / 1.1, counts[-1] * 1.1)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def sweep(problems: dict[Cell, Problem], longest: int, out: Path, of: str, console: Console) -> list[Row]:
    """Certify every cell that is not in the file yet, and write table and figure."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".lock", "--out"), counted(console) as progress:
        file = Rows(out, of)
        rows = file.finished()  # of any grid: none is dropped
        task = progress.add_task("cells", total=len(problems), completed=len(rows.keys() & problems.keys()))
        for cell, problem in problems.items():
            if cell in rows:
                continue
            model, sigma, d, n = cell
            name = f"{model}, sigma = {sigma:g}, d = {d}, n = {n}"
            progress.update(task, description=name)

            def tried(m: int, holds: bool, name: str = name) -> None:
                progress.update(task, description=f"{name}: m = {m:,} {'certified' if holds else 'refused'}")

            with jax.enable_x64(True):
                rows[cell] = certified(problem, "tied" if model == "tied" else "fixed", longest, of, tried)
            file.keep(rows)
            progress.advance(task)
        in_order = [rows[cell] for cell in sorted(problems)]
        write_whole(out / "table.md", markdown(in_order).encode())
        write_whole(out / "figure.png", picture(in_order, longest))
    return in_order


def main(
    what: tyro.conf.Positional[Literal["certificate"]],
    /,
    *,
    sigma: tuple[float, ...] = (0.5, 1.0, 2.0),
    d: tuple[int, ...] = (4, 8, 16),
    n: tuple[int, ...] = (8, 16, 32),
    model: tuple[ModelName, ...] = ("fixed", "tied"),
    longest: int = 2**18,
    out: Path = Path("runs/sweep"),
    seed: int = 0,
) -> int:
    """Certify digits over a grid: the shortest prefix, its rate and its curve, for every sigma, d and n.

    Writes rows.jsonl, table.md and figure.png to OUT. A run that was stopped goes on with the next cell, and a grid takes over
    what other grids have found: rows.jsonl keeps the cells of all grids and settings, table and figure show those asked for.

    Args:
        what: what is swept.
        sigma: standard deviations of a token's coordinates.
        d: principal components of the digits.
        n: images.
        model: "fixed" and "tied".
        longest: tokens up to which a certified prefix is looked for.
        out: folder of what is written.
        seed: of the images and the prefixes.
    """
    console = Console()

    def run() -> int:
        for flag, given in (("--sigma", sigma), ("--d", d), ("--n", n), ("--model", model)):
            if not given:
                raise expected(flag, "at least one", "none")
        check_count("--longest", longest, 2)
        if longest % 2:
            raise expected("--longest", "an even number of tokens", longest)
        # the small ones first: there is something to see early
        grid = sorted(set(itertools.product(model, sigma, d, n)), key=lambda cell: (cell[2] * cell[3], cell))
        with jax.enable_x64(True):
            problems: dict[Cell, Problem] = {
                (name, s, width, count): load("digits", inputs=count, width=width, sigma=s, seed=seed, profile="quick")
                for name, s, width, count in grid
            }
        sources = provenance(sources=("ntk_prefix/**/*.py", "theory/problem.py", "theory/sweep.py"))["sources_sha256"]
        rows = sweep(problems, longest, out, f"seed {seed}, longest {longest}, sources {sources[:16]}", console)
        console.print(table(rows))
        console.print(f"figure: {escape(str(out.absolute() / 'figure.png'))}", highlight=False, soft_wrap=True)
        return 0

    return ended(run, console)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m theory.sweep"))
