"""Methods that train weights of the model itself: all of them, its biases, or only its head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.peft.base import AdapterConfig, AdapterParam, Host, gather_rows
from ntk_prefix.typing import Array, Float

__all__ = ["BitFitConfig", "FullConfig", "HeadConfig", "HeadHost"]


class _InPlaceConfig(AdapterConfig):
    in_place: ClassVar[bool] = True

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Module:
        """Make the chosen weights trainable, where they stand."""
        for attribute, variable in list(vars(module).items()):
            if isinstance(variable, nnx.Param) and self.takes(attribute):
                setattr(module, attribute, AdapterParam(variable[...]))
        return module

    def hosts(self, module: nnx.Module) -> bool:
        """Any module with weights of its own that the method takes."""
        return any(isinstance(v, nnx.Param) and self.takes(a) for a, v in vars(module).items())

    def takes(self, attribute: str) -> bool:
        """Return whether a weight of this name is trained."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(_InPlaceConfig):
    """Full fine-tuning: every weight whose module's path matches ``target``, all by default."""

    method: ClassVar[str] = "full"

    def takes(self, attribute: str) -> bool:
        """All of them."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(_InPlaceConfig):
    """Biases only, those of norms included.

    Source: Ben Zaken et al., arXiv 2106.10199.
    """

    method: ClassVar[str] = "bitfit"

    def takes(self, attribute: str) -> bool:
        """Biases."""
        return attribute == "bias"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig(AdapterConfig):
    """A linear probe: the head alone."""

    method: ClassVar[str] = "head"
    target: str = r"^head$"
    train_head: bool = False

    def hosts(self, module: nnx.Module) -> bool:
        """Linear maps, also those that host other heads."""
        return isinstance(module, (nnx.Linear, HeadHost))

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Module:
        """Give the adapter a copy of the head to train."""
        assert isinstance(module, (nnx.Linear, HeadHost))
        host = module if isinstance(module, HeadHost) else HeadHost(module)
        host.add(name, _Head(host.base))
        return host


class _Head(nnx.Module):
    def __init__(self, base: nnx.Linear):
        self.kernel = AdapterParam(jnp.copy(base.kernel[...]))
        bias = base.bias
        self.bias = AdapterParam(jnp.zeros(base.kernel.shape[1]) if bias is None else jnp.copy(bias[...]))


class HeadHost(Host):
    """A frozen linear map and the copies of it that adapters train."""

    def __init__(self, base: nnx.Linear):
        super().__init__()
        self.base = base

    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T E"]:
        """Return the active copy's output, or that of each row's own; a row of -1 gets the frozen head's."""
        head = self.current()
        if self.rows is not None:
            heads = [self.adapters[name] for name in self.names]
            kernel = gather_rows([h.kernel[...] for h in heads], self.rows)
            bias = gather_rows([h.bias[...] for h in heads], self.rows)
            output = jnp.einsum("b...d,bde->b...e", x, kernel.astype(x.dtype))
            output = output + bias.astype(x.dtype).reshape(len(bias), *(1,) * (x.ndim - 2), -1)
            frozen = (self.rows < 0).reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.where(frozen, self.base(x), output)
        if head is None:
            return self.base(x)
        output = x @ head.kernel[...].astype(x.dtype)
        return output + head.bias[...].astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)

    def merge(self) -> nnx.Linear:
        """Return a linear map with the active copy's weights."""
        head = self.current()
        self.base.kernel[...] = head.kernel[...]
        self.base.bias = nnx.Param(head.bias[...])
        return self.base
