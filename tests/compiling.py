"""How tests compile: most of a test's time is the compilation of a program that runs once.

A kernel comes from XLA's older emitter and a program is one LLVM module, a quarter to a third less time. What MLIR and LLVM
make of programs when they take their time, users see, and `make verify`, the benchmarks, and other commands that tests
start: XLA's own passes are the same.
"""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

KNOWN = jax.__version__ == "0.10.2"  # XLA ends a process at a flag it does not know
FLAGS = (
    [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        # eight devices are eight threads of two busy cores: XLA ends the process where one waits 40 s for the others
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
    if KNOWN
    else []
)
XLA_FLAGS = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])


def quickly() -> dict[str, str]:
    """Return the environment of a process that compiles as tests do."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "XLA_FLAGS": XLA_FLAGS,
    }


def share_contexts(programs: int = 100) -> None:
    """Let that many programs in a row be lowered in one MLIR context; JAX makes one for each, a fifth of a small one's time.

    Not for all: what a program's types, places and constants were is kept as long as its context is.
    """
    if not KNOWN:
        return
    from jax._src.interpreters import mlir

    made: list[Any] = []
    used = 0

    def context(make: Callable[[], Any]) -> Any:
        nonlocal used
        if used % programs == 0:
            made[:] = [make()]
        used += 1
        return made[0]

    mlir.make_ir_context = functools.partial(context, mlir.make_ir_context)


def keep_programs(most: int = 2000) -> None:
    """Keep in memory what JAX's cache of compiled programs would write into its folder: a seventh less processor time.

    That many programs, the last used: some 100 kB each.
    """
    if not KNOWN:
        return
    from jax._src import compilation_cache

    kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def put(key: str, name: str, program: Any, backend: Any, seconds: int) -> None:
        kept[key] = program, seconds
        if len(kept) > most:
            kept.popitem(last=False)

    def get(key: str, options: Any, backend: Any, devices: Any) -> tuple[Any, int | None]:
        if key not in kept:
            return None, None
        kept.move_to_end(key)
        return kept[key]

    compilation_cache.put_executable_and_time = put
    compilation_cache.get_executable_and_time = get


def leave_room() -> None:
    """Empty JAX's tables of programs to call when they are half full: into a full one nothing comes any more.

    Each call of a later program would go through Python, and ``_cache_size`` of it would be 0. A table holds 8,192, which a
    worker of the whole suite reaches.
    """
    if not KNOWN:
        return
    from jax._src import pjit

    for table in (pjit._cpp_pjit_cache_fun_only, pjit._cpp_pjit_cache_explicit_attributes):
        if table.size() > table.capacity() // 2:
            table.clear()
