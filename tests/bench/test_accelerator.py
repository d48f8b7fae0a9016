"""``make accelerator``: every part runs, goes on where it was, and says what is wrong; the bound on errors can fail."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import models
from tests.bench import accelerator, accelerator_parts, bench_attention

pytestmark = pytest.mark.parametrize("x64", [False], indirect=True)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts run here and not in processes of their own, which would each start JAX and compile anew."""

    def call(arguments: list[str], out: Path, limit: float, captured: bool = False) -> Any:
        if arguments == ["--part", "describe"]:
            about = json.dumps(accelerator.describe())
            return subprocess.CompletedProcess(arguments, 0, about, "")
        return subprocess.CompletedProcess(arguments, accelerator.main(arguments), "", "")

    monkeypatch.setattr(accelerator, "part_process", call)


def results(folder: Path) -> dict[str, Any]:
    (file,) = (path for path in folder.glob("*.json") if not path.name.endswith(".before.json"))
    return json.loads(file.read_text())


@pytest.mark.slow
def test_every_part_runs_tiny_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accelerator.main(["--tiny", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert set(found["parts"]) == set(accelerator.PART_NAMES) == set(accelerator_parts.PARTS)
    assert not found["failed"]
    correct = found["parts"]["correctness"]
    assert correct["xla, bfloat16, causal"]["holds"]
    control = correct["control: merged outside, bfloat16"]
    assert control["holds"]
    assert control["output"] < control["bound"] < max(control["d query"], control["d key"])
    programs = found["parts"]["attention"]["forward, bfloat16, B=1 T=16 N=2 H=8, causal"]["programs"]
    assert programs["ntk_attention, xla"]["median ms"] > 0
    assert "ntk_attention, cudnn" not in programs
    assert "cannot run" in correct["cudnn"]
    assert all(row["finite"] and row["tokens/s"] > 0 for row in found["parts"]["step"].values())
    (table,) = tmp_path.glob("*.md")
    assert "| tiny, LoRA r=8 |" in table.read_text()
    assert jax.__version__ in table.read_text()

    capsys.readouterr()
    assert accelerator.main(["--tiny", "--out", str(tmp_path)]) == 0
    assert "tiny, LoRA" not in capsys.readouterr().out
    assert results(tmp_path) == found


def test_a_row_that_fails_says_so_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, calls = [True], []

    def rows(_: Any) -> Iterator[Any]:
        def first() -> dict[str, Any]:
            calls.append("first")
            if broken:
                raise RuntimeError("no such kernel\nmore")
            return {"median ms": 1.0, "quartiles ms": [1.0, 1.0]}

        def second() -> dict[str, Any]:
            calls.append("second")
            return {"holds": True}

        yield "first", first
        yield "second", second

    monkeypatch.setitem(accelerator_parts.PARTS, "step", (rows, 1))
    command = ["--tiny", "--out", str(tmp_path), "--parts", "step"]
    assert accelerator.main(command) == 1
    assert results(tmp_path)["failed"] == {"step: first": "RuntimeError: no such kernel"}
    assert "failed: step (rows failed)" in capsys.readouterr().out
    broken.clear()
    assert accelerator.main(command) == 0
    assert calls == ["first", "second", "first"]
    assert not results(tmp_path)["failed"]

    # what other sources measured is kept, under another name, and not mixed in
    (file,) = tmp_path.glob("*.json")
    other = json.loads(file.read_text())
    other["about"]["provenance"]["sources_sha256"] = "0"
    file.write_text(json.dumps(other))
    assert accelerator.main(command) == 0
    assert calls[3:] == ["first", "second"]
    assert file.with_suffix(".before.json").exists()

    # a row that does not hold is exit status 1, and time that is over is 4
    monkeypatch.setitem(accelerator_parts.PARTS, "step", (lambda _: iter([("third", lambda: {"holds": False})]), 1))
    assert accelerator.main(command) == 1
    assert "does not hold: step: third" in capsys.readouterr().out
    assert accelerator.main([*command, "--minutes", "0.001", "--fresh"]) == accelerator.LATER
    assert "out of time: step" in capsys.readouterr().out


def test_what_a_user_can_mend_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accelerator.main(["--out", str(tmp_path)]) == accelerator.USAGE
    said = capsys.readouterr().err
    assert said.startswith("expected a GPU or TPU, got JAX ")
    assert "TINY=1" in said
    assert said.count("\n") == 1
    (tmp_path / "file").touch()
    assert accelerator.main(["--tiny", "--out", str(tmp_path / "file")]) == accelerator.USAGE
    assert capsys.readouterr().err.startswith("--out: expected a folder")
    assert accelerator.main(["--minutes", "nan"]) == accelerator.USAGE
    assert capsys.readouterr().err.startswith("--minutes: expected a number")
    monkeypatch.setattr(accelerator, "NEEDED", ("json", "no_such_package"))
    assert accelerator.main(["--tiny"]) == accelerator.USAGE
    said = capsys.readouterr().err
    assert "got none of: no_such_package" in said
    assert said.count("\n") == 1


def test_a_peer_that_cannot_run_says_so() -> None:
    x = jnp.ones(3)
    timings = bench_attention.measure({"peer": (lambda x: x @ jnp.ones(4), (x,)), "ours": (jnp.sin, (x,))}, 2)
    assert timings["peer"].problem.startswith("TypeError")
    assert len(timings["ours"].seconds) == 2
    with pytest.raises(RuntimeError, match="No such file"):
        bench_attention.torch_attention("/no/such/python", [(1, 2, 1, 2, "float32", False, False)], 2)


@pytest.mark.parametrize("config", [accelerator_parts.LLAMA_1B, accelerator_parts.LLAMA_8B])
def test_the_weights_that_a_token_meets_are_the_models(config: models.LlamaConfig) -> None:
    short = dataclasses.replace(config, num_hidden_layers=1)
    model = nnx.eval_shape(lambda: models.Llama(short, rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # read, not multiplied
    weights = sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1) - table
    assert accelerator_parts.linear_weights(short) == weights
    named = {16: 1.24e9, 32: 7.5e9}[config.num_hidden_layers]
    assert abs(accelerator_parts.linear_weights(config) / named - 1) < 0.01


@pytest.mark.gpu
def test_every_implementation_is_right_on_this_device() -> None:
    for name, row in accelerator_parts.correctness(accelerator_parts.FULL):
        figures = row()
        assert "cannot run" in figures or figures["holds"], (name, figures)
