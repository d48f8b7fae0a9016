"""The result of a run: what its best weights reach, as summary.json has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from ntk_prefix import peft
from ntk_prefix.artifacts import peak_memory, provenance
from train import confidence
from train.evaluate import Predictions
from train.folder import RunFolder
from train.setup import Setup

__all__ = ["summary"]


def summary(
    setup: Setup,
    folder: RunFolder,
    model: Any,
    *,
    steps: int,
    best_step: int,
    validation: Predictions,
    test: Predictions | None,
    before: Predictions | None,
    unrelated: tuple[float, float] | None = None,
    human: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a run leaves behind.

    Args:
        setup: of the run.
        folder: of the run, which has its times.
        model: with the best weights.
        steps: that were taken.
        best_step: the one whose weights are the best.
        validation: of the best weights.
        test: of the best weights; None if that split was not read.
        before: of the model as it was at the start, on the test split, for language.
        unrelated: its loss on unrelated text, without its adapter and with the best weights; None if not measured.
        human: how a ranker's choices agree with people's; None if not measured.
    """
    config, task = setup.config, setup.task
    trained, whole = peft.trainable_parameters(model)
    return {
        "task": config.task,
        "method": config.method,
        "metric": task.metric,
        "test_score": test and test.score,
        "test_loss": test and test.loss,
        "test_score_before": before and before.score,
        "test_loss_before": before and before.loss,
        "test_last_number": test and test.last_number,
        "test_last_number_before": before and before.last_number,
        "test_rows": test and len(test.correct),
        "unrelated_loss_before": unrelated and unrelated[0],
        "unrelated_loss": unrelated and unrelated[1],
        "forgetting": unrelated and unrelated[1] - unrelated[0],
        "validation_score": validation.score,
        "validation_loss": validation.loss,
        "best_step": best_step,
        "steps": steps,
        "trainable_parameters": trained,
        "parameters": whole,
        "seconds_a_step": folder.metrics.seconds_a_step(),
        "peak_memory_bytes": max(peak_memory(), folder.earlier_peak_memory()),
        "adapter_bytes": None,
        "label_names": task.label_names,
        "source": task.source,
        "model_source": setup.model_source,
        "config": config.as_dict(),
        **({} if test is None or test.identified is None else {**test.identified, "agreement": human}),
        **_confidence(validation, test),
        **provenance("orbax-checkpoint", sources=("ntk_prefix/**/*.py", "train/**/*.py")),
    }


def _confidence(validation: Predictions, test: Predictions | None) -> dict[str, Any]:
    """Return what a classifier's probabilities are worth on the test split; the temperature is validation's."""
    if test is None or test.log_probabilities is None or test.labels is None or validation.log_probabilities is None:
        return {}
    assert validation.labels is not None
    bins = confidence.reliability(np.exp(test.log_probabilities), test.labels)
    t = confidence.temperature(validation.log_probabilities, validation.labels)
    cooled = confidence.reliability(confidence.scaled(test.log_probabilities, t), test.labels)
    return {
        "macro_f1": float(f1_score(test.labels, test.log_probabilities.argmax(axis=1), average="macro")),
        "calibration_error": confidence.calibration_error(bins),
        "temperature": t,
        "calibration_error_scaled": confidence.calibration_error(cooled),
        "reliability": [b._asdict() for b in bins],
    }
