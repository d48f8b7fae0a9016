"""What a certificate is asked about: inputs, targets and a prefix, checked."""

from __future__ import annotations

from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.certificate.length import Progress
from ntk_prefix.certificate.tokens import Prefix
from ntk_prefix.checks import check_finite, check_inputs, expected
from ntk_prefix.one_layer import check_signs
from ntk_prefix.random_prefix import ModelName, RandomPrefix, variant_named
from ntk_prefix.typing import Array, KeyArray

__all__ = ["Drawn", "Search", "Start", "check_data", "outputs_wanted"]

LARGEST_INPUT = 1e100
"""Entries up to which products of two of them, and sums of those, are float64."""


class Drawn(TypedDict, total=False):
    """Of a prefix and its descent, of whatever length."""

    sigma: float
    model: ModelName | Prefix
    key: KeyArray | None
    symmetric: bool
    step_size: float | None


class Start(Drawn, total=False):
    """What both kinds of certificate take."""

    m: int | None


class Search(Drawn, total=False):
    """What the search for a length takes."""

    start: int
    largest: int
    resolution: float
    progress: Progress


def outputs_wanted(y: Array, model: ModelName) -> int | None:
    """Return the outputs that a prefix for these targets is asked for; None for the tied model, which has d."""
    return None if variant_named(model).has_value_part else y.shape[1]


def check_data(x: Array, y: Array, model: ModelName, prefix: Prefix | None) -> None:
    """Refuse what no certificate can be about, before anything is computed.

    Raises:
        UsageError: naming what was expected.
    """
    if jnp.result_type(float) != jnp.float64:
        raise expected(
            "certify",
            "64-bit numbers",
            "JAX's default of 32",
            "Wrap the call in `with jax.enable_x64(True):`",
        )
    variant = variant_named(model)
    if not isinstance(prefix, Prefix | None):
        raise expected("model", '"tied" or "fixed", a model or a RandomPrefix', type(prefix).__name__)
    width = None
    if prefix is not None:
        width = prefix.d if isinstance(prefix, RandomPrefix) else prefix.weights.shape[1]
    if not isinstance(prefix, RandomPrefix | None):
        check_signs(prefix)
        check_finite("the model's weights", prefix.weights[...])
        check_finite("the model's signs", prefix.signs[...])
    check_inputs("x", x, features=width)
    if not isinstance(y, jax.Array | np.ndarray):
        raise expected("y", "an array", type(y).__name__, "Use jnp.asarray")
    if y.ndim != 2 or 0 in y.shape:
        raise expected(
            "y",
            f"targets [n, outputs], one row for each of the {len(x)} inputs",
            y.shape,
            "Class labels become targets by jax.nn.one_hot(y, classes), single numbers by y[:, None]",
        )
    check_finite("y", y)
    for name, array in (("x", x), ("y", y)):
        if array.dtype != jnp.float64:
            raise expected(name, "float64", array.dtype, f"Use {name}.astype(float) under x64")
        if (largest := float(jnp.abs(array).max())) > LARGEST_INPUT:
            raise expected(name, f"entries up to {LARGEST_INPUT:g}", f"{largest:.3g}", "Scale the data")
    outputs = variant.outputs(x.shape[1], outputs_wanted(y, model)) if prefix is None else prefix.output_width
    if y.shape != (len(x), outputs):
        raise expected("y", f"one row of {outputs} targets for each of the {len(x)} inputs", y.shape)
