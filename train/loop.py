"""The training loop: set up, resume, step, look, keep, sum up.

A run is a folder::

    config.json      what was asked for          checkpoints/     adapter, optimizer, step; the last two
    metrics.jsonl    what was seen on the way    adapter/         the best adapter, in Hugging Face form
    summary.json     the result, with versions and commit
    answers.jsonl    of a language task: what was generated, before and after

Order of resuming: ``config.json`` must agree; the last good checkpoint gives weights, optimizer, step, the best weights
so far and the looks since; batch number = step, so the data goes on where it was; ``metrics.jsonl`` is cut back to the
checkpoint's step. The numbers are then bit for bit those of an unbroken run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.metrics import f1_score

from ntk_prefix import peft
from ntk_prefix.artifacts import held, json_text, peak_memory, provenance, write_whole
from ntk_prefix.checks import UsageError
from ntk_prefix.training import TrainState
from train import confidence, data
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.evaluate import Evaluator, Predictions
from train.setup import Setup, build

__all__ = ["Interrupted", "run"]

logger = logging.getLogger(__name__)

LOOK = 10
"""Steps between readings of the loss: the device is not waited for in between."""


class Interrupted(Exception):
    """The run was asked to stop; everything is saved, and the same command goes on."""


def run(config: TrainConfig, workdir: Path, console: Console | None = None) -> dict[str, Any]:
    """Train, or go on training, what ``config`` says in ``workdir``; return the summary.

    Raises:
        ValueError: a configuration that does not fit itself, its data, its model, or what stands in the folder; a folder
            that another process trains in.
        FloatingPointError: the loss is not finite.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with _alone(workdir):
        finished = _claim(config, workdir)
        if finished is not None:
            return finished
        setup = build(config)
        if jax.process_index() == 0:
            # only now: a run that could not be set up leaves the folder to one that can
            write_whole(workdir / "config.json", json_text(config.as_dict()).encode())
        with Checkpoints(workdir / "checkpoints") as checkpoints, _Signals() as signals:
            return _Run(setup, workdir, checkpoints, console or Console(quiet=True)).train(signals)


class _Run:
    """The state of one run, between setting up and summing up."""

    def __init__(self, setup: Setup, workdir: Path, checkpoints: Checkpoints, console: Console):
        self.setup, self.config, self.workdir, self.console = setup, setup.config, workdir, console
        self.checkpoints = checkpoints
        self.evaluate = Evaluator(setup)
        self.step = setup.trainer.stepper(setup.model)
        self.state = setup.trainer.init(setup.model)
        self.best = jax.tree.map(jnp.copy, self.state.trained)
        self.best_worth, self.best_step, self.looks_since = 0.0, 0, 0
        self.best_seen: Predictions | None = None
        self.done = 0
        self.stopped = False
        self.metrics = workdir / "metrics.jsonl"
        self._resume()

    def train(self, signals: _Signals) -> dict[str, Any]:
        config = self.config
        batches = self._batches()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(f"{config.task} {config.method}", total=config.optim.steps, completed=self.done)
            readings: list[dict[str, jax.Array]] = []
            begun = time.perf_counter()
            while self.done < config.optim.steps and not self.stopped:
                for _ in range(config.optim.accumulate):
                    self.state, reading = self.step(self.state, self.setup.trainer.place(next(batches)))
                readings.append(reading)
                self.done += 1
                if len(readings) > 1:  # one step ahead of the device and no more: a signal is heard at the next
                    jax.block_until_ready(readings[-2])
                at_look = self.done % config.eval.evaluate_every == 0 or self.done == config.optim.steps
                at_save = self.done % config.eval.checkpoint_every == 0 or self.done == config.optim.steps
                if len(readings) == LOOK or at_look or at_save or signals.received:
                    self._read(readings, begun)
                    progress.update(bar, completed=self.done, description=self._line(readings))
                    readings = []
                    if at_look:
                        self._look()
                    if at_save or signals.received or self.stopped:
                        self._save()
                    if signals.received:
                        break
                    begun = time.perf_counter()
        self.checkpoints.wait()
        signals.saved = True
        if signals.received:  # also if that was while the last checkpoint was written
            raise Interrupted(f"stopped at step {self.done} of {config.optim.steps}; the same command goes on")
        return self._sum_up()

    # ----------------------------------------------------------------------------------- on the way

    def _batches(self) -> Iterator[data.Batch]:
        config = self.config
        # a step's batch comes in `accumulate` parts; the optimizer collects them
        parts = data.train_batches(
            self.setup.task.train,
            config.optim.batch_size // config.optim.accumulate,
            config.seed,
            start=self.done * config.optim.accumulate,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            # the parts of a step's batch are alike in length too
            grouped=config.data.grouped * config.optim.accumulate,
        )
        return (batch for _, batch in parts)

    def _read(self, readings: list[dict[str, jax.Array]], begun: float) -> None:
        """Fetch what the device measured; a loss that is not finite ends the run before it is saved."""
        values = [{name: float(value) for name, value in reading.items()} for reading in readings]
        seconds = time.perf_counter() - begun
        losses = [value["loss"] for value in values]
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"step {self.done}: expected a finite loss, got {losses}. The last checkpoint is whole; "
                "lower --learning-rate, or use --precision float32, in another --workdir."
            )
        self._write(
            step=self.done,
            loss=statistics.fmean(losses),
            gradient_norm=values[-1]["gradient_norm"],
            update_norm=values[-1]["update_norm"],
            seconds_a_step=seconds / len(readings),
        )
        readings[:] = [{"loss": jnp.asarray(statistics.fmean(losses))}]

    def _look(self) -> None:
        """Evaluate on the validation split; keep the best; stop if there was no better one for long."""
        seen = self.evaluate(self.state, self.setup.task.validation, generate=False)
        self._write(step=self.done, validation_score=seen.score, validation_loss=seen.loss)
        worth = self.config.eval.selection_metric(seen.score, seen.loss)
        if self.best_step == 0 or worth > self.best_worth:
            self.best, self.best_worth, self.best_step = jax.tree.map(jnp.copy, self.state.trained), worth, self.done
            self.best_seen = seen
            self.looks_since = 0
        else:
            self.looks_since += 1
        self.stopped = 0 < self.config.eval.patience <= self.looks_since

    def _line(self, readings: list[dict[str, jax.Array]]) -> str:
        return f"{self.config.task} {self.config.method}  loss {float(readings[-1]['loss']):.4f}"

    # ----------------------------------------------------------------------------------------- kept

    def _tree(self) -> dict[str, Any]:
        """What a checkpoint holds: everything that training changes, frozen weights left out."""
        tree = self.setup.trainer.single({**self.state._asdict(), "best": self.best})
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

    def _save(self) -> None:
        info = {
            "best_score": self.best_worth,
            "best_step": self.best_step,
            "looks_since": self.looks_since,
            "stopped": self.stopped,
            "metrics_bytes": self.metrics.stat().st_size if self.metrics.exists() else 0,
        }
        self.checkpoints.save(self.done, self._tree(), info)

    def _resume(self) -> None:
        like = self._tree()
        found = self.checkpoints.restore_latest(like)
        if found is None:
            self.metrics.unlink(missing_ok=True)
            return
        self.done, flat, info = found
        tree = {**self.state._asdict(), "best": self.best}
        structure = jax.tree.structure(tree)
        tree = self.setup.trainer.lay_out(jax.tree.unflatten(structure, [flat[name] for name in like]))
        self.best = tree.pop("best")
        self.state = TrainState(**tree)
        self.best_worth, self.best_step = info["best_score"], info["best_step"]
        self.looks_since, self.stopped = info["looks_since"], info["stopped"]
        if self.metrics.exists():
            with self.metrics.open("r+b") as file:
                file.truncate(info["metrics_bytes"])
        self.console.print(f"going on from step {self.done}")

    def _write(self, **values: Any) -> None:
        if jax.process_index() == 0:
            with self.metrics.open("a") as file:
                file.write(json_text(values, indent=None))

    # --------------------------------------------------------------------------------------- result

    def _sum_up(self) -> dict[str, Any]:
        """Look at the test split, once and if it is asked for, with the best weights; save the adapter and the summary."""
        config, setup = self.config, self.setup
        best = self.state._replace(trained=self.best)
        # a run that was gone on with has the best weights, and not what they predicted
        validation = self.best_seen or self.evaluate(best, setup.task.validation, generate=False)
        language = config.eval.test and setup.task.kind == "causal-lm"
        if language:
            self.console.print(f"answering {setup.task.test.rows} test rows, as trained and as at the start")
        test = self.evaluate(best, setup.task.test) if config.eval.test else None
        # the model that was set up still has the weights of the start
        before = self.evaluate(setup.trainer.init(setup.model), setup.task.test) if language else None
        model = setup.trainer.model(setup.model, best)
        trained, whole = peft.trainable_parameters(model)
        summary = {
            "task": config.task,
            "method": config.method,
            "metric": setup.task.metric,
            "test_score": test and test.score,
            "test_loss": test and test.loss,
            "test_score_before": before and before.score,
            "test_loss_before": before and before.loss,
            "test_last_number": test and test.last_number,
            "test_last_number_before": before and before.last_number,
            "test_rows": test and len(test.correct),
            "validation_score": validation.score,
            "validation_loss": validation.loss,
            "best_step": self.best_step,
            "steps": self.done,
            "trainable_parameters": trained,
            "parameters": whole,
            "seconds_a_step": self._median_seconds(),
            "peak_memory_bytes": self._peak_memory(),
            "adapter_bytes": None,
            "label_names": setup.task.label_names,
            "source": setup.task.source,
            "config": config.as_dict(),
            **_confidence(validation, test),
            **provenance("orbax-checkpoint", sources=("ntk_prefix/**/*.py", "train/*.py")),
        }
        if jax.process_index() == 0:
            if config.method != "full":
                peft.save_pretrained(model, self.workdir / "adapter", base_model_name_or_path=config.model)
                summary["adapter_bytes"] = (self.workdir / "adapter" / "adapter_model.safetensors").stat().st_size
            if test is not None and before is not None:
                columns = {
                    "question": setup.task.test["question"],
                    "answer": setup.task.test["answer"],
                    "before": before.texts,
                    "generated": test.texts,
                }
                rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
                write_whole(
                    self.workdir / "answers.jsonl", "".join(json_text(row, indent=None) for row in rows).encode()
                )
            write_whole(self.workdir / "summary.json", json_text(summary).encode())
        return json.loads(json_text(summary))

    def _median_seconds(self) -> float | None:
        """Of a step, over all that was logged, by earlier processes too."""
        if not self.metrics.exists():  # not the first process, which alone writes
            return None
        lines = map(json.loads, self.metrics.read_text().splitlines())
        seconds = [line["seconds_a_step"] for line in lines if "seconds_a_step" in line]
        return statistics.median(seconds) if seconds else None

    def _peak_memory(self) -> int:
        """Of this process, or of one that trained and left the test split to this one."""
        before = self.workdir / "summary.json"
        return max(peak_memory(), json.loads(before.read_text())["peak_memory_bytes"] if before.is_file() else 0)


class _Signals:
    """Turns SIGTERM and SIGINT into a wish to stop after the step that is running, or at once when all is saved."""

    def __init__(self) -> None:
        self.received = self.saved = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        try:
            self._before = {kind: signal.signal(kind, self._hear) for kind in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs us there has the signals
            logger.info("signals are left to the main thread")
        return self

    def __exit__(self, *_: object) -> None:
        for kind, before in self._before.items():
            signal.signal(kind, before)

    def _hear(self, kind: int, frame: FrameType | None) -> None:
        if self.saved:
            raise Interrupted("stopped between the last step and the result; the same command goes on")
        if self.received:  # asked twice: at once
            raise KeyboardInterrupt
        self.received = True


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Hold the folder, which ends with this process however it ends; of several processes of a job the first does.

    Raises:
        ValueError: another run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    with held(workdir / ".lock", "--workdir"):
        yield


def _claim(config: TrainConfig, workdir: Path) -> dict[str, Any] | None:
    """Return the summary if the run is finished in the folder, test split included if that is asked for.

    Raises:
        ValueError: the folder has another configuration's run.
    """
    path = workdir / "config.json"
    if path.is_file():
        # whether the test split is read changes nothing of what is trained
        there = TrainConfig.from_file(path).changed(test=config.eval.test).flat()
        wanted = config.flat()
        if changed := sorted(name for name in wanted if there[name] != wanted[name]):
            raise UsageError(
                f"--workdir: expected a new folder, or one of this configuration, got {workdir}, which differs in "
                f"{', '.join(changed)}. Name another folder."
            )
    if not (workdir / "summary.json").is_file():
        return None
    summary = json.loads((workdir / "summary.json").read_text())
    return None if config.eval.test and summary["test_score"] is None else summary


def _confidence(validation: Predictions, test: Predictions | None) -> dict[str, Any]:
    """What a classifier's probabilities are worth on the test split; the temperature is validation's."""
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
