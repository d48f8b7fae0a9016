"""LoRA: a low-rank addition to frozen linear maps."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.checks import UsageError
from ntk_prefix.peft.base import AdapterConfig, AdapterParam, Host, gather_rows
from ntk_prefix.typing import Array, Float

__all__ = ["LoraConfig", "LoraLinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """``x W + (alpha / r) x A B`` in place of ``x W``: ``r (in + out)`` weights a matrix.

    Args:
        target: which linear maps; query and value by default, as in the LoRA paper and in peft.
        r: rank.
        alpha: numerator of the scale; ``r`` if None, a scale of 1.
        use_rslora: scale by ``alpha / sqrt(r)`` instead.

    Source: Hu et al., arXiv 2106.09685; A uniform in ``+-1/sqrt(in)``, B zero, as peft starts them.
    """

    method: ClassVar[str] = "lora"
    target: str = r"\.attention\.(query|value)$"
    r: int = 8
    alpha: float | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty rank."""
        super().__post_init__()
        if self.r < 1:
            raise UsageError(f"expected r >= 1, got {self.r}")

    @property
    def numerator(self) -> float:
        """``alpha``, or what stands for it."""
        return self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What ``A B`` is multiplied by."""
        return self.numerator / (math.sqrt(self.r) if self.use_rslora else self.r)

    def hosts(self, module: nnx.Module) -> bool:
        """Linear maps, also those that host other LoRA adapters."""
        return isinstance(module, (nnx.Linear, LoraLinear))

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Module:
        """Wrap the linear map, or add to the wrapper that is there."""
        assert isinstance(module, (nnx.Linear, LoraLinear))
        host = module if isinstance(module, LoraLinear) else LoraLinear(module)
        host.add(name, _Factors(host.base.in_features, host.base.out_features, self, rngs))
        return host


class _Factors(nnx.Module):
    def __init__(self, features_in: int, features_out: int, config: LoraConfig, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(features_in)
        self.a = AdapterParam(
            jax.random.uniform(rngs.params(), (features_in, config.r), jnp.float32, minval=-bound, maxval=bound)
        )
        self.b = AdapterParam(jnp.zeros((config.r, features_out)))
        self.scale = config.scale


class LoraLinear(Host):
    """A frozen linear map and its low-rank additions."""

    def __init__(self, base: nnx.Linear):
        super().__init__()
        self.base = base

    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T E"]:
        """Return ``base(x)`` plus the addition of the active adapter, or of each row's own."""
        output = self.base(x)
        if self.rows is not None:
            hosted = [self.adapters[name] for name in self.names]
            a = gather_rows([factors.a[...] for factors in hosted], self.rows)
            b = gather_rows([factors.scale * factors.b[...] for factors in hosted], self.rows)
            addition = jnp.einsum("b...d,bdr->b...r", x, a.astype(x.dtype))
            return output + jnp.einsum("b...r,bre->b...e", addition, b.astype(x.dtype)).astype(output.dtype)
        factors = self.current()
        if factors is None:
            return output
        addition = (x @ factors.a[...].astype(x.dtype)) @ (factors.scale * factors.b[...]).astype(x.dtype)
        return output + addition.astype(output.dtype)

    def merge(self) -> nnx.Linear:
        """Return one linear map that computes what this one does now: ``W + scale A B``, summed in float32."""
        factors = self.current()
        if factors is not None:
            addition = factors.scale * (factors.a[...] @ factors.b[...])
            self.base.kernel[...] = (self.base.kernel[...] + addition).astype(self.base.kernel.dtype)
        return self.base
