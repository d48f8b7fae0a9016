"""A few tokens for many: exact where they are asked to be, bounded elsewhere, and for elu1 exact everywhere."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_prefix import PrefixState
from ntk_prefix.feature_maps import Taylor
from ntk_prefix.quadrature import caratheodory, moment_rule_error, representing_prefix


def masses_at(queries, keys):
    """[M, n]: a token's part of the mass, over the whole mass of the query."""
    scores = keys @ queries.T
    return np.exp(scores - scores.max(0)) / np.exp(scores - scores.max(0)).sum(0)


class TestCaratheodory:
    @settings(max_examples=30)
    @given(n=st.integers(1, 40), tokens=st.integers(1, 600), width=st.integers(1, 9), score=st.floats(0.01, 30))
    def test_at_most_n_tokens_meet_n_masses(self, n, tokens, width, score):
        random = np.random.default_rng([n, tokens, width])
        keys, weights = random.normal(size=(tokens, width)), random.uniform(0, 2, tokens)
        features = masses_at(score * random.normal(size=(n, width)), keys)
        chosen, masses = caratheodory(features, weights)
        assert len(chosen) <= min(n, tokens)
        assert (np.diff(chosen) > 0).all()
        assert (masses > 0).all()
        np.testing.assert_allclose(masses @ features[chosen], weights @ features, rtol=1e-12)

    def test_a_hundred_conditions_of_thousands_of_tokens(self):
        random = np.random.default_rng(0)
        features = masses_at(1.5 * random.normal(size=(100, 8)), random.normal(size=(3000, 8)))
        chosen, masses = caratheodory(features, np.ones(3000))
        assert len(chosen) <= 100
        np.testing.assert_allclose(masses @ features[chosen], np.ones(100), rtol=1e-12)

    def test_dependent_conditions_take_as_many_tokens_as_their_rank(self):
        random = np.random.default_rng(0)
        features = np.concatenate([np.ones((500, 1)), random.normal(size=(500, 3))], axis=1)
        chosen, masses = caratheodory(features @ random.normal(size=(4, 12)), np.ones(500))
        assert len(chosen) == 4
        np.testing.assert_allclose(masses @ features[chosen], features.sum(0), atol=1e-10)

    def test_tokens_that_stand_more_than_once_are_no_trouble(self):
        features = np.tile(masses_at(np.eye(4), np.random.default_rng(0).normal(size=(30, 4))), (3, 1))
        chosen, masses = caratheodory(features, np.ones(90))
        assert len(chosen) <= 4
        np.testing.assert_allclose(masses @ features[chosen], features.sum(0), rtol=1e-12)

    def test_numerators_with_their_own_values_and_with_ones_of_their_own(self):
        random = np.random.default_rng(0)
        features, values = (
            masses_at(random.normal(size=(6, 3)), random.normal(size=(400, 3))),
            random.normal(size=(400, 2)),
        )
        both = np.concatenate([features, (features[:, :, None] * values[:, None]).reshape(400, -1)], axis=1)
        chosen, masses = caratheodory(both, np.ones(400))
        assert len(chosen) <= 6 * 3
        outputs = (masses[:, None] * features[chosen]).T @ values[chosen]
        np.testing.assert_allclose(outputs, features.T @ values, atol=1e-12)
        chosen, _ = caratheodory(features, np.ones(400))
        z = np.linalg.solve(features[chosen].T, features.T @ values)
        np.testing.assert_allclose(features[chosen].T @ z, features.T @ values, atol=1e-12)

    def test_no_token_no_mass(self):
        for features, weights in (
            (np.zeros((0, 3)), np.zeros(0)),
            (np.ones((4, 2)), np.zeros(4)),
            (np.zeros((4, 2)), np.ones(4)),
        ):
            chosen, masses = caratheodory(features, weights)
            assert chosen.shape == masses.shape == (0,)

    @pytest.mark.parametrize(
        ("features", "weights", "told"),
        [
            (np.ones(3), np.ones(3), r"features: expected \[M, n\]"),
            (np.ones((3, 2)), np.ones(2), r"weights: expected \[3\]"),
            (np.full((3, 2), np.inf), np.ones(3), "in log space"),
            (np.ones((3, 2)), -np.ones(3), "finite numbers >= 0, got -1"),
            ([[1.0], [1.0, 2.0]], np.ones(2), "features: expected real numbers, got lists of several lengths"),
            (np.ones((2, 1)), [1.0, [2.0]], "weights: expected real numbers, got lists of several lengths"),
        ],
    )
    def test_what_is_no_measure_is_refused(self, features, weights, told):
        with pytest.raises(ValueError, match=told):
            caratheodory(features, weights)


class TestMomentRule:
    def test_the_error_stays_below_the_bound_and_the_bound_below_taylor_s(self):
        random = np.random.default_rng(0)
        keys, queries = random.uniform(-1, 1, (800, 2)), random.uniform(-1.5, 1.5, (50, 2))
        scores = queries @ keys.T
        center, half = (scores.max(1) + scores.min(1)) / 2, (scores.max(1) - scores.min(1)) / 2
        for degree in range(1, 6):
            chosen, masses = caratheodory(np.asarray(Taylor(degree)(jnp.asarray(keys))), np.ones(800))
            assert len(chosen) <= math.comb(2 + degree, degree)
            errors = np.abs(np.exp(scores[:, chosen]) @ masses / np.exp(scores).sum(1) - 1)
            for error, s, mean in zip(errors, half, scores.mean(1) - center, strict=True):
                bound = moment_rule_error(degree, s, mean)
                assert error <= bound <= moment_rule_error(degree, s)
                assert moment_rule_error(degree, s) <= 2 * math.exp(2 * s) * s ** (degree + 1) / math.factorial(
                    degree + 1
                )

    @pytest.mark.parametrize(("degree", "score"), [(0, 1.0), (4, 1.0), (9, 5.0)])
    def test_two_rules_that_agree_on_moments_differ_by_nearly_all_of_it(self, degree, score):
        """Points where the Chebyshev polynomial of the next degree is 1 and -1, at s = score, in units of the mass."""
        place = np.arange(degree + 2)
        share = np.where((place == 0) | (place == degree + 1), 0.5, 1) / (degree + 1) * 2
        points = score * np.cos(place * math.pi / (degree + 1))
        apart = abs(np.sum((-1.0) ** place * share * np.exp(points)))
        bound = moment_rule_error(degree, score, 0.0)
        assert 0.7 * bound <= apart <= bound

    def test_ends(self):
        assert moment_rule_error(3, 0.0) == 0
        assert moment_rule_error(0, 1e4) == math.inf
        assert 0 <= moment_rule_error(5000, 400.0) < 1e-300
        with pytest.raises(ValueError, match="mean: expected a number within 1 of 0"):
            moment_rule_error(1, 1.0, 2.0)


class TestRepresentingPrefix:
    @settings(max_examples=30)
    @given(width=st.integers(1, 24), rank=st.integers(0, 24), size=st.floats(-8, 8), seed=st.integers(0, 9))
    def test_it_has_the_state_s_sums_and_no_token_too_many(self, width, rank, size, seed):
        random = np.random.default_rng(seed)
        rank = min(rank, width)
        k = np.exp(random.normal(size=width) + size)
        z = random.normal(size=(width, rank)) @ random.normal(size=(rank, width))
        keys, values = representing_prefix(z, k)
        assert rank <= len(keys) <= min(rank + 1, width)
        features = np.where(keys > 0, keys + 1, np.exp(np.minimum(keys, 0)))
        np.testing.assert_allclose(features.sum(0), k, rtol=1e-12)
        np.testing.assert_allclose(features.T @ values, z, atol=1e-9 * max(np.abs(z).max(), 1e-9))

    def test_its_state_is_the_state(self):
        random = np.random.default_rng(0)
        z, k = random.normal(size=(8, 8)), random.uniform(0.1, 9, 8)
        keys, values = representing_prefix(z, k)
        state = PrefixState.from_prefix(jnp.asarray(keys)[:, None], jnp.asarray(values)[:, None], scale=1.0)
        np.testing.assert_allclose(state.k[0], k, rtol=1e-12)
        np.testing.assert_allclose(state.z[0], z, atol=1e-12)

    @pytest.mark.parametrize("k", [[1.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
    def test_what_no_prefix_sums_to_is_refused(self, k):
        with pytest.raises(ValueError, match="state of no prefix"):
            representing_prefix(np.ones((2, 2)), np.array(k))

    def test_shapes_are_told(self):
        with pytest.raises(ValueError, match=r"expected \[R, H\] and \[R\]"):
            representing_prefix(np.ones((2, 2)), np.ones(3))


@pytest.mark.parametrize(("size", "mass"), [(1e308, 10.0), (1e-200, 1e-200), (1.0, 1e308)])
def test_conditions_near_the_ends_of_float64_are_met(size: float, mass: float) -> None:
    features = np.random.default_rng(0).uniform(0.5, 1, size=(12, 2))
    kept, masses = caratheodory(features * size, np.full(12, mass) / 12)
    assert len(kept) <= 2
    np.testing.assert_allclose(masses / mass @ features[kept], features.mean(0), rtol=1e-12)


def test_what_is_not_real_is_refused() -> None:
    with pytest.raises(ValueError, match="features: expected real numbers, got complex128"):
        caratheodory(np.ones((3, 1)) * 1j, np.ones(3))
    with pytest.raises(ValueError, match="z, k: expected quotients z / k that float64 holds"):
        representing_prefix(np.full((3, 2), 1e10), np.full(3, 1e-300))


def test_the_bound_of_wide_scores_takes_no_more_memory() -> None:
    # about a mean at the upper end, sum_{t > 0} e^-s I_t(s) is nearly a half
    assert moment_rule_error(0, 1e8, 1e8) == pytest.approx(2, rel=1e-3)
    with pytest.raises(ValueError, match="score: expected at most 1e"):
        moment_rule_error(3, 1e12)
