"""Lengths and thresholds that several claims share, each with where it comes from."""

from __future__ import annotations

import math

from scipy import stats

from theory.problem import Problem

FAILURE = 0.1
"""The probability delta of the bounds after the paper: they hold with probability 1 - delta. Any value would do, since it
enters them through its logarithm."""

ASYMPTOTIC_SIGMA = 0.5
"""The largest sigma at which the m^(-1/2) rate shows at lengths one can train: at |x| = 1 from m = 44 on, at sigma = 1
only from m = 3 10^4 on (theory/README.md, section 4)."""

FALLING = -0.3
"""An exponent is called falling when its whole interval lies below this. Expected are -1 to -1/2 of a lazy prefix and 0 of
one that is not: the threshold is set between them, after a first measurement."""


def training_lengths(problem: Problem) -> list[int]:
    """Return the prefix lengths of the claims that train: as far as minutes (quick) or an hour (full) reach."""
    return [2**power for power in (range(6, 17, 2) if problem.full else range(6, 15, 2))]


def asymptotic_length(spread: float) -> float:
    """Return the prefix length from which the m^(-1/2) rate of a kernel can be seen.

    Its largest entries average T_i T_j, log-normal with s <= 2 spread. Their variance is carried by tokens 2 s standard
    deviations out: a prefix shorter than 1 / P(Z > 2 s) has mostly seen none of them, and its error is still too small
    (theory/README.md, section 4).

    Args:
        spread: sigma max|x_i|, the standard deviation of the largest score of a token.
    """
    return 1 / max(float(stats.norm.sf(4 * spread)), 1e-300)


def largest_spread(length: float) -> float:
    """Return the spread from which on a prefix of that length is too short to see the rate."""
    return float(stats.norm.isf(1 / length)) / 4


def expected_error(spread: float, length: int) -> float:
    """Return the relative error, up to a factor near 1, of the kernel of a drawn prefix: e^(2 spread^2) / sqrt(length).

    The largest entries average T^2 with T = e^(w.x - s^2/2), s = spread: E T^4 / (E T^2)^2 = e^(4 s^2).
    """
    return math.exp(min(2 * spread**2, 300.0)) / math.sqrt(length)


def beyond(spread: float, length: int, problem: Problem, what: str = "the kernel", linear: bool = True) -> str | None:
    """Return why a rate that is fitted from ``length`` on cannot be seen, None if it can.

    Args:
        spread: sigma times the norm of the farthest vector that is scored.
        length: the longest prefix at which the fit may start.
        problem: whose sigma is to blame.
        what: whose rate.
        linear: whether the spread is proportional to sigma, so that the largest one can be named.
    """
    start = asymptotic_length(spread)
    if start <= length:
        return None
    largest = problem.sigma * largest_spread(length) / spread
    return (
        f"undecidable at lengths one can run: at sigma = {problem.sigma:g} the rate of {what} shows from m = {start:.1e} "
        f"on, and it is fitted from m = {length} at the latest; "
        + (f"the largest sigma for these rows and this profile is {largest:.3g}" if linear else "take a smaller sigma")
    )


def indistinct(distance: float, error: float, length: int, problem: Problem, times: float = 1.5) -> str | None:
    """Return why two limits cannot be told apart by drawn kernels, None if they can.

    Args:
        distance: relative, between the true limit and the control's.
        error: of a drawn kernel, :func:`expected_error`.
        length: the longest prefix.
        problem: whose sigma is to blame.
        times: how many errors the distance must hold; at 1.5 a drawn kernel is nearer to its own limit.
    """
    if distance >= times * error:
        return None
    return (
        f"undecidable at lengths one can run: at sigma = {problem.sigma:g} the limit and the one of the control differ by "
        f"{distance:.1e} of themselves, and kernels drawn at m = {length} by {error:.1e}: take another sigma"
    )
