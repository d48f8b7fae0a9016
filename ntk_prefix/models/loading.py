"""``from_pretrained``: a checkpoint's tensors into our modules, every one of them accounted for.

How one gets from the file to its devices is told in :mod:`ntk_prefix.models.placing`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ntk_prefix.checks import UsageError, check_rngs, expected
from ntk_prefix.models.backbone import Backbone, BackboneConfig, Pooling
from ntk_prefix.models.bert import Bert, BertConfig
from ntk_prefix.models.classifier import Classifier, pooled_states
from ntk_prefix.models.families.distilbert import DistilBert, DistilBertConfig
from ntk_prefix.models.families.gemma2 import Gemma, Gemma2Config
from ntk_prefix.models.families.gemma3 import Gemma3Config
from ntk_prefix.models.families.mistral import MistralConfig
from ntk_prefix.models.families.modernbert import ModernBert, ModernBertConfig
from ntk_prefix.models.families.qwen2 import Qwen2Config
from ntk_prefix.models.families.qwen3 import Qwen3Config
from ntk_prefix.models.families.roberta import Roberta, RobertaConfig
from ntk_prefix.models.families.smollm3 import SmolLM3Config
from ntk_prefix.models.families.t5 import T5Config, T5Encoder
from ntk_prefix.models.formats import Checkpoint, StoredTensor, read_checkpoint
from ntk_prefix.models.llama import Llama, LlamaConfig
from ntk_prefix.models.placing import OLD_WORDS, Slot, Target, parameter_dtype, parameters, placed
from ntk_prefix.models.vit import Vit, VitConfig
from ntk_prefix.sharding import automatic, check_divides, weight_sharding

__all__ = ["from_pretrained", "module_aliases", "module_names"]

logger = logging.getLogger(__name__)

MODELS: dict[str, tuple[Any, type[Backbone]]] = {
    "bert": (BertConfig, Bert),
    "deit": (VitConfig, Vit),
    "dinov2": (VitConfig, Vit),
    "dinov2_with_registers": (VitConfig, Vit),
    "distilbert": (DistilBertConfig, DistilBert),
    "gemma2": (Gemma2Config, Gemma),
    "gemma3_text": (Gemma3Config, Gemma),
    "llama": (LlamaConfig, Llama),
    "mistral": (MistralConfig, Llama),
    "modernbert": (ModernBertConfig, ModernBert),
    "mt5": (T5Config, T5Encoder),
    "qwen2": (Qwen2Config, Llama),
    "qwen3": (Qwen3Config, Llama),
    "roberta": (RobertaConfig, Roberta),
    "smollm3": (SmolLM3Config, Llama),
    "t5": (T5Config, T5Encoder),
    "vit": (VitConfig, Vit),
    "xlm-roberta": (RobertaConfig, Roberta),
}
"""By Hugging Face's model_type."""


def from_pretrained(
    path: str | Path,
    task: str | None = None,
    *,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | Literal["file"] | None = None,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Backbone | Classifier:
    """Load a pretrained model.

    Args:
        path: a Hugging Face folder (config.json and safetensors, sharded or not), a .gguf file or an .onnx file; or a model
            of the hub, "owner/name" or "owner/name@revision", where there is network or a copy in Hugging Face's cache.
        task: None is the bare backbone, without logits; else "sequence-classification", "image-classification" or
            "causal-lm".
        num_labels: of a classifier. Its head is the checkpoint's if that has one of this size that is a linear map
            on pooled hidden states (pooling "cls" for images, "cls+mean" for DINOv2, "last" for Llama), and a new one
            otherwise. None takes the checkpoint's.
        pooling: see :class:`Classifier`; None is the checkpoint's own where it brings a head, and "mean" for BERT, "cls"
            for images, "last" for Llama. With another, a head of the checkpoint is not taken.
        dtype: of the computation, e.g. ``jnp.bfloat16``; float32 if None. It says nothing of what weights are kept in.
        param_dtype: what the backbone's weights are kept in: float32 if None, or e.g. ``jnp.bfloat16``, or "file" for each
            tensor's own (float32 for a quantized one, and for float64 without x64). A classifier's head is float32, and so
            are the weights that :mod:`ntk_prefix.peft` trains, whatever they start from.
        mesh: where each weight goes, by :func:`ntk_prefix.sharding.weight_sharding`: a device gets its slice, a process
            reads what its devices hold. None is the default device.
        rngs: for a new head; ``nnx.Rngs(0)`` if None.
        progress: called with the bytes of the model that are there, and with all of them.

    Returns:
        :class:`Bert`, :class:`Vit`, :class:`Llama`, or a :class:`Classifier` around one.

    Raises:
        FileNotFoundError: nothing at ``path``, or a file of the folder is missing.
        UsageError: an unknown format or model_type, a broken file; a task that does not fit; a tensor that is missing,
            has the wrong shape, is not of floating point or is left over (all are named); no number of labels; a head
            that :class:`Classifier` cannot take; a mesh that does not divide the model; a dtype that no weight has.
        NonFiniteError: a tensor that is not finite.
        MissingPackageError: the package that reads the format is not installed.

    Numerics: what the file holds goes before what its config says of it: an ``lm_head`` that differs from the embeddings
        is used, tied or not. Numbers are rounded once, from the file's dtype to ``param_dtype``, to nearest.
    """
    into = Target(
        parameter_dtype(param_dtype), None if mesh is None else automatic(mesh), progress or (lambda done, total: None)
    )
    rngs = nnx.Rngs(0) if rngs is None else rngs
    check_rngs(rngs)  # before the weights are read
    checkpoint = read_checkpoint(path)
    config, model_class, checkpoint = _config(checkpoint)
    classify = task is not None and task.endswith("-classification")
    if task not in (None, *model_class.tasks):
        model_type = checkpoint.config["model_type"]
        raise expected("task", f"None or one of {model_class.tasks} for a {model_type}", repr(task))
    if not classify and (num_labels is not None or pooling is not None):
        raise expected("num_labels, pooling", "only with a classification task", f"task {task!r}")
    if into.mesh is not None:
        shares = {axis: into.mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor")}
        check_divides(config, **shares, flag="mesh: ")
    options: dict[str, Any] = {"causal_lm": task == "causal-lm"} if issubclass(model_class, Llama) else {}
    config, checkpoint = _untied(config, checkpoint, logits=task == "causal-lm")
    model = _shapes(model_class, config, dtype, options)
    if not classify:
        _fill(model, checkpoint, f"{path}", into)
        return model
    # a head's place is on the pooling it was trained on: on another it would be noise
    own_pooling = model.head_pooling or model.pooling
    transform: Any = model.head_transform(_AnyKey(jax.random.key(0)))
    head = _head(model, transform, checkpoint, own_pooling) if pooling in (None, own_pooling) else None
    if head is not None and num_labels in (None, head["head.kernel"].shape[0]):
        num_labels, pooling = head["head.kernel"].shape[0], own_pooling
    elif num_labels is not None:
        head, transform, pooling = None, None, pooling or model.pooling
        logger.info("%s: a new head of %d labels on %r pooled hidden states", path, num_labels, pooling)
    else:
        raise expected(
            "num_labels",
            "a number",
            None,
            f"{path} brings no head of its family on {pooling or own_pooling!r} pooled hidden states; a new one will be made",
        )
    _fill(model, checkpoint, f"{path}", into)
    classifier = Classifier(model, num_labels, pooling=pooling, transform=transform, rngs=rngs)
    for slot in [slot for _, slot in parameters("head", classifier.head)] + _transform_slots(model, transform):
        tensor = None if head is None else head.get(slot.path)
        if tensor is not None:
            slot.variable.set_value(placed(slot, tensor, into._replace(dtype=np.dtype(np.float32))))
        elif into.mesh is not None:
            sharding = weight_sharding(into.mesh, slot.path, slot.variable.shape)
            slot.variable.set_value(jax.device_put(slot.variable[...], sharding))
    return classifier


def _config(checkpoint: Checkpoint) -> tuple[BackboneConfig, type[Backbone], Checkpoint]:
    """Return the sizes that a checkpoint claims, the class that has them, and its tensors as that class has them.

    Raises:
        UsageError: a model that is not built here, or sizes that cannot be; nothing has been allocated yet.
    """
    source, config = checkpoint.source, checkpoint.config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise expected(
            source,
            f"model_type among {sorted(MODELS)}",
            repr(model_type),
            "Other families are not built here; a checkpoint of one of these whose config.json "
            "lacks the word needs it there",
        )
    if found := _quantized(checkpoint):
        raise expected(
            checkpoint.where,
            "weights in floating point",
            f"{found}: quantized weights are not read here",
            "Take the model it was made from, or, with transformers, "
            "AutoModel.from_pretrained(folder).dequantize().save_pretrained(new_folder)",
        )
    config_class, model_class = MODELS[model_type]
    checkpoint = model_class.stored(checkpoint)
    try:
        sizes: BackboneConfig = config_class.from_hugging_face(checkpoint.config)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    # before anything is built layer by layer
    numbers = [
        int(match[1]) for name in checkpoint.tensors if (match := re.search(r"\b(?:layers?|block)\.(\d{1,9})\.", name))
    ]
    have = max(numbers, default=-1) + 1
    if sizes.num_hidden_layers > have:
        raise expected(
            f"{source}: num_hidden_layers", f"at most the {have} of the file's tensors", sizes.num_hidden_layers
        )
    return sizes, model_class, checkpoint


_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_format|weight_scale|weight_scale_inv|weight_packed|input_scale"
    r"|weight\.(absmax|quant_map|quant_state\..*|nested_absmax|nested_quant_map))$"
)
"""What GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 call what they keep beside a weight or in its place."""


def _quantized(checkpoint: Checkpoint) -> str | None:
    """Return how a checkpoint is quantized; None if it is not, or by its format, which reads it."""
    settings = checkpoint.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        return f"a model quantized by {str(method)[:40]} (quantization_config)"
    name = next((name for name in checkpoint.tensors if _QUANTIZED.search(name)), None)
    return None if name is None else f"a quantized model, with tensors such as {name[:80]}"


def _untied(config: BackboneConfig, checkpoint: Checkpoint, *, logits: bool) -> tuple[BackboneConfig, Checkpoint]:
    """Return what a decoder's file says of tied embeddings, whatever its config says: the file is what was trained.

    A table of logits (``lm_head``) that differs from the embeddings is one of its own; one that stands in their place
    is the embeddings.
    """
    if not isinstance(config, LlamaConfig) or not config.tie_word_embeddings:
        return config, checkpoint
    head = checkpoint.tensors.get("lm_head.weight")
    table = next(
        (t for name, t in checkpoint.tensors.items() if name.removeprefix("model.") == "embed_tokens.weight"), None
    )
    if head is None:
        return config, checkpoint
    if table is None:
        tensors = {**checkpoint.tensors, "model.embed_tokens.weight": head}
        return config, checkpoint._replace(tensors={k: v for k, v in tensors.items() if k != "lm_head.weight"})
    if logits and not head.equals(table):
        logger.info("%s: lm_head.weight differs from the embeddings: not tied, whatever the config says", head.file)
        return dataclasses.replace(config, tie_word_embeddings=False), checkpoint
    return config, checkpoint


class _AnyKey(nnx.Rngs):
    """Random numbers that nobody looks at: shapes only are wanted, and counting keys takes most of the time."""

    def __init__(self, key: jax.Array):
        self.key = key

    def params(self) -> jax.Array:
        """Return the key."""
        return self.key


def _shapes(model_class: Any, config: BackboneConfig, dtype: DTypeLike | None, options: dict[str, Any]) -> Backbone:
    """Return a model without numbers: the checkpoint brings them."""
    name = None if dtype is None else jnp.dtype(dtype).name
    return nnx.merge(*_split_shapes(model_class, config, name, tuple(options.items())), copy=True)


@functools.lru_cache(maxsize=8)
def _split_shapes(
    model_class: Any, config: Any, dtype: str | None, options: tuple[tuple[str, Any], ...]
) -> tuple[Any, Any]:
    def build() -> Backbone:
        return model_class(config, dtype=dtype, rngs=_AnyKey(jax.random.key(0)), **dict(options))

    model: Backbone = nnx.eval_shape(build)
    return nnx.split(model)


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


def _fill(model: Backbone, checkpoint: Checkpoint, path: str, into: Target) -> None:
    """Give every parameter its tensor.

    Raises:
        UsageError: naming the tensors that are missing, left over, of the wrong shape or not of floating point; all of
            that before one is read.
        NonFiniteError: naming the first that is not finite.
    """
    prefix, aliases = model.hugging_face_prefix, module_aliases(model)
    wanted: dict[str, Slot] = {}
    known: dict[str, str] = {}  # what a file may call it -> what we call it
    for ours, name in module_names(model).items():
        module = _resolve(model, ours)
        for end, slot in parameters(ours, module):
            wanted[f"{name}{end}"] = slot
            ends = (end, OLD_WORDS[end]) if isinstance(module, nnx.LayerNorm) else (end,)
            for other in {name, aliases.get(ours, name)}:
                bare = other.removeprefix(prefix)
                # a task model's names have the prefix, a bare one's do not, whatever our table says
                known |= {f"{word}{e}": f"{name}{end}" for word in (bare, prefix + bare) for e in ends}
    found: dict[str, StoredTensor] = {}
    over = []
    for name, tensor in checkpoint.tensors.items():
        if name not in known:
            if 0 not in tensor.shape:  # such as no registers, which are kept as a tensor [1, 0, features]
                over.append(name.removeprefix(prefix))
        elif known[name] in found:
            raise expected(f"{path}: {name}", "each tensor once", f"{found[known[name]].name} as well")
        else:
            found[known[name]] = tensor
    if missing := sorted(wanted.keys() - found.keys()):
        raise UsageError(f"{checkpoint.where}: expected tensors that are missing: {_listed(missing)}")
    ignored = [name for name in over if re.match(model.hugging_face_ignored, name)]
    if ignored:
        logger.info("%s: not used: %s", path, _listed(sorted(ignored)))
    if rest := sorted(set(over) - set(ignored)):
        raise expected(
            checkpoint.where,
            f"nothing beyond a {type(model).__name__} of {len(model.layers)} layers",
            f"tensors left over: {_listed(rest)}",
            "They belong to another architecture, or this configuration does",
        )
    wrong = [
        f"{name} expected {slot.variable.shape}, got {shape}"
        for name, slot in wanted.items()
        if (shape := slot.shape(found[name].shape)) != slot.variable.shape
    ]
    if wrong:
        raise UsageError(
            f"{checkpoint.where}: expected tensors of the config's shapes (ours, [in, out]): {_listed(wrong)}"
        )
    total = sum(math.prod(slot.variable.shape) * into.dtype_of(found[name]).itemsize for name, slot in wanted.items())
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        into.progress(done, total)

    for name, slot in wanted.items():
        slot.variable.set_value(placed(slot, found[name], into, read))
    into.progress(total, total)  # also where other processes hold a part


def _transform_slots(model: Backbone, transform: Any) -> list[Slot]:
    """Return the parameters of what stands before a head's linear map."""
    if transform is None:
        return []
    modules = {path: getattr(transform, path) for path in model.hugging_face_transform}
    return [slot for path, module in modules.items() for _, slot in parameters(f"transform.{path}", module)]


def _head(model: Backbone, transform: Any, checkpoint: Checkpoint, pooling: Pooling) -> dict[str, StoredTensor] | None:
    """Return the numbers of the checkpoint's head by our paths, if it is the family's own.

    That is a map on what ``pooling`` makes, behind ``transform``.

    Raises:
        UsageError: a part of such a head has another shape.
    """
    prefix = model.hugging_face_prefix

    def stored(name: str) -> StoredTensor | None:
        return checkpoint.tensors.get(name) or checkpoint.tensors.get(f"{prefix}{name}")

    weight, bias = (stored(f"{model.hugging_face_head}.{end}") for end in ("weight", "bias"))
    if weight is None or len(weight.shape) != 2 or weight.shape[1] != model.config.hidden_size * pooled_states(pooling):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        raise expected(f"{bias.file}: {bias.name}", f"shape {weight.shape[:1]}", bias.shape)
    found = {"head.kernel": weight} | ({} if bias is None else {"head.bias": bias})
    for path, name in model.hugging_face_transform.items():
        for end, slot in parameters(f"transform.{path}", getattr(transform, path)):
            part = stored(f"{name}{end}")
            if part is None:
                return None
            if slot.shape(part.shape) != slot.variable.shape:
                shape = f"shape {slot.variable.shape} (ours, [in, out])"
                raise expected(f"{part.file}: {part.name}", shape, slot.shape(part.shape))
            found[slot.path] = part
    return found


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(name[:200] for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
