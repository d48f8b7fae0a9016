r"""Attention in almost linear time: a low-degree polynomial in the place of the exponential, full or causal.

    e^s  ->  P_g(s) = sum_{t<=g} s^t / t! ,     s = scale q . k ,     P_g(s) = phi(q) . phi(k)

with the ``R = C(H + g, g)`` merged monomials of :class:`~ntk_prefix.feature_maps.Taylor`. Keys and values enter through
sums over tokens alone, so n tokens cost ``O(n R H)`` and not ``O(n^2 H)``: less, as long as the scores are small enough
for a low degree. :func:`polynomial_degree` says which degree an error asks for; ``python -m theory phase_transition``
shows where it stops paying off.

Unlike :func:`~ntk_prefix.attention.ntk_attention`, which replaces the prefix only, this replaces all of the attention:
queries, keys and values are those of the whole sequence, prompt and inputs alike.

Source: the algorithm of Alman & Song 2023 with merged monomials, causal by prefix sums over blocks; the degree: derived
from Taylor's remainder (theory/README.md, sections 11 and 16).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ntk_prefix.checks import (
    check_count,
    check_flag,
    check_floating,
    check_non_negative,
    check_positive,
    check_scale,
    expected,
)
from ntk_prefix.feature_maps import Minimax, Taylor
from ntk_prefix.feature_maps.minimax import LARGEST_DEGREE
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import by_compiler, varying
from ntk_prefix.typing import Array, Float

__all__ = ["polynomial_attention", "polynomial_degree", "polynomial_exponential"]

logger = logging.getLogger(__name__)

FEATURES_PER_BLOCK = 2**21
"""Features held at a time, 16 MiB of float64: what bounds the memory beside inputs and outputs."""

LARGEST_SCORE = 1e15
"""Whose degrees are whole numbers in float64."""

BLOCK = 256
"""Most tokens of one block. A causal block costs BLOCK scores per token, so it must not grow with n."""


def polynomial_degree(score: float, error: float, polynomial: Literal["taylor", "minimax"] = "taylor") -> int:
    """Return the smallest degree whose output error is proved to be at most ``error * max|V|``.

        2 eps / (1 - eps) <= error ,     eps = e^S S^{g+1} / (g+1)!

    or, of the polynomial that is nearest to the exponential up to S, eps as :class:`~ntk_prefix.feature_maps.Minimax` bounds
    it: at S = 8 and 1 % the degree is 13 and not 30, a rank C(H + g, g) of 2.0e5 and not 4.9e7 at H = 8.

    For ``S = c log n`` it grows as ``3.591 c log n``: 3.591 solves k (log k - 1) = 1.

    Args:
        score: S >= 0, the largest |scale q . k|; ``scale * max|q| * max|k|`` bounds it in O(n). (With entries up to B
            and the default scale, S <= sqrt(H) B^2.)
        error: > 0; of the outputs, over the largest |value|.
        polynomial: "taylor", or "minimax", which takes scores up to 8 and has to be told them (``score`` of
            :func:`polynomial_attention`).

    Returns:
        g >= 0, of either parity: with eps < 1 the polynomial is positive on these scores.

    Raises:
        ValueError: a score that is negative or not finite, or beyond what ``minimax`` takes; an error that is not positive,
            or less than what rounding leaves of it; an unknown polynomial.

    Numerics: in log space, so that scores in the thousands are fine.

    Source: derived (theory/README.md, section 11).
    """
    check_non_negative("score", score)
    if score > LARGEST_SCORE:
        raise expected("score", f"at most {LARGEST_SCORE:g}", score, "A degree is at least as large")
    check_positive("error", error)
    if polynomial not in ("taylor", "minimax"):
        raise expected("polynomial", '"taylor" or "minimax"', repr(polynomial))
    if score == 0:
        return 0
    if polynomial == "minimax":
        return _minimax_degree(score, error)

    def proved(degree: int) -> bool:
        remainder = score + (degree + 1) * math.log(score) - math.lgamma(degree + 2)
        return remainder <= math.log(error) - math.log(2 + error)

    # the remainder falls from degree S on, where the search may halve; below it is larger than one
    low, high = math.floor(score) - 1, max(1, math.ceil(score))
    while not proved(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proved(middle) else (middle, high)
    return high


def _minimax_degree(score: float, error: float) -> int:
    def proved(degree: int) -> bool:
        relative = Minimax(degree, score).error_bound(math.sqrt(score))
        return relative < 1 and 2 * relative / (1 - relative) <= error

    # rounding grows with the degree: what is not proved at a low one need not be at a high one
    low, high = -1, max(1, math.ceil(score))
    while not proved(high):
        low, high = high, high + math.ceil(high / 4)
        if high > LARGEST_DEGREE:
            wanted = "an error that a polynomial found in float64 keeps (about 1e-6 at S = 8)"
            raise expected("error", wanted, error, 'Take polynomial="taylor", or a smaller score')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proved(middle) else (middle, high)
    return high


def polynomial_exponential(
    scores: Float[Array, "..."], degree: int, coefficients: Sequence[float] | None = None
) -> Float[Array, "..."]:
    """``P_g(s) = sum_{t<=g} b_t s^t / t!``, by Horner's rule; b = 1 without coefficients.

    With b = 1 it is positive for every s if the degree is even.
    """
    check_floating("scores", scores)
    check_count("degree", degree, 0)
    weights = [1.0] * (degree + 1) if coefficients is None else coefficients
    if len(weights) != degree + 1:
        raise expected("coefficients", f"degree + 1 = {degree + 1} numbers", len(weights))
    total = jnp.full_like(scores, weights[degree])
    for t in range(degree, 0, -1):
        total = weights[t - 1] + total * scores / t
    return total


@functools.partial(jax.jit, static_argnames=("degree", "is_causal", "scale", "score"))
@by_compiler(4)
def polynomial_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    degree: int,
    is_causal: bool = False,
    scale: float | None = None,
    score: float | None = None,
) -> Float[Array, "B T N H"]:
    r"""Attention with ``e^s`` replaced by its Taylor polynomial, in time and memory linear in the tokens.

        T = diag( phi(Q) sum_j phi(k_j) )^{-1}  phi(Q) sum_j phi(k_j) v_j^T ,     causal: the sums over j <= i

    It is worth it while R = C(H + g, g) is well below the number of tokens; beyond, exact attention is cheaper, and a
    warning is logged. Causal sums go from block to block; within a block the polynomial is evaluated on the scores
    themselves, which is the same number.

    Args:
        query: [B, T, N, H], not scaled.
        key, value: [B, S, K, H] with N a multiple of K; causal: S = T.
        degree: g >= 0. An even one keeps every weight positive, so that the output stays between the values whatever
            the scores; an odd one does where the scores are within what :func:`polynomial_degree` was asked for.
        is_causal: token i attends to tokens j <= i.
        scale: of the scores; 1/sqrt(H) by default.
        score: None for Taylor's polynomial; else S > 0, for the one that is nearest to the exponential where
            |scale q . k| <= S, which it must be: beyond S its weights are far off, and of odd degrees negative.

    Returns:
        [B, T, N, H] in the dtype of ``query``. With |scale q . k| <= S it is within ``2 eps / (1 - eps) max|V|`` of
        softmax attention, eps as in :func:`polynomial_degree`.

    Raises:
        ValueError: shapes that do not fit together, an empty sequence, degree < 0, scale <= 0.

    Numerics: sums accumulate in float32 at least. The polynomial of a negative score cancels: a weight has the
    relative error of ``e^{2 S}`` roundings at worst, so scores beyond 5 want float64.

    Memory: ``FEATURES_PER_BLOCK`` features at a time and one state of R (H + 1) numbers per head, whatever n is. The
    gradient of the causal form keeps one state a block.

    Source: Alman & Song 2023 (the algorithm); merged monomials and the causal form derived here.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
    if not query.ndim == key.ndim == value.ndim == 4:
        raise expected("query, key, value", "[B, T, heads, H] each", f"{query.shape}, {key.shape} and {value.shape}")
    heads, width = query.shape[2], query.shape[3]
    if (
        key.shape != value.shape
        or (key.shape[0], key.shape[3]) != (query.shape[0], width)
        or heads % max(key.shape[2], 1)
    ):
        raise expected(
            "key, value",
            f"[{query.shape[0]}, S, K, {width}] with K a divisor of {heads}",
            f"{key.shape} and {value.shape}",
            f"They share batch and head dimension with the query {query.shape}",
        )
    if 0 in (*query.shape, *key.shape):
        raise expected("query, key", "at least one token", f"query {query.shape} and key {key.shape}")
    if is_causal and query.shape[1] != key.shape[1]:
        raise expected("is_causal", "as many queries as keys", f"{query.shape[1]} and {key.shape[1]}")
    scale = check_scale(scale, width)
    check_flag("is_causal", is_causal)
    phi = Taylor(degree) if score is None else Minimax(degree, score)
    if phi.dim(width) > key.shape[1]:
        logger.warning("%d features for %d tokens: exact attention is cheaper", phi.dim(width), key.shape[1])
    dtype = accumulation_dtype(query, key, value)
    groups = heads // key.shape[2]
    block = max(1, min(BLOCK, max(query.shape[1], key.shape[1]), FEATURES_PER_BLOCK // (phi.dim(width) * groups)))

    # [B, K, blocks, ...]: query heads of a group stand beside one another, since they share keys
    grouped = query.reshape(*query.shape[:2], key.shape[2], groups, width) * math.sqrt(scale)
    queries = _blocks(grouped.transpose(0, 2, 1, 3, 4).astype(dtype), block)
    keys = _blocks((key * math.sqrt(scale)).transpose(0, 2, 1, 3).astype(dtype), block)
    ones = jnp.ones((*value.shape[:3], 1), dtype)
    # a column of ones carries the denominator; what pads the last block is zero in both
    values = _blocks(jnp.concatenate([value.astype(dtype), ones], axis=3).transpose(0, 2, 1, 3), block)
    attend = functools.partial(_causal if is_causal else _full, phi)
    sums = jax.vmap(jax.vmap(attend))(queries, keys, values)
    sums = sums.reshape(*sums.shape[:2], -1, groups, width + 1)[:, :, : query.shape[1]]
    output = (sums[..., :-1] / sums[..., -1:]).transpose(0, 2, 1, 3, 4)
    return output.reshape(query.shape).astype(query.dtype)


def _blocks(x: Float[Array, "B K T ..."], block: int) -> Float[Array, "B K blocks block ..."]:
    """Cut the tokens into blocks, the last one filled with zeros."""
    count = -(-x.shape[2] // block)
    padded = jnp.pad(x, [(0, 0)] * 2 + [(0, count * block - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
    return padded.reshape(*x.shape[:2], count, block, *x.shape[3:])


def _full(
    phi: Taylor | Minimax,
    queries: Float[Array, "qb t G H"],
    keys: Float[Array, "kb t H"],
    values: Float[Array, "kb t V"],
) -> Float[Array, "qb t G V"]:
    """Numerators and denominators of one head: all keys into one state, then every query against it."""

    def add(state: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        return state + phi(block[0]).T @ block[1], None

    start = jnp.zeros((phi.dim(keys.shape[-1]), values.shape[-1]), values.dtype)
    state, _ = jax.lax.scan(add, varying(start, keys, values), (keys, values))
    return jax.lax.map(lambda block: phi(block) @ state, queries)


def _causal(
    phi: Taylor | Minimax,
    queries: Float[Array, "blocks t G H"],
    keys: Float[Array, "blocks t H"],
    values: Float[Array, "blocks t V"],
) -> Float[Array, "blocks t G V"]:
    """Numerators and denominators of one head: what earlier blocks left in the state, and the block's own scores."""
    seen = jnp.tri(keys.shape[1], dtype=keys.dtype)[:, None, :]

    def step(state: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        query, key, value = block
        coefficients = phi.coefficients if isinstance(phi, Minimax) else None
        own = seen * polynomial_exponential(jnp.einsum("tgh,sh->tgs", query, key), phi.degree, coefficients)
        sums = phi(query) @ state + own @ value
        return state + phi(key).T @ value, sums

    start = jnp.zeros((phi.dim(keys.shape[-1]), values.shape[-1]), values.dtype)
    return jax.lax.scan(step, varying(start, keys, values), (queries, keys, values))[1]
