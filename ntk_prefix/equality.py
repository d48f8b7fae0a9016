"""What ``==`` says of results with arrays in them, whose own ``==`` is an array and no answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

__all__ = ["EqualByValue"]


class EqualByValue:
    """A dataclass, made with ``eq=False``, that equals another of its kind with the same numbers, dtypes and settings.

    NaN equals nothing, as anywhere. Nothing of this kind is hashed.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert dataclasses.is_dataclass(self)
        names = [field.name for field in dataclasses.fields(self) if field.compare]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)


def _same(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure and the same leaves."""
    structure: Any = jax.tree.structure(one)
    return structure == jax.tree.structure(other) and all(map(_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def _equal(one: Any, other: Any) -> bool:
    if not (hasattr(one, "dtype") and hasattr(other, "dtype")):
        return bool(one == other)
    return one.dtype == other.dtype and one.shape == other.shape and bool(np.all(np.asarray(one) == np.asarray(other)))
