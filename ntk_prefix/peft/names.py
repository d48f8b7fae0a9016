"""What modules and tensors are called in files, which is what they are called in a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import expected
from ntk_prefix.models.loading import module_aliases, module_names

__all__ = ["CONFIG", "Fields", "Names", "exactly"]

CONFIG = "adapter_config.json"

T = TypeVar("T")

HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Fields of Hugging Face's that say nothing about what a trained adapter computes, or that the tensors say again."""


class Fields(NamedTuple):
    """The fields of an ``adapter_config.json``, and the file they stand in."""

    values: Mapping[str, Any]
    file: str

    def read(self, kind: type[T], *, harmless: frozenset[str] = frozenset(HARMLESS)) -> T:
        """Return the fields as a record, each of the type that it says.

        Fields that the record does not know, such as those of a later version, are taken as long as they are off.

        Raises:
            UsageError: a field is of another type or out of bounds, or one that is not known is on.
        """
        known = {field.name for field in dataclasses.fields(kind)} | harmless  # type: ignore[arg-type]
        on = {key: value for key, value in self.values.items() if key not in known and value and value != "none"}
        if on:
            raise expected(self.file, "fields that are known here or off", on, "They change what the adapter computes")
        return checked({key: value for key, value in self.values.items() if key in known}, kind, self.file)


class Names:
    """How a model's modules are called in files.

    In here, keys are *canonical*: the bare backbone's Hugging Face name, with ``head`` for the classifier's head.
    """

    def __init__(self, model: Any):
        self.backbone = getattr(model, "backbone", model)
        self.wrapper = "" if self.backbone is model else "backbone."
        self.prefix: str = getattr(self.backbone, "hugging_face_prefix", "")
        self.ignored: str = getattr(self.backbone, "hugging_face_ignored", r"(?!)")
        table = module_names(self.backbone) if hasattr(self.backbone, "hugging_face_names") else {}
        self.modules = {ours: theirs.removeprefix(self.prefix) for ours, theirs in table.items()}
        # what other versions of transformers call the same modules
        self.aliases = module_aliases(self.backbone) if table else {}
        # Llama's table has the prefix in it, and lm_head without; BERT's leaves it out everywhere
        spelled_out = any(theirs.startswith(self.prefix) for theirs in table.values())
        self.outside = tuple(f"{t}." for t in table.values() if spelled_out and not t.startswith(self.prefix))
        for ours, theirs in list(self.modules.items()):
            if ours.endswith("attention.query"):
                self.modules[ours.rpartition(".")[0]] = theirs.rpartition(".")[0]
        self._canonical = {alias: self.modules[ours] for ours, alias in self.aliases.items()}
        self._built = {canonical: alias for alias, canonical in self._canonical.items()}
        # a map of theirs whose parts are maps of ours, in the order of its outputs
        self.fused: dict[str, tuple[str, ...]] = {
            canonical.rpartition(".")[0]: parts
            for canonical in self.modules.values()
            for whole, parts in getattr(self.backbone, "hugging_face_fused", {}).items()
            if canonical.rpartition(".")[0].endswith(f".{whole}")
        }
        pooled = getattr(self.backbone, "head_pooling", None) or getattr(self.backbone, "pooling", None)
        transform = getattr(self.backbone, "hugging_face_transform", {})
        # the family's own head: on its pooling, behind what it stands behind
        once = getattr(self.backbone, "once_head_pooling", None) or pooled
        own = getattr(model, "pooling", None) in (pooled, once) and bool(transform) == (
            getattr(model, "transform", None) is not None
        )
        known_head = getattr(self.backbone, "hugging_face_head", None)
        has_head = hasattr(model, "head")
        self.head: str = known_head if known_head and has_head and own else "head"
        self.heads: tuple[str, ...] = ("head.",)
        """What canonical keys of the head begin with."""
        if self.head != "head":
            self.modules |= {f"transform.{ours}": theirs for ours, theirs in transform.items()}
            self.heads += tuple(f"{theirs}." for theirs in transform.values())
            self.outside += self.heads[1:]
        self.task: str | None = "FEATURE_EXTRACTION"
        if self.head != "head":
            # peft has no task of its own for images
            images = "image-classification" in getattr(self.backbone, "tasks", ())
            self.task = None if images else "SEQ_CLS"
        elif not has_head and getattr(model, "causal_lm", False):
            self.task = "CAUSAL_LM"

    def module(self, path: str) -> str:
        """Return the canonical name of the module at one of our dotted paths."""
        path = path.removeprefix(self.wrapper)
        return self.modules.get(path, path)

    def parameter(self, path: str) -> str | None:
        """Return the name of a parameter that Hugging Face keeps under a name of its own, such as ``cls_token``."""
        return self.modules.get(path.removeprefix(self.wrapper))

    def saved(self, path: str) -> str:
        """Return the name that a file's settings have for the module at one of our paths, or for the map it is a part of."""
        if path == "head":
            return self.head
        name = self.module(path)
        return whole if (whole := name.rpartition(".")[0]) in self.fused else self.built(name)

    def built(self, canonical: str) -> str:
        """Return a module's or a tensor's name as transformers' class has it today, which is what peft goes by."""
        return _renamed(canonical, self._built)

    def key(self, canonical: str) -> str:
        """Return a tensor's name in a file."""
        if canonical.startswith("head."):
            return f"base_model.model.{self.head}.{canonical.removeprefix('head.')}"
        bare = self.task == "FEATURE_EXTRACTION" or canonical.startswith(self.outside)
        return f"base_model.model.{'' if bare else self.prefix}{canonical}"

    def canonical(self, key: str) -> str:
        """Return the canonical name of a tensor in a file, which may be one of the bare model or of a task model."""
        key = key.removeprefix("base_model.").removeprefix("model.").removeprefix(self.prefix)
        if key.startswith(f"{self.head}."):
            return f"head.{key.removeprefix(f'{self.head}.')}"
        return _renamed(key, self._canonical)

    def every_name(self, path: str) -> list[str]:
        """Return what peft may call the module at one of our paths: of the bare model, of a task model, by either version."""
        path = path.removeprefix(self.wrapper)
        bare = [self.module(path), *([self.aliases[path]] if path in self.aliases else [])]
        bare += [self.head] if path == "head" != self.head else []
        bare += [whole for whole in (bare[0].rpartition(".")[0],) if whole in self.fused]
        return [*bare, *(self.prefix + name for name in bare)]


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """Return a name with the module in it called otherwise; what a tensor is called within may have dots: lora_A.weight."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (name := table.get(".".join(parts[:end]))) is not None:
            return ".".join([name, *parts[end:]])
    return key


def exactly(paths: Sequence[str]) -> str:
    """Return a regular expression for these paths and no others: our ``target``."""
    layers: dict[str, set[str]] = {}
    for path in paths:
        layer = re.search(r"(?<=\.)\d+(?=\.)", path)
        template = path if layer is None else f"{path[: layer.start()]}{{i}}{path[layer.end() :]}"
        layers.setdefault(template, set()).add("" if layer is None else layer[0])
    together: dict[tuple[str, ...], list[str]] = {}
    for template, numbers in layers.items():
        together.setdefault(tuple(sorted(numbers, key=lambda i: int(i or 0))), []).append(template)
    parts = []
    for choice, templates in together.items():
        parts += [re.escape(template).replace(r"\{i\}", f"({'|'.join(choice)})") for template in templates]
    return rf"(^|\.)({'|'.join(parts)})$"
