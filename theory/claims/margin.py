"""Gradient descent on the logistic loss gets labels right, certified by the kernel's margin where lambda_min says nothing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.certificate import MarginCertificate, certify
from ntk_prefix.certificate.margin import Ball, largest_margins, signs_of
from ntk_prefix.certificate.tokens import Tokens
from ntk_prefix.kernels import limit_ntk, prefix_ntk
from ntk_prefix.random_prefix import RandomPrefix
from ntk_prefix.typing import Array, Float
from theory import figures
from theory.claim import Check, Claim, Control, Evidence
from theory.problem import Problem, centered_digits

SIGMA = 0.5
WIDTH = 8
EXAMPLES = {"quick": 32, "full": 300}
TOKENS = {"quick": 4096, "full": 65536}
LOSS = {"quick": 0.45, "full": 0.3}
SIZES = (8, 16, 32, 64, 128, 256)
"""Examples at which margin and smallest eigenvalue are drawn."""
FARTHER = 6.0
"""How much farther than the ball's radius the control moves."""


class Case(NamedTuple):
    """Images of two digits and a prefix."""

    inputs: Float[Array, "n d"]
    labels: Float[np.ndarray, "n"]
    prefix: RandomPrefix


def digits(problem: Problem, examples: int) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n"]]:
    """Return images of the digits 0 and 1 in the unit ball, and labels -1 and 1, in an order drawn from the seed."""
    centered, directions, kinds = centered_digits()
    x = centered @ directions[:WIDTH].T
    rows = np.random.default_rng(problem.seed).permutation(np.flatnonzero(kinds < 2))[:examples]
    return x[rows] / np.linalg.norm(x[rows], axis=1).max(), signs_of(kinds[rows], examples)


@functools.lru_cache(maxsize=1)
def _case(problem: Problem) -> Case:
    x, labels = digits(problem, EXAMPLES[problem.profile])
    m = TOKENS[problem.profile]
    prefix = RandomPrefix(key=problem.key("margin"), d=WIDTH, m=m, sigma=SIGMA, model="fixed", outputs=1)
    return Case(jnp.asarray(x), labels, prefix)


@functools.lru_cache(maxsize=2)
def _certified(problem: Problem, shuffled: bool = False) -> MarginCertificate:
    case = _case(problem)
    labels = _shuffled(problem) if shuffled else case.labels
    return certify(case.inputs, labels=labels, model=case.prefix, loss=LOSS[problem.profile])


def _shuffled(problem: Problem) -> np.ndarray:
    """Return labels that have nothing to do with the images, as many of each as there are."""
    return np.random.default_rng(problem.seed + 1).permutation(_case(problem).labels)


def _outputs(weights: Array, signs: Array, inputs: Array) -> Float[Array, "n"]:
    return len(weights) * (jax.nn.softmax(inputs @ weights.T, axis=1) @ signs[:, 0])


@jax.jit
def _jacobian(weights: Array, signs: Array, inputs: Array) -> Float[Array, "n m d"]:
    """Return dF(x_i)/dW of some inputs, by autodiff of the model alone."""
    return jax.jacrev(_outputs)(weights, signs, inputs)


@functools.partial(jax.jit, static_argnames="steps")
def _descend(
    weights: Array, signs: Array, inputs: Array, labels: Array, seen: Array, step_size: Array, steps: int
) -> tuple[Array, Array]:
    """Return W after so many steps on ``seen`` labels, and the loss on ``labels`` at t = 0..steps."""

    def loss(weights: Array, labels: Array) -> Array:
        return jnp.mean(jnp.logaddexp(0, -labels * _outputs(weights, signs, inputs)))

    def step(weights: Array, _: None) -> tuple[Array, Array]:
        return weights - step_size * jax.grad(loss)(weights, seen), loss(weights, labels)

    last, losses = jax.lax.scan(step, weights, length=steps)
    return last, jnp.append(losses, loss(last, labels))


def _run(problem: Problem, name: str, seen: np.ndarray | None = None, slower: float = 1.0) -> Evidence:
    """Compare a run with the curve that was certified before it."""
    case = _case(problem)
    certificate = _certified(problem)
    weights, signs = case.prefix.materialise()
    labels = jnp.asarray(case.labels)
    steps = certificate.steps_needed
    seen = case.labels if seen is None else seen
    step_size = jnp.asarray(certificate.step_size / slower)
    last, losses = _descend(weights, signs, case.inputs, labels, jnp.asarray(seen), step_size, steps)
    curve = certificate.curve(steps)
    moved = float(jnp.linalg.norm(last - weights))
    checks = (
        Check(
            "loss of the run / certified, largest over the steps", float((losses / curve)[1:].max()), 1.0, part="run"
        ),
        Check("loss after the certified steps / asked for", float(losses[-1]) / certificate.wanted, 1.0, part="run"),
        Check("movement of the prefix / certified radius", moved / certificate.radius, 1.0),
    )
    parameters = {
        "examples": certificate.examples,
        "tokens": certificate.m,
        "steps": steps,
        "step_size": certificate.step_size,
        "margin": certificate.margin,
        "support": certificate.support,
        "steps_taken_to_the_loss": int(np.argmax(np.asarray(losses) <= certificate.wanted)),
    }
    return Evidence(checks, parameters, {name: (np.asarray(losses), curve)})


def _proof(problem: Problem, shuffled: bool = False) -> Evidence:
    """Ask for the certificate of labels, and whether the direction of the margin is what it says."""
    case = _case(problem)
    certificate = _certified(problem, shuffled)
    labels = _shuffled(problem) if shuffled else case.labels
    kernel = np.asarray(prefix_ntk(case.prefix, case.inputs)).reshape(len(case.labels), -1)
    _, alpha, _ = largest_margins(kernel, labels)
    weights, signs = case.prefix.materialise()
    scores = case.inputs @ weights.T
    blocks = len(weights) * jax.nn.softmax(scores, axis=1) * signs[:, 0]
    # U = sum_i alpha_i y_i J_i, of blocks T_ir a_r x_i, and y_i <J_i, U> without any kernel
    signed = jnp.asarray(alpha * labels)
    direction = (blocks * signed[:, None]).T @ case.inputs
    along = jnp.sum(blocks * (case.inputs @ direction.T), axis=1) / jnp.linalg.norm(direction) / len(weights) ** 0.5
    least = float((along * case.labels).min())
    failed = sum(not step.holds for step in certificate.steps)
    checks = (
        Check("inequalities of the proof that fail", failed, 0.5, part="labels"),
        Check(
            "|margin of the direction, without a kernel, / certified - 1|",
            abs(least / max(certificate.margin, 1e-12) - 1),
            1e-6,
            part="labels",
        ),
    )
    return Evidence(checks)


def _ball(problem: Problem, farther: float = 1.0) -> Evidence:
    """Move to the ball's edge where J_i changes most, and compare with what bounds it there.

    One token is moved, the one with the largest share, along the input: the bound is near what that does.
    """
    case = _case(problem)
    certificate = _certified(problem)
    kernel = np.asarray(prefix_ntk(case.prefix, case.inputs)).reshape(len(case.labels), -1)
    drift, lipschitz, _ = Ball.of(Tokens(case.prefix, case.inputs), kernel, 0.0).at(certificate.radius)
    weights, signs = case.prefix.materialise()
    worst: dict[str, float] = {"drift": 0.0, "slope": 0.0}
    for i in np.argsort(-drift)[:4]:
        x = case.inputs[i]
        unit = x / jnp.linalg.norm(x)
        token = int(jnp.argmax(weights @ x))
        scale = len(weights) ** 0.5
        there = [weights.at[token].add(farther * part * certificate.radius * unit) for part in (0.0, 0.95, 1.0)]
        start, near, edge = (_jacobian(w, signs, x[None]) for w in there)
        worst["drift"] = max(worst["drift"], float(jnp.linalg.norm(edge - start)) / scale / drift[i])
        apart = 0.05 * farther * certificate.radius
        # lipschitz is sqrt(m) L_i
        worst["slope"] = max(worst["slope"], float(jnp.linalg.norm(edge - near)) / apart / lipschitz[i])
    checks = (
        Check("change of a Jacobian at the ball's edge / its bound", worst["drift"], 1.0, part="ball"),
        Check("its slope there / the local Lipschitz constant", worst["slope"], 1.0, part="ball"),
    )
    return Evidence(checks, {"radius": certificate.radius})


def _spectra(problem: Problem) -> dict[str, np.ndarray]:
    """Return margin and smallest eigenvalue of the infinite prefix's kernel by the number of examples."""
    x, labels = digits(problem, SIZES[-1])
    kernel = np.asarray(limit_ntk(jnp.asarray(x), sigma=SIGMA, model="fixed", outputs=1)).reshape(len(x), -1)
    margins = [largest_margins(kernel[:n, :n], labels[:n])[0].min() for n in SIZES]
    return {"margin": np.array(margins), "smallest": np.array([np.linalg.eigvalsh(kernel[:n, :n])[0] for n in SIZES])}


def _measure(problem: Problem) -> Evidence:
    parts = [_run(problem, "run"), _proof(problem), _ball(problem)]
    spectra = _spectra(problem)
    falls = Check(
        f"margin at {SIZES[-1]} examples / at {SIZES[2]}",
        float(spectra["margin"][-1] / spectra["margin"][2]),
        0.3,
        at_least=True,
    )
    parameters = {name: value for part in parts for name, value in part.parameters.items()}
    series = {name: value for part in parts for name, value in part.series.items()} | spectra
    return Evidence((*[check for part in parts for check in part.checks], falls), parameters, series)


def _other_labels(problem: Problem) -> Evidence:
    return _run(problem, "trained on shuffled labels", seen=_shuffled(problem))


def _slower(problem: Problem) -> Evidence:
    return _run(problem, "a thousandth of the step", slower=1000.0)


def _no_margin(problem: Problem) -> Evidence:
    return _proof(problem, shuffled=True)


def _beyond(problem: Problem) -> Evidence:
    return _ball(problem, farther=FARTHER)


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (curves, sizes) = figures.panels(2)
    losses, curve = evidence.series["run"]
    times = np.arange(len(losses))
    curves.plot(times, curve, "--", color=figures.COLORS["bound"], label="certified before the first step")
    curves.plot(times, losses, color=figures.COLORS["fixed"], label="gradient descent")
    for name, style in (("a thousandth of the step", ":"), ("trained on shuffled labels", "-.")):
        curves.plot(times, control.series[name][0], style, color=figures.COLORS["control"], label=f"control: {name}")
    curves.set_xscale("symlog", linthresh=1)
    figures.label(curves, title="Logistic loss", x="step t", y="R(t)", log="y")
    sizes.plot(SIZES, evidence.series["margin"], "o-", color=figures.COLORS["fixed"], label="margin")
    smallest = np.maximum(evidence.series["smallest"], 1e-18)
    sizes.plot(SIZES, smallest, "s--", color=figures.COLORS["tied"], label="smallest eigenvalue")
    figures.label(
        sizes, title="Kernel of an infinite prefix, digits 0 and 1", x="examples n", y="margin, eigenvalue", log="xy"
    )
    return figure


CLAIM = Claim(
    name="margin",
    title="Labels, certified by the margin",
    statement="with S the length of a comparison point and kappa its certified margin, R(t) <= s^2 / (eta t) + 2 l(kappa) and "
    "R falls at every step, for any number of examples that the kernel separates",
    proof="margin.md",
    computed_by=("certificate.certify",),
    source="derived (theory/margin.md); the argument is the perceptron's",
    measure=_measure,
    controls=(
        Control("trained on shuffled labels", "descent sees labels that are not those certified", _other_labels, "run"),
        Control("a thousandth of the step", "descent takes smaller steps than were certified", _slower, "run"),
        Control(
            "shuffled labels",
            "certified are labels that have nothing to do with the images",
            _no_margin,
            "labels",
        ),
        Control("beyond the ball", f"tokens move {FARTHER:g} times farther than the bounds are told", _beyond, "ball"),
    ),
    draw=_draw,
    caption="Left: the logistic loss on images of two digits, and the curve that was certified before the first step. Right: "
    "the margin of an infinite prefix's kernel hardly falls with the number of examples; its smallest eigenvalue vanishes.",
    drawn=True,
)
