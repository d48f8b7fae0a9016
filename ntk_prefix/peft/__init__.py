"""Adapters on frozen transformers, trained by type: NTK-Attention, LoRA, prefix tuning and their neighbors.

>>> model = npx.models.from_pretrained(folder, task="sequence-classification", num_labels=2)
>>> npx.peft.apply(model, npx.peft.NTKAttentionConfig())
>>> optimizer = nnx.Optimizer(model, npx.peft.non_negative(optax.adamw(1e-3)), wrt=npx.peft.AdapterParam)

Classes have a help of their own, ``help(npx.peft.LoraConfig)``:

- a configuration for each method, which ``METHODS`` lists by name: ``NTKAttentionConfig``, ``PrefixTuningPlusConfig``,
  ``LoraConfig``, ``PrefixTuningConfig``, ``PrefixPropagationConfig``, ``BitFitConfig``, ``HeadConfig``, ``FullConfig``;
- ``AdapterConfig``, which they are derived from; ``AdapterParam``, the type of what is trained; ``LayerRecord``, what
  ``record`` finds.
"""

from ntk_prefix.peft.base import AdapterConfig as AdapterConfig
from ntk_prefix.peft.base import AdapterParam as AdapterParam
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
from ntk_prefix.peft.record import LayerRecord as LayerRecord
from ntk_prefix.peft.record import record
from ntk_prefix.peft.sites import attention_fn
from ntk_prefix.peft.states import apply_states

# without classes, as in ntk_prefix/__init__.py
__all__ = [
    "HEAD_FILE",
    "METHODS",
    "PRESETS",
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
]
