"""The linearized run, and what a bounded drift of the Jacobian makes of it: theory/certificate.md, sections 2 and 3.

Everything is in the normalization of H = J J^T / m: with Theta = m H, ``rate`` is m eta, path lengths are m times their
size, a Jacobian is J / sqrt(m). The inputs are a few hundred numbers; the prefix is not seen here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ntk_prefix.certificate.rounding import OUTWARD, Enclosure, gamma

__all__ = ["Paths", "Reference", "Step"]

RATIO = 1.25
"""Of consecutive times on the polygon near the linearized run: its distance falls as the square of log RATIO."""

FINE = 1.03
"""Of consecutive times in the sums over all steps, which are taken from above."""

HORIZON = 40.0
"""Time constants of the slowest direction after which a sum is closed by a geometric series."""


WIDEST = 0.4
"""Largest drift over sqrt(lambda_min) that can certify a rate: 2 (1 - 2 e - e^2) is positive up to sqrt(2) - 1."""

LARGEST_FEEDBACK = 0.99
"""Largest eigenvalue of what the paths feed back into themselves, so that solving for them loses four digits at most."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One inequality of the proof: ``used <= allowed``."""

    what: str
    used: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it is true; a NaN is not."""
        return bool(self.used <= self.allowed)

    @property
    def margin(self) -> float:
        """How many times what is used fits into what is allowed."""
        if not (math.isfinite(self.used) and math.isfinite(self.allowed)) or self.allowed <= 0:
            return 0.0
        return self.allowed / self.used if self.used > 0 else math.inf


class Paths(NamedTuple):
    """What gradient descent cannot exceed while |J(W) - J(W(0))|_op / sqrt(m) <= drift.

    ``outputs``: P, m eta sum_t |F(t) - Y|. ``weights``: G, sqrt(m) eta sum_t |J(t)^T (F(t) - Y)|.
    ``deviation``: V, sqrt(m) |W(t) - W(0) - linearized displacement|_F at every t.
    """

    outputs: float
    weights: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Reference:
    """The run e(t) = (I - m eta H^)^t e(0), with H^ = V diag(values) V^T exactly.

    Args:
        kernel: an enclosure of the kernel as computed (or of the limit, for the a-priori form).
        kernel_error: Frobenius norm of what is between that and H(W(0)), not counting the enclosure's own radius.
        error: e(0) = F(0) - Y, flattened, [N].
        error_rounding: Frobenius norm of its rounding.
        rate: m eta.
        relative_error: omega, of what else is between them: H^^(1/2) B H^^(1/2) with |B| <= omega.
    """

    kernel: Enclosure
    kernel_error: float
    error: np.ndarray
    error_rounding: float
    rate: float
    relative_error: float = 0.0

    def __post_init__(self) -> None:
        """Take the sums over all steps."""
        values, rate = self.kernel.values, self.rate
        # coefficients of e(0) in V, from above
        product = gamma(len(values) + 2) * math.sqrt(len(values)) + float(self.kernel.tilt)
        size = float(np.linalg.norm(self.error)) + self.error_rounding
        rounding = (product * size + self.error_rounding) * OUTWARD
        coefficients = self.kernel.basis.T @ self.error
        above = np.abs(coefficients) + rounding
        smallest = float(values[0])
        horizon = max(HORIZON / (rate * smallest), 8.0)
        times = np.unique(np.concatenate([np.arange(16.0), np.floor(np.geomspace(16, horizon, _steps(horizon, FINE)))]))
        powers = np.exp(times[:, None] * np.log1p(-rate * values)[None])

        def total(decreasing: np.ndarray) -> float:
            """m eta sum_t f(t), from above, for an f that falls by at least 1 - m eta lambda_min a step."""
            head = rate * float((np.diff(times) * decreasing[:-1]).sum())
            return OUTWARD * (head + float(decreasing[-1]) / smallest)

        roots = np.sqrt(values)[None]
        object.__setattr__(self, "outputs", total(np.linalg.norm(above * powers, axis=1)))
        object.__setattr__(self, "weights", total(np.linalg.norm(roots * above * powers, axis=1)))
        object.__setattr__(self, "half", total((roots * powers).max(1)))
        object.__setattr__(self, "whole", total((values * powers).max(1)))
        object.__setattr__(self, "norm", OUTWARD * float(np.sqrt((np.square(above) / values).sum())))
        object.__setattr__(self, "coefficients", coefficients)
        object.__setattr__(self, "rounding", rounding)
        object.__setattr__(self, "_polygon", self._near(horizon))

    outputs: float = dataclasses.field(init=False)
    """m eta sum_t |e(t)| of the linearized run."""
    weights: float = dataclasses.field(init=False)
    """m eta sum_t |H^^(1/2) e(t)| of the linearized run."""
    half: float = dataclasses.field(init=False)
    """s_1 = m eta sum_t |H^^(1/2) (I - m eta H^)^t|_op."""
    whole: float = dataclasses.field(init=False)
    """s_2 = m eta sum_t |H^ (I - m eta H^)^t|_op."""
    norm: float = dataclasses.field(init=False)
    """sqrt( e(0)^T H^^-1 e(0) ): sqrt(m) times the length of the linearized displacement, at most."""
    coefficients: np.ndarray = dataclasses.field(init=False)
    """V^T e(0) as computed, [N]."""
    rounding: float = dataclasses.field(init=False)
    """Euclidean norm of what they are off by."""
    _polygon: tuple[np.ndarray, float] = dataclasses.field(init=False)

    @property
    def nu(self) -> float:
        """sqrt(1 + omega + E / lambda): |J(0)^T z| <= sqrt(m) nu |H^^(1/2) z|."""
        least = float(self.kernel.values[0])
        return OUTWARD * math.sqrt(1 + self.relative_error + self.discrepancy / least)

    @property
    def discrepancy(self) -> float:
        """E: |H(W(0)) - H^|_F, without what ``relative_error`` covers."""
        return OUTWARD * (self.kernel_error + float(self.kernel.radius))

    @property
    def smallest(self) -> float:
        """A lower bound on lambda_min(H(W(0)))."""
        return (float(self.kernel.values[0]) * (1 - self.relative_error) - self.discrepancy) / OUTWARD

    @property
    def largest(self) -> float:
        """An upper bound on lambda_max(H(W(0)))."""
        return (float(self.kernel.values[-1]) * (1 + self.relative_error) + self.discrepancy) * OUTWARD

    def polygon(self) -> tuple[np.ndarray, float]:
        """Points near m q(t), where J(0)^T q(t) is the linearized displacement, [k, N], and how near.

        m q(t) = H^^-1 (I - (I - m eta H^)^t) e(0)
        """
        return self._polygon

    def solution(self, times: np.ndarray) -> tuple[np.ndarray, float]:
        """Return m q(t) = H^^-1 (I - (I - m eta H^)^t) e(0), [T, N], and how far off it is at most; times may be infinite."""
        values, basis = self.kernel.values, self.kernel.basis
        ends = self.coefficients / values
        gone = -np.expm1(times[:, None] * np.log1p(-self.rate * values)[None])
        turned = float(self.kernel.tilt) + gamma(len(values) + 8) * math.sqrt(len(values)) + 1e-10
        off = self.rounding / float(values[0]) + turned * float(np.linalg.norm(ends))
        return (gone * ends[None]) @ basis.T, OUTWARD * off

    def _near(self, horizon: float) -> tuple[np.ndarray, float]:
        """Return a polygon near the path of the run, and how far from it the path may be.

        A component is c (1 - b^t) / lambda; between two times the chord is missed by at most min(z^2 / 8, 1 - e^-z) of
        what is left of it, z = -log(b) dt, at the same point of the chord for all components.
        """
        values, coefficients = self.kernel.values, self.coefficients
        times = np.concatenate([[0.0], np.geomspace(1, horizon, _steps(horizon, RATIO))])
        speed = -np.log1p(-self.rate * values)
        left = np.exp(-times[:, None] * speed[None]) * (coefficients / values)[None]
        lengths = np.diff(times)[:, None] * speed[None]
        missed = np.linalg.norm(left[:-1] * np.minimum(np.square(lengths) / 8, -np.expm1(-lengths)), axis=1).max()
        between = max(float(missed), float(np.linalg.norm(left[-1])))
        points, off = self.solution(np.append(times, np.inf))
        return points, OUTWARD * (between + off)

    def _system(self, drift: float) -> np.ndarray:
        """Return the matrix of ``paths``, acting on (P, G^)."""
        least, error, relative, nu = float(self.kernel.values[0]), self.discrepancy, self.relative_error, self.nu
        excess = drift**2 + error  # what stands before P behind s_0 and s_1 alike
        to_outputs = [nu * self.half * drift + excess / least, nu * drift / least + self.half * relative]
        to_weights = [nu * self.whole * drift + self.half * excess, nu * self.half * drift + self.whole * relative]
        return OUTWARD * np.array([to_outputs, to_weights])

    def steps(self, drift: float) -> tuple[Step, Step]:
        """Return the inequality that a drift is small enough for a rate, and for ``paths`` to be finite."""
        (a, b), (c, d) = self._system(drift)
        root = math.sqrt(self.smallest)
        feedback = (a + d) / 2 + math.sqrt(((a - d) / 2) ** 2 + b * c)
        return (
            Step("the drift is small: drift of the Jacobian over sqrt(lambda_min)", OUTWARD * drift / root, WIDEST),
            Step("deviations are summable: what they feed back into themselves", OUTWARD * feedback, LARGEST_FEEDBACK),
        )

    def paths(self, drift: float) -> Paths:
        """Solve for P, G and V at a drift Delta for which ``steps`` hold.

            P  <= P_lin + nu s_1 Delta P + s_0 ( Delta G + E P ) + s_1 omega G^
            G^ <= G_lin + nu s_2 Delta P + s_1 ( Delta G + E P ) + s_2 omega G^
            G  =  nu G^ + Delta P
            V  =  Delta P + (nu / sqrt(lambda)) ( Delta G + E P ) + nu omega G^

        s_0 = 1 / lambda, nu^2 = 1 + omega + E / lambda, lambda = lambda_min(H^). For H(W(0)) = H^ + A + H^^(1/2) B H^^(1/2),
        E bounds |A| and omega bounds |B|.
        """
        ((a, b), (c, d)), nu = self._system(drift), self.nu
        determinant = (1 - a) * (1 - d) - b * c
        outputs = OUTWARD * ((1 - d) * self.outputs + b * self.weights) / determinant
        reduced = OUTWARD * (c * self.outputs + (1 - a) * self.weights) / determinant
        weights = OUTWARD * (nu * reduced + drift * outputs)
        excess = drift * weights + self.discrepancy * outputs
        deviation = drift * outputs + nu / math.sqrt(float(self.kernel.values[0])) * excess
        return Paths(outputs, weights, OUTWARD * (deviation + nu * self.relative_error * reduced))


def _steps(horizon: float, ratio: float) -> int:
    return 2 + math.ceil(math.log(horizon) / math.log(ratio))
