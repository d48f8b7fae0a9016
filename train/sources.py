"""Where the rows of each task come from: files, a hub, or the package assets; the table of tasks.

a folder      ``data_dir``: files of a Hugging Face data set (parquet, jsonl, csv) or of GLUE (train.tsv, dev.tsv),
              in the folder itself or in one named after the task in it
a hub         ``data_dir="hub"``, or ``"hub:owner/name"`` for another data set of the same columns; needs network
the assets    ``data_dir=None``: what ``train.assets`` fetches, and the digits of scikit-learn
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from PIL import Image

from ntk_prefix.checks import UsageError
from train.assets import AssetError, asset

__all__ = ["TASKS", "Columns", "Kind", "TaskSpec", "find_folder", "read", "spec_of"]

Kind = Literal["sequence-classification", "image-classification", "causal-lm"]

Columns = dict[str, Any]
"""Rows, checked: ``text`` (and ``text_pair``) or ``image`` with ``label`` (class numbers), or ``question``, ``answer``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task is, whatever its rows come from.

    Args:
        kind: what is predicted.
        columns: our name of a column -> the names it goes by in files, the usual one first.
        label_names: of the classes, in the order of their numbers; empty for causal language modeling.
        hub, subset: the usual data set on the hub and the folder in it.
        folders: other names that a folder of it goes by.
        test: names of the split that is our ``test``.
        headerless: the column names of files that come without a header.
        assets: rows from the package assets, ``{"train": ..., "test": ...}``; None if no asset has them.
    """

    kind: Kind
    columns: Mapping[str, tuple[str, ...]]
    label_names: tuple[str, ...] = ()
    hub: str = ""
    subset: str = ""
    folders: tuple[str, ...] = ()
    test: tuple[str, ...] = ("test",)
    headerless: tuple[str, ...] = ()
    assets: Callable[[], dict[str, Columns]] | None = None


def spec_of(name: str) -> TaskSpec:
    """The task of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TASKS:
        raise UsageError(f"task: expected one of {', '.join(TASKS)}, got {name!r}.")
    return TASKS[name]


def find_folder(name: str, data_dir: Path | str) -> Path | None:
    """The folder that holds a task's train split: one named after the task in ``data_dir``, or that; None if neither."""
    spec, root = spec_of(name), Path(data_dir).expanduser()
    names = {name, spec.subset, spec.hub.split("/")[-1], *spec.folders} - {""}
    # the folder named after the task first: two data sets may stand side by side
    for folder in (*(root / one for one in sorted(names)), root):
        for inner in (folder, folder / spec.subset, folder / "data"):
            if inner.is_dir() and _files(inner, ("train",)):
                return inner
    return None


def read(name: str, data_dir: Path | str | None = None) -> tuple[dict[str, Columns], str]:
    """Rows of a task's ``train`` split, and of its ``test`` split if the source has one; and the source's name.

    Raises:
        ValueError: an unknown task; a file that cannot be read; a missing column; an unknown or missing label; an empty
            split or text.
        FileNotFoundError: a folder without the task.
        AssetError: rows that no asset has, or that cannot be fetched.
    """
    spec = spec_of(name)
    splits, source = _splits(name, spec, data_dir)
    return {split: _checked(f"{name}, {split} split", columns, spec) for split, columns in splits.items()}, source


def _splits(name: str, spec: TaskSpec, data_dir: Path | str | None) -> tuple[dict[str, Columns], str]:
    if data_dir is None:
        if spec.assets is None:
            raise AssetError(
                f"{name}: expected a data_dir, for no asset has its rows: a folder with the files of {spec.hub}, "
                'or "hub" to fetch that.'
            )
        return spec.assets(), "assets"
    source = str(data_dir)
    if source == "hub" or source.startswith("hub:"):
        data_dir, source = _from_hub(name, spec, source.removeprefix("hub").removeprefix(":") or spec.hub)
    folder = find_folder(name, data_dir)
    if folder is None:
        raise FileNotFoundError(
            f"{name}: expected train.(parquet|jsonl|json|csv|tsv) in {data_dir} or in a folder {name} there, found "
            f"{sorted(path.name for path in Path(data_dir).iterdir()) if Path(data_dir).is_dir() else 'no such folder'}."
        )
    raw = {"train": _read(name, spec, _files(folder, ("train",)))}
    if test := _files(folder, spec.test):
        raw["test"] = _read(name, spec, test)
    return raw, source


def _from_hub(name: str, spec: TaskSpec, repository: str) -> tuple[Path, str]:
    """A data set's files in Hugging Face's own cache, and where they come from."""
    if not repository:
        raise AssetError(f'{name}: expected "hub:owner/name" or no data_dir, for the hub has no usual data set of it.')
    inside = f"{spec.subset}/" if repository == spec.hub and spec.subset else ""
    patterns = [f"{inside}*{end}" for end in _READERS]
    try:
        folder = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise AssetError(
            f"{name}: expected the data set {repository} from the hub, got {type(error).__name__}: {error}. "
            "Without network give data_dir a folder with its files."
        ) from None
    return Path(folder), f"hub:{repository}@{Path(folder).name}"


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split, all of one form: NAME.EXT, or NAME-00000-of-00002.EXT and so on."""
    pattern = re.compile(rf"({'|'.join(names)})(-\d+-of-\d+)?({'|'.join(map(re.escape, _READERS))})")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if len({path.name.split("-")[0] + path.suffix for path in found}) > 1:
        raise UsageError(f"{folder}: expected one file of the split, got {[path.name for path in found]}. Keep one.")
    return found


def _read_delimited(path: Path, columns: Sequence[str] | None, tabs: bool) -> pa.Table:
    return pa.csv.read_csv(
        path,
        pa.csv.ReadOptions(column_names=columns, block_size=1 << 26),
        # GLUE's tsv files hold quotation marks that are text
        pa.csv.ParseOptions(
            delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
        ),
    )


_READERS: dict[str, Callable[[Path, Sequence[str] | None], pa.Table]] = {
    ".parquet": lambda path, columns: pa.parquet.read_table(path),
    ".jsonl": lambda path, columns: pa.json.read_json(path, pa.json.ReadOptions(block_size=1 << 26)),
    ".json": lambda path, columns: pa.json.read_json(path, pa.json.ReadOptions(block_size=1 << 26)),
    ".csv": lambda path, columns: _read_delimited(path, columns, tabs=False),
    ".tsv": lambda path, columns: _read_delimited(path, columns, tabs=True),
}
"""How a file is read; the names of its columns are given if it has no header."""


def _read(name: str, spec: TaskSpec, files: Iterable[Path]) -> Columns:
    """The columns of a split under our names."""
    rows: Columns = {ours: [] for ours in spec.columns}
    for path in files:
        try:
            table = _READERS[path.suffix](path, None)
            if spec.headerless and not _matches(spec, table) and len(table.column_names) == len(spec.headerless):
                table = _READERS[path.suffix](path, spec.headerless)
        except pa.ArrowInvalid as error:
            raise UsageError(f"{name}: {path} cannot be read: {error}") from None
        matches = _matches(spec, table)
        for ours, theirs in spec.columns.items():
            if ours not in matches:
                raise UsageError(
                    f"{name}: expected a column {' or '.join(theirs)} in {path}, got {', '.join(table.column_names)}."
                )
            rows[ours] += table[matches[ours]].to_pylist()
    if "image" in rows:
        rows["image"] = [_decoded(one["bytes"] if isinstance(one, dict) else one) for one in rows["image"]]
    return rows


def _matches(spec: TaskSpec, table: pa.Table) -> dict[str, str]:
    names = table.column_names
    return {
        ours: next(one for one in theirs if one in names)
        for ours, theirs in spec.columns.items()
        if {*theirs} & {*names}
    }


def _decoded(image: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(image))
    return np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))


def _checked(where: str, columns: Columns, spec: TaskSpec) -> Columns:
    """The same rows with class numbers for labels, or an error that names the row."""
    rows = {len(values) for values in columns.values()}
    if rows == {0}:
        raise UsageError(f"{where}: expected at least one row, got none.")
    for column in {"text", "text_pair", "question", "answer"} & set(columns):
        for row, text in enumerate(columns[column]):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"{where}: expected text in {column} of row {row}, got {text!r}.")
    if "label" not in columns:
        return columns
    numbers = {str(one): number for number, name in enumerate(spec.label_names) for one in (name, number)}
    labels = []
    for row, label in enumerate(columns["label"]):
        if str(label) not in numbers:
            hint = " (a split without labels, as GLUE's test)" if str(label) in ("-1", "None") else ""
            raise UsageError(
                f"{where}: expected a label out of {', '.join(spec.label_names)} (or its number from 0) in row {row}, "
                f"got {label!r}{hint}."
            )
        labels.append(numbers[str(label)])
    return columns | {"label": np.array(labels, np.int32)}


# ------------------------------------------------------------------------------------------- assets


def _reviews(source: str) -> dict[str, Columns]:
    with asset("reviews").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == source]
    return {"train": {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}}


def _newsgroups() -> dict[str, Columns]:
    def split(path: Path) -> Columns:
        # three lines of header (names, types, roles) and an empty one; then one document a line
        lines = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[3:] if line.strip()]
        return {"text": [text for _, text in lines], "label": [label for label, _ in lines]}

    folder = asset("newsgroups")
    return {"train": split(folder / "train.tab"), "test": split(folder / "test.tab")}


def _digits() -> dict[str, Columns]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # gray values 0 to 16
    return {"train": {"image": np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), "label": labels}}


def _fashion_mnist() -> dict[str, Columns]:
    folder = asset("fashion_mnist")

    def split(stem: str) -> Columns:
        # IDX: 16 bytes of header before images, 8 before labels
        images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        return {
            "image": np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            "label": np.frombuffer(labels, np.uint8, offset=8),
        }

    return {"train": split("train"), "test": split("t10k")}


def _cifar10() -> dict[str, Columns]:
    examples = json.loads(asset("cifar10").read_text())["examples"]
    return {
        "train": {
            "image": np.stack([_decoded(base64.b64decode(one["input"])) for one in examples]),
            "label": [max(one["target_scores"], key=one["target_scores"].get) for one in examples],
        }
    }


_SHORT_TEMPLATES = 8
"""How many of the 85 templates the short form of gsm_symbolic has."""

_GSM_SYMBOLIC = """
import ast, importlib, json, random, sys
root, rows, shortest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, root)
package = "reasoning_gym.arithmetic.gsm_symbolic."
halves = [importlib.import_module(package + name) for name in ("generators_00_49", "generators_50_99")]
source = open(root + "/reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py", encoding="utf-8").read()
sound = next(
    ast.literal_eval(line.value)
    for line in ast.parse(source).body
    if isinstance(line, ast.Assign) and line.targets[0].id == "tasks_ok"
)
def solved(kind, draw):
    example = getattr(halves[kind // 50], f"generate_{kind}")(random.Random(draw), 1.0)
    return example["question"], example["metadata"]["answer_cot"]
if shortest:
    sound = sorted(sound, key=lambda kind: max(len("".join(solved(kind, draw))) for draw in range(50)))[:shortest]
seen, draw = set(), 0
while len(seen) < rows:
    question, answer = solved(sound[draw % len(sound)], draw)
    draw += 1
    if question not in seen:
        seen.add(question)
        print(json.dumps([question, answer]))
"""


def _gsm_symbolic(*, train: int, test: int, shortest: int = 0) -> dict[str, Columns]:
    """The same problems every time; test has the templates of train with other names and numbers, no question twice.

    Of all templates, or of so many with the shortest solved problems.
    """
    # a process of its own, without site-packages: the generators need only Python, and another version of their
    # package, if one is installed, must not stand in for them
    command = [sys.executable, "-I", "-S", "-c", _GSM_SYMBOLIC, str(asset("gsm_symbolic"))]
    command += [str(train + test), str(shortest)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    rows = [json.loads(line) for line in output.splitlines()]

    def columns(part: list[list[str]]) -> Columns:
        return {"question": [question for question, _ in part], "answer": [answer for _, answer in part]}

    return {"train": columns(rows[test:]), "test": columns(rows[:test])}


# -------------------------------------------------------------------------------------------- tasks

_LABEL = ("label", "labels")
_SENTENCE = {"text": ("sentence", "text", "content"), "label": _LABEL}
_SOLVED = {"question": ("question",), "answer": ("answer",)}

TASKS: dict[str, TaskSpec] = {
    "rte": TaskSpec(
        kind="sequence-classification",
        columns={"text": ("sentence1", "premise"), "text_pair": ("sentence2", "hypothesis"), "label": _LABEL},
        label_names=("entailment", "not_entailment"),
        hub="nyu-mll/glue",
        subset="rte",
        folders=("RTE",),
        test=("validation", "dev", "val"),
        headerless=("idx", "sentence1", "sentence2", "label"),
    ),
    "sst2": TaskSpec(
        kind="sequence-classification",
        columns=_SENTENCE,
        label_names=("negative", "positive"),
        hub="nyu-mll/glue",
        subset="sst2",
        folders=("SST-2",),
        test=("validation", "dev", "val"),
    ),
    "rotten_tomatoes": TaskSpec(
        kind="sequence-classification",
        columns=_SENTENCE,
        label_names=("negative", "positive"),
        hub="cornell-movie-review-data/rotten_tomatoes",
        assets=lambda: _reviews("rotten_tomatoes"),
    ),
    "imdb": TaskSpec(
        kind="sequence-classification",
        columns=_SENTENCE,
        label_names=("negative", "positive"),
        hub="stanfordnlp/imdb",
        subset="plain_text",
        assets=lambda: _reviews("imdb"),
    ),
    "newsgroups": TaskSpec(
        kind="sequence-classification",
        columns=_SENTENCE,
        label_names=(
            "alt.atheism",
            "comp.graphics",
            "comp.os.ms-windows.misc",
            "comp.sys.ibm.pc.hardware",
            "comp.sys.mac.hardware",
            "comp.windows.x",
            "misc.forsale",
            "rec.autos",
            "rec.motorcycles",
            "rec.sport.baseball",
            "rec.sport.hockey",
            "sci.crypt",
            "sci.electronics",
            "sci.med",
            "sci.space",
            "soc.religion.christian",
            "talk.politics.guns",
            "talk.politics.mideast",
            "talk.politics.misc",
            "talk.religion.misc",
        ),
        hub="SetFit/20_newsgroups",
        assets=_newsgroups,
    ),
    "digits": TaskSpec(
        kind="image-classification",
        columns={"image": ("image", "img"), "label": _LABEL},
        label_names=tuple("0123456789"),
        assets=_digits,
    ),
    "fashion_mnist": TaskSpec(
        kind="image-classification",
        columns={"image": ("image", "img"), "label": _LABEL},
        label_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        hub="zalando-datasets/fashion_mnist",
        subset="fashion_mnist",
        assets=_fashion_mnist,
    ),
    "cifar10": TaskSpec(
        kind="image-classification",
        columns={"image": ("img", "image"), "label": _LABEL},
        label_names=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        hub="uoft-cs/cifar10",
        subset="plain_text",
        assets=_cifar10,
    ),
    "gsm8k": TaskSpec(kind="causal-lm", columns=_SOLVED, hub="openai/gsm8k", subset="main"),
    "gsm_symbolic": TaskSpec(kind="causal-lm", columns=_SOLVED, assets=lambda: _gsm_symbolic(train=5000, test=500)),
    "gsm_symbolic_short": TaskSpec(
        kind="causal-lm",
        columns=_SOLVED,
        assets=lambda: _gsm_symbolic(train=2000, test=400, shortest=_SHORT_TEMPLATES),
    ),
}
"""All tasks, by name."""
