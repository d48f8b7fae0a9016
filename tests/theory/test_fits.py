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
