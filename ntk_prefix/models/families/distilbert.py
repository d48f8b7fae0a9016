"""DistilBERT: a BERT without token types.

Source: arXiv 1910.01108; the layout and the names are those of Hugging Face's ``distilbert``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from ntk_prefix.models.backbone import known_fields
from ntk_prefix.models.bert import Bert, BertConfig

__all__ = ["DistilBert", "DistilBertConfig"]

_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """Sizes of a DistilBERT, under the names that :class:`BertConfig` has for them."""

    type_vocab_size: Annotated[int, msgspec.Meta(ge=0, le=0)] = 0

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> DistilBertConfig:
        """Take what is known here from a config.json; sinusoidal positions are in the file like others.

        Raises:
            UsageError: a value is missing or of a wrong type.
        """
        return cls(**known_fields(cls, {**config, **{ours: config.get(name) for name, ours in _NAMES.items()}}))


class DistilBert(Bert):
    """A DistilBERT encoder: ids [B, T] -> hidden states [B, T, D]; arguments are those of :class:`Bert`."""

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    hugging_face_names: ClassVar[dict[str, str]] = {
        "embeddings.tokens": "embeddings.word_embeddings",
        "embeddings.positions": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.{i}.attention.query": "transformer.layer.{i}.attention.q_lin",
        "layers.{i}.attention.key": "transformer.layer.{i}.attention.k_lin",
        "layers.{i}.attention.value": "transformer.layer.{i}.attention.v_lin",
        "layers.{i}.attention.out": "transformer.layer.{i}.attention.out_lin",
        "layers.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
        "layers.{i}.mlp.up": "transformer.layer.{i}.ffn.lin1",
        "layers.{i}.mlp.down": "transformer.layer.{i}.ffn.lin2",
        "layers.{i}.mlp_norm": "transformer.layer.{i}.output_layer_norm",
    }
    hugging_face_prefix: ClassVar[str] = "distilbert."
    hugging_face_ignored: ClassVar[str] = (
        r"(pre_classifier|classifier|qa_outputs|vocab_transform|vocab_layer_norm|vocab_projector)\.(weight|bias)$"
    )
    hugging_face_transform: ClassVar[dict[str, str]] = {"dense": "pre_classifier"}
    head_activation: ClassVar[str] = "relu"

    config: DistilBertConfig
