"""What a feature map is, and the list of those that are known."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import numpy as np

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Float

__all__ = ["LARGEST_DIM", "FeatureMap", "attention_error_bound", "checked_size", "feature_map", "feature_maps"]

LARGEST_DIM = 2**20
"""Features per vector, at most: a state of them is 256 MiB per head at H = 64 in float32."""

_MAPS: dict[str, type[FeatureMap]] = {}


class FeatureMap(abc.ABC):
    """A map from scaled queries and keys to features.

    A map of your own is a frozen dataclass that says ``class Sharp(FeatureMap)``, has a ``name`` and the four methods
    below; its fields are its options. By that it is known to :func:`feature_map`, and to the tests, which run on
    the ``examples`` of every map. One that owns arrays names their fields in ``arrays``, says ``eq=False, repr=False``,
    and may have features of its own for each head: then it has :meth:`per_head` and :meth:`check` too.
    """

    name: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]] = ()
    """The fields that are leaves, or trees of them, such as other maps; the other fields are settings."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the map known by its name, and refuse one that is not whole."""
        super().__init_subclass__(**options)
        missing = [name for name in ("positive", "dim", "__call__", "error_bound") if _is_abstract(cls, name)]
        if missing or not isinstance(getattr(cls, "name", None), str):
            raise TypeError(
                f"{cls.__name__}: expected a feature map with a name and the methods positive, dim, __call__ and "
                f"error_bound, got one without {', '.join(missing) or 'a name'}."
            )
        known = _MAPS.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__name__}: expected a name of its own, got {cls.name!r}, which is {known.__name__}'s."
            )
        _MAPS[cls.name] = cls
        jax.tree_util.register_pytree_with_keys(cls, _flatten, functools.partial(_unflatten, cls))

    def __eq__(self, other: object) -> bool:
        """Whether settings and arrays are equal; dataclasses without arrays compare their fields, which is the same."""
        if type(self) is not type(other):
            return NotImplemented
        (mine, settings), (theirs, others) = _whole(self), _whole(other)
        return bool(settings == others) and all(
            a is b or np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)
        )

    def __hash__(self) -> int:
        """Return the hash of the settings; there is none of arrays, so that a map that owns some is never static."""
        leaves, settings = _whole(self)
        if leaves:
            raise TypeError(f"{type(self).__name__} owns arrays: make it an argument that is traced, not a static one")
        return hash(settings)

    def __repr__(self) -> str:
        """Return the settings, and of arrays their shapes."""

        def shown(value: Any) -> str:
            return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)

        fields: tuple[Any, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        inside = ", ".join(f"{field.name}={shown(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__qualname__}({inside})"

    @classmethod
    def examples(cls) -> tuple[FeatureMap, ...]:
        """Return the map at settings that show what it does; what the tests of every map run on."""
        return (cls(),)

    @property
    @abc.abstractmethod
    def positive(self) -> bool:
        """Whether no feature is ever below 0, so that ``k >= 0`` makes ``phi(q) . k >= 0`` for every query."""

    @abc.abstractmethod
    def dim(self, head_dim: int) -> int:
        """Return R, the number of features of a vector of ``head_dim`` entries."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch R"]:
        """Return the features of scaled vectors ``x = q * sqrt(scale)``, in the dtype of ``x``."""

    @abc.abstractmethod
    def error_bound(self, norm: float) -> float:
        """Return a bound on ``|phi(q) . phi(k) / exp(q . k) - 1|`` for scaled q, k of norm <= ``norm``."""

    def per_head(self, x: Float[Array, "*batch N T H"]) -> tuple[Float[Array, "*batch N T R"], Array | None]:
        """Return the features of each head's vectors in a unit that keeps them finite: what attention calls.

        Returns:
            Features, and None or the log of their unit, [*batch, N, T], under ``stop_gradient``: what
            ``features * exp(log_unit)`` stands for are the values of :meth:`__call__`. Their derivatives are those of
            ``features`` alone, which must be made with the same constant.
        """
        return self(x), None

    def check(self, heads: int, head_dim: int) -> None:  # noqa: B027
        """Raise unless :meth:`per_head` can take x of shape [*batch, heads, T, head_dim]; every map without arrays can.

        Raises:
            UsageError: it has arrays of another number of heads, or of another length.
        """

    def placed(self, query: np.ndarray, key: np.ndarray, draw: np.random.Generator) -> FeatureMap:
        """Return the map with arrays chosen for scaled queries [N, Q, H] and keys [K, M, H]; itself without arrays."""
        if self.arrays:
            raise expected("feature_map", "a map that chooses its own arrays", f"{self!r}", "Give it a method placed")
        return self

    def padded(self, features: int) -> FeatureMap:
        """Return the map with so many features, of which those beyond its own change nothing where z and k are 0.

        Raises:
            UsageError: this map has no such features.
        """
        raise expected(f"{self}", "a map that can be given further features", f"{features} wanted")

    def affordable_dim(self, head_dim: int) -> int:
        """Return :meth:`dim`, for whoever is about to make that many features.

        Raises:
            UsageError: there are more than ``LARGEST_DIM``.
        """
        features = self.dim(head_dim)
        if features > LARGEST_DIM:
            raise expected(
                f"{self}",
                f"at most {LARGEST_DIM:,} features",
                f"{features:,} for a head dimension of {head_dim}",
                "Take a lower degree, or fewer features",
            )
        return features


def _whole(phi: FeatureMap) -> tuple[list[Any], Any]:
    return jax.tree.flatten(phi)


def _flatten(phi: FeatureMap) -> tuple[tuple[tuple[Any, Any], ...], Any]:
    """Return a map's arrays, by name, and its settings: without arrays, the map itself."""
    if not phi.arrays:
        return (), phi
    fields = dataclasses.fields(phi)  # type: ignore[arg-type]
    settings = tuple((field.name, getattr(phi, field.name)) for field in fields if field.name not in phi.arrays)
    return tuple((jax.tree_util.GetAttrKey(name), getattr(phi, name)) for name in phi.arrays), settings


def _unflatten(cls: type[FeatureMap], settings: Any, arrays: Iterable[Any]) -> FeatureMap:
    """Return the map, unchecked: leaves may be anything, as those of ``jax.tree.map`` may."""
    if not cls.arrays:
        return settings
    phi = object.__new__(cls)
    for name, value in (*settings, *zip(cls.arrays, arrays, strict=True)):
        object.__setattr__(phi, name, value)
    return phi


def _is_abstract(cls: type, name: str) -> bool:
    return getattr(getattr(cls, name), "__isabstractmethod__", False)


def feature_maps() -> dict[str, type[FeatureMap]]:
    """Return every map that is known, by name."""
    return dict(_MAPS)


def feature_map(name: str | FeatureMap, **options: Any) -> FeatureMap:
    """Return the feature map of that name; a map is returned as it is.

    Args:
        name: of a map in :func:`feature_maps`: those of this module's table, and yours; or a map.
        options: the map's fields, such as ``degree=2`` or ``features=256, seed=0``.

    Raises:
        ValueError: the name is not known, an option is missing, unknown or out of range, or options come with a map that
            is already made.
    """
    if isinstance(name, FeatureMap):
        if options:
            raise expected("options", "none beside a feature map", options, "Use dataclasses.replace")
        return name
    if not isinstance(name, str) or name not in _MAPS:
        raise expected("feature_map", f"one of {sorted(_MAPS)}, or a FeatureMap", repr(name))
    kind = _MAPS[name]
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    known = [field.name for field in fields if field.init]
    if unknown := sorted(set(options) - set(known)):
        raise expected(f"feature map {name!r}", f"options among {known}", unknown)
    if missing := [
        field.name
        for field in fields
        if field.init
        and field.name not in options
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]:
        raise expected(f"feature map {name!r}", f"its options {missing}", options or "none")
    return kind(**options)


def attention_error_bound(kernel_error: float, value_max: float) -> float:
    """Return the bound on ``|T - PrefixAttn|_max`` that a relative error of all kernel entries implies.

    ``2 eps / (1 - eps) * max|V|``, for sums made by :meth:`~ntk_prefix.prefix_state.PrefixState.from_prefix`.

    Args:
        kernel_error: ``eps``, from :meth:`FeatureMap.error_bound`; infinity is returned from 1 on.
        value_max: the largest ``|V|`` over prefix and own values.

    Source: derived (theory/README.md, section 11).
    """
    if not kernel_error >= 0:
        raise expected("kernel_error", "a number >= 0", kernel_error)
    checked_size(value_max, "value_max")
    return 2 * kernel_error / (1 - kernel_error) * value_max if kernel_error < 1 else math.inf


def checked_size(value: float, name: str = "norm") -> float:
    """Raise unless a norm, or another size, is finite and >= 0; return it."""
    if not (math.isfinite(value) and value >= 0):
        raise expected(name, "a finite number >= 0", value)
    return value
