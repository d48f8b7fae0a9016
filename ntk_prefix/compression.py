r"""A prompt of any length as one small state per attention layer: anchors, divided over the heads where they count most.

Three things are asked of a model. What the prompt leaves behind: the keys and values of each layer (:func:`read_prompt`).
What is asked of it: the queries of texts that stand behind the prompt. And how much an error matters: the model's answer
moves by

.. math::  KL \approx \tfrac12 E (g_i \cdot \delta_i)^2

if the output of a head is off by delta at token i, where g is the gradient there of the log likelihood of a token that the
model itself draws (the Fisher information), or for a model without logits of a random projection of its hidden states. So
the errors that :func:`ntk_prefix.anchor_fit.choose` leaves after each number of anchors are comparable across heads once
they are multiplied by ``E |g|^2``, and a budget goes to where it lowers their sum most.

A prompt of a model with rotary positions is read at positions -M .. -1: only differences of positions count there, so the
state has no position, and the text behind it begins at 0 as it would without a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.anchor_fit import Choice, Rows, choose, descend, divide, rows_of
from ntk_prefix.attention import prefix_attention
from ntk_prefix.checks import NonFiniteError, check_count, expected
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.models.attention import AttentionCore, AttentionOptions
from ntk_prefix.models.backbone import check_tokens
from ntk_prefix.models.llama import Llama
from ntk_prefix.peft.record import LayerRecord, record, replaced_cores
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.typing import Array, Float, Int

__all__ = [
    "Compression",
    "Divergence",
    "Prefix",
    "attending",
    "compress",
    "divergence",
    "in_parts",
    "make",
    "read_prompt",
    "sensitivity",
]

Inputs = Mapping[str, Array]
"""``input_ids`` and ``attention_mask``, [B, T] each, padded on the right."""

Progress = Callable[[str, int, int], Any]
"""Told what is done, and how many steps of how many."""

Made = Callable[[], Mapping[str, np.ndarray]]
Kept = Callable[[str, Made], Mapping[str, np.ndarray]]
"""``kept(name, make)``: arrays that were kept under this name, or those that ``make()`` makes, kept from now on."""


def make(name: str, made: Made) -> Mapping[str, np.ndarray]:
    """Keep nothing."""
    return made()


ROWS_AT_ONCE = 4
"""Texts that a model reads together: their logits are held at once."""

PROMPT_AT_ONCE = 1024
"""Tokens of a prompt that a decoder reads together."""

MOST_PER_HEAD = 256
"""Anchors of a head, at most, or twice the budget if that is more; and never more than 8 times the budget."""

SIZES = (16, 48, 128, 256)
"""Numbers of anchors that a descent is compiled for, and multiples of the last; a head in between is filled up."""


class Prefix(NamedTuple):
    """What a prompt leaves behind in one layer."""

    key: Float[Array, "M K H"]
    value: Float[Array, "M K H"]


@dataclasses.dataclass(frozen=True)
class Compression:
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


class _Prefixed(AttentionCore):
    """Exact attention over a prefix and the keys; ``probe``, zero, is there to be differentiated for."""

    def __init__(self, prefix: Prefix, probe: Array | None = None):
        self.prefix = nnx.data(prefix)
        self.probe = nnx.data(probe)

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        output = prefix_attention(query, key, value, *self.prefix, **options)
        return output if self.probe is None else output + self.probe.astype(output.dtype)


class _Stated(AttentionCore):
    """Attention with a state in the place of a prefix."""

    def __init__(self, state: PrefixState):
        self.state = nnx.data(state)

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        said: dict[str, Any] = dict(options)
        said.pop("scale", None)  # the state has it
        return self.state.attend(query, key, value, **said)


def read_prompt(model: Any, input_ids: Int[Array, " M"], progress: Progress = lambda *_: None) -> dict[str, Prefix]:
    """Return the keys and values that a prompt leaves behind in each attention layer.

    Args:
        model: a decoder reads with its cache, ``PROMPT_AT_ONCE`` tokens at a time, at positions -M .. -1; any other model
            reads the prompt as one sequence from position 0.
        input_ids: of the prompt.
        progress: told after each part.

    Returns:
        By the layer's dotted path. A layer with a sliding window has no more than the window's tokens.

    Raises:
        UsageError: an empty prompt, or ids that the model has not.
    """
    ids = jnp.asarray(input_ids)[None]
    length = ids.shape[1]
    if not length:
        raise expected("prompt", "at least one token", "none")
    if not isinstance(model, Llama):
        kept = record(model, {"input_ids": ids}, lambda _, seen: Prefix(seen.key[0], seen.value[0]))
        progress("reading the prompt", length, length)
        return kept
    check_tokens(ids, None, model.config.vocab_size)

    @nnx.jit
    def read(model: Llama, part: Array, cache: Any, start: Array) -> Any:
        return model.hidden(part, None, cache, start, position_offset=-length)[1]

    cache = model.empty_cache(1, length)
    for start in range(0, length, PROMPT_AT_ONCE):
        part = ids[:, start : start + PROMPT_AT_ONCE]
        cache = jax.block_until_ready(read(model, part, cache, jnp.int32(start)))
        progress("reading the prompt", start + part.shape[1], length)
    paths = list(_paths(model))
    return {path: Prefix(c.key[0], c.value[0]) for path, c in zip(paths, cache, strict=True)}


def attending(
    model: Any, to: Mapping[str, Prefix] | Mapping[str, PrefixState] | None
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a model attends to a prefix exactly, or to states, in the place of what is on it."""
    if to is None:
        return contextlib.nullcontext()

    def core(path: str, _: AttentionCore) -> AttentionCore:
        there = to[path]
        return _Stated(there) if isinstance(there, PrefixState) else _Prefixed(there)

    return replaced_cores(model, core)


def sensitivity(
    model: Any,
    prefix: Mapping[str, Prefix],
    queries: Inputs,
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Float[np.ndarray, "N"]]:
    """Return for each layer and query head the mean ``|g|^2`` over the queries' tokens, g as in this module's formula.

    Args:
        model, prefix, queries: what stands behind the prefix.
        seed: of the drawn tokens, or projections.
        progress: told after each part.
    """
    heads = {path: (site.num_heads, site.head_dim) for path, site in _sites(model)}

    def objective(probes: dict[str, Array], graph: Any, state: Any, inputs: Inputs, key: Array) -> Array:
        model = nnx.merge(graph, state)
        with replaced_cores(model, lambda path, _: _Prefixed(prefix[path], probes[path])):
            result = model(**inputs)
        seen = inputs["attention_mask"].astype(jnp.float32)
        if getattr(result, "logits", None) is not None:
            logits = result.logits.astype(jnp.float32)
            drawn = jax.lax.stop_gradient(jax.random.categorical(key, logits))
            said = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
            return jnp.sum(said * seen)
        hidden = result.last_hidden_state.astype(jnp.float32)
        return jnp.sum(hidden * jax.random.normal(key, hidden.shape) * seen[..., None])

    gradient = jax.jit(jax.grad(objective), static_argnums=1)
    graph, state = nnx.split(model)
    total: dict[str, Any] = dict.fromkeys(heads, 0.0)
    count = 0
    for i, some in enumerate(in_parts(queries)):
        shape = some["input_ids"].shape
        probes = {path: jnp.zeros((*shape, *size)) for path, size in heads.items()}
        found = gradient(probes, graph, state, some, jax.random.fold_in(jax.random.key(seed), i))
        for path, each in found.items():
            total[path] = total[path] + np.asarray(jnp.sum(each**2, axis=(0, 1, 3)), np.float64)
        count += int(some["attention_mask"].sum())
        progress(
            "asking what matters", min((i + 1) * ROWS_AT_ONCE, len(queries["input_ids"])), len(queries["input_ids"])
        )
    return {path: each / count for path, each in total.items()}


def compress(
    model: Any,
    prefix: Mapping[str, Prefix],
    queries: Inputs,
    budget: int = 32,
    *,
    steps: int = 100,
    even: bool = False,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Compression:
    """Return states of anchors that stand in for a prefix.

    Args:
        model: that the prefix is one of; it is left as it was.
        prefix: of :func:`read_prompt`, or keys and values from elsewhere, such as a trained prefix's.
        queries: texts that stand behind the prefix: [B, T] ids and mask.
        budget: anchors per key head, on average over all layers.
        steps: of the descent; 0 keeps the chosen keys.
        even: give every head the same.
        seed: of draws.
        progress: told after each part.

    Returns:
        A :class:`Compression`; its states are for :func:`ntk_prefix.peft.apply_states`.

    Raises:
        UsageError: a budget above the prefix, fewer queries than anchors, a layer without a prefix.
        NonFiniteError: a state that is not finite.
    """
    check_count("budget", budget)
    layers = _sites(model)
    missing = [path for path, _ in layers if path not in prefix]
    if missing:
        raise expected("prefix", "one for each attention layer", f"none for {missing[:4]}")
    shortest = min(len(each.key) for each in prefix.values())
    if budget > shortest:
        raise expected("budget", f"at most the prefix's {shortest} tokens", budget)
    asked = sum(int(np.asarray(some["attention_mask"]).sum()) for some in in_parts(queries))
    if asked < budget:
        raise expected("queries", f"at least {budget} tokens for a budget of {budget}", asked, "Give more text")
    most = min(8 * budget, max(2 * budget, MOST_PER_HEAD), shortest, asked)
    weights = sensitivity(model, prefix, queries, seed=seed, progress=progress)
    recorded = _recorded(model, prefix, queries, progress)
    chosen: dict[str, Choice] = {}
    for i, (path, _) in enumerate(layers):
        chosen[path] = choose(
            _rows(recorded[path], prefix[path]), _scaled(prefix[path], recorded[path][0]), most, seed=seed
        )
        progress("choosing anchors", i + 1, len(layers))
    cost = np.stack([_by_key_head(weights[path], len(chosen[path].left)) for path, _ in layers])
    curves = np.concatenate([chosen[path].left for path, _ in layers]) * cost.reshape(-1)[:, None]
    useful = np.concatenate([chosen[path].useful for path, _ in layers])
    anchors = np.minimum(budget, useful) if even else np.minimum(divide(curves, budget * len(curves)), useful)
    anchors = anchors.reshape(len(layers), -1)
    states, before, after = {}, [], []
    for i, (path, _) in enumerate(layers):
        states[path], *errors = _fit(recorded[path], prefix[path], chosen[path], anchors[i], steps, seed)
        before.append(errors[0])
        after.append(errors[1])
        progress("fitting", i + 1, len(layers))
    return Compression(states, anchors, np.stack(before), np.stack(after), cost)


class Divergence(NamedTuple):
    """How far a model with states is from the model with the prefix, per token of some texts."""

    kl: Float[np.ndarray, "tokens"]
    """``KL(exact, compressed)`` of the next token's distribution, in nats; of a model without logits the relative square
    error of its hidden state."""
    agrees: np.ndarray
    """Whether both say the same first; of a model without logits, nothing."""


def divergence(
    model: Any, prefix: Mapping[str, Prefix], states: Mapping[str, PrefixState] | None, texts: Inputs
) -> Divergence:
    """Return how far states are from the prefix on some texts; with no states, how far the bare model is."""

    def answer(model: Any, inputs: Inputs) -> Array:
        result = model(**inputs)
        logits = getattr(result, "logits", None)
        return result.last_hidden_state if logits is None else jax.nn.log_softmax(logits.astype(jnp.float32))

    run = nnx.jit(answer)
    kl, agrees = [], []
    for some in in_parts(texts):
        with attending(model, prefix):
            exact = run(model, some)
        with attending(model, states):
            ours = run(model, some)
        seen = np.asarray(some["attention_mask"], bool)
        if isinstance(model, Llama):
            each = jnp.sum(jnp.exp(exact) * (exact - ours), axis=-1)
            agrees.append(np.asarray(jnp.argmax(exact, axis=-1) == jnp.argmax(ours, axis=-1))[seen])
        else:
            each = jnp.sum((exact - ours) ** 2, axis=-1) / jnp.sum(exact**2, axis=-1)
        kl.append(np.asarray(each)[seen])
    found = Divergence(np.concatenate(kl), np.concatenate(agrees) if agrees else np.zeros(0, bool))
    if not np.isfinite(found.kl).all():
        raise NonFiniteError("divergence: expected finite numbers, got others.")
    return found


# -------------------------------------------------------------------------------------------- the parts


def _sites(model: Any) -> list[tuple[str, Any]]:
    return attention_sites(model)


def _paths(model: Any) -> Iterator[str]:
    return (path for path, _ in _sites(model))


def in_parts(inputs: Inputs) -> Iterator[dict[str, Array]]:
    """Cut a batch into parts of equal size, the last one filled up with rows of which nothing is seen."""
    rows = len(inputs["input_ids"])
    for start in range(0, rows, ROWS_AT_ONCE):
        part = {name: np.asarray(x[start : start + ROWS_AT_ONCE]) for name, x in inputs.items()}
        short = min(ROWS_AT_ONCE, rows) - len(part["input_ids"])
        yield {name: jnp.asarray(np.pad(x, ((0, short), (0, 0)))) for name, x in part.items()}


def _recorded(
    model: Any, prefix: Mapping[str, Prefix], queries: Inputs, progress: Progress
) -> dict[str, list[LayerRecord]]:
    """Return what each layer sees of the queries behind the exact prefix, part by part."""
    kept: dict[str, list[LayerRecord]] = {path: [] for path in prefix}
    rows = len(queries["input_ids"])
    for i, some in enumerate(in_parts(queries)):
        with attending(model, prefix):
            for path, seen in record(model, some).items():
                # no head has a mask of its own, and T x S of each would be most of the memory
                kept[path].append(seen._replace(mask=seen.mask[:, :1]))
        progress("reading the queries", min((i + 1) * ROWS_AT_ONCE, rows), rows)
    return kept


def _rows(recorded: list[LayerRecord], prefix: Prefix) -> Rows:
    """Return the queries of a layer that are no padding, in shares."""
    parts = []
    for seen in recorded:
        scores: dict[str, Any] = dict(seen.scores)
        rows = rows_of(seen.query, *prefix, seen.key, seen.value, mask=seen.mask, **scores)
        groups = seen.query.shape[2] // seen.key.shape[2]
        kept = np.flatnonzero(np.repeat(np.asarray(seen.seen).reshape(-1), groups))
        parts.append(rows.take(kept))
    return Rows(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))


def _scaled(prefix: Prefix, seen: LayerRecord) -> Float[Array, "K M H"]:
    return jnp.swapaxes(prefix.key, 0, 1) * seen.scale**0.5


def _by_key_head(weights: np.ndarray, heads: int) -> np.ndarray:
    return weights.reshape(heads, -1).mean(axis=1)


def _size(count: int) -> int:
    """Return the number of anchors that ``count`` are filled up to."""
    return next((size for size in SIZES if size >= count), -(-count // SIZES[-1]) * SIZES[-1])


def _fit(
    recorded: list[LayerRecord], prefix: Prefix, chosen: Choice, anchors: np.ndarray, steps: int, seed: int
) -> tuple[PrefixState, np.ndarray, np.ndarray]:
    """Return a layer's state, and each head's error before and after the descent."""
    rows, keys = _rows(recorded, prefix), _scaled(prefix, recorded[0])
    heads, _, head_dim = keys.shape
    largest = max(int(anchors.max()), 1)
    points, z = (np.zeros((heads, largest, head_dim), np.float32) for _ in range(2))
    k, before, after = np.zeros((heads, largest), np.float32), np.ones(heads), np.ones(heads)
    for head, count in enumerate(anchors.tolist()):
        if not count:
            continue
        size = max(min(_size(count), chosen.tokens.shape[1], rows.query.shape[1]), count)
        start = keys[head][chosen.tokens[head, :size]]
        valid = np.arange(size) < count
        one = Rows(*(x[head : head + 1] for x in rows))
        fit = descend(one, start[None], jnp.asarray(valid)[None], steps=steps, seed=seed)
        points[head, :count], z[head, :count], k[head, :count] = (
            np.asarray(x[0])[:count] for x in (fit.points, fit.z, fit.k)
        )
        before[head], after[head] = float(fit.before[0]), float(fit.after[0])
    if not all(np.isfinite(x).all() for x in (points, z, k)):
        raise NonFiniteError("expected a state of finite numbers, got others.")
    seen = recorded[0]
    phi = Anchors(jnp.asarray(points), seen.scores.get("logits_soft_cap"))
    return PrefixState(jnp.asarray(z), jnp.asarray(k), phi, seen.scores.get("scale")), before, after
