r"""A model behind a prompt: what the prompt leaves behind in it, what is asked of that, and how far another answer is.

A prompt of a model with rotary positions is read at positions -M .. -1: only differences of positions count there, so what
it leaves behind has no position, and the text behind it begins at 0 as it would without a prompt.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.attention import prefix_attention
from ntk_prefix.checks import NonFiniteError, UsageError, check_count, expected
from ntk_prefix.models.attention import AttentionCore, AttentionOptions
from ntk_prefix.models.backbone import Backbone, check_tokens
from ntk_prefix.models.generation import generate
from ntk_prefix.models.llama import Llama
from ntk_prefix.models.run import jit_reading
from ntk_prefix.models.sampling import Sampling
from ntk_prefix.models.scan import check_alike
from ntk_prefix.peft.record import LayerRecord, record, replaced_cores
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.query_shares import Rows, rows_of
from ntk_prefix.typing import Array, Float, Int

__all__ = [
    "Asked",
    "Divergence",
    "Inputs",
    "Prefix",
    "Progress",
    "Queries",
    "answers",
    "attending",
    "continuations",
    "distances",
    "divergence",
    "in_parts",
    "read_prompt",
    "sensitivity",
]

Inputs = Mapping[str, Array]
"""``input_ids`` and ``attention_mask``, [B, T] each, padded on the right."""

Progress = Callable[[str, int, int], Any]
"""Told what is done, and how many steps of how many."""
ROWS_AT_ONCE = 4
"""Texts that a model reads together: their logits are held at once."""
COMPARED_AT_ONCE = 2
"""Texts whose answers are compared together: both sides' logits are held at once."""
ASKED_WHAT_MATTERS = 1024
"""Tokens of the queries, whole texts, that :func:`sensitivity` is measured on: a mean for each head, with gradients."""
PROMPT_AT_ONCE = 512
"""Tokens of a prompt that a decoder reads together."""
OWN_TEXTS = Sampling(top_p=0.95)
"""How a decoder draws the texts that it writes itself."""


class Prefix(NamedTuple):
    """What a prompt leaves behind in one layer."""

    key: Float[Array, "M K H"]
    value: Float[Array, "M K H"]


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
        By the layer's dotted path, the prompt's last token last. A layer with a sliding window has no more than the
        window's tokens.

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

    def more(model: Llama, part: Array, cache: Any, start: Array) -> Any:
        return model.hidden(part, None, cache, start, position_offset=-length)[1]

    read, cache = jit_reading(more, donate=2), model.empty_cache(1, length)
    for start in range(0, length, PROMPT_AT_ONCE):
        part = ids[:, start : start + PROMPT_AT_ONCE]
        cache = jax.block_until_ready(read(model, part, cache, jnp.int32(start)))
        progress("reading the prompt", start + part.shape[1], length)
    layers, found = list(cache), {}
    del cache
    for path, _ in attention_sites(model):
        layer = layers.pop(0)  # a slice is a copy: of one layer at a time
        found[path] = Prefix(*(_in_order(x[0], length) for x in layer))
    return found


def _in_order(slots: Array, length: int) -> Array:
    """Return what a cache keeps of a text, oldest token first: of a layer with a window it is a ring."""
    return slots if len(slots) == length else jnp.roll(slots, -(length % len(slots)), axis=0)


@contextlib.contextmanager
def attending(model: Any, to: Mapping[str, Prefix] | Mapping[str, PrefixState] | None) -> Iterator[None]:
    """Make a context in which a model attends to a prefix exactly, or to states, in the place of what is on it."""
    if to is None:
        with _in_a_loop(model):
            yield
        return

    widest = max((each.k.shape[-1] for each in to.values() if isinstance(each, PrefixState)), default=0)

    def core(path: str, _: AttentionCore) -> AttentionCore:
        there = to[path]
        with contextlib.suppress(UsageError):  # a map that cannot have more features
            there = there.padded(widest) if isinstance(there, PrefixState) else there
        return _Stated(there) if isinstance(there, PrefixState) else _Prefixed(there)

    with replaced_cores(model, core), _in_a_loop(model):
        yield


@contextlib.contextmanager
def _in_a_loop(model: Any) -> Iterator[None]:
    """Run layers that are alike as a loop over one: texts are few here, and compiling takes longer than running."""
    if not isinstance(model, Backbone):
        yield
        return
    before = model.scan_layers
    with contextlib.suppress(UsageError):
        check_alike(list(model.layers[model.unlike_layers :]))
        model.scan_layers = True
    try:
        yield
    finally:
        model.scan_layers = before


def continuations(
    model: Llama,
    prefix: Mapping[str, Prefix],
    prompt: Int[np.ndarray, " M"],
    count: int,
    tokens: int,
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Int[np.ndarray, "count tokens"]]:
    """Return texts that a decoder writes behind a prompt, each token drawn from what is likely (:data:`OWN_TEXTS`).

    Args:
        model: a decoder.
        prefix: of :func:`read_prompt`.
        prompt: its ids.
        count: how many.
        tokens: of each.
        seed: of the draws.
        progress: told before texts are written, when no more than the prefix is held, and after.

    Raises:
        UsageError: no texts, or fewer than two tokens.
    """
    check_count("count", count)
    check_count("tokens", tokens, 2)
    # what follows the prompt is what its last token says, at its place behind the others
    others = {path: Prefix(each.key[:-1], each.value[:-1]) for path, each in prefix.items()}
    with attending(model, others):
        logits = _last_said(model, jnp.asarray(prompt[-1:])[None])
        logits.block_until_ready()
    del others  # a copy, as large as the prompt's keys and values
    progress("writing texts", 0, 1)
    begin, rest = jax.random.split(jax.random.key(seed))
    first = jax.random.categorical(begin, OWN_TEXTS.log_probabilities(logits), shape=(count,)).astype(jnp.int32)[
        :, None
    ]
    with attending(model, prefix):
        follow = generate(model, first, max_new_tokens=tokens - 1, sampling=OWN_TEXTS, key=rest)
    ids = np.concatenate([np.asarray(first), np.asarray(follow)], axis=1).astype(np.int32)
    progress("writing texts", 1, 1)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


_last_said = jit_reading(lambda model, ids: model(ids, position_offset=-1).logits[0, -1])


def in_parts(inputs: Inputs, size: int = ROWS_AT_ONCE) -> Iterator[dict[str, Array]]:
    """Cut a batch into parts of equal size, the last one filled up with rows of which nothing is seen."""
    rows = len(inputs["input_ids"])
    for start in range(0, rows, size):
        part = {name: np.asarray(x[start : start + size]) for name, x in inputs.items()}
        short = min(size, rows) - len(part["input_ids"])
        yield {name: jnp.asarray(np.pad(x, ((0, short), (0, 0)))) for name, x in part.items()}


class Asked(NamedTuple):
    """What a layer sees of some texts behind a prefix."""

    rows: Rows
    """Its queries that are no padding, in shares."""
    key: Float[Array, "K M H"]
    """The prefix's, scaled as the queries are."""
    value: Float[Array, "K M H"]


class Queries:
    """What each layer sees of some texts behind the exact prefix, read when it is first asked for."""

    def __init__(self, model: Any, prefix: Mapping[str, Prefix], texts: Inputs, progress: Progress):
        self.model, self.prefix, self.texts, self.progress = model, prefix, texts, progress
        self.lock = threading.Lock()

    def of(self, path: str) -> Asked:
        """Return what one layer sees."""
        with self.lock:
            recorded, said = self._recorded[path], self.scores[path]
        prefix, parts = self.prefix[path], []
        for seen, arrays in recorded:
            rows = _rows(seen.query, *prefix, seen.key, seen.value, mask=seen.mask, **said, **arrays)
            groups = seen.query.shape[2] // seen.key.shape[2]
            parts.append(rows.take(np.flatnonzero(np.repeat(np.asarray(seen.seen).reshape(-1), groups))))
        rows = Rows(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
        scale = said.get("scale") or prefix.key.shape[-1] ** -0.5
        keys, values = (jnp.swapaxes(x, 0, 1).astype(rows.query.dtype) for x in prefix)
        return Asked(rows, keys * scale**0.5, values)

    @functools.cached_property
    def _recorded(self) -> dict[str, list[tuple[LayerRecord, dict[str, Array]]]]:
        kept: dict[str, list[tuple[LayerRecord, dict[str, Array]]]] = {path: [] for path in self.prefix}
        rows = len(self.texts["input_ids"])
        for i, some in enumerate(in_parts(self.texts)):
            with attending(self.model, self.prefix):
                for path, seen in _read(self.model, some).items():
                    kept[path].append(seen)
            self.progress("reading the queries", min((i + 1) * ROWS_AT_ONCE, rows), rows)
        return kept

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, Any]]:
        """What else each layer's attention is told of its scores, in numbers that are no arrays."""
        found: dict[str, dict[str, Any]] = {}

        def keep(path: str, seen: LayerRecord) -> None:
            found[path] = {name: x for name, x in seen.scores.items() if not isinstance(x, jax.Array)}

        token = {name: jnp.ones((1, 1), jnp.int32) for name in self.texts}
        nnx.eval_shape(lambda model: record(model, token, keep), self.model)
        return found


def _arrays(path: str, seen: LayerRecord) -> tuple[LayerRecord, dict[str, Array]]:
    """Return what of a record a program may return. No head has a mask of its own, and the output is not looked at."""
    arrays = {name: x for name, x in seen.scores.items() if isinstance(x, jax.Array)}
    return seen._replace(mask=seen.mask[:, :1], output=seen.query[:0], scores={}), arrays


# as a whole: one by one its small operations would be a hundred programs
_read = jit_reading(lambda model, some: record(model, some, _arrays))
_rows = jax.jit(rows_of, static_argnames=("is_causal", "scale", "logits_soft_cap", "local_window_size"))


def sensitivity(
    model: Any,
    prefix: Mapping[str, Prefix],
    queries: Inputs,
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Float[np.ndarray, "N"]]:
    r"""Return for each layer and query head how much an error of its output matters: the mean ``|g|^2`` over tokens.

    If the output of a head is off by delta at token i, the model's answer moves by

    .. math::  KL \approx \tfrac12 E (g_i \cdot \delta_i)^2,

    where g is the gradient there of the log likelihood of a token that the model itself draws (the Fisher information), or
    for a model without logits of a random projection of its hidden states.

    Args:
        model, prefix, queries: what stands behind the prefix; the first texts, up to ``ASKED_WHAT_MATTERS`` tokens.
        seed: of the drawn tokens, or projections.
        progress: told after each part.
    """
    heads = {path: (site.num_heads, site.head_dim) for path, site in attention_sites(model)}

    def objective(
        probes: dict[str, Array], graph: Any, state: Any, prefix: Mapping[str, Prefix], inputs: Inputs, key: Array
    ) -> Array:
        model = nnx.merge(graph, state)
        with replaced_cores(model, lambda path, _: _Prefixed(prefix[path], probes[path])), _in_a_loop(model):
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
    rows = min(max(ASKED_WHAT_MATTERS // queries["input_ids"].shape[1], 1), len(queries["input_ids"]))
    for i, some in enumerate(in_parts({name: x[:rows] for name, x in queries.items()})):
        shape = some["input_ids"].shape
        probes = {path: jnp.zeros((*shape, *size)) for path, size in heads.items()}
        # the prefix is an argument: a constant of the program would be held several times
        found = gradient(probes, graph, state, dict(prefix), some, jax.random.fold_in(jax.random.key(seed), i))
        for path, each in found.items():
            total[path] = total[path] + np.asarray(jnp.sum(each**2, axis=(0, 1, 3)), np.float64)
        count += int(some["attention_mask"].sum())
        progress("asking what matters", min((i + 1) * ROWS_AT_ONCE, rows), rows)
    return {path: each / count for path, each in total.items()}


@functools.partial(jax.jit, static_argnums=0)
def answers(graph: Any, state: Any, inputs: Inputs) -> Float[Array, "B T V"]:
    """Return the log probabilities of each next token, or hidden states where a model has no logits.

    Args:
        graph, state: of ``nnx.split(model)``: compiled once for all adapters of the same shapes.
        inputs: texts.
    """
    result = nnx.merge(graph, state)(**inputs)
    logits = getattr(result, "logits", None)
    return result.last_hidden_state if logits is None else jax.nn.log_softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def distances(exact: Float[Array, "B T V"], ours: Float[Array, "B T V"], language: bool) -> tuple[Array, Array]:
    """Return each token's divergence, as in :class:`Divergence`, and whether both sides' largest entry is the same, [B, T].

    Args:
        exact, ours: of :func:`answers`.
        language: whether they are log probabilities.
    """
    same = jnp.argmax(exact, axis=-1) == jnp.argmax(ours, axis=-1)
    if language:
        return jnp.sum(jnp.exp(exact) * (exact - ours), axis=-1), same
    return jnp.sum((exact - ours) ** 2, axis=-1) / jnp.sum(exact**2, axis=-1), same


class Divergence(NamedTuple):
    """How far a model with states is from the model with the prefix, per token of some texts."""

    kl: Float[np.ndarray, "tokens"]
    """``KL(exact, compressed)`` of the next token's distribution, in nats; of a model without logits the relative square
    error of its hidden state."""
    agrees: np.ndarray
    """Whether both say the same first; of a model without logits, nothing."""
    text: Int[np.ndarray, "tokens"]
    """Which of the texts each token is of."""

    def by_text(self, values: np.ndarray) -> Float[np.ndarray, "texts"]:
        """Return the mean over each text's tokens: texts are independent of one another, tokens of one are not."""
        _, place = np.unique(self.text, return_inverse=True)
        return np.bincount(place, values.astype(np.float64)) / np.bincount(place)


def divergence(
    model: Any,
    prefix: Mapping[str, Prefix],
    several: Iterable[Mapping[str, PrefixState] | None],
    texts: Inputs,
    progress: Progress = lambda *_: None,
) -> list[Divergence]:
    """Return how far states are from the prefix on some texts, which is asked once; for None, how far the bare model is."""
    several, language = list(several), isinstance(model, Llama)
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in several]
    rows = len(texts["input_ids"])
    for i, some in enumerate(in_parts(texts, COMPARED_AT_ONCE)):
        with attending(model, prefix):
            exact = answers(*nnx.split(model), some)
        seen = np.asarray(some["attention_mask"], bool)
        text = i * COMPARED_AT_ONCE + np.repeat(np.arange(len(seen))[:, None], seen.shape[1], axis=1)
        for states, parts in zip(several, found, strict=True):
            with attending(model, states):
                kl, same = map(np.asarray, distances(exact, answers(*nnx.split(model), some), language))
            parts.append((kl[seen], same[seen] if language else same[:0], text[seen]))
        progress("comparing", min((i + 1) * COMPARED_AT_ONCE, rows), rows)
    results = [Divergence(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]
    if not all(np.isfinite(each.kl).all() for each in results):
        raise NonFiniteError("divergence: expected finite numbers, got others.")
    return results
