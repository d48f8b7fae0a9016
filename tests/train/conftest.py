"""Training runs in float32, as users run it."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def x64() -> Iterator[bool]:
    """Override the suite's float64."""
    with jax.enable_x64(False):
        yield False
