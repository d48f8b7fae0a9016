"""What a claim is: a statement, a measurement that can fail, and controls that must.

A claim holds when every check of its measurement holds *and* each of its negative controls, the same checks made where the
statement is false, fails. A control that passes means that the measurement cannot tell true from false. Where float64
cannot tell either, the claim is undecided, which is neither.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from ntk_prefix.checks import UsageError
from theory.problem import Problem


class Undecidable(UsageError):
    """What a measurement raises when its numbers cannot tell true from false; its text says why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: ``measured <= bound``, or ``>=`` with ``at_least``.

    Args:
        what: the quantity, in words.
        measured: its value.
        bound: what it is compared with.
        at_least: whether the bound is a lower one.
        part: what :class:`Control` chooses its checks by, e.g. the model's name.
    """

    what: str
    measured: float
    bound: float
    at_least: bool = False
    part: str = ""

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
        parameters: what it was measured at: sizes, seeds, step sizes; numbers and lists of numbers, for claims.json.
        series: arrays that the figure draws.
    """

    checks: tuple[Check, ...]
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether there are checks and every one holds."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @property
    def tightest(self) -> int | None:
        """Index of the check with the smallest margin, which the report shows in one line; None without checks."""
        order = [(check.holds, check.margin, index) for index, check in enumerate(self.checks)]
        return min(order)[2] if order else None


@dataclasses.dataclass(frozen=True)
class Control:
    """The measurement of a claim where the statement must fail.

    It fails when *each* of its checks does: what may hold there is no part of it, and what must fail for another reason is
    a control of its own.

    Args:
        name: a word or two.
        statement: what is changed, and so must fail.
        measure: the measurement; controls that share one (the same function) are measured together, once.
        part: the checks to take, those of this ``Check.part``; None takes all.
    """

    name: str
    statement: str
    measure: Callable[[Problem], Evidence]
    part: str | None = None

    def chosen(self, evidence: Evidence) -> tuple[Check, ...]:
        """Return the checks of its measurement that must fail."""
        return tuple(check for check in evidence.checks if self.part is None or check.part == self.part)


def _decidable(problem: Problem) -> None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the theory and how it is put to the test.

    Args:
        name: as on the command line.
        title: a few words.
        statement: the statement, in symbols.
        proof: where it is proved or discussed: a section of theory/README.md, "2", or another file beside it.
        computed_by: functions of the library that the statement is about, by their names.
        source: where it comes from and how sure that is.
        measure: the measurement, on a problem; it may raise :class:`Undecidable`.
        controls: at least one, each of which must fail.
        draw: a figure from the evidence and the controls' (series of all of them together), ready for a paper.
        caption: of the figure.
        drawn: whether it draws its own inputs from the seed, so that the problem's rows and sigma do not enter;
            "unless labeled": as long as the problem has no labels.
        undecidable: why a problem cannot be decided, None if it can; asked before any work.
        timed: whether it measures seconds, so that no other claim may be measured beside it.
    """

    name: str
    title: str
    statement: str
    proof: str
    computed_by: tuple[str, ...]
    source: str
    measure: Callable[[Problem], Evidence]
    controls: tuple[Control, ...]
    draw: Callable[[Evidence, Evidence], Figure]
    caption: str
    drawn: bool | Literal["unless labeled"] = False
    undecidable: Callable[[Problem], str | None] = _decidable
    timed: bool = False

    def draws(self, problem: Problem) -> bool:
        """Return whether it draws its own inputs beside a problem."""
        return problem.labels is None if self.drawn == "unless labeled" else self.drawn

    def refused(self, problem: Problem) -> str | None:
        """Return why the claim cannot be decided on a problem, None if it may be; in float64."""
        with jax.enable_x64(True):
            return self.undecidable(problem)


@dataclasses.dataclass(frozen=True)
class ControlResult:
    """A control after its test."""

    control: Control
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether each of its checks fails, by a number: without any, or by a NaN, nothing is shown."""
        return bool(self.checks) and not any(
            check.holds or math.isnan(check.measured) or math.isnan(check.bound) for check in self.checks
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A claim after its test: the row of the report.

    Args:
        claim: what was tested.
        evidence: of its measurement; without checks if undecided.
        controls: of each control, in the claim's order.
        drawn_from: the controls' evidence, for the figure.
        undecided: why nothing can be said; None if something can.
        drawn: whether it drew its own inputs.
        seconds: what it took.
    """

    claim: Claim
    evidence: Evidence
    controls: tuple[ControlResult, ...]
    drawn_from: Evidence
    undecided: str | None = None
    drawn: bool
    seconds: float

    @property
    def controls_failed(self) -> bool:
        """Whether every control failed, as it must."""
        return bool(self.controls) and all(control.failed for control in self.controls)

    @property
    def holds(self) -> bool:
        """Whether every check held and every control failed."""
        return self.undecided is None and self.evidence.holds and self.controls_failed


def examine(claim: Claim, problem: Problem) -> Result:
    """Measure a claim and its controls, in float64; what several controls share is measured once.

    BLAS has one thread: in matrices of some hundred rows several wait for one another, and claims are measured side by side.
    """
    start = time.perf_counter()
    nothing = Evidence(())
    try:
        if (reason := claim.refused(problem)) is not None:
            raise Undecidable(reason)
        with jax.enable_x64(True), threadpool_limits(1):
            evidence = claim.measure(problem)
            found: dict[Callable[[Problem], Evidence], Evidence] = {}
            for control in claim.controls:
                if control.measure not in found:
                    found[control.measure] = control.measure(problem)
    except Undecidable as error:
        seconds = time.perf_counter() - start
        return Result(
            claim=claim,
            evidence=nothing,
            controls=(),
            drawn_from=nothing,
            undecided=str(error),
            drawn=claim.draws(problem),
            seconds=seconds,
        )
    jax.clear_caches()  # no claim runs another's programs, and together they take more memory than any one of them
    series = {name: value for evidence_of in found.values() for name, value in evidence_of.series.items()}
    together = Evidence(tuple(check for each in found.values() for check in each.checks), series=series)
    return Result(
        claim=claim,
        evidence=evidence,
        controls=tuple(ControlResult(control, control.chosen(found[control.measure])) for control in claim.controls),
        drawn_from=together,
        drawn=claim.draws(problem),
        seconds=time.perf_counter() - start,
    )


def relative_error(measured: Any, reference: Any) -> float:
    """Return the Frobenius norm of the difference over that of the reference."""
    measured, reference = np.asarray(measured), np.asarray(reference)
    return float(np.linalg.norm((measured - reference).ravel()) / np.linalg.norm(reference.ravel()))
