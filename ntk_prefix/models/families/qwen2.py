"""Qwen2 and Qwen2.5: a Llama with biases of queries, keys and values; upper layers may see a window.

Source: arXiv 2407.10671; Hugging Face's ``qwen2``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ntk_prefix.artifacts import checked
from ntk_prefix.models.llama import FULL, SLIDING, LlamaConfig

__all__ = ["Qwen2Config", "upper_windows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Sizes of a Qwen2; defaults are those of Hugging Face's."""

    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 32768
    qkv_bias: bool | None = True

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields."""
        fields = super().translated(config) | upper_windows(config)
        fields.pop("attention_bias", None)  # of queries, keys and values always, of the output never
        return fields


_WORDS = (("use_sliding_window", bool), ("max_window_layers", int))


def upper_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the windows of Qwen: none without ``use_sliding_window``, else from layer ``max_window_layers`` on.

    Raises:
        UsageError: a word of a wrong type.
    """
    used, below = (checked(config.get(name), kind | None, name) for name, kind in _WORDS)
    window = config.get("sliding_window", 4096) if used else None
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if types is None and window is not None and isinstance(layers, int):
        first = 28 if below is None else below
        types = [SLIDING if i >= first else FULL for i in range(min(layers, 1000))]
    return {"sliding_window": window, **({} if types is None else {"layer_types": types})}
