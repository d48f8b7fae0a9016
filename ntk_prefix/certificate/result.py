"""A certificate: what is certain of gradient descent, and the proof in numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ntk_prefix.certificate.reference import Step
from ntk_prefix.certificate.rounding import OUTWARD
from ntk_prefix.checks import UsageError, check_count, expected
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Float

__all__ = ["Certificate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is certain of gradient descent W <- W - eta grad L from one starting point, for ever.

    If ``holds``: at every step t the loss L = 1/2 |F - Y|^2 falls by at least the factor ``1 - rate``, no token leaves its
    own ball of radius ``radii[r]``, and sqrt(lambda_min(H(W(t)))) stays above sqrt(smallest) - drift.

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

    @property
    def margin(self) -> float:
        """The smallest margin of any step of the proof: at least 1 when it holds."""
        return float(min(step.margin for step in self.steps))

    def envelope(self, steps: int) -> Float[np.ndarray, "steps"]:
        """Return the largest |F(t) - Y|^2 at t = 0..steps: ``(1 - rate)^t |F(0) - Y|^2``.

        Raises:
            ValueError: the certificate does not hold, or steps is no whole number >= 0.
        """
        check_count("steps", steps, 0)
        self._check_holds("envelope")
        return self.initial_error**2 * np.exp(np.arange(steps + 1) * math.log1p(-self.rate)) * OUTWARD

    def steps_to(self, fraction: float) -> int:
        """Return steps after which the loss is certain to be below ``fraction`` of the initial one.

        Raises:
            ValueError: the certificate does not hold, or the fraction is not in (0, 1).
        """
        self._check_holds("steps_to")
        if not 0 < fraction < 1:
            raise expected("fraction", "a number in (0, 1)", fraction)
        return math.ceil(math.log(fraction) / math.log1p(-self.rate) * OUTWARD)

    def _check_holds(self, name: str) -> None:
        if not self.holds:
            raise UsageError(f"{name}: this certificate does not hold.\n{self.explain()}")

    def explain(self) -> str:
        """Return the proof in numbers, or the step at which it fails and what would mend it."""
        head = f"{self.model} model, m = {self.m:,}, eta = {self.step_size:.4g}"
        if self.failure:
            head += f", with probability at least {1 - self.failure:g} over the prefix"
        if self.holds:
            lines = [
                f"certified: {head}.",
                f"The loss falls by a factor of at least 1 - {self.rate:.4g} at every step "
                f"(to 1 % in at most {self.steps_to(0.01):,}), and no token moves by more than {self.radius:.3g}.",
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
