"""The two stylized models by what they differ in, and a prefix of either that is described by its seed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ntk_prefix.checks import check_count, check_positive, expected
from ntk_prefix.typing import Array, Float, KeyArray, Signs, Weights

__all__ = ["FIXED", "TIED", "TILE", "ModelName", "RandomPrefix", "Variant", "variant_named"]

ModelName = Literal["tied", "fixed"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """In what the two stylized models differ: what a token carries as its value.

    Args:
        name: "tied" or "fixed".
        has_value_part: whether the value moves with the token, so that F depends on it through key and value.
    """

    name: ModelName
    has_value_part: bool

    def values(self, weights: Array, signs: Array) -> Array:
        """Return the values ``v_r`` of tokens, [.., outputs]: ``a_r w_r`` or ``a_r``."""
        return signs * weights if self.has_value_part else signs

    def outputs(self, d: int, outputs: int | None) -> int:
        """Return how many outputs a model of inputs of width d has that was asked for so many; None is d.

        Raises:
            UsageError: the tied model has d, and other ones were asked for.
        """
        if outputs is None:
            return d
        check_count("outputs", outputs)
        if self.has_value_part and outputs != d:
            raise expected("outputs", f"None or d = {d} for the tied model", outputs, "Leave it out")
        return outputs

    def sign_columns(self, outputs: int) -> int:
        """Return the columns of ``a``: one for each output, or one in all."""
        return 1 if self.has_value_part else outputs


TIED, FIXED = Variant("tied", True), Variant("fixed", False)


def variant_named(name: str) -> Variant:
    """Return the variant of that name.

    Raises:
        UsageError: there is none.
    """
    for variant in (TIED, FIXED):
        if variant.name == name:
            return variant
    raise expected("model", '"tied" or "fixed"', repr(name))


TILE = 8192
"""Distinct prefix rows drawn from one counter. A constant of the format: with it changes every drawn prefix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPrefix:
    """A prefix of m tokens at initialization, described by its seed instead of its m rows.

        w_r ~ N(0, sigma^2 I_d) ,   a uniform in {-1, +1}

    Row blocks are drawn from a counter (``jax.random.fold_in(key, tile)``), so any part of the prefix can be
    recomputed anywhere: a prefix of 10^9 tokens takes no memory, does not depend on how many devices share it, and a
    shorter one with the same key is its beginning. The models start from exactly these rows.

    With ``symmetric`` the rows come in neighboring pairs ``(w, a), (w, -a)``, which makes F = 0 at the start.

    Args:
        key: a ``jax.random.key``.
        d: width of a token.
        m: number of tokens; even if symmetric.
        sigma: standard deviation of every coordinate.
        symmetric: pair the rows.
        model: "tied" (one sign a token) or "fixed" (one sign a token and output).
        outputs: width of the output of the fixed model; d if None. The tied model has d outputs.
        dtype: of the rows; None is JAX's default float.

    Raises:
        ValueError: m odd with symmetric, m, d or sigma not positive, a sigma whose draws the dtype does not hold, outputs given
            for the tied model, a number for a key.
    """

    key: KeyArray
    d: int
    m: int
    sigma: float = 1.0
    symmetric: bool = True
    model: ModelName = "tied"
    outputs: int | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        check_count("d", self.d)
        check_count("m", self.m)
        check_positive("sigma", self.sigma)
        if isinstance(self.key, int | np.integer):
            raise expected("key", "a random key", f"the number {self.key}", f"Use jax.random.key({self.key})")
        if self.symmetric and self.m % 2:
            raise expected(
                "m",
                "an even number of prefix tokens, since symmetric initialization draws pairs",
                self.m,
                f"Use m={self.m + 1}, or symmetric=False",
            )
        self.variant.outputs(self.d, self.outputs)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise expected("dtype", "a floating point dtype or None", self.dtype)
        limits = jnp.finfo(self.tile_dtype)
        # no draw is ten deviations away; below the smallest normal number all would be zero
        smallest, largest = float(limits.smallest_normal), float(limits.max) / 10
        if not smallest <= self.sigma <= largest:
            wanted = f"a number from {smallest:.3g} to {largest:.3g}, whose draws {self.tile_dtype} holds"
            raise expected("sigma", wanted, self.sigma)

    @property
    def variant(self) -> Variant:
        """Which of the two models these are the tokens of."""
        return variant_named(self.model)

    @property
    def output_width(self) -> int:
        """Number of outputs of the model."""
        return self.variant.outputs(self.d, self.outputs)

    @property
    def rows(self) -> int:
        """Distinct rows: m / 2 with symmetric initialization, else m."""
        return self.m // 2 if self.symmetric else self.m

    @property
    def tile_dtype(self) -> jnp.dtype:
        """Dtype of the rows: the one asked for, or JAX's default float."""
        return jnp.dtype(self.dtype or jnp.result_type(float))

    @property
    def tiles(self) -> int:
        """Number of row blocks, each ``TILE`` rows (the last one is cut)."""
        return -(-self.rows // TILE)

    def tile(self, index: Array | int) -> tuple[Float[Array, "tile d"], Float[Array, "tile o"]]:
        """Draw the ``index``-th block of distinct rows: weights [TILE, d] and signs [TILE, 1 or outputs]."""
        dtype = self.tile_dtype
        weight_key, sign_key = jax.random.split(jax.random.fold_in(self.key, index))
        weights = self.sigma * jax.random.normal(weight_key, (TILE, self.d), dtype)
        columns = self.variant.sign_columns(self.output_width)
        bits = jax.random.bits(sign_key, (TILE, columns), jnp.uint8) & 1
        return weights.astype(dtype), 2 * bits.astype(dtype) - 1

    def materialise(self) -> tuple[Weights, Signs]:
        """All m rows: weights [m, d] and signs [m, 1 or outputs]."""
        # whole tiles are drawn by a program that prefixes of many lengths share: drawing is what takes long to compile
        weights, signs = _whole_tiles(dataclasses.replace(self, m=2), self.tiles)
        return _arranged(weights, signs, self.rows, self.symmetric)


jax.tree_util.register_dataclass(
    RandomPrefix,
    data_fields=["key"],
    meta_fields=["d", "m", "sigma", "symmetric", "model", "outputs", "dtype"],
)


@functools.partial(jax.jit, static_argnames="tiles")
def _whole_tiles(prefix: RandomPrefix, tiles: int) -> tuple[Array, Array]:
    """Return the rows of so many tiles: weights [tiles TILE, d] and signs [tiles TILE, 1 or outputs]."""
    weights, signs = jax.lax.map(prefix.tile, jnp.arange(tiles))
    return weights.reshape(-1, weights.shape[-1]), signs.reshape(-1, signs.shape[-1])


@functools.partial(jax.jit, static_argnames=("rows", "symmetric"))
def _arranged(weights: Array, signs: Array, rows: int, symmetric: bool) -> tuple[Array, Array]:
    """Return the first rows, each twice and with both signs if symmetric."""
    weights, signs = weights[:rows], signs[:rows]
    if symmetric:
        weights = jnp.repeat(weights, 2, axis=0)
        signs = jnp.stack([signs, -signs], axis=1).reshape(2 * rows, -1)
    return weights, signs
