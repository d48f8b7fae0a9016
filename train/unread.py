"""Fields of a configuration that say nothing to its task or to its method: nobody may think that they do."""

from __future__ import annotations

from ntk_prefix import peft
from train.config import TrainConfig, adapter_config
from train.sources import Kind, spec_of

__all__ = ["unread"]

LANGUAGE_ONLY = ("prompt_template", "max_new_tokens", "before", "unrelated", "unrelated_rows", "unrelated_length")
RANKING_ONLY = ("suffix_length", "negatives", "generated", "generated_negatives", "human", "temperature")

MEANINGLESS: dict[Kind, tuple[str, ...]] = {
    "sequence-classification": ("image_size", *LANGUAGE_ONLY, *RANKING_ONLY),
    "image-classification": ("max_length", "window", "grouped", *LANGUAGE_ONLY, *RANKING_ONLY),
    "causal-lm": ("image_size", "window", "pooling", "head_learning_rate", *RANKING_ONLY),
    "ranking": ("image_size", "window", "accumulate", *LANGUAGE_ONLY),
}
"""Fields that say nothing to a kind of task."""


def unread(config: TrainConfig) -> dict[str, str]:
    """Return the fields that a run would never look at, and to what they mean nothing, in words."""
    of_method = f"method {config.method}, which trains nothing at it"
    of_task = dict.fromkeys(MEANINGLESS[spec_of(config.task).kind], f"task {config.task}")
    return dict.fromkeys(_idle_rates(config), of_method) | of_task


def _idle_rates(config: TrainConfig) -> list[str]:
    """Return the learning rates at which the method trains nothing."""
    chosen = adapter_config(config.method, config.adapter)
    heads = [each for each in chosen if isinstance(each, peft.HeadConfig) and each.target == peft.HeadConfig.target]
    idle = {
        "learning_rate": len(heads) == len(chosen),
        "head_learning_rate": not heads and not any(each.train_head or each.in_place for each in chosen),
        "k_learning_rate": not any(isinstance(each, peft.NTKAttentionConfig) and each.train_k for each in chosen),
    }
    return [name for name, is_idle in idle.items() if is_idle]
