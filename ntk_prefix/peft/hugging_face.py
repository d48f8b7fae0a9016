"""Adapters in Hugging Face's words: what modules, tensors and settings are called in ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.checks import UsageError
from ntk_prefix.models.attention import AttentionLayer
from ntk_prefix.models.loading import module_aliases, module_names
from ntk_prefix.peft.base import AdapterConfig
from ntk_prefix.peft.inject import dotted, targets
from ntk_prefix.peft.methods.lora import LoraConfig
from ntk_prefix.peft.methods.ntk_attention import NTKAttentionConfig, PrefixTuningPlusConfig
from ntk_prefix.peft.methods.prefix_propagation import PrefixPropagationConfig
from ntk_prefix.peft.methods.prefix_tuning import PrefixTuningConfig
from ntk_prefix.peft.methods.weights import BitFitConfig, FullConfig, HeadConfig
from ntk_prefix.typing import Array

__all__ = ["CONFIG", "Names", "from_form", "packed", "to_form"]

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"

PREFIX_PARTS = ("prefix_key", "prefix_value")
"""What the two halves of a layer's prefix are called, in the order in which peft puts them."""

METHODS: dict[str, type[AdapterConfig]] = {
    kind.method: kind
    for kind in (
        BitFitConfig,
        FullConfig,
        HeadConfig,
        LoraConfig,
        NTKAttentionConfig,
        PrefixPropagationConfig,
        PrefixTuningConfig,
        PrefixTuningPlusConfig,
    )
}

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

HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the model's own weights as they were."""


# -------------------------------------------------------------------------------------------- names

HEAD = re.compile(r"(head|classifier|score)\.(weight|bias)$")


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
        same_pooling = getattr(model, "pooling", None) == getattr(self.backbone, "pooling", None)
        known_head = getattr(self.backbone, "hugging_face_head", None)
        has_head = hasattr(model, "head")
        self.head: str = known_head if known_head and has_head and same_pooling else "head"
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

    def key(self, canonical: str) -> str:
        """Return a tensor's name in a file."""
        if canonical.startswith("head."):
            return f"base_model.model.{self.head}.{canonical.removeprefix('head.')}"
        bare = self.task == "FEATURE_EXTRACTION" or canonical.startswith(self.outside)
        return f"base_model.model.{'' if bare else self.prefix}{canonical}"

    def canonical(self, key: str) -> str:
        """Return the canonical name of a tensor in a file, which may be one of the bare model or of a task model."""
        key = key.removeprefix("base_model.").removeprefix("model.").removeprefix(self.prefix)
        module, _, leaf = key.rpartition(".")
        if module == self.head:
            return f"head.{leaf}"
        parts = key.split(".")
        for end in range(
            len(parts) - 1, 0, -1
        ):  # what a tensor is called within its module may have dots: lora_A.weight
            if (name := self._canonical.get(".".join(parts[:end]))) is not None:
                return ".".join([name, *parts[end:]])
        return key

    def every_name(self, path: str) -> list[str]:
        """Return what peft may call the module at one of our paths: of the bare model, of a task model, by either version."""
        path = path.removeprefix(self.wrapper)
        bare = [self.module(path), *([self.aliases[path]] if path in self.aliases else [])]
        return [*bare, *(self.prefix + name for name in bare)]


# ----------------------------------------------------------------------------------- configurations


def to_form(chosen: Sequence[AdapterConfig], model: Any, names: Names, tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Return adapter_config.json."""
    common = {"task_type": names.task, "inference_mode": True}
    first = chosen[0]
    if all(isinstance(c, LoraConfig) for c in chosen) and len({c.use_rslora for c in chosen}) == 1:  # type: ignore[attr-defined]
        return {**common, **_lora_form(chosen, model, names)}  # type: ignore[arg-type]
    if isinstance(first, PrefixTuningConfig) and len(chosen) == 1:
        layers = _attention_layers(model)
        if set(targets(model, first)) == {path for path, _ in layers}:
            return {**common, **_prefix_form(first, layers)}
    methods = []
    for each in chosen:
        if isinstance(each, NTKAttentionConfig):
            # what the coordinates and the start were is multiplied in
            each = dataclasses.replace(each, whiten=False, init="zero")
        methods.append({"method": each.method, **dataclasses.asdict(each)})
    alone = len(chosen) == 1 and first.method not in ("lora", "prefix_tuning")
    return {**common, "peft_type": first.method.upper() if alone else "NTK_PREFIX", "methods": methods}


def _lora_form(chosen: Sequence[LoraConfig], model: Any, names: Names) -> dict[str, Any]:
    """Return Hugging Face's fields; the first configuration's rank and alpha, the others' as patterns."""
    first, paths = chosen[0], [targets(model, each) for each in chosen]
    others = [(each, names.module(path)) for each, group in zip(chosen, paths, strict=True) for path in group]
    return {
        "peft_type": "LORA",
        "r": first.r,
        "lora_alpha": first.numerator,
        "use_rslora": first.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules({path for group in paths for path in group}, model, names),
        "rank_pattern": {module: each.r for each, module in others if each.r != first.r},
        "alpha_pattern": {module: each.numerator for each, module in others if each.numerator != first.numerator},
    }


def _prefix_form(config: PrefixTuningConfig, layers: Sequence[tuple[str, AttentionLayer]]) -> dict[str, Any]:
    layer = layers[0][1]
    form: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.num_tokens,
        "num_layers": len(layers),
        "num_attention_heads": layer.num_key_heads,
        "token_dim": layer.num_key_heads * layer.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    if not config.shift_positions:
        logger.warning("trained with shift_positions=False: Hugging Face's models shift positions by the prefix")
        form["shift_positions"] = False
    return form


def _target_modules(chosen: set[str], model: Any, names: Names) -> list[str]:
    """Return endings of module names that select these modules and no other linear map; whole names if none do."""
    every = {path: names.module(path) for path in targets(model, LoraConfig(target=""))}
    endings = sorted({re.split(r"\.\d+\.", every[path])[-1] for path in chosen})
    if {path for path, theirs in every.items() if _selects(endings, theirs)} == chosen:
        return endings
    return sorted(every[path] for path in chosen)


def _selects(modules: str | Sequence[str], name: str) -> bool:
    """Return whether peft's ``target_modules`` means a module: a regular expression, or endings of names."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in modules)


def from_form(
    form: Mapping[str, Any], model: Any, names: Names, tensors: dict[str, Array]
) -> tuple[list[AdapterConfig], dict[str, Array]]:
    """Return the configurations that a file means, and its tensors by canonical key."""
    kind = form.get("peft_type")
    if "methods" in form:
        return [_own(fields) for fields in form["methods"]], tensors
    if kind == "LORA":
        return list(_lora_configs(form, model, names)), tensors
    if kind == "PREFIX_TUNING":
        mine = {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"}
        mine |= {"num_transformer_submodules", "prefix_projection", "init_weights", "shift_positions"}
        _refuse_unknown(form, HARMLESS | mine)
        if form.get("num_transformer_submodules") not in (None, 1):
            raise UsageError("expected num_transformer_submodules 1, got an adapter of an encoder and a decoder")
        unpacked = _unpacked(tensors, form.get("num_virtual_tokens"), model, names)
        shift = form.get("shift_positions", True)
        return [PrefixTuningConfig(num_tokens=form["num_virtual_tokens"], shift_positions=shift)], unpacked
    raise UsageError(
        f"{CONFIG}: expected peft_type LORA, PREFIX_TUNING or one of {sorted(m.upper() for m in METHODS)}, got {kind!r}"
    )


def _own(fields: Mapping[str, Any]) -> AdapterConfig:
    """Return one of our configurations from its fields."""
    method = fields.get("method")
    if method not in METHODS:
        raise UsageError(f"{CONFIG}: expected a method among {sorted(METHODS)}, got {method!r}")
    known = {field.name for field in dataclasses.fields(METHODS[method])}
    _refuse_unknown(fields, known | {"method"})
    given = {key: value for key, value in fields.items() if key in known}
    if "feature_map_options" in given:
        given["feature_map_options"] = tuple(tuple(pair) for pair in given["feature_map_options"])
    return METHODS[method](**given)


def _lora_configs(form: Mapping[str, Any], model: Any, names: Names) -> list[LoraConfig]:
    """Return one configuration for each rank and alpha that a file asks for."""
    mine = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"}
    mine |= {"layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights"}
    _refuse_unknown(form, HARMLESS | mine)
    start = form.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UsageError(
            f"{CONFIG}: expected init_lora_weights that leaves the model's weights alone, got {start!r}: "
            "convert the adapter to a plain one with peft (path_initial_model_for_weight_conversion)"
        )
    groups: dict[tuple[int, float], list[str]] = {}
    for path in targets(model, LoraConfig(target="")):
        theirs = names.every_name(path)
        if _wants(form, theirs):
            r = _patterned(form.get("rank_pattern"), theirs, form.get("r", 8))
            alpha = _patterned(form.get("alpha_pattern"), theirs, form.get("lora_alpha", 8))
            groups.setdefault((r, alpha), []).append(path.removeprefix(names.wrapper))
    if not groups:
        raise UsageError(
            f"{CONFIG}: expected target_modules that select linear maps of this model, got "
            f"{form.get('target_modules')!r}, which selects none"
        )
    return [
        LoraConfig(target=_expression(paths), r=r, alpha=alpha, use_rslora=form.get("use_rslora", False))
        for (r, alpha), paths in groups.items()
    ]


def _wants(form: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Return whether peft would put LoRA on the module that has these names."""
    chosen, excluded, numbers = (form.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    if numbers is not None:
        number = re.search(r"\.(\d+)\.", names[-1])
        if number is None or int(number[1]) not in ([numbers] if isinstance(numbers, int) else numbers):
            return False
    if excluded and any(_selects(excluded, name) for name in names):
        return False
    if chosen == "all-linear":
        return names[0] not in ("head", "lm_head")
    return any(_selects(chosen or (), name) for name in names)


def _patterned(patterns: Mapping[str, Any] | None, theirs: Sequence[str], default: Any) -> Any:
    """Return the value of the first pattern that is the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in theirs):
            return value
    return default


def _expression(paths: Sequence[str]) -> str:
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


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Take fields of a later version as long as they are off.

    Raises:
        ValueError: one is on.
    """
    on = {key: value for key, value in fields.items() if key not in known and value and value != "none"}
    if on:
        raise UsageError(
            f"{CONFIG}: expected fields that are known here or off, got {on}: they change what the adapter computes"
        )


def _attention_layers(model: Any) -> list[tuple[str, AttentionLayer]]:
    """Return all attention layers with their paths, first layer first."""
    found = [(path, layer) for path, layer in nnx.iter_modules(model) if isinstance(layer, AttentionLayer)]
    found.sort(key=lambda item: [int(part) for part in map(str, item[0]) if part.isdigit()])
    return [(dotted(path), layer) for path, layer in found]


def packed(tensors: Mapping[str, Array], model: Any, names: Names) -> dict[str, Array]:
    """Return what a file of peft's holds: all prefixes in one array [M, layers, key and value, K, H], flat but for M."""
    keys = [f"{names.module(path)}.{part}" for path, _ in _attention_layers(model) for part in PREFIX_PARTS]
    whole = jnp.stack([tensors[key] for key in keys], axis=1)
    # without a module that wraps the model, a head is one step nearer
    heads = {names.key(key).replace(".model.", ".", 1): tensors[key] for key in tensors if key not in keys}
    return {"prompt_embeddings": whole.reshape(len(whole), -1), **heads}


def _unpacked(tensors: Mapping[str, Array], tokens: int | None, model: Any, names: Names) -> dict[str, Array]:
    layers = _attention_layers(model)
    width = sum(2 * layer.num_key_heads * layer.head_dim for _, layer in layers)
    whole = tensors.get("prompt_embeddings")
    if whole is None or whole.shape != (tokens, width):
        raise UsageError(
            f"expected prompt_embeddings of shape {(tokens, width)}, [tokens, layers * 2 * key heads * head dim] of "
            f"this model, got {None if whole is None else whole.shape}: the adapter is of another model, or saved "
            "with a projection (prefix_projection) that was not multiplied in"
        )
    parts = whole.reshape(tokens, len(layers), 2, layers[0][1].num_key_heads, layers[0][1].head_dim)
    unpacked = {key: value for key, value in tensors.items() if key != "prompt_embeddings"}
    for index, (path, _) in enumerate(layers):
        for part, name in enumerate(PREFIX_PARTS):
            unpacked[f"{names.module(path)}.{name}"] = parts[:, index, part]
    return unpacked
