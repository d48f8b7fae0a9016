"""``python -m train.compare_decoding``: does a ranker make a decoder's continuations better? Run it again to go on.

    python -m train.compare_decoding --adapter runs/ranker/adapter --judge-adapter runs/judge/adapter --out runs/decoding

A decoder continues beginnings of held-out documents: greedily, from the nucleus, from the typical set, as the best of several
from the nucleus by the ranker (*re-ranked*), and by the ranker's beam search. Of each way: how near all its texts together
are to the true continuations (:func:`train.ranking_measures.divergence`, on features of the frozen encoder, not comparable
with published MAUVE), how much they repeat themselves, the ranker's score, and that of a *judge*, another ranker, trained on
other data with another seed: the ranker's own score must rise where it chooses, the judge's need not.

``--out`` gets texts.jsonl, a line as soon as a beginning is done, and table.md and table.json.

Source: RankGen (arXiv 2205.09726).
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.progress
import tyro
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import held, json_text, provenance, write_whole
from ntk_prefix.checks import expected
from train import tasks
from train.assets import model_path
from train.command import Checked, Terminal, at_least, ended, parsed, resumable
from train.config import DataConfig
from train.decoders import load_decoder
from train.kept_lines import KeptLines
from train.rank import Scored, adapter_digest, beam_search, load_scorer, reranked
from train.ranking_measures import distinct, divergence, repetition
from train.writer import Writer

__all__ = ["Options", "compare_decoding"]

WAYS = ("greedy", "nucleus", "typical", "re-ranked", "beam")
TRUE = "true"

DRAWS = 20
"""Of the beginnings, with repeats, for the error of a divergence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Compare ways to continue a text."""

    ranker: str = "minilm"
    """An asset (minilm), a Hugging Face folder, or owner/name of the hub."""
    adapter: Path
    """Folder of the ranker's adapter."""
    judge: str = "minilm"
    """Likewise of the judge."""
    judge_adapter: Path
    """Folder of the judge's adapter, which is another one."""
    model: str = "smollm2"
    """The decoder: an asset (smollm2), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    data_dir: str | None = None
    """Your documents, as of the task ranking; None takes film reviews. Its test split is continued."""
    prompts: int = 100
    """Beginnings."""
    context: int = 96
    """Tokens of a beginning, the last ones."""
    tokens: int = 60
    """Of a continuation, at most."""
    samples: int = 10
    """Continuations that are ranked."""
    beams: int = 2
    """That the beam search keeps."""
    step: int = 20
    """Tokens between two choices of the beam search."""
    top_p: float = 0.9
    """The nucleus."""
    typical: float = 0.95
    """Mass of the typical set."""
    seed: int = 0
    out: Path = Path("runs/decoding")
    """Folder of the results."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        for name, least in (("prompts", 2), ("context", 8), ("tokens", 4), ("samples", 1), ("beams", 1), ("step", 1)):
            at_least(name, getattr(self, name), least)
        at_least("seed", self.seed, 0)
        models.Sampling(top_p=self.top_p, typical=self.typical).check(flags=True)
        if self.out.is_file():
            raise expected("--out", "a folder", f"{self.out}, which is a file")
        if self.judge == self.ranker and (
            adapter_digest(self.judge_adapter, "--judge-adapter") == adapter_digest(self.adapter)
        ):
            hint = "Train one on other data: python -m train ranking_newsgroups --seed 1"
            raise expected("--judge-adapter", "another ranker than the one it judges", f"{self.judge_adapter}", hint)


def compare_decoding(options: Options, console: Console) -> list[dict[str, Any]]:
    """Continue what is missing, measure, write the table, and return its lines.

    Raises:
        UsageError: what cannot be meant; a folder of another comparison, or that another process fills.
    """
    data = DataConfig(
        data_dir=options.data_dir,
        max_length=options.context,
        suffix_length=options.tokens,
        validation_size=64 if options.data_dir is None else None,
        test_size=options.prompts,
    )
    test = tasks.load("ranking", data, test_rows="--prompts").test
    prefixes, truths = list(test["prefix"]), [texts[0] for texts in test["texts"]]
    said = dataclasses.asdict(options) | {"adapter": adapter_digest(options.adapter), "out": None}
    said |= {"judge_adapter": adapter_digest(options.judge_adapter), "texts": [*prefixes, *truths]}
    options.out.mkdir(parents=True, exist_ok=True)
    with held(options.out / ".lock", "--out"):
        kept = KeptLines(options.out / "texts.jsonl", said)
        missing = [row for row in range(len(prefixes)) if str(row) not in kept.known]
        scored = load_scorer(options.ranker, options.adapter)
        if missing:
            ways = _ways(options, scored)
            with rich.progress.Progress(console=console, disable=not console.is_terminal) as bars:
                bar = bars.add_task("continuing", total=len(prefixes), completed=len(prefixes) - len(missing))
                for row in missing:
                    kept.add(str(row), ways(prefixes[row], jax.random.fold_in(jax.random.key(options.seed), row)))
                    bars.advance(bar)
        texts = {way: [kept.known[str(row)][way] for row in range(len(prefixes))] for way in WAYS} | {TRUE: truths}
        path = model_path(options.ranker)
        assert path is not None
        frozen = models.load_ranker(path, cosine=True)
        features = {way: frozen.encode_suffixes(some) for way, some in texts.items()}
        scores = {
            name: {way: scorer(prefixes, some) for way, some in texts.items()}
            for name, scorer in (
                ("ranker", scored),
                ("judge", load_scorer(options.judge, options.judge_adapter, flag="--judge")),
            )
        }
        lines = measured(texts, features, scores)
        document = {"lines": lines, "options": dataclasses.asdict(options), **provenance("jax", "flax")}
        write_whole(options.out / "table.json", json_text(document).encode())
        write_whole(options.out / "table.md", markdown(lines, options).encode())
    return lines


def _ways(options: Options, scored: Scored) -> Callable[[str, jax.Array], dict[str, str]]:
    """Return a function that continues a text in every way."""
    model, tokenizer = load_decoder(options.model)

    def writer(**sampling: Any) -> Writer:
        return Writer(model, tokenizer, models.Sampling(**sampling), options.context)

    greedy, typical, nucleus = writer(top_k=1), writer(typical=options.typical), writer(top_p=options.top_p)
    some: dict[str, Any] = {"samples": options.samples}

    def continued(prefix: str, key: jax.Array) -> dict[str, str]:
        drawn: list[str] = []

        def remembered(texts: Any, samples: int, tokens: int, key: jax.Array) -> Any:
            found = nucleus(texts, samples, tokens, key)
            drawn.append(found[0][0][0])
            return found

        best: Any = remembered
        ranked = reranked(prefix, best, scored, **some, tokens=options.tokens, key=key)[0].text
        steps: dict[str, Any] = {"tokens": options.step, "total": options.tokens, "beams": options.beams}
        return {
            "greedy": greedy([prefix], 1, options.tokens, key)[0][0][0],
            # the first of those that are ranked: what would have been there without a ranker
            "nucleus": drawn[0],
            "typical": typical([prefix], 1, options.tokens, key)[0][0][0],
            "re-ranked": ranked,
            "beam": beam_search(prefix, nucleus, scored, **some, **steps, key=key)[0].text,
        }

    return continued


def measured(
    texts: dict[str, list[str]], features: dict[str, np.ndarray], scores: dict[str, dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Return a line for each way.

    Args:
        texts: way -> the text of each beginning; one is the true one.
        features: way -> [n, D] of these texts.
        scores: who scores -> way -> [n].

    Returns:
        ``divergence`` with its ``divergence_error``, the deviation over draws of the beginnings; ``rep_3``, ``distinct_2``
        of words; and for each who scores ``[mean, its standard error]``, with ``judge_lead``, by how much the judge
        prefers it to the nucleus, of the same beginnings.
    """
    rows = len(next(iter(texts.values())))
    draws = [np.random.default_rng(draw).integers(0, rows, rows) for draw in range(DRAWS)]
    lines = []
    for way, some in texts.items():
        words = [text.split() for text in some]
        line: dict[str, Any] = {"way": way, "rep_3": repetition(words, 3), "distinct_2": distinct(words, 2)}
        if way != TRUE:
            line["divergence"] = divergence(features[way], features[TRUE])
            again = [divergence(features[way][draw], features[TRUE][draw]) for draw in draws]
            line["divergence_error"] = float(np.std(again, ddof=1))
        line |= {name: _mean(by[way]) for name, by in scores.items()}
        line["judge_lead"] = _mean(scores["judge"][way] - scores["judge"]["nucleus"])
        lines.append(line)
    return lines


def _mean(values: np.ndarray) -> list[float]:
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)]


def markdown(lines: list[dict[str, Any]], options: Options) -> str:
    """Return the table for people."""
    about = (
        f"{options.prompts} held-out beginnings of {options.context} tokens, continued by {options.model} with "
        f"{options.tokens}; the best of {options.samples} (re-ranked), a beam search that keeps {options.beams} every "
        f"{options.step} tokens. Divergence: area under the frontier of k-means histograms of the frozen encoder's features, "
        f"1 for equal sets, its deviation over {DRAWS} draws of the beginnings; not comparable with published MAUVE. rep-3: "
        "share of a text's trigrams of words that it had before. Scores: mean cosine and its standard error; the judge is "
        "another ranker. Lead: of the judge's score over the nucleus', of the same beginnings.\n"
    )
    header = ("way", "divergence", "rep-3, %", "distinct-2, %", "ranker", "judge", "judge's lead")
    rows = [header, ("---",) * len(header)]
    for line in lines:
        area = "-" if "divergence" not in line else f"{line['divergence']:.3f} ± {line['divergence_error']:.3f}"
        shares = [f"{100 * line[name]:.1f}" for name in ("rep_3", "distinct_2")]
        means = ["{:.3f} ± {:.3f}".format(*line[name]) for name in ("ranker", "judge")]
        lead = "-" if line["way"] == "nucleus" else "{:+.3f} ± {:.3f}".format(*line["judge_lead"])
        rows.append((line["way"], area, *shares, *means, lead))
    return "\n".join([about, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _main(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.compare_decoding", description=__doc__))
    options.check()

    def run() -> None:
        console.print(
            markdown(compare_decoding(options, console), options), markup=False, highlight=False, soft_wrap=True
        )

    return resumable(run, console)


def main() -> int:
    """Parse, continue, measure; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _main(console), console)


if __name__ == "__main__":
    sys.exit(main())
