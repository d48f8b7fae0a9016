r"""The loss of a language model without its logits: a part of the tokens at a time, and only parts that have a loss.

For a vocabulary of 128,000 the logits [B, T, V] in float32 are the largest array of a training step. Tokens meet in none of
``L = sum_t c_t (logsumexp_v l_tv - l_{t, y_t})``, so they are cut into parts of at most :data:`PART_BYTES`; what is needed
for the gradient of a part is computed with its loss, and the logits are gone when the next part begins. A part in which all
``c_t`` are 0, such as of prompts or padding, is passed over.

Source: derived; a loss computed with its gradient is known from Liger's and tokamax' fused linear cross entropy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntk_prefix import sharding
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Float, Int

__all__ = ["PART_BYTES", "cross_entropy", "in_parts", "weighted_cross_entropy"]

PART_BYTES = 2**27
"""Of the logits that a device holds at a time."""

Logits = Callable[[Any, Float[Array, "B t D"]], Float[Array, "B t V"]]


def cross_entropy(logits: Float[Array, "B t V"], labels: Int[Array, "B t"]) -> Float[Array, "B t"]:
    """Return ``logsumexp(logits) - logits[label]``, in a form in which a divided vocabulary stays divided."""
    logits = logits.astype(accumulation_dtype(logits.dtype))
    logits = sharding.constrain(logits, "batch", None, "vocab")
    of_label = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None] == labels[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(of_label, logits, 0), axis=-1)


def in_parts(function: Callable[..., Any], vocab_size: int, *arrays: Array) -> Any:
    """Return what a function of [B, t, ...] returns for [B, T, ...], computed for a part of the tokens at a time.

    Args:
        function: of one part of each array; returns arrays [B, t, ...]. It must not be differentiated.
        vocab_size: V of the logits [B, t, V] that the function holds.
        arrays: [B, T, ...].
    """
    length = arrays[0].shape[1]
    parts = _cut(vocab_size, arrays)
    return jax.tree.map(lambda x: _join(x, length), jax.lax.map(lambda part: function(*part), parts))


def weighted_cross_entropy(
    logits: Logits,
    weights: Any,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    coefficients: Float[Array, "B T"],
    *,
    vocab_size: int,
) -> Float[Array, ""]:
    """Return ``sum coefficient * cross entropy`` over all tokens.

    Args:
        logits: of (weights, hidden), and of nothing else that is trained.
        weights: what the logits are made with besides hidden states, a pytree; those that are trained get a gradient.
        hidden: [B, T, D].
        labels: [B, T], in the vocabulary also where the coefficient is 0.
        coefficients: [B, T]; they get no gradient.
        vocab_size: V.

    Differentiation: reverse mode.

    Numerics: as without parts, but for the order of sums; gradients of weights are summed over parts in float32 at least.
    """
    leaves, structure = jax.tree.flatten(weights)

    def of_leaves(leaves: list[Array], hidden: Array) -> Array:
        return logits(jax.tree.unflatten(structure, leaves), hidden)

    return _weighted(of_leaves, vocab_size, leaves, hidden, labels, coefficients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(
    logits: Logits, vocab_size: int, weights: list[Array], hidden: Array, labels: Array, coefficients: Array
) -> Array:
    loss = functools.partial(_loss, logits, weights)

    def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _where_there_is_a_loss(loss, part), None

    zero = jnp.zeros((), accumulation_dtype(hidden.dtype))
    return jax.lax.scan(add, zero, _cut(vocab_size, (hidden, labels, coefficients)))[0]


def _forward(
    logits: Logits, vocab_size: int, weights: list[Any], hidden: Any, labels: Any, coefficients: Any
) -> tuple[Array, Any]:
    values: list[Array] = [weight.value for weight in weights]
    moved = [index for index, weight in enumerate(weights) if weight.perturbed]

    def loss(trained: list[Array], *part: Array) -> Array:
        own = dict(zip(moved, trained, strict=True))
        return _loss(logits, [own.get(index, value) for index, value in enumerate(values)], *part)

    trained = [values[index] for index in moved]
    both = functools.partial(jax.value_and_grad(loss, argnums=(0, 1)), trained)

    def add(sums: Any, part: tuple[Array, ...]) -> tuple[Any, Array]:
        value, (of_weights, of_hidden) = _where_there_is_a_loss(both, part)
        return jax.tree.map(lambda total, each: total + each.astype(total.dtype), sums, (value, of_weights)), of_hidden

    zeros = [jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)) for leaf in trained]
    start = (jnp.zeros((), accumulation_dtype(hidden.value.dtype)), zeros)
    # a gradient over a mesh is reduced in every part: of trained weights there is one
    whole = bool(moved) and sharding.current_mesh() is not None
    parts = _cut(vocab_size, (hidden.value, labels.value, coefficients.value), whole=whole)
    (value, sums), of_hidden = jax.lax.scan(add, start, parts)
    gradients: list[Array | None] = [None] * len(values)
    for index, leaf, total in zip(moved, trained, sums, strict=True):
        gradients[index] = total.astype(leaf.dtype)
    return value, (gradients, _join(of_hidden, hidden.value.shape[1]))


def _backward(logits: Logits, vocab_size: int, residuals: Any, d_loss: Any) -> tuple[Any, ...]:
    gradients, of_hidden = residuals
    scaled = [None if each is None else (d_loss * each).astype(each.dtype) for each in gradients]
    return scaled, (d_loss * of_hidden).astype(of_hidden.dtype), None, None


_weighted.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss(logits: Logits, weights: Any, hidden: Array, labels: Array, coefficients: Array) -> Array:
    each = cross_entropy(logits(weights, hidden), labels)
    return jnp.sum(each * coefficients.astype(each.dtype))


def _where_there_is_a_loss(function: Callable[..., Any], part: tuple[Array, ...]) -> Any:
    """Return the function of (hidden, labels, coefficients), zeros if no coefficient is other than 0."""
    shapes = jax.eval_shape(function, *part)
    nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    return jax.lax.cond(jnp.any(part[-1] != 0), function, nothing, *part)


def _cut(vocab_size: int, arrays: tuple[Array, ...], *, whole: bool = False) -> tuple[Array, ...]:
    """Return the arrays [B, T, ...] as [parts, B, t, ...], zeros at the end."""
    mesh = sharding.current_mesh()
    rows, length = arrays[0].shape[:2]
    shares = 1 if mesh is None else mesh.size
    parts = 1 if whole else min(length, -(-rows * length * vocab_size * 4 // (PART_BYTES * shares)))
    size = -(-length // max(1, parts))
    parts = -(-length // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, parts * size - length), *((0, 0),) * (x.ndim - 2)))
        cut = jnp.moveaxis(x.reshape(rows, parts, size, *x.shape[2:]), 1, 0)
        return sharding.constrain(cut, None, "batch")

    return tuple(map(cut, arrays))


def _join(x: Array, length: int) -> Array:
    """Return [parts, B, t, ...] as [B, T, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
