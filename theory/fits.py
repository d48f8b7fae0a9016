"""Power laws: an exponent with its confidence interval."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from theory.claim import Undecidable

SURE = 0.999
"""The confidence with which an exponent is called wrong. Of a report's many 95 % intervals some miss what is true."""


@dataclasses.dataclass(frozen=True)
class Exponent:
    """The exponent p of ``error = C size^p`` with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    reach: float = 0.0
    """Half the length of the interval of confidence ``SURE``."""

    def __str__(self) -> str:
        """Return e.g. ``-0.498 [-0.512, -0.484]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def gap(self, expected: float) -> float:
        """Return how far the interval is from the expected exponent, 0 if it holds it."""
        return max(self.low - expected, expected - self.high, 0.0)

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def distance(self, expected: float) -> float:
        """Return how far the farther end of the interval is from the expected exponent."""
        return max(abs(self.low - expected), abs(self.high - expected))


def check_narrow(slope: Exponent, widest: float, what: str) -> None:
    """Refuse to judge an exponent that is too uncertain to be told from others.

    Args:
        slope: the exponent.
        widest: the largest half width of its interval.
        what: whose exponent it is.

    Raises:
        Undecidable: the interval is wider, or not finite. Few and short rows have few entries, whose errors scatter.
    """
    if not slope.half_width <= widest:
        raise Undecidable(
            f"undecidable by these draws: the exponent of {what}, {slope}, is uncertain by more than {widest:g}: take more rows"
        )


def check_apart(slope: Exponent, bound: float, what: str) -> None:
    """Refuse to judge an exponent whose interval has the bound inside.

    Args:
        slope: the exponent.
        bound: that it is to be below.
        what: whose exponent it is.

    Raises:
        Undecidable: the exponent is below the bound, and the upper end of its interval is not.
    """
    if slope.value <= bound < slope.high:
        raise Undecidable(
            f"undecidable by these draws: the exponent of {what}, {slope}, may be above {bound:g}: take more rows"
        )


def check_settled(slope: Exponent, expected: float, allowed: float, what: str) -> None:
    """Refuse to judge an exponent whose 95 % interval misses what is expected, and whose interval of ``SURE`` does not.

    Args:
        slope: the exponent.
        expected: what it tends to.
        allowed: how far the interval may be from it.
        what: whose exponent it is.

    Raises:
        Undecidable: the draws say neither.
    """
    if slope.gap(expected) > allowed and abs(slope.value - expected) - slope.reach <= allowed:
        raise Undecidable(
            f"undecidable by these draws: the exponent of {what}, {slope}, is not {expected:g} with 95 % confidence, and may "
            f"be with {100 * SURE:g} %: take another seed, or more rows"
        )


def exponent(sizes: ArrayLike, errors: ArrayLike) -> Exponent:
    """Return the least-squares slope of log error against log size.

    Args:
        sizes: [k] sizes, k >= 3; repeated measurements at one size are points of their own.
        errors: [k] positive measurements.

    Returns:
        the exponent and the regression's own 95 % interval (Student's t), which takes the points as independent.
    """
    fit = stats.linregress(np.log(np.asarray(sizes, float)), np.log(np.asarray(errors, float)))
    # without any scatter scipy divides zero by zero
    spread, reach = (
        np.nan_to_num(fit.stderr) * stats.t.ppf((1 + sure) / 2, np.size(sizes) - 2) for sure in (0.95, SURE)
    )
    return Exponent(float(fit.slope), float(fit.slope - spread), float(fit.slope + spread), float(reach))
