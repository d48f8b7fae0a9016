"""What a process does with memory that it frees: keep it, which makes a step on CPUs about a third faster.

XLA asks malloc for a step's temporaries in one block (MiniLM, 32 x 64 tokens: half a gigabyte) and frees it when the
step ends. glibc hands blocks of that size back to the kernel, which gives them out again page by page, each one zeroed:
130,000 page faults a step, 0.3 s of processor time (``python -m tests.bench.bench_step``, with and without
``--no-keep-freed``).
"""

import ctypes

# of glibc's malloc.h, with the value each gets
_KEEP = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads; those of the others hold 64 MiB at most
    -4: 0,  # M_MMAP_MAX: no block of its own from the kernel, whatever its size
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: give the heap's end back from 2 GiB on
}


def keep_freed() -> bool:
    """Let malloc keep what is freed, for this process and from now on; to be called before numpy or JAX is imported.

    They start threads, and glibc settles how many heaps there are when the first thread asks for memory; blocks that
    threads of a second heap ask for still come from the kernel.

    The process then stays as large as it was at its largest, up to 2 GiB of free memory at the end of its heap.

    Returns:
        whether malloc took it; where it is not glibc's (macOS, Windows, musl) nothing changes and this is False.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(option, value) for option, value in _KEEP.items()])
