"""``python -m theory``: verify the theory of infinitely long prefixes and write a report one can read and trust."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ntk_prefix.artifacts import cores
from ntk_prefix.checks import UsageError, expected
from theory.claim import Claim
from theory.claims import claims, table
from theory.command import counted, ended
from theory.jobs import estimate, measure
from theory.page import controls_in_words, number, verdict
from theory.problem import Problem, Profile, Scaling, load
from theory.record import Record
from theory.report import Folder, Outcome, configuration

COLORS = {"holds": "green", "undecided": "yellow"}
"""Of a verdict; all others are red."""


def verify(problem: Problem, chosen: list[Claim], out: Path, console: Console, jobs: int = 1) -> Outcome:
    """Test every claim and write the report; take over what an interrupted run of the same configuration finished.

    Args:
        problem: what they are measured on.
        chosen: the claims, in the order of the report.
        out: folder of the report.
        console: shows progress.
        jobs: how many claims are measured at once; it changes no number.

    Raises:
        UsageError: no claim can be decided on this problem; nothing is measured or written then.
    """
    reasons = [claim.refused(problem) for claim in chosen]
    if reasons and all(reasons):
        raise UsageError("; ".join(f"{claim.name}: {why}" for claim, why in zip(chosen, reasons, strict=True)))
    folder = Folder(out, configuration(problem, chosen))
    with folder.held(), counted(console) as progress:
        task = progress.add_task("claims", total=len(chosen))

        def begun(running: list[Claim]) -> None:
            names = (
                f"{running[0].name}: {running[0].title}" if len(running) == 1 else ", ".join(c.name for c in running)
            )
            progress.update(task, description=escape(names))

        def ended(record: Record, resumed: bool) -> None:
            shown = verdict(record)
            line = f"[{COLORS.get(shown, 'red')}]{shown:<9}[/]  {record['name']:<16} {record['seconds']:6.1f} s"
            details = [record["undecided"], "(from the interrupted run)" if resumed else None]
            details += [controls_in_words(record)] if shown.startswith("not tested") else []
            text = "  ".join([line, *(escape(detail) for detail in details if detail)])
            progress.console.print(text, highlight=False, soft_wrap=True)
            progress.advance(task)

        records = {claim.name: record for claim in chosen if (record := folder.finished(claim)) is not None}
        for record in records.values():
            ended(record, resumed=True)
        left = [claim for claim in chosen if claim.name not in records]
        with contextlib.closing(measure(left, problem, jobs, begun)) as measured:  # ends its processes, come what may
            for claim, found in measured:
                records[claim.name] = folder.keep(claim, found)
                ended(records[claim.name], resumed=False)
        in_order = [records[claim.name] for claim in chosen]
        page = folder.publish(chosen, in_order)
    return Outcome(page, in_order)


def summary(outcome: Outcome) -> Table:
    """Return the report's table, for the terminal."""
    table = Table("claim", "verdict", "measured", "bound", "margin", "controls", "seconds")
    for record in outcome.records:
        shown = verdict(record)
        controls = escape(controls_in_words(record))
        table.add_row(
            record["name"],
            f"[{COLORS.get(shown, 'red')}]{shown}[/]",
            number(record["measured"]),
            number(record["bound"]),
            number(record["margin"]),
            f"[green]{controls}[/]" if record["control_failed"] else f"[red]{controls}[/]",
            f"{record['seconds']:.1f}",
        )
    return table


def main(
    claim: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    profile: Profile = "quick",
    data: str = "digits",
    out: Path = Path("runs/theory"),
    seed: int = 0,
    inputs: int | Literal["all"] | None = None,
    targets: str | None = None,
    scaling: Scaling = "none",
    width: int | None = None,
    sigma: float = 1.0,
    jobs: int | None = None,
    list_claims: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False,
    markdown: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Verify the theory of infinitely long prefixes, claim by claim, each with negative controls that must fail.

    Writes index.html (self-contained), report.md, claims.json, claims.tex, configuration.json and figures/ to OUT. An
    interrupted run goes on where it stopped. Exits with 1 if a claim does not hold or a control does not fail, with 2 on bad
    input or if float64 or so few rows cannot decide a claim, with 130 on Ctrl-C.

    Args:
        claim: claims to test; none means all.
        profile: "quick" takes minutes on two cores, "full" shows the sizes of a paper.
        data: "digits", or a .npy file with your own floats [n, d], rows distinct and in the unit ball, once scaled. Claims
            that draw inputs of their own do without it, and are named.
        out: folder of the report.
        seed: of the data's choice and of every prefix.
        inputs: rows to take, of a file its first, or "all"; the default is 16 of the digits, all of a file. Time grows with
            the square of rows times columns.
        targets: a .npy file with what to learn from a file's rows: floats [n] or [n, outputs], or labels [n], each of which
            stands for the mean of its rows. Drawn from the seed if not given.
        scaling: of a file's rows: "ball" divides by the largest norm, "standard" first brings each column to mean 0 and
            deviation 1.
        width: principal components of the digits, 8 if not given; a file has its own columns.
        sigma: standard deviation of a prefix token's coordinates.
        jobs: claims to measure at once, each in a process of its own; the default is one for each core.
        list_claims: list the claims and stop.
        markdown: with --list, print the table of theory/README.md.
    """
    console = Console()

    def run() -> int:
        chosen = claims(claim)
        if markdown and not list_claims:
            raise expected("--markdown", "it beside --list", "it alone")
        if width is not None and data != "digits":
            raise expected("--width", "it left out beside a file, which has its own columns", width)
        if jobs is not None and jobs < 1:
            raise expected("--jobs", "at least 1 claim at once", jobs)
        if list_claims and markdown:
            console.out(table(chosen), highlight=False)
            return 0
        if list_claims:
            for entry in chosen:
                console.print(
                    f"[bold]{entry.name:<16}[/] {escape(entry.title)}\n{' ' * 17}[dim]{escape(entry.statement)}[/]",
                    highlight=False,
                )
            return 0
        with jax.enable_x64(True):
            problem = load(
                data,
                inputs=inputs,
                width=8 if width is None else width,
                sigma=sigma,
                seed=seed,
                profile=profile,
                targets=targets,
                scaling=scaling,
            )
        at_once = cores() if jobs is None else jobs
        console.print(estimate(problem, chosen, at_once), highlight=False, soft_wrap=True)
        outcome = verify(problem, chosen, out, console, at_once)
        console.print(summary(outcome))
        page = str(outcome.page).encode("utf-8", "replace").decode()  # bytes that are no text cannot be printed
        console.print(f"report: {escape(page)}", highlight=False, soft_wrap=True)
        return outcome.status

    return ended(run, console)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m theory"))
