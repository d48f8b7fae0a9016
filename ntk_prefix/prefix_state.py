r"""A prefix of any length as a state of constant size.

The state is the ``z`` and ``k`` of :func:`ntk_prefix.attention.ntk_attention`.

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
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.attention import LowRank, ntk_attention, prefix_attention
from ntk_prefix.checks import (
    check_array,
    check_attention,
    check_count,
    check_finite,
    check_flag,
    check_scale,
    check_soft_cap,
    check_window,
    expected,
)
from ntk_prefix.equality import EqualByValue
from ntk_prefix.feature_maps import Anchors, Elu1, FeatureMap
from ntk_prefix.feature_maps import feature_map as resolve_feature_map
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.prefix_fit import FitOptions, FitReport, Samples, fit_anchors, fit_prefix
from ntk_prefix.query_shares import rows_of
from ntk_prefix.sharding import varying
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["FitOptions", "FitReport", "PrefixState", "Samples"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PrefixState(EqualByValue):
    """What stands in for a prefix in one attention layer; a pytree whose leaves are ``z``, ``k`` and the map's arrays.

    States of several layers may be stacked, and mapped over.

    Args:
        z: [N, R, H], or a :class:`~ntk_prefix.attention.LowRank` pair; [K, R, H] if the query heads of a group share it.
        k: [N, R], or [K, R].
        feature_map: the map that z and k were made with, and that queries must be given; a name or a map.
        scale: that of the layer's scores; 1/sqrt(H) if None.
    """

    z: Float[Array, "*layers J R H"] | LowRank
    k: Float[Array, "*layers J R"]
    feature_map: FeatureMap = dataclasses.field(default=Elu1())
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        """Take a map by its name; what ``jax.tree`` puts there is left as it is."""
        if isinstance(self.feature_map, str):
            object.__setattr__(self, "feature_map", resolve_feature_map(self.feature_map))

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

        Raises:
            ValueError: shapes that do not fit together, heads that are no multiple of K, a scale that is not > 0.

        Numerics: blocks are added with compensation (Kahan), so the error does not grow with M.

        Source: arXiv 2406.14036, equations for Z and k (code).
        """
        phi = resolve_feature_map(feature_map)
        _check_heads(_check_prefix(prefix_key, prefix_value), num_heads)
        check_count("block", block)
        sums = _sums(phi, prefix_key, prefix_value, scale, block)
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
            ValueError: there is no block, or one that is no pair, or of another shape than the first.
        """
        if not isinstance(blocks, Iterable):
            raise expected("blocks", "pairs (prefix_key, prefix_value), one after the other", type(blocks).__name__)
        phi = resolve_feature_map(feature_map)
        add = jax.jit(_add_block, static_argnums=1)
        sums = None
        for block in blocks:
            key, value = _pair(block)
            if sums is None:
                _check_heads(_check_prefix(key, value), num_heads)
                phi.check(*key.shape[1:])
                sums, shape = _zero_sums(phi, key), key.shape[1:]
            check_array("prefix_key of a block", key, "M", *shape)
            check_array("prefix_value of a block", value, *key.shape)
            sums = add(phi, _root(scale, key.shape[-1]), sums, key, value)
        if sums is None:
            raise expected("blocks", "at least one block", "none", "For M = 0 use from_prefix")
        return cls._of_sums(sums, phi, num_heads, scale)

    @classmethod
    def fit(
        cls,
        query: Float[Array, "B T N H"],
        prefix_key: Float[Array, "M K H"],
        prefix_value: Float[Array, "M K H"],
        key: Float[Array, "B S K H"] | None = None,
        value: Float[Array, "B S K H"] | None = None,
        *,
        feature_map: str | FeatureMap = "elu1",
        features: int | None = None,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        held_out: float = 0.25,
        iterations: int = 200,
        starts: int = 1,
        seed: int = 0,
    ) -> PrefixState:
        """Return the state fitted by :meth:`fit_with_report`; the held-out error is logged at level INFO."""
        return cls.fit_with_report(
            query,
            prefix_key,
            prefix_value,
            key,
            value,
            feature_map=feature_map,
            features=features,
            bias=bias,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            local_window_size=local_window_size,
            held_out=held_out,
            iterations=iterations,
            starts=starts,
            seed=seed,
        )[0]

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
        features: int | None = None,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        held_out: float = 0.25,
        iterations: int = 200,
        starts: int = 1,
        seed: int = 0,
    ) -> tuple[PrefixState, FitReport]:
        """Return the state whose attention is closest to that of the exact prefix, in least squares, and how close.

        What is minimized, and how, is told in :mod:`ntk_prefix.prefix_fit`.

        Args:
            query: [B, T, N, H], sample queries, not scaled.
            prefix_key, prefix_value: [M, K, H], M >= 1.
            key, value: [B, S, K, H], the keys that the queries see beside the prefix; None fits attention
                over the prefix alone. With them, the state is made good where the prefix matters, so give
                them if there are any.
            feature_map: a name or a map. With negative features (Taylor), k is only fitted to
                the masses, without a constraint. "anchors" takes keys of the prefix and moves them
                (:mod:`ntk_prefix.anchor_fit`): by far the closest at equal numbers. The state is then shared by the
                query heads of a group, z [K, R, H], and ``iterations`` are steps of the descent, 1 of ``starts``.
            features: R, of "anchors" alone, which has 32 if None.
            bias, mask, is_causal, scale, logits_soft_cap, local_window_size: of the layer, as in
                :func:`ntk_prefix.attention.ntk_attention`.
            held_out, iterations, starts, seed: as in :class:`~ntk_prefix.prefix_fit.FitOptions`.

        Returns:
            The state, and a :class:`~ntk_prefix.prefix_fit.FitReport`.

        Raises:
            ValueError: shapes that do not fit together, numbers that are not finite (a bias of -inf hides a key), too few
                samples for the features to be determined, no start, masses of too different sizes, or a state that the
                dtype cannot hold.

        Numerics: on the host in float64; masses relative to their median, so only their ratios must be
            moderate, below e^300: products of two stay finite.
        """
        anchors = feature_map == "anchors"
        phi = Elu1() if anchors else resolve_feature_map(feature_map)
        if features is not None and not anchors:
            raise expected("features", 'None for any map but "anchors"', features, "Give the map its own options")
        if anchors and starts != 1:
            raise expected("starts", '1 with "anchors"', starts)
        options = FitOptions(held_out=held_out, iterations=iterations, starts=starts, seed=seed)
        _check_both(key, value)
        check_array("query", query, "B", "T", "N", "H")
        heads, head_dim = query.shape[2:]
        if query.shape[0] * query.shape[1] < 2:
            raise expected("query", "at least two samples [B, T, N, H]", query.shape, "One of them is held out")
        prefix_heads = _check_prefix(prefix_key, prefix_value, head_dim)
        if prefix_key.shape[0] == 0:
            raise expected("prefix_key", "at least one token [M, K, H]", prefix_key.shape)
        _check_heads(prefix_heads, heads)
        check_scale(scale, head_dim)
        cap, _ = check_soft_cap(logits_soft_cap), check_window(local_window_size)
        check_flag("is_causal", is_causal)
        if key is None and (bias is not None or mask is not None):
            raise expected("bias and mask are about the keys", "key and value beside them", "neither")
        if key is not None and value is not None:
            check_attention(query, key, value, bias, mask, scale)
            check_array("key", key, query.shape[0], "S", prefix_heads, head_dim)
        arrays = {"query": query, "prefix_key": prefix_key, "prefix_value": prefix_value, "key": key, "value": value}
        for name, array in arrays.items():
            check_finite(name, array)
        if bias is not None:
            check_finite("bias", jnp.where(bias == -jnp.inf, 0, bias))  # which hides a key
        layer: dict[str, Any] = {
            "bias": bias,
            "mask": mask,
            "is_causal": is_causal,
            "scale": scale,
            "logits_soft_cap": logits_soft_cap,
            "local_window_size": local_window_size,
        }
        if anchors:
            rows = rows_of(query, prefix_key, prefix_value, key, value, **layer)
            keys, values = (jnp.swapaxes(x, 0, 1).astype(rows.query.dtype) for x in (prefix_key, prefix_value))
            shape = (query.shape[0], query.shape[1], heads)
            wanted = 32 if features is None else features
            points, own_z, own_k, report = fit_anchors(
                rows, keys * _root(scale, head_dim), values, wanted, shape, options, cap
            )
            return cls(own_z, own_k, Anchors(points, cap), scale).padded(wanted), report
        (raw_z, raw_k), _ = _sums(phi, prefix_key, prefix_value, scale)
        sums = _by_head(raw_z, heads), _by_head(raw_k, heads)
        samples = Samples.of(
            query,
            prefix_key,
            prefix_value,
            key,
            value,
            feature_map=phi,
            **layer,
        )
        z, k, report = fit_prefix(samples, options, positive=phi.positive, raw=sums, alone=key is None)
        dtype = accumulation_dtype(prefix_key.dtype)
        largest = np.maximum(np.abs(z).max((1, 2)), np.abs(k).max(1))
        if beyond := [head for head, size in enumerate(largest) if not size <= jnp.finfo(dtype).max]:
            raise expected(
                "prefix_key, prefix_value",
                f"a prefix whose state fits into {jnp.dtype(dtype).name}",
                f"one of size e^{np.log(largest.max()):.0f} in heads {beyond}",
                "It is as large as the keys' mass e^lse: leave these heads without a prefix, or fit in float64",
            )
        return cls(jnp.asarray(z, dtype), jnp.asarray(k, dtype), phi, scale), report

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

    def padded(self, features: int) -> PrefixState:
        """Return the same state with features of no account up to so many: states of one size are one program.

        Raises:
            UsageError: fewer features than there are, or a map that has no more of no account.
        """
        check_count("features", features)
        more = features - self.k.shape[-1]
        if more < 0:
            raise expected("features", f"at least the state's {self.k.shape[-1]}", features)
        if not more:
            return self

        def wider(x: Array, axis: int) -> Array:
            widths = [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)]
            # on the host where it is known: each size would be a program
            return jnp.pad(x, widths) if isinstance(x, jax.core.Tracer) else jnp.asarray(np.pad(np.asarray(x), widths))

        z = self.z._replace(left=wider(self.z.left, -2)) if isinstance(self.z, LowRank) else wider(self.z, -2)
        return PrefixState(z, wider(self.k, -1), self.feature_map.padded(features), self.scale)

    def error(
        self,
        query: Float[Array, "B T N H"],
        prefix_key: Float[Array, "M K H"],
        prefix_value: Float[Array, "M K H"],
        key: Float[Array, "B S K H"] | None = None,
        value: Float[Array, "B S K H"] | None = None,
        **options: Any,
    ) -> Float[Array, "N"]:
        """Return per head ``|T - T_exact| / |T_exact|`` over queries, against the exact prefix; 0 where both are the same.

        Args:
            query, prefix_key, prefix_value, key, value: as in :meth:`fit_with_report`; without keys the
                queries see the prefix alone.
            options: bias, mask, is_causal, logits_soft_cap, local_window_size, implementation, as in
                :func:`~ntk_prefix.attention.ntk_attention`.

        Raises:
            ValueError: shapes that do not fit together, a key without a value.

        Numerics: NaN where an output is, so that a state with NaN does not pass for a good one.
        """
        _check_both(key, value)
        check_array("query", query, "B", "T", "N", "H")
        _check_prefix(prefix_key, prefix_value, query.shape[3])
        if key is None or value is None:
            key = value = jnp.zeros((query.shape[0], 0, *prefix_key.shape[1:]), query.dtype)
        exact = prefix_attention(query, key, value, prefix_key, prefix_value, scale=self.scale, **options)
        dtype = accumulation_dtype(query.dtype)
        exact, ours = (x.astype(dtype) for x in (exact, self.attend(query, key, value, **options)))
        # in units of the largest entry: squares of any finite numbers are finite then
        unit = jnp.max(jnp.abs(exact), axis=(0, 1, 3), keepdims=True, initial=jnp.finfo(dtype).tiny)
        distance, size = (jnp.sum((x / unit) ** 2, axis=(0, 1, 3)) for x in (ours - exact, exact))
        return jnp.sqrt(jnp.where(distance == 0, 0, distance / size))

    @classmethod
    def _of_sums(cls, sums: Any, phi: FeatureMap, num_heads: int | None, scale: float | None) -> PrefixState:
        (z, k), _ = sums
        check_finite("the sums over the prefix", (z, k))
        heads = z.shape[0] if num_heads is None else num_heads
        repeats = heads // z.shape[0]
        return cls(jnp.repeat(z, repeats, axis=0), jnp.repeat(k, repeats, axis=0), phi, scale)


# ----------------------------------------------------------------------------------------- the sums


def _root(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.25 if scale is None else math.sqrt(check_scale(scale, head_dim))


def _pair(block: Any) -> tuple[Array, Array]:
    """Return a block's keys and values."""
    try:
        key, value = map(jnp.asarray, block)
    except (TypeError, ValueError):
        wanted = "pairs (prefix_key, prefix_value), each [any length, K, H]"
        raise expected("blocks", wanted, f"another {type(block).__name__}") from None
    return key, value


def _check_both(key: object, value: object) -> None:
    if (key is None) != (value is None):
        raise expected("key, value", "both, or neither", "one of them")


def _check_heads(key_heads: int, num_heads: int | None) -> None:
    if num_heads is None:
        return
    check_count("num_heads", num_heads)
    if num_heads % key_heads:
        raise expected("num_heads", f"a multiple of the {key_heads} key heads", num_heads)


def _check_prefix(key: Array, value: Array, head_dim: int | str = "H") -> int:
    """Raise unless a prefix is [M, K, H] twice, in floating point; return K."""
    check_array("prefix_key", key, "M", "K", head_dim)
    check_array("prefix_value", value, *key.shape)
    if 0 in key.shape[1:]:
        raise expected("prefix_key", "[M, K, H] with K, H >= 1", key.shape)
    return key.shape[1]


def _sums(phi: FeatureMap, prefix_key: Array, prefix_value: Array, scale: float | None, block: int = 4096) -> Any:
    """Return the sums over a prefix, as they are, and what rounding has lost of them."""
    phi.check(*prefix_key.shape[1:])
    add = functools.partial(_add_block, phi, _root(scale, prefix_key.shape[-1]))
    sums = _zero_sums(phi, prefix_key)
    block = min(block, max(prefix_key.shape[0], 1))
    whole = prefix_key.shape[0] // block * block

    def step(sums: Any, start: Array) -> tuple[Any, None]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        return add(sums, cut(prefix_key), cut(prefix_value)), None

    if whole:
        sums, _ = jax.lax.scan(step, varying(sums, prefix_key, prefix_value, phi), jnp.arange(0, whole, block))
    if whole < prefix_key.shape[0]:
        sums = add(sums, prefix_key[whole:], prefix_value[whole:])
    return sums


def _by_head(sums: Array, heads: int) -> np.ndarray:
    """Return sums for each query head; NaN, for they are only reported, where those of anchors are beyond any float."""
    wide = np.repeat(np.asarray(sums, np.float64), heads // len(sums), axis=0)
    return wide if np.isfinite(wide).all() else np.full_like(wide, np.nan)


def _zero_sums(phi: FeatureMap, key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return (sums, what rounding has lost of them)."""
    heads, head_dim = key.shape[1:]
    features, dtype = phi.affordable_dim(head_dim), accumulation_dtype(key.dtype)
    zero = jnp.zeros((heads, features, head_dim), dtype), jnp.zeros((heads, features), dtype)
    return zero, zero


def _add_block(phi: FeatureMap, root: float, sums: Any, key: Array, value: Array) -> Any:
    dtype = accumulation_dtype(key.dtype)
    features = jnp.swapaxes(phi(jnp.swapaxes(key.astype(dtype) * root, 0, 1)), 0, 1)
    block = jnp.einsum("mnr,mnh->nrh", features, value.astype(dtype)), jnp.sum(features, axis=0)

    def add(total: Array, lost: Array, x: Array) -> tuple[Array, Array]:
        x = x - lost
        new = total + x
        return new, (new - total) - x

    pairs = [add(*triple) for triple in zip(*sums, block, strict=True)]
    return tuple(zip(*pairs, strict=True))
