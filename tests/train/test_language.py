"""A language run: trained on answers, judged by generating them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.formulas import CONFIGS, draw, write
from train import tasks
from train.config import TrainConfig
from train.loop import run

WORDS = ["[PAD]", "[UNK]", "</s>", "add", "and", "?", "so", "####", *map(str, range(20))]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer decoder, its tokenizer, and sums that are all twelve."""
    folder = tmp_path_factory.mktemp("sums")
    config = {**CONFIGS["llama_tied"], "vocab_size": len(WORDS)}
    write(folder / "model", config, draw(config))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.add_special_tokens(["[PAD]", "</s>"])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "model" / "tokenizer.json"))
    (folder / "gsm8k").mkdir()
    for split, numbers in (("train", range(80)), ("test", range(80, 100))):
        rows = [{"question": f"add {i % 13} and {12 - i % 13} ?", "answer": "so\n#### 12"} for i in numbers]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(folder: Path, method: str, steps: int) -> TrainConfig:
    return TrainConfig(
        model=str(folder / "model"),
        task="gsm8k",
        data_dir=folder,
        method=method,
        steps=steps,
        batch_size=8,
        learning_rate=1e-2,
        evaluate_every=steps,
        checkpoint_every=steps,
        validation_size=8,
        max_length=24,
        max_new_tokens=5,
        devices=1,
    )


def test_answers_are_learned_and_generated(sums: Path, tmp_path: Path) -> None:
    """Before is the control: the random decoder answers none."""
    summary = run(config(sums, "full", 40), tmp_path)
    assert summary["test_score_before"] == 0
    assert summary["test_score"] == 1
    assert summary["test_rows"] == 20
    assert summary["test_loss"] < 0.1 < summary["test_loss_before"]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["question"] for answer in answers[:2]] == ["add 2 and 10 ?", "add 3 and 9 ?"]
    assert {answer["generated"] for answer in answers} == {"so #### 12"}
    assert "#### 12" not in {answer["before"][-7:] for answer in answers}
    # a number need not be marked to be the last one
    before = [tasks.exact_match(answer["before"], answer["answer"], marked=False) for answer in answers]
    assert (summary["test_last_number"], summary["test_last_number_before"]) == (1, sum(before) / 20)


@pytest.mark.parametrize("method", ["prefix_tuning", "ntk_attention"])
def test_adapters_train_a_decoder(method: str, sums: Path, tmp_path: Path) -> None:
    """The one is in every cache that answers are generated from, the other measures the frozen model first."""
    summary = run(config(sums, method, 2), tmp_path)
    assert 0 <= summary["test_score"] <= 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
