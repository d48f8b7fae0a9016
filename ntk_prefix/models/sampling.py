r"""Drawing the next token: which tokens may come, and with which probability.

What is asked for is done in this order, each on what the one before has left, renormalized:

=====================  ==============================================================================================
repetition penalty     a token that the row has: its logit over the penalty, times it if negative (CTRL, arXiv 1909.05858)
temperature            logits over it
top-k                  the k likeliest
top-p                  the nucleus: the likeliest whose mass is at least p, as few as can be (arXiv 1904.09751)
typical                those whose surprise is nearest to the entropy H, of mass at least p (arXiv 2202.00666)
eta                    no token less likely than ``min(e, e^{1/2} exp(-H))`` (arXiv 2210.15191)
=====================  ==============================================================================================

Equal tokens stay or go together. Kept are always the likeliest ones, at least (of typical: the most typical).

A vocabulary is not sorted: the threshold that a filter needs is found by bisection over the floats there are, in 32 sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Bool, Float, Int, KeyArrays

__all__ = ["Sampling"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; numbers may change without a new program.

    Args:
        temperature: above 0.
        top_k: at least 1; None keeps all.
        top_p: in (0, 1]; None keeps all.
        typical: in (0, 1]; None keeps all.
        eta: in (0, 1), the e above; None keeps all.
        repetition_penalty: above 0; above 1 makes what is there already less likely, None leaves it.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float | Array = 1.0
    top_k: int | Array | None = None
    top_p: float | Array | None = None
    typical: float | Array | None = None
    eta: float | Array | None = None
    repetition_penalty: float | Array | None = None

    def check(self, *, flags: bool = False) -> None:
        """Refuse numbers that cannot be meant; arrays are not looked at.

        Args:
            flags: name them as on a command line, ``--top-p``.
        """
        for name, what, fine in (
            ("temperature", "a finite number > 0", lambda x: 0 < x < float("inf")),
            ("top_k", "a whole number from 1 to 2147483647", lambda x: 1 <= x < 2**31),
            ("top_p", "a number in (0, 1]", lambda x: 0 < x <= 1),
            ("typical", "a number in (0, 1]", lambda x: 0 < x <= 1),
            ("eta", "a number in (0, 1)", lambda x: 0 < x < 1),
            ("repetition_penalty", "a finite number > 0", lambda x: 0 < x < float("inf")),
        ):
            value: Any = getattr(self, name)
            if isinstance(value, jax.Array | np.ndarray) or (value is None and name != "temperature"):
                continue
            kinds = (int, np.integer) if name == "top_k" else (int, np.integer, float, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds) or not fine(value):
                greedy = "Without a sampling, generate is greedy" if name == "temperature" and not flags else ""
                raise expected(f"--{name.replace('_', '-')}" if flags else name, what, repr(value), greedy)

    def log_probabilities(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None = None
    ) -> Float[Array, "*B V"]:
        """Return the distribution that a token is drawn from, -inf for what cannot come.

        Args:
            logits: of the model, of any float dtype; the result is float32 (float64 for float64).
            seen: the tokens that each row has, for the repetition penalty.

        Numerics: of logits that are finite, or -inf for tokens that cannot come but not for all, no number is NaN, however
            large they and the penalty are and however small the temperature is.
        """
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.repetition_penalty is not None:
            if seen is None:
                raise expected("seen", "the tokens that each row has, for a repetition penalty", "None")
            penalized = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            # what overflows is still a logit: of infinite ones there is no softmax
            largest = jnp.finfo(logits.dtype).max
            penalized = jnp.where(jnp.isinf(logits), logits, jnp.clip(penalized, -largest, largest))
            logits = jnp.where(seen, penalized, logits)
        # from the likeliest on, so that a small temperature makes the others -inf, and nothing +inf
        behind = logits - jnp.max(logits, axis=-1, keepdims=True)
        said = jax.nn.log_softmax(behind / jnp.maximum(self.temperature, jnp.finfo(logits.dtype).tiny))
        if self.top_k is not None:
            said = _kept(said, said, jnp.ones_like(said), self.top_k)
        if self.top_p is not None:
            said = _kept(said, said, jnp.exp(said), self.top_p)
        if self.typical is not None:
            # what has no probability is the least typical: its surprise is infinite
            said = _kept(said, -jnp.abs(-said - _entropy(said)), jnp.exp(said), self.typical)
        if self.eta is not None:
            least = jnp.minimum(jnp.log(self.eta), jnp.log(self.eta) / 2 - _entropy(said))
            least = jnp.minimum(least, jnp.max(said, axis=-1, keepdims=True))
            said = jax.nn.log_softmax(jnp.where(said >= least, said, -jnp.inf))
        return said

    def draw(
        self, keys: KeyArrays, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None = None
    ) -> Int[Array, "B"]:
        """Return a token for each row, drawn by a key of its own.

        Args:
            keys: [B] keys: what a row draws does not depend on the others.
            logits, seen: see :meth:`log_probabilities`.
        """
        return jax.vmap(jax.random.categorical)(keys, self.log_probabilities(logits, seen))


def _entropy(said: Float[Array, "*B V"]) -> Float[Array, "*B 1"]:
    return -jnp.sum(jnp.where(said > -jnp.inf, jnp.exp(said) * said, 0), axis=-1, keepdims=True)


def _kept(
    said: Float[Array, "*B V"], score: Float[Array, "*B V"], weight: Float[Array, "*B V"], wanted: Any
) -> Float[Array, "*B V"]:
    """Keep the tokens of the largest scores, as few as weigh at least what is wanted, and renormalize.

    The threshold is the largest float of which what is not below it weighs enough; the sums are rounded alike for all
    thresholds, so that the sets are nested. Where rounding leaves even the whole set lighter, all of it is kept.
    """
    order = _ordered(score)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # enough is at or above low, not at or above high
        # (low + high) / 2 in integers that must not overflow
        middle = (low & high) + ((low ^ high) >> 1)
        heavy = jnp.sum(jnp.where(order >= middle, weight, 0), axis=-1, keepdims=True) >= wanted
        return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle)

    bits = jnp.iinfo(order.dtype)
    shape = (*order.shape[:-1], 1)
    ends = jnp.full(shape, bits.min, order.dtype), jnp.max(order, axis=-1, keepdims=True) + 1
    low, _ = jax.lax.fori_loop(0, bits.bits, halve, ends)
    largest = jnp.max(order, axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(order >= jnp.minimum(low, largest), said, -jnp.inf))


def _ordered(x: Array) -> Array:
    """Return integers in the order of floats."""
    kind = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x + 0.0, kind)  # -0 + 0 is +0
    return jnp.where(bits < 0, jnp.iinfo(kind).min - bits - 1, bits)
