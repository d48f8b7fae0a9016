r"""``python -m train.lazy``: does the empirical tangent kernel of an adapter explain what fine-tuning it reaches?

For each method, on the same few examples: the kernel :math:`\Theta` of the logits of a pretrained model with respect to the
adapter, at its start; its spectrum; kernel regression with it,

.. math::  f(x) = f_0(x) + \Theta(x, X) (\Theta(X, X) + \rho I)^{-1} (Y - f_0(X)),

Y being 1 for the true label and 0 for the others, rho chosen on validation; and beside it the fine-tuned adapter of
``python -m train``, its learning rate chosen on validation.  A head is trained beside the adapter: the second regression
has the sum of both kernels, each divided by its trace, for Adam moves both at rates of their own.  Where regression
reaches as much as training, the lazy regime explains the accuracy; where training is ahead, features moved.

*Participation* is ``(tr)^2 / tr(Theta^2)`` of the adapter's kernel: how many directions of the training set are learned
at comparable speed.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ntk_prefix import peft
from ntk_prefix.kernels import empirical_ntk
from ntk_prefix.kernels.empirical import KernelFallbackWarning
from ntk_prefix.results import json_text, provenance, write_whole
from ntk_prefix.typing import Array, Float
from train import data
from train.config import CONFIGS, METHODS, TrainConfig
from train.loop import run
from train.setup import build

__all__ = ["Options", "View", "draw", "view"]

JACOBIAN_BYTES = 2**29
"""A block of examples is as large as this lets its Jacobian be."""

RIDGES = tuple(10.0**power for power in range(-5, 2))
"""Candidates for rho, relative to the kernel's mean eigenvalue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one look."""

    config: str = "sst2"
    """A named configuration of ``train``, classification."""
    data_dir: str | None = None
    """As in ``train``."""
    methods: tuple[str, ...] = ("head", "lora", "prefix_tuning", "ntk_attention_published", "ntk_attention")
    """By name."""
    train_size: int = 128
    """Examples that kernel and adapter are trained on."""
    validation_size: int = 200
    """Examples that the ridge, and the step, are chosen on."""
    test_size: int = 400
    """Examples that the result is read on."""
    steps: int = 100
    """Of fine-tuning."""
    learning_rates: tuple[float, ...] = (5e-4, 5e-3, 5e-2)
    """Of fine-tuning; the one with the lowest validation loss counts."""
    max_length: int = 48
    """Tokens of a text."""
    seed: int = 0
    """Of the sample and the start."""
    out: Path = Path("runs/lazy")
    """Folder of table, figure and the fine-tuning runs."""


@dataclasses.dataclass(frozen=True)
class View:
    """What one method's kernel says, and what training made of the adapter."""

    method: str
    parameters: int
    eigenvalues: Float[np.ndarray, " n"]
    """Of the training kernel, largest first."""
    ridge: float
    regression_score: float
    """With the adapter's kernel."""
    joint_score: float
    """With the head's kernel added; the same for the method "head"."""
    learning_rate: float
    fine_tuned_score: float

    @property
    def participation(self) -> float:
        """``(sum of eigenvalues)^2 / sum of squares``: 1 if all gradient points one way."""
        return float(self.eigenvalues.sum() ** 2 / np.sum(self.eigenvalues**2))


class _Logits(nnx.Module):
    """A classifier as a function of one array, as a kernel wants it: ids (padding is ``pad_id``) or pixels."""

    def __init__(self, model: Any, pad_id: int):
        self.model, self.pad_id = model, pad_id

    def __call__(self, x: Array) -> Float[Array, "n labels"]:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return self.model(x, attention_mask=x != self.pad_id).logits
        return self.model(x).logits


def view(options: Options, method: str, console: Console) -> View:
    """Compute a method's kernel on real examples, regress with it, and fine-tune beside it."""
    configs = {rate: _config(options, method, rate) for rate in options.learning_rates}
    setup = build(next(iter(configs.values())))
    split = setup.task
    arrays = [_inputs(part, options.max_length) for part in (split.train, split.validation, split.test)]
    labels = [part["labels"] for part in (split.train, split.validation, split.test)]
    model = _Logits(setup.model, split.train.pad_id)
    trained = peft.trainable_parameters(setup.model)[0]
    block = max(JACOBIAN_BYTES // (4 * split.num_labels * trained), 1)
    # all splits at once: one program, compiled once
    everything, ends = jnp.concatenate(arrays), np.cumsum([len(x) for x in arrays])[:-1]
    start = np.split(np.asarray(model(everything), np.float64), ends)
    residual = (np.eye(split.num_labels)[labels[0]] - start[0]).ravel()

    def kernels(wrt: Any) -> list[np.ndarray]:
        """Of the training examples with themselves, validation, test, divided by the trace of the first."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelFallbackWarning)  # structured derivatives do not know attention
            whole = empirical_ntk(model, everything, arrays[0], wrt=wrt, implementation="jacobian", batch_size=block)
        columns = whole.shape[2] * whole.shape[3]
        parts = [rows.reshape(-1, columns) for rows in np.split(np.asarray(whole, np.float64), ends)]
        return [part / np.trace(parts[0]) for part in parts]

    def regress(train_train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Eigenvalues, largest first, the chosen ridge and its score."""
        eigenvalues, vectors = np.linalg.eigh(train_train)

        def score(part: int, cross: np.ndarray, ridge: float) -> float:
            weights = vectors @ (vectors.T @ residual / (eigenvalues.clip(0) + ridge * eigenvalues.mean()))
            outputs = start[part] + (cross @ weights).reshape(start[part].shape)
            return float((outputs.argmax(axis=1) == labels[part]).mean())

        ridge = max(RIDGES, key=lambda r: score(1, validation, r))
        return eigenvalues[::-1], ridge, score(2, test, ridge)

    head = nnx.All(peft.AdapterParam, nnx.PathContains("head"))
    of_head = kernels(head)
    of_adapter = of_head if method == "head" else kernels(nnx.All(peft.AdapterParam, nnx.Not(head)))
    eigenvalues, ridge, regression = regress(*of_adapter)
    joint = regress(*(a + b for a, b in zip(of_adapter, of_head, strict=True)))[2]
    console.print(f"{method}: kernel regression {regression:.3f}, with the head's {joint:.3f}; fine-tuning ...")
    tuned = {
        rate: run(config, options.out / "runs" / f"{options.config}-{method}-{rate:g}", console)
        for rate, config in configs.items()
    }
    best = min(tuned, key=lambda rate: tuned[rate]["validation_loss"])
    return View(method, trained, eigenvalues, ridge, regression, joint, best, tuned[best]["test_score"])


def draw(views: list[View], heading: str) -> Figure:
    """Spectra on the left, scores on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    spectra, scores = figure.subplots(1, 2)
    for index, each in enumerate(views):
        values = each.eigenvalues / each.eigenvalues[0]
        spectra.plot(np.arange(1, len(values) + 1), values.clip(1e-9), color=f"C{index}", label=each.method)
        bars = ((each.regression_score, 0.3), (each.joint_score, 0.6), (each.fine_tuned_score, 1.0))
        for place, (score, alpha) in enumerate(bars):
            scores.barh(index + 0.26 * (place - 1), 100 * score, 0.24, color=f"C{index}", alpha=alpha)
    spectra.set(
        xscale="log", yscale="log", xlabel="index", ylabel="eigenvalue / largest", title="kernel of the adapter"
    )
    spectra.legend(frameon=False, fontsize=8)
    scores.set_yticks(range(len(views)), [each.method for each in views])
    lowest = min(min(each.regression_score, each.joint_score, each.fine_tuned_score) for each in views)
    title = "pale: kernel regression, middle: with the head's\nkernel too, full: fine-tuned"
    scores.set(xlim=(100 * lowest - 5, 100), xlabel="test score, %", title=title)
    scores.invert_yaxis()
    figure.suptitle(heading)
    return figure


def _config(options: Options, method: str, learning_rate: float) -> TrainConfig:
    usual = CONFIGS[options.config][1]
    return dataclasses.replace(
        usual,
        method=method,
        data_dir=options.data_dir,
        train_size=options.train_size,
        validation_size=options.validation_size,
        test_size=options.test_size,
        max_length=options.max_length,
        steps=options.steps,
        learning_rate=learning_rate,
        # where the head is all there is, it is what is tuned
        head_learning_rate=learning_rate if method == "head" else usual.head_learning_rate,
        choose_by="loss",
        evaluate_every=max(options.steps // 4, 1),
        seed=options.seed,
    )


def _inputs(split: data.Dataset, length: int) -> Array:
    """A whole split as one array, padded to one length."""
    (batch,) = data.evaluation_batches(split, split.rows, buckets=(length,))
    return jnp.asarray(batch["pixel_values" if split.has_images else "input_ids"])


def main(options: Options) -> None:
    """Look at every method, print a table, draw."""
    if unknown := set(options.methods) - set(METHODS):
        raise SystemExit(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}.")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    views = [view(options, method, console) for method in options.methods]
    table = Table("method", "parameters", "participation", "kernel regression", "with the head's", "fine-tuned", "rate")
    for each in views:
        scores = (each.regression_score, each.joint_score, each.fine_tuned_score)
        row = (each.method, f"{each.parameters:,}", f"{each.participation:.2f}")
        table.add_row(*row, *(f"{100 * score:.1f}" for score in scores), f"{each.learning_rate:g}")
    console.print(table)
    title = f"{options.config}, {options.train_size} examples"
    draw(views, title).savefig(options.out / "lazy.png", dpi=150)
    numbers = [dataclasses.asdict(each) | {"eigenvalues": each.eigenvalues.tolist()} for each in views]
    document = {"options": dataclasses.asdict(options), "views": numbers, **provenance("neural-tangents")}
    write_whole(options.out / "lazy.json", json_text(document).encode())
    console.print(f"{options.out / 'lazy.png'}")


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m train.lazy"))
