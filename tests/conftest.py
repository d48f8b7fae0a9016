"""What every test runs under: eight simulated CPU devices, no silent rank promotion, float64 unless it says x32."""

import gc
import os
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest

from tests import compiling

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# which lines an operation comes from goes into every program: a twentieth of the time, and nobody reads it here
jax.config.update("jax_traceback_in_locations_limit", 0)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", compiling.XLA_FLAGS)
    jax.devices()  # reads them, once
compiling.share_contexts()
compiling.keep_programs()

# Traces are made of small objects that live long: Python's collector goes through them 2,500 times in 100 seconds, a
# twentieth of them. Fifty times do.
gc.set_threshold(20_000, 20, 20)

# CI must give the same answer twice; a developer gets new examples every time
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Compile a program once, however many tests build it anew: a sixth less processor time.

    A folder for each process and each session, where programs are not kept in memory: JAX writes its entries in place, and
    two workers would meet halves of them (where a cache is shared, as by train.compare, a limit of its size makes JAX lock
    it).
    """
    folder = tempfile.TemporaryDirectory(prefix="ntk_prefix-compiled-")
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_finish() -> None:
    """Let Python's collector pass over what imports have made, which stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def room() -> None:
    """A test's programs find room in JAX's tables, however many tests came before."""
    compiling.leave_room()


@pytest.fixture(autouse=True)
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run each test in float64; parametrize ``x64`` indirectly with [True, False] to run it in both."""
    enabled = getattr(request, "param", True)
    with jax.enable_x64(enabled):
        yield enabled


@pytest.fixture
def without_annotations() -> Iterator[None]:
    """Let wrong arguments through to the errors that users see: outside of tests no annotation is executed."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LONGEST = (
    "notebooks",
    "grid",
    "certificate",
    "loop",
    "report",
    "files",
    "prefix_state",
    "lazy",
    "attention",
    "damaged_files",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files: two workers that share the files then end together."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
