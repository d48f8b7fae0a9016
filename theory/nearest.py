"""The polynomial nearest to the exponential in the place of Taylor's: theory/README.md, section 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import brentq

from ntk_prefix.feature_maps import Minimax
from ntk_prefix.feature_maps.minimax import LARGEST_SCORE
from ntk_prefix.polynomial import polynomial_degree
from ntk_prefix.typing import Float

__all__ = ["LARGEST_SCORE", "PROVED_GROWTH", "Degrees", "degrees", "distance", "largest_error", "share_of_taylor"]

PROVED_GROWTH = float(brentq(lambda k: 1 + math.hypot(1, k) - k * math.asinh(k), 1, 4))
"""Of the degree over the largest score, 2.233: for any score, by Chebyshev's series (derived). Taylor's is 3.591."""

POWERS = (10, 13, 16)
"""Lengths at which it is found, by a linear program for each degree that is tried."""

Scores = Callable[[float], float]
"""The largest score as a function of log n."""

Degrees = Mapping[int, int | None]
"""By power of two; None where the polynomial is not to be had."""

Tokens = Callable[[int, bool], tuple[np.ndarray, np.ndarray]]
"""By power and whether causal: scores over the largest, and how many keys have them, both [queries, levels]."""


def degrees(score: Scores, error: float) -> Degrees:
    """Return what is proved to keep the error of the outputs, up to the scores that float64 finds a polynomial for."""
    largest = {power: score(power * math.log(2)) for power in POWERS}
    return {
        power: polynomial_degree(s, error, "minimax") if s <= LARGEST_SCORE else None for power, s in largest.items()
    }


def share_of_taylor(score: Scores, used: Degrees, error: float) -> float:
    """Return the largest of these degrees over Taylor's, from a score of 1 on; 0 if there is none."""
    largest = {power: score(power * math.log(2)) for power, degree in used.items() if degree is not None}
    shares = [(used[power] or 0) / polynomial_degree(s, error) for power, s in largest.items() if s >= 1]
    return max(shares, default=0.0)


def largest_error(score: Scores, used: Degrees, tokens: Tokens, error: float) -> float:
    """Return the largest output error of these degrees over full and causal sequences, where there is a polynomial."""
    worst = 0.0
    for power, there in degrees(score, error).items():
        if there is None or (degree := used[power]) is None:
            continue
        largest = score(power * math.log(2))
        for causal in (False, True):
            units, keys = tokens(power, causal)
            worst = max(worst, distance(largest * units, keys, degree, largest))
    return worst


def distance(
    scores: Float[np.ndarray, "queries levels"], keys: Float[np.ndarray, "queries levels"], degree: int, largest: float
) -> float:
    """Return the output error for the worst values in [-1, 1] and the worst query, of the polynomial for ``largest``.

    Args:
        scores: of each query's keys.
        keys: how many have that score.
        degree: g.
        largest: what |score| is at most.
    """
    weights = [b / math.factorial(t) for t, b in enumerate(Minimax(degree, largest).coefficients)]
    exact, near = keys * np.exp(scores - largest), keys * np.polynomial.polynomial.polyval(scores, weights)
    shares = [found / found.sum(1, keepdims=True) for found in (near, exact)]
    return float(np.abs(shares[0] - shares[1]).sum(1).max())
