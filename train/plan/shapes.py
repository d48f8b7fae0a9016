"""Models as shapes only: by name, by a config.json, or by what a run's own model says of itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix import models
from ntk_prefix.artifacts import read_json
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.models.formats import read_checkpoint
from ntk_prefix.models.loading import MODELS
from train import assets, setup
from train.config import TrainConfig
from train.sources import Kind, spec_of

__all__ = ["SHAPES", "abstract_batch", "abstract_model", "model_fields"]

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16",
}  # fmt: skip
_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "rope_scaling": {**_ROPE, "factor": 32.0}, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "rope_scaling": {**_ROPE, "factor": 8.0},
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "dtype": "bfloat16",
    },
    "Gemma-2-9B": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
        "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
    "ViT-L/16": {
        "model_type": "vit", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 16,
    },
    "BERT-large": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16,
    },
}  # fmt: skip
"""Fields of the models' own config.json, as their makers publish them."""


def model_fields(name: str) -> dict[str, Any]:
    """Return the fields of a config.json, by a shape's name, a file, or a folder that has one.

    Raises:
        UsageError: none of the three, or a file that says nothing of a model that is built here.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name).expanduser()
    if not path.exists():
        raise expected("--model-shape", f"one of {', '.join(SHAPES)}, a config.json or its folder", repr(name))
    fields = read_json(path / "config.json" if path.is_dir() else path, dict[str, Any])
    if fields.get("model_type") not in MODELS:
        raise expected(f"--model-shape {path}", f"a model_type among {sorted(MODELS)}", repr(fields.get("model_type")))
    return fields


def _sizes(fields: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Return the sizes that a config.json means, and the class of the model."""
    config_class, model_class = MODELS[fields["model_type"]]
    try:
        return config_class.from_hugging_face(fields), model_class
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def abstract_model(config: TrainConfig, shape: str | None, num_labels: int) -> Any:
    """Return the model that a run trains, its adapter on it, every array a ``jax.ShapeDtypeStruct``.

    It is what :func:`train.setup.build` makes, without a weight and without a row of data: what an adapter measures
    on a calibration batch is made up.

    Args:
        config: of the run.
        shape: see :func:`model_fields`; None is the run's own model, whose files are looked at.
        num_labels: of a classifier.

    Raises:
        UsageError: a shape that is none, or that does not fit the task.
    """
    kind = spec_of(config.task).kind
    if kind == "ranking":
        raise expected("CONFIG", "a task of classes or of language: the plan of a ranking is not made", config.task)
    path = None if shape is not None else assets.model_path(config.model)
    if shape is None and path is None:
        make: Callable[[], Any] = functools.partial(setup.load_model, config, None, kind, num_labels)
    else:
        name = f"--model-shape {shape}" if shape is not None else str(path)
        fields = model_fields(shape) if shape is not None else dict(read_checkpoint(Path(str(path))).config)
        sizes, model_class = _sizes(fields, name)
        if kind not in model_class.tasks:
            raise expected(name, f"a model for {kind}, which {config.task} is", f"a {fields['model_type']}")
        if kind == "image-classification":
            sizes = dataclasses.replace(sizes, image_size=config.data.image_size)
        stored = _stored_dtype(config, fields, name)

        def from_fields() -> Any:
            rngs = _AnyKey(jax.random.key(0))
            options = {"causal_lm": kind == "causal-lm"} if issubclass(model_class, models.Llama) else {}
            backbone = model_class(sizes, dtype=jnp.dtype(config.device.precision), rngs=rngs, **options)
            _keep_in(backbone, stored)
            if kind == "causal-lm":
                return backbone
            return models.Classifier(backbone, num_labels, pooling=config.pooling, rngs=rngs)

        make = from_fields

    def build() -> Any:
        model: Any = make()
        setup.check_image_size(model, kind, config.data.image_size)
        setup.set_context_length(model, config)
        rows = abstract_batch(config, kind, 2)
        setup.adapt(model, config, {name: rows[name] for name in model.input_names if name in rows})
        return model

    return nnx.eval_shape(build)


class _AnyKey(nnx.Rngs):
    """Random numbers that nobody looks at: shapes only are wanted, and counting keys takes most of the time."""

    def __init__(self, key: jax.Array):
        self.key = key

    def params(self) -> jax.Array:
        """Return the key."""
        return self.key


def _stored_dtype(config: TrainConfig, fields: dict[str, Any], name: str) -> jnp.dtype:
    """Return what weights are kept in: ``--param-dtype``, or what the config.json says of its file.

    That is its ``dtype``, which was called ``torch_dtype`` before.
    """
    if config.device.param_dtype != "file":
        return jnp.dtype(config.device.param_dtype)
    wanted = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    try:
        dtype = jnp.dtype(wanted)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise expected(f"{name}: dtype", "float32, bfloat16 or float16", repr(wanted))
    return dtype


def _keep_in(backbone: Any, dtype: jnp.dtype) -> None:
    """Keep weights in a dtype, as ``from_pretrained(param_dtype=...)`` loads them."""
    for _, variable in nnx.iter_graph(backbone):
        if type(variable) is nnx.Param:
            variable.set_value(variable[...].astype(dtype))


def abstract_batch(config: TrainConfig, kind: Kind, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what a batch of :func:`train.data.train_batches` is: the longest that there can be.

    Text is padded to a bucket, and never beyond the run's own length.
    """
    if kind == "image-classification":
        inputs: dict[str, tuple[tuple[int, ...], Any]] = {
            "pixel_values": ((rows, config.data.image_size, config.data.image_size, 3), np.float32)
        }
        labels: tuple[int, ...] = (rows,)
    else:
        length = config.data.max_length
        inputs = {name: ((rows, length), np.int32) for name in ("input_ids", "attention_mask")}
        labels = (rows, length) if kind == "causal-lm" else (rows,)
    arrays = {**inputs, "labels": (labels, np.int32), "weight": ((rows,), np.float32)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}
