"""``python -m train.export``: a folder that says what the run says, without anything of ours."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ntk_prefix import artifacts, models, peft
from tests.small_disk import largest_file
from tests.train.tiny_model import write_model
from train.config import TrainConfig
from train.export import Options, main
from train.predict import load
from train.setup import load_model

WORDS = ["[PAD]", "[UNK]", "a", "gripping", "dull", "film"]
DISTILBERT = Path(__file__).parents[1] / "fixtures" / "encoders" / "distilbert"
TEXTS = ["a gripping film", "dull", "a film a film a film a film a film"]


def finished(
    folder: Path, method: peft.AdapterConfig, name: str, task: str = "text", model_of: Path | None = None
) -> Path:
    """Write what a run on texts leaves, with an adapter that does something; the model is a BERT, or a copy of another."""
    base = write_model(folder / "base", WORDS, special=["[PAD]"], kind="bert")
    if model_of is not None:
        shutil.copytree(model_of, base, dirs_exist_ok=True)
    config = TrainConfig(model=str(base), task=task, method=name, max_length=8)
    model = peft.apply(load_model(config, base, "sequence-classification", 2), method)
    for _, x in sorted(adapter_values(model).items()):
        x[...] = x[...] + 0.3 * np.random.default_rng(x.size).random(x.shape, np.float32)
    peft.save_pretrained(model, folder / "adapter")
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    (folder / "summary.json").write_text(json.dumps({"config": config.as_dict(), "label_names": ["bad", "good"]}))
    return folder


def adapter_values(model: Any) -> dict[str, peft.AdapterParam]:
    return {
        f"{path}.{name}": x
        for path, module in nnx.iter_modules(model)
        for name, x in vars(module).items()
        if isinstance(x, peft.AdapterParam)
    }


def export(run: Path, to: str, out: Path, *rows: int) -> None:
    options = Options(run=run, to=to, out=out, rows=rows)
    options.check()
    main(options, Console(quiet=True))


def test_a_predictor_says_what_the_run_says(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", peft.NTKAttentionConfig(), "ntk_attention")
    export(run, "stablehlo", tmp_path / "out", 2)
    wanted = load(run)(TEXTS)
    script = runpy.run_path(str(tmp_path / "out" / "predict.py"))
    found = script["classify"](TEXTS)  # three rows by a program of two
    assert [label for label, _ in found] == [one["label"] for one in wanted]
    np.testing.assert_allclose([p for _, p in found], [one["probability"] for one in wanted], rtol=1e-5)
    assert len({round(p, 4) for _, p in found}) == 3


def test_a_method_that_has_a_random_stream_is_exported_too(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", peft.PrefixPropagationConfig(dropout=0.5), "prefix_propagation")
    export(run, "stablehlo", tmp_path / "out", 3)
    found = runpy.run_path(str(tmp_path / "out" / "predict.py"))["classify"](TEXTS)
    np.testing.assert_allclose([p for _, p in found], [one["probability"] for one in load(run)(TEXTS)], rtol=1e-5)


def test_pairs_have_token_types_only_where_the_model_has(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", peft.LoraConfig(r=2), "lora", "pair", DISTILBERT)
    export(run, "stablehlo", tmp_path / "out", 3)
    found = runpy.run_path(str(tmp_path / "out" / "predict.py"))["classify"]([*zip(TEXTS, TEXTS[::-1], strict=True)])
    wanted = load(run)(TEXTS, TEXTS[::-1])
    np.testing.assert_allclose([p for _, p in found], [one["probability"] for one in wanted], rtol=1e-5)


def test_its_script_needs_nothing_of_ours(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", peft.LoraConfig(r=2), "lora")
    export(run, "stablehlo", tmp_path / "out", 1)
    # without this checkout on the path, and with its package refused
    program = (
        "import sys; sys.modules['ntk_prefix'] = sys.modules['train'] = None; "
        "sys.argv = ['predict.py', 'a gripping film']; import runpy; runpy.run_path('predict.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"})
    one = load(run)("a gripping film")
    assert done.stdout == f"{one['label']} {one['probability']:.4f}\n", done.stderr


def test_a_merged_folder_is_a_model_of_hugging_faces(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", peft.LoraConfig(r=2), "lora")
    export(run, "hugging-face", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label2id"] == {"bad": 0, "good": 1}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    models.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "last"),
    [("stablehlo", "predictor.json"), ("hugging-face", "config.json")],
    ids=["stablehlo", "hugging-face"],
)
def test_a_folder_that_is_not_whole_cannot_be_read_as_one(
    to: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its readers begin with is written last; where writing fails nothing is left, and the same command goes on."""
    run = finished(tmp_path / "run", peft.LoraConfig(r=2), "lora")
    out, write, seen = tmp_path / "out", artifacts.write_whole, list[tuple[str, set[str]]]()

    def noted(path: Path, content: bytes) -> None:
        if path.parent == out:
            seen.append((path.name, {file.name for file in out.iterdir()} - {artifacts.UNFINISHED}))
        write(path, content)

    for module in ("train.export", "ntk_prefix.peft.merged"):
        monkeypatch.setattr(f"{module}.write_whole", noted)
    with largest_file(200), pytest.raises(OSError, match="File too large"):
        export(run, to, out, *((1,) if to == "stablehlo" else ()))
    assert not out.exists()
    seen.clear()
    out.mkdir()
    for left in (artifacts.UNFINISHED, "half.bin"):  # by an export that was killed
        (out / left).touch()
    export(run, to, out, *((1,) if to == "stablehlo" else ()))
    assert seen[-1] == (last, {file.name for file in out.iterdir()} - {last})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": (0,)}, "--rows: expected at least 1"),
        ({"rows": (1,), "to": "hugging-face"}, "--rows: expected --to stablehlo beside it"),
        ({"out": Path(__file__)}, "--out: expected a new folder"),
        ({"run": Path("/nowhere")}, "expected a finished run with a summary.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(change: dict, said: str, tmp_path: Path) -> None:
    options = {"run": tmp_path, "to": "stablehlo", "out": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=said):
        main(Options(**options), Console(quiet=True))
