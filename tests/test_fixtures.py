"""What commit a340712 wrote is still read: adapters, runs broken off and finished, tables, reports, kernel views.

The files are made by ``tests/fixtures/make.py``, which is not part of this; nothing here may be made anew to let a test
pass. Every test works on a copy, through what users type or call, from the checkout's root: the paths in the files are
relative to it.
"""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import theory.__main__
import theory.command
import train.__main__
import train.compare
import train.lazy
from ntk_prefix import models, peft
from train.config import TrainConfig
from train.predict import load

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests" / "fixtures" / "a340712"
ADAPTERS = sorted(path.name for path in (KEPT / "adapters").iterdir())
RUNS = ("lora", "full")


@pytest.fixture(autouse=True)
def x64() -> Iterator[bool]:
    """Override the suite's float64: the files were made in float32, as users run it."""
    with jax.enable_x64(False):
        yield False


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def copied(tmp_path: Path) -> Any:
    """Return a copy of a fixture's folder."""
    return lambda *place: shutil.copytree(KEPT.joinpath(*place), tmp_path / place[-1])


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what runs an entry point with a command line, and gives its exit status."""

    def run(entry: Any, *arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [entry.__module__, *map(str, arguments)])
        return entry()

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------------- adapters


def computed(model: Any, expected: Any) -> np.ndarray:
    seen = model(jnp.asarray(expected["input_ids"]), attention_mask=jnp.asarray(expected["attention_mask"]))
    return np.asarray(seen.last_hidden_state if seen.logits is None else seen.logits)


def told(expected: Any, output: np.ndarray) -> np.ndarray:
    """The part of an output that means something: not what stands at padding."""
    return output if output.ndim == 2 else output[expected["attention_mask"] > 0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_it_did(name: str) -> None:
    folder = KEPT / "adapters" / name
    base, expected = read(folder / "base.json"), dict(np.load(folder / "expected.npz"))
    model = models.from_pretrained(base["model"], base["task"], num_labels=base["num_labels"], rngs=nnx.Rngs(0))
    peft.load_adapter(model, folder)
    output, wanted = (told(expected, values) for values in (computed(model, expected), expected["output"]))
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
    # control: the frozen model does not
    assert np.abs(told(expected, expected["frozen"]) - wanted).max() > 1e-2


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_without_an_adapter_the_models_compute_what_they_did(base: str) -> None:
    """So that a difference above is the adapter's."""
    folder = KEPT / "adapters" / {"bert": "ntk_attention_bare", "llama": "llama_lora"}[base]
    expected = dict(np.load(folder / "expected.npz"))
    model = models.from_pretrained(KEPT / base, read(folder / "base.json")["task"])
    output = told(expected, computed(model, expected))
    np.testing.assert_allclose(output, told(expected, expected["frozen"]), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_was_broken_off_ends_as_it_would_have(method: str, copied: Any, typed: Any) -> None:
    """Step 3 of 6 is on disk. Another machine rounds in another way; one of 40 rows may then fall to the other side."""
    folder = copied("runs", f"unfinished_{method}")
    expected = read(folder / "expected.json")
    assert typed(train.__main__.main, *expected["command"], "--workdir", folder) == 0
    summary, wanted = read(folder / "summary.json"), expected["summary"]
    for name in ("best_step", "steps", "trainable_parameters", "parameters", "test_rows", "label_names"):
        assert summary[name] == wanted[name], name
    assert TrainConfig.from_dict(summary["config"]) == TrainConfig.from_dict(wanted["config"])
    for name in ("test_loss", "validation_loss"):
        assert summary[name] == pytest.approx(wanted[name], rel=1e-4), name
    for name in ("test_score", "validation_score"):
        assert summary[name] == pytest.approx(wanted[name], abs=0.026), name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in expected["metrics"]]
    for line, before in zip(lines, expected["metrics"], strict=True):
        for name in before.keys() & {"loss", "validation_loss", "gradient_norm", "update_norm"}:
            assert line[name] == pytest.approx(before[name], rel=1e-3), (line["step"], name)
    # control: it went on from what was there, and the first lines are those of then, with their times
    kept = (KEPT / "runs" / f"unfinished_{method}" / "metrics.jsonl").read_text()
    assert (folder / "metrics.jsonl").read_text().startswith(kept)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == ["3", "6"]


def test_a_finished_run_answers() -> None:
    folder = KEPT / "runs" / "finished"
    classify = load(folder)
    answers = read(folder / "expected.json")["answers"]
    assert {answer["label"] for answer in answers.values()} == {"negative", "positive"}
    for text, wanted in answers.items():
        answer = classify(text)
        assert answer["label"] == wanted["label"], text
        assert answer["probability"] == pytest.approx(wanted["probability"], abs=1e-4), text


def test_a_finished_run_is_finished(copied: Any, typed: Any) -> None:
    folder = copied("runs", "finished")
    before = (folder / "summary.json").read_bytes()
    assert typed(train.__main__.main, *read(folder / "expected.json")["command"], "--workdir", folder) == 0
    assert (folder / "summary.json").read_bytes() == before
    assert not (folder / "checkpoints").exists()


# ------------------------------------------------------------------------------- tables, reports and kernel views


def test_a_table_is_read_and_no_cell_run_again(copied: Any, typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen.__init__

    def only_git(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        if command[0] != "git":
            pytest.fail(f"a cell was run: {command}")
        start(self, command, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", only_git)
    folder = copied("tables", "small")
    for file in ("table.json", "table.md"):
        (folder / file).unlink()
    assert typed(train.compare.main, *read(folder / "command.json"), "--out", folder) == 0
    before, after = (read(place / "table.json")["lines"] for place in (KEPT / "tables" / "small", folder))
    assert len(before) == len(after) == 2
    for line, wanted in zip(after, before, strict=True):
        assert {name: line[name] for name in wanted} == wanted


@pytest.mark.parametrize("kept", ["finished", "unfinished"])
def test_a_report_of_other_sources_does_not_stand_in_the_way(
    copied: Any, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """A report never mixes two versions, by design: all is measured anew, and a whole report stays till then."""
    asked = []

    def measured(problem: Any) -> Any:
        asked.append(problem)
        raise KeyboardInterrupt

    module = importlib.import_module("theory.claims.gradients")
    monkeypatch.setattr(module, "CLAIM", dataclasses.replace(module.CLAIM, measure=measured))
    folder = copied("reports", kept)
    stopped = theory.__main__.main(("gradients", "complexity"), inputs=4, width=3, out=folder, jobs=1)
    assert stopped == theory.command.STOPPED
    assert len(asked) == 1
    for file in (KEPT / "reports" / kept).glob("*.*"):
        if file.is_file():
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_a_look_is_read_and_not_made_again(copied: Any, typed: Any) -> None:
    folder = copied("views", "tiny")
    (folder / "lazy.json").unlink()
    assert typed(train.lazy.command, *read(folder / "command.json"), "--out", folder) == 0
    before, after = (read(place / "lazy.json")["views"] for place in (KEPT / "views" / "tiny", folder))
    assert len(before) == len(after) == 1
    assert {name: after[0][name] for name in before[0]} == before[0]
    assert not (folder / "runs").exists()
