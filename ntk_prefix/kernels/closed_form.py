"""The kernel of a finite prefix in closed form, streamed over its tokens.

The derivative of an output by a prefix token is known (``one_layer.tied_jacobian``), so the kernel

    H(W)_{(i,k),(j,l)} = (1/m) sum_r < dF_k(x_i)/dw_r , dF_l(x_j)/dw_r >

is one Gram matrix of a thin feature matrix with one column per token. With T = m S and c_ij = x_i . x_j

    fixed   phi_{(i,k)} = T_i (a_k - <a_k, S_i>)
                                               H = c_ij G / m
    tied    phi_{(i,0)} = T_i ,  phi_{(i,k)} = T_i (w_k - a v_{i,k})
                                               H = (G_00 delta_kl + x_{j,k} G_0l + G_k0 x_{i,l} + c_ij G_kl) / m

where v_i = <a w, S_i> is the model's output over m, and a^2 = 1 has been used. Columns are made block by block and
forgotten: memory is O(p^2 + p * block) with p = n (d + 1), whatever m is, and the work is the matrix product, 2 m p^2
flops (half of it when x2 is None: the kernel is symmetric and only one triangle is computed).

A symmetric prefix described by its seed needs one pass: the centre is zero, the normaliser is near its expectation
and a pair of tokens contributes twice the same. Any other prefix is passed over twice: first the normalisers and
centres, then the Gram matrix of the centred features, so nothing is lost to cancellation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ntk_prefix.checks import check_inputs
from ntk_prefix.one_layer import (
    TILE,
    FixedValuePrefixModel,
    ModelName,
    RandomPrefix,
    TiedPrefixModel,
    accumulation_dtype,
)
from ntk_prefix.typing import Array, Float, Inputs, Kernel, OtherInputs

__all__ = ["KernelPart", "prefix_ntk"]

KernelPart = Literal["full", "key"]

BLOCK_BYTES = 2**24
"""Bytes of the feature block held at once when ``block`` is left open: larger ones leave the caches (1.2x slower)."""

BANDS = 4
"""Row bands of the triangle: the work is (1 + 1/BANDS) / 2 of the square's."""

SMALLEST_BAND = 64
"""Rows under which a band no longer reaches the machine's matrix-product rate."""

WIDEST_SCORES = 5.0
"""Standard deviation sigma |x| of Gaussian scores up to which exp(score - sigma^2 |x|^2 / 2), squared and summed over
few or many tokens, stays within float32."""


def prefix_ntk(
    model_or_prefix: TiedPrefixModel | FixedValuePrefixModel | RandomPrefix,
    x1: Inputs,
    x2: OtherInputs | None = None,
    *,
    block: int | None = None,
    mesh: Mesh | None = None,
    part: KernelPart = "full",
) -> Kernel:
    """Neural tangent kernel of a stylised prefix model with respect to its prefix, with the 1/m of H(W).

        H(W)_{(i,k),(j,l)} = (1/m) sum_r < dF_k(x1_i)/dw_r , dF_l(x2_j)/dw_r >

    The empirical NTK of the model (a plain sum over its parameters) is m times this.

    Args:
      model_or_prefix: a model with its current weights, or a ``RandomPrefix``: then the tokens are drawn block by
        block and never stored, so m = 10^9 is a matter of time only.
      x1: [n1, d] inputs, finite. Nothing is assumed of their norms.
      x2: [n2, d] inputs; None means x1, and one triangle of the kernel is computed.
      block: prefix tokens held at once; None chooses it so that the features take 16 MiB. A ``RandomPrefix`` is always
        streamed by the 8192 rows of its counter.
      mesh: devices to share the tokens among, over all axes of the mesh; None is one device.
      part: "full" is the kernel that governs gradient descent. "key" keeps only the derivative through the key (the
        x x^T part), which is the form recalled from Liang et al. for the tied model; the two agree for the fixed one.

    Returns:
      [n1, d, n2, d] (outputs in place of d for the fixed model) in the accumulation dtype: float64 for float64 inputs,
      float32 otherwise. Exactly symmetric when x2 is None.

    Raises:
      ValueError: inputs that are not a finite [n, d] of the prefix's width; a block < 1; an unknown part; a prefix of
        another type.

    Numerics: scores are shifted by their log-sum-exp, or by its expectation sigma^2 |x|^2 / 2 where they are known to
    be Gaussian and of moderate width (sigma |x| <= 5; inputs traced by a surrounding ``jax.jit`` are not known), so
    the exponentials are of order one.

    Source: derived from the gradients in ``one_layer``; checked against autodiff by the claim ``kernel``.
    """
    prefix = model_or_prefix
    if isinstance(prefix, RandomPrefix):
        model: ModelName = prefix.model
        width, rows, dtype = prefix.d, prefix.rows, accumulation_dtype(prefix.tile_dtype, x1)
    elif isinstance(prefix, TiedPrefixModel | FixedValuePrefixModel):
        model = "tied" if isinstance(prefix, TiedPrefixModel) else "fixed"
        rows, width = prefix.weights.shape
        dtype = accumulation_dtype(prefix.weights[...], x1)
    else:
        raise ValueError(
            "model_or_prefix: expected a TiedPrefixModel, FixedValuePrefixModel or RandomPrefix, "
            f"got {type(prefix).__name__}. For any other model use empirical_ntk."
        )
    for name, inputs in (("x1", x1), ("x2", x2)):
        if inputs is not None:
            check_inputs(name, inputs, features=width)
    if part not in ("full", "key"):
        raise ValueError(f'part: expected "full" or "key", got {part!r}.')
    if block is not None and block < 1:
        raise ValueError(f"block: expected at least 1 prefix token at once, got {block}.")

    if mesh is not None:
        # jax.make_mesh makes explicit axes; here the compiler places the data
        mesh = Mesh(mesh.devices, mesh.axis_names)
    devices = 1 if mesh is None else mesh.size
    if isinstance(prefix, RandomPrefix):
        tiles = -(-prefix.tiles // devices) * devices
        stream: _Stream = (jnp.arange(tiles), None)
        tile_rows = TILE
    else:
        signs = prefix.signs[...]
        columns = (1 + width if model == "tied" else signs.shape[1]) * max(len(x1), 0 if x2 is None else len(x2))
        if block is None:
            block = max(256, BLOCK_BYTES // (columns * dtype.itemsize))
        tile_rows = min(block, -(-rows // devices))
        tiles = -(-rows // (tile_rows * devices)) * devices

        def split(array: Array) -> Array:
            padded = jnp.pad(array, ((0, tiles * tile_rows - rows), (0, 0)))
            return padded.reshape(tiles, tile_rows, array.shape[1])

        stream = (jnp.arange(tiles), (split(prefix.weights[...]), split(signs)))

    return _streamed_kernel(
        # how long the prefix is travels as `rows` alone, so that lengths of one tile count share a compiled program
        dataclasses.replace(prefix, m=2) if isinstance(prefix, RandomPrefix) else None,
        stream,
        x1.astype(dtype),
        None if x2 is None else x2.astype(dtype),
        (*divmod(rows, tile_rows), jnp.asarray(rows, dtype)),
        model=model,
        tile_rows=tile_rows,
        mesh=mesh,
        part=part,
        one_pass=isinstance(prefix, RandomPrefix) and prefix.symmetric and _moderate(prefix.sigma, x1, x2),
    )


def _moderate(sigma: float, *inputs: OtherInputs | None) -> bool:
    """Whether the scores of Gaussian tokens are known to have standard deviation at most ``WIDEST_SCORES``."""
    return all(
        not isinstance(x, jax.core.Tracer) and sigma * np.linalg.norm(x, axis=1).max() <= WIDEST_SCORES
        for x in inputs
        if x is not None
    )


_Stream = tuple[Array, tuple[Array, Array] | None]
"""Per tile: its number, and its weights and signs where they are stored rather than drawn."""

_Rows = tuple[Array, Array, Array]
"""Weights, signs, and which rows are real rather than padding."""

_Tile = Callable[[_Stream], _Rows]

_Length = tuple[Array | int, Array | int, Array]
"""Whole tiles, rows of the tile after them, and all rows as a float: an integer of them may not fit 32 bits."""

_Moments = tuple[Array, Array, Array]
"""Per input: the running maximum of the scores, the sum of exponentials under it, the sum of values so weighted."""


@functools.partial(jax.jit, static_argnames=("model", "tile_rows", "mesh", "part", "one_pass"))
def _streamed_kernel(
    drawn: RandomPrefix | None,
    stream: _Stream,
    x1: Inputs,
    x2: OtherInputs | None,
    length: _Length,
    *,
    model: ModelName,
    tile_rows: int,
    mesh: Mesh | None,
    part: KernelPart,
    one_pass: bool,
) -> Kernel:
    inputs = (x1,) if x2 is None else (x1, x2)
    whole, remainder, rows = length
    axes = () if mesh is None else mesh.axis_names

    def local_sums(
        drawn: RandomPrefix | None, stream: _Stream, inputs: tuple[OtherInputs, ...]
    ) -> tuple[list[Array], list[Array]]:
        def tile(entry: _Stream) -> _Rows:
            index, stored = entry
            weights, signs = drawn.tile(index) if stored is None else stored  # type: ignore[union-attr]
            valid = (index < whole) | ((index == whole) & (jnp.arange(tile_rows) < remainder))
            return weights.astype(x1.dtype), signs.astype(x1.dtype), valid

        if drawn is not None and one_pass:
            outputs = x1.shape[1] if model == "tied" else drawn.outputs or drawn.d
            shifts = [drawn.sigma**2 * (x**2).sum(1) / 2 for x in inputs]
            centres = [jnp.zeros((len(x), outputs), x1.dtype) for x in inputs]
        else:
            shifts, centres = _normalisers(tile, stream, inputs, model, rows, axes)
            if drawn is not None and drawn.symmetric:  # of a pair one token is drawn, and the two cancel
                centres = [jnp.zeros_like(centre) for centre in centres]
        return _gram(tile, stream, inputs, shifts, centres, model, axes)

    if mesh is not None:
        local_sums = jax.shard_map(
            local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    totals, bands = local_sums(drawn, stream, inputs)
    width = 1 + x1.shape[1] if model == "tied" else bands[0].shape[1] // len(inputs[-1])
    gram = _assemble(bands, symmetric=x2 is None)
    scale = rows / (totals[0][:, None] * totals[-1][None, :])
    gram = gram.reshape(len(x1), width, len(inputs[-1]), width) * scale[:, None, :, None]
    kernel = _contract(gram, x1, inputs[-1], model, part)
    # the contraction may round its two mirrored halves apart (fused multiply-adds)
    return kernel if x2 is not None else (kernel + kernel.transpose(2, 3, 0, 1)) / 2


def _normalisers(
    tile: _Tile, stream: _Stream, inputs: tuple[OtherInputs, ...], model: ModelName, rows: Array, axes: tuple[str, ...]
) -> tuple[list[Array], list[Array]]:
    """First pass: log(mean exp score) and the model's output over m, per input, with a running maximum."""
    dtype = inputs[0].dtype

    def values(weights: Array, signs: Array) -> Array:
        return signs * weights if model == "tied" else signs

    def step(carry: list[_Moments], entry: _Stream) -> tuple[list[_Moments], None]:
        weights, signs, valid = tile(entry)
        updated = []
        for x, (top, total, moment) in zip(inputs, carry, strict=True):
            scores = jnp.where(valid[None], jnp.matmul(x, weights.T), -jnp.inf)
            new_top = jnp.maximum(top, scores.max(1))
            exponentials = jnp.exp(scores - new_top[:, None])
            fade = jnp.exp(top - new_top)
            updated.append(
                (
                    new_top,
                    fade * total + exponentials.sum(1),
                    fade[:, None] * moment + jnp.matmul(exponentials, values(weights, signs)),
                )
            )
        return updated, None

    weights, signs, _ = jax.eval_shape(tile, jax.tree.map(lambda leaf: leaf[0], stream))
    outputs = jax.eval_shape(values, weights, signs).shape[1]
    lowest = jnp.finfo(dtype).min / 2  # finite, so that fading an empty carry is 0 and not NaN
    start = [(jnp.full(len(x), lowest), jnp.zeros(len(x), dtype), jnp.zeros((len(x), outputs), dtype)) for x in inputs]
    sums, _ = jax.lax.scan(step, jax.tree.map(lambda leaf: leaf.astype(dtype), start), stream)

    shifts, centres = [], []
    for top, total, moment in sums:
        if axes:
            highest = jax.lax.pmax(top, axes)
            total = jax.lax.psum(total * jnp.exp(top - highest), axes)
            moment = jax.lax.psum(moment * jnp.exp(top - highest)[:, None], axes)
            top = highest
        shifts.append(top + jnp.log(total) - jnp.log(rows))
        centres.append(moment / total[:, None])
    return shifts, centres


def _gram(
    tile: _Tile,
    stream: _Stream,
    inputs: tuple[OtherInputs, ...],
    shifts: list[Array],
    centres: list[Array],
    model: ModelName,
    axes: tuple[str, ...],
) -> tuple[list[Array], list[Array]]:
    """Second pass: attention mass per input, and the features' Gram matrix in bands of its upper triangle."""
    dtype = inputs[0].dtype

    def features(rows: _Rows, x: Inputs, shift: Array, centre: Array) -> tuple[Array, Array]:
        weights, signs, valid = rows
        mass = jnp.where(valid[None], jnp.exp(jnp.matmul(x, weights.T) - shift[:, None]), 0)
        if model == "tied":
            through_key = weights.T[None] - signs.T[None] * centre[:, :, None]
            columns = jnp.concatenate([jnp.ones_like(mass)[:, None], through_key], axis=1)
        else:
            columns = signs.T[None] - centre[:, :, None]
        return mass.sum(1), (mass[:, None] * columns).reshape(-1, mass.shape[1])

    def step(carry: tuple[list[Array], list[Array]], entry: _Stream) -> tuple[tuple[list[Array], list[Array]], None]:
        totals, bands = carry
        rows = tile(entry)
        made = [features(rows, x, shift, centre) for x, shift, centre in zip(inputs, shifts, centres, strict=True)]
        totals = [total + mass for total, (mass, _) in zip(totals, made, strict=True)]
        left, right = made[0][1], made[-1][1]
        starts = _band_starts(left.shape[0], symmetric=len(inputs) == 1)
        products = [
            jnp.matmul(left[start:stop], right[start if len(inputs) == 1 else 0 :].T)
            for start, stop in zip(starts, [*starts[1:], left.shape[0]], strict=True)
        ]
        return (totals, [band + product for band, product in zip(bands, products, strict=True)]), None

    width = (1 if model == "tied" else 0) + centres[0].shape[1]
    p1, p2 = len(inputs[0]) * width, len(inputs[-1]) * width
    starts = _band_starts(p1, symmetric=len(inputs) == 1)
    bands = [
        jnp.zeros((stop - start, p2 - (start if len(inputs) == 1 else 0)), dtype)
        for start, stop in zip(starts, [*starts[1:], p1], strict=True)
    ]
    (totals, bands), _ = jax.lax.scan(step, ([jnp.zeros(len(x), dtype) for x in inputs], bands), stream)
    return jax.lax.psum((totals, bands), axes) if axes else (totals, bands)


def _band_starts(size: int, *, symmetric: bool) -> list[int]:
    """First rows of the bands: one band for a rectangle, up to BANDS for the triangle of a symmetric kernel."""
    count = max(1, min(BANDS, size // SMALLEST_BAND)) if symmetric else 1
    return [size * band // count for band in range(count)]


def _assemble(bands: list[Array], *, symmetric: bool) -> Float[Array, "p1 p2"]:
    """The whole Gram matrix from its bands; a symmetric one is mirrored from its upper triangle."""
    if not symmetric:
        return bands[0]
    size = bands[0].shape[1]
    upper = jnp.concatenate([jnp.pad(band, ((0, 0), (size - band.shape[1], 0))) for band in bands])
    upper = jnp.triu(upper)
    return upper + jnp.triu(upper, 1).T


def _contract(gram: Array, x1: Array, x2: Array, model: ModelName, part: KernelPart) -> Kernel:
    """From the Gram matrix of the features to the kernel: the two formulas in this module's docstring."""
    inner = jnp.matmul(x1, x2.T)[:, None, :, None]
    if model == "fixed":
        return inner * gram
    through_key = inner * gram[:, 1:, :, 1:]
    if part == "key":
        return through_key
    through_value = gram[:, :1, :, :1] * jnp.eye(x1.shape[1], dtype=gram.dtype)[None, :, None, :]
    mixed = x2.T[None, :, :, None] * gram[:, :1, :, 1:] + gram[:, 1:, :, :1] * x1[:, None, None, :]
    return through_value + mixed + through_key
