"""Rotary positions: by which angle each pair of a head turns, in the kinds that checkpoints are trained with.

Pair j of a head turns by ``position * f_j`` with ``f_j = theta^(-2 j / H) / factor_j``; kinds differ in the factors:

======== ===================================================================================================
default  1
linear   one number for all (position interpolation)
llama3   1 for high frequencies, one number for low ones, between a mix by wavelength
yarn     the same by the pair's number of turns in the original context; cosines and sines are scaled as well
dynamic  1 up to the trained length; beyond it theta grows with the length of the sequence
======== ===================================================================================================

Source: arXiv 2104.09864 (rotary), 2306.15595 (linear), 2309.00071 (yarn), Meta's ``llama-models`` (llama3); dynamic is
Hugging Face's ``rope_type`` of that name.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Float, Int

__all__ = ["Factor", "Rope", "Rotary", "rope_fields", "rotate", "warn_beyond"]

logger = logging.getLogger(__name__)

Factor = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]
"""What numbers of rotary positions may be: float32 holds the angles that follow from them."""


class Rotary(NamedTuple):
    """Cosines and sines of rotary positions, ``[B, T, H]`` or ``[1, T, H]``, in the half-split layout."""

    cos: Float[Array, "#B T H"]
    sin: Float[Array, "#B T H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn the heads of a layer.

    Args:
        head_dim: H, even.
        theta: the base.
        factors: what each of the H / 2 frequencies is divided by; all by 1 if empty.
        scaling: of cosines and sines.
        dynamic: None, or (factor, trained length): a sequence of L > length tokens has the base
            ``theta (factor L / length - factor + 1)^(H / (H - 2))``.
    """

    head_dim: int
    theta: float = 10000.0
    factors: tuple[float, ...] = ()
    scaling: float = 1.0
    dynamic: tuple[float, int] | None = None

    def frequencies(self) -> np.ndarray:
        """Return the angle by which each pair of a head turns from one position to the next, [H / 2] in float64."""
        base = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return base / np.array(self.factors or 1.0)

    def at(self, positions: Int[Array, "#B T"], dtype: Any) -> Rotary:
        """Return cosines and sines of positions, each angle twice: for either half of the head.

        A dynamic base is that of the longest position in the row. With a cache, keys stay turned as they were written, so a
        text decoded token by token beyond the trained length is another one than the same text at once, as it is with
        Hugging Face's models.
        """
        frequencies = jnp.asarray(self.frequencies(), dtype)[None, None]
        if self.dynamic is not None:
            factor, trained = self.dynamic
            length = jnp.maximum(positions.max(axis=1, keepdims=True) + 1, trained).astype(dtype)
            # not as the difference above, which is all rounding for a large factor
            growth = jnp.log1p(factor * (length - trained) / trained) / (self.head_dim - 2)
            pairs = np.arange(0, self.head_dim, 2)[None, None]
            frequencies = frequencies * jnp.exp(-growth[..., None] * pairs.astype(dtype))
        angles = positions[:, :, None].astype(dtype) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)
        return Rotary(self.scaling * jnp.cos(angles), self.scaling * jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], rotary: Rotary) -> Float[Array, "B T N H"]:
    """Return x turned by its position: ``x cos + [-x_2, x_1] sin`` on the two halves of the head."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (part[:, :, None, :] for part in rotary)
    return (x * cos + turned * sin).astype(x.dtype)


def warn_beyond(trained: int, length: int, mask: Any = None, *, more: int = 0, rope: Rope | None = None) -> None:
    """Warn of texts beyond the positions that a model was trained on, where it still answers, and worse: once for each number.

    Args:
        trained: ``max_position_embeddings``.
        length: of the texts, with their padding.
        mask: [B, length], zero at padding, which has no position; where a tracer, padding counts.
        more: tokens behind the texts.
        rope: of the model. A dynamic one is made for longer texts; of factors the largest counts, for ``trained`` may be from
            before the model was trained with them.
    """
    reach = int(trained * max((1.0, *(rope.factors if rope else ()))))
    if (rope and rope.dynamic) or length + more <= reach:
        return
    if mask is not None and not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True):
        length = int((np.asarray(mask) != 0).sum(axis=1).max())
    if length + more > reach:
        _warn_beyond(reach)


@functools.cache
def _warn_beyond(reach: int) -> None:
    logger.warning(
        "expected texts of at most the %s tokens that the model was trained on, what it adds included, got longer ones: its "
        "answers get worse there. Give less text, or ask for fewer tokens.",
        f"{reach:,}",
    )


# -------------------------------------------------------------------------------------- from a config.json


class _Settings(msgspec.Struct):
    """What config.json says of rotary positions."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Factor | None = None
    partial_rotary_factor: float | None = None
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    attention_factor: Factor | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] | None = None

    def given(self, name: str) -> Any:
        """Return a number that this kind cannot do without."""
        value = getattr(self, name)
        if value is None:
            raise expected(f"rope_scaling: {name}", f"a number for rope_type {self.rope_type or self.type!r}", "none")
        return value


def rope_fields(settings: Any, plain: Rope, max_position_embeddings: int) -> Rope:
    """Return rotary positions as a config.json's ``rope_parameters`` or ``rope_scaling`` change them.

    Args:
        settings: what stands there; None and empty are none.
        plain: without any scaling.
        max_position_embeddings: of the config.

    Raises:
        UsageError: a kind that is not built here, heads turned in part, or a number that is missing or out of bounds.
    """
    given = checked(settings or {}, _Settings, "rope_parameters")
    if nested := [name for name, value in (settings or {}).items() if isinstance(value, dict)]:
        raise expected("rope_parameters", "the same for all layers of this family", f"some of their own for {nested}")
    if given.partial_rotary_factor not in (None, 1):
        raise expected("partial_rotary_factor", "1: all of a head is turned here", given.partial_rotary_factor)
    if given.rope_theta is not None:
        plain = dataclasses.replace(plain, theta=given.rope_theta)
    kind = given.rope_type or given.type or "default"
    if kind == "default":
        return plain
    if kind not in _KINDS:
        raise expected(
            "rope_type",
            f"one of {', '.join(map(repr, ('default', *_KINDS)))}",
            repr(kind),
            "Take a checkpoint of the model without it, or convert its frequencies to rope_factors",
        )
    return _KINDS[kind](given, plain, max_position_embeddings)


def _linear(given: _Settings, plain: Rope, longest: int) -> Rope:
    return dataclasses.replace(plain, factors=(given.given("factor"),) * (plain.head_dim // 2))


def _dynamic(given: _Settings, plain: Rope, longest: int) -> Rope:
    if plain.head_dim < 4:
        raise expected("head_dim", "at least 4 for rope_type 'dynamic'", plain.head_dim)
    return dataclasses.replace(plain, dynamic=(given.given("factor"), longest))


def _llama3(given: _Settings, plain: Rope, longest: int) -> Rope:
    """Divide high frequencies by 1, low ones by ``factor``, between a mix.

    With wavelength ``w = 2 pi / f`` and context ``c``: f if ``w < c / high``, ``f / factor`` if ``w > c / low``, else
    ``(1 - s) f / factor + s f`` with ``s = (c / w - low) / (high - low)``.
    """
    factor, low, high = (given.given(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise expected("rope_scaling: high_freq_factor", f"more than low_freq_factor {low}", high)
    turns = given.given("original_max_position_embeddings") * plain.frequencies() / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return dataclasses.replace(plain, factors=tuple((1 / ((1 - kept) / factor + kept)).tolist()))


def _yarn(given: _Settings, plain: Rope, longest: int) -> Rope:
    """Keep pairs that turn often within the original context, divide the rest by ``factor``, with a ramp between.

    The pair that turns r times in c tokens is ``d(r) = H log(c / (2 pi r)) / (2 log theta)``; the ramp goes from
    d(beta_fast) to d(beta_slow). Cosines and sines are scaled by ``0.1 log(factor) + 1``.
    """
    if plain.theta <= 1:
        raise expected("rope_theta", "above 1 for rope_type 'yarn'", plain.theta)
    context = given.original_max_position_embeddings or longest
    factor = given.factor if given.factor is not None else longest / context
    half = plain.head_dim // 2

    def pair(turns: float) -> float:
        return plain.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(plain.theta))

    first, last = pair(given.beta_fast or 32.0), pair(given.beta_slow or 1.0)
    if given.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, plain.head_dim - 1)
    slowed = np.clip((np.arange(half) - first) / (last - first if last != first else 0.001), 0, 1)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = given.attention_factor
    if scaling is None:
        both = given.mscale and given.mscale_all_dim
        scaling = temperature(given.mscale) / temperature(given.mscale_all_dim) if both else temperature(1.0)  # type: ignore[arg-type]
    factors = tuple((1 / (slowed / factor + 1 - slowed)).tolist())
    return dataclasses.replace(plain, factors=factors, scaling=scaling)


_KINDS = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}
