"""``python -m train.compare_compression``: ways to compress a prompt, at equal bytes; run it again to go on.

    python -m train.compare_compression --prompts notes.txt --queries texts.jsonl --budgets 8 32 --out runs/sizes

Methods (:data:`train.compressors.METHODS`) x budgets x prompts x draws of texts. A budget of R is R anchors for each layer's
key head, R (2H + 1) numbers. Of each: how far the model with the compressed prompt is from the model with the prompt, on
texts that were not fitted to; how much it hurts on text that has nothing to do with the prompt; numbers and seconds.
``--out`` gets rows.jsonl, a line as soon as it is measured; table.md, table.json and pareto.png are made of it.

A row is taken over by a later run if all that it depends on is the same, down to the tokens, but for the program itself:
``--again`` names methods to be measured anew.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import contextlib
import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import held, json_text, provenance, write_figure, write_whole
from ntk_prefix.checks import NonFiniteError, UsageError, expected
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefixed_model import Prefix, answers, attending, distances, in_parts, read_prompt
from ntk_prefix.typing import Array, Float
from train import unrelated
from train.assets import model_version
from train.command import Checked, Terminal, at_least, byte_progress, ended, parsed, resumable
from train.compression_case import Case, seen_by_layers
from train.compression_table import Results, Row, draw, lines_of, markdown
from train.compressors import METHODS
from train.decoders import text_model
from train.prompts import padded, prompt_ids, some_texts, whole_text

__all__ = ["Options", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Compare ways to compress a prompt."""

    model: str = "smollm2"
    """An asset (smollm2, minilm), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    prompts: tuple[Path, ...]
    """Files of text, one prompt each."""
    queries: tuple[Path, ...]
    """Texts that could follow: .jsonl, .csv, .tsv or .parquet with a column "text", or a text file with one a line. One file
    for all prompts, or one for each."""
    unrelated: str = unrelated.REVIEWS
    """Text that has nothing to do with the prompts: film reviews, or a file, see :mod:`train.unrelated`."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    budgets: tuple[int, ...] = (8, 16, 32, 97, 256)
    """Anchors per key head, on average."""
    seeds: int = 1
    """Draws of texts, and of all else that is drawn."""
    prompt_tokens: int | None = None
    """Of each prompt, the first; all if None."""
    fitted: int = 24
    """Texts that are fitted to."""
    held_out: int = 12
    """Texts that are compared on."""
    unrelated_texts: int = 12
    """Texts out of the unrelated ones."""
    tokens: int = 128
    """Of each text, at most."""
    steps: int = 300
    """Of the descent of ours."""
    distil: int = 100
    """Of what is trained on the answers of the model with the prompt, each on four texts."""
    distil_rate: float | None = None
    """The highest learning rate of that; None for 0.003 of what begins as a fit, and 0.01 of all else."""
    again: tuple[str, ...] = ()
    """Methods to be measured again, though they are finished."""
    out: Path = Path("runs/compressors")
    """Folder of the results; a new one, or one of this program."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        for name, least in (
            ("seeds", 1),
            ("fitted", 1),
            ("held_out", 1),
            ("unrelated_texts", 1),
            ("tokens", 2),
            ("steps", 0),
            ("distil", 0),
        ):
            at_least(name, getattr(self, name), least)
        at_least("prompt_tokens", self.prompt_tokens, 1)
        if self.distil_rate is not None and not 0 < self.distil_rate < float("inf"):
            raise expected("--distil-rate", "a number above 0", self.distil_rate)
        for flag, given in (("--methods", self.methods), ("--again", self.again)):
            if unknown := sorted(set(given) - set(METHODS)):
                raise expected(flag, f"among {', '.join(METHODS)}", ", ".join(unknown))
        for flag, some in (("--methods", self.methods), ("--budgets", self.budgets), ("--prompts", self.prompts)):
            if not some:
                raise expected(flag, "at least one", "none")
            if len(set(some)) < len(some):
                raise expected(flag, "each once", ", ".join(map(str, some)))
        for budget in self.budgets:
            at_least("budgets", budget, 1)
        names = [file.stem for file in self.prompts]
        if len(set(names)) < len(names):
            raise expected("--prompts", "files of different names", ", ".join(names))
        if len(self.queries) not in (1, len(self.prompts)):
            raise expected("--queries", f"one file, or one for each of {len(self.prompts)} prompts", len(self.queries))
        if self.out.is_file():
            raise expected("--out", "a folder", f"{self.out}, which is a file")
        if beside := sorted(set(self.again) - set(self.methods)):
            raise expected("--again", "some of --methods", ", ".join(beside))
        if self.out.is_dir() and not (self.out / SETTINGS).is_file() and not _is_new(self.out):
            raise expected("--out", "a new folder, or one of this program", f"{self.out}, which has other files in it")


LOCK, SETTINGS = ".lock", "settings.json"
"""Files in the folder of the results: one that a run holds, and what says that the folder is one of this program."""


def _is_new(folder: Path) -> bool:
    """Return whether nothing is in a folder, or what a run leaves that was killed before it could say whose it is."""
    return all(file.name == LOCK or file.match(f".{SETTINGS}.*.new") for file in folder.iterdir())


class Inputs(NamedTuple):
    """What is asked of one prompt, in tokens."""

    name: str
    prompt: np.ndarray
    texts: dict[str, np.ndarray]
    """Of which fitted and held-out ones are drawn."""


def main(options: Options, console: Console) -> list[dict[str, Any]]:
    """Measure what is not there yet, write table and figure, and return the table's lines.

    Raises:
        UsageError: no text, no such row, a budget above a prompt, too few texts.
    """
    path, tokenizer, language = text_model(options.model)
    inputs, other = _inputs(options, tokenizer, language)
    options.out.mkdir(parents=True, exist_ok=True)
    with held(options.out / LOCK, "--out"):
        document = {"options": dataclasses.asdict(options), **_provenance()}
        write_whole(options.out / SETTINGS, json_text(document).encode())
        results = Results(options.out / "rows.jsonl")
        model = functools.cache(lambda: _model(options, path, language))
        rows: list[Row] = []
        draws = [(each, seed) for each in inputs for seed in range(options.seeds)]
        for each, seed in draws:
            if rows:  # after each draw, as far as it is
                _write(options, rows, language)
            for row in _rows(options, results, each, other, seed, model, language, console):
                rows.append(row)
                _say(console, row)
        lines = _write(options, rows, language)
    console.print(f"{options.out / 'table.md'}, {options.out / 'pareto.png'}", markup=False, soft_wrap=True)
    return lines


def _rows(
    options: Options,
    results: Results,
    inputs: Inputs,
    other: dict[str, np.ndarray],
    seed: int,
    model: Callable[[], Any],
    language: bool,
    console: Console,
) -> Iterator[Row]:
    """Yield the rows of one prompt and one draw of texts, finished ones and new ones."""
    git = _provenance()["git"]
    made: tuple[Case, Judge] | None = None
    for method in options.methods:
        settings = _hash(options, inputs, other, method)
        for budget in options.budgets if METHODS[method].sized else (0,):
            found = results.find(inputs.name, method, budget, seed, settings)
            if found is not None and method not in options.again:
                yield found
                continue
            if made is None:
                console.print(f"{inputs.name}, seed {seed}: reading {len(inputs.prompt)} tokens", highlight=False)
                made = _case(options, inputs, other, seed, model, console)
            case, judge = made
            began = time.perf_counter(), time.process_time()
            measured: dict[str, Any]
            try:
                compressed = METHODS[method].make(case, budget)
                if compressed is None:
                    continue
                measured = _measured(compressed.numbers, case) | judge.measure(compressed.attached)
            except (NonFiniteError, UsageError) as error:  # this one cannot; the others can
                measured = {"failed": str(error)}
            named = {"prompt": inputs.name, "method": method, "budget": budget, "seed": seed, "settings": settings}
            took = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
            row = cast(Row, {**named, **took, "git": git, **measured})
            results.add(row)
            yield row


# ---------------------------------------------------------------------------------------- measuring


class Judge:
    """Says how far a model is from the one with the prompt, and how much worse than without on unrelated text.

    What the exact model says is asked once.
    """

    def __init__(self, model: Any, prefix: dict[str, Prefix], held: dict[str, Array], other: dict[str, Array]):
        self.model = model
        self.held, self.other = list(in_parts(held)), list(in_parts(other))
        with attending(model, prefix):
            graph, state = nnx.split(model)
            self.exact = [np.asarray(answers(graph, state, some)) for some in self.held]
        self.language = isinstance(model, models.Llama)
        with attending(model, None):
            graph, state = nnx.split(model)
        # of a model of language its losses, of another its hidden states
        self.bare = [np.asarray(self._unrelated(answers(graph, state, some), some, None)) for some in self.other]

    def measure(self, attached: Callable[[Any], contextlib.AbstractContextManager[None]]) -> dict[str, Any]:
        """Return what a row says of a compressed prompt.

        Raises:
            NonFiniteError: the model says something that is not finite.
        """
        with attached(self.model):
            graph, state = nnx.split(self.model)
        distance, agrees = [], []
        for some, exact in zip(self.held, self.exact, strict=True):
            each, same = distances(jnp.asarray(exact), answers(graph, state, some), self.language)
            distance += _seen(each, some["attention_mask"])
            agrees += _seen(same, some["attention_mask"])
        rise = []
        for some, bare in zip(self.other, self.bare, strict=True):
            each = self._unrelated(answers(graph, state, some), some, bare)
            rise += _seen(each, some["attention_mask"][:, 1:] if self.language else some["attention_mask"])
        tokens = np.concatenate(distance)
        if not (np.isfinite(tokens).all() and np.isfinite(np.concatenate(rise)).all()):
            raise NonFiniteError("expected finite numbers of the model, got others.")
        mean, error = _clustered(distance)
        worse, its_error = _clustered(rise)
        return {
            "kl": mean,
            "kl_error": error,
            "kl_median": float(np.median(tokens)),
            "agreement": float(np.concatenate(agrees).mean()) if self.language else None,
            "unrelated": worse,
            "unrelated_error": its_error,
        }

    def _unrelated(self, answer: Array, inputs: dict[str, Array], bare: np.ndarray | None) -> Array:
        """Return the loss of each next token, or the hidden states; with the bare model's, the change."""
        if self.language:
            loss = _next_losses(answer, inputs["input_ids"])
            return loss if bare is None else loss - bare
        return answer if bare is None else jnp.sum((answer - bare) ** 2, axis=-1) / jnp.sum(bare**2, axis=-1)


@jax.jit
def _next_losses(answer: Array, ids: Array) -> Float[Array, "B T-1"]:
    return -jnp.take_along_axis(answer[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]


def _seen(values: Array, mask: Array) -> list[np.ndarray]:
    """Return each text's values, texts without any left out."""
    found = [np.asarray(x)[np.asarray(m, bool)] for x, m in zip(values, mask, strict=True)]
    return [x for x in found if len(x)]


def _clustered(texts: list[np.ndarray]) -> tuple[float, float]:
    """Return the mean over tokens, and its standard error for texts that are drawn, tokens of one being alike."""
    sizes, sums = np.array([[len(x), x.sum(dtype=np.float64)] for x in texts]).T
    mean = sums.sum() / sizes.sum()
    if len(texts) < 2:
        return float(mean), 0.0
    spread = np.sum((sums - mean * sizes) ** 2) * len(texts) / (len(texts) - 1)
    return float(mean), float(spread**0.5 / sizes.sum())


# ------------------------------------------------------------------------------------------- inputs


def _model(options: Options, path: Path, language: bool) -> Any:
    with byte_progress(f"loading {options.model}") as progress:
        return models.from_pretrained(path, task="causal-lm" if language else None, progress=progress)


def _inputs(options: Options, tokenizer: Any, language: bool) -> tuple[list[Inputs], dict[str, np.ndarray]]:
    """Return the prompts with their texts, and the unrelated text.

    Raises:
        UsageError: no text, a budget above a prompt or above the queries, too few texts.
    """

    def encoded(texts: list[str], **wanted: Any) -> dict[str, np.ndarray]:
        # an encoder's text begins and ends with tokens of its own, behind a prompt too
        ids = [tokenizer.encode(each, add_special_tokens=not language).ids for each in texts]
        return padded(ids, options.tokens, options.tokens, **wanted)

    texts = [encoded(some_texts(file, "--queries")) for file in options.queries]
    found = []
    for i, file in enumerate(options.prompts):
        whole = whole_text(file, "--prompts")
        ids = prompt_ids(tokenizer, whole, sys.maxsize) if language else tokenizer.encode(whole).ids
        prompt = np.asarray(ids[: options.prompt_tokens], np.int32)
        if max(options.budgets) > len(prompt):
            raise expected("--budgets", f"at most the {len(prompt)} tokens of {file}", max(options.budgets))
        some, wanted = texts[i % len(texts)], options.fitted + options.held_out
        if len(some["input_ids"]) < wanted:
            raise expected("--queries", f"at least {wanted} texts, fitted and held out", len(some["input_ids"]))
        fewest = int(np.sort(some["attention_mask"].sum(axis=1))[: options.fitted].sum())
        if fewest < max(options.budgets):
            raise expected("--queries", f"at least {max(options.budgets)} tokens to fit to", fewest, "Give more text")
        found.append(Inputs(file.stem, prompt, some))
    other = unrelated.texts(options.unrelated, options.unrelated_texts)
    # of a single token a model of language has nothing to say
    return found, encoded(other, flag="--unrelated", fewest=1, shortest=2 if language else 1)


def _case(
    options: Options, inputs: Inputs, other: dict[str, np.ndarray], seed: int, load: Callable[[], Any], console: Console
) -> tuple[Case, Judge]:
    """Draw texts, read the prompt, record the queries, and ask the exact model."""
    model = load()
    order = np.random.default_rng(seed).permutation(len(inputs.texts["input_ids"]))
    split = {"held": order[: options.held_out], "fit": order[options.held_out :][: options.fitted]}
    drawn = {part: {name: jnp.asarray(x[rows]) for name, x in inputs.texts.items()} for part, rows in split.items()}
    prefix = read_prompt(model, jnp.asarray(inputs.prompt))
    layers = seen_by_layers(model, prefix, drawn["fit"])

    def progress(what: str, done: int, total: int) -> None:
        if what == "distilling" and (10 * done // total > 10 * (done - 1) // total):
            console.print(f"{what}: {done} of {total}", highlight=False)

    case = Case(
        model,
        prefix,
        drawn["fit"],
        layers,
        jnp.asarray(inputs.prompt),
        max(options.budgets),
        seed,
        steps=options.steps,
        distil=options.distil,
        distil_rate=options.distil_rate,
        progress=progress,
    )
    return case, Judge(model, prefix, drawn["held"], {name: jnp.asarray(x) for name, x in other.items()})


_weights = functools.cache(model_version)


def _hash(options: Options, inputs: Inputs, other: dict[str, np.ndarray], method: str) -> str:
    """Return a hash of what a method's rows of a prompt depend on, but for its name, budget, seed and the program."""
    named = ("model", "fitted", "held_out", *METHODS[method].options)
    settings = {name: getattr(options, name) for name in named}
    if weights := _weights(options.model):
        settings["weights"] = weights
    known = hashlib.sha256(json_text(settings).encode())
    for array in (inputs.prompt, *inputs.texts.values(), *other.values()):
        known.update(f"{array.shape}".encode() + array.tobytes())
    return known.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ results


def _measured(numbers: int, case: Case) -> dict[str, Any]:
    heads = sum(site.num_key_heads for _, site in attention_sites(case.model))
    return {"numbers": numbers, "numbers_a_head": numbers / heads}


def _write(options: Options, rows: list[Row], language: bool) -> list[dict[str, Any]]:
    """Write table and figure."""
    lines = lines_of(rows, {name: method.label for name, method in METHODS.items()})
    over = f"{options.seeds} draws of texts" if options.seeds > 1 else "one draw of texts"
    distance = (
        "KL: to the model with the prompt, nats per token, and median; same first: of the likeliest next tokens; unrelated: "
        "rise of the next token's loss on unrelated text over the model without anything"
        if language
        else "error: relative square error of a token's hidden state against the model with the prompt, and median; "
        "unrelated: the relative square change of hidden states on unrelated text"
    )
    about = (
        f"{options.model}; {over}, each {options.fitted} fitted and {options.held_out} held out, of at most "
        f"{options.tokens} tokens; a budget is anchors per key head. {distance}. ±: standard error over "
        f"{'draws' if options.seeds > 1 else 'texts'}. KiB: in float32, of the whole model; half of it in bfloat16. Bold: "
        "nothing as small, to 2 %, is better."
    )
    write_whole(options.out / "table.md", markdown(lines, about, language=language).encode())
    write_whole(options.out / "table.json", json_text({"lines": lines, **_provenance()}).encode())
    if any(line["kl"] for line in lines):
        write_figure(options.out / "pareto.png", draw(lines, language=language), dpi=150)
    return lines


@functools.cache
def _provenance() -> dict[str, Any]:
    return provenance(sources=("ntk_prefix/**/*.py", "train/**/*.py"))


def _say(console: Console, row: Row) -> None:
    what = f"{row['prompt']}, seed {row['seed']}, {row['method']}" + (f" at {row['budget']}" if row["budget"] else "")
    said = row.get("failed") or f"{row['kl']:.4f} ± {row['kl_error']:.4f}, unrelated {row['unrelated']:+.3f}"
    console.print(f"{what}: {said}, {row['seconds']:.0f} s", markup=False, highlight=False)


def _compare(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.compare_compression", description=__doc__))
    options.check()
    return resumable(lambda: main(options, console), console)


def command() -> int:
    """Parse, compare; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _compare(console), console)


if __name__ == "__main__":
    sys.exit(command())
