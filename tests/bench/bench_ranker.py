"""Scoring pairs with a ranker, beside transformers on the same encoder: 1,000 pairs of 256 + 128 tokens in at most 60 seconds.

``python -m tests.bench.bench_ranker [--torch-python PATH]``: PATH is a Python with torch and transformers; without one the row
of the peer says that it is not measured.

Both read the same marked texts, all of full length, with the mean over tokens, and their vectors must agree. Ours reads as
many at once as it does for a user; the peer ``--batch-size``, and again four, and its faster run counts. A first batch of
either role, which compiles, is not counted. Seconds are of the wall and of the processor: on a machine
that does other work at the same time only the second can be compared.
"""

import dataclasses
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ntk_prefix import models
from ntk_prefix.artifacts import cores
from train.assets import asset

PEER = """
import json, resource, sys, time
try:
    import torch, transformers
except ImportError as error:
    print(json.dumps({"missing": str(error)}))
    sys.exit()
import numpy as np
folder, file, batch_size, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model = transformers.AutoModel.from_pretrained(folder).eval()
arrays = np.load(file)
def vectors(ids, batch_size):
    with torch.inference_mode():
        parts = [model(part).last_hidden_state.mean(1) for part in torch.from_numpy(ids).split(batch_size)]
    return torch.cat(parts).numpy()
ids = [arrays[name].astype(np.int64) for name in ("prefix", "suffix")]
spent = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
found = []
for size in (batch_size, 4):
    for each in ids:
        vectors(each[:size], size)
    begun, before = time.perf_counter(), spent()
    scores = (vectors(ids[0], size) * vectors(ids[1], size)).sum(1)
    found.append((time.perf_counter() - begun, spent() - before, size))
seconds, processor, size = min(found)
print(json.dumps({"seconds": seconds, "processor": processor, "at once": size, "scores": scores.tolist()}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run."""

    torch_python: Path | None = None
    """A Python with torch and transformers, to measure them in the same run."""
    model: str = "minilm"
    """An asset, or a folder with an encoder."""
    pairs: int = 1000
    lengths: tuple[int, int] = (256, 128)
    """Tokens of a prefix and of a suffix, with their marks."""
    batch_size: int = 20
    """Read at once, at most."""


def texts_of(ranker: models.Ranker, role: Any, count: int, length: int) -> tuple[list[str], np.ndarray]:
    """Return random texts whose marked tokens are so many, and these tokens."""
    draw, words = np.random.default_rng(length), ("film", "good", "long", "very", "the", "was", "story", "of", "and")
    texts = [" ".join(draw.choice(words, length)) for _ in range(count)]
    ids = [models.ranker.marked_ids(ranker.tokenizer, text, role, length) for text in texts]
    return texts, np.array(ids, np.int32)


def ours(ranker: models.Ranker, texts: list[list[str]], batch_size: int) -> dict[str, Any]:
    """Measure ourselves."""

    def spent() -> float:
        return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

    encoders: tuple[Callable[..., np.ndarray], ...] = (ranker.encode_prefixes, ranker.encode_suffixes)
    for encode, some in zip(encoders, texts, strict=True):
        encode(some[:batch_size], batch_size=batch_size)
    begun, before = time.perf_counter(), spent()
    scores = ranker.score(*texts, batch_size=batch_size)
    return {"seconds": time.perf_counter() - begun, "processor": spent() - before, "scores": scores.tolist()}


def main(options: Options) -> int:
    """Measure, print; the status is 1 where 60 seconds for 1,000 pairs are missed on an otherwise idle machine's processor."""
    console = Console()
    path = asset("minilm") if options.model == "minilm" else Path(options.model)
    ranker = models.load_ranker(path, pooling="mean", lengths=options.lengths)
    made = [
        texts_of(ranker, role, options.pairs, length)
        for role, length in zip(("prefix", "suffix"), options.lengths, strict=True)
    ]
    found = {"ntk_prefix": ours(ranker, [texts for texts, _ in made], options.batch_size)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ids.npz")
        np.savez(file, prefix=made[0][1], suffix=made[1][1])
        command = [str(options.torch_python or sys.executable), "-c", PEER, str(path), str(file)]
        ended = subprocess.run(
            [*command, str(options.batch_size), str(cores())], capture_output=True, text=True, check=False
        )
        said = ended.stdout.strip().splitlines()
        found["transformers"] = json.loads(said[-1]) if said else {"missing": ended.stderr.strip().splitlines()[-1]}
    table = Table("", "seconds", "processor seconds", "pairs per second")
    for name, row in found.items():
        if "missing" in row:
            table.add_row(name, "not measured", row["missing"], "-")
            continue
        rate = options.pairs / row["seconds"]
        at_once = f", {row['at once']} texts at once" if "at once" in row else ""
        table.add_row(name + at_once, f"{row['seconds']:.1f}", f"{row['processor']:.1f}", f"{rate:.1f}")
    console.print(
        f"{options.pairs} pairs of {options.lengths}, {platform.processor() or platform.machine()}, {cores()} cores"
    )
    console.print(table)
    if "scores" in found["transformers"]:
        np.testing.assert_allclose(found["ntk_prefix"]["scores"], found["transformers"]["scores"], rtol=1e-3)
    return int(found["ntk_prefix"]["processor"] / cores() > 60 * options.pairs / 1000)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
