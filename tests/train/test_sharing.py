"""What a run tells others: a model card, the command that made it, trackers, and repositories of the hub."""

import shlex
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from train import trackers
from train.__main__ import main, parse
from train.card import card, command
from train.config import CONFIGS, TrainConfig

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "fields": {"learning_rate": 3e-5, "batch_size": 64, "validation_size": 0.1, "seed": 3, "test": False},
    "text": {"method": "lora", "adapter": ("r=16", "target=layers.0"), "data_dir": "my data/it's.csv"},
    "nothing of what there was": {"validation_size": None, "train_size": None},
    "policies": {"remat": "dots", "precision": "bfloat16"},
    "everything recomputed": {"remat": True},
}


class TestTheCommandOfARun:
    @pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize("name", ["sst2", "gsm8k", "tiny"])
    def test_asks_for_the_same_configuration(self, name: str, changes: dict[str, Any]) -> None:
        config = CONFIGS[name][1].changed(**changes)
        python, _, module, *arguments = shlex.split(command(config))
        assert (python, module) == ("python", "train")
        assert parse(arguments).config == config

    def test_says_no_more_than_it_must(self) -> None:
        assert command(CONFIGS["rte"][1]) == "python -m train rte"


def summary(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    return {
        "config": config.as_dict(), "metric": "accuracy", "test_score": 0.875, "test_rows": 1066, "best_step": 300,
        "validation_score": 0.9, "model_source": "org/base", "source": "reviews.csv", "label_names": ["bad", "good"],
        "trainable_parameters": 12_345, "parameters": 22_000_000, "steps": 500, "versions": {"jax": "0.10.2"}, "git": "abc",
        **changes,
    }  # fmt: skip


class TestACard:
    def test_begins_as_the_hub_wants_it_and_says_what_was_measured(self) -> None:
        text = card(summary(CONFIGS["rte"][1]), "sequence-classification")
        found = huggingface_hub.ModelCard(text).data
        assert (found.base_model, found.pipeline_tag) == ("org/base", "text-classification")
        assert found.eval_results[0].metric_value == 0.875
        assert "| test split: accuracy | 0.875 |" in text
        assert "| parameters trained | 12,345 |" in text
        assert "python -m train rte\n" in text

    @pytest.mark.parametrize(
        ("kind", "call"),
        [
            ("sequence-classification", 'task="sequence-classification", num_labels=2, pooling="mean")'),
            ("causal-lm", 'task="causal-lm")'),
            ("ranking", 'load_ranker("org/base", adapter="THIS FOLDER")'),
        ],
    )
    def test_says_how_its_adapter_is_put_on(self, kind: str, call: str) -> None:
        assert call in card(summary(CONFIGS["rte"][1]), kind)
        # an asset's name is one that the package's own loaders do not know
        of_asset = card(summary(CONFIGS["rte"][1], model_source="minilm"), kind)
        assert call.replace('"org/base"', 'model_path("minilm")') in of_asset
        assert '(model_path("minilm"), ' in of_asset
        assert "\nfrom train.assets import model_path\n" in of_asset

    def test_without_a_test_split_claims_no_result(self) -> None:
        text = card(summary(CONFIGS["rte"][1], test_score=None, test_rows=None), "sequence-classification")
        assert huggingface_hub.ModelCard(text).data.eval_results is None
        assert "test split" not in text


class TestTrackers:
    def test_weights_and_biases_gets_every_number_and_goes_on_with_the_same_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a stand-in that remembers: the package is large, and is tried by hand, offline."""
        begun, logged, ended = [], [], []
        known = types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)),
            summary=types.SimpleNamespace(update=ended.append),
            finish=lambda exit_code: ended.append(exit_code),
        )
        module = types.SimpleNamespace(init=lambda **said: begun.append(said) or known)
        monkeypatch.setitem(sys.modules, "wandb", module)
        for step in (0, 20):
            one = trackers.tracker("wandb", tmp_path, {"method": "lora"}, step)
            one.write(step + 10, {"loss": 0.5})
            one.close({"test_score": 0.75} if step else None)
        assert logged == [(10, {"loss": 0.5}), (30, {"loss": 0.5})]
        assert ended == [{}, 1, {"test_score": 0.75}, 0]
        assert begun[0] == begun[1]
        assert begun[0]["config"] == {"method": "lora"}

    def test_one_that_is_not_installed_is_named_before_anything_is_loaded(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setattr(sys, "argv", ["train", "sst2", "--log", "wandb"])
        assert main() == 2
        assert "--log: expected wandb for wandb, got no such package. pip install wandb." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--push-to-hub", "a b"), "--push-to-hub: expected a name such as owner/my-adapter, got 'a b'"),
        (("--push-to-hub", "me/mine", "--method", "full"), "expected a method with an adapter, got full"),
        (("--push-to-hub", "me/mine"), "expected somebody logged in, got no token. Run hf auth login"),
    ],
)
def test_what_could_not_be_pushed_is_refused_before_anything_is_loaded(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody() -> None:
        raise LocalTokenNotFoundError("log in")

    monkeypatch.setattr(huggingface_hub, "whoami", nobody)
    monkeypatch.setattr(sys, "argv", ["train", "sst2", *arguments])
    assert main() == 2
    assert said in capsys.readouterr().out.replace("\n", " ")
