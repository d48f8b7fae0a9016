"""A small transformer with the house's attention layer: enough for everything that adapters touch."""

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.models.attention import AttentionLayer

FEATURES, HEADS, KEY_HEADS, LAYERS, TOKENS = 16, 4, 2, 2, 6


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = AttentionLayer(FEATURES, HEADS, num_key_heads=KEY_HEADS, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def __call__(self, x, mask):
        return self.norm(x + self.attention(x, mask=mask)[0])


class Tiny(nnx.Module):
    """x [B, T, D], attention_mask [B, T] -> logits [B, 3]."""

    def __init__(self, seed: int = 0, head: bool = True):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.position_offset = 0
        if head:
            self.head = nnx.Linear(FEATURES, 3, rngs=rngs)

    def __call__(self, x, attention_mask=None):
        mask = None if attention_mask is None else attention_mask[:, None, None, :].astype(bool)
        for layer in self.layers:
            x = layer(x, mask)
        pooled = jnp.mean(x, axis=1)
        return self.head(pooled) if hasattr(self, "head") else pooled
