"""``python -m train.rank``: which continuation fits a beginning, by a ranking encoder; from samples, or in a beam search.

    python -m train.rank score  --pairs pairs.jsonl                       # a score for each {"prefix", "suffix"}
    python -m train.rank rerank --prompts story.txt --samples 10          # SmolLM2 writes, the ranker chooses
    python -m train.rank beam   --prompts story.txt --tokens 20 --beams 2 # chosen every 20 tokens
    python -m train.rank search --prompts story.txt --among texts.jsonl   # the continuations in a file that fit best

The ranker is any encoder of text (``--ranker``), with an adapter or without, or one of RankGen's own checkpoints. Of a
beginning it reads the last 512 tokens, of a continuation the first 128, and no more than it has positions. Results are JSON
lines, one for each prompt, with all candidates and their scores, best first; written as they are found, and taken over by the
same command run again, unless a file, the adapter or a model's files have changed.

Source: RankGen (arXiv 2205.09726): over-generating and re-ranking, and its beam search.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import rich.progress
import tyro
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import append, held, json_text, provenance, read_bytes, read_json, write_whole
from ntk_prefix.checks import expected
from ntk_prefix.models.ranker import SETTINGS
from train.assets import model_path, model_version
from train.command import Checked, Terminal, at_least, byte_progress, ended, parsed, resumable
from train.decoders import load_decoder
from train.prompts import whole_text
from train.readers import ENDINGS, open_table
from train.writer import Writer, before_stop

__all__ = [
    "Beam",
    "Candidate",
    "Rerank",
    "Score",
    "Search",
    "adapter_digest",
    "beam_search",
    "load_scorer",
    "main",
    "reranked",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranking(Checked):
    """What all of them take."""

    ranker: str = "minilm"
    """An asset (minilm), a Hugging Face folder, or owner/name of the hub; RankGen's checkpoints bring their projection."""
    adapter: Path | None = None
    """Folder of an adapter for the ranker."""
    pooling: str | None = None
    """Of the ranker: mean, cls; None is its own."""
    cosine: bool | None = None
    """Score by the cosine of the two vectors instead of their inner product; None is what the adapter was trained with."""
    out: Path | None = None
    """File of the results, which one that asked otherwise begins anew; None is runs/score.jsonl, runs/rerank.jsonl, ..."""

    @property
    def results(self) -> Path:
        """Where the results go."""
        return self.out or Path("runs", f"{type(self).__name__.lower()}.jsonl")

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        if self.pooling not in (None, "mean", "cls"):
            raise expected("--pooling", "mean or cls", self.pooling)
        if self.results.is_dir():
            raise expected("--out", "a file", f"{self.results}, which is a folder")
        for name in ("pairs", "prompts", "among"):
            file = getattr(self, name, None)
            if file is not None and file.resolve() == self.results.resolve():
                raise expected("--out", f"another file than --{name}", f"{file} for both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(_Ranking):
    """Score pairs."""

    pairs: Path
    """A table with the columns "prefix" and "suffix"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(_Ranking):
    """Find the continuations in a file that fit best: a ranker as a retriever."""

    prompts: Path
    """A text file, which is one prompt up to its last line break, or a table with a column "prefix"."""
    among: Path
    """A table with a column "suffix" or "text"."""
    top: int = 10
    """How many."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        super().check()
        at_least("top", self.top, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerank(_Ranking):
    """Let a decoder write several continuations, and rank them."""

    prompts: Path
    """A text file, which is one prompt up to its last line break, or a table with a column "prefix"."""
    model: str = "smollm2"
    """The decoder: an asset (smollm2), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    samples: int = 10
    """Continuations."""
    tokens: int = 128
    """Of each, at most."""
    context: int = 256
    """Tokens of a prompt, the last ones: of a longer one no more is read."""
    temperature: float = 1.0
    top_p: float = 0.9
    """The nucleus that tokens are drawn from."""
    stop: tuple[str, ...] = ()
    """Texts that a continuation ends before."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        super().check()
        for name in ("samples", "tokens", "context"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if "" in self.stop:
            raise expected("--stop", "texts", "an empty one")
        models.Sampling(temperature=self.temperature, top_p=self.top_p).check(flags=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(Rerank):
    """Let a decoder write a few tokens at a time, and go on from those that the ranker likes best."""

    tokens: int = 20
    """Between two choices."""
    beams: int = 2
    """Continuations that are kept at each."""
    total: int = 128
    """Tokens in all, at most."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        super().check()
        at_least("beams", self.beams, 1)
        at_least("total", self.total, self.tokens)


class Candidate(NamedTuple):
    """A continuation and what the ranker says of it."""

    text: str
    score: float


Scored = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""``scored(prefixes, suffixes)``: a score for each pair; a single prefix is that of all suffixes."""


def reranked(prompt: str, writer: Writer, scored: Scored, samples: int, tokens: int, key: jax.Array) -> list[Candidate]:
    """Return as many continuations of a prompt, best first."""
    [written] = writer([prompt], samples, tokens, key)
    return _best_first([text for text, _ in written], scored([prompt], [text for text, _ in written]))


def beam_search(
    prompt: str,
    writer: Writer,
    scored: Scored,
    *,
    samples: int,
    tokens: int,
    beams: int,
    total: int,
    key: jax.Array,
    stop: tuple[str, ...] = (),
) -> list[Candidate]:
    """Return the continuations of a prompt that are left of a beam search, best first.

    Every ``tokens`` tokens each continuation that is kept is continued ``samples`` times, and of all the ``beams`` best are
    kept; one that has ended stays as it is. What is scored is the whole continuation. It ends before a stop text, also
    before one that began with an earlier step.
    """
    kept: list[tuple[str, bool]] = [("", False)]
    for step in range(-(-total // tokens)):
        left = min(tokens, total - step * tokens)
        open_ = [text for text, over in kept if not over]
        if not open_:
            break
        found = dict(each for each in kept if each[1])
        # each has the seed of its place, so that a step's draws do not depend on how many have ended
        for place, text in enumerate(open_):
            own = jax.random.fold_in(jax.random.fold_in(key, step), place)
            [written] = writer([prompt + text], samples, left, own)
            for new, over in written:
                whole, stopped = before_stop(text + new, stop)
                found.setdefault(whole, over or stopped)
        texts = list(found)
        order = np.argsort(-scored([prompt], texts), kind="stable")[:beams]
        kept = [(texts[i], found[texts[i]]) for i in order]
    return _best_first([text for text, _ in kept], scored([prompt], [text for text, _ in kept]))


def _best_first(texts: Sequence[str], scores: np.ndarray) -> list[Candidate]:
    return [Candidate(texts[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


# ------------------------------------------------------------------------------------------ programs


def main(options: Score | Search | Rerank | Beam, console: Console) -> list[dict[str, Any]]:
    """Do what is asked, write the lines, and return them."""
    asked = _asked(options)
    among = _column(options.among, "--among", ("suffix", "text")) if isinstance(options, Search) else []
    depends: dict[str, Any] = {"asked": asked, "among": among, "ranker": model_version(options.ranker, "--ranker")}
    if options.adapter is not None:
        depends["adapter"] = adapter_digest(options.adapter)
    if isinstance(options, Rerank):
        depends["model"] = model_version(options.model)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with held(options.results.with_name(f"{options.results.name}.lock"), "--out"):
        return _written(options, asked, among, _Results(options, depends), console)


def _written(
    options: Score | Search | Rerank | Beam,
    asked: list[dict[str, str]],
    among: list[str],
    results: _Results,
    console: Console,
) -> list[dict[str, Any]]:
    missing = [row for row in range(len(asked)) if row not in results.found]
    if missing:
        scored = load_scorer(options.ranker, options.adapter, options.pooling, options.cosine)
        with rich.progress.Progress(console=console, disable=not console.is_terminal) as bars:
            task = bars.add_task(type(options).__name__.lower(), total=len(asked), completed=len(asked) - len(missing))
            for row, line in _lines(options, asked, among, missing, scored):
                results.add(row, line)
                bars.advance(task)
    lines = results.lines()
    console.print(
        f"{len(lines)} line{'s' * (len(lines) > 1)} in {options.results}", markup=False, highlight=False, soft_wrap=True
    )
    return lines


def _lines(
    options: Score | Search | Rerank | Beam,
    asked: list[dict[str, str]],
    among: list[str],
    missing: list[int],
    scored: Scored,
) -> Iterator[tuple[int, dict[str, Any]]]:
    if isinstance(options, Score):
        # always the same ones together: what a text is read with decides how its score is rounded
        for start in range(missing[0] // PAIRS_AT_ONCE * PAIRS_AT_ONCE, len(asked), PAIRS_AT_ONCE):
            rows = range(start, min(start + PAIRS_AT_ONCE, len(asked)))
            pairs = [[asked[row][name] for row in rows] for name in ("prefix", "suffix")]
            for row, score in zip(rows, scored(*pairs), strict=True):
                if row >= missing[0]:
                    yield row, asked[row] | {"score": float(score)}
        return
    if isinstance(options, Search):
        for row in missing:
            best = _best_first(among, scored([asked[row]["prefix"]], among))[: options.top]
            yield row, asked[row] | _said(best)
        return
    sampling = models.Sampling(temperature=options.temperature, top_p=options.top_p)
    writer = Writer(*load_decoder(options.model), sampling, options.context, options.stop)
    for row in missing:
        prompt, key = asked[row]["prefix"], jax.random.fold_in(jax.random.key(options.seed), row)
        some: dict[str, Any] = {"samples": options.samples, "tokens": options.tokens, "key": key}
        if isinstance(options, Beam):
            ends: dict[str, Any] = {"total": options.total, "stop": options.stop}
            best = beam_search(prompt, writer, scored, beams=options.beams, **ends, **some)
        else:
            best = reranked(prompt, writer, scored, **some)
        yield row, asked[row] | _said(best)


PAIRS_AT_ONCE = 1024
"""Pairs after which scores are written down."""


def _said(best: list[Candidate]) -> dict[str, Any]:
    return {"best": best[0].text, "candidates": [each._asdict() for each in best]}


def load_scorer(
    name: str, adapter: Path | None, pooling: Any = None, cosine: bool | None = None, flag: str = "--ranker"
) -> Scored:
    """Return the scores of a ranker of a name, with an adapter or without; see :func:`ntk_prefix.models.load_ranker`.

    Raises:
        UsageError: it is none; ``flag`` is what named it.
    """
    path = model_path(name, flag)
    if path is None:
        raise expected(flag, "an encoder of text", name)
    with byte_progress(f"loading {name}") as progress:
        ranker = models.load_ranker(path, adapter=adapter, pooling=pooling, cosine=cosine, progress=progress)
    known: dict[str, np.ndarray] = {}

    def scored(prefixes: Sequence[str], suffixes: Sequence[str]) -> np.ndarray:
        # a prompt, or a file that is searched, is asked about again and again
        names = [json.dumps([role, list(texts)]) for role, texts in (("prefix", prefixes), ("suffix", suffixes))]
        for name, texts, encode in zip(
            names, (prefixes, suffixes), (ranker.encode_prefixes, ranker.encode_suffixes), strict=True
        ):
            known[name] = known.pop(name) if name in known else encode(texts)
        scores = np.sum(known[names[0]] * known[names[1]], axis=1)
        while len(known) > KNOWN:
            known.pop(next(iter(known)))
        return scores

    return scored


KNOWN = 8
"""Batches of vectors that are remembered, those that were asked for last."""


def adapter_digest(folder: Path, flag: str = "--adapter") -> str:
    """Return a hash of an adapter and of how its ranker makes scores.

    Raises:
        UsageError: the folder has none; ``flag`` is what named it.
    """
    if not (folder / WEIGHTS).is_file():
        raise expected(flag, "the folder of an adapter", f"{folder}, which has no {WEIGHTS}")
    files = [file for file in (folder / WEIGHTS, folder / SETTINGS) if file.is_file()]
    return hashlib.sha256(b"".join(read_bytes(file, LARGEST_ADAPTER, flag) for file in files)).hexdigest()


WEIGHTS, LARGEST_ADAPTER = "adapter_model.safetensors", 2**30
"""Of an adapter: its file of weights, and how many bytes that has at most."""


# --------------------------------------------------------------------------------------------- files


def _asked(options: Score | Search | Rerank | Beam) -> list[dict[str, str]]:
    """Return the prompts, or the pairs."""
    if isinstance(options, Score):
        prefixes, suffixes = (_column(options.pairs, "--pairs", (name,)) for name in ("prefix", "suffix"))
        return [{"prefix": prefix, "suffix": suffix} for prefix, suffix in zip(prefixes, suffixes, strict=True)]
    if options.prompts.suffix in ENDINGS:
        prompts = _column(options.prompts, "--prompts", ("prefix",))
        for row, text in enumerate(prompts):
            if not text.strip():
                raise expected(f"--prompts {options.prompts}, row {row}", "some text", repr(text))
        return [{"prefix": text} for text in prompts]
    # a file of text ends in a line break that is no part of what is to be continued
    return [{"prefix": whole_text(options.prompts, "--prompts").rstrip("\r\n")}]


def _column(file: Path, flag: str, names: tuple[str, ...]) -> list[str]:
    table = open_table(file)
    name = next((name for name in names if name in table.names), None)
    if name is None:
        raise expected(f"{flag} {file}", f"a column {' or '.join(map(repr, names))}", ", ".join(table.names) or "none")
    texts = table.column(name)
    if not texts:
        raise expected(f"{flag} {file}", "at least one row", "none")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise expected(f"{flag} {file}, row {row}", f"a text in {name!r}", repr(text)[:60])
    return texts


class _Results:
    """Lines that are written as they are found, behind what they depend on; of a run that asked otherwise, none."""

    def __init__(self, options: _Ranking, depends: dict[str, Any]):
        self.file = options.results
        self.beside = self.file.with_name(f"{self.file.name}.settings.json")
        said = json_text({"options": dataclasses.asdict(options) | {"out": None}, **depends})
        digest = hashlib.sha256(said.encode()).hexdigest()
        self.found: dict[int, dict[str, Any]] = {}
        if (
            self.beside.is_file()
            and read_json(self.beside, dict[str, Any]).get("digest") == digest
            and self.file.is_file()
        ):
            for line in self.file.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a line that was being written when the run was stopped
                    break
                self.found[len(self.found)] = row
        elif self.file.exists() and not self.beside.is_file() and self.file.stat().st_size:  # an empty one: killed here
            raise expected("--out", "a new file, or one of this program", f"{self.file}, which is another")
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.found.values()).encode())
        settings = {"digest": digest, "options": dataclasses.asdict(options), **provenance("jax", "flax")}
        write_whole(self.beside, json_text(settings).encode())

    def add(self, row: int, line: dict[str, Any]) -> None:
        """Write a line, which is the next."""
        assert row == len(self.found)
        self.found[row] = line
        append(self.file, json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Return all."""
        return list(self.found.values())


def _rank(console: Console) -> int:
    choices = Annotated[Score, tyro.conf.subcommand("score")] | Annotated[Search, tyro.conf.subcommand("search")]
    choices |= Annotated[Rerank, tyro.conf.subcommand("rerank")] | Annotated[Beam, tyro.conf.subcommand("beam")]
    options: Any = parsed(lambda: tyro.cli(choices, prog="python -m train.rank", description=__doc__))
    options.check()
    return resumable(lambda: main(options, console), console)


def command() -> int:
    """Parse, rank; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _rank(console), console)


if __name__ == "__main__":
    sys.exit(command())
