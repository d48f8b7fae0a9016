"""What a report writes beside its page: the curves of a figure as CSV, the claims as a LaTeX table, proofs that are found."""

import csv
import re

import numpy as np
import pytest

from theory import figures
from theory.claims import claims
from theory.page import latex
from theory.proofs import proof_of
from theory.record import curves


def test_all_that_a_figure_draws_is_in_its_curves():
    figure, (left, right) = figures.panels(2)
    left.plot([1, 2], [10, 20.5], label="tied")
    left.scatter([3, 4], [5, 6], label="marks")
    left.fill_between([0, 1], [0, 0], [1, 2], label="band")
    left.set_title("Left, with a comma")
    right.bar([1, 2], [7, 8], width=1, label="bars")
    right.imshow(np.array([[1.0, 2.0], [3.0, 4.0]]))
    rows = [
        (row["panel"], row["curve"], float(row["x"]), float(row["y"]))
        for row in csv.DictReader(curves(figure).splitlines())
    ]
    assert {("Left, with a comma", "tied", 1, 10), ("Left, with a comma", "tied", 2, 20.5)} <= set(rows)
    assert ("Left, with a comma", "marks", 4, 6) in rows
    assert ("Left, with a comma", "band, outline", 1, 2) in rows
    assert [row[2:] for row in rows if row[1] == "bars"] == [(1, 7), (2, 8)]
    assert [row[2:] for row in rows if row[1] == "row 1"] == [(0, 3), (1, 4)]


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other():
    _, (axis,) = figures.panels()
    for place in range(3):
        axis.plot([1, 2], [1, 10 * (1 + place / 1e6)], label=f"line {place}")
    axis.plot([1, 2], [2, 2], label="_unnamed")
    figures.label(axis, title="", x="", y="", log="y", direct=True)
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert sorted(heights) == sorted(heights, key=heights.__getitem__) == ["line 0", "line 1", "line 2"]
    assert np.diff(sorted(heights.values())).min() > 0.99 * figures.SPACE
    assert axis.get_legend() is None


def test_the_table_for_a_paper_is_latex():
    (claim,) = claims(("lazy",))
    check = {"what": "a", "measured": 1.5e-16, "bound": 2.0, "at_least": False, "margin": 3.0, "holds": True}
    record = {"holds": True, "undecided": None, "control_failed": True, "tightest": 0, "checks": [check]}
    table = latex([claim], [record])
    assert r"Long prefixes train lazily & holds & $1.5 \cdot 10^{-16}$ & $\le$ 2 & 3 \\" in table
    assert table.count(r"\begin{tabular}") == table.count(r"\end{tabular}") == 1


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim.name)
def test_every_claim_leads_to_its_proof(claim):
    where, proof = proof_of(claim.proof)
    assert claim.proof in where
    assert len(re.sub(r"<[^>]*>", "", proof)) > 100
    assert "\ue000" not in proof
    assert "href" not in proof


def test_a_section_that_is_not_there_has_no_proof():
    assert proof_of("99")[1] == ""
