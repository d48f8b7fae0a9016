"""Memory, seen from outside: page faults of a large block that is asked for again, and pages of what was freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.memory import TUNABLES

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import os, sys
from train.memory import use_huge_pages
how, *rest = sys.argv[1:]
assert rest == ["an argument", "--another=ü"], rest
if how == "huge":
    use_huge_pages()
import resource
import jax, jax.numpy as jnp
block = jax.jit(lambda x: jnp.full((1 << 24,), x))  # 64 MiB, 16384 pages
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for count in range(2, 12):
    before = faults()
    block(1.0 * count).block_until_ready()
    found.append(faults() - before)
print(os.getpid(), sys.prefix, min(found), sep="\\n")
"""


FREED = """
import resource, sys
from pathlib import Path
from train.memory import give_back
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
blocks = [b"." * 100_000 for _ in range(1000)]
last = blocks[-1]
del blocks
kept = pages()
give_back()
print(kept, pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_what_is_freed_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], stdout=subprocess.PIPE, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept - left > 0.9 * 100_000_000 / 4096


def run(how: str, **environment: str) -> int:
    """Fewest page faults of ten blocks; the process, its arguments and its environment stay what they were."""
    kept = {name: value for name, value in os.environ.items() if name not in TUNABLES}
    command = [sys.executable, "-c", PROGRAM, how, "an argument", "--another=ü"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept | environment) as process:
        output, _ = process.communicate()
    pid, prefix, faults = output.splitlines()
    assert (int(pid), prefix) == (process.pid, sys.prefix)
    return int(faults)


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="no huge pages here, or always"
)
def test_a_block_costs_a_tenth_of_its_pages():
    assert run("huge") < 1638
    assert run("as it is") > 16_000  # the control: each of its pages
    assert run("huge", GLIBC_TUNABLES="glibc.malloc.hugetlb=0") > 16_000  # what the user set stands
