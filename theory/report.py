"""The report: one page that carries its figures, the same as Markdown, and a file for programs.

Nothing is written half. Every finished claim goes to a hidden folder of its own inside the output folder, where an
interrupted run finds it again; the report itself is written under other names and moved into place when all is done.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntk_prefix.artifacts import held, json_text, provenance, write_whole
from theory.claim import Claim, Result
from theory.problem import Problem

UNFINISHED = ".unfinished"


def configuration(problem: Problem, claims: list[Claim]) -> dict[str, Any]:
    """What a run is: data, sizes, versions and sources. Two runs of the same configuration measure the same."""
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
        self.path, self.config = path, config
        self.unfinished = path / UNFINISHED

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; what another configuration left unfinished in it is dropped.

        Raises:
            ValueError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with held(self.path / ".lock", "--out"):
            if self._stored("configuration") != self.config:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(exist_ok=True)
            write_whole(self.unfinished / "configuration.json", json_text(self.config).encode())
            yield

    def finished(self, claim: Claim) -> dict[str, Any] | None:
        """The record of a claim that an interrupted run of this configuration had finished."""
        record = self._stored(claim.name)
        return record if (self.unfinished / f"{claim.name}.png").is_file() else None

    def keep(self, result: Result) -> dict[str, Any]:
        """Store a finished claim, figure first: a record without its figure does not exist."""
        record = json.loads(json_text(result.record()))
        picture = self.unfinished / f"{result.claim.name}.png.new"
        result.claim.draw(result.evidence, result.control).savefig(picture, format="png")
        picture.replace(picture.with_suffix(""))
        write_whole(self.unfinished / f"{result.claim.name}.json", json_text(record).encode())
        return record

    def publish(self, claims: list[Claim], records: list[dict[str, Any]]) -> Path:
        """Move the whole report into place, the page last, and forget the unfinished run."""
        figures = self.path / "figures"
        figures.mkdir(exist_ok=True)
        pictures = {claim.name: (self.unfinished / f"{claim.name}.png").read_bytes() for claim in claims}
        for name, picture in pictures.items():
            write_whole(figures / f"{name}.png", picture)
        write_whole(self.path / "claims.json", json_text(records).encode())
        write_whole(self.path / "configuration.json", json_text(self.config).encode())
        write_whole(self.path / "report.md", markdown(claims, records, self.config).encode())
        page = self.path / "index.html"
        write_whole(page, webpage(claims, records, self.config, pictures).encode())
        shutil.rmtree(self.unfinished)
        return page

    def _stored(self, name: str) -> dict[str, Any] | None:
        path = self.unfinished / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None


# ----------------------------------------------------------------------------- What the reader sees


def number(value: float | int | str | None) -> str:
    """A number as a reader wants it: three digits, powers of ten where they help."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def lengths(record: dict[str, Any]) -> tuple[str, str]:
    """The prefix length a claim used, and the one the theory's form asks for where it states one."""
    parameters = record["parameters"]
    asked = [
        f"10^{value:.0f} ({key.rsplit('_', 1)[1]})" for key, value in parameters.items() if key.startswith("theory_")
    ]
    return number(parameters.get("tokens")), ", ".join(asked) or "-"


def markdown(claims: list[Claim], records: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The report as Markdown, figures beside it."""
    lines = [
        "# Verification of the infinite-prefix theory",
        "",
        _summary(records),
        "",
        f"Data: {config['data']} (n = {config['inputs']}, d = {config['width']}), sigma = {config['sigma']:g}, "
        f"seed {config['seed']}, profile {config['profile']}, commit {config['git']}.",
        "",
        "| claim | verdict | tightest check | measured | bound | margin | m used | m the theory asks | control |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        used, asked = lengths(record)
        shown = _tightest(record)
        lines.append(
            f"| [{record['name']}](#{record['name']}) | {_verdict(record)} | {shown['what']} | {number(shown['measured'])} | "
            f"{'>=' if shown['at_least'] else '<='} {number(shown['bound'])} | {number(shown['margin'])} | {used} | {asked} | "
            f"{'failed, as it must' if record['control_failed'] else 'DID NOT FAIL'} |"
        )
    for claim, record in zip(claims, records, strict=True):
        lines += ["", f"## {record['name']}", "", f"**{claim.title}.** {record['statement']}", ""]
        lines += [
            f"Source: {record['source']}.",
            "",
            f"![{claim.title}](figures/{claim.name}.png)",
            "",
            claim.caption,
            "",
        ]
        lines += ["| check | measured | bound | holds |", "|---|---|---|---|"]
        lines += [_markdown_row(check, "") for check in record["checks"]]
        lines += [_markdown_row(check, "control: ") for check in record["control_checks"]]
        lines += ["", f"Control: {record['control']}.", "", f"Measured at: {_parameters(record)}."]
    return "\n".join(lines) + "\n"


def _markdown_row(check: dict[str, Any], prefix: str) -> str:
    # a bar inside a cell would end it
    what = (prefix + check["what"]).replace("|", "\\|")
    sign = ">=" if check["at_least"] else "<="
    return f"| {what} | {number(check['measured'])} | {sign} {number(check['bound'])} | {'yes' if check['holds'] else 'no'} |"


def webpage(
    claims: list[Claim], records: list[dict[str, Any]], config: dict[str, Any], pictures: dict[str, bytes]
) -> str:
    """The report as one page that needs no other file."""
    rows = []
    for record in records:
        shown = _tightest(record)
        used, asked = lengths(record)
        verdict = f'<span class="{"good" if record["holds"] else "bad"}">{_verdict(record)}</span>'
        failed = "It failed, as it must." if record["control_failed"] else '<span class="bad">It did not fail.</span>'
        cells = [
            f'<a href="#{record["name"]}">{record["name"]}</a><br>{verdict}',
            f'{html.escape(record["statement"])}<br><span class="quiet">{html.escape(record["source"])}</span>',
            html.escape(shown["what"]),
            number(shown["measured"]),
            f"{'&ge;' if shown['at_least'] else '&le;'} {number(shown['bound'])}",
            number(shown["margin"]),
            used,
            asked,
            f"{html.escape(record['control'])}. {failed}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("claim", "statement", "tightest check", "measured", "bound", "margin", "m used", "m the theory asks for",
             "negative control")  # fmt: skip
    sections = [_section(claim, record, pictures[claim.name]) for claim, record in zip(claims, records, strict=True)]
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


def _section(claim: Claim, record: dict[str, Any], picture: bytes) -> str:
    checks = "".join(
        f"<tr><td>{html.escape(kind + check['what'])}</td><td>{number(check['measured'])}</td>"
        f"<td>{'&ge;' if check['at_least'] else '&le;'} {number(check['bound'])}</td>"
        f"<td>{'yes' if check['holds'] else 'no'}</td></tr>"
        for kind, found in (("", record["checks"]), ("control: ", record["control_checks"]))
        for check in found
    )
    return (
        f'<section id="{claim.name}"><h2>{claim.name}: {html.escape(claim.title)}</h2>'
        f"<p>{html.escape(record['statement'])}</p><p class=quiet>Source: {html.escape(record['source'])}.</p>"
        f'<figure><img alt="{html.escape(claim.title)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<figcaption>{html.escape(claim.caption)}</figcaption></figure>"
        f"<details><summary>Every check, and the control's</summary><table><tr><th>check</th><th>measured</th>"
        f"<th>bound</th><th>holds</th></tr>{checks}</table></details>"
        f"<p class=quiet>Measured at: {html.escape(_parameters(record))}; {record['seconds']:.0f} s.</p></section>"
    )


def _summary(records: list[dict[str, Any]]) -> str:
    held = sum(record["holds"] for record in records)
    failed = sum(record["control_failed"] for record in records)
    return (
        f"{held} of {len(records)} claims hold. {failed} of {len(records)} negative controls fail, as they must. "
        f"{sum(record['seconds'] for record in records):.0f} s of measurement."
    )


def _verdict(record: dict[str, Any]) -> str:
    if record["holds"]:
        return "holds"
    return "does not hold" if record["control_failed"] else "not tested: the control holds too"


def _tightest(record: dict[str, Any]) -> dict[str, Any]:
    """The check that claims.json shows at its top: found again by its numbers."""
    same = [c for c in record["checks"] if (c["measured"], c["bound"]) == (record["measured"], record["bound"])]
    return same[0]


def _parameters(record: dict[str, Any]) -> str:
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
<p><b>{summary}</b></p><p class="quiet">Data: {data}. A claim holds when all of its checks hold and its negative control
does not; the row shows the check with the smallest margin.</p>
<div class="wide"><table class="claims"><tr>{head}</tr>{rows}</table></div>
{sections}
<section><h2>Configuration</h2><div class="wide"><table>{settings}</table></div></section>
</body></html>
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run found, for the program that started it."""

    page: Path
    records: list[dict[str, Any]]

    @property
    def holds(self) -> bool:
        """Every claim holds."""
        return all(record["holds"] for record in self.records)
