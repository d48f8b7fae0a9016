"""The one attention layer that every backbone here is built of, and the hook that adapters take.

A layer is four linear maps around a *core*::

    x -> query, key, value -> (rotary) -> (cache) -> core(query, key, value) -> out

An adapter that changes what attention computes (a prefix, NTK-Attention) replaces ``core``; one that changes the
weights (LoRA) replaces ``query``, ``key``, ``value`` or ``out``. Neither knows about the other or about the backbone.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.attention import softmax_attention
from ntk_prefix.checks import expected
from ntk_prefix.models.window import windowed
from ntk_prefix.sharding import constrain
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["AttentionCore", "AttentionLayer", "KeyValueCache", "Rotary", "rotate"]


class Rotary(NamedTuple):
    """Cosines and sines of rotary positions, ``[B, T, H]`` or ``[1, T, H]``, in the half-split layout."""

    cos: Float[Array, "#B T H"]
    sin: Float[Array, "#B T H"]


class KeyValueCache(NamedTuple):
    """Keys and values seen so far in one layer, in a buffer of fixed length."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


class AttentionCore(nnx.Module):
    """Softmax attention; what adapters replace. Scores are scaled by 1/sqrt(H).

    Class attributes:
        whole: whether the core wants a windowed sequence whole, with ``window`` and ``leading`` as further arguments, and
            not cut into blocks; :class:`ntk_prefix.peft.record` does.
    """

    whole: ClassVar[bool] = False

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        query_offset: Int[Array, ""] | int = 0,
    ) -> Float[Array, "B T N H"]:
        """Return attention, [B, T, N, H] in the query's dtype.

        ``mask`` is True where a query may see a key. With a cache a causal query counts from ``query_offset``; where there
        is none, nobody gives it.
        """
        return softmax_attention(query, key, value, mask=mask, is_causal=is_causal, query_offset=query_offset)


class AttentionLayer(nnx.Module):
    """Multi-head attention with grouped-query heads: ``x [B, T, D] -> [B, T, D]``.

    Args:
        features: D.
        num_heads: N.
        num_key_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        use_bias: of query, key and value; ``out`` has ``use_out_bias``.
        dtype: of the computation; parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = True,
        use_out_bias: bool = True,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads or num_heads
        self.head_dim = head_dim or features // num_heads
        wide, narrow = num_heads * self.head_dim, self.num_key_heads * self.head_dim
        self.query = nnx.Linear(features, wide, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(features, narrow, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(features, narrow, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(wide, features, use_bias=use_out_bias, dtype=dtype, rngs=rngs)
        self.core = AttentionCore()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
        start: Int[Array, ""] | int = 0,
        window: int | None = None,
        leading: int = 0,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache | None]:
        """Return the layer's output and the cache with this call's keys written at ``start``.

        With a cache, S is the buffer's length and causality counts from ``start``, which hides what is not yet written;
        where ``start`` is the number 0, S is T: the tokens of this call are all there is to see. With a window, tokens
        see ``window`` neighbors to each side and the first ``leading`` rows (:func:`~ntk_prefix.models.window.windowed`).

        Raises:
            ValueError: a window beside a cache, a causal mask, or adapters that differ from row to row.
        """
        query = constrain(self._heads(self.query(x), self.num_heads), "batch", None, "heads")
        key = constrain(self._heads(self.key(x), self.num_key_heads), "batch", None, "key_heads")
        value = constrain(self._heads(self.value(x), self.num_key_heads), "batch", None, "key_heads")
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            cache = KeyValueCache(
                jax.lax.dynamic_update_slice_in_dim(cache.key, key.astype(cache.key.dtype), start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.value, value.astype(cache.value.dtype), start, axis=1),
            )
        if window is None:
            place = {}
            if cache is not None and not (isinstance(start, int) and start == 0):
                (key, value), place = cache, {"query_offset": start}
            output = self.core(query, key, value, mask=mask, is_causal=is_causal, **place)
        elif cache is not None or is_causal or getattr(self.core, "rows", None) is not None:
            raise expected(
                "window",
                "an encoder with one adapter for the whole batch",
                "a cache, a causal mask or mixed rows: set window = None",
            )
        else:
            windows: dict[str, Any] = {"mask": mask, "window": window, "leading": leading}
            output = (
                self.core(query, key, value, **windows)
                if self.core.whole
                else windowed(self.core, query, key, value, **windows)
            )
        return self.out(constrain(output, "batch", None, "heads").reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Array, heads: int) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], heads, self.head_dim)


def rotate(x: Float[Array, "B T N H"], rotary: Rotary) -> Float[Array, "B T N H"]:
    """Return x turned by its position: ``x cos + [-x_2, x_1] sin`` on the two halves of the head."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (part[:, :, None, :] for part in rotary)
    return (x * cos + turned * sin).astype(x.dtype)
