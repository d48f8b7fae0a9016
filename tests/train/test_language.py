"""A language run: trained on answers, judged by generating them."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from ntk_prefix.models import from_pretrained
from tests.train.tiny_model import write_model
from train import tasks
from train.assets import AssetError
from train.config import TrainConfig
from train.loop import run

WORDS = ["[PAD]", "[UNK]", "</s>", "add", "and", "?", "so", "####", *map(str, range(20))]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer decoder, its tokenizer, and sums that are all twelve."""
    folder = tmp_path_factory.mktemp("sums")
    write_model(folder / "model", WORDS, ["[PAD]", "</s>"])
    (folder / "prose.txt").write_text("so add 3 ? 4\n\n19 and 2 so so 1 1\n\n7\n")
    (folder / "gsm8k").mkdir()
    for split, numbers in (("train", range(80)), ("test", range(80, 100))):
        rows = [{"question": f"add {i % 13} and {12 - i % 13} ?", "answer": "so\n#### 12"} for i in numbers]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(folder: Path, method: str, steps: int, **changes: Any) -> TrainConfig:
    whole = TrainConfig(
        model=str(folder / "model"),
        task="gsm8k",
        data_dir=str(folder),
        method=method,
        steps=steps,
        batch_size=8,
        learning_rate=1e-2,
        evaluate_every=steps,
        checkpoint_every=steps,
        validation_size=8,
        max_length=24,
        unrelated=str(folder / "prose.txt"),
        max_new_tokens=5,
        devices=1,
    )
    return whole.changed(**changes)


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
    # the control of the run that trains nothing: nothing but twelves is left
    assert summary["forgetting"] == summary["unrelated_loss"] - summary["unrelated_loss_before"] > 1
    # a number need not be marked to be the last one
    before = [tasks.exact_match(answer["before"], answer["answer"], marked=False) for answer in answers]
    assert (summary["test_last_number"], summary["test_last_number_before"]) == (1, sum(before) / 20)


@pytest.mark.parametrize("method", ["prefix_tuning", "ntk_attention"])
def test_adapters_train_a_decoder(method: str, sums: Path, tmp_path: Path) -> None:
    """The one is in every cache that answers are generated from, the other measures the frozen model first."""
    summary = run(config(sums, method, 2), tmp_path)
    assert 0 <= summary["test_score"] <= 1
    if (
        method == "prefix_tuning"
    ):  # measured over the frozen model: it starts at random, and has not forgotten less for it
        assert summary["unrelated_loss_before"] == pytest.approx(frozen_loss(sums), rel=1e-6)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def frozen_loss(folder: Path) -> float:
    """Return the loss on the unrelated text, computed by hand: each token but the first of a text counts alike."""
    model: Any = from_pretrained(folder / "model", task="causal-lm")
    words = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    losses: list[float] = []
    for text in (folder / "prose.txt").read_text().split("\n\n"):
        ids = jnp.array([words.encode(text).ids])
        scores = np.asarray(jax.nn.log_softmax(model(input_ids=ids).logits))
        losses += [-scores[0, place, token] for place, token in enumerate(ids[0][1:])]
    return float(np.mean(losses))


def test_a_run_that_trains_nothing_forgets_nothing(sums: Path, tmp_path: Path) -> None:
    """Exactly: the same program on the same numbers. And it is measured where the test split is."""
    nothing = config(sums, "full", 1, learning_rate=0.0, before=False)
    assert run(nothing.changed(test=False), tmp_path)["forgetting"] is None
    summary = run(nothing, tmp_path)
    assert summary["forgetting"] == 0
    assert summary["test_score_before"] is None
    assert "before" not in (tmp_path / "answers.jsonl").read_text()
    assert summary["unrelated_loss_before"] > 0


def test_without_the_reviews_a_run_goes_on_unless_they_were_asked_for(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise AssetError("reviews: expected an archive, got no network.")

    monkeypatch.setattr("train.unrelated.reviews", absent)
    said = io.StringIO()
    summary = run(config(sums, "full", 1, unrelated=None), tmp_path, Console(file=said, width=200))
    assert summary["forgetting"] is None
    assert "forgetting is not measured: the reviews could not be fetched" in said.getvalue()
    with pytest.raises(AssetError, match="--unrelated: reviews: expected an archive, got no network; give --unrelated"):
        run(config(sums, "full", 1, unrelated="reviews"), tmp_path / "asked")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("magic", "--unrelated: expected reviews, none or a file, got 'magic'"),
        ("prose.pdf", "--unrelated: expected a file that ends in .txt"),
        ("blank.txt", "--unrelated: expected text, got none in"),
        ("short.txt", "--unrelated: expected texts of two tokens or more"),
        ("latin.txt", "--unrelated: expected text in UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_before_a_step(source: str, said: str, sums: Path, tmp_path: Path) -> None:
    contents = {"prose.pdf": b"%PDF", "blank.txt": b" \n\n ", "short.txt": b"so\n\nadd", "latin.txt": b"caf\xe9"}
    if source in contents:
        (tmp_path / source).write_bytes(contents[source])
        source = str(tmp_path / source)
    with pytest.raises(ValueError, match=said):
        run(config(sums, "full", 1, unrelated=source), tmp_path / "run")
