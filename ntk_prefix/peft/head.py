"""The head that every adapter may train beside itself: a copy of its own of a linear map of the model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.peft.base import Adapter, AdapterConfig, AdapterParam, Host, gather_rows, widened
from ntk_prefix.typing import Array, Float

__all__ = ["HeadConfig", "HeadHost"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(AdapterConfig):
    """A linear probe: the head alone, or any other linear map that is trained whole."""

    method: ClassVar[str] = "head"
    target: str = r"^head$"
    train_head: bool = False

    def hosts(self, module: nnx.Module) -> bool:
        """Linear maps, also those that host other heads."""
        return isinstance(module, (nnx.Linear, HeadHost))

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Give the adapter a copy of the head to train."""
        assert isinstance(module, (nnx.Linear, HeadHost))
        host = module if isinstance(module, HeadHost) else HeadHost(module)
        return host.add(name, _Head(host.base))


class _Head(Adapter):
    file_names: ClassVar = {"kernel": "weight"}
    transposed: ClassVar = frozenset({"kernel"})

    def __init__(self, base: nnx.Linear):
        self.kernel = AdapterParam(jnp.copy(widened(base.kernel[...])))
        bias = base.bias
        # a map that has none, such as Llama's score, gets one, but for one that may have none, as a ranker's
        never = getattr(base, "without_bias", False)
        start = jnp.zeros(base.kernel.shape[1]) if bias is None else jnp.copy(widened(bias[...]))
        self.optional = ("bias",) if bias is None and not never else ()
        self.bias = None if never else AdapterParam(start)


class HeadHost(Host):
    """A frozen linear map and the copies of it that adapters train."""

    unmergeable: ClassVar[str | None] = None

    def __init__(self, base: nnx.Linear):
        super().__init__()
        self.base = base

    def bare(self) -> nnx.Linear:
        """Return the frozen map."""
        return self.base

    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T E"]:
        """Return the active copy's output, or that of each row's own; a row of -1 gets the frozen head's."""
        head = self.current()
        if self.rows is not None:
            rows = self.rows_of(len(x))
            heads = [self.adapters[name] for name in self.names]
            kernel = gather_rows([h.kernel[...] for h in heads], rows)
            output = jnp.einsum("b...d,bde->b...e", x, kernel.astype(x.dtype))
            if biases := [h.bias[...] for h in heads if h.bias is not None]:
                bias = gather_rows(biases, rows)
                output = output + bias.astype(x.dtype).reshape(len(bias), *(1,) * (x.ndim - 2), -1)
            frozen = (rows < 0).reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.where(frozen, self.base(x), output)
        if head is None:
            return self.base(x)
        output = x @ head.kernel[...].astype(x.dtype)
        if head.bias is None:
            return output
        return output + head.bias[...].astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)

    def merge(self) -> nnx.Linear:
        """Return a linear map with the active copy's weights, rounded to what its own are kept in."""
        head, dtype = self.current(), self.base.kernel.dtype
        self.base.kernel[...] = head.kernel[...].astype(dtype)
        if head.bias is not None:
            self.base.bias = nnx.Param(head.bias[...].astype(dtype))
        return self.base
