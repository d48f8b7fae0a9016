"""Gemma 3, text: a Gemma 2 with norms of queries and keys in the place of soft caps, five windows to one full layer.

Layers with a window turn positions by another base.

Source: arXiv 2503.19786; Hugging Face's ``gemma3_text``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import expected
from ntk_prefix.models.backbone import Size
from ntk_prefix.models.families.gemma2 import Gemma2Config
from ntk_prefix.models.llama import FULL, SLIDING
from ntk_prefix.models.rotary import Factor, Rope, rope_fields

__all__ = ["Gemma3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """Sizes of a Gemma 3; defaults are those of Hugging Face's."""

    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 131072
    rope_theta: Factor = 1e6
    local_rope_theta: Factor | None = 1e4
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None
    qk_norm: bool = True

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields.

        Raises:
            UsageError: scaled rotary positions in layers with a window, or a pattern that is none.
        """
        fields = super().translated(config)
        settings = checked(config.get("rope_parameters") or {}, dict[str, Any], "rope_parameters")
        local = Rope(head_dim=2, theta=config.get("rope_local_base_freq") or 1e4)
        if SLIDING in settings or FULL in settings:  # transformers 5; before, the words stood alone
            fields["rope_parameters"] = settings.get(FULL) or {}
            local = rope_fields(settings.get(SLIDING), local, 1)
            if local != Rope(head_dim=2, theta=local.theta):
                raise expected("rope_parameters", f"rope_type 'default' for {SLIDING}", settings[SLIDING])
        fields["local_rope_theta"] = local.theta
        words = ("sliding_window_pattern", "_sliding_window_pattern")
        every = next((x for name in words if (x := checked(config.get(name), Size | None, name))), 6)
        layers = config.get("num_hidden_layers")
        if fields.get("layer_types") is None and isinstance(layers, int):
            fields["layer_types"] = [SLIDING if (i + 1) % every else FULL for i in range(min(layers, 1000))]
        return fields

    def pattern(self) -> tuple[str, ...]:
        """Return five windows to one full layer."""
        return tuple(SLIDING if (i + 1) % 6 else FULL for i in range(self.num_hidden_layers))
