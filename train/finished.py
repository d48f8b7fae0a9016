"""A finished run, read from its folder: the configuration, and the model with the adapter that it trained."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tokenizers

from ntk_prefix import models, peft
from ntk_prefix.artifacts import read_json
from ntk_prefix.checks import UsageError, expected
from train.assets import model_path
from train.config import TrainConfig
from train.data import ImageFormat
from train.setup import load_model, normalization, set_context_length
from train.sources import Kind, spec_of

__all__ = ["Finished", "finished"]


class Finished(NamedTuple):
    """What a run has left."""

    folder: Path
    config: TrainConfig
    kind: Kind
    columns: tuple[str, ...]
    """What a row of the task has."""
    labels: list[str]
    """Names of classes; none of a task that has no classes."""
    path: Path | None
    """Of the base model; None for one of random weights."""

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """Return the model's tokenizer, which does not pad; None for one of images."""
        found = None if self.path is None else models.load_tokenizer(self.path)
        if found is not None:
            found.no_padding()
        return found

    def image(self) -> ImageFormat:
        """Return what the model wants of an image."""
        mean, std = normalization(self.path)
        return ImageFormat(size=self.config.data.image_size, mean=mean, std=std)

    def model(self) -> Any:
        """Return the model with the adapter.

        Raises:
            UsageError: a file of either is broken.
        """
        model: Any = load_model(self.config, self.path, self.kind, len(self.labels))
        set_context_length(model, self.config)
        return peft.load_adapter(model, self.folder / "adapter")


class _Summary(msgspec.Struct):
    config: dict[str, Any]
    label_names: list[str] = []


def finished(workdir: Path | str, wanted: str = "a run with an adapter", kinds: Collection[Kind] = ()) -> Finished:
    """Return what a run has left, before its model is loaded.

    Args:
        workdir: of a ``python -m train`` with any method that has an adapter.
        wanted: what is asked for, in words.
        kinds: of tasks that it may be; any if there are none.

    Raises:
        UsageError: the run is not finished, is of another kind, or trained the whole model; a file of it is broken.
    """
    folder = Path(workdir)
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        raise expected(str(folder), "a finished run with a summary.json", "none", "Run the same command to go on")
    summary = read_json(summary_file, _Summary)
    config = TrainConfig.from_dict(summary.config, str(summary_file))
    try:
        spec, path = spec_of(config.task), model_path(config.model)
    except UsageError as error:
        raise UsageError(f"{summary_file}: {error}") from None
    classes = not spec.kind.endswith("classification") or summary.label_names
    if not (folder / "adapter").is_dir() or (kinds and spec.kind not in kinds) or not classes:
        raise expected(str(folder), wanted, f"{config.task} by {config.method} on {config.model}")
    found = Finished(folder, config, spec.kind, tuple(spec.columns), summary.label_names, path)
    if "text" in spec.columns and found.tokenizer() is None:
        raise expected(str(folder), f"{wanted}, of a model with a tokenizer", config.model)
    return found
