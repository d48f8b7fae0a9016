"""The proofs as a report has them: sections of theory/README.md, and the files beside it, as HTML with formulas."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_it import MarkdownIt

from theory import formulas

HERE = Path(__file__).parent


def proof_of(proof: str) -> tuple[str, str]:
    """Return where a claim's proof stands, in words, and the proof as HTML that needs no other file.

    Args:
        proof: :attr:`theory.claim.Claim.proof`: a section of theory/README.md, "2", or a file beside it.
    """
    if proof.endswith(".md"):
        return f"theory/{proof}", _page((HERE / proof).read_text("utf-8"))
    sections = re.split(r"^## ", (HERE / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    found = [section for section in sections if section.startswith(f"{proof}. ")]
    return f"theory/README.md, section {proof}", _page(f"## {found[0]}" if found else "")


def _page(markdown: str) -> str:
    marked, made = formulas.placed(markdown)
    page = formulas.restored(MarkdownIt("commonmark", {"html": False}).enable("table").render(marked), made)
    return re.sub(r"<a href[^>]*>(.*?)</a>|<img[^>]*>", r"\1", page)
