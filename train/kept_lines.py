"""What a long program has found so far: lines of a file by key, taken over by the same program run again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec

from ntk_prefix.artifacts import append, decode_json, json_text, write_whole
from ntk_prefix.checks import UsageError, expected

__all__ = ["KeptLines"]


class _Row(msgspec.Struct):
    key: str
    value: Any


class KeptLines:
    """Lines of a file, each written as soon as it is known; the first says what was asked.

    A line that was being written when the program was stopped is left out, and so is one that is damaged.

    Args:
        file: made if need be, with its folder.
        settings: all that the values depend on, as plain values.

    Attributes:
        known: key -> value.

    Raises:
        UsageError: a file of other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.known = file, dict[str, Any]()
        first = _line("settings", json.loads(json_text(settings)))
        lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
        if lines and lines[0] != first:
            raise expected(
                "--out", "a new folder, or one that was begun by the same command", f"{file}, of another one"
            )
        for line in lines[1:]:
            with contextlib.suppress(UsageError):
                row = decode_json(line, _Row, str(file))
                self.known[row.key] = row.value
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join([first, *(_line(*pair) for pair in self.known.items())]).encode())

    def add(self, key: str, value: Any) -> None:
        """Keep a value, of JSON's kinds."""
        self.known[key] = value
        append(self.file, _line(key, value))


def _line(key: str, value: Any) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"
