"""An adapter's model card: a README.md beside its weights, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ntk_prefix.artifacts import json_text
from train.asset_table import ASSETS
from train.config import CONFIGS, TrainConfig
from train.unread import unread

__all__ = ["card", "command"]

MEASURED = (
    ("test_score", "test split: {metric}"),
    ("macro_f1", "test split: macro-F1"),
    ("calibration_error", "test split: calibration error"),
    ("test_loss", "test split: loss"),
    ("validation_score", "validation split: {metric}"),
    ("forgetting", "rise of the loss on unrelated text"),
    ("trainable_parameters", "parameters trained"),
    ("parameters", "parameters of the model"),
    ("steps", "steps"),
    ("seconds_a_step", "seconds per step"),
)
"""What of a summary the card shows, in this order."""

TAGS = {
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
    "ranking": "sentence-similarity",
}
"""The hub's word for a kind of task."""


def command(config: TrainConfig) -> str:
    """Return a command line that asks for this configuration: the nearest named one, and what differs from it.

    What such a run would never look at is left out.
    """
    silent = unread(config)
    wanted = {field: value for field, value in config.flat().items() if field not in silent}
    changes = {
        name: {field: value for field, value in wanted.items() if known.flat()[field] != value}
        for name, (_, known) in CONFIGS.items()
    }
    name = min(changes, key=lambda name: len(changes[name]))
    words = ["python", "-m", "train", name]
    for field, value in changes[name].items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(value, bool) and field != "remat":
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def card(summary: dict[str, Any], kind: str) -> str:
    """Return the card of a run's adapter.

    Args:
        summary: of the run.
        kind: of its task, see :data:`TAGS`.
    """
    config = TrainConfig.from_dict(summary["config"])
    score = summary.get("test_score")
    # JSON is YAML
    head = {
        "library_name": "ntk-prefix",
        "base_model": summary["model_source"] or config.model,
        "pipeline_tag": TAGS[kind],
        "tags": ["jax", "flax", config.method],
        "metrics": [summary["metric"]],
    }
    title = f"{config.method} for {config.task}"
    if score is not None:
        result = {
            "task": {"type": TAGS[kind]},
            "dataset": {"name": config.task, "type": config.task, "split": "test"},
            "metrics": [{"type": summary["metric"], "value": score}],
        }
        head["model-index"] = [{"name": title, "results": [result]}]
    rows = [
        f"| {what.format(metric=summary['metric'])} | {_shown(summary[name])} |"
        for name, what in MEASURED
        if summary.get(name) is not None
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    tested = "" if score is None else f", {summary['test_rows']:,} test rows"
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    return f"""---
{front}
---
# {title}

An adapter for {head["base_model"]}, trained with ntk_prefix while the model stayed frozen.

| measured | |
| --- | --- |
{chr(10).join(rows)}

One run, seed {config.seed}{tested}; the validation split chose step {summary["best_step"]}.

## Use

```python
{_code(config, kind, summary)}
```

## Trained by

```
{command(config)}
```

Data: {summary["source"]}. Versions: {versions}. Commit {summary["git"]}.

<details><summary>Every setting</summary>

```json
{json_text(config.as_dict()).rstrip()}
```
</details>
"""


def _code(config: TrainConfig, kind: str, summary: dict[str, Any]) -> str:
    """Return how the adapter is put on the model that it was trained on."""
    source = summary["model_source"] or config.model
    base, imports = json.dumps(source), ""
    if source in ASSETS:  # a name that train knows, and models does not
        base, imports = f"model_path({base})", "from train.assets import model_path\n"
    if kind == "ranking":
        return f'from ntk_prefix import models\n{imports}\nranker = models.load_ranker({base}, adapter="THIS FOLDER")'
    said = [f'task="{kind}"']
    if kind != "causal-lm":
        said += [f"num_labels={len(summary['label_names'])}", f'pooling="{config.pooling}"']
    return (
        f"from ntk_prefix import models, peft\n{imports}\n"
        f"model = models.from_pretrained({base}, {', '.join(said)})\n"
        'peft.load_adapter(model, "THIS FOLDER")'
    )


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
