"""An infinitely long Gaussian prefix in closed form: attention over it is affine in the query."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import prefix_attention
from ntk_prefix.typing import Array
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.problem import Problem

HEAD_DIM, QUERIES = 8, 64
LENGTHS = [2**power for power in range(8, 19, 2)]
REPEATS = 8
ALLOWED = 0.05
"""How far the exponent's interval may be from -1/2, and half of its length, at most."""


def _law(problem: Problem) -> tuple[Array, Array, Array, Array]:
    """Return the mean and root covariance of the keys, and the affine map from a key to its value."""
    mean, spread, linear, shift = jax.random.split(problem.key("gaussian_prefix"), 4)
    d = HEAD_DIM
    return (
        jax.random.normal(mean, (d,)) / 2,
        jax.random.normal(spread, (d, d)) / d**0.5,
        jax.random.normal(linear, (d, d)) / d**0.5,
        jax.random.normal(shift, (d,)),
    )


@functools.partial(jax.jit, static_argnames="m")
def _drawn(key: Array, law: tuple[Array, Array, Array, Array], query: Array, m: int) -> Array:
    """Return attention of the queries over m drawn prefix tokens and no keys of their own."""
    mean, root, linear, shift = law
    keys = mean + jax.random.normal(key, (m, HEAD_DIM)) @ root.T
    values = keys @ linear.T + shift
    none = jnp.zeros((1, 0, 1, HEAD_DIM))
    return prefix_attention(query[None, :, None], none, none, keys[:, None], values[:, None])[0, :, 0]


def _infinite(query: Array, law: tuple[Array, Array, Array, Array]) -> Array:
    """Return b + A (mu + Gamma q / sqrt(d)): the tilted mean of the values."""
    mean, root, linear, shift = law
    tilted = mean + query @ (root @ root.T) / HEAD_DIM**0.5
    return tilted @ linear.T + shift


def _approach(problem: Problem, covariance: float = 1.0) -> Evidence:
    """Measure the distance to the closed form, whose covariance is multiplied by ``covariance``."""
    law = _law(problem)
    told = (law[0], law[1] * covariance**0.5, *law[2:])
    query = jax.random.normal(problem.key("queries"), (QUERIES, HEAD_DIM))
    goal = _infinite(query, told)
    errors = {
        m: np.array(
            [
                relative_error(_drawn(problem.key("gaussian_prefix", m, repeat), law, query, m), goal)
                for repeat in range(REPEATS)
            ]
        )
        for m in LENGTHS
    }
    slope = fits.exponent(*zip(*[(m, error) for m, found in errors.items() for error in found], strict=True))
    if covariance == 1:
        fits.check_settled(slope, -0.5, ALLOWED, "the error")
    checks = (
        Check(f"distance of the slope's interval {slope} from -1/2", slope.gap(-0.5), ALLOWED, part="limit"),
        Check("half width of that interval", slope.half_width, ALLOWED),
        Check(f"median relative error at m = {LENGTHS[-1]}", float(np.median(errors[LENGTHS[-1]])), 0.01, part="limit"),
    )
    parameters = {"tokens": LENGTHS[-1], "shortest": LENGTHS[0], "head_dim": HEAD_DIM, "repeats": REPEATS}
    return Evidence(checks, parameters, {"errors": errors, "slope": slope})


def _other_covariance(problem: Problem) -> Evidence:
    return _approach(problem, covariance=0.8)


def _figure(evidence: Evidence, control: Evidence) -> Figure:
    figure, (axis,) = figures.panels(width=5.0)
    errors = evidence.series["errors"]
    figures.power_law(axis, errors, "closed form", figures.COLORS["real"], evidence.series["slope"])
    figures.power_law(axis, control.series["errors"], "control", figures.COLORS["control"])
    figures.guide(axis, list(errors), 1.5 * float(np.median(errors[LENGTHS[0]])), -0.5, "slope -1/2")
    figures.label(axis, title="A Gaussian prefix", x="prefix length m", y="|T - T_infinite| / |T_infinite|", log="xy")
    return figure


CLAIM = Claim(
    name="gaussian_prefix",
    title="Attention over an infinite Gaussian prefix is affine",
    statement="keys N(mu, Gamma), values v = A k + b: attention over the prefix -> b + A (mu + Gamma q / sqrt(d)) as m^(-1/2)",
    proof="12",
    computed_by=("prefix_attention",),
    source="derived, after Boursier and Boyer, arXiv 2512.11784",
    measure=_approach,
    controls=(
        Control(
            "another covariance", "the closed form with a covariance that is 20 % too small", _other_covariance, "limit"
        ),
    ),
    draw=_figure,
    caption="Relative distance of exact attention over a drawn Gaussian prefix from the closed form for an infinite one.",
    drawn=True,
)
