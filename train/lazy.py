r"""``python -m train.lazy``: does the empirical tangent kernel of an adapter explain what fine-tuning it reaches?

For each method, on the same few examples: the kernel :math:`\Theta` of the logits of a pretrained model with respect to the
adapter, at its start; its spectrum; kernel regression with it,

.. math::  f(x) = f_0(x) + \Theta(x, X) (\Theta(X, X) + \rho I)^{-1} (Y - f_0(X)),

Y being 1 for the true label and 0 for the others, rho chosen on validation; and beside it the fine-tuned adapter of
``python -m train``, its learning rate chosen on validation.  A head is trained beside the adapter: the second regression
has the sum of both kernels, each divided by its trace, for Adam moves both at rates of their own. Where regression
reaches as much as training, the lazy regime explains the accuracy; where training is ahead, features moved.

*Directions* are ``(tr)^2 / tr(Theta^2)`` of the adapter's kernel, its participation: how many directions of the training
set are learned at comparable speed. Each seed draws its own sample and start; one view, a method on a seed, is a file,
and the same command later makes those that are missing.
"""

from __future__ import annotations

from train.memory import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import dataclasses
import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax.numpy as jnp
import msgspec
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ntk_prefix import peft
from ntk_prefix.artifacts import json_text, provenance, read_json, write_figure, write_whole
from ntk_prefix.checks import NonFiniteError, expected
from ntk_prefix.kernels import empirical_ntk
from ntk_prefix.kernels.empirical import KernelFallbackWarning
from ntk_prefix.typing import Array, Float
from train import data
from train.command import Checked, DivergedError, Terminal, check_rates, ended, parsed
from train.config import CONFIGS, METHODS, TrainConfig
from train.fingerprint import fingerprint
from train.loop import Interrupted, run
from train.prefix_lengths import head_lengths, in_words
from train.setup import build, model_inputs
from train.sources import spec_of

__all__ = ["Options", "View", "cached_view", "draw", "view"]

JACOBIAN_BYTES, TOKENS = 2**29, 2**13
"""A block of examples is as large as these let its Jacobian be, and its texts together: activations are kept for all that
is derived at once. MiniLM, two labels, 1,256 sentences: 5.2 GB and 113 s; without the second limit 14.3 GB and 77 s.
"""

RIDGES = tuple(10.0**power for power in range(-5, 2))
"""Candidates for rho, relative to the kernel's mean eigenvalue."""


def _has_classes(name: str) -> bool:
    return name in CONFIGS and spec_of(CONFIGS[name][1].task).kind.endswith("classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Of one kernel view."""

    config: str = "rotten_tomatoes"
    """A named configuration of ``train``, classification."""
    data_dir: str | None = None
    """As in ``train``."""
    methods: tuple[str, ...] = ("head", "lora", "prefix_tuning", "ntk_attention_published", "ntk_attention")
    """By name."""
    train_size: int = 256
    """Examples that kernel and adapter are trained on."""
    validation_size: int = 200
    """Examples that the ridge, and the step, are chosen on."""
    test_size: int = 800
    """Examples that the result is read on."""
    steps: int = 100
    """Of fine-tuning."""
    learning_rates: tuple[float, ...] = (5e-4, 5e-3, 5e-2)
    """Of fine-tuning; the one with the lowest validation loss counts."""
    max_length: int = 48
    """Tokens of a text."""
    seeds: int = 3
    """How many samples and starts."""
    out: Path = Path("runs/lazy")
    """Folder of table, figure, views and the fine-tuning runs."""

    def check(self) -> None:
        """Refuse what is not there, before any work."""
        if self.config not in CONFIGS or not _has_classes(self.config):
            of_classes = [name for name in CONFIGS if _has_classes(name)]
            raise expected("--config", f"one of {', '.join(of_classes)}", repr(self.config))
        if unknown := set(self.methods) - set(METHODS):
            raise expected("--methods", f"some of {', '.join(METHODS)}", ", ".join(sorted(unknown)))
        if self.seeds < 1:
            raise expected("--seeds", "at least one", self.seeds)
        if not self.learning_rates:
            raise expected("--learning-rates", "at least one", "none")
        for method, rate in itertools.product(self.methods, self.learning_rates):
            _config(self, method, rate, self.seeds - 1)
        check_rates("--learning-rates", self.learning_rates)


@dataclasses.dataclass(frozen=True)
class View:
    """One method on one sample: kernel regression with its kernel, and fine-tuning of the adapter."""

    method: str
    seed: int
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

    @property
    def scores(self) -> tuple[float, float, float]:
        """Of regression, regression with the head's kernel, and training."""
        return self.regression_score, self.joint_score, self.fine_tuned_score


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a classifier of text takes: in this order along the last axis of the array that a kernel is a function of."""


class _Logits(nnx.Module):
    """A classifier as a function of one array, as a kernel wants it: pixels, or :data:`TEXT_INPUTS` [n, T, 2 or 3]."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, x: Array) -> Float[Array, "n labels"]:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            return self.model(x).logits
        batch = {name: x[..., index] for index, name in zip(range(x.shape[-1]), TEXT_INPUTS, strict=False)}
        return self.model(**model_inputs(self.model, batch)).logits


HEAD = nnx.All(peft.AdapterParam, nnx.PathContains("head"))
"""What is trained of a classifier's head."""


class _Identity(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return x


def head_ntk(model: _Logits, x: Array, columns: int) -> Float[Array, "n labels columns labels"]:
    """Return the kernel of the logits with respect to the head alone, of rows with the first ``columns`` of them.

    Logits are linear in it, ``W^T h(x) + b``, so no derivative is taken: ``(<h(x_i), h(x_j)> + 1) delta_kl``, without the 1
    where no bias is trained.

    Raises:
        UsageError: no head is trained.
    """
    trained = {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, HEAD))}
    if "kernel" not in trained:
        raise expected("model", "a head that is trained", sorted(trained))
    head, model.model.head = model.model.head, _Identity()
    try:
        states = model(x)
    finally:
        model.model.head = head
    products = states @ states[:columns].T + ("bias" in trained)
    return jnp.einsum("ij,kl->ikjl", products, jnp.eye(trained["kernel"][-1], dtype=products.dtype))


class _StoredView(TypedDict):
    """A :class:`View` in its file."""

    method: str
    seed: int
    parameters: int
    eigenvalues: Annotated[list[float], msgspec.Meta(min_length=1)]
    ridge: float
    regression_score: float
    joint_score: float
    learning_rate: float
    fine_tuned_score: float


class _ViewFile(TypedDict):
    options: dict[str, Any]
    view: _StoredView
    rows: NotRequired[str | None]
    """:func:`train.fingerprint.fingerprint` of what was read."""


def cached_view(options: Options, method: str, seed: int, console: Console) -> View:
    """Return :func:`view`, from its file if it has been made.

    Raises:
        UsageError: it was made with other options or of other rows, or its file is damaged.
    """
    file = options.out / "views" / f"{options.config}-{method}-{seed}.json"
    free = ("methods", "seeds", "out")
    asked = json.loads(json_text({k: v for k, v in dataclasses.asdict(options).items() if k not in free}))
    rows = fingerprint(CONFIGS[options.config][1].task, options.data_dir)
    if file.is_file():
        stored: _ViewFile = read_json(file, _ViewFile)
        if stored["options"] != asked:
            raise expected(
                "--out",
                "a new folder, or one of these options",
                f"{options.out}, where {file.name} has {stored['options']} and not {asked}",
                "Name another folder",
            )
        if rows is not None and stored.get("rows") not in (None, rows):
            found = f"{options.out}, where {file.name} is of {options.data_dir} before it changed"
            raise expected("--out", "a new folder, or one of these rows", found, "Name another folder")
        values: dict[str, Any] = {**stored["view"]}
        return View(**values | {"eigenvalues": np.asarray(values["eigenvalues"])})
    made = view(options, method, seed, console)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json_text({"options": asked, "rows": rows, "view": _plain(made), **_provenance()}).encode())
    return made


def view(options: Options, method: str, seed: int, console: Console) -> View:
    """Compute a method's kernel on real examples, regress with it, and fine-tune beside it.

    Raises:
        NonFiniteError: logits or a kernel are not finite, or training diverged at every rate.
    """
    configs = {rate: _config(options, method, rate, seed) for rate in options.learning_rates}
    setup = build(next(iter(configs.values())))
    split = setup.task
    arrays = [_inputs(part, options.max_length) for part in (split.train, split.validation, split.test)]
    labels = [part["labels"] for part in (split.train, split.validation, split.test)]
    model = _Logits(setup.model)
    trained = peft.trainable_parameters(setup.model)[0]
    block = max(min(JACOBIAN_BYTES // (4 * split.num_labels * trained), TOKENS // options.max_length), 1)
    # all splits at once: one program, compiled once
    everything, ends = jnp.concatenate(arrays), np.cumsum([len(x) for x in arrays])[:-1]
    start = np.split(_finite("logits", np.asarray(model(everything), np.float64)), ends)
    residual = (np.eye(split.num_labels)[labels[0]] - start[0]).ravel()

    def of_adapter() -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelFallbackWarning)  # structured derivatives do not know attention
            wrt = nnx.All(peft.AdapterParam, nnx.Not(HEAD))
            return empirical_ntk(model, everything, arrays[0], wrt=wrt, implementation="jacobian", batch_size=block)

    def normalized(whole: Array) -> list[np.ndarray]:
        """Of the training examples with themselves, validation, test, divided by the trace of the first."""
        columns = whole.shape[2] * whole.shape[3]
        found = _finite(f"kernel of {method}", np.asarray(whole, np.float64))
        parts = [rows.reshape(-1, columns) for rows in np.split(found, ends)]
        if not (trace := np.trace(parts[0])) > 0:
            raise NonFiniteError(f"kernel of {method}: expected a trace above 0, got {trace}: no gradient reaches it.")
        return [part / trace for part in parts]

    def regress(train_train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Eigenvalues, largest first, the chosen ridge and its score."""
        eigenvalues, vectors = np.linalg.eigh(train_train)

        def score(part: int, cross: np.ndarray, ridge: float) -> float:
            weights = vectors @ (vectors.T @ residual / (eigenvalues.clip(0) + ridge * eigenvalues.mean()))
            outputs = start[part] + (cross @ weights).reshape(start[part].shape)
            return float((outputs.argmax(axis=1) == labels[part]).mean())

        ridge = max(RIDGES, key=lambda r: score(1, validation, r))
        return eigenvalues[::-1], ridge, score(2, test, ridge)

    by_head = normalized(head_ntk(model, everything, len(arrays[0])))
    by_adapter = by_head if method == "head" else normalized(of_adapter())
    eigenvalues, ridge, regression = regress(*by_adapter)
    joint = regress(*(a + b for a, b in zip(by_adapter, by_head, strict=True)))[2]
    console.print(
        f"{method}, seed {seed}: kernel regression {regression:.3f}, with the head's {joint:.3f}; fine-tuning ..."
    )
    tuned: dict[float, dict[str, Any]] = {}
    for rate, config in configs.items():
        try:
            tuned[rate] = run(config, _run_folder(options, method, rate, seed), console)
        except DivergedError as error:  # a rate too high for this method: another is chosen
            console.print(str(error), markup=False, highlight=False)
    if not tuned:
        raise NonFiniteError(
            f"--learning-rates: expected one at which {method} does not diverge, got none of {[*configs]}."
        )
    best = min(tuned, key=lambda rate: tuned[rate]["validation_loss"])
    return View(method, seed, trained, eigenvalues, ridge, regression, joint, best, tuned[best]["test_score"])


def draw(views: list[View], heading: str) -> Figure:
    """Return spectra on the left, one line per sample; scores on the right, with their standard deviation."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    spectra, scores = figure.subplots(1, 2)
    methods = _by_method(views)
    for index, (method, seen) in enumerate(methods.items()):
        for each in seen:
            values = each.eigenvalues / each.eigenvalues[0]
            label = method if each is seen[0] else None
            spectra.plot(np.arange(1, len(values) + 1), values.clip(1e-9), color=f"C{index}", lw=1, label=label)
        means, spreads = _mean_and_spread([each.scores for each in seen])
        for place, alpha in enumerate((0.3, 0.6, 1.0)):
            bar = {"color": f"C{index}", "alpha": alpha, "error_kw": {"lw": 1}}
            scores.barh(index + 0.26 * (place - 1), 100 * means[place], 0.24, xerr=100 * spreads[place], **bar)
    spectra.set(
        xscale="log",
        yscale="log",
        ylim=(1e-6, 2),  # below is float32's rounding
        xlabel="index",
        ylabel="eigenvalue / largest",
        title="kernel of the adapter",
    )
    spectra.legend(frameon=False, fontsize=8)
    scores.set_yticks(range(len(methods)), list(methods))
    lowest, highest = (100 * choose(choose(each.scores) for each in views) for choose in (min, max))
    title = "pale: kernel regression, middle: with the head's\nkernel too, full: fine-tuned"
    scores.set(
        xlim=(lowest - 5, min(highest + 5, 100)),
        xlabel="test score, %; cut at the left, lines: standard deviation",
        title=title,
    )
    scores.invert_yaxis()
    figure.suptitle(heading)
    return figure


def _by_method(views: list[View]) -> dict[str, list[View]]:
    return {method: [v for v in views if v.method == method] for method in dict.fromkeys(v.method for v in views)}


def _mean_and_spread(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Over the samples, the first axis; the spread of one sample is 0."""
    array = np.asarray(values, np.float64)
    return array.mean(axis=0), array.std(axis=0, ddof=1) if len(array) > 1 else 0 * array[0]


def _provenance() -> dict[str, Any]:
    return provenance("neural-tangents", sources=("ntk_prefix/**/*.py", "train/**/*.py"))


def _plain(each: View) -> dict[str, Any]:
    return dataclasses.asdict(each) | {"eigenvalues": each.eigenvalues.tolist()}


def _config(options: Options, method: str, learning_rate: float, seed: int) -> TrainConfig:
    usual = CONFIGS[options.config][1]
    return usual.changed(
        method=method,
        data_dir=options.data_dir,
        train_size=options.train_size,
        validation_size=options.validation_size,
        test_size=options.test_size,
        max_length=options.max_length,
        steps=options.steps,
        learning_rate=learning_rate,
        # where the head is all there is, it is what is tuned
        head_learning_rate=learning_rate if method == "head" else usual.optim.head_learning_rate,
        choose_by="loss",
        evaluate_every=max(options.steps // 4, 1),
        seed=seed,
    )


def _run_folder(options: Options, method: str, learning_rate: float, seed: int) -> Path:
    return options.out / "runs" / f"{options.config}-{method}-{learning_rate:g}-{seed}"


def _inputs(split: data.Dataset, length: int) -> Array:
    """Return a whole split as one array, padded to one length: what :class:`_Logits` takes."""
    (batch,) = data.evaluation_batches(split, split.rows, buckets=(length,))
    if split.has_images:
        return jnp.asarray(batch["pixel_values"])
    return jnp.stack([jnp.asarray(batch[name], jnp.int32) for name in TEXT_INPUTS if name in batch], axis=-1)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """Return numbers as they are.

    Raises:
        NonFiniteError: one is not finite; ``argmax`` and eigenvalues would hide it.
    """
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: expected finite numbers, got {np.count_nonzero(~np.isfinite(values)):,} others.")
    return values


def main(options: Options, console: Console | None = None) -> None:
    """Compute the view of every method on every sample, print a table, draw."""
    console = console or Console()
    options.out.mkdir(parents=True, exist_ok=True)
    methods = tuple(dict.fromkeys(options.methods))  # one that is named twice is no second sample
    views = [cached_view(options, m, seed, console) for seed in range(options.seeds) for m in methods]
    table = Table()
    table.add_column("method", no_wrap=True)
    for name in ("parameters", "directions", "kernel regression", "with the head's", "fine-tuned", "ahead by"):
        table.add_column(name)

    def plus_minus(error: float) -> str:
        return f" ± {100 * error:.1f}" if options.seeds > 1 else ""

    for method, seen in _by_method(views).items():
        # on one sample each: what the samples share cancels
        leads = [each.fine_tuned_score - each.joint_score for each in seen]
        lead, spread = _mean_and_spread(leads)
        means, spreads = _mean_and_spread([each.scores for each in seen])
        directions = _mean_and_spread([each.participation for each in seen])[0]
        table.add_row(
            method,
            f"{seen[0].parameters:,}",
            f"{directions:.1f}",
            *(f"{100 * mean:.1f}" + plus_minus(error) for mean, error in zip(means, spreads, strict=True)),
            f"{100 * lead:+.1f}" + plus_minus(spread / options.seeds**0.5),
        )
    console.print(table)
    for each in views:
        folder = _run_folder(options, each.method, each.learning_rate, each.seed) / "adapter"
        if each.seed == 0 and folder.is_dir() and (heads := head_lengths(folder)):
            console.print(f"{each.method}: {in_words(heads)}", markup=False, highlight=False, soft_wrap=True)
    over = ", mean and standard deviation (ahead by: standard error)" if options.seeds > 1 else ""
    console.print(
        f"samples: {options.seeds}; test score, %{over}. Ahead by: fine-tuning minus regression with both kernels."
    )
    title = f"{options.config}, {options.train_size} examples, samples: {options.seeds}"
    write_figure(options.out / "lazy.png", draw(views, title), dpi=150)
    document = {
        "options": dataclasses.asdict(options),
        "views": [_plain(each) for each in views],
        **_provenance(),
    }
    write_whole(options.out / "lazy.json", json_text(document).encode())
    console.print(f"{options.out / 'lazy.png'}", markup=False, highlight=False, soft_wrap=True)


def _view_all(console: Console) -> int:
    options = parsed(lambda: tyro.cli(Options, prog="python -m train.lazy"))
    options.check()
    try:
        main(options, console)
    except Interrupted as stop:
        console.print(str(stop), style="yellow", markup=False)
    return 0


def command() -> int:
    """Parse, compute; say in a line what is wrong."""
    console = Terminal()
    return ended(lambda: _view_all(console), console)


if __name__ == "__main__":
    sys.exit(command())
