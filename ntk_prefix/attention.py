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

import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import UsageError, check_attention, check_floating, check_prefix
from ntk_prefix.feature_maps import FeatureMap
from ntk_prefix.feature_maps import feature_map as resolve_feature_map
from ntk_prefix.flash import Flash, Statistics, cudnn_problem
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["IMPLEMENTATIONS", "LowRank", "ntk_attention", "prefix_attention", "softmax_attention"]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "xla", "cudnn")


class LowRank(NamedTuple):
    """``Z = left @ right`` of rank s: ``R s + s H`` numbers per head in the place of ``R H``.

    Source: derived; it answers the complaint that ``R H + R`` numbers are more than a short prefix has.
    """

    left: Float[Array, "N R rank"]
    right: Float[Array, "N rank H"]


def ntk_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    z: Float[Array, "N R H"] | LowRank,
    k: Float[Array, "N R"],
    *,
    feature_map: str | FeatureMap = "elu1",
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mass: str = "absolute",
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Softmax attention in which a prefix of any length is summed up in ``z`` and ``k``.

    ``T = (A V + phi(q) Z) / (A 1 + phi(q) . k)`` with ``A = exp(scale q . k' + bias)``, masked; ``phi`` is
    applied to ``q * sqrt(scale)``, which is ``q / H**0.25`` by default.

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
        z: [N, R, H], the prefix's values summed with features, or a :class:`LowRank` pair.
        k: [N, R], the prefix's features summed; it stands in the denominator.
        feature_map: a name known to :func:`ntk_prefix.feature_maps.feature_map`, or a map.
        bias: added to the scaled scores, as in ``jax.nn``; every axis may be 1.
        mask: True where a query may see a key; it concerns the keys only, the prefix is always seen.
        is_causal: query t sees keys s <= t, both counted from 0, as in ``jax.nn``.
        scale: > 0, of scores and of feature maps alike; 1/sqrt(H) if None.
        mass: "absolute" (the paper's) or "relative"; what the numbers in z and k are units of.
        implementation: "reference" (T x S arrays, plain autodiff), "xla" (blockwise), "cudnn" (CUDA), or
            None: cuDNN where it can run, else xla; the reason for the choice is logged at level INFO.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit together, or the named implementation cannot take them.

    Numerics: scores, softmax, features and sums are in float32 (float64 for float64 inputs). The two parts
    are weighed in log space, so scores of any finite size are safe, those of rows masked by a large negative
    bias included; and a state of any finite size, since one beyond the root of the largest float is summed in
    units of it. ``phi(q) . k`` below zero, which k >= 0 rules out for a positive map, counts as zero (and then
    has no gradient). A row that sees neither a key nor prefix mass is 0, with gradient 0. The weight
    ``e^{-L}`` of ``phi(q) Z`` is capped at the largest float over ``e^20``, which matters only where own keys
    and prefix together have a mass below ``e^-68`` in float32 (``e^-689`` in float64); there gradients of
    ``phi(q) Z`` and ``phi(q) . k``, up to ``e^{-2 L}``, are capped at the same number ("reference" is plain
    autodiff, and overflows).

    Differentiation: reverse mode everywhere; forward mode on top of it (``jax.jvp`` of ``jax.grad``) for
    "reference" and "xla".  Forward mode alone is for "reference"; elsewhere JAX raises its TypeError about
    ``custom_vjp``.

    Source: the operator and elu1 are arXiv 2406.14036 (its public code); the stable form and the backward are
    derived.
    """
    scale = check_attention(query, key, value, bias, mask, scale)
    phi = resolve_feature_map(feature_map)
    linear = _linear(query, z, k, phi, scale)
    if mass == "relative":
        own_output = softmax_attention(
            query, key, value, bias=bias, mask=mask, is_causal=is_causal, scale=scale, implementation=implementation
        )
        # in the layout of scores, where both parts are computed: one copy at the end instead of one for each
        one = 1 / linear.unit[None, :, None]
        own_part = own_output.transpose(0, 2, 1, 3).astype(one.dtype) * one[..., None]
        total = (own_part + linear.numerator) / (one + linear.mass)[..., None]
        return total.transpose(0, 2, 1, 3).astype(query.dtype)
    if mass != "absolute":
        raise UsageError(f'expected mass "absolute" or "relative", got {mass!r}')
    implementation = _choose(implementation, query, key, bias, mask)
    if implementation == "reference":
        own = _scores(query, key, bias, mask, is_causal=is_causal, scale=scale)
        return _reference(own, value, linear).astype(query.dtype)
    flash = Flash(implementation, scale, is_causal)
    return _attend((flash,), query, (_Source(key, value, bias, mask),), linear)


def prefix_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    prefix_key: Float[Array, "M K H"] | Float[Array, "B M K H"],
    prefix_value: Float[Array, "M K H"] | Float[Array, "B M K H"],
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Exact attention over a prefix and the keys: ``softmax(scale q [P; K']^T) [P_V; V]``.

    Every query sees the whole prefix, whatever ``bias``, ``mask`` and ``is_causal`` say about the keys.
    Prefix and keys are two flash passes, merged as in :func:`ntk_attention`; a prefix [M, K, H] shared by the
    batch is never repeated.

    Args:
        query: [B, T, N, H], not scaled: 1/sqrt(H) is applied here.
        key, value: [B, S, K, H] with N a multiple of K.
        prefix_key, prefix_value: [M, K, H] for all, or [B, M, K, H]; M = 0 is attention without a prefix, bit
            for bit.
        bias, mask, is_causal, scale, implementation: as in :func:`ntk_attention`.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit together, or the named implementation cannot take them.

    Numerics: time and memory as attention over M + S keys; no T x M array, except for "reference".

    Source: arXiv 2406.14036, section on prefix attention; the merge of the two passes is derived.
    """
    scale = check_attention(query, key, value, bias, mask, scale)
    check_prefix(query, key, prefix_key, prefix_value)
    own = _Source(key, value, bias, mask)
    prefix = _Source(prefix_key, prefix_value, None, None)
    implementation = _choose(implementation, query, key, bias, mask)
    if implementation == "reference":
        shape = (query.shape[0], *prefix_key.shape[-3:])
        prefix_key, prefix_value = jnp.broadcast_to(prefix_key, shape), jnp.broadcast_to(prefix_value, shape)
        both = jnp.concatenate(
            [
                _scores(query, prefix_key, None, None, is_causal=False, scale=scale),
                _scores(query, key, bias, mask, is_causal=is_causal, scale=scale),
            ],
            axis=-1,
        )
        return _reference(both, jnp.concatenate([prefix_value, value], axis=1)).astype(query.dtype)
    flash = Flash(implementation, scale, is_causal)
    if prefix_key.shape[-3] == 0:
        return _attend((flash,), query, (own,), None)
    return _attend((flash, Flash(implementation, scale)), query, (own, prefix), None)


def softmax_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention without a prefix: what :func:`ntk_attention` is at ``z = 0, k = 0``, bit for bit.

    Arguments, result and errors are those of :func:`ntk_attention`.
    """
    scale = check_attention(query, key, value, bias, mask, scale)
    implementation = _choose(implementation, query, key, bias, mask)
    if implementation == "reference":
        own = _scores(query, key, bias, mask, is_causal=is_causal, scale=scale)
        return _reference(own, value).astype(query.dtype)
    return _attend((Flash(implementation, scale, is_causal),), query, (_Source(key, value, bias, mask),), None)


# ------------------------------------------------------------------------------- the one custom_vjp


class _Source(NamedTuple):
    """Keys that queries are compared with; a key and value without a batch axis are shared by the batch."""

    key: Array
    value: Array
    bias: Array | None
    mask: Array | None


class _Linear(NamedTuple):
    """What stands beside the softmax sums: a numerator and its mass >= 0, in the layout of scores.

    Both are in a head's ``unit``, 1 for all but states so large that their sums would overflow.
    """

    numerator: Float[Array, "B N T H"]
    mass: Float[Array, "B N T"]
    unit: Float[Array, "N"]

    @property
    def log_unit(self) -> Float[Array, "1 N 1"]:
        """Of every row, exactly 0 for a unit of 1."""
        return jnp.log(self.unit)[None, :, None]


def _linear(query: Array, z: Array | LowRank, k: Array, phi: FeatureMap, scale: float) -> _Linear:
    """Return what a state says about the prefix: ``N = phi(q) Z`` and ``E = max(phi(q) . k, 0)``."""
    batch, length, heads, head_dim = query.shape
    features_dim = phi.dim(head_dim)
    _check_state(z, k, heads, features_dim, head_dim, phi)
    factors = z if isinstance(z, LowRank) else (z,)
    dtype = accumulation_dtype(query.dtype)
    unit = _unit((*factors, k), dtype)
    features = phi(query.transpose(0, 2, 1, 3).astype(dtype) * math.sqrt(scale)) / unit[None, :, None, None]
    numerator = features
    for factor in factors:
        if length < factor.shape[2]:
            numerator = jnp.einsum("bntr,nrh->bnth", numerator, factor.astype(dtype))
        else:  # repeated for the rows of the batch it is no larger than they are, and they stay where they are
            numerator = numerator @ jnp.broadcast_to(factor.astype(dtype), (batch, *factor.shape))
    mass = jnp.sum(features * k.astype(dtype)[None, :, None], axis=-1)
    return _Linear(numerator, jnp.where(mass < 0, 0, mass), unit)  # `maximum` would halve the gradient at k = 0


def _unit(arrays: tuple[Array, ...], dtype: jnp.dtype) -> Float[Array, "N"]:
    """Return 1, or a power of two for a head with an entry beyond the root of the largest float.

    Float32: entries from 2^64 to 2^128, in units of 2^96, are within 2^32 of 1, with room for sums and squares.
    """
    exponent = jnp.finfo(dtype).maxexp // 4
    largest = [jnp.max(jnp.abs(x.astype(dtype)), axis=tuple(range(1, x.ndim)), initial=0) for x in arrays]
    beyond = functools.reduce(jnp.maximum, largest) > 2.0 ** (2 * exponent)
    return jax.lax.stop_gradient(jnp.where(beyond, 2.0 ** (3 * exponent), 1).astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_once(
    flashes: tuple[Flash, ...], query: Array, sources: tuple[_Source, ...], linear: _Linear | None
) -> Array:
    """Attention over all sources and the linear part at once: one softmax, one denominator."""
    return _attend_forward(flashes, query, sources, linear)[0]


def _attend_forward(
    flashes: tuple[Flash, ...], query: Array, sources: tuple[_Source, ...], linear: _Linear | None
) -> tuple[Array, Any]:
    parts = [_forward(flash, query, source) for flash, source in zip(flashes, sources, strict=True)]
    statistics = _merge(parts, linear)
    output = statistics.output
    if linear is not None and query.dtype == jnp.float16:  # where a capped weight still goes beyond 65504
        output = jnp.clip(output, jnp.finfo(jnp.float16).min, jnp.finfo(jnp.float16).max)
    statistics = statistics._replace(output=output.astype(query.dtype))
    unit = None if linear is None else linear.unit
    return statistics.output, (query, sources, statistics, unit)


def _attend_backward(flashes: tuple[Flash, ...], residuals: Any, d_output: Array) -> tuple[Any, ...]:
    query, sources, statistics, unit = residuals
    d_query = jnp.zeros(query.shape, accumulation_dtype(query.dtype))
    d_sources = []
    for flash, source in zip(flashes, sources, strict=True):
        d_part, d_source = _backward(flash, query, source, statistics, d_output)
        d_query = d_query + d_part
        d_sources.append(d_source)
    d_linear = None
    if unit is not None:
        weight = _linear_weight((statistics.maximum - jnp.log(unit)[None, :, None]) + statistics.log_sum)
        d_total = d_output.astype(weight.dtype)
        projection = jnp.sum(d_total * statistics.output.astype(weight.dtype), axis=-1)
        largest = math.exp(_largest_log(weight.dtype))
        d_numerator = jnp.clip(weight[..., None] * d_total.transpose(0, 2, 1, 3), -largest, largest)
        d_mass = jnp.clip(-weight * projection.transpose(0, 2, 1), -largest, largest)
        d_linear = _Linear(d_numerator, d_mass, jnp.zeros_like(unit))
    return d_query.astype(query.dtype), tuple(d_sources), d_linear


_attend_once.defvjp(_attend_forward, _attend_backward)
_attend = jax.jit(_attend_once, static_argnums=0)  # one program, also when called outside of jit


def _merge(parts: list[Statistics], linear: _Linear | None) -> Statistics:
    """Return output and log-mass of all parts together; a part of mass 0 leaves the others' bits alone."""
    dtype = parts[0].maximum.dtype
    largest = functools.reduce(jnp.maximum, [part.maximum for part in parts])
    if linear is not None:
        log_mass = jnp.log(jnp.where(linear.mass > 0, linear.mass, 1)) + linear.log_unit
        largest = jnp.maximum(largest, jnp.where(linear.mass > 0, log_mass, -jnp.inf))
    empty = largest == -jnp.inf
    largest = jnp.where(empty, jnp.inf, largest)  # every weight below becomes exp(-inf) = 0
    weights = [jnp.exp((part.maximum - largest) + part.log_sum) for part in parts]
    values = [part.output.astype(dtype) for part in parts]
    total = functools.reduce(jnp.add, weights)
    if linear is not None:
        weights.append(_linear_weight(largest - linear.log_unit))
        values.append(linear.numerator.transpose(0, 2, 1, 3))
        total = total + weights[-1] * linear.mass
    total = jnp.where(empty, 1, total)
    output = functools.reduce(
        jnp.add, [(w / total).transpose(0, 2, 1)[..., None] * v for w, v in zip(weights, values, strict=True)]
    )
    return Statistics(output, largest, jnp.log(total))


def _linear_weight(log_mass: Array) -> Array:
    """Return ``exp(-log_mass)``, capped with room for sums: the cap keeps 0 * infinity from happening."""
    return jnp.exp(jnp.minimum(-log_mass, _largest_log(log_mass.dtype)))


def _largest_log(dtype: jnp.dtype) -> float:
    return math.log(jnp.finfo(dtype).max) - 20


def _forward(flash: Flash, query: Array, source: _Source) -> Statistics:
    if source.key.ndim == 4:
        return flash.forward(query, source.key, source.value, source.bias, source.mask)
    output, *rows = flash.forward(_fold(query), source.key[None], source.value[None])
    batch, length, heads, _ = query.shape
    return Statistics(output.reshape(query.shape), *(x.reshape(heads, batch, length).transpose(1, 0, 2) for x in rows))


def _backward(
    flash: Flash, query: Array, source: _Source, statistics: Statistics, d_output: Array
) -> tuple[Array, _Source]:
    if source.key.ndim == 4:
        grads = flash.backward(query, source.key, source.value, source.bias, source.mask, statistics, d_output)
        return grads.query, _Source(grads.key, grads.value, grads.bias, None)
    output, *rows = statistics
    folded = Statistics(_fold(output), *(x.transpose(1, 0, 2).reshape(1, query.shape[2], -1) for x in rows))
    grads = flash.backward(_fold(query), source.key[None], source.value[None], None, None, folded, _fold(d_output))
    return grads.query.reshape(query.shape), _Source(grads.key[0], grads.value[0], None, None)


def _fold(x: Array) -> Array:
    """Make one long row of queries of a batch that shares its keys: [B, T, N, H] -> [1, B T, N, H]."""
    return x.reshape(1, -1, *x.shape[2:])


def _scores(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    *,
    is_causal: bool,
    scale: float,
) -> Float[Array, "B N T S"]:
    """Return all T x S scores at once, in the accumulation dtype: the definition."""
    dtype = accumulation_dtype(query.dtype)
    groups = query.shape[2] // max(key.shape[2], 1)
    keys = jnp.repeat(key, groups, axis=2).astype(dtype)
    result = scale * jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), keys)
    if bias is not None:
        result = result + bias.astype(dtype)
    if mask is not None:
        result = jnp.where(mask, result, -jnp.inf)
    if is_causal:
        keep = (np.tri(result.shape[2], result.shape[3]) > 0)[None, None]
        result = jnp.where(keep, result, -jnp.inf)
    return result


@jax.jit
def _reference(
    all_scores: Float[Array, "B N T S"], value: Float[Array, "B S K H"], linear: _Linear | None = None
) -> Float[Array, "B T N H"]:
    """Return the formula as it stands, ``(A V + N) / (A 1 + E)``, up to a common factor; plain autodiff."""
    dtype = all_scores.dtype
    values = jnp.repeat(value, all_scores.shape[1] // value.shape[2], axis=2).astype(dtype)
    largest = jnp.max(all_scores, axis=-1, initial=-jnp.inf)
    if linear is not None:
        largest = jnp.maximum(largest, jnp.log(linear.mass) + linear.log_unit)
    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, jnp.inf, largest))
    attention = jnp.exp(all_scores - largest[..., None])
    above = jnp.einsum("bnts,bsnh->bnth", attention, values)
    below = jnp.sum(attention, axis=-1)
    if linear is not None:
        weight = _linear_weight(largest - linear.log_unit)
        above = above + weight[..., None] * linear.numerator
        below = below + weight * linear.mass
    below = jnp.where(below == 0, 1, below)
    return (above / below[..., None]).transpose(0, 2, 1, 3)


# ---------------------------------------------------------------------------------------- arguments


def _choose(implementation: str | None, query: Array, key: Array, bias: Array | None, mask: Array | None) -> str:
    """Return the implementation to use: the one asked for, or cuDNN where it can run and xla elsewhere."""
    if implementation is None:
        problem = cudnn_problem(query, key, bias, mask)
        logger.info("attention runs on %s", "cudnn" if problem is None else f"xla: {problem}")
        return "cudnn" if problem is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(f"expected implementation among {IMPLEMENTATIONS} or None, got {implementation!r}")
    return implementation


def _check_state(z: Array | LowRank, k: Array, heads: int, features: int, head_dim: int, phi: FeatureMap) -> None:
    """Raise unless z and k are those of so many heads and features, in floating point."""
    factors = z if isinstance(z, LowRank) else (z,)
    shapes = tuple(x.shape for x in factors)
    rank = shapes[0][-1] if isinstance(z, LowRank) and shapes[0] else head_dim
    wanted = ((heads, features, rank), (heads, rank, head_dim))[: len(shapes)]
    if k.shape != (heads, features) or shapes != wanted:
        got = f"left {shapes[0]}, right {shapes[1]}" if isinstance(z, LowRank) else f"{shapes[0]}"
        raise UsageError(
            f"expected k {(heads, features)} and z {(heads, features, head_dim)}, or factors of such a z, for {heads} "
            f"heads and {phi}, got k {k.shape} and z {got}: use the state's own map and heads"
        )
    names = ("z.left", "z.right") if isinstance(z, LowRank) else ("z",)
    for name, x in zip(("k", *names), (k, *factors), strict=True):
        check_floating(name, x)
