"""Vision transformers in two layouts: Hugging Face's ``vit``, and ``dinov2`` with LayerScale.

Position embeddings stand on a grid; for another image size the grid is resampled (bicubic, as torch does it).

Source: arXiv 2010.11929 and 2304.07193; the layouts and the names are those of Hugging Face.
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
from ntk_prefix.checks import expected
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
from ntk_prefix.precision import accumulation_dtype
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

    ``model_type`` is the layout: "vit", or "dinov2", which has LayerScale.
    """

    model_type: Literal["vit", "dinov2"]
    image_size: Side = 224
    patch_size: Side = 16
    num_channels: Size = 3
    layer_norm_eps: Epsilon = 1e-12
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise expected("image_size", f"at least one patch of {self.patch_size}", self.image_size)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> VitConfig:
        """Take what is known here from a config.json.

        Raises:
            UsageError: a value is missing or of a wrong type, the model has a gated MLP, or its images or patches are
                not square.
        """
        if config.get("use_swiglu_ffn"):
            raise expected("use_swiglu_ffn", "false", "true", "DINOv2 giant is not built here")
        if config.get("model_type") == "dinov2":
            config = {"layer_norm_eps": 1e-6, "patch_size": 14, **config}
            if config.get("mlp_ratio") is not None and config.get("hidden_size") is not None:
                ratio = checked(config["mlp_ratio"], _Ratio, "mlp_ratio")
                config["intermediate_size"] = int(ratio * checked(config["hidden_size"], Size, "hidden_size"))
        sides = {name: _side(name, config[name]) for name in ("image_size", "patch_size") if name in config}
        return cls(**known_fields(cls, {**config, **sides}))

    @property
    def grid(self) -> int:
        """Patches along one side of the image that the position embeddings were made for."""
        return self.image_size // self.patch_size


class VitEmbeddings(nnx.Module):
    """Patches, linearly mapped, after a class token; plus positions."""

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.patches = nnx.Linear(
            config.patch_size**2 * config.num_channels, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, config.hidden_size), jnp.float32))
        self.position_embeddings = nnx.Param(jnp.zeros((1, 1 + config.grid**2, config.hidden_size), jnp.float32))

    def __call__(self, pixel_values: Float[Array, "B height width channels"]) -> Float[Array, "B T D"]:
        """Return the layers' input."""
        batch, height, width, channels = pixel_values.shape
        size = self.patch_size
        if height % size or width % size or channels != self.num_channels or not height * width:
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
        positions = self._positions(rows, columns, accumulation_dtype(x.dtype)).astype(x.dtype)
        first = self.cls_token[...].astype(x.dtype) + positions[:, :1]
        first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
        return jnp.concatenate([first, x + positions[:, 1:]], axis=1)

    def _positions(self, rows: int, columns: int, dtype: jnp.dtype) -> Float[Array, "1 T D"]:
        """Resample the grid of position embeddings to the image's."""
        embeddings = self.position_embeddings[...].astype(dtype)
        grid = round((embeddings.shape[1] - 1) ** 0.5)
        if (rows, columns) == (grid, grid):
            return embeddings
        down, across = (jnp.asarray(bicubic_matrix(grid, n), embeddings.dtype) for n in (rows, columns))
        square = embeddings[0, 1:].reshape(grid, grid, -1)
        square = jnp.einsum("rh,hwd,cw->rcd", down, square, across)
        return jnp.concatenate([embeddings[:, :1], square.reshape(1, rows * columns, -1)], axis=1)


def bicubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Return the linear map [new, old] of bicubic resampling along one axis.

    Sample i of the new axis lies at ``(i + 1/2) old / new - 1/2`` of the old one and is the sum of its four
    neighbors, each weighed by Keys' kernel at its distance; beyond the border the border's value goes on.
    No antialiasing.

    Source: Keys 1981; ``a`` and the borders are torch's and ONNX's.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(centers[:, None] - taps)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), np.where(distance <= 1, near, far))
    return matrix


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


class Vit(Backbone):
    """A vision transformer: images [B, height, width, channels] -> hidden states [B, 1 + patches, D].

    Args:
        config: layout and sizes.
        dtype: of the computation (float32 if None); parameters are float32, see :func:`ntk_prefix.peft.narrow_frozen`.
        rngs: for weights that a checkpoint will replace.
    """

    input_names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    NAMES: ClassVar[dict[str, dict[str, str]]] = {
        "vit": {
            **_SHARED_NAMES,
            "layers.{i}.attention_norm": "encoder.layer.{i}.layernorm_before",
            "layers.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
            "layers.{i}.mlp.down": "encoder.layer.{i}.output.dense",
            "layers.{i}.mlp_norm": "encoder.layer.{i}.layernorm_after",
        },
        "dinov2": {
            **_SHARED_NAMES,
            "layers.{i}.attention_norm": "encoder.layer.{i}.norm1",
            "layers.{i}.attention_scale": "encoder.layer.{i}.layer_scale1.lambda1",
            "layers.{i}.mlp.up": "encoder.layer.{i}.mlp.fc1",
            "layers.{i}.mlp.down": "encoder.layer.{i}.mlp.fc2",
            "layers.{i}.mlp_norm": "encoder.layer.{i}.norm2",
            "layers.{i}.mlp_scale": "encoder.layer.{i}.layer_scale2.lambda1",
        },
    }
    # transformers 5 builds its modules by these names and peft writes them; its checkpoints keep those above
    ALIASES: ClassVar[dict[str, dict[str, str]]] = {
        "vit": {
            **{f"layers.{{i}}.{ours}": f"layers.{{i}}.{name}" for ours, name in _ATTENTION_OF_TRANSFORMERS_5.items()},
            "layers.{i}.attention_norm": "layers.{i}.layernorm_before",
            "layers.{i}.mlp.up": "layers.{i}.mlp.fc1",
            "layers.{i}.mlp.down": "layers.{i}.mlp.fc2",
            "layers.{i}.mlp_norm": "layers.{i}.layernorm_after",
        },
        "dinov2": {
            f"layers.{{i}}.{ours}": f"encoder.layer.{{i}}.{name}" for ours, name in _ATTENTION_OF_TRANSFORMERS_5.items()
        },
    }
    hugging_face_ignored: ClassVar[str] = (
        r"((pooler\.dense|classifier|decoder\.0)\.(weight|bias)|embeddings\.mask_token)$"
    )
    hugging_face_head: ClassVar[str | None] = "classifier"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    pooling: Pooling = "cls"

    config: VitConfig

    def __init__(self, config: VitConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype)
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
                Mlp(config, dtype=self.dtype, rngs=rngs),
                norm,
                layer_scale=config.model_type == "dinov2",
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = norm()

    @property
    def hugging_face_names(self) -> dict[str, str]:  # type: ignore[override]
        """The layout's table."""
        return self.NAMES[self.config.model_type]

    @property
    def hugging_face_aliases(self) -> dict[str, str]:  # type: ignore[override]
        """The layout's other names."""
        return self.ALIASES[self.config.model_type]

    @property
    def hugging_face_prefix(self) -> str:  # type: ignore[override]
        """The layout's prefix."""
        return f"{self.config.model_type}."

    def __call__(self, pixel_values: Float[Array, "B height width channels"]) -> Output:
        """Encode a batch of images, normalized as the checkpoint wants them.

        Raises:
            UsageError: sides that patches do not divide, another number of channels, or integers.
        """
        return self.encode(self.embeddings(pixel_values), norm=self.final_norm)
