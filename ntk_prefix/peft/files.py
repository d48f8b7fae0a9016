r"""Adapters as files, in the form Hugging Face's users know: ``adapter_config.json`` and ``adapter_model.safetensors``.

===========================  ==============================  ==================================================
adapter                      ``peft_type``                   tensors, after ``base_model.model.<module>.``
===========================  ==============================  ==================================================
LoRA                         LORA                            ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r]
prefix tuning, all layers    PREFIX_TUNING                   one ``prompt_embeddings`` [M, layers * 2 * K * H]
NTK-Attention                NTK_ATTENTION                   ``z`` [N, R, H] (or ``z_left``, ``z_right``), ``k`` [N, R];
                                                             the arrays of a map that owns some: ``points`` [K, R, H];
                                                             ``<name>.scale``, float32 [..., 1], of those in int8;
                                                             ``<name>.lengths``, int32 [K], of heads that differ in it
Prefix-Tuning+               PREFIX_TUNING_PLUS              as above, without ``k``
prefix propagation           PREFIX_PROPAGATION              ``leading.rows`` [layers, j, D]; ``alpha`` [N] of kernels
head, bitfit, full           HEAD, BITFIT, FULL              the model's own names
anything else, together too  NTK_PREFIX                      as above; ``prefix_key``, ``prefix_value`` [M, K, H]
===========================  ==============================  ==================================================

The first two are read and written by Hugging Face peft (0.21); it cannot read the others, several methods in one
adapter among them. Modules are called what they are called in a Hugging Face checkpoint, by the models' table
``hugging_face_names``; in files of LoRA, what transformers 5 calls them once it has loaded them, which is what peft goes by
(those of ViTs it renames). Weights of linear maps are stored [out, in].

``z`` and ``k`` are stored in the published meaning: the coordinates they were trained in (``whiten``) are multiplied
in, and ``mass`` stands in the configuration. So a file is enough to compute and to train on, from the same function,
but not to resume a run bit for bit: that is what checkpoints are for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix import __version__
from ntk_prefix.artifacts import read_json, write_whole
from ntk_prefix.checks import NonFiniteError, UsageError, expected
from ntk_prefix.peft.base import Adapter, AdapterConfig, AdapterParam, Host, dotted, without_hosts
from ntk_prefix.peft.file_dtypes import check_kinds, checked, packed, unpacked
from ntk_prefix.peft.file_rows import ROWS, lengthened, shortened
from ntk_prefix.peft.hugging_face import CONFIG, Names, from_fields, to_fields
from ntk_prefix.peft.inject import active_adapter, apply, configs
from ntk_prefix.peft.names import Fields
from ntk_prefix.typing import Array

__all__ = ["load_adapter", "own_weights", "save_pretrained"]

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"

COMING_CONFIG = f".{CONFIG}.coming"
"""The configuration of weights that are about to be put in their place; what a save leaves here that was killed then."""

CONFIG_HASH = "adapter_config_sha256"
"""Name, in the metadata of the weights, of a hash of the configuration that they were saved with."""

FILE_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""What torch calls the weights of a model's own modules; others keep their name."""

STORED_TRANSPOSED = frozenset({"kernel"})

HEAD = re.compile(r"(head|classifier|score)\.")
"""What heads are called; also where the model at hand has none."""

UNREAD = re.compile(r"pooler\.")
"""What stands behind the last hidden state in Hugging Face's models and is not built here: nothing here could read it."""

CORE = re.compile(r"(\.attention_fn)?\.core$")
"""Of an attention layer's place, what Hugging Face's models have not: see :mod:`ntk_prefix.peft.sites`."""


def save_pretrained(
    model: Any,
    directory: str | Path,
    name: str | None = None,
    *,
    base_model_name_or_path: str | None = None,
    dtype: Any = None,
) -> None:
    """Write an adapter to a directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

    LoRA and prefix tuning are in Hugging Face peft's form and can be read there; it cannot read the others. ``z`` and ``k``
    are stored in the published meaning, the coordinates they were trained in multiplied in.

    Hugging Face's prefix tuning counts the prefix in the positions of the tokens. A prefix trained with
    ``shift_positions=False`` says so in its file; peft warns of the field and ignores it, so there, positions are off.
    Where layers have a window, as Mistral's, Hugging Face's prefix lies in it and is left behind by tokens beyond the
    window's size less the prefix's; ours is seen by all. Both ways, a warning says up to which token they are equal.
    Likewise a classifier's head is one of Hugging Face's (``classifier``, ``score``) only where that model has the
    same pooling; BERT's has not, and our ``head`` is ignored there.

    Args:
        model: hosts the adapter; it is left as it is.
        directory: made if need be. An adapter there is replaced at once: :func:`load_adapter` finds the former one or the new
            one, also if this is killed.
        name: of the adapter; the active one if None.
        base_model_name_or_path: recorded for the reader; what the model says of itself if None.
        dtype: of the numbers in the file, float16 or bfloat16 for one of half the size, int8 (NTK-Attention alone) for a
            quarter, see :func:`ntk_prefix.peft.file_dtypes.packed`; each weight's own if None.

    Raises:
        ValueError: no such adapter, or none is active; a weight that is not finite, or below zero where
            :func:`load_adapter` would refuse it, or beyond what ``dtype`` holds, by its name; a configuration that no file
            can hold, such as a feature map of one's own; another dtype.
    """
    dtype = checked(dtype)
    known = configs(model)
    if name is None:
        name = active_adapter(model)
    if name not in known:
        if not known:
            raise expected(
                "model",
                "one with an adapter",
                f"{type(model).__name__} without any",
                "ntk_prefix.peft.apply puts one on",
            )
        raise expected("name", f"an adapter among {sorted(known)}", repr(name), "Activate one, or name it")
    if dtype == "int8" and not all(each.in_int8 for each in known[name]):
        kinds = " and ".join(sorted({type(each).__name__ for each in known[name]}))
        raise expected(
            "dtype", "float32, float16 or bfloat16 for this adapter", f"int8 of {kinds}", "int8 is for states"
        )
    names = Names(model)
    slots = list(_slots(model, name, names))
    for slot in slots:
        what, value = f"{slot.key} of adapter {name!r}", np.asarray(slot.value, np.float32)
        if not np.isfinite(value).all():
            raise NonFiniteError(f"{what}: expected finite weights to save, got NaN or infinity.")
        if slot.non_negative and value.min(initial=0) < 0:
            raise expected(
                what, "weights >= 0, which are part of a denominator", value.min(),
                "Wrap the optimizer in peft.non_negative, or clip them at 0",
            )  # fmt: skip
    tensors = {slot.key: slot.value for slot in slots}
    fields, stored = to_fields(known[name], model, names, tensors)
    fields["base_model_name_or_path"] = base_model_name_or_path or getattr(names.backbone, "name_or_path", None)
    if "head.weight" in tensors:
        fields["modules_to_save"] = [names.head, *fields.get("modules_to_save", ())]
    parent = names.head.rpartition(".")[0]
    saved = fields.get("modules_to_save", ())
    if parent and any(module.startswith(f"{parent}.") for module in saved):
        # a head that is one module of theirs is theirs to save whole, whatever of it is trained
        fields["modules_to_save"] = list(dict.fromkeys(parent if m.startswith(f"{parent}.") else m for m in saved))
        frozen = {key: value for key, value in own_weights(model, names).items() if key.startswith(names.heads)}
        stored = {names.key(key): value for key, value in frozen.items()} | stored
    uneven = {names.key(slot.key) for slot in slots if slot.uneven}
    held: dict[str, np.ndarray] = {}
    for key, array in stored.items():
        parts = shortened(key, array) if key in uneven else {key: np.asarray(array)}
        held |= packed(key, parts.pop(key), dtype) | parts
    _write(Path(directory), fields, held)


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
    fields, tensors = _read(directory)
    names = Names(model)
    where = directory / WEIGHTS
    tensors = {names.canonical(key): value for key, value in tensors.items()}
    if not load_head:
        tensors = {key: value for key, value in tensors.items() if not HEAD.match(key)}
    elif foreign := [key for key in tensors if HEAD.match(key) and not key.startswith(names.heads)]:
        raise expected(
            where,
            "a head that this model has",
            f"{foreign[0]}: it has none, or pools in another way than the Hugging Face model, "
            "where these weights mean something else; load_head=False leaves the head out",
        )
    chosen, tensors = from_fields(fields, model, names, tensors)
    has_head = "head.weight" in tensors
    if has_head and not getattr(names.backbone, "hugging_face_head_bias", True):
        tensors.setdefault("head.bias", np.zeros(len(tensors["head.weight"]), np.float32))
    chosen = [dataclasses.replace(each, train_head=each.train_head and has_head) for each in chosen]
    try:
        wanted = _wanted(model, chosen, name, names)
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from error
    _check(wanted, tensors, where)
    _account_for(tensors, wanted, model, names, where)
    apply(model, chosen, name=name)
    for slot in _slots(model, name, names):
        variable = getattr(slot.owner, slot.attribute)
        if slot.key in tensors:
            value = jnp.asarray(tensors[slot.key], variable.dtype)
            variable[...] = _turned(value, back=True) if slot.turned else value
    return model


# ------------------------------------------------------------------------------------------ tensors


class _Slot(NamedTuple):
    """A trained variable and what a file holds for it."""

    key: str
    owner: nnx.Module
    attribute: str
    value: Array
    turned: bool
    non_negative: bool
    optional: bool
    uneven: bool = False
    """Whether its heads may be of different length, see :mod:`ntk_prefix.peft.file_rows`."""


def _slots(model: Any, name: str, names: Names) -> Iterator[_Slot]:
    """Iterate over what an adapter has trained, by canonical key."""
    in_place = any(each.in_place for each in configs(model)[name])
    hosts = [dotted(path) for path, module in nnx.iter_modules(model) if isinstance(module, Host)]
    for path, module in nnx.iter_modules(model):
        place = without_hosts(dotted(path), hosts)
        if isinstance(module, Host) and name in module.adapters:
            adapter: Adapter = module.adapters[name]
            # a core's tensors are the attention layer's: Hugging Face's models have no cores
            prefix = names.module(CORE.sub("", place))
            for attribute, value in adapter.file_values().items():
                key, turned = (
                    f"{prefix}.{adapter.file_names.get(attribute, attribute)}",
                    attribute in adapter.transposed,
                )
                marked = bool(vars(adapter)[attribute].get_metadata().get("non_negative"))
                value = _turned(value) if turned else value
                optional = attribute in adapter.optional
                yield _Slot(key, adapter, attribute, value, turned, marked, optional, adapter.uneven)
        elif in_place and "adapters" not in path:
            yield from _own_weights(module, place, names, AdapterParam)


def _own_weights(module: nnx.Module, place: str, names: Names, kind: type[nnx.Variable]) -> Iterator[_Slot]:
    """Iterate over a module's own weights of one type."""
    for attribute, variable in vars(module).items():
        if type(variable) is kind:
            named = names.parameter(f"{place}.{attribute}")
            key = named or f"{names.module(place)}.{FILE_NAMES.get(attribute, attribute)}"
            turned = attribute in STORED_TRANSPOSED
            value = _turned(variable[...]) if turned else variable[...]
            yield _Slot(key, module, attribute, value, turned, False, False)


def own_weights(model: Any, names: Names) -> dict[str, Array]:
    """Return the model's own weights by canonical key, as a file has them."""
    hosts = [dotted(path) for path, module in nnx.iter_modules(model) if isinstance(module, Host)]
    return {
        slot.key: slot.value
        for path, module in nnx.iter_modules(model)
        if "adapters" not in path
        for slot in _own_weights(module, without_hosts(dotted(path), hosts), names, nnx.Param)
    }


def _turned(value: Array, *, back: bool = False) -> Array:
    """Turn a kernel [*window, in, out] to [out, in, *window], as torch has it, or back."""
    axes = (*range(2, value.ndim), 1, 0) if back else (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    return value.transpose(axes)


def _wanted(model: Any, chosen: list[AdapterConfig], name: str, names: Names) -> dict[str, _Slot]:
    """Return what a file has to hold for an adapter that is not there yet; nothing of its size is made."""
    found: dict[str, _Slot] = {}

    def build() -> dict[str, Array]:
        trial = nnx.clone(model)
        apply(trial, chosen, name=name)
        found.update({slot.key: slot for slot in _slots(trial, name, names)})
        return {key: slot.value for key, slot in found.items()}

    shapes = jax.eval_shape(build)
    return {key: slot._replace(value=shapes[key]) for key, slot in found.items()}


def _check(slots: Mapping[str, _Slot], tensors: Mapping[str, np.ndarray], where: Path) -> None:
    """Refuse a file in which a tensor of the adapter is missing or cannot be it."""
    for key, slot in slots.items():
        if key not in tensors:
            if slot.optional:
                continue
            raise expected(where, f"a tensor {key} {slot.value.shape} for this model", "none")
        if tensors[key].shape != slot.value.shape:
            raise expected(
                where,
                f"{key} of shape {slot.value.shape} for this model",
                f"{tensors[key].shape}: the adapter is of another model",
            )
        if slot.non_negative and tensors[key].min(initial=0) < 0:
            raise expected(f"{where}: {key}", "numbers >= 0, which are part of a denominator", tensors[key].min())


def _account_for(
    tensors: Mapping[str, np.ndarray], slots: Mapping[str, _Slot], model: Any, names: Names, where: Path
) -> None:
    """Refuse a file with a tensor that says something and has no place in the adapter.

    Hugging Face peft writes copies of frozen weights beside what was trained, such as ``lm_head.base_layer.weight``: they
    are taken for what they are if they agree with the model's.
    """
    left = {key: value for key, value in tensors.items() if key not in slots}
    if not left:
        return
    own = own_weights(model, names)
    nowhere = []
    for key, value in left.items():
        frozen = own.get(key.replace(".base_layer.", "."))
        if frozen is not None:
            # in the file's precision, which may be half of the model's
            if frozen.shape != value.shape or not np.array_equal(np.asarray(frozen).astype(value.dtype), value):
                raise expected(
                    f"{where}: {key}", "a copy of the model's own weight, which this adapter does not train",
                    "other numbers", "The adapter is of another model, or trained this weight whole",
                )  # fmt: skip
        elif UNREAD.match(key):
            logger.warning("%s: %s is left out: this model has no such module, and nothing that reads it", where, key)
        else:
            nowhere.append(key)
    if nowhere:
        raise expected(where, "tensors that have a place in this adapter", f"also {sorted(nowhere)[:4]}")


# --------------------------------------------------------------------------------------------- disk


def _write(directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write configuration and weights so that :func:`_read` finds the former pair or the new one, whenever this is ended.

    The new configuration lies beside the former one until weights that name it by its hash are in their place.
    """
    from safetensors.numpy import save

    directory.mkdir(parents=True, exist_ok=True)
    said = (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    metadata = {"format": "pt", "ntk_prefix_version": __version__, CONFIG_HASH: _hash(said)}
    coming = directory / COMING_CONFIG
    write_whole(coming, said)
    try:
        write_whole(directory / WEIGHTS, _in_order(save(dict(tensors), metadata=metadata)))
    except OSError:
        coming.unlink()
        raise
    coming.replace(directory / CONFIG)


def _read(directory: Path) -> tuple[Fields, dict[str, np.ndarray]]:
    """Return configuration and weights of one save, also while another is being written.

    Raises:
        FileNotFoundError: one of the two files is missing.
        UsageError: one is broken.
    """
    weights, coming = directory / WEIGHTS, directory / COMING_CONFIG
    while True:
        if not weights.is_file():
            raise _missing(directory, WEIGHTS)
        before = _version(weights)
        tensors, wanted = _read_tensors(weights)
        config = directory / CONFIG
        # a save was ended before it could put its configuration in the former one's place
        with contextlib.suppress(FileNotFoundError):
            config = coming if _hash(coming.read_bytes()) == wanted else config
        if not config.is_file():
            raise _missing(directory, CONFIG)
        fields = Fields(read_json(config, dict[str, Any]), str(config))
        if before == _version(weights):
            return fields, tensors


def _in_order(content: bytes) -> bytes:
    """Return safetensors whose metadata stand in alphabetical order, so that the same adapter is the same bytes.

    The library writes them in another order each time.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + said.ljust(begin - 8) + content[begin:]


def _missing(directory: Path, name: str) -> FileNotFoundError:
    return FileNotFoundError(f"expected {CONFIG} and {WEIGHTS} in {directory}, found no {name}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(file: Path) -> tuple[int, int, int]:
    """Return what changes when another file takes the place of this one."""
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_tensors(file: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the tensors of a file, each of finite floating point numbers, and the hash of their configuration if it is there.

    Raises:
        UsageError: the file is broken, a tensor is of another kind, or float32 cannot hold its numbers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as content:
            config_hash = (content.metadata() or {}).get(CONFIG_HASH)
            slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
            kinds = {key: each.get_dtype() for key, each in slices.items()}
            numbers = {key: kind for key, kind in kinds.items() if not (key.endswith(ROWS) and kind == "I32")}
            check_kinds(str(file), numbers, {key: each.get_shape() for key, each in slices.items()})
            tensors = {key: content.get_tensor(key) for key in slices}
    except (SafetensorError, OSError) as error:
        raise expected(str(file), "safetensors", f"a file that is broken: {error}") from None
    tensors = lengthened(str(file), unpacked(tensors))
    for key, value in tensors.items():
        with np.errstate(over="ignore"):
            narrow = value.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise NonFiniteError(f"{file}: {key}: expected finite float32 numbers, got NaN, infinity or larger ones.")
        if value.dtype == np.float64:
            if not np.array_equal(narrow, value):
                raise expected(f"{file}: {key}", "numbers that float32 holds", "float64 ones that it does not")
            tensors[key] = narrow
    return tensors, config_hash
