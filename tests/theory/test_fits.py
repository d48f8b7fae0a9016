"""Exponents: what is too uncertain is not judged."""

import numpy as np
import pytest

from theory import fits
from theory.claim import Undecidable


def test_an_exponent_that_scatters_is_undecided_and_a_certain_one_is_not() -> None:
    sizes, scatter = np.repeat([64.0, 256.0, 1024.0], 2), np.array([0.9, 1.1] * 3)
    certain = fits.exponent(sizes, sizes**-0.5 * scatter**0.1)
    fits.check_narrow(certain, 0.1, "an error")
    uncertain = fits.exponent(sizes, sizes**-0.5 * scatter**5)
    assert uncertain.low < -0.5 < uncertain.high, "it would pass where only its interval is asked for"
    for slope in (uncertain, fits.Exponent(-0.5, float("nan"), float("nan"))):
        with pytest.raises(Undecidable, match=r"the exponent of an error, -0.5.*uncertain by more than 0.1"):
            fits.check_narrow(slope, 0.1, "an error")


def test_an_exponent_that_may_be_above_its_bound_is_not_judged() -> None:
    for slope in (fits.Exponent(-1.3, -1.6, -1.1), fits.Exponent(-0.8, -1.1, -0.5), fits.Exponent(1.2, 0.9, 1.5)):
        fits.check_apart(slope, -1.0, "an error")  # below it, and above it: the check says which
    with pytest.raises(Undecidable, match=r"the exponent of an error, -1.26.* may be above -1"):
        fits.check_apart(fits.Exponent(-1.26, -1.58, -0.95), -1.0, "an error")


def test_an_exponent_is_called_wrong_with_more_confidence_than_a_report_has_intervals() -> None:
    for slope in (fits.Exponent(-0.45, -0.49, -0.41, 0.07), fits.Exponent(-0.2, -0.28, -0.12, 0.14)):
        fits.check_settled(slope, -0.5, 0.05, "an error")  # as expected, and not: the check says which
    with pytest.raises(Undecidable, match=r"error, -0.375 .* not -0.5 with 95 % confidence, and may be with 99.9 %"):
        fits.check_settled(fits.Exponent(-0.375, -0.455, -0.295, 0.14), -0.5, 0.02, "an error")
    sizes, draws = np.repeat([64.0, 256.0, 1024.0], 4), np.random.default_rng(0)
    slopes = [fits.exponent(sizes, sizes**-0.5 * np.exp(draws.normal(size=12) / 4)) for _ in range(2000)]
    missed = np.mean([slope.gap(-0.5) > 0 for slope in slopes])
    surely = np.mean([abs(slope.value + 0.5) > slope.reach for slope in slopes])
    assert missed == pytest.approx(0.05, abs=0.02)
    assert surely < 0.004
