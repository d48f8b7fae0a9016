r"""Feature maps ``phi`` with ``phi(q) . phi(k)`` in the place of ``exp(q . k)``.

A prefix enters attention only through ``sum_j exp(q . k_j) v_j`` and ``sum_j exp(q . k_j)``. With a feature
map these become ``phi(q) Z`` and ``phi(q) . k``: a state whose size does not depend on the length of the
prefix.

==============================  ============  ========  =====================================================
``feature_map(...)``            dimension R   positive  is phi(q) . phi(k) close to exp(q . k)?
==============================  ============  ========  =====================================================
``"elu1"``                      H             yes       no: Z and k must be trained or fitted
``"taylor", degree=g``          C(H + g, g)   no        yes, deterministically; use an even degree
``"positive_random", features``  features     yes       yes, in probability
``"elu"``, ``"gelu"``           H             no        no: the maps of Prefix-Tuning+, without a mass
==============================  ============  ========  =====================================================

Every map takes the *scaled* vector: attention calls ``phi(q * sqrt(scale))`` and ``phi(k * sqrt(scale))``, so
that ``phi(q) . phi(k)`` stands for ``exp(scale * q . k)``; with the usual ``scale = 1/sqrt(H)`` that is
``phi(q / H**0.25)``. Maps are frozen dataclasses: equal settings are equal maps, and a map may be a static
argument of ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import UsageError
from ntk_prefix.typing import Array, Float

__all__ = ["Elu", "Elu1", "FeatureMap", "Gelu", "PositiveRandom", "Taylor", "attention_error_bound", "feature_map"]


class FeatureMap:
    """A map from scaled queries and keys to features. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @property
    def positive(self) -> bool:
        """Whether every feature is > 0, so that ``k >= 0`` makes ``phi(q) . k >= 0`` for every query."""
        raise NotImplementedError

    def dim(self, head_dim: int) -> int:
        """Return R, the number of features of a vector of ``head_dim`` entries."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return the features of scaled vectors ``x = q * sqrt(scale)``, in the dtype of ``x``."""
        raise NotImplementedError

    def error_bound(self, norm: float) -> float:
        """Return a bound on ``|phi(q) . phi(k) / exp(q . k) - 1|`` for scaled q, k of norm <= ``norm``."""
        raise NotImplementedError


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
        if self.degree < 0:
            raise UsageError(f"expected degree >= 0, got {self.degree}: degree 0 is the constant feature 1")

    @property
    def positive(self) -> bool:
        """False, except for the constant map of degree 0."""
        return self.degree == 0

    def dim(self, head_dim: int) -> int:
        """Return ``C(head_dim + degree, degree)``."""
        return math.comb(head_dim + self.degree, self.degree)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return all scaled monomials of x up to the degree, ordered by degree."""
        layers = [jnp.ones_like(x[..., :1])]
        coefficients = [np.ones(1)]
        for parents, variables, weights in _monomials(x.shape[-1], self.degree):
            layers.append(layers[-1][..., parents] * x[..., variables])
            coefficients.append(weights)
        scale = jnp.asarray(np.concatenate(coefficients), x.dtype)
        return jnp.concatenate(layers, axis=-1) * scale.reshape((1,) * (x.ndim - 1) + (-1,))

    def error_bound(self, norm: float) -> float:
        """Return ``e^s s^{g+1} / (g+1)!`` at ``s = norm**2``, the largest possible score."""
        score = norm**2
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
        if self.features < 1:
            raise UsageError(f"expected features >= 1, got {self.features}")
        if not 0 < self.failure_probability < 1:
            raise UsageError(f"expected 0 < failure_probability < 1, got {self.failure_probability}")

    @property
    def positive(self) -> bool:
        """True: features are exponentials."""
        return True

    def dim(self, head_dim: int) -> int:
        """Return ``features``."""
        return self.features

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``exp(W x - |x|^2 / 2) / sqrt(R)``, computed in one exponential."""
        directions = jnp.asarray(_orthogonal_gaussians(self.features, x.shape[-1], self.seed), x.dtype)
        exponent = x @ directions - jnp.sum(x * x, axis=-1, keepdims=True) / 2
        return jnp.exp(exponent - math.log(self.features) / 2)

    def error_bound(self, norm: float) -> float:
        """Return ``sqrt((e^{4 norm^2} - 1) / (R failure_probability))``: Chebyshev, for one pair (q, k)."""
        if 4 * norm**2 > 700:
            return math.inf
        return math.sqrt(math.expm1(4 * norm**2) / (self.features * self.failure_probability))


_REGISTRY: dict[str, type[FeatureMap]] = {cls.name: cls for cls in (Elu1, Taylor, PositiveRandom, Elu, Gelu)}


def feature_map(name: str | FeatureMap, **options: Any) -> FeatureMap:
    """Return the feature map of that name; a map is returned as it is.

    Args:
        name: "elu1", "taylor", "positive_random", "elu" or "gelu"; or a map of your own, made by subclassing
            :class:`FeatureMap`.
        options: the map's fields, such as ``degree=2`` or ``features=256, seed=0``.

    Raises:
        ValueError: the name is not known, or options come with a map that is already made.
    """
    if isinstance(name, FeatureMap):
        if options:
            raise UsageError(f"expected no options beside a feature map, got {options}: use dataclasses.replace")
        return name
    if name not in _REGISTRY:
        raise UsageError(f"expected a feature map among {sorted(_REGISTRY)}, got {name!r}")
    return _REGISTRY[name](**options)


def attention_error_bound(kernel_error: float, value_max: float) -> float:
    """Return the bound on ``|T - PrefixAttn|_max`` that a relative error of all kernel entries implies.

    ``2 eps / (1 - eps) * max|V|``, for sums made by :meth:`~ntk_prefix.prefix_state.PrefixState.from_prefix`.

    Args:
        kernel_error: ``eps``, from :meth:`FeatureMap.error_bound`; infinity is returned from 1 on.
        value_max: the largest ``|V|`` over prefix and own values.

    Source: derived, paper.md section 1.
    """
    return 2 * kernel_error / (1 - kernel_error) * value_max if kernel_error < 1 else math.inf


@jax.custom_jvp
def _elu1(x: Array) -> Array:
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


@_elu1.defjvp
def _elu1_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The derivative is ``min(phi, 1)``: one pass over what is kept anyway, and 1 at 0 as it should be."""
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
