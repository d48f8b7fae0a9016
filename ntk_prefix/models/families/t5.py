"""The encoder of T5 v1.1, mT5 and Flan-T5: a bias for relative positions, RMS norms before, gated GELU, scores as they are.

Source: arXiv 1910.10683 and 2002.05202; the layout and the names are those of Hugging Face's ``t5``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import check_rngs, expected
from ntk_prefix.models.attention import AttentionKind, AttentionLayer
from ntk_prefix.models.backbone import (
    Backbone,
    BackboneConfig,
    Epsilon,
    Mlp,
    Output,
    Pooling,
    Size,
    TransformerLayer,
    check_tokens,
    embedded,
    known_fields,
)
from ntk_prefix.models.elementwise import rms_norm
from ntk_prefix.models.formats import Checkpoint
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["T5Config", "T5Encoder", "relative_buckets"]

_NAMES = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_kv": "head_dim",
    "d_ff": "intermediate_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(BackboneConfig):
    """Sizes of a T5 encoder, under the names that :class:`BackboneConfig` has for them."""

    vocab_size: Size
    head_dim: Size = 64
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-6
    relative_attention_num_buckets: Annotated[int, msgspec.Meta(ge=4, le=2**16, multiple_of=4)] = 32
    relative_attention_max_distance: Size = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            near = f"more than a quarter of the {self.relative_attention_num_buckets} buckets"
            raise expected("relative_attention_max_distance", near, self.relative_attention_max_distance)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> T5Config:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, or the MLP is not gated, as in the first T5.
        """
        kind, _, activation = checked(config.get("feed_forward_proj") or "relu", str, "feed_forward_proj").partition(
            "-"
        )
        if kind != "gated" or not activation:
            raise expected(
                "feed_forward_proj",
                "a gated one, such as 'gated-gelu' (T5 v1.1)",
                repr(config.get("feed_forward_proj")),
            )
        given = {**config, **{ours: config.get(name) for name, ours in _NAMES.items()}}
        given["hidden_act"] = "gelu_new" if activation == "gelu" else activation
        return cls(**known_fields(cls, given))


class T5Encoder(Backbone):
    """The encoder of a T5: ids [B, T] -> hidden states [B, T, D].

    Args:
        config: the sizes.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    hugging_face_names: ClassVar[dict[str, str]] = {
        "embeddings": "shared",
        "position_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.{i}.attention_norm": "encoder.block.{i}.layer.0.layer_norm",
        "layers.{i}.attention.query": "encoder.block.{i}.layer.0.SelfAttention.q",
        "layers.{i}.attention.key": "encoder.block.{i}.layer.0.SelfAttention.k",
        "layers.{i}.attention.value": "encoder.block.{i}.layer.0.SelfAttention.v",
        "layers.{i}.attention.out": "encoder.block.{i}.layer.0.SelfAttention.o",
        "layers.{i}.mlp_norm": "encoder.block.{i}.layer.1.layer_norm",
        "layers.{i}.mlp.gate": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
        "layers.{i}.mlp.up": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
        "layers.{i}.mlp.down": "encoder.block.{i}.layer.1.DenseReluDense.wo",
        "final_norm": "encoder.final_layer_norm",
    }
    hugging_face_prefix: ClassVar[str] = "transformer."
    hugging_face_ignored: ClassVar[str] = r"(?!)"
    tasks: ClassVar[tuple[str, ...]] = ("sequence-classification",)
    pooling: Pooling = "mean"

    config: T5Config

    def __init__(self, config: T5Config, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        check_rngs(rngs)
        norm = rms_norm(config.hidden_size, config.layer_norm_epsilon, self.dtype, rngs)
        # no dtype: nnx.Embed would convert its whole table in every step
        self.embeddings = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_bias = nnx.Embed(config.relative_attention_num_buckets, config.num_attention_heads, rngs=rngs)
        self.layers = nnx.List(
            TransformerLayer(
                AttentionLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    head_dim=config.head_dim,
                    kind=AttentionKind(use_bias=False, use_out_bias=False, scale=1.0),
                    dtype=self.dtype,
                    rngs=rngs,
                ),
                Mlp(config, gated=True, use_bias=False, dtype=self.dtype, rngs=rngs),
                norm,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = norm()

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
    ) -> Output:
        """Encode a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], nonzero or True at tokens, zero at padding; all tokens if None.

        Raises:
            UsageError: ids that the model has not, or a mask that does not fit.
        """
        check_tokens(input_ids, attention_mask, self.config.vocab_size)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        x = embedded(self.embeddings.embedding[...], input_ids).astype(self.dtype)
        return self.encode(x, mask, self.final_norm, bias=self._bias(input_ids.shape[1]))

    def _bias(self, length: int) -> Float[Array, "1 N T T"]:
        """Return what is added to the scores of every layer, by how far a key is from a query."""
        config = self.config
        distances = np.arange(length)[None] - np.arange(length)[:, None]
        buckets = relative_buckets(
            distances, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        table = self.position_bias.embedding[...].astype(accumulation_dtype(self.dtype))
        return jnp.take(table, jnp.asarray(buckets), axis=0).transpose(2, 0, 1)[None]

    @classmethod
    def stored(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Take the encoder of RankGen's layout, and the embeddings once, of a file that has them twice.

        Raises:
            UsageError: a file with a decoder, or with two tables that differ.
        """
        tensors = {name.removeprefix("t5_encoder."): tensor for name, tensor in checkpoint.tensors.items()}
        if len(tensors) == len(checkpoint.tensors) and any(
            name.startswith("t5_encoder.") for name in checkpoint.tensors
        ):
            tensors.pop("projection.weight", None)  # what a ranker has behind the encoder
        if any(name.startswith("decoder.") for name in tensors):
            raise expected(
                checkpoint.where,
                "the encoder of a T5",
                "one with its decoder",
                "With transformers, T5EncoderModel.from_pretrained(folder).save_pretrained(new_folder) takes the encoder",
            )
        if (twice := tensors.pop("encoder.embed_tokens.weight", None)) is not None:
            table = tensors.setdefault("shared.weight", twice)
            if table is not twice and not table.equals(twice):
                raise expected(checkpoint.where, "one table of embeddings", "another table in encoder.embed_tokens")
        return checkpoint._replace(tensors=tensors)


def relative_buckets(distances: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Return the bucket of each distance from a query to a key: keys after it have the upper half.

    Of each half, the lower half is a bucket a distance, and the upper one grows with its logarithm up to ``longest``; what is
    further off is in the last.

    Numerics: the logarithm in float32, for a distance at an edge falls where it fell in training.
    """
    half = buckets // 2
    near = half // 2
    far = np.abs(distances)
    growth = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(longest / near))
    grown = near + (growth * np.float32(half - near)).astype(np.int32)
    return np.where(distances > 0, half, 0) + np.where(far < near, far, np.minimum(grown, half - 1))
