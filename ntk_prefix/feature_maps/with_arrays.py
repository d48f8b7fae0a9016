"""Maps that own arrays, for each key head its own: points of a prefix, centroids, directions; and several maps together.

The arrays are in the coordinates of what a map is given, which is scaled: a key is ``key * sqrt(scale)`` there. They have
K leading heads, and query head n of N has the arrays of head ``n // (N // K)``, as it has its key head's keys; with K = 1
all heads share them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import check_array, check_scale, check_soft_cap, expected
from ntk_prefix.feature_maps.base import FeatureMap
from ntk_prefix.feature_maps.fixed import Elu1, Taylor
from ntk_prefix.typing import Array, Float

__all__ = ["Anchors", "Concatenated", "Nearest", "NormalizedAnchors", "Projected"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Anchors(FeatureMap):
    r"""Exponentials of the scores against chosen keys: ``phi_j(x) = exp(cap(x . c_j))``.

    With the keys of a prefix as points, k = 1 and the prefix's values as Z, the state *is* the prefix. With a few of them,
    k >= 0 and Z fitted, it is a quadrature rule for the measure that the prefix is on keys.

    Numerics: in log space; :meth:`per_head` is ``exp(s - m)`` in units of ``e^m``, m the largest score of the row, so
    scores of any finite size are safe. :meth:`__call__` is not.

    Source: Attention Matching and Cartridges compute this operator (theory/README.md, section 11); derived.

    Args:
        points: [K, R, H], scaled: ``key * sqrt(scale)``, see :meth:`of_keys`.
        logits_soft_cap: that of the layer, if its scores have one: ``cap(s) = logits_soft_cap tanh(s / logits_soft_cap)``.
    """

    points: Float[Array, "K R H"]
    logits_soft_cap: float | None = None
    name: ClassVar[str] = "anchors"
    arrays: ClassVar[tuple[str, ...]] = ("points",)

    def __post_init__(self) -> None:
        """Refuse what are no points, and no cap."""
        _set_array(self, "points")
        object.__setattr__(self, "logits_soft_cap", check_soft_cap(self.logits_soft_cap))

    @classmethod
    def of_keys(
        cls, keys: Float[Array, "R K H"], scale: float | None = None, logits_soft_cap: float | None = None
    ) -> Anchors:
        """Return the anchors that are these keys.

        Args:
            keys: [R, K, H], as a layer has them, not scaled: a prefix, or some of its tokens.
            scale: of the layer's scores; 1/sqrt(H) if None.
            logits_soft_cap: of the layer's scores.
        """
        check_array("keys", keys, "R", "K", "H")
        root = math.sqrt(check_scale(scale, keys.shape[-1]))
        return cls(jnp.swapaxes(keys, 0, 1) * root, logits_soft_cap)

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return points of three entries, one head's, without and with a soft cap."""
        return cls(_drawn(1, 5, 3)), cls(_drawn(1, 4, 3), logits_soft_cap=1.5)

    @property
    def positive(self) -> bool:
        """True: features are exponentials."""
        return True

    def dim(self, head_dim: int) -> int:
        """Return R, the number of points."""
        return self.points.shape[-2]

    def check(self, heads: int, head_dim: int) -> None:
        """Raise unless points are those of such heads."""
        _check_fits("points", self.points, heads, head_dim)

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return ``exp(s - m)`` and m, the largest of the scores ``s = cap(x . c)``, as a constant."""
        scores = self._scores(x)
        # the constant is in both, and cancels: the derivative of what they stand for is exact
        largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        return jnp.exp(scores - largest[..., None]), largest

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``exp(cap(x . c))``; x is [*batch, N, T, H], or [*batch, H] for points of K = 1."""
        return jnp.exp(self._scores(x))

    def _scores(self, x: Array) -> Array:
        scores = _by_head("points", self.points, x)
        cap = self.logits_soft_cap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def placed(self, query: np.ndarray, key: np.ndarray, draw: np.random.Generator) -> FeatureMap:
        """Return anchors that are as many of the keys, far from one another."""
        return dataclasses.replace(self, points=_spread("anchors", _pooled(key, self.points), self.points, draw))

    def padded(self, features: int) -> FeatureMap:
        """Return the anchors with the last of them several times."""
        return _repeated_last(self, features)

    def error_bound(self, norm: float) -> float:
        """Return infinity: the points are not made for all keys."""
        return math.inf


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NormalizedAnchors(Anchors):
    """Attention to the anchors: ``phi(x) = softmax_j(cap(x . c_j))``, features that add up to 1 for every query.

    What ``mass="relative"`` wants: for keys that stand still, ``phi(q) Z`` trains as values of a prefix do.
    """

    name: ClassVar[str] = "normalized_anchors"

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return the probabilities, which need no unit."""
        return self(x), None

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return the probabilities; x as :class:`Anchors` takes it."""
        return jax.nn.softmax(self._scores(x), axis=-1)

    def padded(self, features: int) -> FeatureMap:
        """Refuse it: one more anchor takes its part of the probability."""
        return FeatureMap.padded(self, features)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Nearest(FeatureMap):
    """One-hot of the nearest centroid, in Euclidean distance: a state keeps a value and a mass for each cell.

    The largest ``x . c_j - |c_j|^2 / 2``, the first of equal ones. The choice has no gradient, for x and for centroids.

    Source: Attention-State Memory (abstract; theory/README.md, section 11).

    Args:
        centroids: [K, R, H], scaled as queries are: ``query * sqrt(scale)``.
    """

    centroids: Float[Array, "K R H"]
    name: ClassVar[str] = "nearest"
    arrays: ClassVar[tuple[str, ...]] = ("centroids",)

    def __post_init__(self) -> None:
        """Refuse what are no centroids."""
        _set_array(self, "centroids")

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return centroids of three entries, one head's."""
        return (cls(_drawn(1, 5, 3)),)

    @property
    def positive(self) -> bool:
        """True: features are 0 and 1."""
        return True

    def dim(self, head_dim: int) -> int:
        """Return R, the number of centroids."""
        return self.centroids.shape[-2]

    def check(self, heads: int, head_dim: int) -> None:
        """Raise unless centroids are those of such heads."""
        _check_fits("centroids", self.centroids, heads, head_dim)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return the one-hot choices; x is [*batch, N, T, H], or [*batch, H] for centroids of K = 1."""
        x, centroids = jax.lax.stop_gradient((x, self.centroids.astype(x.dtype)))
        scores = _by_head("centroids", centroids, x, -jnp.sum(centroids**2, axis=-1) / 2)
        return jax.nn.one_hot(jnp.argmax(scores, axis=-1), self.dim(x.shape[-1]), dtype=x.dtype)

    def placed(self, query: np.ndarray, key: np.ndarray, draw: np.random.Generator) -> FeatureMap:
        """Return the centers of the queries' clusters (Lloyd's algorithm, 20 turns)."""
        points = _pooled(query, self.centroids)
        centers = np.array(_spread("centroids", points, self.centroids, draw), np.float64)
        for _ in range(20):
            for own, vectors in zip(centers, points, strict=True):
                nearest = np.argmax(vectors @ own.T - np.sum(own**2, axis=1) / 2, axis=1)
                for j in np.unique(nearest):
                    own[j] = vectors[nearest == j].mean(axis=0)
        return dataclasses.replace(self, centroids=jnp.asarray(centers, self.centroids.dtype))

    def padded(self, features: int) -> FeatureMap:
        """Return the centroids with the last of them several times; of equal ones the first is the nearest."""
        return _repeated_last(self, features)

    def error_bound(self, norm: float) -> float:
        """Return infinity: there is no bound."""
        return math.inf


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Projected(FeatureMap):
    """Another map on some directions of the head: ``phi(x) = inner(D x)``, such as Taylor on the principal ones.

    Args:
        inner: the map.
        directions: [K, r, H], D; orthonormal rows keep the size of what lies in them.
    """

    inner: FeatureMap
    directions: Float[Array, "K r H"]
    name: ClassVar[str] = "projected"
    arrays: ClassVar[tuple[str, ...]] = ("inner", "directions")

    def __post_init__(self) -> None:
        """Refuse what are no directions, and no map."""
        _check_maps("inner", (self.inner,))
        _set_array(self, "directions")

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return maps with and without arrays, on two of three directions."""
        return cls(Taylor(3), _drawn(1, 2, 3)), cls(Anchors(_drawn(1, 4, 2)), _drawn(1, 2, 3))

    @property
    def positive(self) -> bool:
        """Whether the inner map is."""
        return self.inner.positive

    def dim(self, head_dim: int) -> int:
        """Return the inner map's, for r entries."""
        return self.inner.dim(self.directions.shape[-2])

    def check(self, heads: int, head_dim: int) -> None:
        """Raise unless directions are those of such heads, and the inner map can take what comes of them."""
        _check_fits("directions", self.directions, heads, head_dim)
        self.inner.check(heads, self.directions.shape[-2])

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return what the inner map does, of ``D x``."""
        return self.inner.per_head(_by_head("directions", self.directions, x))

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return ``inner(D x)``; x is [*batch, N, T, H], or [*batch, H] for directions of K = 1."""
        return self.inner(_by_head("directions", self.directions, x))

    def placed(self, query: np.ndarray, key: np.ndarray, draw: np.random.Generator) -> FeatureMap:
        """Return the map on the principal directions of the queries, the inner map placed there."""
        heads, rank, head_dim = self.directions.shape
        if rank > head_dim:
            raise expected("rank", f"at most {head_dim} directions of a head", rank)
        points = _pooled(query, self.directions)
        _, vectors = np.linalg.eigh(np.swapaxes(points, 1, 2) @ points)
        directions = np.swapaxes(vectors[..., : -rank - 1 : -1], 1, 2)  # [K, rank, H], the largest first

        def on_them(x: np.ndarray) -> np.ndarray:
            own = directions if heads == len(x) else directions[np.arange(len(x)) * heads // len(x)]
            return x @ np.swapaxes(own, 1, 2)

        inner = self.inner.placed(on_them(query), on_them(key), draw)
        return Projected(inner, jnp.asarray(directions, self.directions.dtype))

    def error_bound(self, norm: float) -> float:
        """Return infinity: nothing is known of the other directions."""
        return math.inf


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Concatenated(FeatureMap):
    """The features of several maps, side by side: their kernels are added.

    Numerics: all features of a row are in the largest of the maps' units, 1 for a map without one; beside an anchor whose
    score is above 80 (float32), features of size 1 are 0, also where that anchor's own z and k are.

    Args:
        maps: at least one, in the order of z's and k's features.
    """

    maps: tuple[FeatureMap, ...]
    name: ClassVar[str] = "concatenated"
    arrays: ClassVar[tuple[str, ...]] = ("maps",)

    def __post_init__(self) -> None:
        """Refuse what are no maps."""
        object.__setattr__(self, "maps", tuple(self.maps))
        if not self.maps:
            raise expected("maps", "at least one feature map", "none")
        _check_maps("maps", self.maps)

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return maps with a unit and without one."""
        return cls((Elu1(), Taylor(2))), cls((Anchors(_drawn(1, 4, 3)), Elu1()))

    @property
    def positive(self) -> bool:
        """Whether all maps are."""
        return all(phi.positive for phi in self.maps)

    def dim(self, head_dim: int) -> int:
        """Return the sum over the maps."""
        return sum(phi.dim(head_dim) for phi in self.maps)

    def check(self, heads: int, head_dim: int) -> None:
        """Raise unless every map can take such heads."""
        for phi in self.maps:
            phi.check(heads, head_dim)

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return all features, in the largest of their units."""
        parts = [phi.per_head(x) for phi in self.maps]
        if all(unit is None for _, unit in parts):
            return jnp.concatenate([features for features, _ in parts], axis=-1), None
        units = [jnp.zeros_like(x[..., 0]) if unit is None else unit for _, unit in parts]
        largest = functools.reduce(jnp.maximum, units)
        scaled = [
            features * jnp.exp(unit - largest)[..., None] for (features, _), unit in zip(parts, units, strict=True)
        ]
        return jnp.concatenate(scaled, axis=-1), largest

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return all features; x as every map takes it."""
        return jnp.concatenate([phi(x) for phi in self.maps], axis=-1)

    def placed(self, query: np.ndarray, key: np.ndarray, draw: np.random.Generator) -> FeatureMap:
        """Return the maps, each placed."""
        return Concatenated(tuple(phi.placed(query, key, draw) for phi in self.maps))

    def error_bound(self, norm: float) -> float:
        """Return infinity: a sum of kernels is near exp only for weights that are fitted."""
        return math.inf


def _by_head(name: str, weights: Array, x: Array, offset: Array | None = None) -> Array:
    """Return ``x . w + offset`` for each head's own: [*batch, N, T, H], [K, R, H], [K, R] -> [*batch, N, T, R]."""
    weights = weights.astype(x.dtype)
    own_heads, features, _ = weights.shape
    if own_heads > 1 and x.ndim < 3:
        raise expected("x", f"[*batch, N, T, H] for {name} of {own_heads} heads", x.shape)
    _check_fits(name, weights, x.shape[-3] if own_heads > 1 else 1, x.shape[-1])
    if own_heads == 1:
        rows, result = x.shape[:-1], x.reshape(1, -1, x.shape[-1]) @ jnp.swapaxes(weights, 1, 2)
        return (result if offset is None else result + offset[:, None]).reshape(*rows, features)
    *batch, heads, length, head_dim = x.shape
    grouped = x.reshape(math.prod(batch), own_heads, heads // own_heads * length, head_dim)
    result = jnp.einsum("bkth,krh->bktr", grouped, weights)
    result = result if offset is None else result + offset[None, :, None]
    return result.reshape(*batch, heads, length, features)


def _repeated_last(phi: FeatureMap, features: int) -> FeatureMap:
    """Return a map with the last of its vectors several times, for each of several layers too."""

    def longer(array: Array) -> Array:
        widths = [(0, 0)] * (array.ndim - 2) + [(0, features - array.shape[-2]), (0, 0)]
        if isinstance(array, jax.core.Tracer):
            return jnp.pad(array, widths, mode="edge")
        return jnp.asarray(np.pad(np.asarray(array), widths, mode="edge"))  # on the host: each size would be a program

    return jax.tree.map(longer, phi)


def _check_fits(name: str, array: Array, heads: int, head_dim: int) -> None:
    if array.ndim != 3 or heads % len(array) or array.shape[2] != head_dim:
        raise expected(
            name,
            f"[K, ., {head_dim}] with K a divisor of the {heads} query heads",
            array.shape,
            "Use the map with the layer that it was made for",
        )


def _set_array(phi: FeatureMap, name: str) -> None:
    """Make a field an array [K, R, H], or refuse it."""
    array = getattr(phi, name)
    if isinstance(array, (np.ndarray, list, tuple)):
        array = jnp.asarray(array)
        object.__setattr__(phi, name, array)
    check_array(name, array, "K", "R", "H")
    if 0 in array.shape:
        raise expected(name, "[K, R, H] with K, R, H >= 1", array.shape)


def _check_maps(name: str, maps: tuple[object, ...]) -> None:
    for phi in maps:
        if not isinstance(phi, FeatureMap):
            raise expected(name, "feature maps", repr(phi), "Make one with ntk_prefix.feature_map(name, ...)")


def _pooled(x: np.ndarray, own: Array) -> np.ndarray:
    """Return the vectors that each of a map's own heads is for: [n, M, H] -> [K, ., H]."""
    heads = len(own)
    if len(x) % heads and heads % len(x):
        raise expected("heads", f"a divisor or a multiple of {len(x)}", heads)
    return np.repeat(x, heads // len(x), axis=0) if heads > len(x) else x.reshape(heads, -1, x.shape[-1])


def _spread(name: str, points: np.ndarray, own: Array, draw: np.random.Generator) -> Array:
    """Return R of each head's vectors [K, M, H], each drawn in proportion to its squared distance from those before it.

    Source: Arthur and Vassilvitskii, k-means++ (2007).
    """
    heads, count, size = len(points), own.shape[-2], points.shape[-1]
    if points.shape[1] < count:
        raise expected(name, f"at least {count} vectors to choose {count} of", points.shape[1], "Give more tokens")
    distance, taken = np.full(points.shape[:2], np.inf), np.empty((heads, count, size))
    for j in range(count):
        weights = np.ones_like(distance) if j == 0 else distance
        # where all that is left are copies, any of them
        total = np.cumsum(np.where(weights.sum(axis=1, keepdims=True) > 0, weights, 1), axis=1)
        chosen = np.argmax(total > draw.random((heads, 1)) * total[:, -1:], axis=1)
        taken[:, j] = points[np.arange(heads), chosen]
        distance = np.minimum(distance, np.sum((points - taken[:, j, None]) ** 2, axis=-1))
    return jnp.asarray(taken, own.dtype)


def _drawn(heads: int, features: int, head_dim: int) -> Array:
    """Return an example's array."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((heads, features, head_dim)), jnp.float32)
