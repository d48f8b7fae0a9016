"""Gradient descent stays under the theory's geometric envelope, at every step, for every length of the prefix."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import bounds
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.typing import Array
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.descent import MODELS, build, descend, gram, limit_of, smallest_eigenvalue, spectrum
from theory.problem import Problem
from theory.scales import FAILURE, training_lengths

LEAST_FALL = 1e-11
"""Of the envelope in a step, over itself. A sum over m <= 2^16 tokens is rounded by up to sqrt(m) eps = 6e-14 of itself, and
the square doubles that: a hundred times below this."""


def _steps(problem: Problem) -> int:
    return 2000 if problem.full else 400


def worst_targets(kernel: Array, problem: Problem) -> Array:
    """Return targets along the kernel's slowest direction, as long as the problem's own: nothing converges more slowly."""
    slowest = jnp.linalg.eigh(gram(kernel))[1][:, 0].reshape(problem.targets.shape)
    return slowest * jnp.linalg.norm(problem.targets) / jnp.linalg.norm(slowest)


def _check_decidable(name: str, regime: list[int], smallest: float, spectra: dict[int, np.ndarray]) -> None:
    """Refuse a comparison that no run can decide.

    Raises:
        Undecidable: fewer than two lengths are in the regime, or rounding hides the envelope's fall.
    """
    if len(regime) < 2:
        raise Undecidable(
            f"undecidable at lengths one can run: the kernel of a drawn prefix ({name}) is half as well conditioned as its "
            f"limit at {len(regime)} of {len(spectra)} lengths up to m = {max(spectra)}; two are needed: take a smaller sigma"
        )
    # at the slowest direction the loss falls four times as fast as the envelope, so what must be told apart is the fall
    fall = smallest / float(spectra[max(regime)][-1])
    if fall < LEAST_FALL:
        raise Undecidable(
            f"undecidable in float64: the envelope ({name}) falls by {fall:.1e} of itself in a step, and rounding moves "
            f"the loss by as much: take a smaller sigma, or rows that are less alike"
        )


def _train(problem: Problem, stability: float, used: list[int], steps: int) -> Evidence:
    """Descend at ``stability`` times the largest stable step of each drawn kernel."""
    checks: list[Check] = []
    curves: dict[tuple[str, str, int], np.ndarray] = {}
    envelopes: dict[tuple[str, int], np.ndarray] = {}
    asked: dict[str, float] = {}
    regime: dict[str, list[int]] = {}
    scale = bounds.weight_scale(sigma=problem.sigma, inputs=problem.n, outputs=problem.d, failure=FAILURE)
    for name in MODELS:
        limit = limit_of(problem, name)
        smallest = smallest_eigenvalue(spectrum(limit), f"H* ({name})")
        asked[name] = bounds.log10_prefix_length(
            smallest=smallest, inputs=problem.n, outputs=problem.d, scale=scale, failure=FAILURE
        )
        models = {m: build(problem, name, m, "convergence") for m in used}
        spectra = {m: np.asarray(spectrum(prefix_ntk(model, problem.inputs))) for m, model in models.items()}
        # the first step of the proof: the drawn kernel is at least half as well conditioned as its limit
        regime[name] = [m for m in models if spectra[m][0] >= smallest / 2]
        _check_decidable(name, regime[name], smallest, spectra)
        for kind, targets in (("data", problem.targets), ("slowest", worst_targets(limit, problem))):
            worst = 0.0
            for m, model in models.items():
                step_size = stability * bounds.largest_stable_step(largest=float(spectra[m][-1]), tokens=m)
                # always so many steps, of which the first are taken: one program for a length
                path = descend(model, problem.inputs, targets, step_size=step_size, steps=_steps(problem))
                error = np.asarray(path.squared_error(targets))[: steps + 1]
                envelope = np.array(
                    [
                        bounds.loss_envelope(
                            steps=t, smallest=smallest, tokens=m, step_size=step_size, initial=float(error[0])
                        )
                        for t in range(steps + 1)
                    ]
                )
                curves[name, kind, m], envelopes[name, m] = error / error[0], envelope / error[0]
                # a diverged run is NaN or inf: it must not hold
                ratio = np.nan_to_num(error[1:] / envelope[1:], nan=np.inf)
                if m in regime[name]:
                    worst = max(worst, float(ratio.max()))
            what = f"{name}, {kind} targets: largest loss / envelope, all steps, those m"
            checks.append(Check(what, worst, 1.0, part=name))
    parameters = {
        "tokens": used[-1],
        **{f"shortest_in_regime_{name}": min(regime[name], default=None) for name in MODELS},
        "steps": steps,
        "step_over_largest_stable": stability,
        **{f"theory_tokens_log10_{name}": asked[name] for name in MODELS},
    }
    series = {"curves": curves, "envelopes": envelopes, "lengths": used}
    return Evidence(tuple(checks), parameters, series)


def _steps_too_long(problem: Problem) -> Evidence:
    # it leaves the envelope within a few steps
    return _train(problem, 1.3, training_lengths(problem)[-2:], 60)


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(2)
    used = evidence.series["lengths"]
    for axis, name in zip(axes, MODELS, strict=True):
        for index, m in enumerate(used):
            fade = 0.25 + 0.75 * index / (len(used) - 1)
            for kind, style in (("data", "-"), ("slowest", "--")):
                text = f"m = {m}" if kind == "data" else "slowest targets" if m == used[-1] else None
                axis.plot(
                    evidence.series["curves"][name, kind, m], style, color=figures.COLORS[name], alpha=fade, label=text
                )
        axis.plot(evidence.series["envelopes"][name, used[-1]], color=figures.COLORS["bound"], label="envelope")
        broken = control.series["curves"][name, "data", used[-1]]
        broken = np.where(np.isfinite(broken) & (broken < 10), broken, np.nan)
        axis.plot(broken, ":", color=figures.COLORS["control"], label="control: step too large")
        figures.label(axis, title=f"Gradient descent, {name}", x="step t", y="|F(t) - Y|^2 / |F(0) - Y|^2", log="y")
    return figure


CLAIM = Claim(
    name="convergence",
    title="Gradient descent converges at the stated rate",
    statement="|F(t) - Y|^2 <= (1 - m eta lambda / 2)^t |F(0) - Y|^2 at every step, lambda = lambda_min(H*), for every m "
    "whose drawn kernel has lambda_min >= lambda / 2",
    proof="7",
    computed_by=("bounds.loss_envelope",),
    source="form after arXiv 2406.14036, constants not verified against the text; checked far below its m",
    measure=lambda problem: _train(problem, 0.25, training_lengths(problem), _steps(problem)),
    controls=tuple(
        Control(
            f"{name}, steps too long",
            "a step size 30 % beyond 2 / (m lambda_max) leaves the envelope",
            _steps_too_long,
            name,
        )
        for name in MODELS
    ),
    draw=_draw,
    caption="Squared error of full-batch gradient descent for each prefix length (darker: longer), on the data's targets "
    "and, dashed, on targets along the slowest direction of the kernel; green: the theory's envelope at the longest.",
)
