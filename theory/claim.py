"""What a claim is: a statement, a measurement that can fail, and a control that must.

A claim holds when every check of its measurement holds *and* its negative control, the same checks made where the
statement should be false, does not. A control that passes means that the measurement cannot tell true from false.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.artifacts import finite_or_none
from theory.problem import Problem


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: ``measured <= bound``, or ``>=`` with ``at_least``."""

    what: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the comparison is true; a NaN never holds."""
        return bool(self.measured >= self.bound if self.at_least else self.measured <= self.bound)

    @property
    def margin(self) -> float:
        """How many times the measured value fits into the bound (or the bound into it): at least 1 when it holds.

        A quantity that is negative or zero has no ratio: there the margin is infinite or 0.
        """
        small, large = (self.bound, self.measured) if self.at_least else (self.measured, self.bound)
        if math.isnan(small) or math.isnan(large):
            return 0.0
        if small <= 0:
            return math.inf if small <= large else 0.0
        return max(large, 0.0) / small


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a measurement found.

    Args:
        checks: the comparisons, all of which must hold.
        parameters: what it was measured at: sizes, seeds, step sizes; plain numbers and strings, for claims.json.
        series: arrays that the figure draws.
    """

    checks: tuple[Check, ...]
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    @property
    def tightest(self) -> Check:
        """The check with the smallest margin: what the report shows in one line."""
        return min(self.checks, key=lambda check: (check.holds, check.margin))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the theory and how it is put to the test.

    Args:
        name: as on the command line.
        title: a few words.
        statement: the statement, in symbols.
        source: where it comes from and how sure that is.
        measure: the measurement, on a problem.
        control: the same measurement where the statement must fail.
        control_statement: what the control changes.
        draw: a figure from the evidence and the control's, ready for a paper.
        caption: of the figure.
        drawn: whether it draws its own inputs from the seed, so that the problem's rows and sigma do not enter.
    """

    name: str
    title: str
    statement: str
    source: str
    measure: Callable[[Problem], Evidence]
    control: Callable[[Problem], Evidence]
    control_statement: str
    draw: Callable[[Evidence, Evidence], Figure]
    caption: str
    drawn: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A claim after its test: the row of the report."""

    claim: Claim
    evidence: Evidence
    control: Evidence
    seconds: float

    @property
    def holds(self) -> bool:
        """The measurement held and the control did not."""
        return self.evidence.holds and not self.control.holds

    def record(self) -> dict[str, Any]:
        """The claim's entry of claims.json."""
        shown = self.evidence.tightest
        return {
            "name": self.claim.name,
            "statement": self.claim.statement,
            "source": self.claim.source
            + ("; inputs drawn from the seed, not those of --data" if self.claim.drawn else ""),
            "holds": self.holds,
            **{name: value for name, value in _row(shown).items() if name in ("measured", "bound", "margin")},
            "control": self.claim.control_statement,
            "control_failed": not self.control.holds,
            "seconds": self.seconds,
            "parameters": self.evidence.parameters,
            "checks": [_row(check) for check in self.evidence.checks],
            "control_checks": [_row(check) for check in self.control.checks],
        }


def _row(check: Check) -> dict[str, Any]:
    numbers = {"measured": check.measured, "bound": check.bound, "margin": check.margin}
    finite = {name: finite_or_none(value) for name, value in numbers.items()}
    return {**dataclasses.asdict(check), **finite, "holds": check.holds}


def examine(claim: Claim, problem: Problem) -> Result:
    """Measure a claim and its control, in float64."""
    start = time.perf_counter()
    with jax.enable_x64(True):
        evidence, control = claim.measure(problem), claim.control(problem)
    jax.clear_caches()  # no claim runs another's programs, and together they take more memory than any one of them
    return Result(claim=claim, evidence=evidence, control=control, seconds=time.perf_counter() - start)


def relative_error(measured: Any, reference: Any) -> float:
    """Frobenius norm of the difference over that of the reference."""
    measured, reference = np.asarray(measured), np.asarray(reference)
    return float(np.linalg.norm((measured - reference).ravel()) / np.linalg.norm(reference.ravel()))
