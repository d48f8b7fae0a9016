"""How far a fitted state gets on a real prefix: ``python -m tests.bench.bench_fit [--tokens 512] [--out runs/fit]``.

512 tokens of real text go through MiniLM; their keys and values are the prefix of every layer. Other texts give the
queries, with their own keys beside the prefix. The state of ``PrefixState.fit`` is held against the raw sums of
``from_prefix`` on texts that the fit has not seen, per head, in a table and a figure.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ntk_prefix import PrefixState, models, peft
from ntk_prefix.artifacts import json_text, provenance, write_whole
from train import assets, tasks
from train.config import DataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run."""

    tokens: int = 512
    """Length of the prefix."""
    texts: int = 48
    """Texts that give queries."""
    length: int = 64
    """Tokens of each."""
    feature_map: str = "elu1"
    """Of the state."""
    starts: int = 8
    """Of the fit's descent: the problem is not convex."""
    layers: tuple[int, ...] = ()
    """Some of the layers; all for none."""
    out: Path = Path("runs/fit")
    """Folder of the figure and the numbers."""


def measure(options: Options) -> dict[int, dict[str, np.ndarray]]:
    """Errors per layer and head: fitted (held out and in training), raw, and of leaving the prefix out."""
    folder = assets.asset("minilm")
    model = models.from_pretrained(folder)
    settings = DataConfig(max_length=options.tokens, test_size=40)
    task = tasks.load("newsgroups", settings, tokenizer=models.load_tokenizer(folder))
    rows = list(task.train["input_ids"])
    prefix = next(ids for ids in rows if len(ids) == options.tokens)
    long = [ids[: options.length] for ids in rows if len(ids) >= options.length and ids is not prefix]
    seen = peft.record(model, {"input_ids": jnp.asarray(prefix)[None]})
    others = peft.record(model, {"input_ids": jnp.asarray(np.stack(long[: options.texts]))})
    result = {}
    for layer in track(options.layers or range(len(seen)), description="layers"):
        before, own = (records[f"layers.{layer}.attention"] for records in (seen, others))
        _, report = PrefixState.fit_with_report(
            own.query,
            before.key[0],
            before.value[0],
            own.key,
            own.value,
            feature_map=options.feature_map,
            starts=options.starts,
        )
        result[layer] = {name: value for name, value in report._asdict().items()}
    return result


def draw(result: dict[int, dict[str, np.ndarray]], title: str) -> Figure:
    """Raw over fitted error, a column a layer, a point a head; the aim is 5."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for layer, errors in result.items():
        ratio = errors["raw_error"] / errors["held_out_error"]
        spread = np.linspace(-0.25, 0.25, len(ratio))
        panel.plot(
            layer + spread, np.sort(ratio), "o", color="C0", ms=4, label="a head" if layer == min(result) else None
        )
        panel.plot(
            [layer - 0.35, layer + 0.35],
            [np.median(ratio)] * 2,
            color="C3",
            label="median of heads" if layer == min(result) else None,
        )
    panel.axhline(5, color="0.6", ls="--", lw=1, label="aim")
    panel.set(xlabel="layer", ylabel="error of raw sums / error of the fit, held out", title=title, yscale="log")
    panel.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    panel.legend(frameon=False)
    return figure


def main(options: Options) -> None:
    """Measure, print, draw."""
    console = Console()
    result = measure(options)
    table = Table("layer", "raw sums", "fit, held out", "fit, training", "no prefix", "ratio: median", "worst", "best")
    for layer, errors in result.items():
        ratio = errors["raw_error"] / errors["held_out_error"]
        medians = [np.median(errors[f"{name}_error"]) for name in ("raw", "held_out", "training", "no_prefix")]
        table.add_row(
            str(layer),
            *(f"{x:.3f}" for x in medians),
            f"{np.median(ratio):.1f}",
            f"{ratio.min():.1f}",
            f"{ratio.max():.1f}",
        )
    console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"{options.feature_map}, {options.tokens} real tokens through MiniLM"
    draw(result, title).savefig(options.out / "fit.png", dpi=150)
    numbers = {
        str(layer): {name: list(map(float, v)) for name, v in errors.items()} for layer, errors in result.items()
    }
    document = {"options": dataclasses.asdict(options), "layers": numbers, **provenance()}
    write_whole(options.out / "fit.json", json_text(document).encode())
    console.print(f"{options.out / 'fit.png'}")


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m tests.bench.bench_fit"))
