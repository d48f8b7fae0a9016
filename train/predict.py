"""A finished run, ready to predict.

>>> from train.predict import load
>>> classify = load("runs/rotten_tomatoes-ntk_attention-0")
>>> classify("a gripping film")
{'label': 'positive', 'probability': 0.97}
>>> classify(["a gripping film", "two hours of nothing"])
[{'label': 'positive', 'probability': 0.97}, {'label': 'negative', 'probability': 0.99}]

A run on pairs takes two texts, ``classify("a premise", "a hypothesis")``, or two lists; one on images takes files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix import peft
from ntk_prefix.artifacts import read_bytes
from ntk_prefix.checks import NonFiniteError, expected
from ntk_prefix.models.run import jit_reading
from train import tasks
from train.data import Dataset, evaluation_batches, objects
from train.finished import finished
from train.images import LARGEST_FILE, decoded
from train.setup import model_inputs
from train.sources import Kind

__all__ = ["Prediction", "load"]

TOGETHER = 32
"""Rows that are classified at once."""


class Prediction(TypedDict):
    """What a run says of one row."""

    label: str
    probability: float


def load(workdir: Path | str) -> Callable[..., Prediction | list[Prediction]]:
    """Return a function from a text, a pair of texts or an image to its label and the label's probability.

    It takes what the task has: ``classify(text)``, ``classify(text, other)``, or ``classify(image)``, the path of a file or
    its bytes. Lists of these give a list of answers, computed together.

    Args:
        workdir: of a finished ``python -m train`` on a classification task, with any method that has an adapter.

    Raises:
        UsageError: the run is not finished, is of another kind, or trained the whole model; a file of it is broken.
    """
    run_of: tuple[Kind, ...] = ("sequence-classification", "image-classification")
    found = finished(workdir, "a run of classification with an adapter", run_of)
    folder, config, labels, tokenizer = found.folder, found.config, found.labels, found.tokenizer()
    texts = [column for column in ("text", "text_pair") if column in found.columns]
    image, model = found.image(), found.model()
    peft.narrow_frozen(model)
    run = jit_reading(lambda model, inputs: jax.nn.softmax(model(**inputs).logits.astype(jnp.float32)))

    def columns(inputs: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
        if not texts:
            return {"image": objects([_picture(one) for one in inputs[0]])}
        for values in inputs:
            for row, value in enumerate(values):
                if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
                    raise expected(f"classify, row {row}", "a text", ascii(value)[:100])
        rows = dict(zip(texts, inputs, strict=True))
        return tasks.encode_texts(tokenizer, rows, config.data.max_length)  # type: ignore[arg-type]

    def classify(*inputs: Any) -> Prediction | list[Prediction]:
        wanted = len(texts) or 1
        what = {0: "one image", 1: "one text", 2: "two texts, as the run was trained on pairs"}[len(texts)]
        if len(inputs) != wanted:
            raise expected("classify", what, f"{len(inputs)} arguments")
        several = isinstance(inputs[0], list | tuple)
        batches = [list(one) if isinstance(one, list | tuple) else [one] for one in inputs]
        if len({len(one) for one in batches}) != 1 or any(isinstance(one, list | tuple) != several for one in inputs):
            raise expected("classify", f"{what}, or lists of one length", f"{[len(one) for one in batches]} rows")
        if not batches[0]:
            return []
        labeled = {"labels": np.zeros(len(batches[0]), np.int32)}
        split = Dataset(columns(batches) | labeled, image=None if texts else image)
        # one length, and one or TOGETHER rows: two programs
        size = 1 if split.rows == 1 else TOGETHER
        probabilities = np.concatenate(
            [
                np.asarray(run(model, model_inputs(model, batch)))
                for batch in evaluation_batches(split, size, (config.data.max_length,))
            ]
        )[: split.rows]
        if not np.isfinite(probabilities).all():
            raise NonFiniteError(f"{folder}: expected finite probabilities, got NaN.")
        best = probabilities.argmax(axis=1)
        answers = [
            Prediction(label=labels[one], probability=float(row[one]))
            for one, row in zip(best, probabilities, strict=True)
        ]
        return answers if several else answers[0]

    return classify


def _picture(value: Any) -> np.ndarray:
    """Return an image of a file, of its bytes, or as it is."""
    is_array = isinstance(value, np.ndarray)
    if is_array and value.dtype == np.uint8 and value.size and (value.ndim == 2 or value.shape[2:] == (3,)):
        return value
    if isinstance(value, str | Path):
        return decoded(read_bytes(Path(value), LARGEST_FILE), str(value))
    if isinstance(value, bytes):
        return decoded(value, "classify: the image")
    raise expected(
        "classify",
        "an image: a path, bytes, or uint8 [h, w] or [h, w, 3]",
        f"{value.dtype} {list(value.shape)}" if is_array else type(value).__name__,
    )


def _is_unicode(text: str) -> bool:
    """Return whether a text is one: half of a surrogate pair is no character, and no tokenizer takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
