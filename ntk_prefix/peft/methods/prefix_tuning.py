"""Prefix tuning (P-Tuning V2): trained keys and values before those of every attention layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.attention import prefix_attention, softmax_attention
from ntk_prefix.checks import UsageError
from ntk_prefix.models.attention import AttentionCore, AttentionLayer
from ntk_prefix.peft.base import AdapterConfig, AdapterParam, Host, gather_rows
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["PrefixCore", "PrefixTuningConfig", "Tokens", "host_core"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(AdapterConfig):
    """``num_tokens`` trained keys and values in front of every chosen attention layer's own: ``2 M K H`` weights each.

    Args:
        target: which attention layers.
        num_tokens: M.
        init_scale: standard deviation of the start; the tokens cannot start at the frozen model.
        shift_positions: count the prefix in the positions of the tokens, as Hugging Face models do. Off by
            default: a prefix is no text, and a shift moves pretrained positions.

    Source: Li and Liang, arXiv 2101.00190; Liu et al. (P-Tuning V2), arXiv 2110.07602; without a reparametrizing
    network, like peft's default.
    """

    method: ClassVar[str] = "prefix_tuning"
    target: str = r"\.attention$"
    num_tokens: int = 16
    init_scale: float = 0.02
    shift_positions: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty prefix."""
        super().__post_init__()
        if self.num_tokens < 1:
            raise UsageError(f"expected num_tokens >= 1, got {self.num_tokens}")

    def hosts(self, module: nnx.Module) -> bool:
        """Attention layers."""
        return isinstance(module, AttentionLayer)

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Module:
        """Replace the layer's core, or add to the one that is there."""
        assert isinstance(module, AttentionLayer)
        host_core(module, PrefixCore).add(name, Tokens(module.num_key_heads, module.head_dim, self, rngs))
        return module


Core = TypeVar("Core", bound=Host)


def host_core(layer: AttentionLayer, kind: type[Core]) -> Core:
    """Return the layer's core of this kind, put in place of a plain one if need be.

    Raises:
        ValueError: another method has the core.
    """
    if type(layer.core) is AttentionCore:
        layer.core = kind()  # type: ignore[assignment]
    if not isinstance(layer.core, kind):
        raise UsageError(
            f"expected an attention core that is free or a {kind.__name__}, got {type(layer.core).__name__}: "
            "two methods that replace attention cannot share a layer"
        )
    return layer.core


class Tokens(nnx.Module):
    """The keys and values of one layer."""

    def __init__(self, heads: int, head_dim: int, config: PrefixTuningConfig, rngs: nnx.Rngs):
        shape = (config.num_tokens, heads, head_dim)
        self.key = AdapterParam(config.init_scale * jax.random.normal(rngs.params(), shape))
        self.value = AdapterParam(config.init_scale * jax.random.normal(rngs.params(), shape))


class PrefixCore(Host, AttentionCore):
    """Exact attention over a trained prefix and the layer's own keys."""

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "B T N H"]:
        """Return :func:`~ntk_prefix.attention.prefix_attention`; every query sees the whole prefix."""
        tokens = self.current()
        if self.rows is not None:
            hosted = [self.adapters[name] for name in self.names]
            prefix_key = gather_rows([t.key[...] for t in hosted], self.rows).astype(key.dtype)
            prefix_value = gather_rows([t.value[...] for t in hosted], self.rows).astype(value.dtype)
            output = prefix_attention(query, key, value, prefix_key, prefix_value, mask=mask, is_causal=is_causal)
            # keys of zeros are still seen, so rows without an adapter need attention without a prefix
            plain = softmax_attention(query, key, value, mask=mask, is_causal=is_causal)
            return jnp.where((self.rows < 0)[:, None, None, None], plain, output)
        if tokens is None:
            return softmax_attention(query, key, value, mask=mask, is_causal=is_causal)
        prefix_key, prefix_value = tokens.key[...].astype(key.dtype), tokens.value[...].astype(value.dtype)
        return prefix_attention(query, key, value, prefix_key, prefix_value, mask=mask, is_causal=is_causal)
