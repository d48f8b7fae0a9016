"""The data every claim is checked on: rows in the unit ball, and something to learn from them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import UsageError, check_inputs, check_positive, check_unit_ball
from ntk_prefix.typing import Array, Float, Inputs, KeyArray

Profile = Literal["quick", "full"]

LARGEST_GRAM = 4096
"""Largest n d: a Gram matrix of this size takes 128 MiB in float64, and its spectrum about a minute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs, targets, and how long a prefix may get.

    Args:
        name: where the data came from, for the report.
        inputs: [n, d] in float64, distinct rows, |x_i| <= 1.
        targets: [n, d] in float64, |y_i| <= 1.
        sigma: standard deviation of a prefix token's coordinates.
        seed: of every prefix drawn.
        profile: "quick" for minutes, "full" for the sizes a paper would show.
    """

    name: str
    inputs: Inputs
    targets: Float[Array, "n d"]
    sigma: float = 1.0
    seed: int = 0
    profile: Profile = "quick"

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
        """A random key of its own for every use, the same on every machine."""
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
        ValueError: what was expected, what came, and what to do: no such file, not [n, d], not finite, rows outside of
            the unit ball, duplicated rows, too large a problem.
    """
    check_positive("sigma", sigma)
    x, y, name = _digits(inputs or 16, width, seed) if data == "digits" else _file(Path(data), inputs, seed)
    check_inputs("data", x)
    check_unit_ball("data", x)
    _check_distinct(np.asarray(x))
    if x.size > LARGEST_GRAM:
        raise UsageError(
            f"data: expected n * d <= {LARGEST_GRAM}, got {x.shape[0]} * {x.shape[1]} = {x.size}: its kernel has "
            f"{x.size**2:.1e} entries. Take fewer rows with --inputs {max(2, LARGEST_GRAM // x.shape[1])}, or fewer columns."
        )
    return Problem(name=name, inputs=x, targets=y, sigma=sigma, seed=seed, profile=profile)


def _digits(n: int, d: int, seed: int) -> tuple[Array, Array, str]:
    """Images of handwritten digits; the target of each is the mean image of its class, in the same coordinates."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    if not (2 <= n <= len(images) and 1 <= d <= images.shape[1]):
        raise UsageError(
            f"expected 2 <= --inputs <= {len(images)} and 1 <= --width <= {images.shape[1]}, got {n} and {d}."
        )
    centered = images - images.mean(0)
    components = np.linalg.svd(centered, full_matrices=False)[2][:d] @ centered.T
    prototypes = np.stack([components[:, labels == label].mean(1) for label in range(10)])
    rows = np.random.default_rng(seed).permutation(len(images))[:n]
    x = components[:, rows].T
    scale = np.linalg.norm(x, axis=1).max()
    y = prototypes[labels[rows]]
    y = y / max(scale, np.linalg.norm(y, axis=1).max())
    return (
        jnp.asarray(x / scale),
        jnp.asarray(y),
        f"scikit-learn digits, {n} images, PCA to {d}, scaled into the unit ball",
    )


def _file(path: Path, n: int | None, seed: int) -> tuple[Array, Array, str]:
    """A user's own rows; the targets are drawn, uniform in a cube inside the unit ball."""
    if not path.is_file() or path.suffix != ".npy":
        raise UsageError(
            f'data: expected "digits" or an existing .npy file with a float array [n, d], got {str(path)!r}.'
        )
    loaded = np.load(path, allow_pickle=False)
    if not np.issubdtype(loaded.dtype, np.floating):
        raise UsageError(f"data: expected floating point numbers in {path}, got {loaded.dtype}. Save x.astype(float).")
    x = jnp.asarray(loaded.astype(np.float64)[:n])
    width = x.shape[-1] if x.ndim else 1
    y = np.random.default_rng(seed).uniform(-1, 1, x.shape) / np.sqrt(width)
    return x, jnp.asarray(y), f"{path.name}, targets drawn"


def _check_distinct(x: np.ndarray) -> None:
    """Refuse equal rows, and zero rows: the kernel is singular there, and every claim divides by its smallest eigenvalue."""
    zero = np.flatnonzero(~x.any(1))
    if len(zero):
        raise UsageError(
            f"data: expected non-zero rows, got zeros at row {zero[0]}. The kernel is singular there: drop it."
        )
    _, first, inverse = np.unique(x, axis=0, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse.ravel()] != np.arange(len(x)))
    if len(repeated):
        row = repeated[0]
        raise UsageError(
            f"data: expected distinct rows, got row {row} equal to row {first[inverse.ravel()[row]]}. The kernel is "
            "singular there (claim `positivity`): drop duplicates with np.unique(x, axis=0)."
        )
