r"""What a held-out error says of the expected one: an upper bound without assumptions, for few texts.

Losses ``x_1 .. x_n`` in [0, L] of independent texts have the same expectation ``mu``. For a bet ``c`` in [0, 1] and a
candidate ``t`` in [0, L) the capital

.. math::  C_c(t) = \prod_i \Bigl(1 + c \, \frac{t - x_i}{L - t}\Bigr)

is not negative, and its expectation is at most 1 if ``mu >= t``: every factor has expectation ``1 + c (t - mu)/(L - t)``.
So has a mean over bets that are fixed beforehand. By Markov's inequality it exceeds ``1/delta`` with probability at most
delta, and as it grows with t, the t at which it reaches ``1/delta`` is an upper bound on mu with probability 1 - delta.

The bets are those of the universal portfolio, the nodes of ``Beta(1/2, 1/2)``: as good as the best bet in hindsight up to a
factor of about sqrt(n) in the capital. The bound adapts to the variance as an empirical Bernstein bound (Maurer and Pontil
2009) does, without its additive ``7 L log(2/delta) / (3 (n - 1))``, which alone is 0.78 L for 12 texts at delta = 0.05.

Source: betting, Waudby-Smith and Ramdas (arXiv 2010.09686); the mixture, Orabona and Jun (arXiv 2110.14099); the proof is
above, and the claim ``compression`` measures the coverage.
"""

from __future__ import annotations

import math

import numpy as np
import scipy
from numpy.typing import ArrayLike

from ntk_prefix.checks import check_count, check_fraction, check_positive, expected, real_numbers

__all__ = ["expected_error_bound", "success_probability_bound"]

MOST_BETS = 256
"""Up to twice as many losses the mean over bets is the exact integral; above, any mean over fixed bets is as valid."""

LOSSES_AT_ONCE = 4096
"""Whose capital is held for every bet, 8 MiB."""


def expected_error_bound(losses: ArrayLike, delta: float, upper: float) -> float:
    """Return an upper bound on the expected loss that holds with probability at least 1 - delta.

    **The unit is the text.** Losses must be independent of one another, and tokens of one text are not: give one loss a
    text, the mean over its tokens, and the bound speaks of the expected loss of a text so weighted. (In an order of your
    own it is enough that each has the expectation mu given the ones before it.) The map that is judged must not have seen
    these texts. Neither may they have chosen it: of several maps compared on them, give each delta over their number.

    A loss without a bound, as a Kullback-Leibler divergence is, must be cut at ``upper``, chosen before looking at it: then
    it is the expectation of the loss so cut that is bounded.

    Args:
        losses: [n], one per text, each in [0, upper].
        delta: the probability with which the bound may fail, in (0, 1).
        upper: L > 0, the largest loss there can be.

    Returns:
        the bound, in [mean of the losses, upper]. From n losses of zero it is at least ``upper (1 - delta^(1/n))``, which
        no bound can do without.

    Raises:
        UsageError: no losses, one outside [0, upper], a delta that is no probability.

    Numerics: float64, bisected to the last digit and rounded up; ``O(n)`` time and bounded memory.
    """
    x = real_numbers("losses", losses)
    if x.ndim != 1 or not len(x):
        raise expected(
            "losses",
            "[n] with n >= 1, one loss for each text",
            f"shape {x.shape}",
            "Take the mean over each text's tokens",
        )
    check_positive("upper", upper)
    check_fraction("delta", delta, "a probability in (0, 1)")
    outside = np.flatnonzero(~((x >= 0) & (x <= upper)))
    if len(outside):
        hint = "Cut losses at an upper that was chosen before, np.minimum(losses, upper)"
        raise expected("losses", f"numbers in [0, {upper:g}]", f"{x[outside[0]]} at {outside[0]}", hint)
    x = x / upper
    count = min(len(x) // 2 + 1, MOST_BETS)
    bets = np.sin((np.arange(count) + 0.5) * math.pi / (2 * count)) ** 2

    parts = np.array_split(x, -(-len(x) // LOSSES_AT_ONCE))

    def exceeds(t: float) -> bool:
        logs = np.sum([np.log1p(bets[:, None] * ((t - part) / (1 - t))[None]).sum(1) for part in parts], axis=0)
        largest = logs.max()
        return bool(largest + np.log(np.exp(logs - largest).sum()) >= math.log(count / delta))

    low, high = min(float(x.mean()), 1.0), 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return min(high * upper * (1 + 2**-40), float(upper))


def success_probability_bound(successes: int, trials: int, delta: float) -> float:
    """Return a lower bound on the probability of success that holds with probability at least 1 - delta.

    It is the p at which ``P(Binomial(trials, p) >= successes) = delta``, a quantile of Beta(successes, trials - successes
    + 1): were the true probability smaller, so many successes would come with probability at most delta.

    Args:
        successes: of independent trials of one probability.
        trials: at least 1.
        delta: the probability with which the bound may fail, in (0, 1).

    Raises:
        UsageError: more successes than trials, a delta that is no probability.

    Numerics: float64, rounded down.

    Source: Clopper and Pearson, Biometrika 26 (1934), one-sided.
    """
    check_count("trials", trials)
    check_count("successes", successes, 0)
    if successes > trials:
        raise expected("successes", f"at most trials = {trials}", successes)
    check_fraction("delta", delta, "a probability in (0, 1)")
    if not successes:
        return 0.0
    return float(scipy.special.betaincinv(successes, trials - successes + 1, delta)) * (1 - 2**-40)
