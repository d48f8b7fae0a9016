"""SmolLM3: a Llama in which every fourth layer leaves positions alone; those may see a window.

Source: arXiv 2501.18795 (layers without positions); Hugging Face's ``smollm3``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ntk_prefix.artifacts import checked
from ntk_prefix.models.backbone import Size
from ntk_prefix.models.llama import FULL, SLIDING, LlamaConfig
from ntk_prefix.models.rotary import Factor

__all__ = ["SmolLM3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LlamaConfig):
    """Sizes of a SmolLM3; defaults are those of Hugging Face's."""

    num_key_value_heads: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 4
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 32768
    rope_theta: Factor = 2e6
    tie_word_embeddings: bool = True

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields.

        Raises:
            UsageError: a word of a wrong type or out of its bounds.
        """
        layers, turned = config.get("num_hidden_layers"), config.get("no_rope_layers")
        every = checked(config.get("no_rope_layer_interval"), Size | None, "no_rope_layer_interval") or 4
        if turned is None and isinstance(layers, int):
            turned = [int((i + 1) % every != 0) for i in range(min(layers, 1000))]
        used = checked(config.get("use_sliding_window"), bool | None, "use_sliding_window")
        window = config.get("sliding_window") if used else None
        types = config.get("layer_types")
        if types is None and window is not None and isinstance(turned, list):
            types = [FULL if turns else SLIDING for turns in turned]
        own = {"no_rope_layers": turned, "layer_types": types}
        own = {name: value for name, value in own.items() if value is not None}
        return super().translated(config) | own | {"sliding_window": window}
