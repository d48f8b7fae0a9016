"""Adapters are float32 and the models here tiny: most of the time would go into compiling."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def x64() -> Iterator[bool]:
    """Float32, as everywhere outside of tests."""
    with jax.enable_x64(False):
        yield False


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
