"""The definition: all T x S scores at once and plain autodiff, which every backend is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.flash.base import Flash, Source
from ntk_prefix.flash.merging import Linear, linear_weight
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Float

__all__ = ["attend", "scores"]


def scores(flash: Flash, query: Array, source: Source) -> Float[Array, "B N T S"]:
    """Return the scores that :class:`~ntk_prefix.flash.base.Flash` states, in the accumulation dtype."""
    key, _, bias, mask, offset = source
    dtype = accumulation_dtype(query.dtype)
    groups = query.shape[2] // max(key.shape[2], 1)
    keys = jnp.repeat(key, groups, axis=2).astype(dtype)
    result = flash.scale * jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), keys)
    if flash.logits_soft_cap is not None:
        result = flash.logits_soft_cap * jnp.tanh(result / flash.logits_soft_cap)
    if bias is not None:
        result = result + bias.astype(dtype)
    if mask is not None:
        result = jnp.where(mask, result, -jnp.inf)
    left, right = flash.sees
    place = np.arange(result.shape[2], dtype=np.int32)[:, None] + (flash.query_offset if offset is None else offset)
    column = np.arange(result.shape[3], dtype=np.int32)[None]
    if right is not None:
        result = jnp.where((column <= place + right)[None, None], result, -jnp.inf)
    if left is not None:
        result = jnp.where((column >= place - left)[None, None], result, -jnp.inf)
    return result


@jax.jit
def attend(
    all_scores: Float[Array, "B N T S"], value: Float[Array, "B S K H"], linear: Linear | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the formula as it stands, ``(A V + N) / (A 1 + E)``, and the log of what is below; plain autodiff."""
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
        weight = linear_weight(largest - linear.log_unit)
        above = above + weight[..., None] * linear.numerator
        below = below + weight * linear.mass
    empty = below == 0
    below = jnp.where(empty, 1, below)
    return (above / below[..., None]).transpose(0, 2, 1, 3), jnp.where(empty, -jnp.inf, largest + jnp.log(below))
