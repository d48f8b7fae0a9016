r"""Attention with an infinitely long prefix: NTK-Attention, and the exact prefix attention it stands for.

A prefix enters softmax attention only through a numerator and a mass per query,

.. math::  T = \frac{A V + N}{A 1 + E}, \qquad A = e^{scores}, \quad N = \phi(q) Z, \quad E = \phi(q) \cdot k

(or, exactly, :math:`N = \sum_j e^{q \cdot p_j} v_j` and :math:`E = \sum_j e^{q \cdot p_j}`). So no attention
kernel of our own is needed. Forward: any flash attention returns ``o`` and ``lse`` (as two numbers: a
maximum and a log); with ``L = logaddexp(lse, log E)``,

.. math::  T = e^{lse - L} o + e^{-L} N .

Backward: with ``P = exp(scores - L)`` (its rows sum to less than 1),

.. math::
    dV = P^T dT, \quad dS = P \circ (dT V^T - rowsum(dT \circ T)), \quad dN = e^{-L} dT, \quad
    dE = -e^{-L} rowsum(dT \circ T),

and the first two are what the *ordinary* flash backward computes when it is handed ``T`` and ``L`` as its
output and log-sum-exp. Merging outside, on the ``lse`` that
``jax.nn.dot_product_attention(return_residual=True)`` returns, gives the same loss and wrong gradients for q
and k, because that ``lse`` is under ``stop_gradient``.

Nothing is added to the keys: no virtual tokens, no cache entries, no shift of positions, no change of masks.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_prefix.checks import (
    FARTHEST,
    UsageError,
    check_attention,
    check_flag,
    check_floating,
    check_offset,
    check_prefix,
    check_soft_cap,
    check_window,
    expected,
)
from ntk_prefix.feature_maps import FeatureMap
from ntk_prefix.feature_maps import feature_map as resolve_feature_map
from ntk_prefix.flash import BACKENDS, Flash, Source, reference
from ntk_prefix.flash.base import problem
from ntk_prefix.flash.merging import Linear, attend, attend_with_lse, merge_attention, relative, relative_clipped
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import by_compiler
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = [
    "IMPLEMENTATIONS",
    "LowRank",
    "attention_with_lse",
    "merge_attention",
    "ntk_attention",
    "prefix_attention",
    "softmax_attention",
]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", *BACKENDS)


class LowRank(NamedTuple):
    """``Z = left @ right`` of rank s: ``R s + s H`` numbers per head in the place of ``R H``.

    Source: derived; it answers the complaint that ``R H + R`` numbers are more than a short prefix has.
    """

    left: Float[Array, "J R rank"]
    right: Float[Array, "J rank H"]


@by_compiler(4)
def ntk_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    z: Float[Array, "J R H"] | LowRank,
    k: Float[Array, "J R"],
    *,
    feature_map: str | FeatureMap = "elu1",
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    mass: str = "absolute",
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Softmax attention in which a prefix of any length is summed up in ``z`` and ``k``.

    ``T = (A V + phi(q) Z) / (A 1 + phi(q) . k)`` with ``A = exp(cap(scale q . k') + bias)``, masked, where
    ``cap(x) = logits_soft_cap * tanh(x / logits_soft_cap)``, or x; ``phi`` is applied to ``q * sqrt(scale)``, which is
    ``q / H**0.25`` by default.

    With ``mass="relative"``, z and k are in units of each query's own mass ``A 1``, so that with ``o`` the
    attention without a prefix ``T = (o + phi(q) Z) / (1 + phi(q) . k)``. A prefix made of real tokens is
    absolute; for training, relative keeps the factor ``e^{-lse}``, which spans many orders between heads, out
    of the gradient.

    ``z = 0, k = 0`` is attention without a prefix, bit for bit, and has a gradient there for both; so start
    there and keep k >= 0 by projection (``optax.projections.projection_non_negative``) rather than through
    ``abs`` or ``exp``.

    Args:
        query: [B, T, N, H], not scaled: 1/sqrt(H) is applied here.
        key, value: [B, S, K, H] with N a multiple of K; query head n meets key head n // (N // K).
        z: [N, R, H], the prefix's values summed with features, or a :class:`LowRank` pair. A state may be shared by the
            query heads of a group: with J heads, a divisor of N such as K, query head n has the state n // (N // J).
        k: [N, R] or [J, R], the prefix's features summed; it stands in the denominator.
        feature_map: a name known to :func:`ntk_prefix.feature_maps.feature_map`, or a map; the arrays of one that owns some
            have their gradients, where its definition has one.
        bias: added to the scaled scores, as in ``jax.nn``; every axis may be 1.
        mask: True where a query may see a key; it concerns the keys only, the prefix is always seen.
        is_causal: query t sees keys s <= t + ``query_offset``, both counted from 0, as in ``jax.nn``.
        query_offset: where in the keys the first query stands, a whole number or an array of one, beside ``is_causal`` or a
            window; with a cache, so many keys are older than this call's, and slots out of sight are not looked at.
        scale: > 0, of scores and of feature maps alike; 1/sqrt(H) if None.
        logits_soft_cap: > 0, what scores stay below, in front of bias and mask, so that an additive mask stays one
            (Gemma 2, flash-attn; tokamax caps the sum with the bias). What ``phi(q) . k`` makes is not a score.
        local_window_size: (left, right), or one number for both: query t sees keys ``t - left <= s <= t + right``, t
            counted from ``query_offset``, as in ``jax.nn``; with ``is_causal`` right is 0. The prefix is always seen.
        mass: "absolute" (the paper's) or "relative"; what the numbers in z and k are units of.
        implementation: "reference" (T x S arrays, plain autodiff), "xla" (blockwise), "cudnn" (CUDA), "splash" (TPU), or
            None: the first of :data:`~ntk_prefix.flash.BACKENDS` that can run, xla if no other; the reason is logged at
            level INFO.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit together, or the named implementation cannot take them.

    Numerics: scores, softmax, features and sums are in float32 (float64 for float64 inputs); as factors of a product
    with bfloat16 values, a GPU's and a TPU's probabilities are rounded to bfloat16. The two parts are weighed in log
    space, so scores of any finite size are safe, those of rows masked by a large negative bias included; and a state
    of any finite size, since one beyond the root of the largest float is summed in units of it. ``phi(q) . k`` below
    zero, which k >= 0 rules out for a positive map, counts as zero (and then has no gradient). A row that sees
    neither a key nor prefix mass is 0, with gradient 0. The weight ``e^{-L}`` of ``phi(q) Z`` is capped at the
    largest float over ``e^20``, which matters only where own keys and prefix together have a mass below ``e^-68`` in
    float32 (``e^-689`` in float64); there gradients of ``phi(q) Z`` and ``phi(q) . k``, up to ``e^{-2 L}``, are
    capped at the same number ("reference" is plain autodiff, and overflows).

    Differentiation: reverse mode everywhere; forward mode on top of it (``jax.jvp`` of ``jax.grad``) for "reference" and
    "xla".  Forward mode alone is for "reference"; elsewhere JAX raises its TypeError about ``custom_vjp``.

    Source: the operator and elu1 are arXiv 2406.14036 (its public code); the stable form and the backward are derived.
    """
    definition, own = _described(
        query, key, value, bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size
    )
    linear = _linear(query, z, k, resolve_feature_map(feature_map), definition.scale)
    flashes = _choose(implementation, definition, query, own)
    if mass == "relative":
        # in the layout of scores, where both parts are computed: one copy at the end instead of one for each
        own_output = _softmax(definition, flashes, query, own).transpose(0, 2, 1, 3).astype(linear.mass.dtype)
        merge = relative if flashes is None or linear.row_log_unit is None else relative_clipped
        return merge(own_output, linear).transpose(0, 2, 1, 3).astype(query.dtype)
    if mass != "absolute":
        raise expected("mass", '"absolute" or "relative"', repr(mass))
    if flashes is None:
        return reference.attend(reference.scores(definition, query, own), value, linear)[0].astype(query.dtype)
    return attend(flashes, query, (own,), linear)


@by_compiler(4)
def prefix_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    prefix_key: Float[Array, "M K H"] | Float[Array, "B M K H"],
    prefix_value: Float[Array, "M K H"] | Float[Array, "B M K H"],
    *,
    prefix_bias: Float[Array, "#B #N #T #M"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Exact attention over a prefix and the keys: ``softmax(scale q [P; K']^T + [prefix_bias; bias]) [P_V; V]``.

    Every query sees the whole prefix, whatever ``mask``, ``is_causal`` and ``local_window_size`` say about the keys; a soft
    cap is for the prefix's scores too, in front of ``prefix_bias``.
    Prefix and keys are two flash passes, merged as in :func:`ntk_attention`; a prefix [M, K, H] shared by the
    batch is never repeated.

    Args:
        query: [B, T, N, H], not scaled: 1/sqrt(H) is applied here.
        key, value: [B, S, K, H] with N a multiple of K.
        prefix_key, prefix_value: [M, K, H] for all, or [B, M, K, H]; M = 0 is attention without a prefix, bit
            for bit.
        prefix_bias: added to the scaled scores of the prefix, and trained if need be; every axis may be 1. One number for
            a token is the log of how many of its kind it stands for.
        bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size, implementation: as in
            :func:`ntk_attention`.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit together, or the named implementation cannot take them.

    Numerics: time and memory as attention over M + S keys; no T x M array, except for "reference".

    Source: arXiv 2406.14036, section on prefix attention; the merge of the two passes is derived.
    """
    definition, own = _described(
        query, key, value, bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size
    )
    check_prefix(query, key, prefix_key, prefix_value, prefix_bias)
    if prefix_bias is not None and prefix_key.ndim == 3 and (prefix_bias.shape[0] > 1 or prefix_bias.shape[2] > 1):
        shape = query.shape[0], *prefix_key.shape  # a shared prefix is one row of all queries: its bias is one for all
        prefix_key, prefix_value = jnp.broadcast_to(prefix_key, shape), jnp.broadcast_to(prefix_value, shape)
    prefix = Source(prefix_key, prefix_value, prefix_bias)
    sources = (own, prefix) if prefix_key.shape[-3] else (own,)
    flashes = _choose(implementation, definition, query, *sources)
    if flashes is None:
        shape = (query.shape[0], *prefix_key.shape[-3:])
        prefix = prefix._replace(key=jnp.broadcast_to(prefix_key, shape), value=jnp.broadcast_to(prefix_value, shape))
        scores = reference.scores(definition.everywhere(), query, prefix), reference.scores(definition, query, own)
        both = jnp.concatenate(scores, axis=-1)
        return reference.attend(both, jnp.concatenate([prefix.value, value], axis=1))[0].astype(query.dtype)
    return attend(flashes, query, sources)


@by_compiler(4)
def softmax_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention without a prefix: what :func:`ntk_attention` is at ``z = 0, k = 0``, bit for bit.

    Arguments, result and errors are those of :func:`ntk_attention`.
    """
    definition, own = _described(
        query, key, value, bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size
    )
    flashes = _choose(implementation, definition, query, own)
    return _softmax(definition, flashes, query, own)


@by_compiler(4, 3)
def attention_with_lse(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return :func:`softmax_attention` and the log-sum-exp of each row's scores, differentiable through both.

    With it attention over keys in several places (a cache and this call's, pages, devices) is attention over each, merged:
    :func:`merge_attention`. ``jax.nn.dot_product_attention(return_residual=True)`` returns the same number under
    ``stop_gradient``, so whatever is merged on it has wrong gradients for queries and keys.

    Args:
        query, key, value, bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size, implementation:
            as in :func:`ntk_attention`.

    Returns:
        The output, [B, T, N, H] in the dtype of ``query``, and ``lse = logsumexp(cap(scale q . k) + bias)``, [B, T, N] in
        float32 (float64 for float64 inputs); -inf, with output and gradients 0, for a row that sees no key.

    Raises:
        ValueError: shapes do not fit together, or the named implementation cannot take them.

    Numerics: the lse is one number, so in a row whose largest score is beyond 1e7 (float32), as one masked by a bias of
        -1e9 is, it no longer counts the keys. Where that matters, mask, or merge inside of :func:`prefix_attention`.

    Source: derived: ``dS = P * (dO V^T - rowsum(dO * O) + d_lse)``, the flash backward with one more term.
    """
    definition, own = _described(
        query, key, value, bias, mask, is_causal, query_offset, scale, logits_soft_cap, local_window_size
    )
    flashes = _choose(implementation, definition, query, own)
    if flashes is None:
        output, lse = reference.attend(reference.scores(definition, query, own), value)
        output = output.astype(query.dtype)
    else:
        output, lse = attend_with_lse(flashes, query, (own,))
    return output, lse.transpose(0, 2, 1)


# ------------------------------------------------------------------------------------------ the parts


def _softmax(
    definition: Flash, flashes: tuple[Flash, ...] | None, query: Array, own: Source
) -> Float[Array, "B T N H"]:
    """Return attention over keys alone."""
    if flashes is None:
        return reference.attend(reference.scores(definition, query, own), own.value)[0].astype(query.dtype)
    return attend(flashes, query, (own,))


def _linear(query: Array, z: Array | LowRank, k: Array, phi: FeatureMap, scale: float) -> Linear:
    """Return what a state says about the prefix: ``N = phi(q) Z`` and ``E = max(phi(q) . k, 0)``."""
    batch, length, heads, head_dim = query.shape
    features_dim = phi.dim(head_dim)
    _check_state(z, k, heads, features_dim, head_dim, phi)
    phi.check(heads, head_dim)
    dtype = accumulation_dtype(query.dtype)
    factors = [factor.astype(dtype) for factor in (z if isinstance(z, LowRank) else (z,))]
    unit = _unit((*factors, k), dtype)
    states, groups = len(k), heads // len(k)
    features, row_log_unit = phi.per_head(query.transpose(0, 2, 1, 3).astype(dtype) * math.sqrt(scale))
    # the queries of heads that share a state are rows of one product
    features = features.reshape(batch, states, groups * length, features_dim) / unit[None, :, None, None]
    numerator = features
    if length < head_dim:
        # a few rows are multiplied from the left, and their mass is one more column of the first product: XLA's CPU takes 15 us
        # for 8 x 9 queries (R = H = 64), 48 with the mass as a sum of its own, and a GPU launches one kernel less
        numerator = _times_few(numerator, jnp.concatenate([factors[0], k.astype(dtype)[..., None]], axis=-1), "highest")
        numerator, mass = numerator[..., :-1], numerator[..., -1]
        for factor in factors[1:]:
            numerator = _times_few(numerator, factor)
    else:
        # repeated for the rows of the batch a factor is no larger than they are, and they stay where they are
        for factor in factors:
            numerator = numerator @ jnp.broadcast_to(factor, (batch, *factor.shape))
        mass = jnp.sum(features * k.astype(dtype)[None, :, None], axis=-1)
    return Linear(
        numerator.reshape(batch, heads, length, head_dim),
        jnp.where(mass < 0, 0, mass).reshape(batch, heads, length),  # `maximum` would halve the gradient at k = 0
        jnp.repeat(unit, groups),
        row_log_unit,
    )


def _times_few(rows: Float[Array, "B J T R"], factor: Float[Array, "J R E"], precision: str | None = None) -> Array:
    """Return ``rows @ factor`` [B, J, T, E], computed as ``factor' rows'``."""
    return jnp.einsum("jre,bjtr->bjet", factor, rows, precision=precision).swapaxes(2, 3)


def _unit(arrays: tuple[Array, ...], dtype: jnp.dtype) -> Float[Array, "J"]:
    """Return 1, or a power of two for a head with an entry beyond the root of the largest float.

    Float32: entries from 2^64 to 2^128, in units of 2^96, are within 2^32 of 1, with room for sums and squares.
    """
    exponent = jnp.finfo(dtype).maxexp // 4
    largest = [jnp.max(jnp.abs(x.astype(dtype)), axis=tuple(range(1, x.ndim)), initial=0) for x in arrays]
    beyond = functools.reduce(jnp.maximum, largest) > 2.0 ** (2 * exponent)
    return jax.lax.stop_gradient(jnp.where(beyond, 2.0 ** (3 * exponent), 1).astype(dtype))


# ---------------------------------------------------------------------------------------- arguments


def _described(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    query_offset: int | Array,
    scale: float | None,
    logits_soft_cap: float | None,
    local_window_size: int | tuple[int, int] | None,
) -> tuple[Flash, Source]:
    """Return what is static about attention over these keys, by the definition, and the keys: checked."""
    scale = check_attention(query, key, value, bias, mask, scale)
    soft_cap, (left, right) = check_soft_cap(logits_soft_cap), check_window(local_window_size)
    known = check_offset(query_offset, needed=is_causal or local_window_size is not None)
    check_flag("is_causal", is_causal)
    static, dynamic = (int(query_offset), None) if known else (0, _place(jnp.asarray(query_offset)))
    is_causal = bool(is_causal) or right == 0
    flash = Flash("reference", scale, is_causal, static, (left, None if is_causal else right), soft_cap)
    return flash, Source(key, value, bias, mask, dynamic)


def _place(offset: Array) -> Int[Array, ""]:
    """Return an offset that is known at run time in int32; one beyond every sequence stays so, and does not wrap around."""
    limits = jnp.iinfo(offset.dtype)
    offset = jnp.minimum(offset, FARTHEST) if limits.max > FARTHEST else offset
    offset = jnp.maximum(offset, -FARTHEST) if limits.min < -FARTHEST else offset
    return offset.astype(jnp.int32)


def _choose(implementation: str | None, definition: Flash, query: Array, *sources: Source) -> tuple[Flash, ...] | None:
    """Return what runs: for each source a flash of the implementation asked for, or of the first that can; None: reference.

    All sources but the first are prefixes, which every query sees.
    """
    if implementation == "reference":
        return None
    if implementation is not None and (not isinstance(implementation, str) or implementation not in BACKENDS):
        raise expected("implementation", f"one of {IMPLEMENTATIONS}, or None", repr(implementation))

    def of(name: str) -> tuple[Flash, ...]:
        own = dataclasses.replace(definition, implementation=name)
        return own, *[own.everywhere() for _ in sources[1:]]

    if implementation is not None:
        flashes = of(implementation)
        # what is traced may be for another platform
        elsewhere = None if isinstance(query, jax.core.Tracer) else BACKENDS[implementation].elsewhere()
        if why := problem(flashes, query, sources) or elsewhere:
            raise UsageError(f"implementation={implementation!r}: {why}. Take another, or None for the best that can.")
        return flashes
    problems: list[str] = []
    for name, backend in BACKENDS.items():
        flashes = of(name)
        if why := problem(flashes, query, sources) or backend.not_chosen(query):
            problems.append(f"{name}: {why}")
            continue
        logger.info("attention runs on %s", ": ".join([name, "; ".join(problems)]) if problems else name)
        return flashes
    raise AssertionError("xla takes everything")


def _check_state(z: Array | LowRank, k: Array, heads: int, features: int, head_dim: int, phi: FeatureMap) -> None:
    """Raise unless z and k are those of so many heads, or of a divisor of them, and features, in floating point."""
    factors = z if isinstance(z, LowRank) else (z,)
    names = ("z.left", "z.right") if isinstance(z, LowRank) else ("z",)
    for name, x in zip(("k", *names), (k, *factors), strict=True):
        check_floating(name, x)
    shapes = tuple(x.shape for x in factors)
    rank = shapes[0][-1] if isinstance(z, LowRank) and shapes[0] else head_dim
    states = k.shape[0] if k.ndim == 2 and k.shape[0] and heads % k.shape[0] == 0 else heads
    wanted = ((states, features, rank), (states, rank, head_dim))[: len(shapes)]
    if k.shape != (states, features) or shapes != wanted:
        got = f"left {shapes[0]}, right {shapes[1]}" if isinstance(z, LowRank) else f"{shapes[0]}"
        raise expected(
            "state",
            f"k {(heads, features)} and z {(heads, features, head_dim)}, or factors of such a z, for {heads} query heads and "
            f"{phi}; a state that heads share has a divisor of {heads} in the place of {heads}",
            f"k {k.shape} and z {got}",
            "Use the map and the heads that it was made with",
        )
