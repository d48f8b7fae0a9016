"""Every notebook runs from a fresh kernel at the repository's root, and stands in git without its outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    """Without this a wrong folder would pass: no notebook, no test."""
    assert NOTEBOOKS


@every_notebook
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert figures
    warnings = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert not warnings


def test_rows_of_one_s_own_take_the_place_of_x() -> None:
    """As the first notebook says: one line is replaced, and everything follows from it."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_explore_the_kernel.ipynb", as_version=4)
    said = "any float array [n, d]"
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and said in cell.source]
    (line,) = [line for line in cell.source.splitlines() if said in line]
    cell.source = cell.source.replace(line, "x = np.random.default_rng(0).normal(size=(5, 3))")
    for cell in notebook.cells:  # fewer sizes to compile for: what is tested are the shapes
        cell.source = cell.source.replace("2 ** np.arange(6, 17, 2), 5", "2 ** np.arange(6, 9, 2), 2")
        cell.source = cell.source.replace("(64, 1024, 16384)", "(64, 128, 256)")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()


@every_notebook
def test_it_is_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "strip the outputs before committing"
        assert cell.get("execution_count") is None


def test_an_error_in_a_cell_fails() -> None:
    """Control: the client does not swallow what a cell raises."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        nbclient.NotebookClient(notebook, timeout=60).execute()
