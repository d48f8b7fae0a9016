"""BERT: learned positions, token types, norms after the residual sums, exact GELU.

Source: arXiv 1810.04805; the layout and the names are those of Hugging Face's ``bert``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import msgspec
from flax import nnx
from jax.typing import DTypeLike

from ntk_prefix.checks import check_count, check_rngs, expected
from ntk_prefix.models.attention import AttentionLayer
from ntk_prefix.models.backbone import (
    Backbone,
    BackboneConfig,
    Epsilon,
    Mlp,
    Output,
    Pooling,
    Size,
    TransformerLayer,
    check_ids,
    check_tokens,
    embedded,
    known_fields,
    offset_extremes,
)
from ntk_prefix.models.classifier import HeadTransform
from ntk_prefix.models.elementwise import layer_norm
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["Bert", "BertConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(BackboneConfig):
    """Sizes of a BERT; the names and defaults are those of Hugging Face's config.json."""

    vocab_size: Size
    max_position_embeddings: Size = 512
    type_vocab_size: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 2
    layer_norm_eps: Epsilon = 1e-12

    @property
    def first_position(self) -> int:
        """The position of the first token."""
        return 0

    @property
    def max_tokens(self) -> int:
        """How many tokens have positions."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> BertConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, positions are not absolute, or the model is a decoder.
        """
        if config.get("position_embedding_type") not in (None, "absolute") or config.get("is_decoder"):
            raise expected(
                "position_embedding_type, is_decoder",
                "a BERT encoder with absolute positions",
                f"{config.get('position_embedding_type')!r}, {config.get('is_decoder')!r}",
            )
        return cls(**known_fields(cls, config))


class BertEmbeddings(nnx.Module):
    """``norm(token + token type + position)``, summed before anything is rounded to a narrow dtype."""

    def __init__(self, config: BertConfig, norm: Any, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.sum_dtype = accumulation_dtype(dtype)
        # no dtype: nnx.Embed would convert its whole table in every step
        embed = functools.partial(nnx.Embed, features=config.hidden_size, rngs=rngs)
        self.tokens = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.token_types = embed(config.type_vocab_size) if config.type_vocab_size else None
        self.norm = norm()

    def __call__(
        self, input_ids: Int[Array, "B T"], token_type_ids: Int[Array, "B T"] | None, positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """Return the layers' input.

        Raises:
            UsageError: token types for a model without any.
        """
        total = embedded(self.tokens.embedding[...], input_ids).astype(self.sum_dtype)
        if self.token_types is not None:
            types = self.token_types(jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids)
            total = total + types.astype(self.sum_dtype)
        elif token_type_ids is not None:
            raise expected("token_type_ids", "None for a model without token types", token_type_ids.shape)
        return self.norm(total + self.positions(positions).astype(self.sum_dtype))


class Bert(Backbone):
    """A BERT encoder: ids [B, T] -> hidden states [B, T, D].

    Args:
        config: the sizes.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    hugging_face_names: ClassVar[dict[str, str]] = {
        "embeddings.tokens": "embeddings.word_embeddings",
        "embeddings.positions": "embeddings.position_embeddings",
        "embeddings.token_types": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
        "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
        "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
        "layers.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
        "layers.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
        "layers.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
        "layers.{i}.mlp.down": "encoder.layer.{i}.output.dense",
        "layers.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    }
    hugging_face_prefix: ClassVar[str] = "bert."
    hugging_face_ignored: ClassVar[str] = (
        r"((pooler\.dense|classifier|qa_outputs|cls\.seq_relationship|cls\.predictions(\.transform\.dense|\.decoder)?)"
        r"\.(weight|bias)|cls\.predictions\.transform\.LayerNorm\.(weight|bias|gamma|beta)|embeddings\.position_ids)$"
    )
    hugging_face_head: ClassVar[str | None] = "classifier"
    hugging_face_transform: ClassVar[dict[str, str]] = {"dense": "pooler.dense"}
    head_activation: ClassVar[str] = "tanh"
    head_pooling: Pooling | None = "cls"
    tasks: ClassVar[tuple[str, ...]] = ("sequence-classification",)
    pooling: Pooling = "mean"

    config: BertConfig

    def __init__(self, config: BertConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        check_rngs(rngs)
        norm = layer_norm(config.hidden_size, config.layer_norm_eps, self.dtype, rngs)
        self.embeddings = BertEmbeddings(config, norm, dtype=self.dtype, rngs=rngs)
        self.layers = nnx.List(
            TransformerLayer(
                AttentionLayer(config.hidden_size, config.num_attention_heads, dtype=self.dtype, rngs=rngs),
                Mlp(config, dtype=self.dtype, rngs=rngs),
                norm,
                post_norm=True,
            )
            for _ in range(config.num_hidden_layers)
        )

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        position_offset: Int[Array, " #B"] | Int[Array, ""] | int = 0,
    ) -> Output:
        """Encode a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], nonzero or True at tokens, zero at padding; all tokens if None.
            token_type_ids: [B, T]; zeros if None.
            position_offset: added to the positions 0 .. T - 1, on top of the model's own ``position_offset``; a
                number, or one per row.

        Raises:
            UsageError: positions, ids or token types that the model has not, or a mask that does not fit.
        """
        check_tokens(input_ids, attention_mask, self.config.vocab_size)
        if token_type_ids is not None and self.config.type_vocab_size:
            check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size, "the model's token types")
            if token_type_ids.shape != input_ids.shape:
                raise expected("token_type_ids", f"{list(input_ids.shape)}, the ids' shape", token_type_ids.shape)
        length, own = input_ids.shape[1], self.position_offset
        least, most = offset_extremes(position_offset, len(input_ids)) or (0, 0)
        if length + own + most > self.config.max_tokens:
            raise expected(
                "input_ids",
                f"at most {self.config.max_tokens} positions",
                f"{length} tokens with a position offset of {own + most}",
                "Truncate them, or call extend_positions",
            )
        if own + least < 0:
            raise expected("position_offset", "no position before the first", own + least)
        x = self.embeddings(input_ids, token_type_ids, self.places(input_ids, position_offset))
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        return self.encode(x, mask)

    def places(
        self, input_ids: Int[Array, "B T"], offset: Int[Array, " #B"] | Int[Array, ""] | int
    ) -> Int[Array, "#B T"]:
        """Return the row of the positions' table for each token."""
        return self.positions(jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], offset)

    def head_transform(self, rngs: nnx.Rngs) -> HeadTransform:
        """Make what stands in the family's own head before the linear map."""
        return HeadTransform(self.config.hidden_size, self.head_activation, rngs=rngs)

    def extend_positions(self, length: int) -> None:
        """Give the model position embeddings for ``length`` tokens: those it has, repeated.

        Raises:
            ValueError: the model has more already.

        Source: Beltagy et al. (Longformer), arXiv 2004.05150; to be trained further, or left frozen.
        """
        check_count("length", length)
        have, first = self.config.max_tokens, self.config.first_position
        if length < have:
            raise expected("length", f"at least the model's {have} positions", length)
        table = self.embeddings.positions
        before, own = jnp.split(table.embedding[...], [first])
        repeated = jnp.tile(own, (-(-length // have), 1))[:length]
        table.embedding = nnx.Param(jnp.concatenate([before, repeated]))
        table.num_embeddings = first + length
        self.config = dataclasses.replace(self.config, max_position_embeddings=first + length)
