r"""Train what stands in for a prefix until the model answers as it does behind the prefix itself.

Minimized is the mean over the tokens of some texts of ``KL(exact || compressed)`` of the next token's distribution, with
all weights of the model frozen; for a model without logits the relative square error of its last hidden state. The exact
side is asked once: its hidden states are kept, [rows, T, D], from which its logits are made again when they are needed.

Source: context distillation (Snell, Klein and Zhong, arXiv 2209.15189), for caches Cartridges (arXiv 2506.06266), which
start at a cache of the same size; here the start is any state, such as the one that :func:`ntk_prefix.compression.compress`
fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ntk_prefix.attention import LowRank
from ntk_prefix.checks import NonFiniteError, check_count, check_positive, expected
from ntk_prefix.compression import Kept, make
from ntk_prefix.models.run import jit_reading
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.prefixed_model import Inputs, Prefix, Progress, attending, in_parts
from ntk_prefix.typing import Array

__all__ = ["FITTED_RATE", "UNFITTED_RATE", "distil", "distil_states"]

Unknowns = TypeVar("Unknowns")

FITTED_RATE, UNFITTED_RATE = 0.003, 0.01
"""Learning rates, for what begins as a fit and for all else. SmolLM2, 100 steps on 24 texts, judged on 48 others (GSM8K): from
fits of 8, 32 and 97 anchors with 0.0355, 0.0076 and 0.0035 nats 0.003 leads to 0.0264, 0.0069 and 0.0036, 0.001 to 0.0070 and
0.0034 at 32 and 97; 0.01 takes at 97 and 256 anchors two and six times as much as the fit has (another draw)."""

KEPT_EVERY = 10
"""Steps after which what has been reached is kept."""


def distil(
    model: Any,
    prefix: Mapping[str, Prefix],
    unknowns: Unknowns,
    attached: Callable[[Any, Unknowns], contextlib.AbstractContextManager[None]],
    texts: Inputs,
    *,
    steps: int,
    learning_rate: float = UNFITTED_RATE,
    seed: int = 0,
    progress: Progress = lambda *_: None,
    kept: Kept = make,
) -> Unknowns:
    """Return unknowns with which the model answers nearly as it does behind a prefix.

    Args:
        model: frozen; it is left as it was.
        prefix: of :func:`ntk_prefix.prefixed_model.read_prompt`.
        unknowns: where training starts: a pytree of float arrays, each of a size near 1, for Adam moves all alike.
        attached: ``attached(model, unknowns)`` is a context in which the model has them.
        texts: that stand behind the prefix: [B, T] ids and mask.
        steps: of Adam, each on four texts, with the rate rising over the first tenth and falling to zero by a cosine.
        learning_rate: the highest.
        seed: of the order of the texts.
        progress: told after each step.
        kept: see :func:`ntk_prefix.compression.compress`.

    Raises:
        UsageError: a count or a rate that is none.
        NonFiniteError: training diverged.
    """
    check_count("steps", steps, 0)
    check_positive("learning_rate", learning_rate)
    if not steps:
        return unknowns
    graph, weights = nnx.split(model)
    wanted = _exact(model, prefix, texts, progress)
    rise = max(steps // 10, 1)
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, rise, max(steps, rise + 1)), b1=0.9, b2=0.99
    )

    def loss(unknowns: Unknowns, weights: Any, some: Inputs, exact: Array) -> Array:
        model = nnx.merge(graph, weights)
        with attached(model, unknowns):
            ours = _hidden(model, some)
        seen = some["attention_mask"].astype(jnp.float32)
        return jnp.sum(_apart(model, exact, ours, seen)) / jnp.maximum(jnp.sum(seen), 1)

    @jax.jit
    def step(unknowns: Unknowns, state: Any, weights: Any, some: Inputs, exact: Array) -> tuple[Unknowns, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(unknowns, weights, some, exact)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(unknowns, update), state, value

    rows = len(texts["input_ids"])
    at_once = len(next(in_parts(texts))["input_ids"])
    order = np.random.default_rng(seed)
    drawn = np.concatenate([order.permutation(rows) for _ in range(-(-steps * at_once // rows))])
    carry = (unknowns, optimizer.init(unknowns))

    def go_on(carry: Any, first: int) -> Any:
        for i in range(first, min(first + KEPT_EVERY, steps)):
            chosen = np.sort(drawn[i * at_once : (i + 1) * at_once])
            some = {name: jnp.asarray(x)[chosen] for name, x in texts.items()}
            *carry, value = step(*carry, weights, some, jnp.asarray(wanted[chosen]))
            if not np.isfinite(value):
                raise NonFiniteError(f"distillation: expected a finite loss, got {value} in step {i}; lower the rate.")
            progress("distilling", i + 1, steps)
        return tuple(carry)

    for first in range(0, steps, KEPT_EVERY):
        leaves, tree = jax.tree.flatten(carry)

        def arrays(carry: Any = carry, first: int = first) -> dict[str, np.ndarray]:
            leaves = [np.asarray(x) for x in jax.tree.leaves(go_on(carry, first))]
            # a loss is that of the step before: what the last one has made of a gradient is seen nowhere else
            if not all(np.isfinite(x).all() for x in leaves):
                raise NonFiniteError(f"distillation: expected finite numbers, got others by step {first + KEPT_EVERY}.")
            return {str(i): x for i, x in enumerate(leaves)}

        found = kept(f"distilled-{first}", arrays)
        carry = jax.tree.unflatten(tree, [jnp.asarray(found[str(i)]) for i in range(len(leaves))])
    return carry[0]


def distil_states(
    model: Any,
    prefix: Mapping[str, Prefix],
    states: Mapping[str, PrefixState],
    texts: Inputs,
    *,
    steps: int,
    learning_rate: float = FITTED_RATE,
    fixed: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, PrefixState]:
    """Return states from which the model answers nearly as it does behind the prefix.

    Trained are ``z``, ``log k`` and the arrays of the map, each in units of its own size: what is zero stays zero.

    Args:
        model, prefix, texts, steps, learning_rate: see :func:`distil`.
        states: where training starts, by the layer's path; none of low rank.
        fixed: of "z", "k", "map", what is not trained.
        options: of :func:`distil`.

    Raises:
        UsageError: a state of low rank, or a mass below 0, or a name that is none of those.
    """
    if isinstance(fixed, str):
        raise expected("fixed", "a tuple of names", repr(fixed), f"Use fixed=({fixed!r},)")
    for name in fixed:
        if name not in ("z", "k", "map"):
            raise expected("fixed", "some of z, k, map", name)
    low = [path for path, state in states.items() if isinstance(state.z, LowRank)]
    if low:
        raise expected("states", "full ones", f"one of low rank at {low[0]}")
    below = [path for path, state in states.items() if not (np.asarray(state.k) >= 0).all()]
    if below:
        raise expected("states", "masses k >= 0", f"others at {below[0]}")

    if not steps:
        return dict(states)

    @contextlib.contextmanager
    def attached(model: Any, moved: dict[str, _Moved]) -> Iterator[None]:
        with attending(model, {path: _moved(state, moved[path], fixed) for path, state in states.items()}):
            yield

    start = {path: _Moved.none(state) for path, state in states.items()}
    end = distil(model, prefix, start, attached, texts, steps=steps, learning_rate=learning_rate, **options)
    # one program for all layers: operation by operation it would be one for each and for each size
    return jax.jit(lambda states, end: {path: _moved(state, end[path], fixed) for path, state in states.items()})(
        states, end
    )


class _Moved(NamedTuple):
    """How far a state has moved, each array in its own units; zeros at the start."""

    z: Array
    log_k: Array
    arrays: list[Array]

    @classmethod
    def none(cls, state: PrefixState) -> _Moved:
        z: Any = state.z
        arrays = [jnp.zeros_like(x) for x in jax.tree.leaves(state.feature_map)]
        return cls(jnp.zeros_like(z), jnp.zeros_like(state.k), arrays)


def _moved(state: PrefixState, by: _Moved, fixed: tuple[str, ...]) -> PrefixState:
    arrays, tree = jax.tree.flatten(state.feature_map)
    z: Any = state.z
    if "z" not in fixed:
        z = z + _size(z, (-1,)) * by.z
    k = state.k if "k" in fixed else state.k * jnp.exp(by.log_k)
    if "map" not in fixed:
        # points of a head have one size: a feature near the origin moves as far as the others
        arrays = [x + _size(x, (-2, -1)) * y for x, y in zip(arrays, by.arrays, strict=True)]
    return PrefixState(z, k, jax.tree.unflatten(tree, arrays), state.scale)


def _size(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the root mean square over some axes of what is not zero there."""
    count = jnp.maximum(jnp.sum(x != 0, axis=axes, keepdims=True), 1)
    return jnp.where(x != 0, jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True) / count), 0)


# -------------------------------------------------------------------------------------------- the two sides


def _hidden(model: Any, inputs: Inputs) -> Array:
    """Return what answers are made of: a decoder's states before its logits."""
    return model.hidden(**inputs)[0] if hasattr(model, "hidden") else model(**inputs).last_hidden_state


def _exact(model: Any, prefix: Mapping[str, Prefix], texts: Inputs, progress: Progress) -> np.ndarray:
    run = jit_reading(_hidden)
    found = []
    rows = len(texts["input_ids"])
    with attending(model, prefix):
        for some in in_parts(texts):
            found.append(np.asarray(run(model, some)))
            progress("asking the prompt", min(len(found) * len(found[0]), rows), rows)
    return np.concatenate(found)[:rows]


def _apart(model: Any, exact: Array, ours: Array, seen: Array) -> Array:
    """Return each row's sum over its tokens of how far the answers are apart."""

    @jax.checkpoint
    def row(exact: Array, ours: Array, seen: Array) -> Array:
        if getattr(model, "causal_lm", False):
            # the logits of one row at a time: the vocabulary is wide
            exact, ours = (jax.nn.log_softmax(model.logits(x[None])[0].astype(jnp.float32)) for x in (exact, ours))
            return jnp.sum(jnp.sum(jnp.exp(exact) * (exact - ours), axis=-1) * seen)
        exact, ours = exact.astype(jnp.float32), ours.astype(jnp.float32)
        return jnp.sum(jnp.sum((exact - ours) ** 2, axis=-1) / jnp.sum(exact**2, axis=-1) * seen)

    return jax.lax.map(lambda each: row(*each), (exact, ours, seen))
