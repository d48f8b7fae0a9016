"""One training step of MiniLM, 32 x 64 tokens: our methods, interleaved, beside Hugging Face peft in the same run.

``python -m tests.bench.bench_step [--torch-python PATH]``: PATH is a Python with torch, transformers and peft.

The *floor* is the time that the step's matrix products take at the rate of one large product measured in the same run:
forward, and backward through frozen weights (activations' gradients only), without attention's own products. Then the
parts of a layer are timed alone, forward and backward, as often as the model has them: where the rest of the step goes.
The library's GELU and LayerNorm, which ours stand in for, are timed beside them.

Ours run in huge pages, as ``python -m train`` does, or without. Theirs run twice, with and without; the faster counts,
method by method.
"""

import sys

from train.memory import TUNABLES, use_huge_pages

if __name__ == "__main__" and "--no-huge-pages" not in sys.argv:
    use_huge_pages()

import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from ntk_prefix import models, ntk_attention, peft, softmax_attention
from ntk_prefix.checks import expected
from ntk_prefix.models.elementwise import LayerNorm, gelu
from ntk_prefix.training import Trainer
from tests.bench.bench_attention import processor
from train import assets
from train.command import ended
from train.config import TrainConfig, adapter_config
from train.setup import loss_of, model_inputs

BATCH, LENGTH = 32, 64

ROWS = {
    "head": ("head", ()),
    "bitfit": ("bitfit", ()),
    "lora r=8": ("lora", ()),
    "prefix 50": ("prefix_tuning", ("num_tokens=50",)),
    "prefix-tuning+": ("prefix_tuning_plus", ()),
    "ntk published": ("ntk_attention_published", ()),
    "ntk": ("ntk_attention", ()),
    "full": ("full", ()),
}

PEERS = """
import json, sys, time, torch, transformers, peft, statistics
torch.set_num_threads(2)
folder, repeats = sys.argv[1], int(sys.argv[2])
ids = torch.randint(1000, 20000, (32, 64), generator=torch.Generator().manual_seed(0))
mask, labels = torch.ones_like(ids), torch.arange(32) % 2
def model():
    # without dropout, as ours: it would cost them time
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
def head():
    m = model()
    for name, parameter in m.named_parameters():
        parameter.requires_grad = "classifier" in name or "pooler" in name
    return m
lora = lambda: peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
makers = {
    "lora r=8": lambda: peft.get_peft_model(model(), lora()),
    "prefix 50": lambda: peft.get_peft_model(
        model(), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=50)
    ),
    "full": model,
    "head": head,
}
steps, problems = {}, {}
for name, make in makers.items():
    try:
        m = make()
        m.train()
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-4)
        def step(m=m, optimizer=optimizer):
            optimizer.zero_grad(); m(input_ids=ids, attention_mask=mask, labels=labels).loss.backward(); optimizer.step()
        step()
    except Exception as error:  # a method that these versions cannot run: the others are timed
        problems[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    else:
        steps[name] = step
square = torch.ones(1536, 1536)
steps["product"] = lambda: square @ square
steps["product"]()
times = {name: [] for name in steps}
for _ in range(repeats):
    for name, step in steps.items():
        begun = time.perf_counter(); step(); times[name].append(time.perf_counter() - begun)
versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
print(json.dumps({"times": times, "problems": problems, "versions": versions}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run."""

    torch_python: Path | None = None
    """A Python with torch, transformers and peft, to time them in the same run."""
    repeats: int = 9
    """Steps of each, interleaved."""
    rows: tuple[str, ...] = ()
    """Some of the methods; all for none."""
    huge_pages: bool = True
    """Large blocks in huge pages, as in training."""

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            UsageError: naming the flag.
        """
        if self.repeats < 2:
            raise expected("--repeats", "at least 2", self.repeats)
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise expected("--rows", f"some of {', '.join(map(repr, ROWS))}", unknown[0])
        if self.torch_python is not None and not self.torch_python.is_file():
            raise expected("--torch-python", "a Python", f"{self.torch_python}, which is no file")


def batch() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1000, 20000, (BATCH, LENGTH), dtype=np.int32)
    labels = np.arange(BATCH, dtype=np.int32) % 2
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": labels,
        "weight": np.ones(BATCH, np.float32),
    }


def stepper(method: str, changes: tuple[str, ...]) -> tuple[Callable[[], None], int]:
    """A function that takes one step and waits for it, and the number of trained parameters."""
    model = models.from_pretrained(
        assets.asset("minilm"), task="sequence-classification", num_labels=2, rngs=nnx.Rngs(0)
    )
    peft.apply(model, adapter_config(method, changes), calibration=model_inputs(model, batch()))
    optimizer = peft.non_negative(optax.adamw(1e-4))
    config = TrainConfig(model="minilm", task="sst2", method=method)
    loss = loss_of("sequence-classification", config)
    trainer = Trainer(loss=loss, optimizer=optimizer, wrt=peft.AdapterParam)
    state, step = trainer.init(model), trainer.stepper(model)
    rows = trainer.place({name: jnp.asarray(value) for name, value in batch().items()})

    def once() -> None:
        nonlocal state
        state, metrics = step(state, rows)
        jax.block_until_ready((state, metrics))

    once()
    return once, peft.trainable_parameters(model)[0]


def interleaved(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begun)
    return times


def parts() -> dict[str, float]:
    """Seconds per step, forward and backward, of what a model has of each part; median of 9, each part compiled alone."""
    tokens, layers = BATCH * LENGTH, 6
    norm = LayerNorm(384, rngs=nnx.Rngs(0))
    flax_norm = nnx.LayerNorm(384, use_fast_variance=False, rngs=nnx.Rngs(0))
    up, square = (nnx.Linear(384, width, rngs=nnx.Rngs(0)) for width in (1536, 384))
    down = nnx.Linear(1536, 384, rngs=nnx.Rngs(0))
    heads = (BATCH, LENGTH, 12, 32)
    z, k = jnp.full((12, 32, 32), 0.01), jnp.full((12, 32), 0.01)
    made: dict[str, tuple[int, Callable[..., jax.Array], tuple[tuple[int, ...], ...]]] = {
        "maps of attention": (4 * layers, square, ((tokens, 384),)),
        "maps of the MLP, up": (layers, up, ((tokens, 384),)),
        "maps of the MLP, down": (layers, down, ((tokens, 1536),)),
        "GELU": (layers, gelu, ((tokens, 1536),)),
        "GELU of jax.nn": (layers, functools.partial(jax.nn.gelu, approximate=False), ((tokens, 1536),)),
        "layer norm of a sum": (2 * layers, lambda x, y: norm(x + y), ((tokens, 384),) * 2),
        "layer norm of flax": (2 * layers, lambda x, y: flax_norm(x + y), ((tokens, 384),) * 2),
        "attention": (layers, softmax_attention, (heads,) * 3),
        "NTK-Attention": (layers, lambda q, k_, v: ntk_attention(q, k_, v, z, k, mass="relative"), (heads,) * 3),
    }
    found = {}
    for name, (count, function, shapes) in made.items():
        arguments = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

        @jax.jit
        def both(arguments: list[jax.Array], function: Callable[..., jax.Array] = function) -> Any:
            output, pull = jax.vjp(function, *arguments)
            return output, pull(output)

        jax.block_until_ready(both(arguments))
        times = []
        for _ in range(9):
            begun = time.perf_counter()
            jax.block_until_ready(both(arguments))
            times.append(time.perf_counter() - begun)
        found[f"{count} x {name}"] = count * statistics.median(times)
    return found


SIDE = 1536
"""Of the square matrices whose product gives the machine's rate, ours and theirs."""


def product() -> Callable[[], None]:
    """A large product of ours."""
    a = jnp.ones((SIDE, SIDE))
    multiply = jax.jit(lambda x: x @ x)
    return lambda: jax.block_until_ready(multiply(a))


def floors(seconds: float) -> tuple[float, float]:
    """Seconds of the matrix products of a forward, and of a forward and a frozen backward, at the rate of a large one."""
    rate = 2 * SIDE**3 / seconds
    # a layer: four maps of d x d, two of d x 4 d
    flops = 6 * 2 * BATCH * LENGTH * (4 * 384**2 + 2 * 384 * 1536)
    return flops / rate, 2 * flops / rate


@dataclasses.dataclass
class Peers:
    """Seconds of each step of each method and of a large product, and why the others cannot run."""

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: str = ""


def torch_and_peft(python: Path, repeats: int) -> Peers:
    """Return the peers' figures, in the setting of malloc where a method's median is lower."""
    settings = []
    for tunables in ({"GLIBC_TUNABLES": ""}, TUNABLES):
        command = [str(python), "-c", PEERS, str(assets.asset("minilm")), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | tunables)
        if done.returncode:
            return Peers(problems=dict.fromkeys(ROWS, (done.stderr.strip().splitlines() or ["it ended"])[-1][:120]))
        settings.append(json.loads(done.stdout.splitlines()[-1]))
    faster = {
        name: min((found["times"][name] for found in settings), key=statistics.median) for name in settings[0]["times"]
    }
    return Peers(faster, settings[0]["problems"], settings[0]["versions"])


def run(options: Options, console: Console) -> int:
    """Print the tables; return the exit status."""
    options.check()
    chosen = {name: ROWS[name] for name in (options.rows or ROWS)}
    made = {name: stepper(*row) for name, row in chosen.items()}
    steps = {name: step for name, (step, _) in made.items()} | {"product": product()}
    steps["product"]()
    peers = Peers()
    times: dict[str, list[float]] = {name: [] for name in steps}
    # half of ours before the peers and half after: a machine that changes its pace does it to both
    for half in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for name, values in interleaved(steps, -(-options.repeats // 2)).items():
            times[name] += values
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if half == 0 and options.torch_python is not None:
            peers = torch_and_peft(options.torch_python, options.repeats)
    forward, both = floors(statistics.median(times["product"]))
    table = Table(
        "method", "trained", "ours: median (quartiles), s", "over the floor", "torch + peft, s", "ours / theirs"
    )
    for name in made:
        low, middle, high = statistics.quantiles(times[name], n=4)
        floor = forward if name == "head" else both
        row = (name, f"{made[name][1]:,}", f"{middle:.3f} ({low:.3f}..{high:.3f})", f"{middle / floor:.2f}")
        ratio = ("-", "-")
        if name in peers.times:
            theirs = statistics.median(peers.times[name])
            ratio = (f"{theirs:.3f}", f"{middle / theirs:.2f}")
        elif name in peers.problems:
            ratio = (f"cannot run: {peers.problems[name]}", "-")
        table.add_row(*row, *ratio)
    console.print(table)
    if peers.times:
        ours, theirs = (statistics.median(each["product"]) for each in (times, peers.times))
        console.print(
            f"{peers.versions}; a product of {SIDE}^3: ours {2e-9 * SIDE**3 / ours:.0f}, theirs "
            f"{2e-9 * SIDE**3 / theirs:.0f} Gflop/s: JAX multiplies at {theirs / ours:.2f}x of torch's rate here."
        )
    shares = Table("part alone, forward and backward", "s per step")
    for name, seconds in parts().items():
        shares.add_row(name, f"{seconds:.3f}")
    console.print(shares)
    each = faults / len(made) / -(-options.repeats // 2)
    console.print(
        f"floor: forward {forward:.3f} s, forward and frozen backward {both:.3f} s; {processor()}, {jax.devices()[0]}; "
        f"{each:,.0f} page faults per step"
    )
    return 0


def main() -> int:
    """Run it; a user's error is one line."""
    console = Console(width=140)
    return ended(lambda: run(tyro.cli(Options, prog="python -m tests.bench.bench_step"), console), console)


if __name__ == "__main__":
    sys.exit(main())
