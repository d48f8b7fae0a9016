"""The nearest polynomial: its bound holds everywhere, is hardly above the error, and no other weights do as well."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import softmax_attention
from ntk_prefix.feature_maps import Minimax, Taylor, attention_error_bound
from ntk_prefix.polynomial import polynomial_attention, polynomial_degree, polynomial_exponential


def error(coefficients: tuple[float, ...], score: float) -> float:
    """The largest relative error on a fine grid."""
    scores = np.linspace(-score, score, 50_001)
    found = polynomial_exponential(jnp.asarray(scores), len(coefficients) - 1, coefficients)
    return float(np.abs(np.asarray(found) * np.exp(-scores) - 1).max())


@pytest.mark.parametrize(("degree", "score"), [(0, 0.3), (1, 1.0), (4, 2.0), (8, 4.0), (14, 8.0)])
def test_the_bound_is_just_above_the_error(degree: int, score: float) -> None:
    phi = Minimax(degree, score)
    for size in (0.7 * score, score, 1.2 * score):
        found = error(phi.coefficients, size)
        assert found * (1 - 1e-12) <= phi.error_bound(size**0.5) <= 1.001 * found + 1e-5


@pytest.mark.parametrize(("degree", "score"), [(2, 1.0), (6, 4.0)])
def test_no_other_weight_does_better(degree: int, score: float) -> None:
    """Each of them is needed: a hundredth more or less of any is further from the exponential, and 1.5 times far off."""
    best = Minimax(degree, score).coefficients
    for t in range(degree + 1):
        for factor in (0.99, 1.01, 1.5):
            other = (*best[:t], factor * best[t], *best[t + 1 :])
            assert error(other, score) > (1 if factor != 1.5 else 2) * error(best, score)
    assert error(best, score) < Taylor(degree).error_bound(score**0.5) / 10


@pytest.mark.parametrize(
    ("degree", "score"), [(1, 5e-324), (5, 1e-9), (20, 1e-4), (20, 1e-3), (40, 0.01), (40, 1.0), (40, 8.0), (64, 8.0)]
)
def test_is_never_further_off_than_taylors(degree: int, score: float) -> None:
    """Where a degree is high for its score, a linear program's terms of high degree are rounding times 1e40."""
    phi, taylor = Minimax(degree, score), Taylor(degree)
    rounding = 1e-6 if score > 1 else 1e-12
    assert phi.error_bound(score**0.5) <= taylor.error_bound(score**0.5) + rounding
    assert max(phi.coefficients) < 2


def test_half_as_much_is_no_bound() -> None:
    """The error is met: two thirds of what is promised are exceeded."""
    for degree, score in ((2, 0.5), (4, 2.0), (8, 4.0)):
        phi = Minimax(degree, score)
        assert error(phi.coefficients, score) > phi.error_bound(score**0.5) / 1.5


def test_features_are_the_polynomial() -> None:
    x, y = np.random.default_rng(0).uniform(-0.7, 0.7, (2, 9, 3))
    phi = Minimax(4, 1.5)
    wanted = polynomial_exponential(jnp.asarray(x @ y.T), 4, phi.coefficients)
    np.testing.assert_allclose(phi(jnp.asarray(x)) @ phi(jnp.asarray(y)).T, wanted, atol=1e-14)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_keeps_its_bound(is_causal: bool) -> None:
    query, key, value = (jnp.asarray(x) for x in np.random.default_rng(1).uniform(-1, 1, (3, 1, 20, 1, 3)))
    score = float(jnp.abs(jnp.einsum("btnh,bsnh->bts", query, key)).max() / 3**0.5)
    found = polynomial_attention(query, key, value, degree=4, is_causal=is_causal, score=score)
    off = float(jnp.abs(found - softmax_attention(query, key, value, is_causal=is_causal)).max())
    allowed = attention_error_bound(Minimax(4, score).error_bound(score**0.5), float(jnp.abs(value).max()))
    assert 0 < off <= allowed < attention_error_bound(Taylor(4).error_bound(score**0.5), 1.0)


@pytest.mark.parametrize("score", [0.5, 2.0, 8.0])
def test_the_degree_is_the_smallest_that_is_proved(score: float) -> None:
    degree = polynomial_degree(score, 0.01, "minimax")
    below, kept = (Minimax(g, score).error_bound(score**0.5) for g in (degree - 1, degree))
    assert 2 * kept / (1 - kept) <= 0.01
    assert below >= 1 or 2 * below / (1 - below) > 0.01
    assert degree <= polynomial_degree(score, 0.01) - (score >= 2)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: Minimax(-1), "degree: expected a whole number >= 0"),
        (lambda: Minimax(65), "degree: expected at most 64"),
        (lambda: Minimax(2, 0.0), "score: expected a finite number > 0"),
        (lambda: Minimax(2, 9.0), "score: expected at most 8"),
        (lambda: polynomial_degree(1.0, 0.01, "best"), 'polynomial: expected "taylor" or "minimax"'),
        (
            lambda: polynomial_degree(8.0, 1e-9, "minimax"),
            "error: expected an error that a polynomial found in float64",
        ),
    ],
)
def test_what_cannot_be_meant(call, told: str, without_annotations: None) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_beyond_what_it_is_made_for_the_bound_says_so() -> None:
    phi = Minimax(4, 1.0)
    assert phi.error_bound(1.0) < phi.error_bound(1.4) < phi.error_bound(3.0)
    assert phi.error_bound(5.0) == np.inf
    assert Minimax(0, 1.0).positive
    assert not phi.positive
