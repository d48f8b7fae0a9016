"""States made elsewhere, by :meth:`~ntk_prefix.prefix_state.PrefixState.fit` or from sums, as an adapter on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ntk_prefix.attention import LowRank
from ntk_prefix.checks import check_flag, check_floating, check_scale, expected
from ntk_prefix.feature_maps.described import array_names, described
from ntk_prefix.peft.inject import apply
from ntk_prefix.peft.methods.ntk_attention import NTKAttentionConfig, StateCore
from ntk_prefix.peft.names import exactly
from ntk_prefix.peft.sites import AttentionSite, attention_sites
from ntk_prefix.prefix_state import PrefixState

__all__ = ["apply_states"]


def apply_states(
    model: Any, states: Mapping[str | int, PrefixState], *, name: str = "default", train_map: bool = False
) -> Any:
    """Put a state on each of some attention layers, as an adapter like any other: saved, loaded, switched, trained further.

    States may differ from layer to layer in their map and in its size, and may be shared by the query heads of a group.

    Args:
        model: any that :func:`ntk_prefix.peft.apply` takes; it is changed and returned.
        states: by the layer's dotted path, or by its place among the attention layers, first is 0.
        name: of the adapter.
        train_map: train the maps' arrays too, beside z and k.

    Returns:
        The model, the adapter active on it.

    Raises:
        UsageError: no states; a layer that is not there, or named twice; a state of other heads than its layer's, of
            another scale, of numbers that a file would not hold or masses below 0, or with a map that no file can name.
    """
    check_flag("train_map", train_map)
    sites = attention_sites(model)
    if not isinstance(states, Mapping) or not states:
        raise expected(
            "states",
            "a PrefixState for at least one layer, by path or place",
            type(states).__name__ if states else "none",
        )
    found: dict[str, PrefixState] = {}
    for place, state in states.items():
        known = [path for i, (path, _) in enumerate(sites) if place in (i, path) and not isinstance(place, bool)]
        if not known or known[0] in found:
            wanted = f"attention layers, each once, among {[path for path, _ in sites][:8]} or their places"
            raise expected("states", wanted, repr(place))
        if not isinstance(state, PrefixState):
            raise expected(f"state of {known[0]}", "a PrefixState", type(state).__name__)
        found[known[0]] = state
    layers = dict(sites)
    chosen: dict[NTKAttentionConfig, list[str]] = {}
    for path, state in found.items():
        chosen.setdefault(_config(path, layers[path], state, train_map), []).append(path)
    apply(model, [dataclasses.replace(config, target=exactly(paths)) for config, paths in chosen.items()], name=name)
    for path, site in attention_sites(model):
        if path in found:
            core: Any = site.core
            assert isinstance(core, StateCore)
            core.adapters[name].take(found[path])
    return model


def _config(path: str, layer: AttentionSite, state: PrefixState, train_map: bool) -> NTKAttentionConfig:
    """Return the configuration of a state, without its target: states that are alike have the same."""
    phi, head_dim = state.feature_map, layer.head_dim
    _check_numbers(path, state)
    factors = state.z if isinstance(state.z, LowRank) else (state.z,)
    heads, rank, features = len(state.k), factors[0].shape[-1], phi.dim(head_dim)
    wanted = ((heads, features, rank), (heads, rank, head_dim)) if len(factors) > 1 else ((heads, features, head_dim),)
    shapes = tuple(x.shape for x in factors)
    if heads not in (layer.num_heads, layer.num_key_heads) or shapes != wanted or state.k.shape != (heads, features):
        raise expected(
            f"state of {path}",
            f"z [J, {features}, {head_dim}] and k [J, {features}] of J = {layer.num_heads} query heads or "
            f"{layer.num_key_heads} key heads",
            f"z {shapes} and k {state.k.shape}",
        )
    phi.check(layer.num_heads, head_dim)
    kind = getattr(layer, "kind", None)
    scale = (kind.scores() if kind else {}).get("scale") or head_dim**-0.5
    if abs((given := check_scale(state.scale, head_dim)) / scale - 1) > 1e-6:
        raise expected(f"state of {path}", f"the layer's scale {scale:g}", given)
    feature_map, options = described(phi)
    return NTKAttentionConfig(
        feature_map=feature_map,
        feature_map_options=options,
        rank=rank if isinstance(state.z, LowRank) else None,
        grouped=heads != layer.num_heads,
        train_map=train_map and bool(jax.tree.leaves(phi)),
        train_head=False,
        given=True,
    )


def _check_numbers(path: str, state: PrefixState) -> None:
    """Refuse what a file would not hold: an adapter is one that can be saved."""
    z = state.z._asdict() if isinstance(state.z, LowRank) else {"z": state.z}
    names = array_names(state.feature_map)
    arrays = {"k": state.k, **z, **dict(zip(names, jax.tree.leaves(state.feature_map), strict=True))}
    for name, array in arrays.items():
        what = f"{name} of the state of {path}"
        check_floating(what, array)
        if isinstance(array, jax.core.Tracer):
            continue
        values = np.asarray(array, np.float64)
        beyond = values[~(np.abs(values) <= float(np.finfo(np.float32).max))]
        if len(beyond):
            raise expected(what, "finite numbers that float32 holds", beyond[0])
        if name == "k" and state.feature_map.positive and values.min(initial=0) < 0:
            raise expected(what, "masses >= 0, which are part of a denominator", values.min(), "Clip them at 0")
