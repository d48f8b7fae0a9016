"""ModernBERT: rotary positions, norms before, gated GELU, and layers that see a window between layers that see all.

Source: arXiv 2412.13663; the layout and the names are those of Hugging Face's ``modernbert``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
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
    offset_extremes,
)
from ntk_prefix.models.classifier import HeadTransform
from ntk_prefix.models.elementwise import ACTIVATIONS, layer_norm
from ntk_prefix.models.formats import Checkpoint
from ntk_prefix.models.formats.checkpoint import cut
from ntk_prefix.models.rotary import Factor, Rope, rope_fields, warn_beyond
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["ModernBert", "ModernBertConfig"]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(BackboneConfig):
    """Sizes of a ModernBERT; the names and defaults are those of Hugging Face's config.json.

    ``layer_types`` says of each layer whether it sees all or ``local_attention // 2`` tokens to each side; by default every
    third sees all, the first too.
    """

    vocab_size: Size
    max_position_embeddings: Size = 8192
    norm_eps: Epsilon = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: Size = 128
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    global_rope_theta: Factor = 160_000.0
    local_rope_theta: Factor = 10_000.0
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_bias: bool = False
    classifier_activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier_activation not in ACTIVATIONS:
            raise expected("classifier_activation", f"one of {sorted(ACTIVATIONS)}", repr(self.classifier_activation))
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _alternating(self.num_hidden_layers, 3))
        if len(self.layer_types) != self.num_hidden_layers:
            raise expected("layer_types", f"one for each of the {self.num_hidden_layers} layers", len(self.layer_types))
        if SLIDING in self.layer_types and self.local_attention < 2:
            raise expected("local_attention", "at least 2 tokens", self.local_attention)
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise expected(
                "num_attention_heads", "heads of an even size: rotary positions turn pairs", self.num_attention_heads
            )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> ModernBertConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, or rotary positions are scaled.
        """
        given = {**config, "hidden_act": config.get("hidden_activation")}
        if not config.get("layer_types") and config.get("global_attn_every_n_layers") is not None:
            every = checked(config["global_attn_every_n_layers"], Size, "global_attn_every_n_layers")
            given["layer_types"] = _alternating(
                checked(config.get("num_hidden_layers"), Size, "num_hidden_layers"), every
            )
        # transformers 5 writes rope_parameters; before, two bases stood alone
        ropes = checked(config.get("rope_parameters") or {}, dict[str, dict[str, Any] | None], "rope_parameters")
        for kind, name in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
            plain = Rope(head_dim=2, theta=getattr(cls, name))
            rope = rope_fields(ropes.get(kind) or config.get("rope_scaling"), plain, 1)
            if rope != dataclasses.replace(plain, theta=rope.theta):
                raise expected("rope_parameters", "rope_type 'default' for a ModernBERT", ropes.get(kind))
            if ropes.get(kind):
                given[name] = rope.theta
        return cls(**known_fields(cls, given))

    def kind(self, layer: int) -> AttentionKind:
        """Return what differs between layers."""
        local = self.layer_types[layer] == SLIDING
        theta = self.local_rope_theta if local else self.global_rope_theta
        return AttentionKind(
            use_bias=self.attention_bias,
            use_out_bias=self.attention_bias,
            rope=Rope(head_dim=self.hidden_size // self.num_attention_heads, theta=theta),
            neighbors=self.local_attention // 2 if local else None,
        )


def _alternating(layers: int, every: int) -> tuple[str, ...]:
    return tuple(SLIDING if i % every else FULL for i in range(layers))


class ModernBertEmbeddings(nnx.Module):
    """``norm(token)``."""

    def __init__(self, config: ModernBertConfig, norm: Any, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        # no dtype: nnx.Embed would convert its whole table in every step
        self.tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.norm = norm()

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the layers' input."""
        return self.norm(embedded(self.tokens.embedding[...], input_ids).astype(self.dtype))


class _Unchanged(nnx.Module):
    """Stands where a layer has no norm."""

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x


class ModernBert(Backbone):
    """A ModernBERT encoder: ids [B, T] -> hidden states [B, T, D].

    A file has query, key and value in one map, and both halves of the MLP's; here they are apart. LoRA on some of them is, in
    a file, LoRA on the whole map (:mod:`ntk_prefix.peft.fused`); other adapters' files call them ``attn.Wqkv.query`` and so on.

    Args:
        config: the sizes.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    hugging_face_names: ClassVar[dict[str, str]] = {
        "embeddings.tokens": "embeddings.tok_embeddings",
        "embeddings.norm": "embeddings.norm",
        "layers.{i}.attention_norm": "layers.{i}.attn_norm",
        "layers.{i}.attention.query": "layers.{i}.attn.Wqkv.query",
        "layers.{i}.attention.key": "layers.{i}.attn.Wqkv.key",
        "layers.{i}.attention.value": "layers.{i}.attn.Wqkv.value",
        "layers.{i}.attention.out": "layers.{i}.attn.Wo",
        "layers.{i}.mlp_norm": "layers.{i}.mlp_norm",
        "layers.{i}.mlp.gate": "layers.{i}.mlp.Wi.gate",
        "layers.{i}.mlp.up": "layers.{i}.mlp.Wi.up",
        "layers.{i}.mlp.down": "layers.{i}.mlp.Wo",
        "final_norm": "final_norm",
    }
    hugging_face_fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "attn.Wqkv": ("query", "key", "value"),
        "mlp.Wi": ("gate", "up"),
    }
    hugging_face_prefix: ClassVar[str] = "model."
    hugging_face_ignored: ClassVar[str] = r"(head\.(dense|norm)|classifier|decoder)\.(weight|bias)$"
    hugging_face_head: ClassVar[str | None] = "classifier"
    hugging_face_transform: ClassVar[dict[str, str]] = {"dense": "head.dense", "norm": "head.norm"}
    tasks: ClassVar[tuple[str, ...]] = ("sequence-classification",)
    pooling: Pooling = "mean"
    unlike_layers: ClassVar[int] = 1

    config: ModernBertConfig

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        check_rngs(rngs)
        self.head_pooling = config.classifier_pooling
        norm = layer_norm(config.hidden_size, config.norm_eps, self.dtype, rngs, use_bias=config.norm_bias)
        self.embeddings = ModernBertEmbeddings(config, norm, dtype=self.dtype, rngs=rngs)
        self.layers = nnx.List(
            TransformerLayer(
                AttentionLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    kind=config.kind(layer),
                    dtype=self.dtype,
                    rngs=rngs,
                ),
                Mlp(config, gated=True, use_bias=config.mlp_bias, dtype=self.dtype, rngs=rngs),
                norm,
            )
            for layer in range(config.num_hidden_layers)
        )
        self.layers[0].attention_norm = _Unchanged()  # the embeddings' norm stands before it
        self.final_norm = norm()

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
        position_offset: Int[Array, " #B"] | Int[Array, ""] | int = 0,
    ) -> Output:
        """Encode a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], nonzero or True at tokens, zero at padding; all tokens if None.
            position_offset: added to the positions 0 .. T - 1, of which only differences count.

        Raises:
            UsageError: ids that the model has not, or a mask or an offset that does not fit.
        """
        check_tokens(input_ids, attention_mask, self.config.vocab_size)
        offset_extremes(position_offset, len(input_ids))
        warn_beyond(self.config.max_position_embeddings, input_ids.shape[1], attention_mask)
        positions = self.positions(jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], position_offset)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        return self.encode(self.embeddings(input_ids), mask, self.final_norm, rotary=self.rotary(positions))

    def head_transform(self, rngs: nnx.Rngs) -> HeadTransform:
        """Make what stands in the family's own head before the linear map."""
        config = self.config
        norm = layer_norm(config.hidden_size, config.norm_eps, jnp.dtype(jnp.float32), rngs, use_bias=config.norm_bias)
        return HeadTransform(
            config.hidden_size, config.classifier_activation, use_bias=config.classifier_bias, norm=norm, rngs=rngs
        )

    @classmethod
    def stored(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Cut the maps that a file has in one piece."""
        return checkpoint._replace(tensors=cut(checkpoint.tensors, cls.hugging_face_fused))
