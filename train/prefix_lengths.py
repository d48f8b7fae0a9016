"""Of which prefix a trained elu1 state is the state: how many tokens, head by head (theory/equivalence.md, section 4).

Where the adapter's mass is relative to that of a query's own keys, so is that of the prefix.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ntk_prefix.artifacts import read_json
from ntk_prefix.quadrature import representing_prefix

__all__ = ["HeadLength", "head_lengths", "in_words"]

NEAR = 0.01
"""The share of a head's Z / k that may be missing where tokens are counted that nearly do."""


class HeadLength(NamedTuple):
    """A trained head."""

    layer: int
    head: int
    tokens: int
    """Of the shortest prefix with this state; 0 where k has an entry that is not above 0, which no prefix has."""
    nearly: int
    """Of one whose Z is within 1 % of it, in the norm of Z / k; its k is the same."""
    size: float
    """|Z|_F."""


def head_lengths(adapter: Path) -> list[HeadLength]:
    """Return the heads of an adapter's folder, none if it has no elu1 states of full rank with a trained k."""
    from safetensors.numpy import load_file

    methods = read_json(adapter / "adapter_config.json", dict).get("methods") or [{}]
    if methods[0].get("feature_map") != "elu1" or not methods[0].get("train_k"):
        return []
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = []
    for name in sorted(key for key in tensors if key.endswith(".z") and f"{key[:-1]}k" in tensors):
        number = re.search(r"\.layers?\.(\d+)\.", name)
        for head, (z, k) in enumerate(zip(tensors[name], np.abs(tensors[f"{name[:-1]}k"]), strict=True)):
            found.append(_length(int(number[1]) if number else 0, head, z.astype(np.float64), k.astype(np.float64)))
    return sorted(found)


def _length(layer: int, head: int, z: np.ndarray, k: np.ndarray) -> HeadLength:
    size = float(np.linalg.norm(z))
    if not (k > 0).all():
        return HeadLength(layer, head, 0, 0, size)
    squares = np.square(np.linalg.svd(z / k[:, None], compute_uv=False))
    left = squares[::-1].cumsum()[::-1]
    rank = int((left > NEAR**2 * squares.sum()).sum())
    return HeadLength(layer, head, len(representing_prefix(z, k)[0]), min(rank + 1, len(k)), size)


def in_words(heads: list[HeadLength]) -> str:
    """Return a line: how many heads are prefixes, of how many tokens, and which heads are largest."""
    prefixes = [head for head in heads if head.tokens]
    largest = sorted(heads, key=lambda head: -head.size)[:3]
    named = ", ".join(f"layer {head.layer} head {head.head}" for head in largest)
    text = f"{len(prefixes)} of {len(heads)} heads are the state of a prefix"
    if prefixes:
        exact, nearly = ([getattr(head, name) for head in prefixes] for name in ("tokens", "nearly"))
        text += f": of {min(exact)} to {max(exact)} tokens, to 1 % of {min(nearly)} to {max(nearly)}"
        text += f" (median {np.median(nearly):g})"
    return f"{text}; largest Z: {named}"
