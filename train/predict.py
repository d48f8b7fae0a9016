"""A finished run, ready to be asked.

>>> from train.predict import load
>>> classify = load("runs/rotten_tomatoes-ntk_attention-0")
>>> classify("a gripping film")
{'label': 'positive', 'probability': 0.97}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from train.config import TrainConfig
from train.setup import load_tokenizer, model_path, read_far

__all__ = ["load"]


def load(workdir: Path | str) -> Callable[[str], dict[str, Any]]:
    """Return a function from a sentence to its label and the label's probability.

    Args:
        workdir: of a finished ``python -m train`` on a text classification task, with any method that has an adapter.

    Raises:
        ValueError: the run is not finished, is of another kind, or trained the whole model.
    """
    folder = Path(workdir)
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        raise UsageError(f"expected a finished run with a summary.json, got {folder}: run the same command to go on")
    summary = json.loads(summary_file.read_text())
    config, labels = TrainConfig.from_dict(summary["config"], str(summary_file)), summary["label_names"]
    path = model_path(config.model)
    tokenizer = None if path is None else load_tokenizer(path)
    if path is None or tokenizer is None or not labels or not (folder / "adapter").is_dir():
        raise UsageError(f"expected a run of text classification with an adapter, got {config.task} by {config.method}")
    model = models.from_pretrained(
        path,
        task="sequence-classification",
        num_labels=len(labels),
        pooling=config.pooling,
        dtype=jnp.dtype(config.device.precision),
    )
    read_far(model, config.data.max_length, config.window)
    peft.load_adapter(model, folder / "adapter")
    peft.narrow_frozen(model)
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.data.max_length)
    run = nnx.jit(lambda model, ids, mask: jax.nn.softmax(model(ids, attention_mask=mask).logits))

    def classify(text: str) -> dict[str, Any]:
        ids = tokenizer.encode(text).ids
        row = np.zeros((1, config.data.max_length), np.int32)  # one length, one program
        row[0, : len(ids)] = ids
        mask = np.arange(row.shape[1])[None] < len(ids)
        probabilities = np.asarray(run(model, row, mask))[0]
        best = int(probabilities.argmax())
        return {"label": labels[best], "probability": float(probabilities[best])}

    return classify
