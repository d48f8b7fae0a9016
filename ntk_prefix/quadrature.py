r"""Anchors as quadrature: a prefix is a measure on keys, and a few of its tokens with other masses stand for it.

A prefix of tokens ``p_i`` with masses ``w_i`` (all 1, as it comes) enters attention through
``E(q) = sum_i w_i e^{q . p_i}`` and ``N(q) = sum_i w_i e^{q . p_i} v_i``. A rule keeps some tokens, with masses of their own:

- :func:`caratheodory`: as many tokens as there are conditions, at most, meet them all exactly. With ``f_i = e^{q . p_i}`` at
  n queries these are n masses ``E(q)``; with monomials of ``p_i`` they are the moments of the prefix.
- :func:`moment_rule_error`: what a rule that is exact on moments up to a degree loses at most, at any query.
- :func:`representing_prefix`: for elu1 the rule is exact everywhere. Every state with k > 0 is the state of at most H tokens.

Scores are plain products here: a layer's scale is in queries and keys. Proofs: theory/equivalence.md, sections 1 to 4.
"""

from __future__ import annotations

import math

import numpy as np
import scipy
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from ntk_prefix.checks import check_count, check_non_negative, expected, real_numbers

__all__ = ["caratheodory", "moment_rule_error", "representing_prefix"]

LARGEST_SCORE = 1e9
"""Whose bound is a sum of some million terms."""

DEPENDENT = 1e-14
"""Pivots below this part of the largest are none: conditions that follow from others up to rounding."""


def caratheodory(features: ArrayLike, weights: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    r"""Return at most n of M tokens, and masses for them that meet all n conditions: Caratheodory's theorem for cones.

    .. math::  \sum_j k_j f_{i_j} = \sum_i w_i f_i, \qquad k \ge 0

    For numerators append columns: n queries and values of width H are ``n (H + 1)`` columns ``e^{q . p_i}`` and
    ``e^{q . p_i} v_i``, and as many tokens keep their own values. With values of one's own n tokens are enough: the tokens
    returned have independent features, so ``Z`` in ``F Z = N`` is found by solving, F their features at the queries.

    Args:
        features: [M, n], ``f_i``, a row for each token; ``numpy.ones((M, 1))`` beside others keeps the total mass.
        weights: [M], ``w_i >= 0``.

    Returns:
        tokens [r], indices in ascending order, r <= min(n, rank of the features), and masses [r], all > 0.

    Raises:
        UsageError: shapes that do not fit, a negative weight, numbers that are not finite.

    Numerics: float64. Tokens are put into 2n groups, half of the groups are done without, and so on: ``O(M n + n^3 log(M/n))``.
    Directions in which nothing changes are rotated and not eliminated, and no step doubles a mass, so that errors stay at some
    n roundings of ``sum_i w_i |f_i|``, condition by condition.

    Source: Caratheodory 1907; by groups, Litterer and Lyons 2012 (recombination); the rotation is ours.
    """
    table, masses = (real_numbers(name, x) for name, x in (("features", features), ("weights", weights)))
    if table.ndim != 2 or not table.shape[1]:
        raise expected("features", "[M, n] with n >= 1", f"shape {table.shape}", "One row for each token")
    if masses.shape != table.shape[:1]:
        raise expected("weights", f"[{len(table)}], one for each token", f"shape {masses.shape}")
    if not np.isfinite(table).all():
        raise expected(
            "features", "finite numbers", "some that are not", "Divide e^(q.p) by its sum over tokens, in log space"
        )
    if not (np.isfinite(masses) & (masses >= 0)).all():
        raise expected("weights", "finite numbers >= 0", masses[~(np.isfinite(masses) & (masses >= 0))][0])
    # in units of their own, powers of two that round nothing, sums neither overflow nor vanish
    of_masses, of_features = (np.frexp(np.abs(x).max(axis=0, initial=0))[1] for x in (masses, table))
    masses, table = np.ldexp(masses, -of_masses), np.ldexp(table, -of_features)
    size = masses @ np.abs(table)
    table = table[:, size > 0] / size[size > 0]
    kept = np.flatnonzero((masses > 0) & table.any(axis=1))
    conditions = table.shape[1]
    while True:
        groups = min(len(kept), 2 * conditions + 2)
        # neighbors into different groups: what is alike is told apart first
        parts = [kept[start::groups] for start in range(groups)]
        columns = (
            np.stack([masses[part] @ table[part] for part in parts], axis=1) if groups else np.zeros((conditions, 0))
        )
        with threadpool_limits(1):  # matrices of 2n x n: the threads of BLAS would wait for one another
            factors = _vertex(columns)
        for part, factor in zip(parts, factors, strict=True):
            masses[part] *= factor
        if len(kept) == groups and (factors > 0).all():
            return kept, np.ldexp(masses[kept], of_masses)
        kept = kept[masses[kept] > 0]


def _vertex(columns: np.ndarray) -> np.ndarray:
    """Return factors >= 0, [c], with ``columns @ factors = columns @ 1`` and independent columns where they are not 0."""
    factors = np.ones(columns.shape[1])
    if not columns.size:
        return factors
    across, triangle, _ = scipy.linalg.qr(columns.T, pivoting=True)
    diagonal = np.abs(np.diagonal(triangle))
    free = across[
        :, int((diagonal > DEPENDENT * diagonal[0]).sum()) :
    ].T  # orthonormal rows, along which nothing changes
    while len(free):
        direction = free[0]
        # along it or against it, the first factor to vanish is the one with the greatest relative change: none may double
        last = np.argmax(np.abs(direction) / np.maximum(factors, np.finfo(float).tiny))
        factors = np.maximum(factors - factors[last] / direction[last] * direction, 0)
        factors[last] = 0
        # Householder's reflection of the rows turns this column into (|column|, 0, .., 0): the other rows keep it at 0
        mirror = free[:, last].copy()
        mirror[0] += math.copysign(np.linalg.norm(mirror), mirror[0])
        free = (free - np.outer(mirror, mirror @ free) * (2 / (mirror @ mirror)))[1:]
        free[:, last] = 0
    return factors


def moment_rule_error(degree: int, score: float, mean: float | None = None) -> float:
    r"""Return what a rule that is exact on moments up to a degree is off by at most, over the mass ``E(q)``.

    .. math::  \frac{|E'(q) - E(q)|}{E(q)} \le 4 e^{-\bar x} \sum_{t > g} I_t(s)
               \le 4 e^{s} \sum_{t > g} I_t(s) \le 2 e^{2 s} \frac{s^{g+1}}{(g+1)!}

    The scores ``q . p`` of the prefix's tokens (and so of the rule's, which are among them) lie within s of a center that is
    the query's own, and average ``center + mean``. I_t are modified Bessel functions: ``2 sum_{t>g} I_t(s)`` is how far the
    Chebyshev series of ``e^x`` on [-s, s] is from it, about ``(s/2)^{g+1} 2 / (g+1)!``; the mean enters by Jensen's
    inequality. The masses need to be >= 0, and moments include that of degree 0.

    Args:
        degree: g >= 0; at most C(h + g, g) tokens are needed in h dimensions (:func:`caratheodory` on monomials).
        score: s >= 0, half of the range of the scores.
        mean: the mean score less the center of the range, in [-s, s]; None takes -s, the worst.

    Returns:
        the bound; infinite where float64 does not hold it.

    Source: derived, proof in theory/equivalence.md, section 2; sharp up to ``I_{g+1} / sum_{t>g} I_t`` in units of the mass.
    """
    check_count("degree", degree, 0)
    check_non_negative("score", score)
    if score > LARGEST_SCORE:
        raise expected("score", f"at most {LARGEST_SCORE:g}, half of the range of the scores", score)
    mean = -score if mean is None else mean
    if not abs(mean) <= score * (1 + 1e-12):
        raise expected("mean", f"a number within {score:g} of 0", mean, "It is counted from the center of the scores")
    if score == 0:
        return 0.0
    # I_t(s) falls as e^(-t^2 / 2 s) up to t = s, and faster from there on: what is left out is below rounding
    terms = 60 + int(min(2 * score, 40 * math.sqrt(score)))
    tail = float(scipy.special.ive(np.arange(degree + 1, degree + terms), score).sum())
    # where that underflows, Taylor's remainder, which is above it, in log space
    log_tail = math.log(tail) if tail else (degree + 1) * math.log(score) - math.lgamma(degree + 2) - math.log(2)
    log_bound = math.log(4) + score - mean + log_tail
    return math.exp(log_bound) if log_bound < 700 else math.inf


def representing_prefix(z: ArrayLike, k: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values of a prefix whose elu1 state is exactly (z, k): at most ``min(rank(z) + 1, R)`` tokens.

    ``phi(x) = elu(x) + 1`` maps R^R onto the positive vectors, one to one. So every state with k > 0, however it was trained,
    is that of a prefix this short, and of none of fewer than ``rank(z)`` tokens.

    Args:
        z: [R, H], of one head; R = H in attention.
        k: [R], all > 0.

    Returns:
        keys [t, R], scaled: a layer's key is ``key / sqrt(scale)``; and values [t, H].

    Raises:
        UsageError: shapes that do not fit, a k that is not > 0: the sums of no prefix.

    Numerics: float64. The rank is what exceeds rounding, ``1e-13`` of the largest singular value; k comes back to some
    roundings of its largest entry, and z of ``max(k) max|z / k|``, times the number of tokens.

    Source: derived, proof in theory/equivalence.md, section 4.
    """
    z, k = real_numbers("z", z), real_numbers("k", k)
    if k.ndim != 1 or z.ndim != 2 or z.shape[0] != len(k) or not len(k):
        raise expected("z, k", "[R, H] and [R]", f"shapes {z.shape} and {k.shape}", "One head at a time")
    if not (np.isfinite(k) & (k > 0)).all() or not np.isfinite(z).all():
        hint = "Sums of positive features are positive: this is the state of no prefix"
        raise expected("z, k", "finite numbers, k > 0", f"k from {k.min():.3g}", hint)
    features = len(k)
    with np.errstate(over="ignore"):
        ratios = z / k[:, None]
    if not np.isfinite(ratios).all():
        raise expected(
            "z, k", "quotients z / k that float64 holds", "an overflow", "Values of tokens are of their size"
        )
    left, singular, _ = np.linalg.svd(ratios, full_matrices=False)
    rank = int((singular > 1e-13 * max(singular[0], np.finfo(float).tiny)).sum()) if singular.size else 0
    count = min(rank + 1, features)
    if rank == features:
        sums = (np.eye(features) + 1 / features) / 2  # half of it on its own feature, half on all
    else:
        # any basis of z's columns, small beside 1, and what makes the rows add up to 1
        basis = left[:, :rank].T
        steps = np.concatenate([basis, -basis.sum(0, keepdims=True)])
        sums = (1 + 0.5 * steps / max(np.abs(steps).max(initial=0), np.finfo(float).tiny)) / count
    values = np.linalg.lstsq(sums.T, ratios, rcond=None)[0]
    wanted = sums * k[None]
    # phi is e^x below 0 and 1 + x above
    keys = np.where(wanted < 1, np.log(np.minimum(wanted, 1)), wanted - 1)
    return keys, values
