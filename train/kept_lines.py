"""What a long program has found so far: lines of a file by key, taken over by the same program run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntk_prefix.artifacts import json_text, write_whole
from ntk_prefix.checks import expected

__all__ = ["KeptLines"]


class KeptLines:
    """Lines of a file, each written as soon as it is known; the first says what was asked.

    A line that was being written when the program was stopped is left out.

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
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        if lines and lines[0] != first:
            raise expected(
                "--out", "a new folder, or one that was begun by the same command", f"{file}, of another one"
            )
        for line in lines[1:]:
            if line.endswith("\n"):
                row = json.loads(line)
                self.known[row["key"]] = row["value"]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join([first, *(_line(*pair) for pair in self.known.items())]).encode())

    def add(self, key: str, value: Any) -> None:
        """Keep a value, of JSON's kinds."""
        self.known[key] = value
        with self.file.open("a") as stream:
            stream.write(_line(key, value))


def _line(key: str, value: Any) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"
