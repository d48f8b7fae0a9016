"""Windowed attention is full attention with a band mask, computed without it; positions can be extended for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ntk_prefix as npx
from ntk_prefix import models, peft
from ntk_prefix.attention import softmax_attention
from ntk_prefix.models.window import windowed
from tests.models.calling import call

SIZES = models.BertConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=31,
    max_position_embeddings=8,
)


def band(length: int, leading: int, window: int) -> np.ndarray:
    """What a window means, as a mask [T, T]."""
    place = np.arange(length + leading) - leading
    near = np.abs(place[:, None] - place[None]) <= window
    return near | (place[:, None] < 0) | (place[None] < 0)


reference = functools.partial(softmax_attention, implementation="reference")


def arrays(length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    shape = (3, 2, length, 2, 4)
    query, key, value = jax.random.normal(jax.random.key(seed), shape)
    return query, key, value


# one block, whole blocks, a part of one, more window than text, no text but a token
@pytest.mark.parametrize("window", [1, 4, 12])
@pytest.mark.parametrize(("length", "leading"), [(12, 0), (11, 3), (1, 2)])
def test_is_full_attention_under_a_band_mask(length, leading, window):
    query, key, value = arrays(length + leading)
    seen = np.random.default_rng(length).random((2, 1, 1, length + leading)) < 0.8
    whole = jnp.asarray(seen & band(length, leading, window)[None, None])
    expected = reference(query, key, value, mask=whole)
    found = windowed(reference, query, key, value, mask=jnp.asarray(seen), window=window, leading=leading)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_gradients_are_those_of_the_mask():
    query, key, value = arrays(11)

    def windowed_sum(*heads):
        return jnp.sum(windowed(softmax_attention, *heads, window=3, leading=2) ** 2)

    def masked_sum(*heads):
        return jnp.sum(softmax_attention(*heads, mask=jnp.asarray(band(9, 2, 3))[None, None]) ** 2)

    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(query, key, value) for f in (windowed_sum, masked_sum))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_no_array_grows_with_the_square_of_the_length():
    query = jax.ShapeDtypeStruct((1, 4096, 2, 4), jnp.float32)

    def run(query):
        return windowed(softmax_attention, query, query, query, window=32, leading=8).sum()

    def largest(function) -> int:
        memory = jax.jit(jax.grad(function)).lower(query).compile().memory_analysis()
        return memory.temp_size_in_bytes

    # 8 leading rows meet all 4096 keys; a token meets 8 + 3 * 32; the square would be 2 * 4096^2 * 4 bytes = 134 MB
    assert largest(run) < 25e6


@pytest.mark.parametrize("state", [False, True])
def test_every_core_can_be_windowed(state):
    """NTK-Attention and a trained prefix see the window's keys; what they add is the same for all tokens."""
    query, key, value = arrays(9)
    z, k = jnp.ones((2, 4, 4)), jnp.ones((2, 4))

    def core(*heads, mask=None):
        if state:
            return npx.ntk_attention(*heads, z, k, mask=mask)
        return npx.prefix_attention(*heads, key[0, :3], value[0, :3], mask=mask)

    found = windowed(core, query, key, value, window=2)
    np.testing.assert_allclose(found, core(query, key, value, mask=jnp.asarray(band(9, 0, 2))[None, None]), atol=1e-12)


def test_a_model_reads_beyond_its_positions():
    ids = jnp.arange(24).reshape(1, 24) % 31
    model = models.Bert(SIZES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"at most 8 positions, got 24.*extend_positions"):
        model(ids)
    short = call(model, ids[:, :8]).last_hidden_state
    model.extend_positions(24)
    assert model.config.max_position_embeddings == 24
    table = np.asarray(model.embeddings.positions.embedding[...])
    np.testing.assert_array_equal(table[16:], table[:8])
    np.testing.assert_allclose(call(model, ids[:, :8]).last_hidden_state, short, rtol=1e-6)
    full = call(model, ids).last_hidden_state
    model.window = 23
    np.testing.assert_allclose(call(model, ids).last_hidden_state, full, rtol=1e-6)
    model.window = 2
    narrow = call(model, ids).last_hidden_state
    assert np.abs(narrow - full).max() > 1e-3
    # two layers of two tokens to each side: token 0 knows nothing of token 5
    other = call(model, ids.at[0, 5].set(30)).last_hidden_state
    assert np.abs(other - narrow)[0, 0].max() < 1e-6 < 1e-3 < np.abs(other - narrow)[0, 4].max()
    with pytest.raises(ValueError, match="at least the model's 24 positions, got 8"):
        model.extend_positions(8)


def test_what_a_window_cannot_do_is_refused():
    query, key, value = arrays(9)
    with pytest.raises(ValueError, match="at least 1 token"):
        windowed(softmax_attention, query, key, value, window=0)
    with pytest.raises(ValueError, match="a mask of queries and keys needs full attention"):
        windowed(softmax_attention, query, key, value, window=2, mask=jnp.ones((1, 1, 9, 9), bool))
    model = models.Bert(SIZES, rngs=nnx.Rngs(0))
    peft.apply(model, peft.PrefixTuningConfig(num_tokens=2), name="a")
    model.window = 2
    with peft.mixed(model, jnp.array([0, -1]), ["a"]), pytest.raises(ValueError, match="one adapter for the whole"):
        model(jnp.ones((2, 8), jnp.int32))
