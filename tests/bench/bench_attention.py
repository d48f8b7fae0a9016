"""NTK-Attention beside its peers: ``python -m tests.bench.bench_attention`` prints the table.

Every line compares programs inside one run: rounds are interleaved, so that a busy machine slows all of them
alike, and a ratio is the median over rounds of the ratio within the round. Peers are
``jax.nn.dot_product_attention`` and a plain einsum - softmax - einsum; ours does more work than either, since
it has a prefix. Memory is XLA's own account of temporary buffers. The lines for a GPU appear when there is
one.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.attention import ntk_attention, prefix_attention
from ntk_prefix.prefix_state import PrefixState


def einsum_attention(query, key, value):
    """Attention as one writes it down."""
    scores = jnp.einsum("btnh,bsnh->bnts", query * query.shape[-1] ** -0.5, key)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


def with_gradient(attend: Callable) -> Callable:
    """Return the forward and backward pass of an attention: output, and gradients of all its arguments."""

    def both(cotangent, *arguments):
        output, pull = jax.vjp(attend, *arguments)
        return output, pull(cotangent)

    return both


def arrays(batch, length, heads, size, dtype=jnp.float32):
    """Return query, key, value, z, k and an output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 6)
    tokens = (batch, length, heads, size)
    draw = functools.partial(jax.random.normal, dtype=dtype)
    query, key, value, cotangent = (draw(k, tokens) for k in keys[:4])
    z = jax.random.normal(keys[4], (heads, size, size), jnp.float32)
    k = jnp.abs(jax.random.normal(keys[5], (heads, size), jnp.float32))
    return (query, key, value, z, k), cotangent


def compare(title: str, programs: dict[str, tuple[Callable, tuple]], rounds: int, flops: float | None = None):
    """Time programs in interleaved rounds and print a line each; return seconds [program, round]."""
    compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, args) in programs.items()}
    for name, (_, args) in programs.items():
        jax.block_until_ready(compiled[name](*args))
    seconds = np.zeros((len(programs), rounds))
    for r in range(rounds):
        for row, (name, (_, args)) in enumerate(programs.items()):
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[row, r] = time.perf_counter() - start
    print(f"\n{title}")
    ours = seconds[-1]
    for row, name in enumerate(programs):
        low, middle, high = np.percentile(seconds[row], [25, 50, 75]) * 1e3
        memory = compiled[name].memory_analysis().temp_size_in_bytes / 2**20
        rate = f"{flops / middle / 1e9:8.1f} TFLOP/s" if flops else ""
        print(
            f"  {name:34s} {middle:9.2f} ms  (quartiles {low:.2f}-{high:.2f})  {memory:8.1f} MiB {rate}"
            f"   ours / this {np.median(ours / seconds[row]):5.2f}"
        )
    return seconds


def peers(arguments, **options):
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


def differentiated(programs, cotangent):
    """Return the same programs, forward and backward."""
    return {name: (with_gradient(f), (cotangent, *args)) for name, (f, args) in programs.items()}


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


def on_gpu(rounds: int) -> None:
    """Print the lines of the issue for a GPU: bfloat16 against cuDNN, beside the measured peak."""
    square = jnp.ones((8192, 8192), jnp.bfloat16)
    compare("matrix product, the measured peak", {"8192^3": (jnp.matmul, (square, square))}, rounds, 2 * 8192**3)
    batch, length, heads, size = 8, 4096, 16, 128
    arguments, cotangent = arrays(batch, length, heads, size, jnp.bfloat16)
    for is_causal in (False, True):
        flops = 4 * batch * heads * length**2 * size / (2 if is_causal else 1)
        cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=is_causal)
        ours = functools.partial(ntk_attention, implementation="cudnn", is_causal=is_causal)
        programs = {"cuDNN flash attention": (cudnn, arguments[:3]), "ntk_attention": (ours, arguments)}
        title = f"bfloat16, B=8 T=4096 N=16 H=128, causal={is_causal}"
        compare(f"forward, {title}", programs, rounds, flops)
        both = differentiated(programs, cotangent)
        compare(f"forward and backward, {title}", both, rounds, 3.5 * flops)
    accuracy_on_gpu()


def accuracy_on_gpu() -> None:
    """Print the error of outputs and gradients against float64, at a size where float64 is affordable."""
    arguments, cotangent = arrays(1, 512, 4, 128, jnp.bfloat16)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (cotangent, *arguments))
        exact = with_gradient(functools.partial(ntk_attention, implementation="reference", is_causal=True))(*wide)
        got = with_gradient(functools.partial(ntk_attention, implementation="cudnn", is_causal=True))(
            cotangent, *arguments
        )
        names = ("output", "d query", "d key", "d value", "d z", "d k")
        print("\ncuDNN against float64, |error| / |exact|, causal, B=1 T=512 N=4 H=128")
        for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            error = jnp.linalg.norm(a.astype(jnp.float64).ravel() - b.ravel()) / jnp.linalg.norm(b.ravel())
            print(f"  {name:8s} {float(error):.2e}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of the short lines")
    rounds = parser.parse_args().rounds
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind})")
    if device.platform == "gpu":
        on_gpu(rounds)
    else:
        on_cpu(rounds)
        print("\nNo GPU at hand: on one, this same command prints its lines.")


if __name__ == "__main__":
    main()
