r"""Attention over several sources and a linear part under one softmax: the one custom_vjp there is.

Forward: each source's flash attention returns ``o_i`` and ``lse_i``; with ``L = log(sum_i e^{lse_i} + E)``,

.. math::  T = \sum_i e^{lse_i - L} o_i + e^{-L} N .

Backward: the derivatives that :mod:`ntk_prefix.attention` states are, for keys, what the *ordinary* flash backward
computes when it is handed ``T`` and ``L`` as its output and log-sum-exp, for every source alike. A cotangent of ``L``
itself enters as ``dS = P (dP - rowsum(dT T) + dL)`` and ``dE = e^{-L} (dL - rowsum(dT T))``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ntk_prefix.checks import check_array, expected
from ntk_prefix.flash.base import Flash, Source, Statistics
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import varying
from ntk_prefix.typing import Array, Float

__all__ = [
    "RESULT",
    "Linear",
    "attend",
    "attend_with_lse",
    "linear_weight",
    "merge_attention",
    "relative",
    "relative_clipped",
]

RESULT = "attention"
"""The name of what the backward pass needs of the forward pass beside its inputs, for policies of ``jax.checkpoint``."""


class Linear(NamedTuple):
    """What stands beside the softmax sums: a numerator and its mass >= 0, in the layout of scores.

    Both are in units, which are constants: they have no derivative.
    """

    numerator: Float[Array, "B N T H"]
    mass: Float[Array, "B N T"]
    unit: Float[Array, "N"]
    """Of a head, 1 for all but states so large that their sums would overflow."""
    row_log_unit: Float[Array, "B N T"] | None = None
    """The log of a row's own, beside its head's, from feature maps in log space."""

    @property
    def log_unit(self) -> Float[Array, "#B N #T"]:
        """Of every row, exactly 0 for a unit of 1."""
        of_head = jnp.log(self.unit)[None, :, None]
        return of_head if self.row_log_unit is None else of_head + self.row_log_unit


def attend(
    flashes: tuple[Flash, ...], query: Array, sources: tuple[Source, ...], linear: Linear | None = None
) -> Float[Array, "B T N H"]:
    """Return attention over all sources, one for each flash, and the linear part at once, in the query's dtype."""
    return _attend_jitted((flashes, False), *varying((query, sources, linear)))[0]


def attend_with_lse(
    flashes: tuple[Flash, ...], query: Array, sources: tuple[Source, ...], linear: Linear | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return what :func:`attend` does, and the log of what it was divided by; both have all their derivatives."""
    output, lse = _attend_jitted((flashes, True), *varying((query, sources, linear)))
    assert lse is not None
    return output, lse


_Plan = tuple[tuple[Flash, ...], bool]
"""What is static: a flash for each source, and whether the log-sum-exp is wanted."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan, query: Array, sources: tuple[Source, ...], linear: Linear | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    return _attend_forward(plan, query, sources, linear)[0]


def _attend_forward(
    plan: _Plan, query: Array, sources: tuple[Source, ...], linear: Linear | None
) -> tuple[tuple[Array, Array | None], Any]:
    flashes, with_lse = plan
    parts = [_forward(flash, query, source) for flash, source in zip(flashes, sources, strict=True)]
    statistics = _merge(parts, linear)
    output = statistics.output
    if linear is not None and query.dtype == jnp.float16:  # where a capped weight still goes beyond 65504
        output = jnp.clip(output, jnp.finfo(jnp.float16).min, jnp.finfo(jnp.float16).max)
    statistics = checkpoint_name(statistics._replace(output=output.astype(query.dtype)), RESULT)
    units = None if linear is None else linear[2:]
    lse = jnp.where(_empty(statistics), -jnp.inf, statistics.lse) if with_lse else None
    return (statistics.output, lse), (query, sources, statistics, units)


def _attend_backward(plan: _Plan, residuals: Any, cotangents: tuple[Array, Array | None]) -> tuple[Any, ...]:
    flashes, _ = plan
    query, sources, statistics, units = residuals
    d_output, d_lse = cotangents
    if d_lse is not None:  # a row that sees nothing has no derivative, whatever has been made of its -inf
        d_lse = jnp.where(_empty(statistics), 0, d_lse)
    d_queries, d_sources = [], []
    for flash, source in zip(flashes, sources, strict=True):
        d_query, d_source = _backward(flash, query, source, statistics, d_output, d_lse)
        d_queries.append(d_query if len(sources) == 1 else d_query.astype(accumulation_dtype(query.dtype)))
        d_sources.append(d_source)
    d_query = functools.reduce(jnp.add, d_queries).astype(query.dtype)
    return d_query, tuple(d_sources), None if units is None else _d_linear(units, statistics, d_output, d_lse)


_attend.defvjp(_attend_forward, _attend_backward)
_attend_jitted = jax.jit(_attend, static_argnums=0)  # one program, also when called outside of jit


def _d_linear(units: Any, statistics: Statistics, d_output: Array, d_lse: Array | None) -> Linear:
    log_unit = Linear(statistics.output, statistics.maximum, *units).log_unit
    weight = linear_weight((statistics.maximum - log_unit) + statistics.log_sum)
    d_total = d_output.astype(weight.dtype)
    projection = jnp.sum(d_total * statistics.output.astype(weight.dtype), axis=-1).transpose(0, 2, 1)
    if d_lse is not None:
        projection = projection - d_lse
    d_numerator = _clipped(weight[..., None] * d_total.transpose(0, 2, 1, 3))
    return Linear(d_numerator, _clipped(-weight * projection), *jax.tree.map(jnp.zeros_like, units))


def _clipped(cotangent: Array) -> Array:
    largest = math.exp(_largest_log(cotangent.dtype))
    return jnp.clip(cotangent, -largest, largest)


def _empty(statistics: Statistics) -> Array:
    """Return which rows of merged statistics saw neither a key nor any mass."""
    return statistics.maximum == jnp.inf


def _merge(parts: list[Statistics], linear: Linear | None) -> Statistics:
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
        weights.append(linear_weight(largest - linear.log_unit))
        values.append(linear.numerator.transpose(0, 2, 1, 3))
        total = total + weights[-1] * linear.mass
    total = jnp.where(empty, 1, total)
    output = functools.reduce(
        jnp.add, [(w / total).transpose(0, 2, 1)[..., None] * v for w, v in zip(weights, values, strict=True)]
    )
    return Statistics(output, largest, jnp.log(total))


def linear_weight(log_mass: Array) -> Array:
    """Return ``exp(-log_mass)``, capped with room for sums: the cap keeps 0 * infinity from happening."""
    return jnp.exp(jnp.minimum(-log_mass, _largest_log(log_mass.dtype)))


def _largest_log(dtype: jnp.dtype) -> float:
    return math.log(jnp.finfo(dtype).max) - 20


def merge_attention(
    outputs: Sequence[Float[Array, "B T N H"]] | Float[Array, "parts B T N H"],
    lses: Sequence[Float[Array, "B T N"]] | Float[Array, "parts B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return attention over all keys, and its log-sum-exp, from attention over each part of them.

    ``L = logsumexp_i(lse_i)``, ``O = sum_i e^{lse_i - L} o_i``. What comes out is of the kind that went in, so parts can be
    merged in any order, one after the other or all at once.

    Args:
        outputs: at least one [B, T, N, H], each attention of the same queries over keys of its own; a list, or stacked.
        lses: for each its [B, T, N], from :func:`ntk_prefix.attention_with_lse`; -inf where a part has no key for a row.

    Returns:
        [B, T, N, H] in the outputs' dtype and [B, T, N]; 0 and -inf for a row that has no key in any part.

    Raises:
        UsageError: no part, not as many log-sum-exps as outputs, or shapes that do not fit together.

    Numerics: in float32 (float64 for float64), relative to the largest lse, which may be of any finite size. What is NaN or
        +inf is not refused, for under ``jax.jit`` there are no values to look at: it makes its row NaN, and no other.

    Differentiation: in everything, plain autodiff; a part of weight 0 has gradient 0.

    Source: the online softmax, arXiv 1805.02867.
    """
    outputs, lses = tuple(outputs), tuple(lses)
    if not outputs or len(outputs) != len(lses):
        raise expected("outputs and lses", "as many of either, at least one", f"{len(outputs)} and {len(lses)}")
    check_array("outputs[0]", outputs[0], "B", "T", "N", "H")
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        check_array(f"outputs[{i}]", output, *outputs[0].shape)
        check_array(f"lses[{i}]", lse, *outputs[0].shape[:3])
    dtype = accumulation_dtype(*outputs, *lses)
    wide = jnp.stack([lse.astype(dtype) for lse in lses])
    largest = jax.lax.stop_gradient(jnp.max(wide, axis=0))
    empty = largest == -jnp.inf
    weights = jnp.exp(wide - jnp.where(empty, 0, largest)[None])
    total = jnp.where(empty, 1, jnp.sum(weights, axis=0))
    parts = [(w / total)[..., None] * o.astype(dtype) for w, o in zip(weights, outputs, strict=True)]
    output = functools.reduce(jnp.add, parts).astype(jnp.result_type(*outputs))
    return output, jnp.where(empty, -jnp.inf, largest + jnp.log(total))


def relative(own_output: Float[Array, "B N T H"], linear: Linear) -> Float[Array, "B N T H"]:
    """Return ``(o + N) / (1 + E)``: the linear part in units of each query's own mass."""
    if linear.row_log_unit is None:
        one = 1 / linear.unit[None, :, None]
        return (own_output * one[..., None] + linear.numerator) / (one + linear.mass)[..., None]
    return _weigh(own_output, linear)[0]


def _weigh(own_output: Array, linear: Linear) -> tuple[Array, Array, Array]:
    """Return (o + N) / (1 + E), and what o and N are multiplied by; it is :func:`_merge` with an own mass of 1."""
    log_mass = jnp.log(jnp.where(linear.mass > 0, linear.mass, 1)) + linear.log_unit
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.where(linear.mass > 0, log_mass, 0), 0))
    own, weight = jnp.exp(-largest), linear_weight(largest - linear.log_unit)
    total = own + weight * linear.mass
    own, weight = own / total, weight / total
    return own[..., None] * own_output + weight[..., None] * linear.numerator, own, weight


def relative_clipped(own_output: Float[Array, "B N T H"], linear: Linear) -> Float[Array, "B N T H"]:
    """Return what :func:`relative` does of rows with a unit, with cotangents of the linear part that stay finite."""
    return _relative_clipped(*varying((own_output, linear)))


@jax.custom_vjp
def _relative_clipped(own_output: Float[Array, "B N T H"], linear: Linear) -> Float[Array, "B N T H"]:
    return _weigh(own_output, linear)[0]


def _relative_forward(own_output: Array, linear: Linear) -> tuple[Array, Any]:
    output, own, weight = _weigh(own_output, linear)
    return output, (output, own, weight, linear[2:])


def _relative_backward(residuals: Any, d_output: Array) -> tuple[Array, Linear]:
    output, own, weight, units = residuals
    d_mass = -weight * jnp.sum(d_output * output, axis=-1)
    d_units = jax.tree.map(jnp.zeros_like, units)
    return own[..., None] * d_output, Linear(_clipped(weight[..., None] * d_output), _clipped(d_mass), *d_units)


_relative_clipped.defvjp(_relative_forward, _relative_backward)


def _forward(flash: Flash, query: Array, source: Source) -> Statistics:
    if source.key.ndim == 4:
        return flash.forward(query, source)
    output, *rows = flash.forward(_fold(query), _one_row(source))
    batch, length, heads, _ = query.shape
    return Statistics(output.reshape(query.shape), *(x.reshape(heads, batch, length).transpose(1, 0, 2) for x in rows))


def _backward(
    flash: Flash, query: Array, source: Source, statistics: Statistics, d_output: Array, d_lse: Array | None
) -> tuple[Array, Source]:
    if source.key.ndim == 4:
        grads = flash.backward(query, source, statistics, d_output, d_lse)
        return grads.query, Source(grads.key, grads.value, grads.bias)
    folded = Statistics(_fold(statistics.output), _fold_rows(statistics.maximum), _fold_rows(statistics.log_sum))
    d_lse = None if d_lse is None else _fold_rows(d_lse)
    grads = flash.backward(_fold(query), _one_row(source), folded, _fold(d_output), d_lse)
    return grads.query.reshape(query.shape), Source(grads.key[0], grads.value[0], grads.bias)


def _one_row(source: Source) -> Source:
    """Make keys that a batch shares those of one long row of queries; their bias must not differ between queries."""
    return source._replace(key=source.key[None], value=source.value[None])


def _fold(x: Array) -> Array:
    """Make one long row of queries of a batch that shares its keys: [B, T, N, H] -> [1, B T, N, H]."""
    return x.reshape(1, -1, *x.shape[2:])


def _fold_rows(x: Array) -> Array:
    """[B, N, T] -> [1, N, B T]."""
    return x.transpose(1, 0, 2).reshape(1, x.shape[1], -1)
