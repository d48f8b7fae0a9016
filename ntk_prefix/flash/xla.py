"""Flash attention in jax.numpy, blockwise over queries and keys: any platform and float dtype, memory linear in T and S.

What suits a CPU and an accelerator differs: see :class:`_Tuning`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.flash.base import BACKENDS, Backend, Flash, Gradients, Source, Statistics, target_platform
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import varying
from ntk_prefix.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class _Tuning:
    """What suits a platform.

    Attributes:
        queries, keys: shape of one block of scores, at most.
        scores: in one block over all rows and heads of the batch; above it fewer queries go into it, down to an eighth.
        long: whether a block of few queries takes as many keys as fit, so that a token is decoded in one step.
        narrow: whether products take bfloat16 factors as they are, and probabilities rounded to it, as a flash kernel
            does. Sums are float32 all the same. Float16 factors are always widened: gradients of scores may not fit.
    """

    queries: int
    keys: int
    scores: int
    long: bool
    narrow: bool


TUNINGS = {
    # 2 cores, float32, H = 64 (tests/bench): large enough that XLA's matrix products run at their rate, small enough
    # (8 MiB) that scores, probabilities and their gradients stay in the last-level cache
    "cpu": _Tuning(queries=512, keys=512, scores=2**21, long=False, narrow=False),
    # an H200, bfloat16, B=8 T=4096 N=16 H=128 (tests/bench/results): 3 and 4 times the rate of the CPU's blocks
    "gpu": _Tuning(queries=1024, keys=1024, scores=2**27, long=True, narrow=True),
    # not measured; a block of float32 scores is 128 MiB, of the 16 GiB of the smallest chips
    "tpu": _Tuning(queries=512, keys=512, scores=2**25, long=True, narrow=True),
}


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The schedule: which block of queries meets which block of keys, and how arrays are cut for it.

    Cut queries are [blocks, B, K, G * rows, H] and cut keys [blocks, B, K, columns, H]: the G query heads
    that share a key head become rows of one matrix product, no axis of size one stands between batch and rows
    (that is what makes ``jax.nn.dot_product_attention`` transpose all its probabilities on a CPU), and B and
    K stay whole, so that arrays sharded over them need no communication.
    """

    query_length: int
    key_length: int
    key_heads: int
    groups: int
    sees: tuple[int | None, int | None]
    query_offset: int | Array
    rows: int
    columns: int
    scale: float
    soft_cap: float | None
    sums: np.dtype
    factors: np.dtype

    @classmethod
    def of(cls, flash: Flash, query: Array, source: Source) -> _Blocks:
        key = source.key
        batch, query_length, heads, _ = query.shape
        key_length, key_heads = key.shape[1], key.shape[2]
        tuning = TUNINGS.get(target_platform(), TUNINGS["gpu"])
        widest, highest = tuning.keys, tuning.queries
        if tuning.long and query_length <= tuning.queries:
            widest = max(widest, tuning.scores // max(batch * heads * query_length, 1))
        left, right = flash.sees
        if left is not None and right is not None:  # blocks much larger than a window are mostly outside of it
            narrow = max(left + right + 1, tuning.queries // 4)
            widest, highest = min(widest, narrow), min(highest, narrow)
        columns = _even_block(key_length, widest)
        affordable = tuning.scores // max(batch * heads * columns, 1)
        rows = _even_block(query_length, min(highest, max(affordable, tuning.queries // 8)))
        offset = flash.query_offset if source.query_offset is None else source.query_offset
        sums = accumulation_dtype(query.dtype)
        same = query.dtype == key.dtype == source.value.dtype
        return cls(
            query_length,
            key_length,
            key_heads,
            heads // key_heads,
            flash.sees,
            offset,
            rows,
            columns,
            flash.scale,
            flash.logits_soft_cap,
            sums,
            query.dtype if tuning.narrow and same and query.dtype == jnp.bfloat16 else sums,
        )

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.rows)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.columns)

    def pairs(self) -> np.ndarray:
        """Return the (query, key) block pairs to visit, [pairs, 2]; where they are known, none that sees nothing.

        Behind an offset that is known at run time only, what a window may touch is counted from :meth:`first`.
        """
        columns = self.key_blocks if self.bound is None else self.bound
        all_pairs = [(i, j) for i in range(self.query_blocks) for j in range(columns)]
        visit = all_pairs if isinstance(self.query_offset, Array) else [pair for pair in all_pairs if self.meet(*pair)]
        return np.array(visit, np.int32).reshape(-1, 2)

    @property
    def bound(self) -> int | None:
        """How many blocks of keys one of queries touches at most, if that is few and where they are is not yet known."""
        left, right = self.sees
        if left is None or right is None or not isinstance(self.query_offset, Array):
            return None
        touched = -(-(left + right + self.rows - 1) // self.columns) + 1
        return touched if touched < self.key_blocks else None

    def first(self, i: Array) -> Array:
        """Return the first of the :attr:`bound` blocks of keys that block i of queries may touch."""
        left, bound = self.sees[0], self.bound
        assert left is not None
        assert bound is not None
        return jnp.clip((i * self.rows + self.query_offset - left) // self.columns, 0, self.key_blocks - bound)

    def meet(self, i: Any, j: Any) -> Any:
        """Whether any query of block i sees any key of block j, as far as causality and windows go."""
        left, right = self.sees
        below = right is None or j * self.columns < (i + 1) * self.rows + self.query_offset + right
        above = left is None or (j + 1) * self.columns > i * self.rows + self.query_offset - left
        return below & above

    def scan(self, visit: Callable[[Any, Array, Array], Any], start: Any) -> Any:
        """Fold ``visit(carry, i, j)`` over all pairs; what is out of sight is skipped at run time if not known before."""
        pairs = self.pairs()

        def step(carry: Any, pair: Array) -> tuple[Any, None]:
            i, j = pair
            if self.sees == (None, None) or not isinstance(self.query_offset, Array) or self.key_blocks == 1:
                return visit(carry, i, j), None
            j = j if self.bound is None else j + self.first(i)
            return jax.lax.cond(self.meet(i, j), visit, lambda carry, *_: carry, carry, i, j), None

        return jax.lax.scan(step, start, jnp.asarray(pairs))[0] if len(pairs) else start

    def cut_queries(self, x: Float[Array, "B T N H"]) -> Float[Array, "blocks B K rows H"]:
        x = _pad(x, 1, self.query_blocks * self.rows)
        batch, _, _, size = x.shape
        x = x.reshape(batch, self.query_blocks, self.rows, self.key_heads, self.groups, size)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(*self._cut_shape(batch), size)

    def join_queries(self, x: Float[Array, "blocks B K rows H"]) -> Float[Array, "B T N H"]:
        blocks, batch, heads, _, size = x.shape
        x = x.reshape(blocks, batch, heads, self.groups, self.rows, size).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(batch, blocks * self.rows, heads * self.groups, size)[:, : self.query_length]

    def cut_rows(self, x: Float[Array, "B N T"], fill: float) -> Float[Array, "blocks B K rows"]:
        x = _pad(x, 2, self.query_blocks * self.rows, fill)
        x = x.reshape(x.shape[0], self.key_heads, self.groups, self.query_blocks, self.rows)
        return x.transpose(3, 0, 1, 2, 4).reshape(self._cut_shape(x.shape[0]))

    def join_rows(self, x: Float[Array, "blocks B K rows"]) -> Float[Array, "B N T"]:
        blocks, batch, heads, _ = x.shape
        x = x.reshape(blocks, batch, heads, self.groups, self.rows).transpose(1, 2, 3, 0, 4)
        return x.reshape(batch, heads * self.groups, blocks * self.rows)[..., : self.query_length]

    def cut_keys(self, x: Float[Array, "B S K H"]) -> Float[Array, "blocks B K columns H"]:
        x = _pad(x, 1, self.key_blocks * self.columns)
        batch, _, heads, size = x.shape
        return x.reshape(batch, self.key_blocks, self.columns, heads, size).transpose(1, 0, 3, 2, 4)

    def join_keys(self, x: Float[Array, "blocks B K columns H"]) -> Float[Array, "B S K H"]:
        blocks, batch, heads, _, size = x.shape
        x = x.transpose(1, 0, 3, 2, 4)
        return x.reshape(batch, blocks * self.columns, heads, size)[:, : self.key_length]

    def cut_scores(self, x: Array | None) -> Array | None:
        """Split the heads of a bias or mask [#B, #N, #T, #S] into [#K, #G]; pad T and S to whole blocks."""
        if x is None:
            return None
        batch, heads, queries, keys = x.shape
        x = x.reshape(batch, *((1, 1) if heads == 1 else (self.key_heads, self.groups)), queries, keys)
        if queries > 1:
            x = _pad(x, 3, self.query_blocks * self.rows)
        return _pad(x, 4, self.key_blocks * self.columns) if keys > 1 else x

    def join_scores(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Undo :meth:`cut_scores`, for the gradient of a bias."""
        return x[..., : shape[2], : shape[3]].reshape(shape)

    def window(self, x: Array, i: Array, j: Array) -> Array:
        """Return block (i, j) of an array from :meth:`cut_scores`."""
        return jax.lax.dynamic_slice(x, *self._window(x, i, j))

    def add_to_window(self, x: Array, i: Array, j: Array, block: Array) -> Array:
        """Add the gradient of block (i, j) to that of a bias, summed over the axes it was broadcast along."""
        start, size = self._window(x, i, j)
        repeated = tuple(axis for axis in range(5) if x.shape[axis] == 1)
        block = jnp.sum(block, axis=repeated, keepdims=True) + jax.lax.dynamic_slice(x, start, size)
        return jax.lax.dynamic_update_slice(x, block, start)

    def product(self, subscripts: str, x: Array, y: Array) -> Array:
        """Return a product of two blocks, summed in the accumulation dtype."""
        x, y = x.astype(self.factors), y.astype(self.factors)
        return jnp.einsum(subscripts, x, y, preferred_element_type=self.sums)

    def scaled(self, query: Array) -> Array:
        """Return queries times the scale, unless that would round them: then :meth:`rescaled` takes over."""
        return query.astype(self.sums) * self.scale if self.factors == self.sums else query

    def rescaled(self, x: Array) -> Array:
        """Return a product of what :meth:`scaled` returned, times the scale if that has left it out."""
        return x if self.factors == self.sums else x * self.scale

    def scores(
        self, query: Array, key: Array, bias: Array | None, mask: Array | None, i: Array, j: Array
    ) -> tuple[Float[Array, "B K grouped columns"], Float[Array, "B K grouped columns"] | None]:
        """Return one block of scores, of queries as :meth:`scaled` returns them, and its derivative by ``scale q . k``.

        The derivative is ``1 - tanh^2``, and None without a soft cap.
        """
        result, slope = self.rescaled(self.product("bkrh,bksh->bkrs", query, key)), None
        if self.soft_cap is not None:
            ratio = jnp.tanh(result / self.soft_cap)
            result, slope = self.soft_cap * ratio, (1 - ratio) * (1 + ratio)
        left, right = self.sees
        whole = self.sees == (None, None) and self.key_length % self.columns == 0
        if bias is None and mask is None and whole:
            return result, slope
        grouped = self.ungroup(result)
        row = (i * self.rows + jnp.arange(self.rows, dtype=np.int32))[:, None]
        column = (j * self.columns + jnp.arange(self.columns, dtype=np.int32))[None, :]
        keep = column < self.key_length
        if right is not None:
            keep = keep & (column <= row + self.query_offset + right)
        if left is not None:
            keep = keep & (column >= row + self.query_offset - left)
        keep = keep[None, None, None]
        if mask is not None:
            keep = keep & self.window(mask, i, j)
        if bias is not None:
            grouped = grouped + self.window(bias, i, j).astype(grouped.dtype)
        return jnp.where(keep, grouped, -jnp.inf).reshape(result.shape), slope

    def ungroup(self, x: Float[Array, "B K grouped columns"]) -> Float[Array, "B K G rows columns"]:
        batch, heads, _, columns = x.shape
        return x.reshape(batch, heads, self.groups, self.rows, columns)

    def _cut_shape(self, batch: int) -> tuple[int, int, int, int]:
        return self.query_blocks, batch, self.key_heads, self.groups * self.rows

    def _window(self, x: Array, i: Array, j: Array) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        rows, columns = min(self.rows, x.shape[3]), min(self.columns, x.shape[4])
        zero = np.int32(0)
        start = (
            zero,
            zero,
            zero,
            i * self.rows if rows > 1 else zero,
            j * self.columns if columns > 1 else zero,
        )
        return start, (*x.shape[:3], rows, columns)


def _forward(flash: Flash, query: Array, source: Source) -> Statistics:
    dtype = accumulation_dtype(query.dtype)
    blocks = _Blocks.of(flash, query, source)
    queries, keys, values = blocks.cut_queries(query), blocks.cut_keys(source.key), blocks.cut_keys(source.value)
    bias, mask = blocks.cut_scores(source.bias), blocks.cut_scores(source.mask)

    def visit(carry: tuple[Array, Array, Array], i: Array, j: Array) -> tuple[Array, Array, Array]:
        """Online softmax: rescale what was summed so far to the new row maximum, then add this block."""
        maxima, sums, outputs = carry
        old_maximum = _at(maxima, i)
        block, _ = blocks.scores(blocks.scaled(_at(queries, i)), _at(keys, j), bias, mask, i, j)
        maximum = jnp.maximum(old_maximum, jnp.max(block, axis=-1))
        shift = jnp.where(maximum == -jnp.inf, 0, maximum)  # a row without keys so far: exp(-inf - 0) = 0
        weights = jnp.exp(block - shift[..., None])
        decay = jnp.exp(old_maximum - shift)
        added = blocks.product("bkrs,bksh->bkrh", weights, _at(values, j))
        return (
            _put(maxima, i, maximum),
            _put(sums, i, _at(sums, i) * decay + jnp.sum(weights, axis=-1)),
            _put(outputs, i, _at(outputs, i) * decay[..., None] + added),
        )

    start = (
        jnp.full(queries.shape[:-1], -jnp.inf, dtype),
        jnp.zeros(queries.shape[:-1], dtype),
        jnp.zeros(queries.shape, dtype),
    )
    maxima, sums, outputs = blocks.scan(visit, varying(start, queries))
    sums = jnp.where(sums == 0, 1, sums)  # a row without keys, whose maximum is still -inf
    output = blocks.join_queries(outputs / sums[..., None])
    return Statistics(output, blocks.join_rows(maxima), blocks.join_rows(jnp.log(sums)))


def _backward(
    flash: Flash, query: Array, source: Source, statistics: Statistics, d_output: Array, d_lse: Array | None
) -> Gradients:
    dtype = accumulation_dtype(query.dtype)
    blocks = _Blocks.of(flash, query, source)
    key, value, bias, mask = source[:4]
    queries, keys, values = blocks.cut_queries(query), blocks.cut_keys(key), blocks.cut_keys(value)
    d_outputs, outputs = blocks.cut_queries(d_output), blocks.cut_queries(statistics.output)
    maxima, log_sums = blocks.cut_rows(statistics.maximum, fill=jnp.inf), blocks.cut_rows(statistics.log_sum, fill=0)
    projection = jnp.sum(d_outputs.astype(dtype) * outputs.astype(dtype), axis=-1)
    if d_lse is not None:
        projection = projection - blocks.cut_rows(d_lse, fill=0)
    cut_bias, cut_mask = blocks.cut_scores(bias), blocks.cut_scores(mask)

    def visit(carry: tuple[Array, Array, Array, Array | None], i: Array, j: Array) -> Any:
        d_queries, d_keys, d_values, d_bias = carry
        block_query, block_key, d_block_output = blocks.scaled(_at(queries, i)), _at(keys, j), _at(d_outputs, i)
        block, slope = blocks.scores(block_query, block_key, cut_bias, cut_mask, i, j)
        weights = jnp.exp((block - _at(maxima, i)[..., None]) - _at(log_sums, i)[..., None])
        d_weights = blocks.product("bkrh,bksh->bkrs", d_block_output, _at(values, j))
        d_scores = weights * (d_weights - _at(projection, i)[..., None])
        if d_bias is not None:
            d_bias = blocks.add_to_window(d_bias, i, j, blocks.ungroup(d_scores))
        if slope is not None:
            d_scores = d_scores * slope
        return (
            _add(d_queries, i, flash.scale * blocks.product("bkrs,bksh->bkrh", d_scores, block_key)),
            _add(d_keys, j, blocks.rescaled(blocks.product("bkrs,bkrh->bksh", d_scores, block_query))),
            _add(d_values, j, blocks.product("bkrs,bkrh->bksh", weights, d_block_output)),
            d_bias,
        )

    start = (
        jnp.zeros(queries.shape, dtype),
        jnp.zeros(keys.shape, dtype),
        jnp.zeros(values.shape, dtype),
        None if cut_bias is None else jnp.zeros(cut_bias.shape, dtype),
    )
    d_queries, d_keys, d_values, d_bias = blocks.scan(visit, varying(start, queries))
    return Gradients(
        blocks.join_queries(d_queries).astype(query.dtype),
        blocks.join_keys(d_keys).astype(key.dtype),
        blocks.join_keys(d_values).astype(value.dtype),
        None if bias is None or d_bias is None else blocks.join_scores(d_bias, bias.shape).astype(bias.dtype),
    )


def _even_block(length: int, target: int) -> int:
    """Return the size that cuts ``length`` into blocks of at most ``target``, equal but for the last."""
    count = max(-(-length // target), 1)
    return max(-(-length // count), 1)


def _pad(x: Array, axis: int, length: int, fill: float = 0) -> Array:
    missing = length - x.shape[axis]
    if missing == 0:
        return x
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _at(x: Array, index: Array) -> Array:
    return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: Array, index: Array, block: Array) -> Array:
    return block[None] if x.shape[0] == 1 else jax.lax.dynamic_update_index_in_dim(x, block, index, 0)


def _add(x: Array, index: Array, block: Array) -> Array:
    return _put(x, index, _at(x, index) + block)


BACKENDS["xla"] = Backend(_forward, _backward, problem=lambda *_: None, unavailable=lambda _: None)
