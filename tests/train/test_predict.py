"""A finished run that is asked: what its folder must hold, and what it says when that is damaged."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given

from ntk_prefix import peft
from tests.fuzz import damaged_json, fuzzed, survives
from train.config import TrainConfig
from train.predict import load
from train.setup import load_model

LABELS = ["dark", "bright"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on images leaves, of which nothing was trained."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(model="tiny-vit", task="image", method="lora", adapter=("r=2",), image_size=8)
    model = peft.apply(load_model(config, None, "image-classification", 2), peft.LoraConfig(r=2))
    peft.save_pretrained(model, folder / "adapter")
    (folder / "summary.json").write_text(json.dumps({"config": config.as_dict(), "label_names": LABELS}))
    return folder


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a finished run with a summary\.json, got none\. Run the same command"
    ):
        load(tmp_path)


def test_a_run_without_an_adapter_says_so(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "summary.json", tmp_path)
    with pytest.raises(
        ValueError, match="expected a run of classification with an adapter, got image by lora on tiny-vit"
    ):
        load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("task", "magic"), ("model", "/nowhere"), ("seed", -1), ("label", None)])
def test_a_configuration_of_nothing_is_told_with_its_file(
    finished: Path, tmp_path: Path, field: str, value: object
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    summary["config"][field] = value
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"summary\.json: .*expected"):
        load(tmp_path)


def test_a_damaged_summary_is_told(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where the model is loaded, which reads other files."""
    good = json.loads((finished / "summary.json").read_text())
    shutil.copytree(finished / "adapter", tmp_path / "adapter")

    class Loaded(Exception):
        pass

    def loaded(config: TrainConfig, path: Path | None, kind: str, num_labels: int) -> None:
        assert num_labels >= 1
        raise Loaded

    monkeypatch.setattr("train.finished.load_model", loaded)

    @fuzzed
    @given(content=damaged_json(good))
    def damage(content: bytes) -> None:
        (tmp_path / "summary.json").write_bytes(content)
        with survives(tmp_path / "summary.json"), contextlib.suppress(Loaded):
            load(tmp_path)

    damage()
