"""Vision transformers in Hugging Face's layouts: ``vit``, ``deit``, ``dinov2`` and ``dinov2_with_registers``.

A DeiT has a second class token; a DINOv2 has LayerScale, and its registers are tokens without a position.
Position embeddings stand on a grid; for another image size the grid is resampled (bicubic, as torch does it).

Source: arXiv 2010.11929, 2012.12877, 2304.07193 and 2309.16588; the layouts and the names are those of Hugging Face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import check_is_array, check_rngs, expected
from ntk_prefix.models.attention import AttentionKind, AttentionLayer
from ntk_prefix.models.backbone import (
    Backbone,
    BackboneConfig,
    Epsilon,
    Mlp,
    Output,
    Pooling,
    Size,
    TransformerLayer,
    known_fields,
)
from ntk_prefix.models.elementwise import layer_norm
from ntk_prefix.models.formats import Checkpoint
from ntk_prefix.models.formats.checkpoint import average, cut
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.sharding import check_placed
from ntk_prefix.typing import Array, Float

__all__ = ["Vit", "VitConfig", "bicubic_matrix"]


Side = Annotated[int, msgspec.Meta(ge=1, le=2**14)]
"""Pixels."""

_Ratio = Annotated[float, msgspec.Meta(gt=0, le=1000)]


def _side(name: str, value: Any) -> Any:
    """Return the side of a square that may be given as [height, width].

    Raises:
        UsageError: the two differ.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise expected(name, "a number, or two equal ones: images and patches are square here", value)
    return value[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(BackboneConfig):
    """Sizes of a vision transformer; the names and defaults are those of Hugging Face's config.json.

    ``model_type`` is the layout; those of DINOv2 have LayerScale. ``distilled_head`` says that a DeiT's file has a head on
    each of its two class tokens, whose logits are averaged.
    """

    model_type: Literal["vit", "deit", "dinov2", "dinov2_with_registers"]
    image_size: Side = 224
    patch_size: Side = 16
    num_channels: Size = 3
    layer_norm_eps: Epsilon = 1e-12
    qkv_bias: bool = True
    num_register_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**10)] = 0
    use_swiglu_ffn: bool = False
    distilled_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise expected("image_size", f"at least one patch of {self.patch_size}", self.image_size)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> VitConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, or its images or patches are not square.
        """
        model_type = config.get("model_type")
        given = {**config, "num_register_tokens": 0}
        if model_type == "dinov2_with_registers":
            given["num_register_tokens"] = config.get("num_register_tokens", 4)
        if model_type in ("dinov2", "dinov2_with_registers"):
            given = {"layer_norm_eps": 1e-6, "patch_size": 14 if model_type == "dinov2" else 16, **given}
            ratio, features = config.get("mlp_ratio"), config.get("hidden_size")
            if ratio is None and "intermediate_size" not in config:
                ratio = 4
            if ratio is not None and features is not None:
                wide = int(checked(ratio, _Ratio, "mlp_ratio") * checked(features, Size, "hidden_size"))
                if config.get("use_swiglu_ffn"):
                    wide = -(-int(wide * 2 / 3) // 8) * 8  # two of three maps, rounded up
                    given["hidden_act"] = "silu"
                given["intermediate_size"] = wide
        else:
            given["use_swiglu_ffn"] = False
        sides = {name: _side(name, config[name]) for name in ("image_size", "patch_size") if name in config}
        return cls(**known_fields(cls, {**given, **sides}))

    @property
    def own_tokens(self) -> int:
        """Tokens before the patches."""
        return (2 if self.model_type == "deit" else 1) + self.num_register_tokens

    @property
    def grid(self) -> int:
        """Patches along one side of the image that the position embeddings were made for."""
        return self.image_size // self.patch_size


class VitEmbeddings(nnx.Module):
    """Patches, linearly mapped, after a class token; plus positions.

    A DeiT's second class token has a position, registers have none.
    """

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.patches = nnx.Linear(
            config.patch_size**2 * config.num_channels, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.antialias = config.model_type == "dinov2_with_registers"
        deit, registers, features = config.model_type == "deit", config.num_register_tokens, config.hidden_size

        def tokens(count: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((1, count, features), jnp.float32))

        self.cls_token = tokens(1)
        self.distillation_token = tokens(1) if deit else None
        self.register_tokens = tokens(registers) if registers else None
        self.position_embeddings = tokens(1 + deit + config.grid**2)

    def __call__(self, pixel_values: Float[Array, "B height width channels"]) -> Float[Array, "B T D"]:
        """Return the layers' input."""
        check_is_array("pixel_values", pixel_values)
        check_placed("pixel_values", pixel_values)
        batch, height, width, channels = shape = pixel_values.shape if pixel_values.ndim == 4 else (0,) * 4
        size = self.patch_size
        if 0 in shape or height % size or width % size or channels != self.num_channels:
            raise expected(
                "pixel_values",
                f"[B, height, width, {self.num_channels}] with sides divisible by the patch size {size}",
                f"{pixel_values.shape}: resize or crop, and put channels last",
            )
        if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
            raise expected(
                "pixel_values",
                "floating point numbers, normalized as the model wants them (models.image_normalization)",
                pixel_values.dtype,
            )
        rows, columns = height // size, width // size
        # a convolution whose stride is its width is one matrix product over patches
        patches = pixel_values.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patches(patches.reshape(batch, rows * columns, -1))
        classes = [token[...] for token in (self.cls_token, self.distillation_token) if token is not None]
        positions = self._positions(rows, columns, len(classes), accumulation_dtype(x.dtype)).astype(x.dtype)
        first = jnp.concatenate(classes, axis=1).astype(x.dtype) + positions[:, : len(classes)]
        if self.register_tokens is not None:
            first = jnp.concatenate([first, self.register_tokens[...].astype(x.dtype)], axis=1)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
        return jnp.concatenate([first, x + positions[:, len(classes) :]], axis=1)

    def _positions(self, rows: int, columns: int, classes: int, dtype: jnp.dtype) -> Float[Array, "1 T D"]:
        """Resample the grid of position embeddings, which stands behind those of class tokens, to the image's."""
        embeddings = self.position_embeddings[...].astype(dtype)
        grid = round((embeddings.shape[1] - classes) ** 0.5)
        if (rows, columns) == (grid, grid):
            return embeddings
        matrix = antialiased_bicubic_matrix if self.antialias else bicubic_matrix
        down, across = (jnp.asarray(matrix(grid, n), embeddings.dtype) for n in (rows, columns))
        square = embeddings[0, classes:].reshape(grid, grid, -1)
        square = jnp.einsum("rh,hwd,cw->rcd", down, square, across)
        return jnp.concatenate([embeddings[:, :classes], square.reshape(1, rows * columns, -1)], axis=1)


def bicubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Return the linear map [new, old] of bicubic resampling along one axis.

    Sample i of the new axis lies at ``(i + 1/2) old / new - 1/2`` of the old one and is the sum of its four
    neighbors, each weighed by Keys' kernel at its distance; beyond the border the border's value goes on.
    No antialiasing.

    Source: Keys 1981; ``a`` and the borders are torch's and ONNX's.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    weights = _keys(np.abs(centers[:, None] - taps), a)
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)
    return matrix


def antialiased_bicubic_matrix(old: int, new: int, a: float = -0.5) -> np.ndarray:
    """Return the linear map [new, old] of bicubic resampling along one axis, with antialiasing.

    As :func:`bicubic_matrix`, but the kernel is as much wider as the axis becomes shorter, and at a border the weights of
    what is there are made to sum to 1.

    Source: Keys 1981; ``a`` and the borders are those of torch with ``antialias=True``, and of Pillow.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = _keys(np.abs(centers[:, None] - np.arange(old)) / max(old / new, 1), a)
    return weights / weights.sum(axis=1, keepdims=True)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' kernel at distances >= 0; it is zero from 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


_SHARED_NAMES = {
    "embeddings.patches": "embeddings.patch_embeddings.projection",
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "layers.{i}.attention.query": "encoder.layer.{i}.attention.attention.query",
    "layers.{i}.attention.key": "encoder.layer.{i}.attention.attention.key",
    "layers.{i}.attention.value": "encoder.layer.{i}.attention.attention.value",
    "layers.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "final_norm": "layernorm",
}


_ATTENTION_OF_TRANSFORMERS_5 = {
    f"attention.{ours}": f"attention.{theirs}_proj"
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
}


_VIT_NAMES = {
    **_SHARED_NAMES,
    "layers.{i}.attention_norm": "encoder.layer.{i}.layernorm_before",
    "layers.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.mlp.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.mlp_norm": "encoder.layer.{i}.layernorm_after",
}

_DINOV2_NAMES = {
    **_SHARED_NAMES,
    "layers.{i}.attention_norm": "encoder.layer.{i}.norm1",
    "layers.{i}.attention_scale": "encoder.layer.{i}.layer_scale1.lambda1",
    "layers.{i}.mlp_norm": "encoder.layer.{i}.norm2",
    "layers.{i}.mlp_scale": "encoder.layer.{i}.layer_scale2.lambda1",
}

_MLP_NAMES = {"layers.{i}.mlp.up": "encoder.layer.{i}.mlp.fc1", "layers.{i}.mlp.down": "encoder.layer.{i}.mlp.fc2"}

_SWIGLU_NAMES = {
    "layers.{i}.mlp.gate": "encoder.layer.{i}.mlp.weights_in.gate",
    "layers.{i}.mlp.up": "encoder.layer.{i}.mlp.weights_in.up",
    "layers.{i}.mlp.down": "encoder.layer.{i}.mlp.weights_out",
}

# transformers 5 builds its modules by these names and peft writes them; its checkpoints keep those above
_VIT_ALIASES = {
    **{f"layers.{{i}}.{ours}": f"layers.{{i}}.{name}" for ours, name in _ATTENTION_OF_TRANSFORMERS_5.items()},
    "layers.{i}.attention_norm": "layers.{i}.layernorm_before",
    "layers.{i}.mlp.up": "layers.{i}.mlp.fc1",
    "layers.{i}.mlp.down": "layers.{i}.mlp.fc2",
    "layers.{i}.mlp_norm": "layers.{i}.layernorm_after",
}

_DINOV2_ALIASES = {
    f"layers.{{i}}.{ours}": f"encoder.layer.{{i}}.{name}" for ours, name in _ATTENTION_OF_TRANSFORMERS_5.items()
}

_SWIGLU_ALIASES = {
    f"layers.{{i}}.mlp.{part}": f"encoder.layer.{{i}}.mlp.{part}_proj" for part in ("gate", "up", "down")
}


class Vit(Backbone):
    """A vision transformer: images [B, height, width, channels] -> hidden states [B, own tokens + patches, D].

    Args:
        config: layout and sizes.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    hugging_face_ignored: ClassVar[str] = (
        r"((pooler\.dense|classifier|(cls|distillation)_classifier|head|decoder\.0)\.(weight|bias)|embeddings\.mask_token)$"
    )
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    pooling: Pooling = "cls"
    once_head_pooling: ClassVar[Pooling | None] = "cls"

    config: VitConfig

    def __init__(self, config: VitConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
        check_rngs(rngs)
        self.head_pooling = "cls+distillation" if config.distilled_head else "cls+mean" if self._dinov2 else None
        norm = layer_norm(config.hidden_size, config.layer_norm_eps, self.dtype, rngs)
        self.embeddings = VitEmbeddings(config, dtype=self.dtype, rngs=rngs)
        self.layers = nnx.List(
            TransformerLayer(
                AttentionLayer(
                    config.hidden_size,
                    config.num_attention_heads,
                    kind=AttentionKind(use_bias=config.qkv_bias),
                    dtype=self.dtype,
                    rngs=rngs,
                ),
                Mlp(config, gated=config.use_swiglu_ffn, dtype=self.dtype, rngs=rngs),
                norm,
                layer_scale=self._dinov2,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = norm()

    @property
    def _dinov2(self) -> bool:
        return self.config.model_type in ("dinov2", "dinov2_with_registers")

    @property
    def poolings(self) -> tuple[Pooling, ...]:  # type: ignore[override]
        """Of a DeiT, the second class token too."""
        both: tuple[Pooling, ...] = ("cls+distillation",) if self.config.model_type == "deit" else ()
        return (*super().poolings, "cls+mean", *both)

    @property
    def hugging_face_names(self) -> dict[str, str]:  # type: ignore[override]
        """The layout's table."""
        if self._dinov2:
            mlp = _SWIGLU_NAMES if self.config.use_swiglu_ffn else _MLP_NAMES
            return _DINOV2_NAMES | mlp | {"embeddings.register_tokens": "embeddings.register_tokens"}
        return _VIT_NAMES | {"embeddings.distillation_token": "embeddings.distillation_token"}

    @property
    def hugging_face_aliases(self) -> dict[str, str]:  # type: ignore[override]
        """The layout's other names."""
        if self._dinov2:
            return _DINOV2_ALIASES | (_SWIGLU_ALIASES if self.config.use_swiglu_ffn else {})
        return _VIT_ALIASES

    @property
    def hugging_face_prefix(self) -> str:  # type: ignore[override]
        """The layout's prefix."""
        return f"{self.config.model_type}."

    @property
    def hugging_face_head(self) -> str:  # type: ignore[override]
        """The one map of the file's head, or the one that two of them make (:meth:`stored`)."""
        return "head" if self.config.distilled_head else "classifier"

    @classmethod
    def stored(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Cut a gated MLP's map in two; make one head of a DeiT's two, on both class tokens, which computes their average."""
        tensors = cut(checkpoint.tensors, {"mlp.weights_in": ("gate", "up")})
        config, names = checkpoint.config, ("cls_classifier", "distillation_classifier")
        if config.get("model_type") != "deit" or f"{names[0]}.weight" not in tensors:
            return checkpoint._replace(tensors=tensors)
        for end, axis in (("weight", 1), ("bias", None)):
            parts = [tensors.pop(f"{name}.{end}", None) for name in names]
            whole = [part for part in parts if part is not None]
            if whole:
                if len(whole) < len(names) or len({part.shape for part in whole}) > 1:
                    raise expected(
                        checkpoint.where, f"two heads with a {end} each, of one shape", [p.shape for p in whole]
                    )
                tensors[f"head.{end}"] = average(f"head.{end}", whole, axis)
        return checkpoint._replace(config={**config, "distilled_head": True}, tensors=tensors)

    def __call__(self, pixel_values: Float[Array, "B height width channels"]) -> Output:
        """Encode a batch of images, normalized as the checkpoint wants them.

        Raises:
            UsageError: sides that patches do not divide, another number of channels, or integers.
        """
        return self.encode(self.embeddings(pixel_values), norm=self.final_norm)
