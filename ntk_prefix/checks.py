"""What a wrong input is told, written once: expected this, got that, do this."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_inputs", "check_positive", "check_unit_ball"]


def check_inputs(name: str, inputs: jax.Array, *, features: int | None = None) -> None:
    """Refuse anything but a finite floating point ``[n, d]`` array with at least one row.

    Shapes and dtypes are checked always, finiteness only outside of ``jax.jit`` (a tracer has no values).

    Raises:
        ValueError: naming the argument, what was expected, what came, and what to do.
    """
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(
            f"{name}: expected a matrix [n, d] with n, d >= 1, got shape {inputs.shape}. "
            "One row per input: use x[None, :] for a single one, x.reshape(n, -1) for images."
        )
    if features is not None and inputs.shape[1] != features:
        raise ValueError(
            f"{name}: expected d = {features} columns (the prefix has d = {features}), got {inputs.shape[1]}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating point numbers, got {inputs.dtype}. Use x.astype(float).")
    if isinstance(inputs, jax.core.Tracer):
        return
    values = np.asarray(inputs).astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"{name}: expected finite numbers, got {values[row, column]} at row {row}, column {column}. "
            "Drop or impute such rows first."
        )


def check_unit_ball(name: str, inputs: jax.Array) -> None:
    """Refuse rows outside of the unit ball: the bounds are stated for ``|x_i| <= 1``.

    Raises:
        ValueError: with the largest norm found and the factor that mends it.
    """
    norms = np.linalg.norm(np.asarray(inputs, np.float64), axis=1)
    # four roundings: a row normalized in the input's own precision must pass
    tolerance = 4 * float(jnp.finfo(inputs.dtype).eps)
    if norms.max() > 1 + tolerance:
        raise ValueError(
            f"{name}: expected rows in the unit ball, |x_i| <= 1, got |x_{norms.argmax()}| = {norms.max():.6g}. "
            f"Scale the data once: x / {norms.max():.6g}."
        )


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a finite number above zero.

    Raises:
        ValueError: naming the argument and what came.
    """
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}.")
