"""Fixed weights, a prompt that is a table: one softmax head of one layer approximates every Lipschitz function."""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.prompting import Construction, Function
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence
from theory.lipschitz import functions, largest_error
from theory.problem import Problem

QUICK = {
    (1, 1): (4, 8, 16, 32, 64),
    (2, 1): (2, 4, 8, 16, 24),
    (1, 2): (2, 4, 8, 16, 24),
    (3, 1): (2, 4, 6, 8, 10),
    (1, 3): (2, 3, 4, 5, 6),
}
"""Grids by (d, L)."""

FULL = {
    (1, 1): (4, 16, 64, 256, 1024),
    (2, 1): (2, 4, 8, 16, 32, 64, 128),
    (1, 2): (2, 4, 8, 16, 32, 64, 96),
    (3, 1): (2, 4, 8, 16, 24, 32),
    (1, 3): (2, 4, 6, 8, 12, 16),
    (2, 2): (2, 3, 4, 6, 8),
    (4, 1): (2, 4, 6, 8, 12),
}

SHARPNESS = [2.0**power for power in range(-2, 9, 2)]
"""tau of the sweep that shows the softmax's own term of the bound."""

SWEPT = (2, 1, 8)
"""d, L and grid of that sweep."""

READS_OTHERS = (1, 2)
"""(d, L) of the controls, on ``shift``: each row answers with the other row's token."""


def _random(problem: Problem, *labels: int) -> np.random.Generator:
    return np.random.default_rng([problem.seed, 14, *labels])


def _border(construction: Construction) -> Function:
    """Return the distance to the nearest center: its table is zero, as its negative's is, so no table knows it."""

    def function(x: np.ndarray) -> np.ndarray:
        distance = np.abs(x[..., None] - construction.centers).min(-1)
        return np.broadcast_to(distance.max((1, 2), keepdims=True), x.shape)

    return function


def _measure(problem: Problem) -> Evidence:
    """Measure errors over grids for every (d, L), their exponent in the prompt's length, and over the softmax's sharpness."""
    checks: list[Check] = []
    parameters: dict[str, int | float] = {}
    errors: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    bounds: dict[tuple[int, int], list[float]] = {}
    slopes: dict[tuple[int, int], fits.Exponent] = {}
    for (d, length), grids in (FULL if problem.full else QUICK).items():
        targets = functions(_random(problem, d, length), d, length)
        found, allowed, hidden = {}, [], []
        for grid in grids:
            built = Construction(d=d, length=length, grid=grid)
            random = _random(problem, d, length, grid)
            known = [largest_error(built, f, built.prompt(f), random) for f in targets.values()]
            hidden.append(largest_error(built, _border(built), built.prompt(_border(built)), random) / built.bound)
            found[built.tokens] = np.array(known)
            allowed.append(built.bound)
        worst = np.array([max(known) for known in found.values()])
        slope = fits.exponent(list(found), worst)
        errors[d, length], bounds[d, length], slopes[d, length] = found, allowed, slope
        name, expected = f"d = {d}, L = {length}", -1 / (d * length)
        checks += [
            Check(f"{name}: largest error / bound, all functions and grids", float((worst / allowed).max()), 1.0),
            Check(f"{name}: bound / error of the function hidden from the table", 1 / min(hidden), 1.1),
            Check(
                f"{name}: farther end of the slope {slope} from -1/(dL), relative",
                slope.distance(expected) * d * length,
                0.05,
            ),
        ]
        weights = built.transformer
        parameters |= {
            f"d{d}_L{length}_tokens": built.tokens,
            f"d{d}_L{length}_numbers_per_token": built.numbers,
            f"d{d}_L{length}_hidden_units_before": weights.hidden.shape[1],
            f"d{d}_L{length}_width_of_values": weights.value.shape[1],
            f"d{d}_L{length}_layers_after": len(weights.layers),
            f"d{d}_L{length}_largest_weight": max(
                float(np.abs(w).max()) for w in (weights.query, *(w for w, _ in weights.layers))
            ),
        }
    swept = _sharpness(problem)
    checks.append(Check("softmax of any sharpness: largest error / bound", max(e / b for e, b in swept.values()), 1.0))
    parameters |= {"tokens": max(max(found) for found in errors.values()), "functions": len(targets) + 1}
    series = {"errors": errors, "bounds": bounds, "slopes": slopes, "swept": swept}
    return Evidence(tuple(checks), parameters, series)


def _sharpness(problem: Problem) -> dict[float, tuple[float, float]]:
    """Measure the largest error over the functions, and bound, by tau."""
    d, length, grid = SWEPT
    targets = functions(_random(problem, d, length), d, length)
    found = {}
    for tau in SHARPNESS:
        built = Construction(d=d, length=length, grid=grid, sharpness=tau)
        known = [largest_error(built, f, built.prompt(f), _random(problem, grid)) for f in targets.values()]
        found[tau] = max(known), built.bound
    return found


def _control(problem: Problem) -> Evidence:
    """Measure the prompt of another function, and weights that do not read the context, on a function that needs it."""
    d, length = READS_OTHERS
    targets = functions(_random(problem, d, length), d, length)
    checks, errors = [], {}
    for grid in QUICK[READS_OTHERS]:
        built = Construction(d=d, length=length, grid=grid)
        blind = dataclasses.replace(built, contexts=False)
        random = _random(problem, d, length, grid)
        wanted = targets["shift"]
        errors[built.tokens] = {
            "its own prompt": largest_error(built, wanted, built.prompt(wanted), random),
            "no context": largest_error(blind, wanted, blind.prompt(wanted), random),
            "prompt of another function": largest_error(built, wanted, built.prompt(targets["cones"]), random),
        }
    for name in ("no context", "prompt of another function"):
        ratio = errors[built.tokens][name] / built.bound
        checks.append(Check(f"{name}: error / bound at the finest grid", ratio, 1.0, part=name))
    return Evidence(tuple(checks), {}, {"errors": errors})


def _figure(evidence: Evidence, control: Evidence) -> Figure:
    figure, (lengths, sharpness, context) = figures.panels(3, width=4.0, height=4.6)
    shades = ("#0b2c54", "#1f5fa8", "#c8531c", "#6b3fa0", "#d99a2b", "#2a7f4f", "#8a8a8a")
    for shade, ((d, length), found) in zip(shades, evidence.series["errors"].items(), strict=False):
        slope, used = evidence.series["slopes"][d, length], list(found)
        text = f"d = {d}, L = {length}: slope {slope.value:.3f}, -1/(dL) = {-1 / (d * length):.3f}"
        lengths.plot(used, [known.max() for known in found.values()], "o", color=shade, label=text)
        lengths.plot(used, evidence.series["bounds"][d, length], "-", color=shade, linewidth=0.9)
    lengths.plot([], [], "-", color="black", linewidth=0.9, label="bound")
    figures.label(lengths, title="A table in the prompt", x="prompt tokens", y="largest |out - f|", log="xy")
    swept, (d, length, grid) = evidence.series["swept"], SWEPT
    taus = list(swept)
    sharpness.plot(taus, [bound for _, bound in swept.values()], color=figures.COLORS["bound"], label="bound")
    sharpness.plot(
        taus, [error for error, _ in swept.values()], "o-", color=figures.COLORS["tied"], label="largest error"
    )
    sharpness.axhline(0.5 / grid, color="black", linestyle=":", linewidth=0.9, label="half a cell")
    figures.label(
        sharpness, title=f"Softmax as a lookup, d = {d}, G = {grid}", x="sharpness tau", y="largest |out - f|", log="xy"
    )
    colors = {"its own prompt": figures.COLORS["tied"], "no context": figures.COLORS["control"]}
    errors = control.series["errors"]
    for name in next(iter(errors.values())):
        context.plot(
            list(errors),
            [found[name] for found in errors.values()],
            "o-",
            color=colors.get(name, "#c8531c"),
            label=name,
        )
    figures.label(context, title="Answer with the other token", x="prompt tokens", y="largest |out - f|", log="xy")
    return figure


CLAIM = Claim(
    name="universality",
    title="One layer with fixed weights, any Lipschitz function in its prompt",
    statement="sup |out - f|_max <= C h (1/2 + d t(tau)) + 2 F omega for every f: [0,1]^(dL) -> [-F,F]^(dL) that is "
    "C-Lipschitz in the max-norm, from a prompt of L h^(-dL) tokens: an error of order L_p^(-1/(dL))",
    proof="14",
    computed_by=("prompting.Construction",),
    source="bound and construction derived (theory/README.md, section 14); that such a theorem exists is arXiv 2411.16525, "
    "whose own construction is recalled only",
    measure=_measure,
    controls=(
        Control("no context", "weights that do not read the other tokens", _control, "no context"),
        Control("another function", "the prompt of another function", _control, "prompt of another function"),
    ),
    draw=_figure,
    caption="Left: largest error found over three functions against the prompt's length; lines: the bound. Middle: the "
    "same over the sharpness of the softmax. Right: each row must answer with the other row's token.",
    drawn=True,
)
