"""Calibration error by hand, on what is calibrated by construction, and what a temperature can mend."""

import numpy as np
import pytest
from scipy.special import log_softmax

from train.confidence import calibration_error, reliability, scaled, temperature


def drawn(sharpness: float, rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities that are ``sharpness`` times as sure as they should be, and labels drawn from the true ones."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, 4))
    true = np.exp(log_softmax(logits, axis=1))
    labels = (true.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    return log_softmax(sharpness * logits, axis=1), labels


def error(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    return calibration_error(reliability(np.exp(log_probabilities), labels))


def test_by_hand() -> None:
    """Two rows at 0.9, one right; one at 0.6, right: (2 |0.5 - 0.9| + 1 |1 - 0.6|) / 3."""
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    bins = reliability(probabilities, np.array([0, 0, 0]))
    assert [(b.rows, round(b.confidence, 12), b.accuracy) for b in bins] == [(1, 0.6, 1.0), (2, 0.9, 0.5)]
    assert calibration_error(bins) == pytest.approx((2 * 0.4 + 0.4) / 3)


def test_what_is_calibrated_has_a_small_error_and_what_is_too_sure_has_not() -> None:
    """20,000 rows in 15 bins: an accuracy is known to about sqrt(0.25 / 1300) = 0.014, the weighted mean of |.| to less."""
    assert error(*drawn(1.0)) < 0.015
    assert error(*drawn(3.0)) > 0.15


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_a_temperature_chosen_on_half_mends_the_other_half_and_no_prediction(sharpness: float) -> None:
    log_probabilities, labels = drawn(sharpness)
    t = temperature(log_probabilities[:10_000], labels[:10_000])
    assert t == pytest.approx(sharpness, rel=0.05)
    mended = scaled(log_probabilities[10_000:], t)
    assert calibration_error(reliability(mended, labels[10_000:])) < 0.025 < error(log_probabilities, labels)
    np.testing.assert_array_equal(mended.argmax(axis=1), log_probabilities[10_000:].argmax(axis=1))


def test_one_is_in_the_last_bin_and_nothing_is_refused() -> None:
    assert calibration_error(reliability(np.array([[1.0, 0.0]]), np.array([0]))) == 0
    with pytest.raises(ValueError, match=r"expected probabilities \[rows, classes\]"):
        reliability(np.ones((3, 2)), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"got \(0, 2\)"):
        reliability(np.ones((0, 2)), np.zeros(0, int))
