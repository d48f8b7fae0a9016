"""Adapters are float32."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def x64() -> Iterator[bool]:
    """Float32, as everywhere outside of tests."""
    with jax.enable_x64(False):
        yield False
