"""The fields of ``adapter_config.json``: what all methods have in common; what a method's own mean stands with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from flax import nnx
from msgspec import Meta

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import expected
from ntk_prefix.peft.base import AdapterConfig, dotted, module_at, targets
from ntk_prefix.peft.head import HeadConfig
from ntk_prefix.peft.methods import METHODS
from ntk_prefix.peft.names import CONFIG, Fields, Names, exactly
from ntk_prefix.peft.patterns import matching, plain
from ntk_prefix.typing import Array

__all__ = ["CONFIG", "Names", "from_fields", "to_fields"]

THEIRS = {kind.peft_type: kind for kind in METHODS.values() if kind.peft_type}

Methods = Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=1024)]
"""Several act together, and layers may each have a state of another size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ours:
    """What stands in a file of ours that Hugging Face's have not; another field may be a later version's."""

    methods: Methods
    peft_type: str = "NTK_PREFIX"


def to_fields(
    chosen: Sequence[AdapterConfig], model: Any, names: Names, tensors: Mapping[str, Array]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return adapter_config.json, and the tensors as a file has them.

    Raises:
        ValueError: a configuration that no file can hold.
    """
    first = chosen[0]
    common = {"task_type": names.task, "inference_mode": True}
    theirs = first.to_hugging_face(chosen, model, names, tensors)
    if theirs is not None:
        return {**common, **theirs[0]}, theirs[1]
    methods = [{"method": each.method, **dataclasses.asdict(each.stored())} for each in chosen]
    alone = len(chosen) == 1 and first.peft_type is None
    fields = {**common, "peft_type": first.method.upper() if alone else "NTK_PREFIX", "methods": methods}
    return fields, {names.key(key): value for key, value in tensors.items()}


def from_fields(
    fields: Fields, model: Any, names: Names, tensors: dict[str, np.ndarray]
) -> tuple[list[AdapterConfig], dict[str, np.ndarray]]:
    """Return the configurations that a file means, and its tensors by canonical key.

    Raises:
        UsageError: a method that is not known, or a field that is wrong or not known.
    """
    kind = fields.values.get("peft_type")
    if "methods" in fields.values:
        own = fields.read(_Ours)
        chosen = [_own(Fields(each, fields.file), model) for each in own.methods]
        wanted = {"NTK_PREFIX", *(each.method.upper() for each in chosen if len(chosen) == 1)}
        if own.peft_type not in wanted:
            raise expected(fields.file, f"peft_type {' or '.join(sorted(wanted))} beside these methods", repr(kind))
        return chosen, tensors
    if not isinstance(kind, str) or kind not in THEIRS:
        ours = sorted(name.upper() for name in METHODS)
        raise expected(fields.file, f"peft_type {', '.join(sorted(THEIRS))} or one of {ours}", repr(kind))
    chosen, tensors = THEIRS[kind].from_hugging_face(fields, model, names, tensors)
    return chosen + _saved_whole(fields, model, names, tensors), tensors


def _own(fields: Fields, model: Any) -> AdapterConfig:
    """Return one of our configurations from its fields."""
    method = fields.values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise expected(fields.file, f"a method among {sorted(METHODS)}", repr(method))
    config = fields.read(METHODS[method], harmless=frozenset({"method"}))
    if not plain(config.target):
        # what it selects is found once, in bounded time
        places = [dotted(path) for path, _ in nnx.iter_modules(model)]
        found = matching(config.target, places, f"{fields.file}: target", how="search")
        config = dataclasses.replace(config, target=exactly(sorted(found)) if found else "(?!)")
    return config


def _saved_whole(fields: Fields, model: Any, names: Names, tensors: Mapping[str, np.ndarray]) -> list[AdapterConfig]:
    """Return configurations for what ``modules_to_save`` has trained whole beside the classifier's head."""
    saved = checked(fields.values.get("modules_to_save") or [], list[str], f"{fields.file}: modules_to_save")
    places = [
        path
        for path in targets(model, HeadConfig(target=""))
        if path != "head"
        and f"{names.module(path)}.weight" in tensors
        and any(f".{end}." in f".{name}." for end in saved for name in names.every_name(path))
        and not _copied(module_at(model, path), tensors[f"{names.module(path)}.weight"])
    ]
    return [HeadConfig(target=exactly([place])) for place in places]


def _copied(module: Any, weight: np.ndarray) -> bool:
    """Return whether a weight in a file is the model's own: it stands there because what it is a part of is saved whole."""
    own = np.asarray(getattr(module, "base", module).kernel[...]).T
    return own.shape == weight.shape and np.array_equal(own.astype(weight.dtype), weight)
