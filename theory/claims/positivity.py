"""The limit kernel is positive definite for distinct inputs, which the paper assumes and theory/README.md proves."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from theory import figures
from theory.claim import Check, Claim, Evidence
from theory.descent import MODELS, limit_of, spectrum
from theory.problem import Problem


def _smallest(problem: Problem) -> Evidence:
    checks = []
    spectra = {}
    for model in MODELS:
        eigenvalues = np.asarray(spectrum(limit_of(problem, model)))
        # an eigenvalue computed in float64 is off by at most p(n) eps |H|; p(n) = 10 n d is generous for LAPACK's syevd
        floor = 10 * len(eigenvalues) * 2**-52 * eigenvalues[-1]
        checks.append(
            Check(f"{model}: smallest eigenvalue, above rounding", float(eigenvalues[0]), floor, at_least=True)
        )
        spectra[model] = (eigenvalues, floor)
    parameters = {"inputs": problem.n, "smallest_tied": checks[0].measured, "smallest_fixed": checks[1].measured}
    return Evidence(tuple(checks), parameters, {"spectra": spectra})


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
    source="derived, proof in theory/README.md; the paper assumes it",
    measure=_smallest,
    control=_duplicated,
    control_statement="one input duplicated: the smallest eigenvalue must vanish",
    draw=_draw,
    caption="Eigenvalues of the infinite-prefix kernel on the data; with one input duplicated, d of them fall to rounding.",
)
