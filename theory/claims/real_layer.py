"""The real layer, inputs present: as m outgrows L its kernel tends to a limit of its own, not to the stylized one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from ntk_prefix import PrefixAttentionLayer
from ntk_prefix.kernels import empirical_ntk, limit_ntk, real_layer_limit_ntk
from ntk_prefix.typing import Kernel
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, Undecidable, relative_error
from theory.problem import Problem
from theory.scales import asymptotic_length, beyond, expected_error, indistinct

OUTGROWN = 16
"""The rate is fitted where the prefix is this many times longer than the sequence. The error has two parts there: the
inputs' share of the attention, falling as L / m, and the draw of the prefix, falling as m^{-1/2}."""


SEQUENCE = 16
"""Rows of the sequence, at most: three lengths that outgrow it can be run in the quick profile."""

WIDEST = 0.2
"""Half-width of the exponent's interval, at most: wider ones tell -1/2 from nothing."""

FALLS = -0.45
"""Upper end of the exponent's interval, at most: one that may be -1/2 and ends above it is undecided."""

FITTED = 3
"""Lengths that the rate is fitted to, at least."""


def _layer(problem: Problem, m: int, repeat: int) -> PrefixAttentionLayer:
    """Return another prefix for every repeat, the same projections for all."""
    layer = PrefixAttentionLayer(problem.d, m, problem.sigma, rngs=nnx.Rngs(problem.key("real", m, repeat)))
    same = PrefixAttentionLayer(problem.d, 2, problem.sigma, rngs=nnx.Rngs(problem.key("projections")))
    layer.query_projection, layer.key_projection = same.query_projection, same.key_projection
    layer.value_projection = same.value_projection
    return layer


def _own_limit(problem: Problem, layer: PrefixAttentionLayer) -> Kernel:
    return real_layer_limit_ntk(
        problem.inputs,
        query_projection=layer.query_projection[...],
        key_projection=layer.key_projection[...],
        value_projection=layer.value_projection[...],
        sigma=problem.sigma,
    )


def _stylized_limit(problem: Problem, layer: PrefixAttentionLayer) -> Kernel:
    """Return the tied model's limit at the same scores, its values projected: what absorbing the projections would give."""
    effective = layer.query_projection[...] @ layer.key_projection[...].T / jnp.sqrt(problem.d)
    limit = limit_ntk(problem.inputs @ effective, sigma=problem.sigma, model="tied")
    value = layer.value_projection[...]
    return jnp.einsum("ikjl,ka,lb->iajb", limit, value, value)


def _few(problem: Problem) -> Problem:
    """Return the problem with the rows of one sequence."""
    return dataclasses.replace(problem, inputs=problem.inputs[:SEQUENCE], targets=problem.targets[:SEQUENCE])


def _lengths(problem: Problem) -> list[int]:
    return [2**power for power in (range(2, 17, 2) if problem.full else range(2, 13, 2))]


def _spread(problem: Problem, layer: PrefixAttentionLayer) -> float:
    """Return the standard deviation of the largest score of a prefix token."""
    scored = problem.inputs @ layer.query_projection[...] @ layer.key_projection[...].T / problem.d**0.5
    return problem.sigma * float(jnp.linalg.norm(scored, axis=1).max())


def _apart(problem: Problem, layer: PrefixAttentionLayer) -> float:
    """Return the relative distance of the two limits, which the claim must be able to tell apart."""
    return relative_error(_stylized_limit(problem, layer), _own_limit(problem, layer))


def _undecidable(problem: Problem) -> str | None:
    problem = _few(problem)
    layer, fitted = _layer(problem, 2, 0), [m for m in _lengths(problem) if m >= OUTGROWN * problem.n]
    spread = _spread(problem, layer)
    if (reason := beyond(spread, fitted[-FITTED], problem, "the real layer's kernel")) is not None:
        return reason
    return indistinct(_apart(problem, layer), expected_error(spread, fitted[-1]), fitted[-1], problem)


def _approach(problem: Problem, limit: str) -> Evidence:
    problem, repeats = _few(problem), 4
    lengths, layer = _lengths(problem), _layer(problem, 2, 0)
    goal = (_own_limit if limit == "own" else _stylized_limit)(problem, layer)
    errors = {}
    for m in lengths:
        # one sequence of L d outputs: its dense Jacobian is small, and cheaper than structured derivatives
        kernels = [
            empirical_ntk(_layer(problem, m, repeat), problem.inputs[None], implementation="jacobian")
            for repeat in range(repeats)
        ]
        errors[m] = np.array([relative_error(m * kernel[0, :, :, 0], goal) for kernel in kernels])
    first = max(OUTGROWN * problem.n, asymptotic_length(_spread(problem, layer)))
    points = [(m, error) for m, found in errors.items() if m >= first for error in found]
    slope = fits.exponent(*zip(*points, strict=True))
    if limit == "own":
        fits.check_narrow(slope, WIDEST, "the real layer's error")
        if slope.low <= -0.5 and slope.high > FALLS:
            raise Undecidable(f"undecidable by these draws: the exponent {slope} may be -1/2 and may be above {FALLS}")
    # nearer to its own limit than to the other one, and about as near as the draw lets it be
    close = min(_apart(problem, layer) / 2, 2 * expected_error(_spread(problem, layer), lengths[-1]))
    checks = (
        Check(f"upper end of the exponent {slope}", slope.high, FALLS),
        Check(f"median relative error at m = {lengths[-1]}", float(np.median(errors[lengths[-1]])), close),
    )
    parameters = {"tokens": lengths[-1], "shortest": lengths[0], "sequence": problem.n, "repeats": repeats}
    return Evidence(checks, parameters, {"errors": errors, "slope": slope, "sequence": problem.n})


def _stylized(problem: Problem) -> Evidence:
    return _approach(problem, "stylized")


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (distance, rate) = figures.panels(2, width=4.6)
    errors, others = evidence.series["errors"], control.series["errors"]
    real, gray = figures.COLORS["real"], figures.COLORS["control"]
    figures.power_law(distance, errors, "its own limit", real, evidence.series["slope"])
    figures.power_law(distance, others, "the stylized limit (control)", gray)
    distance.axvline(evidence.series["sequence"], color="black", linewidth=0.8, linestyle=":", label="m = L")
    figures.label(
        distance, title="Real prefix attention", x="prefix length m", y="|m Theta - limit| / |limit|", log="xy"
    )
    for found, name, color in ((errors, "its own limit", real), (others, "the stylized limit", gray)):
        figures.power_law(rate, {m: m**0.5 * error for m, error in found.items()}, name, color)
    fitted = [m for m in errors if m >= OUTGROWN * evidence.series["sequence"]]
    start = float(np.median(errors[fitted[0]]))
    rate.plot(fitted, [fitted[0] ** 0.5 * start] * len(fitted), "--", color="black", linewidth=0.9, label="slope -1/2")
    figures.label(
        rate, title="Over m^(-1/2)", x="prefix length m", y="sqrt(m) |m Theta - limit| / |limit|", log="xy", direct=True
    )
    return figure


CLAIM = Claim(
    name="real_layer",
    title="Real prefix attention has a limit of its own",
    statement="m Theta -> e^(s c)[(1 + s c) A A^T + (2 s + s^2 c) A u_j (A u_i)^T] at least as fast as m^(-1/2) "
    "once m outgrows L, with "
    "s = sigma^2, u = W_K W_Q^T x / sqrt(d), A = W_V^T, c = u_i.u_j; the stylized limit keeps a constant distance",
    proof="10",
    computed_by=("kernels.real_layer_limit_ntk",),
    source="derived (theory/README.md); empirical NTK by neural-tangents, inputs present",
    measure=lambda problem: _approach(problem, "own"),
    controls=(
        Control(
            "the stylized limit",
            "the stylized tied limit at the same scores: real values carry no signs, so it is another kernel",
            _stylized,
        ),
    ),
    draw=_draw,
    undecidable=_undecidable,
    caption="Relative distance of the real layer's kernel, inputs present, from its own infinite-prefix limit and from the "
    "stylized one; right: times sqrt(m), where what falls like m^(-1/2) is flat (dashed, from the first length of the "
    "fit). While m is below L the inputs hold most of the attention.",
)
