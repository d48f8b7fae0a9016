"""Training a finite prefix follows the trajectory that the infinite-prefix kernel predicts, ever closer as m grows."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from ntk_prefix import bounds
from ntk_prefix.certificate import certify
from ntk_prefix.certificate.curve import Curve
from ntk_prefix.kernels import limit_ntk, predict, prefix_ntk
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Array, Inputs, Kernel
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.descent import MODELS, Model, build, descend, limit_of, spectrum, with_weights
from theory.problem import Problem
from theory.scales import ASYMPTOTIC_SIGMA, expected_error, indistinct, training_lengths

STEPS = 200
REPEATS = 3

SECOND_ORDER_SIGMA = 0.25
"""The largest sigma at which the orders of a kernel's own error show from m = 256 on. They average products of more tilts
than a kernel does, and so show later: at sigma = 0.5 the exponents are still 0.1 to 0.25 above."""

ORDERS = {"in pairs": -2.0, "without pairs": -1.5}
"""Exponents of the distance from the prediction by H(W(0)) (theory/README.md, section 9), by start."""

NEAR = 0.25
"""How far the farther end of an exponent's interval may be from the exponent derived: half of what the two differ by."""

NARROW = 0.1
"""Largest half width of an interval that can tell them apart."""

ALLOWED = 0.05
"""How far an interval may be from -1/2: terms beyond the first are seen at lengths that one can train."""

DRAWS = range(3, 25, 3)
"""Starts of a kind at each length: as many as make the interval narrow."""

EVEN = 1e-9
"""What rounding may leave of a difference that is zero, over the drift; the other way it is of order 1."""

LEAST_EXPONENT = -0.35
"""What the distance must fall with: near the -1/2 expected, and farther than draws scatter (0.05) from the -0.2 that is left
at a wrong sigma."""

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


class _Run(NamedTuple):
    """A descent and what it started from."""

    model: Model
    outputs: Array
    targets: Array
    step_size: float

    def apart(self, kernel: Kernel) -> Array:
        """Return the distance from the prediction by a kernel at every step."""
        predicted = predict(
            self.model.m * kernel,
            self.targets,
            learning_rate=self.step_size,
            steps=jnp.arange(STEPS + 1),
            f_train_0=self.outputs[0],
        ).train
        return jnp.linalg.norm(self.outputs - predicted, axis=(1, 2))

    def distance(self, kernel: Kernel) -> float:
        """Return the largest of them, over |F(0) - Y|."""
        return float(self.apart(kernel).max() / jnp.linalg.norm(self.outputs[0] - self.targets))


@functools.cache
def _largest(problem: Problem, name: ModelName) -> float:
    """Return lambda_max(H*)."""
    return float(spectrum(limit_of(problem, name))[-1])


@functools.cache
def _trained(problem: Problem, name: ModelName, m: int, repeat: int, symmetric: bool = True) -> _Run:
    """Train a drawn prefix, once for the measurement and its controls; without pairs on the targets y + F(0)."""
    step_size = 0.25 * bounds.largest_stable_step(largest=_largest(problem, name), tokens=m)
    if symmetric:
        model = _drawn(problem, name, m, repeat)
        targets = problem.targets
    else:
        model = _without_pairs(_trained(problem, name, m, 0).model, problem, repeat)
        targets = problem.targets + _outputs(nnx.split(model), problem.inputs)
    path = descend(model, problem.inputs, targets, step_size=step_size, steps=STEPS)
    return _Run(model, path.outputs, targets, step_size)


def _drawn(problem: Problem, name: ModelName, m: int, repeat: int) -> Model:
    """Return a start in pairs; all sigmas share the programs that draw one."""
    model = build(dataclasses.replace(problem, sigma=1.0), name, m, "dynamics", repeat)
    model.weights[...] = problem.sigma * model.weights[...]
    return model


@jax.jit
def _outputs(graph_and_state: tuple[nnx.GraphDef[Model], nnx.State], inputs: Inputs) -> Array:
    return nnx.merge(*graph_and_state)(inputs)


def _random(problem: Problem, *labels: int | str) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(problem.key("dynamics", *labels))))


def _without_pairs(model: Model, problem: Problem, repeat: int) -> Model:
    """Return another start of that shape, with independent tokens; drawn by NumPy, whose draws are no programs."""
    random = _random(problem, type(model).__name__, model.m, repeat)
    single = with_weights(model, jnp.asarray(problem.sigma * random.normal(size=model.weights.shape)))
    single.signs[...] = jnp.asarray(random.choice([-1.0, 1.0], size=model.signs.shape))
    return single


@functools.cache
def _certified(problem: Problem, name: ModelName, m: int) -> Curve | None:
    """Return what is certain of the first of these descents before it starts; None if that is nothing."""
    run = _trained(problem, name, m, 0)
    found = certify(problem.inputs, run.targets, model=run.model, step_size=run.step_size)
    return found.curve(STEPS) if found.holds else None


def _follow(problem: Problem, wrong_sigma: float = 1.0) -> Evidence:
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, ASYMPTOTIC_SIGMA))
    checks: list[Check] = []
    errors: dict[str, dict[int, np.ndarray]] = {}
    slopes: dict[str, fits.Exponent] = {}
    example: dict[str, np.ndarray] = {}
    curves: dict[str, Curve] = {}
    used = training_lengths(problem)[1:]
    for name in MODELS:
        limit = limit_ntk(problem.inputs, sigma=problem.sigma * wrong_sigma, model=name)
        errors[name] = {}
        for m in used:
            runs = [_trained(problem, name, m, repeat) for repeat in range(REPEATS)]
            errors[name][m] = np.array([run.distance(limit) for run in runs])
            example[f"{name}, m = {m}"] = np.asarray(jnp.square(runs[0].outputs - problem.targets).sum((1, 2)))
        # nothing shorter is certified for 16 inputs at a sigma where the rate of H* shows
        if problem.full and (curve := _certified(problem, name, m)) is not None:
            kernel = limit if wrong_sigma != 1 else prefix_ntk(runs[0].model, problem.inputs)
            worst = float((np.asarray(runs[0].apart(kernel))[1:] / curve.deviation[1:]).max())
            what = f"{name}, m = {m}: distance from the prediction by H(W(0)) over D(t), certified before"
            checks.append(Check(what, worst, 1.0, part=name))
            curves[name] = curve
        example[f"{name}, predicted"] = 2 * np.asarray(
            predict(m * limit, problem.targets, learning_rate=runs[0].step_size, steps=jnp.arange(STEPS + 1)).loss
        )
        slope = slopes[name] = fits.exponent(*_points(errors[name]))
        if wrong_sigma == 1:
            fits.check_narrow(slope, NARROW, f"the distance from the prediction by H* ({name})")
            fits.check_settled(slope, -0.5, ALLOWED, f"the distance from the prediction by H* ({name})")
        checks += [
            Check(f"{name}: exponent {slope}, distance of its interval from -1/2", slope.gap(-0.5), ALLOWED),
            Check(f"{name}: that exponent", slope.value, LEAST_EXPONENT, part=name),
        ]
    parameters = {"tokens": used[-1], "shortest": used[0], "steps": STEPS, "repeats": REPEATS, "sigma": problem.sigma}
    series = {"errors": errors, "slopes": slopes, "example": example, "curves": curves}
    return Evidence(tuple(checks), parameters, series)


def _points(errors: dict[int, np.ndarray]) -> tuple[list[int], list[float]]:
    """Return all measurements and their lengths."""
    return [m for m, values in errors.items() for _ in values], [
        error for values in errors.values() for error in values
    ]


@functools.cache
def _own(problem: Problem, name: ModelName, start: str) -> dict[int, np.ndarray]:
    """Return distances from the prediction by H(W(0)) at a small sigma, by length."""
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, SECOND_ORDER_SIGMA))
    lengths = training_lengths(problem)[1:-1]
    found: dict[int, list[float]] = {m: [] for m in lengths}
    for draws in DRAWS:
        for m in lengths:
            runs = [_trained(problem, name, m, repeat, start == "in pairs") for repeat in range(len(found[m]), draws)]
            found[m] += [run.distance(prefix_ntk(run.model, problem.inputs)) for run in runs]
        errors = {m: np.array(values) for m, values in found.items()}
        if fits.exponent(*_points(errors)).half_width <= NARROW:
            break
    return errors


def _orders(problem: Problem, exchanged: bool = False) -> Evidence:
    """Hold the distances from the prediction by H(W(0)) to their orders, or each start to the order of the other."""
    checks: list[Check] = []
    own: dict[str, dict[int, np.ndarray]] = {}
    slopes: dict[str, fits.Exponent] = {}
    for name in MODELS:
        for start, order in zip(ORDERS, reversed(ORDERS.values()) if exchanged else ORDERS.values(), strict=True):
            label = f"{name}, {start}"
            own[label] = _own(problem, name, start)
            slope = slopes[label] = fits.exponent(*_points(own[label]))
            fits.check_narrow(slope, NARROW, f"the distance from the prediction by H(W(0)) ({label})")
            what = f"{label}, by H(W(0)): exponent {slope}, its farther end from {order:g}"
            checks.append(Check(what, slope.distance(order), NEAR, part=f"{name}, exchanged"))
        checks.append(_even(problem, name, alike=exchanged))
    return Evidence(tuple(checks), {}, {"own": own, "own slopes": slopes})


def _even(problem: Problem, name: ModelName, alike: bool) -> Check:
    """Return that H(W(0) + u) = H(W(0) - u) if the tokens of a pair move against one another, which ``alike`` denies."""
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, SECOND_ORDER_SIGMA))
    model = _drawn(problem, name, training_lengths(problem)[1], 0)
    moved = _random(problem, name, "pairs").normal(size=(model.m // 2, problem.d))
    moved *= 0.1 / np.linalg.norm(problem.inputs, axis=1).max()  # scores change by a tenth
    both = np.stack([moved, moved if alike else -moved], axis=1).reshape(model.m, -1)
    start, ahead, back = (
        prefix_ntk(with_weights(model, model.weights[...] + sign * both), problem.inputs) for sign in (0, 1, -1)
    )
    odd = float(jnp.linalg.norm((ahead - back).ravel()) / jnp.linalg.norm((ahead - start).ravel()))
    return Check(f"{name}: |H(W(0) + u) - H(W(0) - u)| over the drift", odd, EVEN, part=f"{name}, exchanged")


def _measure(problem: Problem) -> Evidence:
    limit, own = _follow(problem), _orders(problem)
    return Evidence(limit.checks + own.checks, limit.parameters, limit.series | own.series)


def _other_sigma(problem: Problem) -> Evidence:
    return _follow(problem, wrong_sigma=WRONG)


def _exchanged(problem: Problem) -> Evidence:
    return dataclasses.replace(_orders(problem, exchanged=True), series={})


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (curves, rates) = figures.panels(2)
    for curve in evidence.series["curves"].values():
        sides = (2 * curve.lower, 2 * curve.upper)
        curves.fill_between(curve.steps, *sides, color=figures.COLORS["bound"], alpha=0.4, label="certified before")
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
        for start, style in zip(ORDERS, ("--", "-."), strict=True):
            medians = {m: np.median(values) for m, values in evidence.series["own"][f"{name}, {start}"].items()}
            slope = evidence.series["own slopes"][f"{name}, {start}"]
            label = f"{name}, {start}: slope {slope.value:.2f} [{slope.low:.2f}, {slope.high:.2f}]"
            rates.plot(list(medians), list(medians.values()), style, color=figures.COLORS[name], label=label)
        wrong = control.series["errors"][name]
        rates.plot(
            list(wrong), [np.median(v) for v in wrong.values()], ":", color=figures.COLORS["control"],
            label=f"{'_' if name == 'tied' else ''}{name}, control",
        )  # fmt: skip
    figures.label(curves, title="Training curves (darker: longer prefix)", x="step t", y="|F(t) - Y|^2", log="y")
    figures.label(
        rates, title="Distance from the prediction", x="prefix length m", y="max_t |F(t) - predicted| / |Y|", log="xy"
    )
    return figure


CLAIM = Claim(
    name="dynamics",
    title="Training follows the kernel's prediction",
    statement="max_t |F(t) - F_kernel(t)| / |F(0) - Y| falls as m^(-1/2) when predicted by H*; by H(W(0)) as m^(-2) from "
    "starts in pairs, where H(W(0) + u) = H(W(0) - u), and as m^(-3/2) from others, their offset removed",
    proof="9",
    computed_by=("kernels.predict",),
    source="rates: derived (theory/README.md); predictions by ntk_prefix.kernels.predict",
    measure=_measure,
    controls=(
        *(
            Control(
                f"{name}, another sigma",
                "predictions by the limit kernel at a sigma that is 30 % too large",
                _other_sigma,
                name,
            )
            for name in MODELS
        ),
        *(
            Control(
                f"{name}, exchanged",
                "each start held to the order of the other, and tokens of a pair that move alike",
                _exchanged,
                f"{name}, exchanged",
            )
            for name in MODELS
        ),
    ),
    draw=_draw,
    undecidable=_undecidable,
    caption="Left: squared error of trained prefixes and the prediction of the infinite-prefix kernel; green, where the "
    "longest is certified: between what its loss was certain to lie. Right: largest distance from the prediction over the "
    "training, by prefix length: solid by H*, dashed by the start's own kernel at sigma = 0.25, from starts in pairs and "
    "without; dotted: by H* at a wrong sigma.",
)
