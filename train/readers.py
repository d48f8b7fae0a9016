"""Files of rows: parquet, arrow, jsonl, json, csv and tsv; one reader each, and every error names the file.

A reader takes only the columns that are asked for. Whatever a file holds, a broken one is a
:class:`~ntk_prefix.checks.UsageError` of one line: what the library that parses it says is mapped here and nowhere else.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from ntk_prefix.artifacts import decode_json, read_bytes, read_json
from ntk_prefix.checks import UsageError, expected

__all__ = ["ENDINGS", "Table", "open_table", "saved_files", "saved_splits"]

LONGEST_ROW = 2**26
"""Bytes of one row of text; a longer one is a file without line breaks, and is not read."""

LARGEST_ARRAY = 2**30
"""Bytes of a JSON file that is one array, which is read whole; a row per line has no such bound."""

TEXT = {".jsonl", ".json", ".csv", ".tsv"}
"""Endings of files of text, which spreadsheets may save in UTF-16."""

MOST_PACKED, LEAST_UNPACKED = 256, 2**28
"""How often its own size a packed file may hold, and bytes that it may hold in any case: a few kilobytes can unpack to more
than memory has, by one value that is said to be repeated."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of rows.

    Args:
        file: of which it is.
        names: of its columns.
        class_names: of columns whose numbers stand for names, as the ``datasets`` library notes them.
    """

    file: Path
    names: tuple[str, ...]
    read: Callable[[str], list[Any]]
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def column(self, name: str) -> list[Any]:
        """Return the values of a column; None where a row has none.

        Raises:
            UsageError: the file is broken, or has no such column, or has it twice: which one is meant?
        """
        times = self.names.count(name)
        if times > 1:
            raise expected(str(self.file), f"the column {name} once", f"{times} of that name")
        if name not in self.names:
            raise expected(str(self.file), f"a column {name}", ", ".join(self.names) or "none")
        with _errors_mapped(self.file):
            return self.read(name)


def open_table(file: Path, names: Sequence[str] | None = None) -> Table:
    """Return a file's table; its ending says what it is.

    Args:
        file: with one of :data:`ENDINGS`.
        names: of the columns of a csv or tsv file that has no header; other files name theirs.

    Raises:
        UsageError: another ending, a file that cannot be read.
    """
    if file.suffix not in _READERS:
        raise expected(str(file), f"a file that ends in {', '.join(_READERS)}", repr(file.suffix))
    with _errors_mapped(file):
        if file.suffix in TEXT:
            with file.open("rb") as stream:
                if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise expected(str(file), "text in UTF-8", "UTF-16", "Save it as UTF-8")
        return _READERS[file.suffix](file, names)


@contextlib.contextmanager
def _errors_mapped(file: Path) -> Iterator[None]:
    """Map what the libraries raise about a broken file."""
    try:
        yield
    except UsageError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        said = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        kind = file.suffix.removeprefix(".")
        raise expected(
            str(file), f"a {kind} file", f"one that cannot be read: {' '.join(said.split())[:300]}"
        ) from None


# --------------------------------------------------------------------------------------- one each


def _parquet(file: Path, _: Sequence[str] | None) -> Table:
    opened = pa.parquet.ParquetFile(file)
    schema = opened.schema_arrow
    largest = max(LEAST_UNPACKED, MOST_PACKED * file.stat().st_size)

    def read(name: str) -> list[Any]:
        values: list[Any] = []
        held = 0
        for batch in opened.iter_batches(batch_size=64, columns=[name]):
            batch.validate(full=True)
            held += batch.nbytes + 8 * batch.num_rows
            if held > largest:
                raise expected(str(file), f"a column {name} of at most {largest:,} bytes, unpacked", "more")
            values += batch.column(0).to_pylist()
        return values

    return Table(file, tuple(schema.names), read, _class_names(schema))


def _arrow(file: Path, _: Sequence[str] | None) -> Table:
    """Read the stream that ``datasets`` writes, or a file with random access (Feather)."""
    source = pa.memory_map(str(file))
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
    table.validate(full=True)  # offsets of a broken file point anywhere
    return Table(file, tuple(table.column_names), lambda name: table[name].to_pylist(), _class_names(table.schema))


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the names of class numbers, which ``datasets`` puts beside the schema; nothing where they cannot be read."""
    noted = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = msgspec.json.decode(noted, type=_Noted).info.features
        return {
            name: tuple(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and msgspec.convert(feature.get("names"), list[str])
        }
    except (msgspec.MsgspecError, RecursionError):
        return {}


class _Info(msgspec.Struct):
    features: dict[str, Any] = {}


class _Noted(msgspec.Struct):
    info: _Info = msgspec.field(default_factory=_Info)


def _delimited(file: Path, names: Sequence[str] | None, *, tabs: bool) -> Table:
    """Read all values as the text they are: whether 01 is a number or a name is not for a reader to say."""
    # a row must fit into a block; a block is allocated whole
    block = min(max(file.stat().st_size, 2**16), LONGEST_ROW)
    reading = pa.csv.ReadOptions(column_names=names, block_size=block)
    # GLUE's tsv files hold quotation marks that are text
    parsing = pa.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    with pa.csv.open_csv(file, reading, parsing) as stream:
        found = tuple(stream.schema.names)

    def read(name: str) -> list[Any]:
        converting = pa.csv.ConvertOptions(include_columns=[name], column_types={name: pa.string()})
        return pa.csv.read_csv(file, reading, parsing, converting)[name].to_pylist()

    return Table(file, found, read)


def _lines(file: Path, _: Sequence[str] | None) -> Table:
    """Read one JSON object per line; or, under the name .json, one array of objects."""
    with file.open("rb") as stream:
        if file.suffix == ".json" and stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            return _array(file)
    names: dict[str, None] = {}
    for row in _rows(file):
        names |= dict.fromkeys(row)

    def read(name: str) -> list[Any]:
        return [row.get(name) for row in _rows(file)]

    return Table(file, tuple(names), read)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield rows one at a time: msgspec gives up on deep nesting, where the parser of pyarrow overruns its stack."""
    with file.open("rb") as stream:
        for number in range(1, 1 << 62):
            line = stream.readline(LONGEST_ROW + 1)
            if not line:
                return
            if len(line) > LONGEST_ROW:
                raise expected(f"{file}, line {number}", f"at most {LONGEST_ROW:,} bytes", "more")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield decode_json(line, dict[str, Any], f"{file}, line {number}")


def _array(file: Path) -> Table:
    content = read_bytes(file, LARGEST_ARRAY).removeprefix(codecs.BOM_UTF8)
    rows = decode_json(content, list[dict[str, Any]], str(file))
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(file, tuple(names), lambda name: [row.get(name) for row in rows])


_READERS: dict[str, Callable[[Path, Sequence[str] | None], Table]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl": _lines,
    ".json": _lines,
    ".csv": lambda file, names: _delimited(file, names, tabs=False),
    ".tsv": lambda file, names: _delimited(file, names, tabs=True),
}

ENDINGS = tuple(_READERS)
"""Of the files that can be read."""


# --------------------------------------------------------------------------------- save_to_disk


class _Split(TypedDict):
    filename: str


class _State(msgspec.Struct):
    """``state.json`` of a data set that ``datasets`` saved."""

    data_files: list[_Split] = msgspec.field(name="_data_files")
    indices: list[_Split] | None = msgspec.field(name="_indices_data_files", default=None)


class _Splits(msgspec.Struct):
    """``dataset_dict.json``."""

    splits: list[str]


def saved_splits(folder: Path) -> list[str]:
    """Return the splits of a folder that ``DatasetDict.save_to_disk`` wrote; none if it is not such a folder.

    Raises:
        UsageError: its list of splits cannot be read, or names what is not a folder in it.
    """
    file = folder / "dataset_dict.json"
    return [_plain(file, name) for name in read_json(file, _Splits).splits] if file.is_file() else []


def saved_files(folder: Path) -> list[Path]:
    """Return the files of a folder that ``Dataset.save_to_disk`` wrote; none if it is not such a folder.

    Raises:
        UsageError: its state cannot be read, or names what is not a file in it.
    """
    file = folder / "state.json"
    if not file.is_file():
        return []
    state = read_json(file, _State)
    if state.indices:
        raise expected(str(file), "rows in their own order", "indices beside them", "Save flatten_indices() of it")
    return [folder / _plain(file, one["filename"]) for one in state.data_files]


def _plain(file: Path, name: str) -> str:
    if name != Path(name).name or not name.strip("."):
        raise expected(str(file), "names of what lies beside it", json.dumps(name))
    return name
