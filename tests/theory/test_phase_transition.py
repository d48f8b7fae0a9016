"""The pieces of the claim ``phase_transition``: sequences, errors, costs, and checks that can fail."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import comb, ive

from ntk_prefix import softmax_attention
from ntk_prefix.feature_maps import Minimax
from ntk_prefix.polynomial import polynomial_attention, polynomial_degree
from theory import nearest
from theory.claims import phase_transition as claim
from theory.problem import Problem, load


@pytest.fixture
def problem() -> Problem:
    return load("digits", inputs=5, width=3, sigma=1.0, seed=0, profile="quick")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter sequences than the claim's."""
    monkeypatch.setattr(claim, "POWERS", range(6, 9))
    monkeypatch.setattr(nearest, "POWERS", (6, 8))


def scores_of(problem: Problem, power: int) -> np.ndarray:
    """Every pair's score over B^2."""
    keys = claim._drawn(problem.seed, claim.POWERS[-1])[: 2**power, :power].astype(float)
    return keys @ keys.T / power


@pytest.mark.usefixtures("short")
class TestSequences:
    @pytest.mark.parametrize("causal", [False, True])
    def test_signs_are_counted_by_score(self, problem: Problem, causal: bool) -> None:
        power = 7
        tokens = claim._signs(problem, power, causal)
        rows = claim._sampled(2**power, 16, causal)
        for row, unit, keys in zip(rows, *tokens, strict=True):
            seen = scores_of(problem, power)[row, : row + 1 if causal else None]
            assert keys.sum() == len(seen)
            np.testing.assert_allclose(np.sort(np.repeat(unit, keys.astype(int))), np.sort(seen), atol=1e-15)
            assert keys[0] >= 1, "every token sees itself, at the largest score"

    def test_the_last_causal_query_sees_everything_and_the_first_only_itself(self) -> None:
        rows = claim._sampled(256, 16, True)
        assert (rows[0], rows[-1]) == (0, 255)

    @pytest.mark.parametrize("degree", [2, 5])
    def test_the_distance_is_the_algorithm_s_error_for_the_worst_values(self, problem: Problem, degree: int) -> None:
        """Run the real thing on features with the values that each query finds worst."""
        power, largest = 6, 2.0
        scores = largest * scores_of(problem, power)
        exact = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        weights = sum(scores**t / math.factorial(t) for t in range(degree + 1))
        worst = np.sign(weights / weights.sum(1, keepdims=True) - exact)
        rows = claim._sampled(2**power, 16, False)
        keys = jnp.asarray(claim._drawn(problem.seed, 8)[: 2**power, :power] * math.sqrt(largest))[None, :, None]
        errors = []
        for row in rows:
            value = jnp.broadcast_to(jnp.asarray(worst[row])[None, :, None, None], keys.shape)
            found = polynomial_attention(keys, keys, value, degree=degree, scale=1 / power)
            errors.append(float((found - softmax_attention(keys, keys, value, scale=1 / power))[0, row, 0, 0]))
        expected = claim._distances(claim._signs(problem, power, False), largest, degree)[degree]
        assert max(errors) == pytest.approx(expected, abs=1e-12)


class TestDegrees:
    def test_needed_is_the_last_violation_and_one(self) -> None:
        assert claim._needed(np.array([1.0, 0.5, 0.009, 0.02, 0.001])) == 4
        assert claim._needed(np.array([0.001, 0.0001])) == 0
        assert claim._needed(np.array([1.0, np.nan, 0.001])) == 2

    def test_between_whole_degrees_the_error_is_interpolated(self) -> None:
        assert claim._between(np.array([1.0, 1e-1, 1e-3])) == pytest.approx(1.5)
        assert claim._between(np.array([1.0, 1e-2])) == pytest.approx(1.0)
        assert claim._between(np.array([1e-3])) == 0


class TestCost:
    def test_rank(self) -> None:
        assert math.exp(claim.log_rank(6, 4)) == pytest.approx(comb(10, 4))

    def test_operations_are_linear_or_square_at_a_given_width_and_degree(self) -> None:
        features = math.exp(claim.log_rank(10, 2)) * (2 * 11 + 2)
        assert claim.operations(10, 2) == pytest.approx(2**10 * features)
        assert claim.operations(10, 2, causal=True) > claim.operations(10, 2)
        assert claim.exact_operations(10) == 2**20 * 21

    @pytest.mark.parametrize("beta", [0.2, 0.7])
    def test_the_exponent_of_the_rank_is_the_derived_one(self, beta: float) -> None:
        def log_rank(power: int) -> float:
            return claim.log_rank(power, polynomial_degree(beta**2 * power * math.log(2), 0.01))

        slope = (log_rank(40000) - log_rank(20000)) / (20000 * math.log(2))
        assert slope == pytest.approx(claim.rank_exponent(claim.PROVED_GROWTH * beta**2), rel=1e-3)


@pytest.mark.usefixtures("short")
class TestChecks:
    def test_the_proved_degree_keeps_the_error_and_the_control_s_does_not(self, problem: Problem) -> None:
        errors = claim._errors(problem, {name: claim.REGIMES[name] for name in claim.CRITICAL}, ("full", "causal"))
        assert all(check.holds for check in claim._accuracy(errors, errors.proved))
        assert not claim._control(problem).holds

    def test_the_bound_can_fail(self, problem: Problem) -> None:
        errors = claim._errors(problem, {"beta = 1/4": claim.REGIMES["beta = 1/4"]}, ("full",))
        assert claim._bounded(errors).holds
        worse = {key: {power: 100 * e for power, e in found.items()} for key, found in errors.found.items()}
        assert not claim._bounded(errors._replace(found=worse)).holds


def test_operations_on_the_wrong_side_are_noticed() -> None:
    """Degrees of one side of the transition on the other: every check must turn."""
    low = {power: 2 for power in claim.POWERS}
    high = {power: power + 3 for power in claim.POWERS}
    right = {(kind, name): low for kind in ("full", "causal") for name in claim.BELOW}
    right |= {(kind, claim.ABOVE): high for kind in ("full", "causal")}
    assert all(check.holds for check in claim._counted(right))
    wrong = {(kind, name): high if name in claim.BELOW else low for kind, name in right}
    assert not any(check.holds for check in claim._counted(wrong))


def test_far_exponents() -> None:
    assert all(check.holds for check in claim._far())


class TestNearestPolynomial:
    def test_its_error_is_the_largest_that_any_values_see(self) -> None:
        scores, keys = np.array([[1.0, -0.5, 0.0], [-1.0, 0.5, 0.5]]), np.array([[1, 2, 1], [3, 1, 0]])
        weights = np.array(Minimax(1, 1.0).coefficients)
        errors = []
        for row, count in zip(scores, keys, strict=True):
            seen = np.repeat(row, count)
            near, exact = weights[0] + weights[1] * seen, np.exp(seen)
            errors.append(np.abs(near / near.sum() - exact / exact.sum()).sum())
        assert nearest.distance(scores, keys, 1, 1.0) == pytest.approx(max(errors))
        assert min(errors) < max(errors)

    def test_its_growth_is_that_of_chebyshev_s_series(self) -> None:
        score = 300.0

        def log_error(growth: float) -> float:
            # 2 e^S I_t(S) of the first term that is left out; ive is I e^-S
            return math.log(2) + 2 * score + math.log(ive(growth * score, score))

        assert log_error(1.02 * nearest.PROVED_GROWTH) < 0 < log_error(nearest.PROVED_GROWTH / 1.02)

    def test_it_is_used_up_to_the_scores_it_is_found_for(self) -> None:
        found = nearest.degrees(claim.REGIMES["beta = 1"], claim.ERROR)
        assert [degree is None for degree in found.values()] == [power > 11 for power in found]
        assert 0 < nearest.share_of_taylor(claim.REGIMES["beta = 1"], found, claim.ERROR) < claim.FEWER / 1.5
        assert nearest.share_of_taylor(claim.REGIMES["B = 1/2"], found, claim.ERROR) == 0
