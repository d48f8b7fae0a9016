"""Tiny models that transformers saved, beside what it made of them: how they are drawn, and read."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np


def draw_model(
    folder: Path, model_class: str, config_class: str, sizes: dict[str, Any], seed: int
) -> tuple[Any, np.random.Generator]:
    """Save a model of transformers with every parameter drawn at random; needs torch and transformers.

    Returns:
        The model, and the generator for what it is to be asked.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data = 0.5 * parameter.data + 0.3 * torch.tensor(rng.normal(size=parameter.shape)).float()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return model, rng


@functools.cache
def recorded(folder: Path) -> dict[str, np.ndarray]:
    """Return what the model in a folder was asked, and what it answered in float64."""
    with np.load(folder / "recorded.npz") as file:
        return dict(file)
