"""What `make docs` adds to MkDocs: the repository's own pages, formulas as MathML, public names, and what must be there.

Nothing is written twice: README.md, the proofs, the tables and the notebooks are pages as they stand, at their own paths.
"""

import functools
import importlib
import inspect
import json
import re
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from theory import formulas

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "train/README.md", "theory/*.md"]
PICTURES = ["train/*.png", "theory/*.png"]
PROOFS = "theory/"

LISTED = r"^@@ ([\w.]+):?(.*)$"
"""A line of an API page: a module whose public names are wanted, or some of them behind a colon."""

PUBLIC = [
    "ntk_prefix", "ntk_prefix.bounds", "ntk_prefix.certificate", "ntk_prefix.feature_maps", "ntk_prefix.kernels",
    "ntk_prefix.kernels.equivalence", "ntk_prefix.kernels.neural_tangents", "ntk_prefix.models", "ntk_prefix.peft",
    "ntk_prefix.prompting", "ntk_prefix.training",
]  # fmt: skip
"""Modules whose names are public: each of them has to stand on a page, with a docstring."""


_entries: dict[str, str] = {}
"""The page of each public name's entry."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put every page at its path in the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        files.append(File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path))
    for pattern in PAGES + PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        for names in listed(path.read_text("utf-8")).values():
            _entries.update(dict.fromkeys(names, f"docs/api/{path.name}"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        content = notebook(json.loads(path.read_text("utf-8")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def notebook(cells: dict[str, Any]) -> str:
    """Return a notebook as Markdown: its texts, its code, and the pictures and texts that are committed with it."""
    parts = []
    for cell in cells["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"].split())}">')
            elif text := "".join(data.get("text/plain", "")):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Set the proofs' formulas, list public names, turn links to notebooks into links to their pages."""
    if page.file.src_uri.startswith(PROOFS):
        markdown, page.meta["formulas"] = formulas.placed(markdown)
    for line, names in listed(markdown).items():
        markdown = markdown.replace(f"{line}\n", "\n\n".join(f"::: {anchor(name)}" for name in names) + "\n")
    return re.sub(r"(\]\([\w/.]*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)


def listed(markdown: str) -> dict[str, list[str]]:
    """Return the names that an API page's lines list; a module alone stands for what no other line of the page names."""
    lines = list(re.finditer(LISTED, markdown, flags=re.MULTILINE))
    named = {f"{line[1]}.{name}" for line in lines for name in line[2].split()}
    return {
        line[0]: [f"{line[1]}.{name}" for name in line[2].split()]
        or [
            f"{line[1]}.{name}"
            for name, member in public(line[1]).items()
            if f"{line[1]}.{name}" not in named and not isinstance(member, ModuleType)
        ]
        for line in lines
    }


def anchor(name: str) -> str:
    """Return where a public name's entry is: at the name, or where it is defined if a module of that name is in front."""
    module, _, short = name.rpartition(".")
    member = getattr(importlib.import_module(module), short)
    return name if name not in sys.modules or isinstance(member, ModuleType) else f"{member.__module__}.{short}"


def linked(html: str, page: Page) -> str:
    """Return a page whose public names, ``npx.kernels.limit_ntk`` between backticks, lead to their entries."""
    here = {name.rpartition(".")[2]: name for name, of in _entries.items() if of == page.file.src_uri}
    methods = importlib.import_module("ntk_prefix.peft").PRESETS

    def link(found: re.Match[str]) -> str:
        name = f"ntk_prefix.{found[2]}"
        if found[2] in here:  # on its own page a name stands alone
            return f'<a href="#{anchor(here[found[2]])}">{found[1]}</a>'
        of_command_line = found[1] == f"<code>{found[2]}</code>" and found[2] in methods  # `ntk_attention`, no function
        if of_command_line or name not in _entries or page.file.src_uri == _entries[name]:
            return found[0]
        up = "../" * page.file.dest_uri.count("/")
        return f'<a href="{up}{_entries[name].removesuffix(".md")}.html#{anchor(name)}">{found[1]}</a>'

    headings = dict(re.findall(r'<h2 id="((\d+)-[^"]*)"', html))
    of_section = {number: name for name, number in headings.items()}
    html = re.sub(
        r"§(\d+)", lambda at: f'<a href="#{of_section[at[1]]}">{at[0]}</a>' if at[1] in of_section else at[0], html
    )
    return re.sub(r"(?<!<pre>)(<code>(?:npx\.|ntk_prefix\.)?((?:\w+\.)*\w+)(?:\([^<]*\))?</code>)(?!</a>)", link, html)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put formulas where their places are, and turn LaTeX into MathML."""
    html = linked(formulas.restored(html, page.meta.get("formulas", [])), page)
    for tag, kind, opened, closed in (("span", "inline", r"\\\(", r"\\\)"), ("div", "block", r"\\\[", r"\\\]")):
        written = rf'<{tag} class="arithmatex">\s*{opened}(.*?){closed}\s*</{tag}>'
        html = re.sub(written, functools.partial(_latex, kind=kind), html, flags=re.DOTALL)
    return html


def _latex(found: re.Match[str], kind: str) -> str:
    return latex2mathml.converter.convert(unescape(found[1]).strip(), display=kind)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site in which a public name is missing or undocumented, or in which something is fetched from a network."""
    html = {path: path.read_text("utf-8") for path in sorted(Path(config.site_dir).rglob("*.html"))}
    anchors = set(re.findall(r'id="([\w.]+)"', "".join(html.values())))
    names = {f"{module}.{name}": member for module in PUBLIC for name, member in public(module).items()}
    shown = {id(member) for name, member in names.items() if name in PUBLIC or anchor(name) in anchors}
    if missing := [name for name, member in names.items() if id(member) not in shown or not documented(member)]:
        raise PluginError(f"public names without a page or a docstring: {', '.join(missing)}; see docs/api")
    fetched = {
        f"{path.name}: {url}"
        for path, text in html.items()
        for url in re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(https?:[^"]+)"', text)
    }
    if fetched:
        raise PluginError(f"expected a site that needs no network, got {', '.join(sorted(fetched))}")
    print(f"{len(html)} pages, {len(names)} public names, each documented: {config.site_dir}/index.html")


def public(module: str) -> dict[str, Any]:
    """Return what is public in a module: what ``__all__`` names and, of a package, the classes that it imports."""
    members = importlib.import_module(module)
    classes = [
        name
        for name, member in vars(members).items()
        if inspect.isclass(member) and member.__module__.startswith("ntk_prefix.") and not name.startswith("_")
    ]
    names = [*members.__all__, *(classes if hasattr(members, "__path__") else [])]
    return {name: getattr(members, name) for name in sorted(set(names))}


def documented(member: Any) -> bool:
    """Return whether a module, a class or a function has a docstring of its own; dataclasses are given one by Python."""
    if not (isinstance(member, ModuleType) or inspect.isclass(member) or inspect.isfunction(member)):
        return True  # a constant: mkdocstrings shows it only with its docstring
    own = (vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__) or ""
    return bool(own) and not own.startswith(f"{member.__name__}(")
