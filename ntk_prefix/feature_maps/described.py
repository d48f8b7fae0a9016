"""Maps as files and command lines name them: a string and a few numbers; arrays are kept elsewhere, or chosen anew.

==================================  ================================================================================
name                                is
==================================  ================================================================================
``elu1``, ``taylor``, ...           a map without arrays; its options are its fields
``anchors``, ``nearest``, ...       one with ``features`` points for each of ``heads`` heads
``projected:taylor``                another map on ``rank`` directions for each of ``heads`` heads
``anchors+elu1``                    several, side by side; an option is for every map that has it, ``0.features`` for
                                    the first alone
==================================  ================================================================================
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import check_count, expected
from ntk_prefix.feature_maps.base import LARGEST_DIM, FeatureMap, feature_map, feature_maps
from ntk_prefix.feature_maps.with_arrays import Concatenated, Projected

__all__ = ["array_names", "described", "placed", "template"]

Options = Sequence[tuple[str, Any]]


def described(phi: FeatureMap) -> tuple[str, tuple[tuple[str, int | float], ...]]:
    """Return the name and the options that :func:`template` makes a map of these shapes and settings of.

    Raises:
        UsageError: there are none, as for a map of one's own class that another process does not know.
    """
    if isinstance(phi, Concatenated):
        parts = [described(part) for part in phi.maps]
        if not any("+" in name for name, _ in parts):
            options = [(f"{i}.{key}", value) for i, (_, own) in enumerate(parts) for key, value in own]
            return "+".join(name for name, _ in parts), tuple(options)
    elif isinstance(phi, Projected):
        name, own = described(phi.inner)
        heads, rank, _ = phi.directions.shape
        if not {"+", ":"} & set(name):
            return f"projected:{name}", (("rank", rank), ("heads", heads), *((f"inner.{key}", x) for key, x in own))
    else:
        settings: tuple[Any, ...] = dataclasses.fields(phi) if dataclasses.is_dataclass(phi) else ()
        said = {field.name: getattr(phi, field.name) for field in settings if field.name not in phi.arrays}
        # numbers of NumPy's are what a file has of them
        known: dict[str, Any] = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in said.items()
            if value is not None
        }
        if phi.arrays:
            heads, features, _ = getattr(phi, phi.arrays[0]).shape
            known = {"features": features, "heads": heads, **known}
        if feature_maps().get(phi.name) is type(phi) and all(isinstance(x, int | float) for x in known.values()):
            return phi.name, tuple(known.items())
    raise expected(
        "feature_map",
        "a map that a file can name",
        f"{phi!r}, which another process does not know",
        "The adapter stays on the model: keep its weights in a checkpoint, or build the map into ntk_prefix.feature_maps",
    )


def template(name: str, options: Options, heads: int, head_dim: int) -> FeatureMap:
    """Return the map of that name, its arrays zero, of the right shapes.

    Args:
        name: as in the table above.
        options: its options, as pairs.
        heads: K, of arrays whose options do not say it.
        head_dim: H.

    Raises:
        UsageError: an unknown name; an option that is missing, unknown or out of range.
    """
    parts = name.split("+") if isinstance(name, str) else [name]
    if len(parts) == 1:
        return _template(parts[0], dict(options), heads, head_dim)
    numbered = [{k.removeprefix(f"{i}."): v for k, v in options if k.startswith(f"{i}.")} for i in range(len(parts))]
    # what is said of no part is for all that know it
    common = [(key, value) for key, value in options if not key.partition(".")[0].isdigit()]
    known = [_known(part) for part in parts]
    if unknown := [key for key, _ in common if not any(key in each for each in known)]:
        raise expected(f"feature map {name!r}", f"options among {sorted(set().union(*known))}", unknown)
    if beyond := [k for k, _ in options if k.partition(".")[0].isdigit() and int(k.partition(".")[0]) >= len(parts)]:
        raise expected(f"feature map {name!r}", f"options of its {len(parts)} maps", beyond)
    own = [{**{k: v for k, v in common if k in each}, **n} for each, n in zip(known, numbered, strict=True)]
    return Concatenated(tuple(_template(p, o, heads, head_dim) for p, o in zip(parts, own, strict=True)))


def _template(name: str, options: dict[str, Any], heads: int, head_dim: int) -> FeatureMap:
    outer, colon, inner = name.partition(":")
    kind: Any = feature_maps().get(outer)
    if kind is None or not kind.arrays:
        return feature_map(name, **options)
    if issubclass(kind, Concatenated):
        raise expected("feature_map", 'the maps themselves, such as "anchors+elu1"', repr(name))
    if unknown := sorted(key for key in options if key not in _known(name)):
        raise expected(f"feature map {name!r}", f"options among {sorted(_known(name))}", unknown)
    own_heads = options.pop("heads", heads)
    check_count("heads", own_heads)
    if colon and issubclass(kind, Projected):
        rank = options.pop("rank", None)
        if rank is None:
            raise expected(f"feature map {name!r}", "its option rank", options or "none")
        check_count("rank", rank)
        inside = {key.removeprefix("inner."): value for key, value in options.items()}
        return Projected(_template(inner, inside, own_heads, rank), _zeros(own_heads, rank, head_dim))
    if colon or "features" not in options:
        wanted = "no map inside" if colon else "its option features"
        raise expected(f"feature map {name!r}", wanted, inner if colon else options or "none")
    features = options.pop("features")
    check_count("features", features)
    return kind(_zeros(own_heads, features, head_dim), **options)


def _zeros(heads: int, features: int, head_dim: int) -> jax.Array:
    if heads * features > LARGEST_DIM:
        raise expected("features", f"at most {LARGEST_DIM:,} features of all heads", heads * features)
    return jnp.asarray(np.zeros((heads, features, head_dim)))  # made on the host: each size would be a program


def _known(name: str) -> set[str]:
    """Return the options of one map."""
    outer, _, inner = name.partition(":")
    kind = feature_maps().get(outer)
    if kind is None:
        return set()
    if issubclass(kind, Projected):
        own = _known(inner)
        return {"rank", "heads", *own, *(f"inner.{key}" for key in own)}
    known = {key for key in inspect.signature(kind).parameters if key not in kind.arrays}
    return known | {"features", "heads"} if kind.arrays else known


def array_names(phi: FeatureMap) -> tuple[str, ...]:
    """Return what a map's arrays are called, in the order of its leaves: ``points``, ``maps_0_points``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(phi)
    return tuple("_".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path) for path, _ in paths)


def placed(phi: FeatureMap, query: np.ndarray, key: np.ndarray, seed: int = 0) -> FeatureMap:
    """Return the map with its arrays chosen for a layer's queries and keys; a map without arrays is returned as it is.

    Args:
        phi: the map, such as a :func:`template`.
        query: [N, Q, H], scaled.
        key: [K, M, H], scaled.
        seed: of the choice.

    Raises:
        UsageError: fewer vectors than features, or fewer directions than asked for.
    """
    return phi.placed(np.asarray(query, np.float64), np.asarray(key, np.float64), np.random.default_rng(seed))
