"""LoRA on maps that a Hugging Face model has in one piece and ours has apart, such as ModernBERT's ``Wqkv``.

Parts of rank r each are one adapter of the whole map, of the sum of the ranks: their A one below the other, their B in blocks
on the diagonal. The other way round, each part has the rows of B that are its own outputs, and of A what these read::

    [B_q       ] [A_q]
    [          ] [   ] x  =  B_q A_q x, 0, B_v A_v x          (query and value adapted, key not)
    [       B_v] [A_v]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["joined", "parted"]

A, B = "lora_A.weight", "lora_B.weight"


def joined(
    tensors: Mapping[str, Any], fused: Mapping[str, Sequence[str]], scales: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, tuple[int, float]]]:
    """Return an adapter's tensors as those of whole maps.

    Args:
        tensors: by canonical key.
        fused: whole map -> its parts, in the order of the file; equal in size.
        scales: of each part's adapter, by the part's canonical name. The whole has that of the first one, and the others' B
            is multiplied.

    Returns:
        The tensors, and rank and scale of each map that was put together.
    """
    found, forms = dict(tensors), {}
    for whole, parts in fused.items():
        have = {i: f"{whole}.{part}" for i, part in enumerate(parts) if f"{whole}.{part}.{A}" in tensors}
        if not have:
            continue
        first = scales[next(iter(have.values()))]
        rows = {i: np.asarray(found.pop(f"{name}.{A}")) for i, name in have.items()}
        columns = {i: np.asarray(found.pop(f"{name}.{B}")) * (scales[name] / first) for i, name in have.items()}
        size, rank, at = len(next(iter(columns.values()))), sum(len(a) for a in rows.values()), 0
        found[f"{whole}.{A}"] = np.concatenate(list(rows.values()))
        b = found[f"{whole}.{B}"] = np.zeros((size * len(parts), rank), np.float32)
        for i, block in columns.items():
            b[i * size : (i + 1) * size, at : at + block.shape[1]] = block
            at += block.shape[1]
        forms[whole] = rank, first
    return found, forms


def parted(
    tensors: Mapping[str, np.ndarray], fused: Mapping[str, Sequence[str]]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Return an adapter's tensors with whole maps in parts.

    What a part does not read of A is left out; a part that nothing is added to has no adapter. Where B is zero, as before
    training, all parts have all of A.

    Returns:
        The tensors, and for each part its rank and the whole's; 0 if it has no adapter.
    """
    found, ranks = dict(tensors), {}
    for whole, parts in fused.items():
        a, b = tensors.get(f"{whole}.{A}"), tensors.get(f"{whole}.{B}")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(b) % len(parts) or b.shape[1] != len(a):
            continue
        del found[f"{whole}.{A}"], found[f"{whole}.{B}"]
        for part, rows in zip(parts, np.split(b, len(parts)), strict=True):
            read = rows.any(axis=0) | (not b.any())
            ranks[f"{whole}.{part}"] = int(read.sum()), len(a)
            if read.any():
                found[f"{whole}.{part}.{A}"], found[f"{whole}.{part}.{B}"] = a[read], rows[:, read]
    return found, ranks
