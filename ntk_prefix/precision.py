"""The dtype that sums are carried in, decided once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__all__ = ["accumulation_dtype"]


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """float64 for float64, float32 for anything narrower.

    Args:
        arrays: arrays or dtypes, promoted together.
    """
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
