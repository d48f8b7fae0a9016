"""Outputs at inputs that are not trained on, with a certified band: theory/certificate.md, section 6.

Other inputs are more rows of the Jacobian, and theirs drift in the same ball of prefixes as those of the training do.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ntk_prefix.certificate.curve import Forecast
from ntk_prefix.certificate.rounding import OUTWARD, eigen_enclosure, gamma
from ntk_prefix.certificate.tokens import LARGEST_EXPONENT, Claimed, Tokens
from ntk_prefix.checks import expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.typing import Float

__all__ = ["Elsewhere", "Predictions", "elsewhere"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictions(EqualByValue):
    """Outputs at other inputs, predicted before the first step.

    =============  ==========  ======================================================================
    attribute      shape       what
    =============  ==========  ======================================================================
    ``steps``      [T]         t
    ``outputs``    [T, n2, o]  F_kernel(t): what they are if the kernel stands still
    ``deviation``  [T]         |F(t) - F_kernel(t)|_F, over all these inputs together, is at most this
    =============  ==========  ======================================================================
    """

    steps: Float[np.ndarray, "T"]
    outputs: Float[np.ndarray, "T n2 o"]
    deviation: Float[np.ndarray, "T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What is known of other inputs at the start.

    Args:
        forecast: of the training.
        start: F(0) there, [n2, o]; start_error: Frobenius norm of its rounding.
        kernel: K = J' J(0)^T / m between their outputs and those of the training, [n2 o, N]; kernel_error: of its rounding.
        steepest: kappa, |J'(0)|_op / sqrt(m) at most.
        drift: Delta', |J'(W) - J'(0)|_op / sqrt(m) at most, everywhere in the ball.
    """

    forecast: Forecast
    start: np.ndarray
    start_error: float
    kernel: np.ndarray
    kernel_error: float
    steepest: float
    drift: float

    def predict(self, times: np.ndarray) -> Predictions:
        """Return the outputs at any steps >= 0, [T].

        F_kernel(t) = F(0) - K H^^-1 (I - (I - m eta H^)^t) e(0)
        |F(t) - F_kernel(t)| <= kappa Delta P(t) + mu(t) ( Delta G(t) + E P(t) ) + Delta' G(t)
        """
        reference, drift = self.forecast.reference, self.forecast.drift
        outputs, weights = self.forecast.sums(times)
        points, off = reference.solution(times)
        size, lengths = float(np.linalg.norm(self.kernel)), np.linalg.norm(points, axis=1)
        changes = points @ self.kernel.T
        rounding = size * off + (self.kernel_error + gamma(len(reference.kernel.values) + 8) * size) * lengths
        deviation = self.steepest * drift * outputs + self.drift * weights
        deviation += self._answers(times) * (drift * weights + reference.discrepancy * outputs)
        return Predictions(
            steps=times,
            outputs=self.start[None] - changes.reshape(len(times), *self.start.shape),
            deviation=OUTWARD * (deviation + rounding + self.start_error),
        )

    def _answers(self, times: np.ndarray) -> np.ndarray:
        """mu(t) = |K H^^-1 (I - (I - m eta H^)^t)|_op from above; it grows, so that it is taken at powers of two only."""
        reference = self.forecast.reference
        values, basis = reference.kernel.values, reference.kernel.basis
        marks = 2.0 ** np.arange(math.ceil(math.log2(max(times.max(initial=0), 2))) + 1)
        size = float(np.linalg.norm(self.kernel))
        along = self.kernel @ basis
        rounding = self.kernel_error + size * (float(reference.kernel.tilt) + gamma(len(values) + 8) * len(values))
        norms = []
        for mark in marks:
            answer = along * (-np.expm1(mark * np.log1p(-reference.rate * values)) / values)[None]
            gram = answer @ answer.T if len(answer) <= len(values) else answer.T @ answer
            found = eigen_enclosure((gram + gram.T) / 2)
            most = float(np.square(answer).sum())
            norms.append(
                math.sqrt(max(float(found.values[-1]), 0) + float(found.radius) + gamma(len(values) + 8) * most)
            )
        return OUTWARD * (np.array(norms)[np.searchsorted(marks, times)] + rounding / float(values[0]))


def elsewhere(
    tokens: Tokens, kernel_error: float, movement: np.ndarray, total: float, forecast: Forecast, inputs: np.ndarray
) -> Elsewhere:
    """Look at other inputs through the prefix of a certificate.

    Args:
        tokens: the prefix as the training inputs see it; kernel_error: rounding of its kernel.
        movement, total: the ball: rho_r and V.
        forecast: of the training.
        inputs: [n2, d].

    Raises:
        ValueError: an input so long that the exponents of section 4 are not small.
    """
    others = Tokens(tokens.prefix, jnp.asarray(inputs))
    spread, own_error = others.second_moments()
    # of h and s neither depends on itself, and s on h only: two passes compute them, a third the drift
    claimed = Claimed(total, np.zeros(len(inputs)), np.zeros(len(inputs)))
    claimed = Claimed(total, others.ball(claimed, movement, spread).normalizer, claimed.center)
    exponent = float(others.norms.max()) * (float(movement.max()) + total) + float(claimed.normalizer.max())
    if not exponent * OUTWARD <= LARGEST_EXPONENT:
        wanted = f"inputs whose exponents |x| R_r + h are at most {LARGEST_EXPONENT:g}"
        raise expected("x_test", wanted, f"{exponent:.3g}", "Scale them down")
    claimed = Claimed(total, claimed.normalizer, others.ball(claimed, movement, spread).center)
    x_test, x = jnp.asarray(inputs), jnp.asarray(tokens.inputs)
    own = np.asarray(prefix_ntk(tokens.prefix, x_test)).reshape(inputs.shape[0] * others.outputs, -1)
    found = eigen_enclosure(own)
    start, start_error = others.outputs_now()
    # an entry is off relative to T_ir T_jr b_ir b_jr, as in Tokens.second_moments, and by Cauchy and Schwarz so is K
    apart = max(tokens.slack / others.slack, others.slack / tokens.slack)
    return Elsewhere(
        forecast=forecast,
        start=start,
        start_error=start_error,
        kernel=np.asarray(prefix_ntk(tokens.prefix, x_test, x)).reshape(len(own), -1),
        kernel_error=OUTWARD * math.sqrt(apart * own_error * kernel_error),
        steepest=OUTWARD * math.sqrt(max(float(found.values[-1]), 0) + float(found.radius) + own_error),
        drift=OUTWARD * others.ball(claimed, movement, spread).drift,
    )
