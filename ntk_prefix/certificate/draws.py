"""How likely a prefix of a given length is certified, from prefixes drawn: theory/certificate.md, section 8."""

from __future__ import annotations

import dataclasses

import jax

from ntk_prefix.certificate.theorem import certify
from ntk_prefix.checks import check_count, expected
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.statistics import success_probability_bound
from ntk_prefix.typing import Float, Inputs, KeyArray

__all__ = ["Draws", "certify_draws"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """What independent prefixes of one length say of the next one.

    Args:
        m: prefix length.
        draws: how many were drawn; certified: how many of them have a certificate.
        probability: that a fresh prefix has one, at least, with confidence 1 - delta over the draws.
        delta: the probability with which that may be false.
        rate: the smallest certified rate; 0 if no prefix has one.
    """

    m: int
    draws: int
    certified: int
    probability: float
    delta: float
    rate: float


def certify_draws(
    x: Inputs,
    y: Float[jax.Array, "n o"],
    *,
    m: int,
    draws: int = 45,
    delta: float = 0.01,
    sigma: float = 1.0,
    model: ModelName = "fixed",
    key: KeyArray | None = None,
    symmetric: bool = True,
    step_size: float | None = None,
    remove_offset: bool = False,
) -> Draws:
    """Bound the probability that a prefix of m tokens is certified, at lengths far below those of ``certify(..., delta)``.

    ``certify(..., delta=delta)`` bounds what prefixes are drawn at all, by moments; here some are drawn, and the bound of
    Clopper and Pearson is on the share of all prefixes that are certified as they were.

    Args:
        x, y, sigma, model, symmetric, step_size, remove_offset: as in ``certify``.
        m: prefix length, chosen before looking at these draws.
        draws: prefixes to draw. If all are certified, the bound is delta^(1/draws): 0.90 for 45 at delta = 0.01.
        delta: the probability with which the bound may fail, over the draws.
        key: each draw's is folded from it; ``jax.random.key(0)`` if None.

    Raises:
        ValueError: as ``certify``; draws not positive, a delta that is no probability, a model instead of its name.

    Source: Clopper and Pearson, Biometrika 26 (1934); it is exact, and holds for every number of draws.
    """
    check_count("draws", draws)
    if not isinstance(model, str):
        raise expected("model", '"tied" or "fixed"', type(model).__name__, "Prefixes are drawn here")
    success_probability_bound(0, draws, delta)
    key = jax.random.key(0) if key is None else key
    found = [
        certify(
            x,
            y,
            m=m,
            sigma=sigma,
            model=model,
            key=jax.random.fold_in(key, draw),
            symmetric=symmetric,
            step_size=step_size,
            remove_offset=remove_offset,
        )
        for draw in range(draws)
    ]
    rates = [certificate.rate for certificate in found if certificate.holds]
    return Draws(
        m=m,
        draws=draws,
        certified=len(rates),
        probability=success_probability_bound(len(rates), draws, delta),
        delta=delta,
        rate=float(min(rates, default=0.0)),
    )
