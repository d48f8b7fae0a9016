"""What the backbones share: their layers, how a stack of layers runs, and what a call returns.

Attribute names are the same in every backbone, so that one regular expression selects the same thing in all::

    embeddings...   layers.<i>.attention.{query,key,value,out}   layers.<i>.mlp.{up,down[,gate]}   final_norm
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from ntk_prefix.checks import UsageError, check_is_array, expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.models.attention import AttentionLayer, KeyValueCache
from ntk_prefix.models.elementwise import ACTIVATIONS
from ntk_prefix.models.formats import Checkpoint
from ntk_prefix.models.rotary import Rope, Rotary
from ntk_prefix.models.run import REMAT_POLICIES, Runnable, RunOptions
from ntk_prefix.models.scan import scan
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import check_placed, constrain, current_mesh, row_axes, row_shares, spec
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Epsilon",
    "Layers",
    "LeadingRows",
    "Mlp",
    "Output",
    "Pooling",
    "RunOptions",
    "Size",
    "TransformerLayer",
    "check_ids",
    "check_tokens",
    "embedded",
    "offset_extremes",
]

Pooling = Literal["mean", "cls", "last", "cls+mean", "cls+distillation"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Output(EqualByValue):
    """What a model returns; a pytree.

    Args:
        last_hidden_state: [B, T, D] in the computation's dtype, after the final norm.
        logits: [B, T, V] of a causal language model, [B, labels] of a classifier; None of a bare backbone.
        cache: one :class:`KeyValueCache` a layer, if one was handed in; else None.
        leading_states: [B, j, D], the rows that an adapter put before the tokens (:class:`LeadingRows`); else None.
    """

    # not annotated with shapes: JAX also rebuilds a pytree around things that are not arrays
    last_hidden_state: Any
    logits: Any = None
    cache: Any = None
    leading_states: Any = None


Layers = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, lt=1)]
"""What fields of a config may be. The bounds are far above any model's: what lies beyond them is a broken file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What every backbone is told; the names are those of Hugging Face's config.json.

    Raises:
        UsageError: a field of a wrong type or out of its bounds, heads that do not divide the features, or an unknown
            activation.
    """

    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        for name, value in _checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        if self.hidden_act not in ACTIVATIONS:
            raise expected("hidden_act", f"one of {sorted(ACTIVATIONS)}", repr(self.hidden_act))
        if not getattr(self, "head_dim", 0) and self.hidden_size % self.num_attention_heads:
            raise expected(
                "num_attention_heads",
                f"a divisor of hidden_size {self.hidden_size}",
                self.num_attention_heads,
            )


@functools.cache
def _schema(config_class: Any) -> dict[str, Any]:
    """Return the type of each field of a config, with its bounds."""
    return typing.get_type_hints(config_class, include_extras=True)


def _checked(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a config, in the type and within the bounds that it declares.

    Raises:
        UsageError: one that is not.
    """
    found = {}
    for name, kind in _schema(config_class).items():
        if name in values:
            value = values[name]
            try:
                found[name] = msgspec.convert(value.item() if isinstance(value, np.generic) else value, kind)
            except msgspec.ValidationError as error:
                wanted = str(error).removeprefix("Expected ").partition(", got")[0]
                raise expected(name, wanted, repr(value)[:80]) from None
    return found


def known_fields(config_class: type[BackboneConfig], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says about the fields of a config.

    Raises:
        UsageError: a value is missing, of a wrong type or out of its bounds.
    """
    fields = dataclasses.fields(config_class)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and config.get(f.name) is None]
    if missing:
        raise UsageError(f"expected {missing} for a {config_class.__name__}, got {sorted(config)[:40]}")
    return _checked(config_class, {f.name: config[f.name] for f in fields if config.get(f.name) is not None})


class Mlp(nnx.Module):
    """``down(act(up(x)))``, or gated, ``down(act(gate(x)) * up(x))``.

    Args:
        config: the backbone's.
        gated: with a third map.
        use_bias: of all maps.
        dtype: of the computation.
        rngs: for weights that a checkpoint will replace.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        gated: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(nnx.Linear, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.hidden_act = config.hidden_act
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.gate = linear(config.hidden_size, config.intermediate_size) if gated else None
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the layer's update."""
        activation = ACTIVATIONS[self.hidden_act]
        wide = activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x)
        return self.down(constrain(wide, "batch", None, "mlp"))


class TransformerLayer(nnx.Module):
    """Attention and an MLP, each with a residual connection and a norm.

    Before (``post_norm=False``) ``x + scale * f(norm(x))``; after ``norm(x + f(x))``, as in BERT; before and after each map
    ``x + norm(f(norm(x)))``, as in Gemma.

    Args:
        attention, mlp: the two maps.
        norm: makes a norm of [B, T, D].
        post_norm: where the norm stands.
        update_norms: norm the updates too.
        layer_scale: multiply the updates by learned vectors [D] (DINOv2).
    """

    def __init__(
        self,
        attention: AttentionLayer,
        mlp: Mlp,
        norm: Callable[[], nnx.Module],
        *,
        post_norm: bool = False,
        update_norms: bool = False,
        layer_scale: bool = False,
    ):
        self.attention = attention
        self.attention_norm = norm()
        self.mlp = mlp
        self.mlp_norm = norm()
        self.post_norm = post_norm
        self.attention_update_norm = norm() if update_norms else None
        self.mlp_update_norm = norm() if update_norms else None
        features = attention.out.out_features
        self.attention_scale = nnx.Param(jnp.ones(features, jnp.float32)) if layer_scale else None
        self.mlp_scale = nnx.Param(jnp.ones(features, jnp.float32)) if layer_scale else None

    def __call__(self, x: Float[Array, "B T D"], **options: Any) -> tuple[Float[Array, "B T D"], KeyValueCache | None]:
        """Return the layer's output and its cache; options are those of :class:`AttentionLayer`."""
        attention_norm, mlp_norm = (cast(Callable[[Array], Array], n) for n in (self.attention_norm, self.mlp_norm))
        if self.post_norm:
            update, cache = self.attention(x, **options)
            x = attention_norm(x + update)
            return mlp_norm(x + self.mlp(x)), cache
        update, cache = self.attention(attention_norm(x), **options)
        x = x + _scaled(update, self.attention_update_norm, self.attention_scale)
        return x + _scaled(self.mlp(mlp_norm(x)), self.mlp_update_norm, self.mlp_scale), cache


def _scaled(update: Float[Array, "B T D"], norm: Any, scale: nnx.Param | None) -> Float[Array, "B T D"]:
    update = update if norm is None else norm(update)
    return update if scale is None else update * scale[...].astype(update.dtype)[None, None]


class LeadingRows(nnx.Module):
    """What stands before the tokens of an encoder in every layer: nothing, until an adapter replaces this.

    Args:
        num_layers, features: of the encoder.
    """

    def __init__(self, num_layers: int, features: int):
        self.num_layers, self.features = num_layers, features

    def __call__(self) -> Float[Array, "layers j D"] | None:
        """Return what is added to the j leading rows before each layer; the rows start at zero. None: no rows."""
        return None

    @property
    def pooling(self) -> str | None:
        """How a classifier reads the sequence instead of its own way: "prefix" is the first leading row."""
        return None


def embedded(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the rows of a vocabulary's table.

    On a mesh each device of "fsdp" looks up its share of the features, for the rows of all of them; then features are
    exchanged for rows. That moves ``B T D`` numbers once, where gathering the table would be ``V D``. Where "tensor" divides
    the vocabulary, features are exchanged for it before, and gathered after.
    """
    mesh = current_mesh()
    shares = 1 if mesh is None else mesh.shape.get("fsdp", 1)
    if mesh is None or shares == 1 or table.shape[1] % (shares * mesh.shape.get("tensor", 1)):
        return jnp.take(table, ids, axis=0)
    place = spec(mesh, ("vocab", "embed"), table.shape)
    if place[1] is None or ids.shape[0] % row_shares(mesh):
        return jnp.take(table, ids, axis=0)
    others = tuple(axis for axis in row_axes(mesh) if axis != "fsdp")

    def own(table: Array, ids: Array) -> Array:
        if place[0] is not None:
            table = jax.lax.all_to_all(table, "tensor", 1, 0, tiled=True)
        found = jnp.take(table, ids, axis=0)
        if place[0] is not None:
            found = jax.lax.all_gather(found, "tensor", axis=2, tiled=True)
        return jax.lax.all_to_all(found, "fsdp", 0, 2, tiled=True)

    # what is gathered over "tensor" is the same there, which cannot be seen from the types
    exchange = jax.shard_map(own, in_specs=(place, P(others)), out_specs=P((*others, "fsdp")), check_vma=False)
    return exchange(table, ids)


def check_tokens(input_ids: Any, attention_mask: Any, vocab_size: int, seen: int | None = None) -> None:
    """Refuse token ids that a model has not, and masks that would be read as something else.

    Shapes and dtypes are checked always, ids only outside of ``jax.jit`` (a tracer has no values), where one beyond the
    vocabulary would be NaN and a negative one another token.

    Args:
        input_ids: [B, T].
        attention_mask: [B, seen] or None.
        vocab_size: of the model.
        seen: length of the mask; T if None.

    Raises:
        UsageError: naming the argument.
    """
    check_ids("input_ids", input_ids, vocab_size, "the model's vocabulary", "Is the tokenizer this model's own")
    if attention_mask is None:
        return
    check_is_array("attention_mask", attention_mask)
    wanted = (input_ids.shape[0], input_ids.shape[1] if seen is None else seen)
    if attention_mask.shape != wanted:
        raise expected(
            "attention_mask",
            f"{list(wanted)}, the ids' shape or, with a cache, that of its slots",
            attention_mask.shape,
        )
    if not (jnp.issubdtype(attention_mask.dtype, jnp.integer) or attention_mask.dtype == bool):
        hint = "A mask of zeros and ones: mask.astype(bool); one that is added to scores: mask > -1"
        raise expected("attention_mask", "integers or booleans, nonzero at tokens", attention_mask.dtype, hint)


def check_ids(name: str, ids: Any, count: int, of: str, hint: str = "") -> None:
    """Refuse anything but [B, T] whole numbers from 0 to ``count - 1``, the rows of a table; of a tracer the shape alone.

    Args:
        name: of the argument.
        ids: what came.
        count: rows of the table.
        of: whose they are, in words.
        hint: what to do about a number that is none of them.

    Raises:
        UsageError: naming the argument; no token, or no row, too.
    """
    check_is_array(name, ids)
    check_placed(name, ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise expected(name, "integers [B, T]", f"{ids.dtype} {ids.shape}")
    if 0 in ids.shape:
        raise expected(name, "at least one token a row, and a row", f"shape {ids.shape}")
    if (extremes := _extremes(ids)) is not None:
        least, most = extremes
        if least < 0 or most >= count:
            raise expected(name, f"numbers from 0 to {count - 1}, {of}", least if least < 0 else most, hint)


def offset_extremes(offset: Any, rows: int) -> tuple[int, int] | None:
    """Return the least and the largest offset of positions; None of a tracer, which has no values.

    Args:
        offset: a whole number, or an integer array with one for all rows or one a row.
        rows: B.

    Raises:
        UsageError: anything else, or a number beyond 32 bits.
    """
    given = np.asarray(offset) if isinstance(offset, int | np.integer) else offset
    shape = getattr(given, "shape", None)
    if shape not in ((), (1,), (rows,)) or not jnp.issubdtype(given.dtype, jnp.integer):
        came = repr(offset) if shape is None else f"{given.dtype} {list(shape)}"
        raise expected("position_offset", f"a whole number, or integers [{rows}], one a row", came)
    extremes = _extremes(given)
    if extremes is not None and max(map(abs, extremes)) >= 2**31:
        raise expected("position_offset", "less than 2147483648", max(extremes, key=abs))
    return extremes


def _extremes(numbers: Any) -> tuple[int, int] | None:
    """Return the least and the largest of whole numbers where they can be looked at."""
    if isinstance(numbers, jax.core.Tracer) or not getattr(numbers, "is_fully_addressable", True):
        return None
    values = np.asarray(numbers)
    return int(values.min()), int(values.max())


class Backbone(Runnable, nnx.Module):
    """A stack of layers.

    Class attributes:
        input_names: the arguments of a call that are a batch's; the first is what is encoded.
        encoder: whether every token may see all others: what leading rows and windows need.
        hugging_face_names: our module's path -> the module in a Hugging Face checkpoint; ``{i}`` is the layer. The
            loader goes by it, and adapter files are written by it.
        hugging_face_aliases: our module's path -> what else it is called in files, by other versions of transformers.
        hugging_face_fused: a Hugging Face model's map -> what its parts are called in ``hugging_face_names`` behind its name.
        hugging_face_prefix: what a Hugging Face task model puts before these names, or the bare model leaves out.
        hugging_face_ignored: regular expression of tensors (without that prefix) that have no place here.
        hugging_face_head: the module of the classifier's linear map, if it is one that
            :class:`~ntk_prefix.models.classifier.Classifier` has.
        hugging_face_head_bias: whether that map has a bias there; here it has one in any case.
        hugging_face_transform: of the classifier's ``transform``, our path -> Hugging Face's module; empty without one.
        head_pooling: what the file's head stands on, if it is not ``pooling``.
        once_head_pooling: what heads in adapters' files have stood on under the name of the family's own.
        tasks: what ``from_pretrained(task=...)`` may ask for.
        pooling: what a classifier pools by unless told otherwise.
        poolings: what it may pool by.
        unlike_layers: how many of the first layers are of another build than the rest, and run before a loop over these.
    """

    input_names: ClassVar[tuple[str, ...]]
    encoder: ClassVar[bool] = True
    hugging_face_names: ClassVar[dict[str, str]]
    hugging_face_aliases: ClassVar[dict[str, str]] = {}
    hugging_face_fused: ClassVar[dict[str, tuple[str, ...]]] = {}
    hugging_face_prefix: ClassVar[str]
    hugging_face_ignored: ClassVar[str]
    hugging_face_head: ClassVar[str | None] = None
    hugging_face_head_bias: ClassVar[bool] = True
    hugging_face_transform: ClassVar[dict[str, str]] = {}
    head_pooling: Pooling | None = None
    once_head_pooling: ClassVar[Pooling | None] = None
    tasks: ClassVar[tuple[str, ...]]
    pooling: Pooling
    poolings: ClassVar[tuple[Pooling, ...]] = ("mean", "cls", "last")
    unlike_layers: ClassVar[int] = 0

    layers: nnx.List
    config: BackboneConfig

    def __init__(self, config: BackboneConfig, *, dtype: DTypeLike | None):
        self.config = config
        self.dtype = jnp.dtype(dtype or jnp.float32)
        if not jnp.issubdtype(self.dtype, jnp.floating) or self.dtype.itemsize < 2:
            raise expected("dtype", "floating point numbers of 16, 32 or 64 bits to compute in", self.dtype)
        self.run = RunOptions()
        self.leading = LeadingRows(config.num_hidden_layers, config.hidden_size) if self.encoder else None

    @classmethod
    def stored(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint with its tensors as our maps are: what a file has in one piece is cut."""
        return checkpoint

    def head_transform(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Make what stands in the family's own head before the linear map, for a file's numbers; None is nothing."""
        return None

    def encode(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
        *,
        bias: Float[Array, "#B #N T T"] | None = None,
        rotary: Mapping[Rope, Rotary] | None = None,
    ) -> Output:
        """Send an encoder's embeddings through all layers, with leading rows if there are any, and through ``norm``.

        Leading rows have no position: nothing is added to their scores, and they are not turned.
        """
        rows = None if self.leading is None else self.leading()
        count = 0 if rows is None else rows.shape[1]
        if count:
            x = jnp.pad(x, ((0, 0), (count, 0), (0, 0)))
            mask = None if mask is None else jnp.pad(mask, ((0, 0),) * 3 + ((count, 0),), constant_values=True)
            bias = None if bias is None else jnp.pad(bias, ((0, 0),) * 2 + ((count, 0),) * 2)
            ahead = ((0, 0), (count, 0), (0, 0))
            rotary = rotary and {
                rope: Rotary(jnp.pad(cos, ahead, constant_values=1), jnp.pad(sin, ahead))
                for rope, (cos, sin) in rotary.items()
            }
        # what is not there is not said, for a layer of somebody else's
        told: dict[str, Any] = {name: x for name, x in (("bias", bias), ("rotary", rotary)) if x is not None}
        x, _ = self.run_layers(x, rows=rows, mask=mask, window=self.window, leading=count, **told)
        x = norm(x)
        return Output(last_hidden_state=x[:, count:], leading_states=x[:, :count] if count else None)

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[KeyValueCache, ...] | None = None,
        rows: Float[Array, "layers j D"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValueCache, ...] | None]:
        """Send x through all layers; options are those of :class:`AttentionLayer`.

        Before each layer, that layer's ``rows`` are added to the first j rows of x.
        """
        if cache is not None:
            new_cache = []
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                x, written = layer(x, cache=layer_cache, **options)
                new_cache.append(written)
            return x, tuple(new_cache)

        def run(layer: Any, x: Array, own: Array | None) -> Array:
            if own is not None:
                x = x.at[:, : own.shape[0]].add(own[None].astype(x.dtype))
            # rows are divided where a layer begins and ends, or the compiler gathers the batch to spare weights
            return constrain(layer(constrain(x, "batch"), **options)[0], "batch")

        policy = REMAT_POLICIES["full" if self.remat is True else str(self.remat)] if self.remat else None
        # nnx's, not jax's: an adapter in the layer may hold state of any type
        run_layer = run if policy is None else nnx.remat(run, graph_updates=False, policy=policy)
        alone = self.unlike_layers if self.scan_layers else len(self.layers)
        for index, layer in enumerate(self.layers[:alone]):
            x = run_layer(layer, x, None if rows is None else rows[index])
        if alone < len(self.layers):
            x = scan(list(self.layers[alone:]), run, x, None if rows is None else rows[alone:], policy)
        return x, None

    def rotary(self, positions: Int[Array, "#B T"]) -> dict[Rope, Rotary]:
        """Return cosines and sines for each way in which layers turn their heads."""
        ropes = {layer.attention.kind.rope for layer in self.layers} - {None}
        return {rope: rope.at(positions, accumulation_dtype(self.dtype)) for rope in ropes}

    def positions(
        self, positions: Int[Array, "#B T"], offset: Int[Array, " #B"] | Int[Array, ""] | int
    ) -> Int[Array, "#B T"]:
        """Shift positions by the model's offset and by the call's, which may differ from row to row."""
        return positions + jnp.asarray(self.position_offset + offset, positions.dtype).reshape(-1, 1)
