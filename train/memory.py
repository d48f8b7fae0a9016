"""What malloc does with blocks: large ones in huge pages, a training step on CPUs in two thirds of its time; freed ones back.

XLA asks malloc for a step's temporaries in one block (MiniLM, 32 x 64 tokens: half a gigabyte) and frees it when the
step ends. glibc hands blocks of that size back to the kernel, which gives them out again page by page, each one zeroed
at a page fault: 130,000 per step, 0.3 s of processor time (``python -m tests.bench.bench_step``, with and without
``--no-huge-pages``). Pages of 2 MiB make that 600 faults, and cost no memory; keeping the blocks (``mallopt``) was as
fast and cost a fifth more.
"""

import contextlib
import ctypes
import os
import sys

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What glibc reads when a program starts, and at no later time. Other C libraries do not look at it."""


def use_huge_pages() -> None:
    """Start this program anew, the same process with the same command line, with :data:`TUNABLES` in its environment.

    To be called first thing, as what was done so far is done again. Nothing happens where the variable is set, whatever
    it says, or where the system is not Linux.
    """
    if sys.platform == "linux" and not TUNABLES.keys() & os.environ.keys():
        os.environ.update(TUNABLES)
        # by its full name: a bare "python" would be looked for on the path, and the environment with it
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
    """Forget compiled programs, and give the kernel what is free: glibc keeps blocks of some megabytes while a program runs.

    For between two stages that share no program: ``python -m train.compress`` had 1.5 GiB of such blocks. Other C libraries
    keep theirs.
    """
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
