"""What a prompt's compression is compared with: ways to a state of a given size, one function and one line of a table each.

All get the same: the model, the prompt's keys and values, what its layers see of texts behind the prompt, and a budget of R
anchors for each layer's key head, which is R (2H + 1) numbers. What they make is counted in numbers alike:

====================  =================================================================================
a token of a cache    2H: key and value
an anchor, a cell     2H + 1: point, value and mass
a feature of a map    H + 1: value and mass; directions of Taylor's are counted, seeds are not
LoRA                  r (in + out) for each linear map
====================  =================================================================================

No way may use more than 1 % above the budget. One without a size near the budget makes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from ntk_prefix import peft
from ntk_prefix.checks import NonFiniteError
from ntk_prefix.compression import Compression, compress
from ntk_prefix.distillation import FITTED_RATE, UNFITTED_RATE, distil, distil_states
from ntk_prefix.feature_maps import Anchors, Elu1, FeatureMap, Nearest, PositiveRandom, Projected, Taylor
from ntk_prefix.prefix_fit import FitOptions, fit_prefix
from ntk_prefix.prefix_state import PrefixState, Samples
from ntk_prefix.prefixed_model import Prefix, attending, read_prompt
from ntk_prefix.typing import Array, Int
from train.compression_case import Case, Compressed, Layer

__all__ = ["METHODS", "Method"]

DESCENT, DESCENDED = 30, 128
"""Iterations of the fit of a map's masses, each of R^2 Q operations per head, and the most features that get them."""

ABOVE = 1.01
"""How far above the budget a size may be: an elu1 state of 64 entries is 0.8 % more than 32 anchors."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compress."""

    label: str
    make: Callable[[Case, int], Compressed | None]
    """Of a case and a budget; nothing where there is no such size."""
    sized: bool = True
    """Whether it has a budget."""
    options: tuple[str, ...] = ()
    """Which of the program's options it depends on, beside those that all do."""


# ------------------------------------------------------------------------------------- the methods


def no_prompt(case: Case, size: int) -> Compressed:
    """Leave it out."""
    return Compressed(0, functools.partial(attending, to=None))


def whole_prompt(case: Case, size: int) -> Compressed:
    """Keep all of it."""
    return Compressed(_numbers(dict(case.prefix)), _on(case.prefix))


def last_tokens(case: Case, size: int) -> Compressed:
    """Keep the first 4 tokens, where attention rests, and the last ones (StreamingLLM, arXiv 2309.17453)."""

    def kept(path: str, layer: Layer) -> np.ndarray:
        count = layer.key.shape[1]
        most = min(size, count)  # a layer with a window has no more of a prompt
        first = min(4, most // 2)
        return np.concatenate([np.arange(first), np.arange(count - most + first, count)])[None]

    return _tokens(case, kept)


def heaviest_tokens(case: Case, size: int) -> Compressed:
    """Keep what each key head gives most weight to."""
    return _tokens(case, lambda path, layer: case.heaviest[path][:, :size])


def attention_matching(case: Case, size: int) -> Compressed:
    """Take the heaviest keys, masses by non-negative least squares and values by least squares (arXiv 2602.16284)."""
    return _of_maps(case, lambda path, layer: _anchors(layer, case.heaviest[path][:, :size]))


def attention_matching_by_pursuit(case: Case, size: int) -> Compressed:
    """Take keys by orthogonal matching pursuit of the mass, the rest as :func:`attention_matching`."""
    return _of_maps(case, lambda path, layer: _anchors(layer, case.pursued(path, size)))


def nearest_centroids(case: Case, size: int) -> Compressed:
    """Keep a value and a mass for each cluster of queries (Attention-State Memory, arXiv 2605.18226, its abstract)."""

    def placed(path: str, layer: Layer) -> FeatureMap:
        draw = np.random.default_rng(case.seed)
        query = np.asarray(layer.rows.query, np.float64)
        some = query[:, np.sort(draw.permutation(query.shape[1])[: 16 * size])]
        return Nearest(layer.key[:, :size]).placed(some, np.asarray(layer.key), draw)

    return _of_maps(case, placed)


def elu1(case: Case, size: int) -> Compressed | None:
    """Fit a state of ``elu1``: for each query head if there is room, else for each key head."""
    layer = next(iter(case.layers.values()))
    (keys, _, head_dim), room = layer.key.shape, ABOVE * size * (2 * layer.key.shape[2] + 1)
    numbers = head_dim * (head_dim + 1)
    groups = layer.heads // keys
    for own in dict.fromkeys((groups, 1)):
        # much below the budget it is the row of a smaller one
        if room / 2 < own * numbers <= room:
            return _of_maps(case, lambda path, layer: Elu1(), by_query_head=own > 1, fit=_descended)
    return None


def taylor(case: Case, size: int) -> Compressed | None:
    """Fit a state of the exponential's series of degree 2 in the principal directions of the queries.

    Its features are negative too, and masses by least squares then make denominators that vanish: masses are the raw sums
    over the keys, positive for every query, times a factor.
    """
    layer = next(iter(case.layers.values()))
    head_dim, room = layer.key.shape[2], ABOVE * size * (2 * layer.key.shape[2] + 1)

    def numbers(rank: int) -> int:
        return math.comb(rank + 2, 2) * (head_dim + 1) + rank * head_dim

    ranks = [rank for rank in range(1, head_dim + 1) if numbers(rank) <= room]
    if not ranks:
        return None

    def placed(path: str, layer: Layer) -> FeatureMap:
        query, key = (np.asarray(x, np.float64) for x in (layer.rows.query, layer.key))
        start = Projected(Taylor(2), jnp.zeros((len(key), ranks[-1], head_dim)))
        return start.placed(query, key, np.random.default_rng(case.seed))

    return _of_maps(case, placed, fit=_with_raw_masses)


def random_features(case: Case, size: int) -> Compressed:
    """Fit a state of positive random features (Performers, arXiv 2009.14794)."""
    head_dim = next(iter(case.layers.values())).key.shape[2]
    features = size * (2 * head_dim + 1) // (head_dim + 1)
    return _of_maps(case, lambda path, layer: PositiveRandom(features, case.seed), fit=_descended)


def ours(case: Case, size: int) -> Compressed:
    """Choose anchors, divide the budget over the heads by what an error costs, and descend."""
    found = _compressed(case, size)
    return Compressed(found.numbers, _on(found.states))


def ours_distilled(case: Case, size: int) -> Compressed:
    """Train all of what :func:`ours` has made."""
    found = _compressed(case, size)
    states = distil_states(case.model, case.prefix, found.states, case.texts, **case.training(FITTED_RATE))
    return Compressed(found.numbers, _on(states))


def cartridge(case: Case, size: int) -> Compressed:
    """Train keys and values of a cache that begins as the prompt's first tokens (Cartridges, arXiv 2506.06266)."""
    return _cartridge(case, case.prompt[:size])


def cartridge_of_random_tokens(case: Case, size: int) -> Compressed:
    """Train keys and values of a cache that begins as tokens drawn from the prompt and the texts behind it."""
    known = np.concatenate(
        [case.prompt, np.asarray(case.texts["input_ids"])[np.asarray(case.texts["attention_mask"]) > 0]]
    )
    return _cartridge(case, jnp.asarray(np.random.default_rng(case.seed).choice(known, size), jnp.int32))


def lora(case: Case, size: int) -> Compressed | None:
    """Train LoRA on queries and values (arXiv 2106.09685), of the largest rank that there is room for."""
    layer = next(iter(case.layers.values()))
    room = ABOVE * size * (2 * layer.key.shape[2] + 1) * sum(len(each.key) for each in case.layers.values())
    rank = int(room // _numbers(_lora_start(case.model, peft.LoraConfig(r=1, train_head=False), case.seed)))
    if not rank:
        return None
    config = peft.LoraConfig(r=rank, train_head=False)
    start = _lora_start(case.model, config, case.seed)
    # in units in which A begins with entries up to 1: a step of Adam then moves it as far as states are moved
    unit = jax.tree.map(lambda x: max(float(jnp.max(jnp.abs(x))), 1e-30), start)
    unit = {name: unit[name.rpartition(".")[0] + ".a"] for name in start}

    def attached(model: Any, factors: dict[str, Array]) -> contextlib.AbstractContextManager[None]:
        return _with_lora(model, config, {name: unit[name] * x for name, x in factors.items()})

    factors = distil(
        case.model,
        case.prefix,
        {name: x / unit[name] for name, x in start.items()},
        attached,
        case.texts,
        **case.training(UNFITTED_RATE),
    )
    return Compressed(_numbers(start), functools.partial(attached, factors=factors))


DISTILLED = ("distil", "distil_rate")

METHODS = {
    "none": Method("no prompt", no_prompt, sized=False),
    "prompt": Method("the prompt itself", whole_prompt, sized=False),
    "last": Method("first 4 + last", last_tokens),
    "heaviest": Method("heaviest", heaviest_tokens),
    "matching": Method("Attention Matching", attention_matching),
    "matching-omp": Method("Attention Matching, OMP", attention_matching_by_pursuit),
    "nearest": Method("nearest centroids", nearest_centroids),
    "elu1": Method("elu1", elu1),
    "taylor": Method("Taylor", taylor),
    "random": Method("random features", random_features),
    "ours": Method("ours", ours, options=("steps",)),
    "ours-distilled": Method("ours, distilled", ours_distilled, options=("steps", *DISTILLED)),
    "cartridge": Method("Cartridge", cartridge, options=DISTILLED),
    "cartridge-random": Method("Cartridge, random tokens", cartridge_of_random_tokens, options=DISTILLED),
    "lora": Method("LoRA, distilled", lora, options=DISTILLED),
}
"""In the order in which they are run: what is cheap first."""


# --------------------------------------------------------------------------------------- the parts


def _on(
    states: Mapping[str, Prefix] | Mapping[str, PrefixState],
) -> Callable[[Any], contextlib.AbstractContextManager[None]]:
    return functools.partial(attending, to=states)


def _compressed(case: Case, size: int) -> Compression:
    """Return ours, which is made once."""
    if (name := f"ours {size}") not in case.known:
        options: dict[str, Any] = {"steps": case.steps, "seed": case.seed, "kept": case.kept, "progress": case.progress}
        case.known[name] = compress(case.model, case.prefix, case.texts, size, **options)
    return case.known[name]


def _cartridge(case: Case, tokens: Int[Array, "R"]) -> Compressed:
    """Return trained keys and values that begin as those of some tokens, read where they end before the text."""
    states, numbers = {}, 0
    for path, (key, value) in read_prompt(case.model, tokens).items():
        layer = case.layers[path]
        phi = Anchors.of_keys(key, layer.scale, layer.soft_cap)
        states[path] = PrefixState(jnp.swapaxes(value, 0, 1), jnp.ones(phi.points.shape[:2]), phi, layer.scale)
        numbers += key.size + value.size
    how = case.training(UNFITTED_RATE)
    return Compressed(numbers, _on(distil_states(case.model, case.prefix, states, case.texts, fixed=("k",), **how)))


ADAPTER = "compared"
"""Name of LoRA while it is on the model."""


@contextlib.contextmanager
def _with_lora(model: Any, config: peft.LoraConfig, factors: Mapping[str, Array]) -> Iterator[None]:
    """Within it the model has LoRA of these factors, by their dotted paths."""
    peft.apply(model, config, name=ADAPTER)
    try:
        for name, variable in _variables(model).items():
            variable[...] = factors[name]
        with attending(model, None):
            yield
    finally:
        peft.delete_adapter(model, ADAPTER)


def _lora_start(model: Any, config: peft.LoraConfig, seed: int) -> dict[str, Array]:
    """Return the factors that LoRA begins with."""
    peft.apply(model, config, name=ADAPTER, rngs=nnx.Rngs(seed))
    try:
        return {name: variable[...] for name, variable in _variables(model).items()}
    finally:
        peft.delete_adapter(model, ADAPTER)


def _variables(model: Any) -> dict[str, Any]:
    return {
        ".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, peft.AdapterParam)
    }


def _numbers(arrays: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(arrays))


def _tokens(case: Case, kept: Callable[[str, Layer], np.ndarray]) -> Compressed:
    """Return some of the prompt's tokens as they are, [K or 1, R] for each layer."""
    states, numbers = {}, 0
    for path, layer in case.layers.items():
        index = jnp.asarray(kept(path, layer))[..., None]
        key, value = (jnp.take_along_axis(x, index, axis=1) for x in (layer.key, layer.value))
        states[path] = PrefixState(value, jnp.ones(key.shape[:2]), Anchors(key, layer.soft_cap), layer.scale)
        numbers += key.size + value.size
    return Compressed(numbers, _on(states))


def _of_maps(
    case: Case,
    chosen: Callable[[str, Layer], FeatureMap],
    *,
    by_query_head: bool = False,
    fit: Callable[[Layer, FeatureMap, int], PrefixState] | None = None,
) -> Compressed:
    """Return states of maps, masses and values fitted to the queries; by default as :func:`_fitted` does."""
    states = {}
    for path, layer in case.layers.items():
        layer = layer.by_query_head() if by_query_head else layer
        state = (fit or _fitted)(layer, chosen(path, layer), case.seed)
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state)):
            raise NonFiniteError(f"{state.feature_map.name}: expected a state that float32 holds, got one beyond it.")
        states[path] = state
    return Compressed(_numbers(states), _on(states))


def _descended(layer: Layer, phi: FeatureMap, seed: int) -> PrefixState:
    return _fitted(layer, phi, seed, DESCENT if phi.dim(layer.key.shape[2]) <= DESCENDED else 0)


def _fitted(layer: Layer, phi: FeatureMap, seed: int, iterations: int = 0) -> PrefixState:
    """Return a state of a map, by the fit of :meth:`PrefixState.fit`: k by non-negative least squares, z by least squares.

    Raises:
        UsageError: fewer queries than features.
    """
    rows = layer.rows
    features, own, own_mass, mass, target = (
        np.asarray(x, np.float64) for x in (layer.shares(phi), rows.own, jnp.exp(rows.log_own), rows.mass, rows.target)
    )
    # all is a share of the exact denominator, so that units are 1; one query is held out, as few as can be
    samples = Samples(features, own_mass, own, mass, target, np.ones_like(mass), 1)
    options = FitOptions(held_out=1e-9, iterations=iterations, seed=seed)
    nothing = np.zeros((len(mass), features.shape[2], own.shape[2])), np.zeros((len(mass), features.shape[2]))
    fit = fit_prefix(samples, options, positive=phi.positive, raw=nothing, alone=False)
    return PrefixState(jnp.asarray(fit.z, jnp.float32), jnp.asarray(fit.k, jnp.float32), phi, layer.scale)


def _with_raw_masses(layer: Layer, phi: FeatureMap, seed: int) -> PrefixState:
    """Return a state whose k is a multiple of the raw sums over the keys, and z by least squares."""
    sums, _ = phi.per_head(layer.key)
    rows, k, z = layer.rows, np.asarray(jnp.sum(sums, axis=1), np.float64), []
    for head, features in enumerate(np.asarray(layer.shares(phi), np.float64)):
        part, own, mass, target = (
            np.asarray(x[head], np.float64) for x in (rows.own, jnp.exp(rows.log_own), rows.mass, rows.target)
        )
        raw = features @ k[head]
        k[head] *= max(raw @ mass / (raw @ raw), 0)
        denominator = (own + features @ k[head])[:, None]
        left = features / denominator
        size = np.sqrt(np.mean(left**2, axis=0))
        moments = (left / size).T @ (left / size)
        moments += 1e-5 * len(left) * np.eye(len(moments))
        wanted = (left / size).T @ (target - part * own[:, None] / denominator)
        z.append(scipy.linalg.solve(moments, wanted, assume_a="pos") / size[:, None])
    return PrefixState(jnp.asarray(np.stack(z), jnp.float32), jnp.asarray(k, jnp.float32), phi, layer.scale)


def _anchors(layer: Layer, tokens: np.ndarray) -> Anchors:
    return Anchors(jnp.take_along_axis(layer.key, jnp.asarray(tokens)[..., None], axis=1), layer.soft_cap)
