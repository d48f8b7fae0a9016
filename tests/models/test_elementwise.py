"""Activations and LayerNorm: the values of the library's, and derivatives of every order and mode."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from ntk_prefix.models.elementwise import LayerNorm, gelu

GRID = np.linspace(-12, 12, 4001)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(jnp.float64, 1e-15), (jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)],
)
def test_gelu_is_exact(dtype: Any, limit: float) -> None:
    """float64, float32: some roundings of numbers up to 12; bfloat16: the rounding of the result alone, relative."""
    x = jnp.asarray(GRID, dtype)
    wide = np.asarray(x, np.float64)
    wanted = wide * scipy.special.ndtr(wide)
    assert gelu(x).dtype == dtype
    scale = np.maximum(np.abs(wanted), 1)
    assert (np.abs(np.asarray(gelu(x), np.float64) - wanted) / scale).max() < limit
    if dtype != jnp.bfloat16:  # the control: the form with tanh is another function, 5e-4 away
        assert (np.abs(np.asarray(jax.nn.gelu(x), np.float64) - wanted) / scale).max() > 100 * limit


def test_derivatives_of_gelu_are_those_of_the_library() -> None:
    ours, theirs = gelu, functools.partial(jax.nn.gelu, approximate=False)
    x = jnp.asarray(GRID)
    for _ in range(3):
        ours, theirs = jax.grad(ours), jax.grad(theirs)
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), atol=1e-13)
    check_grads(lambda x: gelu(jnp.asarray(x)), (x[::400],), order=2, modes=("fwd", "rev"))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_finite_number_gives_nan(x: float) -> None:
    value = jnp.asarray(x, jnp.float32)
    assert all(jnp.isfinite(f(value)) for f in (gelu, jax.grad(gelu), jax.grad(jax.grad(gelu))))


@pytest.mark.parametrize("shape", [(24,), (2, 5, 24)])
def test_layer_norm_and_its_gradients_are_flaxs(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    ours, flaxs = (
        kind(24, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0)) for kind in (LayerNorm, nnx.LayerNorm)
    )
    for norm in (ours, flaxs):
        values = (np.random.default_rng(seed).normal(size=24) for seed in (1, 2))
        norm.scale, norm.bias = (nnx.Param(jnp.asarray(value)) for value in values)
    x, weights = (jnp.asarray(rng.normal(2.0, 3.0, shape)) for _ in range(2))

    def loss(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
        return jnp.sum(weights * norm(x) ** 2)

    with jax.numpy_rank_promotion("allow"):  # flax's own broadcast
        wanted = flaxs(x), nnx.grad(loss, argnums=(0, 1))(flaxs, x)
    found = ours(x), nnx.grad(loss, argnums=(0, 1))(ours, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_layer_norm_rounds_once() -> None:
    """In bfloat16 the statistics, scale and bias are float32's: the result is the exact one, rounded."""
    x = jnp.asarray(np.random.default_rng(0).normal(100.0, 1.0, (50, 64)), jnp.bfloat16)
    norm = LayerNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.bias[...] = jnp.full(64, 0.123, jnp.float32)
    wide = np.asarray(x, np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + norm.epsilon) + 0.123
    result = norm(x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64), wanted, rtol=2.0**-8, atol=2.0**-8)
    # the control: statistics in bfloat16 would not do
    narrow = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True)) + jnp.bfloat16(0.123)
    assert np.abs(np.asarray(narrow, np.float64) - wanted).max() > 2.0**-6
