"""The columns of a task out of its files, under our names, and checked row by row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_prefix.artifacts import read_bytes
from ntk_prefix.checks import expected
from train.images import LARGEST_FILE, decoded
from train.readers import open_table

if TYPE_CHECKING:
    from train.sources import TaskSpec

__all__ = ["Columns", "checked", "column_flag", "label_names", "read_columns"]

Columns = dict[str, Any]
"""Rows, checked: ``text`` (and ``text_pair``) or ``image`` with ``label`` (class numbers), or ``question``, ``answer``,
or ``prefix``, ``suffix``."""

WITHOUT_LABELS = " (a split without labels, as GLUE's test)"


def column_flag(column: str) -> str:
    """Return the flag that names a column of ours in somebody's files."""
    return f"--{column.replace('_', '-')}-column"


def read_columns(name: str, spec: TaskSpec, files: Iterable[Path]) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns of a split under our names, and the names of its classes if its files note them.

    Numbers of classes become the names that their file notes for them, for the next file may number them otherwise; of a task
    with classes of its own only where it has these names.

    Args:
        name: of the task, for errors.
        spec: of the task: what the columns are called.
        files: of the split, in their order.

    Raises:
        UsageError: a file that cannot be read, a column that is not there, an image that is none.
    """
    rows: Columns = {ours: [] for ours in spec.columns}
    class_names: dict[str, None] = {}
    for file in files:
        table = open_table(file)
        headless = spec.headerless and file.suffix in (".csv", ".tsv") and not _matches(spec, table.names)
        if headless and len(table.names) == len(spec.headerless):
            table = open_table(file, spec.headerless)
        matches = _matches(spec, table.names)
        for ours, theirs in spec.columns.items():
            if ours not in matches:
                raise expected(
                    f"{name}: {file}",
                    f"a column {' or '.join(theirs)}",
                    ", ".join(table.names) or "none",
                    _hint(ours, spec, table.names),
                )
            values = table.column(matches[ours])
            if ours == "image":
                values = [_image(value, file, row, spec.own) for row, value in enumerate(values)]
            if ours == "label" and (noted := table.class_names.get(matches[ours], ())):
                class_names |= dict.fromkeys(noted)
                values = (
                    [_named(value, noted) for value in values]
                    if spec.own or {*noted} <= {*spec.label_names}
                    else values
                )
            rows[ours] += values
    return rows, tuple(class_names)


def _named(label: Any, noted: Sequence[str]) -> Any:
    """Return the name of a class's number, anything else as it is."""
    is_number = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(noted)
    return noted[label] if is_number else label


def _matches(spec: TaskSpec, names: Sequence[str]) -> dict[str, str]:
    return {
        ours: next(one for one in theirs if one in names)
        for ours, theirs in spec.columns.items()
        if {*theirs} & {*names}
    }


def _hint(ours: str, spec: TaskSpec, names: Sequence[str]) -> str:
    """Return what to do about a column that is not there."""
    folded = {name.casefold(): name for name in names}
    near = (found for one in spec.columns[ours] for found in difflib.get_close_matches(one.casefold(), folded, 1))
    nearest = folded.get(next(near, ""))
    return f"Did you mean {column_flag(ours)} {nearest}" if nearest else f"Name it: {column_flag(ours)} NAME"


def _image(value: Any, file: Path, row: int, encoded: bool) -> np.ndarray | bytes:
    """Return a picture that can be read: its bytes, or those of the file that the data set names beside its own."""
    where = f"{file}, row {row}"
    content, path = value, None
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        content, path = None, value
    if content is None and isinstance(path, str):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise expected(
                where, "an image in it, or a path inside of its folder", path, "Copy the images there, or embed them"
            )
        content = read_bytes(file.parent / path, LARGEST_FILE, where)
    if not isinstance(content, bytes):
        raise expected(where, "an image, or the path of one", type(value).__name__)
    picture = decoded(content, where)
    return content if encoded else picture


def _label_text(label: Any) -> str | None:
    """Return a label as the name of a class; None if it can be none."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # what a table with gaps makes of whole numbers
    return str(label) if isinstance(label, int | str) and str(label).strip() else None


def label_names(where: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Return the classes of somebody's own labels: numbers in their order, else by the alphabet.

    Args:
        where: which split of which task, for errors.
        labels: of the train split: texts, whole numbers, true and false.

    Raises:
        UsageError: a label that is none of these, only one class, or nearly as many as rows.
    """
    names = set()
    for row, label in enumerate(labels):
        name = _label_text(label)
        if name is None:
            raise expected(f"{where}, row {row}", "a label: text, a whole number, true or false", repr(label))
        names.add(name)
    if len(names) < 2 and labels:
        raise expected(where, "labels of at least two classes", f"only {', '.join(names)!r}")
    if 2 * len(names) > max(len(labels), 4):
        raise expected(
            where,
            "a label that stands in several rows",
            f"{len(names)} different ones in {len(labels)} rows",
            f"Is {column_flag('label')} right? Of classes that are this rare nothing can be learned",
        )
    whole = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else (lambda name: (0, name))))


def checked(where: str, columns: Columns, spec: TaskSpec, *, numbered: bool) -> Columns:
    """Return the same rows with class numbers for labels.

    Args:
        where: which split of which task, for errors.
        columns: the rows.
        spec: of the task.
        numbered: whether a label may be a class's number as well as its name.

    Raises:
        UsageError: no rows; a text that is none or empty, a label that is no class: the row is named.
    """
    rows = {len(values) for values in columns.values()}
    if rows == {0}:
        raise expected(where, "at least one row", "none")
    for column in {"text", "text_pair", "question", "answer", "prefix", "suffix"} & set(columns):
        for row, text in enumerate(columns[column]):
            if not isinstance(text, str) or not text.strip():
                raise expected(where, f"text in {column} of row {row}", repr(text))
    if "label" not in columns:
        return columns
    numbers = {name: number for number, name in enumerate(spec.label_names)}
    # a number that is a name too is the name: stars from 1 to 5 are the classes 0 to 4
    numbered = numbered and not any(name.isdecimal() and name != str(number) for name, number in numbers.items())
    if numbered:
        numbers = {str(number): number for number in numbers.values()} | numbers
    labels = []
    for row, label in enumerate(columns["label"]):
        text = _label_text(label) if spec.own else str(label)
        if text not in numbers:
            names, hint = ", ".join(spec.label_names), WITHOUT_LABELS if str(label) in ("-1", "None", "") else ""
            number = " (or its number from 0)" if numbered else ""
            raise expected(where, f"a label out of {names}{number} in row {row}", f"{label!r}{hint}")
        labels.append(numbers[text])
    return columns | {"label": np.array(labels, np.int32)}
