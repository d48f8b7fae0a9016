"""RoBERTa and XLM-R: a BERT whose positions count tokens that are not padding, from behind the padding's own.

Source: arXiv 1907.11692 and 1911.02116; the layout and the names are those of Hugging Face's ``roberta``.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
import msgspec

from ntk_prefix.checks import expected
from ntk_prefix.models.bert import Bert, BertConfig
from ntk_prefix.typing import Array, Int

__all__ = ["Roberta", "RobertaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa; the names and defaults are those of Hugging Face's config.json."""

    pad_token_id: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id + 1 >= self.max_position_embeddings:
            least = f"less than the {self.max_position_embeddings} positions, of which it is one"
            raise expected("pad_token_id", least, self.pad_token_id)

    @property
    def first_position(self) -> int:
        """The position of the first token: the padding's is its id, and no other lies before it."""
        return self.pad_token_id + 1


class Roberta(Bert):
    """A RoBERTa encoder: ids [B, T] -> hidden states [B, T, D]; arguments are those of :class:`Bert`."""

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    hugging_face_prefix: ClassVar[str] = "roberta."
    hugging_face_ignored: ClassVar[str] = (
        r"((pooler\.dense|classifier|classifier\.(dense|out_proj)|qa_outputs|lm_head(\.(dense|layer_norm|decoder))?)"
        r"\.(weight|bias)|embeddings\.position_ids)$"
    )
    hugging_face_head: ClassVar[str | None] = "classifier.out_proj"
    hugging_face_transform: ClassVar[dict[str, str]] = {"dense": "classifier.dense"}

    config: RobertaConfig

    def places(
        self, input_ids: Int[Array, "B T"], offset: Int[Array, " #B"] | Int[Array, ""] | int
    ) -> Int[Array, "#B T"]:
        """Return the row of the positions' table for each token: by the ids alone, whatever a mask says."""
        padding = self.config.pad_token_id
        real = input_ids != padding
        counted = self.positions(jnp.cumsum(real, axis=1, dtype=jnp.int32), offset)
        return jnp.where(real, counted, 0) + padding
