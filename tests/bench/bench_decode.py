"""Greedy decoding of SmolLM2-135M, tokens per second, beside transformers in the same run.

``python -m tests.bench.bench_decode [--torch-python PATH]``: PATH is a Python with torch and transformers.

Theirs is a process that has loaded the same weights and waits; rounds are interleaved, ours and theirs taking turns, so
that a busy machine slows all of them alike, and a ratio is the median over rounds of the ratio within the round. What is
timed is a token: a call that makes many less a call that makes one, so that reading the prompt does not count. The first
tokens of all are compared.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from ntk_prefix import models, peft
from ntk_prefix.checks import expected
from tests.bench.bench_attention import processor
from train import assets
from train.command import ended
from train.config import adapter_config

PEER = """
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
made = {"float32": model}
print(json.dumps([torch.__version__, transformers.__version__]), flush=True)
for line in sys.stdin:
    kind, ids, new = json.loads(line)
    if kind not in made:
        made[kind] = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval().to(getattr(torch, kind))
    ids = torch.tensor(ids)
    begun = time.perf_counter()
    out = made[kind].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    print(json.dumps([time.perf_counter() - begun, out[:, ids.shape[1]:].tolist()]), flush=True)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run."""

    torch_python: Path | None = None
    """A Python with torch and transformers, to time them in the same run."""
    batches: tuple[int, ...] = (1, 8)
    """Rows at once."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 32
    """Tokens that are timed."""
    rounds: int = 5
    """Of each, interleaved."""
    threads: int = 2
    """Of torch's."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters for SmolLM2, such as ``train.compress`` writes, each a row."""

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            UsageError: naming the flag.
        """
        for name in ("prompt", "new", "rounds", "threads", *(() if all(b > 0 for b in self.batches) else ("batches",))):
            value = getattr(self, name)
            if value == () or (value if isinstance(value, int) else min(value)) < 1:
                raise expected(f"--{name}", "at least 1", value)
        if self.torch_python is not None and not self.torch_python.is_file():
            raise expected("--torch-python", "a Python", f"{self.torch_python}, which is no file")


class Transformers:
    """The peer's process."""

    def __init__(self, python: Path, folder: Path, threads: int):
        command = [str(python), "-c", PEER, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._answer()

    def __call__(self, ids: np.ndarray, new: int, kind: str = "float32") -> tuple[float, list[list[int]]]:
        """Return the seconds of a call and its tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, ids.tolist(), new]) + "\n")
        self.process.stdin.flush()
        seconds, tokens = self._answer()
        return seconds, tokens

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise expected(
                "--torch-python", "a Python with torch and transformers", "one that ended; it says why above"
            )
        return json.loads(line)


@contextmanager
def transformers(options: Options, model: models.Llama) -> Iterator[Transformers | None]:
    """Start the peer with our model's weights, and end it."""
    if options.torch_python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(model, Path(folder))
        peer = Transformers(options.torch_python, Path(folder), options.threads)
        try:
            yield peer
        finally:
            peer.process.kill()
            peer.process.wait()


def write_hugging_face(model: models.Llama, folder: Path) -> None:
    """Write a model's weights as transformers reads them: ``y = W x`` with ``W`` [out, in]."""
    # what says nothing here (no types of layers) transformers would take at its word
    config = {name: value for name, value in dataclasses.asdict(model.config).items() if value not in ((), None)}
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, kind = (str(part) for part in path)
        layer = module[1] if module[0] == "layers" else ""
        ours = ".".join("{i}" if part == layer and i == 1 else part for i, part in enumerate(module))
        name = model.hugging_face_names[ours].replace("{i}", layer)
        array = np.asarray(value[...])
        tensors[f"{name}.weight"] = np.ascontiguousarray(array.T if kind == "kernel" else array)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))


def contenders(adapters: tuple[Path, ...] = ()) -> dict[str, models.Llama]:
    """Return our models by name; the first is the one that ratios are of."""

    def load(**options: Any) -> models.Llama:
        model = models.from_pretrained(assets.asset("smollm2"), task="causal-lm", **options)
        assert isinstance(model, models.Llama)
        return model

    plain, adapted = load(), load()
    ids = jnp.asarray(np.random.default_rng(1).integers(0, plain.config.vocab_size, (2, 64)))
    peft.apply(adapted, adapter_config("ntk_attention", ()), calibration={"input_ids": ids})
    narrow = peft.narrow_frozen(load(dtype=jnp.bfloat16))
    made = {"float32": plain, "a state of any prefix": adapted, "bfloat16": narrow}
    for folder in adapters:
        made[str(folder)] = load()
        peft.load_adapter(made[str(folder)], folder)
    return made


def run(options: Options, console: Console) -> int:
    """Print the table; return the exit status."""
    options.check()
    made = contenders(options.adapters)
    with transformers(options, made["float32"]) as peer:
        for batch in options.batches:
            compare(made, peer, batch, options, console)
    return 0


def compare(
    made: dict[str, models.Llama], peer: Transformers | None, batch: int, options: Options, console: Console
) -> None:
    """Print the table of one batch."""
    ids = np.random.default_rng(0).integers(0, 40_000, (batch, options.prompt))
    tokens: dict[str, list[list[int]]] = {}

    def ours(name: str, new: int) -> float:
        begun = time.perf_counter()
        tokens[name] = np.asarray(models.generate(made[name], jnp.asarray(ids), max_new_tokens=new)).tolist()
        return time.perf_counter() - begun

    def theirs(new: int) -> float:
        assert peer is not None
        seconds, tokens["transformers"] = peer(ids, new)
        return seconds

    calls: dict[str, Any] = {name: lambda new, name=name: ours(name, new) for name in made}
    if peer is not None:
        calls["transformers"] = theirs
    for call in calls.values():
        call(1), call(options.new + 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds):
        # there and back again: nobody is always the one behind the peer, whose threads may still be awake
        for name, call in list(calls.items())[:: (1, -1)[turn % 2]]:
            seconds[name].append((call(options.new + 1) - call(1)) / options.new)
    first, *_ = made
    for call in calls.values():
        call(8)
    title = (
        f"SmolLM2-135M, batch {batch}, prompt {options.prompt}, {options.new} tokens; {processor()}, {jax.devices()[0]}"
    )
    if peer is not None:
        title += f"; torch {peer.versions[0]}, transformers {peer.versions[1]}, float32, {options.threads} threads"
    table = Table(
        "",
        "ms per token: median (min..max)",
        "tokens/s",
        f"time / {first} (quartiles)",
        "same first 8 tokens",
        title=title,
    )
    for name, each in seconds.items():
        middle = statistics.median(each)
        low, ratio, high = np.quantile(np.divide(each, seconds[first]), (0.25, 0.5, 0.75))
        same = sum(a == b for a, b in zip(tokens[name], tokens[first], strict=True))
        taken = f"{1e3 * middle:.1f} ({1e3 * min(each):.1f}..{1e3 * max(each):.1f})"
        table.add_row(
            name, taken, f"{batch / middle:.1f}", f"{ratio:.2f} ({low:.2f}..{high:.2f})", f"{same} of {batch} rows"
        )
    console.print(table)


def main() -> int:
    """Run it; a user's error is one line."""
    console = Console(width=140)
    return ended(lambda: run(tyro.cli(Options, prog="python -m tests.bench.bench_decode"), console), console)


if __name__ == "__main__":
    sys.exit(main())
