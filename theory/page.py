"""What a reader sees of a report: a page that needs no other file, with formulas, symbols and proofs, and Markdown."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from typing import Any

from theory import formulas
from theory.claim import Claim
from theory.proofs import proof_of
from theory.record import ControlRecord, Record, Row


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
        lines += [
            f"[SVG](figures/{claim.name}.svg), [PDF](figures/{claim.name}.pdf), [curves](figures/{claim.name}.csv)",
            "",
        ]
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
    heads = ("claim", "statement", "tightest check", "measured", "bound", "margin", "m used", "m the theory asks for",
             "controls, each of which must fail")  # fmt: skip
    rows = []
    for record in records:
        good = f'<span class="{"good" if record["holds"] else "bad"}">{verdict(record)}</span>'
        controls = "<br>".join(
            f"{html.escape(found['name'])}: {formulas.in_line(found['statement'])}; "
            f'<span class="{"quiet" if found["failed"] else "bad"}">{_failed(found)}</span>'
            for found in record["controls"]
        )
        cells = [
            f'<a href="#{record["name"]}">{record["name"]}</a><br>{good}',
            f'{formulas.in_line(record["statement"])}<br><span class="quiet">{html.escape(record["source"])}</span>',
            *map(html.escape, (*_shown(record), *lengths(record))),
            controls or "-",
        ]
        named = zip(heads, cells, strict=True)
        rows.append("<tr>" + "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in named) + "</tr>")
    told: dict[str, str] = {}
    sections = [
        _section(claim, record, pictures.get(claim.name), told) for claim, record in zip(claims, records, strict=True)
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
        symbols="".join(
            f"<dt>{formulas.inline(symbol)}</dt><dd>{formulas.in_line(meaning)}</dd>" for symbol, meaning in SYMBOLS
        ),
        sections="".join(sections),
        settings=settings,
    )


def _section(claim: Claim, record: Record, picture: bytes | None, told: dict[str, str]) -> str:
    """Return a claim's part of the page; ``told`` says by which claim a proof has been told that others share."""
    head = (
        f'<section id="{claim.name}"><h2>{claim.name}: {html.escape(claim.title)}</h2>'
        f"<p>{formulas.in_line(record['statement'])}</p><p class=quiet>Source: {html.escape(record['source'])}.</p>"
    )
    where, proof = proof_of(claim.proof)
    if claim.proof in told:
        proof = f'<p>Proof: {where}, at <a href="#{told[claim.proof]}">{told[claim.proof]}</a>.</p>'
    else:
        told[claim.proof] = claim.name
        proof = f'<details><summary>Proof: {where}</summary><div class="proof">{proof}</div></details>'
    if picture is None:
        return head + f"<p>Undecided: {html.escape(record['undecided'] or '')}</p>{proof}</section>"
    checks = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(record)
    )
    least = int.from_bytes(picture[16:20], "big") // 2  # pixels of a PNG: in half of its width text can still be read
    return head + (
        f"<p>Measured at: {html.escape(_parameters(record))}; {record['seconds']:.0f} s.</p>"
        f'<figure><div class="wide"><img alt="{html.escape(claim.title)}" style="min-width: {least}px" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></div>'
        f"<figcaption>{formulas.in_line(claim.caption)} Also figures/{claim.name} as .svg and .pdf, its curves as .csv."
        f"</figcaption></figure>"
        f"<details><summary>Every check, and the controls'</summary><div class=wide><table><tr><th>check</th>"
        f"<th>measured</th><th>bound</th><th>holds</th></tr>{checks}</table></div></details>{proof}</section>"
    )


def latex(claims: list[Claim], records: list[Record]) -> str:
    """Return the claims as a LaTeX table, for a paper that has the package booktabs."""
    lines = [r"\begin{tabular}{llrrr}", r"\toprule", r"claim & verdict & measured & bound & margin \\", r"\midrule"]
    for claim, record in zip(claims, records, strict=True):
        _, measured, bound, margin = _shown(record)
        bound = bound.replace("<=", r"$\le$").replace(">=", r"$\ge$")
        cells = [_in_latex(claim.title), _in_latex(verdict(record)), *map(_power, (measured, bound, margin))]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _in_latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text).replace("^", r"\^{}")


def _power(text: str) -> str:
    return re.sub(r"(-?[\d.]+)e([+-]?)0*(\d+)", lambda x: rf"${x[1]} \cdot 10^{{{x[2].strip('+')}{x[3]}}}$", text)


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


SYMBOLS = (
    ("n", "inputs"), ("d", "numbers of an input and of an output"), ("x_i", "input i, of length at most 1"),
    ("y_i", "its target; Y all of them"), ("m", "tokens of the prefix"), ("w_r", "token r; W all of them"),
    ("a_r", "its fixed sign"), ("sigma", "standard deviation of a token's numbers at the start"),
    ("F(x)", "output of the model; F(t) on all inputs after t steps"),
    ("S_ir", "attention of input i to token r"), ("T_ir", "m S_ir"),
    ("J", "derivatives of the outputs by the tokens"), ("H(W)", "the kernel, over m; H(W(0)) at the start"),
    ("Θ", "the kernel itself, m H"), ("H*", "the kernel of an infinite prefix"),
    ("λ_min", "smallest eigenvalue; λ_max the largest"), ("η", "step size"), ("|x|", "Euclidean or Frobenius norm"),
    ("φ", "feature map"), ("g", "its degree"), ("Z, k", "a state: sums of features, with and without values"),
    ("ε", "error, of what the statement says"), ("δ", "probability of failure"),
    ("L", "loss, or the tokens of a sequence"), ("tied", "a token is key and, up to its sign, value"),
    ("fixed", "values are fixed signs, keys are trained"),
)  # fmt: skip
"""What letters mean in statements, but where a statement says otherwise."""


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
math {{ font-family: "Cambria Math", "STIX Two Math", "Latin Modern Math", math, serif; font-size: 1.06em; }}
.whole {{ white-space: nowrap; }} .formula {{ overflow-x: auto; margin: 1em 0; }}
.formula > div {{ display: flex; gap: 2em; justify-content: space-between; min-width: max-content; padding: .15em 1em; }}
.formula math {{ display: math; }} .number {{ color: #555; font-size: .85em; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.2em; font-size: 14px; }} dd {{ margin: 0; }}
.proof {{ border-left: 3px solid #ddd; padding-left: 1em; overflow-x: auto; max-width: 60em; }}
summary {{ cursor: pointer; margin: .4em 0; }}
@media (min-width: 800px) {{ dl {{ grid-template-columns: max-content 1fr max-content 1fr; }} }}
@media (max-width: 800px) {{
  .claims tr, .claims td {{ display: block; border: 0; }} .claims tr:first-child {{ display: none; }}
  .claims tr {{ border-bottom: 2px solid #888; padding: .6em 0; }} .claims td {{ white-space: normal !important; }}
  .claims td:nth-child(n+3)::before {{ content: attr(data-head) ": "; color: #555; }}
}}
</style></head><body>
<h1>Verification of the infinite-prefix theory</h1>
<p><b>{summary}</b></p><p class="quiet">Data: {data}. A claim holds when all of its checks hold and each of its negative
controls fails; the row shows the check with the smallest margin.</p>
<div class="wide"><table class="claims"><tr>{head}</tr>{rows}</table></div>
<details><summary>Symbols</summary><dl>{symbols}</dl></details>
{sections}
<section><h2>Configuration</h2><div class="wide"><table>{settings}</table></div></section>
</body></html>
"""
