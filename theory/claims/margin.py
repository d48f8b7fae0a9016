"""Gradient descent on the logistic loss gets labels right, certified by the kernel's margin where lambda_min says nothing."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.certificate import MarginCertificate, certify, find_m
from ntk_prefix.certificate.margin import Ball, compared, contrasts, largest_margins, outputs_for
from ntk_prefix.certificate.tokens import Tokens
from ntk_prefix.kernels import limit_ntk, prefix_ntk
from ntk_prefix.random_prefix import RandomPrefix
from ntk_prefix.typing import Array, Float
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, Undecidable
from theory.problem import LARGEST_GRAM, Problem, centered_digits

SIGMA = 0.5
WIDTH = 8
EXAMPLES = {"quick": 32, "full": 300}
TOKENS = {"quick": 4096, "full": 65536}
"""Of images; for a reader's labels the search for a certified length starts there."""

LONGEST, NUMBERS = 2**20, 2**25
"""Where that search ends: at so many tokens, or so many scores of all rows."""

WORK = {"quick": 2**33, "full": 2**36}
"""Scores that a descent may compute."""

LOSS = {"quick": 0.45, "full": 0.3}
"""What is asked for of two kinds; of K it is log K / log 2 times that."""

SIZES = (8, 16, 32, 64, 128, 256)
"""Examples at which margin and smallest eigenvalue are drawn."""

SHUFFLES, EASIER = 4, 1.5
"""Orders of the labels of which the controls take the one with the smallest margin, and how much larger that of the labels
has to be: a certified length goes with its inverse square, and the shortest one is found to a factor of two."""

FARTHER = 6.0
"""How much farther than the ball's radius the control moves, at least, """
EXPONENT = 2.0
"""and by how much at least it moves the token's score: where it hardly grows J is nearly linear, and keeps its slope."""


class Case(NamedTuple):
    """Inputs with labels, a prefix, and the loss asked for."""

    inputs: Float[Array, "n d"]
    classes: np.ndarray
    """[n], whole numbers from 0."""
    prefix: RandomPrefix
    loss: float


def digits(problem: Problem, examples: int) -> tuple[Float[np.ndarray, "n d"], np.ndarray]:
    """Return images of the digits 0 and 1 in the unit ball, and which they are, in an order drawn from the seed."""
    centered, directions, kinds = centered_digits()
    x = centered @ directions[:WIDTH].T
    rows = np.random.default_rng(problem.seed).permutation(np.flatnonzero(kinds < 2))[:examples]
    return x[rows] / np.linalg.norm(x[rows], axis=1).max(), kinds[rows]


def _undecidable(problem: Problem) -> str | None:
    """Return why nothing can be said of the reader's labels."""
    if problem.labels is None:
        return None
    kinds, n = max(problem.labels) + 1, problem.n
    if kinds >= max(n, 3):
        return f"undecidable on these rows: {kinds} kinds of labels for {n} rows: give fewer kinds than rows"
    if kinds > 2 and n * kinds > LARGEST_GRAM:
        return (
            f"undecidable here: {n} rows for {kinds} kinds have {n * kinds} outputs: take {LARGEST_GRAM // kinds} rows"
        )
    return None


@functools.lru_cache(maxsize=1)
def _case(problem: Problem) -> Case:
    """Return images and a prefix of a length set beforehand, or the reader's rows and the shortest certified one.

    Raises:
        Undecidable: the kernel does not separate the reader's labels, or no easier than others, or no length that one can
            run is certified.
    """
    if problem.labels is None:
        x, classes = digits(problem, EXAMPLES[problem.profile])
        sigma, m, loss = SIGMA, TOKENS[problem.profile], LOSS[problem.profile]
    else:
        x, classes, sigma = np.asarray(problem.inputs), np.array(problem.labels), problem.sigma
        loss = LOSS[problem.profile] * math.log2(classes.max() + 1)
        m = _shortest(problem, classes, loss)
    prefix = RandomPrefix(
        key=problem.key("margin"), d=x.shape[1], m=m, sigma=sigma, model="fixed", outputs=outputs_for(classes)
    )
    return Case(jnp.asarray(x), classes, prefix, loss)


def _shortest(problem: Problem, classes: np.ndarray, loss: float) -> int:
    """Return the shortest prefix that is certified for the reader's labels, to a factor of two."""
    scores = 2 ** int(math.log2(NUMBERS / problem.n))
    found = find_m(
        problem.inputs,
        labels=classes,
        loss=loss,
        sigma=problem.sigma,
        key=problem.key("margin"),
        start=min(TOKENS[problem.profile], scores),
        largest=min(LONGEST, scores),
        resolution=0.5,
    )
    if not found.holds:
        head, step, *_ = found.explain().splitlines()
        raise Undecidable(f"undecidable at lengths one can run: {head} {step}")
    if found.steps_needed * found.m * problem.n > WORK[problem.profile]:
        raise Undecidable(
            f"undecidable by a run: certified are {found.steps_needed:,} steps of {found.m:,} tokens on {problem.n} rows, "
            "which takes too long: take fewer rows, or another sigma"
        )
    return found.m


@functools.lru_cache(maxsize=2)
def _certified(problem: Problem, shuffled: bool = False) -> MarginCertificate:
    case = _case(problem)
    classes = _shuffled(problem) if shuffled else case.classes
    return certify(case.inputs, labels=classes, model=case.prefix, loss=case.loss)


def _direction(kernel: np.ndarray, classes: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the least margin of labels, and the weights [n, k] of the direction that has it."""
    signed, _ = compared(kernel, classes, 0.0)
    margins, alpha, _ = largest_margins(signed, np.ones(len(signed)))
    return float(margins.min()), alpha.reshape(len(classes), -1)


def _kernel(case: Case) -> np.ndarray:
    found = np.asarray(prefix_ntk(case.prefix, case.inputs))
    return found.reshape(len(found) * found.shape[1], -1)


@functools.lru_cache(maxsize=1)
def _shuffled(problem: Problem) -> np.ndarray:
    """Return labels that have nothing to do with the inputs, as many of each as there are.

    Raises:
        Undecidable: they are as easy for the kernel as the right ones.
    """
    case, kernel = _case(problem), _kernel(_case(problem))
    draw = np.random.default_rng(problem.seed + 1)
    orders = [draw.permutation(case.classes) for _ in range(SHUFFLES)]
    margins = [_direction(kernel, order)[0] for order in orders]
    own = _direction(kernel, case.classes)[0]
    if own < EASIER * min(margins):
        raise Undecidable(
            f"undecidable by these labels: the kernel separates them by a margin of {own:.3g}, and shuffled ones by "
            f"{min(margins):.3g}: they have too little to do with the rows"
        )
    return orders[int(np.argmin(margins))]


def _outputs(weights: Array, signs: Array, inputs: Array) -> Float[Array, "n o"]:
    return len(weights) * (jax.nn.softmax(inputs @ weights.T, axis=1) @ signs)


@jax.jit
def _jacobian(weights: Array, signs: Array, x: Array, contrast: Array) -> Float[Array, "k m d"]:
    """Return the derivatives by W of what must be positive at an input, by autodiff of the model alone."""
    return jax.jacrev(lambda w: contrast @ _outputs(w, signs, x[None])[0])(weights)


@functools.partial(jax.jit, static_argnames="steps")
def _descend(
    weights: Array, signs: Array, inputs: Array, right: Array, seen: Array, step_size: Array, steps: int
) -> tuple[Array, Array]:
    """Return W after so many steps on the labels ``seen``, and the loss on the right ones at t = 0..steps."""

    def loss(weights: Array, contrast: Array) -> Array:
        between = jnp.einsum("nko,no->nk", contrast, _outputs(weights, signs, inputs))
        return jnp.mean(jax.nn.logsumexp(jnp.pad(-between, ((0, 0), (1, 0))), axis=1))

    def step(weights: Array, _: None) -> tuple[Array, Array]:
        return weights - step_size * jax.grad(loss)(weights, seen), loss(weights, right)

    last, losses = jax.lax.scan(step, weights, length=steps)
    return last, jnp.append(losses, loss(last, right))


def _run(problem: Problem, name: str, seen: np.ndarray | None = None, slower: float = 1.0) -> Evidence:
    """Compare a run with the curve that was certified before it."""
    case = _case(problem)
    certificate = _certified(problem)
    weights, signs = case.prefix.materialise()
    steps = certificate.steps_needed
    right, trained = (jnp.asarray(contrasts(case.classes if given is None else given)) for given in (None, seen))
    step_size = jnp.asarray(certificate.step_size / slower)
    last, losses = _descend(weights, signs, case.inputs, right, trained, step_size, steps)
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
        "kinds": certificate.kinds,
        "tokens": certificate.m,
        "steps": steps,
        "step_size": certificate.step_size,
        "margin": certificate.margin,
        "support": certificate.support,
        "steps_taken_to_the_loss": int(np.argmax(np.asarray(losses) <= certificate.wanted)),
    }
    return Evidence(checks, parameters, {name: (np.asarray(losses), curve)})


def _proof(problem: Problem, shuffled: bool = False) -> Evidence:
    """Ask for the certificate of labels, and whether their direction has the margin that is certified of the right ones."""
    case = _case(problem)
    certificate = _certified(problem, shuffled)
    weights, signs = case.prefix.materialise()
    _, alpha = _direction(_kernel(case), _shuffled(problem) if shuffled else case.classes)
    mass = len(weights) * jax.nn.softmax(case.inputs @ weights.T, axis=1)
    # U = sum_ik alpha_ik (what must be positive of i)', of blocks T_ir (a_r . beta_i) x_i, and <J_i, U> without any kernel
    given, right = contrasts(_shuffled(problem) if shuffled else case.classes), contrasts(case.classes)
    along_values = jnp.einsum("nk,nko->no", alpha, given) @ signs.T
    direction = (mass * along_values).T @ case.inputs
    along = (mass * (case.inputs @ direction.T)) @ signs / jnp.linalg.norm(direction) / len(weights) ** 0.5
    least = float(jnp.einsum("nko,no->nk", right, along).min())
    failed = sum(not step.holds for step in certificate.steps)
    checks = (
        Check("inequalities of the proof that fail", failed, 0.5, part="labels"),
        Check(
            "|margin of the direction, without a kernel, / certified - 1|",
            abs(least / _certified(problem).margin - 1),
            1e-6,
            part="direction",
        ),
    )
    return Evidence(checks)


def _ball(problem: Problem, farther: bool = False) -> Evidence:
    """Move to the ball's edge where J_i changes most, and compare with what bounds it there.

    One token is moved, the one with the largest share, along the input: the bound is near what that does.
    """
    case = _case(problem)
    certificate = _certified(problem)
    drift, lipschitz, _ = Ball.of(Tokens(case.prefix, case.inputs), _kernel(case), 0.0).at(certificate.radius)
    weights, signs = case.prefix.materialise()
    worst: dict[str, float] = {"drift": 0.0, "slope": 0.0}
    for i in np.argsort(-drift)[:4]:
        x, contrast = case.inputs[i], jnp.asarray(contrasts(case.classes)[i])
        length = float(jnp.linalg.norm(x))
        edge = certificate.radius
        if farther:
            edge = max(FARTHER * edge, EXPONENT / length)
        token = int(jnp.argmax(weights @ x))
        scale = len(weights) ** 0.5
        there = [weights.at[token].add(part * edge * x / length) for part in (0.0, 0.95, 1.0)]
        start, near, far = (_jacobian(w, signs, x, contrast) for w in there)
        moved, step = (float(jnp.linalg.norm(far - before, axis=(1, 2)).max()) for before in (start, near))
        worst["drift"] = max(worst["drift"], moved / scale / drift[i])
        # lipschitz is sqrt(m) L_i
        worst["slope"] = max(worst["slope"], step / (0.05 * edge) / lipschitz[i])
    checks = (
        Check("change of a Jacobian at the ball's edge / its bound", worst["drift"], 1.0, part="ball"),
        Check("its slope there / the local Lipschitz constant", worst["slope"], 1.0, part="ball"),
    )
    return Evidence(checks, {"radius": certificate.radius})


def _spectra(problem: Problem) -> dict[str, np.ndarray]:
    """Return margin and smallest eigenvalue of the infinite prefix's kernel by the number of examples."""
    if problem.labels is None:
        (x, classes), sigma = digits(problem, SIZES[-1]), SIGMA
    else:  # which may come sorted
        order = np.random.default_rng(problem.seed).permutation(problem.n)[: SIZES[-1]]
        x, sigma = np.asarray(problem.inputs)[order], problem.sigma
        classes = np.unique(np.array(problem.labels)[order], return_inverse=True)[1]
    outputs = outputs_for(classes)
    kernel = np.asarray(limit_ntk(jnp.asarray(x), sigma=sigma, model="fixed", outputs=outputs))
    kernel = kernel.reshape(len(x) * outputs, -1)
    signed, _ = compared(kernel, classes, 0.0)
    sizes = np.array([size for size in SIZES if size <= len(x)] or [len(x)])
    margins, smallest = [], []
    for n in sizes:
        rows = n * (len(signed) // len(x))
        margins.append(largest_margins(signed[:rows, :rows], np.ones(rows))[0].min())
        smallest.append(np.linalg.eigvalsh(kernel[: n * outputs, : n * outputs])[0])
    return {"sizes": sizes, "margin": np.array(margins), "smallest": np.array(smallest)}


def _measure(problem: Problem) -> Evidence:
    parts = [_run(problem, "run"), _proof(problem), _ball(problem)]
    checks = [check for part in parts for check in part.checks]
    spectra = _spectra(problem)
    if problem.labels is None:  # of others nothing says how fast it falls
        falls = float(spectra["margin"][-1] / spectra["margin"][2])
        checks.append(Check(f"margin at {SIZES[-1]} examples / at {SIZES[2]}", falls, 0.3, at_least=True))
    parameters = {name: value for part in parts for name, value in part.parameters.items()}
    series = {name: value for part in parts for name, value in part.series.items()} | spectra
    return Evidence(tuple(checks), parameters, series)


def _other_labels(problem: Problem) -> Evidence:
    return _run(problem, "trained on shuffled labels", seen=_shuffled(problem))


def _slower(problem: Problem) -> Evidence:
    # eta m B^2 <= 1: no step moves an output by more than 1, and all of them together by a tenth
    return _run(problem, "steps too short", slower=10.0 * _certified(problem).steps_needed)


def _no_margin(problem: Problem) -> Evidence:
    return _proof(problem, shuffled=True)


def _beyond(problem: Problem) -> Evidence:
    return _ball(problem, farther=True)


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (curves, sizes) = figures.panels(2)
    losses, curve = evidence.series["run"]
    times = np.arange(len(losses))
    curves.plot(times, curve, "--", color=figures.COLORS["bound"], label="certified before the first step")
    curves.plot(times, losses, color=figures.COLORS["fixed"], label="gradient descent")
    for name, style in (("steps too short", ":"), ("trained on shuffled labels", "-.")):
        curves.plot(times, control.series[name][0], style, color=figures.COLORS["control"], label=f"control: {name}")
    curves.set_xscale("symlog", linthresh=1)
    figures.label(curves, title="Logistic loss", x="step t", y="R(t)", log="y")
    counts = evidence.series["sizes"]
    sizes.plot(counts, evidence.series["margin"], "o-", color=figures.COLORS["fixed"], label="margin")
    smallest = np.maximum(evidence.series["smallest"], 1e-18)
    sizes.plot(counts, smallest, "s--", color=figures.COLORS["tied"], label="smallest eigenvalue")
    figures.label(sizes, title="Kernel of an infinite prefix", x="examples n", y="margin, eigenvalue", log="xy")
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
        Control("steps too short", "descent goes a tenth of the first certified step in all", _slower, "run"),
        Control(
            "shuffled labels",
            "certified are labels that have nothing to do with the inputs",
            _no_margin,
            "labels",
        ),
        Control("another direction", "the margin is that of the direction for such labels", _no_margin, "direction"),
        Control(
            "beyond the ball",
            f"tokens move at least {FARTHER:g} times farther than the bounds are told",
            _beyond,
            "ball",
        ),
    ),
    draw=_draw,
    caption="Left: the logistic loss on labels (images of two digits, unless --targets has labels), and the curve that was "
    "certified before the first step. Right: the margin of an infinite prefix's kernel, which on digits hardly falls with the "
    "number of examples, and its smallest eigenvalue, which vanishes.",
    drawn="unless labeled",
    undecidable=_undecidable,
)
