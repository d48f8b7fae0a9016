"""A state that trains as an infinite prefix does: how far apart the two get, and that it falls in R."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from matplotlib.figure import Figure

from ntk_prefix import ntk_attention, prefix_attention
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.kernels import equivalence
from ntk_prefix.quadrature import caratheodory
from ntk_prefix.typing import Array
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.problem import Problem, load
from theory.scales import FALLING

HEAD = Path(__file__).parents[1] / "head.npz"
"""Keys and queries of a head of MiniLM-L6, see :mod:`theory.record_head`."""

TRAINED, FITTED = 64, 448
"""Queries that are trained on, and other ones that anchors, masses and W are chosen on."""

POOL = 4096
"""Draws of a Gaussian prefix that anchors are chosen among."""

STEPS, DRAWS = 1000, 3
OUTPUTS = 8

CLOSE = 0.13
"""What the distance of two runs must come down to, over the first error, at the largest R: two thirds of what the nearest
control keeps, after a first measurement."""

WRONG = 1.5
"""The control's sigma, over the right one: keys of the head are as many times longer."""

SIMULATED = 200
"""Steps of gradient descent by automatic differentiation, through attention itself."""

Trained = Literal["values", "values and keys"]
TRAININGS: tuple[Trained, ...] = ("values", "values and keys")


def _sizes(problem: Problem) -> tuple[int, ...]:
    return (8, 16, 32, 64, 128, 192) if problem.full else (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """A prefix, its queries, and what it is to learn.

    Args:
        name: for the reader.
        keys: [m, h], tokens of the prefix, or draws from it.
        queries: [TRAINED + FITTED, h].
        log_mass: [queries], log of the mean of ``e^{q . k}`` over the prefix.
        ntk: [queries, queries], K, of the values.
        error: [TRAINED, outputs], ``e(0)``.
    """

    name: str
    keys: np.ndarray
    queries: np.ndarray
    log_mass: np.ndarray
    ntk: np.ndarray
    error: np.ndarray

    @classmethod
    def gaussian(cls, problem: Problem, scale: float = 1.0) -> Case:
        """Digits before an infinite Gaussian prefix, whose K is known: ``e^{sigma^2 q . q'}``."""
        sigma, count = scale, TRAINED + FITTED
        queries = np.asarray(
            load("digits", inputs=count, width=8, sigma=1.0, seed=problem.seed, profile="quick").inputs
        )
        keys = sigma * _random(problem, "pool").normal(size=(POOL, queries.shape[1]))
        log_mass = sigma**2 * np.sum(queries**2, axis=1) / 2
        return cls("digits", keys, queries, log_mass, np.exp(sigma**2 * queries @ queries.T), _error(problem))

    @classmethod
    def head(cls, problem: Problem, scale: float = 1.0) -> Case:
        """A head of MiniLM: queries of some texts before a prefix of 1,024 tokens of others."""
        with np.load(HEAD) as stored:
            keys, queries = (stored[name].astype(np.float64) for name in ("keys", "queries"))
        queries = queries[_random(problem, "head").permutation(len(queries))[: TRAINED + FITTED]]
        scores = scale * queries @ keys.T
        largest = scores.max(1)
        log_mass = np.log(np.mean(np.exp(scores - largest[:, None]), axis=1)) + largest
        tilts = np.exp(scores - log_mass[:, None])
        return cls("a head of MiniLM", scale * keys, queries, log_mass, tilts @ tilts.T / len(keys), _error(problem))

    def resolution(self, rows: int, trained: int) -> float:
        """Return lambda for as many rows of the kernel: 1 / (2 eta T) of the rows trained, in proportion."""
        return rows / trained * float(np.linalg.eigvalsh(self.ntk[:trained, :trained])[-1]) / STEPS

    def tilts(self, points: np.ndarray) -> np.ndarray:
        """Return ``p_q(c)``, the densities of attention over the prefix at these points."""
        return np.exp(self.queries @ points.T - self.log_mass[:, None])

    def training(self, what: Trained) -> np.ndarray:
        """Return what K is multiplied by, entry by entry: keys that are trained too add ``q . q'`` of it."""
        products = self.queries[:TRAINED] @ self.queries[:TRAINED].T
        return np.ones_like(products) if what == "values" else 1 + products

    @functools.cached_property
    def leverage(self) -> np.ndarray:
        """The tokens' ridge leverage scores, on the queries to be fitted."""
        return equivalence.leverage_scores(self._fitted, self.resolution(FITTED, TRAINED))

    def greedy(self, count: int) -> np.ndarray:
        """Return as many tokens, chosen one after the other."""
        return self.keys[equivalence.greedy_anchors(self._fitted, self.resolution(FITTED, TRAINED), count)]

    @property
    def _fitted(self) -> np.ndarray:
        return self.tilts(self.keys)[TRAINED:] / np.sqrt(len(self.keys))


@functools.cache
def _digits(count: int, seed: int) -> np.ndarray:
    return np.asarray(load("digits", inputs=count, width=8, sigma=1.0, seed=seed, profile="quick").inputs)


@dataclasses.dataclass(frozen=True)
class State:
    """A state that is to be trained: its points, its masses and its W."""

    points: np.ndarray
    masses: np.ndarray
    weights: np.ndarray
    features: np.ndarray
    """[queries, R], ``phi(q) / (phi(q) . k)``: what Z is multiplied by."""


def _random(problem: Problem, *labels: str | int) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(problem.key("equivalence", *labels))))


def _error(problem: Problem) -> np.ndarray:
    """Return an error with as much along every direction of the kernel, on average: no direction is forgotten."""
    return _random(problem, "targets").normal(size=(TRAINED, OUTPUTS))


def _state(case: Case, points: np.ndarray) -> State:
    """Return the state of some points: k by non-negative and W by plain least squares, on the queries to be fitted."""
    tilts = case.tilts(points)
    masses, _ = scipy.optimize.nnls(tilts[TRAINED:], np.ones(FITTED), maxiter=100 * len(points))
    return _weighted(case, points, masses, tilts / (tilts @ masses)[:, None])


def _weighted(case: Case, points: np.ndarray, masses: np.ndarray, features: np.ndarray) -> State:
    fitted = slice(TRAINED, None)
    ntk = case.ntk[fitted, fitted]
    weights = equivalence.training_weights(features[fitted], ntk, case.resolution(FITTED, TRAINED))
    return State(points, masses, weights, features)


def _states(problem: Problem, case: Case) -> dict[int, list[State]]:
    """Return states of growing size, some draws of each."""

    def drawn(size: int, draw: int) -> State:
        return _state(case, _anchors(case, size, _random(problem, case.name, size, draw)))

    return {size: [drawn(size, draw) for draw in range(DRAWS)] for size in _sizes(problem)}


def _anchors(case: Case, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw anchors from the prefix in proportion to their leverage scores; one that is drawn twice counts once."""
    share = case.leverage / case.leverage.sum()
    return case.keys[np.unique(random.choice(len(share), count, p=share))]


def _compared(case: Case, state: State, what: Trained) -> equivalence.Distance:
    """Return how far the state's run is from the prefix's, over ``STEPS`` steps of half the largest size."""
    trained = slice(0, TRAINED)
    factor = case.training(what)
    ntk = case.ntk[trained, trained] * factor
    other = state.features[trained] @ state.weights @ state.features[trained].T * factor
    step = 0.5 / float(np.linalg.eigvalsh(ntk)[-1])
    return equivalence.training_distance(ntk, other, case.error, learning_rate=step, steps=STEPS)


# --------------------------------------------------------------------------------------------- the claim


def _cases(problem: Problem, scale: float = 1.0) -> list[Case]:
    return [Case.gaussian(problem, scale), Case.head(problem, scale)]


def _falling(cases: dict[str, tuple[Case, dict[int, list[State]]]]) -> Evidence:
    """Measure the distance over R, and hold it to its bounds at every step."""
    checks: list[Check] = []
    found: dict[tuple[str, Trained], dict[str, np.ndarray]] = {}
    curves: dict[tuple[str, Trained], dict[int, equivalence.Distance]] = {}
    chosen: dict[str, np.ndarray] = {}
    for case, states in cases.values():
        sizes = list(states)
        for what in TRAININGS:
            name = f"{case.name}, {what}"
            runs = {size: [_compared(case, state, what) for state in states[size]] for size in sizes}
            curves[case.name, what] = {size: runs[size][0] for size in sizes}
            largest = {
                field: np.array([[getattr(run, field).max() for run in runs[size]] for size in sizes])
                for field in ("distance", "bound")
            }
            by_step, by_epsilon = (
                max(_over(run.distance, getattr(run, field)) for some in runs.values() for run in some)
                for field in ("bound", "spectral_bound")
            )
            slope = fits.exponent(np.repeat(sizes, DRAWS), largest["distance"].ravel())
            last = {field: float(np.median(values[-1])) for field, values in largest.items()}
            checks += [
                Check(f"{name}: distance / bound, largest over steps, R and draws", by_step, 1.0),
                Check(f"{name}: distance / bound from epsilon alone, likewise", by_epsilon, 1.0),
                Check(f"{name}: largest bound at R = {sizes[-1]}", last["bound"], 3 * CLOSE),
                Check(f"{name}: largest distance at R = {sizes[-1]}", last["distance"], CLOSE),
                Check(f"{name}: exponent of the distance in R, upper end of {slope}", slope.high, FALLING),
            ]
            found[case.name, what] = largest
        order = case.greedy(sizes[-1])
        runs_of_chosen = [_compared(case, _state(case, order[:size]), "values") for size in sizes]
        chosen[case.name] = np.array([run.distance.max() for run in runs_of_chosen])
        held = max(_over(run.distance, run.bound) for run in runs_of_chosen)
        checks += [
            Check(f"{case.name}, anchors chosen greedily: distance / bound", held, 1.0),
            Check(
                f"{case.name}, anchors chosen greedily: largest distance at R = {sizes[-1]}",
                chosen[case.name][-1],
                CLOSE,
            ),
        ]
    parameters = {"sizes": sizes, "trained": TRAINED, "fitted": FITTED, "steps": STEPS, "draws": DRAWS}
    return Evidence(tuple(checks), parameters, {"found": found, "curves": curves, "sizes": sizes, "chosen": chosen})


def _over(distance: np.ndarray, bound: np.ndarray) -> float:
    """Return the largest distance over its bound, from the second step on: at the first they are the same number."""
    return float(np.max(distance[2:] / bound[2:]))


def _others(problem: Problem) -> Evidence:
    """States that are not of this prefix, or cannot grow: of one with another sigma, and elu1."""
    size, checks = _sizes(problem)[-1], []
    distances: dict[tuple[str, Trained, str], float] = {}
    curves: dict[tuple[str, Trained], equivalence.Distance] = {}
    for case, wrong in zip(_cases(problem), _cases(problem, WRONG), strict=True):
        points = _anchors(wrong, size, _random(problem, "wrong"))
        phi = np.where(case.queries > 0, case.queries + 1, np.exp(np.minimum(case.queries, 0)))
        relative = phi * np.exp(-case.log_mass)[:, None]
        masses, _ = scipy.optimize.nnls(relative[TRAINED:], np.ones(FITTED))
        elu1 = _weighted(case, phi[:0], masses, phi / (phi @ masses)[:, None])
        for part, state in (("sigma", _state(wrong, points)), ("elu1", elu1)):
            for what in TRAININGS:
                run = _compared(case, state, what)
                distances[case.name, what, part] = float(run.distance.max())
                checks.append(
                    Check(f"{case.name}, {what}: largest distance", distances[case.name, what, part], CLOSE, part=part)
                )
                if part == "elu1":
                    curves[case.name, what] = run
    return Evidence(tuple(checks), {}, {"others": distances, "elu1": curves})


def _rate(cases: dict[str, tuple[Case, dict[int, list[State]]]]) -> Evidence:
    """At the queries W is fitted to: epsilon against the theorem's, from what is left outside of the anchors' span."""
    worst, fitted = 0.0, slice(TRAINED, None)
    for case, states in cases.values():
        ntk, resolution = case.ntk[fitted, fitted], case.resolution(FITTED, TRAINED)
        eigenvalues, vectors = np.linalg.eigh(ntk)
        root = np.sqrt(np.maximum(eigenvalues, 0) + resolution)
        for state, *_ in states.values():
            features = state.features[fitted]
            spanned, _ = np.linalg.qr((vectors.T @ features) / root[:, None])
            kept = np.sqrt(np.maximum(eigenvalues, 0)) / root
            left = np.linalg.norm(kept[:, None] * np.eye(len(root)) - spanned @ (spanned.T * kept), 2) ** 2
            distance = equivalence.relative_distance(ntk, features @ state.weights @ features.T, resolution)
            worst = max(worst, float(distance / (np.sqrt(left) + left)))
    return Evidence((Check("W fitted: epsilon / (sqrt(rho) + rho), rho outside of the anchors' span", worst, 1.0),))


def _exact(problem: Problem) -> Evidence:
    """With as many anchors as queries the state trains as the prefix, exactly."""
    checks = []
    for case in _cases(problem):
        trained = dataclasses.replace(
            case, queries=case.queries[:TRAINED], log_mass=case.log_mass[:TRAINED], ntk=case.ntk[:TRAINED, :TRAINED]
        )
        tokens, masses = caratheodory(trained.tilts(case.keys).T, np.ones(len(case.keys)))
        tilts = trained.tilts(case.keys[tokens])
        features = tilts / (tilts @ masses)[:, None]
        weights = equivalence.training_weights(features, trained.ntk, trained.resolution(1, TRAINED))
        state = State(case.keys[tokens], masses, weights, features)
        run = _compared(trained, state, "values")
        checks.append(Check(f"{case.name}: {len(tokens)} anchors, largest distance", float(run.distance.max()), 1e-6))
    return Evidence(tuple(checks))


# ------------------------------------------------------------------- gradient descent, through attention itself


@functools.partial(jax.jit, static_argnames="steps")
def _values_descend(query: Array, keys: Array, targets: Array, step: Array, steps: int) -> Array:
    """Train the values of a prefix, and return the errors, [steps + 1, n, h]."""

    def error(values: Array) -> Array:
        found = prefix_attention(
            *_alone(query), keys, values, scale=1.0, implementation="reference", mask=_nothing(query)
        )
        return found[0, :, 0] - targets

    return _descend(error, jnp.zeros_like(keys), step, steps)


@functools.partial(jax.jit, static_argnames="steps")
def _state_descend(
    query: Array, points: Array, masses: Array, root: Array, targets: Array, step: Array, steps: int
) -> Array:
    """Train Y of a state ``Z = root Y``, and return the errors, [steps + 1, n, h]."""

    def error(y: Array) -> Array:
        found = ntk_attention(
            *_alone(query), (root @ y)[None], masses[None], feature_map=Anchors(points[None]), scale=1.0,
            implementation="reference", mask=_nothing(query),
        )  # fmt: skip
        return found[0, :, 0] - targets

    return _descend(error, jnp.zeros((root.shape[1], targets.shape[1])), step, steps)


def _alone(query: Array) -> tuple[Array, Array, Array]:
    """Return attention's arguments with one own key, which :func:`_nothing` hides."""
    own = jnp.zeros_like(query[:1])[None, :, None]
    return query[None, :, None], own, own


def _nothing(query: Array) -> Array:
    return jnp.zeros((1, 1, len(query), 1), bool)


def _descend(error: Callable[[Array], Array], start: Array, step: Array, steps: int) -> Array:
    def one(x: Array, _: None) -> tuple[Array, Array]:
        found, back = jax.vjp(error, x)
        return x - step * back(found)[0], found

    last, errors = jax.lax.scan(one, start, length=steps)
    return jnp.concatenate([errors, error(last)[None]])


def _simulated(problem: Problem) -> Evidence:
    """Compare both runs with gradient descent on values, and on a state, by automatic differentiation."""
    case = Case.head(problem)
    size = 32
    state = _state(case, _anchors(case, size, _random(problem, "simulated")))
    targets = _random(problem, "simulated targets").normal(size=(TRAINED, case.keys.shape[1]))
    ntk = case.ntk[:TRAINED, :TRAINED]
    features = state.features[:TRAINED]
    other = features @ state.weights @ features.T
    step = 0.5 / max(float(np.linalg.eigvalsh(each)[-1]) for each in (ntk, other))
    eigenvalues, vectors = np.linalg.eigh(state.weights)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    # a state's Z is a sum over the prefix's tokens of the masses that the features were divided by
    arrays = [jnp.asarray(x) for x in (case.queries[:TRAINED], case.keys[:, None], targets)]
    by_values = _values_descend(*arrays, step * len(case.keys), SIMULATED)
    arrays = [jnp.asarray(x) for x in (case.queries[:TRAINED], state.points, state.masses, root, targets)]
    by_state = _state_descend(*arrays, step, SIMULATED)
    checks = []
    for name, errors, kernel in (("the prefix's values", by_values, ntk), ("the state's Y", by_state, other)):
        eigenvalues, vectors = np.linalg.eigh(kernel)
        powers = (1 - step * eigenvalues)[None] ** np.arange(SIMULATED + 1)[:, None]
        predicted = -vectors @ (powers[:, :, None] * (vectors.T @ targets))
        checks.append(
            Check(f"gradient descent on {name} / kernel regression: distance", relative_error(errors, predicted), 1e-9)
        )
    return Evidence(tuple(checks))


def _measure(problem: Problem) -> Evidence:
    cases = {case.name: (case, _states(problem, case)) for case in _cases(problem)}
    falling = _falling(cases)
    others = (_rate(cases), _exact(problem), _simulated(problem))
    return dataclasses.replace(falling, checks=(*falling.checks, *(check for part in others for check in part.checks)))


# ------------------------------------------------------------------------------------------------ the figure


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(3, width=4.4)
    sizes, found = evidence.series["sizes"], evidence.series["found"]
    colors = {"digits": figures.COLORS["tied"], "a head of MiniLM": figures.COLORS["real"]}
    for axis, name in zip(axes[:2], colors, strict=True):
        runs = evidence.series["curves"][name, "values"]
        for place, size in enumerate(sizes[::2]):
            fade = 0.3 + 0.7 * place / (len(sizes[::2]) - 1)
            axis.plot(runs[size].other_curve[1:], color=colors[name], alpha=fade, label=f"a state of R = {size}")
        axis.plot(runs[sizes[0]].curve[1:], "--", color="black", linewidth=1, label="the infinite prefix")
        axis.plot(
            control.series["elu1"][name, "values"].other_curve[1:],
            ":",
            color=figures.COLORS["control"],
            label="elu1 (control)",
        )
        figures.label(axis, title=f"{name}: values trained", x="step t", y="|e(t)| / |e(0)|", log="x")
    hidden = {"digits": "", "a head of MiniLM": "_"}  # the legend names one data set's lines; color tells them apart
    for (name, what), values in found.items():
        style, text = "o-" if what == "values" else "s--", f"{hidden[name]}{name}, {what}"
        axes[2].plot(sizes, np.median(values["distance"], axis=1), style, color=colors[name], label=text)
        axes[2].plot(
            sizes, np.median(values["bound"], axis=1), style[1:], color=figures.COLORS["bound"], linewidth=1,
            label=f"{hidden[name] if what == 'values' else '_'}{name}, {what}: bound",
        )  # fmt: skip
    for name, chosen in evidence.series["chosen"].items():
        axes[2].plot(sizes, chosen, ":", color=colors[name], label=f"{hidden[name]}{name}, values, chosen greedily")
    for (name, what, part), distance in control.series["others"].items():
        if what == "values":
            axes[2].plot(
                sizes[-1] * (1.15 if part == "sigma" else 1.3), distance, "v" if part == "sigma" else "x", color=colors[name],
                label=f"{hidden[name]}{name}, {'another sigma' if part == 'sigma' else 'elu1'} (control)",
            )  # fmt: skip
    axes[2].axhline(CLOSE, color=figures.COLORS["control"], linewidth=0.8, linestyle=":", label="_close")
    title = "Distance of the runs"
    figures.label(axes[2], title=title, x="features R", y="largest difference of e / |e(0)|", log="xy")
    axes[2].set_xticks(sizes, [str(size) for size in sizes])
    axes[2].minorticks_off()
    return figure


CLAIM = Claim(
    name="equivalence",
    title="A state trains as an infinite prefix does",
    statement="gradient descent on an infinite prefix's values is kernel regression with K, on a state through W with "
    "F W F^T; if they differ by eps relative to K + lambda, the runs differ by at most "
    "0.96 eps / sqrt(1 - eps) |e(0)|, up to O(t^(-1/2)), until step t = 1 / (2 eta lambda); anchors drawn by leverage scores, "
    "W by least squares: the distance falls in R",
    proof="equivalence.md",
    computed_by=("kernels.equivalence.training_distance", "kernels.equivalence.training_weights"),
    source="derived (theory/equivalence.md); leverage scores after arXiv 1411.0306 and 1605.07583",
    measure=_measure,
    controls=(
        Control(
            "another sigma", f"a state that follows a prefix whose tokens are {WRONG:g} times as long", _others, "sigma"
        ),
        Control("elu1", "elu1's features, with the W that is best for them", _others, "elu1"),
    ),
    draw=_draw,
    caption="Left and middle: error of gradient descent on the values of an infinite prefix and on states of R anchors. Right: "
    "largest distance between the two runs over 1,000 steps (median of 3 draws), with the bound on it, for the digits (blue) "
    "and the head of MiniLM (purple), dashed where keys are trained too; the controls stand beside the largest R, where the "
    "distance has to be below the dotted line.",
    drawn=True,
)
