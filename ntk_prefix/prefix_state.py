r"""A prefix of any length as a state of constant size: the ``z`` and ``k`` of
:func:`ntk_prefix.attention.ntk_attention`.

Two ways lead from a real prefix (keys and values of one attention layer, from any source: prefix tuning in
any library, or simply a long text run through the layer) to a state.

``from_prefix``
    The sums ``z = sum_j phi(p_j) v_j^T`` and ``k = sum_j phi(p_j)``. Right when ``phi(q) . phi(p)`` is close
    to ``exp(q . p)``, as for Taylor and random features; for ``elu1`` it is not, and the sums are far off.
``fit``
    The ``z, k`` whose *attention output* is closest to that of the exact prefix on sample queries, for any
    map.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
from threadpoolctl import threadpool_limits

from ntk_prefix.attention import LowRank, ntk_attention, prefix_attention
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Elu1, FeatureMap
from ntk_prefix.feature_maps import feature_map as resolve_feature_map
from ntk_prefix.flash import Flash
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["FitReport", "PrefixState"]

logger = logging.getLogger(__name__)

RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)
"""Candidates for the ridge on z, relative to the mean eigenvalue of the features' second moments."""

LARGEST_LOG_RATIO = 300
"""Of masses in a fit: products of two stay far from the ends of float64, e^709."""


class FitReport(NamedTuple):
    """How well a fit does, per head: ``|T - T_exact| / |T_exact|`` over queries and head dimension."""

    held_out_error: np.ndarray
    """On queries the fit has not seen."""
    training_error: np.ndarray
    raw_error: np.ndarray
    """Of the raw sums of :meth:`PrefixState.from_prefix`, on the same held-out queries."""
    no_prefix_error: np.ndarray
    """Of leaving the prefix out, on the same held-out queries; infinite without keys of their own."""
    ridge: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixState:
    """What stands in for a prefix in one attention layer; a pytree whose leaves are ``z`` and ``k``.

    Args:
        z: [N, R, H], or a :class:`~ntk_prefix.attention.LowRank` pair.
        k: [N, R].
        feature_map: the map that z and k were made with, and that queries must be given.
        scale: that of the layer's scores; 1/sqrt(H) if None.
    """

    z: Float[Array, "N R H"] | LowRank
    k: Float[Array, "N R"]
    feature_map: FeatureMap = dataclasses.field(default=Elu1(), metadata={"static": True})
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def from_prefix(
        cls,
        prefix_key: Float[Array, "M K H"],
        prefix_value: Float[Array, "M K H"],
        *,
        feature_map: str | FeatureMap = "elu1",
        num_heads: int | None = None,
        scale: float | None = None,
        block: int = 4096,
    ) -> PrefixState:
        """Return the raw sums over a prefix: ``z = sum_j phi(p_j) v_j^T``, ``k = sum_j phi(p_j)``.

        Args:
            prefix_key, prefix_value: [M, K, H], keys not scaled; M = 0 gives the zero state.
            feature_map: a name or a map; applied to ``p * sqrt(scale)``.
            num_heads: N, a multiple of K, for layers whose query heads share keys; K if None.
            scale: of the layer's scores; 1/sqrt(H) if None.
            block: prefix tokens whose features exist at one time.

        Returns:
            The state, in the accumulation dtype of ``prefix_key``.

        Numerics: blocks are added with compensation (Kahan), so the error does not grow with M.

        Source: arXiv 2406.14036, equations for Z and k (code).
        """
        phi = resolve_feature_map(feature_map)
        add = functools.partial(_add_block, phi, _root(scale, prefix_key.shape[-1]))
        sums = _zero_sums(phi, prefix_key)
        block = min(block, max(prefix_key.shape[0], 1))
        whole = prefix_key.shape[0] // block * block

        def step(sums: Any, start: Array) -> tuple[Any, None]:
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
            return add(sums, cut(prefix_key), cut(prefix_value)), None

        if whole:
            sums, _ = jax.lax.scan(step, sums, jnp.arange(0, whole, block))
        if whole < prefix_key.shape[0]:
            sums = add(sums, prefix_key[whole:], prefix_value[whole:])
        return cls._of_sums(sums, phi, num_heads, scale)

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[tuple[Any, Any]],
        *,
        feature_map: str | FeatureMap = "elu1",
        num_heads: int | None = None,
        scale: float | None = None,
    ) -> PrefixState:
        """Return the raw sums over a prefix that comes in pieces: one of 10^8 tokens fits.

        Args:
            blocks: (prefix_key, prefix_value) pairs, each [any length, K, H], from memory, a file or a
                generator; equal lengths compile once.
            feature_map, num_heads, scale: as in :meth:`from_prefix`.

        Raises:
            ValueError: there is no block.
        """
        phi = resolve_feature_map(feature_map)
        add = jax.jit(_add_block, static_argnums=(0, 1))
        sums = None
        for key, value in blocks:
            key = jnp.asarray(key)
            if sums is None:
                sums = _zero_sums(phi, key)
            sums = add(phi, _root(scale, key.shape[-1]), sums, key, jnp.asarray(value))
        if sums is None:
            raise UsageError("expected at least one block, got none: for M = 0 use from_prefix")
        return cls._of_sums(sums, phi, num_heads, scale)

    @classmethod
    def fit(cls, *args: Any, **options: Any) -> PrefixState:
        """Return the state fitted by :meth:`fit_with_report`; the held-out error is logged at level INFO."""
        return cls.fit_with_report(*args, **options)[0]

    @classmethod
    def fit_with_report(
        cls,
        query: Float[Array, "B T N H"],
        prefix_key: Float[Array, "M K H"],
        prefix_value: Float[Array, "M K H"],
        key: Float[Array, "B S K H"] | None = None,
        value: Float[Array, "B S K H"] | None = None,
        *,
        feature_map: str | FeatureMap = "elu1",
        bias: Float[Array, "#B #N #T #S"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        held_out: float = 0.25,
        iterations: int = 200,
        starts: int = 1,
        seed: int = 0,
    ) -> tuple[PrefixState, FitReport]:
        r"""Return the state whose attention is closest to that of the exact prefix, in least squares, and how
        close.

        Per head, over sample queries with features ``phi_i``, own mass ``a_i = e^{lse_i}`` and own output
        ``o_i``, minimize

        .. math::  \sum_i |T_i - T^*_i|^2, \qquad T_i = (\phi_i Z + a_i o_i) / (\phi_i \cdot k + a_i)

        over Z and k >= 0, where ``T*`` is the exact prefix attention. For a given k the best Z is a linear
        least squares problem, so the descent is in k alone; it starts at the k that fits the exact prefix
        masses, each relative to its row's whole mass, by non-negative least squares. The problem is not
        convex: further starts are drawn, and the k with the least error on the samples is kept.

        Args:
            query: [B, T, N, H], sample queries, not scaled.
            prefix_key, prefix_value: [M, K, H].
            key, value: [B, S, K, H], the keys that the queries see beside the prefix; None fits attention
                over the prefix alone. With them, the state is made good where the prefix matters, so give
                them if there are any.
            feature_map: a name or a map. With negative features (Taylor), k is only fitted to
                the masses, without a constraint.
            bias, mask, is_causal, scale: of the layer, as in :func:`ntk_prefix.attention.ntk_attention`.
            held_out: the fraction of samples (whole sequences if B >= 4) that is only used for the report.
            iterations: of the descent in k, each a factorization of R x R moments; 0 leaves k at its start.
            starts: of the descent, each as long as the first.
            seed: of the splits and of the drawn starts.

        Returns:
            The state, and a :class:`FitReport`.

        Raises:
            ValueError: too few samples for the features to be determined, no start, masses of too different sizes, or a
                state that the dtype cannot hold.

        Numerics: on the host in float64; masses relative to their median, so only their ratios must be
            moderate, below e^300: products of two stay finite.

        Source: derived; the elimination of Z is the variable projection of Golub and Pereyra (1973).
        """
        phi = resolve_feature_map(feature_map)
        if (key is None) != (value is None):
            raise UsageError("expected key and value, or neither")
        if starts < 1:
            raise UsageError(f"expected starts >= 1, got {starts}")
        samples = _samples(query, prefix_key, prefix_value, key, value, bias, mask, is_causal, scale, phi)
        heads, count, features = samples.features.shape
        held = _held_out(query.shape[0], query.shape[1], held_out, seed)
        if count - held.sum() < features:
            raise UsageError(
                f"expected at least {features} samples to fit {features} features, got {count - held.sum()}: "
                "give more queries, or a smaller feature map"
            )
        raw = cls.from_prefix(prefix_key, prefix_value, feature_map=phi, num_heads=heads, scale=scale)
        zs, ks, rows = [], [], []
        for head in range(heads):
            fit, test = (_Head(*(x[head][chosen] for x in samples)) for chosen in (~held, held))
            # systems of R x R: the threads of BLAS would wait for one another, six times as long
            with threadpool_limits(1):
                z, k, ridge = _fit_head(fit, phi.positive, iterations, starts, seed)
            raw_z, raw_k = np.asarray(raw.z, np.float64)[head], np.asarray(raw.k, np.float64)[head]
            rows.append(
                (
                    test.error(z, k),
                    fit.error(z, k),
                    test.error(raw_z, raw_k),
                    test.error(0 * z, 0 * k) if key is not None else math.inf,
                    ridge,
                )
            )
            zs.append(z)
            ks.append(k)
        report = FitReport(*np.array(rows).T)
        logger.info("held-out error of the fit per head: %s", np.round(report.held_out_error, 4))
        dtype = accumulation_dtype(prefix_key.dtype)
        largest = [max(np.abs(z).max(), np.abs(k).max()) for z, k in zip(zs, ks, strict=True)]
        if beyond := [head for head, size in enumerate(largest) if not size <= jnp.finfo(dtype).max]:
            raise UsageError(
                f"expected a state that fits into {jnp.dtype(dtype).name}, got one of size e^{np.log(max(largest)):.0f} in "
                f"heads {beyond}: it is as large as the keys' mass e^lse; leave these heads without a prefix, or fit in float64"
            )
        return cls(jnp.asarray(np.stack(zs), dtype), jnp.asarray(np.stack(ks), dtype), phi, scale), report

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        **options: Any,
    ) -> Float[Array, "B T N H"]:
        """Return :func:`~ntk_prefix.attention.ntk_attention` with this state, its map and its scale."""
        return ntk_attention(
            query, key, value, self.z, self.k, feature_map=self.feature_map, scale=self.scale, **options
        )

    def error(
        self,
        query: Float[Array, "B T N H"],
        prefix_key: Float[Array, "M K H"],
        prefix_value: Float[Array, "M K H"],
        key: Float[Array, "B S K H"] | None = None,
        value: Float[Array, "B S K H"] | None = None,
        **options: Any,
    ) -> Float[Array, "N"]:
        """Return per head ``|T - T_exact| / |T_exact|`` over queries, against the exact prefix.

        Args:
            query, prefix_key, prefix_value, key, value: as in :meth:`fit_with_report`; without keys the
                queries see the prefix alone.
            options: bias, mask, is_causal, implementation, as in :func:`~ntk_prefix.attention.ntk_attention`.
        """
        if key is None or value is None:
            key = value = jnp.zeros((query.shape[0], 0, *prefix_key.shape[1:]), query.dtype)
        exact = prefix_attention(query, key, value, prefix_key, prefix_value, scale=self.scale, **options)
        distance = self.attend(query, key, value, **options) - exact
        return jnp.sqrt(jnp.sum(distance**2, axis=(0, 1, 3)) / jnp.sum(exact**2, axis=(0, 1, 3)))

    @classmethod
    def _of_sums(cls, sums: Any, phi: FeatureMap, num_heads: int | None, scale: float | None) -> PrefixState:
        (z, k), _ = sums
        heads = z.shape[0] if num_heads is None else num_heads
        if heads % z.shape[0]:
            raise UsageError(f"expected num_heads, a multiple of the {z.shape[0]} key heads, got {heads}")
        repeats = heads // z.shape[0]
        return cls(jnp.repeat(z, repeats, axis=0), jnp.repeat(k, repeats, axis=0), phi, scale)


# ----------------------------------------------------------------------------------------- the sums


def _root(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.25 if scale is None else math.sqrt(scale)


def _zero_sums(phi: FeatureMap, key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return (sums, what rounding has lost of them)."""
    heads, head_dim = key.shape[1:]
    features, dtype = phi.dim(head_dim), accumulation_dtype(key.dtype)
    zero = jnp.zeros((heads, features, head_dim), dtype), jnp.zeros((heads, features), dtype)
    return zero, zero


def _add_block(phi: FeatureMap, root: float, sums: Any, key: Array, value: Array) -> Any:
    dtype = accumulation_dtype(key.dtype)
    features = phi(key.astype(dtype) * root)
    block = jnp.einsum("mnr,mnh->nrh", features, value.astype(dtype)), jnp.sum(features, axis=0)

    def add(total: Array, lost: Array, x: Array) -> tuple[Array, Array]:
        x = x - lost
        new = total + x
        return new, (new - total) - x

    pairs = [add(*triple) for triple in zip(*sums, block, strict=True)]
    return tuple(zip(*pairs, strict=True))


# ------------------------------------------------------------------------------------------ the fit


class _Head(NamedTuple):
    """What the fit of one head needs to know of each sample query (a leading axis of heads: of all)."""

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
        """Return the relative Frobenius error of a state in natural units."""
        unit = self.unit[0]
        distance = self.output(z / unit, k / unit) - self.target
        return float(np.linalg.norm(distance) / np.linalg.norm(self.target))

    def take(self, rows: np.ndarray) -> _Head:
        """Return some of the samples."""
        return _Head(*(x[rows] for x in self))


def _samples(
    query: Array,
    prefix_key: Array,
    prefix_value: Array,
    key: Array | None,
    value: Array | None,
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    scale: float | None,
    phi: FeatureMap,
) -> _Head:
    """Run the two exact attentions, blockwise, and return what is left of them; arrays [N, Q, ...]."""
    batch, length, heads, head_dim = query.shape
    root = _root(scale, head_dim)

    def by_head(x: Array) -> np.ndarray:  # [B, T, N, ...] -> [N, B T, ...]
        rows = np.moveaxis(np.asarray(x, np.float64), 2, 0)
        return rows.reshape(heads, batch * length, *x.shape[3:])

    folded = query.reshape(1, batch * length, heads, head_dim)
    prefix = Flash("xla", root**2).forward(folded, prefix_key[None], prefix_value[None])
    prefix_log = by_head(prefix.lse.transpose(0, 2, 1).reshape(batch, length, heads))
    prefix_output = by_head(prefix.output.reshape(query.shape))
    own_log, own_output = np.full_like(prefix_log, -np.inf), np.zeros_like(prefix_output)
    if key is not None and value is not None:
        own = Flash("xla", root**2, is_causal).forward(query, key, value, bias, mask)
        own_log, own_output = by_head(own.lse.transpose(0, 2, 1)), by_head(own.output)
    unit = np.median(prefix_log, axis=1, keepdims=True)
    if (widest := max(np.abs(unit).max(), np.abs(np.maximum(own_log, prefix_log) - unit).max())) > LARGEST_LOG_RATIO:
        raise UsageError(
            f"expected masses e^lse between e^-{LARGEST_LOG_RATIO} and e^{LARGEST_LOG_RATIO}, also relative to their median, "
            f"got e^{widest:.0f}: no sums of so different ones are exact; scale down queries or keys"
        )
    own_mass, prefix_mass = np.exp(own_log - unit), np.exp(prefix_log - unit)
    share = (prefix_mass / (own_mass + prefix_mass))[..., None]
    dtype = accumulation_dtype(query.dtype)
    return _Head(
        by_head(phi(query.astype(dtype) * root)),
        own_mass,
        own_output,
        prefix_mass,
        share * prefix_output + (1 - share) * own_output,
        np.broadcast_to(np.exp(unit), own_mass.shape),
    )


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
    if positive and iterations:
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
    """Return the z that is best for this k: least squares in the output itself."""
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
