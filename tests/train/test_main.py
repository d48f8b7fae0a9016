"""``python -m train`` as it is typed: what is wrong is said before anything runs, with exit status 2."""

import sys
from pathlib import Path

import pytest

from train.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        return main()
    except SystemExit as stop:  # tyro's way
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sst2", "--method", "magic"), "expected one of full, head, bitfit, lora"),
        (("sst2", "--adapter", "magic=3"), "for ntk_attention, got 'magic'"),
        (("sst2", "--adapter", "rank"), "expected field=value, got 'rank'"),
        (("tiny", "--steps", "0"), "--steps: expected at least 1, got 0"),
        (("tiny", "--accumulate", "3"), "a divisor of the batch size 64, got 3"),
        (("tiny", "--parallel", "pmap", "--fsdp", "2"), "expected 1 with --parallel pmap"),
        (("tiny", "--window", "0"), "--window: expected at least 1 token"),
        (("imdb", "--method", "prefix_propagation", "--pooling", "cls"), "Use --adapter pool=cls"),
        (("nosuch",), "newsgroups_long"),
        (("tiny", "--model", "/nowhere"), "or an existing path, got '/nowhere'"),
        (("sst2", "--data-dir", "/nowhere", "--model", "tiny-vit"), "in /nowhere or in a folder sst2 there"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, *arguments, "--workdir", str(tmp_path)) == 2
    shown = capsys.readouterr()
    # boxes and line breaks are the terminal's
    text = " ".join(word for word in (shown.out + shown.err).split() if word != "│")
    assert said in text
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}  # nothing that takes the folder


def test_a_folder_keeps_its_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run(monkeypatch, "tiny", "--workdir", str(tmp_path)) == 2
    assert "expected a new folder, or one of this configuration" in " ".join(capsys.readouterr().out.split())
