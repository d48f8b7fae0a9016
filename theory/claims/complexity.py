"""NTK-Attention costs the same whatever prefix it stands for; exact prefix attention pays for every token."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import PrefixState, ntk_attention, prefix_attention
from ntk_prefix.typing import Array
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence
from theory.problem import Problem

BATCH, LENGTH, HEADS, HEAD_DIM = 1, 256, 4, 32
LENGTHS = [2**power for power in range(10, 16)]
RUNS = 20

BACKBONES = {
    # layers, heads, head dimension, and the count of the authors' public code (theory/README.md, section 13)
    "ViT-B/16": (12, 12, 64, 599_040),
    "28 layers, 32 heads of 128": (28, 32, 128, 14_794_752),
    "16 layers, 32 heads of 64": (16, 32, 64, 2_129_920),
}


def parameter_counts(layers: int, heads: int, head_dim: int) -> dict[str, int]:
    """Return trained numbers of every method on a backbone of that shape, all its attention layers adapted."""
    width = heads * head_dim
    zero = PrefixState.from_prefix(*[jnp.zeros((0, heads, head_dim))] * 2)
    rank = 4
    return {
        "NTK-Attention": layers * sum(leaf.size for leaf in jax.tree.leaves(zero)),
        f"NTK-Attention, rank {rank}": layers * heads * (2 * rank * head_dim + head_dim),
        "prefix tuning, 10 tokens": layers * 2 * 10 * width,
        "prefix tuning, 200 tokens": layers * 2 * 200 * width,
        "prefix propagation, 10 tokens": layers * 10 * width,
        "LoRA, rank 8 on query and value": layers * 2 * 2 * 8 * width,
    }


Prepare = Callable[[Array, Array], tuple[Callable[[], Array], list[Array]]]
"""From a prefix's keys and values to a call to be timed, and to the arrays that must be kept for it."""


def _cost(problem: Problem, attend: Callable[[Array, Array, Array], Prepare]) -> Evidence:
    """Measure time and bytes of what must be kept, by prefix length."""
    keys = jax.random.split(problem.key("complexity"), 5)
    shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
    query, key, value = (jax.random.normal(k, shape, jnp.float32) for k in keys[:3])
    prefixes = {m: tuple(jax.random.normal(k, (m, HEADS, HEAD_DIM), jnp.float32) for k in keys[3:]) for m in LENGTHS}
    calls, kept = {}, {}
    for m, (prefix_key, prefix_value) in prefixes.items():
        calls[m], arrays = attend(query, key, value)(prefix_key, prefix_value)
        kept[m] = sum(array.nbytes for array in arrays)
    seconds = {m: np.full(RUNS, np.inf) for m in LENGTHS}
    for run in range(-1, RUNS):  # the first round compiles; lengths take turns, so that a slow moment hits all alike
        for m, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if run >= 0:
                seconds[m][run] = time.perf_counter() - start
    quickest = [found.min() for found in seconds.values()]
    time_slope = fits.exponent(LENGTHS, quickest)
    memory_slope = fits.exponent(LENGTHS, list(kept.values()))
    counts = {name: parameter_counts(*sizes[:3]) for name, sizes in BACKBONES.items()}
    wrong = sum(counts[name]["NTK-Attention"] != sizes[3] for name, sizes in BACKBONES.items())
    checks = (
        Check(f"exponent of time in m, {time_slope}", abs(time_slope.value), 0.1, part="time"),
        Check(f"exponent of the bytes kept in m, {memory_slope}", abs(memory_slope.value), 0.01, part="memory"),
        Check("backbones whose parameter count differs from the recorded one", wrong, 0),
    )
    parameters = {
        "tokens": LENGTHS[-1],
        "batch": BATCH,
        "length": LENGTH,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "runs": RUNS,
    }
    return Evidence(checks, parameters, {"seconds": seconds, "kept": kept, "counts": counts})


def _ntk(query: Array, key: Array, value: Array) -> Prepare:
    attend = jax.jit(ntk_attention)

    def prepare(prefix_key: Array, prefix_value: Array) -> tuple[Callable[[], Array], list[Array]]:
        state = PrefixState.from_prefix(prefix_key, prefix_value)
        return lambda: attend(query, key, value, state.z, state.k), jax.tree.leaves(state)

    return prepare


def _exact(query: Array, key: Array, value: Array) -> Prepare:
    attend = jax.jit(prefix_attention)

    def prepare(prefix_key: Array, prefix_value: Array) -> tuple[Callable[[], Array], list[Array]]:
        return lambda: attend(query, key, value, prefix_key, prefix_value), [prefix_key, prefix_value]

    return prepare


def _exact_cost(problem: Problem) -> Evidence:
    return _cost(problem, _exact)


def _figure(evidence: Evidence, control: Evidence) -> Figure:
    figure, (times, memory, counts) = figures.panels(3, width=4.0)
    for found, name, color in (
        (evidence, "NTK-Attention", figures.COLORS["real"]),
        (control, "exact prefix attention", figures.COLORS["control"]),
    ):
        milliseconds = {m: 1e3 * seconds for m, seconds in found.series["seconds"].items()}
        figures.power_law(times, milliseconds, name, color)
        memory.plot(LENGTHS, [size / 2**10 for size in found.series["kept"].values()], "o-", color=color, label=name)
    figures.label(times, title="Time of one call", x="prefix length m", y="milliseconds", log="xy")
    figures.label(memory, title="Kept for the prefix", x="prefix length m", y="KiB", log="xy")
    shown = evidence.series["counts"]["ViT-B/16"]
    counts.barh(list(shown), list(shown.values()), color=figures.COLORS["tied"])
    counts.invert_yaxis()
    figures.label(counts, title="Trained parameters, ViT-B/16", x="parameters", y="", log="x")
    counts.set_xlim(left=1e4)
    return figure


CLAIM = Claim(
    name="complexity",
    title="The cost does not depend on the prefix",
    statement="NTK-Attention: time O(L^2) and memory O(r d + r) whatever m is; exact prefix attention: O(m L + L^2) and O(m d)",
    proof="13",
    computed_by=("ntk_attention", "PrefixState"),
    source="arXiv 2406.14036 (its public code); measured here, float32",
    measure=lambda problem: _cost(problem, _ntk),
    controls=(
        Control("time of exact attention", "the time of exact prefix attention grows with m", _exact_cost, "time"),
        Control("memory of exact attention", "so does what must be kept for it", _exact_cost, "memory"),
    ),
    timed=True,
    draw=_figure,
    caption="Median and range of the time of one call, bytes kept for the prefix, and trained parameters of each method: "
    "NTK-Attention trains more numbers than a 10-token prefix or LoRA of rank 8, which every comparison must say.",
    drawn=True,
)
