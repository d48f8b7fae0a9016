"""Numbers of a tensor by its name: the same wherever they are drawn."""

import zlib

import numpy as np


def draw_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers: around 1 for what scales a norm, of a size that keeps hidden states near 1 for maps."""
    rng = np.random.default_rng(zlib.crc32(name.removeprefix("model.").encode()))
    drawn = rng.normal(size=shape)
    if "norm" in name:
        return (0.8 + 0.4 * drawn).astype(np.float32)
    spread = 0.4 if len(shape) == 1 else 0.2 if "embed" in name else 2.4 / np.sqrt(shape[-1])
    return (spread * drawn).astype(np.float32)
