"""NTK-Attention beside its peers: ``python -m tests.bench.bench_attention [--torch-python PATH]`` prints the table.

Every line compares programs inside one run: rounds are interleaved, so that a busy machine slows all of them
alike, and a ratio is the median over rounds of the ratio within the round. Peers are
``jax.nn.dot_product_attention``, a plain einsum - softmax - einsum and, with PATH (a Python with torch), torch's
``scaled_dot_product_attention`` in a process of its own, half of our rounds before it and half after; ours does more
work than any of them, since it has a prefix. Beside torch's, a large matrix product of both says how much of the gap
is the library of products. Memory is XLA's own account of temporary buffers. A peer that cannot run says why. The
lines for an accelerator appear when there is one.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.attention import IMPLEMENTATIONS, ntk_attention, prefix_attention, softmax_attention
from ntk_prefix.flash.base import BACKENDS
from ntk_prefix.prefix_state import PrefixState

Programs = dict[str, tuple[Callable, tuple]]
"""By name, a function and its arguments; ours last."""


def einsum_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention as one writes it down."""
    scores = jnp.einsum("btnh,bsnh->bnts", query * query.shape[-1] ** -0.5, key)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


def with_gradient(attend: Callable) -> Callable:
    """Return the forward and backward pass of an attention: output, and gradients of all its arguments."""

    def both(cotangent: jax.Array, *arguments: Any) -> tuple[Any, Any]:
        output, pull = jax.vjp(attend, *arguments)
        return output, pull(cotangent)

    return both


def arrays(
    batch: int, length: int, heads: int, size: int, dtype: Any = jnp.float32
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return query, key, value, z, k and an output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 6)
    tokens = (batch, length, heads, size)
    draw = functools.partial(jax.random.normal, dtype=dtype)
    query, key, value, cotangent = (draw(k, tokens) for k in keys[:4])
    z = jax.random.normal(keys[4], (heads, size, size), jnp.float32)
    k = jnp.abs(jax.random.normal(keys[5], (heads, size), jnp.float32))
    return (query, key, value, z, k), cotangent


@dataclasses.dataclass
class Timing:
    """Of one program: seconds of each round and bytes of temporaries, or why there are none."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    temporary: int | None = None
    problem: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float, float]:
        low, middle, high = np.percentile(self.seconds, [25, 50, 75])
        return float(low), float(middle), float(high)


def processor() -> str:
    """Return the name that the system gives its processor; a CPU's figures are nothing without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    amx = ", AMX" if any("amx_tile" in line for line in lines) else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{amx}"


def said(error: BaseException) -> str:
    """Return an error in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def measure(programs: Programs, rounds: int, within: float = float("inf")) -> dict[str, Timing]:
    """Time programs in interleaved rounds; after ``within`` seconds no more than three. Who cannot run says so."""
    timings, compiled = {name: Timing() for name in programs}, {}
    for name, (function, arguments) in programs.items():
        try:
            program = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(program(*arguments))
        except Exception as error:  # a peer's own, of any type
            timings[name].problem = said(error)
        else:
            compiled[name] = program
            analysis = program.memory_analysis()
            timings[name].temporary = None if analysis is None else int(analysis.temp_size_in_bytes)
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begun > within:
            break
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*programs[name][1]))
            timings[name].seconds.append(time.perf_counter() - start)
    return timings


def compare(title: str, programs: Programs, rounds: int, flops: float | None = None) -> dict[str, Timing]:
    """Time programs in interleaved rounds and print a line each."""
    timings = measure(programs, rounds)
    print(f"\n{title}")
    ours = list(timings.values())[-1]
    for name, timing in timings.items():
        if timing.problem:
            print(f"  {name:34s} cannot run: {timing.problem}")
            continue
        low, middle, high = (1e3 * x for x in timing.quartiles())
        rate = f"{flops / middle / 1e9:8.1f} TFLOP/s" if flops else ""
        ratio = f"   ours / this {np.median(np.divide(ours.seconds, timing.seconds)):5.2f}" if ours.seconds else ""
        memory = (timing.temporary or 0) / 2**20
        print(f"  {name:34s} {middle:9.2f} ms  (quartiles {low:.2f}-{high:.2f})  {memory:8.1f} MiB {rate}{ratio}")
    return timings


def peers(arguments: tuple[jax.Array, ...], **options: Any) -> Programs:
    """Return the peers and ours, by name; ours last."""
    tokens = arguments[:3]
    return {
        "jax.nn.dot_product_attention": (
            functools.partial(jax.nn.dot_product_attention, **options),
            tokens,
        ),
        "einsum - softmax - einsum": (einsum_attention, tokens),
        "ntk_attention": (functools.partial(ntk_attention, **options), arguments),
    }


def differentiated(programs: Programs, cotangent: jax.Array) -> Programs:
    """Return the same programs, forward and backward."""
    return {name: (with_gradient(f), (cotangent, *args)) for name, (f, args) in programs.items()}


TORCH = """
import json, sys, time, torch
import torch.nn.functional as F
cases, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    torch.set_num_threads(int(sys.argv[3]))
def timed(run):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(); wait(); times = []
    for _ in range(rounds):
        begun = time.perf_counter(); run(); wait(); times.append(time.perf_counter() - begun)
    return times
found = []
for batch, length, heads, size, dtype, causal, backward in cases:
    draw = lambda: torch.randn(batch, heads, length, size, device=device, dtype=getattr(torch, dtype))
    q, k, v, d = draw(), draw(), draw(), draw()
    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    def both():
        for x in (q, k, v):
            x.grad = None
            x.requires_grad_(True)
        forward().backward(d)
    found.append(timed(both if backward else forward))
side = 8192 if device == "cuda" else 1536
a = torch.randn(side, side, device=device, dtype=getattr(torch, cases[0][4]))
found.append(timed(lambda: a @ a))
if device == "cpu":
    batch, length, heads, size, dtype = cases[0][:5]
    q, k, v = (torch.randn(batch, heads, length, size, dtype=getattr(torch, dtype)) for _ in range(3))
    found.append(timed(lambda: (q @ k.transpose(2, 3)) @ v))
    found.append(timed(lambda: torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v))
print(json.dumps({"version": torch.__version__, "device": device, "seconds": found}))
"""
"""Seconds of torch's SDPA for each case, of a large product in the first case's dtype, and on a CPU of the first case's
parts: its two products, and softmax between them."""

Case = tuple[int, int, int, int, str, bool, bool]
"""Batch, length, heads, head dimension, dtype, whether it is causal, whether the backward pass is in it."""


def torch_attention(python: Path | str, cases: list[Case], rounds: int, threads: int = 2) -> dict[str, Any]:
    """Return torch's version, device and seconds [case, round], with the rows more that :data:`TORCH` says.

    Raises:
        RuntimeError: it cannot run there; the text is its last line.
    """
    command = [str(python), "-c", TORCH, json.dumps(cases), str(rounds), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{python}: {error.strerror}") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:160])
    return json.loads(done.stdout.splitlines()[-1])


def beside_torch(python: Path, rounds: int) -> None:
    """Print softmax and NTK-Attention beside torch's SDPA, float32, half of our rounds before it and half after."""
    arguments, cotangent = arrays(2, 512, 8, 64)
    forward: Programs = {
        "softmax_attention": (softmax_attention, arguments[:3]),
        "ntk_attention": (ntk_attention, arguments),
    }
    square = jnp.ones((1536, 1536))
    product: Programs = {"product": (jnp.matmul, (square, square))}
    groups = [forward, differentiated(forward, cotangent), product, parts(*arguments[:3])]
    before = [measure(group, -(-rounds // 2)) for group in groups]
    theirs = torch_attention(python, [(2, 512, 8, 64, "float32", False, b) for b in (False, True)], rounds)
    after = [measure(group, -(-rounds // 2)) for group in groups]
    print(f"\ntorch {theirs['version']} SDPA in the same run, float32, B=2 T=S=512 N=8 H=64, {theirs['device']}")
    titles = ("forward", "forward and backward", "product 1536^3: what is not attention's")
    for title, one, two, seconds in zip(titles, before[:3], after[:3], theirs["seconds"][:3], strict=True):
        peer = statistics.median(seconds)
        print(f"  {title}: torch {1e3 * peer:.2f} ms")
        for name in one:
            median = statistics.median(one[name].seconds + two[name].seconds)
            print(f"    {name:24s} {1e3 * median:9.2f} ms   ours / torch {median / peer:5.2f}")
    print("  parts of the forward, in blocks as ours are; torch's of the whole:")
    medians = {name: statistics.median(before[3][name].seconds + after[3][name].seconds) for name in before[3]}
    peers_parts = [statistics.median(row) for row in theirs["seconds"][3:]]
    for (name, median), peer in zip(medians.items(), [peers_parts[0], None, peers_parts[1]], strict=True):
        print(f"    {name:24s} {1e3 * median:9.2f} ms   torch {'-' if peer is None else f'{1e3 * peer:.2f} ms'}")


def parts(query: jax.Array, key: jax.Array, value: jax.Array) -> Programs:
    """Return what a forward in blocks of 256 queries cannot do without: products; exponentials; and a whole softmax."""
    batch, _, heads, size = query.shape
    blocks = query.reshape(batch, -1, 256, heads, size).transpose(1, 0, 3, 2, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

    def program(between: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
        def run(blocks: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            def one(block: jax.Array) -> jax.Array:
                scores = jnp.einsum("bnth,bnsh->bnts", block, key)
                return jnp.einsum("bnts,bnsh->bnth", between(scores), value)

            return jax.lax.map(one, blocks)

        return run

    steps = {"two products": lambda x: x, "exponentials between": jnp.exp, "softmax between": jax.nn.softmax}
    return {name: (program(between), (blocks, key, value)) for name, between in steps.items()}


def on_cpu(rounds: int) -> None:
    """Print the lines of the issue for a CPU."""
    short, cotangent = arrays(2, 512, 8, 64)
    compare("forward, float32, B=2 T=S=512 N=8 H=64", peers(short), rounds)
    compare("forward and backward, the same", differentiated(peers(short), cotangent), rounds)

    long, cotangent = arrays(1, 4096, 8, 64)
    few = max(rounds // 8, 3)
    compare("forward, T=S=4096, B=1", peers(long), few)
    compare("forward and backward, the same", differentiated(peers(long), cotangent), few)
    causal = peers(long, is_causal=True)
    del causal["einsum - softmax - einsum"]
    compare("forward, causal, the same", causal, few)

    draw = np.random.default_rng(0)
    block = draw.standard_normal((2, 10_000, 8, 64)).astype(np.float32)
    states = {
        "a state made from 10 tokens": PrefixState.from_blocks([(block[0][:10], block[1][:10])]),
        "a state made from 1,000,000 tokens": PrefixState.from_blocks((block[0], block[1]) for _ in range(100)),
    }
    run = lambda query, key, value, state: state.attend(query, key, value)  # noqa: E731
    compare(
        "ntk_attention, T=S=512: the length of the prefix does not show",
        {name: (run, (*short[:3], state)) for name, state in states.items()},
        rounds,
    )
    exact = {
        f"exact prefix attention, {m} tokens": (prefix_attention, (*short[:3], *block[:, :m])) for m in (512, 4096)
    }
    compare("exact prefix attention beside it", {**exact, "ntk_attention": (ntk_attention, short)}, few)


def on_accelerator(rounds: int) -> None:
    """Print the lines of the issue for a GPU or TPU: bfloat16 beside the platform's own, and the measured peak."""
    square = jnp.ones((8192, 8192), jnp.bfloat16)
    compare("matrix product, the measured peak", {"8192^3": (jnp.matmul, (square, square))}, rounds, 2 * 8192**3)
    for title, programs, flops in accelerator_cases(8, 4096, 16, 128):
        compare(title, programs, rounds, flops)


def accelerator_cases(
    batch: int, length: int, heads: int, size: int, causal: tuple[bool, ...] = (False, True)
) -> Iterator[tuple[str, Programs, float]]:
    """Yield title, programs and flops of attention in bfloat16, each implementation that is there to be named."""
    arguments, cotangent = arrays(batch, length, heads, size, jnp.bfloat16)
    for is_causal in causal:
        flops = 4 * batch * heads * length**2 * size / (2 if is_causal else 1)
        programs: Programs = {
            f"jax.nn, {name}": (
                functools.partial(jax.nn.dot_product_attention, implementation=name, is_causal=is_causal),
                arguments[:3],
            )
            for name in ("cudnn", "xla")
        }
        for name in IMPLEMENTATIONS:
            # not the reference, whose arrays are T x S, nor what is another platform's
            if name in BACKENDS and BACKENDS[name].not_here(arguments[0]) is None:
                ours = functools.partial(ntk_attention, implementation=name, is_causal=is_causal)
                programs[f"ntk_attention, {name}"] = (ours, arguments)
        title = f"bfloat16, B={batch} T={length} N={heads} H={size}{', causal' if is_causal else ''}"
        yield f"forward, {title}", programs, flops
        yield f"forward and backward, {title}", differentiated(programs, cotangent), 3.5 * flops


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of the short lines, at least 2")
    parser.add_argument("--torch-python", type=Path, help="a Python with torch, to time its attention in the same run")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    if options.torch_python is not None and not options.torch_python.is_file():
        parser.error(f"--torch-python: expected a Python, got {options.torch_python}, which is no file")
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind}, {processor()})")
    if options.torch_python is not None and device.platform == "cpu":
        try:
            beside_torch(options.torch_python, options.rounds)
        except RuntimeError as error:
            print(f"\ntorch cannot run: {error}")
    if device.platform == "cpu":
        on_cpu(options.rounds)
        print("\nNo accelerator at hand: on one, this same command prints its lines.")
    else:
        on_accelerator(options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
