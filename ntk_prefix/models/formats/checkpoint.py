"""The one form that every format is read into: a Hugging Face checkpoint, whose tensors are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntk_prefix.checks import NonFiniteError, expected

__all__ = ["Checkpoint", "StoredTensor", "average", "cut"]

BLOCK = 2**18
"""Numbers that are read, checked and converted at a time: they stay in a processor's cache, and beside a model they are
nothing."""


class StoredTensor(NamedTuple):
    """A tensor as a file has it, in torch's layout ([out, in] of a linear map).

    Args:
        file: where it is.
        name: what it is called there.
        shape: by the file's header: nothing is read for it.
        dtype: the file's word for it.
        numbers: what its numbers are read as; None if they are not of floating point, such as a quantized model's integers.
        load: reads rows, the tensor's own along its first axis, one slice of them after the other.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: np.dtype | None
    load: Callable[[Iterable[slice]], Iterator[np.ndarray]]

    def rows(self, name: str, start: int, stop: int) -> StoredTensor:
        """Return some of the rows as a tensor of its own: a part of what a file has in one piece."""

        def load(bounds: Iterable[slice]) -> Iterator[np.ndarray]:
            return self.load(slice(start + b.start, start + b.stop) for b in bounds)

        return self._replace(name=name, shape=(stop - start, *self.shape[1:]), load=load)

    def blocks(self, dtype: np.dtype, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield rows from ``start`` to ``stop`` and their numbers in ``dtype``, :data:`BLOCK` at a time.

        Raises:
            UsageError: they are of another kind, such as integers of a quantized model, or not as many as the header says.
            NonFiniteError: one is NaN or infinite, in ``dtype``.
        """
        if self.numbers is None:
            raise expected(
                f"{self.file}: {self.name}",
                "floating point numbers of 16, 32 or 64 bits",
                self.dtype,
                "Save the model unquantized, in one of them",
            )
        if not self.shape:
            raise expected(f"{self.file}: {self.name}", "rows of numbers", "a single one")
        stop = self.shape[0] if stop is None else stop
        if not math.prod(self.shape):
            return
        step = max(1, BLOCK // math.prod(self.shape[1:]))
        bounds = [slice(row, min(row + step, stop)) for row in range(start, stop, step)]
        for rows, stored in zip(bounds, self.load(bounds), strict=True):
            with np.errstate(all="ignore"):
                values = stored.astype(dtype, copy=False)
            if values.shape != (wanted := (rows.stop - rows.start, *self.shape[1:])):
                raise expected(f"{self.file}: {self.name}", f"rows of shape {wanted}", values.shape)
            if not _finite(values):
                extremes = f"{values.min()} to {values.max()} in {values.dtype.name}"
                raise NonFiniteError(f"{self.file}: {self.name}: expected finite numbers, got {extremes}.")
            yield rows, values

    def equals(self, other: StoredTensor) -> bool:
        """Return whether two tensors are the same, block by block up to the first difference."""
        if self.shape != other.shape:
            return False
        blocks = (tensor.blocks(np.dtype(np.float32)) for tensor in (self, other))
        return all(np.array_equal(a, b) for (_, a), (_, b) in zip(*blocks, strict=True))

    def read(self, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """Return all numbers; errors are those of :meth:`blocks`."""
        values = np.empty(self.shape, dtype)
        for rows, block in self.blocks(values.dtype):
            values[rows] = block
        return values


def _finite(values: np.ndarray) -> bool:
    """Return whether floating point numbers of any width are finite.

    By their bits: once the sign is shifted out, infinity's are the smallest of those that are not.
    """
    bits = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(bits)
    return bool((values.view(bits) << 1).max() < infinity << 1)


class Checkpoint(NamedTuple):
    """A checkpoint in Hugging Face's terms.

    Args:
        source: the file that the configuration comes from.
        weights: the file that says where the tensors are; it may be the same.
        config: what config.json holds.
        tensors: by Hugging Face's name.
    """

    source: Path
    weights: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def where(self) -> str:
        """What to call the checkpoint where its configuration and its tensors disagree: either may be wrong."""
        return str(self.source) if self.source == self.weights else f"{self.source} and {self.weights.name}"


def cut(tensors: Mapping[str, StoredTensor], maps: Mapping[str, tuple[str, ...]]) -> dict[str, StoredTensor]:
    """Return tensors with some linear maps in parts, which a file has in one piece, stacked along their outputs.

    Args:
        tensors: by name.
        maps: ending of a map's name -> what the parts are called after it.
    """
    found = {}
    for name, tensor in tensors.items():
        place, _, end = name.rpartition(".")
        parts = next((parts for map_, parts in maps.items() if f".{place}".endswith(f".{map_}")), ())
        if not parts or end not in ("weight", "bias") or not tensor.shape or tensor.shape[0] % len(parts):
            found[name] = tensor
            continue
        size = tensor.shape[0] // len(parts)
        for i, part in enumerate(parts):
            own = f"{place}.{part}.{end}"
            found[own] = tensor.rows(own, i * size, (i + 1) * size)
    return found


def average(name: str, parts: Sequence[StoredTensor], axis: int | None) -> StoredTensor:
    """Return the average of tensors of one shape; with an axis, of what they make of as many inputs: side by side."""

    def load(bounds: Iterable[slice]) -> Iterator[np.ndarray]:
        bounds = list(bounds)
        for rows in zip(*(part.load(bounds) for part in parts), strict=True):
            together = [np.asarray(each, np.float32) / np.float32(len(parts)) for each in rows]
            yield np.sum(together, axis=0) if axis is None else np.concatenate(together, axis=axis)

    shape = list(parts[0].shape)
    if axis is not None:
        shape[axis] *= len(parts)
    return parts[0]._replace(name=name, shape=tuple(shape), load=load)
