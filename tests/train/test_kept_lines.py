"""What a long program has found so far: taken over by the same program, whatever became of its last lines."""

from pathlib import Path

import pytest

from ntk_prefix.checks import UsageError
from train.kept_lines import KeptLines


def test_what_is_whole_is_taken_over_and_what_is_not_is_found_anew(tmp_path: Path) -> None:
    file = tmp_path / "out" / "lines.jsonl"
    kept = KeptLines(file, {"seed": 0})
    for key in "abcd":
        kept.add(key, [key, 1.5])
    lines = file.read_bytes().splitlines(keepends=True)
    # of b a power cut has left zeros, of c other bytes, and d was being written
    file.write_bytes(lines[0] + lines[1] + bytes(len(lines[2])) + b"\n" + b'{"key": "\xff"}\n' + lines[4][:-9])
    kept = KeptLines(file, {"seed": 0})
    assert kept.known == {"a": ["a", 1.5]}
    kept.add("b", 2)
    assert KeptLines(file, {"seed": 0}).known == {"a": ["a", 1.5], "b": 2}
    with pytest.raises(UsageError, match="a new folder, or one that was begun by the same command"):
        KeptLines(file, {"seed": 1})
