r"""How far a classifier's confidence can be believed: calibration error, reliability, temperature.

Confidence is the largest probability of a row. Rows are put into :data:`BINS` bins of equal width by confidence, and

.. math::  \mathrm{ECE} = \sum_b \frac{|B_b|}{N} |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)| .

Temperature scaling, the control: one number T, chosen on *validation*, divides the logits; it changes no prediction.

Source: Guo et al., On calibration of modern neural networks, arXiv 1706.04599.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ntk_prefix.checks import UsageError

__all__ = ["BINS", "Bin", "calibration_error", "reliability", "scaled", "temperature"]

BINS = 15


class Bin(NamedTuple):
    """Rows of like confidence."""

    rows: int
    confidence: float
    """Mean of the rows' own."""
    accuracy: float


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[Bin]:
    """Return the bins that are not empty, least confident first.

    Args:
        probabilities: [rows, classes].
        labels: [rows].

    Raises:
        ValueError: shapes that do not belong together, or no rows.
    """
    if probabilities.ndim != 2 or probabilities.shape[:1] != labels.shape or not len(labels):
        raise UsageError(
            f"expected probabilities [rows, classes] and labels [rows], got {probabilities.shape} and {labels.shape}"
        )
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # bin b is (b / BINS, (b + 1) / BINS]; a probability is never 0 as the largest
    where = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Bin(int(mine.sum()), float(confidence[mine].mean()), float(correct[mine].mean()))
        for mine in (where == b for b in range(BINS))
        if mine.any()
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error, in [0, 1]."""
    return sum(b.rows * abs(b.accuracy - b.confidence) for b in bins) / sum(b.rows for b in bins)


def temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the T in [1/20, 20] whose ``softmax(logits / T)`` has the least cross entropy on these rows.

    Args:
        log_probabilities: [rows, classes], or logits: they differ by a number per row.
        labels: [rows].
    """

    def loss(log_t: float) -> float:
        return -np.mean(log_softmax(log_probabilities / np.exp(log_t), axis=1)[np.arange(len(labels)), labels])

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


def scaled(log_probabilities: np.ndarray, t: float) -> np.ndarray:
    """Return the probabilities at a temperature."""
    return np.exp(log_softmax(log_probabilities / t, axis=1))
