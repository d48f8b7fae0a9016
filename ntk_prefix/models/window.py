"""Attention in which a token sees its neighbors and some leading rows: memory and time linear in the length.

Queries are cut into blocks of ``window`` tokens, each with its own block of keys, the one before and the one after; the
blocks are folded into the batch and go through the layer's ordinary core. So every core (plain, a trained prefix,
NTK-Attention) can be windowed, and none knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["seen_in_windows", "windowed"]


def windowed(
    core: Callable[..., Float[Array, "B T N H"]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    window: int,
    leading: int = 0,
    **scores: Any,
) -> Float[Array, "B T N H"]:
    """Return attention in which token t sees the tokens ``|t - s| <= window``, and the leading rows see and are seen by all.

    Args:
        core: attention of any kind, called as :class:`~ntk_prefix.models.attention.AttentionCore` is.
        query, key, value: [B, T, heads, H], the leading rows first.
        mask: [#B, 1, 1, T], True at keys that may be seen at all.
        window: tokens seen to each side, >= 1.
        leading: how many rows of T are seen by all.
        scores: what else the core is told, such as a scale; nothing that differs from token to token.

    Raises:
        ValueError: a window below 1, or a mask that differs from query to query.

    Numerics: exact; the same scores as with a band mask, without the T x T of it.

    Source: the pattern is that of Beltagy et al. (Longformer), arXiv 2004.05150.
    """
    if window < 1:
        raise expected("window", "at least 1 token to each side", window)
    batch, rows = query.shape[:2]
    if mask is not None and mask.shape[1:] != (1, 1, rows):
        raise expected(
            "mask",
            f"one for keys only beside a window, [B, 1, 1, {rows}]",
            f"{mask.shape}: a mask of queries and keys needs full attention",
        )
    length = rows - leading
    if length - 1 <= window:
        return core(query, key, value, mask=mask, **scores)
    blocks = -(-length // window)

    def cut(x: Array, around: int) -> Array:
        """[B, leading + length, ...] -> [B, blocks, (1 + 2 around) window, ...], zeros beyond both ends."""
        ends = (around * window, (blocks + around) * window - length)
        padded = jnp.pad(x[:, leading:], [(0, 0), ends] + [(0, 0)] * (x.ndim - 2))
        parts = padded.reshape(x.shape[0], blocks + 2 * around, window, *x.shape[2:])
        return jnp.concatenate([parts[:, i : i + blocks] for i in range(1 + 2 * around)], axis=2)

    def keys(x: Array) -> Array:
        """Return the keys of each block, the leading ones first: [B blocks, leading + 3 window, ...]."""
        first = jnp.broadcast_to(x[:, None, :leading], (x.shape[0], blocks, leading, *x.shape[2:]))
        return _fold(jnp.concatenate([first, cut(x, 1)], axis=2))

    seen = jnp.ones((1, rows), bool) if mask is None else mask[:, 0, 0]
    seen = keys(jnp.broadcast_to(seen, (batch, rows)))
    near = np.abs(np.arange(window)[:, None] + window - np.arange(3 * window)[None]) <= window
    band = np.concatenate([np.ones((window, leading), bool), near], axis=1)
    local = core(
        _fold(cut(query, 0)),
        keys(key),
        keys(value),
        mask=seen[:, None, None, :] & jnp.asarray(band)[None, None],
        **scores,
    )
    local = local.reshape(batch, blocks * window, *local.shape[2:])[:, :length]
    if not leading:
        return local
    return jnp.concatenate([core(query[:, :leading], key, value, mask=mask, **scores), local], axis=1)


def seen_in_windows(rows: int, window: int, leading: int = 0) -> Bool[Array, "T T"]:
    """Return the pattern of :func:`windowed` as a mask of queries and keys: full attention under it is the same."""
    place = np.arange(rows)
    near = np.abs(place[:, None] - place[None]) <= window
    return jnp.asarray(near | (place[:, None] < leading) | (place[None] < leading))


def _fold(x: Any) -> Array:
    return x.reshape(-1, *x.shape[2:])
