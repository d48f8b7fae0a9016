"""Expectations of polynomials under a Gaussian, without an integral."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["degree_five"]


def degree_five(d: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes [2 d^2 + 1, d] and weights that integrate polynomials of degree 5 against N(0, I) exactly.

    The origin, +-sqrt(3) on one axis, and on two: weights 1 + (d^2 - 7 d) / 18, (4 - d) / 18, 1 / 36.
    """
    axis = math.sqrt(3) * np.concatenate([np.eye(d), -np.eye(d)])
    two = [axis[a] + axis[b] for a in range(2 * d) for b in range(a) if (a - b) % d]
    nodes = np.concatenate([np.zeros((1, d)), axis, np.reshape(two, (-1, d))])
    weights = np.concatenate([[1 + (d**2 - 7 * d) / 18], np.full(2 * d, (4 - d) / 18), np.full(len(two), 1 / 36)])
    return nodes, weights
