"""The kernel of a finite prefix in closed form, streamed over its tokens.

The derivative of an output by a prefix token is known (``one_layer.tied_jacobian``), so the kernel

    H(W)_{(i,k),(j,l)} = (1/m) sum_r < dF_k(x_i)/dw_r , dF_l(x_j)/dw_r >

needs no Jacobian. Write u_r for what a token contributes to the output (tied: w_r, fixed: its signs), s_r for the sign
in front (tied: a_r, fixed: 1), T = m S and v_i = <s u, S_i>, the model's output over m. With c_ij = x_i . x_j

    fixed   H = c_ij G_kl / m
    tied    H = (G_00 delta_kl + x_{j,k} G_0l + G_k0 x_{i,l} + c_ij G_kl) / m

    G_kl = sum_r T_i T_j (u_k - s v_{i,k}) (u_l - s v_{j,l})
    G_0l = sum_r T_i T_j (u_l - s v_{j,l}) ,     G_k0 = sum_r T_i T_j (u_k - s v_{i,k}) ,     G_00 = sum_r T_i T_j

and multiplied out, every G is a combination of moments ``sum_r T_i T_j f_r`` with f = u_k u_l (k <= l), s u, u, s, 1.
They depend on the pair of inputs and on the pair of coordinates separately and symmetrically, so all of them are one
matrix product over the tokens, [pairs of inputs, m] x [m, pairs of coordinates]: m n^2 o^2 / 2 flops when x2 is None,
a quarter of what the Gram matrix of the Jacobian's n o rows takes. It is made block by block of tokens and memory is
O((n^2 + o^2) (block + o^2)), whatever m is. Tokens are first moved by a common center, so that what is multiplied out
does not cancel unless single inputs have outputs far apart.

A symmetric prefix described by its seed needs one pass: the center is zero, the normalizer is near its expectation
and a pair of tokens contributes twice the same. Any other prefix is passed over twice: first the normalizers and
centers, then the moments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ntk_prefix.checks import check_count, check_held, check_inputs, expected
from ntk_prefix.one_layer import FixedValuePrefixModel, TiedPrefixModel, check_signs
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.random_prefix import TILE, RandomPrefix, Variant
from ntk_prefix.sharding import automatic
from ntk_prefix.typing import Array, Float, Inputs, Kernel, OtherInputs

__all__ = ["KernelPart", "prefix_ntk"]

KernelPart = Literal["full", "key"]

BLOCK_BYTES = 2**23
"""Bytes of the two factors held at once when ``block`` is left open: on a CPU larger ones leave the caches."""

ACCELERATOR_BLOCK_BYTES = 2**27
"""The same on a GPU or TPU, whose products are at their rate from thousands of tokens on."""

SMALLEST_BLOCK = 256
"""Tokens under which a matrix product no longer reaches the machine's rate."""

FEWEST_ROWS = 4096
"""Rows of stored weights that a program is made for, at least: some milliseconds at most, as blocks are smaller than that for
more inputs."""

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
    """Neural tangent kernel of a stylized prefix model with respect to its prefix, with the 1/m of H(W).

        H(W)_{(i,k),(j,l)} = (1/m) sum_r < dF_k(x1_i)/dw_r , dF_l(x2_j)/dw_r >

    The empirical NTK of the model (a plain sum over its parameters) is m times this.

    Args:
        model_or_prefix: a model with its current weights, or a ``RandomPrefix``: then the tokens are drawn block by
            block and never stored, so m = 10^9 is a matter of time only.
        x1: [n1, d] inputs, finite. Nothing is assumed of their norms.
        x2: [n2, d] inputs; None means x1, and only pairs i <= j are computed.
        block: prefix tokens multiplied at once; None chooses it so that the factors take 8 MiB, on an accelerator 128.
            For a ``RandomPrefix``, whose counter draws 8192 rows at a time, it is rounded down to a power of two.
        mesh: devices to share the tokens among, over all axes of the mesh; None is one device.
        part: "full" is the kernel that governs gradient descent. "key" keeps only the derivative through the key (the x
            x^T part), which is the form recalled from Liang et al. for the tied model; the two agree for the fixed one.

    Returns:
        [n1, d, n2, d] (outputs in place of d for the fixed model) in the accumulation dtype: float64 for float64
            inputs,
        float32 otherwise. Exactly symmetric when x2 is None.

    Raises:
        ValueError: inputs that are not a finite [n, d] of the prefix's width; a block < 1; an unknown part; a prefix of
            another type; a tied model whose signs are not -1 or +1; a kernel that overflows.

    Numerics: scores are shifted by their log-sum-exp, or by its expectation sigma^2 |x|^2 / 2 where they are known to
    be Gaussian and of moderate width (sigma |x| <= 5; inputs traced by a surrounding ``jax.jit`` are not known), so
    the exponentials are of order one. The error is a few eps of the largest entry. It is more only where the attention
    of given weights is all on single tokens, different ones for different inputs: then eps m |x|^2 |u|^2, which the
    centered kernel itself can be far below. Products run with JAX's default precision: on a GPU or TPU wrap a float32
    call in ``jax.default_matmul_precision("highest")``.

    Source: derived from the gradients in ``one_layer``; checked against autodiff by the claim ``kernel``.
    """
    prefix = model_or_prefix
    if isinstance(prefix, RandomPrefix):
        width, rows, dtype = prefix.d, prefix.rows, accumulation_dtype(prefix.tile_dtype, x1)
    elif isinstance(prefix, TiedPrefixModel | FixedValuePrefixModel):
        check_signs(prefix)
        rows, width = prefix.weights.shape
        dtype = accumulation_dtype(prefix.weights[...], x1)
    else:
        raise expected(
            "model_or_prefix",
            "a TiedPrefixModel, FixedValuePrefixModel or RandomPrefix",
            type(prefix).__name__,
            "For any other model use empirical_ntk",
        )
    for name, inputs in (("x1", x1), ("x2", x2)):
        if inputs is not None:
            check_inputs(name, inputs, features=width)
    if part not in ("full", "key"):
        raise expected("part", '"full" or "key"', repr(part))
    if block is not None:
        check_count("block", block)

    if mesh is not None:
        mesh = automatic(mesh)
    devices = 1 if mesh is None else mesh.size
    outputs = prefix.output_width
    pairs = len(x1) * (len(x1) + 1) // 2 if x2 is None else len(x1) * len(x2)
    if block is None:
        factor_rows = pairs + outputs * (outputs + 5) // 2 + 2
        room = BLOCK_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK_BYTES
        block = max(SMALLEST_BLOCK, room // (factor_rows * dtype.itemsize))
    if isinstance(prefix, RandomPrefix):
        tile_rows = TILE
        block = 1 << (min(block, TILE).bit_length() - 1)
        tiles = -(-prefix.tiles // devices) * devices
        # what is differentiated or compiled together with other things wants a scan, which lengths do not share
        counted = mesh is None and not any(isinstance(x, jax.core.Tracer) for x in (x1, x2, prefix.key))
        stream: _Stream = (jnp.asarray(tiles) if counted else jnp.arange(tiles), None)
    else:
        # short prefixes are filled up to one length, and share a program: it takes a hundred times as long to compile
        tile_rows = block = min(block, max(-(-rows // devices), FEWEST_ROWS))
        tiles = -(-rows // (tile_rows * devices)) * devices

        def split(array: Array) -> Array:
            padded = jnp.pad(array, ((0, tiles * tile_rows - rows), (0, 0)))
            return padded.reshape(tiles, tile_rows, array.shape[1])

        stream = (jnp.arange(tiles), (split(prefix.weights[...]), split(prefix.signs[...])))

    kernel = _streamed_kernel(
        # how long the prefix is travels as `rows` alone, so that lengths of one tile count share a compiled program
        dataclasses.replace(prefix, m=2) if isinstance(prefix, RandomPrefix) else None,
        stream,
        x1.astype(dtype),
        None if x2 is None else x2.astype(dtype),
        (*divmod(rows, tile_rows), jnp.asarray(rows, dtype)),
        variant=prefix.variant,
        tile_rows=tile_rows,
        block=block,
        mesh=mesh,
        part=part,
        one_pass=isinstance(prefix, RandomPrefix) and prefix.symmetric and _moderate(prefix.sigma, x1, x2),
    )
    check_held("the kernel", kernel)
    return kernel


def _moderate(sigma: float, *inputs: OtherInputs | None) -> bool:
    """Whether the scores of Gaussian tokens are known to have standard deviation at most ``WIDEST_SCORES``."""
    return all(
        not isinstance(x, jax.core.Tracer) and sigma * np.linalg.norm(x, axis=1).max() <= WIDEST_SCORES
        for x in inputs
        if x is not None
    )


_Stream = tuple[Array, tuple[Array, Array] | None]
"""Per tile: its number, and its weights and signs where they are stored rather than drawn. Drawn tiles may be given by how
many there are, [], which then is no part of the program."""

_Rows = tuple[Array, Array, Array]
"""Weights, signs, and which rows are real rather than padding."""

_Tile = Callable[[_Stream], _Rows]

_Length = tuple[Array | int, Array | int, Array]
"""Whole tiles, rows of the tile after them, and all rows as a float: an integer of them may not fit 32 bits."""

_Running = tuple[Array, Array, Array]
"""Per input: the running maximum of the scores, the sum of exponentials under it, the sum of values so weighted."""


@functools.partial(jax.jit, static_argnames=("variant", "tile_rows", "block", "mesh", "part", "one_pass"))
def _streamed_kernel(
    drawn: RandomPrefix | None,
    stream: _Stream,
    x1: Inputs,
    x2: OtherInputs | None,
    length: _Length,
    *,
    variant: Variant,
    tile_rows: int,
    block: int,
    mesh: Mesh | None,
    part: KernelPart,
    one_pass: bool,
) -> Kernel:
    inputs = (x1,) if x2 is None else (x1, x2)
    whole, remainder, rows = length
    axes = () if mesh is None else mesh.axis_names

    def local_sums(
        drawn: RandomPrefix | None, stream: _Stream, inputs: tuple[OtherInputs, ...]
    ) -> tuple[list[Array], Array, list[Array]]:
        def tile(entry: _Stream) -> _Rows:
            index, stored = entry
            weights, signs = drawn.tile(index) if stored is None else stored  # type: ignore[union-attr]
            valid = (index < whole) | ((index == whole) & (jnp.arange(tile_rows) < remainder))
            return weights.astype(x1.dtype), signs.astype(x1.dtype), valid

        if drawn is not None and one_pass:
            outputs = drawn.output_width
            shifts = [drawn.sigma**2 * (x**2).sum(1) / 2 for x in inputs]
            centers = [jnp.zeros((len(x), outputs), x1.dtype) for x in inputs]
        else:
            shifts, centers = _normalizers(tile, stream, inputs, variant, rows, axes)
            if drawn is not None and drawn.symmetric:  # of a pair one token is drawn, and the two cancel
                centers = [jnp.zeros_like(center) for center in centers]
        common = jnp.concatenate(centers).mean(0)
        totals, moments = _moments(tile, stream, inputs, shifts, common, variant, tile_rows // block, axes)
        return totals, moments, [center - common[None] for center in centers]

    if mesh is not None:
        local_sums = jax.shard_map(
            local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    totals, moments, centers = local_sums(drawn, stream, inputs)
    left, right = _pairs(inputs)
    moments = moments * (rows / (totals[0][left] * totals[-1][right]))[:, None]
    blocks = _contract(
        moments, (x1[left], inputs[-1][right]), (centers[0][left], centers[-1][right]), variant=variant, part=part
    )
    outputs = blocks.shape[1]
    if x2 is not None:
        return blocks.reshape(len(x1), len(x2), outputs, outputs).transpose(0, 2, 1, 3)
    place = np.zeros((len(x1), len(x1)), int)  # of (i, j) in the list of pairs i <= j
    place[left, right] = place[right, left] = np.arange(len(left))
    i, j, k, l = np.ix_(*map(np.arange, (len(x1), len(x1), outputs, outputs)))  # noqa: E741
    # the lower triangle is read from the upper one, which makes the two the same to the last bit
    upper = (jnp.asarray(i) < j) | ((i == j) & (jnp.asarray(k) <= l))
    return jnp.where(upper, blocks[place], blocks.swapaxes(1, 2)[place]).transpose(0, 2, 1, 3)


def _pairs(inputs: tuple[OtherInputs, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which inputs each pair is made of: i <= j of one set, or all of two."""
    if len(inputs) == 1:
        return np.triu_indices(len(inputs[0]))
    first, second = np.indices((len(inputs[0]), len(inputs[1]))).reshape(2, -1)
    return first, second


def _normalizers(
    tile: _Tile, stream: _Stream, inputs: tuple[OtherInputs, ...], variant: Variant, rows: Array, axes: tuple[str, ...]
) -> tuple[list[Array], list[Array]]:
    """First pass: log(mean exp score) and the model's output over m, per input, with a running maximum."""
    dtype = inputs[0].dtype

    def step(carry: list[_Running], entry: _Stream) -> tuple[list[_Running], None]:
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
                    fade[:, None] * moment + jnp.matmul(exponentials, variant.values(weights, signs)),
                )
            )
        return updated, None

    weights, signs, _ = jax.eval_shape(tile, jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf[0], stream))
    outputs = jax.eval_shape(variant.values, weights, signs).shape[1]
    lowest = jnp.finfo(dtype).min / 2  # finite, so that fading an empty carry is 0 and not NaN
    start = [(jnp.full(len(x), lowest), jnp.zeros(len(x), dtype), jnp.zeros((len(x), outputs), dtype)) for x in inputs]
    sums = _over_tiles(step, jax.tree.map(lambda leaf: leaf.astype(dtype), start), stream)

    shifts, centers = [], []
    for top, total, moment in sums:
        if axes:
            highest = jax.lax.pmax(top, axes)
            total = jax.lax.psum(total * jnp.exp(top - highest), axes)
            moment = jax.lax.psum(moment * jnp.exp(top - highest)[:, None], axes)
            top = highest
        shifts.append(top + jnp.log(total) - jnp.log(rows))
        centers.append(moment / total[:, None])
    return shifts, centers


def _over_tiles(step: Callable[[Any, _Stream], tuple[Any, None]], start: Any, stream: _Stream) -> Any:
    """Return what is carried from tile to tile, at the end."""
    index, stored = stream
    if index.ndim == 0 and stored is None:
        return jax.lax.fori_loop(0, index, lambda i, carry: step(carry, (i, None))[0], start)
    return jax.lax.scan(step, start, stream)[0]


def _moments(
    tile: _Tile,
    stream: _Stream,
    inputs: tuple[OtherInputs, ...],
    shifts: list[Array],
    common: Float[Array, " o"],
    variant: Variant,
    pieces: int,
    axes: tuple[str, ...],
) -> tuple[list[Array], Float[Array, "pairs f"]]:
    """Second pass: attention mass per input, and ``sum_r T_i T_j f_r`` in the order that ``_contract`` takes apart."""
    dtype = inputs[0].dtype
    left, right = _pairs(inputs)
    first, second = np.triu_indices(len(common))

    def factor(weights: Array, signs: Array) -> Float[Array, "f block"]:
        """Return what is summed over the tokens, u moved by the common center: u_k u_l, s u, and tied: u, s; 1."""
        one = jnp.ones((1, len(weights)), dtype)
        if not variant.has_value_part:
            moved = signs.T - common[:, None]
            return jnp.concatenate([moved[first] * moved[second], moved, one])
        sign = signs.T
        moved = weights.T - sign * common[:, None]
        return jnp.concatenate([moved[first] * moved[second], sign * moved, moved, sign, one])

    def piece(carry: tuple[list[Array], Array], rows: _Rows) -> tuple[tuple[list[Array], Array], None]:
        totals, moments = carry
        weights, signs, valid = rows
        masses = [
            jnp.where(valid[None], jnp.exp(jnp.matmul(x, weights.T) - shift[:, None]), 0)
            for x, shift in zip(inputs, shifts, strict=True)
        ]
        totals = [total + mass.sum(1) for total, mass in zip(totals, masses, strict=True)]
        products = masses[0][left] * masses[-1][right]
        return (totals, moments + jnp.matmul(products, factor(weights, signs).T)), None

    def step(carry: tuple[list[Array], Array], entry: _Stream) -> tuple[tuple[list[Array], Array], None]:
        rows = jax.tree.map(lambda leaf: leaf.reshape(pieces, -1, *leaf.shape[1:]), tile(entry))
        return jax.lax.scan(piece, carry, rows)

    columns = len(first) + len(common) + 1 + (len(common) + 1 if variant.has_value_part else 0)
    start = ([jnp.zeros(len(x), dtype) for x in inputs], jnp.zeros((len(left), columns), dtype))
    totals, moments = _over_tiles(step, start, stream)
    return jax.lax.psum((totals, moments), axes) if axes else (totals, moments)


def _contract(
    moments: Float[Array, "pairs f"],
    x: tuple[Float[Array, "pairs d"], Float[Array, "pairs d"]],
    center: tuple[Float[Array, "pairs o"], Float[Array, "pairs o"]],
    *,
    variant: Variant,
    part: KernelPart,
) -> Float[Array, "pairs o o"]:
    """From the moments to the kernel, pair by pair: the formulas in this module's docstring."""
    outputs = center[0].shape[1]
    first, second = np.triu_indices(outputs)
    entry = np.zeros((outputs, outputs), int)
    entry[first, second] = entry[second, first] = np.arange(len(first))
    quadratic, linear, *rest = jnp.split(
        moments, np.cumsum([len(first), outputs] + [outputs, 1] * variant.has_value_part), 1
    )
    mass = rest[-1][:, :, None]

    def outer(rows: Array, columns: Array) -> Array:
        return rows[:, :, None] * columns[:, None, :]

    inner = (x[0] * x[1]).sum(1)[:, None, None]
    through_key = inner * (
        quadratic[:, entry] - outer(linear, center[1]) - outer(center[0], linear) + mass * outer(*center)
    )
    if not variant.has_value_part or part == "key":
        return through_key
    plain, sign, _ = rest
    through_value = mass * jnp.eye(outputs, dtype=moments.dtype)[None]
    mixed = outer(x[1], plain - sign * center[1]) + outer(plain - sign * center[0], x[0])
    return through_value + mixed + through_key
