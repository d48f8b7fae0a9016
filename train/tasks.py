"""Tasks: how the rows of ``train.sources`` are split, and how they become tokens or images.

Splits. ``test`` is the public test split, or the public dev split where that test has no labels (GLUE); look at it
once. It may be another data set's, as that of metamath is. Where a source has none, such as a single file, a fifth of its
train split is set aside, repeated inputs left out first. ``validation`` is split off train, unless somebody's own data have
one. Both are stratified and the same for every ``seed``: that draws only the ``train_size`` rows to train on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer

from ntk_prefix.checks import UsageError, expected
from ntk_prefix.models import load_tokenizer
from train.assets import AssetError
from train.config import DataConfig
from train.data import Dataset, ImageFormat, objects
from train.ranking_data import OTHERS, encoded, pairs, read_generated
from train.sources import Columns, Kind, read, spec_of
from train.unrelated import NONE, REVIEWS, texts

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Task",
    "encode_texts",
    "ending_token",
    "exact_match",
    "extract_answer",
    "load",
]

logger = logging.getLogger(__name__)

SPLIT_SEED = 20_26
"""Draws validation and test rows: the same for every run."""

TEST_FRACTION = 0.2
"""Of a train split, set aside where there is no public test split."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A task with its rows, ready for ``train.data``; fields as in ``load``."""

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    source: str
    """Where the rows come from, for the record."""
    tokenizer: Tokenizer | None = None
    end_id: int | None = None
    """The token that ends an answer; causal language modeling only."""
    unrelated: Dataset | None = None
    """Text that forgetting is measured on, see :mod:`train.unrelated`; causal language modeling only."""

    def __str__(self) -> str:
        """How many rows of what, for the log."""
        rows = ", ".join(f"{getattr(self, split).rows:,} {split}" for split in ("train", "validation", "test"))
        classes = f" of {self.num_labels} classes" if self.label_names else ""
        return f"{self.name}: {rows} rows{classes}; {self.source}"

    @property
    def num_labels(self) -> int:
        """How many classes; 0 for causal language modeling."""
        return len(self.label_names)

    @property
    def metric(self) -> Literal["accuracy", "exact_match", "identification"]:
        """Return what is reported."""
        if self.kind == "ranking":
            return "identification"
        return "exact_match" if self.kind == "causal-lm" else "accuracy"


def load(
    name: str,
    settings: DataConfig,
    *,
    tokenizer: Tokenizer | Path | str | None = None,
    image_mean: tuple[float, float, float] = IMAGENET_MEAN,
    image_std: tuple[float, float, float] = IMAGENET_STD,
    seed: int = 0,
    test_rows: str = "",
) -> Task:
    """Return a task and its three splits.

    Args:
        name: one of ``train.sources.TASKS``.
        settings: what of the rows is taken, and how long texts and how large images are. ``train_size`` rows are drawn
            with ``seed``, stratified; ``test_size`` rows are the same for every seed; ``test_beyond`` leaves out the rows
            that a ``test_size`` of this many would draw. Classification truncates to ``max_length`` (the longer sentence
            of a pair first); in causal language modeling train rows that are longer are left out, others truncated,
            prompts never.
        tokenizer: the model's: a ``Tokenizer``, a tokenizer.json, or a folder with one. None leaves text as it is.
        image_mean, image_std: what the backbone wants; ImageNet's mean and deviation by default.
        seed: of the train rows.
        test_rows: who asks for so many of the test split, for errors: a flag of another name.

    Raises:
        ValueError: an unknown task; a size larger than what there is; a missing column; an unknown or missing label; an
            empty split or text.
        FileNotFoundError: a folder without the task.
        AssetError: rows that no asset has, or that cannot be fetched.
    """
    spec = spec_of(name, settings.columns)
    if not isinstance(seed, int) or seed < 0:
        raise expected("seed", "an integer >= 0", repr(seed))
    max_length = settings.max_length
    text = spec.kind != "image-classification"
    encoder = _tokenizer(tokenizer) if text and tokenizer is not None else None
    raw, source, label_names = read(name, settings.data_dir, settings.columns)
    if spec.kind == "ranking":
        raw = {
            split: pairs(f"{name}, {split} split", columns, max_length, settings.suffix_length)
            for split, columns in raw.items()
        }
    train = raw["train"]
    if "test" in raw:
        test = raw["test"]
    else:
        train, test = _split(f"{name}, test rows", _without_repeats(train), TEST_FRACTION, SPLIT_SEED)
        source += f"; test: {TEST_FRACTION:.0%} of its train split, ours"
    size = settings.validation_size
    if "validation" in raw:
        validation = raw["validation"]
        if size is not None and size < _rows_of(validation):
            validation = _split(f"{name}, validation_size", validation, size, SPLIT_SEED)[1]
    else:
        size = min(0.1, 1000 / _rows_of(train)) if size is None else size
        train, validation = _split(f"{name}, validation_size", train, size, SPLIT_SEED)
        if not _rows_of(train):
            raise expected("--validation-size", f"fewer than all {_rows_of(validation)} training rows", size)
    if settings.train_size is not None:
        train = _split(f"{name}, train_size", train, settings.train_size, seed)[1]
    if settings.test_beyond:
        test = _split(f"{name}, test_beyond", test, settings.test_beyond, SPLIT_SEED)[0]
        if not _rows_of(test):
            raise UsageError(f"{name}, test_beyond: expected fewer than all {settings.test_beyond} test rows.")
    if settings.test_size is not None:
        test = _split(test_rows or f"{name}, test_size", test, settings.test_size, SPLIT_SEED)[1]

    end_id = ending_token(encoder) if encoder is not None and spec.kind == "causal-lm" else None
    image = None if text else ImageFormat(size=settings.image_size, mean=image_mean, std=image_std)
    pad_id = _pad_id(encoder) if encoder is not None else 0

    def ranked(columns: Columns) -> Dataset:
        others = (settings.negatives, settings.generated_negatives) if columns is train else (OTHERS, OTHERS)
        written: dict[str, list[str]] = {}
        if settings.generated is not None and others[1]:
            # for the validation split nothing need be written
            written = read_generated(settings.generated, () if columns is validation else columns["prefix"])
            if columns is not validation and (lacking := sum(prefix not in written for prefix in columns["prefix"])):
                logger.warning(
                    "%s: of %d rows %d have no generated text. Write them for the rows of this run: "
                    "python -m train.write_negatives with its task, seed, --train-size, --validation-size and --test-size",
                    name,
                    len(columns["prefix"]),
                    lacking,
                )
        lengths = (max_length, settings.suffix_length)
        return Dataset(encoded(encoder, columns, lengths, others, written), pad_id=pad_id, longest=max(lengths))

    def dataset(columns: Columns, drop: bool = False) -> Dataset:
        if spec.kind == "ranking":
            return ranked(columns)
        arrays = {key: _array(values) for key, values in columns.items() if key != "label"}
        if "label" in columns:
            arrays["labels"] = np.asarray(columns["label"], np.int32)
        if encoder is not None:
            if spec.kind == "causal-lm":
                arrays |= _encode_answers(encoder, columns, max_length, settings.prompt_template)
            else:
                arrays |= encode_texts(encoder, columns, max_length)
        if drop:
            arrays = _without_long(name, arrays, max_length)
        return Dataset(arrays, pad_id=pad_id, image=image, longest=max_length)

    unrelated = None
    if encoder is not None and end_id is not None and settings.unrelated != NONE:
        unrelated = _unrelated(encoder, settings, pad_id)
    return Task(
        name=name,
        kind=spec.kind,
        label_names=label_names,
        train=dataset(train, drop=end_id is not None),
        validation=dataset(validation),
        test=dataset(test),
        source=source,
        tokenizer=encoder,
        end_id=end_id,
        unrelated=unrelated,
    )


def extract_answer(text: str) -> Decimal | None:
    """Return the number after the first ``####``, as in GSM8K's own evaluation; None if there is none.

    Commas are left out; the value counts, not its form: 18 and 18.00 are equal. Of 1/2 and 1e3 the 1 is not the number.
    """
    found = re.search(r"####\s*\$?(-?[0-9.,]+)(?![0-9.,]|\s*/|[eE][+-]?[0-9])", text)
    return _value(found.group(1)) if found else None


def metamath_answer(text: str) -> Decimal | None:
    """Return the number after the last "The answer is", which MetaMathQA's answers end with; None if there is none.

    As in peft's method comparison, but for what is no number there: that divides fractions out and compares other text as
    it stands, which of GSM8K's whole numbers makes a difference only where a model answers 36/2 for 18.
    """
    found = re.findall(r"The (?:final )?answer is:? \s*\$?(-?[0-9][0-9.,]*)(?![0-9.,]*\s*/)", text)
    return _value(found[-1]) if found else None


def marked_answer(text: str) -> Decimal | None:
    """Return the number that a text marks as its answer, as GSM8K's or else as MetaMathQA's do."""
    return extract_answer(text) if "####" in text else metamath_answer(text)


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, whatever stands before it; None if there is none."""
    # a hyphen behind a digit or a bracket takes away
    found = re.findall(r"(?:(?<![0-9)])-)?[0-9](?:[0-9.,]*[0-9])?", text)
    return _value(found[-1]) if found else None


def exact_match(generated: str, reference: str, *, marked: bool = True) -> bool:
    """Return whether a generated answer ends in the same number as the reference; no number is never right.

    A reference that marks no number is not one of GSM8K's or MetaMathQA's: then the texts are compared, but for case and
    white space; those after ``####`` if the reference has it.

    Args:
        generated: what the model wrote.
        reference: the true answer, its number after ``####`` or "The answer is".
        marked: the model's number must stand after one of them too; else its last number counts, which a model that was
            not taught that form can be right by.
    """
    wanted = marked_answer(reference)
    if wanted is not None:
        return wanted == (marked_answer(generated) if marked else last_number(generated))
    if "####" in reference:
        generated, reference = (text.partition("####")[2] for text in (generated, reference))
    return generated.casefold().split() == reference.casefold().split()


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


# ------------------------------------------------------------------------------------------- splits


def _rows_of(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _taken(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _split(where: str, columns: Columns, size: int | float, seed: int) -> tuple[Columns, Columns]:
    """Return the rest and a part of ``size`` rows (or that fraction), stratified by label, both in their first order."""
    rows = _rows_of(columns)
    wanted = round(size * rows) if size < 1 else int(size)
    if not 0 < wanted <= rows:
        raise expected(where, f"a size of 1 to {rows} rows, or a fraction of them", size)
    if wanted == rows:
        return _taken(columns, np.arange(0)), columns
    try:
        rest, part = train_test_split(
            np.arange(rows), test_size=wanted, random_state=seed, stratify=columns.get("label")
        )
    except ValueError as error:  # too few rows of a class, or fewer rows than classes
        raise UsageError(
            f"{where}: expected {wanted} of {rows} rows of all classes, at least one row per class on both sides, but {error}"
        ) from None
    return _taken(columns, np.sort(rest)), _taken(columns, np.sort(part))


def _without_repeats(columns: Columns) -> Columns:
    """Keep each input once: a repeated one could stand on both sides of a split."""
    if "image" in columns:
        keys: list[Any] = [
            image if isinstance(image, bytes) else (image.shape, image.tobytes()) for image in columns["image"]
        ]
    else:
        names = [name for name in ("text", "text_pair", "question", "prefix", "suffix") if name in columns]
        keys = list(zip(*(columns[name] for name in names), strict=True))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    if len(first) < len(keys):
        logger.info("%d rows with a repeated input are left out", len(keys) - len(first))
    return _taken(columns, np.sort(list(first.values())))


# ------------------------------------------------------------------------------------------- tokens


def _tokenizer(given: Tokenizer | Path | str) -> Tokenizer:
    """Return a tokenizer of our own, without the truncation and padding that the file may ask for."""
    if not isinstance(given, Tokenizer):
        path = Path(os.path.expanduser(given))
        found = load_tokenizer(path.parent if path.name == "tokenizer.json" else path)
        if found is None:
            raise FileNotFoundError(f"tokenizer: expected a tokenizer.json or a folder with one, got {given}.")
        given = found
    own = Tokenizer.from_str(given.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def _first_known(tokenizer: Tokenizer, tokens: Sequence[str]) -> int | None:
    return next((found for token in tokens if (found := tokenizer.token_to_id(token)) is not None), None)


def ending_token(tokenizer: Tokenizer) -> int:
    """Return the token that ends an answer: that of a chat model's turn, or of a text."""
    tokens = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
    found = _first_known(tokenizer, tokens)
    if found is None:
        raise expected("tokenizer", f"one with a token that ends an answer ({', '.join(tokens)})", "none")
    return found


def _pad_id(tokenizer: Tokenizer) -> int:
    """Return a token to pad with: any does, for padding is masked; some models count positions by it."""
    return _first_known(tokenizer, ("[PAD]", "<pad>", "<|endoftext|>")) or 0


def _array(values: Sequence[Any]) -> np.ndarray:
    """Return rows as a column: stacked if they are images of one size, else an object array."""
    if len(values) and isinstance(values[0], np.ndarray) and len({value.shape for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _token_column(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return objects([np.array(ids, np.int32) for ids in rows])


def encode_texts(tokenizer: Tokenizer, columns: Columns, max_length: int) -> dict[str, np.ndarray]:
    """Return the tokens of sentences, or of pairs with their token types; truncated, special tokens kept.

    Args:
        tokenizer: without padding; its truncation is set.
        columns: ``text``, and ``text_pair`` for pairs.
        max_length: tokens of a row at most.
    """
    tokenizer.enable_truncation(max_length)
    pairs = "text_pair" in columns
    rows = list(zip(columns["text"], columns["text_pair"], strict=True)) if pairs else columns["text"]
    encodings = tokenizer.encode_batch_fast(rows)
    encoded = {"input_ids": _token_column([one.ids for one in encodings])}
    if pairs:
        encoded["token_type_ids"] = _token_column([one.type_ids for one in encodings])
    return encoded


def _unrelated(tokenizer: Tokenizer, settings: DataConfig, pad_id: int) -> Dataset | None:
    """Return text whose every token but the first is to be said; None if it cannot be had, and nobody asked for it."""
    try:
        columns = {"text": texts(settings.unrelated or REVIEWS, settings.unrelated_rows)}
    except AssetError:
        if settings.unrelated is not None:
            raise
        return None
    tokens = encode_texts(tokenizer, columns, settings.unrelated_length)["input_ids"]
    tokenizer.no_truncation()
    if not (kept := [ids for ids in tokens if len(ids) > 1]):
        raise expected("--unrelated", "texts of two tokens or more", f"none in {settings.unrelated}")
    return Dataset({"input_ids": _token_column(kept), "prompt_length": np.ones(len(kept), np.int32)}, pad_id=pad_id)


def _encode_answers(
    tokenizer: Tokenizer, columns: Columns, max_length: int, template: str | None = None
) -> dict[str, np.ndarray]:
    """Return prompt and answer in one row; the loss is on the answer and the token that ends it."""
    if template is not None:
        pass
    elif tokenizer.token_to_id("<|im_start|>") is not None:
        template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    else:
        template = "Question: {}\nAnswer:\n"
    # GSM8K marks its arithmetic for a calculator, <<48/2=24>>: not part of the text
    answers = [re.sub(r"<<[^>]*>>", "", answer) for answer in columns["answer"]]
    prompts = [one.ids for one in tokenizer.encode_batch_fast([template.replace("{}", q) for q in columns["question"]])]
    ends = [one.ids for one in tokenizer.encode_batch_fast(answers, add_special_tokens=False)]
    rows = [prompt + answer + [ending_token(tokenizer)] for prompt, answer in zip(prompts, ends, strict=True)]
    longest = max(map(len, prompts))
    if longest >= max_length:
        raise expected("max_length", f"more than the {longest} tokens of the longest prompt", max_length)
    return {
        "input_ids": _token_column([row[:max_length] for row in rows]),
        "prompt_ids": _token_column(prompts),
        "prompt_length": np.array([len(prompt) for prompt in prompts], np.int32),
        "length": np.array([len(row) for row in rows], np.int32),
    }


def _without_long(name: str, columns: dict[str, np.ndarray], max_length: int) -> dict[str, np.ndarray]:
    """Leave out rows whose answer is cut off: they would teach to stop in the middle, or never."""
    whole = columns["length"] <= max_length
    if not whole.any():
        raise expected(name, f"max_length >= {columns['length'].min()} for any row to fit", max_length)
    if not whole.all():
        logger.warning(
            "%s: %d of %d train rows have more than max_length = %d tokens and are left out",
            name, (~whole).sum(), len(whole), max_length,
        )  # fmt: skip
    return {key: column[whole] for key, column in columns.items()}
