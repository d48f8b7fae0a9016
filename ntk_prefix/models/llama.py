"""Llama and its relatives: grouped-query attention with rotary positions, RMSNorm, a gated MLP; a cache for generation.

What the families differ in are fields of the config. A family is a file in :mod:`ntk_prefix.models.families`, which says
what its config.json means in these fields, and a line in :data:`ntk_prefix.models.loading.MODELS`.

Source: arXiv 2302.13971 and 2307.09288 (grouped queries); the layout and the names are those of Hugging Face's
``llama``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ntk_prefix import sharding
from ntk_prefix.checks import UsageError, check_rngs, expected
from ntk_prefix.models.attention import AttentionKind, AttentionLayer, KeyValueCache
from ntk_prefix.models.backbone import (
    Backbone,
    BackboneConfig,
    Epsilon,
    Mlp,
    Output,
    Pooling,
    Size,
    TransformerLayer,
    check_tokens,
    embedded,
    known_fields,
    offset_extremes,
)
from ntk_prefix.models.cross_entropy import weighted_cross_entropy
from ntk_prefix.models.elementwise import rms_norm
from ntk_prefix.models.rotary import Factor, Rope, rope_fields, warn_beyond
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["Llama", "LlamaConfig"]


SLIDING, FULL = "sliding_attention", "full_attention"
"""What Hugging Face calls layers with a window, and without one."""

_WHAT_FAMILIES_ADD = frozenset(
    (
        "sliding_window", "layer_types", "no_rope_layers", "local_rope_theta", "qkv_bias", "qk_norm", "query_pre_attn_scalar",
        "attn_logit_softcapping", "final_logit_softcapping", "update_norms", "norm_offset", "scale_embeddings",
    )
)  # fmt: skip
"""Fields that a file may speak of only where its family has them: Hugging Face's other models pass over them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(BackboneConfig):
    """Sizes of a Llama; the names and defaults are those of Hugging Face's config.json.

    ``num_key_value_heads`` and ``head_dim`` follow from the others where they are 0. ``rope_factors`` [H / 2] is ours: what
    each rotary frequency is divided by, one after the other (Hugging Face's ``rope_scaling``, GGUF's ``rope_freqs``); all
    by 1 if it is empty. ``rope_attention_factor`` scales cosines and sines; ``rope_dynamic_factor`` lets the base grow
    with the text, not at 0: see :class:`~ntk_prefix.models.rotary.Rope`.

    What families add, ours unless Hugging Face has a word for it:

    =========================== ======================================================================================
    sliding_window              tokens that a layer of type "sliding_attention" sees; all if None
    layer_types                 of each layer, "sliding_attention" or "full_attention"; empty is the family's own pattern
    no_rope_layers              0 for each layer that leaves positions alone; empty is the family's own pattern
    local_rope_theta            base of the layers with a window, unscaled; the others' if None
    qkv_bias                    of query, key and value alone; ``attention_bias`` if None
    qk_norm                     an RMSNorm of each head's queries and keys
    query_pre_attn_scalar       scores are scaled by its -1/2 power; ``head_dim`` if None
    attn_logit_softcapping      of scores; none if None
    final_logit_softcapping     of logits; none if None
    update_norms                norms after attention and MLP too
    norm_offset                 what is added to the weights of norms
    scale_embeddings            multiply embeddings by sqrt(D)
    =========================== ======================================================================================

    Raises:
        UsageError: a field of a wrong type or out of its bounds, key-value heads that do not divide the query heads, an
            odd head dimension, another number of rotary factors, or layers of which nothing or something unknown is said.
    """

    vocab_size: Size
    hidden_act: str = "silu"
    num_key_value_heads: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    head_dim: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Factor = 10000.0
    rope_factors: tuple[Factor, ...] = ()
    rope_attention_factor: Factor = 1.0
    rope_dynamic_factor: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: Size | None = None
    layer_types: tuple[str, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    local_rope_theta: Factor | None = None
    qkv_bias: bool | None = None
    qk_norm: bool = False
    query_pre_attn_scalar: Factor | None = None
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None
    update_norms: bool = False
    norm_offset: float = 0.0
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise expected(
                "num_key_value_heads",
                f"a divisor of the {self.num_attention_heads} query heads",
                self.num_key_value_heads,
            )
        if self.head_dim % 2:
            raise expected("head_dim", "an even number", f"{self.head_dim}: rotary positions turn pairs")
        if len(self.rope_factors) not in (0, self.head_dim // 2):
            raise expected(
                "rope_factors", f"one for each of the {self.head_dim // 2} frequencies", len(self.rope_factors)
            )
        for name in ("layer_types", "no_rope_layers"):
            if 0 < len(given := getattr(self, name)) < self.num_hidden_layers:
                raise expected(name, f"one for each of the {self.num_hidden_layers} layers", len(given))
        if unknown := set(self.layer_types) - {SLIDING, FULL}:
            raise expected("layer_types", f"{SLIDING} and {FULL}", sorted(unknown), "Other attention is not built here")

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, or rotary positions are scaled in a way that is not built
                here.
        """
        fields = cls.translated(config)
        given = known_fields(cls, fields)
        # a null says more than a default
        given |= {name: None for name in _WHAT_FAMILIES_ADD if name in fields and fields[name] is None}
        if fields.get("num_key_value_heads", 0) is None:
            given["num_key_value_heads"] = 0  # as many as query heads, whatever a family's default is
        plain = cls(**given)
        # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it
        if fields.get("partial_rotary_factor") not in (None, 1):
            raise expected("partial_rotary_factor", "1: all of a head is turned here", fields["partial_rotary_factor"])
        settings = fields.get("rope_parameters") or fields.get("rope_scaling")
        rope = rope_fields(settings, plain.rope, plain.max_position_embeddings)
        return dataclasses.replace(
            plain,
            rope_theta=rope.theta,
            rope_factors=rope.factors,
            rope_attention_factor=rope.scaling,
            rope_dynamic_factor=0.0 if rope.dynamic is None else rope.dynamic[0],
        )

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json by the names of these fields; a family says here what its own words mean.

        Raises:
            UsageError: something that changes what the model computes and is not built here.
        """
        if config.get("use_bidirectional_attention"):
            raise expected("use_bidirectional_attention", "false: a decoder", config["use_bidirectional_attention"])
        return {name: value for name, value in config.items() if name not in _WHAT_FAMILIES_ADD}

    def pattern(self) -> tuple[str, ...]:
        """Return the types of the layers where ``layer_types`` says nothing: a window in all, if there is one."""
        return (FULL if self.sliding_window is None else SLIDING,) * self.num_hidden_layers

    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Return what the layers differ in, first layer first."""
        local = self.rope
        if self.local_rope_theta is not None:
            local = Rope(head_dim=self.head_dim, theta=self.local_rope_theta)
        turned = self.no_rope_layers or (1,) * self.num_hidden_layers
        own = self.query_pre_attn_scalar
        kinds = []
        for kind, turns in zip((self.layer_types or self.pattern())[: self.num_hidden_layers], turned, strict=False):
            near = kind == SLIDING and self.sliding_window is not None
            kinds.append(
                AttentionKind(
                    use_bias=self.attention_bias if self.qkv_bias is None else self.qkv_bias,
                    use_out_bias=self.attention_bias,
                    rope=None if not turns else local if kind == SLIDING else self.rope,
                    window=self.sliding_window if near else None,
                    scale=None if own in (None, self.head_dim) else own**-0.5,
                    soft_cap=self.attn_logit_softcapping,
                )
            )
        return tuple(kinds)

    @property
    def rope(self) -> Rope:
        """How positions turn heads."""
        return Rope(
            head_dim=self.head_dim,
            theta=self.rope_theta,
            factors=self.rope_factors,
            scaling=self.rope_attention_factor,
            dynamic=(self.rope_dynamic_factor, self.max_position_embeddings) if self.rope_dynamic_factor else None,
        )

    def frequencies(self) -> np.ndarray:
        """Return the angle by which each pair of a head turns from one position to the next, [H / 2] in float64."""
        return self.rope.frequencies()


class Llama(Backbone):
    """A Llama decoder: ids [B, T] -> hidden states [B, T, D] and, with ``causal_lm``, logits [B, T, V].

    Args:
        config: the sizes.
        causal_lm: compute logits, with the embeddings' table if the config ties them.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    encoder: ClassVar[bool] = False
    hugging_face_names: ClassVar[dict[str, str]] = {
        "embeddings": "model.embed_tokens",
        "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "layers.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
        "layers.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
        "layers.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
        "layers.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
        "layers.{i}.attention.query_norm": "model.layers.{i}.self_attn.q_norm",
        "layers.{i}.attention.key_norm": "model.layers.{i}.self_attn.k_norm",
        "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
        "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
    }
    hugging_face_prefix: ClassVar[str] = "model."
    hugging_face_ignored: ClassVar[str] = (
        r"(score\.(weight|bias)|lm_head\.weight|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq)$"
    )
    hugging_face_head: ClassVar[str | None] = "score"
    hugging_face_head_bias: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "sequence-classification")
    pooling: Pooling = "last"

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, causal_lm: bool = True, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        check_rngs(rngs)
        make = functools.partial(
            rms_norm, epsilon=config.rms_norm_eps, dtype=self.dtype, rngs=rngs, offset=config.norm_offset
        )
        norm, head_norm = make(config.hidden_size), make(config.head_dim) if config.qk_norm else None
        self.causal_lm = causal_lm
        # no dtype: nnx.Embed would convert its whole table in every step
        self.embeddings = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List(
            TransformerLayer(
                AttentionLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    num_key_heads=config.num_key_value_heads,
                    head_dim=config.head_dim,
                    kind=kind,
                    head_norm=head_norm,
                    dtype=self.dtype,
                    rngs=rngs,
                ),
                Mlp(config, gated=True, use_bias=config.mlp_bias, dtype=self.dtype, rngs=rngs),
                norm,
                update_norms=config.update_norms,
            )
            for kind in config.attention_kinds()
        )
        self.final_norm = norm()
        self.lm_head = (
            nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, dtype=self.dtype, rngs=rngs)
            if causal_lm and not config.tie_word_embeddings
            else None
        )

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | Bool[Array, "B S"] | None = None,
        cache: tuple[KeyValueCache, ...] | None = None,
        start: Int[Array, ""] | int = 0,
        position_offset: Int[Array, " #B"] | Int[Array, ""] | int = 0,
    ) -> Output:
        """Decode a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S], nonzero or True at tokens, zero at padding, on either side; all tokens if None.
                S = T, or with a cache the length of the text that it is for. Positions count tokens only, so padding on
                the left changes nothing.
            cache: from :meth:`empty_cache`; these tokens are written at ``start`` and see all tokens before them.
            start: where in the cache.
            position_offset: added to the positions, on top of the model's own ``position_offset``; a number, or
                one per row.

        Raises:
            UsageError: ids that the model has not, or a mask or an offset that does not fit.
        """
        x, cache = self.hidden(input_ids, attention_mask, cache, start, position_offset)
        return Output(last_hidden_state=x, logits=self.logits(x) if self.causal_lm else None, cache=cache)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | Bool[Array, "B S"] | None = None,
        cache: tuple[KeyValueCache, ...] | None = None,
        start: Int[Array, ""] | int = 0,
        position_offset: Int[Array, " #B"] | Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValueCache, ...] | None]:
        """Return what comes before the logits, and the cache; arguments as in :meth:`__call__`."""
        length = input_ids.shape[1]
        seen: int | None = length
        if cache is not None:
            # a ring does not say how long a text it is for
            whole = [
                c.key.shape[1]
                for c, layer in zip(cache, self.layers, strict=True)
                if layer.attention.kind.window is None
            ]
            seen = max(whole) if whole else None if attention_mask is None else attention_mask.shape[1]
        check_tokens(input_ids, attention_mask, self.config.vocab_size, seen)
        offset_extremes(position_offset, len(input_ids))
        # of a cache that is filled under jit, whoever made it knows how much of it is padding
        if isinstance(start, int) and (cache is None or not isinstance(attention_mask, jax.core.Tracer)):
            until = start + length
            written = None if attention_mask is None else attention_mask[:, :until]
            warn_beyond(self.config.max_position_embeddings, until, written, rope=self.config.rope)
        if attention_mask is None:
            mask = None
            positions = start + jnp.arange(length, dtype=jnp.int32)[None]
        else:
            mask = attention_mask.astype(bool)
            positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            positions = jax.lax.dynamic_slice_in_dim(positions, start, length, axis=1)
            mask = mask[:, None, None, :]
            if isinstance(start, int) and start == 0:
                mask = mask[..., :length]  # what is written now is all there is to see
        x = embedded(self.embeddings.embedding[...], input_ids).astype(self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x, cache = self.run_layers(
            x,
            cache,
            mask=mask,
            is_causal=True,
            rotary=self.rotary(self.positions(positions, position_offset)),
            start=start,
        )
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return next-token logits in float32; apply it to the positions that are wanted, the vocabulary is wide.

        Raises:
            ValueError: the model was made without ``causal_lm``.
        """
        return _logits(self._output_map(), hidden, self.config.final_logit_softcapping)

    def loss(
        self, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], coefficients: Float[Array, "B T"]
    ) -> Float[Array, ""]:
        """Return ``sum coefficient * cross entropy`` of next tokens, of which the logits are never there all at once.

        Args:
            hidden: [B, T, D], of :meth:`hidden`.
            labels: [B, T], what each position is to say; below 0 is nothing, for its coefficient is 0.
            coefficients: [B, T].

        Raises:
            ValueError: the model was made without ``causal_lm``.
        """
        graph, weights = nnx.split(self._output_map())
        # gathered once, and not for each part of the tokens
        weights = sharding.gathered("lm_head" if self.lm_head is not None else "embeddings", weights)
        return weighted_cross_entropy(
            lambda weights, hidden: _logits(nnx.merge(graph, weights), hidden, self.config.final_logit_softcapping),
            weights,
            hidden,
            jnp.maximum(labels, 0),
            coefficients,
            vocab_size=self.config.vocab_size,
        )

    def _output_map(self) -> Any:
        """Return what makes logits: a linear map, or the embeddings' table."""
        if not self.causal_lm:
            raise UsageError('expected a model made with causal_lm=True, got a bare one: task="causal-lm" makes it')
        return self.embeddings if self.lm_head is None else self.lm_head

    def empty_cache(self, batch: int, length: int) -> tuple[KeyValueCache, ...]:
        """Make a cache for texts of ``length`` tokens in ``batch`` rows; a layer with a window keeps no more than that."""

        def zeros(window: int | None) -> Array:
            slots = min(length, window or length)
            return jnp.zeros((batch, slots, self.config.num_key_value_heads, self.config.head_dim), self.dtype)

        # two arrays, not one twice: a cache may be donated
        windows = [layer.attention.kind.window for layer in self.layers]
        return tuple(KeyValueCache(zeros(window), zeros(window)) for window in windows)


def _logits(output_map: Any, hidden: Float[Array, "B T D"], soft_cap: float | None) -> Float[Array, "B T V"]:
    accumulate = accumulation_dtype(hidden.dtype)
    if isinstance(output_map, nnx.Embed):
        table = output_map.embedding[...].astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=accumulate)
    else:
        logits = output_map(hidden).astype(accumulate)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
