"""Mistral: a Llama whose layers see a window of tokens.

Source: arXiv 2310.06825; Hugging Face's ``mistral``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import expected
from ntk_prefix.models.backbone import Size
from ntk_prefix.models.llama import FULL, LlamaConfig

__all__ = ["MistralConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Sizes of a Mistral; defaults are those of Hugging Face's."""

    num_key_value_heads: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 8
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 4096 * 32
    sliding_window: Size | None = 4096

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields.

        Raises:
            UsageError: layers without a window beside others, which is another architecture.
        """
        if (
            FULL in checked(config.get("layer_types") or (), tuple[str, ...], "layer_types")
            and config.get("sliding_window") is not None
        ):
            raise expected(
                "layer_types", "a window in all layers, as Mistral has", "'full_attention' in some (Ministral)"
            )
        own = {name: config[name] for name in ("sliding_window",) if name in config}
        return super().translated(config) | own
