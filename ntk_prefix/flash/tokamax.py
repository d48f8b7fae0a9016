"""tokamax's kernels for GPUs, Mosaic (Hopper, Blackwell) and Triton; it wants Python 3.12 and JAX 0.11.1, and is optional.

Its operators return the residuals that its own backward takes, a maximum and a denominator, so both numbers of our statistics
go in and out. It is taken where it is named and nowhere else: on an H200 its Mosaic kernels were as fast as cuDNN forward and
14 % slower with the backward, and were compared with float64 for causal attention, grouped heads, bias and mask in bfloat16.
Windows, soft caps and Triton's kernels have run as its own plain XLA on a CPU, which has their arguments and residuals.

Numerics: the kernels'; a cotangent of the log-sum-exp is rounded to the query's dtype, and costs one more backward.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import MissingPackageError, UsageError
from ntk_prefix.flash.base import BACKENDS, Backend, Flash, Gradients, Source, Statistics, lse_gradients
from ntk_prefix.flash.mesh import Layout
from ntk_prefix.typing import Array

KERNELS = ("mosaic_gpu", "triton")
"""Of tokamax, the one to be preferred first."""

_EMPTY = float(np.finfo(np.float32).min) / 2
"""Below it is the maximum of a row whose keys are all masked: the kernels mask with float32's lowest number."""


def _problem(flash: Flash, query: Array, source: Source) -> str | None:
    if source.query_offset is not None:
        return "tokamax takes a query_offset that is known before the program runs: use implementation='xla'"
    if flash.sees[1] == 0 and flash.query_offset < 0:
        return f"tokamax takes a query_offset >= 0, got {flash.query_offset}: use implementation='xla'"
    if flash.sees != (None, None) and flash.sees[1] != 0:
        return f"tokamax takes windows to the left only, (left, 0), got {flash.sees}: use implementation='xla'"
    if flash.logits_soft_cap is not None and source.bias is not None:
        return "tokamax caps scores with their bias, and here they are capped before it: use implementation='xla'"
    if source.key.shape[-3] == 0 or query.shape[1] == 0:
        return f"tokamax needs a query and a key, got T={query.shape[1]}, S={source.key.shape[-3]}"
    return None


def _unavailable(query: Array) -> str | None:
    try:
        _operator()
    except (MissingPackageError, UsageError) as error:
        return str(error)
    return None


def _operator() -> Any:
    """Return tokamax's attention, in the first of :data:`KERNELS` that this machine can run.

    Raises:
        MissingPackageError: tokamax is not installed.
        UsageError: none of the kernels runs here.
    """
    try:
        from tokamax._src.ops.attention import api
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{error.name}: expected this package, got none of that name. Python 3.12, JAX 0.11.1, and: pip install tokamax"
        ) from None
    device = jax.devices()[0]
    for name in KERNELS:
        operator = api.IMPLEMENTATIONS.get(name)
        if operator is not None and operator.supported_on(device):
            return operator
    raise UsageError(f"tokamax's kernels {KERNELS} do not run on {device.device_kind}: use implementation='xla'")


def _options(flash: Flash, bias: Array | None, mask: Array | None) -> dict[str, Any]:
    from tokamax._src.ops.attention import base

    left, right = flash.sees
    # the query's own place counts
    size = None if left is None else left + 1
    causal = base.CausalMask(offset=flash.query_offset, window_size=size) if right == 0 else None
    options = {"logits_scale": flash.scale, "logits_soft_cap": flash.logits_soft_cap}
    return {**options, "bias": bias, "mask": base.Mask(mask, causal_mask=causal)}


def _forward(flash: Flash, query: Array, source: Source) -> Statistics:
    operator = _operator()

    def run(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None) -> tuple[Array, ...]:
        options = _options(flash, bias, mask)
        with jax.numpy_rank_promotion("allow"):  # it counts on that
            output, (maximum, denominator) = operator(query, key, value, **options, return_residuals=True)
        return output, maximum, denominator

    arguments = (query, *source[:4])
    output, maximum, denominator = Layout(flash, query, source.key).apply(run, "qkkbb", "qss", *arguments)
    empty = (maximum < _EMPTY) | (denominator == 0)
    return Statistics(
        jnp.where(empty.transpose(0, 2, 1)[..., None], 0, output),
        jnp.where(empty, -jnp.inf, maximum),
        jnp.log(jnp.where(empty, 1, denominator)),
    )


def _backward(
    flash: Flash, query: Array, source: Source, statistics: Statistics, d_output: Array, d_lse: Array | None
) -> Gradients:
    operator, layout = _operator(), Layout(flash, query, source.key)
    if layout.mesh is not None and source.bias is not None:
        raise UsageError("tokamax takes no bias that is trained on a mesh: use implementation='xla'")
    # of a row that is switched off nothing may come back, whatever the library makes of a row that is masked
    off = statistics.maximum == jnp.inf
    maximum = jnp.where(off, 0, statistics.maximum)
    d_output = jnp.where(off.transpose(0, 2, 1)[..., None], 0, d_output)

    def run(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        mask: Array | None,
        maximum: Array,
        denominator: Array,
        output: Array,
        d_output: Array,
    ) -> tuple[Array, ...]:
        bound = operator.bind(query, key, value, **_options(flash, bias, mask))
        options = {name: x for name, x in bound.kwargs.items() if name != "return_residuals"}
        with jax.numpy_rank_promotion("allow"):
            grads = operator.vjp((maximum, denominator), output, d_output, *bound.args, **options)
        sums = grads["k"], grads["v"]
        if layout.queries is not None:
            sums = jax.lax.psum(sums, layout.queries)
        return grads["q"], *sums, *([] if bias is None else [grads["bias"]])

    def call(value: Array, output: Array, d_output: Array) -> tuple[Array, ...]:
        arguments = (query, source.key, value, source.bias, source.mask, maximum, jnp.exp(statistics.log_sum))
        results = "qkk" + ("" if source.bias is None else "b")
        return tuple(layout.apply(run, "qkkbbssqq", results, *arguments, output, d_output))

    d_query, d_key, d_value, *d_bias = call(source.value, statistics.output, d_output)
    if d_lse is not None:
        more_query, more_key, _, *more_bias = lse_gradients(call, source, query, d_lse)
        d_query, d_key = d_query + more_query, d_key + more_key
        d_bias = [x + y for x, y in zip(d_bias, more_bias, strict=True)]
    return Gradients(d_query, d_key, d_value, None if source.bias is None else d_bias[0].reshape(source.bias.shape))


BACKENDS["tokamax"] = Backend(
    _forward, _backward, _problem, _unavailable, platform="gpu", unproven="tokamax's kernels run where they are named"
)
