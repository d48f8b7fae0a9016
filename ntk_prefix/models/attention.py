"""The one attention layer that every backbone here is built of, and the hook that adapters take.

A layer is four linear maps around a *core*::

    x -> query, key, value -> (norm) -> (rotary) -> (cache) -> core(query, key, value) -> out

An adapter that changes what attention computes (a prefix, NTK-Attention) replaces ``core``; one that changes the
weights (LoRA) replaces ``query``, ``key``, ``value`` or ``out``. Neither knows about the other or about the backbone.

What families' layers differ in is one record, :class:`AttentionKind`. What of it concerns scores (a scale, a soft cap, a
window) reaches attention through the core, by the argument names of :func:`ntk_prefix.attention.softmax_attention`: a core
passes on what it is given (:class:`AttentionOptions`) and is given nothing that is at its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.attention import softmax_attention
from ntk_prefix.checks import expected
from ntk_prefix.models.rotary import Rope, Rotary, rotate
from ntk_prefix.models.window import windowed
from ntk_prefix.sharding import constrain
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["AttentionCore", "AttentionKind", "AttentionLayer", "AttentionOptions", "KeyValueCache"]


class KeyValueCache(NamedTuple):
    """Keys and values seen so far in one layer, in a buffer of fixed length.

    Of a layer with a window it is a ring: token t lies in slot ``t % S``, and the last S tokens are there.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


class AttentionOptions(TypedDict, total=False):
    """What a core is told beside queries, keys and values; names and meaning are those of ``softmax_attention``."""

    bias: Float[Array, "#B #N #T #S"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    is_causal: bool
    query_offset: Int[Array, ""] | int
    scale: float | None
    logits_soft_cap: float | None
    local_window_size: int | tuple[int, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """What attention layers differ in, from family to family and from layer to layer.

    Args:
        use_bias: of query, key and value.
        use_out_bias: of ``out``.
        rope: how positions turn queries and keys; None leaves them alone.
        window: a token sees itself and the ``window - 1`` tokens before it; None is all before it.
        neighbors: a token of an encoder sees so many to each side; None is all.
        scale: of scores; 1/sqrt(H) if None.
        soft_cap: scores are ``cap tanh(scores / cap)``, after the scale; None leaves them alone.

    Raises:
        UsageError: a window below 1, or a scale or a cap that is not positive.
    """

    use_bias: bool = True
    use_out_bias: bool = True
    rope: Rope | None = None
    window: int | None = None
    neighbors: int | None = None
    scale: float | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "neighbors", "scale", "soft_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise expected(name, "a number above 0, or None", value)

    def scores(self) -> AttentionOptions:
        """Return what attention is told of scores: what is at its default is not said."""
        said = {"scale": self.scale, "logits_soft_cap": self.soft_cap}
        return cast(AttentionOptions, {name: value for name, value in said.items() if value is not None})


class AttentionCore(nnx.Module):
    """Softmax attention; what adapters replace. Scores are scaled by 1/sqrt(H) unless the layer says otherwise.

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
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        """Return attention, [B, T, N, H] in the query's dtype.

        ``mask`` is True where a query may see a key. With a cache a causal query counts from ``query_offset``.
        """
        return softmax_attention(query, key, value, **options)


class AttentionLayer(nnx.Module):
    """Multi-head attention with grouped-query heads: ``x [B, T, D] -> [B, T, D]``.

    Args:
        features: D.
        num_heads: N.
        num_key_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        kind: what the family's layers differ in.
        head_norm: makes a norm of each query and key, [B, T, heads, H], before they are turned; none if None.
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
        kind: AttentionKind = AttentionKind(),
        head_norm: Callable[[], nnx.Module] | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads or num_heads
        self.head_dim = head_dim or features // num_heads
        self.kind = kind
        wide, narrow = num_heads * self.head_dim, self.num_key_heads * self.head_dim
        self.query = nnx.Linear(features, wide, use_bias=kind.use_bias, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(features, narrow, use_bias=kind.use_bias, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(features, narrow, use_bias=kind.use_bias, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(wide, features, use_bias=kind.use_out_bias, dtype=dtype, rngs=rngs)
        self.query_norm = None if head_norm is None else head_norm()
        self.key_norm = None if head_norm is None else head_norm()
        self.core = AttentionCore()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
        rotary: Mapping[Rope, Rotary] | None = None,
        cache: KeyValueCache | None = None,
        start: Int[Array, ""] | int = 0,
        window: int | None = None,
        leading: int = 0,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache | None]:
        """Return the layer's output and the cache with this call's keys written at ``start``.

        With a cache, S is the length of the text that it is for and causality counts from ``start``, which hides what is
        not yet written; where ``start`` is the number 0, S is T: the tokens of this call are all there is to see. Beside a
        ring, a mask is one for keys only. With ``window``, tokens see that many neighbors to each side and the first
        ``leading`` rows (:func:`~ntk_prefix.models.window.windowed`).

        Raises:
            ValueError: a window beside a cache, a causal mask, a bias, or adapters that differ from row to row.
        """
        query = constrain(self._heads(self.query(x), self.num_heads), "batch", None, "heads")
        key = constrain(self._heads(self.key(x), self.num_key_heads), "batch", None, "key_heads")
        value = constrain(self._heads(self.value(x), self.num_key_heads), "batch", None, "key_heads")
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.kind.rope is not None and rotary is not None:
            turns = rotary[self.kind.rope]
            query, key = rotate(query, turns), rotate(key, turns)
        options = self.kind.scores() | {"mask": mask}
        if bias is not None:
            options |= {"bias": bias}
        if (near := self.kind.neighbors) is not None:
            if window is None and not leading:
                options |= {"local_window_size": near}
            else:
                window = near if window is None else min(window, near)
        if window is None:
            options |= {"is_causal": is_causal}
            if self.kind.window is not None:
                options |= {"local_window_size": (self.kind.window - 1, 0)}
            first = isinstance(start, int) and start == 0
            before = cache
            if cache is not None:
                cache = _written(cache, key, value, start, ring=self.kind.window is not None)
            if before is not None and cache is not None and not first:
                if self.kind.window is None:
                    (key, value), options = cache, options | {"query_offset": start}
                else:
                    key, value, options = _of_ring(before, cache, key, value, start, options)
            output = self.core(query, key, value, **options)
        elif cache is not None or is_causal or bias is not None or getattr(self.core, "rows", None) is not None:
            raise expected(
                "window",
                "an encoder with one adapter for the whole batch",
                "a cache, a causal mask, a position bias or mixed rows: set window = None",
            )
        else:
            windows: dict[str, Any] = {**options, "window": window, "leading": leading}
            output = (
                self.core(query, key, value, **windows)
                if self.core.whole
                else windowed(self.core, query, key, value, **windows)
            )
        return self.out(constrain(output, "batch", None, "heads").reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Array, heads: int) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], heads, self.head_dim)


def _written(
    cache: KeyValueCache, key: Array, value: Array, start: Int[Array, ""] | int, *, ring: bool
) -> KeyValueCache:
    """Return a cache with the keys and values of tokens ``start``, ``start + 1``, ... in their places."""
    slots, length = cache.key.shape[1], key.shape[1]
    kept = min(length, slots) if ring else length
    first = start + length - kept
    at_once = not ring or kept == 1 or (isinstance(first, int) and first % slots + kept <= slots)

    def put(buffer: Array, new: Array) -> Array:
        new = new[:, length - kept :].astype(buffer.dtype)
        if at_once:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, first % slots if ring else first, axis=1)
        return buffer.at[:, (first + jnp.arange(kept)) % slots].set(new, unique_indices=True)

    return KeyValueCache(put(cache.key, key), put(cache.value, value))


def _of_ring(
    before: KeyValueCache,
    after: KeyValueCache,
    key: Array,
    value: Array,
    start: Int[Array, ""] | int,
    options: AttentionOptions,
) -> tuple[Array, Array, AttentionOptions]:
    """Return the keys and values that a call's tokens may see beside a ring, and what attention is told of them.

    A single token sees the ring as it is: what order keys stand in does not matter, and none of them is out of its window.
    Several see the ring as it was, put in order, and themselves.
    """
    slots, length, mask = before.key.shape[1], key.shape[1], options.pop("mask", None)
    if length == 1:
        tokens = start - (start - jnp.arange(slots)) % slots
        key, value = after
        del options["local_window_size"]
        options |= {"is_causal": False}
    else:
        tokens = start - slots + jnp.arange(slots + length)
        key, value = (
            jnp.concatenate([jnp.take(old, tokens[:slots] % slots, axis=1), new.astype(old.dtype)], axis=1)
            for old, new in zip(before, (key, value), strict=True)
        )
        options |= {"query_offset": slots}
    seen = (tokens >= 0)[None, None, None]
    if mask is not None:
        seen = seen & jnp.take(mask, jnp.maximum(tokens, 0), axis=3)
    return key, value, options | {"mask": seen}
