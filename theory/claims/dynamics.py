"""Training a finite prefix follows the trajectory that the infinite-prefix kernel predicts, ever closer as m grows."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import bounds
from ntk_prefix.kernels import limit_ntk, predict, prefix_ntk
from ntk_prefix.typing import Array, Kernel
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.descent import MODELS, build, descend, limit_of, spectrum
from theory.problem import Problem
from theory.scales import ASYMPTOTIC_SIGMA, expected_error, indistinct, training_lengths

STEPS = 200
REPEATS = 3


LEAST_EXPONENT = -0.35
"""What the distance must fall with from the shortest to the longest prefix: near the -1/2 expected, and farther than
draws scatter (0.05) from the -0.2 that is left at a wrong sigma."""

WRONG = 1.3
"""The control's sigma, over the right one."""


def _undecidable(problem: Problem) -> str | None:
    """Ask whether the control's limit can be told from the right one."""
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, ASYMPTOTIC_SIGMA))
    m = training_lengths(problem)[-1]
    wrong = dataclasses.replace(problem, sigma=WRONG * problem.sigma)
    apart = min(relative_error(limit_of(wrong, name), limit_of(problem, name)) for name in MODELS)
    spread = problem.sigma * float(jnp.linalg.norm(problem.inputs, axis=1).max())
    return indistinct(apart, expected_error(spread, m), m, problem, times=3)


def _distance(outputs: Array, kernel: Kernel, problem: Problem, step_size: float, m: int) -> float:
    """Return the largest distance over all steps between a trajectory and a kernel's prediction of it, over |Y|."""
    predicted = predict(m * kernel, problem.targets, learning_rate=step_size, steps=jnp.arange(STEPS + 1)).train
    return float(jnp.linalg.norm(outputs - predicted, axis=(1, 2)).max() / jnp.linalg.norm(problem.targets))


def _follow(problem: Problem, repeats: int = REPEATS, wrong_sigma: float = 1.0) -> Evidence:
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, ASYMPTOTIC_SIGMA))
    checks: list[Check] = []
    errors: dict[str, dict[int, np.ndarray]] = {}
    own: dict[str, dict[int, np.ndarray]] = {}
    slopes: dict[str, fits.Exponent] = {}
    example: dict[str, np.ndarray] = {}
    used = training_lengths(problem)[1:]
    for name in MODELS:
        largest = float(spectrum(limit_of(problem, name))[-1])
        limit = limit_ntk(problem.inputs, sigma=problem.sigma * wrong_sigma, model=name)
        errors[name], own[name] = {}, {}
        for m in used:
            step_size = 0.25 * bounds.largest_stable_step(largest=largest, tokens=m)
            models = [build(problem, name, m, "dynamics", repeat) for repeat in range(repeats)]
            paths = [
                descend(model, problem.inputs, problem.targets, step_size=step_size, steps=STEPS) for model in models
            ]
            errors[name][m] = np.array([_distance(path.outputs, limit, problem, step_size, m) for path in paths])
            own[name][m] = np.array(
                [
                    _distance(path.outputs, prefix_ntk(model, problem.inputs), problem, step_size, m)
                    for path, model in zip(paths, models, strict=True)
                ]
            )
            example[f"{name}, m = {m}"] = np.asarray(paths[0].squared_error(problem.targets))
        example[f"{name}, predicted"] = 2 * np.asarray(
            predict(m * limit, problem.targets, learning_rate=step_size, steps=jnp.arange(STEPS + 1)).loss
        )
        for which, found, expected in (("", errors, "from -1/2"), (", own kernel", own, "above -1/2")):
            points = [(m, error) for m, values in found[name].items() for error in values]
            slope = slopes[name + which] = fits.exponent(*zip(*points, strict=True))
            gap = slope.gap(-0.5) if found is errors else max(slope.low + 0.5, 0.0)
            checks.append(Check(f"{name}{which}: exponent {slope}, distance of its interval {expected}", gap, 0.05))
        first, last = (float(np.median(errors[name][m])) for m in (used[0], used[-1]))
        what = f"{name}: median distance at m = {used[-1]} over that at m = {used[0]}"
        checks.append(Check(what, last / first, (used[-1] / used[0]) ** LEAST_EXPONENT, part=name))
    parameters = {"tokens": used[-1], "shortest": used[0], "steps": STEPS, "repeats": repeats, "sigma": problem.sigma}
    return Evidence(tuple(checks), parameters, {"errors": errors, "own": own, "slopes": slopes, "example": example})


def _other_sigma(problem: Problem) -> Evidence:
    return _follow(problem, repeats=1, wrong_sigma=WRONG)


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (curves, rates) = figures.panels(2)
    for name in MODELS:
        shown = {key: curve for key, curve in evidence.series["example"].items() if key.startswith(name)}
        for index, (key, curve) in enumerate(shown.items()):
            if key.endswith("predicted"):
                curves.plot(
                    curve, "--", color="black", linewidth=1, label="predicted by H*" if name == "tied" else None
                )
            else:
                fade = 0.25 + 0.75 * index / (len(shown) - 2)
                curves.plot(
                    curve, color=figures.COLORS[name], alpha=fade, label=key if index == len(shown) - 2 else None
                )
        slopes = evidence.series["slopes"]
        figures.power_law(rates, evidence.series["errors"][name], f"{name}, by H*", figures.COLORS[name], slopes[name])
        medians = {m: np.median(values) for m, values in evidence.series["own"][name].items()}
        slope = slopes[f"{name}, own kernel"]
        rates.plot(
            list(medians),
            list(medians.values()),
            "--",
            color=figures.COLORS[name],
            label=f"{name}, by H(W(0)): slope {slope.value:.2f}",
        )
        wrong = control.series["errors"][name]
        rates.plot(list(wrong), [np.median(v) for v in wrong.values()], ":", color=figures.COLORS["control"])
    figures.label(curves, title="Training curves (darker: longer prefix)", x="step t", y="|F(t) - Y|^2", log="y")
    figures.label(
        rates, title="Distance from the prediction", x="prefix length m", y="max_t |F(t) - predicted| / |Y|", log="xy"
    )
    return figure


CLAIM = Claim(
    name="dynamics",
    title="Training follows the kernel's prediction",
    statement="max_t |F(t) - F_kernel(t)| / |Y| falls as m^(-1/2) when predicted by H*, and faster by H(W(0))",
    proof="9",
    computed_by=("kernels.predict",),
    source="rate: derived from the claims limit and lazy; predictions by ntk_prefix.kernels.predict",
    measure=_follow,
    controls=tuple(
        Control(
            f"{name}, another sigma",
            "predictions by the limit kernel at a sigma that is 30 % too large",
            _other_sigma,
            name,
        )
        for name in MODELS
    ),
    draw=_draw,
    undecidable=_undecidable,
    caption="Left: squared error of trained prefixes and the prediction of the infinite-prefix kernel. Right: largest "
    "distance from the prediction over the training, by prefix length; dotted: predictions at a wrong sigma.",
)
