"""A model behind a prompt: what is read of it, in order, and in which numbers it is fitted to."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from ntk_prefix import peft, prefixed_model
from ntk_prefix.models import Llama, LlamaConfig, Sampling
from ntk_prefix.prefixed_model import Queries, continuations, divergence, read_prompt

WINDOW, PROMPT = 4, jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], jnp.int32)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def windowed() -> Llama:
    """A decoder whose cache is a ring, in which the prompt's last token is in the second slot of four."""
    config = LlamaConfig(**SIZES, intermediate_size=16, vocab_size=30, sliding_window=WINDOW)
    return Llama(config, rngs=nnx.Rngs(0))


def test_what_a_window_keeps_of_a_prompt_are_its_last_tokens_in_their_order(windowed: Llama) -> None:
    seen = peft.record(windowed, {"input_ids": PROMPT[None]})
    (prefix,), (layer,) = read_prompt(windowed, PROMPT).values(), seen.values()
    np.testing.assert_allclose(prefix.value, layer.value[0, -WINDOW:], atol=1e-6)
    assert np.abs(prefix.value - layer.value[0, -WINDOW - 1 : -1]).max() > 0.01


def test_continuations_are_drawn_from_what_the_model_says_behind_the_prompt_also_with_a_window(
    windowed: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and second tokens come as often as the model with the whole text would draw them."""
    sharp = Sampling(temperature=0.1)
    monkeypatch.setattr(prefixed_model, "OWN_TEXTS", sharp)
    first, second = continuations(windowed, read_prompt(windowed, PROMPT), np.asarray(PROMPT), 2000, 2)["input_ids"].T
    most = np.bincount(first).argmax()
    for drawn, text in ((first, PROMPT), (second[first == most], jnp.append(PROMPT, most))):
        probability = np.exp(np.asarray(sharp.log_probabilities(windowed(text[None]).logits[0, -1]), np.float64))
        expected = len(drawn) * probability / probability.sum()
        often = expected > 5  # Pearson's test wants so many; the others are one class
        observed = np.bincount(drawn, minlength=len(probability))
        classes = [np.append(x[often], x[~often].sum()) for x in (observed, expected)]
        assert scipy.stats.chisquare(*classes).pvalue > 1e-3


def test_continuations_have_no_token_that_is_not_likely(windowed: Llama) -> None:
    first = continuations(windowed, read_prompt(windowed, PROMPT), np.asarray(PROMPT), 2000, 2)["input_ids"][:, 0]
    said = Sampling(top_p=0.951).log_probabilities(windowed(PROMPT[None]).logits[0, -1])
    assert np.isneginf(said).any()
    assert np.isfinite(said[first]).all()


def test_continuations_follow_their_seed(windowed: Llama) -> None:
    prefix, prompt = read_prompt(windowed, PROMPT), np.asarray(PROMPT)
    once, again, other = (continuations(windowed, prefix, prompt, 3, 8, seed=seed)["input_ids"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_what_is_measured_of_a_text_is_its_tokens_alone(windowed: Llama) -> None:
    """Of texts that are compared two at a time, the last one on its own: each token knows which of them it is of."""
    ids, lengths = jnp.arange(1, 13, dtype=jnp.int32).reshape(3, 4), np.array([4, 1, 3])
    mask = jnp.asarray(np.arange(4)[None] < lengths[:, None], jnp.int32)
    prefix = read_prompt(windowed, PROMPT)
    (found,) = divergence(windowed, prefix, [None], {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(found.text, np.repeat(np.arange(3), lengths))
    (alone,) = divergence(windowed, prefix, [None], {"input_ids": ids[1:2], "attention_mask": mask[1:2]})
    by_text = found.by_text(found.kl)
    np.testing.assert_allclose(by_text, [found.kl[:4].mean(), alone.kl.mean(), found.kl[5:].mean()], rtol=1e-4)
    assert len(set(by_text.round(6))) == 3


def test_keys_of_a_model_in_bfloat16_are_scaled_in_float32() -> None:
    """Rounded once more, a key of 30 is off by 0.1, and its score by as much times the query."""
    config = LlamaConfig(**SIZES, intermediate_size=16, vocab_size=30, head_dim=6)
    model = Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    prefix, ids = read_prompt(model, PROMPT), jnp.asarray([[1, 2, 3]], jnp.int32)
    ((path, given),) = prefix.items()
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    key = Queries(model, prefix, texts, lambda *_: None).of(path).key
    assert given.key.dtype == jnp.bfloat16
    assert key.dtype == jnp.float32
    np.testing.assert_allclose(np.swapaxes(key, 0, 1), np.asarray(given.key, np.float32) / 6**0.25, rtol=1e-6)
