"""What a fit knows of the queries that meet a prefix: the exact sums, and everything as a share of them.

Scores of any size are as safe as small ones so.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.attention import attention_with_lse
from ntk_prefix.feature_maps import FeatureMap
from ntk_prefix.flash.merging import linear_weight
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["Rows", "around", "outputs", "rows_of"]


class Rows(NamedTuple):
    """What a fit knows of the queries that meet a key head: Q = B T N / K of them, all as shares of the exact sums."""

    query: Float[Array, "K Q H"]
    """Scaled, ``q * sqrt(scale)``."""
    log_total: Float[Array, "K Q"]
    """``L``: the log of the exact denominator."""
    own: Float[Array, "K Q H"]
    """The output of attention over the queries' own keys."""
    log_own: Float[Array, "K Q"]
    """The log of their share of the denominator; -inf for a query that sees no key."""
    mass: Float[Array, "K Q"]
    """``e``: the prefix's share of the denominator."""
    part: Float[Array, "K Q H"]
    """What the prefix adds to the exact output."""

    @property
    def target(self) -> Float[Array, "*K Q H"]:
        """The exact output, of several heads or of one."""
        return self.own * jnp.exp(self.log_own)[..., None] + self.part

    @property
    def size(self) -> Float[Array, "K"]:
        """What a square error is relative to: ``|prefix's part|^2``, or the square of the output's rounding if that is more.

        A prefix that adds less than rounding does, such as one of zeros, is none to be relative to.
        """
        part, output = (jnp.sum(x**2, axis=(1, 2)) for x in (self.part, self.target))
        limits = jnp.finfo(part.dtype)
        return jnp.maximum(jnp.maximum(part, limits.eps**2 * output), limits.tiny)

    def take(self, index: Array | np.ndarray | slice) -> Rows:
        """Return some of the queries."""
        return Rows(*(x[:, index] for x in self))

    def and_more(self, more: Rows) -> Rows:
        """Return these queries and others."""
        return Rows(*(jnp.concatenate(pair, axis=1) for pair in zip(self, more, strict=True)))


def rows_of(
    query: Float[Array, "B T N H"],
    prefix_key: Float[Array, "M K H"],
    prefix_value: Float[Array, "M K H"],
    key: Float[Array, "B S K H"] | None = None,
    value: Float[Array, "B S K H"] | None = None,
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> Rows:
    """Run the exact attentions, over the prefix and over the queries' own keys, and return what a fit needs of them.

    Args:
        query, key, value: not scaled; without keys the queries see the prefix alone.
        prefix_key, prefix_value: [M, K, H].
        mask, bias, is_causal, scale, logits_soft_cap, local_window_size: of the layer, as in
            :func:`ntk_prefix.attention.ntk_attention`; the prefix is always seen.

    Returns:
        :class:`Rows`, in float32 (float64 for float64); a head's queries stand as [B, T, group].
    """
    heads, head_dim = query.shape[2:]
    groups = heads // prefix_key.shape[1]
    dtype = accumulation_dtype(query.dtype)
    folded = query.reshape(1, -1, heads, head_dim)
    part, prefix_lse = attention_with_lse(
        folded, prefix_key[None], prefix_value[None], scale=scale, logits_soft_cap=logits_soft_cap
    )
    part, prefix_lse = part.reshape(query.shape).astype(dtype), prefix_lse.reshape(query.shape[:3])
    if key is None or value is None:
        own, lse = jnp.zeros_like(part), jnp.full_like(prefix_lse, -jnp.inf)
    else:
        own, lse = attention_with_lse(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            local_window_size=local_window_size,
        )
    total = jnp.logaddexp(prefix_lse, lse)
    mass = jnp.exp(prefix_lse - total)

    def by_key_head(x: Array) -> Array:
        x = x.reshape(*x.shape[:2], heads // groups, groups, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(heads // groups, -1, *x.shape[4:])

    root = head_dim**-0.25 if scale is None else scale**0.5
    return Rows(
        by_key_head(query.astype(dtype) * root),
        by_key_head(total),
        by_key_head(own.astype(dtype)),
        by_key_head(lse - total),
        by_key_head(mass),
        by_key_head(part * mass[..., None]),
    )


def around(
    rows: Rows,
    prefix_key: Float[Array, "K M H"],
    prefix_value: Float[Array, "K M H"],
    count: int,
    key: Array,
    *,
    spread: float,
    logits_soft_cap: float | None = None,
) -> Rows:
    r"""Draw queries around those that were seen, and ask the prefix: it answers any.

    .. math::  q + \frac{s}{\sqrt 2} (q' - q''), \qquad q', q'' \text{ drawn among the queries},

    which is noise with s^2 times the queries' covariance: far where they are far apart. The queries' own part stays that of q,
    its output and its share of the denominator.

    Args:
        rows: the queries that were seen.
        prefix_key, prefix_value: keys scaled as the queries are.
        count: how many are drawn, around one query after the other.
        key: of the draw.
        spread: ``s``.
        logits_soft_cap: of the layer's scores.
    """
    base = jnp.arange(count) % rows.query.shape[1]
    one, other = jax.random.randint(key, (2, count), 0, rows.query.shape[1])
    query = rows.query[:, base] + spread / 2**0.5 * (rows.query[:, one] - rows.query[:, other])
    part, lse = attention_with_lse(
        *(jnp.swapaxes(x, 0, 1)[None] for x in (query, prefix_key, prefix_value)),
        scale=1.0,
        logits_soft_cap=logits_soft_cap,
    )
    part, lse = jnp.swapaxes(part[0], 0, 1), jnp.swapaxes(lse[0], 0, 1)
    same = rows.take(base)
    # of a prefix that is not seen the share is 0, and stays next to it
    log_mass = jnp.log(jnp.maximum(same.mass, jnp.finfo(same.mass.dtype).tiny))
    return same._replace(query=query, log_total=lse - log_mass, part=part * same.mass[..., None])


def outputs(rows: Rows, z: Float[Array, "K R H"], k: Float[Array, "K R"], phi: FeatureMap) -> Float[Array, "K Q H"]:
    """Return the output of attention with a state that the query heads of a group share, for the queries of a fit.

    Numerics: relative to the larger of both denominators, so that a state is far from the exact one and yet finite.
    """
    features, log_unit = phi.per_head(rows.query)
    log_unit = -rows.log_total if log_unit is None else log_unit - rows.log_total
    mass = jnp.maximum(jnp.einsum("kqr,kr->kq", features, k), 0)
    log_mass = jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)) + log_unit, -jnp.inf)
    largest = jnp.maximum(log_mass, rows.log_own)
    nothing = largest == -jnp.inf
    largest = jnp.where(nothing, jnp.inf, largest)
    own, weight = jnp.exp(rows.log_own - largest), linear_weight(largest - log_unit)
    total = jnp.where(nothing, 1, own + weight * mass)
    numerator = own[..., None] * rows.own + weight[..., None] * jnp.einsum("kqr,krh->kqh", features, z)
    return numerator / total[..., None]
