"""What a model gets right on a split: accuracy, or exact match of generated answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix import models, peft, sharding
from ntk_prefix.models.cross_entropy import cross_entropy, in_parts
from ntk_prefix.models.ranker import LENGTHS, Role, marked_ids
from ntk_prefix.training import Trainer, TrainState
from train import data, tasks
from train.ranking import by_encoder, vectors
from train.ranking_measures import agreement, read_choices
from train.setup import Setup, model_inputs

__all__ = ["Evaluator", "Predictions"]


GENERATED_TOGETHER = 32
"""Rows that are continued at a time: a step reads all weights, however many rows there are."""


class Predictions(NamedTuple):
    """What came out for each row of a split."""

    correct: np.ndarray
    """[rows] bool; of rankings the share of kinds of candidates."""
    loss: float
    """Mean cross entropy; of the answers' tokens for language."""
    log_probabilities: np.ndarray | None
    """[rows, classes]; None for language."""
    labels: np.ndarray | None = None
    """[rows], the true classes; None for language."""
    texts: tuple[str, ...] = ()
    """Generated answers; language only."""
    identified: dict[str, Any] | None = None
    """Rankings only: :meth:`train.ranking.Identification.summary`."""
    last_number: float | None = None
    """Share of them whose last number is right, marked as the answer or not; language only."""

    @property
    def score(self) -> float:
        """The task's metric: accuracy, or exact match, in [0, 1]."""
        return float(self.correct.mean())


class Evaluator:
    """Evaluates states of one run; compiles once for each padded length.

    Every process evaluates the whole split, each with its own devices, so no result has to travel.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        # what fits for training fits here; larger batches leave a CPU's caches and take up to half as long again
        self.batch_size = setup.config.optim.batch_size
        graph, *states = nnx.split(setup.model, setup.trainer.wrt, ...)
        self._graph: Any = graph
        self._frozen: Any = states[1]

        # of several processes each has weights of its own, on one device
        mesh = setup.trainer.mesh if jax.process_count() == 1 else None

        @jax.jit
        def logits(trained: Any, frozen: Any, batch: data.Batch) -> jax.Array:
            with sharding.on(mesh):
                model: Any = nnx.merge(graph, trained, frozen)
                return model(**model_inputs(model, batch)).logits.astype(jnp.float32)

        @functools.partial(jax.jit, static_argnums=0)
        def tokens(
            graph: Any, trained: Any, frozen: Any, batch: data.Batch, labels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """Return for each token its cross entropy, and whether it is the most likely one: [B, T - 1] each."""

            def of_part(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
                scores = model.logits(hidden)
                return cross_entropy(scores, labels), scores.argmax(axis=-1) == labels

            with sharding.on(mesh):
                model: Any = nnx.merge(graph, trained, frozen)
                hidden, _ = model.hidden(**model_inputs(model, batch))
                return in_parts(of_part, model.config.vocab_size, hidden[:, :-1], labels)

        self._logits: Callable[..., jax.Array] = logits
        self._tokens: Callable[..., tuple[jax.Array, jax.Array]] = tokens

    def __call__(self, state: TrainState, split: data.Dataset, *, generate: bool = True) -> Predictions:
        """Return what the state's model predicts on a split.

        Args:
            state: of the setup's trainer.
            split: one of the task's.
            generate: for language, also generate answers; without, a row is correct if every answer token is the
                most likely one given the true ones before it, which is quick and stricter than it looks.
        """
        if self.setup.task.kind == "causal-lm":
            return self._language(state, split, generate)
        if self.setup.task.kind == "ranking":
            temperature = self.setup.config.optim.temperature
            found = by_encoder(self.encoder(state), split, self.batch_size, temperature)
            right = np.mean([*found.right.values()], axis=0)
            return Predictions(right, float(np.mean([*found.loss.values()])), None, identified=found.summary())
        trained, frozen = self._local(state)
        rows, weights, labels = [], [], []
        split, places = data.by_length(split)
        for batch in data.evaluation_batches(split, self.batch_size):
            rows.append(np.asarray(self._logits(trained, frozen, batch)))
            weights.append(np.asarray(batch["weight"]) > 0)
            labels.append(batch["labels"])
        kept = np.concatenate(weights)
        scores, targets = np.concatenate(rows)[kept][places], np.concatenate(labels)[kept][places]
        log_probabilities = np.asarray(jax.nn.log_softmax(scores))
        loss = -log_probabilities[np.arange(len(targets)), targets].mean()
        return Predictions(scores.argmax(axis=1) == targets, float(loss), log_probabilities, targets)

    def encoder(self, state: TrainState) -> Callable[[data.Batch], np.ndarray]:
        """Return how a state's ranker makes vectors of a batch of texts."""
        trained, frozen = self._local(state)
        return lambda batch: np.asarray(self._logits(trained, frozen, batch))

    def agreement(self, state: TrainState, file: str) -> dict[str, Any]:
        """Return how often a state's ranker chooses as people did, by :func:`train.ranking_measures.agreement`."""
        choices = read_choices(file)
        tokenizer = self.setup.task.tokenizer
        columns = zip(*((each.prefix, each.ranked, each.sampled) for each in choices), strict=True)
        roles: tuple[Role, ...] = ("prefix", "suffix", "suffix")
        ids = [
            np.array(marked_ids(tokenizer, text, role, LENGTHS[role]), np.int32)
            for role, texts in zip(roles, columns, strict=True)
            for text in texts
        ]
        found = vectors(self.encoder(state), ids, self.batch_size).reshape(3, len(choices), -1)
        return agreement(choices, np.einsum("nd,knd->nk", found[0], found[1:]))

    def _language(self, state: TrainState, split: data.Dataset, generate: bool) -> Predictions:
        trained, frozen = self._local(state)
        losses, correct = [], []
        for batch in data.evaluation_batches(split, self.batch_size):
            labels = batch["labels"][:, 1:]
            answer = labels >= 0
            entropies, right = map(np.asarray, self._tokens(self._graph, trained, frozen, batch, np.maximum(labels, 0)))
            kept = np.flatnonzero(batch["weight"])
            losses.append(((entropies * answer).sum(axis=1) / np.maximum(answer.sum(axis=1), 1))[kept])
            correct.append(np.all(right | ~answer, axis=1)[kept])
        loss = float(np.concatenate(losses).mean())
        if not generate:
            return Predictions(np.concatenate(correct), loss, None)
        texts = self._generate(state, split)
        marked, last = (
            np.array([tasks.exact_match(*pair, marked=m) for pair in zip(texts, split["answer"], strict=True)])
            for m in (True, False)
        )
        return Predictions(marked, loss, None, texts=tuple(texts), last_number=float(last.mean()))

    def unrelated_loss(self, state: TrainState | None) -> float:
        """Return the mean cross entropy per token on text that has nothing to do with the task.

        Every token counts alike, whatever its text's length; summed in float64.

        Args:
            state: of the setup's trainer; None is the model without its adapter, or with the weights that it was set up
                with where the method trains these.
        """
        split, trainer, model = self.setup.task.unrelated, self.setup.trainer, self.setup.model
        assert split is not None
        graph, frozen = self._graph, self._frozen
        if state is None and any(each.in_place for chosen in peft.configs(model).values() for each in chosen):
            state = trainer.init(model)
        if state is None:
            with peft.disable_adapter(model):
                graph, *states = nnx.split(model, trainer.wrt, ...)
            trained, frozen = states
            if trainer.mesh is not None:
                frozen = trainer.lay_out(frozen)
            trained, frozen = self._replica(trained, frozen)
        else:
            trained, frozen = self._local(state)
        total, count = 0.0, 0
        for batch in data.evaluation_batches(split, self.batch_size):
            labels = batch["labels"][:, 1:]
            told = (labels >= 0) & (batch["weight"][:, None] > 0)
            entropies, _ = self._tokens(graph, trained, frozen, batch, np.maximum(labels, 0))
            total += float(np.asarray(entropies, np.float64)[told].sum())
            count += int(told.sum())
        return total / count

    def _generate(self, state: TrainState, split: data.Dataset) -> list[str]:
        task, config = self.setup.task, self.setup.config
        assert task.tokenizer is not None
        trained, frozen = self._local(state)
        graph = nnx.split(self.setup.model, self.setup.trainer.wrt, ...)[0]
        model: Any = nnx.merge(graph, trained, frozen, copy=True)
        texts: list[str] = []
        for batch in data.prompt_batches(split, GENERATED_TOGETHER):
            tokens = models.generate(
                model,
                jnp.asarray(batch["input_ids"]),
                jnp.asarray(batch["attention_mask"]),
                max_new_tokens=config.eval.max_new_tokens,
                eos_token_id=task.end_id,
            )
            new = np.asarray(tokens)[np.asarray(batch["weight"]) > 0]
            texts += [task.tokenizer.decode(_until(row, task.end_id)) for row in new]
        return texts

    def _local(self, state: TrainState) -> tuple[Any, Any]:
        """Return the trained and frozen weights as one replica on this process's devices."""
        trainer: Trainer = self.setup.trainer
        if trainer.parallel == "pmap":
            return trainer.single(state.trained), self._frozen
        return self._replica(state.trained, self._frozen)

    def _replica(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Return weights as one replica on this process's devices."""
        trainer: Trainer = self.setup.trainer
        if trainer.parallel == "pmap" or jax.process_count() == 1:
            return trained, frozen
        # weights are replicated, or gathered first
        gathered = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(trainer.mesh, jax.P()))  # type: ignore[arg-type]
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered((trained, frozen)))


def _until(tokens: np.ndarray, end: int | None) -> list[int]:
    """Return the tokens before the first end of text."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[0] if len(ends) else None].tolist()
