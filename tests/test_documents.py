"""What documents say is run: the code of README, guide and recipes, in order, and the version where it stands."""

import contextlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ntk_prefix
from ntk_prefix.feature_maps.base import _MAPS
from ntk_prefix.models import loading

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in ("attention", "fine-tuning", "kernels", "your-own-model"))]


def run_code(document: str) -> dict[str, Any]:
    """Run a document's Python blocks one after another, as a reader would in one session; return the names they leave."""
    text = (ROOT / document).read_text("utf-8")
    names: dict[str, Any] = {"__name__": document}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        lines_before = "\n" * (text[: block.start(1)].count("\n"))  # a failure names the document's line
        exec(compile(lines_before + block[1], str(ROOT / document), "exec"), names)
    return names


@contextlib.contextmanager
def registered_for_a_while() -> Iterator[None]:
    maps, models = dict(_MAPS), dict(loading.MODELS)
    try:
        yield
    finally:
        for kept, known in ((_MAPS, maps), (loading.MODELS, models)):
            kept.clear()
            kept.update(known)


KEPT = ROOT / "tests" / "fixtures" / "a340712"
AT_HAND = {
    "SmolLM2-135M": KEPT / "llama",
    "all-MiniLM-L6-v2": KEPT / "bert",
    "runs/notes/adapter": KEPT / "adapters" / "llama_ntk_attention",
    "runs/rotten_tomatoes-ntk_attention-0": KEPT / "runs" / "finished",
    "tests": ROOT / "tests",
}
"""What documents name and a reader has after the commands above the code; here small models and old runs take their place."""


@pytest.mark.parametrize("x64", [False], indirect=True)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_code_of_a_document_runs(x64, document, tmp_path, monkeypatch):
    for name, stands_for in AT_HAND.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(stands_for)
    monkeypatch.chdir(tmp_path)
    names = run_code(document)
    if document == "docs/your-own-model.md":
        assert names["losses"][-1] < 0.9 * names["losses"][0]


def test_every_document_with_code_is_run():
    there = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    with_code = [name for name in there if "```python" in (ROOT / name).read_text("utf-8")]
    assert sorted(with_code) == sorted([*DOCUMENTS, "CONTRIBUTING.md"])


def test_paragraphs_of_readme_are_short():
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = [part for part in text.split("\n\n") if not part.lstrip().startswith("|")]
    assert max(map(len, prose)) < 700


@pytest.mark.parametrize("x64", [False], indirect=True)
def test_the_recipes_for_contributors_run(x64):
    with registered_for_a_while():
        names = run_code("CONTRIBUTING.md")
        assert loading.MODELS["mistral_like"] == (names["MistralLikeConfig"], loading.Llama)
    assert "squared" not in _MAPS


def test_recipes_name_files_that_there_are():
    recipes = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Four things that people add")[1]
    named = set(re.findall(r"`((?:ntk_prefix|theory|tests|docs)/[\w/.]+)`", recipes)) - {"theory/claims/NAME.py"}
    assert len(named) >= 8
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_a_method_is_one_file_and_one_line():
    """No module names a method but its own, the list of methods, and those that are built on it."""
    methods = sorted(path.stem for path in (ROOT / "ntk_prefix/peft/methods").glob("[a-z]*.py"))
    imports = re.compile(rf"from ntk_prefix\.peft\.methods\.({'|'.join(methods)}) import")
    outside = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ntk_prefix", "train", "theory")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "peft/methods" not in path.as_posix() and imports.search(path.read_text("utf-8"))
    ]
    assert outside == ["ntk_prefix/peft/states.py"]  # it makes adapters of states, which is one method's business


def test_the_version_is_the_same_where_it_stands():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (\S+)$", citation, flags=re.MULTILINE)[1] == ntk_prefix.__version__
    assert f"\n## {ntk_prefix.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_annotations_are_for_users_too():
    """Type checkers read a package's annotations only beside this file, which the wheel has as it has every other."""
    assert (Path(ntk_prefix.__file__).parent / "py.typed").exists()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["ntk_prefix"]}
