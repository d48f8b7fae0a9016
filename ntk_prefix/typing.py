"""The axis letters, written once.

Every array in this package is annotated with jaxtyping. The letters are those of ``jax.nn``:

======  =====================================  ======  ====================================
letter  axis                                   letter  axis
======  =====================================  ======  ====================================
``B``   batch                                  ``H``   head dimension
``T``   query length                           ``M``   prefix length of a real layer
``S``   key and value length                   ``R``   dimension of a feature map
``N``   query heads                            ``D``   features of a transformer
``K``   key-value heads, N % K == 0            ``n``   inputs of the stylized model
``G``   N // K                                 ``d``   input and output dimension there
``o``   outputs of the fixed-value model       ``m``   prefix tokens there
``J``   heads of a state, N % J == 0
======  =====================================  ======  ====================================

The annotations are documentation everywhere and are *executed* only by the tests, through jaxtyping's import hook
(``--jaxtyping-packages`` in pyproject.toml).
"""

from __future__ import annotations

from jax import Array
from jaxtyping import Bool, Float, Int, Key

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Inputs",
    "Int",
    "Kernel",
    "KeyArray",
    "KeyArrays",
    "OtherInputs",
    "Signs",
    "Weights",
]

Inputs = Float[Array, "n d"]
"""Rows are inputs of the stylized model; the theory wants ``|x_i| <= 1``."""

OtherInputs = Float[Array, "_ d"]
"""A second set of inputs, of the same width but with any number of rows."""

Weights = Float[Array, "m d"]
"""One row per prefix token: ``w_r``."""

Signs = Float[Array, "m o"]
"""Fixed signs ``a`` in {-1, +1}: one column an output of the fixed-value model, one column in all of the tied one."""

Kernel = Float[Array, "n1 d1 n2 d2"]
"""Every kernel of this package: ``[n1, d, n2, d]``, so ``kernel.reshape(n1 * d, n2 * d)`` is the Gram matrix."""

KeyArray = Key[Array, ""]
"""One ``jax.random.key``."""

KeyArrays = Key[Array, "_"]
"""Several of them, one for each row."""
