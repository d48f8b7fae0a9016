"""Attention by polynomial features: the polynomial it states, the bound it states, and memory that is linear."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import softmax_attention
from ntk_prefix.feature_maps import Taylor, attention_error_bound
from ntk_prefix.polynomial import (
    BLOCK,
    polynomial_attention,
    polynomial_degree,
    polynomial_exponential,
)


def draw(queries=20, keys=20, heads=(4, 2), width=3, seed=0):
    """One batch of two, entries uniform in (-1, 1)."""
    random = np.random.default_rng(seed)
    shapes = [(2, queries, heads[0], width), (2, keys, heads[1], width), (2, keys, heads[1], width)]
    return tuple(jnp.asarray(random.uniform(-1, 1, shape)) for shape in shapes)


def definition(query, key, value, degree, *, scale, is_causal=False):
    """The formula with every pair of tokens written out."""
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = scale * np.einsum("btnh,bsnh->bnts", query, key)
    weights = sum(scores**t / math.factorial(t) for t in range(degree + 1))
    if is_causal:
        weights = np.tril(weights)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


class TestPolynomialAttention:
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("length", [20, 2 * BLOCK + 7])
    def test_is_the_polynomial_of_the_scores(self, is_causal, length):
        """Grouped heads, and blocks of which the last is not full."""
        drawn = draw(length, length)
        found = polynomial_attention(*drawn, degree=4, is_causal=is_causal)
        np.testing.assert_allclose(
            found, definition(*drawn, 4, scale=1 / math.sqrt(3), is_causal=is_causal), atol=1e-13
        )

    def test_queries_and_keys_may_differ_in_number(self):
        drawn = draw(5, BLOCK + 30)
        np.testing.assert_allclose(
            polynomial_attention(*drawn, degree=2, scale=0.3), definition(*drawn, 2, scale=0.3), atol=1e-13
        )

    def test_a_causal_output_does_not_see_what_follows(self):
        query, key, value = draw(BLOCK + 20, BLOCK + 20)
        before = polynomial_attention(query, key, value, degree=2, is_causal=True)
        after = polynomial_attention(query, key.at[:, -10:].set(9.0), value, degree=2, is_causal=True)
        np.testing.assert_array_equal(before[:, :-10], after[:, :-10])
        assert jnp.abs(before[:, -1] - after[:, -1]).max() > 1e-3

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("degree", [2, 5, 8])
    def test_keeps_its_bound(self, is_causal, degree):
        query, key, value = draw()
        score = float(jnp.abs(jnp.einsum("btnh,bsmh->btnsm", query, key)).max() / math.sqrt(3))
        error = jnp.abs(
            polynomial_attention(query, key, value, degree=degree, is_causal=is_causal)
            - softmax_attention(query, key, value, is_causal=is_causal)
        ).max()
        allowed = attention_error_bound(Taylor(degree).error_bound(math.sqrt(score)), float(jnp.abs(value).max()))
        assert 0 < error <= allowed

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_gradients(self, is_causal):
        """Against the same polynomial on a dense matrix of scores, which autodiff sees through."""
        query, key, value = draw(heads=(1, 1))

        def dense(query, key, value):
            weights = polynomial_exponential(jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(3), 3)
            weights = jnp.tril(weights) if is_causal else weights
            return jnp.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)

        def total(attend):
            return jax.grad(lambda *args: jnp.sin(attend(*args)).sum(), argnums=(0, 1, 2))(query, key, value)

        blockwise = total(lambda *args: polynomial_attention(*args, degree=3, is_causal=is_causal))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), blockwise, total(dense))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_follows_the_dtype(self, dtype):
        drawn = [x.astype(dtype) for x in draw()]
        found = polynomial_attention(*drawn, degree=2)
        assert found.dtype == dtype
        exact = polynomial_attention(*[x.astype(jnp.float64) for x in drawn], degree=2)
        np.testing.assert_allclose(found.astype(jnp.float64), exact, atol=4 * float(jnp.finfo(dtype).eps))

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_memory_does_not_grow_with_the_square(self, is_causal):
        """Eight times the tokens: eight times the bytes and not 64. The compiler counts them; nothing runs."""

        def bytes_held(length):
            shapes = [jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)] * 3
            program = polynomial_attention.lower(*shapes, degree=4, is_causal=is_causal).compile()
            return program.memory_analysis().temp_size_in_bytes

        assert bytes_held(2**17) <= 8 * bytes_held(2**14)

    @pytest.mark.usefixtures("without_annotations")
    @pytest.mark.parametrize(
        ("shape", "options", "told"),
        [
            ((2, 20, 3, 3), {}, "K a divisor of 4"),
            ((2, 20, 2, 5), {}, "share batch and head dimension"),
            ((2, 0, 2, 3), {}, "at least one token"),
            ((2, 21, 2, 3), {"is_causal": True}, "as many queries as keys, got 20 and 21"),
            ((2, 20, 2, 3), {"degree": -1}, "degree: expected a whole number >= 0"),
            ((2, 20, 2, 3), {"scale": -1.0}, "scale: expected a finite number > 0"),
        ],
    )
    def test_says_what_is_wrong(self, shape, options, told):
        key = jnp.ones(shape)
        with pytest.raises(ValueError, match=told):
            polynomial_attention(draw()[0], key, key, **{"degree": 2, **options})


class TestPolynomialDegree:
    @pytest.mark.parametrize("score", [1e-3, 0.3, 1.0, 2.5, 10.0, 60.0])
    @pytest.mark.parametrize("error", [0.5, 1e-2, 1e-9])
    def test_is_the_smallest_with_the_bound(self, score, error):
        def bound(degree):
            return attention_error_bound(Taylor(degree).error_bound(math.sqrt(score)), 1.0)

        degree = polynomial_degree(score, error)
        assert bound(degree) <= error
        assert all(bound(lower) > error for lower in range(degree))

    def test_grows_as_the_derived_multiple_of_the_score(self):
        factor = 3.5911214766686222  # k (log k - 1) = 1
        assert factor * (math.log(factor) - 1) == pytest.approx(1)
        assert polynomial_degree(1e5, 1e-2) / 1e5 == pytest.approx(factor, rel=1e-3)

    def test_nothing_to_approximate(self):
        assert polynomial_degree(0.0, 1e-9) == 0

    @pytest.mark.parametrize(("score", "error"), [(-1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, 0.0)])
    def test_says_what_is_wrong(self, score, error):
        with pytest.raises(ValueError, match="expected a finite number"):
            polynomial_degree(score, error)


def test_scores_and_coefficients_that_no_polynomial_has_are_refused() -> None:
    with pytest.raises(ValueError, match="score: expected at most 1e"):
        polynomial_degree(1e308, 0.1)
    for coefficients in ([1.0, 1.0], [1.0] * 5):
        with pytest.raises(ValueError, match=r"coefficients: expected degree \+ 1 = 4 numbers"):
            polynomial_exponential(jnp.ones(3), 3, coefficients)
