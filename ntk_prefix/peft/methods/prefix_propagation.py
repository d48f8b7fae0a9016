r"""Prefix propagation: trained rows that run through the layers with the text, attend to it and are attended to.

j rows of zeros are put before the tokens; before every layer l, ``H[:j] += P^l`` with P^l in R^{j x D}; the frozen
layer then runs on all j + T rows. In each layer a prefix is thus a query, a key and a value made of *one* trained
vector and of what the rows have read so far: half the weights of prefix tuning, whose keys and values are trained
apart and never see the input.

Attention over both kinds of rows is a convex combination, with ``s`` the prefix's share of a query's mass,

.. math::  \mathrm{softmax}([x; p]) = (1 - s)\,\mathrm{softmax}(q k_x) v_x + s\,\mathrm{softmax}(q k_p) v_p .

The *kernel form* puts one trained number in place of the share and any kernel in place of the second softmax,

.. math::  \mathrm{softmax}(q k_x) v_x + \alpha\, K_n(q, k_p) v_p ,

with K_n row-normalized; for ``exp`` and ``alpha = s / (1 - s)`` it is the first one, times ``1 - s``.

Source: Li et al., Prefix propagation, arXiv 2305.12086; defaults after its authors' code.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, ClassVar, Unpack

import flax.errors
import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.attention import softmax_attention
from ntk_prefix.checks import check_non_negative, expected
from ntk_prefix.models.attention import AttentionCore, AttentionLayer, AttentionOptions
from ntk_prefix.models.backbone import LeadingRows
from ntk_prefix.peft.base import Adapter, AdapterConfig, AdapterParam, Host
from ntk_prefix.peft.methods.prefix_tuning import PrefixCore, PrefixTuningConfig, Tokens, host_core
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["PrefixPropagationConfig", "kernel_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixPropagationConfig(AdapterConfig):
    """``num_prefix_tokens`` rows that propagate through an encoder: ``j n D`` weights for its n layers.

    Args:
        target: must be left empty: the rows run through all layers.
        num_prefix_tokens: j.
        dropout: of the trained rows while training, one mask a step.
        pool: what a classifier reads: "prefix" the first of the rows, "cls" the first token, "model" what the
            classifier reads anyway, such as the mean of the tokens.
        combine: let half of the tokens propagate and make the other half ordinary prefix tuning: ``3/2 j n D`` weights.
        kernel: None for one softmax over all rows, or the kernel form with "exp", "rbf" or "poly".
        alpha: the kernel form's start of the trained weight, one per head.
        lengthscale: of "rbf"; ``H^{1/4}`` if None, where its scores are those of "exp" with long keys damped.
        init_scale: standard deviation of the start.
    """

    method: ClassVar[str] = "prefix_propagation"
    num_prefix_tokens: int = 8
    dropout: float = 0.1
    pool: str = "prefix"
    combine: bool = False
    kernel: str | None = None
    alpha: float = 1.0
    lengthscale: float | None = None
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        super().__post_init__()
        if self.target:
            raise expected("target", "none", f"{self.target!r}: propagated rows run through all layers")
        if self.num_prefix_tokens < 1:
            raise expected("num_prefix_tokens", "at least 1", self.num_prefix_tokens)
        if not 0 <= self.dropout < 1:
            raise expected("dropout", "a fraction in [0, 1)", self.dropout)
        if self.pool not in ("prefix", "cls", "model"):
            raise expected("pool", '"prefix", "cls" or "model"', repr(self.pool))
        if self.kernel not in (None, "exp", "rbf", "poly"):
            raise expected("kernel", 'None, "exp", "rbf" or "poly"', repr(self.kernel))
        check_non_negative("init_scale", self.init_scale)
        if self.lengthscale is not None and not 1e-14 <= self.lengthscale <= 1e14:
            raise expected("lengthscale", "a number from 1e-14 to 1e14", self.lengthscale)
        if self.combine and self.kernel is not None:
            raise expected("combine", "kernel=None", "both: each has its own attention")
        if self.combine and self.num_prefix_tokens % 2:
            raise expected("combine", "an even num_prefix_tokens", self.num_prefix_tokens)

    @property
    def rows(self) -> int:
        """How many tokens propagate."""
        return self.num_prefix_tokens // 2 if self.combine else self.num_prefix_tokens

    @property
    def pooling(self) -> str | None:
        """What ``pool`` says."""
        return None if self.pool == "model" else self.pool

    @property
    def unmixable(self) -> str | None:
        """Rows that run through the layers have no row of a batch to belong to."""
        return "leave the rows alone"

    def hosts(self, module: nnx.Module) -> bool:
        """Return whether this is the place of an encoder's leading rows, or an attention layer where attention changes."""
        return isinstance(module, LeadingRows) or (
            isinstance(module, AttentionLayer) and (self.combine or self.kernel is not None)
        )

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Replace the leading rows, or the core of an attention layer.

        Raises:
            ValueError: a decoder, whose tokens a row before them could not see.
        """
        if isinstance(module, LeadingRows):
            host = module if isinstance(module, PropagatedRows) else PropagatedRows(module.num_layers, module.features)
            return host.add(name, _Rows(module.num_layers, module.features, self, rngs))
        assert isinstance(module, AttentionLayer)
        if self.combine:
            static = PrefixTuningConfig(num_tokens=self.rows, init_scale=self.init_scale)
            host_core(module, PrefixCore).add(name, Tokens(module.num_key_heads, module.head_dim, static, rngs))
        else:
            host_core(module, KernelCore).add(name, _Weight(module.num_heads, self))
        return module


class _Rows(Adapter):
    def __init__(self, layers: int, features: int, config: PrefixPropagationConfig, rngs: nnx.Rngs):
        start = jax.random.normal(rngs.params(), (layers, config.rows, features))
        self.rows = AdapterParam(config.init_scale * start)
        self.pool = config.pool
        dropout = nnx.Rngs(dropout=rngs.params())
        self.dropout = nnx.Dropout(config.dropout, deterministic=True, rngs=dropout) if config.dropout else None

    def __call__(self) -> Float[Array, "layers j D"]:
        """Return the rows, with dropout while the model trains; each call draws anew.

        In a trace that took this module's Variables from outside nothing can be counted: calls then draw what the count
        says, so whoever calls steps must number them, as :class:`ntk_prefix.training.Trainer` does.
        """
        if self.dropout is None or self.dropout.deterministic:
            return self.rows[...]
        stream = self.dropout.rngs
        dropped = self.dropout(self.rows[...], rngs=nnx.clone(stream))
        with contextlib.suppress(flax.errors.TraceContextError):
            stream.count[...] += 1
        return dropped


class PropagatedRows(Host, LeadingRows):
    """The trained rows of an encoder, all layers' in one place."""

    def __init__(self, num_layers: int, features: int):
        Host.__init__(self)
        LeadingRows.__init__(self, num_layers, features)

    def bare(self) -> LeadingRows:
        """Return the place of the rows, empty."""
        return LeadingRows(self.num_layers, self.features)

    def __call__(self) -> Float[Array, "layers j D"] | None:
        """Return P, with dropout while the model trains; None where no adapter is active."""
        own = self.current()
        return None if own is None else own()

    @property
    def pooling(self) -> str | None:
        """What the active adapter's configuration says; None where the classifier's own way is meant."""
        own = self.current()
        return None if own is None or own.pool == "model" else own.pool


class _Weight(Adapter):
    def __init__(self, heads: int, config: PrefixPropagationConfig):
        self.alpha = AdapterParam(jnp.full(heads, config.alpha))
        self.count, self.kernel, self.lengthscale = config.rows, config.kernel, config.lengthscale


class KernelCore(Host, AttentionCore):
    """The kernel form; the first rows of the keys are the prefix's."""

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
        """Return :func:`kernel_attention`; plain attention where no adapter is active.

        Raises:
            ValueError: causal, beside an adapter: no decoder hosts one.
        """
        own = self.current()
        if own is None:
            return softmax_attention(query, key, value, **options)
        if options.pop("is_causal", False):
            raise expected("is_causal", "False beside prefix propagation", "True: its prefix sees the text")
        j = own.count
        text: dict[str, Any] = dict(options)
        mask = text.pop("mask", None)
        return kernel_attention(
            query, key[:, j:], value[:, j:], key[:, :j], value[:, :j], own.alpha[...],
            kernel=own.kernel, lengthscale=own.lengthscale, mask=None if mask is None else mask[..., j:], **text,
        )  # fmt: skip


def kernel_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    prefix_key: Float[Array, "B M K H"],
    prefix_value: Float[Array, "B M K H"],
    alpha: Float[Array, "N"] | Float[Array, "B T N"],
    *,
    kernel: str = "exp",
    lengthscale: float | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    r"""Return ``softmax(q k_x / sqrt(H)) v_x + alpha K_n(q, k_p) v_p`` with K_n normalized to sum 1 over the prefix.

    ======== ==========================================
    kernel   K(q, p), before it is normalized
    ======== ==========================================
    exp      ``exp(q . p / sqrt(H))``
    rbf      ``exp(-|q - p|^2 / (2 lengthscale^2))``
    poly     ``(1 + q . p / sqrt(H))^2``
    ======== ==========================================

    Args:
        query: [B, T, N, H], not scaled.
        key, value: [B, S, K, H], the text's.
        prefix_key, prefix_value: [B, M, K, H].
        alpha: [N], or a number for each query, [B, T, N].
        kernel, lengthscale: as in the table; ``lengthscale`` is ``H^{1/4}`` if None.
        mask: [#B, #N, #T, #S], True where a query may see a key of the text; all see the prefix.
        options: what else is said of the text's scores.

    Raises:
        ValueError: an unknown kernel.

    Numerics: exp and rbf are softmax attention over the prefix (``|q|^2`` cancels in the rbf's sum to 1), in log
        space; poly is computed as it stands, in the accumulation dtype.

    Source: arXiv 2305.12086 (form); ``lengthscale`` and the offset 1 are ours.
    """
    own = softmax_attention(query, key, value, mask=mask, **options)
    head_dim = query.shape[-1]
    if kernel == "exp":
        other = softmax_attention(query, prefix_key, prefix_value)
    elif kernel == "rbf":
        square = head_dim**0.5 if lengthscale is None else lengthscale**2
        length = jnp.sum(prefix_key.astype(accumulation_dtype(query.dtype)) ** 2, axis=-1) / (2 * square)
        bias = -jnp.repeat(length.transpose(0, 2, 1), query.shape[2] // prefix_key.shape[2], axis=1)[:, :, None]
        other = softmax_attention(query, prefix_key, prefix_value, bias=bias, scale=1 / square)
    elif kernel == "poly":
        other = _polynomial(query, prefix_key, prefix_value)
    else:
        raise expected("kernel", '"exp", "rbf" or "poly"', repr(kernel))
    weight = alpha[None, None, :, None] if alpha.ndim == 1 else alpha[..., None]
    return own + (weight * other).astype(own.dtype)


def _polynomial(query: Any, key: Any, value: Any) -> Array:
    dtype = accumulation_dtype(query.dtype)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2).astype(dtype) for x in (key, value))
    weights = (1 + jnp.einsum("btnh,bmnh->bntm", query.astype(dtype), key) / query.shape[-1] ** 0.5) ** 2
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bntm,bmnh->btnh", weights / jnp.where(total == 0, 1, total), value).astype(query.dtype)
