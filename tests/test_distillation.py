"""Distillation: states are trained until the model answers as behind the prefix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import compression, prefixed_model
from ntk_prefix.attention import LowRank
from ntk_prefix.checks import NonFiniteError, UsageError
from ntk_prefix.distillation import distil, distil_states
from ntk_prefix.models import Llama, LlamaConfig
from ntk_prefix.prefix_state import PrefixState

TOKENS = 24


@pytest.fixture(scope="module")
def found() -> tuple[Any, dict[str, prefixed_model.Prefix], dict[str, Any], dict[str, PrefixState]]:
    """A decoder, a prompt's prefix, texts behind it, and states of the chosen keys as they are."""
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    for layer in model.layers:  # random weights attend to all tokens alike: sharpen them
        layer.attention.query.kernel[...] *= 12
    drawn = np.random.default_rng(0)
    prefix = prefixed_model.read_prompt(model, jnp.asarray(drawn.integers(1, 29, TOKENS), jnp.int32))
    ids, mask = drawn.integers(1, 29, (10, 8)), np.ones((10, 8), np.int32)
    mask[::3, 5:] = 0
    texts = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.asarray(mask)}
    return model, prefix, texts, compression.compress(model, prefix, texts, 4, steps=0).states


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_lowers_the_divergence_and_leaves_the_model_alone(found: Any) -> None:
    model, prefix, texts, states = found
    before = jax.tree.map(np.asarray, nnx.state(model))
    told: list[str] = []
    trained = distil_states(
        model, prefix, states, texts, steps=60, learning_rate=0.1, progress=lambda what, *_: told.append(what)
    )
    start, end = (each.kl.mean() for each in prefixed_model.divergence(model, prefix, [states, trained], texts))
    assert end < 0.5 * start
    assert told.count("distilling") == 60
    assert_same(before, nnx.state(model))
    for path, state in trained.items():  # what a head has no anchor for stays empty
        np.testing.assert_array_equal(state.k == 0, states[path].k == 0)


def test_what_is_kept_is_taken_up_again(found: Any) -> None:
    model, prefix, texts, states = found
    kept: dict[str, Any] = {}
    made: list[str] = []

    def keep(name: str, make: compression.Made) -> Any:
        if name not in kept:
            made.append(name)
            kept[name] = make()
        return kept[name]

    whole = distil_states(model, prefix, states, texts, steps=12, kept=keep)
    assert made == ["distilled-0", "distilled-10"]
    del kept["distilled-10"]
    again = distil_states(model, prefix, states, texts, steps=12, kept=keep)
    assert made[2:] == ["distilled-10"]
    assert_same(whole, again)


def test_what_is_fixed_does_not_move(found: Any) -> None:
    model, prefix, texts, states = found
    trained = distil_states(model, prefix, states, texts, steps=2, fixed=("k", "map"))
    for path, state in states.items():
        np.testing.assert_array_equal(trained[path].k, state.k)
        assert_same(trained[path].feature_map, state.feature_map)
    assert any(not np.array_equal(trained[path].z, state.z) for path, state in states.items())


def test_no_steps_are_no_training(found: Any) -> None:
    model, prefix, texts, states = found
    assert_same(distil_states(model, prefix, states, texts, steps=0), states)


def test_a_gradient_that_is_not_finite_is_found_out_by_the_last_step_too(found: Any) -> None:
    """The loss of that step is finite: it was computed before."""
    model, prefix, texts, states = found

    def attached(model: Any, unknown: Any) -> Any:
        moved = {
            path: dataclasses.replace(state, z=state.z + jnp.sqrt(jnp.abs(unknown))) for path, state in states.items()
        }
        return prefixed_model.attending(model, moved)

    with pytest.raises(NonFiniteError, match="distillation: expected finite numbers, got others"):
        distil(model, prefix, jnp.float32(0), attached, texts, steps=1)


@pytest.mark.usefixtures("without_annotations")
def test_bad_input(found: Any) -> None:
    model, prefix, texts, states = found
    path = next(iter(states))
    with pytest.raises(UsageError, match="fixed: expected some of z, k, map, got keys"):
        distil_states(model, prefix, states, texts, steps=1, fixed=("keys",))
    with pytest.raises(UsageError, match=r"fixed: expected a tuple of names, got 'z'. Use fixed=\('z',\)"):
        distil_states(model, prefix, states, texts, steps=1, fixed="z")
    low = states[path]
    low = PrefixState(LowRank(low.z[..., :1], low.z[:, :1]), low.k, low.feature_map, low.scale)
    with pytest.raises(UsageError, match="full ones, got one of low rank"):
        distil_states(model, prefix, {**states, path: low}, texts, steps=1)
    below = PrefixState(states[path].z, states[path].k - 1, states[path].feature_map, states[path].scale)
    with pytest.raises(UsageError, match="masses k >= 0"):
        distil_states(model, prefix, {**states, path: below}, texts, steps=1)
    with pytest.raises(UsageError, match="learning_rate"):
        distil_states(model, prefix, states, texts, steps=1, learning_rate=0.0)
