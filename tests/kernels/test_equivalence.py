"""Two kernels from one start: how far they get apart, what bounds it, and a W that brings them together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_prefix.kernels import equivalence


def kernel(random, n, rank, decay=1.0):
    """A kernel with eigenvalues that fall as powers, and the features it is made of."""
    features = random.normal(size=(n, rank)) * (1 + np.arange(rank)) ** -decay
    return features @ features.T, features


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 12),
    rank=st.integers(1, 16),
    size=st.floats(-6, 1),
    steps=st.integers(1, 300),
    rate=st.floats(0.01, 1),
)
def test_runs_are_gradient_descent_s_and_their_distance_is_bounded(seed, n, rank, size, steps, rate):
    random = np.random.default_rng(seed)
    ntk, _ = kernel(random, n, rank)
    change, _ = kernel(random, n, rank)
    mixed = abs(1 - 10**size) * ntk + 10**size * change
    error = random.normal(size=(n, 2))
    step = rate / max(np.linalg.eigvalsh(each)[-1] for each in (ntk, mixed))
    found = equivalence.training_distance(ntk, mixed, error, learning_rate=step, steps=steps)
    one, other, whole = error, error, np.linalg.norm(error)
    for t in range(steps + 1):
        assert found.curve[t] == pytest.approx(np.linalg.norm(one) / whole, abs=1e-10)
        assert found.other_curve[t] == pytest.approx(np.linalg.norm(other) / whole, abs=1e-10)
        assert found.distance[t] == pytest.approx(np.linalg.norm(one - other) / whole, abs=1e-10)
        one, other = one - step * ntk @ one, other - step * mixed @ other
    assert (np.abs(found.curve - found.other_curve) <= found.distance + 1e-10).all()
    assert (found.distance <= found.bound + 1e-10).all()
    assert (found.distance <= found.spectral_bound + 1e-10).all()


def test_the_theorem_s_constant():
    """Uniformly in t up to 1/(2 eta lambda), section 6, (5): the sum of h(u) h(s) that multiplies epsilon."""
    for steps in (1, 2, 3, 10, 100, 1000):
        slowest = equivalence._slowest(1.0, 1 / (2 * steps), steps)
        assert np.convolve(slowest, slowest)[steps - 1] <= np.pi / (2 * np.e**0.5) + 2.3 / steps**0.5


def test_weights_by_least_squares_are_the_best_and_exact_with_enough_features():
    random = np.random.default_rng(0)
    ntk, _ = kernel(random, 20, 30)
    features = random.normal(size=(20, 6))
    whitening = np.linalg.cholesky(ntk + 0.1 * np.eye(20))

    def distance(weights):
        return np.linalg.norm(
            np.linalg.solve(whitening, np.linalg.solve(whitening, features @ weights @ features.T - ntk).T)
        )

    best = equivalence.training_weights(features, ntk, 0.1)
    assert np.linalg.eigvalsh(best)[0] >= -1e-12
    for _ in range(20):
        change = 1e-3 * random.normal(size=(6, 6))
        assert distance(best) <= distance(best + change + change.T)
    features = random.normal(size=(20, 20))
    weights = equivalence.training_weights(features, ntk, 0.1)
    assert equivalence.relative_distance(ntk, features @ weights @ features.T, 0.1) <= 1e-10


def test_leverage_adds_up_to_the_effective_dimension_and_greedy_anchors_span():
    random = np.random.default_rng(0)
    ntk, features = kernel(random, 15, 40)
    scores = equivalence.leverage_scores(features, 0.3)
    assert scores.sum() == pytest.approx(np.trace(np.linalg.solve(ntk + 0.3 * np.eye(15), ntk)))
    assert scores.max() <= 1
    order = equivalence.greedy_anchors(features, 0.3, 15)
    assert order[0] == scores.argmax()
    assert len(set(order)) == np.linalg.matrix_rank(features[:, order]) == 15
    np.testing.assert_array_equal(order[:4], equivalence.greedy_anchors(features, 0.3, 4))


def test_what_does_not_fit_is_refused():
    ntk = np.eye(3)
    with pytest.raises(ValueError, match="learning_rate: expected at most 1 / 2"):
        equivalence.training_distance(ntk, 2 * ntk, np.ones((3, 1)), learning_rate=0.6, steps=3)
    with pytest.raises(ValueError, match="count: expected at most 3"):
        equivalence.greedy_anchors(np.ones((3, 9)), 0.1, 4)
    with pytest.raises(ValueError, match="resolution: expected a finite number > 0"):
        equivalence.leverage_scores(np.ones((3, 9)), 0.0)


KERNEL, ERROR = np.diag([1.0, 0.5, 0.1]), np.ones((3, 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"error": np.zeros((3, 1))}, "error: expected .*not all of it 0"),
        ({"ntk": KERNEL * np.nan}, "ntk: expected finite numbers"),
        ({"ntk": -KERNEL}, "ntk: expected a positive semidefinite kernel"),
        ({"ntk": KERNEL + np.triu(np.ones((3, 3)), 1)}, "ntk: expected a symmetric kernel"),
    ],
)
def test_what_training_distance_is_not_of_is_refused(change: dict[str, np.ndarray], told: str) -> None:
    given = {"ntk": KERNEL, "other": KERNEL, "error": ERROR} | change
    with pytest.raises(ValueError, match=told):
        equivalence.training_distance(**given, learning_rate=0.5, steps=3)


def test_a_resolution_below_the_rounding_of_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution: expected a number above"):
        equivalence.leverage_scores(np.ones((3, 4)), 1e-17)
    with pytest.raises(ValueError, match="resolution: expected a number above"):
        equivalence.relative_distance(-KERNEL, KERNEL, 1e-3)
