"""The loss at every step, from both sides, before the first one: theory/certificate.md, section 6.

The run e(t) stays within D(t) of the linearized run, whose loss is known, and D comes from the same drift of the
Jacobian that certifies the rate. Normalized as ``reference``: J is J / sqrt(m), and ``rate`` is m eta.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ntk_prefix.certificate.reference import HORIZON, Reference
from ntk_prefix.certificate.rounding import OUTWARD
from ntk_prefix.equality import EqualByValue
from ntk_prefix.typing import Float

__all__ = ["Curve", "Forecast"]

SINGLE = 256
"""A window is one step up to twice this number, and from there on this part of its first step's number."""

AT_ONCE = 2**22
"""Numbers of a table of coefficients by times, 32 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve(EqualByValue):
    """What is certain of the loss L(t) = 1/2 |F(t) - Y|^2 at given steps of gradient descent.

    ==============  =====  ========================================================================
    attribute       shape  what
    ==============  =====  ========================================================================
    ``steps``       [T]    t
    ``kernel``      [T]    the loss if the kernel stood still: 1/2 |(I - eta Theta)^t (F(0) - Y)|^2
    ``deviation``   [T]    D(t): |F(t) - F_kernel(t)|_F is at most this
    ``lower``       [T]    1/2 (|F_kernel(t) - Y| - D(t))^2, or 0: L(t) is at least this
    ``upper``       [T]    1/2 (|F_kernel(t) - Y| + D(t))^2, or what the rate says: L(t) is at most this
    ==============  =====  ========================================================================
    """

    steps: Float[np.ndarray, "T"]
    kernel: Float[np.ndarray, "T"]
    deviation: Float[np.ndarray, "T"]
    lower: Float[np.ndarray, "T"]
    upper: Float[np.ndarray, "T"]


class _Sums(NamedTuple):
    """What has been fed into the deviation up to a step, weighted by how much of it is left there.

    ``slow``, ``half`` and ``whole`` are m eta sum_s f(t - 1 - s) z(s) with f(k) = |H^^p (I - m eta H^)^k|_op for p = 0,
    1/2 and 1, each for z = a, c and g, which bound |e|, |J^T e| and |H^^(1/2) e|: [3].
    """

    slow: np.ndarray
    half: np.ndarray
    whole: np.ndarray

    def plus(self, other: _Sums) -> _Sums:
        """Return the sums entry by entry."""
        return _Sums(self.slow + other.slow, self.half + other.half, self.whole + other.whole)


class Forecast:
    """Bounds on |e(t)| and on its distance from the linearized run, window by window of steps.

        D(t)  = m eta sum_{s<t} [ nu Delta f_1/2 a(s) + Delta f_0 c(s) + E f_0 a(s)   + omega f_1/2 g(s) ] ,
        D'(t) = m eta sum_{s<t} [ nu Delta f_1 a(s)   + Delta f_1/2 c(s) + E f_1/2 a(s) + omega f_1 g(s) ] ,
        a = min(|e^| + D, sqrt(1 - x) a(t-1)) ,   g = |H^^(1/2) e^| + D' ,   c = nu g + Delta a ,

    with f_p taken at t - 1 - s. A window of several steps is one summand: a, c and g are those of its first step or
    larger, f that of its last step, so that T steps take of the order of log T windows.

    Args:
        reference: the linearized run.
        drift: Delta.
        decrease: x, the certified rate.
    """

    def __init__(self, reference: Reference, drift: float, decrease: float) -> None:
        self.reference, self.drift, self.decrease = reference, drift, decrease
        values, rate = reference.kernel.values, reference.rate
        self._least, self._roots = float(values[0]), np.sqrt(values)
        horizon = max(HORIZON / (rate * self._least), 2.0)
        spaced = np.floor(np.geomspace(2 * SINGLE, max(horizon, 4 * SINGLE), 4 * SINGLE))
        self._ages = np.unique(np.concatenate([np.arange(2.0 * SINGLE), spaced]))
        powers = self._powers(self._ages)
        # from above between two ages, as both fall
        self._left = np.stack([(self._roots * powers).max(1), (values * powers).max(1)])
        self._summed = rate * np.cumsum(np.diff(self._ages, prepend=0) * np.roll(self._left, 1, axis=1), axis=1)
        self._starts, self._lengths = np.zeros(1024), np.zeros(1024)
        self._fed, self._caps = np.zeros((3, 1024)), np.zeros((2, 1024))
        self._deviations = np.zeros(1024)
        self._count, self._next = 0, 0
        self._slow = np.zeros(3)

    def curve(self, steps: np.ndarray) -> Curve:
        """Return the bounds at any steps >= 0, [T]."""
        times = np.asarray(steps, float)
        while self._next <= times.max(initial=0):
            self._advance()
        window = np.searchsorted(self._starts[: self._count], times, side="right") - 1
        run, above, below = self._run(times)
        deviation = self._deviations[window]
        since = times - self._starts[window]
        by_rate = OUTWARD * self._fed[0, window] * np.exp(since * (math.log1p(-self.decrease) / 2))
        upper = np.minimum(OUTWARD * (above + deviation), by_rate)
        lower = np.maximum(below / OUTWARD - deviation, 0) / OUTWARD
        deviation = OUTWARD * (deviation + self.reference.rounding)
        return Curve(
            steps=times,
            kernel=np.square(run) / 2,
            deviation=deviation,
            lower=np.square(lower) / 2,
            upper=np.square(upper) / 2 * OUTWARD,
        )

    def sums(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return P(t) and G(t), bounds on m eta sum_{s<t} |e(s)| and sqrt(m) eta sum_{s<t} |J(s)^T e(s)|, [T] each."""
        while self._next <= times.max(initial=0):
            self._advance()
        window = np.searchsorted(self._starts[: self._count], times, side="right") - 1
        fed = self.reference.rate * self._fed[:2, : self._count]
        whole = np.cumsum(fed * self._lengths[: self._count], axis=1) - fed * self._lengths[: self._count]
        outputs, weights = OUTWARD * (whole[:, window] + fed[:, window] * (times - self._starts[window]))
        return outputs, weights

    def reaches(self, error: float, last: int) -> int:
        """Return the first step at which |e| is certain to be at most ``error``, or ``last`` if that is earlier."""
        while not (self._count and (self._fed[0, self._count - 1] <= error or self._starts[self._count - 1] >= last)):
            self._advance()
        # at a window's first step the bound is at most what it is in the window before: look into that one
        first = int(np.argmax((self._fed[0, : self._count] <= error) | (self._starts[: self._count] >= last)))
        times = np.arange(self._starts[max(first - 1, 0)], self._starts[first] + 1)
        found = np.flatnonzero(self.curve(times).upper <= error**2 / 2)
        return int(min(times[found[0]], last)) if len(found) else last

    def _powers(self, times: np.ndarray) -> np.ndarray:
        """(1 - m eta lambda_j)^t, [T, N]."""
        return np.exp(times[:, None] * np.log1p(-self.reference.rate * self.reference.kernel.values)[None])

    def _run(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """|e^(t)| as computed, from above and from below, each [T]."""
        sizes = np.abs(self.reference.coefficients)
        rounding = self.reference.rounding
        found = []
        for part in np.array_split(times, -(-times.size * sizes.size // AT_ONCE) or 1):
            powers = self._powers(part)
            found.append(
                [
                    np.linalg.norm(size * powers, axis=1)
                    for size in (sizes, sizes + rounding, np.maximum(sizes - rounding, 0))
                ]
            )
        run, above, below = np.concatenate(found, axis=1)
        return run, above, below

    def _past(self) -> _Sums:
        """Return the sums over all windows so far, at the step after them."""
        count = self._count
        # no step of a window is younger than its last
        ages = self._next - self._starts[:count] - self._lengths[:count]
        left = self._left[:, np.searchsorted(self._ages, ages, side="right") - 1]
        shares = np.minimum(self.reference.rate * self._lengths[:count] * left, self._caps[:, :count])
        half, whole = (shares[:, None] * self._fed[None, :, :count]).sum(-1)
        return _Sums(self._slow, half, whole)

    def _within(self, fed: np.ndarray, length: int) -> _Sums:
        """Return the sums over a window itself, at the step after it."""
        slow = -np.expm1(length * math.log1p(-self.reference.rate * self._least)) / self._least
        half, whole = self._totals(length)
        return _Sums(slow * fed, half * fed, whole * fed)

    def _totals(self, length: float) -> np.ndarray:
        """m eta sum_{k < length} f_p(k) for p = 1/2 and 1."""
        beyond = self.reference.rate * max(length - self._ages[-1], 0) * self._left[:, -1]
        return np.array([np.interp(length, self._ages, summed) for summed in self._summed]) + beyond

    def _deviation(self, sums: _Sums) -> tuple[float, float]:
        """D and D'."""
        reference, drift = self.reference, self.drift
        error, relative, nu = reference.discrepancy, reference.relative_error, reference.nu
        outputs = nu * drift * sums.half[0] + drift * sums.slow[1] + error * sums.slow[0] + relative * sums.half[2]
        weights = nu * drift * sums.whole[0] + drift * sums.half[1] + error * sums.half[0] + relative * sums.whole[2]
        return OUTWARD * float(outputs), OUTWARD * float(weights)

    def _advance(self) -> None:
        """Take one more window."""
        if self._count == len(self._starts):
            for name in ("_starts", "_lengths", "_fed", "_caps", "_deviations"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)], axis=-1))
        start, length = self._next, max(1, self._next // SINGLE)
        past, nu, drift = self._past(), self.reference.nu, self.drift
        deviation, reduced = self._deviation(past)
        sizes = (np.abs(self.reference.coefficients) + self.reference.rounding) * self._powers(np.array([start]))[0]
        straight, slope = OUTWARD * float(np.linalg.norm(sizes)), OUTWARD * float(np.linalg.norm(self._roots * sizes))
        a = OUTWARD * (straight + deviation)
        if self._count:
            before = self._lengths[self._count - 1] * math.log1p(-self.decrease) / 2
            a = min(a, OUTWARD * float(self._fed[0, self._count - 1]) * math.exp(before))
        steepest = OUTWARD * float(self._roots[-1]) * a

        def feed(reduced: float) -> np.ndarray:
            g = min(slope + reduced, steepest)
            return np.array([a, OUTWARD * (nu * g + drift * a), g])

        fed = feed(reduced)
        if length > 1:
            # claim twice what the window adds if nothing grows in it, then look whether the claim implies itself
            alone = self._deviation(past.plus(self._within(fed, length)))[1]
            claim = reduced + 2 * (alone - reduced)
            fed = feed(claim)
            deviation, implied = self._deviation(past.plus(self._within(fed, length)))
            if not implied <= claim:
                fed = feed(math.inf)
                deviation, _ = self._deviation(past.plus(self._within(fed, length)))
        place = self._count
        self._starts[place], self._lengths[place], self._deviations[place] = start, length, deviation
        self._fed[:, place], self._caps[:, place] = fed, self._totals(length)
        kept = math.exp(length * math.log1p(-self.reference.rate * self._least))
        self._slow = kept * self._slow + self._within(fed, length).slow
        self._count, self._next = place + 1, start + length
