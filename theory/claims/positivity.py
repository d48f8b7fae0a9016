"""The limit kernel is positive definite for distinct inputs, which the paper assumes and theory/README.md proves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.kernels import limit_ntk
from ntk_prefix.random_prefix import ModelName
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.descent import MODELS, limit_of, rounding, smallest_eigenvalue, spectrum
from theory.problem import Problem

NEAR = 0.01
"""Distance of two inputs, in units of what the kernel varies over."""


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


def _near_one_another(problem: Problem, model: ModelName, larger: float = 1.0) -> Check:
    """Return that the smallest eigenvalue of two inputs at a distance eps is eps^2 times its constant (README, section 5).

    The constant is lambda_min(K_uv - K_u^T K^-1 K_v) / 2 of the derivatives along the direction between them, by differences.
    """
    x = np.asarray(problem.inputs[0])
    norm, s = float(np.linalg.norm(x)), problem.sigma**2
    unit = np.array(jax.random.normal(problem.key("positivity"), x.shape))
    unit /= np.linalg.norm(unit)
    # what the kernel varies over: e^(s c) and, of the fixed model, c itself
    scale = 1 / (problem.sigma + s * norm)
    scale = min(scale, norm) if model == "fixed" else scale
    points = jnp.asarray(x + scale * np.array([0, -1e-3, 1e-3, -NEAR / 2, NEAR / 2])[:, None] * unit)
    kernel = np.asarray(limit_ntk(points, sigma=problem.sigma, model=model)).transpose(0, 2, 1, 3)
    first = (kernel[0, 2] - kernel[0, 1]) / 2e-3
    both = (kernel[2, 2] - kernel[2, 1] - kernel[1, 2] + kernel[1, 1]) / 4e-6
    constant = np.linalg.eigvalsh(both - first.T @ np.linalg.solve(kernel[0, 0], first))[0] / 2
    eigenvalues = np.linalg.eigvalsh(kernel[3:, 3:].transpose(0, 2, 1, 3).reshape(2 * len(x), -1))
    smallest = smallest_eigenvalue(eigenvalues, f"H* ({model}) at two inputs")
    off = abs(smallest / (larger * NEAR**2 * constant) - 1)
    return Check(f"{model}: two inputs near one another, |lambda_min / (C eps^2) - 1|", off, 0.1, part=f"{model}, near")


def _measure(problem: Problem) -> Evidence:
    """Measure, and tell an eigenvalue that rounding hides from a negative one, which is a counterexample."""
    found = _smallest(problem)
    for model, check in zip(MODELS, found.checks, strict=True):
        if abs(check.measured) < check.bound:
            raise Undecidable(
                f"undecidable in float64: the smallest eigenvalue of H* ({model}), {check.measured:.1e}, is below its "
                f"rounding, {check.bound:.1e}: rows are too alike, too many or too small"
            )
    near = tuple(_near_one_another(problem, model) for model in MODELS)
    return dataclasses.replace(found, checks=found.checks + near)


def _larger(problem: Problem) -> Evidence:
    return Evidence(tuple(_near_one_another(problem, model, larger=1.5) for model in MODELS))


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
    statement="lambda_min(H*) > 0 for distinct non-zero inputs, both models; of two at a distance eps it is C eps^2 + o(eps^2)",
    proof="5",
    computed_by=("kernels.limit_ntk",),
    source="derived, proof in theory/README.md; the paper assumes it",
    measure=_measure,
    controls=(
        *(
            Control(f"{model}, an input duplicated", "the smallest eigenvalue must vanish", _duplicated, model)
            for model in MODELS
        ),
        *(Control(f"{model}, another constant", "a half larger", _larger, f"{model}, near") for model in MODELS),
    ),
    draw=_draw,
    caption="Eigenvalues of the infinite-prefix kernel on the data; with one input duplicated, d of them fall to rounding.",
)
