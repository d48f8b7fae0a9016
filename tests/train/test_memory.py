"""Freed memory is kept, seen from outside: the pages that a process has to ask the kernel for."""

import subprocess
import sys

import pytest

FAULTS = """
import os, resource, sys
from train.memory import keep_freed
how, cpus = sys.argv[1:]
if how == "keep" and not keep_freed():
    sys.exit("not glibc")
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cpus)])
import jax, jax.numpy as jnp
block = jax.jit(lambda x: jnp.full((1 << 24,), x))  # 64 MiB, 16384 pages
for count in range(2, 12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block(1.0 * count).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, cpus: int) -> int:
    command = [sys.executable, "-c", FAULTS, how, str(cpus)]
    done = subprocess.run(command, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"})
    if "not glibc" in done.stderr:
        pytest.skip("malloc is not glibc's")
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
@pytest.mark.parametrize("cpus", [1, 2])  # other threads allocate where there is one
def test_a_block_that_is_freed_is_not_asked_for_again(cpus):
    assert faults("keep", cpus) < 1000
    assert faults("as it is", cpus) > 10_000  # the control: each of its pages
