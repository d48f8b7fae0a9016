"""Floating point, accounted for: what a computed number says about the exact one.

What is assumed of the machine and of the libraries, and nothing else:

1. float64 is IEEE 754 binary64, rounding to nearest, with or without fused multiply-add; nothing overflows. Subnormal
   numbers may be flushed to zero (an absolute error of 1e-307, far below every bound here).
2. ``exp``, ``expm1``, ``log``, ``log1p`` and ``sqrt`` have a relative error of at most 8 units in the last place.
3. Sums and matrix products evaluate the textbook expression in any order (no Strassen-like algorithm).

Nothing is assumed of ``eigh``: its result is verified (``eigen_enclosure``). Sums of k terms are then bounded with
Higham's constant gamma_k = k u / (1 - k u), u = 2^-53.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ntk_prefix.checks import expected

__all__ = ["OUTWARD", "Enclosure", "eigen_enclosure", "gamma"]

UNIT = 2.0**-53

LARGEST_ENTRY = 1e140
"""Of a matrix whose Frobenius norm, and its square, are float64."""

OUTWARD = 1 + 1e-10
"""Factor on every scalar that is the upper end of a bound; its inverse on the lower ends. A scalar here is made of fewer
than 10^4 rounded operations on positive numbers, which is 2e-12 (norms of larger matrices count their entries); powers
(1 - x)^t come from exp(t log1p(-x)), whose relative error is 8 u times an exponent of at most 745 before it underflows,
which is 1e-12."""


def gamma(terms: float) -> float:
    """Higham's bound on the relative error of a sum of ``terms`` positive numbers, in any order: k u / (1 - k u)."""
    return OUTWARD * terms * UNIT / (1 - terms * UNIT)


class Enclosure(NamedTuple):
    """A matrix with known eigenvalues and orthonormal eigenvectors, near to a given one.

    There is an exactly orthogonal V with |V - basis| <= tilt, and the symmetric matrix M that was given (as computed)
    satisfies |M - V diag(values) V^T| <= radius, both in the Frobenius norm. So the eigenvalues of M are those
    ``values`` up to ``radius`` (Weyl).
    """

    values: np.ndarray
    basis: np.ndarray
    radius: np.ndarray
    tilt: np.ndarray


def eigen_enclosure(matrix: np.ndarray) -> Enclosure:
    """Return verified eigenvalues of symmetric matrices [..., N, N], whatever ``eigh`` did.

        radius = |M - U diag(w) U^T|_F + 3 |U^T U - I|_F max|w| + rounding

    Proof: with the polar decomposition U = V S, |U - V| <= max|s - 1| <= max|s^2 - 1| = |U^T U - I|; then the triangle
    inequality on U w U^T - V w V^T. The two residuals are themselves rounded: by gamma_{N+3} of their absolute sums,
    at most N times the product of the norms.
    """
    if not np.abs(matrix).max() <= LARGEST_ENTRY:
        wanted = f"kernels and moments with entries up to {LARGEST_ENTRY:g}"
        raise expected("x and the prefix", wanted, f"{np.abs(matrix).max():.3g}", "Scale them down")
    values, basis = np.linalg.eigh(matrix)
    size = matrix.shape[-1]
    frobenius = lambda a: np.linalg.norm(a, axis=(-2, -1)) * (1 + gamma(size**2 + 4))  # noqa: E731
    rounding = gamma(size + 3) * size
    tilt = OUTWARD * (frobenius(np.swapaxes(basis, -1, -2) @ basis - np.eye(size)) + 2 * rounding)
    largest = np.abs(values).max(-1)
    residual = frobenius(matrix - (basis * values[..., None, :]) @ np.swapaxes(basis, -1, -2))
    return Enclosure(values, basis, OUTWARD * (residual + 4 * rounding * largest + 3 * tilt * largest), tilt)
