r"""A prompt of any length as one small state per attention layer: anchors, divided over the heads where they count most.

Three things are asked of a model. What the prompt leaves behind: the keys and values of each layer. What is asked of it: the
queries of texts that stand behind the prompt. And how much an error matters: ``E |g|^2`` of each head, the Fisher information
(:func:`~ntk_prefix.prefixed_model.sensitivity`). So the errors that :func:`~ntk_prefix.anchor_fit.choose` leaves after each
number of anchors are comparable across heads once they are multiplied by it, and a budget goes where it lowers their sum most.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from ntk_prefix.anchor_budget import divide, steps_for
from ntk_prefix.anchor_fit import Choice, choose, fit_chosen
from ntk_prefix.artifacts import cores
from ntk_prefix.checks import check_array, check_count, expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.models.backbone import check_tokens
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.prefixed_model import Inputs, Prefix, Progress, Queries, in_parts, sensitivity
from ntk_prefix.query_shares import Rows, outputs
from ntk_prefix.typing import Array, Float, Int

__all__ = ["Compression", "Kept", "Made", "compress", "errors", "make"]

Result = TypeVar("Result")

Made = Callable[[], Mapping[str, np.ndarray]]
Kept = Callable[[str, Made], Mapping[str, np.ndarray]]
"""``kept(name, make)``: arrays that were kept under this name, or those that ``make()`` makes, kept from now on."""


def make(name: str, made: Made) -> Mapping[str, np.ndarray]:
    """Keep nothing."""
    return made()


MOST_PER_HEAD = 256
"""Anchors of a head, at most, or twice the budget if that is more; and never more than 8 times the budget."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compression(EqualByValue):
    """What a prompt has become, layer by layer in the order of the model's."""

    states: dict[str, PrefixState]
    """By the layer's dotted path; shared by the query heads of a group."""
    anchors: Int[np.ndarray, "layers K"]
    """How many each key head has; the others of a layer's R are zero."""
    chosen_error: Float[np.ndarray, "layers K"]
    """``|T - T*|^2 / |prefix's part|^2`` on the queries, of the chosen keys with fitted masses and values."""
    error: Float[np.ndarray, "layers K"]
    """The same after the descent."""
    sensitivity: Float[np.ndarray, "layers K"]
    """Mean ``|g|^2`` of the key head's query heads: what an error there costs, relative to other heads."""

    @property
    def numbers(self) -> int:
        """How many numbers the anchors are: points, values and masses."""
        head_dim = jax.tree.leaves(next(iter(self.states.values())).z)[0].shape[-1]
        return int(self.anchors.sum()) * (2 * head_dim + 1)


def compress(
    model: Any,
    prefix: Mapping[str, Prefix],
    queries: Inputs,
    budget: int = 32,
    *,
    steps: int = 300,
    even: bool = False,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    kept: Kept = make,
) -> Compression:
    """Return states of anchors that stand in for a prefix.

    Args:
        model: that the prefix is one of; it is left as it was.
        prefix: of :func:`ntk_prefix.prefixed_model.read_prompt`, or keys and values from elsewhere, such as a trained prefix's.
        queries: texts that stand behind the prefix: [B, T] ids and mask.
        budget: anchors per key head, on average over all layers.
        steps: of the descent, a third of them where little hangs on a head; 0 keeps the chosen keys.
        even: give every head the same.
        seed: of draws.
        progress: told after each part.
        kept: ``kept(name, make)`` returns the arrays that were kept under that name, or keeps those of ``make()``, for a
            run that goes on where another stopped; from several threads.

    Returns:
        A :class:`Compression`; its states are for :func:`ntk_prefix.peft.apply_states`.

    Raises:
        UsageError: a budget above the prefix, fewer queries than anchors, a layer without a prefix.
        NonFiniteError: a state that is not finite.
    """
    check_count("budget", budget)
    layers = attention_sites(model)
    if vocabulary := getattr(getattr(model, "config", None), "vocab_size", None):
        check_tokens(queries["input_ids"], queries["attention_mask"], vocabulary)
    missing = [path for path, _ in layers if path not in prefix]
    if missing:
        raise expected("prefix", "one for each attention layer", f"none for {missing[:4]}")
    for path, site in layers:
        for name, x in prefix[path]._asdict().items():
            check_array(f"{name} of the prefix in {path}", x, "M", site.num_key_heads, site.head_dim)
    shortest = min(len(each.key) for each in prefix.values())
    if budget > shortest:
        raise expected("budget", f"at most the prefix's {shortest} tokens", budget)
    asked = sum(int(np.asarray(some["attention_mask"]).sum()) for some in in_parts(queries))
    if asked < budget:
        raise expected("queries", f"at least {budget} tokens for a budget of {budget}", asked, "Give more text")
    most = min(8 * budget, max(2 * budget, MOST_PER_HEAD), shortest, asked)
    weights = kept("sensitivity", lambda: sensitivity(model, prefix, queries, seed=seed, progress=progress))
    seen = Queries(model, prefix, queries, progress)

    caps = {path: scores.get("logits_soft_cap") for path, scores in seen.scores.items()}

    def chosen_in(path: str) -> Choice:
        def made() -> dict[str, np.ndarray]:
            asked = seen.of(path)
            return choose(asked.rows, asked.key, most, logits_soft_cap=caps[path], seed=seed)._asdict()

        found = kept(f"choice of {path}", made)
        return Choice(found["tokens"], found["left"])

    paths = [path for path, _ in layers]
    chosen = _each(chosen_in, paths, "choosing anchors", progress)
    cost = np.stack([_by_key_head(weights[path], len(choice.left)) for path, choice in zip(paths, chosen, strict=True)])
    curves = np.concatenate([choice.left for choice in chosen]) * cost.reshape(-1)[:, None]
    useful = np.concatenate([choice.useful for choice in chosen])
    anchors = np.minimum(budget, useful) if even else np.minimum(divide(curves, budget * len(curves)), useful)
    turns = steps_for(np.take_along_axis(curves, anchors[:, None], axis=1)[:, 0], steps).reshape(len(layers), -1)
    anchors = anchors.reshape(len(layers), -1)

    def fitted_in(path: str) -> dict[str, np.ndarray]:
        layer = paths.index(path)
        some: dict[str, Any] = {"steps": turns[layer], "logits_soft_cap": caps[path], "seed": seed}

        def made() -> dict[str, np.ndarray]:
            fitted = fit_chosen(*seen.of(path), chosen[layer].tokens, anchors[layer], **some)
            return {name: np.asarray(x) for name, x in fitted._asdict().items()}

        return dict(kept(f"fit of {path}", made))

    fitted = _each(fitted_in, paths, "fitting", progress)
    states = {path: _state(seen.scores[path], found) for path, found in zip(paths, fitted, strict=True)}
    before, after = (np.stack([found[name] for found in fitted]) for name in ("before", "after"))
    return Compression(states, anchors, before, after, cost)


def errors(
    model: Any,
    prefix: Mapping[str, Prefix],
    states: Mapping[str, PrefixState],
    texts: Inputs,
    progress: Progress = lambda *_: None,
) -> Float[np.ndarray, "layers K"]:
    """Return ``|T - T*|^2 / |prefix's part|^2`` of each layer and key head behind the exact prefix, on texts of one's own.

    Args:
        model, prefix: see :func:`compress`.
        states: maps with a group's heads sharing a state.
        texts: on which no state was fitted.
        progress: told after each part.
    """
    seen = Queries(model, prefix, texts, progress)
    # of one size, so that they are one program
    widest = max(state.k.shape[-1] for state in states.values())
    found = (_error(seen.of(path).rows, states[path].padded(widest)) for path, _ in attention_sites(model))
    return np.stack([np.asarray(x, np.float64) for x in found])


def _each(do: Callable[[str], Result], paths: list[str], what: str, progress: Progress) -> list[Result]:
    """Do something for each layer, for a layer a core: what a head needs is too small for several."""
    found = []
    # BLAS has one number of threads for all of them, so it is set outside of them
    with threadpool_limits(1), concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        for each in pool.map(do, paths):
            found.append(each)
            progress(what, len(found), len(paths))
    return found


def _by_key_head(weights: np.ndarray, heads: int) -> np.ndarray:
    return weights.reshape(heads, -1).mean(axis=1)


def _state(scores: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> PrefixState:
    points, z, k = (jnp.asarray(found[name]) for name in ("points", "z", "k"))
    return PrefixState(z, k, Anchors(points, scores.get("logits_soft_cap")), scores.get("scale"))


@jax.jit
def _error(rows: Rows, state: PrefixState) -> Float[Array, "K"]:
    z: Any = state.z
    distance = outputs(rows, z, state.k, state.feature_map) - rows.target
    return jnp.sum(distance**2, axis=(1, 2)) / rows.size
