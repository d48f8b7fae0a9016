"""A certificate: what is certain of gradient descent, and the proof in numbers."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from ntk_prefix.certificate.curve import Curve, Forecast
from ntk_prefix.certificate.elsewhere import Elsewhere, Predictions
from ntk_prefix.certificate.reference import Step
from ntk_prefix.certificate.rounding import OUTWARD
from ntk_prefix.checks import UsageError, check_count, expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Array, Float

__all__ = ["Certificate"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Certificate(EqualByValue):
    """What is certain of gradient descent W <- W - eta grad L from one starting point, for ever.

    If ``holds``: at every step t the loss L = 1/2 |F - Y|^2 falls by at least the factor ``1 - rate`` and lies between
    the two sides of ``curve``, no token leaves its own ball of radius ``radii[r]``, and sqrt(lambda_min(H(W(t)))) stays
    above sqrt(smallest) - drift.

    Args:
        holds: whether the proof goes through. If not, nothing is said, and ``explain()`` names the step that fails.
        model, m: the model and its prefix length.
        step_size: eta.
        rate: x in |F(t+1) - Y|^2 <= (1 - x) |F(t) - Y|^2.
        radius: the largest radius of any token.
        deviation: bound on |W(t) - W(0) - linearized displacement|_F at every step, part of every radius.
        smallest, largest: bounds on the extreme eigenvalues of H(W(0)).
        drift: bound on |J(W(t)) - J(W(0))|_op / sqrt(m) at every step.
        initial_error: upper bound on |F(0) - Y|_F.
        steps: the inequalities of the proof.
        drift_parts: what the drift is made of: which step of the proof loses most.
        radii: one radius for every token [m]; empty for an a-priori certificate.
        failure: probability that an a-priori certificate does not apply to the prefix drawn; 0 a posteriori.
        forecast: what ``curve`` is computed by; None if the certificate does not hold.
        elsewhere: what ``predict`` is computed by; None also if no ``x_test`` was given.
    """

    holds: bool
    model: ModelName
    m: int
    step_size: float
    rate: float
    radius: float
    deviation: float
    smallest: float
    largest: float
    drift: float
    initial_error: float
    steps: tuple[Step, ...]
    drift_parts: dict[str, float] = dataclasses.field(default_factory=dict)
    radii: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0), repr=False)
    failure: float = 0.0
    forecast: Forecast | None = dataclasses.field(default=None, repr=False, compare=False)
    elsewhere: Elsewhere | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def margin(self) -> float:
        """The smallest margin of any step of the proof: at least 1 when it holds.

        If so, it is mostly by how much more than it computed the search claimed: certificates compare by ``drift``, or by m.
        """
        return float(min(step.margin for step in self.steps))

    def curve(self, steps: int | Array | np.ndarray) -> Curve:
        """Return the loss at every step, from below and from above, before the first one.

            1/2 (|F_kernel(t) - Y| - D(t))^2 <= L(t) <= 1/2 (|F_kernel(t) - Y| + D(t))^2

        F_kernel is gradient descent if the kernel stood still, H(W(0)) (a priori: H*); from above also what the rate says.

        Args:
            steps: the steps, whole numbers >= 0, [T]; or the last one, then t = 0..steps.

        Raises:
            ValueError: the certificate does not hold, or steps are no whole numbers >= 0.

        Numerics: float64, rounded outward. Up to step 512 each step is a summand of D, later ones share it in windows of
        1/256 of their number, which takes D from above by up to a fifth; T steps cost of the order of (log T)^2.

        Source: derived, theory/certificate.md, section 6.
        """
        return self._forecast("curve").curve(_times(steps))

    def predict(self, steps: int | Array | np.ndarray) -> Predictions:
        """Return the outputs at ``x_test`` at every step, and how far they may be from that, before the first one.

            |F(t) - F_kernel(t)|_F <= kappa Delta P(t) + mu(t) ( Delta G(t) + E P(t) ) + Delta' G(t)

        Args:
            steps: as in ``curve``.

        Raises:
            ValueError: the certificate does not hold, no x_test was given to ``certify``, or steps as in ``curve``.

        Source: derived, theory/certificate.md, section 6, which says what the letters are.
        """
        self._forecast("predict")
        if self.elsewhere is None:
            raise expected("predict", "inputs to predict at", "none", "Use certify(..., x_test=...)")
        return self.elsewhere.predict(_times(steps))

    def envelope(self, steps: int) -> Float[np.ndarray, "steps"]:
        """Return the largest |F(t) - Y|^2 at t = 0..steps: the upper side of ``curve``, or ``(1 - rate)^t |F(0) - Y|^2``.

        Raises:
            ValueError: the certificate does not hold, or steps is no whole number >= 0.
        """
        check_count("steps", steps, 0)
        by_curve = 2 * self._forecast("envelope").curve(np.arange(steps + 1)).upper
        by_rate = self.initial_error**2 * np.exp(np.arange(steps + 1) * math.log1p(-self.rate)) * OUTWARD
        return np.minimum(by_curve, by_rate)

    def steps_to(self, fraction: float) -> int:
        """Return steps after which the loss is certain to be below ``fraction`` of the initial one: by ``envelope``.

        Raises:
            ValueError: the certificate does not hold, or the fraction is not in (0, 1).
        """
        forecast = self._forecast("steps_to")
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise expected("fraction", "a number in (0, 1)", fraction)
        by_rate = math.ceil(math.log(fraction) / math.log1p(-self.rate) * OUTWARD)
        return forecast.reaches(math.sqrt(2 * fraction * float(forecast.curve(np.zeros(1)).lower[0])), by_rate)

    def _forecast(self, name: str) -> Forecast:
        if self.forecast is None:
            raise UsageError(f"{name}: this certificate does not hold.\n{self.explain()}")
        return self.forecast

    def explain(self) -> str:
        """Return the proof in numbers, or the step at which it fails and what would mend it."""
        head = f"{self.model} model, m = {self.m:,}, eta = {self.step_size:.4g}"
        if self.failure:
            head += f", with probability at least {1 - self.failure:g} over the prefix"
        if self.holds:
            lines = [
                f"certified: {head}.",
                f"The loss is at 10 %, 1 % and 0.1 % of the first one after at most "
                f"{self.steps_to(0.1):,}, {self.steps_to(0.01):,} and {self.steps_to(0.001):,} steps, and falls by a factor "
                f"of at least 1 - {self.rate:.4g} at every one.",
                f"No token moves by more than {self.radius:.3g}.",
            ]
        else:
            failed = next(step for step in self.steps if not step.holds)
            lines = [
                f"not certified: {head}.",
                f"The step that fails: {failed.what}: {failed.used:.4g} is not at most {failed.allowed:.4g}.",
                _way_on(failed, self),
            ]
        lines += [f"  {'ok ' if s.holds else 'NO '} {s.what}: {s.used:.4g} <= {s.allowed:.4g}" for s in self.steps]
        if self.drift_parts:
            lines.append("  the drift of the Jacobian over sqrt(m), by part:")
            lines += [
                f"      {value:.3g}  {name}" for name, value in sorted(self.drift_parts.items(), key=lambda p: -p[1])
            ]
        return "\n".join(lines)


def _way_on(failed: Step, certificate: Certificate) -> str:
    """Return what would mend a refusal; ``find_m``, which looks for another length, takes several certificates' time."""
    if "positive" in failed.what:
        return "No length mends it where inputs are equal, or so near that rounding cannot tell them apart: drop one of them."
    if "stable" in failed.what:
        return "Take a smaller step_size, or None for a quarter of the largest stable one."
    if certificate.failure:
        return "A longer prefix would do: certify(x, y, ..., m=None, delta=...) takes the first length that has a certificate."
    return f'A longer prefix would do: certificate.find_m(x, y, model="{certificate.model}") finds the shortest.'


def _times(steps: int | Array | np.ndarray) -> np.ndarray:
    """Return steps as floats, [T]."""
    if not isinstance(steps, jax.Array | np.ndarray):
        check_count("steps", steps, 0)
        return np.arange(float(steps) + 1)
    times = np.asarray(steps, float)
    if times.ndim != 1 or not (np.isfinite(times) & (times >= 0) & (times == np.round(times))).all():
        raise expected(
            "steps", "a whole number >= 0, or a vector [T] of them", f"{times.ravel()[:3]} of shape {times.shape}"
        )
    return times
