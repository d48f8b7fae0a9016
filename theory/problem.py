"""The data every claim is checked on: rows in the unit ball, and something to learn from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.artifacts import read_array
from ntk_prefix.checks import UsageError, check_finite, check_inputs, check_positive, check_unit_ball, expected
from ntk_prefix.typing import Array, Float, Inputs, KeyArray

Profile = Literal["quick", "full"]
Source = Literal["digits", "file"]
Scaling = Literal["none", "ball", "standard"]
"""Of a file's rows: as they are; divided by the largest norm; or first each column to mean 0 and deviation 1."""

LARGEST_GRAM = 4096
"""Largest n d: a Gram matrix of this size takes 128 MiB in float64, and its spectrum about a minute."""

LARGEST_SPREAD, SMALLEST_SPREAD = 16.0, 1e-6
"""Of sigma max|x_i|. Kernels are of order e^(sigma^2 |x|^2), 1e111 at most here, so that their squares, which norms take,
are far from float64's largest number; and below the smallest their terms in sigma^2 are lost to rounding beside 1."""

DIGITS = 1797
"""Images there are."""

SMALLEST_TARGET = 1e-9
"""Of max|y_i|. The outputs start at 0 up to rounding of sums over thousands of tokens, which smaller targets drown in."""

SEEDS = 2**32
"""Seeds are below this: what a random key takes with and without float64."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Inputs, targets, and how long a prefix may get. Equal numbers make equal problems, so results can be kept by them.

    Args:
        name: where the data came from, for the reader; nothing is decided by it.
        source: "digits" of scikit-learn, of which more can be had, or a user's "file".
        inputs: [n, d] in float64, distinct rows, |x_i| <= 1.
        targets: [n, d] in float64, |y_i| <= 1.
        sigma: standard deviation of a prefix token's coordinates.
        seed: of every prefix drawn.
        profile: "quick" for minutes, "full" for the sizes a paper would show.
        labels: of a file's rows, if its targets were labels: the place of each among their kinds in order.
    """

    name: str
    source: Source
    inputs: Inputs
    targets: Float[Array, "n d"]
    sigma: float = 1.0
    seed: int = 0
    profile: Profile = "quick"
    labels: tuple[int, ...] | None = None

    def __eq__(self, other: object) -> bool:
        """Whether every number is the same."""
        return isinstance(other, Problem) and self._identity == other._identity

    def __hash__(self) -> int:
        """Hash of the numbers."""
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str | float, ...]:
        return self.digest, self.name, self.source, self.sigma, self.seed, self.profile

    @property
    def full(self) -> bool:
        """Whether the full sizes are asked for."""
        return self.profile == "full"

    @property
    def n(self) -> int:
        """Number of inputs."""
        return self.inputs.shape[0]

    @property
    def d(self) -> int:
        """Width of inputs and outputs."""
        return self.inputs.shape[1]

    def key(self, *labels: int | str) -> KeyArray:
        """Return a random key of its own for every use, the same on every machine."""
        key = jax.random.key(self.seed)
        for label in labels:
            number = label if isinstance(label, int) else int.from_bytes(hashlib.sha256(label.encode()).digest()[:4])
            key = jax.random.fold_in(key, number)
        return key

    @property
    def digest(self) -> str:
        """A hash of the numbers, so that a resumed run knows its data."""
        kinds = b"" if self.labels is None else np.array(self.labels, np.int64).tobytes()
        return hashlib.sha256(
            np.asarray(self.inputs).tobytes() + np.asarray(self.targets).tobytes() + kinds
        ).hexdigest()


def load(
    data: str,
    *,
    inputs: int | Literal["all"] | None,
    width: int,
    sigma: float,
    seed: int,
    profile: Profile,
    targets: str | None = None,
    scaling: Scaling = "none",
) -> Problem:
    """Read ``digits`` or a .npy file and check everything the claims rely on, before any of them runs.

    Args:
        data: "digits", or the path of a .npy file with a float [n, d] array, in the unit ball once it is scaled.
        inputs: how many rows to take; None is 16 of the digits, all of a file.
        width: d for the digits (principal components); a file has its own.
        sigma, seed, profile: as in ``Problem``.
        targets: the path of a .npy file with what to learn from a file's rows, instead of targets that are drawn: floats
            [n] or [n, o], o <= d, divided by their largest norm if that is above 1, further outputs zero; or labels [n],
            whole numbers or texts, for each the mean of its rows, and the labels themselves.
        scaling: of a file's rows.

    Raises:
        UsageError: what was expected, what came, and what to do: no such file, not [n, d], not finite, rows outside of
            the unit ball, duplicated rows, too large a problem, a sigma or a seed out of range.
    """
    check_positive("--sigma", sigma)
    if not 0 <= seed < SEEDS:
        raise expected("--seed", f"a whole number from 0 to {SEEDS - 1}", seed)
    if isinstance(inputs, int) and inputs < 1:
        raise expected("--inputs", "at least 1 row", inputs)
    source: Source = "digits" if data == "digits" else "file"
    kinds: tuple[int, ...] | None = None
    if source == "digits":
        for flag, given in (("--targets", targets), ("--scaling", None if scaling == "none" else scaling)):
            if given is not None:
                raise expected(flag, "it beside a file of --data; digits have theirs", given)
        x, y, name = _digits(16 if inputs is None else DIGITS if inputs == "all" else inputs, width, seed)
    else:
        x, y, kinds, name = _file(data, None if inputs == "all" else inputs, seed, targets, scaling)
    label = "--data" if source == "digits" else f"--data {data}"
    check_inputs(label, x)
    try:
        check_unit_ball(label, x)
    except UsageError as error:
        raise UsageError(f"{error} Or take --scaling ball, or --scaling standard.") from None
    _check_distinct(label, np.asarray(x))
    unit = float(np.abs(x).max())  # not 0: what is divided by it has squares that neither vanish nor overflow
    norm = unit * float(np.linalg.norm(np.asarray(x) / unit, axis=1).max())
    smallest, largest = (bound / max(norm, np.finfo(float).tiny) for bound in (SMALLEST_SPREAD, LARGEST_SPREAD))
    if not smallest <= sigma <= largest:
        raise expected(
            "--sigma",
            f"a number from {smallest:.3g} to {largest:.3g} for these rows",
            sigma,
            "Kernels are of order e^(sigma^2 |x|^2), which float64 must hold",
        )
    return Problem(name=name, source=source, inputs=x, targets=y, sigma=sigma, seed=seed, profile=profile, labels=kinds)


@functools.cache
def centered_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images [1797, 64] about their mean, their principal directions [64, 64], and their labels [1797]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    centered = images - images.mean(0)
    return centered, np.linalg.svd(centered, full_matrices=False)[2], labels


def _digits(n: int, d: int, seed: int) -> tuple[Array, Array, str]:
    """Return images of handwritten digits and, for each, the mean image of its class, in the same coordinates."""
    centered, directions, labels = centered_digits()
    if not (2 <= n <= len(centered) and 1 <= d <= len(directions)):
        wanted = f"2 <= --inputs <= {len(centered)} and 1 <= --width <= {len(directions)}"
        raise expected("--data digits", wanted, f"{n} and {d}")
    _check_size("--data", n, d)
    components = directions[:d] @ centered.T
    prototypes = np.stack([components[:, labels == label].mean(1) for label in range(10)])
    rows = np.random.default_rng(seed).permutation(len(centered))[:n]
    x = components[:, rows].T
    scale = np.linalg.norm(x, axis=1).max()
    y = prototypes[labels[rows]]
    y = y / max(scale, np.linalg.norm(y, axis=1).max())
    return (
        jnp.asarray(x / scale),
        jnp.asarray(y),
        f"scikit-learn digits, {n} images, PCA to {d}, scaled into the unit ball",
    )


def _read(flag: str, name: str, wanted: str) -> np.ndarray:
    path = Path(name)
    if not path.is_file() or path.suffix != ".npy":
        raise expected(flag, wanted, repr(name))
    return read_array(path)


def _file(
    data: str, n: int | None, seed: int, targets: str | None, scaling: Scaling
) -> tuple[Array, Array, tuple[int, ...] | None, str]:
    """Return a user's own rows, their targets, drawn uniformly in a cube inside the unit ball if not given, and labels."""
    label = f"--data {data}"
    loaded = _read("--data", data, '"digits" or an existing .npy file with a float array [n, d]')
    if not np.issubdtype(loaded.dtype, np.floating):
        raise expected(label, "floating point numbers", loaded.dtype, "Save x.astype(float)")
    if loaded.ndim != 2 or 0 in loaded.shape:
        hint = "One row per input: x[None, :] for a single one, x.reshape(n, -1) for images"
        raise expected(label, "a matrix [n, d] with n, d >= 1", f"shape {loaded.shape}", hint)
    if n is not None and n > len(loaded):
        raise expected("--inputs", f"at most {len(loaded)}, the rows of {data}", n)
    rows = loaded[:n]
    _check_size(label, *rows.shape)
    with np.errstate(over="ignore"):  # a wider type's largest numbers: they are refused as infinite
        x = rows.astype(np.float64)
    check_inputs(label, jnp.asarray(x))
    x = _rounded_into_the_ball(_scaled(label, x, scaling), float(np.finfo(loaded.dtype).eps))
    kinds = None
    if targets is None:
        y, learned = np.random.default_rng(seed).uniform(-1, 1, x.shape) / np.sqrt(x.shape[1]), "targets drawn"
    else:
        told = _read("--targets", targets, "an existing .npy file with numbers or labels, one for each row of --data")
        y, kinds = _targets(f"--targets {targets}", told, x, len(loaded))
        learned = f"targets of {_shown(targets)}"
    how = "" if scaling == "none" else f", scaled ({scaling})"
    return jnp.asarray(x), jnp.asarray(y), kinds, f"{_shown(data)}{how}, {learned}"


def _shown(name: str) -> str:
    """Return a file's name as text, whatever its bytes."""
    return os.fsencode(Path(name).name).decode("utf-8", "replace")


def _rounded_into_the_ball(x: np.ndarray, eps: float) -> np.ndarray:
    """Return rows that are beyond the unit ball by four roundings of their file's type at most on its border."""
    with np.errstate(over="ignore"):  # such rows are far beyond it
        norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.where((norms > 1) & (norms <= 1 + 4 * eps), x / np.maximum(norms, 1), x)


def _scaled(label: str, x: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Return rows in the unit ball, unless they are to be left as they are.

    Raises:
        UsageError: a column that is the same everywhere and so has no deviation to divide by.
    """
    if scaling == "none":
        return x
    # columns and rows are brought to size 1 first: squares of the largest numbers overflow
    if scaling == "standard":
        unit = np.abs(x).max(0)
        x = x / np.where(unit > 0, unit, 1)
        x = x - x.mean(0)
        deviation = x.std(0)
        if (flat := np.flatnonzero(deviation < 1e-12)).size:
            wanted = "columns that differ from row to row, to divide by their deviations"
            raise expected(label, wanted, f"one number in all of column {flat[0]}", "Leave it out, or --scaling ball")
        x = x / deviation
    unit = np.abs(x).max()
    x = x / (unit if unit > 0 else 1)
    norm = np.linalg.norm(x, axis=1).max()
    return x / (norm if norm > 0 else 1)


def _targets(label: str, told: np.ndarray, x: np.ndarray, rows: int) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Return targets [n, d] in the unit ball from numbers or labels of all the rows of the file, and labels' places.

    Raises:
        UsageError: another number of rows, more outputs than columns, numbers that are not finite or all next to 0, labels of
            one kind.
    """
    if told.ndim not in (1, 2) or len(told) != rows:
        raise expected(label, f"numbers [{rows}] or [{rows}, outputs], or labels [{rows}]", f"shape {told.shape}")
    told, places = told[: len(x)], None
    if np.issubdtype(told.dtype, np.floating):
        y = told.reshape(len(x), -1).astype(np.float64)
        if y.shape[1] > x.shape[1]:
            raise expected(label, f"at most {x.shape[1]} outputs, as many as columns of --data", y.shape[1])
        check_finite(label, jnp.asarray(y))
        y = np.pad(y, ((0, 0), (0, x.shape[1] - y.shape[1])))
    elif told.ndim == 1 and (np.issubdtype(told.dtype, np.integer) or told.dtype.kind in "bUS"):
        kinds, kind = np.unique(told, return_inverse=True)
        if len(kinds) < 2:
            raise expected(
                label,
                "labels of at least two kinds",
                f"{len(kinds)} in the first {len(x)} rows",
                "Shuffle both files alike, or raise --inputs",
            )
        y = np.stack([x[kind == place].mean(0) for place in range(len(kinds))])[kind]
        places = tuple(kind.tolist())
    else:
        raise expected(
            label, f"floats, or labels [{rows}] that are whole numbers or texts", f"{told.dtype} {told.shape}"
        )
    largest = float(np.abs(y).max())
    y = y / max(largest, 1.0)  # the largest entry is 1 then, and squares do not overflow
    if largest < SMALLEST_TARGET:
        what = "targets" if places is None else "labels whose rows have means"
        hint = (
            "Scale them up: there is nothing to learn"
            if places is None
            else "Center the rows elsewhere, or give floats"
        )
        raise expected(label, f"{what} of at least {SMALLEST_TARGET:g}", f"{largest:.3g} at most", hint)
    return y / max(np.linalg.norm(y, axis=1).max(), 1.0), places


def _check_size(label: str, n: int, d: int) -> None:
    """Refuse a Gram matrix that is too large, before anything as long as the data is made of it."""
    if n * d > LARGEST_GRAM:
        fewer = (
            f"Take fewer rows with --inputs {LARGEST_GRAM // d}, or fewer columns"
            if d <= LARGEST_GRAM // 2
            else "Take fewer columns"
        )
        raise expected(
            label,
            f"n * d <= {LARGEST_GRAM}",
            f"{n} * {d} = {n * d}",
            f"Its kernel has {(n * d) ** 2:.1e} entries. {fewer}",
        )


def _check_distinct(label: str, x: np.ndarray) -> None:
    """Refuse equal rows, and zero rows: the kernel is singular there, and every claim divides by its smallest eigenvalue."""
    zero = np.flatnonzero(~x.any(1))
    if len(zero):
        raise expected(label, "non-zero rows", f"zeros at row {zero[0]}", "The kernel is singular there: drop it")
    _, first, inverse = np.unique(x, axis=0, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse.ravel()] != np.arange(len(x)))
    if len(repeated):
        row = repeated[0]
        raise expected(
            label,
            "distinct rows",
            f"row {row} equal to row {first[inverse.ravel()[row]]}",
            "The kernel is singular there (claim `positivity`): drop duplicates with np.unique(x, axis=0)",
        )
