"""Compile attention for TPUs that are not there, and say what it takes: needs libtpu, and no TPU.

    python -m tests.bench.compile_attention [--topology v5e:2x2] [--batch 4 --length 4096 --heads 16 --head-dim 128]

One JSON object a line, one for each program: temporaries in MiB, the number of Mosaic kernels, and the largest buffer that
has T x S numbers, if there is any.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from train.plan.topology import ENVIRONMENT, Topology


def mesh_of(topology: str, **axes: int) -> Any:
    """Return a mesh over the first devices of a topology, of one device without axes."""
    import math

    import numpy as np
    from jax.sharding import Mesh

    devices = Topology(topology).devices()
    axes = axes or {"data": 1}
    return Mesh(np.array(devices[: math.prod(axes.values())]).reshape(tuple(axes.values())), tuple(axes))


def compiled(function: Any, mesh: Any, *arguments: Any) -> Any:
    """Compile a function of shapes, placed by their shardings, for the mesh's devices."""
    import jax

    from ntk_prefix import sharding

    def traced(*xs: Any) -> Any:
        with sharding.on(mesh):
            return function(*xs)

    return jax.jit(traced).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def report(program: Any, length: int) -> dict[str, Any]:
    """Return what a compiled program takes."""
    text = program.as_text()
    square = re.findall(rf"\b(?:f32|bf16|pred)\[[\d,]*{length},{length}\]", text)
    return {
        "temporaries_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "mosaic_kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "square": max(square, key=len, default=None),
        "collectives": sorted(set(re.findall(r"\b(all-gather|all-to-all|all-reduce|collective-permute)\b", text))),
    }


def programs(
    topology: str,
    batch: int,
    length: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    implementations: list[str],
    masses: tuple[str, ...] = ("absolute", "relative"),
    transform: dict[str, Any] | None = None,
    **axes: int,
) -> Iterator[dict[str, Any]]:
    """Yield a report for each implementation, forward and with all gradients, causal, in bfloat16."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    import ntk_prefix as npx
    from ntk_prefix import sharding

    mesh = mesh_of(topology, **axes)

    def shape(dtype: Any, names: tuple[str | None, ...], *sizes: int) -> Any:
        placed = NamedSharding(mesh, sharding.spec(mesh, names, sizes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)

    rows = ("batch", None, "heads", None)
    arguments = (
        shape(jnp.bfloat16, rows, batch, length, heads, head_dim),
        *[shape(jnp.bfloat16, ("batch", None, "key_heads", None), batch, length, key_heads, head_dim)] * 2,
        shape(jnp.float32, ("heads", None, None), heads, head_dim, head_dim),
        shape(jnp.float32, ("heads", None), heads, head_dim),
    )
    for implementation in implementations:
        for mass in masses:
            named = None if implementation == "default" else implementation
            options = {"implementation": named, "mass": mass, **(transform or {})}
            attend = functools.partial(npx.ntk_attention, is_causal=True, **options)
            loss = lambda *xs, attend=attend: jnp.sum(attend(*xs).astype(jnp.float32))  # noqa: E731
            for name, function in (("forward", attend), ("with backward", jax.grad(loss, (0, 1, 2, 3, 4)))):
                what = {"topology": topology, "implementation": implementation, "mass": mass, "program": name}
                try:
                    yield what | axes | report(compiled(function, mesh, *arguments), length)
                except Exception as error:
                    yield what | axes | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Print a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", help="v5e:2x2, v5p:2x2x1, v6e:2x2 ...; several; default v5e:2x2")
    parser.add_argument("--implementation", action="append", help="splash, xla, default ...; several; default splash")
    parser.add_argument("--mass", action="append", choices=["absolute", "relative"])
    for name, value in (("batch", 4), ("length", 4096), ("heads", 16), ("key-heads", 0), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--local-window-size", type=int)
    parser.add_argument("--logits-soft-cap", type=float)
    for name in ("data", "fsdp", "tensor"):
        parser.add_argument(f"--{name}", type=int, default=1)
    given = parser.parse_args()
    if set(ENVIRONMENT) - set(os.environ):  # JAX is imported already, by the package's name alone
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.bench.compile_attention", *sys.argv[1:]],
            os.environ | ENVIRONMENT,
        )
    for topology in given.topology or ["v5e:2x2"]:
        for line in programs(
            topology,
            given.batch,
            given.length,
            given.heads,
            given.key_heads or given.heads,
            given.head_dim,
            given.implementation or ["splash"],
            tuple(given.mass or ("absolute", "relative")),
            {"local_window_size": given.local_window_size, "logits_soft_cap": given.logits_soft_cap},
            **{name: getattr(given, name) for name in ("data", "fsdp", "tensor") if getattr(given, name) > 1},
        ):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
