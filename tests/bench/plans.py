"""Plans of six well-known models on three TPU slices: what fits, what is sent, and what a step must take.

    python -m tests.bench.plans [--topologies ...] [--models ...] [--methods ...] [--out FILE]

16 rows of 2,048 tokens per step (BERT: 64 of 512, all that it has positions for), or 256 images; bfloat16, weights in their
files' dtype, layers in a loop, fsdp over all chips. Where a step does not fit, or the compiler ends, it is planned again
with ``--remat``. Each plan is a process of its own and is written when it ends: the same command goes on. Wants libtpu
(``pip install "ntk-prefix[tpu]"``); a plan takes a minute or two of one core.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ntk_prefix.artifacts import CHECKOUT, json_text, provenance, read_json, write_whole
from train.plan.topology import Topology

MACHINES = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4")
NARROW = ("--precision", "bfloat16", "--param-dtype", "file", "--scan-layers", "--search", "0")
TEXT = ("instruct", "--max-length", "2048", "--batch-size", "16", *NARROW)
MODELS = {
    "Llama-3.2-1B": TEXT,
    "Llama-3.1-8B": TEXT,
    "Qwen3-8B": TEXT,
    "Gemma-2-9B": TEXT,
    "ViT-L/16": ("image", "--image-size", "224", "--batch-size", "256", "--num-labels", "1000", *NARROW),
    "BERT-large": ("text", "--max-length", "512", "--batch-size", "64", *NARROW),
}
METHODS = {
    "ntk_attention": (),
    "lora": (),
    "prefix_tuning": ("--adapter", "num_tokens=50"),
    "full": (),
}


@dataclasses.dataclass(frozen=True)
class Plans:
    """Which plans to make."""

    topologies: tuple[str, ...] = MACHINES
    models: tuple[str, ...] = tuple(MODELS)
    methods: tuple[str, ...] = tuple(METHODS)
    out: Path = Path("tests/bench/results/plans.json")
    """What is in it already is not made again. The table is written beside it, as .md."""


def planned(topology: str, model: str, method: str, *more: str) -> dict[str, Any]:
    """Return a plan of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        mesh = ("--topology", topology, "--fsdp", str(Topology(topology).chips))
        command = [*MODELS[model], "--model-shape", model, "--method", method, *METHODS[method], *mesh, *more]
        done = subprocess.run(
            [sys.executable, "-m", "train.plan", *command, "--out", str(file)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        if file.exists():
            return json.loads(file.read_text())
        if done.returncode > 128:  # a signal: the compiler itself has ended
            return {"ended": _reason(done.stderr)}
        raise RuntimeError(done.stdout + done.stderr)


def _reason(said: str) -> str:
    """Return what a compiler that ended by a signal gave as its reason."""
    checks = [line for line in said.splitlines() if "Check failed" in line or "F0000" in line]
    return (checks or said.splitlines() or ["nothing said"])[0].strip()[:200]


def line(plan: dict[str, Any], remat: bool) -> dict[str, Any]:
    """Return what a table says of a plan."""
    if "ended" in plan:
        return {"remat": remat, "ended": plan["ended"]}
    step: dict[str, Any] = plan["step"] or {}
    sent = {
        contents: sum(row["bytes"] for row in kinds.values()) for contents, kinds in step.get("collectives", {}).items()
    }
    return {
        "remat": remat,
        "fits": plan["fits"],
        "needed": plan["needed"],
        "memory": step.get("memory"),
        "sent": sent,
        "weights_gathered_at_most": step.get("weights_gathered_at_most"),
        "kernels": step.get("kernels"),
        "largest_square_bytes": step.get("largest_square_bytes"),
        "flops": step.get("flops"),
        "seconds": step.get("seconds"),
        "compile_seconds": plan["compile_seconds"],
        "trainable_parameters": plan["trainable_parameters"],
    }


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Return the lines as Markdown, in the order of machines, models and methods."""
    order = [f"{machine} {model} {method}" for machine in MACHINES for model in MODELS for method in METHODS]
    lines = {
        name: lines[name] for name in sorted(lines, key=lambda name: order.index(name) if name in order else len(order))
    }
    head = "| machine | model | method | GiB per chip | temporaries | weights sent | activations sent | step, ms |"
    rows = [head, "|" + " --- |" * (head.count("|") - 1)]
    for name, each in lines.items():
        first = f"| {' | '.join(name.split())}{', remat' if each['remat'] else ''} | "
        if "ended" in each:
            rows.append(f"{first}the compiler itself ended | | | | |")
            continue
        needed = "?" if each["needed"] is None else f"{each['needed'] / 2**30:.2f}"
        if not each["fits"]:
            rows.append(f"{first}{needed}: does not fit | | | | |")
            continue
        memory, sent, seconds = each["memory"], each["sent"], each["seconds"]
        temporaries = (memory["activations"] + memory["other temporaries"]) / 2**30
        rows.append(
            f"{first}{needed} | {temporaries:.2f} GiB | {sent.get('weights', 0) / 2**30:.2f} GiB | "
            f"{sent.get('activations', 0) / 2**20:.1f} MiB | {_ms(seconds['least'])} to {_ms(seconds['most'])} |"
        )
    return "\n".join(rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f}"


def main() -> None:
    """Make what is missing; print the table."""
    wanted, console = tyro.cli(Plans, prog="python -m tests.bench.plans"), Console()
    lines: dict[str, Any] = read_json(wanted.out, dict[str, Any])["plans"] if wanted.out.exists() else {}
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    for method in wanted.methods:
        for topology in wanted.topologies:
            for model in wanted.models:
                name = f"{topology} {model} {method}"
                if name in lines:
                    continue
                with console.status(name):
                    found, remat = planned(topology, model, method), False
                    ended = found.get("ended")
                    if ended or not found["fits"]:
                        found, remat = planned(topology, model, method, "--remat"), True
                lines[name] = line(found, remat) | {"ended_without_remat": ended}
                document = {"plans": lines, **provenance("libtpu", sources=("ntk_prefix/**/*.py", "train/**/*.py"))}
                write_whole(wanted.out, json_text(document).encode())
                write_whole(wanted.out.with_suffix(".md"), f"{table(lines)}\n".encode())
                console.print(table({name: lines[name]}).splitlines()[-1], markup=False, soft_wrap=True)
    console.print(table(lines), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
