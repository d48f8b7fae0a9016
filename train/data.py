"""From the rows of a data set to batches: every batch is a pure function of (seed, batch number).

A run's place in its data is therefore one integer, on any number of processes: process p of P holds rows
``p B/P .. (p+1) B/P`` of the same global batch of B rows. Batch i of seed s is rows ``i B .. (i+1) B`` of the endless
stream of epochs, each epoch its own shuffle of all rows; batches run over the ends of epochs and are always full.
*Grouped* batches are drawn many at a time and divided among themselves by length, then shuffled: less padding, and each
still a function of its number.

Text is padded to the smallest *bucket* that holds the whole global batch, so a step compiles at most once per bucket;
one bucket, ``buckets=(128,)``, is a fixed length.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
from PIL import Image

from ntk_prefix.checks import expected
from train.images import decoded

__all__ = [
    "BUCKETS",
    "IGNORED",
    "Batch",
    "Dataset",
    "ImageFormat",
    "by_length",
    "evaluation_batches",
    "objects",
    "parts",
    "prompt_batches",
    "train_batches",
]

Batch = dict[str, np.ndarray]

BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Lengths that text is padded to, if not told otherwise."""

IGNORED = -100
"""The label of a position that carries no loss, as in Hugging Face models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """What a backbone wants of an image: ``(resized / 255 - mean) / std``, float32 [size, size, 3]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Mapping[str, np.ndarray]):
    """A split: columns of equal length, read-only.

    Args:
        columns: what there is of
            ``input_ids``       object, each int32 [tokens]
            ``token_type_ids``  object, the same shapes; of models that tell two sentences apart
            ``labels``          int32; classification
            ``prompt_length``   int32; causal language modeling: the loss is on the tokens from here on
            ``prompt_ids``      object, each int32; what to generate from
            ``candidates``      int8 [rows, C], ``candidate_ids`` and ``candidate_mask`` int32 [rows, C, tokens], ``pair``
                                int32; ranking, see :mod:`train.ranking_data`
            ``image``           uint8 [rows, h, w] or [rows, h, w, 3], or object of such, or of bytes of picture files
            and columns that no batch holds: ``text``, ``question``, ``answer``, ...
        pad_id: token that pads.
        image: how images are handed out.
        longest: tokens that a row has at most, if that is known; no batch is padded beyond it, for a model may have as many
            positions and no more.

    Raises:
        ValueError: no row, or columns of different length.
    """

    columns: Mapping[str, np.ndarray]
    pad_id: int = 0
    image: ImageFormat | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        """Check, and protect what is shared."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise expected("columns", "equal lengths of at least one row", lengths)
        for column in self.columns.values():
            column.flags.writeable = False

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def has_images(self) -> bool:
        """Return whether batches hold images rather than tokens."""
        return "image" in self.columns and self.image is not None

    def bounded(self, buckets: Sequence[int]) -> Sequence[int]:
        """Return lengths to pad to, none beyond :attr:`longest`."""
        if self.longest is None:
            return buckets
        return (*(length for length in buckets if length < self.longest), self.longest)

    @property
    def rows(self) -> int:
        """How many rows; ``len`` counts columns, as for any mapping."""
        return len(next(iter(self.columns.values())))


def train_batches(
    split: Dataset,
    batch_size: int,
    seed: int,
    start: int = 0,
    buckets: Sequence[int] = BUCKETS,
    process_index: int = 0,
    process_count: int = 1,
    grouped: int = 1,
) -> Iterator[tuple[int, Batch]]:
    """Return batches without end, from number ``start`` on.

    Args:
        split: the rows.
        batch_size: rows of a global batch, over all processes.
        seed: of the order; every epoch has another.
        start: number of the first batch: as many as have been used before.
        buckets: lengths that text is padded to.
        process_index, process_count: which share of each batch this process holds.
        grouped: batches that are drawn together and divided by length; 1 leaves the order as it is drawn.

    Returns:
        Pairs (i, batch). Of text: ``input_ids``, ``attention_mask`` and, where the split has them, ``token_type_ids``,
        all int32 [rows, bucket]; ``labels`` int32 [rows], or [rows, bucket] with ``IGNORED`` outside of the answer, not
        shifted, for causal language modeling, and of rankings their candidates instead.
        Of images: ``pixel_values`` float32 [rows, size, size, 3] and
            ``labels``.
        ``weight`` float32 [rows] is 1.

    Raises:
        ValueError: at the call: a split without tokens or images, rows that fit no bucket, a share that is not whole.
    """
    share, buckets = _share(batch_size, process_index, process_count), split.bounded(buckets)
    lengths = _lengths(split, buckets)
    # grain shuffles epoch e with seed + e: neighboring seeds would share epochs
    (order_seed,) = np.random.SeedSequence(seed).generate_state(1)
    size = batch_size * grouped
    # as good as endless
    groups = (1 << 53) // size
    weight = np.ones(batch_size, np.float32)

    @functools.lru_cache(maxsize=1)
    def group(number: int) -> np.ndarray:
        drawn = _drawn(split.rows, int(order_seed), range(number * size, (number + 1) * size))
        if lengths is None or grouped == 1:
            return drawn.reshape(grouped, batch_size)
        by_length = drawn[np.argsort(lengths[drawn], kind="stable")]
        return np.random.default_rng([order_seed, number]).permutation(by_length.reshape(grouped, batch_size))

    def collate(number: int) -> Batch:
        rows = group(number // grouped)[number % grouped]
        return _collate(split, rows[share], weight[share], _bucket(lengths, rows, buckets))

    # a thread keeps a few batches ready: images take a GPU's step to resize
    ready = (
        grain.MapDataset.range(groups * grouped)
        .map(collate)[start:]
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    )
    return zip(itertools.count(start), ready, strict=False)


def parts(batch: Batch, count: int) -> list[Batch]:
    """Return a batch in so many parts of equally many rows, in their order.

    Raises:
        UsageError: its rows, those of one process, are no multiple of ``count``.
    """
    rows = len(next(iter(batch.values())))
    if rows % count:
        raise expected("--accumulate", f"a divisor of the {rows} rows of a step that a process holds", count)
    cut = {name: np.split(column, count) for name, column in batch.items()}
    return [{name: columns[part] for name, columns in cut.items()} for part in range(count)]


FEW = 4096
"""Rows up to which an epoch's order is drawn as a whole and kept."""


def _drawn(rows: int, seed: int, places: Iterable[int]) -> np.ndarray:
    """Return the rows that stand at these places of an order without end, every epoch of it shuffled by grain."""
    if rows > FEW:
        return _shuffled(rows, seed, places)
    return np.asarray([_epoch(rows, seed, place // rows)[place % rows] for place in places])


@functools.lru_cache(maxsize=64)
def _epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return one epoch's order [rows].

    Grain looks for each of few rows among 65,536 places, milliseconds per row; runs of one seed have this in common.
    """
    return _shuffled(rows, seed, range(epoch * rows, (epoch + 1) * rows))


def _shuffled(rows: int, seed: int, places: Iterable[int]) -> np.ndarray:
    order = grain.MapDataset.range(rows).shuffle(seed=seed)
    return np.asarray([order[place] for place in places])


def evaluation_batches(
    split: Dataset,
    batch_size: int,
    buckets: Sequence[int] = BUCKETS,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Return every row once, in order; batches as those of ``train_batches``. ``by_length`` first makes less padding.

    The last batch is filled up to ``batch_size`` with rows of ``weight`` 0, so row r stands in batch
    ``r // batch_size`` at place ``r % batch_size``.

    Raises:
        ValueError: as ``train_batches``.
    """
    share, buckets = _share(batch_size, process_index, process_count), split.bounded(buckets)
    lengths = _lengths(split, buckets)
    return (
        _collate(split, rows[share], weight[share], _bucket(lengths, rows, buckets))
        for rows, weight in _in_order(split.rows, batch_size)
    )


def by_length(split: Dataset) -> tuple[Dataset, np.ndarray]:
    """Return the split with its rows in order of length, and the place [rows] of each row of the split in it."""
    if split.has_images or "input_ids" not in split:
        return split, np.arange(split.rows)
    order = np.argsort([len(tokens) for tokens in split["input_ids"]], kind="stable")
    columns = {name: column[order] for name, column in split.items()}
    return dataclasses.replace(split, columns=columns), np.argsort(order)


def prompt_batches(
    split: Dataset,
    batch_size: int,
    buckets: Sequence[int] = BUCKETS,
    side: Literal["left", "right"] = "left",
) -> Iterator[Batch]:
    """Return what to generate from: the prompts of a causal language modeling split, once each and in order.

    Args:
        split: with a column ``prompt_ids``.
        batch_size: rows of a batch; the last is filled up with rows of ``weight`` 0.
        buckets: lengths that prompts are padded to.
        side: where the padding goes. Left lets every row be continued at the same column.

    Returns:
        Batches of ``input_ids`` and ``attention_mask``, int32 [rows, bucket], and ``weight`` float32 [rows].

    Raises:
        ValueError: a split without prompts, a prompt that fits no bucket.
    """
    lengths = _lengths(split, buckets, "prompt_ids")
    return (
        _padded(split, "prompt_ids", rows, _bucket(lengths, rows, buckets), side) | {"weight": weight}
        for rows, weight in _in_order(split.rows, batch_size)
    )


def objects(values: Sequence[Any]) -> np.ndarray:
    """Return a column [rows] of objects, each as it is: arrays of one shape are not stacked."""
    column = np.empty(len(values), object)
    for row, value in enumerate(values):
        column[row] = value
    return column


# ---------------------------------------------------------------------------------------- the parts


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return the rows of a global batch that one process holds."""
    if batch_size < 1 or batch_size % process_count:
        raise expected("batch_size", f"a positive multiple of the {process_count} processes", batch_size)
    if not 0 <= process_index < process_count:
        raise expected("process_index", f"0 to {process_count - 1}", process_index)
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _in_order(rows: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers and weights of batches; the last one is filled up with row 0 at weight 0."""
    for first in range(0, rows, batch_size):
        numbers = np.arange(first, first + batch_size)
        yield np.where(numbers < rows, numbers, 0), (numbers < rows).astype(np.float32)


def _lengths(split: Dataset, buckets: Sequence[int], column: str = "input_ids") -> np.ndarray | None:
    """Return tokens per row, None for images; refuses what cannot be batched."""
    if column == "input_ids" and split.has_images:
        return None
    if column not in split:
        raise expected(
            "split",
            f"a column {column} (give tasks.load a tokenizer) or images",
            f"columns {sorted(split)}",
        )
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise expected("buckets", "lengths in growing order", tuple(buckets))
    lengths = np.array([len(tokens) for tokens in split[column]])
    if lengths.max() > buckets[-1]:
        raise expected(
            "buckets",
            f"one that holds the longest row, {lengths.max()} tokens",
            tuple(buckets),
            "Add a longer bucket, or load the task with a smaller max_length",
        )
    return lengths


def _bucket(lengths: np.ndarray | None, rows: np.ndarray, buckets: Sequence[int]) -> int:
    if lengths is None:
        return 0
    longest = lengths[rows].max()
    return next(length for length in buckets if length >= longest)


def _collate(split: Dataset, rows: np.ndarray, weight: np.ndarray, length: int) -> Batch:
    if split.image is not None and split.has_images:
        pixels = np.stack([_pixels(split["image"][row], split.image) for row in rows])
        return {"pixel_values": pixels, "labels": split["labels"][rows], "weight": weight}
    batch = _padded(split, "input_ids", rows, length, "right")
    if "candidate_ids" in split:
        own = ("candidate_ids", "candidate_mask", "candidates", "pair")
        return batch | {name: split[name][rows] for name in own} | {"weight": weight}
    if "token_type_ids" in split:
        batch["token_type_ids"] = _padded(split, "token_type_ids", rows, length, "right")["input_ids"]
    if "prompt_length" in split:
        places = np.arange(length)[None, :]
        answer = (places >= split["prompt_length"][rows][:, None]) & (batch["attention_mask"] == 1)
        labels = np.where(answer, batch["input_ids"], np.int32(IGNORED))
    else:
        labels = split["labels"][rows]
    return batch | {"labels": labels, "weight": weight}


def _padded(split: Dataset, column: str, rows: np.ndarray, length: int, side: str) -> Batch:
    tokens = np.full((len(rows), length), 0 if column == "token_type_ids" else split.pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for place, row in enumerate(rows):
        ids = split[column][row]
        held = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        tokens[place, held], mask[place, held] = ids, 1
    return {"input_ids": tokens, "attention_mask": mask}


def _pixels(image: np.ndarray | bytes, wanted: ImageFormat) -> np.ndarray:
    image = decoded(image, "image") if isinstance(image, bytes) else image
    picture = Image.fromarray(image).convert("RGB").resize((wanted.size, wanted.size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32) / 255
    return (pixels - np.array(wanted.mean, np.float32)) / np.array(wanted.std, np.float32)
