"""Where a model attends: the places whose core an adapter can replace, in our models and in anybody's.

=================================  =======================================================================================
a place                            is found by
=================================  =======================================================================================
a layer of ntk_prefix.models       the hook that every such layer offers, and any module may: ``core``, an
or of your own                     :class:`~ntk_prefix.models.attention.AttentionCore` that it attends with, and its sizes
                                   ``num_heads``, ``num_key_heads``, ``head_dim``
``nnx.MultiHeadAttention``         its class; an ``attention_fn`` takes the place of Flax's own
=================================  =======================================================================================

Attention that is neither, in Linen or written by hand, calls :func:`attention_fn` (or ``ntk_attention`` itself) on a state
that the model holds as its own parameters.

A query that sees no key at all, a row of padding, is where the two differ: Flax gives it the mean of all values, attention
here zero, or the prefix alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.attention import ntk_attention
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.feature_maps import FeatureMap
from ntk_prefix.models.attention import AttentionCore
from ntk_prefix.peft.base import Host, dotted
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["AttentionSite", "FlaxCore", "attention_fn", "attention_site", "attention_sites", "released"]


_OF_NO_ACCOUNT = {
    "broadcast_dropout", "dropout_rng", "einsum", "einsum_dot_general", "force_fp32_for_softmax", "precision",
    "promote_dtype", "qk_attn_weights_einsum", "attn_weights_value_einsum",
}  # fmt: skip
"""What Flax may give an ``attention_fn`` and only says how to draw, to multiply or to round."""


@runtime_checkable
class AttentionSite(Protocol):
    """The hook: what a module that attends offers to adapters."""

    core: AttentionCore
    num_heads: int
    num_key_heads: int
    head_dim: int


def attention_site(module: Any) -> AttentionSite | None:
    """Return the hook of a module, None if it has none."""
    if isinstance(module, nnx.MultiHeadAttention):
        return _FlaxSite(module)
    return module if isinstance(module, AttentionSite) and isinstance(module.core, AttentionCore) else None


def attention_sites(model: Any) -> list[tuple[str, AttentionSite]]:
    """Return all places of a model with their dotted paths, first layer first."""
    found = [(path, site) for path, module in nnx.iter_modules(model) if (site := attention_site(module)) is not None]
    found.sort(key=lambda item: [int(part) for part in map(str, item[0]) if part.isdigit()])
    return [(dotted(path), site) for path, site in found]


class FlaxCore(nnx.Module):
    """An ``attention_fn`` of ``nnx.MultiHeadAttention`` with the hook; without an active adapter, what it replaced."""

    def __init__(self, replaced: Callable[..., Array]):
        self.replaced = replaced
        self.core = AttentionCore()

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K H"],
        **options: Any,
    ) -> Float[Array, "*B T N H"]:
        """Return attention by the core; options are those that Flax gives an ``attention_fn``.

        Raises:
            ValueError: dropout of attention's probabilities, or the probabilities themselves, are asked for.
        """
        idle = isinstance(self.core, Host) and self.core.rows is None and self.core.current() is None
        if idle or type(self.core) is AttentionCore:
            return self.replaced(query, key, value, **options)
        return _flax_call(self.core, query, key, value, **options)


class _FlaxSite:
    """The hook of an ``nnx.MultiHeadAttention``: its ``attention_fn`` changes with the core."""

    def __init__(self, module: nnx.MultiHeadAttention):
        self.module = module
        self.num_heads, self.num_key_heads = module.num_heads, module.num_kv_heads
        self.head_dim = module.head_dim

    @property
    def core(self) -> AttentionCore:
        """The core of its ``attention_fn``, a plain one where that is Flax's."""
        function = self.module.attention_fn
        return function.core if isinstance(function, FlaxCore) else AttentionCore()

    @core.setter
    def core(self, core: AttentionCore) -> None:
        function: Any = self.module.attention_fn
        if not isinstance(function, FlaxCore):
            if function is not nnx.dot_product_attention:
                raise expected(
                    "attention_fn", "Flax's own, nnx.dot_product_attention, whose place an adapter can take",
                    getattr(function, "__name__", function), "Call ntk_prefix.peft.attention_fn in it",
                )  # fmt: skip
            function = FlaxCore(function)
        function.core = core
        plain = type(core) is AttentionCore
        self.module.attention_fn = nnx.static(function.replaced) if plain else nnx.data(function)


def released(model: Any) -> None:
    """Give Flax's attention its own ``attention_fn`` back where no adapter is left in ours."""
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, nnx.MultiHeadAttention):
            site = _FlaxSite(module)
            if type(site.core) is AttentionCore and isinstance(module.attention_fn, FlaxCore):
                site.core = site.core


def attention_fn(
    z: Float[Array, "J R H"],
    k: Float[Array, "J R"],
    *,
    feature_map: str | FeatureMap = "elu1",
    mass: Literal["absolute", "relative"] = "absolute",
) -> Callable[..., Array]:
    """Return NTK-Attention as an ``attention_fn`` of Flax, Linen's and nnx's alike.

    For models that :func:`ntk_prefix.peft.apply` does not reach::

        z, k = self.param("z", zeros, (N, R, H)), self.param("k", zeros, (N, R))       # R = H for "elu1"
        x = nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=peft.attention_fn(z, k))(x)

    z and k of zeros are the frozen model. Train them alone (``optax.masked``, or ``optax.multi_transform``), and keep
    k >= 0.

    Args:
        z, k, feature_map, mass: as in :func:`ntk_prefix.ntk_attention`.

    Returns:
        A function of query [*B, T, N, H], key and value [*B, S, K, H] and what Flax gives beside them.

    Raises:
        ValueError: by the function: dropout of attention's probabilities, or the probabilities themselves, are asked for.
    """

    def attend(query: Array, key: Array, value: Array, **options: Any) -> Array:
        def core(query: Array, key: Array, value: Array, **known: Any) -> Array:
            return ntk_attention(query, key, value, z, k, feature_map=feature_map, mass=mass, **known)

        return _flax_call(core, query, key, value, **options)

    return attend


def _flax_call(
    core: Callable[..., Array],
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K H"],
    bias: Float[Array, "*#B #N #T #S"] | None = None,
    mask: Bool[Array, "*#B #N #T #S"] | Float[Array, "*#B #N #T #S"] | None = None,
    *,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    dtype: Any = None,
    module: Any = None,
    **rest: Any,
) -> Float[Array, "*B T N H"]:
    """Call a core as Flax calls an ``attention_fn``: any number of batch axes, masks of any dtype, one dtype for all."""
    if dropout_rate and not deterministic:
        raise expected(
            "dropout_rate", "0, or deterministic=True: attention with an adapter has no probabilities to drop",
            dropout_rate,
        )  # fmt: skip
    if module is not None:
        raise UsageError("sow_weights: expected False, got True. Attention with an adapter keeps no probabilities")
    if unknown := {name for name, x in rest.items() if x is not None} - _OF_NO_ACCOUNT:
        raise expected("attention_fn", "the arguments of Flax's attention", sorted(unknown))
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    batch = query.shape[:-3]

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[-3:])

    def over_batch(x: Array | None) -> Array | None:
        if x is None:
            return None
        if x.ndim <= 4 and len(batch) == 1:
            return x.reshape(*(1,) * (4 - x.ndim), *x.shape)
        return flat(jnp.broadcast_to(x, (*batch, *x.reshape(*(1,) * (3 - x.ndim), *x.shape).shape[-3:])))

    options: dict[str, Any] = {"bias": over_batch(bias), "mask": over_batch(mask)}
    if mask is not None:
        options["mask"] = options["mask"].astype(bool)  # Flax's masks are numbers unless they are asked for otherwise
    given = {name: x for name, x in options.items() if x is not None}
    if is_causal:
        given["is_causal"] = True
    output = core(*(flat(x.astype(dtype)) for x in (query, key, value)), **given)
    return output.reshape(query.shape)
