r"""Softmax attention that hands its statistics out, and takes them back in.

Flash attention has two halves. The forward returns the output ``o`` and, per row, the log of the softmax
denominator, ``lse = logsumexp(scores)``. The backward takes both back in, recomputes ``P = exp(scores -
lse)`` block by block, and never needs to know that ``o`` and ``lse`` came from these keys alone.
:mod:`ntk_prefix.attention` lives on that: it merges a prefix into ``o`` and ``lse`` and hands the *merged*
statistics to the ordinary backward, which then returns exactly the gradients of the merged attention.

``lse`` is carried as two numbers, the row's maximum ``M`` and ``log sum exp(scores - M)``. In a row masked by
the usual additive bias of -1e9 their sum is M to the last bit, and P would be S times too large.

Whose halves are offered, under one signature; a backend is a file that adds itself to ``BACKENDS``, and a line here. Where
none is named, the first that can run is taken:

=========  ==================================================================================================
``cudnn``  cuDNN flash attention through JAX's own primitives; CUDA, bfloat16 and float16
``splash`` JAX's splash attention, a Pallas kernel for TPU; bfloat16 and float32, no bias, masks of keys only
``tokamax`` kernels for Hopper, Blackwell and older GPUs, where it is installed and named; takes a soft cap
``xla``    jax.numpy, blockwise over queries and keys; any platform and float dtype, memory linear in T and S
=========  ==================================================================================================

Layouts are those of ``jax.nn.dot_product_attention``; row statistics are [B, N, T] in the accumulation dtype.
"""

from __future__ import annotations

from ntk_prefix.flash import cudnn, splash, tokamax, xla  # isort: skip
from ntk_prefix.flash.base import BACKENDS, Flash, Gradients, Source, Statistics

__all__ = ["BACKENDS", "Flash", "Gradients", "Source", "Statistics", "cudnn", "splash", "tokamax", "xla"]
