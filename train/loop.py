"""The training loop: set up, resume, step, evaluate, keep, summarize.

Order of resuming: ``config.json`` must agree; the last good checkpoint gives weights, optimizer, step, the best weights
so far and the evaluations since; batch number = step, so the data goes on where it was; ``metrics.jsonl`` is cut back to
the checkpoint's step. The numbers are then bit for bit those of an unbroken run.

Numbers are checked after they change and before anything is kept: a step's loss, gradient, update and the weights it
leaves, an evaluation's loss, and whatever is written. One that is not finite ends the run with
``DivergedError``, a ``NonFiniteError``; the last checkpoint is then whole, and there is no result.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ntk_prefix import peft
from ntk_prefix.artifacts import json_text, write_whole
from ntk_prefix.checks import NonFiniteError, expected
from ntk_prefix.models.ranker import save_settings
from ntk_prefix.training import TrainState
from train import data, result, trackers
from train.card import card
from train.checkpoint import Checkpoints
from train.command import DivergedError
from train.config import TrainConfig
from train.evaluate import Evaluator, Predictions
from train.fingerprint import fingerprint
from train.folder import RunFolder
from train.interrupt import Interrupted, Signals
from train.setup import Setup, build

__all__ = ["Interrupted", "run"]

LOG_EVERY = 10
"""Steps between readings of the loss: the device is not waited for in between."""

MEND = "The last checkpoint is whole; lower --learning-rate, or use --precision float32, in another --workdir"


def run(config: TrainConfig, workdir: Path, console: Console | None = None, log: str = "jsonl") -> dict[str, Any]:
    """Train, or go on training, what ``config`` says in ``workdir``; return the summary.

    Args:
        config: of the run.
        workdir: its folder.
        console: told what happens.
        log: of :data:`train.trackers.TRACKERS`, where measurements also go.

    Raises:
        UsageError: a configuration that does not fit itself, its data, its model, or what stands in the folder; a folder
            that another process trains in.
        DivergedError: a number of the training is not finite any more.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    folder = RunFolder(workdir)
    with folder.held():
        rows = fingerprint(config.task, config.data.data_dir)
        finished = folder.finished(config, rows)
        if finished is not None:
            return finished
        setup = build(config)
        if jax.process_index() == 0:
            if console is not None:
                console.print(str(setup.task), markup=False, highlight=False, soft_wrap=True)
            # only now: a run whose setup fails must not take the folder
            folder.write_config(config, rows)
        with Checkpoints(workdir / "checkpoints") as checkpoints, Signals() as signals:
            training = _Run(setup, folder, checkpoints, console or Console(quiet=True), log)
            result = None
            try:
                result = training.train(signals)
            except NonFiniteError as error:
                raise DivergedError(str(error)) from error
            finally:
                training.tracker.close(result and _measured(result))
            return result


def _asked(signals: Signals, together: bool = True) -> bool:
    """Return whether to stop: of several processes all do when one is asked to, where all of them come together.

    One that saved alone would wait for the others, which wait for it in the next step.
    """
    if jax.process_count() == 1:
        return signals.received
    return together and bool(multihost_utils.process_allgather(np.array(signals.received)).any())


def _measured(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary, without the settings."""
    return {name: x for name, x in summary.items() if isinstance(x, int | float) and not isinstance(x, bool)}


class _Kept(TypedDict):
    """What a checkpoint says beside its arrays."""

    selection_metric: float
    """Of the best weights so far."""
    best_step: Annotated[int, msgspec.Meta(ge=0)]
    evaluations_since: Annotated[int, msgspec.Meta(ge=0)]
    """The best one."""
    stopped: bool
    """By --patience."""
    metrics_bytes: Annotated[int, msgspec.Meta(ge=0)]
    """Of metrics.jsonl at that time."""


def _kept(info: dict[str, Any]) -> _Kept:
    """Return a checkpoint's record, also under the names that older versions gave it.

    Raises:
        UsageError: it is another's, or damaged.
    """
    names = {"best_score": "selection_metric", "looks_since": "evaluations_since"}
    try:
        kept = msgspec.convert({names.get(name, name): value for name, value in info.items()}, _Kept)
    except msgspec.ValidationError as error:
        raise expected("info", "what a run keeps in a checkpoint", f"this: {error}") from None
    if not math.isfinite(kept["selection_metric"]):
        raise NonFiniteError(f"info: expected a finite selection metric, got {kept['selection_metric']}.")
    return kept


class _Run:
    """The state of one run, between setup and summary."""

    def __init__(self, setup: Setup, folder: RunFolder, checkpoints: Checkpoints, console: Console, log: str):
        self.setup, self.config, self.folder, self.console = setup, setup.config, folder, console
        self.checkpoints = checkpoints
        self.evaluate = Evaluator(setup)
        self.step = setup.trainer.stepper(setup.model)
        self.state = setup.trainer.init(setup.model)
        self.done = 0
        # the best so far, by the validation split
        self.best = jax.tree.map(jnp.copy, self.state.trained)
        self.best_metric, self.best_step, self.evaluations_since = 0.0, 0, 0
        self.best_predictions: Predictions | None = None
        self.stopped = False
        self._resume()
        # of several processes the first one writes
        first = jax.process_index() == 0
        self.tracker = trackers.tracker(log if first else "jsonl", folder.path, setup.config.flat(), self.done)

    def train(self, signals: Signals) -> dict[str, Any]:
        """Take the steps that are left and return the summary.

        Raises:
            NonFiniteError: a number is not finite any more.
            Interrupted: a signal was received.
        """
        config, steps = self.config, self.config.optim.steps
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
            name = escape(f"{config.task} {config.method}")
            bar = progress.add_task(name, total=steps, completed=self.done)
            readings: list[list[dict[str, jax.Array]]] = []
            begun = time.perf_counter()
            asked = False
            while self.done < steps and not self.stopped and not asked:
                readings.append([self._part(next(batches)) for _ in range(config.optim.accumulate)])
                self.done += 1
                if len(readings) > 1:  # one step ahead of the device and no more: a signal is heard at the next
                    jax.block_until_ready(readings[-2])
                last = self.done == steps
                evaluating = last or self.done % config.eval.evaluate_every == 0
                saving = last or self.done % config.eval.checkpoint_every == 0
                due = len(readings) == LOG_EVERY or evaluating or saving
                asked = _asked(signals, due)
                if due or asked:
                    loss = self._log(readings, begun)
                    progress.update(bar, completed=self.done, description=f"{name}  loss {loss:.4f}")
                    readings = []
                    if evaluating:
                        self._evaluate()
                    if saving or asked or self.stopped:
                        self._save()
                    begun = time.perf_counter()
        self.checkpoints.wait()
        asked = asked or _asked(signals)  # while the last checkpoint was written
        signals.saved = True
        if asked:
            raise Interrupted(f"stopped at step {self.done} of {steps}; the same command goes on")
        if self.stopped and self.done < steps:
            self._say(f"stopped at step {self.done}: no better evaluation in the last {self.evaluations_since}")
        return self._summarize()

    # ----------------------------------------------------------------------------------- on the way

    def _batches(self) -> Iterator[data.Batch]:
        config = self.config
        batches = data.train_batches(
            self.setup.task.train,
            config.optim.batch_size,
            config.seed,
            start=self.done,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            grouped=config.data.grouped,
        )
        # a step's batch comes in `accumulate` parts; the optimizer collects them
        return (part for _, batch in batches for part in data.parts(batch, config.optim.accumulate))

    def _part(self, batch: data.Batch) -> dict[str, jax.Array]:
        """Take a step, or a part of one; return what the device measures."""
        self.state, reading = self.step(self.state, self.setup.trainer.place(batch))
        return reading

    def _log(self, readings: list[list[dict[str, jax.Array]]], begun: float) -> float:
        """Fetch what the device measured, write it down, and return the mean loss.

        Raises:
            NonFiniteError: a number is not finite, or a weight after the update is not: before anything is saved.
        """
        steps: list[list[dict[str, Any]]] = jax.device_get(readings)
        seconds = time.perf_counter() - begun
        for number, parts in enumerate(steps, start=self.done - len(steps) + 1):
            for name in ("loss", "gradient_norm", "update_norm"):
                if bad := [float(part[name]) for part in parts if not math.isfinite(part[name])]:
                    raise NonFiniteError(
                        f"step {number}: expected a finite {name.replace('_', ' ')}, got {bad[0]}. {MEND}."
                    )
            if not all(part["finite"] for part in parts):
                raise NonFiniteError(f"step {number}: expected finite weights after the update, got others. {MEND}.")
        # of the whole batch: the loss is the mean of its parts, and the last part's norms are those of all
        loss = statistics.fmean(float(part["loss"]) for parts in steps for part in parts)
        self._write(
            loss=loss,
            gradient_norm=float(steps[-1][-1]["gradient_norm"]),
            update_norm=float(steps[-1][-1]["update_norm"]),
            seconds_a_step=seconds / len(steps),
        )
        return loss

    def _evaluate(self) -> None:
        """Evaluate on the validation split; keep the best; stop if there was no better one for long.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        seen = self.evaluate(self.state, self.setup.task.validation, generate=False)
        if not math.isfinite(seen.loss):  # before it is compared: nothing is larger than NaN
            raise NonFiniteError(f"step {self.done}: expected a finite validation loss, got {seen.loss}. {MEND}.")
        self._write(validation_score=seen.score, validation_loss=seen.loss)
        metric = self.config.eval.selection_metric(seen.score, seen.loss)
        if self.best_step == 0 or metric > self.best_metric:
            self.best, self.best_metric, self.best_step = jax.tree.map(jnp.copy, self.state.trained), metric, self.done
            self.best_predictions = seen
            self.evaluations_since = 0
        else:
            self.evaluations_since += 1
        self.stopped = 0 < self.config.eval.patience <= self.evaluations_since

    def _write(self, **values: float) -> None:
        if jax.process_index() == 0:
            self.folder.metrics.append(step=self.done, **values)
            self.tracker.write(self.done, values)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    # ----------------------------------------------------------------------------------------- kept

    def _tree(self) -> dict[str, Any]:
        """Return what a checkpoint holds: everything that training changes, frozen weights left out."""
        tree = self.setup.trainer.single({**self.state._asdict(), "best": self.best})
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

    def _save(self) -> None:
        info: _Kept = {
            "selection_metric": self.best_metric,
            "best_step": self.best_step,
            "evaluations_since": self.evaluations_since,
            "stopped": self.stopped,
            "metrics_bytes": self.folder.metrics.sync(),
        }
        self.checkpoints.save(self.done, self._tree(), info)

    def _resume(self) -> None:
        like = self._tree()
        found = self.checkpoints.restore_latest(like, _kept)
        if found is None:
            if jax.process_index() == 0:
                self.folder.metrics.clear()
            return
        self.done, flat, info = found
        tree = {**self.state._asdict(), "best": self.best}
        structure = jax.tree.structure(tree)
        tree = self.setup.trainer.lay_out(jax.tree.unflatten(structure, [flat[name] for name in like]))
        self.best = tree.pop("best")
        self.state = TrainState(**tree)
        self.best_metric, self.best_step = info["selection_metric"], info["best_step"]
        self.evaluations_since, self.stopped = info["evaluations_since"], info["stopped"]
        self._say(f"going on from step {self.done}")
        if jax.process_index() == 0 and (damage := self.folder.metrics.cut(info["metrics_bytes"], self.done)):
            self._say(damage)

    # --------------------------------------------------------------------------------------- result

    def _summarize(self) -> dict[str, Any]:
        """Read the test split, once and if it is asked for, with the best weights; save the adapter and the summary.

        Raises:
            NonFiniteError: naming the number; nothing is written then.
        """
        config, setup = self.config, self.setup
        best = self.state._replace(trained=self.best)
        # a run that was gone on with has the best weights, and not what they predicted
        validation = self.best_predictions or self.evaluate(best, setup.task.validation, generate=False)
        language = config.eval.test and setup.task.kind == "causal-lm"
        if language:
            start = " and as at the start" if config.eval.before else ""
            self._say(f"answering {setup.task.test.rows} test rows, as trained{start}")
        test = self.evaluate(best, setup.task.test) if config.eval.test else None
        # the model that was set up still has the weights of the start
        before = None
        if language and config.eval.before:
            before = self.evaluate(setup.trainer.init(setup.model), setup.task.test)
        unrelated = None
        if language and config.data.unrelated is None and setup.task.unrelated is None:
            self._say("forgetting is not measured: the reviews could not be fetched; --unrelated FILE takes other text")
        if language and setup.task.unrelated is not None:
            unrelated = self.evaluate.unrelated_loss(None), self.evaluate.unrelated_loss(best)
        human = None
        if test is not None and setup.task.kind == "ranking" and config.data.human is not None:
            human = self.evaluate.agreement(best, config.data.human)
        model: Any = setup.trainer.model(setup.model, best)
        summary = result.summary(
            setup,
            self.folder,
            model,
            steps=self.done,
            best_step=self.best_step,
            validation=validation,
            test=test,
            before=before,
            unrelated=unrelated,
            human=human,
        )
        json_text(summary)  # before the adapter is written: refuses what is not finite
        if jax.process_index() == 0:
            if config.method != "full":
                peft.save_pretrained(model, self.folder.path / "adapter", base_model_name_or_path=setup.model_source)
                if setup.task.kind == "ranking":
                    save_settings(model, self.folder.path / "adapter")
                weights = self.folder.path / "adapter" / "adapter_model.safetensors"
                summary["adapter_bytes"] = weights.stat().st_size
                write_whole(self.folder.path / "adapter" / "README.md", card(summary, setup.task.kind).encode())
            if test is not None and language:
                columns: dict[str, Any] = {name: setup.task.test[name] for name in ("question", "answer")}
                columns |= {} if before is None else {"before": before.texts}
                self.folder.write_answers({**columns, "generated": test.texts})
            write_whole(self.folder.summary, json_text(summary).encode())
        return json.loads(json_text(summary))
