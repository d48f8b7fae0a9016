"""The report: one page that carries its figures, the same as Markdown, and a file for programs.

Nothing is written half. Every finished claim goes to a hidden folder of its own inside the output folder, where an
interrupted run finds it again; the report itself is written under other names and moved into place when all is done.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from ntk_prefix.artifacts import decode_json, finite_or_none, held, json_text, provenance, read_json, write_whole
from ntk_prefix.checks import UsageError
from theory.claim import Check, Claim, Result
from theory.problem import Problem

UNFINISHED = ".unfinished"


# ------------------------------------------------------------------------------- What is in claims.json


class Row(TypedDict):
    """A check; numbers that are not finite are None."""

    what: str
    measured: float | None
    bound: float | None
    at_least: bool
    margin: float | None
    holds: bool


class ControlRecord(TypedDict):
    """A control."""

    name: str
    statement: str
    failed: bool
    checks: list[Row]


class Record(TypedDict):
    """A claim's entry; ``tightest`` is the check whose numbers stand at the top, ``undecided`` why there are none."""

    name: str
    statement: str
    source: str
    holds: bool
    undecided: str | None
    measured: float | None
    bound: float | None
    margin: float | None
    tightest: int | None
    control: str
    control_failed: bool
    controls: list[ControlRecord]
    seconds: float
    parameters: dict[str, int | float | str | list[int | float | None] | None]
    checks: list[Row]


def record_of(result: Result) -> Record:
    """Return the entry of a claim that was tested."""
    claim, evidence = result.claim, result.evidence
    checks = [_row(check) for check in evidence.checks]
    shown = None if evidence.tightest is None else checks[evidence.tightest]
    return {
        "name": claim.name,
        "statement": claim.statement,
        "source": claim.source + ("; inputs drawn from the seed, not those of --data" if claim.drawn else ""),
        "holds": result.holds,
        "undecided": result.undecided,
        "measured": shown and shown["measured"],
        "bound": shown and shown["bound"],
        "margin": shown and shown["margin"],
        "tightest": evidence.tightest,
        "control": "; ".join(control.statement for control in claim.controls),
        "control_failed": result.controls_failed,
        "controls": [
            {
                "name": found.control.name,
                "statement": found.control.statement,
                "failed": found.failed,
                "checks": [_row(check) for check in found.checks],
            }
            for found in result.controls
        ],
        "seconds": result.seconds,
        "parameters": {name: _finite(value) for name, value in evidence.parameters.items()},
        "checks": checks,
    }


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the report takes from a claim that was tested: bytes, which any process may have made.

    Args:
        record: its :class:`Record`, as JSON.
        picture: its figure, as PNG; None if it is undecided.
    """

    record: bytes
    picture: bytes | None


def finish(result: Result) -> Finished:
    """Draw a claim that was tested and write it down."""
    record = json_text(record_of(result)).encode()
    if result.undecided is not None:
        return Finished(record, None)
    picture = io.BytesIO()
    result.claim.draw(result.evidence, result.drawn_from).savefig(picture, format="png")
    return Finished(record, picture.getvalue())


def _row(check: Check) -> Row:
    return {
        "what": check.what,
        "measured": finite_or_none(float(check.measured)),
        "bound": finite_or_none(float(check.bound)),
        "at_least": check.at_least,
        "margin": finite_or_none(float(check.margin)),
        "holds": check.holds,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return finite_or_none(value) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------- The folder


def configuration(problem: Problem, claims: list[Claim]) -> dict[str, Any]:
    """Return what a run is: data, sizes, versions and sources. Two runs of the same configuration measure the same."""
    return {
        "claims": [claim.name for claim in claims],
        "data": problem.name,
        "data_sha256": problem.digest,
        "inputs": problem.n,
        "width": problem.d,
        "sigma": problem.sigma,
        "seed": problem.seed,
        "profile": problem.profile,
        **provenance("neural-tangents", sources=("ntk_prefix/**/*.py", "theory/**/*.py")),
    }


class Folder:
    """The output folder of one run, held by one process at a time."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        # absolute: what is written stays together wherever the process goes
        self.path, self.config = path.absolute(), config
        self.unfinished = self.path / UNFINISHED

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; what another configuration left unfinished in it is dropped.

        Raises:
            UsageError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with held(self.path / ".lock", "--out"):
            if self._stored("configuration", dict) != self.config:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(exist_ok=True)
            write_whole(self.unfinished / "configuration.json", json_text(self.config).encode())
            yield

    def finished(self, claim: Claim) -> Record | None:
        """Return the record of a claim that an interrupted run of this configuration had finished."""
        record = self._stored(claim.name, Record)
        if record is None or record["name"] != claim.name:
            return None
        return record if record["undecided"] or (self.unfinished / f"{claim.name}.png").is_file() else None

    def keep(self, claim: Claim, found: Finished) -> Record:
        """Store a finished claim, figure first: a record without its figure does not exist."""
        record = decode_json(found.record, Record, claim.name)
        if found.picture is not None:
            write_whole(self.unfinished / f"{claim.name}.png", found.picture)
        write_whole(self.unfinished / f"{claim.name}.json", found.record)
        return record

    def publish(self, claims: list[Claim], records: list[Record]) -> Path:
        """Move the whole report into place, the page last, and forget the unfinished run."""
        figures = self.path / "figures"
        figures.mkdir(exist_ok=True)
        pictures = {
            record["name"]: (self.unfinished / f"{record['name']}.png").read_bytes()
            for record in records
            if not record["undecided"]
        }
        for name, picture in pictures.items():
            write_whole(figures / f"{name}.png", picture)
        write_whole(self.path / "claims.json", json_text(records).encode())
        write_whole(self.path / "configuration.json", json_text(self.config).encode())
        write_whole(self.path / "report.md", markdown(claims, records, self.config).encode())
        page = self.path / "index.html"
        write_whole(page, webpage(claims, records, self.config, pictures).encode())
        shutil.rmtree(self.unfinished)
        return page

    def _stored(self, name: str, kind: type[Any]) -> Any:
        """Return what an interrupted run has stored; what cannot be read was not."""
        try:
            return read_json(self.unfinished / f"{name}.json", kind)
        except UsageError:
            return None


# --------------------------------------------------------------------------------- What the reader sees


def number(value: Any) -> str:
    """Return a number as a reader wants it: three digits, powers of ten where they help; lists entry by entry."""
    if isinstance(value, list):
        return " ".join(number(entry) for entry in value)
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line, whatever stands in it."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def lengths(record: Record) -> tuple[str, str]:
    """Return the prefix length a claim used, and the one the theory's form asks for where it states one."""
    parameters = record["parameters"]
    asked = [
        f"10^{value:.0f} ({key.rsplit('_', 1)[1]})"
        for key, value in parameters.items()
        if key.startswith("theory_") and isinstance(value, int | float)
    ]
    return number(parameters.get("tokens")), ", ".join(asked) or "-"


def verdict(record: Record) -> str:
    """Return the verdict in words: a claim holds, does not, is undecided, or was not tested by its controls."""
    if record["undecided"]:
        return "undecided"
    if record["holds"]:
        return "holds"
    return "does not hold" if record["control_failed"] else "not tested: a control holds too"


def controls_in_words(record: Record) -> str:
    """Return how many controls failed, and which did not."""
    passed = [control["name"] for control in record["controls"] if not control["failed"]]
    if passed:
        return f"DID NOT FAIL: {', '.join(passed)}"
    return f"{len(record['controls'])} of {len(record['controls'])} fail" if record["controls"] else "-"


def _shown(record: Record) -> tuple[str, str, str, str]:
    """Return the tightest check in words: what, measured, bound, margin."""
    if record["tightest"] is None:
        return record["undecided"] or "-", "-", "-", "-"
    row = record["checks"][record["tightest"]]
    return row["what"], number(row["measured"]), f"{_sign(row)} {number(row['bound'])}", number(row["margin"])


def _sign(row: Row) -> str:
    return ">=" if row["at_least"] else "<="


def _rows(record: Record) -> Iterator[tuple[str, str, str, str]]:
    """Yield every check, and the controls': what, measured, bound, whether it holds."""
    parts = [("", record["checks"])] + [
        (f"control, {found['name']}: ", found["checks"]) for found in record["controls"]
    ]
    for prefix, rows in parts:
        for row in rows:
            bound = f"{_sign(row)} {number(row['bound'])}"
            yield prefix + row["what"], number(row["measured"]), bound, "yes" if row["holds"] else "no"


def markdown(claims: list[Claim], records: list[Record], config: dict[str, Any]) -> str:
    """Return the report as Markdown, figures beside it."""
    lines = [
        "# Verification of the infinite-prefix theory",
        "",
        _summary(records),
        "",
        f"Data: {plain(config['data'])} (n = {config['inputs']}, d = {config['width']}), sigma = {config['sigma']:g}, "
        f"seed {config['seed']}, profile {config['profile']}, commit {config['git']}.",
        "",
        "| claim | verdict | tightest check | measured | bound | margin | m used | m the theory asks | controls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [verdict(record), *_shown(record), *lengths(record), controls_in_words(record)]
        lines.append(f"| [{plain(record['name'])}](#{record['name']}) | {' | '.join(map(plain, cells))} |")
    for claim, record in zip(claims, records, strict=True):
        lines += ["", f"## {record['name']}", "", f"**{plain(claim.title)}.** {plain(record['statement'])}", ""]
        lines += [f"Source: {plain(record['source'])}.", ""]
        if record["undecided"]:
            lines += [f"Undecided: {plain(record['undecided'])}"]
            continue
        lines += [f"![{plain(claim.title)}](figures/{claim.name}.png)", "", plain(claim.caption), ""]
        lines += ["| check | measured | bound | holds |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(plain, row))} |" for row in _rows(record)]
        lines += ["", "Controls:", ""]
        lines += [f"- {plain(c['name'])}: {plain(c['statement'])}; {_failed(c)}." for c in record["controls"]]
        lines += ["", f"Measured at: {plain(_parameters(record))}."]
    return "\n".join(lines) + "\n"


def _failed(control: ControlRecord) -> str:
    return "it failed, as it must" if control["failed"] else "it DID NOT FAIL"


def webpage(claims: list[Claim], records: list[Record], config: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Return the report as one page that needs no other file."""
    rows = []
    for record in records:
        good = f'<span class="{"good" if record["holds"] else "bad"}">{verdict(record)}</span>'
        controls = "<br>".join(
            f"{html.escape(found['name'])}: {html.escape(found['statement'])}; "
            f'<span class="{"quiet" if found["failed"] else "bad"}">{_failed(found)}</span>'
            for found in record["controls"]
        )
        cells = [
            f'<a href="#{record["name"]}">{record["name"]}</a><br>{good}',
            f'{html.escape(record["statement"])}<br><span class="quiet">{html.escape(record["source"])}</span>',
            *map(html.escape, (*_shown(record), *lengths(record))),
            controls or "-",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("claim", "statement", "tightest check", "measured", "bound", "margin", "m used", "m the theory asks for",
             "controls, each of which must fail")  # fmt: skip
    sections = [
        _section(claim, record, pictures.get(claim.name)) for claim, record in zip(claims, records, strict=True)
    ]
    settings = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
        for key, value in config.items()
    )
    return PAGE.format(
        summary=html.escape(_summary(records)),
        data=html.escape(f"{config['data']}; sigma = {config['sigma']:g}; profile {config['profile']}"),
        head="".join(f"<th>{head}</th>" for head in heads),
        rows="".join(rows),
        sections="".join(sections),
        settings=settings,
    )


def _section(claim: Claim, record: Record, picture: bytes | None) -> str:
    head = (
        f'<section id="{claim.name}"><h2>{claim.name}: {html.escape(claim.title)}</h2>'
        f"<p>{html.escape(record['statement'])}</p><p class=quiet>Source: {html.escape(record['source'])}.</p>"
    )
    if picture is None:
        return head + f"<p>Undecided: {html.escape(record['undecided'] or '')}</p></section>"
    checks = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(record)
    )
    return head + (
        f'<figure><img alt="{html.escape(claim.title)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<figcaption>{html.escape(claim.caption)}</figcaption></figure>"
        f"<details><summary>Every check, and the controls'</summary><table><tr><th>check</th><th>measured</th>"
        f"<th>bound</th><th>holds</th></tr>{checks}</table></details>"
        f"<p class=quiet>Measured at: {html.escape(_parameters(record))}; {record['seconds']:.0f} s.</p></section>"
    )


def _summary(records: list[Record]) -> str:
    controls = [found["failed"] for record in records for found in record["controls"]]
    undecided = sum(bool(record["undecided"]) for record in records)
    return (
        f"{sum(record['holds'] for record in records)} of {len(records)} claims hold"
        + (f", {undecided} undecided" if undecided else "")
        + f". {sum(controls)} of {len(controls)} negative controls fail, as they must. "
        f"{sum(record['seconds'] for record in records):.0f} s of measurement."
    )


def _parameters(record: Record) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in record["parameters"].items())


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Verification of the infinite-prefix theory</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1280px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.6em; }} h2 {{ font-size: 1.15em; margin-top: 2.2em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ text-align: left; vertical-align: top; padding: .35em .6em; border-bottom: 1px solid #ddd; }}
th {{ border-bottom: 2px solid #888; }}
.claims td:nth-child(2) {{ min-width: 26em; }} .claims td:nth-child(3), .claims td:nth-child(9) {{ min-width: 13em; }}
.claims td:nth-child(n+4):nth-child(-n+7) {{ white-space: nowrap; }}
.good {{ color: #1b6e3c; font-weight: 600; }} .bad {{ color: #b3261e; font-weight: 600; }}
.quiet, figcaption {{ color: #555; font-size: 13px; }}
figure {{ margin: 1em 0; }} img {{ max-width: 100%; }}
</style></head><body>
<h1>Verification of the infinite-prefix theory</h1>
<p><b>{summary}</b></p><p class="quiet">Data: {data}. A claim holds when all of its checks hold and each of its negative
controls fails; the row shows the check with the smallest margin.</p>
<div class="wide"><table class="claims"><tr>{head}</tr>{rows}</table></div>
{sections}
<section><h2>Configuration</h2><div class="wide"><table>{settings}</table></div></section>
</body></html>
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run found, for the program that started it."""

    page: Path
    records: list[Record]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(record["holds"] for record in self.records)

    @property
    def status(self) -> int:
        """Exit status: 0 if every claim holds, 1 if one does not, 2 if none fails and one is undecided."""
        if self.holds:
            return 0
        return 1 if any(not record["holds"] and not record["undecided"] for record in self.records) else 2
