"""The neural tangent kernel of infinitely long prefixes in attention, and NTK-Attention itself.

>>> import ntk_prefix as npx
>>> model = npx.TiedPrefixModel(d=8, m=4096, rngs=nnx.Rngs(0))
>>> npx.kernels.prefix_ntk(model, x)        # the kernel of this prefix          [n, d, n, d]
>>> npx.kernels.limit_ntk(x)                # the kernel of an infinite one      [n, d, n, d]
"""

from ntk_prefix import bounds, kernels, training
from ntk_prefix.one_layer import FixedValuePrefixModel, PrefixAttentionLayer, RandomPrefix, TiedPrefixModel

__all__ = [
    "FixedValuePrefixModel",
    "PrefixAttentionLayer",
    "RandomPrefix",
    "TiedPrefixModel",
    "bounds",
    "kernels",
    "training",
]
