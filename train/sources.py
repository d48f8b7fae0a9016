"""Where the rows of each task come from: files, a hub, or the package assets; the table of tasks.

a file        ``data_dir``: one of ``train.readers.ENDINGS``; its test rows are set aside by ``train.tasks``
a folder      ``data_dir``: files of a Hugging Face data set (parquet, jsonl, csv) or of GLUE (train.tsv, dev.tsv),
              in the folder itself or in one named after the task in it; or what ``datasets.save_to_disk`` wrote
a hub         ``data_dir="hub"``, or ``"hub:owner/name"`` for another data set of the same columns; needs network
the assets    ``data_dir=None``: what ``train.assets`` fetches, and the digits of scikit-learn

The tasks text, pair, image, instruct and ranking are anybody's own: their columns are named by whoever has them, and their
classes are those that the train split has.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub
import numpy as np

from ntk_prefix.artifacts import decode_json
from ntk_prefix.checks import expected
from train.assets import AssetError, asset, verified_files
from train.columns import Columns, checked, column_flag, label_names, read_columns
from train.images import decoded
from train.readers import ENDINGS, open_table, saved_files, saved_splits

__all__ = [
    "TASKS",
    "Columns",
    "Kind",
    "Rows",
    "TaskSpec",
    "check_source",
    "find_folder",
    "on_hub",
    "read",
    "reviews",
    "spec_of",
    "split_files",
]

Kind = Literal["sequence-classification", "image-classification", "causal-lm", "ranking"]


class Rows(NamedTuple):
    """What was read."""

    splits: dict[str, Columns]
    """``train``, and ``validation`` and ``test`` if the source has them."""
    source: str
    """Where the rows come from, for the record."""
    label_names: tuple[str, ...]
    """Of the classes, in the order of their numbers; empty where there are none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task is, whatever its rows come from.

    Args:
        kind: what is predicted.
        columns: our name of a column -> the names it goes by in files, the usual one first.
        label_names: of the classes, in the order of their numbers; empty for causal language modeling, and where they are
            those of the train split.
        hub, subset: the usual data set on the hub and the folder in it.
        folders: other names that a folder of it goes by.
        validation: names of the split that is our ``validation``; without, that is split off train.
        train: names of the split that is our ``train``.
        test: names of the split that is our ``test``.
        foreign_test: whether ``test`` is another data set's, so that none may be set aside of ``train`` instead.
        headerless: the column names of files that come without a header.
        assets: rows from the package assets, ``{"train": ..., "test": ...}``; None if no asset has them.
        own: whether it is anybody's own data; its pictures stay encoded until a batch needs them, for they may be large.
    """

    kind: Kind
    columns: Mapping[str, tuple[str, ...]]
    label_names: tuple[str, ...] = ()
    hub: str = ""
    subset: str = ""
    folders: tuple[str, ...] = ()
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ("test",)
    foreign_test: bool = False
    headerless: tuple[str, ...] = ()
    assets: Callable[[], dict[str, Columns]] | None = None
    own: bool = False


def spec_of(name: str, columns: Mapping[str, str | None] | None = None) -> TaskSpec:
    """Return the task of a name, its columns called as somebody's files call them.

    Args:
        name: one of :data:`TASKS`.
        columns: our name of a column -> its name in the files; None leaves the usual ones.

    Raises:
        UsageError: an unknown name, a column that the task has not.
    """
    if name not in TASKS:
        raise expected("task", f"one of {', '.join(TASKS)}", repr(name))
    spec = TASKS[name]
    named = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
    for ours, theirs in named.items():
        if ours not in spec.columns:
            flags = ", ".join(map(column_flag, spec.columns))
            raise expected(column_flag(ours), f"it left out for the task {name}, which has {flags}", repr(theirs))
    return dataclasses.replace(spec, columns={**spec.columns, **{ours: (theirs,) for ours, theirs in named.items()}})


def find_folder(name: str, data_dir: Path | str) -> Path | None:
    """Return where a task's train split is: ``data_dir``, or a folder named after the task in it; None if neither."""
    spec, root = spec_of(name), Path(os.path.expanduser(data_dir))
    if root.is_file():
        return root
    names = {name, spec.subset, spec.hub.split("/")[-1], *spec.folders} - {""}
    # the folder named after the task first: two data sets may stand side by side
    for folder in (*(root / one for one in sorted(names)), root):
        for inner in (folder, folder / spec.subset, folder / "data"):
            if inner.is_dir() and _files(inner, spec.train):
                return inner
    return None


def check_source(name: str, data_dir: Path | str | None) -> None:
    """Refuse a task whose rows are nowhere; reads none, and asks no network.

    Raises:
        UsageError: an unknown task, a folder that cannot be listed.
        AssetError: no asset has its rows.
        FileNotFoundError: the folder has none.
    """
    spec = spec_of(name)
    if data_dir is None:
        if spec.assets is None:
            files = spec.hub or " or ".join(spec.folders)
            rows = "a file or folder with your rows" if spec.own else f"a folder with the files of {files}"
            hub = "hub:owner/name" if spec.own else "hub"
            fetched = f', or "{hub}" to fetch that' if spec.own or spec.hub else ""
            raise AssetError(f"{name}: expected a data_dir, for no asset has its rows: {rows}{fetched}.")
    elif not on_hub(str(data_dir)) and find_folder(name, data_dir) is None:
        place = Path(os.path.expanduser(data_dir))
        found = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        shown = f"{found[:20]}{' and more' if len(found) > 20 else ''}" if place.is_dir() else "no such file or folder"
        names = " or ".join(spec.train)
        raise FileNotFoundError(
            f"{name}: expected {names}.({'|'.join(ending[1:] for ending in ENDINGS)}) in {place} or in a folder {name} there, "
            f"or the name of one such file, found {shown}."
        )


def on_hub(data_dir: str) -> bool:
    """Return whether rows are to be fetched from a hub."""
    return data_dir == "hub" or data_dir.startswith("hub:")


def read(name: str, data_dir: Path | str | None = None, named: Mapping[str, str | None] | None = None) -> Rows:
    """Return the rows of a task's ``train`` split, and of the others if the source has them.

    Args:
        name: one of :data:`TASKS`.
        data_dir: see the top of this module.
        named: our name of a column -> its name in the files, see :func:`spec_of`.

    Raises:
        UsageError: an unknown task; a file that cannot be read; a missing column; an unknown or missing label; an empty
            split or text.
        FileNotFoundError: a folder without the task.
        AssetError: rows that no asset has, or that cannot be fetched.
    """
    spec = spec_of(name, named)
    if data_dir is None and (
        flags := [column_flag(ours) for ours, theirs in (named or {}).items() if theirs is not None]
    ):
        raise expected(
            ", ".join(flags), f"--data-dir beside it, for the columns of {name}'s own rows are known", "none"
        )
    splits, source, class_names = _splits(name, spec, data_dir)
    where = "" if data_dir is None else f"{source}: "
    if "label" in spec.columns and not spec.label_names:
        found = class_names or label_names(f"{where}{name}, train split", splits["train"]["label"])
        spec = dataclasses.replace(spec, label_names=found)
    numbered = bool(class_names) or not spec.own
    rows = {
        split: checked(f"{where}{name}, {split} split", columns, spec, numbered=numbered)
        for split, columns in splits.items()
    }
    return Rows(rows, source, spec.label_names)


def _splits(name: str, spec: TaskSpec, data_dir: Path | str | None) -> tuple[dict[str, Columns], str, tuple[str, ...]]:
    """Return rows as they stand in the source, its name, and the names of classes if it notes them."""
    check_source(name, data_dir)
    if data_dir is None:
        assert spec.assets is not None
        return spec.assets(), "assets", ()
    source = str(data_dir)
    if on_hub(source):
        data_dir, source = _from_hub(name, spec, source.removeprefix("hub").removeprefix(":") or spec.hub)
        check_source(name, data_dir)
    folder = find_folder(name, data_dir)
    assert folder is not None
    files = split_files(spec, folder)
    if spec.kind == "ranking" and not {*spec.columns["text"]} & {*open_table(files["train"][0]).names}:
        # pairs as they are, in the place of whole documents
        spec = dataclasses.replace(spec, columns={"prefix": ("prefix",), "suffix": ("suffix",)})
    if spec.foreign_test and not files["test"]:
        raise expected(f"{name}: {source}", "a test split beside it", "none", "Put test.jsonl of GSM8K into the folder")
    found = {split: read_columns(name, spec, some) for split, some in files.items() if some}
    return {split: rows for split, (rows, _) in found.items()}, source, found["train"][1]


def _from_hub(name: str, spec: TaskSpec, repository: str) -> tuple[Path, str]:
    """Return a data set's files in Hugging Face's own cache, and where they come from."""
    if not repository:
        raise AssetError(f'{name}: expected "hub:owner/name" or no data_dir, for the hub has no usual data set of it.')
    inside = f"{spec.subset}/" if repository == spec.hub and spec.subset else ""
    patterns = [f"{inside}*{end}" for end in ENDINGS]
    try:
        folder = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise AssetError(
            f"{name}: expected the data set {repository} from the hub, got {type(error).__name__}: "
            f"{' '.join(str(error).split())}. "
            "Without network give data_dir a folder with its files."
        ) from None
    return Path(folder), f"hub:{repository}@{Path(folder).name}"


def split_files(spec: TaskSpec, place: Path) -> dict[str, list[Path]]:
    """Return the files of each split, of a folder or of one file; empty lists where there are none.

    Raises:
        UsageError: a split in files of several forms, or a list of splits that cannot be read.
    """
    wanted = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    return {split: _files(place, names) for split, names in wanted.items() if names}


def _files(place: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of a split, of one form: NAME.EXT, or NAME-00000-of-00002.EXT etc.; a single file is train."""
    if place.is_file():
        return [place] if "train" in names else []
    if splits := saved_splits(place):
        return saved_files(place / next((one for one in names if one in splits), ""))
    if files := saved_files(place):
        return files if "train" in names else []
    pattern = re.compile(rf"({'|'.join(names)})(-\d+-of-\d+)?({'|'.join(map(re.escape, ENDINGS))})")
    found = sorted(path for path in place.iterdir() if pattern.fullmatch(path.name) and path.is_file())
    if len({path.name.split("-")[0] + path.suffix for path in found}) > 1:
        raise expected(place, "one file of the split", [path.name for path in found], "Keep one")
    return found


# ------------------------------------------------------------------------------------------- assets


def reviews(source: str) -> dict[str, Columns]:
    """Return the film reviews of an asset: ``imdb``, or the sentences of ``rotten_tomatoes``."""
    with asset("reviews").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == source]
    return {"train": {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}}


_LONG = 300
"""Words of a review that is a document."""


def _documents(words: int) -> dict[str, Columns]:
    """Return the film reviews of so many words or more."""
    return {"train": {"text": [text for text in reviews("imdb")["train"]["text"] if len(text.split()) >= words]}}


def _newsgroups() -> dict[str, Columns]:
    def split(path: Path) -> Columns:
        # three lines of header (names, types, roles) and an empty one; then one document per line
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
            "image": np.stack([decoded(base64.b64decode(one["input"]), "cifar10") for one in examples]),
            "label": [max(one["target_scores"], key=one["target_scores"].get) for one in examples],
        }
    }


_SHORT_TEMPLATES = 8
"""How many of the 85 templates the short form of gsm_symbolic has."""

_GENERATOR = Path(__file__).with_name("gsm_symbolic.py")


def _gsm_symbolic(*, train: int, test: int, shortest: int = 0) -> dict[str, Columns]:
    """Return the same problems every time; test has the templates of train with other names and numbers, no question twice.

    Of all templates, or of so many with the shortest solved problems.

    Raises:
        AssetError: the generators fail, or do not end.
    """
    with tempfile.TemporaryDirectory(prefix="ntk_prefix-gsm_symbolic-") as folder:
        # nothing lies beside the bytes that were verified; the process has no site-packages, for the generators need only
        # Python, and another version of their package, if one is installed, must not stand in for them
        for name, content in verified_files("gsm_symbolic").items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        command = [sys.executable, "-I", "-S", "-B", str(_GENERATOR), folder, str(train + test), str(shortest)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, cwd=folder)
        except subprocess.TimeoutExpired:
            raise AssetError("gsm_symbolic: expected its generators to end within 300 s, got no end.") from None
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise AssetError(f"gsm_symbolic: expected problems from its generators, got exit {ended.returncode}: {said}")
    rows = [decode_json(line, tuple[str, str], "gsm_symbolic, a problem") for line in ended.stdout.splitlines()]

    def columns(part: list[tuple[str, str]]) -> Columns:
        return {"question": [question for question, _ in part], "answer": [answer for _, answer in part]}

    return {"train": columns(rows[test:]), "test": columns(rows[:test])}


# -------------------------------------------------------------------------------------------- tasks

_LABEL = ("label", "labels")
_SENTENCE = {"text": ("sentence", "text", "content"), "label": _LABEL}
_SOLVED = {"question": ("question",), "answer": ("answer",)}

_VALIDATION = ("validation", "dev", "val", "valid")
_TEXT = ("text", "sentence", "content", "review")

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
        assets=lambda: reviews("rotten_tomatoes"),
    ),
    "imdb": TaskSpec(
        kind="sequence-classification",
        columns=_SENTENCE,
        label_names=("negative", "positive"),
        hub="stanfordnlp/imdb",
        subset="plain_text",
        assets=lambda: reviews("imdb"),
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
    # trained on one data set, tested on another: see train.tasks
    "metamath": TaskSpec(
        kind="causal-lm",
        columns={"question": ("query", "question"), "answer": ("response", "answer")},
        folders=("MetaMathQA",),
        train=("train", "MetaMathQA-395K"),
        validation=_VALIDATION,
        foreign_test=True,
    ),
    "gsm_symbolic": TaskSpec(kind="causal-lm", columns=_SOLVED, assets=lambda: _gsm_symbolic(train=5000, test=500)),
    "gsm_symbolic_short": TaskSpec(
        kind="causal-lm",
        columns=_SOLVED,
        assets=lambda: _gsm_symbolic(train=2000, test=400, shortest=_SHORT_TEMPLATES),
    ),
    "text": TaskSpec(
        kind="sequence-classification", columns={"text": _TEXT, "label": _LABEL}, own=True, validation=_VALIDATION
    ),
    "pair": TaskSpec(
        kind="sequence-classification",
        columns={
            "text": ("text", "sentence1", "premise", "question"),
            "text_pair": ("text_pair", "sentence2", "hypothesis", "answer"),
            "label": _LABEL,
        },
        own=True,
        validation=_VALIDATION,
    ),
    "image": TaskSpec(
        kind="image-classification",
        columns={"image": ("image", "img", "file_name"), "label": _LABEL},
        own=True,
        validation=_VALIDATION,
    ),
    # the reviews, without their classes, that are long enough to have spans beside a pair
    "ranking": TaskSpec(
        kind="ranking", columns={"text": _TEXT}, own=True, validation=_VALIDATION, assets=lambda: _documents(_LONG)
    ),
    "ranking_newsgroups": TaskSpec(
        kind="ranking",
        columns={"text": _TEXT},
        assets=lambda: {split: {"text": columns["text"]} for split, columns in _newsgroups().items()},
    ),
    "instruct": TaskSpec(
        kind="causal-lm",
        columns={
            "question": ("question", "prompt", "instruction"),
            "answer": ("answer", "response", "output", "completion"),
        },
        own=True,
        validation=_VALIDATION,
    ),
}
"""All tasks, by name."""
