"""A compiler that ends its process is said in a line."""

import sys
from pathlib import Path

import pytest

from train.plan.watch import CHILD, watched


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("exit 1", 1, ""),  # does not fit
        ('test "$1 $2 $3" = "-m train.plan there" && test $NTK_PREFIX_WATCHED = 1', 0, ""),
        ("kill -ABRT $$", 128 + 6, "The compiler ended by SIGABRT"),
    ],
)
def test_a_compiler_that_ends_its_process_is_a_line(
    body: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    monkeypatch.delenv(CHILD, raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["plan", "there"])
    with pytest.raises(SystemExit) as end:
        watched("train.plan")
    assert end.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert ("--remat" in err) == bool(said)


def test_the_process_that_does_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHILD, "1")
    watched("train.plan")
