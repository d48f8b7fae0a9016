"""Llama: grouped-query attention with rotary positions, RMSNorm, gated SiLU; a cache for generation.

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
from ntk_prefix.checks import UsageError, expected
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
)
from ntk_prefix.models.cross_entropy import weighted_cross_entropy
from ntk_prefix.models.rotary import Factor, Rope, rope_fields
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["Llama", "LlamaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(BackboneConfig):
    """Sizes of a Llama; the names and defaults are those of Hugging Face's config.json.

    ``num_key_value_heads`` and ``head_dim`` follow from the others where they are 0. ``rope_factors`` [H / 2] is ours: what
    each rotary frequency is divided by, one after the other (Hugging Face's ``rope_scaling``, GGUF's ``rope_freqs``); all
    by 1 if it is empty.

    Raises:
        UsageError: a field of a wrong type or out of its bounds, key-value heads that do not divide the query heads, an
            odd head dimension, or another number of rotary factors.
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

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, or rotary positions are scaled in a way that is not built
                here.
        """
        plain = cls(**known_fields(cls, config))
        # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it
        if config.get("partial_rotary_factor") not in (None, 1):
            raise expected("partial_rotary_factor", "1: all of a head is turned here", config["partial_rotary_factor"])
        settings = config.get("rope_parameters") or config.get("rope_scaling")
        rope = rope_fields(settings, plain.rope, plain.max_position_embeddings)
        return dataclasses.replace(
            plain,
            rope_theta=rope.theta,
            rope_factors=rope.factors,
            rope_attention_factor=rope.scaling,
            rope_dynamic_factor=0.0 if rope.dynamic is None else rope.dynamic[0],
        )

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


def _keep_dtypes(arrays: Any, **_: Any) -> Any:
    """Leave a norm's scale in float32 beside narrower inputs. A function of the module: models of one shape share it."""
    return arrays


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
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "sequence-classification")
    pooling: Pooling = "last"

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, causal_lm: bool = True, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        norm = functools.partial(
            nnx.RMSNorm,
            config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=self.dtype,
            promote_dtype=_keep_dtypes,
            rngs=rngs,
        )
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
                    kind=AttentionKind(
                        use_bias=config.attention_bias, use_out_bias=config.attention_bias, rope=config.rope
                    ),
                    dtype=self.dtype,
                    rngs=rngs,
                ),
                Mlp(config, gated=True, use_bias=config.mlp_bias, dtype=self.dtype, rngs=rngs),
                norm,
            )
            for _ in range(config.num_hidden_layers)
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
                S = T, or the cache's length with a cache. Positions count tokens only, so padding on the left
                changes nothing.
            cache: from :meth:`empty_cache`; these tokens are written at ``start`` and see all tokens before them.
            start: where in the cache.
            position_offset: added to the positions, on top of the model's own ``position_offset``; a number, or
                one per row.

        Raises:
            UsageError: ids that the model has not, or a mask that does not fit.
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
        seen = length if cache is None else cache[0].key.shape[1]
        check_tokens(input_ids, attention_mask, self.config.vocab_size, seen)
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
        return _logits(self._output_map(), hidden)

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
            lambda weights, hidden: _logits(nnx.merge(graph, weights), hidden),
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
        """Make a cache of ``length`` tokens for ``batch`` rows."""
        zeros = jnp.zeros((batch, length, self.config.num_key_value_heads, self.config.head_dim), self.dtype)
        return tuple(KeyValueCache(zeros, zeros) for _ in self.layers)


def _logits(output_map: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    accumulate = accumulation_dtype(hidden.dtype)
    if not isinstance(output_map, nnx.Embed):
        return output_map(hidden).astype(accumulate)
    table = output_map.embedding[...].astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=accumulate)
