"""The part of each device in a kernel that the compiler cannot divide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ntk_prefix import sharding
from ntk_prefix.flash.base import Flash
from ntk_prefix.typing import Array

__all__ = ["Layout"]


class Layout:
    """Which axes of a mesh divide rows and heads of what is computed; nothing without a mesh.

    Where keys are shared by a batch its rows are one long row of queries, and that is divided; not where it matters to a
    query at which place it stands.
    """

    def __init__(self, flash: Flash, query: Array, key: Array):
        self.mesh = sharding.current_mesh()
        batch, length, heads, _ = query.shape
        self.rows = self.queries = self.heads = None
        if self.mesh is None:
            return
        rows, queries, heads_axis = sharding.spec(self.mesh, ("batch", None, "heads"), (batch, length, heads))
        if batch == 1 and flash.sees == (None, None):
            queries = sharding.spec(self.mesh, ("batch",), (length,))[0]
        self.rows, self.queries = rows, queries
        whole_groups = sharding.spec(self.mesh, ("key_heads",), (key.shape[2],))[0]
        self.heads = heads_axis if heads_axis == whole_groups else None

    def apply(self, function: Callable[..., Any], names: str, results: str, *arrays: Array | None) -> Any:
        """Return the function of each device's part.

        Args:
            function: of arrays.
            names: what they are, a letter each: q [B, T, N, H], k [B, S, K, H], m [B, S], s [B, N, T], b [#B, #N, #T, #S];
                m and b may be None.
            results: the same of what it returns.
            arrays: the arguments.
        """
        if self.mesh is None:
            return function(*arrays)
        specs = {
            "q": PartitionSpec(self.rows, self.queries, self.heads),
            "k": PartitionSpec(self.rows, None, self.heads),
            "m": PartitionSpec(self.rows),
            "s": PartitionSpec(self.rows, self.heads, self.queries),
        }

        def scores(x: Array) -> PartitionSpec:
            full = (self.rows, self.heads, self.queries)
            return PartitionSpec(*(axis if size > 1 else None for axis, size in zip(full, x.shape, strict=False)))

        placed = [
            scores(x) if name == "b" and x is not None else specs.get(name)
            for name, x in zip(names, arrays, strict=True)
        ]
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(placed),
            out_specs=tuple(specs[name] for name in results),
            check_vma=False,  # the kernels do not say over which axes their results differ
        )(*arrays)
