"""Prompts and texts of a user's, for the programs that compress: read whole, or refused in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntk_prefix.artifacts import read_bytes
from ntk_prefix.checks import expected

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["padded", "prompt_ids", "some_texts", "whole_text"]

LARGEST_PROMPT = 2**26
"""Bytes of a file of text."""


def whole_text(file: Path, flag: str) -> str:
    """Return the text of a file; - is standard input.

    Raises:
        UsageError: too long, not in UTF-8, or nothing but white space.
    """
    name = "standard input" if file == Path("-") else str(file)
    content = sys.stdin.buffer.read(LARGEST_PROMPT + 1) if file == Path("-") else read_bytes(file, LARGEST_PROMPT, flag)
    if len(content) > LARGEST_PROMPT:
        raise expected(flag, f"at most {LARGEST_PROMPT:,} bytes", f"more from {name}")
    try:
        text = content.decode("utf-8-sig")  # some editors mark a file of text by its first character
    except UnicodeDecodeError as error:
        raise expected(flag, "text in UTF-8", f"{name}: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise expected(flag, "some text", f"{name}, which has none")
    return text


def some_texts(file: Path, flag: str) -> list[str]:
    """Return the texts of a file: its column "text", or its lines.

    Raises:
        UsageError: no such column, or fewer than two texts.
    """
    from train.readers import ENDINGS, open_table  # and 25 MiB of pyarrow, which not every run needs

    if file.suffix in ENDINGS:
        texts = [str(each) for each in open_table(file).column("text") if each is not None]
    else:
        # str.splitlines would end a line at a form feed too
        texts = re.split("\r\n|\r|\n", whole_text(file, flag))
    texts = [each for each in texts if each.strip()]
    if len(texts) < 2:
        raise expected(f"{flag} {file}", "at least two texts, one of them to be held out", len(texts))
    return texts


def prompt_ids(tokenizer: Tokenizer, text: str, tokens: int) -> list[int]:
    """Return the last tokens of what a decoder is to continue, behind those that its tokenizer begins every text with.

    Args:
        tokenizer: without truncation and padding. What it ends texts with is left out: nothing follows an end.
        text: the prompt.
        tokens: at most, those that begin it included, but one of the text in any case.
    """
    encoded = tokenizer.encode(text)
    own = [place for place, added in enumerate(encoded.special_tokens_mask) if not added]
    first, last = (own[0], own[-1] + 1) if own else (len(encoded.ids),) * 2
    return encoded.ids[:first] + encoded.ids[max(first, last - max(tokens - first, 1)) : last]


def padded(
    ids: Sequence[Sequence[int]],
    tokens: int,
    width: int = 0,
    *,
    flag: str = "--queries",
    fewest: int = 2,
    shortest: int = 1,
) -> dict[str, np.ndarray]:
    """Return texts as ``input_ids`` and ``attention_mask``, padded on the right.

    Args:
        ids: of each text.
        tokens: of a text, at most.
        width: to pad to, if the longest text is shorter.
        flag: that the texts came with.
        fewest: texts.
        shortest: tokens of a text; one of fewer is left out.

    Raises:
        UsageError: fewer texts.
    """
    ids = [each[:tokens] for each in ids if len(each) >= shortest]
    if len(ids) < fewest:
        raise expected(flag, f"at least {fewest} texts of {shortest} tokens or more", len(ids))
    whole = np.zeros((len(ids), max(width, *map(len, ids))), np.int32)
    mask = np.zeros_like(whole)
    for row, each in enumerate(ids):
        whole[row, : len(each)], mask[row, : len(each)] = each, 1
    return {"input_ids": whole, "attention_mask": mask}
