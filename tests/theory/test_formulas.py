"""Formulas in plain text are set as a browser shows them: what is a script, what a word, where a line may break."""

import re
from pathlib import Path
from xml.dom.minidom import parseString

import pytest

from theory import formulas

PROOFS = sorted((Path(__file__).parents[2] / "theory").glob("*.md"))


def tex(text: str) -> str:
    """Return the MathML of a formula with its tags in brief."""
    xml = (
        formulas.inline(text)
        .replace("<math>", "")
        .replace("</math>", "")
        .replace("<mrow>", "{")
        .replace("</mrow>", "}")
    )
    xml = re.sub(r'<mspace width="[^"]*"></mspace>', " ", xml)
    xml = re.sub(r"</?(mi|mn|mo|mtext)\b[^>]*>", "", xml)
    return re.sub(r"</\w+>", ")", re.sub(r"<(m\w+)[^>]*>", r"\1(", xml))


@pytest.mark.parametrize(
    ("text", "set_as"),
    [
        ("x_i", "msub(x{i})"),
        ("w_{r,k}", "msub(w{r,k})"),
        ("x_rx_rᵀ", "msub(x{r})msubsup(x{r}{T})"),
        ("e^{-s}", "msup(e{−s})"),
        ("T^½", "msup(T{½})"),
        ("λ_min(H*)", "msub(λ{min})(msup(H{∗}))"),
        ("lambda_min", "msub(λ{min})"),
        ("√λ_max(H(W)) δ", "msqrt(msub(λ{max})(H(W))) δ"),
        ("√(1 − x)", "msqrt(1−x)"),
        ("Ĥ", "mover(H^)"),
        ("H_(ik),(jl)", "msub(H{(ik),(jl)})"),
        ("Σ_{s<t} E'", "munder(∑{s&lt;t}) msup(E{′})"),
        ("a <= b", "a<wbr>≤b"),
        ("<a_k, S> < 1", "⟨msub(a{k}),S⟩<wbr>&lt;1"),
        ("e^(s c) I", "msup(e{s c}) I"),
        ("log₂ n", "msub(log{2}) n"),
    ],
)
def test_what_a_formula_becomes(text, set_as):
    assert tex(text) == set_as


@pytest.mark.parametrize(
    "code", ["python -m theory", "--seed", "kernels.predict", "theory/README.md", "certify(…, delta=δ)"]
)
def test_code_is_no_formula(code):
    assert not formulas.is_formula(code)


@pytest.mark.parametrize("formula", ["w_r ∈ R^d", "F Z", "a", "2^g e^{2s}", "m Σ S_r a_r w_r"])
def test_formulas_are_not_code(formula):
    assert formulas.is_formula(formula)


def test_prose_keeps_its_words():
    found = formulas.found_in("at σ = 1 the error is of order m^{−1/2}, and n = 8 rows of a file.npy are taken (x_1).")
    assert [text for text, is_formula in found if is_formula] == ["σ = 1", "m^{−1/2}", "n = 8", "(x_1)"]
    assert "".join(text for text, _ in found).startswith("at σ = 1 the error")


def test_statements_in_ascii_are_set_too():
    found = formulas.found_in(
        "|F(t) - Y|^2 <= (1 - m eta lambda / 2)^t at every step, for every m whose lambda_min > 0"
    )
    assert [text for text, is_formula in found if is_formula] == [
        "|F(t) - Y|^2 <= (1 - m eta lambda / 2)^t", "lambda_min > 0",
    ]  # fmt: skip


def test_formulas_come_back_where_they_were():
    table = "| `aa.b` | `cc.d` |\n|---|---|\n| `ee.f` | `gg.h` |"
    text = f"With `x_i`, see `theory.md`.\n\n    y = Σ_i x_i      (1)\n\nThen `λ\n> 0`.\n\n{table}\n"
    marked, made = formulas.placed(text)
    assert len(made) == 3
    assert marked.endswith(f"\n\n{table}\n")
    page = formulas.restored(marked, made)
    assert page.count("<math") == 4  # a line may break in front of the last one's relation
    assert "`theory.md`" in page
    assert '<span class="number">(1)</span>' in page
    assert "\ue000" not in page


@pytest.mark.parametrize("path", PROOFS, ids=lambda path: path.stem)
def test_every_formula_of_the_proofs_is_well_formed(path):
    text = path.read_text("utf-8")
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if formulas.is_formula(span)]
    blocks = [line[4:] for line in text.splitlines() if line.startswith("    ") and line.strip()]
    html = "".join([*map(formulas.inline, spans), formulas.display(blocks)])
    parseString(f"<html>{html.replace('<wbr>', '')}</html>")
    assert len(spans) + len(blocks) > 3
    # a closing brace that nothing opens would cut the rest off
    assert all("{" not in tex(span) or tex(span).count("{") == tex(span).count("}") for span in spans)
