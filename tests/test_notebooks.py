"""Every notebook runs from nothing at the repository's root, and stands in git with what it said to the last who ran it."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbclient
import nbformat
import pytest
from safetensors.numpy import load_file, save_file

from tests.compiling import quickly
from tests.record_notebooks import WIDGET
from tests.train.tiny_model import write_model
from train.assets import asset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    """Without this a wrong folder would pass: no notebook, no test."""
    assert NOTEBOOKS


def run(notebook: nbformat.NotebookNode, kernel: Any = None, connection: Any = None) -> None:
    client = nbclient.NotebookClient(notebook, kernel, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    client.kc = connection
    client.execute()


AFRESH = """
%reset -f
import jax
jax.config.update("jax_enable_x64", False)
del jax
"""
"""A cell before all others: the kernel has no names, and numbers are as JAX has them."""


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Return what a cell shows, in kind: pictures, a value, text; not sliders, which only a running kernel has."""
    outputs = [output for output in cell.get("outputs", []) if WIDGET not in output.get("data", {})]
    shown = {"image/png" if "image/png" in output.get("data", {}) else output.output_type for output in outputs}
    return {{"display_data": "stream"}.get(kind, kind) for kind in shown}


def check(notebook: nbformat.NotebookNode) -> None:
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def run_quickly() -> Iterator[Callable[[nbformat.NotebookNode], None]]:
    """Return a function that runs notebooks compiled as tests are, in one kernel: imports are a third of their time."""
    kernel = jupyter_client.KernelManager()
    kernel.start_kernel(cwd=str(ROOT), env=quickly())
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready()

    def run_there(notebook: nbformat.NotebookNode) -> None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(AFRESH))
        run(notebook, kernel, client)

    yield run_there
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return models in the place of larger ones: MiniLM's first layer, and a random decoder that knows a prompt's words."""
    folder = tmp_path_factory.mktemp("models")
    compress = (ROOT / "notebooks" / "02_compress_a_prefix.ipynb").read_text()
    words = sorted(set(re.findall(r"\w+|[^\w\s]", compress)))
    write_model(folder / "smollm2", ["[UNK]", *words])
    return {"minilm": str(first_layer(folder / "minilm")), "smollm2": str(folder / "smollm2")}


def first_layer(folder: Path) -> Path:
    """Write MiniLM without all of its layers but the first: there is six times less to compile."""
    shutil.copytree(asset("minilm"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not re.search(r"\.layer\.[1-9]", name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors")
    return folder


INSTEAD = """
from pathlib import Path
from train import assets
def asset(name, fetched=assets.asset, folders={folders!r}, **options):
    return Path(folders[name]) if name in folders else fetched(name, **options)
assets.asset = asset
"""
"""A cell before all others: whoever asks for a model is given another folder."""


FEWER = {
    "01": {"2 ** np.arange(6, 17, 2), 5": "2 ** np.arange(6, 9, 2), 2", "(64, 1024, 16384)": "(64, 128)"},
    "02": {"count, tokens = 24, 48": "count, tokens = 12, 8"},
    "03": {
        "many, steps, learning_rates = 1000, 100, (1e-3, 1e-2)": "many, steps, learning_rates = 64, 2, (1e-3,)",
        "few = 32": "few = 16",
        "validation_size=200, test_size=200": "validation_size=16, test_size=16",
    },
    "04": {"grids = (4, 8, 32)": "grids = (4, 8)"},
}
"""What is made smaller, by notebook: there is less to compile and to run. Lists have other lengths, as a reader may give."""


def with_fewer_sizes(notebook: nbformat.NotebookNode, number: str) -> None:
    """Leave fewer and smaller sizes: that the cells run is tested, not what they show."""
    for whole, few in FEWER.get(number, {}).items():
        assert any(whole in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(whole, few)


@every_notebook
def test_it_runs(path: Path, run_quickly: Callable[..., None], smaller: dict[str, str]) -> None:
    """Every cell, compiled as tests are; in the place of pretrained models and of many sizes smaller ones and few."""
    notebook = nbformat.read(path, as_version=4)
    with_fewer_sizes(notebook, path.stem[:2])
    pretrained = [cell for cell in notebook.cells if re.search(r'asset\("(minilm|smollm2)"\)', cell.source)]
    assert bool(pretrained) == path.stem.startswith(("02", "03"))
    if pretrained:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(INSTEAD.format(folders=smaller)))
        (cell,) = pretrained
        cell.source += '\nassert len(getattr(model, "backbone", model).layers) < 3'
    committed = [kinds(cell) for cell in notebook.cells]
    run_quickly(notebook)
    check(notebook)
    assert [kinds(cell) for cell in notebook.cells[-len(committed) :]] == committed


@pytest.mark.slow
@every_notebook
def test_it_runs_as_readers_run_it(path: Path) -> None:
    """In a kernel of its own, as large as it is."""
    notebook = nbformat.read(path, as_version=4)
    run(notebook)
    check(notebook)


def magics_left_out(source: str) -> str:
    return re.sub(r"^%.*$", "", source, flags=re.MULTILINE)


@every_notebook
def test_what_there_is_to_turn_is_what_later_cells_read(path: Path) -> None:
    """No later cell gives one of those names to something else; one may be made of itself, as rows are scaled."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    first, *later = [ast.parse(magics_left_out(source)) for source in cells]
    names = {node.id for node in ast.walk(first) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert len(names) >= 4
    for cell in later:
        for statement in cell.body:
            if isinstance(statement, ast.FunctionDef):
                continue  # its names are its own
            of = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id in names]
            inner = {
                id(n) for each in ast.walk(statement) if isinstance(each, ast.comprehension) for n in ast.walk(each)
            }
            set_here = {node.id for node in of if isinstance(node.ctx, ast.Store) and id(node) not in inner}
            read = {node.id for node in of if isinstance(node.ctx, ast.Load)}
            assert not set_here - (read if isinstance(statement, ast.Assign) else set())


def test_rows_of_one_s_own_take_the_place_of_x(run_quickly: Callable[..., None]) -> None:
    """As the first notebook says: one line is replaced, and everything follows from it."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_explore_the_kernel.ipynb", as_version=4)
    said = "any float array [n, d]"
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and said in cell.source]
    (line,) = [line for line in cell.source.splitlines() if said in line]
    cell.source = cell.source.replace(line, "x = np.random.default_rng(0).normal(size=(5, 3))")
    with_fewer_sizes(notebook, "01")
    run_quickly(notebook)


@every_notebook
def test_its_outputs_are_committed_small_and_without_traces_of_a_machine(path: Path) -> None:
    """``make notebooks`` writes them anew."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check(notebook)
    assert path.stat().st_size < 2**19
    assert "/tmp/" not in path.read_text()
    assert (
        notebook.cells[1].source.split("\n# ")[-1].startswith(("Everything there is to turn", "# Everything there is"))
    )


@pytest.mark.parametrize(("cell", "error"), [("1 / 0", "ZeroDivisionError"), ("npx", "name 'npx' is not defined")])
def test_an_error_in_a_cell_fails(cell: str, error: str, run_quickly: Callable[..., None]) -> None:
    """Control: the client does not swallow what a cell raises, and no notebook has the names of another."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=error):
        run_quickly(notebook)
