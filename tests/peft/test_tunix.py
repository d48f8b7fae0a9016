"""NTK-Attention on a model of google-tunix, which attends by hand: a subclass of its attention offers the hook.

Needs ``pip install google-tunix``, which no lock of ours has.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import peft
from ntk_prefix.models.attention import AttentionCore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs: it is written for an older JAX
    pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="google-tunix is not installed"),
]


@pytest.fixture(autouse=True)
def broadcasts() -> Iterator[None]:
    """Their norms count on it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def llama() -> Any:
    """Return a small random Llama of tunix's, and the same with attention that adapters find."""
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig(
        num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=4, num_kv_heads=2,
        rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip

    class Attention(llama3.Attention):
        num_heads = property(lambda self: self.config.num_heads)  # theirs says the features
        num_key_heads = property(lambda self: self.config.num_kv_heads)
        head_dim = property(lambda self: self.config.head_dim)

        def __init__(self, attention: llama3.Attention):
            super().__init__(attention.config, rngs=nnx.Rngs(0))
            nnx.update(self, nnx.state(attention))
            self.core = AttentionCore()

        def block(self, x: Any, segment_pos: Any, cache: None, attn_mask: Any) -> Any:
            query, key = (
                llama3.apply_rope(project(x), segment_pos, head_dim=self.head_dim)
                for project in (self.q_proj, self.k_proj)
            )
            return None, self.o_proj(self.core(query, key, self.v_proj(x), mask=attn_mask[:, None]))

    theirs, hooked = (llama3.Llama3(config, rngs=nnx.Rngs(0)) for _ in range(2))
    for layer in hooked.layers:
        layer.attn = Attention(layer.attn)
    return theirs, hooked


def test_a_state_is_put_on_trained_saved_and_loaded(tmp_path: Path) -> None:
    ids = jax.random.randint(jax.random.key(0), (3, 6), 0, 32)
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (3, 6, 6))
    positions = jnp.broadcast_to(jnp.arange(6), (3, 6))

    def logits(model: Any) -> jax.Array:
        return model(ids, positions, None, seen)[0]

    theirs, model = llama()
    frozen = logits(theirs)
    np.testing.assert_allclose(logits(model), frozen, rtol=0, atol=1e-5)
    peft.apply(model, peft.NTKAttentionConfig())
    np.testing.assert_allclose(logits(model), frozen, rtol=0, atol=1e-5)
    trained, whole = peft.trainable_parameters(model)
    assert trained == 2 * 4 * (4 * 4 + 4) < whole

    optimizer = nnx.Optimizer(model, peft.non_negative(optax.adam(1e-1)), wrt=peft.AdapterParam)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            each = optax.softmax_cross_entropy_with_integer_labels(logits(model)[:, :-1], ids[:, 1:])
            return each.mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, peft.AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    peft.save_pretrained(model, tmp_path)
    other = peft.load_adapter(llama()[1], tmp_path)
    np.testing.assert_allclose(logits(other), logits(model), rtol=0, atol=1e-5)
    assert jnp.abs(logits(model) - frozen).max() > 1e-3
