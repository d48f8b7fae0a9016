"""Files of a run: by schema in, whole and finite out, held by one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

import theory.command
import train.command
from ntk_prefix import artifacts
from ntk_prefix.checks import NonFiniteError, UsageError, check_arguments, expected, explain
from tests.small_disk import largest_file


@dataclasses.dataclass
class Sizes:
    rank: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    names: tuple[str, ...] = ()


def test_a_file_is_what_its_type_says(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rank": 3, "names": ["x"], "else": [1]}')
    assert artifacts.read_json(tmp_path / "a.json", Sizes) == Sizes(3, ("x",))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"rank": "3"}',
        '{"rank": 3.5}',
        '{"rank": true}',
        '{"rank": 1000000000}',
        '{"rank": NaN}',
        '{"rank": 1, "names": 2}',
        "\xff",
        '{"rank": 1, "deep": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}",
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"a\.json: expected"):
        artifacts.read_json(tmp_path / "a.json", Sizes)


def test_what_is_no_file_and_what_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text('{"rank": 3}')
    for name in ("none.json", ".", "long.json"):
        with pytest.raises(UsageError, match="expected"):
            artifacts.read_json(tmp_path / name, Sizes, largest=5)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_what_is_written_is_json_or_refused(value: object) -> None:
    flat = json.dumps(value)  # writes NaN, Infinity and -Infinity, which JSON has not
    if any(word in flat.replace('"', "") and f'"{word}' not in flat for word in ("NaN", "Infinity")):
        with pytest.raises(NonFiniteError, match="expected a finite number"):
            artifacts.json_text(value)
    else:
        assert json.loads(artifacts.json_text(value)) == value


def test_a_number_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(NonFiniteError, match=r"lines\[1\]\.loss: expected a finite number, got nan"):
        artifacts.json_text({"lines": [{"loss": 1.0}, {"loss": math.nan}]})
    assert artifacts.finite_or_none(math.inf) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    artifacts.write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(TypeError):
        artifacts.write_whole(tmp_path / "a", None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_full_is_said_with_the_files_name_and_leaves_what_was_there(tmp_path: Path) -> None:
    """What the system says of it names no file."""
    file = tmp_path / "a.png"
    artifacts.write_whole(file, b"old")
    figure = Figure()
    with largest_file(1000):
        for write in (
            lambda: artifacts.write_whole(file, bytes(2000)),
            lambda: artifacts.write_figure(file, figure),
        ):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert explain(caught.value) == f"{file}: File too large."
            assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
        with pytest.raises(OSError, match="File too large") as caught:
            artifacts.append(file, "x" * 2000)
    assert explain(caught.value) == f"{file}: File too large."
    artifacts.write_figure(file, figure, dpi=20)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("made", [True, False])
def test_a_new_folder_is_taken_back_where_it_cannot_be_filled(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "new"
    if not made:
        folder.mkdir()
    with contextlib.suppress(KeyboardInterrupt), artifacts.new_folder(folder, "--out"):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == ([] if made else [folder])
    with artifacts.new_folder(folder, "--out"):
        (folder / "a").write_text("whole")
    assert (folder / "a").read_text() == "whole"
    with pytest.raises(UsageError, match=r"^--out: expected a new folder, got .*, which is in use"):
        artifacts.check_new(folder, "--out")


def test_a_new_folder_whose_process_was_killed_is_filled_by_the_next_one(tmp_path: Path) -> None:
    """Until then it is nobody's but the living process'."""
    folder = tmp_path / "new"
    fill = "with artifacts.new_folder(folder, '--out'): (folder / 'a').write_text('half'); print(flush=True); input()"
    program = f"import sys, pathlib; from ntk_prefix import artifacts; folder = pathlib.Path(sys.argv[1])\n{fill}"
    command = [sys.executable, "-c", program, str(folder)]
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": artifacts.CHECKOUT}
    with subprocess.Popen(command, **piped) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UsageError, match="which another process holds"), artifacts.new_folder(folder, "--out"):
            pass
        assert (folder / "a").is_file()
        other.kill()
    artifacts.check_new(folder, "--out")
    with artifacts.new_folder(folder, "--out"):
        (folder / "b").write_text("whole")
    assert [file.name for file in folder.iterdir()] == ["b"]


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    held = "with artifacts.held(pathlib.Path(sys.argv[1]), '--out'): pass"
    program = f"import sys, pathlib; from ntk_prefix import artifacts\n{held}"
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with artifacts.held(tmp_path / ".lock", "--out"):
        other = subprocess.run(command, capture_output=True, text=True, cwd=artifacts.CHECKOUT)
    assert other.returncode != 0
    assert "--out: expected a folder that nobody writes" in other.stderr
    with artifacts.held(tmp_path / ".lock", "--out"):
        pass


def test_peak_memory_is_this_process_own() -> None:
    program = "from ntk_prefix import artifacts; print(artifacts.peak_resident_memory())"
    ballast = bytearray(os.urandom(1)) * 2**30  # a large parent
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=artifacts.CHECKOUT).stdout)
    assert child < len(ballast) < artifacts.peak_resident_memory()


def test_an_empty_argument_is_refused_by_its_flag() -> None:
    """As a path it is the current folder, which would be written to."""
    check_arguments(["certificate", "--out", "runs", "--adapter", "target=", "rank=3", "-"])
    for arguments, said in (
        (["certificate", "--out", ""], "^--out: expected a value, got an empty one"),
        (["--out="], "^--out: expected a value"),
        ([""], "^the argument behind the program: expected a value"),
        (["a", ""], "^the argument behind a: expected a value"),
    ):
        with pytest.raises(UsageError, match=said):
            check_arguments(arguments)


@pytest.mark.parametrize("ended", [theory.command.ended, train.command.ended])
def test_every_program_refuses_an_empty_argument_before_it_begins(
    ended: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--out", ""])
    assert ended(lambda: pytest.fail("it began"), Console(width=200)) == 2
    assert capsys.readouterr().out.startswith("--out: expected a value, got an empty one.")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (expected("--rank", "at least 1", 0, "Use 8"), "--rank: expected at least 1, got 0. Use 8."),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory."),
        (MemoryError(), "expected this to fit into memory, got: no room"),
        (TypeError("ours"), None),
        (ValueError("a library's"), None),
        (RuntimeError("ours"), None),
    ],
)
def test_a_user_is_told_in_one_line_and_a_mistake_of_ours_keeps_its_traceback(
    error: Exception, line: str | None
) -> None:
    assert explain(error) == line
