"""How well a constant-size state stands in for a prefix: Taylor features do, raw elu1 sums do not, a fit helps."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import PrefixState, feature_map, prefix_attention
from ntk_prefix.feature_maps import Minimax, attention_error_bound
from ntk_prefix.typing import Array
from theory import figures
from theory.claim import Check, Claim, Control, Evidence
from theory.problem import Problem

HEAD_DIM, LENGTH, TOKENS = 4, 8, 512
DEGREES = range(7)
NORMS = (0.5, 1.0, 2.0)
REFERENCE = {0.5: 4.1e-11, 1.0: 6.6e-6, 2.0: 5.1e-2}
"""Errors at degree 6 of other draws of the same sizes (theory/README.md, section 11); ours must be of the same order."""

NEAREST_DEGREES, SHORTER = (2, 4, 6), 3.0
"""Degrees of the nearest polynomial, and by how much the control's scores are larger than it is told."""

FIT_QUERIES = 512


class Drawn(NamedTuple):
    """One sequence of one head, [1, L, 1, d], and a prefix, [m, 1, d]."""

    query: Array
    key: Array
    value: Array
    prefix_key: Array
    prefix_value: Array


LARGEST_DRAW = 2**15
"""Entries of the largest array that is drawn: 8,192 prefix tokens of 4 entries. The first of so many are what fewer would
be, so that one program draws them all."""


@jax.jit
def _entries(key: Array) -> Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (LARGEST_DRAW,), minval=-1.0, maxval=1.0))(
        jax.random.split(key, 5)
    )


def _draw(problem: Problem, norm: float, *, length: int = LENGTH, tokens: int = TOKENS, d: int = HEAD_DIM) -> Drawn:
    """Return entries uniform in (-norm, norm)."""
    entries = norm * np.asarray(_entries(problem.key("approximation", int(norm * 100), length, tokens, d)))
    shapes = [(1, length, 1, d)] * 3 + [(tokens, 1, d)] * 2
    parts = (row[: math.prod(shape)].reshape(shape) for row, shape in zip(entries, shapes, strict=True))
    return Drawn(*map(jnp.asarray, parts))


@functools.partial(jax.jit, static_argnums=1)
def _distance(drawn: Drawn, degree: int) -> Array:
    phi = feature_map("taylor", degree=degree)
    state = PrefixState.from_prefix(drawn.prefix_key, drawn.prefix_value, feature_map=phi)
    exact = prefix_attention(*drawn, implementation="reference")
    approximate = state.attend(drawn.query, drawn.key, drawn.value, implementation="reference")
    return jnp.abs(approximate - exact).max()


def _error(drawn: Drawn, degree: int) -> float:
    """Return max |T - PrefixAttn| of the Taylor state of a degree."""
    return float(_distance(drawn, degree))


def _bound(drawn: Drawn, degree: int) -> float:
    """Return the derived bound on it: from the largest score to a relative kernel error, from that to the outputs."""
    root = drawn.query.shape[-1] ** 0.25
    norm = max(float(np.linalg.norm(x, axis=-1).max()) / root for x in (drawn.query, drawn.prefix_key))
    largest = max(float(np.abs(x).max()) for x in (drawn.value, drawn.prefix_value))
    return attention_error_bound(feature_map("taylor", degree=degree).error_bound(norm), largest)


def _attended(own: np.ndarray, value: np.ndarray, prefix_value: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return attention to own keys and to a prefix, by the weights of both before they are normalized."""
    return (own @ value + weights @ prefix_value) / (own.sum(1) + weights.sum(1))[:, None]


def _nearest(problem: Problem, shorter: float = 1.0) -> list[Check]:
    """Hold the nearest polynomial to its bound; it is made for the largest score there is, over ``shorter``.

    The polynomial is evaluated on scores, as features give the same number (tests/test_minimax.py).
    """
    checks = []
    for norm in NORMS:
        query, key, value, prefix_key, prefix_value = (
            np.asarray(x).reshape(-1, HEAD_DIM) for x in _draw(problem, norm)
        )
        own, scores = np.exp(query @ key.T / HEAD_DIM**0.5), query @ prefix_key.T / HEAD_DIM**0.5
        score = float(np.abs(scores).max()) / shorter
        largest = float(max(np.abs(value).max(), np.abs(prefix_value).max()))

        attend = functools.partial(_attended, own, value, prefix_value)
        exact, worst = attend(np.exp(scores)), 0.0
        for degree in NEAREST_DEGREES:
            phi = Minimax(degree, score)
            terms = [b / math.factorial(t) for t, b in enumerate(phi.coefficients)]
            error = np.abs(attend(np.polynomial.polynomial.polyval(scores, terms)) - exact).max()
            worst = max(worst, float(error) / attention_error_bound(phi.error_bound(score**0.5), largest))
        what = f"B = {norm:g}: nearest polynomial for the largest score, error / bound, degrees 2, 4 and 6"
        checks.append(Check(what, worst, 1, part="nearest"))
    return checks


def _bounded(problem: Problem, degrees_off: int = 0) -> Evidence:
    """Measure errors by degree against the bound, which is told a degree that is ``degrees_off`` too high."""
    checks: list[Check] = []
    errors: dict[float, np.ndarray] = {}
    allowed: dict[float, np.ndarray] = {}
    for norm in NORMS:
        drawn = _draw(problem, norm)
        errors[norm] = np.array([_error(drawn, degree) for degree in DEGREES])
        allowed[norm] = np.array([_bound(drawn, degree + degrees_off) for degree in DEGREES])
        finite = np.isfinite(allowed[norm])
        if finite.any():
            ratio = float((errors[norm] / allowed[norm])[finite].max())
            what = f"B = {norm:g}: largest error / bound, over the degrees where it is finite"
            checks.append(Check(what, ratio, 1, part="bound"))
        checks.append(Check(f"B = {norm:g}: error at degree 6 / recorded", errors[norm][6] / REFERENCE[norm], 10))
    return Evidence(tuple(checks), {}, {"errors": errors, "allowed": allowed})


def _measure(problem: Problem) -> Evidence:
    """Measure the bound, errors over sizes, and what a fit makes of elu1."""
    bounded = _bounded(problem)
    raw, fitted = _fit(problem)
    checks = [
        *bounded.checks,
        *_nearest(problem),
        Check("elu1: held-out error of the raw sums, which do not approximate", raw, 0.1, at_least=True),
        Check("elu1: held-out error of a fit / that of the raw sums", fitted / raw, 0.5),
    ]
    parameters = {"tokens": TOKENS, "head_dim": HEAD_DIM, "length": LENGTH, "elu1_raw": raw, "elu1_fit": fitted}
    return Evidence(tuple(checks), parameters, {**bounded.series, "sweeps": _sweeps(problem)})


def _other_degree(problem: Problem) -> Evidence:
    return _bounded(problem, degrees_off=6)


def _shorter(problem: Problem) -> Evidence:
    return Evidence(tuple(_nearest(problem, shorter=SHORTER)))


def _sweeps(problem: Problem) -> dict[str, dict[int, float]]:
    """Return errors of degree 4 at B = 1 over one size at a time, the others as above."""
    return {
        "prefix length m": {m: _error(_draw(problem, 1.0, tokens=m), 4) for m in (32, 512, 8192)},
        "sequence length L": {n: _error(_draw(problem, 1.0, length=n), 4) for n in (2, 16, 128)},
        "head dimension d": {d: _error(_draw(problem, 1.0, d=d), 4) for d in (2, 4, 8)},
    }


def _fit(problem: Problem) -> tuple[float, float]:
    """Return held-out relative errors of raw elu1 sums and of a least-squares fit of the same size, in 16 dimensions."""
    drawn = _draw(problem, 1.0, length=FIT_QUERIES, d=16)
    own = (drawn.key[:, :LENGTH], drawn.value[:, :LENGTH])
    _, report = PrefixState.fit_with_report(drawn.query, drawn.prefix_key, drawn.prefix_value, *own)
    return float(report.raw_error[0]), float(report.held_out_error[0])


def _figure(evidence: Evidence, control: Evidence) -> Figure:
    figure, (degrees, sizes, elu) = figures.panels(3, width=3.8)
    shades = dict(zip(NORMS, ("#9dbfe3", "#1f5fa8", "#0b2c54"), strict=True))
    for norm in NORMS:
        degrees.plot(DEGREES, evidence.series["errors"][norm], "o-", color=shades[norm], label=f"B = {norm:g}")
        degrees.plot(DEGREES, evidence.series["allowed"][norm], "--", color=shades[norm])
    degrees.plot([], [], "--", color="black", label="bound (where it is finite)")
    figures.label(degrees, title="Taylor features", x="degree g", y="max |T - PrefixAttn|", log="y")
    for name, found in evidence.series["sweeps"].items():
        sizes.plot(list(found), list(found.values()), "o-", label=name)
    figures.label(sizes, title="Degree 4, B = 1", x="size", y="max |T - PrefixAttn|", log="xy")
    elu.bar(
        ["raw sums", "fit"],
        [evidence.parameters["elu1_raw"], evidence.parameters["elu1_fit"]],
        color=[figures.COLORS["control"], figures.COLORS["bound"]],
    )
    figures.label(elu, title="elu1, d = 16, m = 512", x="", y="held-out relative error")
    return figure


CLAIM = Claim(
    name="approximation",
    title="A state of constant size stands in for the prefix",
    statement="|T - PrefixAttn|_max <= 2 eps / (1 - eps) max|V|, eps = e^s s^(g+1) / (g+1)!, s the largest score, for "
    "Taylor features of degree g, and a smaller eps with the weights of the nearest polynomial up to s; "
    "raw elu1 sums do not approximate, a least-squares fit of the same size does better",
    proof="11",
    computed_by=(
        "feature_maps.Taylor.error_bound",
        "feature_maps.Minimax.error_bound",
        "feature_maps.attention_error_bound",
    ),
    source="bound derived (ntk_prefix/feature_maps/base.py); the theorem it stands beside is arXiv 2406.14036, recalled",
    measure=_measure,
    controls=(
        Control(
            "a bound of too high a degree",
            "the bound of a degree that is 6 higher than the features'",
            _other_degree,
            "bound",
        ),
        Control(
            "a polynomial for smaller scores", f"scores are {SHORTER:g} times those it is told", _shorter, "nearest"
        ),
    ),
    draw=_figure,
    caption="Left: largest output error of Taylor states by degree for entries uniform in (-B, B), dashed the derived bound. "
    "Middle: the same error over sizes. Right: elu1, the map of the paper's code, as raw sums and fitted.",
    drawn=True,
)
