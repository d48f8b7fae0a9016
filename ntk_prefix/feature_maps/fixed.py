"""Maps without arrays: what they are is their settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import check_count, check_fraction, check_seed
from ntk_prefix.feature_maps.base import FeatureMap, checked_size
from ntk_prefix.typing import Array, Float

__all__ = ["Elu", "Elu1", "Gelu", "PositiveRandom", "Taylor"]


@dataclasses.dataclass(frozen=True)
class Elu1(FeatureMap):
    """The paper's practical map: ``phi(x) = elu(x) + 1``, elementwise, R = H.

    It is not an approximation of ``exp`` in any sense, so no theorem speaks about sums made with it: its
    state must be trained or fitted (:meth:`ntk_prefix.prefix_state.PrefixState.fit`).

    Source: arXiv 2406.14036, the authors' public code (there ``elu(x / d**0.25) + 1``; the division is our
    scaling).
    """

    name: ClassVar[str] = "elu1"

    @property
    def positive(self) -> bool:
        """True: ``elu(x) + 1 = exp(x)`` below 0 and ``1 + x`` above."""
        return True

    def dim(self, head_dim: int) -> int:
        """Return ``head_dim``."""
        return head_dim

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``elu(x) + 1``, as ``exp(x)`` below 0, so that small features keep their digits."""
        return _elu1(x)

    def error_bound(self, norm: float) -> float:
        """Return infinity: there is no bound."""
        return math.inf


@dataclasses.dataclass(frozen=True)
class Elu(FeatureMap):
    """``phi(x) = elu(x)``, elementwise, R = H: a map for numerators only.

    Source: Prefix-Tuning+, arXiv 2506.13674 (code), which has neither ``k`` nor a denominator.
    """

    name: ClassVar[str] = "elu"

    @property
    def positive(self) -> bool:
        """False."""
        return False

    def dim(self, head_dim: int) -> int:
        """Return ``head_dim``."""
        return head_dim

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``elu(x)``."""
        return jax.nn.elu(x)

    def error_bound(self, norm: float) -> float:
        """Return infinity: there is no bound."""
        return math.inf


@dataclasses.dataclass(frozen=True)
class Gelu(Elu):
    """``phi(x) = gelu(x)``, elementwise, R = H: Prefix-Tuning+'s other map."""

    name: ClassVar[str] = "gelu"

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``gelu(x)``, exact."""
        return jax.nn.gelu(x, approximate=False)


@dataclasses.dataclass(frozen=True)
class Taylor(FeatureMap):
    r"""The truncated exponential series: ``phi(q) . phi(k) = sum_{t <= g} (q . k)^t / t!``.

    One feature ``x^a / sqrt(a!)`` for each multi-index ``a`` with ``|a| <= g``; equal monomials are merged,
    so that R = C(H + g, g) and not ``1 + H + ... + H^g``. For an even degree the sum is positive for every q
    and k, for an odd degree it can be negative; single features are negative either way.

    Numerics: monomials are products of ``degree`` entries; nothing is in log space.

    Source: derived; ``|e^x - sum_{t<=g} x^t/t!| <= e^{|x|} |x|^{g+1}/(g+1)!`` is Taylor's theorem.

    Args:
        degree: g >= 0.
    """

    degree: int = 2
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        """Refuse what is no degree; 0 is the constant feature 1."""
        check_count("degree", self.degree, 0)

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return even and odd degrees."""
        return tuple(cls(degree) for degree in range(4))

    @property
    def positive(self) -> bool:
        """False, except for the constant map of degree 0."""
        return self.degree == 0

    def dim(self, head_dim: int) -> int:
        """Return ``C(head_dim + degree, degree)``."""
        return math.comb(head_dim + self.degree, self.degree)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return all scaled monomials of x up to the degree, ordered by degree."""
        self.affordable_dim(x.shape[-1])
        layers = [jnp.ones_like(x[..., :1])]
        coefficients = [np.ones(1)]
        for parents, variables, weights in _monomials(x.shape[-1], self.degree):
            layers.append(layers[-1][..., parents] * x[..., variables])
            coefficients.append(weights)
        scale = jnp.asarray(np.concatenate(coefficients), x.dtype)
        return jnp.concatenate(layers, axis=-1) * scale.reshape((1,) * (x.ndim - 1) + (-1,))

    def error_bound(self, norm: float) -> float:
        """Return ``e^s s^{g+1} / (g+1)!`` at ``s = norm**2``, the largest possible score."""
        score = checked_size(norm) ** 2
        if score == 0:
            return 0.0
        log_bound = score + (self.degree + 1) * math.log(score) - math.lgamma(self.degree + 2)
        return math.exp(log_bound) if log_bound < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class PositiveRandom(FeatureMap):
    r"""Positive random features: ``phi(x)_i = exp(w_i . x - |x|^2 / 2) / sqrt(R)``, ``w_i ~ N(0, I)``.

    ``E[phi(q) . phi(k)] = exp(q . k)``.  Blocks of H directions are orthogonal, with independent
    chi-distributed norms, so that each is still Gaussian and the variance is no larger than that of
    independent ones.

    Numerics: in log space; queries of any finite size have features by :meth:`per_head`. :meth:`__call__`, which sums over a
    prefix are made of, is not: a key of ``|p|^2 / 2`` beyond 87 (float32, 708 in float64) may have features of 0.

    Source: Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794 (FAVOR+); the bound is
    derived: the relative variance of one independent feature is ``e^{|q+k|^2} - 1``, then Chebyshev's
    inequality.

    Args:
        features: R >= 1.
        seed: the directions are a function of ``(seed, features, H)`` alone, drawn when the map is traced.
        failure_probability: the probability, for one pair (q, k), with which ``error_bound`` may be exceeded.
    """

    features: int
    seed: int = 0
    failure_probability: float = 0.01
    name: ClassVar[str] = "positive_random"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        check_count("features", self.features)
        check_seed("seed", self.seed)
        check_fraction("failure_probability", self.failure_probability)
        self.affordable_dim(1)

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return a number of features that no head dimension divides."""
        return (cls(17),)

    @property
    def positive(self) -> bool:
        """True: features are exponentials."""
        return True

    def dim(self, head_dim: int) -> int:
        """Return ``features``."""
        return self.features

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return the features in units of the largest of the row, and the log of that, as a constant."""
        exponent = self._exponent(x)
        largest = jax.lax.stop_gradient(jnp.max(exponent, axis=-1))
        return jnp.exp(exponent - largest[..., None]), largest

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``exp(W x - |x|^2 / 2) / sqrt(R)``, computed in one exponential."""
        return jnp.exp(self._exponent(x))

    def _exponent(self, x: Array) -> Array:
        directions = jnp.asarray(_orthogonal_gaussians(self.features, x.shape[-1], self.seed), x.dtype)
        return x @ directions - jnp.sum(x * x, axis=-1, keepdims=True) / 2 - math.log(self.features) / 2

    def error_bound(self, norm: float) -> float:
        """Return ``sqrt((e^{4 norm^2} - 1) / (R failure_probability))``: Chebyshev, for one pair (q, k)."""
        if 4 * checked_size(norm) ** 2 > 700:
            return math.inf
        return math.sqrt(math.expm1(4 * norm**2) / (self.features * self.failure_probability))


@jax.custom_jvp
def _elu1(x: Array) -> Array:
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


@_elu1.defjvp
def _elu1_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Return the derivative is ``min(phi, 1)``: one pass over what is kept anyway, and 1 at 0 as it should be."""
    features = _elu1(*primals)
    return features, jnp.minimum(features, 1) * tangents[0]


@functools.lru_cache(maxsize=64)
def _monomials(head_dim: int, degree: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return, for each degree, how its monomials follow from those one degree lower, and ``1/sqrt(a!)``.

    A monomial is a non-decreasing tuple of variables; dropping the last variable gives its parent.
    """
    layers = []
    previous: dict[tuple[int, ...], int] = {(): 0}
    for t in range(1, degree + 1):
        current = list(itertools.combinations_with_replacement(range(head_dim), t))
        parents = np.array([previous[a[:-1]] for a in current], np.int32)
        variables = np.array([a[-1] for a in current], np.int32)
        factorials = [math.prod(math.factorial(a.count(v)) for v in set(a)) for a in current]
        layers.append((parents, variables, 1 / np.sqrt(np.array(factorials, np.float64))))
        previous = {a: index for index, a in enumerate(current)}
    return layers


@functools.lru_cache(maxsize=64)
def _orthogonal_gaussians(features: int, head_dim: int, seed: int) -> np.ndarray:
    """Return [head_dim, features] Gaussian columns, orthogonal within each block of ``head_dim``."""
    generator = np.random.default_rng([seed, features, head_dim])
    blocks = []
    for _ in range(-(-features // head_dim)):
        orthogonal, triangle = np.linalg.qr(generator.standard_normal((head_dim, head_dim)))
        orthogonal = orthogonal * np.sign(np.diag(triangle))  # Haar distributed
        norms = np.linalg.norm(generator.standard_normal((head_dim, head_dim)), axis=0)
        blocks.append(orthogonal * norms[None, :])
    return np.concatenate(blocks, axis=1)[:, :features]
