"""``python -m train.write_negatives``: let a decoder continue the beginnings of a ranking task; run it again to go on.

    python -m train.write_negatives ranking_reviews --train-size 2000 --out generated.jsonl
    python -m train ranking_reviews --train-size 2000 --generated generated.jsonl --generated-negatives 1

What it wrote are negatives of a run of the same data and lengths: a ranker learns to tell people's text from a decoder's. One
line a beginning, written as soon as it is made; a beginning that the file has with as many continuations is left as it is, so
that runs of several seeds or sizes may share a file.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import rich.progress
import tyro
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import held, json_text, provenance, read_json, write_whole
from ntk_prefix.checks import expected
from train import tasks
from train.__main__ import parse_command
from train.assets import model_version
from train.command import Terminal, at_least, ended, resumable
from train.config import TrainConfig
from train.decoders import load_decoder
from train.ranking_data import OTHERS, read_generated
from train.sources import spec_of
from train.writer import Writer

__all__ = ["Command", "write"]


@dataclasses.dataclass(frozen=True)
class Command:
    """Write negatives of a ranking task."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    writer: str = "smollm2"
    """The decoder: an asset (smollm2), a Hugging Face folder, a .gguf file, or owner/name of the hub."""
    samples: int = 1
    """Continuations of each beginning of the train split; 0 leaves it out."""
    test_samples: int = OTHERS
    """Of each of the test split, likewise; the validation split has none."""
    rows: int = 32
    """Continuations that are written at once, but all of one beginning in any case."""
    top_p: float = 0.9
    """The nucleus that tokens are drawn from."""
    out: Path = Path("generated.jsonl")

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        for name, least in (("samples", 0), ("test_samples", 0), ("rows", 1)):
            at_least(name, getattr(self, name), least)
        models.Sampling(top_p=self.top_p).check(flags=True)
        if spec_of(self.config.task).kind != "ranking":
            raise expected("task", "a ranking", self.config.task)
        if self.out.is_dir():
            raise expected("--out", "a file", f"{self.out}, which is a folder")


def write(command: Command, console: Console, writer: Writer | None = None) -> int:
    """Write what is missing; return how many lines that is.

    Args:
        command: what is asked.
        console: for progress.
        writer: in the place of the one that is named.

    Raises:
        UsageError: what cannot be meant; a file of another form, or of texts that were written otherwise; another process
            writes it.
    """
    command.check()
    config, file = command.config, command.out
    bare = dataclasses.replace(config.data, generated=None, generated_negatives=0)
    task = tasks.load(config.task, bare, seed=config.seed)
    wanted = [(prefix, command.samples) for prefix in task.train["prefix"]]
    wanted += [(prefix, command.test_samples) for prefix in task.test["prefix"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    with held(file.with_name(file.name + ".lock"), "--out"):
        found = read_generated(file)
        _check_settings(command, new=not found)
        missing = [(prefix, count) for prefix, count in wanted if len(found.get(prefix, ())) < count]
        # a line that was being written when the program was stopped is left out
        rows = [json.dumps({"prefix": prefix, "generated": texts}) + "\n" for prefix, texts in found.items()]
        write_whole(file, "".join(rows).encode())
        if missing and writer is None:
            sampling = models.Sampling(top_p=command.top_p)
            writer = Writer(*load_decoder(command.writer, "--writer"), sampling, config.data.max_length)
        with rich.progress.Progress(console=console, disable=not console.is_terminal) as bars:
            bar = bars.add_task("writing", total=len(wanted), completed=len(wanted) - len(missing))
            for count in sorted({count for _, count in missing}):
                some = [prefix for prefix, own in missing if own == count]
                size = max(command.rows // count, 1)
                for start in range(0, len(some), size):
                    together = some[start : start + size]
                    _write_some(command, together, count, writer)
                    bars.advance(bar, len(together))
    console.print(
        f"{len(wanted)} beginnings in {file}, {len(missing)} of them written now",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return len(missing)


def _check_settings(command: Command, new: bool) -> None:
    """Refuse to add texts of one kind to those of another; a file that is new is of this kind.

    What is asked of the decoder stands beside the file. Where nothing does, nothing is known and nothing refused.
    """
    data, beside = command.config.data, command.out.with_name(f"{command.out.name}.settings.json")
    settings = {
        "writer": command.writer,
        "version": [list(file) for file in model_version(command.writer, "--writer")],
        "top-p": command.top_p,
        "suffix-length": data.suffix_length,
        "max-length": data.max_length,
    }
    if new:
        write_whole(beside, json_text(settings | provenance("jax", "flax")).encode())
    elif beside.is_file():
        before = read_json(beside, dict[str, Any])
        for name, value in settings.items():
            if (written := before.get(name)) != value:
                what = f"the files of {command.writer}" if name == "version" else name
                wanted, got = ("as they were", "others") if name == "version" else (written, value)
                raise expected(f"--out {command.out}: {what}", wanted, got, "Give another --out for other texts")


def _write_some(command: Command, prefixes: list[str], count: int, writer: Any) -> None:
    # the draws are those of these texts, whatever was written before
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32("\n".join(prefixes).encode()))
    written = writer(prefixes, count, command.config.data.suffix_length, key)
    lines = [
        json.dumps({"prefix": prefix, "generated": [text for text, _ in texts]}) + "\n"
        for prefix, texts in zip(prefixes, written, strict=True)
    ]
    # at once: beginnings that are left of these would be written beside others, and be other draws
    with command.out.open("ab", buffering=0) as stream:
        stream.write("".join(lines).encode())


def _main(console: Console) -> int:
    about = "Let a decoder continue the beginnings of a ranking task; the same command goes on."
    command = parse_command(Command, sys.argv[1:], "python -m train.write_negatives", about)
    command.check()
    return resumable(lambda: write(command, console), console)


def main() -> int:
    """Parse, write; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _main(console), console)


if __name__ == "__main__":
    sys.exit(main())
