"""Somebody's own rows through ``python -m train``: any columns, any classes, one file or several; and asked afterwards."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.formulas import CONFIGS, draw, write
from train import sources, tasks
from train.__main__ import main, parse
from train.config import TrainConfig
from train.data import train_batches
from train.predict import load
from train.setup import build, model_inputs, normalization

BERT = Path(__file__).parents[1] / "fixtures" / "a340712" / "bert"
QUICK = ["--steps", "4", "--batch-size", "8", "--evaluate-every", "4", "--checkpoint-every", "4", "--devices", "1"]
QUICK += ["--method", "lora", "--adapter", "r=2"]
WORDS = ["good", "fine", "bad", "dull", "so", "quite"]
REVIEWS = [
    {"review": f"the film {i} is {WORDS[i % 6]} and {WORDS[i % 5]}", "reply": f"not {WORDS[i % 4]}", "stars": 1 + i % 5}
    for i in range(80)
]


def trained(monkeypatch: pytest.MonkeyPatch, workdir: Path, *arguments: object) -> dict:
    """The summary of a run as it is typed."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), *QUICK, "--workdir", str(workdir)])
    assert main() == 0
    return json.loads((workdir / "summary.json").read_text())


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong command ends with."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), *QUICK])
    assert main() == 2
    (line,) = capsys.readouterr().out.strip().splitlines()
    return line


def write_rows(file: Path, some: list[dict]) -> Path:
    match file.suffix:
        case ".csv":
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(some[0]))
                writer.writeheader()
                writer.writerows(some)
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in some))
        case ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(some), file)
    return file


NAMED = ("--text-column", "review", "--label-column", "stars")


class TestTexts:
    def test_of_one_file_are_split_trained_and_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = write_rows(tmp_path / "reviews.csv", REVIEWS)
        summary = trained(monkeypatch, tmp_path / "run", "text", "--model", BERT, "--data-dir", file, *NAMED)
        assert summary["label_names"] == ["1", "2", "3", "4", "5"]
        said = " ".join(capsys.readouterr().out.split())
        assert f"text: 58 train, 6 validation, 16 test rows of 5 classes; {file}; test: 20% of its train" in said
        classify = load(tmp_path / "run")
        texts = [row["review"] for row in REVIEWS[:40]]
        several, one = classify(texts), classify(texts[3])
        assert len(several) == 40
        assert several[3]["label"] == one["label"] in summary["label_names"]
        np.testing.assert_allclose(several[3]["probability"], one["probability"], rtol=1e-5)
        assert classify([]) == []
        for wrong in ((), ("a", "b"), (["a", ""],), ([1],), (None,), ("half of \ud83d",)):
            with pytest.raises(ValueError, match=r"^classify"):
                classify(*wrong)

    def test_start_from_any_configuration(self, tmp_path: Path) -> None:
        """Classes are whatever the training rows have: here true and false, in a file of its own for each split."""
        for split, some in (("train", REVIEWS), ("validation", REVIEWS[:10]), ("test", REVIEWS[:12])):
            good = [{"review": row["review"], "good": row["stars"] > 2} for row in some]
            write_rows(tmp_path / f"{split}.jsonl", good)
        arguments = ("--task", "text", "--text-column", "review", "--label-column", "good", "--data-dir", tmp_path)
        config = parse(["rotten_tomatoes", *map(str, arguments)]).config
        task = tasks.load(config.task, config.data)
        assert task.label_names == ("false", "true")
        assert (task.train.rows, task.validation.rows, task.test.rows) == (80, 10, 12)

    def test_in_two_columns_are_pairs_and_asked_as_such(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_rows(tmp_path / "pairs.parquet", REVIEWS)
        arguments = (*NAMED, "--text-pair-column", "reply", "--data-dir", file)
        trained(monkeypatch, tmp_path / "run", "pair", "--model", BERT, *arguments)
        classify = load(tmp_path / "run")
        several = classify([row["review"] for row in REVIEWS[:3]], [row["reply"] for row in REVIEWS[:3]])
        one = classify(REVIEWS[1]["review"], REVIEWS[1]["reply"])
        np.testing.assert_allclose(several[1]["probability"], one["probability"], rtol=1e-5)
        # control: the order matters, as the token types say which text is which
        assert abs(classify(REVIEWS[1]["reply"], REVIEWS[1]["review"])["probability"] - one["probability"]) > 1e-6
        for wrong in (("one text",), ("a", ["b"]), (["a"], ["b", "c"])):
            with pytest.raises(ValueError, match="two texts, as the run was trained on pairs"):
                classify(*wrong)


class TestImages:
    def test_by_path_of_any_size_are_trained_and_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "photos").mkdir()
        listed = []
        for i in range(40):
            pixels = np.full((8 + i % 3, 12, 3), 5 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
            listed.append({"photo": f"photos/{i}.png", "kind": ["dark", "bright"][i // 20]})
        file = write_rows(tmp_path / "photos.csv", listed)
        arguments = ("--data-dir", file, "--image-column", "photo", "--label-column", "kind", "--image-size", 8)
        summary = trained(monkeypatch, tmp_path / "run", "image", "--model", "tiny-vit", *arguments)
        assert summary["label_names"] == ["bright", "dark"]
        classify = load(tmp_path / "run")
        path = tmp_path / "photos" / "7.png"
        answers = classify([str(path), path.read_bytes(), np.asarray(Image.open(path))])
        assert answers[0] == answers[1] == answers[2] == classify(path) | {"probability": answers[0]["probability"]}
        with pytest.raises(ValueError, match=r"nothing\.png: expected an existing file"):
            classify(tmp_path / "nothing.png")
        for shape in ((8, 8, 4), (8, 8, 1), (0, 8)):
            with pytest.raises(ValueError, match=r"uint8 \[h, w\] or \[h, w, 3\], got uint8 \["):
                classify(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize(
        ("said", "mean", "std"),
        [
            ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5)),
            ({"do_normalize": False}, (0, 0, 0), (1, 1, 1)),
            (None, tasks.IMAGENET_MEAN, tasks.IMAGENET_STD),
        ],
    )
    def test_are_normalized_as_the_model_was_trained(
        self, said: dict | None, mean: tuple, std: tuple, tmp_path: Path
    ) -> None:
        shutil.copytree(BERT.with_name("vit"), tmp_path / "vit")
        file = tmp_path / "vit" / "preprocessor_config.json"
        file.unlink() if said is None else file.write_text(json.dumps(said))
        found = normalization(tmp_path / "vit")
        np.testing.assert_allclose(found.mean, mean)
        np.testing.assert_allclose(found.std, std)
        config = TrainConfig(model=str(tmp_path / "vit"), task="digits", method="head", image_size=8, train_size=100)
        used = build(config).task.train.image
        assert used is not None
        assert (used.mean, used.std) == (found.mean, found.std)


class TestInstructions:
    def test_are_judged_by_their_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = [
            "[PAD]",
            "[UNK]",
            "</s>",
            "is",
            "good",
            "bad",
            "Question",
            ":",
            "Answer",
            "yes",
            "no",
            *map(str, range(9)),
        ]
        config = {**CONFIGS["llama_tied"], "vocab_size": len(words)}
        write(tmp_path / "model", config, draw(config))
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.add_special_tokens(["[PAD]", "</s>"])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
        asked = [{"ask": f"is {i % 9} {i // 9} good", "say": "yes"} for i in range(60)]
        file = write_rows(tmp_path / "asked.jsonl", asked)
        arguments = (
            "--model",
            tmp_path / "model",
            "--data-dir",
            file,
            "--question-column",
            "ask",
            "--answer-column",
            "say",
        )
        arguments += ("--max-length", 24, "--max-new-tokens", 4, "--learning-rate", 0.05, "--unrelated", "none")
        arguments += ("--steps", 30, "--method", "full")
        monkeypatch.setattr(
            sys.modules[__name__], "QUICK", ["--batch-size", "8", "--evaluate-every", "30", "--devices", "1"]
        )
        summary = trained(monkeypatch, tmp_path / "run", "instruct", *arguments)
        assert (summary["test_score_before"], summary["test_score"]) == (0, 1)
        assert summary["forgetting"] is None
        with pytest.raises(ValueError, match="expected a run of classification"):
            load(tmp_path / "run")


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--text-column", "reviews"), "a column reviews, got review, reply, stars. Did you mean --text-column review."),
            ((), "expected a column label or labels, got review, reply, stars. Name it: --label-column NAME."),
            ((*NAMED, "--image-column", "x"), "--image-column: expected it left out for the task text, which has --text-"),
            ((*NAMED, "--task", "pair"), "expected a column text_pair or sentence2"),
            (("--label-column", "review"), "expected a label that stands in several rows, got 80 different"),
            ((*NAMED, "--validation-size", "70"), "validation_size: expected a size of 1 to 64 rows"),
        ],
    )  # fmt: skip
    def test_is_told_with_what_to_do(
        self, arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        file = write_rows(tmp_path / "reviews.csv", REVIEWS)
        line = refused(monkeypatch, capsys, "text", "--model", BERT, "--data-dir", file, *arguments)
        assert said in line

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            ([None, 1, 2, 1, 2], "row 0: expected a label: text, a whole number, true or false, got None"),
            ([1, 2, 1, 2, 0.5], "row 4: expected a label: text, a whole number, true or false, got 0.5"),
            ([1, 1, 1, 1, 1], "expected labels of at least two classes, got only '1'"),
            ([1, 2, [1], 2, 1], "row 2: expected a label"),
        ],
    )
    def test_labels_are_told_by_their_row(
        self,
        labels: list,
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = write_rows(tmp_path / "a.jsonl", [{"text": f"a {i}", "label": one} for i, one in enumerate(labels)])
        line = refused(monkeypatch, capsys, "text", "--model", BERT, "--data-dir", file)
        assert said in line
        assert "a.jsonl" in line

    def test_a_class_that_training_has_not_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_rows(tmp_path / "train.csv", REVIEWS)
        write_rows(tmp_path / "test.csv", [{"review": "a", "reply": "b", "stars": 0}])
        line = refused(monkeypatch, capsys, "text", "--model", BERT, "--data-dir", tmp_path, *NAMED)
        assert "test split: expected a label out of 1, 2, 3, 4, 5 in row 0, got '0'" in line

    def test_a_token_that_the_model_has_not_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a tokenizer with added tokens: compiled, such an id would be read as NaN."""
        monkeypatch.chdir(tmp_path)
        folder = shutil.copytree(BERT, tmp_path / "bert")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens(["film"])
        known = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokenizer.add_tokens([f"word{i}" for i in range(known)])
        tokenizer.add_tokens(["review"])
        tokenizer.save(str(folder / "tokenizer.json"))
        file = write_rows(tmp_path / "reviews.csv", [{**row, "review": "review " + row["review"]} for row in REVIEWS])
        line = refused(monkeypatch, capsys, "text", "--model", folder, "--data-dir", file, *NAMED)
        assert f"--model: expected a tokenizer whose ids are below {known}, the model's, got" in line


def test_parts_that_are_accumulated_are_those_of_the_batch_that_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts of many lengths, which batches are grouped by."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"{i} " + "so good " * (i % 7), "label": i % 2} for i in range(60)]
    file = write_rows(tmp_path / "texts.jsonl", texts)
    for parts in (1, 4):
        trained(monkeypatch, tmp_path / str(parts), "text", "--model", BERT, "--data-dir", file, "--accumulate", parts)
    one, four = (
        [
            line
            for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for run in "14"
    )
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([x[name] for x in four], [x[name] for x in one], rtol=1e-4)


def test_a_run_does_not_go_on_with_other_rows_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "reviews.csv", REVIEWS)
    command = ("text", "--model", BERT, "--data-dir", file, *NAMED)
    before = trained(monkeypatch, tmp_path / "run", *command)
    write_rows(file, [{**row, "stars": 1 + row["stars"] % 5} for row in REVIEWS])
    capsys.readouterr()
    line = refused(monkeypatch, capsys, *command, "--workdir", tmp_path / "run")
    assert line.startswith("--workdir: expected a new folder, or one of a run on these rows")
    assert str(file) in line
    write_rows(file, REVIEWS)  # and with the same, whenever they were written
    assert trained(monkeypatch, tmp_path / "run", *command) == before
    file.unlink()  # what is finished needs no rows
    assert trained(monkeypatch, tmp_path / "run", *command) == before


@pytest.mark.parametrize("adapter", [(), ("shift_positions=true", "num_tokens=3")])
def test_texts_of_any_length_have_positions_padded_and_shifted(adapter: tuple[str, ...], tmp_path: Path) -> None:
    """No length that batches are padded to is 41, and the model has 32 positions."""
    file = write_rows(tmp_path / "long.jsonl", [{"text": f"{i} " + "so " * 50, "label": i % 2} for i in range(40)])
    config = TrainConfig(model=str(BERT), task="text", method="prefix_tuning", adapter=adapter, max_length=41)
    found = build(config.changed(data_dir=str(file), validation_size=8))
    _, batch = next(train_batches(found.task.train, 4, 0))
    assert batch["input_ids"].shape == (4, 41)
    assert found.model(**model_inputs(found.model, batch)).logits.shape == (4, 2)


def test_numbers_are_in_their_order(tmp_path: Path) -> None:
    numbers = [10.0, 9.0, -1.0, 9.0] * 2  # as a table with gaps has them
    for name, labels in (("a.csv", map(int, numbers)), ("a.parquet", numbers)):
        file = write_rows(tmp_path / name, [{"text": f"a {i}", "label": label} for i, label in enumerate(labels)])
        assert sources.read("text", file).label_names == ("-1", "9", "10")


class TestClassNames:
    """What ``datasets`` notes beside a column of class numbers: each file's numbers mean its own names."""

    def written(self, file: Path, names: list[str], labels: list[str]) -> None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = pa.table({"text": [f"a {i}" for i in range(len(labels))], "label": [*map(names.index, labels)]})
        noted = {"huggingface": json.dumps({"info": {"features": features}})}
        pa.parquet.write_table(table.replace_schema_metadata(noted), file)

    def test_splits_and_parts_of_one_may_number_their_classes_otherwise(self, tmp_path: Path) -> None:
        whole, fewer = ["x", "y", "z"] * 4, ["y", "z", "z"]
        self.written(tmp_path / "train-00000-of-00002.parquet", ["x", "y", "z"], whole)
        self.written(tmp_path / "train-00001-of-00002.parquet", ["z", "y", "x"], whole)
        self.written(tmp_path / "test.parquet", ["y", "z"], fewer)
        found = sources.read("text", tmp_path)
        for split, labels in (("train", 2 * whole), ("test", fewer)):
            assert [found.label_names[number] for number in found.splits[split]["label"]] == labels

    def test_beside_class_numbers_a_file_of_names_or_of_numbers_is_read(self, tmp_path: Path) -> None:
        self.written(tmp_path / "train.parquet", ["x", "y"], ["x", "y"] * 4)
        for label in ("y", "1"):
            write_rows(tmp_path / "test.csv", [{"text": "a", "label": label}])
            assert sources.read("text", tmp_path).splits["test"]["label"] == [1]

    def test_a_number_that_is_a_name_is_the_name(self, tmp_path: Path) -> None:
        self.written(tmp_path / "train.parquet", ["1", "2", "3"], ["1", "2", "3"] * 4)
        write_rows(tmp_path / "test.csv", [{"text": "a", "label": label} for label in "123"])
        assert [*sources.read("text", tmp_path).splits["test"]["label"]] == [0, 1, 2]
        write_rows(tmp_path / "test.csv", [{"text": "a", "label": "0"}])
        with pytest.raises(ValueError, match="expected a label out of 1, 2, 3 in row 0, got '0'"):
            sources.read("text", tmp_path)

    def test_a_class_that_training_has_not_is_refused_by_its_name(self, tmp_path: Path) -> None:
        self.written(tmp_path / "train.parquet", ["x", "y"], ["x", "y"] * 4)
        self.written(tmp_path / "test.parquet", ["w", "x"], ["w", "x"])
        with pytest.raises(ValueError, match=r"expected a label out of x, y.* in row 0, got 'w'"):
            sources.read("text", tmp_path)
