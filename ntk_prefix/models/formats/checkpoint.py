"""The one form that every format is read into: a Hugging Face checkpoint, whose tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntk_prefix.checks import NonFiniteError, expected

__all__ = ["Checkpoint", "StoredTensor"]


class StoredTensor(NamedTuple):
    """A tensor as a file has it, in torch's layout ([out, in] of a linear map).

    Args:
        file: where it is.
        name: what it is called there.
        shape: by the file's header: nothing is read for it.
        dtype: the file's word for it.
        floating: whether that means floating point numbers.
        load: reads the numbers.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    floating: bool
    load: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """Return the numbers in float32.

        Raises:
            UsageError: they are of another kind, such as integers of a quantized model.
            NonFiniteError: one is NaN or infinite, in float32.
        """
        if not self.floating:
            raise expected(
                f"{self.file}: {self.name}",
                "floating point numbers of 16, 32 or 64 bits",
                self.dtype,
                "Save the model unquantized, in one of them",
            )
        with np.errstate(all="ignore"):
            values = np.asarray(self.load(), np.float32)
            # NaN goes through both; no array of the tensor's size is made for it
            extremes = [values.min(), values.max()] if values.size else []
        if not np.isfinite(extremes).all():
            raise NonFiniteError(
                f"{self.file}: {self.name}: expected finite numbers, got {extremes[0]} to {extremes[1]}."
            )
        return values


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
