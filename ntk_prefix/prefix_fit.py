r"""The fit of a prefix's state: the z and k whose attention is closest to that of the exact prefix, in least squares.

Per head, over sample queries with features ``phi_i``, own mass ``a_i = e^{lse_i}`` and own output ``o_i``, minimize

.. math::  \sum_i |T_i - T^*_i|^2, \qquad T_i = (\phi_i Z + a_i o_i) / (\phi_i \cdot k + a_i)

over Z and k >= 0, where ``T*`` is the exact prefix attention. For a given k the best Z is a linear least squares
problem, so the descent is in k alone; it starts at the k that fits the exact prefix masses, each relative to its row's
whole mass, by non-negative least squares. The problem is not convex: further starts are drawn, and the k with the least
error on the samples is kept.

Everything is on the host, in float64; :class:`~ntk_prefix.prefix_state.PrefixState` makes the state of it.

Source: derived; the elimination of Z is the variable projection of Golub and Pereyra (1973).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from ntk_prefix.anchor_fit import RIDGE, check_enough, choose, fit_chosen
from ntk_prefix.checks import check_count, check_fraction, check_seed, check_soft_cap, check_window, expected
from ntk_prefix.feature_maps import Anchors, FeatureMap
from ntk_prefix.flash import Flash, Source
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.query_shares import Rows, outputs
from ntk_prefix.typing import Array

__all__ = ["Fit", "FitOptions", "FitReport", "Samples", "fit_anchors", "fit_prefix"]

logger = logging.getLogger(__name__)

RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)
"""Candidates for the ridge on z, relative to the mean eigenvalue of the features' second moments."""

LARGEST_LOG_RATIO = 300
"""Of masses in a fit: products of two stay far from the ends of float64, e^709."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit is made.

    Args:
        held_out: the fraction of samples (whole sequences if there are four or more) that is only used for the report.
        iterations: of the descent in k, each a factorization of R x R moments; 0 leaves k at its start.
        starts: of the descent, each as long as the first.
        seed: of the splits and of the drawn starts.

    Raises:
        UsageError: a fraction outside (0, 1), a count that is not one.
    """

    held_out: float = 0.25
    iterations: int = 200
    starts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted with."""
        check_fraction("held_out", self.held_out, "a fraction in (0, 1)")
        check_count("iterations", self.iterations, 0)
        check_count("starts", self.starts)
        check_seed("seed", self.seed)


class FitReport(NamedTuple):
    """How well a fit does, per head: ``|T - T_exact| / |T_exact|`` over queries and head dimension."""

    held_out_error: np.ndarray
    """On queries the fit has not seen."""
    training_error: np.ndarray
    raw_error: np.ndarray
    """Of the raw sums of :meth:`PrefixState.from_prefix`, on the same held-out queries; NaN where no float holds them."""
    no_prefix_error: np.ndarray
    """Of leaving the prefix out, on the same held-out queries; infinite without keys of their own."""
    ridge: np.ndarray


class Fit(NamedTuple):
    """What a fit finds, in float64 and natural units, and how good it is."""

    z: np.ndarray
    """[N, R, H]"""
    k: np.ndarray
    """[N, R]"""
    report: FitReport


class Samples(NamedTuple):
    """What the fit needs to know of Q = B T sample queries, per head."""

    features: np.ndarray
    """[N, Q, R], ``phi_i``."""
    own_mass: np.ndarray
    """[N, Q], ``a_i``, relative to the prefix masses' median; 0 where a query sees no key."""
    own_output: np.ndarray
    """[N, Q, H], ``o_i``."""
    prefix_mass: np.ndarray
    """[N, Q], relative likewise."""
    target: np.ndarray
    """[N, Q, H], ``T*_i``."""
    unit: np.ndarray
    """[N, Q], the median that the masses are relative to, repeated."""
    sequences: int
    """B: queries of one sequence stand together, and are held out together."""

    @classmethod
    def of(
        cls,
        query: Array,
        prefix_key: Array,
        prefix_value: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        feature_map: FeatureMap,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
        is_causal: bool = False,
    ) -> Samples:
        """Run the two exact attentions, blockwise, and return what is left of them.

        Args:
            query: [B, T, N, H], not scaled.
            prefix_key, prefix_value: [M, K, H].
            key, value: [B, S, K, H], or neither.
            feature_map: the map to fit.
            scale: of the layer's scores; 1/sqrt(H) if None.
            logits_soft_cap, local_window_size, bias, mask, is_causal: of the layer; the cap is the prefix's too.

        Raises:
            UsageError: a cap or a window that is none; masses of too different sizes for sums in float64.
        """
        batch, length, heads, head_dim = query.shape
        root = head_dim**-0.25 if scale is None else math.sqrt(scale)

        def by_head(x: Array) -> np.ndarray:  # [B, T, N, ...] -> [N, B T, ...]
            rows = np.moveaxis(np.asarray(x, np.float64), 2, 0)
            return rows.reshape(heads, batch * length, *x.shape[3:])

        folded = query.reshape(1, batch * length, heads, head_dim)
        window, soft_cap = check_window(local_window_size), check_soft_cap(logits_soft_cap)
        flash = Flash("xla", root**2, is_causal, window=window, logits_soft_cap=soft_cap)
        prefix = flash.everywhere().forward(folded, Source(prefix_key[None], prefix_value[None]))
        prefix_log = by_head(prefix.lse.transpose(0, 2, 1).reshape(batch, length, heads))
        prefix_output = by_head(prefix.output.reshape(query.shape))
        own_log, own_output = np.full_like(prefix_log, -np.inf), np.zeros_like(prefix_output)
        if key is not None and value is not None:
            own = flash.forward(query, Source(key, value, bias, mask))
            own_log, own_output = by_head(own.lse.transpose(0, 2, 1)), by_head(own.output)
        unit = np.median(prefix_log, axis=1, keepdims=True)
        if (
            widest := max(np.abs(unit).max(), np.abs(np.maximum(own_log, prefix_log) - unit).max())
        ) > LARGEST_LOG_RATIO:
            raise expected(
                "query, prefix_key",
                f"masses e^lse between e^-{LARGEST_LOG_RATIO} and e^{LARGEST_LOG_RATIO}, also relative to their median",
                f"e^{widest:.0f}",
                "No sums of so different ones are exact: scale down queries or keys",
            )
        own_mass, prefix_mass = np.exp(own_log - unit), np.exp(prefix_log - unit)
        share = (prefix_mass / (own_mass + prefix_mass))[..., None]
        return cls(
            _features(feature_map, query, root),
            own_mass,
            own_output,
            prefix_mass,
            share * prefix_output + (1 - share) * own_output,
            np.broadcast_to(np.exp(unit), own_mass.shape),
            batch,
        )

    def head(self, index: int, chosen: np.ndarray) -> _Head:
        """Return one head's chosen samples."""
        return _Head(*(x[index][chosen] for x in self[:-1]))


def _features(phi: FeatureMap, query: Array, root: float) -> np.ndarray:
    """Return ``phi`` of all samples, [N, B T, R]; in float64 from where a map keeps them finite.

    Raises:
        UsageError: features too large for sums in float64.
    """
    scaled = query.astype(accumulation_dtype(query.dtype)) * root
    features, log_unit = (
        None if x is None else np.asarray(x, np.float64) for x in phi.per_head(jnp.swapaxes(scaled, 1, 2))
    )
    assert features is not None
    if log_unit is not None:
        if (largest := log_unit.max(initial=0)) > LARGEST_LOG_RATIO:
            raise expected(
                "query", f"features of at most e^{LARGEST_LOG_RATIO}", f"e^{largest:.0f}", "Scale down the points"
            )
        features = features * np.exp(log_unit)[..., None]
    return np.moveaxis(features, 1, 0).reshape(features.shape[1], -1, features.shape[-1])


def fit_prefix(
    samples: Samples, options: FitOptions, *, positive: bool, raw: tuple[np.ndarray, np.ndarray], alone: bool
) -> Fit:
    """Fit z and k to samples.

    Args:
        samples: from :meth:`Samples.of`.
        options: how.
        positive: whether the features are, so that k >= 0 is asked for; else k is only fitted to the masses.
        raw: z [N, R, H] and k [N, R] of the raw sums, to report beside.
        alone: whether the queries see the prefix alone, without keys of their own.

    Raises:
        UsageError: too few samples for the features to be determined.
    """
    heads, count, features = samples.features.shape
    held = _held_out(samples.sequences, count // samples.sequences, options.held_out, options.seed)
    if count - held.sum() < features:
        raise expected(
            "query",
            f"at least {features} samples to fit {features} features",
            count - held.sum(),
            "Give more queries, or a smaller feature map",
        )
    zs, ks, rows = [], [], []
    for head in range(heads):
        fit, test = samples.head(head, ~held), samples.head(head, held)
        # systems of R x R: the threads of BLAS would wait for one another, six times as long
        with threadpool_limits(1):
            z, k, ridge = _fit_head(fit, positive, options.iterations, options.starts, options.seed)
        rows.append(
            (
                test.error(z, k),
                fit.error(z, k),
                test.error(raw[0][head], raw[1][head]),
                math.inf if alone else test.error(0 * z, 0 * k),
                ridge,
            )
        )
        zs.append(z)
        ks.append(k)
    report = FitReport(*np.array(rows).T)
    logger.info("held-out error of the fit per head: %s", np.round(report.held_out_error, 4))
    return Fit(np.stack(zs), np.stack(ks), report)


def fit_anchors(
    rows: Rows,
    prefix_key: Array,
    prefix_value: Array,
    features: int,
    shape: tuple[int, int, int],
    options: FitOptions,
    logits_soft_cap: float | None = None,
) -> tuple[Array, Array, Array, FitReport]:
    """Choose and fit anchors.

    Args:
        rows: the queries, of K heads.
        prefix_key, prefix_value: [K, M, H], keys scaled.
        features: R.
        shape: B, T, N of the queries.
        options: how; ``iterations`` are steps of the descent.
        logits_soft_cap: of the layer's scores.

    Returns:
        points, z [K, R, H], k [K, R], of as many anchors as lower the error of any head, and the report, per query head.

    Raises:
        UsageError: more anchors than prefix tokens or queries.
    """
    check_count("features", features)
    if features > prefix_key.shape[1]:
        raise expected("features", f"at most the prefix's {prefix_key.shape[1]} tokens", features)
    batch, length, heads = shape
    groups = heads // len(prefix_key)
    held = np.repeat(_held_out(batch, length, options.held_out, options.seed), groups)
    fit, test = rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))
    check_enough(fit, features)
    some: dict[str, Any] = {"logits_soft_cap": logits_soft_cap, "seed": options.seed}
    chosen = choose(fit, prefix_key, features, **some)
    found = fit_chosen(fit, prefix_key, prefix_value, chosen.tokens, chosen.useful, steps=options.iterations, **some)
    phi = Anchors(found.points, logits_soft_cap)

    def errors(some: Rows, k: Array, z: Array) -> np.ndarray:
        def size(x: Array) -> Array:  # [K, Q, H], of query heads
            return jnp.sqrt(jnp.sum(x.reshape(len(x), -1, groups, x.shape[-1]) ** 2, axis=(1, 3))).reshape(-1)

        whole = jnp.maximum(size(some.target), jnp.finfo(z.dtype).tiny)
        return np.asarray(size(outputs(some, z, k, phi) - some.target) / whole, np.float64)

    alone = bool(jnp.all(rows.log_own == -jnp.inf))
    none = np.full(heads, math.inf) if alone else errors(test, 0 * found.k, 0 * found.z)
    held_out, training = errors(test, found.k, found.z), errors(fit, found.k, found.z)
    logger.info("held-out error of the fit per head: %s", np.round(held_out, 4))
    report = FitReport(held_out, training, np.full(heads, math.nan), none, np.full(heads, RIDGE))
    return found.points, found.z, found.k, report


class _Head(NamedTuple):
    """The samples of one head; the fields are those of :class:`Samples`."""

    features: np.ndarray
    """[Q, R]"""
    own_mass: np.ndarray
    """[Q], ``a``: relative to the prefix masses' median."""
    own_output: np.ndarray
    """[Q, H]"""
    prefix_mass: np.ndarray
    """[Q]"""
    target: np.ndarray
    """[Q, H], ``T*``"""
    unit: np.ndarray
    """[Q], the median that the masses are relative to, repeated."""

    def denominator(self, k: np.ndarray) -> np.ndarray:
        """Return ``D``, for a k relative to the unit, kept off zero."""
        exact = self.own_mass + self.prefix_mass
        return np.maximum(self.own_mass + np.maximum(self.features @ k, 0), 1e-6 * exact)

    def output(self, z: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Return ``T``, for z and k relative to the unit."""
        above = self.features @ z + self.own_mass[:, None] * self.own_output
        return above / self.denominator(k)[:, None]

    def error(self, z: np.ndarray, k: np.ndarray) -> float:
        """Return the relative Frobenius error of a state in natural units; 0 where all is zero."""
        unit = self.unit[0]
        distance = np.linalg.norm(self.output(z / unit, k / unit) - self.target)
        size = np.linalg.norm(self.target)
        return float(distance / size) if size > 0 else math.inf if distance > 0 else 0.0

    def take(self, rows: np.ndarray) -> _Head:
        """Return some of the samples."""
        return _Head(*(x[rows] for x in self))


def _held_out(batch: int, length: int, fraction: float, seed: int) -> np.ndarray:
    """Return which samples are held out, [B * T]: whole sequences where there are at least four."""
    groups = batch if batch >= 4 else batch * length
    count = min(max(round(fraction * groups), 1), groups - 1)
    chosen = np.zeros(groups, bool)
    chosen[np.random.default_rng(seed).permutation(groups)[:count]] = True
    return np.repeat(chosen, batch * length // groups)


def _fit_head(
    samples: _Head, positive: bool, iterations: int, starts: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return z and k in natural units, and the ridge that did best on a quarter of the samples."""
    test = _held_out(1, len(samples.features), 0.25, seed + 1)
    fit, check = samples.take(~test), samples.take(test)
    unit = samples.unit[0]

    def trial(ridge: float) -> float:
        k = _solve_mass(fit, ridge, positive)
        return check.error(unit * _solve_z(fit, k, ridge), unit * k)

    ridge = min(RIDGES, key=trial)
    k = _solve_mass(samples, ridge, positive)
    # of values of zero the output is zero, whatever the masses are: they stay those of the prefix
    if positive and iterations and np.sum(samples.target**2) > 0:
        drawn = np.random.default_rng(seed).normal(size=(starts - 1, len(k)))
        # masses are relative to their median, so these k have about the right mass, spread over e^{+-2} per feature
        others = np.exp(2 * drawn) / np.mean(np.sum(samples.features, axis=1))
        found = [_descend(samples, start, ridge, iterations) for start in (k, *others)]
        k = min(found, key=lambda k: samples.error(unit * _solve_z(samples, k, ridge), unit * k))
    return unit * _solve_z(samples, k, ridge), unit * k, ridge


def _solve_mass(samples: _Head, ridge: float, positive: bool) -> np.ndarray:
    """Return the k that fits the exact prefix masses, each relative to the whole mass of its row."""
    weights = 1 / (samples.own_mass + samples.prefix_mass) ** 2
    factor = scipy.linalg.cholesky(_moments(samples.features, weights, ridge), lower=True)
    wanted = samples.features.T @ (weights * samples.prefix_mass)
    if not positive:
        return scipy.linalg.cho_solve((factor, True), wanted)
    wanted = scipy.linalg.solve_triangular(factor, wanted, lower=True)
    return scipy.optimize.nnls(factor.T, wanted, maxiter=100 * len(wanted))[0]


def _solve_z(samples: _Head, k: np.ndarray, ridge: float) -> np.ndarray:
    """Return the z that is best for this k: least squares in the output itself.

    A feature without mass gets no value: far from the samples it could be all that a query finds, divided by nothing.
    """
    if not k.all():
        z = np.zeros((len(k), samples.target.shape[1]))
        z[k != 0] = _solve_z(samples._replace(features=samples.features[:, k != 0]), k[k != 0], ridge)
        return z
    denominator = samples.denominator(k)
    wanted = samples.target * denominator[:, None] - samples.own_mass[:, None] * samples.own_output
    weights = 1 / denominator**2
    moments = _moments(samples.features, weights, ridge)
    return scipy.linalg.solve(moments, samples.features.T @ (weights[:, None] * wanted), assume_a="pos")


def _descend(samples: _Head, k: np.ndarray, ridge: float, iterations: int) -> np.ndarray:
    """Return a better k > 0: descent of the output error in log k, at the best z for each k.

    At the best z the error does not change with z, so its gradient in k is the plain one at fixed z.
    """

    def loss(log_k: np.ndarray) -> tuple[float, np.ndarray]:
        k = np.exp(log_k)
        output = samples.output(_solve_z(samples, k, ridge), k)
        residual = output - samples.target
        projection = np.sum(residual * output, axis=1) / samples.denominator(k)
        size = np.sum(samples.target**2)
        return np.sum(residual**2) / size, -2 / size * (samples.features.T @ projection) * k

    start = np.log(np.maximum(k, 1e-3 * np.mean(k)))
    found = scipy.optimize.minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack([start - 20, start + 20], axis=1),
        options={"maxiter": iterations},
    )
    return np.exp(found.x)


def _moments(features: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    moments = (features.T * weights) @ features
    return moments + ridge * np.trace(moments) / len(moments) * np.eye(len(moments))
