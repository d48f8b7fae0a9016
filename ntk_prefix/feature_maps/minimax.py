"""The polynomial that is nearest to the exponential on the scores there are, on Taylor's features."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import check_count, check_positive, expected
from ntk_prefix.feature_maps.base import FeatureMap, checked_size
from ntk_prefix.feature_maps.fixed import Taylor
from ntk_prefix.typing import Array, Float

__all__ = ["Minimax"]

LARGEST_SCORE = 8.0
"""Of the scores a polynomial is made for. Its value at -S is e^(-2 S) of that at S: float64 solves the linear program to 6e-4
there, and to 8 % at 10."""

LARGEST_DEGREE = 64

LARGEST_LOG_COEFFICIENT = 600
"""Of a polynomial in Chebyshev's basis, as one in monomials: float64 ends at e^709."""

PLACES = 600
"""Points at which the polynomial is chosen."""

PROVED_AT = 2**14
"""Points between which its error is bounded."""


@dataclasses.dataclass(frozen=True)
class Minimax(FeatureMap):
    r"""Taylor's features, weighted by degree: ``phi(q) . phi(k) = sum_{t <= g} b_t (q . k)^t / t!``, b for scores up to S.

        b = argmin_{b >= 0}  max_{|s| <= S} | 1 - e^{-s} sum_t b_t s^t / t! |

    As many features as ``taylor`` of the degree, with other weights: at S = 4 the relative error of degree 8 is 0.2 % and not
    39 (4,000 %). b >= 0 makes the two factors the same map, and costs nothing that can be seen. Beyond S it says less than
    Taylor's, so S is the largest |scale q . k| that is measured.

    Numerics: as ``taylor``; of weights at s = -S rounding takes e^{2 S} of a relative error, which the bound counts in float64.

    Source: derived. b comes from a linear program at Chebyshev points, and is not trusted: its error is bounded anew, and
    Taylor's b = 1 is taken where that bound is smaller, as it is where S is small for the degree.

    Args:
        degree: g, from 0 to 64.
        score: S > 0, at most 8: the largest score it is made for.
    """

    degree: int = 2
    score: float = 1.0
    name: ClassVar[str] = "minimax"

    def __post_init__(self) -> None:
        """Refuse what is no degree, and scores at which rounding is as large as the weights."""
        check_count("degree", self.degree, 0)
        check_positive("score", self.score)
        if self.degree > LARGEST_DEGREE:
            raise expected("degree", f"at most {LARGEST_DEGREE}", self.degree)
        if self.score > LARGEST_SCORE:
            hint = 'Take feature_map("taylor", degree=...), or positive features'
            raise expected("score", f"at most {LARGEST_SCORE:g}", self.score, hint)

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return an even and an odd degree."""
        return cls(2), cls(3, 2.0)

    @property
    def positive(self) -> bool:
        """False, except for the constant map of degree 0."""
        return self.degree == 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """b_0 .. b_g: what the terms of the exponential series are multiplied by."""
        return _coefficients(self.degree, float(self.score))

    def dim(self, head_dim: int) -> int:
        """Return ``C(head_dim + degree, degree)``."""
        return math.comb(head_dim + self.degree, self.degree)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return all scaled monomials of x up to the degree, ordered by degree."""
        counts = [math.comb(x.shape[-1] + t - 1, t) for t in range(self.degree + 1)]
        weights = jnp.asarray(np.repeat(np.sqrt(self.coefficients), counts), x.dtype)
        return Taylor(self.degree)(x) * weights.reshape((1,) * (x.ndim - 1) + (-1,))

    def error_bound(self, norm: float) -> float:
        """Return a bound on the relative error at scores up to ``norm**2``, which may be more or less than S."""
        size = checked_size(norm) ** 2
        return _proved(self.coefficients, size) if size <= 2 * LARGEST_SCORE else math.inf


@functools.lru_cache(maxsize=256)
def _coefficients(degree: int, score: float) -> tuple[float, ...]:
    """Return b by a linear program in Chebyshev's basis, whose columns do not resemble one another."""
    from scipy.optimize import linprog

    taylor = (1.0,) * (degree + 1)
    if math.lgamma(degree + 1) - degree * math.log(score) > LARGEST_LOG_COEFFICIENT:
        return taylor  # of scores so small the terms of high degree are below any rounding

    places = np.cos(np.pi * np.arange(PLACES) / (PLACES - 1))
    columns = np.polynomial.chebyshev.chebvander(places, degree) * np.exp(-score * places)[:, None]
    sizes = np.abs(columns).max(0)
    # [t, j]: what the j-th Chebyshev polynomial adds to b_t
    inside = np.zeros((degree + 1, degree + 1))
    for j in range(degree + 1):
        monomials = np.polynomial.chebyshev.cheb2poly(np.eye(degree + 1)[j])
        for t, value in enumerate(monomials):
            inside[t, j] = value * math.exp(math.lgamma(t + 1) - t * math.log(score))
    inside = inside / sizes
    rows = np.abs(inside).max(1, keepdims=True)
    columns = columns / sizes
    one, ones = np.ones((PLACES, 1)), np.ones(PLACES)
    found = linprog(
        np.append(np.zeros(degree + 1), 1.0),
        A_ub=np.block([[columns, -one], [-columns, -one], [-inside / rows, np.zeros((degree + 1, 1))]]),
        b_ub=np.concatenate([ones, -ones, np.zeros(degree + 1)]),
        bounds=[(None, None)] * (degree + 1) + [(0, None)],
        method="highs",
    )
    if found.x is None:
        return taylor
    # of scores small for the degree the program's terms of high degree are rounding, and may be huge
    return min((tuple(np.maximum(inside @ found.x[:-1], 0).tolist()), taylor), key=lambda b: _proved(b, score))


@functools.lru_cache(maxsize=1024)
def _proved(coefficients: tuple[float, ...], size: float) -> float:
    """Return a bound on max |r(s)|, r = 1 - e^{-s} p(s), over |s| <= ``size``.

    Between two points at a distance h |r| is at most the larger of its values there plus h^2 max |r''| / 8, and r'' likewise
    by its fourth derivative, that by its sixth. r^(k) = -e^{-s} D_k, D_0 = p, D_{k+1} = D_k' - D_k, and
    |r^(6)| <= 2^6 max b e^{2 size}, as |p^(j)(s)| <= p^(j)(size) <= max b e^{size}. A value is rounded by
    gamma_{4 g + 64} of the same sum with all signs plus, p(|s|) e^{-s}, times 2^k for D_k.
    """
    if size == 0:
        return abs(1 - coefficients[0])
    degree = len(coefficients) - 1
    places = np.linspace(-size, size, PROVED_AT + 1)
    distance = 2 * size / PROVED_AT * (1 + 1e-9)
    monomial = np.array([b / math.factorial(t) for t, b in enumerate(coefficients)])
    unit = (4 * degree + 64) * 2.0**-53 * 1.01
    plus = np.polynomial.polynomial.polyval(np.abs(places), monomial) * np.exp(-places)
    # with the derivatives' own terms b_{t+j}: all of them are at most max b e^|s|
    above = unit * (max(coefficients) * np.exp(np.abs(places) - places) + plus + 1)
    bound = 2.0**6 * max(coefficients) * math.exp(2 * size)
    derivative, by_order = np.polynomial.Polynomial(monomial), {}
    for order in range(5):
        by_order[order] = derivative(places) * np.exp(-places)
        derivative = derivative.deriv() - derivative
    for order in (4, 2, 0):
        values = np.abs(1 - by_order[0]) if order == 0 else np.abs(by_order[order])
        bound = float((values + 2.0**order * above).max()) + distance**2 / 8 * bound
    return float(bound * (1 + 1e-12))
