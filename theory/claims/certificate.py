"""A guarantee before the first step, at prefix lengths one can run: the certificate, and the descent it speaks of."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import RandomPrefix, bounds
from ntk_prefix.certificate import Certificate, certify, find_m
from ntk_prefix.certificate.curve import Curve, Forecast
from ntk_prefix.certificate.elsewhere import Elsewhere
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.one_layer import fixed_outputs, tied_outputs
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Array
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.claims.convergence import worst_targets
from theory.descent import MODELS, above_rounding, build, limit_of, smallest_eigenvalue, spectrum, with_weights
from theory.events import failures
from theory.problem import Problem, load
from theory.scales import FAILURE

START = {"fixed": 2048, "tied": 2**16}
"""Prefix lengths at which the search for a certified one starts; the quick profile tries powers of two only."""

LONGEST = {"quick": 2**20, "full": 2**24}
"""Where the search ends, by profile."""

LOWEST = 1e-4
"""Where the figure cuts the curve's lower side, which may be 0."""

CONTROL_INPUTS = 16

CONTROL_STEPS = 20

ACCURACY = 0.01
"""The share of the first loss that the report counts steps to."""

OTHER = 1.2
"""The control's kernel, over the right one."""

FASTER = 1.5
"""The control's rate, over that of the linearized run in its slowest direction: there the loss falls by 2 m eta lambda at most,
of which at least 3/4 is promised up to what a drift takes away."""

DRAWN_INPUTS, NEARER = 8, 20.0
"""Inputs whose a-priori limits are drawn, and what the control divides their distances by: Chebyshev's are 8 deviations."""

SHORTEST = 12
"""Halvings of the targets along the slowest direction until they are certified."""

QUICK_STEPS = {"fixed": 200, "tied": 50}
FULL_STEPS = {"fixed": 2000, "tied": 500}

RESTART_EVERY = 500
"""Steps of training between attempts at a certificate for a prefix that is too short for one where it is drawn."""

RESTARTS = 10

KINDS = ("certified", "certified before drawing", "form after the paper")

SPECTRUM_WORK = 2**21
"""m n^2 per step of descent that goes into watching lambda_min: at every step for short prefixes, else at every k-th;
the quick profile watches every tenth at most."""


class Run(NamedTuple):
    """Gradient descent from the certified start, with every hypothesis of the certificate watched."""

    error: np.ndarray
    """|F(t) - Y|^2 at t = 0..T-1."""
    reach: float
    """Largest |w_r(t) - w_r(0)| over that token's own radius, over all tokens and steps."""
    smallest: np.ndarray
    """lambda_min(H(W(t))) at every ``every``-th step."""
    every: int
    final: Array
    """W(T), [m, d]."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.error)


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def _advance(
    weights: Array,
    signs: Array,
    start: Array,
    radii: Array,
    data: tuple[Array, Array],
    step_size: Array,
    name: ModelName,
    steps: int,
) -> tuple[Array, tuple[Array, Array]]:
    """Take so many steps of gradient descent; before each the squared error and the largest movement over its radius."""
    outputs = tied_outputs if name == "tied" else fixed_outputs

    def step(weights: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        found, pull_back = jax.vjp(lambda w: outputs(w, signs, data[0]), weights)
        error = found - data[1]
        reach = (jnp.linalg.norm(weights - start, axis=1) / radii).max()
        return weights - step_size * pull_back(error)[0], (jnp.square(error).sum(), reach)

    return jax.lax.scan(step, weights, length=steps)


def follow(problem: Problem, certificate: Certificate, prefix: RandomPrefix, *, step_size: float, steps: int) -> Run:
    """Descend from the drawn prefix and watch what the certificate says of every step."""
    name = prefix.model
    weights, signs = prefix.materialise()
    model = build(problem, name, prefix.m)
    model.signs[...] = signs
    every = max(1 if problem.full else 10, prefix.m * problem.n**2 // SPECTRUM_WORK)
    start, radii = weights, jnp.asarray(certificate.radii)
    errors, reaches, smallest = [], [], []
    # one more step than asked for: what is recorded is the state before each
    for _ in range(steps // every + 1):
        smallest.append(float(spectrum(prefix_ntk(with_weights(model, weights), problem.inputs))[0]))
        weights, (error, reach) = _advance(
            weights, signs, start, radii, (problem.inputs, problem.targets), jnp.asarray(step_size), name, every
        )
        errors.append(np.asarray(error))
        reaches.append(float(reach.max()))
    return Run(np.concatenate(errors), max(reaches), np.array(smallest), every, weights)


def _watched(label: str, certificate: Certificate, run: Run, problem: Problem) -> list[Check]:
    """Return the hypotheses and conclusions of a certificate, at every step of a run; what diverged must not hold."""
    error = run.error[: above_rounding(run.error, problem, certificate.m, certificate.model)]
    floor = math.sqrt(certificate.smallest) - certificate.drift
    return [
        Check(f"{label}: movement of any token over its own radius", float(np.nan_to_num(run.reach, nan=np.inf)), 1.0),
        Check(
            f"{label}: sqrt(lambda_min(H(t))) over its bound",
            float(np.sqrt(max(np.nan_to_num(run.smallest).min(), 0))) / floor,
            1.0,
            at_least=True,
        ),
        _descends(label, error, certificate.rate),
        _inside(label, np.nan_to_num(run.error, nan=np.inf), certificate.curve(len(run.error) - 1)),
    ]


def _descends(label: str, error: np.ndarray, rate: float) -> Check:
    """Return that the loss falls at every step by what the rate promises: its logarithm over that of the loss."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        fallen = -np.log(error[1:] / error[:-1])
        promised = -math.log1p(-rate) if rate < 1 else math.inf
        worst = np.where(fallen > 0, promised / np.where(fallen > 0, fallen, 1), np.inf).max()
    return Check(f"{label}: promised fall of the loss in a step / its fall", float(worst), 1.0, part="rate")


def _inside(label: str, error: np.ndarray, curve: Curve) -> Check:
    """Return that |F(t) - Y| is within D(t) of the kernel's own curve at every step of a run."""
    apart = np.abs(np.sqrt(error[1:]) - np.sqrt(2 * curve.kernel[1:])) / curve.deviation[1:]
    return Check(f"{label}: distance from the kernel's curve over D(t)", float(apart.max()), 1.0, part="curve")


def _between(problem: Problem) -> Array:
    """Return inputs that are not trained on: the middles of neighbors."""
    return (problem.inputs + jnp.roll(problem.inputs, 1, axis=0)) / 2


@functools.lru_cache
def _elsewhere(problem: Problem, name: ModelName) -> Elsewhere:
    """Return what the shortest certified prefix makes certain of those."""
    prefix = _prefix(problem, name, _shortest(problem, name).m)
    found = certify(problem.inputs, problem.targets, model=prefix, x_test=_between(problem)).elsewhere
    assert found is not None
    return found


def _predicted(label: str, problem: Problem, run: Run, prefix: RandomPrefix, elsewhere: Elsewhere) -> Check:
    """Return that the outputs between the inputs are within their band after a run."""
    found = elsewhere.predict(np.array([run.steps], float))
    outputs = tied_outputs if prefix.model == "tied" else fixed_outputs
    apart = np.asarray(outputs(run.final, prefix.materialise()[1], _between(problem))) - found.outputs[0]
    what = f"{label}: distance from the prediction between the inputs, over its band"
    return Check(what, float(np.linalg.norm(apart) / found.deviation[0]), 1.0, part="between the inputs")


@functools.lru_cache
def _along_the_slowest(problem: Problem, name: ModelName) -> tuple[Certificate, Run]:
    """Return the certificate of the longest certified targets along the slowest direction, and a descent towards them.

    Data lie along fast directions, and their loss falls faster than any rate says; there it falls as slowly as it can.
    """
    found = _shortest(problem, name)
    prefix = _prefix(problem, name, found.m)
    # of the drawn kernel: where sigma is large the limit's slowest direction may be a fast one of it
    slowest = worst_targets(prefix_ntk(prefix, problem.inputs), problem)
    for power in range(SHORTEST):
        part = dataclasses.replace(problem, targets=slowest / 2**power)
        certificate = certify(part.inputs, part.targets, model=prefix, step_size=found.step_size)
        if certificate.holds:
            return certificate, follow(part, certificate, prefix, step_size=found.step_size, steps=CONTROL_STEPS)
    raise Undecidable(
        f"undecidable at m = {found.m:,}: targets along the slowest direction are not certified, however short they are"
    )


def at_size(problem: Problem, n: int) -> Problem:
    """Return the same data with n inputs: digits are taken anew, of a user's rows there are only those given."""
    if problem.source == "digits":
        return load(
            "digits", inputs=n, width=problem.d, sigma=problem.sigma, seed=problem.seed, profile=problem.profile
        )
    return dataclasses.replace(problem, inputs=problem.inputs[:n], targets=problem.targets[:n])


@functools.lru_cache
def _shortest(problem: Problem, name: ModelName) -> Certificate:
    """Return the shortest certified prefix, searched for once.

    Raises:
        Undecidable: H* is singular up to rounding, or no length that one can run is certified.
    """
    smallest_eigenvalue(spectrum(limit_of(problem, name)), f"H* ({name})")
    found = find_m(
        problem.inputs,
        problem.targets,
        sigma=problem.sigma,
        model=name,
        key=problem.key("certificate", name),
        start=START[name],
        largest=LONGEST[problem.profile],
        resolution=0.02 if problem.full else 0.5,
    )
    if not found.holds:
        raise Undecidable(
            f"undecidable at lengths one can run: up to m = {found.m:,} no prefix ({name}, n = {problem.n}, sigma = "
            f"{problem.sigma:g}) is certified: take a smaller sigma, or rows that are less alike"
        )
    return found


def plan(problem: Problem) -> dict[ModelName, list[int]]:
    """Return numbers of inputs to certify, by model."""
    return {"tied": [8, 16], "fixed": [8, 16, 32]} if problem.full else {"tied": [8], "fixed": [16]}


def _prefix(problem: Problem, name: ModelName, m: int) -> RandomPrefix:
    # described as the search describes it, and so drawn by the same programs
    outputs = None if name == "tied" else problem.d
    key = problem.key("certificate", name)
    return RandomPrefix(key=key, d=problem.d, m=m, sigma=problem.sigma, model=name, outputs=outputs)


def _paper(problem: Problem, name: ModelName) -> float:
    """Return log10 of the prefix length after the paper's convergence theorem."""
    scale = bounds.weight_scale(sigma=problem.sigma, inputs=problem.n, outputs=problem.d, failure=FAILURE)
    smallest = smallest_eigenvalue(spectrum(limit_of(problem, name)), f"H* ({name})")
    return bounds.log10_prefix_length(
        smallest=smallest, inputs=problem.n, outputs=problem.d, scale=scale, failure=FAILURE
    )


def _measure(problem: Problem) -> Evidence:
    checks: list[Check] = []
    lengths: dict[str, dict[str, dict[int, float]]] = {name: {kind: {} for kind in KINDS} for name in MODELS}
    curves: dict[str, tuple[np.ndarray, Curve, np.ndarray]] = {}
    parameters: dict[str, float | int | str] = {}
    for name in MODELS:
        for n in plan(problem)[name]:
            part = at_size(problem, n)
            label = f"{name}, n = {part.n}"
            found = _shortest(part, name)
            prior = certify(part.inputs, part.targets, sigma=part.sigma, model=name, delta=FAILURE)
            asked = _paper(part, name)
            before = prior.m if prior.holds else math.nan
            for kind, value in zip(KINDS, (found.m, before, 10**asked), strict=True):
                lengths[name][kind][part.n] = value
            parameters |= {
                f"tokens_{name}_{part.n}": found.m,
                f"tokens_before_drawing_{name}_{part.n}": before,
                f"theory_log10_{name}_{part.n}": asked,
            }
            if n == plan(problem)[name][0]:
                checks += failures(at_size(problem, DRAWN_INPUTS), name)
            steps = FULL_STEPS[name] if problem.full else QUICK_STEPS[name]
            run = follow(part, found, _prefix(part, name, found.m), step_size=found.step_size, steps=steps)
            checks += _watched(f"{label}, {len(run.error) - 1} steps", found, run, part)
            curve = found.curve(len(run.error) - 1)
            curves[label] = (run.error, curve, (1 - found.rate) ** curve.steps)
            within = found.curve(found.steps_to(ACCURACY))
            parameters |= {
                f"widest_band_{name}_{part.n}": float(curve.deviation.max() / math.sqrt(run.error[0])),
                f"steps_to_1_percent_{name}_{part.n}": int(within.steps[-1]),
                f"steps_to_1_percent_of_the_kernel_{name}_{part.n}": int(
                    np.argmax(within.kernel <= ACCURACY * within.kernel[0])
                ),
            }
            parameters[f"tightest_step_{name}_{part.n}"] = max(
                found.drift_parts, key=lambda key: found.drift_parts[key]
            )
            if name == "fixed":
                certificate, along = _along_the_slowest(part, name)
                checks.append(_descends(f"{label}, slowest targets", along.error, certificate.rate))
                others = _elsewhere(part, name)
                checks.append(_predicted(label, part, run, _prefix(part, name, found.m), others))
                band = others.predict(np.array([run.steps], float))
                parameters[f"band_between_the_inputs_{name}_{part.n}"] = float(
                    band.deviation[0] / np.linalg.norm(band.outputs[0])
                )
            if problem.full and name == "fixed":
                checks += _restarted(part, name, found.m // 8 * 2)
    parameters["tokens"] = int(max(max(kinds["certified"].values()) for kinds in lengths.values()))
    return Evidence(tuple(checks), parameters, {"lengths": lengths, "curves": curves})


def _restarted(problem: Problem, name: ModelName, m: int) -> list[Check]:
    """Check that a prefix a quarter as long is refused where it is drawn and certified where some training has taken it."""
    prefix = _prefix(problem, name, m)
    weights, signs = prefix.materialise()
    model = build(problem, name, m)
    model.signs[...] = signs
    fresh = certify(problem.inputs, problem.targets, model=prefix)
    data, free = (problem.inputs, problem.targets), jnp.ones(m)
    steps = 0
    for _ in range(RESTARTS):
        steps += RESTART_EVERY
        weights, _ = _advance(weights, signs, weights, free, data, jnp.asarray(fresh.step_size), name, RESTART_EVERY)
        again = certify(problem.inputs, problem.targets, model=with_weights(model, weights), step_size=fresh.step_size)
        if again.holds:
            break
    label = f"{name}, n = {problem.n}, m = {m:,}, restarted after {steps} steps"
    return [
        Check(f"{label}: tightest inequality there", again.margin, 1, at_least=True),
        Check(f"{label}: tightest inequality where it was drawn", fresh.margin, 1),
    ]


def _nearer(problem: Problem) -> Evidence:
    part = at_size(problem, DRAWN_INPUTS)
    return Evidence(tuple(check for name in MODELS for check in failures(part, name, NEARER)))


def _sabotage(problem: Problem) -> Evidence:
    """Measure a prefix that is too short, and a certified one with steps too long, a rate too good, by another's curve."""
    name: ModelName = "fixed"
    part = at_size(problem, CONTROL_INPUTS)
    found = _shortest(part, name)
    short = certify(part.inputs, part.targets, model=_prefix(part, name, max(found.m // 128 * 2, 2)))
    run = follow(part, found, _prefix(part, name, found.m), step_size=16 * found.step_size, steps=CONTROL_STEPS)
    certificate, along = _along_the_slowest(part, name)
    faster = FASTER * 2 * certificate.m * certificate.step_size * certificate.smallest
    slowest = _descends(f"{name}, slowest targets, a rate too good", along.error, faster)
    checks = [
        Check(f"{name}: tightest inequality at m = {short.m}", short.margin, 1, at_least=True, part="too short"),
        *_watched(f"{name}, steps too long", found, run, part),
        dataclasses.replace(slowest, part="too good"),
    ]
    prefix, others = _prefix(part, name, found.m), _elsewhere(part, name)
    right = follow(part, found, prefix, step_size=found.step_size, steps=CONTROL_STEPS)
    forecast = found.forecast
    assert forecast is not None
    kernel = forecast.reference.kernel
    other = dataclasses.replace(forecast.reference, kernel=kernel._replace(values=OTHER * kernel.values))
    wrong = Forecast(other, found.drift, found.rate).curve(np.arange(len(right.error)))
    checks.append(dataclasses.replace(_inside(f"{name}, another kernel", right.error, wrong), part="another kernel"))
    their_own = others.predict(np.array([right.steps], float)).outputs
    others = dataclasses.replace(others, kernel=OTHER * others.kernel)
    checks.append(_predicted(f"{name}, another kernel", part, right, prefix, others))
    _check_narrow(
        "the curve", found, np.sqrt(2 * wrong.kernel) - np.sqrt(2 * found.curve(wrong.steps).kernel), wrong.deviation
    )
    predicted = others.predict(np.array([right.steps], float))
    _check_narrow("predictions", found, np.linalg.norm(predicted.outputs - their_own, axis=(1, 2)), predicted.deviation)
    return Evidence(tuple(checks), {"tokens": found.m}, {"other": (f"{name}, n = {part.n}", wrong)})


def _check_narrow(what: str, certificate: Certificate, apart: np.ndarray, band: np.ndarray) -> None:
    """Refuse a band within which a run of either kernel may be.

    Raises:
        Undecidable: kernels are nowhere as far apart as the band is wide.
    """
    worth = np.abs(apart[band > 0]) / band[band > 0]
    if not worth.max(initial=0) >= 1:
        raise Undecidable(
            f"undecidable at m = {certificate.m:,}: the certified band of {what} is {1 / max(worth.max(initial=0), 1e-9):.2g} "
            f"times as wide as what a kernel {OTHER:g} times as large changes: take more rows"
        )


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (lengths, losses, distances) = figures.panels(3)
    counts: set[int] = set()
    for name, kinds in evidence.series["lengths"].items():
        for (kind, found), style in zip(kinds.items(), ("o-", "^--", "s:"), strict=True):
            text = f"{'_' if name == 'tied' else ''}{name}: {kind}"  # the names of one model are enough
            lengths.plot(list(found), list(found.values()), style, color=figures.COLORS[name], label=text)
            counts |= set(found)
    lengths.set_xlim(0.8 * min(counts), 1.25 * max(counts))
    title = "Prefix length that guarantees convergence"
    figures.label(lengths, title=title, x="inputs n", y="prefix length m", log="xy", direct=True)
    lengths.set_xticks(sorted(counts), [f"{n}" for n in sorted(counts)], minor=False)
    lengths.set_xticks([], minor=True)
    for label, (error, curve, by_rate) in evidence.series["curves"].items():
        times, color = np.arange(1, len(error) + 1), figures.COLORS[label.split(",")[0]]
        losses.plot(times, by_rate, "--", color=color, linewidth=1, label=f"{label}, by its rate")
        losses.plot(times, error / error[0], color=color, label=label)
        # of the two sides the lower one is the nearer
        certified, found = 1 - curve.lower / curve.kernel, np.abs(error / 2 / curve.kernel - 1)
        distances.plot(times[1:], certified[1:], "--", color=figures.COLORS["bound"], label=f"{label}, certified")
        distances.plot(times[1:], found[1:], color=color, label=label)
    label, other = control.series["other"]  # fewer inputs than it asks for, of a user's few rows
    right = evidence.series["curves"][label][1].kernel[: len(other.steps)]
    wrong = np.abs(right / other.kernel - 1)
    distances.plot(other.steps[1:] + 1, wrong[1:], ":", color=figures.COLORS["control"], label="control")
    figures.label(losses, title="The loss of gradient descent", x="step t + 1", y="L(t) / L(0)", log="xy", direct=True)
    title, between = "Its distance from the prediction", "|L(t) / L_kernel(t) - 1|"
    figures.label(distances, title=title, x="step t + 1", y=between, log="xy", direct=True)
    return figure


CLAIM = Claim(
    name="certificate",
    title="Convergence, certified before the first step",
    statement="|F(t+1) - Y|^2 <= (1 - rate) |F(t) - Y|^2 for ever, ||F(t) - Y| - |F_kernel(t) - Y|| <= D(t), |w_r(t) - w_r(0)| "
    "<= R_r for every token and sqrt(lambda_min(H(t))) >= sqrt(lambda) - Delta, all computed from X, Y and W(0) with "
    "rounding accounted for",
    proof="certificate.md",
    computed_by=("certificate.certify", "certificate.find_m", "Certificate.curve", "Certificate.predict"),
    source="derived (theory/certificate.md); checked along a real descent at the smallest certified m",
    measure=_measure,
    controls=(
        Control("too short", "a prefix 64 times too short, or one pair, is refused", _sabotage, "too short"),
        Control("steps too long", "with steps 16 times too long the loss does not fall as promised", _sabotage, "rate"),
        Control(
            "a rate too good",
            f"{FASTER:g} times the rate of the linearized run is not kept in the slowest direction",
            _sabotage,
            "too good",
        ),
        Control(
            "nearer limits",
            f"1/{NEARER:g} of the distances that draws may have, or what a quarter of other draws exceeds, are not kept",
            _nearer,
            "events",
        ),
        Control("another kernel", "the curve of a kernel a fifth too large is left", _sabotage, "another kernel"),
        Control("between the inputs", "predictions by such a kernel are left", _sabotage, "between the inputs"),
    ),
    draw=_draw,
    caption="Left: smallest certified prefix length beside the form after the paper, for tied (blue) and fixed values. "
    "Middle: the loss of gradient descent at the certified length; dashed: what the rate of the slowest direction says "
    "alone. Right: how far it is from the predicted loss, below what is certified (green); dotted: how far from the "
    f"prediction by a kernel {OTHER:g} times as large.",
)
