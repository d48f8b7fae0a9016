"""``from_pretrained``: a checkpoint's tensors into our modules, every one of them accounted for."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ntk_prefix.checks import UsageError
from ntk_prefix.models.backbone import Backbone, Classifier, Pooling
from ntk_prefix.models.bert import Bert, BertConfig
from ntk_prefix.models.formats import Checkpoint, read_checkpoint
from ntk_prefix.models.llama import Llama, LlamaConfig
from ntk_prefix.models.vit import Vit, VitConfig

__all__ = ["from_pretrained", "module_aliases", "module_names"]

logger = logging.getLogger(__name__)

MODELS: dict[str, tuple[Any, type[Backbone]]] = {
    "bert": (BertConfig, Bert),
    "dinov2": (VitConfig, Vit),
    "llama": (LlamaConfig, Llama),
    "vit": (VitConfig, Vit),
}
"""By Hugging Face's model_type."""


def from_pretrained(
    path: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs | None = None,
) -> Backbone | Classifier:
    """Load a pretrained model.

    Args:
        path: a Hugging Face folder (config.json and safetensors, sharded or not), a .gguf file or an .onnx file.
        task: None is the bare backbone, without logits; else "sequence-classification", "image-classification" or
            "causal-lm".
        num_labels: of a classifier. Its head is the checkpoint's if that has one of this size that is a linear map
            on pooled hidden states (pooling "cls" for images, "last" for Llama), and a new one otherwise. None
            takes the checkpoint's.
        pooling: see :class:`Classifier`; None is "mean" for BERT, "cls" for images, "last" for Llama.
        dtype: of the computation, e.g. ``jnp.bfloat16``; parameters are float32 all the same.
        rngs: for a new head; ``nnx.Rngs(0)`` if None.

    Returns:
        :class:`Bert`, :class:`Vit`, :class:`Llama`, or a :class:`Classifier` around one.

    Raises:
        FileNotFoundError: nothing at ``path``, or a file of the folder is missing.
        ValueError: an unknown format or model_type; a task that does not fit; a tensor that is missing, has the wrong
            shape or is left over (all are named); no number of labels; a head that :class:`Classifier` cannot take.
    """
    checkpoint = read_checkpoint(path)
    model_type = checkpoint.config.get("model_type")
    if model_type not in MODELS:
        raise UsageError(f"{path}: expected model_type among {sorted(MODELS)}, got {model_type!r}")
    config_class, model_class = MODELS[model_type]
    classify = task is not None and task.endswith("-classification")
    if task not in (None, *model_class.tasks):
        raise UsageError(f"task: expected None or one of {model_class.tasks} for a {model_type}, got {task!r}")
    if not classify and (num_labels is not None or pooling is not None):
        raise UsageError(f"num_labels, pooling: expected only with a classification task, got task {task!r}")
    options: dict[str, Any] = {"causal_lm": task == "causal-lm"} if model_class is Llama else {}
    config = config_class.from_hugging_face(checkpoint.config)
    # shapes only: the checkpoint brings the numbers
    build: Callable[..., Backbone] = functools.partial(cast(Any, model_class), config, dtype=dtype, **options)
    model: Backbone = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    if not classify:
        _fill(model, checkpoint, f"{path}")
        return model
    pooling = pooling or model_class.pooling
    # a head's place is on the pooling it was trained on: on another it would be noise
    head = _head(model, checkpoint) if pooling == model_class.pooling else None
    if head is not None and num_labels in (None, len(head[1])):
        num_labels = len(head[1])
    elif num_labels is not None:
        head = None
        logger.info("%s: a new head of %d labels on %r pooled hidden states", path, num_labels, pooling)
    else:
        raise UsageError(
            f"num_labels: expected a number, since {path} brings no head that is a linear map on {pooling!r} pooled "
            "hidden states; a new one will be made"
        )
    _fill(model, checkpoint, f"{path}")
    classifier = Classifier(model, num_labels, pooling=pooling, rngs=rngs or nnx.Rngs(0))
    if head is not None:
        kernel, bias = (jnp.asarray(values, jnp.float32) for values in head)
        nnx.update(classifier.head, nnx.State({"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}))
    return classifier


def module_names(model: Backbone) -> dict[str, str]:
    """Return our path -> Hugging Face's name for every module the model has, layer numbers filled in.

    >>> module_names(bert)["layers.2.attention.query"]
    'encoder.layer.2.attention.self.query'
    """
    return _filled_in(model, model.hugging_face_names)


def module_aliases(model: Backbone) -> dict[str, str]:
    """Return our path -> what else the module is called in files, for modules that other versions name otherwise."""
    return _filled_in(model, model.hugging_face_aliases)


def _filled_in(model: Backbone, table: dict[str, str]) -> dict[str, str]:
    names = {}
    for path, name in table.items():
        for i in range(len(model.layers)) if "{i}" in path else (0,):
            ours = path.format(i=i)
            if _resolve(model, ours) is not None:
                names[ours] = name.format(i=i)
    return names


def _resolve(model: Any, path: str) -> Any:
    """Return what stands at a dotted path; None if the model does without."""
    return functools.reduce(
        lambda m, part: m[int(part)] if part.isdigit() else getattr(m, part), path.split("."), model
    )


def _parameters(module: Any, name: str) -> Iterator[tuple[str, nnx.Variable, Callable[[np.ndarray], np.ndarray]]]:
    """Yield Hugging Face's tensor name, our variable, and the change of layout, for all parameters of a module."""
    if isinstance(module, nnx.Variable):
        yield name, module, np.asarray
    elif isinstance(module, nnx.Embed):
        yield f"{name}.weight", module.embedding, np.asarray
    elif isinstance(module, nnx.Linear):
        yield f"{name}.weight", module.kernel, _kernel
    else:
        yield f"{name}.weight", module.scale, np.asarray
    if getattr(module, "bias", None) is not None:
        yield f"{name}.bias", module.bias, np.asarray


def _kernel(weight: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]; a patch convolution [out, channels, height, width] is a map from flat patches."""
    if weight.ndim == 4:
        weight = weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return weight.T


def _fill(model: Backbone, checkpoint: Checkpoint, path: str) -> None:
    """Give every parameter its tensor.

    Raises:
        ValueError: naming the tensors that are missing, left over or of the wrong shape.
    """
    wanted = {
        tensor: (variable, convert)
        for ours, name in module_names(model).items()
        for tensor, variable, convert in _parameters(_resolve(model, ours), name)
    }
    prefix = model.hugging_face_prefix
    # a task model's names have the prefix, a bare one's do not, whatever our table says
    spelling = {
        next((s for s in (name, name.removeprefix(prefix), prefix + name) if s in wanted), name): name
        for name in checkpoint.tensors
    }
    if missing := sorted(wanted.keys() - spelling.keys()):
        raise UsageError(f"{path}: expected tensors that are missing: {_listed(missing)}")
    over = {name.removeprefix(prefix) for name in spelling.keys() - wanted.keys()}
    ignored = {name for name in over if re.match(model.hugging_face_ignored, name)}
    if ignored:
        logger.info("%s: not used: %s", path, _listed(sorted(ignored)))
    if over - ignored:
        raise UsageError(
            f"{path}: expected nothing beyond a {type(model).__name__}, got tensors left over: "
            f"{_listed(sorted(over - ignored))}. Is model_type right?"
        )
    wrong = []
    for name, (variable, convert) in wanted.items():
        tensor = convert(checkpoint.tensors[spelling[name]]())
        if tensor.shape != variable.shape:
            wrong.append(f"{name} expected {variable.shape}, got {tensor.shape}")
        else:
            variable.set_value(jnp.asarray(tensor, jnp.float32))
    if wrong:
        raise UsageError(f"{path}: expected tensors of the config's shapes (ours, [in, out]): {_listed(wrong)}")


def _head(model: Backbone, checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the kernel [D, labels] and bias [labels] of the checkpoint's head, if it is one linear map."""
    if f"{model.hugging_face_head}.weight" not in checkpoint.tensors:
        return None
    kernel = _kernel(checkpoint.tensors[f"{model.hugging_face_head}.weight"]())
    if kernel.shape[0] != model.config.hidden_size:
        return None  # DINOv2's reads two pooled states
    bias = checkpoint.tensors.get(f"{model.hugging_face_head}.bias")
    return kernel, np.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias()


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
