"""The closed form against neural-tangents' best: time and peak memory.

    python -m tests.bench.bench_prefix_ntk            n = 64, d = 32, m = 65,536, float32: about two minutes on 2 cores
    python -m tests.bench.bench_prefix_ntk --huge     and m = 10^9 tokens drawn on the fly, n = 8, d = 4
    python -m tests.bench.bench_prefix_ntk --model tied --m 1024

The model is the fixed one, at whose kernel neural-tangents is good. Of the tied model, whose parameter is used twice,
it holds the Jacobian: 0.7 GB at m = 1,024, so that m = 65,536 is out of reach.

Times are taken in one process, the contenders taking turns, so that a neighbor on the machine slows all of them;
ratios are medians over the rounds. Peak memory is taken in a process for each contender, over what it had after its
imports. The machine's matrix-product rate is measured in the same rounds: what a contender reaches of it is its flops
(those of the formula it evaluates) over its time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

import ntk_prefix as npx
from ntk_prefix.artifacts import peak_resident_memory
from ntk_prefix.kernels.empirical import empirical_ntk

ROOT = Path(__file__).parents[2]
OURS, DRAWN, THEIRS, PRODUCT = "prefix_ntk", "prefix_ntk, drawn", "neural-tangents", "matrix product"
TARGET_SPEED, TARGET_MEMORY = 1.8, 0.5
SIDE = 2048
"""Of the square matrices whose product gives the machine's rate."""


def inputs(n: int, d: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (n, d))
    return x / jnp.linalg.norm(x, axis=1).max()


MODELS = {"tied": npx.TiedPrefixModel, "fixed": npx.FixedValuePrefixModel}


def contender(name: str, model: str, n: int, d: int, m: int) -> Callable[[], jax.Array]:
    """What is timed: a call without arguments that returns a kernel."""
    x = inputs(n, d)
    if name == PRODUCT:
        square = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
        product = jax.jit(jnp.matmul)
        return lambda: product(square, square)
    if name == DRAWN:
        drawn = npx.RandomPrefix(key=jax.random.key(0), d=d, m=m, model=model)  # type: ignore[arg-type]
        return lambda: npx.kernels.prefix_ntk(drawn, x)
    built = MODELS[model](d, m, rngs=nnx.Rngs(0))
    if name == OURS:
        return lambda: npx.kernels.prefix_ntk(built, x)
    return lambda: empirical_ntk(built, x, implementation="structured", vmap_axes=0) / m


def flops(n: int, d: int, m: int) -> float:
    """Of the plain closed form: the Gram matrix of n d features over m tokens."""
    return 2.0 * m * (n * d) ** 2


def measure(name: str, model: str, n: int, d: int, m: int) -> dict[str, float]:
    """One cold call in this process: memory over what the imports took, and seconds with compilation."""
    jax.block_until_ready(jnp.zeros(()))
    before, start = peak_resident_memory(), time.perf_counter()
    jax.block_until_ready(contender(name, model, n, d, m)())
    return {"bytes": peak_resident_memory() - before, "seconds": time.perf_counter() - start}


def measure_apart(name: str, model: str, n: int, d: int, m: int) -> dict[str, float]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_prefix_ntk", "--measure", name]
    sizes = [f"--model={model}", f"--n={n}", f"--d={d}", f"--m={m}"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def interleaved(
    names: list[str], model: str, n: int, d: int, m: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every round of every contender, and those of its first call, which compiles it."""
    calls = {name: contender(name, model, n, d, m) for name in names}
    kernels, first = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        kernels[name] = jax.block_until_ready(call())
        first[name] = time.perf_counter() - start
    difference = 0.0
    if THEIRS in names:
        difference = abs(kernels[OURS] - kernels[THEIRS]).max() / abs(kernels[THEIRS]).max()
    if difference > 1e-4:
        raise ArithmeticError(f"The contenders disagree by {difference:.1e}: there is nothing to compare.")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds, first


def compare(model: str, n: int, d: int, m: int, rounds: int, console: Console) -> bool:
    """Print the table; whether both targets are met."""
    names = [OURS, DRAWN, THEIRS]
    memory = {name: measure_apart(name, model, n, d, m)["bytes"] for name in names}
    seconds, _ = interleaved([*names, PRODUCT], model, n, d, m, rounds)
    rate = 2.0 * SIDE**3 / min(seconds[PRODUCT])

    device = jax.devices()[0]
    table = Table(title=f"Kernel of the {model} model, n = {n}, d = {d}, m = {m:,}, float32, {device}")
    for column in ("", "median s", "min .. max s", "speed", "peak MiB", "memory"):
        table.add_column(column, justify="left" if not column else "right")
    ratios = {}
    for name in names:
        taken = seconds[name]
        ratios[name] = statistics.median(t / own for t, own in zip(seconds[THEIRS], taken, strict=True))
        table.add_row(
            name,
            f"{statistics.median(taken):.2f}",
            f"{min(taken):.2f} .. {max(taken):.2f}",
            f"{ratios[name]:.2f}x",
            f"{memory[name] / 2**20:.0f}",
            f"{memory[name] / memory[THEIRS]:.2f}x",
        )
    console.print(table)
    work = flops(n, d, m)
    console.print(
        f"Matrix product {SIDE} x {SIDE}: {rate / 1e9:.0f} Gflop/s. The Gram matrix of n d features takes "
        f"{work / 1e9:.0f} Gflop, {work / rate:.2f} s at that rate; prefix_ntk took {min(seconds[OURS]):.2f} s, the "
        f"time of {min(seconds[OURS]) * rate / work:.2f} of it."
    )
    met = ratios[OURS] >= TARGET_SPEED and memory[OURS] <= TARGET_MEMORY * memory[THEIRS]
    verdict = "met" if met else "missed"
    console.print(f"Target, at least {TARGET_SPEED}x as fast in at most {TARGET_MEMORY} of the memory: {verdict}.")
    return met


def huge(console: Console) -> None:
    """A billion tokens."""
    n, d, m = 8, 4, 10**9
    measured = measure_apart(DRAWN, "tied", n, d, m)
    console.print(
        f"n = {n}, d = {d}, m = {m:,} drawn on the fly, float32: {measured['seconds']:.0f} s, "
        f"{measured['bytes'] / 2**20:.0f} MiB over the imports; the tokens alone would be {m * d * 4 / 2**30:.0f} GiB."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="fixed")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--d", type=int, default=32)
    parser.add_argument("--m", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--huge", action="store_true", help="time m = 10^9 tokens as well")
    parser.add_argument("--measure", choices=[OURS, DRAWN, THEIRS], help="one contender in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.model, options.n, options.d, options.m)))
        return 0
    console = Console()
    met = compare(options.model, options.n, options.d, options.m, options.rounds, console)
    if options.huge:
        huge(console)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
