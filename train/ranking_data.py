"""Pairs of a beginning and its continuation, cut out of documents, with what else could have followed.

A document is cut where a sentence begins (between any words where no sentence ends): the words before are the prefix, those
after it the suffix. *Others of the same document* are spans of as many words that begin where a sentence does and touch
neither. Where a document is cut is a function of its text: the same for every run and seed. Documents come to a split whole,
so that no split has a part of another's.

*Generated* others were written by a decoder that read the prefix, and stand in a file of lines ``{"prefix": text,
"generated": [text, ...]}``, which ``python -m train.write_negatives`` makes.

Source: RankGen (arXiv 2205.09726): negatives in the batch, in the book, and generated.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ntk_prefix.checks import UsageError, expected
from ntk_prefix.models.ranker import marked_ids
from train.columns import Columns
from train.data import objects

__all__ = ["KINDS", "OTHERS", "Pair", "cut", "encoded", "pairs", "read_generated"]

logger = logging.getLogger(__name__)

KINDS = ("none", "true", "same document", "generated")
"""What a candidate is, by its number in the column ``candidates``."""

OTHERS = 9
"""Candidates of a kind beside the true one, where a ranker is measured."""

WORDS_A_TOKEN = 0.75
"""Of English, about: spans are cut so long that their tokens fill the lengths that are read, and little more."""


class Pair(NamedTuple):
    """What one document gives."""

    prefix: str
    suffix: str
    others: tuple[str, ...]


def cut(text: str, prefix_words: int, suffix_words: int, others: int = OTHERS) -> Pair | None:
    """Return a pair out of a document, None of one that is too short.

    Args:
        text: the document.
        prefix_words: of a prefix, at most; half as many at least.
        suffix_words: of a suffix, likewise; of the others exactly.
        others: at most; a short document has fewer.
    """
    words = re.sub(r"<br\s*/?>", " ", text).split()
    ends = [re.search(r"[.!?][\"')\]]*$", word) is not None for word in words]
    starts = [place for place in range(len(words)) if place == 0 or ends[place - 1]]
    if len(starts) < 3:
        starts = list(range(len(words)))

    def places(share: int) -> list[int]:
        fits = range(prefix_words // share, len(words) - suffix_words // share + 1)
        return [place for place in starts if place in fits and place > 0]

    if not (fit := places(1) or places(2)):
        return None
    draw = np.random.default_rng(zlib.crc32(text.encode()))
    at = int(draw.choice(fit))
    first, last = max(at - prefix_words, 0), at + suffix_words
    free = [
        place
        for place in starts
        if place + suffix_words <= len(words) and (place >= last or place + suffix_words <= first)
    ]
    chosen = draw.permutation(free)[:others].tolist() if free else []
    spans = tuple(" ".join(words[place : place + suffix_words]) for place in chosen)
    return Pair(" ".join(words[first:at]), " ".join(words[at:last]), spans)


def pairs(where: str, columns: Columns, prefix_length: int, suffix_length: int) -> Columns:
    """Return the pairs of a split as the columns ``prefix``, ``suffix`` and ``others``.

    Args:
        where: which split of which task, for errors.
        columns: whole documents, ``text``, or pairs as they are, ``prefix`` and ``suffix``.
        prefix_length, suffix_length: tokens of each that will be read.

    Raises:
        UsageError: no document is long enough.
    """
    if "prefix" in columns:
        found = [Pair(p, s, ()) for p, s in zip(columns["prefix"], columns["suffix"], strict=True)]
    else:
        lengths = [max(round(WORDS_A_TOKEN * length), 2) for length in (prefix_length, suffix_length)]
        found = [pair for text in columns["text"] if (pair := cut(text, *lengths)) is not None]
        if not found:
            least = sum(length // 2 for length in lengths)
            raise expected(
                where, f"documents of {least} words or more", "none so long", "Lower --max-length and --suffix-length"
            )
        if short := len(columns["text"]) - len(found):
            logger.info("%s: %d documents are too short to be cut and are left out", where, short)
    return {name: [getattr(pair, name) for pair in found] for name in Pair._fields}


def read_generated(file: str | Path, wanted: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return what was written behind each prefix; nothing of a file that is not there, if no prefix is wanted.

    A line that was being written when its program was stopped is left out.

    Args:
        file: of ``python -m train.write_negatives``.
        wanted: prefixes some of which have to be there.

    Raises:
        UsageError: no such file, a line of another form, or none of the prefixes.
    """
    path, found = Path(file).expanduser(), dict[str, list[str]]()
    if not path.is_file():
        if not wanted:
            return found
        raise expected("--generated", "a file of python -m train.write_negatives", f"no file {path}")
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = row["generated"]
            # a text is a sequence of texts too, of its letters
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in (row["prefix"], *texts)):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UsageError(
                f'{path}, line {number}: expected {{"prefix": text, "generated": [texts]}}, got {line[:60]!r}.'
            ) from None
        found.setdefault(row["prefix"], []).extend(texts)
    if wanted and not any(prefix in found for prefix in wanted):
        hint = "Write it with the same lengths, sizes and data"
        raise expected("--generated", "what was written behind prefixes of this run", f"others in {path}", hint)
    return found


def encoded(
    tokenizer: Tokenizer | None,
    columns: Columns,
    lengths: tuple[int, int],
    others: tuple[int, int],
    generated: Mapping[str, Sequence[str]],
) -> dict[str, np.ndarray]:
    """Return pairs as the columns of a :class:`train.data.Dataset`.

    Args:
        tokenizer: without padding and truncation; None leaves texts as they are.
        columns: of :func:`pairs`.
        lengths: tokens of a prefix and of a suffix, at most.
        others: how many candidates of the same document and how many generated ones a row has, at most.
        generated: of :func:`read_generated`.

    Returns:
        ``prefix`` and ``texts``, the candidates' (objects); ``candidates`` int8 [rows, C], what each is, see
        :data:`KINDS`, the true one first; ``pair`` int32 [rows], the first row that has the same suffix; and with a tokenizer
        ``input_ids`` (objects) of the prefix, ``candidate_ids`` and ``candidate_mask``, int32 [rows, C, T].
    """
    rows = len(columns["prefix"])
    texts, kinds = np.empty(rows, object), np.zeros((rows, 1 + sum(others)), np.int8)
    for row in range(rows):
        written = generated.get(columns["prefix"][row], ())[: others[1]]
        same = columns["others"][row][: others[0]]
        texts[row] = [columns["suffix"][row], *same, *written]
        kinds[row, : len(texts[row])] = [1] + [2] * len(same) + [3] * len(written)
    arrays: dict[str, Any] = {"prefix": objects(columns["prefix"]), "texts": texts, "candidates": kinds}
    first: dict[str, int] = {}
    arrays["pair"] = np.array([first.setdefault(text, row) for row, text in enumerate(columns["suffix"])], np.int32)
    if tokenizer is None:
        return arrays
    ids = [[marked_ids(tokenizer, text, "suffix", lengths[1]) for text in texts[row]] for row in range(rows)]
    width = max(len(each) for row in ids for each in row)
    tokens, mask = (np.zeros((*kinds.shape, width), np.int32) for _ in range(2))
    for row, candidates in enumerate(ids):
        for place, each in enumerate(candidates):
            tokens[row, place, : len(each)], mask[row, place, : len(each)] = each, 1
    prefixes = [np.array(marked_ids(tokenizer, text, "prefix", lengths[0]), np.int32) for text in columns["prefix"]]
    return arrays | {"input_ids": objects(prefixes), "candidate_ids": tokens, "candidate_mask": mask}
