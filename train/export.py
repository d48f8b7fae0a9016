"""``python -m train.export RUN``: what a finished run has trained, for machines that have nothing of ours.

    python -m train.export RUN --to stablehlo --out DIR        a predictor: a program, its weights, a script
    python -m train.export RUN --to hugging-face --out DIR     the model with LoRA merged into its weights

A predictor is the model with its adapter, NTK-Attention's state for one, as StableHLO (``jax.export``) for CPU, GPU and TPU;
it runs with jax, safetensors and tokenizers alone. Its attention is the implementation that runs everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.console import Console

from ntk_prefix import peft
from ntk_prefix.artifacts import check_new, json_text, new_folder, write_whole
from ntk_prefix.checks import expected
from ntk_prefix.typing import Array
from train.command import Checked, Terminal, at_least, ended, parsed
from train.finished import Finished, finished
from train.sources import Kind

__all__ = ["Options", "main"]

PLATFORMS = ("cpu", "cuda", "tpu")

SCRIPT = Path(__file__).with_name("predictor.py")
"""What a predictor's folder is run by; it is copied, and imports nothing of ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Write what a run has trained, for machines that have nothing of ours."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    to: Literal["stablehlo", "hugging-face"]
    """A predictor, or the model with its adapter merged."""
    out: Path
    """A new folder; one that an export was killed in is filled anew."""
    rows: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Texts or images that the predictor's program takes at once; several times for several programs. 1 and 32 by default."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        for rows in self.rows:
            at_least("rows", rows, 1)
        if self.rows and self.to != "stablehlo":
            raise expected("--rows", "--to stablehlo beside it", self.to)
        check_new(self.out, "--out")


def main(options: Options, console: Console) -> None:
    """Write the folder.

    Raises:
        UsageError: a run of another kind, or an adapter that cannot be merged.
    """
    if options.to == "hugging-face":
        _merged(options, console)
    else:
        _predictor(options, console)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    console.print(f"{options.out}: {size / 2**20:.1f} MiB", markup=False, soft_wrap=True)


def _merged(options: Options, console: Console) -> None:
    kinds: tuple[Kind, ...] = ("causal-lm", *CLASSIFIERS)
    run = finished(options.run, "a run of language or classification with an adapter", kinds)
    if run.path is None or not run.path.is_dir():
        raise expected("--to hugging-face", "a run on a Hugging Face folder", run.config.model)
    said: dict[str, Any] = {}
    if run.labels:
        labels = dict(enumerate(run.labels))
        said = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    written = peft.save_merged(run.model(), run.path, options.out, config=said)
    (options.out / "asset.json").unlink(missing_ok=True)  # of our own cache
    console.print(f"{len(written)} tensors are not the base model's")
    if (options.out / peft.HEAD_FILE).is_file():
        console.print(
            f"{peft.HEAD_FILE} has the head, {run.config.pooling} over tokens, then weight and bias: Hugging Face's class for "
            "this model pools in another way.",
            soft_wrap=True,
        )


CLASSIFIERS: tuple[Kind, ...] = ("sequence-classification", "image-classification")


def _predictor(options: Options, console: Console) -> None:
    run = finished(options.run, "a run of classification with an adapter", CLASSIFIERS)
    model = run.model()
    # keys of random streams, which no prediction draws from, are no weights
    graph, *states = nnx.split(model, nnx.Not(nnx.RngState), ...)
    state, streams = states
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    weights: dict[str, Array] = {name: variable[...] for name, (_, variable) in variables.items()}

    def predict(weights: dict[str, Array], inputs: dict[str, Array]) -> Array:
        filled = [(path, variable.replace(weights[name])) for name, (path, variable) in variables.items()]
        model = nnx.merge(graph, nnx.from_flat_state(filled), streams)
        return jax.nn.softmax(model(**inputs).logits.astype(jnp.float32))

    with new_folder(options.out, "--out"):
        for rows in options.rows or (1, 32):
            made = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(_shapes(weights), _inputs(run, model, rows))
            write_whole(options.out / f"predict_{rows}.bin", bytes(made.serialize()))
            console.print(f"a program for {rows} rows on {', '.join(made.platforms)}")
        from safetensors.flax import save

        write_whole(options.out / "weights.safetensors", save(weights))
        tokenizer = run.tokenizer()
        if tokenizer is not None:
            write_whole(options.out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
        shutil.copyfile(SCRIPT, options.out / "predict.py")
        # last: without it the script does not begin, so that a folder with it is whole
        write_whole(options.out / "predictor.json", json_text(_about(run, model)).encode())


def _about(run: Finished, model: Any) -> dict[str, Any]:
    """Return what a predictor's script has to know."""
    return {
        "labels": run.labels,
        "tokens": run.config.data.max_length if "text" in run.columns else None,
        "pairs": "text_pair" in run.columns,
        "inputs": {name: [list(x.shape), str(x.dtype)] for name, x in _inputs(run, model, 1).items()},
        "image": None if "text" in run.columns else dataclasses.asdict(run.image()),
        "run": json.loads((run.folder / "config.json").read_text()),
        "jax": jax.__version__,
    }


def _shapes(weights: dict[str, Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}


def _inputs(run: Finished, model: Any, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what the program takes: token ids and mask, token types of pairs if the model has them; or images, normalized."""
    if "text" not in run.columns:
        size = run.config.data.image_size
        return {"pixel_values": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32)}
    made = {"input_ids", "attention_mask", *({"token_type_ids"} if "text_pair" in run.columns else ())}
    names = [name for name in model.input_names if name in made]
    return {name: jax.ShapeDtypeStruct((rows, run.config.data.max_length), jnp.int32) for name in names}


def _export(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.export", description=__doc__))
    options.check()
    main(options, console)
    return 0


if __name__ == "__main__":
    terminal = Terminal()
    sys.exit(ended(lambda: _export(terminal), terminal))
