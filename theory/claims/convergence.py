"""Gradient descent stays under the theory's geometric envelope, at every step, for every length of the prefix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import bounds
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Array
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.descent import MODELS, Model, above_rounding, build, descend, gram, limit_of, smallest_eigenvalue, spectrum
from theory.problem import Problem
from theory.scales import FAILURE, training_lengths

LEAST_FALL = 1e-11
"""Of the envelope in a step, over itself. A sum over m <= 2^16 tokens is rounded by up to sqrt(m) eps = 6e-14 of itself, and
the square doubles that: a hundred times below this."""


STABILITY = 0.25
"""Steps over the largest stable one."""

FASTER = 5.0
"""The control's promised rate, over the right one. In the limit the slowest direction falls four times as fast as promised:
the envelope has half of the exponent, and the loss is a square."""


LOWEST = 1e-30
"""Of the figure's losses, over the first: below is rounding."""


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


def promised(error: np.ndarray, envelope: np.ndarray) -> np.ndarray:
    """Return what an envelope says that the loss has fallen by, over what it has: logarithms, at t = 1..T.

    Losses over the envelope would be near 1 at the first steps whatever the rate. A loss that is no number, or that has not
    fallen, breaks every promise.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        fallen = np.log(error[0] / error[1:])
        said = np.log(envelope[0] / envelope[1:])
        return np.where(fallen > 0, said / np.where(fallen > 0, fallen, 1), np.inf)


@functools.cache
def _drawn(problem: Problem, name: ModelName, m: int) -> tuple[Model, np.ndarray]:
    """Return a prefix and the spectrum of its kernel."""
    model = build(problem, name, m, "convergence")
    return model, np.asarray(spectrum(prefix_ntk(model, problem.inputs)))


@functools.cache
def _squared_errors(problem: Problem, name: ModelName, m: int, kind: str, step_size: float) -> np.ndarray:
    """Return |F(t) - Y|^2 at every step of a descent, which measurement and controls share."""
    targets = problem.targets if kind == "data" else worst_targets(limit_of(problem, name), problem)
    path = descend(_drawn(problem, name, m)[0], problem.inputs, targets, step_size=step_size, steps=_steps(problem))
    return np.asarray(path.squared_error(targets))


def _train(problem: Problem, stability: float, used: list[int], steps: int, faster: float = 1.0) -> Evidence:
    """Descend at ``stability`` times the largest stable step, and promise ``faster`` times the rate."""
    checks: list[Check] = []
    curves: dict[tuple[str, str, int], np.ndarray] = {}
    envelopes: dict[tuple[str, int], np.ndarray] = {}
    asked: dict[str, float] = {}
    regime: dict[str, list[int]] = {}
    scale = bounds.weight_scale(sigma=problem.sigma, inputs=problem.n, outputs=problem.d, failure=FAILURE)
    for name in MODELS:
        smallest = smallest_eigenvalue(spectrum(limit_of(problem, name)), f"H* ({name})")
        asked[name] = bounds.log10_prefix_length(
            smallest=smallest, inputs=problem.n, outputs=problem.d, scale=scale, failure=FAILURE
        )
        spectra = {m: _drawn(problem, name, m)[1] for m in used}
        # the first step of the proof: the drawn kernel is at least half as well conditioned as its limit
        regime[name] = [m for m in used if spectra[m][0] >= smallest / 2]
        _check_decidable(name, regime[name], smallest, spectra)
        for kind in ("data", "slowest"):
            worst = 0.0
            for m in used:
                step_size = stability * bounds.largest_stable_step(largest=float(spectra[m][-1]), tokens=m)
                # always so many steps, of which the first are taken: one program for a length
                error = _squared_errors(problem, name, m, kind, step_size)[: steps + 1]
                envelope = np.array(
                    [
                        bounds.loss_envelope(
                            steps=t,
                            # no more can be promised than that nothing is left after a step
                            smallest=min(faster * smallest, 2 / (m * step_size)),
                            tokens=m,
                            step_size=step_size,
                            initial=float(error[0]),
                        )
                        for t in range(steps + 1)
                    ]
                )
                curves[name, kind, m], envelopes[name, m] = error / error[0], envelope / error[0]
                if m in regime[name]:
                    judged = above_rounding(error, problem, m, name)
                    worst = max(worst, float(promised(error[:judged], envelope[:judged]).max()))
            what = f"{name}, {kind} targets: promised fall of the loss / its fall, all steps, those m"
            checks.append(Check(what, worst, 1.0, part=f"{name}, {kind}"))
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
    found = _train(problem, 1.3, training_lengths(problem)[-2:], 60)
    return dataclasses.replace(found, series={"broken": found.series["curves"]})


def _faster(problem: Problem) -> Evidence:
    found = _train(problem, STABILITY, training_lengths(problem), _steps(problem), faster=FASTER)
    return dataclasses.replace(found, series={"too good": found.series["envelopes"]})


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(2, rows=2, height=3.5)
    used, last = evidence.series["lengths"], evidence.series["lengths"][-1]
    green, gray = figures.COLORS["bound"], figures.COLORS["control"]
    for loss, falls, name in zip(axes[:2], axes[2:], MODELS, strict=True):
        curves, envelopes = evidence.series["curves"], evidence.series["envelopes"]
        for index, m in enumerate(used):
            style: dict[str, Any] = {"color": figures.COLORS[name], "alpha": 0.25 + 0.75 * index / (len(used) - 1)}
            loss.plot(curves[name, "data", m], label=f"m = {m}", **style)
            if m < (evidence.parameters[f"shortest_in_regime_{name}"] or last):
                continue  # nothing is promised there
            kept = 1 / promised(curves[name, "slowest", m], envelopes[name, m])
            falls.plot(np.arange(1, len(kept) + 1), kept, label=f"m = {m}", **style)
        loss.plot(envelopes[name, last], color=green, label="envelope")
        steps_too_long = control.series["broken"][name, "data", last]
        loss.plot(steps_too_long, ":", color=gray, label="_control: steps too long")
        lowest = min(float(curves[name, "data", m].min()) for m in used)
        loss.set_ylim(0.7 * max(lowest, LOWEST), 10)
        too_good = 1 / promised(curves[name, "slowest", last], control.series["too good"][name, last])
        falls.plot(np.arange(1, len(too_good) + 1), too_good, ":", color=gray, label="control: rate too good")
        falls.plot([1, len(too_good)], [1, 1], color=green, label="as promised")
        title = f"Gradient descent, {name}"
        figures.label(loss, title=title, x="step t", y="|F(t) - Y|^2 / |F(0) - Y|^2", log="y", direct=True)
        title, fall = f"Slowest targets, {name}", "fall of log loss / promised fall"
        figures.label(falls, title=title, x="step t", y=fall, log="xy", direct=True)
    return figure


CLAIM = Claim(
    name="convergence",
    title="Gradient descent converges at the stated rate",
    statement="|F(t) - Y|^2 <= (1 - m eta lambda / 2)^t |F(0) - Y|^2 at every step, lambda = lambda_min(H*), for every m "
    "whose drawn kernel has lambda_min >= lambda / 2",
    proof="7",
    computed_by=("bounds.loss_envelope",),
    source="form after arXiv 2406.14036, constants not verified against the text; checked far below its m",
    measure=lambda problem: _train(problem, STABILITY, training_lengths(problem), _steps(problem)),
    controls=(
        *(
            Control(
                f"{name}, steps too long",
                "a step size 30 % beyond 2 / (m lambda_max) leaves the envelope",
                _steps_too_long,
                f"{name}, data",
            )
            for name in MODELS
        ),
        *(
            Control(
                f"{name}, a rate too good",
                f"{FASTER:g} times the promised rate is not kept in the slowest direction",
                _faster,
                f"{name}, slowest",
            )
            for name in MODELS
        ),
    ),
    draw=_draw,
    caption="Above: squared error of full-batch gradient descent on the data's targets for each prefix length (darker: "
    "longer), the theory's envelope at the longest (green), and with steps too long (dotted). Below: on targets along the "
    "slowest direction of the kernel, by how many times the logarithm of the loss falls further than the envelope "
    "promises, for every length of which something is promised; dotted: of a rate that is too good, at the longest.",
)
