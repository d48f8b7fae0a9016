"""What a prompt's compression is compared with: ways to a state of a given size, one function and one line of a table each.

All get the same: the model, the prompt's keys and values, what its layers see of texts behind the prompt, and a budget of R
anchors for each layer's key head, which is R (2H + 1) numbers. What they make is counted in numbers alike:

====================  =================================================================================
a token of a cache    2H: key and value
an anchor, a cell     2H + 1: point, value and mass
a feature of a map    H + 1: value and mass; directions of Taylor's are counted, seeds are not
====================  =================================================================================

No way may use more than 1 % above the budget. One without a size near the budget makes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ntk_prefix.anchor_fit import Rows
from ntk_prefix.checks import NonFiniteError
from ntk_prefix.compression import Made, compress
from ntk_prefix.feature_maps import Anchors, Elu1, FeatureMap, Nearest, PositiveRandom, Projected, Taylor
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefix_fit import FitOptions, fit_prefix
from ntk_prefix.prefix_state import PrefixState, Samples
from ntk_prefix.prefixed_model import Inputs, Prefix, Queries, attending
from ntk_prefix.typing import Array, Float

__all__ = ["METHODS", "Case", "Compressed", "Layer", "Method", "seen_by_layers"]

PURSUED = 1024
"""Keys that matching pursuit looks at, the heaviest, or twice the anchors if that is more."""

DESCENT = 30
"""Iterations of the fit of a map's masses, each of R^2 Q operations a head."""

ABOVE = 1.01
"""How far above the budget a size may be: an elu1 state of 64 entries is 0.8 % more than 32 anchors."""


class Layer(NamedTuple):
    """What is known of one attention layer."""

    rows: Rows
    """Of the fitted texts: K heads, the queries of a head's group side by side."""
    key: Float[Array, "K M H"]
    """The prompt's, scaled."""
    value: Float[Array, "K M H"]
    heads: int
    """N, of queries."""
    scale: float | None
    soft_cap: float | None

    def shares(self, phi: FeatureMap) -> Float[Array, "K Q R"]:
        """Return a map's features of the queries, as shares of their exact denominators."""
        features, log_unit = phi.per_head(self.rows.query)
        shift = -self.rows.log_total if log_unit is None else log_unit - self.rows.log_total
        return features * jnp.exp(shift)[..., None]

    def by_query_head(self) -> Layer:
        """Return the layer with a key head for each query head."""
        groups = self.heads // len(self.key)

        def parted(x: Array) -> Array:
            x = x.reshape(len(x), -1, groups, *x.shape[2:])
            return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])

        key, value = (jnp.repeat(x, groups, axis=0) for x in (self.key, self.value))
        return self._replace(rows=Rows(*map(parted, self.rows)), key=key, value=value)


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt in a model, and texts behind it."""

    model: Any
    """Without an adapter."""
    prefix: Mapping[str, Prefix]
    texts: Inputs
    """That are fitted to."""
    layers: Mapping[str, Layer]
    most: int
    """The largest budget there is."""
    seed: int
    steps: int = 100
    """Of the descent of ours."""
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What ours finds out for all budgets alike."""

    def kept(self, name: str, made: Made) -> Mapping[str, np.ndarray]:
        """Return what an error costs as it was first found, and all else anew."""
        if name != "sensitivity":
            return made()
        if name not in self.known:
            self.known[name] = made()
        return self.known[name]

    @functools.cached_property
    def heaviest(self) -> dict[str, np.ndarray]:
        """For each layer and key head the prompt's tokens, by their root mean square share of attention, [K, M]."""
        return {path: _heaviest(layer) for path, layer in self.layers.items()}

    @functools.cached_property
    def pursued(self) -> dict[str, np.ndarray]:
        """For each layer and key head tokens by matching pursuit of the mass, [K, most]."""
        return {path: _pursued(layer, self.heaviest[path], self.most) for path, layer in self.layers.items()}


class Compressed(NamedTuple):
    """What a method has made of a prompt."""

    numbers: int
    attached: Callable[[Any], contextlib.AbstractContextManager[None]]
    """``attached(model)`` is a context in which the model has it in the prompt's place."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compress."""

    label: str
    make: Callable[[Case, int], Compressed | None]
    """Of a case and a budget; nothing where there is no such size."""
    sized: bool = True
    """Whether it has a budget."""


def seen_by_layers(model: Any, prefix: Mapping[str, Prefix], texts: Inputs) -> dict[str, Layer]:
    """Return what each layer sees of texts behind the exact prefix, paddings left out."""
    seen, found = Queries(model, prefix, texts, lambda *_: None), {}
    for path, site in attention_sites(model):
        rows, key = seen.of(path)
        scale, cap = (seen.scores[path].get(name) for name in ("scale", "logits_soft_cap"))
        found[path] = Layer(rows, key, jnp.swapaxes(prefix[path].value, 0, 1), site.num_heads, scale, cap)
    return found


# ------------------------------------------------------------------------------------- the methods


def no_prompt(case: Case, size: int) -> Compressed:
    """Leave it out."""
    return Compressed(0, lambda model: contextlib.nullcontext())


def whole_prompt(case: Case, size: int) -> Compressed:
    """Keep all of it."""
    return Compressed(sum(x.size for x in jax.tree.leaves(dict(case.prefix))), _on(case.prefix))


def last_tokens(case: Case, size: int) -> Compressed:
    """Keep the first 4 tokens, where attention rests, and the last ones (StreamingLLM, arXiv 2309.17453)."""
    first = min(4, size // 2)

    def kept(path: str, layer: Layer) -> np.ndarray:
        count = layer.key.shape[1]
        return np.concatenate([np.arange(first), np.arange(count - size + first, count)])[None]

    return _tokens(case, kept)


def heaviest_tokens(case: Case, size: int) -> Compressed:
    """Keep what each key head gives most weight to."""
    return _tokens(case, lambda path, layer: case.heaviest[path][:, :size])


def attention_matching(case: Case, size: int) -> Compressed:
    """Take the heaviest keys, masses by non-negative least squares and values by least squares (arXiv 2602.16284)."""
    return _of_maps(case, lambda path, layer: _anchors(layer, case.heaviest[path][:, :size]))


def attention_matching_by_pursuit(case: Case, size: int) -> Compressed:
    """Take keys by orthogonal matching pursuit of the mass, the rest as :func:`attention_matching`."""
    return _of_maps(case, lambda path, layer: _anchors(layer, case.pursued[path][:, :size]))


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
    found = compress(case.model, case.prefix, case.texts, size, steps=case.steps, seed=case.seed, kept=case.kept)
    return Compressed(found.numbers, _on(found.states))


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
    "ours": Method("ours", ours),
}
"""In the order in which they are run: what is cheap first."""


# --------------------------------------------------------------------------------------- the parts


def _on(
    states: Mapping[str, Prefix] | Mapping[str, PrefixState],
) -> Callable[[Any], contextlib.AbstractContextManager[None]]:
    return functools.partial(attending, to=states)


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
    states, numbers = {}, 0
    for path, layer in case.layers.items():
        layer = layer.by_query_head() if by_query_head else layer
        state = (fit or _fitted)(layer, chosen(path, layer), case.seed)
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state)):
            raise NonFiniteError(f"{state.feature_map.name}: expected a state that float32 holds, got one beyond it.")
        numbers += sum(x.size for x in jax.tree.leaves(state))
        states[path] = state
    return Compressed(numbers, _on(states))


def _descended(layer: Layer, phi: FeatureMap, seed: int) -> PrefixState:
    return _fitted(layer, phi, seed, DESCENT)


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


def _heaviest(layer: Layer) -> np.ndarray:
    """Return each head's tokens by their mean square share, the largest first; Attention Matching's "rms"."""

    def square(head: int) -> Array:
        one = layer._replace(rows=Rows(*(x[head : head + 1] for x in layer.rows)), key=layer.key[head : head + 1])
        return jnp.mean(one.shares(Anchors(one.key, layer.soft_cap)) ** 2, axis=(0, 1))

    return np.argsort(-np.stack([square(head) for head in range(len(layer.key))]), axis=1, kind="stable")


def _pursued(layer: Layer, heaviest: np.ndarray, most: int) -> np.ndarray:
    """Return each head's tokens in the order of matching pursuit of the mass, one at a time.

    As in Attention Matching's code, a column of shares is not normalized, and masses are refitted by least squares and cut
    off at 0 after each; the search is among the heaviest :data:`PURSUED` keys.
    """
    among = heaviest[:, : max(PURSUED, 2 * most)]
    found = []
    for head, tokens in enumerate(among):
        key, rows = layer.key[head : head + 1, tokens], Rows(*(x[head : head + 1] for x in layer.rows))
        shares = np.asarray(layer._replace(rows=rows).shares(Anchors(key, layer.soft_cap))[0])
        moments = np.asarray(shares.T @ shares, np.float64)
        wanted = np.asarray(shares.T @ np.asarray(rows.mass[0]), np.float64)
        # float32's rounding, of which the least squares must not be made
        ridge = 1e-7 * np.trace(moments) / len(moments)
        chosen: list[int] = []
        free, left = np.ones(len(tokens), bool), wanted
        for _ in range(min(most, len(tokens))):
            best = int(np.argmax(np.where(free, left, -np.inf)))
            chosen.append(best)
            free[best] = False
            own = moments[np.ix_(chosen, chosen)] + ridge * np.eye(len(chosen))
            masses = np.maximum(scipy.linalg.solve(own, wanted[chosen], assume_a="pos"), 0)
            left = wanted - moments[:, chosen] @ masses
        found.append(tokens[chosen])
    return np.stack(found)
