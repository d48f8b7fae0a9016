"""JAX's splash attention: a Pallas kernel for TPU; bfloat16 and float32, causal or not, padding masks, grouped heads.

The kernel's public function hides its log-sum-exp from autodiff, so its two halves are called here, and what lies between
them is ours: rows of a batch, padding to whole blocks, and, on a mesh, the part of each device. Of grouped queries no key
is repeated.

Numerics: scores are made of ``scale * query`` rounded to the query's dtype (exact for a head of 16, 64 or 256). There is one
statistic, the log-sum-exp in float32: of scores of size s, probabilities are within ``s 2^-23`` of themselves, 1e-3 at 1e4.
Without a bias nothing is larger than that in practice, which is what the two numbers of a statistic are for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import UsageError
from ntk_prefix.flash.base import BACKENDS, Backend, Flash, Gradients, Source, Statistics
from ntk_prefix.flash.mesh import Layout
from ntk_prefix.typing import Array

LANES = 128
BLOCK = 512
"""Queries and keys of a block, at most: a multiple of the lanes of a TPU."""

ROWS_BYTES = 2**25
"""What the kernel's log-sum-exp may take at a time: it writes each number 128 times. Rows of a batch beyond that wait."""

INTERPRET = False
"""Whether kernels are interpreted, operation by operation, on whatever there is: for tests."""

_NAMES = ("_splash_attention_forward", "_splash_attention_bwd_dkv", "_splash_attention_bwd_dq", "make_splash_mha")


def _problem(flash: Flash, query: Array, source: Source) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash takes bfloat16 and float32, got {query.dtype}: cast, or use implementation='xla'"
    if source.bias is not None:
        return "splash takes no bias: use implementation='xla'"
    if source.mask is not None and source.mask.shape[1:3] != (1, 1):
        return f"splash takes masks of keys, [B, 1, 1, S], got {source.mask.shape}: use implementation='xla'"
    if source.query_offset is not None or flash.query_offset < 0:
        return "splash takes a query_offset >= 0 that is known before the program runs: use implementation='xla'"
    queries, keys, left = query.shape[1], source.key.shape[-3], flash.sees[0]
    if keys == 0 or queries == 0:
        return f"splash needs a query and a key, got T={queries}, S={keys}"
    if left is not None and flash.query_offset - left >= keys:
        return "splash needs a key in the window of a query, and all are before it: use implementation='xla'"
    return None


def _unavailable(query: Array) -> str | None:
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "splash has to know the mesh of several devices, and none is set: use ntk_prefix.sharding.on, or jax.set_mesh"
    try:
        _library()
    except UsageError as error:
        return str(error)
    return None


def _library() -> tuple[Any, Any]:
    """Return JAX's modules of the kernel and of its masks; no public function takes residuals back in.

    Raises:
        UsageError: this JAX has them not, or not as they were.
    """
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    except ImportError as error:
        raise UsageError(f"JAX {jax.__version__} has no splash attention ({error}): use implementation='xla'") from None
    if missing := [name for name in _NAMES if not hasattr(kernel, name)]:
        raise UsageError(f"JAX {jax.__version__} has moved splash attention's halves: {missing} not found, use 'xla'")
    return kernel, masks


# ------------------------------------------------------------------------------------ one row of a batch


def _block(length: int) -> int:
    """Return the size of even blocks, a multiple of the lanes, that cover a length with the least padding."""
    lanes = -(-length // LANES)
    blocks = -(-lanes // (BLOCK // LANES))
    return -(-lanes // blocks) * LANES


@functools.lru_cache(maxsize=64)
def _kernel(flash: Flash, heads: int, queries: int, keys: int) -> Any:
    """Return what the kernel wants to know beforehand, for lengths that blocks divide: which blocks meet, and their sizes."""
    kernel, masks = _library()
    shape = (queries, keys)
    if flash.window != (None, None):
        mask = masks.LocalMask(shape, window_size=flash.sees, offset=flash.query_offset)
    else:
        mask = masks.CausalMask(shape, offset=flash.query_offset) if flash.is_causal else masks.FullMask(shape)
    rows, columns = _block(queries), _block(keys)
    sizes = kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    with jax.ensure_compile_time_eval():  # numbers, whatever is being traced
        made = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        return jax.tree.map(np.asarray, made)


def _forward_row(
    flash: Flash, lengths: tuple[int, int], query: Array, key: Array, value: Array, seen: Array | None
) -> tuple[Array, Array]:
    """[T, N, H], [S, K, H] twice and [S] -> [T, N, H] and [N, T]."""
    kernel, _ = _library()
    made = _kernel(flash, query.shape[1], *lengths)
    output, (lse,) = kernel._splash_attention_forward(
        made.fwd_mask_info,
        *_operands(flash, lengths, query, key, value),
        _segments(kernel, flash, lengths, query.shape[0], key.shape[0], seen),
        None,
        save_residuals=True,
        attn_logits_soft_cap=flash.logits_soft_cap,
        interpret=INTERPRET,
        **{name: made.kwargs[name] for name in ("mask_value", "is_mqa", "block_sizes", "mask_function")},
        residual_checkpoint_name=None,
    )
    length = query.shape[0]
    return output.transpose(1, 0, 2)[:length], lse[:, :length]


def _backward_row(
    flash: Flash,
    lengths: tuple[int, int],
    query: Array,
    key: Array,
    value: Array,
    seen: Array | None,
    lse: Array,
    projection: Array,
    d_output: Array,
) -> tuple[Array, Array, Array]:
    """Beside what :func:`_forward_row` takes, [N, T] twice and [T, N, H]; return gradients of query, key and value."""
    kernel, _ = _library()
    made = _kernel(flash, query.shape[1], *lengths)
    sizes = made.kwargs["block_sizes"]
    segments = _segments(kernel, flash, lengths, query.shape[0], key.shape[0], seen)
    rows = [(0, 0), (0, lengths[0] - query.shape[0])]
    operands = (
        *_operands(flash, lengths, query, key, value),
        segments,
        None,
        jnp.pad(lse, rows, constant_values=np.float32(np.inf)),
        _heads_first(d_output, lengths[0]),
        jnp.pad(projection, rows),
    )
    common = dict(
        is_mqa=False,
        mask_value=made.kwargs["mask_value"],
        attn_logits_soft_cap=flash.logits_soft_cap,
        q_layout=sizes.q_layout,
        k_layout=sizes.k_layout,
        v_layout=sizes.v_layout,
        mask_function=made.kwargs["mask_function"],
        interpret=INTERPRET,
    )
    _, d_key, d_value = kernel._splash_attention_bwd_dkv(
        *operands,
        bq=sizes.block_q_dkv,
        bkv=sizes.block_kv_dkv,
        bkv_compute=sizes.block_kv_dkv_compute,
        mask_info=made.dkv_mask_info,
        use_fused_bwd_kernel=False,
        **common,
    )
    d_query = kernel._splash_attention_bwd_dq(
        *operands, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=made.dq_mask_info, **common
    )
    d_query = (d_query * flash.scale).astype(query.dtype)
    queries, keys = query.shape[0], key.shape[0]
    return tuple(x.transpose(1, 0, 2)[:n] for x, n in ((d_query, queries), (d_key, keys), (d_value, keys)))


def _operands(flash: Flash, lengths: tuple[int, int], query: Array, key: Array, value: Array) -> tuple[Array, ...]:
    scaled = (query * flash.scale).astype(query.dtype)
    return _heads_first(scaled, lengths[0]), _heads_first(key, lengths[1]), _heads_first(value, lengths[1])


def _heads_first(x: Array, length: int) -> Array:
    """[T, N, H] -> [N, length, H], zeros at the end."""
    return jnp.pad(x, [(0, length - x.shape[0]), (0, 0), (0, 0)]).transpose(1, 0, 2)


def _segments(kernel: Any, flash: Flash, lengths: tuple[int, int], queries: int, keys: int, seen: Array | None) -> Any:
    """Return segments, by which queries, all of segment 1, see keys of the same: those a mask leaves, not the padding."""
    right = flash.sees[1]
    hidden_anyway = right is not None and queries + flash.query_offset + right <= keys
    if seen is None and (lengths[1] == keys or hidden_anyway):
        return None
    seen = jnp.ones(keys, bool) if seen is None else seen
    of_keys = jnp.pad(seen.astype(jnp.int32), (0, lengths[1] - keys))
    return kernel.SegmentIds(q=jnp.ones(lengths[0], jnp.int32), kv=of_keys)


# ------------------------------------------------------------------------------------------ all of them


def _by_rows(function: Callable[..., Any], *arrays: Array | None) -> Any:
    """Apply a function of one row of a batch to all, so many at a time as :data:`ROWS_BYTES` allows; None stays None."""
    query = arrays[0]
    assert query is not None
    batch, length, heads, _ = query.shape
    affordable = max(ROWS_BYTES // max(heads * length * LANES * 4, 1), 1)
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= affordable)
    if rows == batch:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda xs: function(*xs), arrays, batch_size=rows)


def _seen(source: Source) -> Array | None:
    """Return which keys a row may see, [B, S]."""
    if source.mask is None:
        return None
    return jnp.broadcast_to(source.mask[:, 0, 0], source.key.shape[:2])


def _lengths(query: Array, key: Array) -> tuple[int, int]:
    """Return the lengths of this device's queries and keys, padded to whole blocks."""
    queries, keys = query.shape[1], key.shape[1]
    return -(-queries // _block(queries)) * _block(queries), -(-keys // _block(keys)) * _block(keys)


def _forward(flash: Flash, query: Array, source: Source) -> Statistics:
    def run(query: Array, key: Array, value: Array, seen: Array | None) -> tuple[Array, Array]:
        with jax.enable_x64(False):  # the kernel counts in 32 bits
            return _by_rows(functools.partial(_forward_row, flash, _lengths(query, key)), query, key, value, seen)

    arguments = (query, source.key, source.value, _seen(source))
    output, lse = Layout(flash, query, source.key).apply(run, "qkkm", "qs", *arguments)
    if source.mask is None and flash.window == (None, None):
        return Statistics(output, lse, jnp.zeros_like(lse))
    empty = lse < np.finfo(np.float32).min / 4  # the mean of what is masked, at the kernel's own "minus infinity"
    output = jnp.where(empty.transpose(0, 2, 1)[..., None], 0, output)
    return Statistics(output, jnp.where(empty, -jnp.inf, lse), jnp.zeros_like(lse))


def _backward(
    flash: Flash, query: Array, source: Source, statistics: Statistics, d_output: Array, d_lse: Array | None
) -> Gradients:
    layout = Layout(flash, query, source.key)

    def run(
        query: Array, key: Array, value: Array, seen: Array | None, lse: Array, projection: Array, d_output: Array
    ) -> tuple[Array, ...]:
        row = functools.partial(_backward_row, flash, _lengths(query, key))
        with jax.enable_x64(False):
            d_query, d_key, d_value = _by_rows(row, query, key, value, seen, lse, projection, d_output)
        if layout.queries is not None:
            d_key, d_value = (jax.lax.psum(x, layout.queries) for x in (d_key, d_value))
        return d_query, d_key, d_value

    projection = jnp.einsum("btnh,btnh->bnt", d_output, statistics.output, preferred_element_type=jnp.float32)
    projection = projection if d_lse is None else projection - d_lse
    arguments = (query, source.key, source.value, _seen(source), statistics.lse, projection, d_output)
    d_query, d_key, d_value = layout.apply(run, "qkkmssq", "qkk", *arguments)
    return Gradients(d_query, d_key, d_value, None)


BACKENDS["splash"] = Backend(_forward, _backward, _problem, _unavailable, platform="tpu")
