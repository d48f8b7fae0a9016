"""Run the notebooks as readers do and write their outputs into them: ``make notebooks``, or with the names of some.

What differs from one run to the next for no reason is left out: times, identities, and sliders, which need a running kernel.
"""

import re
import sys
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parents[1]

WIDGET = "application/vnd.jupyter.widget-view+json"


def recorded(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of this run."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}, record_timing=False
    )
    client.execute()
    clean(notebook)
    return notebook


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave out of the outputs what another run would not repeat, or a page not show: sliders, colors of a terminal."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            data.pop("text/html", None)
            if "text/plain" in data:
                data["text/plain"] = re.sub(r"\x1b\[[0-9;]*m", "", "".join(data["text/plain"]))
        cell.outputs = [output for output in cell.outputs if shown(output)]


def shown(output: nbformat.NotebookNode) -> bool:
    """Return whether a reader of the file sees anything of an output."""
    data = output.get("data")
    return data is None or (("image/png" in data or bool(data.get("text/plain", "").strip())) and WIDGET not in data)


if __name__ == "__main__":
    for one in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if len(sys.argv) == 1 or any(one.name.startswith(name) for name in sys.argv[1:]):
            nbformat.write(recorded(one), one)
            print(f"{one.name}: {one.stat().st_size / 1024:.0f} KiB", flush=True)
