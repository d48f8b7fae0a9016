"""Numbers of an adapter in its file: as they are, in half the bytes, or in a quarter of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Float

__all__ = ["FILE_DTYPES", "check_kinds", "checked", "packed", "rounded", "unpacked"]

FILE_DTYPES = ("float32", "float16", "bfloat16", "int8")
"""What numbers may be rounded to in a file."""

FLOATS = {"F64", "F32", "F16", "BF16"}

SCALE = ".scale"
"""What stands behind the name of an array in int8 in that of its units, float32 [..., 1]."""

LARGEST = 127


def checked(dtype: Any) -> str | None:
    """Return the name of a dtype of files, or None.

    Raises:
        UsageError: it is another one.
    """
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in (None, *FILE_DTYPES):
        raise expected("dtype", f"one of {', '.join(FILE_DTYPES)}, or None", name)
    return name


def packed(name: str, value: Array | np.ndarray, dtype: str | None) -> dict[str, np.ndarray]:
    """Return the arrays of a file that hold an array.

    In int8, arrays of three axes or more, Z and the points of a map, are whole numbers from -127 to 127 times a unit for each
    row along the last axis, a 127th of its largest number: no number is off by more than half of that. Others, such as
    k, whose numbers differ by orders of magnitude, stay in float32.

    Args:
        name: of the array.
        value: finite numbers.
        dtype: one of :data:`FILE_DTYPES`; None keeps the array's own.

    Raises:
        UsageError: numbers that the dtype does not hold.
    """
    array = np.asarray(value)
    wide = array.astype(np.float32)
    if dtype == "int8" and array.ndim > 2:
        unit = np.max(np.abs(wide), axis=-1, keepdims=True, initial=0) / np.float32(LARGEST)
        whole = np.rint(np.divide(wide, unit, out=np.zeros_like(wide), where=unit > 0)).clip(-LARGEST, LARGEST)
        held = {name: whole.astype(np.int8), f"{name}{SCALE}": unit}
    else:
        kept = "float32" if dtype == "int8" else dtype
        with np.errstate(over="ignore"):
            held = {name: np.ascontiguousarray(array if kept is None else array.astype(jnp.dtype(kept)))}
    if not np.isfinite(unpacked(held)[name].astype(np.float32)).all():
        hint = "bfloat16 and float32 hold larger ones"
        raise expected(name, f"numbers that {dtype} holds", np.abs(wide).max(), hint)
    return held


def unpacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays that a file holds, those in int8 times their units in float32."""
    units = {name for name, value in tensors.items() if value.dtype == np.int8}
    scales = {f"{name}{SCALE}" for name in units}
    with np.errstate(over="ignore"):
        return {
            name: value.astype(np.float32) * tensors[f"{name}{SCALE}"] if name in units else value
            for name, value in tensors.items()
            if name not in scales
        }


def rounded(value: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Return an array as a file in a dtype holds it.

    Raises:
        UsageError: numbers that the dtype does not hold.
    """
    return jnp.asarray(unpacked(packed("", value, dtype))[""], value.dtype)


def check_kinds(file: str, kinds: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse arrays of a file that are no floating point numbers, or int8 without units that fit.

    Args:
        file: its name, for errors.
        kinds: of each array, in safetensors' words.
        shapes: of each.

    Raises:
        UsageError: naming the array.
    """
    for name, kind in kinds.items():
        scale = f"{name}{SCALE}"
        if kind not in FLOATS and not (kind == "I8" and kinds.get(scale) == "F32"):
            wanted = f"floating point weights ({', '.join(sorted(FLOATS))}), or I8 beside {scale} in F32"
            raise expected(f"{file}: {name}", wanted, kind)
        if kind == "I8" and [*shapes[scale]] != [*shapes[name][:-1], 1]:
            wanted = f"a unit for each row of {[*shapes[name]]}"
            raise expected(f"{file}: {scale}", wanted, [*shapes[scale]])
