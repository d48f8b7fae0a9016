"""The neural tangent kernel of infinitely long prefixes in attention, and NTK-Attention itself.

>>> import ntk_prefix as npx
>>> model = npx.TiedPrefixModel(d=8, m=4096, rngs=nnx.Rngs(0))
>>> npx.kernels.prefix_ntk(model, x)        # the kernel of this prefix          [n, d, n, d]
>>> npx.kernels.limit_ntk(x)                # the kernel of an infinite one      [n, d, n, d]
>>> npx.ntk_attention(query, key, value, z, k)      # attention with a prefix of any length, in two small arrays
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from ntk_prefix.attention import (
    LowRank,
    attention_with_lse,
    merge_attention,
    ntk_attention,
    prefix_attention,
    softmax_attention,
)
from ntk_prefix.feature_maps import FeatureMap, feature_map
from ntk_prefix.one_layer import FixedValuePrefixModel, PrefixAttentionLayer, TiedPrefixModel
from ntk_prefix.polynomial import polynomial_attention, polynomial_degree
from ntk_prefix.prefix_fit import FitOptions, FitReport
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.random_prefix import RandomPrefix

if TYPE_CHECKING:
    from ntk_prefix import bounds, certificate, kernels, models, peft, prompting, training

__all__ = [
    "FeatureMap",
    "FitOptions",
    "FitReport",
    "FixedValuePrefixModel",
    "LowRank",
    "PrefixAttentionLayer",
    "PrefixState",
    "RandomPrefix",
    "TiedPrefixModel",
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
