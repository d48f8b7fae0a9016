"""The table: one line for each task and method, for programs and for people."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from ntk_prefix.artifacts import provenance
from train.comparison.plan import Cell, Comparison
from train.confidence import BINS
from train.profiles import Row
from train.ranking import lead
from train.ranking_data import KINDS

__all__ = ["UNTRAINED", "as_number", "as_whole", "document", "markdown", "table_line"]


UNTRAINED = "none"
"""The method of a row for which nothing is trained."""

FROZEN = "frozen cosine"
"""The row of :mod:`train.ranking_references` that rankers start from."""


def table_line(task: str, row: Row, finished: dict[Cell, dict[str, Any]], rate: float) -> dict[str, Any]:
    """Return one line of the table: the runs of the chosen rate.

    Args:
        task: of the line.
        row: of the line.
        finished: what each of its cells says, by :func:`train.comparison.run.run_cell`.
        rate: that was chosen.
    """
    runs = [
        summary for cell, summary in sorted(finished.items(), key=lambda i: i[0].seed) if cell.learning_rate == rate
    ]
    scores = [run["test_score"] for run in runs]  # None of one that diverged
    known = [score for score in scores if score is not None]
    whole = [run for run in runs if not run.get("diverged")] or [{}]

    def median(name: str) -> Any:
        values = [run[name] for run in whole if run.get(name) is not None]
        return statistics.median(values) if values else None

    def mean(name: str) -> float | None:
        values = [run[name] for run in whole if run.get(name) is not None]
        return statistics.fmean(values) if values else None

    def spread(name: str) -> float | None:
        values = [run[name] for run in whole if run.get(name) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    return {
        "task": task,
        "row": row[0],
        "method": row[1],
        "scores": scores,
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "diverged": sum(bool(run.get("diverged")) for run in runs),
        "learning_rate": rate,
        "grid": {f"{c.learning_rate:g}": s["validation_score"] for c, s in finished.items() if c.seed == 0},
        "trainable_parameters": median("trainable_parameters"),
        "test_rows": median("test_rows"),
        "before": mean("test_score_before"),
        "last_number_before": mean("test_last_number_before"),
        "last_number": mean("test_last_number"),
        "loss_before": mean("test_loss_before"),
        "loss": mean("test_loss"),
        "forgetting": mean("forgetting"),
        "forgetting_spread": spread("forgetting"),
        "seconds_a_step": median("seconds_a_step"),
        "peak_memory_bytes": median("peak_memory_bytes"),
        "adapter_bytes": median("adapter_bytes"),
        **{name: mean(name) for name in ("macro_f1", "calibration_error", "calibration_error_scaled", "temperature")},
        # of rankers: kind of candidates -> how often the true one is told from nine of these; of choices, the share
        "identification": {
            kind: statistics.fmean(run["identification"][kind] for run in whole)
            for kind in whole[0].get("identification", ())
        },
        "right": [run.get("right") for run in whole],
        "agreement": _mean_agreement(whole),
        # of all seeds together: the bins add up
        "reliability": [[*b.values()] for run in whole for b in run.get("reliability", ())],
    }


def _mean_agreement(runs: list[dict[str, Any]]) -> float | None:
    found = [run["agreement"] for run in runs if run.get("agreement")]
    return statistics.fmean(each["agree"] / each["of"] for each in found) if found else None


def document(comparison: Comparison, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table for programs, with where it comes from."""
    return {
        "comparison": dataclasses.asdict(comparison),
        "lines": lines,
        **provenance("orbax-checkpoint", sources=("ntk_prefix/**/*.py", "train/**/*.py")),
    }


def markdown(comparison: Comparison, lines: list[dict[str, Any]]) -> str:
    """Return the table for people."""
    seeds = (
        f"Test score, mean and standard deviation over {comparison.repeats} seeds (each draws its own training sample, order "
        "and start)"
        if comparison.repeats > 1
        else "Test score of one seed"
    )
    about = (
        f"{seeds}; {_about_rates(comparison)}; the head's is that of the task's configuration, "
        "but for the row that trains nothing else. Parameters include the head. Before: at the start, of language; the "
        "score is that of generated answers, right if the number marked ####, and last number if the last one, is; the "
        "loss is that of the true answers. Diverged: runs whose numbers did not stay finite; they have no score. "
        "Ahead by: the difference of the means and its "
        "standard error, the seeds of both rows taken as independent. Loss: mean cross entropy on the test rows. "
        "Forgetting: rise of the mean cross entropy per token on text that has nothing to do with the task, over the model "
        "without adapter; - of runs that did not measure it, and of encoders, which have no loss of language. F1: macro; "
        f"ECE: expected calibration error, {BINS} bins of equal width; scaled: with a temperature from validation.\n"
    )
    if any(line["identification"] for line in lines):
        about += (
            "Of rankers: how often the true continuation is told from nine others, the score the mean over the kinds of these "
            "(other documents' at random, other spans of its own, what a decoder wrote; too few of its own are filled up with "
            "random); a share p of n test rows has an error of sqrt(p (1 - p) / n). Ahead of frozen cosine by: row "
            "by row, the test rows the sample, of the mean over seeds. People: how often it prefers what most of them did, in "
            "percent.\n"
        )
    ours = {line["task"]: line for line in lines if line["row"] == "ntk"}
    # a task of the same test rows, with other training rows, may have no references of its own
    frozen = next((line for line in lines if line["row"] == FROZEN), None)
    columns = {
        "task": [line["task"] for line in lines],
        "method": [line["row"] for line in lines],
        "before": [as_number(line["before"], 0.01, 1) for line in lines],
        "score": [as_number(line["mean"], 0.01, 1) for line in lines],
        "spread": [as_number(line["spread"], 0.01, 1) for line in lines],
        "diverged": [f"{line['diverged']} of {len(line['scores'])}" if line["diverged"] else "-" for line in lines],
        "ntk is ahead by": [_lead(ours.get(line["task"]), line) for line in lines],
        "last number before": [as_number(line["last_number_before"], 0.01, 1) for line in lines],
        "last number": [as_number(line["last_number"], 0.01, 1) for line in lines],
        **{f"among {kind}": [_kind(line, kind) for line in lines] for kind in ("random", *KINDS[2:])},
        f"ahead of {FROZEN} by": [_ahead_of(frozen, line) for line in lines],
        "people": [as_number(line["agreement"], 0.01, 1) for line in lines],
        "loss before": [as_number(line["loss_before"], 1, 3) for line in lines],
        "loss": [as_number(line["loss"], 1, 3) for line in lines],
        "forgetting": [_forgetting(line) for line in lines],
        "F1": [as_number(line["macro_f1"], 0.01, 1) for line in lines],
        "ECE": [as_number(line["calibration_error"], 0.01, 1) for line in lines],
        "ECE, scaled": [as_number(line["calibration_error_scaled"], 0.01, 1) for line in lines],
        "parameters": [as_whole(line["trainable_parameters"]) for line in lines],
        "learning rate": [_rate(comparison, line) for line in lines],
        "s / step": [as_number(line["seconds_a_step"], 1, 2) for line in lines],
        "peak memory, MiB": [as_number(line["peak_memory_bytes"], 2**20, 0) for line in lines],
        "adapter, KiB": [as_number(line["adapter_bytes"], 2**10, 0) for line in lines],
    }
    known = {name: values for name, values in columns.items() if name == "forgetting" or set(values) != {"-"}}
    rows = [list(known), ["---"] * len(known), *map(list, zip(*known.values(), strict=True))]
    return "\n".join([about, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _kind(line: dict[str, Any], kind: str) -> str:
    return as_number(line["identification"].get(kind), 0.01, 1)


def _ahead_of(frozen: dict[str, Any] | None, line: dict[str, Any]) -> str:
    """Return by how much a ranker is ahead of the frozen one, in percentage points."""
    if frozen is None or frozen is line or (found := lead(line["right"], frozen["right"][0])) is None:
        return "-"
    return f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f}"


def _about_rates(comparison: Comparison) -> str:
    """Return how learning rates were chosen."""
    grids = {comparison.rates_of(row) for _, row in comparison.pairs()}
    several = sorted(", ".join(f"{rate:g}" for rate in grid) for grid in grids if len(grid) > 1)
    said = [
        f"learning rate chosen on validation out of {' or '.join(several)} with seed 0, marked * at an end of these: one "
        "beyond might be better"
    ] * bool(several)
    if len(several) < len(grids):
        said.append(f"one learning rate {'for some rows' if several else 'a row'}, of the profile, not tuned here")
    return "; ".join(said)


def _rate(comparison: Comparison, line: dict[str, Any]) -> str:
    """Return a line's rate, marked at an end of its grid."""
    if line["method"] == UNTRAINED:
        return "-"
    rate = line["learning_rate"]
    (grid,) = {comparison.rates_of(row) for _, row in comparison.pairs() if row[0] == line["row"]}
    return f"{rate:g}{'*' * (len(grid) > 1 and rate in (min(grid), max(grid)))}"


def _forgetting(line: dict[str, Any]) -> str:
    """Return its mean over seeds, with the standard deviation of more than one."""
    spread = line["forgetting_spread"]
    return as_number(line["forgetting"], 1, 3) + ("" if spread is None else f" ± {spread:.3f}")


def _lead(ours: dict[str, Any] | None, line: dict[str, Any]) -> str:
    """Return by how much the row "ntk" of the same task is better, in percentage points."""
    if ours is None or ours is line or ours["mean"] is None or line["mean"] is None:
        return "-"
    lead = f"{100 * (ours['mean'] - line['mean']):+.1f}"
    if ours["spread"] is None or line["spread"] is None:
        return lead
    error = sum(each["spread"] ** 2 / (len(each["scores"]) - each["diverged"]) for each in (ours, line)) ** 0.5
    return f"{lead} ± {100 * error:.1f}"


def as_whole(value: Any) -> str:
    """Return a whole number with its thousands set off; "-" for none."""
    return "-" if value is None else f"{int(value):,}"


def as_number(value: Any, unit: float, digits: int) -> str:
    """Return a number in a unit; "-" for none."""
    return "-" if value is None else f"{value / unit:,.{digits}f}"
