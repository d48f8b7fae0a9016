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
from ntk_prefix.checks import check_inputs, check_positive, check_unit_ball, expected
from ntk_prefix.typing import Array, Float, Inputs, KeyArray

Profile = Literal["quick", "full"]
Source = Literal["digits", "file"]

LARGEST_GRAM = 4096
"""Largest n d: a Gram matrix of this size takes 128 MiB in float64, and its spectrum about a minute."""

LARGEST_SPREAD, SMALLEST_SPREAD = 16.0, 1e-6
"""Of sigma max|x_i|. Kernels are of order e^(sigma^2 |x|^2), 1e111 at most here, so that their squares, which norms take,
are far from float64's largest number; and below the smallest their terms in sigma^2 are lost to rounding beside 1."""

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
    """

    name: str
    source: Source
    inputs: Inputs
    targets: Float[Array, "n d"]
    sigma: float = 1.0
    seed: int = 0
    profile: Profile = "quick"

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
        return hashlib.sha256(np.asarray(self.inputs).tobytes() + np.asarray(self.targets).tobytes()).hexdigest()


def load(data: str, *, inputs: int | None, width: int, sigma: float, seed: int, profile: Profile) -> Problem:
    """Read ``digits`` or a .npy file and check everything the claims rely on, before any of them runs.

    Args:
        data: "digits", or the path of a .npy file with a float [n, d] array in the unit ball.
        inputs: how many rows to take; None is 16 of the digits, all of a file.
        width: d for the digits (principal components); a file has its own.
        sigma, seed, profile: as in ``Problem``.

    Raises:
        UsageError: what was expected, what came, and what to do: no such file, not [n, d], not finite, rows outside of
            the unit ball, duplicated rows, too large a problem, a sigma or a seed out of range.
    """
    check_positive("--sigma", sigma)
    if not 0 <= seed < SEEDS:
        raise expected("--seed", f"a whole number from 0 to {SEEDS - 1}", seed)
    if inputs is not None and inputs < 1:
        raise expected("--inputs", "at least 1 row", inputs)
    source: Source = "digits" if data == "digits" else "file"
    x, y, name = (
        _digits(16 if inputs is None else inputs, width, seed) if source == "digits" else _file(data, inputs, seed)
    )
    label = "--data" if source == "digits" else f"--data {data}"
    check_inputs(label, x)
    check_unit_ball(label, x)
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
    return Problem(name=name, source=source, inputs=x, targets=y, sigma=sigma, seed=seed, profile=profile)


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


def _file(data: str, n: int | None, seed: int) -> tuple[Array, Array, str]:
    """Return a user's own rows, and targets drawn uniformly in a cube inside the unit ball."""
    path, label = Path(data), f"--data {data}"
    if not path.is_file() or path.suffix != ".npy":
        raise expected("--data", '"digits" or an existing .npy file with a float array [n, d]', repr(data))
    loaded = read_array(path)
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
        x = jnp.asarray(rows.astype(np.float64))
    y = np.random.default_rng(seed).uniform(-1, 1, x.shape) / np.sqrt(x.shape[1])
    return x, jnp.asarray(y), f"{os.fsencode(path.name).decode('utf-8', 'replace')}, targets drawn"


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
