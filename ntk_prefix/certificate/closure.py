"""The search for a ball that gradient descent does not leave: theory/certificate.md, section 5.

It needs no proof. Each pass over the tokens computes what a claim implies, and the pass that computes no more than was
claimed is the proof.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ntk_prefix.certificate.reference import Reference, Step
from ntk_prefix.certificate.rounding import OUTWARD
from ntk_prefix.certificate.tokens import LARGEST_EXPONENT, Claimed, Tokens

__all__ = ["PASSES", "SEARCHES", "Closure", "close"]

PASSES = 16
"""Attempts at closing the bounds, each a pass over the tokens."""

SEARCHES = ((2.0, 2.0, 1.3, 1.3, 1.3, 1.05), (1.5, 1.5, 1.3, 1.2, 1.1, 1.05))
"""By how much more than the last pass computed each attempt claims: the first search takes fewer passes, and where its claims
outgrow themselves the second one may not."""


@dataclasses.dataclass(frozen=True)
class Closure:
    """A ball that gradient descent does not leave, or the step at which looking for one failed."""

    steps: tuple[Step, ...]
    claimed: Claimed
    drift: float
    parts: dict[str, float]


def close(
    tokens: Tokens, reference: Reference, movement: np.ndarray, spread: np.ndarray, growth: Sequence[float]
) -> Closure:
    """Look for a drift that implies itself: claim one, and h and s with it, until a pass computes no more than claimed."""
    n = len(tokens.inputs)
    claimed = Claimed(0.0, np.zeros(n), np.zeros(n))
    drift, parts, steps = 0.0, {}, []
    for attempt in range(PASSES):
        exponent = float(tokens.norms.max()) * (float(movement.max()) + claimed.total) + float(claimed.normalizer.max())
        steps = [Step("exponents are small: |x_i| R_r + h_i of every token", OUTWARD * exponent, LARGEST_EXPONENT)]
        if not steps[0].holds:
            break
        if drift:
            steps += reference.steps(drift)
        ball = tokens.ball(claimed, movement, spread)
        parts = ball.parts
        if drift:
            steps += [
                Step("the drift implies itself: computed in the ball, over the one assumed", ball.drift / drift, 1.0),
                Step("so does the normalizer", _worst(ball.normalizer, claimed.normalizer), 1.0),
                Step("so does the mean value", _worst(ball.center, claimed.center), 1.0),
            ]
            if all(step.holds for step in steps):
                break
        factor = growth[min(attempt, len(growth) - 1)]
        wanted = factor * ball.drift
        needed = reference.steps(wanted)
        if not all(step.holds for step in needed):
            return Closure((steps[0], *needed), claimed, wanted, parts)
        drift = wanted
        total = OUTWARD * reference.paths(drift).deviation / math.sqrt(tokens.m)
        factor = min(factor, 1.5)  # they grow less than the drift does
        claimed = Claimed(total, factor * ball.normalizer, factor * ball.center)
    return Closure(tuple(steps), claimed, drift, parts)


def _worst(computed: np.ndarray, claimed: np.ndarray) -> float:
    """Largest ratio; nothing claimed and nothing computed is 0."""
    return float(np.where(computed > 0, computed / np.where(claimed > 0, claimed, 1e-300), 0).max())
