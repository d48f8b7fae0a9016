"""Docstrings as the site's Markdown: the docstrings have reStructuredText's roles, formulas and tables."""

import re
import textwrap
from typing import Any

import griffe

from theory import formulas


class Docstrings(griffe.Extension):
    """What mkdocstrings loads: every docstring is rewritten before its sections are told apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, a class, a function or an attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with roles as code, ``.. math::`` as ``$$``, and ``====`` tables as Markdown's."""
    text = re.sub(r":(?:mod|func|class|meth|attr|data):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *$))*)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r"((?:^ *>>>.*\n?)+)", _session, text, flags=re.MULTILINE)
    text = re.sub(r"(?<!:)\n *\n((?:    +\S.*\n?|\n(?=    ))+)", _block, text)
    text = re.sub(
        r"^( *)=+(?: +=+)+\n(.*)\n *=+(?: +=+)+\n((?:.*\n)+?) *=+(?: +=+)+$", _table, text, flags=re.MULTILINE
    )
    text = re.sub(r"^( *[\w, ]+: )>", r"\1\\>", text, flags=re.MULTILINE)  # "scale: > 0" is no quotation
    return re.sub(r"([^:]):: *$", r"\1:", text, flags=re.MULTILINE)


def _session(found: re.Match[str]) -> str:
    """Return lines of a Python session as code, without its prompts."""
    return "```python\n" + re.sub(r"^ *>>> ?", "", found[1], flags=re.MULTILINE).rstrip() + "\n```\n"


def _block(found: re.Match[str]) -> str:
    """Return an indented block as formulas, if it is one: symbols with an index or a power, and a relation."""
    lines = [line for line in textwrap.dedent(found[1]).splitlines() if line.strip()]
    symbols, relation = re.search(r"\w[_^][\w{(]", found[1]), re.search(r" (=|<=|->|~) ", found[1])
    if symbols and relation and ">>>" not in found[1]:
        return f"\n\n{formulas.display(lines)}\n\n"
    return found[0]


def _formula(found: re.Match[str]) -> str:
    indent, latex = found[1], textwrap.dedent(found[2]).strip()
    return f"\n{indent}$$\n{textwrap.indent(latex, indent)}\n{indent}$$\n"


def _table(found: re.Match[str]) -> str:
    """Return a reStructuredText table in Markdown; its columns begin where its rulers' do."""
    ruler = found[0].splitlines()[0]
    starts = [column.start() for column in re.finditer("=+", ruler)]
    rows = [found[2], *found[3].splitlines()]
    cells = [
        [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)] for row in rows
    ]  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(["", lines[0], "|---" * len(starts) + "|", *lines[1:], ""])
