"""Qwen3: a Llama with norms of each head's queries and keys; upper layers may see a window.

Source: arXiv 2505.09388; Hugging Face's ``qwen3``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ntk_prefix.models.families.qwen2 import upper_windows
from ntk_prefix.models.llama import LlamaConfig

__all__ = ["Qwen3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """Sizes of a Qwen3; defaults are those of Hugging Face's."""

    head_dim: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 128
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 32768
    qk_norm: bool = True

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields."""
        return super().translated(config) | upper_windows(config)
