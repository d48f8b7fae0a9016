"""``python -m train.ranking_references``: what rankers are compared with that nothing was trained for; run it again to go on.

    python -m train.ranking_references --config runs/ranking/config.json --out runs/references

The rows: a random choice; the frozen encoder's cosine, and its inner product; and a decoder's likelihood of the continuation
given the beginning, the sum over its tokens and their mean. On the run's test split and people's choices, as
:mod:`train.ranking` measures a run. The decoder reads the prefix once for all its candidates.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import tyro
from flax import nnx
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import held, json_text, provenance, write_whole
from ntk_prefix.checks import expected
from ntk_prefix.models.cross_entropy import cross_entropy, in_parts
from ntk_prefix.models.ranker import LENGTHS
from ntk_prefix.typing import Array, Float, Int
from train import ranking, tasks
from train.assets import model_path
from train.command import Checked, Terminal, at_least, ended, parsed, resumable
from train.config import TrainConfig
from train.decoders import load_decoder
from train.kept_lines import KeptLines
from train.prompts import prompt_ids
from train.ranking_measures import Choice, agreement, read_choices
from train.sources import spec_of

__all__ = ["Likelihood", "Options", "references"]

NAMES = ("random", "frozen cosine", "frozen product", "likelihood, sum", "likelihood, mean")
"""The rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What it takes to make the rows."""

    config: Path
    """The config.json of a ranking run."""
    decoder: str = "smollm2"
    """Whose likelihood is asked: an asset (smollm2), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    likelihood_rows: int = 50
    """Test rows that it is asked of, the first: it takes a hundred times as long as a cosine."""
    out: Path = Path("runs/references")
    """Folder of the results."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        at_least("likelihood_rows", self.likelihood_rows, 2)
        if self.out.is_file():
            raise expected("--out", "a folder", f"{self.out}, which is a file")


class Likelihood:
    """A decoder's log-likelihood of continuations, given what stands before them.

    Args:
        model: made with ``causal_lm``.
        tokenizer: the model's, without padding and truncation.
    """

    def __init__(self, model: models.Llama, tokenizer: Any):
        self.tokenizer = tokenizer
        graph, self._state = nnx.split(model)

        @jax.jit
        def found(
            state: Any, prefix: Int[Array, "1 P"], seen: Int[Array, "1 P"], ids: Int[Array, "C S"]
        ) -> Float[Array, "C S"]:
            decoder = nnx.merge(graph, state)
            (count, tokens), length = ids.shape, prefix.shape[1]
            mask = jnp.concatenate([seen, jnp.ones((1, tokens), seen.dtype)], axis=1)
            hidden, cache = decoder.hidden(prefix, mask, decoder.empty_cache(1, length + tokens), 0)
            shared = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), (cache, mask, hidden[:, -1:]))
            after, _ = decoder.hidden(ids, shared[1], shared[0], length)
            states = jnp.concatenate([shared[2], after[:, :-1]], axis=1)

            def of_part(hidden: Array, labels: Array) -> Array:
                return -cross_entropy(decoder.logits(hidden), labels)

            return in_parts(of_part, decoder.config.vocab_size, states, ids)

        self._found: Callable[..., Array] = found

    def __call__(
        self, prefix: str, suffixes: Sequence[str], lengths: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
        """Return the sum and the mean of the log-probabilities of each suffix' tokens.

        Args:
            prefix, suffixes: texts; a blank stands between them.
            lengths: tokens that are read, the prefix' last and the suffix' first; the arrays are so wide.
        """
        before = prompt_ids(self.tokenizer, prefix, lengths[0])
        # what a tokenizer begins a text with is no part of one that goes on
        after = [self.tokenizer.encode(" " + suffix, add_special_tokens=False).ids[: lengths[1]] for suffix in suffixes]
        if not before or not all(after):
            raise expected("texts", "at least one token in each", "none")
        ids, seen = np.zeros((1, lengths[0]), np.int32), np.zeros((1, lengths[0]), np.int32)
        ids[0, lengths[0] - len(before) :], seen[0, lengths[0] - len(before) :] = before, 1
        tokens, there = (np.zeros((len(after), lengths[1]), np.int32) for _ in range(2))
        for row, each in enumerate(after):
            tokens[row, : len(each)], there[row, : len(each)] = each, 1
        said = np.asarray(self._found(self._state, ids, seen, tokens), np.float64) * there
        return said.sum(axis=1), said.sum(axis=1) / there.sum(axis=1)


def references(options: Options, console: Console) -> dict[str, dict[str, Any]]:
    """Return each row's ``identification`` and ``agreement``; what is finished is taken over.

    Raises:
        UsageError: a configuration of another task, or a folder of another one.
    """
    config = TrainConfig.from_file(options.config)
    if spec_of(config.task).kind != "ranking":
        raise expected("--config", "the config.json of a ranking", f"one of {config.task}")
    options.out.mkdir(parents=True, exist_ok=True)
    with held(options.out / ".lock", "--out"):
        return _references(options, config, console)


def _references(options: Options, config: TrainConfig, console: Console) -> dict[str, dict[str, Any]]:
    # what was drawn for training, and how, changes nothing of a row
    data = dataclasses.asdict(config.data) | {"train_size": None, "negatives": None, "generated_negatives": None}
    said: dict[str, Any] = {"data": data, "task": config.task, "model": config.model, "pooling": config.pooling}
    said |= {"decoder": options.decoder, "rows": options.likelihood_rows}
    done = KeptLines(options.out / "references.jsonl", said)
    path = model_path(config.model)
    tokenizer = None if path is None else models.load_tokenizer(path)
    if path is None or tokenizer is None:
        raise expected("--model", "an encoder of text with its tokenizer", config.model)
    task = tasks.load(config.task, config.data, tokenizer=tokenizer, seed=config.seed)
    choices = [] if config.data.human is None else read_choices(config.data.human)
    found = {
        "random": lambda: _random(task, choices),
        "frozen cosine": lambda: _frozen(task, choices, path, config, cosine=True),
        "frozen product": lambda: _frozen(task, choices, path, config, cosine=False),
    }
    for name, make in found.items():
        if name not in done.known:
            done.add(name, make())
    if not {*NAMES} <= {*done.known}:
        likelihood = functools.cache(lambda: _decoder(options.decoder))
        for each in zip(NAMES[3:], _likelihood(options, config, task, choices, done, likelihood, console), strict=True):
            done.add(*each)
    rows = {name: done.known[name] for name in NAMES}
    document = {"rows": rows, "settings": said, **provenance("jax", "flax")}
    write_whole(options.out / "references.json", json_text(document).encode())
    return rows


def _result(found: ranking.Identification, rows: int, agreed: dict[str, Any] | None) -> dict[str, Any]:
    return {**found.summary(), "rows": rows, "agreement": agreed}


def _random(task: tasks.Task, choices: list[Choice]) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    found = ranking.identification(task.test, lambda kind, row, candidates: draw.normal(size=len(candidates)))
    agreed = agreement(choices, draw.normal(size=(len(choices), 2))) if choices else None
    return _result(found, task.test.rows, agreed)


def _frozen(
    task: tasks.Task, choices: list[Choice], path: Path, config: TrainConfig, *, cosine: bool
) -> dict[str, Any]:
    ranker = models.load_ranker(path, pooling=config.pooling, cosine=cosine)
    graph, state = nnx.split(ranker)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask).logits)
    encode = lambda batch: np.asarray(run(state, batch["input_ids"], batch["attention_mask"]))  # noqa: E731
    found = ranking.by_encoder(encode, task.test, config.optim.batch_size, config.optim.temperature, cosine=cosine)
    agreed = None
    if choices:
        columns = [[getattr(each, name) for each in choices] for name in ("prefix", "ranked", "sampled")]
        scores = np.stack([ranker.score(columns[0], some) for some in columns[1:]], axis=1)
        agreed = agreement(choices, scores)
    return _result(found, task.test.rows, agreed)


def _decoder(name: str) -> Likelihood:
    model, tokenizer = load_decoder(name, "--decoder")
    return Likelihood(model, tokenizer)


def _likelihood(
    options: Options,
    config: TrainConfig,
    task: tasks.Task,
    choices: list[Choice],
    done: KeptLines,
    likelihood: Callable[[], Likelihood],
    console: Console,
) -> Iterator[dict[str, Any]]:
    """Yield what the sum identifies, and what the mean does."""
    rows = min(options.likelihood_rows, task.test.rows)
    split = dataclasses.replace(task.test, columns={name: column[:rows] for name, column in task.test.items()})
    lengths = (config.data.max_length, config.data.suffix_length)
    asked: list[tuple[str, str, list[str], tuple[int, int]]] = []
    for kind, ten in ranking.ten(split).items():
        for row, candidates in enumerate(ten):
            texts = [split["texts"][other][place] for other, place in candidates]
            asked.append((f"{kind} {row}", split["prefix"][row], texts, lengths))
    whole = LENGTHS["prefix"] // 2, LENGTHS["suffix"]
    asked += [(f"choice {i}", c.prefix, [c.ranked, c.sampled], whole) for i, c in enumerate(choices)]
    missing = [each for each in asked if each[0] not in done.known]
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("likelihood", total=len(asked), completed=len(asked) - len(missing))
        for key, prefix, texts, read in missing:
            done.add(key, [each.tolist() for each in likelihood()(prefix, texts, read)])
            bars.advance(bar)
    for number in range(2):

        def score(kind: str, row: int, _: list[tuple[int, int]], number: int = number) -> np.ndarray:
            return np.array(done.known[f"{kind} {row}"][number])

        found = ranking.identification(split, score)
        scores = np.array([done.known[f"choice {i}"][number] for i in range(len(choices))])
        yield _result(found, rows, agreement(choices, scores) if choices else None)


def _main(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.ranking_references", description=__doc__))
    options.check()

    def run() -> None:
        for name, row in references(options, console).items():
            kinds = ", ".join(f"{kind} {share:.3f}" for kind, share in row["identification"].items())
            human = (
                ""
                if row["agreement"] is None
                else f"; agrees on {row['agreement']['agree']} of {row['agreement']['of']}"
            )
            console.print(f"{name}: {kinds}{human}", markup=False, highlight=False, soft_wrap=True)

    return resumable(run, console)


def main() -> int:
    """Parse, measure; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _main(console), console)


if __name__ == "__main__":
    sys.exit(main())
