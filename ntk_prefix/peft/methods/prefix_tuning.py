"""Prefix tuning (P-Tuning V2): trained keys and values before those of every attention layer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from msgspec import Meta

from ntk_prefix.attention import prefix_attention, softmax_attention
from ntk_prefix.checks import check_non_negative, expected
from ntk_prefix.models.attention import AttentionCore, AttentionOptions
from ntk_prefix.peft.base import LARGEST, Adapter, AdapterConfig, AdapterParam, Host, gather_rows, targets
from ntk_prefix.peft.names import Fields, Names
from ntk_prefix.peft.sites import AttentionSite, attention_site, attention_sites
from ntk_prefix.typing import Array, Float

__all__ = ["PrefixCore", "PrefixTuningConfig", "Tokens", "host_core"]

logger = logging.getLogger(__name__)

PARTS = ("prefix_key", "prefix_value")
"""What the two halves of a layer's prefix are called, in the order in which peft puts them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields:
    """Hugging Face's fields of a prefix; those of the model it is for are checked by the tensor's shape."""

    num_virtual_tokens: Annotated[int, Meta(ge=1, le=LARGEST)]
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    encoder_hidden_size: int | None = None
    num_transformer_submodules: int | None = None
    prefix_projection: bool = False
    init_weights: bool | None = None
    shift_positions: bool = True


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
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    target: str = ""
    num_tokens: int = 16
    init_scale: float = 0.02
    shift_positions: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty prefix."""
        super().__post_init__()
        if self.num_tokens < 1:
            raise expected("num_tokens", "at least 1", self.num_tokens)
        check_non_negative("init_scale", self.init_scale)

    @property
    def position_shift(self) -> int:
        """``num_tokens`` where ``shift_positions`` says so."""
        return self.num_tokens if self.shift_positions else 0

    @property
    def unmixable(self) -> str | None:
        """One batch has one numbering of its tokens."""
        return "leave positions alone, so shift_positions=False" if self.shift_positions else None

    @classmethod
    def to_hugging_face(
        cls, chosen: Sequence[AdapterConfig], model: Any, names: Names, tensors: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Return Hugging Face's fields, and all prefixes in one array, if every attention layer has one."""
        layers = attention_sites(model)
        config = chosen[0]
        if len(chosen) > 1 or set(targets(model, config)) != {path for path, _ in layers}:
            return None
        assert isinstance(config, PrefixTuningConfig)
        layer = layers[0][1]
        fields: dict[str, Any] = {
            "peft_type": cls.peft_type,
            "num_virtual_tokens": config.num_tokens,
            "num_layers": len(layers),
            "num_attention_heads": layer.num_key_heads,
            "token_dim": layer.num_key_heads * layer.head_dim,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }
        if not config.shift_positions:
            logger.warning("trained with shift_positions=False: Hugging Face's models shift positions by the prefix")
            fields["shift_positions"] = False
        _warn_of_windows(layers, config.num_tokens)
        # [M, layers, key and value, K, H], flat but for M
        keys = [f"{names.module(path)}.{part}" for path, _ in layers for part in PARTS]
        whole = jnp.stack([tensors[key] for key in keys], axis=1)
        # without a module that wraps the model, a head is one step nearer
        heads = {names.key(key).replace(".model.", ".", 1): tensors[key] for key in tensors if key not in keys}
        return fields, {"prompt_embeddings": whole.reshape(len(whole), -1), **heads}

    @classmethod
    def from_hugging_face(
        cls, fields: Fields, model: Any, names: Names, tensors: dict[str, np.ndarray]
    ) -> tuple[list[AdapterConfig], dict[str, np.ndarray]]:
        """Return the configuration of a prefix in all layers, and its tensors layer by layer."""
        given = fields.read(_Fields)
        if given.num_transformer_submodules not in (None, 1):
            raise expected(fields.file, "num_transformer_submodules 1", "an adapter of an encoder and a decoder")
        layers, tokens = attention_sites(model), given.num_virtual_tokens
        width = sum(2 * layer.num_key_heads * layer.head_dim for _, layer in layers)
        whole = tensors.get("prompt_embeddings")
        if whole is None or whole.shape != (tokens, width):
            raise expected(
                fields.file, f"prompt_embeddings of shape {(tokens, width)}, [tokens, layers * 2 * key heads * head dim] "
                "of this model", None if whole is None else whole.shape, "The adapter is of another model, or saved with a "
                "projection (prefix_projection) that was not multiplied in",
            )  # fmt: skip
        parts = whole.reshape(tokens, len(layers), 2, layers[0][1].num_key_heads, layers[0][1].head_dim)
        unpacked = {key: value for key, value in tensors.items() if key != "prompt_embeddings"}
        for index, (path, _) in enumerate(layers):
            for part, name in enumerate(PARTS):
                unpacked[f"{names.module(path)}.{name}"] = parts[:, index, part]
        _warn_of_windows(layers, tokens)
        return [cls(num_tokens=tokens, shift_positions=given.shift_positions)], unpacked

    def hosts(self, module: nnx.Module) -> bool:
        """Attention layers."""
        return attention_site(module) is not None

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Replace the layer's core, or add to the one that is there."""
        site = attention_site(module)
        assert site is not None
        host_core(site, PrefixCore).add(name, Tokens(site.num_key_heads, site.head_dim, self, rngs))
        return module


def _warn_of_windows(layers: Sequence[tuple[str, AttentionSite]], tokens: int) -> None:
    """Say where Hugging Face's prefix, which lies in the cache, moves out of a layer's window; here it is always seen."""
    windows = [getattr(getattr(layer, "kind", None), "window", None) for _, layer in layers]
    if known := [window for window in windows if window is not None]:
        logger.warning(
            "prefix of %d tokens in layers with a window of %d: the same as peft's up to token %d of a text; beyond it, "
            "peft's window leaves the prefix behind, and here every token sees all of it",
            tokens,
            min(known),
            max(min(known) - tokens, 0),
        )


Core = TypeVar("Core", bound=Host)


def host_core(layer: AttentionSite, kind: type[Core]) -> Core:
    """Return the layer's core of this kind, put in place of a plain one if need be.

    Raises:
        ValueError: another method has the core.
    """
    if type(layer.core) is AttentionCore:
        layer.core = kind()  # type: ignore[assignment]
    if not isinstance(layer.core, kind):
        raise expected(
            "configs",
            f"an attention core that is free or a {kind.__name__}",
            type(layer.core).__name__,
            "Two methods that replace attention cannot share a layer: give one a target without it",
        )
    return layer.core


class Tokens(Adapter):
    """The keys and values of one layer."""

    file_names: ClassVar = dict(zip(("key", "value"), PARTS, strict=True))

    def __init__(self, heads: int, head_dim: int, config: PrefixTuningConfig, rngs: nnx.Rngs):
        shape = (config.num_tokens, heads, head_dim)
        self.key = AdapterParam(config.init_scale * jax.random.normal(rngs.params(), shape))
        self.value = AdapterParam(config.init_scale * jax.random.normal(rngs.params(), shape))


class PrefixCore(Host, AttentionCore):
    """Exact attention over a trained prefix and the layer's own keys."""

    unmergeable: ClassVar[str | None] = "what trained tokens add is a nonlinear function of the query"

    def bare(self) -> AttentionCore:
        """Return a plain core."""
        return AttentionCore()

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        """Return :func:`~ntk_prefix.attention.prefix_attention`; every query sees the whole prefix."""
        tokens = self.current()
        if self.rows is not None:
            rows = self.rows_of(len(query))
            hosted = [self.adapters[name] for name in self.names]
            prefix_key = gather_rows([t.key[...] for t in hosted], rows).astype(key.dtype)
            prefix_value = gather_rows([t.value[...] for t in hosted], rows).astype(value.dtype)
            output = prefix_attention(query, key, value, prefix_key, prefix_value, **options)
            # keys of zeros are still seen, so rows without an adapter need attention without a prefix
            plain = softmax_attention(query, key, value, **options)
            return jnp.where((rows < 0)[:, None, None, None], plain, output)
        if tokens is None:
            return softmax_attention(query, key, value, **options)
        prefix_key, prefix_value = tokens.key[...].astype(key.dtype), tokens.value[...].astype(value.dtype)
        return prefix_attention(query, key, value, prefix_key, prefix_value, **options)
