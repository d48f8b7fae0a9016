r"""When a state of R features trains as an infinite prefix does: what to choose, and how far apart the two can get.

With keys that stand still, attention over a prefix is linear in its values: gradient descent on them is kernel regression with

.. math::  K(q, q') = \int p_q p_{q'} \, d\mu , \qquad p_q(k) = e^{q \cdot k} / E(q) .

A state with features F [n, R] at n queries, trained through a fixed W, is kernel regression with ``F W F^T``. All that its
training can differ in is the distance of the two kernels, and that counts relatively, down to a resolution:

.. math::  \epsilon = |(K + \lambda)^{-1/2} (\hat K - K) (K + \lambda)^{-1/2}| .

Everything is on the host, in float64: n is the number of inputs, and a prefix of any length has been summed over before.

Source: derived, proofs in theory/equivalence.md, sections 5 to 8; leverage scores, Alaoui and Mahoney (arXiv 1411.0306), Musco
and Musco (arXiv 1605.07583).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from ntk_prefix.checks import check_count, check_positive, expected
from ntk_prefix.typing import Float

__all__ = [
    "Distance",
    "greedy_anchors",
    "leverage_scores",
    "relative_distance",
    "training_distance",
    "training_weights",
]

Matrix = Float[np.ndarray, "n n"]


def leverage_scores(features: Float[np.ndarray, "n m"], resolution: float) -> Float[np.ndarray, "m"]:
    """Return the ridge leverage scores ``f_r . (F F^T + resolution)^{-1} f_r`` of the columns of F.

    They add up to the effective dimension ``tr K (K + resolution)^{-1}`` of ``K = F F^T``. Anchors drawn in proportion to
    them span all of K above the resolution, in about as many draws up to a logarithm.

    Args:
        features: of all tokens at some queries, ``p_q / sqrt(m)``: their products add up to K.
        resolution: > 0, in units of K's eigenvalues.
    """
    _check_matrix("features", features)
    check_positive("resolution", resolution)
    return np.sum(_Whitening(features @ features.T, resolution).left(features) ** 2, axis=0)


def greedy_anchors(features: Float[np.ndarray, "n m"], resolution: float, count: int) -> np.ndarray:
    """Return the tokens, [count], each of which has the most of its leverage outside of the span of those before it.

    No draw is needed, and a longer list begins with a shorter one. On a real head this is better than drawing by
    :func:`leverage_scores`, which has the theorem on how many are enough.

    Args:
        features, resolution: as there.
        count: at most n and m.

    Numerics: QR with column pivoting, ``O(n^2 m)``.
    """
    _check_matrix("features", features)
    check_positive("resolution", resolution)
    check_count("count", count)
    if count > min(features.shape):
        raise expected("count", f"at most {min(features.shape)}, the smaller side of the features", count)
    whitened = _Whitening(features @ features.T, resolution).left(features)
    return scipy.linalg.qr(whitened, mode="r", pivoting=True)[1][:count]


def training_weights(features: Float[np.ndarray, "n R"], ntk: Matrix, resolution: float) -> Float[np.ndarray, "R R"]:
    r"""Return the W that brings ``F W F^T`` nearest to a kernel, relatively, down to a resolution.

    .. math::  W = \arg\min | (K + \lambda)^{-1/2} (F W F^T - K) (K + \lambda)^{-1/2} |_F

    Args:
        features: [n, R], F, at n queries: more than R, unless the kernel is to be met at these alone.
        ntk: [n, n], K, at the same queries.
        resolution: lambda > 0, in units of K's eigenvalues: ``1 / (2 eta T)`` for T steps of size eta.

    Returns:
        W, positive semidefinite up to rounding. A state trains with it as ``Z = L Y``, ``W = L L^T``, Y being trained.
    """
    _check_matrix("features", features)
    _check_kernel("ntk", ntk)
    check_positive("resolution", resolution)
    if len(features) != len(ntk):
        raise expected("features", f"[{len(ntk)}, R], the kernel's queries", f"{features.shape}")
    whitening = _Whitening(ntk, resolution)
    with threadpool_limits(1):  # some hundred rows: the threads of BLAS would wait for one another
        inverse = np.linalg.pinv(whitening.left(features), rcond=1e-10)
        return inverse @ whitening.both(ntk) @ inverse.T


def relative_distance(ntk: Matrix, other: Matrix, resolution: float) -> float:
    """Return ``|(K + resolution)^{-1/2} (other - K) (K + resolution)^{-1/2}|``, the spectral norm."""
    _check_kernel("ntk", ntk)
    _check_kernel("other", other, len(ntk))
    check_positive("resolution", resolution)
    return float(np.abs(np.linalg.eigvalsh(_Whitening(ntk, resolution).both(other - ntk))).max())


def _check_matrix(name: str, matrix: np.ndarray) -> None:
    if np.ndim(matrix) != 2 or 0 in np.shape(matrix):
        raise expected(name, "a matrix", f"shape {np.shape(matrix)}")
    if not np.isfinite(matrix).all():
        raise expected(name, "finite numbers", "some that are not")


def _check_kernel(name: str, kernel: np.ndarray, size: int | None = None) -> None:
    """Refuse what is no symmetric matrix, of the size of another one if that is given."""
    _check_matrix(name, kernel)
    rows, columns = np.shape(kernel)
    if rows != columns or rows != (size or rows):
        raise expected(name, f"[{size or rows}, {size or rows}]", f"shape {np.shape(kernel)}")
    # rounding costs half the digits at most
    if (skew := float(np.abs(kernel - np.transpose(kernel)).max())) > 1e-8 * float(np.abs(kernel).max()):
        raise expected(name, "a symmetric kernel", f"one that differs from its transpose by {skew:.3g}")


class _Whitening:
    """``G^{-1}`` with ``G G^T = K + resolution``: a rotation of ``(K + resolution)^{-1/2}``, which no norm sees."""

    def __init__(self, ntk: Matrix, resolution: float) -> None:
        try:
            self.factor = scipy.linalg.cholesky(ntk + resolution * np.eye(len(ntk)), lower=True)
        except np.linalg.LinAlgError:
            wanted = "a number above what the kernel's eigenvalues are below 0 by, of their rounding at least"
            raise expected("resolution", wanted, resolution, "Take a positive semidefinite kernel, or more") from None

    def left(self, x: np.ndarray) -> np.ndarray:
        """Return ``G^{-1} x``."""
        return scipy.linalg.solve_triangular(self.factor, x, lower=True)

    def both(self, x: Matrix) -> Matrix:
        """Return ``G^{-1} x G^{-T}``, symmetric as x is."""
        found = self.left(self.left(x).T)
        return (found + found.T) / 2


class Distance(NamedTuple):
    """Of two runs of gradient descent from the same start, at every step, over the length of the first error."""

    curve: Float[np.ndarray, "steps"]
    """``|e(t)| / |e(0)|`` with K: the square root of the relative loss."""
    other_curve: Float[np.ndarray, "steps"]
    """The same with the other kernel."""
    distance: Float[np.ndarray, "steps"]
    """``|e(t) - other e(t)| / |e(0)|``: at least the distance of the curves."""
    bound: Float[np.ndarray, "steps"]
    """What the theorem says of it, from both kernels and the first run alone."""
    spectral_bound: Float[np.ndarray, "steps"]
    """What it says from the first run and epsilon alone; it may be above 1, where it says nothing."""


def training_distance(
    ntk: Matrix, other: Matrix, error: Float[np.ndarray, "n o"], *, learning_rate: float, steps: int
) -> Distance:
    r"""Follow gradient descent with a kernel and with another, and bound how far apart they get.

    With ``e(t) = (1 - eta K)^t e(0)``, ``h(u) = max_x (1 - eta x)^u (x + lambda)^{1/2}`` over x in [0, 1/eta] and
    ``lambda = 1 / (2 eta T)``, the distance at step t is at most

    .. math::  \frac{\eta}{\sqrt{1 - \epsilon}} \sum_{s<t} h(t - 1 - s) \, |(K + \lambda)^{-1/2} (\hat K - K) e(s)|
               \le \frac{\eta \epsilon}{\sqrt{1 - \epsilon}} \sum_{s<t} h(t - 1 - s) \, |(K + \lambda)^{1/2} e(s)| ,

    at most ``eta sum_{s<t} |(other - K) e(s)|``, and at most ``|e(0)|``.

    Args:
        ntk, other: [n, n], positive semidefinite.
        error: [n, o], ``e(0)``, outputs less targets; each output is trained with the same kernel.
        learning_rate: eta, at most one over the largest eigenvalue of either.
        steps: T.

    Raises:
        UsageError: a learning rate above that, kernels that are not positive semidefinite or not of one size, an error that is
            not [n, o] or all 0, numbers that are not finite.
    """
    _check_kernel("ntk", ntk)
    _check_kernel("other", other, len(ntk))
    _check_matrix("error", error)
    if len(error) != len(ntk) or not np.any(error):
        raise expected("error", f"[{len(ntk)}, o], not all of it 0", f"shape {np.shape(error)}")
    check_count("steps", steps)
    check_positive("learning_rate", learning_rate)
    eigenvalues, vectors = np.linalg.eigh(ntk)
    others, other_vectors = np.linalg.eigh((other + other.T) / 2)
    largest = max(eigenvalues[-1], others[-1])
    for name, values in (("ntk", eigenvalues), ("other", others)):
        if values[0] < -1e-8 * np.abs(values).max():
            raise expected(name, "a positive semidefinite kernel", f"a smallest eigenvalue of {values[0]:.3g}")
    if learning_rate * largest > 1 + 1e-9:
        raise expected("learning_rate", f"at most 1 / {largest:.3g}, the kernels' largest eigenvalue", learning_rate)
    eigenvalues, others = np.maximum(eigenvalues, 0), np.maximum(others, 0)
    times = np.arange(steps + 1)
    # in the basis of K: e(t), [steps, n, o]
    start = vectors.T @ error
    path = (1 - learning_rate * eigenvalues)[None, :, None] ** times[:, None, None] * start
    turn = vectors.T @ other_vectors
    other_path = turn @ ((1 - learning_rate * others)[None, :, None] ** times[:, None, None] * (turn.T @ start))

    resolution = 1 / (2 * learning_rate * steps)
    root = np.sqrt(eigenvalues + resolution)
    change = turn @ (others[:, None] * turn.T) - np.diag(eigenvalues)
    relative = change / root[:, None] / root
    epsilon = np.abs(np.linalg.eigvalsh(relative)).max()
    moved = change @ path
    plain = _summed(np.ones(steps), _lengths(moved))
    slowed = _slowest(learning_rate, resolution, steps)
    factor = np.inf if epsilon >= 1 else (1 - epsilon) ** -0.5
    sharp = _summed(slowed, _lengths(moved / root[:, None]))
    spectral = _summed(slowed, _lengths(path * root[:, None]))
    whole = float(np.linalg.norm(error))
    sharp[1:], spectral[1:] = factor * sharp[1:], epsilon * factor * spectral[1:]
    bound = np.minimum(np.minimum(plain, sharp) * learning_rate / whole, 1)
    return Distance(
        _lengths(path) / whole,
        _lengths(other_path) / whole,
        _lengths(path - other_path) / whole,
        bound,
        spectral * learning_rate / whole,
    )


def _lengths(path: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(path**2, axis=(1, 2)))


def _summed(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``sum_{s<t} weights[t - 1 - s] lengths[s]`` for t = 0 .. T."""
    return np.concatenate([[0.0], np.convolve(weights, lengths[:-1])[: len(weights)]])


def _slowest(learning_rate: float, resolution: float, steps: int) -> np.ndarray:
    """Return ``h(u)`` for u < steps, by the x at which its derivative vanishes."""
    u = np.arange(steps)
    place = np.maximum((1 - 2 * u * learning_rate * resolution) / (learning_rate * (1 + 2 * u)), 0)
    return (1 - learning_rate * place) ** u * np.sqrt(place + resolution)
