"""A prompt as states of anchors, in a layer that says more of its scores than their scale."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.compression import compress, errors
from ntk_prefix.models import Llama, LlamaConfig
from ntk_prefix.prefixed_model import read_prompt


def test_a_prompt_of_one_token_is_one_anchor_also_under_a_soft_cap_and_another_scale() -> None:
    """Exactly, with its key as it is: no anchor under another cap has its mass for all queries."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    scores = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 9.0}
    config = LlamaConfig(**sizes, **scores, intermediate_size=16, vocab_size=30)
    model = Llama(config, rngs=nnx.Rngs(0))
    for map_ in (model.layers[0].attention.query, model.layers[0].attention.key):
        map_.kernel[...] *= 4
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 30, (4, 8)), jnp.int32)
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    prefix = read_prompt(model, jnp.asarray([7], jnp.int32))
    found = compress(model, prefix, texts, 1, steps=0)
    np.testing.assert_allclose([found.error, errors(model, prefix, found.states, texts)], 0, atol=1e-6)
    np.testing.assert_allclose([state.k for state in found.states.values()], 1, rtol=1e-3)
