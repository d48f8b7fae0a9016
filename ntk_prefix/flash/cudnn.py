"""cuDNN flash attention through JAX's own primitives; CUDA, bfloat16 and float16."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.flash.base import BACKENDS, Backend, Flash, Gradients, Source, Statistics, lse_gradients
from ntk_prefix.typing import Array


def _problem(flash: Flash, query: Array, source: Source) -> str | None:
    key, _, bias, mask, offset = source
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, got {query.dtype}: cast, or use implementation='xla'"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"cuDNN takes head dimensions that are multiples of 8 up to 256, got {query.shape[-1]}"
    if (bias is not None or mask is not None) and (query.shape[1] % 2 or key.shape[-3] % 2):
        return f"cuDNN takes a bias or mask over even lengths only, got T={query.shape[1]}, S={key.shape[-3]}"
    if key.shape[-3] == 0:
        return "cuDNN needs at least one key, got S=0"
    if offset is not None or flash.query_offset:
        return "cuDNN counts causality from 0, got a query_offset"
    if flash.logits_soft_cap is not None:
        return "cuDNN takes no soft cap, got logits_soft_cap: use implementation='xla'"
    if flash.window != (None, None):
        if flash.sees[0] is None or flash.sees[1] != 0:
            return f"cuDNN takes windows to the left only, (left, 0), got {flash.sees}: use implementation='xla'"
        if bias is not None or mask is not None:
            return "cuDNN takes a window without a bias and a mask only: use implementation='xla'"
        if query.shape[1] > key.shape[-3]:
            return (
                f"cuDNN takes a window over as many keys as queries at least, got T={query.shape[1]}, S={key.shape[-3]}"
            )
    return None


def _unavailable(query: Array) -> str | None:
    head_dim = query.shape[-1]
    capability = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "0.0")
    if not capability.replace(".", "").isdigit() or float(capability) < 8.0:  # ROCm says "gfx..."
        return f"cuDNN flash attention needs compute capability 8.0, got {capability}"
    if head_dim > 128 and float(capability) < 9.0:
        return f"cuDNN takes head dimensions above 128 from compute capability 9.0, got {capability}"
    missing = [name for name in _NAMES if not hasattr(_cudnn(), name)]
    if missing:
        return f"JAX {jax.__version__} has moved its cuDNN primitives with residuals: {missing} not found"
    return None


_NAMES = (
    "_dot_product_attention_fwd_p_wrapper",
    "_dot_product_attention_bwd_p_wrapper",
    "AttentionLayout",
    "MaskType",
)

_MASKED = {"bfloat16": -(2.0**41), "float16": -(2.0**15)}
"""What stands for minus infinity in a cuDNN bias: two infinities would be subtracted inside the kernel."""

_LARGE_BIAS = 4096.0
"""Largest bias of a row that cuDNN is given as it is: there ``lse``, one float32, is within 2^-12 of itself."""


def _cudnn() -> Any:
    """Return JAX's private module of cuDNN attention; no public one takes residuals back in."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


class _Call(NamedTuple):
    """What both primitives take, and by how much each row's bias was lowered for them."""

    operands: list[Array]
    parameters: dict[str, Any]
    shift: Array | None
    """[#B, #N, T], the large bias that a whole row shares; None if no bias was given."""


def _call(flash: Flash, query: Array, source: Source) -> _Call:
    """Return the call's operands: the unused ones as empty arrays, mask folded into the bias.

    cuDNN has one statistic, ``lse``, in float32. Probabilities do not change when all scores of a row do by the
    same number, so a row whose largest bias is large gets a bias without it; it goes into ``maximum``, and ``lse``
    keeps its digits.
    """
    key, _, bias, mask, _ = source
    unused = jnp.zeros(0, query.dtype)
    has_bias = bias is not None or mask is not None
    combined, shift = unused, None
    if has_bias:
        masked = _MASKED[query.dtype.name]
        lengths = (query.shape[1], key.shape[1])
        wide = jnp.zeros((1,) * 4, jnp.float32) if bias is None else bias.astype(jnp.float32)
        wide = wide if mask is None else jnp.where(mask, wide, -jnp.inf)
        wide = jnp.broadcast_to(wide, (*wide.shape[:2], *lengths))
        if bias is not None:
            if flash.is_causal:  # what a row does not see must not count as its largest
                wide = jnp.where(np.tri(*lengths, dtype=bool)[None, None], wide, -jnp.inf)
            largest = jnp.max(wide, axis=-1)
            large = jnp.isfinite(largest) & (jnp.abs(largest) > _LARGE_BIAS)
            shift = jnp.where(large, largest, 0)
            wide = wide - shift[..., None]
        combined = jnp.clip(wide, masked, -masked).astype(query.dtype)
    mask_type = _cudnn().MaskType.CAUSAL if flash.sees[1] == 0 else _cudnn().MaskType.NO_MASK
    parameters = dict(
        scale=float(flash.scale),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(has_bias, has_bias),
        mask_type=mask_type,
        layout=_cudnn().AttentionLayout.BTNH.value,
        sliding_window_length=None if flash.sees[0] is None else flash.sees[0] + 1,  # the query's own place counts
    )
    # bias, query lengths, key lengths, query offsets, key offsets, page table of keys, page table of values
    return _Call([combined, *[unused] * 6], parameters, shift)


def _forward(flash: Flash, query: Array, source: Source) -> Statistics:
    call = _call(flash, query, source)
    output, lse = _cudnn()._dot_product_attention_fwd_p_wrapper.bind(
        query, source.key, source.value, *call.operands, is_training=True, **call.parameters
    )
    if source.bias is None and source.mask is None:
        return Statistics(output, lse, jnp.zeros_like(lse))
    empty = lse < _MASKED[query.dtype.name] / 2
    output = jnp.where(empty.transpose(0, 2, 1)[..., None], 0, output)
    if call.shift is None:
        return Statistics(output, jnp.where(empty, -jnp.inf, lse), jnp.zeros_like(lse))
    # the larger of the two first, for whoever merges; rows with a small bias have no shift, and are as without it
    shifted = call.shift != 0
    maximum = jnp.where(empty, -jnp.inf, jnp.where(shifted, call.shift, lse))
    return Statistics(output, maximum, jnp.where(shifted & ~empty, lse, 0))


def _backward(
    flash: Flash, query: Array, source: Source, statistics: Statistics, d_output: Array, d_lse: Array | None
) -> Gradients:
    call = _call(flash, query, source)
    maximum = statistics.maximum if call.shift is None else statistics.maximum - call.shift
    # masked scores stay far below 0
    lse = jnp.where(statistics.maximum == jnp.inf, 0, maximum + statistics.log_sum)

    def run(value: Array, output: Array, d_output: Array) -> tuple[Array, ...]:
        results = _cudnn()._dot_product_attention_bwd_p_wrapper.bind(
            query, source.key, value, *call.operands, lse, output, d_output, **call.parameters
        )
        return tuple(results)

    d_query, d_key, d_value, *d_bias = run(source.value, statistics.output, d_output)
    if d_lse is not None:
        more_query, more_key, _, *more_bias = lse_gradients(run, source, query, d_lse)
        d_query, d_key = d_query + more_query, d_key + more_key
        d_bias = [x + y for x, y in zip(d_bias, more_bias, strict=True)]
    bias = source.bias
    if bias is None:
        return Gradients(d_query, d_key, d_value, None)
    repeated = tuple(axis for axis in range(4) if bias.shape[axis] != d_bias[0].shape[axis])
    return Gradients(d_query, d_key, d_value, jnp.sum(d_bias[0], repeated, keepdims=True).astype(bias.dtype))


BACKENDS["cudnn"] = Backend(_forward, _backward, _problem, _unavailable, platform="gpu")
