"""Adapters on frozen transformers, trained by type: NTK-Attention, LoRA, prefix tuning and their neighbors.

>>> model = npx.models.from_pretrained(folder, task="sequence-classification", num_labels=2)
>>> npx.peft.apply(model, npx.peft.NTKAttentionConfig())
>>> optimizer = nnx.Optimizer(model, npx.peft.non_negative(optax.adamw(1e-3)), wrt=npx.peft.AdapterParam)
"""

from ntk_prefix.peft.base import AdapterConfig, AdapterParam
from ntk_prefix.peft.files import load_adapter, save_pretrained
from ntk_prefix.peft.inject import (
    activate,
    active_adapter,
    apply,
    configs,
    delete_adapter,
    disable_adapter,
    merge,
    mixed,
    narrow_frozen,
    non_negative,
    print_trainable_parameters,
    trainable_parameters,
)
from ntk_prefix.peft.merged import HEAD_FILE, save_merged
from ntk_prefix.peft.methods import *  # noqa: F403  a new method needs no line here
from ntk_prefix.peft.methods import METHODS, PRESETS
from ntk_prefix.peft.record import LayerRecord, record
from ntk_prefix.peft.sites import attention_fn
from ntk_prefix.peft.states import apply_states

__all__ = [
    "HEAD_FILE",
    "METHODS",
    "PRESETS",
    "AdapterConfig",
    "AdapterParam",
    "LayerRecord",
    "activate",
    "active_adapter",
    "apply",
    "apply_states",
    "attention_fn",
    "configs",
    "delete_adapter",
    "disable_adapter",
    "load_adapter",
    "merge",
    "mixed",
    "narrow_frozen",
    "non_negative",
    "print_trainable_parameters",
    "record",
    "save_merged",
    "save_pretrained",
    "trainable_parameters",
    *(kind.__name__ for kind in METHODS.values()),
]
