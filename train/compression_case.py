"""A prompt in a model with texts behind it, as ways to compress it see it: what a layer knows, and what it gives weight to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ntk_prefix.compression import Made
from ntk_prefix.feature_maps import Anchors, FeatureMap
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefixed_model import Inputs, Prefix, Progress, Queries
from ntk_prefix.query_shares import Rows
from ntk_prefix.typing import Array, Float, Int

__all__ = ["Case", "Compressed", "Layer", "seen_by_layers"]

PURSUED = 1024
"""Keys that matching pursuit looks at, the heaviest, or twice the anchors if that is more."""


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
    prompt: Int[Array, "M"]
    """Its tokens."""
    most: int
    """The largest budget there is."""
    seed: int
    steps: int = 300
    """Of the descent of ours."""
    distil: int = 100
    """Steps of what is trained on the answers of the model with the prompt."""
    distil_rate: float | None = None
    """None: each its own, that of :func:`distil_states` for what begins as a fit, that of :func:`distil` for the others."""
    progress: Progress = lambda *_: None
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What has been found, by its name, and is wanted again."""

    def kept(self, name: str, made: Made) -> Mapping[str, np.ndarray]:
        """Return what an error costs as it was first found, and all else anew."""
        if name != "sensitivity":
            return made()
        if name not in self.known:
            self.known[name] = made()
        return self.known[name]

    def training(self, own_rate: float) -> dict[str, Any]:
        """Return how to train on the answers of the model with the prompt."""
        rate = own_rate if self.distil_rate is None else self.distil_rate
        return {"steps": self.distil, "learning_rate": rate, "seed": self.seed, "progress": self.progress}

    @functools.cached_property
    def heaviest(self) -> dict[str, np.ndarray]:
        """For each layer and key head the prompt's tokens, by their root mean square share of attention, [K, M]."""
        return {path: _heaviest(layer) for path, layer in self.layers.items()}

    def pursued(self, path: str, size: int) -> np.ndarray:
        """Return tokens of a layer's key heads by matching pursuit of the mass, [K, size]: the same, whatever other budgets.

        The search is among the heaviest :data:`PURSUED` keys, or twice the budget if that is more.
        """
        among = max(PURSUED, 2 * size)
        if (name := f"pursued in {path} among {among}") not in self.known:
            most = min(self.most, among // 2)
            self.known[name] = _pursued(self.layers[path], self.heaviest[path][:, :among], most)
        return self.known[name][:, :size]


class Compressed(NamedTuple):
    """What a method has made of a prompt."""

    numbers: int
    attached: Callable[[Any], contextlib.AbstractContextManager[None]]
    """``attached(model)`` is a context in which the model has it in the prompt's place."""


def seen_by_layers(model: Any, prefix: Mapping[str, Prefix], texts: Inputs) -> dict[str, Layer]:
    """Return what each layer sees of texts behind the exact prefix, paddings left out."""
    seen, found = Queries(model, prefix, texts, lambda *_: None), {}
    for path, site in attention_sites(model):
        asked = seen.of(path)
        scale, cap = (seen.scores[path].get(name) for name in ("scale", "logits_soft_cap"))
        found[path] = Layer(*asked, site.num_heads, scale, cap)
    return found


def _heaviest(layer: Layer) -> np.ndarray:
    """Return each head's tokens by their mean square share, the largest first; Attention Matching's "rms"."""

    def square(head: int) -> Array:
        one = layer._replace(rows=Rows(*(x[head : head + 1] for x in layer.rows)), key=layer.key[head : head + 1])
        return jnp.mean(one.shares(Anchors(one.key, layer.soft_cap)) ** 2, axis=(0, 1))

    return np.argsort(-np.stack([square(head) for head in range(len(layer.key))]), axis=1, kind="stable")


def _pursued(layer: Layer, among: np.ndarray, most: int) -> np.ndarray:
    """Return each head's tokens in the order of matching pursuit of the mass, one at a time.

    As in Attention Matching's code, a column of shares is not normalized, and masses are refitted by least squares and cut
    off at 0 after each.
    """
    found = []
    for head, tokens in enumerate(among):
        key, rows = layer.key[head : head + 1, tokens], Rows(*(x[head : head + 1] for x in layer.rows))
        # sums in float64, for those in float32 of keys that are nearly alike are of no matrix that is positive
        shares = np.asarray(layer._replace(rows=rows).shares(Anchors(key, layer.soft_cap))[0], np.float64)
        moments, wanted = shares.T @ shares, shares.T @ np.asarray(rows.mass[0], np.float64)
        # the rounding of the shares, of which the least squares must not be made
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
