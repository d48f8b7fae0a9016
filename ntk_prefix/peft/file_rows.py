"""Heads of different length as one array of a file: what fills the shorter ones up is left out.

A compressed prompt has few anchors in one head and many in another, and a layer's arrays have as many rows for each head as
the largest needs: behind its own ones a head repeats its last row, of mass 0. In the file an array [J, R, ...] of such heads
is [1, R_1 + ... + R_J, ...], each head's rows up to the first that is repeated until its end, beside ``<name>.lengths``, int32
[J], the R_j. The largest is R. An array that has no such rows, or next to nothing else, is written as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array

__all__ = ["ROWS", "lengthened", "shortened"]

ROWS = ".lengths"
"""What stands behind the name of a shortened array in that of its heads' numbers of rows."""

MOST = 128
"""How many times an array may grow as it is read, and so shrink before: a damaged file must not ask for all memory there is."""


def shortened(name: str, value: Array | np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of a file that hold an array [J, R, ...]: itself, or what its heads have, and how much that is."""
    array = np.asarray(value)
    if array.ndim < 2 or not array.size:
        return {name: array}
    rows = array.reshape(*array.shape[:2], -1)
    differ = (rows != rows[:, -1:]).any(axis=2)
    # one of those that are alike stays
    counts = array.shape[1] - np.argmax(differ[:, ::-1], axis=1) + 1
    counts = np.where(differ.any(axis=1), counts, 1).astype(np.int32)
    counts[np.argmax(counts)] = array.shape[1]
    if not 1 < array.shape[0] * array.shape[1] / counts.sum() <= MOST:
        return {name: array}
    own = np.concatenate([head[:count] for head, count in zip(array, counts, strict=True)])
    return {name: own[None], f"{name}{ROWS}": counts}


def lengthened(file: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays that a file holds, with as many rows for each head.

    Args:
        file: its name, for errors.
        tensors: what is in it.

    Raises:
        UsageError: numbers of rows that do not fit their array, naming it.
    """
    found = dict(tensors)
    for name in [name for name, value in tensors.items() if name.endswith(ROWS) and value.dtype == np.int32]:
        what, counts, own = f"{file}: {name}", found.pop(name), found.get(name.removesuffix(ROWS))
        if own is None or own.ndim < 2 or own.shape[0] != 1 or counts.ndim != 1 or not counts.size or counts.min() < 1:
            raise expected(what, "numbers above 0, one for each head of an array beside it", counts.tolist()[:4])
        total, largest, ends = own.shape[1], int(counts.max()), np.cumsum(counts, dtype=np.int64)
        if ends[-1] != total:
            raise expected(what, f"numbers of rows that sum up to {total}", ends[-1])
        if len(counts) * largest > MOST * total:
            raise expected(what, f"heads of {MOST} times {total} rows in all at most", f"{len(counts)} of {largest}")
        # a row of each head's own, then its last again and again
        index = np.minimum(np.arange(largest), counts[:, None] - 1) + (ends - counts)[:, None]
        found[name.removesuffix(ROWS)] = own[0][index]
    return found
