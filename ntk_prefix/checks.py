"""The message for a wrong input, in one form: the name, what was expected, what came, what to do.

:class:`UsageError` is for what a user can mend; the programs print it as one line and exit with 2.  Any other exception is
a mistake of ours and keeps its traceback.  :func:`explain` is the one place that tells them apart.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "MissingPackageError",
    "NonFiniteError",
    "UsageError",
    "check_arguments",
    "check_array",
    "check_attention",
    "check_count",
    "check_finite",
    "check_flag",
    "check_floating",
    "check_fraction",
    "check_held",
    "check_inputs",
    "check_is_array",
    "check_non_negative",
    "check_offset",
    "check_positive",
    "check_prefix",
    "check_rngs",
    "check_scale",
    "check_seed",
    "check_unit_ball",
    "expected",
    "explain",
    "extra",
    "real_numbers",
]


class UsageError(ValueError):
    """An input that does not fit: its text says what was expected, what came, and what to do."""


class NonFiniteError(UsageError, FloatingPointError):
    """A number that must be finite and is NaN or infinite; its text names it."""


class MissingPackageError(UsageError, ImportError):
    """A package of an extra that is not installed; its text has the command that installs it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import a package of one of our extras within it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f'{error.name}: expected this package, got none of that name. pip install "ntk-prefix[{name}]"'
        ) from None


def expected(name: object, wanted: object, got: object, hint: str = "") -> UsageError:
    """Return the error ``name: expected wanted, got got. Hint.``, to be raised.

    Args:
        name: the argument, the flag, or the file and the field in it.
        wanted: what would have been right.
        got: what came.
        hint: what to do, a sentence without its stop.
    """
    return UsageError(f"{name}: expected {wanted}, got {got}." + (f" {hint}." if hint else ""))


def explain(error: BaseException) -> str | None:
    """Return one line for an error that a user can mend, None for one that is ours and must keep its traceback.

    A user can mend a :class:`UsageError`, what the operating system refuses (the file is named), and a machine whose
    memory is too small. Bytes of a path that are no text come as question marks: no terminal can print them.
    """
    line = _explained(error)
    return None if line is None else line.encode("utf-8", "replace").decode()


def _explained(error: BaseException) -> str | None:
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError):
        name = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else error.filename
        return f"{name}: {error.strerror or error}." if name else str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        return f"expected this to fit into memory, got: {str(error).splitlines()[0] if str(error) else 'no room'}"
    return None


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse empty arguments of a program, which as a path are the current folder: a shell makes them of unset variables.

    Raises:
        UsageError: naming the flag.
    """
    for before, given in itertools.pairwise(["", *arguments]):
        flag, equals, value = given.partition("=")
        if not given or (flag.startswith("--") and equals and not value):
            name = flag or (before if before.startswith("-") else f"the argument behind {before or 'the program'}")
            raise expected(name, "a value", "an empty one", "Look whether a variable of the shell is set")


def check_is_array(name: str, array: object) -> None:
    """Refuse a list, None, and whatever else has no shape and no dtype.

    Raises:
        UsageError: naming the argument and its type.
    """
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise expected(name, "an array", type(array).__name__, "Use jnp.asarray")


def check_floating(name: str, array: jax.Array) -> None:
    """Refuse an array whose dtype is not a real floating point one.

    Integers and booleans would make the result one of theirs, and of complex numbers the imaginary part would go.

    Raises:
        UsageError: naming the argument and its dtype.
    """
    check_is_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise expected(name, "floating point numbers", array.dtype, f"Use {name.split()[0]}.astype(float)")


def check_finite(name: str, tree: Any) -> None:
    """Refuse NaN and infinities, where there are values to look at (a tracer has none).

    Raises:
        UsageError: naming the argument, the first such number and its place.
    """
    for array in jax.tree.leaves(tree):
        if isinstance(array, jax.core.Tracer) or not jnp.issubdtype(array.dtype, jnp.inexact):
            continue
        # under jit a concrete array would become a tracer by being looked at
        with jax.ensure_compile_time_eval():
            finite = jnp.isfinite(array)
            if finite.all():
                continue
            place = tuple(int(index) for index in np.argwhere(~np.asarray(finite))[0])
            raise UsageError(
                f"{name}: expected finite numbers, got {array[place]} at {list(place)}, and {(~finite).sum()} such in "
                "all. Drop or impute them first."
            )


def check_held(name: str, array: jax.Array, hint: str = "Scale the inputs or the weights down") -> None:
    """Refuse a result of finite numbers that its dtype does not hold, where there are values to look at.

    Raises:
        NonFiniteError: naming the result, its dtype and what to do.
    """
    if isinstance(array, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        if not bool(jnp.isfinite(array).all()):
            raise NonFiniteError(f"{name}: expected numbers that {array.dtype} holds, got an overflow. {hint}.")


def check_inputs(name: str, inputs: jax.Array, *, features: int | None = None) -> None:
    """Refuse anything but a finite floating point ``[n, d]`` array with at least one row.

    Shapes and dtypes are checked always, finiteness only outside of ``jax.jit`` (a tracer has no values).

    Raises:
        ValueError: naming the argument, what was expected, what came, and what to do.
    """
    check_is_array(name, inputs)
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise UsageError(
            f"{name}: expected a matrix [n, d] with n, d >= 1, got shape {inputs.shape}. "
            "One row per input: use x[None, :] for a single one, x.reshape(n, -1) for images."
        )
    if features is not None and inputs.shape[1] != features:
        raise UsageError(
            f"{name}: expected d = {features} columns (the prefix has d = {features}), got {inputs.shape[1]}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise UsageError(f"{name}: expected floating point numbers, got {inputs.dtype}. Use x.astype(float).")
    if isinstance(inputs, jax.core.Tracer):
        return
    values = np.asarray(inputs).astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise UsageError(
            f"{name}: expected finite numbers, got {values[row, column]} at row {row}, column {column}. "
            "Drop or impute such rows first."
        )


def check_unit_ball(name: str, inputs: jax.Array) -> None:
    """Refuse rows outside of the unit ball: the bounds are stated for ``|x_i| <= 1``.

    Raises:
        ValueError: with the largest norm found and the factor that mends it.
    """
    values = np.asarray(inputs, np.float64)
    unit = max(float(np.abs(values).max()), 1.0)  # squares of the largest numbers overflow
    norms = unit * np.linalg.norm(values / unit, axis=1)
    # four roundings: a row normalized in the input's own precision must pass
    tolerance = 4 * float(jnp.finfo(inputs.dtype).eps)
    if (largest := float(norms.max())) > 1 + tolerance:
        factor = f"{largest:.6g}"
        if float(factor) < largest:  # rounded up: what is divided by it must pass
            factor = f"{largest * (1 + 6e-6):.6g}"
        raise UsageError(
            f"{name}: expected rows in the unit ball, |x_i| <= 1, got |x_{norms.argmax()}| = {largest:.9g}. "
            f"Scale the data once: x / {factor}."
        )


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a finite number above zero.

    Raises:
        UsageError: naming the argument and what came.
    """
    if not (_is_finite(value) and value > 0):
        raise expected(name, "a finite number > 0", value)


def check_non_negative(name: str, value: float) -> None:
    """Refuse anything but a finite number from zero on.

    Raises:
        UsageError: naming the argument and what came.
    """
    if not (_is_finite(value) and value >= 0):
        raise expected(name, "a finite number >= 0", value)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse anything but a whole number from ``least`` on.

    Raises:
        UsageError: naming the argument and what came.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise expected(name, f"a whole number >= {least}", repr(value))


def check_seed(name: str, value: int) -> None:
    """Refuse anything but a whole number that ``jax.random.key`` and NumPy take alike.

    Raises:
        UsageError: naming the argument and what came.
    """
    check_count(name, value, 0)
    if value >= 2**63:
        raise expected(name, "a whole number below 2^63", value)


def check_fraction(name: str, value: float, wanted: str = "a number in (0, 1)") -> None:
    """Refuse anything but a number strictly between 0 and 1.

    Raises:
        UsageError: naming the argument and what came.
    """
    if not (_is_finite(value) and 0 < value < 1):
        raise expected(name, wanted, repr(value))


def check_flag(name: str, value: bool) -> None:
    """Refuse anything but True and False: a word would count as True, and an array is not known when it is traced.

    Raises:
        UsageError: naming the argument and what came.
    """
    if not isinstance(value, bool | np.bool_):
        raise expected(name, "True or False", repr(value))


def check_rngs(rngs: object) -> None:
    """Refuse a seed or a key in the place of flax's random streams.

    Raises:
        UsageError: saying what came, and how streams are made of it.
    """
    if not callable(getattr(rngs, "params", None)):
        made = f"nnx.Rngs({rngs})" if isinstance(rngs, int) else "nnx.Rngs(0)"
        raise expected("rngs", "flax's nnx.Rngs", f"{type(rngs).__name__}", f"Use rngs={made}")


def real_numbers(name: str, numbers: ArrayLike) -> np.ndarray:
    """Return real numbers in float64, of an array or of lists; the imaginary part of complex ones would go.

    Raises:
        UsageError: naming the argument and what came.
    """
    try:
        found = np.asarray(numbers)
    except ValueError:
        raise expected(name, "real numbers", "lists of several lengths", "Make rows of one length") from None
    if found.dtype.kind not in "biuf" and not jnp.issubdtype(found.dtype, jnp.floating):
        raise expected(name, "real numbers", found.dtype)
    return found.astype(np.float64)


def check_array(name: str, array: jax.Array, *shape: int | str) -> None:
    """Refuse an array of another shape, or of anything but real floating point numbers.

    Nothing broadcasts: an axis of 1 where another length is wanted is refused.

    Args:
        name: of the argument.
        array: what came.
        shape: for each axis its length, or the letter of an axis that may have any.

    Raises:
        UsageError: naming the argument, the shape wanted and the one that came.
    """
    lengths = getattr(array, "shape", None)
    if (
        lengths is None
        or len(lengths) != len(shape)
        or any(isinstance(wanted, int) and wanted != length for wanted, length in zip(shape, lengths, strict=True))
    ):
        wanted = ", ".join(str(axis) for axis in shape)
        raise expected(name, f"[{wanted}]", lengths if lengths is not None else type(array).__name__)
    check_floating(name, array)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that float64 holds: of whole numbers those below 2^1024."""
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_scale(scale: float | None, head_dim: int) -> float:
    """Raise unless a scale of scores is None or > 0, and a float32 holds it; return it, 1/sqrt(H) for None."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    check_positive("scale", scale)  # feature maps are applied to q * sqrt(scale)
    if not _MODERATE[0] <= scale <= _MODERATE[1]:
        raise expected("scale", "a number from 1e-30 to 1e30", scale, "None is 1/sqrt(H)")
    return float(scale)


_MODERATE = 1e-30, 1e30
"""What float32 can multiply with and divide by."""


def check_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float | None,
) -> float:
    """Raise unless shapes and dtypes are those of attention; return the scale."""
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias), ("mask", mask)):
        if x is not None or name in ("query", "key", "value"):
            check_is_array(name, x)
    if query.ndim != 4 or key.ndim != 4:
        raise expected("query and key", "[B, T, N, H] and [B, S, K, H]", f"{query.shape} and {key.shape}")
    batch, length, heads, head_dim = query.shape
    if 0 in (heads, head_dim):
        raise expected("query", "[B, T, N, H] with N, H >= 1", query.shape)
    if value.shape != key.shape:
        raise expected("value", f"the key's shape {key.shape}", value.shape)
    if key.shape[0] != batch or key.shape[3] != head_dim or key.shape[2] == 0 or heads % key.shape[2]:
        raise expected(
            "key",
            f"[{batch}, S, K, {head_dim}] with K a divisor of {heads}",
            key.shape,
            "Key and query share batch and head dimension, and key heads divide query heads",
        )
    full = (batch, heads, length, key.shape[1])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            _check_scores(name, x, full)
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if x is not None:
            check_floating(name, x)
    if mask is not None and mask.dtype != jnp.bool_:
        raise expected("mask", "booleans, True where a key is seen", mask.dtype, "Use bias for numbers")
    return check_scale(scale, head_dim)


UNBOUNDED = 2**30
"""From so many tokens to one side on a window has no end: beyond every sequence, and no sum of places overflows."""


def check_window(window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Raise unless a window is one of attention; return how many keys are seen to the left and right, None for all."""
    if window is None:
        return None, None
    sides = window if isinstance(window, tuple) else (window, window)
    whole = [isinstance(x, int | np.integer) and not isinstance(x, bool) and x >= 0 for x in sides]
    if len(sides) != 2 or not all(whole):
        wanted = "a whole number >= 0 of tokens seen to each side, or (left, right)"
        raise expected("local_window_size", wanted, repr(window), "Use None for no window")
    left, right = (None if x >= UNBOUNDED else int(x) for x in sides)
    return left, right


def check_soft_cap(cap: float | None) -> float | None:
    """Raise unless a soft cap is None or > 0, and a float32 can divide by it; return it."""
    if cap is None:
        return None
    if not _is_number(cap) or not _MODERATE[0] <= cap <= _MODERATE[1]:
        raise expected("logits_soft_cap", "a number > 0, from 1e-30 to 1e30", repr(cap), "Use None for no cap")
    return float(cap)


FARTHEST = 2**29
"""Place of a first query: with a window and the query's own place beside it no sum is beyond int32."""


def check_offset(offset: int | jax.Array, needed: bool) -> bool:
    """Raise unless an offset of queries is a whole number, or an array of one; return whether it is known by now.

    Args:
        offset: what was given.
        needed: whether anything counts from it.
    """
    known = isinstance(offset, int | np.integer)
    if not known and not (jnp.issubdtype(getattr(offset, "dtype", bool), jnp.integer) and jnp.ndim(offset) == 0):
        raise expected("query_offset", "a whole number, or an integer array []", offset)
    if isinstance(offset, int | np.integer) and abs(int(offset)) > FARTHEST:
        raise expected("query_offset", f"a place within {FARTHEST:,} of 0", offset)
    if not needed and not (known and offset == 0):
        raise expected("query_offset", "0 without is_causal or a window", offset, "Hide keys with mask")
    return known


def _check_scores(name: str, x: jax.Array, full: tuple[int, ...]) -> None:
    """Raise unless x broadcasts to scores, axis by axis."""
    check_is_array(name, x)
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise expected(name, f"{full}, each axis possibly 1", x.shape, "Add axes of size 1")


def check_prefix(
    query: jax.Array,
    key: jax.Array,
    prefix_key: jax.Array,
    prefix_value: jax.Array,
    prefix_bias: jax.Array | None = None,
) -> None:
    """Raise unless a prefix [M, K, H] or [B, M, K, H] and its bias fit the query and the key of attention."""
    check_is_array("prefix_key", prefix_key)
    check_is_array("prefix_value", prefix_value)
    batch = {3: (), 4: (query.shape[0],)}.get(prefix_key.ndim)
    if batch is None or prefix_key.shape != (*batch, prefix_key.shape[-3], *key.shape[2:]):
        raise expected(
            "prefix_key",
            f"[M, {key.shape[2]}, {key.shape[3]}], or that with a leading batch axis of {query.shape[0]}",
            prefix_key.shape,
            "A prefix has the key's heads, not the query's",
        )
    if prefix_value.shape != prefix_key.shape:
        raise expected("prefix_value", f"the prefix_key's shape {prefix_key.shape}", prefix_value.shape)
    check_floating("prefix_key", prefix_key)
    check_floating("prefix_value", prefix_value)
    if prefix_bias is not None:
        batch_size, length, heads, _ = query.shape
        _check_scores("prefix_bias", prefix_bias, (batch_size, heads, length, prefix_key.shape[-3]))
        check_floating("prefix_bias", prefix_bias)
