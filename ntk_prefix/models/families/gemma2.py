"""Gemma 2: norms around every map, soft caps of scores and logits, a window in every other layer, scaled embeddings.

Source: arXiv 2408.00118; Hugging Face's ``gemma2``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from ntk_prefix.models.backbone import Epsilon, Size
from ntk_prefix.models.llama import FULL, SLIDING, Llama, LlamaConfig
from ntk_prefix.models.rotary import Factor

__all__ = ["Gemma", "Gemma2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """Sizes of a Gemma 2; defaults are those of Hugging Face's."""

    hidden_act: str = "gelu_pytorch_tanh"
    num_key_value_heads: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 4
    head_dim: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 256
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 8192
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = True
    sliding_window: Size | None = 4096
    query_pre_attn_scalar: Factor | None = 256
    attn_logit_softcapping: Factor | None = 50.0
    final_logit_softcapping: Factor | None = 30.0
    update_norms: bool = True
    norm_offset: float = 1.0
    scale_embeddings: bool = True

    words: ClassVar[tuple[str, ...]] = (
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "norm_offset",
    )
    """Of a config.json, beyond a Llama's; ``norm_offset`` is of a GGUF, which has added it already."""

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields."""
        own = {name: config[name] for name in cls.words if name in config}
        if own.get("layer_types", ()) is None:
            del own["layer_types"]
        # hidden_act is what older files say beside it, and nothing follows from that
        return super().translated(config) | own | {"hidden_act": config.get("hidden_activation")}

    def pattern(self) -> tuple[str, ...]:
        """Return a window in every other layer, from the first."""
        return tuple(SLIDING if i % 2 == 0 else FULL for i in range(self.num_hidden_layers))


class Gemma(Llama):
    """A Gemma 2 or 3 decoder; all but the names of its norms in files is a Llama's."""

    hugging_face_names: ClassVar[dict[str, str]] = {
        **Llama.hugging_face_names,
        "layers.{i}.attention_update_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "layers.{i}.mlp_update_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
