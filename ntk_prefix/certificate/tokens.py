"""Sums over the prefix, one tile of tokens at a time: the only place that sees the tokens.

Every pass is a loop over tiles of one shape, so a prefix of any length runs the same few compiled programs and takes
the memory of a tile, plus one number a token: how far the linearized run takes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.certificate.rounding import eigen_enclosure, gamma
from ntk_prefix.checks import expected
from ntk_prefix.one_layer import FixedValuePrefixModel, TiedPrefixModel
from ntk_prefix.random_prefix import TILE, RandomPrefix, Variant
from ntk_prefix.typing import Array

__all__ = ["LARGEST_EXPONENT", "Ball", "Claimed", "Prefix", "Tokens"]

Prefix = TiedPrefixModel | FixedValuePrefixModel | RandomPrefix
_Rows = tuple[Array, Array, Array]

PATH = 64
"""Points of a path taken at once."""

LARGEST_EXPONENT = 1.0
"""Up to which the rounding of exponentials is accounted for; far beyond what any certificate can have."""


@dataclasses.dataclass(frozen=True)
class Claimed:
    """The ball and what is claimed of it, before a pass proves or refutes it.

    Args:
        total: V, bound on the Frobenius norm of all deviations from the linearized run together.
        normalizer: h_i, [n], bound on |log sum_r S_ir(0) e^{x_i . u_r}|.
        center: s_i, [n], bound on how far the mean value c_i moves.
    """

    total: float
    normalizer: np.ndarray
    center: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ball:
    """What one pass computes of the ball ``Claimed``, every entry an upper bound.

    Args:
        normalizer, center: as in ``Claimed``, computed.
        parts: bounds on the operator norm of each part of (J(W) - J(W(0))) / sqrt(m), by name.
    """

    normalizer: np.ndarray
    center: np.ndarray
    parts: dict[str, float]

    @property
    def drift(self) -> float:
        """Bound on |J(W) - J(W(0))|_op / sqrt(m) in the ball."""
        return sum(self.parts.values())


class Tokens:
    """A prefix at the point where the certificate starts, and the inputs it is seen by.

    Args:
        prefix: a model with its current weights, or a ``RandomPrefix``, which is drawn tile by tile and never stored.
        inputs: [n, d], float64.
    """

    def __init__(self, prefix: Prefix, inputs: Array) -> None:
        self.inputs = np.asarray(inputs)
        self.norms = np.linalg.norm(self.inputs, axis=1) * (1 + gamma(self.inputs.shape[1] + 9))
        self.prefix = prefix
        self.variant = prefix.variant
        self.m: int = prefix.m
        self.paired = isinstance(prefix, RandomPrefix) and prefix.symmetric
        """Of a pair (w, a), (w, -a) one token is drawn: both move equally far, and every sum here counts it twice."""
        self.rows = self.m // 2 if self.paired else self.m
        self._stored: tuple[Array, ...] | None = None
        if not isinstance(prefix, RandomPrefix):
            pad = -self.rows % TILE
            self._stored = tuple(
                jnp.pad(array[...].astype(float), ((0, pad), (0, 0))).reshape(-1, TILE, array[...].shape[1])
                for array in (prefix.weights, prefix.signs)
            )
        self._normalize()

    @property
    def outputs(self) -> int:
        """Number of outputs of the model."""
        return self.center.shape[1]

    def _tiles(self) -> Iterator[_Rows]:
        """Weights, signs and which of the rows are real."""
        for index in range(-(-self.rows // TILE)):
            if isinstance(self.prefix, RandomPrefix):
                weights, signs = _drawn(dataclasses.replace(self.prefix, m=2), index)
            elif self._stored is not None:
                weights, signs = (array[index] for array in self._stored)
            yield weights, signs, jnp.arange(TILE) < self.rows - index * TILE

    @property
    def _copies(self) -> int:
        return 2 if self.paired else 1

    def _normalize(self) -> None:
        """First pass: normalizers of the attention and mean values, and the rounding of everything built on them.

        A score is off by gamma_d |x_i| |w_r|, the shifted score by three more roundings of it, the normalizer by as
        much and by its sum: hence the relative error of T_ir. Whatever else is computed here is made of positive
        terms with at most four factors T or S, a bounded number of other operations, and exponentials of arguments
        below 1, whose relative error is at most that of the argument.
        """
        found = [_scores(*tile, self.inputs, variant=self.variant) for tile in self._tiles()]
        top, total, moment, size, longest = (
            np.stack([np.asarray(entry) for entry in part]) for part in zip(*found, strict=True)
        )
        highest = top.max(0)
        fade = np.exp(top - highest[None])
        mean = (fade * total).sum(0) * self._copies / self.m
        self.shift = highest + np.log(mean)
        if not np.isfinite(self.shift).all():
            raise expected("x and the prefix", "scores w_r . x_i that float64 holds", "an overflow", "Scale them down")
        self.largest_mass = np.exp(highest - self.shift)
        d = self.inputs.shape[1]
        score = (gamma(d + 2) + gamma(8)) * float(self.norms.max() * longest.max()) + gamma(16) * (
            1 + float(np.abs(self.shift).max())
        )
        self.slack = 16 * (2 * score + gamma(self.m + 64 * (d + len(self.inputs)) + 256))
        """Relative error of every positive sum below (twelve roundings of T or of an exponent, and the sum itself)."""
        if not self.slack <= 1:  # of scores from about 1e13 on: nothing is known of any sum
            raise expected(
                "x and the prefix",
                "scores w_r . x_i whose rounding is small beside 1",
                f"{self.slack:.3g}",
                "Scale them down",
            )
        if self.paired:
            self.center = np.zeros_like(moment[0])
            self.center_error = 0.0
        else:
            total_mass = (mean * self.m)[:, None]
            self.center = (fade[:, :, None] * moment).sum(0) / total_mass
            # a sum within a tile, then over tiles; S_ir stands in numerator and denominator. Relative to sum_r S_ir |v_r|
            terms = min(self.m, TILE) + len(found) + 64
            sizes = (fade[:, :, None] * size).sum(0) / total_mass
            self.center_error = 2.1 * (score + gamma(terms)) * float(np.linalg.norm(sizes)) * (1 + self.slack)
        self.value_reach = np.linalg.norm(self.center, axis=1) * (1 + self.slack) + self.center_error
        """|c_i|, [n]."""

    def outputs_now(self) -> tuple[np.ndarray, float]:
        """Return the model's outputs F(x_i) = m c_i, [n, o], and the Frobenius norm of their rounding error."""
        return self.m * self.center, self.m * self.center_error * (1 + self.slack)

    def second_moments(self) -> tuple[np.ndarray, float]:
        """Bounds on lambda_max(sum_r S_ir v_r v_r^T), [n], and the rounding of the kernel ``prefix_ntk`` computes.

        Every entry of that kernel is a sum of products that are at most T_ir T_jr b_ir b_jr in absolute value, with
        b_ir = sqrt(d) (tied) + |x_i| (|v_r| + 3 max|c|); an error relative to those is, in Frobenius norm, at most
        slack (1/m) sum_r sum_i T_ir^2 b_ir^2.
        """
        moments: Any = 0.0
        squares = 0.0
        reach = 3 * self.value_reach.max()
        for tile in self._tiles():
            moment, square = _second_moments(*tile, *self._common(), reach, variant=self.variant)
            moments, squares = moments + np.asarray(moment), squares + float(square)
        return (
            self._largest(moments * self._copies / self.m),
            self.slack * (1 + self.slack) * squares * self._copies / self.m,
        )

    def _common(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.inputs, self.shift, self.norms

    def _largest(self, matrices: np.ndarray) -> np.ndarray:
        """Upper bounds on the largest eigenvalues of positive sums ``sum z v v^T``, [..., o, o]."""
        found = eigen_enclosure(matrices)
        # the entries' error is relative to sum z |v_k| |v_l|, whose Frobenius norm is at most the trace
        return np.maximum(found.values[..., -1], 0) + found.radius + self.slack * np.trace(matrices, axis1=-2, axis2=-1)

    def movement(self, path: np.ndarray, between: float) -> np.ndarray:
        """Bounds rho_r on how far the linearized run takes each token, [tiles, rows of a tile].

            rho_r = max_k |J_r^T q_k| / m + |J_r|_F between / m

        Args:
            path: m q_k, [k, n, o]: a polygon near which ``m q(t)`` stays, J^T q(t) being the linearized displacement.
            between: Frobenius norm of the largest distance of m q(t) from that polygon.
        """
        # the products of one component are rounded relative to |J_r|_F |q|; what the center is off by, on its own
        # a few sizes only, so that all lengths of a path share a program: the last point stands again
        path = np.concatenate([path, np.repeat(path[-1:], -len(path) % PATH, axis=0)])
        longest = float(np.sqrt(np.square(path).sum((1, 2)).max()))
        reach, missed = between + self.slack * longest, self.center_error * longest
        return np.stack(
            [
                np.asarray(
                    _movement(
                        *tile, *self._common(), self.center, self.value_reach, path, reach, missed, variant=self.variant
                    )
                )
                for tile in self._tiles()
            ]
        ) * ((1 + self.slack) / self.m)

    def ball(self, claimed: Claimed, movement: np.ndarray, spread: np.ndarray) -> Ball:
        """One pass over the ball { u = p + v: |p_r| <= rho_r, |v|_F <= V }: theory/certificate.md, section 4.

        Args:
            claimed: V, h, s.
            movement: rho_r.
            spread: lambda_max(sum_r S_ir v_r v_r^T), [n].
        """
        sums: dict[str, np.ndarray] = {}
        steepest = 0.0
        for tile, rho in zip(self._tiles(), movement, strict=True):
            added, block = _ball(
                *tile,
                *self._common(),
                self.value_reach,
                rho,
                claimed.total,
                claimed.normalizer,
                claimed.center,
                variant=self.variant,
            )
            sums = {name: sums.get(name, 0.0) + np.asarray(value) for name, value in added.items()}
            steepest = max(steepest, float(block))
        sums = {name: value * (self._copies * (1 + self.slack)) for name, value in sums.items()}
        up, norms, total = 1 + self.slack, self.norms, claimed.total

        # a sum over S = T / m, and a root of a sum over S^2
        mean = lambda name: sums[name] / self.m  # noqa: E731
        root = lambda name: np.sqrt(sums[name]) / self.m  # noqa: E731
        normalizer = norms * (mean("grow") + total * root("grow_squared"))
        center = np.sqrt(mean("path_squared") * spread) + total * root("value_squared")
        center = np.exp(claimed.normalizer) * norms * center
        if self.variant.has_value_part:
            center = center + mean("carried") + total * root("carried_squared")

        inner = np.abs(self.inputs @ self.inputs.T) + gamma(len(self.inputs[0]) + 2) * norms[:, None] * norms[None]
        n, o = len(norms), self.outputs
        blocks = np.zeros((n, n))
        left, right = np.triu_indices(n)
        row, column = np.triu_indices(o)
        quadratic = np.zeros((len(left), o, o))
        quadratic[:, row, column] = quadratic[:, column, row] = sums["quadratic"] / self.m
        blocks[left, right] = blocks[right, left] = self._largest(quadratic)
        parts = {
            "attention, through the values": _operator(inner * blocks),
            "the mean value": _operator(inner * sums["mass"] / self.m * claimed.center[:, None] * claimed.center[None]),
            "deviations from the linearized run": steepest * total / float(np.sqrt(self.m)),
        }
        if not self.paired:
            about = np.diagonal(sums["step"]) / self.m * np.square(norms * self.value_reach)
            parts["attention, through the mean value"] = float(np.sqrt(about.sum()))
        if self.variant.has_value_part:
            parts["attention, through the tokens"] = _operator(sums["step"] / self.m)
            parts["the tokens as values"] = _operator(inner * sums["moved"] / self.m)
        parts = {name: value * up for name, value in parts.items()}
        return Ball(normalizer * up, center * up, parts)


def _operator(squares: np.ndarray) -> float:
    """Square root of an upper bound on the largest eigenvalue of a symmetric matrix of non-negative entries.

    Collatz and Wielandt: lambda_max <= max_i (M x)_i / x_i for every positive x; near Perron's vector it is sharp.
    """
    vector = np.ones(len(squares))
    floor = 1e-9 * squares.max() + np.finfo(float).tiny
    for _ in range(50):
        vector = squares @ vector + floor * vector.sum()
        vector /= vector.max()
    return float(np.sqrt(((squares @ vector) / vector).max()))


# ----------------------------------------------------------------------------- Programs of one tile


@jax.jit
def _drawn(prefix: RandomPrefix, index: Array | int) -> tuple[Array, Array]:
    weights, signs = prefix.tile(index)
    return weights.astype(float), signs.astype(float)


def _mass(weights: Array, valid: Array, inputs: Array, shift: Array) -> Array:
    """T_ir, [n, tile]; zero where there is no token."""
    return jnp.where(valid[None], jnp.exp(jnp.matmul(inputs, weights.T) - shift[:, None]), 0)


def _blocks(mass: Array, norms: Array, lengths: Array, outputs: int, variant: Variant) -> Array:
    """Bounds on |J_ir|_F, [n, tile], from |v_r - c_i| <= ``lengths``."""
    return mass * (np.sqrt(outputs) * variant.has_value_part + norms[:, None] * lengths)


@functools.partial(jax.jit, static_argnames="variant")
def _scores(weights: Array, signs: Array, valid: Array, inputs: Array, *, variant: Variant) -> tuple[Array, ...]:
    scores = jnp.where(valid[None], jnp.matmul(inputs, weights.T), -jnp.inf)
    top = scores.max(1)
    exponentials = jnp.exp(scores - top[:, None])
    values = variant.values(weights, signs)
    return (
        top,
        exponentials.sum(1),
        jnp.matmul(exponentials, values),
        jnp.matmul(exponentials, jnp.abs(values)),
        jnp.where(valid, jnp.linalg.norm(weights, axis=1), 0).max(),
    )


@functools.partial(jax.jit, static_argnames="variant")
def _second_moments(
    weights: Array,
    signs: Array,
    valid: Array,
    inputs: Array,
    shift: Array,
    norms: Array,
    reach: Array,
    *,
    variant: Variant,
) -> tuple[Array, Array]:
    mass, values = _mass(weights, valid, inputs, shift), variant.values(weights, signs)
    blocks = _blocks(mass, norms, jnp.linalg.norm(values, axis=1)[None] + reach, values.shape[1], variant)
    return jnp.einsum("ir,rk,rl->ikl", mass, values, values), jnp.square(blocks).sum()


@functools.partial(jax.jit, static_argnames="variant")
def _movement(
    weights: Array,
    signs: Array,
    valid: Array,
    inputs: Array,
    shift: Array,
    norms: Array,
    center: Array,
    reach: Array,
    path: Array,
    between: Array,
    missed: Array,
    *,
    variant: Variant,
) -> Array:
    mass, values = _mass(weights, valid, inputs, shift), variant.values(weights, signs)

    def length(point: Array) -> Array:
        """|J_r^T q|^2 of every token."""
        along = jnp.matmul(point, values.T) - (center * point).sum(1)[:, None]
        moved = jnp.matmul((mass * along).T, inputs)
        if variant.has_value_part:
            moved += signs * jnp.matmul(mass.T, point)
        return jnp.square(moved).sum(1)

    furthest = jax.lax.map(length, path).max(0)
    blocks = _blocks(mass, norms, jnp.linalg.norm(values, axis=1)[None] + reach[:, None], values.shape[1], variant)
    aside = jnp.sqrt(jnp.square(mass * norms[:, None]).sum(0)) * missed
    return jnp.sqrt(furthest) + jnp.sqrt(jnp.square(blocks).sum(0)) * between + aside


@functools.partial(jax.jit, static_argnames="variant")
def _ball(
    weights: Array,
    signs: Array,
    valid: Array,
    inputs: Array,
    shift: Array,
    norms: Array,
    reach: Array,
    rho: Array,
    total: Array,
    normalizer: Array,
    center: Array,
    *,
    variant: Variant,
) -> tuple[dict[str, Array], Array]:
    mass, values = _mass(weights, valid, inputs, shift), variant.values(weights, signs)
    outputs = values.shape[1]
    rho = jnp.where(valid, rho, 0)[None]
    x, h = norms[:, None], normalizer[:, None]
    radius = rho + total
    exponent = x * radius + h
    growth, growth_alone, size = _secant(exponent), _secant(x * radius), jnp.exp(exponent)
    step = growth * (x * rho + h)  # |S_ir / S_ir(0) - 1| without the deviation's share
    lengths = jnp.linalg.norm(values, axis=1)[None] + reach[:, None]
    left, right = np.triu_indices(len(inputs))
    row, column = np.triu_indices(outputs)
    share = mass * step
    full = mass * size
    block = jnp.sqrt(jnp.square(mass * growth * x * (variant.has_value_part + x * lengths)).sum(0))
    sums = {
        "grow": (mass * growth_alone * rho).sum(1),
        "grow_squared": jnp.square(mass * growth_alone).sum(1),
        "path_squared": (mass * jnp.square(growth_alone * rho)).sum(1),
        "value_squared": jnp.square(mass * growth_alone * lengths).sum(1),
        "quadratic": jnp.matmul(share[left] * share[right], values[:, row] * values[:, column]),
        "step": jnp.matmul(share, share.T),
        "mass": jnp.matmul(full, full.T),
    }
    if variant.has_value_part:
        block += jnp.sqrt(jnp.square(full * x).sum(0))
        sums |= {
            "carried": (full * rho).sum(1),
            "carried_squared": jnp.square(full).sum(1),
            "moved": jnp.matmul(full * rho, (full * rho).T),
        }
    return sums, block.max()


def _secant(size: Array) -> Array:
    """(e^y - 1) / y, the largest |e^t - 1| / |t| over |t| <= y."""
    return jnp.where(size > 0, jnp.expm1(size) / jnp.where(size > 0, size, 1), 1)
