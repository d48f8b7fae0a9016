"""Power laws: an exponent with its confidence interval, from repeated measurements over a range of sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Exponent:
    """The exponent p of ``error = C size^p`` with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """E.g. ``-0.498 [-0.512, -0.484]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def distance(self, expected: float) -> float:
        """How far the farther end of the interval is from the expected exponent."""
        return max(abs(self.low - expected), abs(self.high - expected))


def exponent(sizes: np.ndarray, errors: np.ndarray) -> Exponent:
    """Least-squares slope of log error against log size.

    Args:
      sizes: [k] sizes, k >= 3.
      errors: [repeats, k] positive measurements, independent between repeats. With several repeats the interval is that
        of the mean of the repeats' slopes (Student's t); with one it is the regression's own.

    Returns:
      the exponent and its 95 % interval.
    """
    errors = np.atleast_2d(np.asarray(errors, float))
    log_sizes = np.log(np.asarray(sizes, float))
    if len(errors) == 1:
        fit = stats.linregress(log_sizes, np.log(errors[0]))
        spread = fit.stderr * stats.t.ppf(0.975, len(log_sizes) - 2)
        return Exponent(float(fit.slope), float(fit.slope - spread), float(fit.slope + spread))
    slopes = np.array([stats.linregress(log_sizes, np.log(row)).slope for row in errors])
    spread = stats.sem(slopes) * stats.t.ppf(0.975, len(slopes) - 1)
    return Exponent(float(slopes.mean()), float(slopes.mean() - spread), float(slopes.mean() + spread))
