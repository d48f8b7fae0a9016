"""``python -m train.compress``: a prompt as an adapter of constant size, with a report of what is lost.

    python -m train.compress --model smollm2 --prompt notes.txt --budget 32 --out runs/notes

The prompt is read once. Texts that could follow it, your own (``--queries``) or the model's (``--self-study``), say what it is
asked, and ``--budget`` anchors per key head, on average, are placed and fitted for them. A part of the texts is held out, and
the report compares the model with the adapter to the model with the prompt on those. ``--out`` gets the adapter's folder, for
:func:`ntk_prefix.peft.load_adapter`, and the report as index.html, report.json and errors.png.

An adapter takes no place in the cache and has no position: text behind it begins at 0.
"""

from __future__ import annotations

from train.memory import give_back, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import shutil
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import tyro
from rich.console import Console

from ntk_prefix import peft
from ntk_prefix.artifacts import held, json_text, provenance, read_json, write_whole
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.compression import Compression, Made, compress, errors
from ntk_prefix.distillation import distil_states
from ntk_prefix.peft.file_dtypes import rounded
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.prefixed_model import ROWS_AT_ONCE, Divergence, continuations, divergence, read_prompt
from ntk_prefix.statistics import expected_error_bound
from ntk_prefix.typing import Array, Float
from train.assets import file_states
from train.command import Checked, Terminal, at_least, ended, parsed, resumable
from train.decoders import decoder, loaded
from train.prompts import padded, prompt_ids, some_texts, whole_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Options", "main"]

LOCK = ".lock"
"""File that a run holds, so that no other one writes the folder."""

UNFINISHED = "unfinished"
"""Folder, in that of the results, of what a run has found so far."""

BEGUN = "of"
"""File in it with a hash of what the run began with."""

SURE = 0.95
"""Probability with which bounds of the report hold."""

LARGEST_KL = 1.0
"""Nats at which a text's KL is cut for its bound, which needs a largest one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Turn a prompt into an adapter of constant size."""

    model: str = "smollm2"
    """A decoder: an asset (smollm2), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    prompt: Path = Path("-")
    """A file of text; - is standard input."""
    budget: int = 32
    """Anchors per key head, on average over the model's."""
    queries: Path | None = None
    """Texts that could follow the prompt: .jsonl, .csv, .tsv or .parquet with a column "text", or a text file with one a line.
    None lets the model write some."""
    self_study: int = 36
    """Without --queries: how many texts the model writes behind the prompt, drawn from what it finds likely."""
    tokens: int = 128
    """Of each text, at most."""
    held_out: float = 0.33
    """The part of the texts that only the report is about."""
    steps: int = 300
    """Of the descent on anchors and masses, a third of them for heads with little error; 0 keeps the chosen keys."""
    even: bool = False
    """Give every head the same number of anchors."""
    distil: int = 0
    """Steps of training from the prompt's own answers, after the fit; a step takes seconds."""
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Of the adapter's numbers in its file, half the bytes or a quarter. The report is about the adapter as it is there."""
    seed: int = 0
    """Of the split of the texts, and of draws."""
    out: Path = Path("runs/compressed")
    """Folder of the adapter and the report; a new one, or one of this program."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        for name, least in (("budget", 1), ("self_study", 2), ("tokens", 2), ("steps", 0), ("distil", 0), ("seed", 0)):
            at_least(name, getattr(self, name), least)
        if not 0 < self.held_out < 1:
            raise expected("--held-out", "a part of the texts, between 0 and 1", self.held_out)
        if self.out.is_file():
            raise expected("--out", "a folder", f"{self.out}, which is a file")
        if self.out.is_dir() and not _is_ours(self.out):
            raise expected("--out", "a new folder, or one of this program", f"{self.out}, which has other files in it")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is new, or one of this program: what is in it may be replaced."""
    names, report = {file.name for file in folder.iterdir()} - {LOCK}, folder / "report.json"
    if report.is_file():
        return "prompt_tokens" in read_json(report, dict[str, Any])
    unfinished = folder / UNFINISHED  # which is removed: another's folder of this name must not be
    if not names or (unfinished / BEGUN).is_file():
        return True
    # a run may have been killed before it could say that the folder is its own
    return names == {UNFINISHED} and all(file.match(f".{BEGUN}.*.new") for file in unfinished.iterdir())


def main(options: Options, console: Console) -> None:
    """Compress, write the adapter, compare, write the report.

    Raises:
        UsageError: no text, no decoder, more anchors than tokens, fewer queries than anchors.
    """
    began = time.perf_counter()
    text = whole_text(options.prompt, "--prompt")
    own = None if options.queries is None else some_texts(options.queries, "--queries")
    path, tokenizer = decoder(options.model)
    prompt = np.asarray(prompt_ids(tokenizer, text, sys.maxsize), np.int32)
    if not len(prompt):
        raise expected("--prompt", "at least one token", "none")
    if options.budget > len(prompt):
        raise expected("--budget", f"at most the prompt's {len(prompt)} tokens", options.budget)
    texts: dict[str, np.ndarray] | None = None
    if own is not None:
        texts = padded([tokenizer.encode(each, add_special_tokens=False).ids for each in own], options.tokens)
        _check_enough(int(_split(texts, options)[0]["attention_mask"].sum()), options, "--queries")
    else:
        fitted = options.self_study - _held_out(options.self_study, options)
        _check_enough(fitted * options.tokens, options, "--self-study")
    model = loaded(path, options.model)
    windows = [kind.window for kind in model.config.attention_kinds()]
    reach, narrowest = len(prompt) + options.tokens, min((window for window in windows if window), default=None)
    if narrowest is not None and options.budget > narrowest:
        raise expected("--budget", f"at most the {narrowest} tokens that a layer with a window keeps", options.budget)
    if narrowest is not None and reach > narrowest:
        console.print(
            f"Layers with a window of {narrowest:,} tokens keep so many of the prompt's, and every text sees them: the "
            "adapter is compared with that, not with the model that has the prompt in its text.",
            markup=False,
        )
    if reach > model.config.max_position_embeddings:
        console.print(
            f"The prompt and {options.tokens} tokens behind it reach over {reach:,} positions, and the model was trained on "
            f"{model.config.max_position_embeddings:,}: its own answers get worse there, and they are what is kept.",
            markup=False,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with held(options.out / LOCK, "--out"):
        _run(options, console, model, prompt, texts, _Unfinished(options, path, prompt, own), began)


def _run(
    options: Options,
    console: Console,
    model: Any,
    prompt: np.ndarray,
    texts: dict[str, np.ndarray] | None,
    kept: _Unfinished,
    began: float,
) -> None:
    """Compress, write the adapter, compare, write the report."""
    with _Stages(console) as told:

        def given_back(*step: Any) -> None:
            give_back()
            told(*step)

        prefix = read_prompt(model, jnp.asarray(prompt), told)
        if texts is None:
            size = options.self_study, options.tokens
            texts = kept(
                "texts", lambda: continuations(model, prefix, prompt, *size, seed=options.seed, progress=given_back)
            )
            give_back()
        fit, judged = _split(texts, options)
        some = {"seed": options.seed, "progress": told, "kept": kept}
        found = compress(model, prefix, fit, options.budget, steps=options.steps, even=options.even, **some)
        give_back()
        states = distil_states(model, prefix, found.states, fit, steps=options.distil, **some)
        states = _rounded(states, options.dtype)
        measured = divergence(model, prefix, [states, None, *([found.states] if options.distil else [])], judged, told)
        give_back()
        held_error = errors(model, prefix, states, {name: x[:ROWS_AT_ONCE] for name, x in judged.items()})
    found = dataclasses.replace(found, states=states)
    named: dict[str | int, PrefixState] = dict(states.items())
    peft.apply_states(model, named, name="compressed")
    peft.save_pretrained(model, options.out / "adapter", dtype=options.dtype)
    cache = sum(x.size for each in prefix.values() for x in each)
    rows = {"fitted": len(fit["input_ids"]), "held_out": len(judged["input_ids"])}
    report = _report(options, len(prompt), cache, rows, found, held_error, measured, time.perf_counter() - began)
    picture = io.BytesIO()
    draw(found, held_error).savefig(picture, dpi=150)
    write_whole(options.out / "errors.png", picture.getvalue())
    write_whole(options.out / "index.html", _page(report, picture.getvalue()).encode())
    write_whole(options.out / "report.json", json_text(report).encode())
    kept.remove()
    console.print(_said(report), markup=False, highlight=False)
    console.print(f"{options.out / 'adapter'}, {options.out / 'index.html'}", markup=False, soft_wrap=True)


def _rounded(states: dict[str, PrefixState], dtype: str) -> dict[str, PrefixState]:
    """Return states as a file in a dtype holds them."""
    try:
        return jax.tree.map(lambda x: rounded(x, dtype), states)
    except UsageError:
        advice = "The same command with --dtype bfloat16 goes on from here"
        raise expected("--dtype", "one that holds the adapter's numbers, which are beyond it", dtype, advice) from None


class _Unfinished:
    """What a run has found so far, in files, for one that begins in the same way; any other starts anew."""

    def __init__(self, options: Options, model: Path, prompt: np.ndarray, own: list[str] | None):
        self.folder, self.lock = options.out / UNFINISHED, threading.Lock()
        said = {
            **{
                name: value
                for name, value in dataclasses.asdict(options).items()
                if name not in ("out", "prompt", "dtype")
            },
            "queries": own,
            "prompt": prompt.tolist(),
            "weights": file_states(model),
            **provenance("jax", "flax", sources=("ntk_prefix/**/*.py", "train/compress.py")),
        }
        self.digest = hashlib.sha256(json_text(said).encode()).hexdigest()
        name = self.folder / BEGUN
        self.begun = name.is_file() and name.read_bytes() == self.digest.encode()

    def __call__(self, name: str, make: Made) -> dict[str, np.ndarray]:
        """Return arrays that were kept, or keep those that are made."""
        file = self.folder / f"{name.replace(' ', '-')}.npz"
        if self.begun and file.is_file():
            # what is damaged is made again
            damaged = contextlib.suppress(zipfile.BadZipFile, zlib.error, ValueError, EOFError)
            with damaged, file.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
                return dict(arrays)
        arrays = {key: np.asarray(value) for key, value in make().items()}
        with self.lock:
            if not self.begun:
                self.remove()
                self.folder.mkdir(parents=True)
                write_whole(self.folder / BEGUN, self.digest.encode())
                self.begun = True
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_whole(file, content.getvalue())
        return arrays

    def remove(self) -> None:
        """Forget all of it, last what says whose the folder is: killed within this, a run leaves one that is known."""
        if self.folder.is_dir():
            for file in self.folder.iterdir():
                if file.name != BEGUN:
                    file.unlink()
            shutil.rmtree(self.folder)


def draw(found: Compression, held_error: Float[np.ndarray, "layers K"]) -> Figure:
    """Return the figure: how many anchors each head has, and its error on the first held-out texts, layer by layer."""
    from matplotlib.figure import Figure  # takes 30 MiB, which until now are the prompt's

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for panel, values, title, log in (
        (panels[0], found.anchors, "anchors", False),
        (panels[1], np.maximum(held_error, 1e-12), "held-out error, share of the prefix's part", True),
    ):
        shown = np.log10(values) if log else values
        image = panel.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set(title=title, xlabel="key head", ylabel="layer", xticks=range(values.shape[1]))
        bar = figure.colorbar(image, ax=panel)
        if log:
            bar.ax.set_ylabel("log10 of the relative square error")
    return figure


# -------------------------------------------------------------------------------------------- texts


def _held_out(rows: int, options: Options) -> int:
    return min(max(round(options.held_out * rows), 1), rows - 1)


def _check_enough(tokens: int, options: Options, flag: str) -> None:
    if tokens < options.budget:
        raise expected(flag, f"at least {options.budget} tokens to fit to", tokens, "Give more text")


def _split(texts: dict[str, np.ndarray], options: Options) -> tuple[dict[str, Array], dict[str, Array]]:
    rows = len(texts["input_ids"])
    apart = _held_out(rows, options)
    order = np.random.default_rng(options.seed).permutation(rows)
    fit = {name: jnp.asarray(x[order[apart:]]) for name, x in texts.items()}
    return fit, {name: jnp.asarray(x[order[:apart]]) for name, x in texts.items()}


# ------------------------------------------------------------------------------------------- report


def _report(
    options: Options,
    tokens: int,
    cache: int,
    texts: dict[str, int],
    found: Compression,
    held_error: Float[np.ndarray, "layers K"],
    measured: list[Divergence],
    seconds: float,
) -> dict[str, Any]:
    after, before, *fitted = measured
    files = [file.stat().st_size for file in (options.out / "adapter").glob("*.safetensors")]
    return {
        "options": dataclasses.asdict(options),
        "prompt_tokens": tokens,
        "texts": texts,
        "held_out_tokens": len(after.kl),
        "kl": _of(after.kl),
        "kl_without_prompt": _of(before.kl),
        **({"kl_before_distillation": _of(fitted[0].kl)} if fitted else {}),
        "agreement": float(after.agrees.mean()),
        "agreement_without_prompt": float(before.agrees.mean()),
        "bounds": {
            "probability": SURE,
            "agreement_at_least": 1 - _bound(after, ~after.agrees, 1.0),
            "kl_at_most": _bound(after, after.kl, LARGEST_KL),
            "of": f"the expectation over such texts of a text's mean; its KL is cut at {LARGEST_KL:g}",
        },
        "numbers": found.numbers,
        "numbers_of_the_cache": cache,
        "adapter_bytes": sum(files),
        "anchors": found.anchors.tolist(),
        "held_out_error": held_error.tolist(),
        "error": found.error.tolist(),
        "chosen_error": found.chosen_error.tolist(),
        "sensitivity": found.sensitivity.tolist(),
        "seconds": seconds,
        **provenance("jax", "flax", sources=("ntk_prefix/**/*.py", "train/compress.py")),
    }


def _bound(measured: Divergence, values: np.ndarray, upper: float) -> float:
    losses = np.clip(measured.by_text(values), 0, upper)  # a KL of 0 may be rounded below it
    return expected_error_bound(losses, 1 - SURE, upper)


def _of(kl: np.ndarray) -> dict[str, float]:
    """Return a divergence's mean, its standard error over tokens and its median."""
    spread = float(kl.std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else 0.0
    return {"mean": float(kl.mean()), "standard_error": spread, "median": float(np.median(kl))}


def _said(report: dict[str, Any]) -> str:
    kl, without = report["kl"], report["kl_without_prompt"]
    return (
        f"{report['prompt_tokens']:,} tokens, {report['numbers_of_the_cache']:,} numbers in a cache, became "
        f"{report['numbers']:,} ({report['numbers_of_the_cache'] / max(report['numbers'], 1):.1f} times fewer), "
        f"{report['adapter_bytes'] / 1024:,.0f} KiB in {report['options']['dtype']}, in {report['seconds']:.0f} s.\n"
        f"On {report['texts']['held_out']} held-out texts, {report['held_out_tokens']:,} tokens: "
        f"KL to the prompt {kl['mean']:.4f} +- {kl['standard_error']:.4f} a token (median {kl['median']:.4f}; without the "
        f"prompt {without['mean']:.4f}); the same first choice for {100 * report['agreement']:.1f} % of tokens "
        f"({100 * report['agreement_without_prompt']:.1f} % without).\n"
        f"With {100 * SURE:.0f} % confidence, for {report['texts']['held_out']} texts: on such texts at least "
        f"{100 * report['bounds']['agreement_at_least']:.1f} % are expected to be the same."
    )


def _page(report: dict[str, Any], picture: bytes) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(json_text(report[name], indent=None))}</td></tr>"
        for name in ("options", "texts", "bounds", "adapter_bytes", "versions", "git")
        if name in report
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>A prompt, compressed</title><style>"
        "body{font:16px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}td{padding:.2rem .6rem;vertical-align:top;overflow-wrap:anywhere}</style>"
        f"<h1>A prompt, compressed</h1><p>{html.escape(_said(report))}</p>"
        '<img alt="Anchors and error of each layer and key head" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<table>{rows}</table></html>\n"
    )


class _Stages:
    """A bar for each stage on a terminal, a line for each elsewhere."""

    def __init__(self, console: Console):
        self.console, self.since = console, time.perf_counter()
        self.tasks: dict[str, rich.progress.TaskID] = {}
        self.bars = rich.progress.Progress(console=console, disable=not console.is_terminal)

    def __enter__(self) -> Any:
        self.bars.__enter__()
        return self.told

    def __exit__(self, *error: Any) -> None:
        self.bars.__exit__(*error)

    def told(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total)
            self.bars.update(self.tasks[what], completed=done)
        elif done == total:
            now = time.perf_counter()
            self.console.print(f"{what}: {now - self.since:.0f} s", markup=False, highlight=False)
            self.since = now


def _compress(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.compress", description=__doc__))
    options.check()
    return resumable(lambda: main(options, console), console)


def command() -> int:
    """Parse, compress; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _compress(console), console)


if __name__ == "__main__":
    sys.exit(command())
