"""The limit kernel is positive definite for distinct inputs, which the paper assumes and theory/README.md proves."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.descent import MODELS, limit_of, rounding, spectrum
from theory.problem import Problem


def _smallest(problem: Problem) -> Evidence:
    checks = []
    spectra = {}
    for model in MODELS:
        eigenvalues = np.asarray(spectrum(limit_of(problem, model)))
        floor = rounding(eigenvalues)
        checks.append(
            Check(f"{model}: smallest eigenvalue, above rounding", float(eigenvalues[0]), floor, True, part=model)
        )
        spectra[model] = (eigenvalues, floor)
    parameters = {"inputs": problem.n, "smallest_tied": checks[0].measured, "smallest_fixed": checks[1].measured}
    return Evidence(tuple(checks), parameters, {"spectra": spectra})


def _measure(problem: Problem) -> Evidence:
    """Measure, and tell an eigenvalue that rounding hides from a negative one, which is a counterexample."""
    found = _smallest(problem)
    for model, check in zip(MODELS, found.checks, strict=True):
        if abs(check.measured) < check.bound:
            raise Undecidable(
                f"undecidable in float64: the smallest eigenvalue of H* ({model}), {check.measured:.1e}, is below its "
                f"rounding, {check.bound:.1e}: rows are too alike, too many or too small"
            )
    return found


def _duplicated(problem: Problem) -> Evidence:
    return _smallest(dataclasses.replace(problem, inputs=jnp.concatenate([problem.inputs, problem.inputs[:1]])))


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(2)
    for axis, model in zip(axes, MODELS, strict=True):
        eigenvalues, floor = evidence.series["spectra"][model]
        duplicated, _ = control.series["spectra"][model]
        axis.plot(np.abs(duplicated[::-1]), "x", color=figures.COLORS["control"], label="one input duplicated")
        axis.plot(eigenvalues[::-1], "o", color=figures.COLORS[model], label="distinct inputs")
        axis.axhline(floor, color=figures.COLORS["bound"], linewidth=1, label="rounding")
        figures.label(
            axis, title=f"Spectrum of H*, {model}", x="eigenvalue, from the largest", y="|eigenvalue|", log="y"
        )
    return figure


CLAIM = Claim(
    name="positivity",
    title="The limit kernel is positive definite",
    statement="lambda_min(H*) > 0 for distinct non-zero inputs, both models",
    proof="5",
    computed_by=("kernels.limit_ntk",),
    source="derived, proof in theory/README.md; the paper assumes it",
    measure=_measure,
    controls=tuple(
        Control(f"{model}, an input duplicated", "the smallest eigenvalue must vanish", _duplicated, model)
        for model in MODELS
    ),
    draw=_draw,
    caption="Eigenvalues of the infinite-prefix kernel on the data; with one input duplicated, d of them fall to rounding.",
)
