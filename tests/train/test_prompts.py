"""Files of text as users have them: marks in front, ends of lines of every system, texts that are too short."""

from pathlib import Path

import numpy as np
import pytest

from ntk_prefix.checks import UsageError
from train.prompts import padded, some_texts, whole_text

FORM_FEED, LINE_SEPARATOR = "one\x0ctext", "another\u2028one\x85"
"""Of which str.splitlines would make four."""


def test_a_mark_in_front_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert whole_text(tmp_path / "prompt.txt", "--prompt") == "caf\u00e9\r\n"
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(UsageError, match=r"--prompt: expected some text, got .*prompt.txt, which has none"):
        whole_text(tmp_path / "prompt.txt", "--prompt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_is_a_line_and_nothing_less(tmp_path: Path, end: str) -> None:
    (tmp_path / "texts.txt").write_bytes(end.join([FORM_FEED, "", " ", LINE_SEPARATOR, ""]).encode())
    assert some_texts(tmp_path / "texts.txt", "--queries") == [FORM_FEED, LINE_SEPARATOR]


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv"])
def test_a_folder_is_no_file_of_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=name):
        some_texts(tmp_path / name, "--queries")


def test_short_texts_are_left_out_and_the_flag_is_named() -> None:
    found = padded([[1, 2, 3], [], [4], [5, 6]], 2, shortest=2)
    np.testing.assert_array_equal(found["input_ids"], [[1, 2], [5, 6]])
    with pytest.raises(UsageError, match="--unrelated: expected at least 1 texts of 2 tokens or more, got 0"):
        padded([[1], []], 8, flag="--unrelated", fewest=1, shortest=2)
