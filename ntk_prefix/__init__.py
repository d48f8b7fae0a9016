"""The neural tangent kernel of infinitely long prefixes in attention, and NTK-Attention itself.

>>> import ntk_prefix as npx
>>> model = npx.TiedPrefixModel(d=8, m=4096, rngs=nnx.Rngs(0))
>>> npx.kernels.prefix_ntk(model, x)        # the kernel of this prefix          [n, d, n, d]
>>> npx.kernels.limit_ntk(x)                # the kernel of an infinite one      [n, d, n, d]
>>> npx.ntk_attention(query, key, value, z, k)      # attention with a prefix of any length, in two small arrays

Classes have a help of their own, ``help(npx.PrefixState)``:

- states: ``PrefixState``, ``FitOptions``, ``FitReport``, ``LowRank``; feature maps: ``FeatureMap``;
- one-layer models: ``TiedPrefixModel``, ``FixedValuePrefixModel``, ``PrefixAttentionLayer``, ``RandomPrefix``.
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from ntk_prefix.attention import LowRank as LowRank
from ntk_prefix.attention import attention_with_lse, merge_attention, ntk_attention, prefix_attention, softmax_attention
from ntk_prefix.feature_maps import FeatureMap as FeatureMap
from ntk_prefix.feature_maps import feature_map
from ntk_prefix.one_layer import FixedValuePrefixModel as FixedValuePrefixModel
from ntk_prefix.one_layer import PrefixAttentionLayer as PrefixAttentionLayer
from ntk_prefix.one_layer import TiedPrefixModel as TiedPrefixModel
from ntk_prefix.polynomial import polynomial_attention, polynomial_degree
from ntk_prefix.prefix_fit import FitOptions as FitOptions
from ntk_prefix.prefix_fit import FitReport as FitReport
from ntk_prefix.prefix_state import PrefixState as PrefixState
from ntk_prefix.random_prefix import RandomPrefix as RandomPrefix

if TYPE_CHECKING:
    from ntk_prefix import bounds, certificate, kernels, models, peft, prompting, training

# classes are public too, but not here: help() prints all that each of them inherits, hundreds of lines
__all__ = [
    "attention_with_lse",
    "bounds",
    "certificate",
    "feature_map",
    "kernels",
    "merge_attention",
    "models",
    "ntk_attention",
    "peft",
    "polynomial_attention",
    "polynomial_degree",
    "prefix_attention",
    "prompting",
    "softmax_attention",
    "training",
]

LAZY = frozenset({"bounds", "certificate", "kernels", "models", "peft", "prompting", "training"})
"""Parts that are imported when they are first named: who wants attention alone does not wait for the others."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
