"""Loading a checkpoint of Llama-3.2-1B's shape, and one training step with it, in memory and time.

``python -m tests.bench.bench_loading [--torch-python PATH]``: PATH is a Python with torch, transformers and peft.

The checkpoint is random, bfloat16, in sharded safetensors, and made here. Each row is a process of its own:

    load    the checkpoint into bfloat16 weights, each of which has been read once (torch maps the file, and reads a weight
            when it is used; ours are turned, looked at for numbers that are not finite, and in place)
    step    4 rows of 512 tokens, in bfloat16, weights loaded as above: NTK-Attention and LoRA; torch + peft has LoRA only

*Peak* is the process' largest resident memory (VmHWM), pages of the mapped file included, which the kernel counts as this
process' while they are mapped, though it could drop them. *Anonymous* is the largest of what it could not drop (RssAnon),
looked at every 5 ms. Of a load both are given beyond what the process had before it, with its libraries imported and one
operation done; of a step the peak is the whole process, compilation included.

On a CPU, XLA makes float32 copies of bfloat16 weights for its products and keeps them from the forward pass to the backward
one. ``--remat`` takes less memory there only with XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false;
``--scan-layers`` has the copies of one layer at a time.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from ntk_prefix import models
from train.config import DataConfig, DeviceConfig, OptimConfig, TrainConfig
from train.setup import adapt, trainer_of

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 1000,
    },
}

MEASURE = '''
def status():
    lines = (line.split(":") for line in open("/proc/self/status"))
    return {name: int(value.split()[0]) * 1024 for name, value in lines if name in ("VmHWM", "RssAnon")}

class Watched:
    """The seconds, and the two peaks, of what is done within it."""
    def __enter__(self):
        import threading, time
        self.before, self.anonymous, self.done, self.begun = status(), 0, False, time.perf_counter()
        def watch():
            while not self.done:
                self.anonymous = max(self.anonymous, status()["RssAnon"])
                time.sleep(0.005)
        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self
    def __exit__(self, *_):
        import time
        self.done = True
        self.thread.join()
        self.seconds = time.perf_counter() - self.begun
        self.peak = status()["VmHWM"]
'''

PEERS = (
    MEASURE
    + """
import json, sys, torch, transformers, peft, time
what, folder = sys.argv[1:3]
torch.set_num_threads(2)
torch.ones(3) + 1
transformers.LlamaForCausalLM  # imported when it is asked for
with Watched() as load:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().sum()
found = {"seconds": load.seconds, "peak": load.peak - load.before["VmHWM"],
         "anonymous": load.anonymous - load.before["RssAnon"]}
if what != "load":
    if what != "lora":
        raise NotImplementedError(f"peft has no {what}")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(0, model.config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(int(sys.argv[3])):
        begun = time.perf_counter()
        optimizer.zero_grad(); model(input_ids=ids, labels=ids).loss.backward(); optimizer.step()
        times.append(time.perf_counter() - begun)
    found = {"seconds": min(times), "peak": status()["VmHWM"]}
print(json.dumps(found))
"""
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run."""

    torch_python: Path | None = None
    """A Python with torch, transformers and peft, to measure them in the same run."""
    shape: str = "llama-3.2-1b"
    """Of the checkpoint; tiny is to see that everything runs."""
    folder: Path | None = None
    """Where the checkpoint is, or is made and kept; a folder that is gone afterwards for none."""
    rows: tuple[str, ...] = ("load", "ntk_attention", "lora")
    """What is measured: load, or the method of a step."""
    steps: int = 2
    """Of a training step; the fastest counts."""
    remat: bool = False
    """Recompute activations in our steps."""
    scan_layers: bool = False
    """Run layers as a loop in our steps."""


def make(folder: Path, shape: str) -> None:
    """Write a random checkpoint, in bfloat16, the embeddings in one file and the layers in two."""
    sizes = SHAPES[shape]
    width, middle, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    queries, keys = (sizes[f"num_{kind}_heads"] * sizes["head_dim"] for kind in ("attention", "key_value"))
    maps = {
        **{f"self_attn.{name}_proj": (rows, width) for name, rows in (("q", queries), ("k", keys), ("v", keys))},
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (middle, width),
        "mlp.up_proj": (middle, width),
        "mlp.down_proj": (width, middle),
    }
    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int) -> np.ndarray:
        blocks = (min(1024, rows - row) for row in range(0, rows, 1024))
        normal = [rng.standard_normal((n, columns), np.float32).astype(ml_dtypes.bfloat16) for n in blocks]
        return np.concatenate(normal) * ml_dtypes.bfloat16(0.02)

    ones = np.ones(width, ml_dtypes.bfloat16)
    files: list[dict[str, np.ndarray]] = [{"model.embed_tokens.weight": drawn(sizes["vocab_size"], width)}, {}, {}]
    for layer in range(layers):
        file = files[1 + (2 * layer >= layers)]
        file |= {f"model.layers.{layer}.{name}.weight": drawn(*of) for name, of in maps.items()}
        file |= {f"model.layers.{layer}.{n}_layernorm.weight": ones for n in ("input", "post_attention")}
    files[2]["model.norm.weight"] = ones
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    where = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        **sizes,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def ours(what: str, folder: str, steps: int, device: dict[str, Any], watched: Any) -> dict[str, float]:
    """Measure a row in this process.

    Args:
        what: load, or a method.
        folder: of the checkpoint.
        steps: of training.
        device: flags of a step, remat and scan_layers.
        watched: the class of :data:`MEASURE`.
    """
    jnp.zeros(3).block_until_ready()
    with watched() as load:
        model: Any = models.from_pretrained(folder, "causal-lm", dtype=jnp.bfloat16, param_dtype="file")
    if what == "load":
        return {
            "seconds": load.seconds,
            "peak": load.peak - load.before["VmHWM"],
            "anonymous": load.anonymous - load.before["RssAnon"],
            "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        }
    config = TrainConfig(
        model=folder,
        task="instruct",
        method=what,
        data=DataConfig(max_length=512, data_dir="-"),
        optim=OptimConfig(batch_size=4),
        device=DeviceConfig(precision="bfloat16", **device),
    )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 512), dtype=np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids, "weight": np.ones(4, np.float32)}
    adapt(model, config, {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones_like(ids)})
    trainer = trainer_of(config, "causal-lm", {})
    state, step, rows = trainer.init(model), trainer.stepper(model), trainer.place(batch)
    times, loss = [], jnp.nan
    begun = time.perf_counter()
    needed = step.lower(state, rows).compile().memory_analysis()
    compiled = time.perf_counter() - begun
    for _ in range(steps):
        begun = time.perf_counter()
        state, metrics = step(state, rows)
        loss = jax.block_until_ready(metrics)["loss"]
        times.append(time.perf_counter() - begun)
    with watched() as after:
        pass
    return {
        "seconds": min(times),
        "peak": after.peak,
        "temporaries": needed.temp_size_in_bytes,
        "compile": compiled,
        "loss": float(loss),
    }


OURS = f"{MEASURE}\nimport json, sys\nfrom tests.bench.bench_loading import ours\n" + (
    "print(json.dumps(ours(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), Watched)))"
)


def measured(command: list[Any]) -> dict[str, float] | str:
    """Return what a process says in its last line, or the last line of why it did not."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return f"cannot: {last[:100]}" if done.returncode > 0 else f"ended by signal {-done.returncode}"


def row(what: str, who: str, found: dict[str, float] | str, size: int) -> list[str]:
    """Return a row of the table."""
    if isinstance(found, str):
        return [what, who, "-", found, "-", "-"]
    mib = {name: f"{found[name] / 2**20:,.0f}" for name in ("peak", "anonymous", "temporaries") if name in found}
    over = f"{found['peak'] / size:.2f}x" if what == "load" else f"{found['peak'] / 2**30:.2f} GiB"
    extra = f"anonymous {mib['anonymous']}" if what == "load" else f"temporaries {mib.get('temporaries', '-')}"
    return [what, who, f"{found['seconds']:.1f}", mib["peak"], over, extra]


def main(options: Options) -> None:
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if not (folder / "config.json").exists():
            make(folder, options.shape)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        device = json.dumps({"remat": options.remat, "scan_layers": options.scan_layers})
        table = Table("what", "who", "s", "peak, MiB", "of the file, or in all", "MiB")
        for what in options.rows:
            found = measured([sys.executable, "-c", OURS, what, folder, options.steps, device])
            table.add_row(*row(what, "ours", found, size))
            if options.torch_python is not None:
                found = measured([options.torch_python, "-c", PEERS, what, folder, options.steps])
                table.add_row(*row(what, "torch + peft", found, size))
        console.print(table)
        console.print(f"{options.shape}: {size / 2**20:,.0f} MiB of bfloat16; {_processor()}, {jax.devices()[0]}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {sum(line.startswith('processor') for line in lines)} cores"


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m tests.bench.bench_loading"))
