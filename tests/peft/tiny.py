"""A small transformer with the library's attention layer: enough for everything that adapters touch."""

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.models import AttentionLayer, Backbone
from ntk_prefix.models.backbone import BackboneConfig

FEATURES, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, LABELS, TOKENS = 16, 4, 2, 4, 2, 3, 6


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype=None):
        self.attention = AttentionLayer(FEATURES, HEADS, num_key_heads=KEY_HEADS, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, dtype=dtype, rngs=rngs)

    def __call__(self, x, **options):
        update, cache = self.attention(x, **options)
        return self.norm(x + update), cache


class Tiny(Backbone):
    """x [B, T, D], attention_mask [B, T] -> logits [B, 3]; in a Hugging Face checkpoint it would be called like BERT."""

    hugging_face_names: ClassVar[dict[str, str]] = {
        "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
        "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
        "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
        "layers.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
        "layers.{i}.norm": "encoder.layer.{i}.attention.output.LayerNorm",
    }
    hugging_face_prefix: ClassVar[str] = "tiny."
    hugging_face_ignored: ClassVar[str] = r"pooler\."
    hugging_face_head: ClassVar[str] = "classifier"

    def __init__(self, seed: int = 0, head: bool = True, dtype=None):
        config = BackboneConfig(
            hidden_size=FEATURES, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FEATURES
        )
        super().__init__(config, dtype=dtype)
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(LAYERS)])
        if head:
            self.head = nnx.Linear(FEATURES, LABELS, rngs=rngs)

    def __call__(self, x, attention_mask=None):
        mask = None if attention_mask is None else attention_mask[:, None, None, :].astype(bool)
        # positions do enter, so that a shift of them shows
        x = x + jnp.sin(jnp.arange(x.shape[1], dtype=x.dtype) + self.position_offset)[None, :, None]
        pooled = jnp.mean(self.encode(x, mask).last_hidden_state, axis=1)
        return self.head(pooled) if hasattr(self, "head") else pooled


@functools.cache
def _drawn(seed: int, head: bool, dtype) -> Tiny:
    return Tiny(seed, head, dtype)


def tiny(seed: int = 0, head: bool = True, dtype=None) -> Tiny:
    """Return one of the reader's own: drawn once, as drawing takes ten times as long as copying."""
    return nnx.clone(_drawn(seed, head, dtype))
