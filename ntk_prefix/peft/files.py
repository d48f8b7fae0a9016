r"""Adapters as files, in the form Hugging Face's users know: ``adapter_config.json`` and ``adapter_model.safetensors``.

===========================  ==============================  ==================================================
adapter                      ``peft_type``                   tensors, after ``base_model.model.<module>.``
===========================  ==============================  ==================================================
LoRA                         LORA                            ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r]
prefix tuning, all layers    PREFIX_TUNING                   one ``prompt_embeddings`` [M, layers * 2 * K * H]
NTK-Attention                NTK_ATTENTION                   ``z`` [N, R, H] (or ``z_left``, ``z_right``), ``k`` [N, R]
Prefix-Tuning+               PREFIX_TUNING_PLUS              as above, without ``k``
prefix propagation           PREFIX_PROPAGATION              ``leading.rows`` [layers, j, D]; ``alpha`` [N] of kernels
head, bitfit, full           HEAD, BITFIT, FULL              the model's own names
anything else, together too  NTK_PREFIX                      as above; ``prefix_key``, ``prefix_value`` [M, K, H]
===========================  ==============================  ==================================================

The first two are read and written by Hugging Face peft (0.21); it cannot read the others, several methods in one
adapter among them. Modules are called what they are called in a Hugging Face checkpoint, by the models' table
``hugging_face_names``; for BERT and Llama that is also what peft calls them, while transformers 5 renames the modules
of ViTs when it loads them, so there peft finds none of its own. Weights of linear maps are stored [out, in].

``z`` and ``k`` are stored in the published meaning: the coordinates they were trained in (``whiten``) are multiplied
in, and ``mass`` stands in the configuration. So a file is enough to compute and to train on, from the same function,
but not to resume a run bit for bit: that is what checkpoints are for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.attention import LowRank
from ntk_prefix.checks import UsageError
from ntk_prefix.peft.base import AdapterParam, Host
from ntk_prefix.peft.hugging_face import CONFIG, HEAD, PREFIX_PARTS, Names, from_form, packed, to_form
from ntk_prefix.peft.inject import active_adapter, apply, configs, dotted
from ntk_prefix.peft.methods.ntk_attention import State
from ntk_prefix.typing import Array

__all__ = ["load_adapter", "save_pretrained"]

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"

FILE_NAMES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "key": PREFIX_PARTS[0],
    "value": PREFIX_PARTS[1],
}
"""Attribute -> what it is called in a file; others keep their name."""

STORED_TRANSPOSED = {"a", "b", "kernel"}


def save_pretrained(
    model: Any, directory: str | Path, name: str | None = None, *, base_model_name_or_path: str | None = None
) -> None:
    """Write an adapter to a directory, in the form of the table above.

    Hugging Face's prefix tuning counts the prefix in the positions of the tokens. A prefix trained with
    ``shift_positions=False`` says so in its file; peft warns of the field and ignores it, so there, positions are off.
    Likewise a classifier's head is one of Hugging Face's (``classifier``, ``score``) only where that model has the
    same pooling; BERT's has not, and our ``head`` is ignored there.

    Args:
        model: hosts the adapter; it is left as it is.
        directory: made if need be; files there are replaced, each at once.
        name: of the adapter; the active one if None.
        base_model_name_or_path: recorded for the reader; what the model says of itself if None.

    Raises:
        ValueError: no such adapter, or none is active.
    """
    known = configs(model)
    if name is None:
        name = active_adapter(model)
    if name not in known:
        raise UsageError(f"expected an adapter among {sorted(known)}, got {name!r}: activate one, or name it")
    names = Names(model)
    tensors = {key: slot.value for key, slot in _slots(model, name, names).items()}
    form = to_form(known[name], model, names, tensors)
    form["base_model_name_or_path"] = base_model_name_or_path or getattr(names.backbone, "name_or_path", None)
    if any(key.startswith("head.") for key in tensors):
        form["modules_to_save"] = [names.head]
    if form["peft_type"] == "PREFIX_TUNING":
        tensors = packed(tensors, model, names)
    else:
        tensors = {names.key(key): value for key, value in tensors.items()}
    _write(Path(directory), form, {key: np.ascontiguousarray(value) for key, value in tensors.items()})


def load_adapter(model: Any, directory: str | Path, name: str = "default", *, load_head: bool = True) -> Any:
    """Put an adapter from files on a model and make it the active one, as :func:`ntk_prefix.peft.apply` does.

    Args:
        model: of the same architecture as the one the adapter was trained on; it is changed and returned.
        directory: of :func:`save_pretrained` or of Hugging Face peft, whose LoRA and prefix tuning are understood.
        name: of the adapter on this model.
        load_head: take the classifier's head from the file, if it has one.

    Returns:
        The model.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a broken file; a foreign ``peft_type``; a field that changes what the adapter computes and is
            not known here; a tensor that is missing, has no place in this model or does not fit it. The model is
            then as it was.
    """
    directory = Path(directory)
    form, tensors = _read(directory)
    names = Names(model)
    tensors = {names.canonical(key): value for key, value in tensors.items()}
    if not load_head:
        tensors = {key: value for key, value in tensors.items() if not HEAD.match(key)}
    elif foreign := [key for key in tensors if HEAD.match(key) and not key.startswith("head.")]:
        raise UsageError(
            f"expected a head that this model has, got {foreign[0]}: it has none, or pools in another way than the "
            "Hugging Face model, where these weights mean something else; load_head=False leaves the head out"
        )
    tensors = {key: value for key, value in tensors.items() if not re.match(names.ignored, key)}
    chosen, tensors = from_form(form, model, names, tensors)
    has_head = "head.weight" in tensors
    if has_head:
        # Llama's score has no bias
        tensors.setdefault("head.bias", jnp.zeros(len(tensors["head.weight"])))
    chosen = [dataclasses.replace(each, train_head=each.train_head and has_head) for each in chosen]
    # shapes are checked on a copy, which shares the arrays: a file that does not fit changes nothing
    trial = nnx.clone(model)
    apply(trial, chosen, name=name)
    _check(_slots(trial, name, names), tensors, directory)
    apply(model, chosen, name=name)
    for key, slot in _slots(model, name, names).items():
        variable = getattr(slot.owner, slot.attribute)
        variable[...] = _turned(slot.attribute, tensors[key], back=True).astype(variable.dtype)
    return model


# ------------------------------------------------------------------------------------------ tensors


class _Slot(NamedTuple):
    """A trained variable and what a file holds for it."""

    owner: nnx.Module
    attribute: str
    value: Array


def _slots(model: Any, name: str, names: Names) -> dict[str, _Slot]:
    """Return what an adapter has trained, by canonical key."""
    in_place = any(each.in_place for each in configs(model)[name])
    slots = {}
    for path, module in nnx.iter_modules(model):
        owner: Any = None
        if isinstance(module, Host) and name in module.adapters:
            owner, values = module.adapters[name], _values(module.adapters[name])
        elif in_place and "adapters" not in path:
            owner, values = module, _values(module, AdapterParam)
        else:
            continue
        # a core's tensors are the attention layer's: Hugging Face's models have no cores
        place = dotted(path).removesuffix(".core")
        for attribute, value in values.items():
            key = names.parameter(f"{place}.{attribute}") if owner is module else None
            key = key or f"{names.module(place)}.{FILE_NAMES.get(attribute, attribute)}"
            slots[key] = _Slot(owner, attribute, _turned(attribute, value))
    return slots


def _values(owner: Any, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Array]:
    """Return the variables of an adapter by attribute; a state in the published coordinates."""
    values = {key: variable[...] for key, variable in vars(owner).items() if isinstance(variable, kind)}
    if isinstance(owner, State):
        z, k = owner.state()
        effective = {"z_left": z.left, "z_right": z.right} if isinstance(z, LowRank) else {"z": z}
        return effective if owner.k is None else {**effective, "k": k}
    return values


def _turned(attribute: str, value: Array, *, back: bool = False) -> Array:
    """Turn a kernel [*window, in, out] to [out, in, *window], as torch has it, or back; others stay."""
    if attribute not in STORED_TRANSPOSED:
        return value
    axes = (*range(2, value.ndim), 1, 0) if back else (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    return value.transpose(axes)


def _check(slots: Mapping[str, _Slot], tensors: Mapping[str, Array], directory: Path) -> None:
    where = directory / WEIGHTS
    for key, slot in slots.items():
        if key not in tensors:
            raise UsageError(f"{where}: expected a tensor {key} {slot.value.shape} for this model, got none")
        if tensors[key].shape != slot.value.shape:
            raise UsageError(
                f"{where}: expected {key} of shape {slot.value.shape} for this model, got {tensors[key].shape}: "
                "the adapter is of another model"
            )
    if left_over := sorted(set(tensors) - set(slots)):
        raise UsageError(f"{where}: expected tensors that have a place in this adapter, got also {left_over[:4]}")


# --------------------------------------------------------------------------------------------- disk


def _write(directory: Path, form: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the weights, then the configuration, each under a temporary name first."""
    from safetensors.numpy import save

    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "ntk_prefix_version": importlib.metadata.version("ntk-prefix")}
    contents = {
        WEIGHTS: save(dict(tensors), metadata=metadata),
        CONFIG: (json.dumps(form, indent=2, sort_keys=True) + "\n").encode(),
    }
    for name, content in contents.items():
        temporary = directory / f".{name}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, directory / name)
        finally:
            temporary.unlink(missing_ok=True)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"expected {CONFIG} and {WEIGHTS} in {directory}, found no {name}")
    try:
        form = dict(json.loads((directory / CONFIG).read_text()))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{directory / CONFIG}: expected JSON fields, got a file that is broken: {error}") from error
    try:
        return form, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise UsageError(f"{directory / WEIGHTS}: expected safetensors, got a file that is broken: {error}") from error
