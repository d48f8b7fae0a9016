"""Lengths and thresholds that several claims share, each with where it comes from."""

from __future__ import annotations

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
