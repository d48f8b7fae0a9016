"""A bound on the expected error: it holds as often as it says, and says as much as there is to say."""

import numpy as np
import pytest
from scipy import stats

from ntk_prefix.statistics import expected_error_bound, success_probability_bound


@pytest.mark.parametrize(
    "shape", [(0.3, 0.3), (0.05, 2.0), (5.0, 1.0)], ids=["two ends", "rare and large", "mostly large"]
)
def test_it_holds_with_the_probability_that_it_states(shape: tuple[float, float]) -> None:
    """100 draws of a skewed loss: at delta = 0.1, 10 failures are expected at most, 20 are 3.3 standard errors more."""
    random = np.random.default_rng(0)
    truth = shape[0] / sum(shape)
    assert sum(expected_error_bound(random.beta(*shape, 12), 0.1, 1.0) < truth for _ in range(100)) <= 20


def test_without_its_concentration_term_it_would_not() -> None:
    random = np.random.default_rng(0)
    assert sum(random.beta(0.05, 2.0, 12).mean() < 0.05 / 2.05 for _ in range(100)) > 2 * 20


@pytest.mark.parametrize("texts", [1, 12, 200])
def test_losses_of_zero_leave_what_none_could_have_seen(texts: int) -> None:
    """A loss of ``upper`` with probability p is missed by all texts with (1 - p)^n: no bound may be below p then."""
    least = 1 - 0.05 ** (1 / texts)
    found = expected_error_bound(np.zeros(texts), 0.05, 1.0)
    assert least <= found <= 1.8 * least + 0.01


def test_more_texts_and_less_scatter_bring_it_nearer_to_the_mean() -> None:
    random = np.random.default_rng(0)
    above = [
        expected_error_bound(x, 0.05, 1.0) - x.mean()
        for x in (
            0.5 + scatter * random.uniform(-0.5, 0.5, texts) for texts, scatter in ((20, 1), (800, 1), (800, 0.1))
        )
    ]
    assert above[0] > 4 * above[1] > 8 * above[2] > 0


def test_it_neither_depends_on_the_order_nor_on_the_unit() -> None:
    losses = np.random.default_rng(0).uniform(size=30)
    bound = expected_error_bound(losses, 0.05, 1.0)
    assert expected_error_bound(losses[::-1], 0.05, 1.0) == pytest.approx(bound, rel=1e-12)
    assert expected_error_bound(7 * losses, 0.05, 7.0) == pytest.approx(7 * bound, rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "delta", "found"), [([1.0, 1.0], 0.05, 1.0), ([0.0], 1e-300, 1.0), ([0.5], 0.999, 0.5)]
)
def test_at_the_ends(losses: list[float], delta: float, found: float) -> None:
    assert expected_error_bound(losses, delta, 1.0) == pytest.approx(found, abs=2e-3)


@pytest.mark.parametrize(
    ("losses", "delta", "upper", "told"),
    [
        ([], 0.1, 1.0, r"losses: expected \[n\] with n >= 1"),
        ([[0.1, 0.2]], 0.1, 1.0, "mean over each text's tokens"),
        ([0.1, 1.5], 0.1, 1.0, r"losses: expected numbers in \[0, 1\], got 1.5 at 1"),
        ([0.1, np.nan], 0.1, 1.0, "got nan at 1"),
        ([-1e-9], 0.1, 1.0, "got -1e-09 at 0"),
        ([0.1], 1.0, 1.0, "delta: expected a probability"),
        ([0.1], 0.1, np.inf, "upper: expected a finite number"),
    ],
)
def test_what_is_no_loss_is_refused(losses: list, delta: float, upper: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        expected_error_bound(losses, delta, upper)


@pytest.mark.parametrize("trials", [1, 10, 45])
def test_so_many_successes_would_be_as_rare_as_it_states_at_the_bound(trials: int) -> None:
    for successes in range(1, trials + 1):
        bound = success_probability_bound(successes, trials, 0.01)
        assert stats.binom.sf(successes - 1, trials, bound) == pytest.approx(0.01, rel=1e-6)
    assert success_probability_bound(0, trials, 0.01) == 0


def test_it_is_below_the_probability_as_often_as_it_states_and_the_share_is_not() -> None:
    bounds = np.array([success_probability_bound(k, 20, 0.05) for k in range(21)])
    for p in np.linspace(0.01, 0.99, 99):
        counts = stats.binom.pmf(np.arange(21), 20, p)
        assert counts[bounds > p].sum() <= 0.05
    assert stats.binom.pmf(np.arange(21), 20, 0.5)[np.arange(21) / 20 > 0.5].sum() > 0.05


def test_more_successes_than_trials_are_none() -> None:
    with pytest.raises(ValueError, match="successes: expected at most trials = 3, got 4"):
        success_probability_bound(4, 3, 0.1)
