"""A stack of layers as one loop: a program of one layer, which runs once a layer.

The layers stay what they are, a list. A turn of the loop takes the weights of its layer out of those of all, where they
lie (``jax.lax.switch``): no stack of them is made, so there is no second copy, and whatever else reads the model, such as
files, generation and an optimizer, sees nothing of it. What is trained is stacked within the program, which is what sums its
gradients in one pass; adapters are small.

Compiling then takes the time of one layer, and what a compiler makes of weights to compute with them, such as a CPU's float32
copies of bfloat16 ones, is there for one layer at a time. A layer's weights are never kept for the backward pass: they are
taken again.

Layers may differ in their :class:`~ntk_prefix.models.attention.AttentionKind`, as where some have a window: then a turn runs
the program of its layer's kind, of which each is compiled once. First layers of another build, such as ModernBERT's, which has
no norm before attention, run before the loop (``Backbone.unlike_layers``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix import sharding
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.flash.merging import RESULT
from ntk_prefix.typing import Array, Float

__all__ = ["check_alike", "scan"]

TRAINED = nnx.LoRAParam
"""What is stacked: all that :mod:`ntk_prefix.peft` trains. A trained weight of another type gets the same gradient, by adding
up one of all layers in every turn."""

PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(RESULT),
)
"""What is kept for the backward pass unless told otherwise: products with weights, and attention. The rest takes less time to
compute again than to write and read, which is what a compiler does of itself where it sees all layers at once."""


def scan(
    layers: Sequence[nnx.Module],
    run: Callable[[Any, Array, Any], Array],
    x: Float[Array, "B T D"],
    rows: Float[Array, "layers j D"] | None = None,
    policy: Callable[..., bool] | None = None,
) -> Float[Array, "B T D"]:
    """Return ``run(layers[L - 1], ... run(layers[0], x, rows[0]) ..., rows[L - 1])``, of one program for all layers.

    Args:
        layers: alike, see :func:`check_alike`.
        run: a layer, its input and its rows (None without any) -> its output, of the input's shape and dtype.
        x: what goes into the first.
        rows: an array for each layer.
        policy: what of a layer is kept for the backward pass, of ``jax.checkpoint_policies``; None keeps products with
            weights, and attention.

    Raises:
        UsageError: layers that differ, or one that changes state as it runs, such as a random stream that is drawn from.
    """
    check_alike(layers)
    layer_graphs, trained, others = zip(*(nnx.split(layer, TRAINED, ...) for layer in layers), strict=True)
    graphs = list(dict.fromkeys(layer_graphs))
    kinds = jnp.asarray([graphs.index(graph) for graph in layer_graphs])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)
    stacked = sharding.constrain_weights(stacked, leading=1)
    takers = [lambda *states, turn=turn: states[turn] for turn in range(len(layers))]

    def one(x: Array, turn: Array, row: Any, own: nnx.State) -> Array:
        taken = jax.lax.switch(turn, takers, *others)
        # gathered by name, where the compiler would send pieces round in a loop of its own for each product
        taken = sharding.gathered("layers", sharding.constrain_weights(taken))
        if len(graphs) == 1:
            return ran(graphs[0], x, row, own, taken)
        return jax.lax.switch(kinds[turn], [functools.partial(ran, graph) for graph in graphs], x, row, own, taken)

    def ran(graph: Any, x: Array, row: Any, own: nnx.State, taken: nnx.State) -> Array:
        layer = nnx.merge(graph, own, taken)
        before = jax.tree.leaves(nnx.state(layer))
        x = run(layer, x, row)
        after = jax.tree_util.tree_leaves_with_path(nnx.state(layer))
        for (path, leaf), was in zip(after, before, strict=True):
            if leaf is not was:
                raise UsageError(
                    f"scan_layers: expected layers that change nothing as they run, got one that writes "
                    f"{sharding.dotted(path)}. Set scan_layers = False."
                )
        return x

    # within a loop there are no common subexpressions to be kept apart
    one = jax.checkpoint(one, policy=policy or PRODUCTS, prevent_cse=False)

    def turn(x: Array, own: tuple[Array, Any, nnx.State]) -> tuple[Array, None]:
        return one(x, *own), None

    return jax.lax.scan(turn, x, (jnp.arange(len(layers)), rows, stacked))[0]


def check_alike(layers: Sequence[nnx.Module]) -> None:
    """Refuse layers of which one program for each kind of attention cannot be made.

    Raises:
        UsageError: naming the first that is not as layer 0, and what of it differs.
    """
    graph, first = nnx.split(layers[0])
    # what is said of each weight is a part of the structure
    structure: Any = jax.tree.structure(first)
    wanted = _described(first)
    for index, layer in enumerate(layers[1:], 1):
        own, state = _split_as(layer, layers[0])
        found = _described(state)
        different = [path for path in sorted(found | wanted) if found.get(path) != wanted.get(path)]
        if different:
            path = different[0]
            got = f"layers.{index} with {found.get(path, 'none')} where layers.0 has {wanted.get(path, 'none')}"
            raise expected("scan_layers", f"layers that are alike in {path}", got)
        if own != graph or structure != jax.tree.structure(state):
            raise expected("scan_layers", "layers that are alike", f"layers.{index} with other options than layers.0")


def _split_as(layer: Any, other: Any) -> tuple[Any, nnx.State]:
    """Return a layer's structure and state, as if its attention were of another's kind."""
    attention = getattr(layer, "attention", None)
    kind = getattr(attention, "kind", None)
    if attention is None or kind is None:
        return nnx.split(layer)
    attention.kind = other.attention.kind
    try:
        return nnx.split(layer)
    finally:
        attention.kind = kind


def _described(state: nnx.State) -> dict[str, str]:
    """Return what each array of a layer is, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    described = {}
    for path, leaf in leaves:
        kind = type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array"
        described[sharding.dotted(path)] = f"{kind} {leaf.dtype}{list(leaf.shape)}"
    return described
