"""Tasks: files in the layouts people have, fixed splits, tokens, answers, and errors that name the row."""

import gzip
import io
import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from train import data, sources, tasks
from train.assets import AssetError, asset
from train.config import DataConfig
from train.sources import TASKS

WORDS = [*"abcdefgh", *"0123456789", "good", "bad", "question", "answer", ":", "#", "="]


def load(name: str, *, tokenizer: object = None, seed: int = 0, **fields: object) -> tasks.Task:
    """A task by the fields of its configuration; a tenth for validation."""
    settings = {
        "validation_size": None,
        "unrelated": "none",
        **{key: str(v) if isinstance(v, Path) else v for key, v in fields.items()},
    }
    return tasks.load(name, DataConfig(**settings), tokenizer=tokenizer, seed=seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with the tokenizer.json of a tiny model of two sentences, which asks for truncation and padding."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    one = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    one.add_special_tokens(special)
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    one.enable_truncation(3)
    one.enable_padding(length=50)
    folder = tmp_path_factory.mktemp("model")
    one.save(str(folder / "tokenizer.json"))
    return folder


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def glue(tmp_path) -> Path:
    """RTE and SST-2 as GLUE has them, with quotation marks that are text and a dev file without header."""
    answers = ["entailment", "not_entailment"]
    rows = [f'{i}\ta "b {i}\tc {"d " * (i % 4)}\t{answers[i % 2]}' for i in range(40)]
    write(tmp_path / "RTE" / "train.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
    write(tmp_path / "RTE" / "dev.tsv", rows[:10])
    reviews = [f"good {i}\t1" if i % 3 else f"bad {i}\t0" for i in range(60)]
    write(tmp_path / "SST-2" / "train.tsv", ["sentence\tlabel", *reviews])
    write(tmp_path / "SST-2" / "dev.tsv", ["sentence\tlabel", *reviews[:9]])
    return tmp_path


def test_glue_pairs(glue, tokenizer):
    task = load("rte", data_dir=glue, tokenizer=tokenizer, validation_size=8, max_length=10)
    assert (task.kind, task.num_labels, task.metric) == ("sequence-classification", 2, "accuracy")
    assert task.label_names == ("entailment", "not_entailment")
    assert (task.train.rows, task.validation.rows, task.test.rows) == (32, 8, 10)
    assert task.test["text"][0] == 'a "b 0'
    np.testing.assert_array_equal(task.test["labels"], [0, 1] * 5)
    assert str(glue) in task.source
    # [CLS] a " b 3 [SEP] c d d d [SEP] is 11: one less of the longer sentence
    ids, types = task.test["input_ids"][3], task.test["token_type_ids"][3]
    assert len(ids) == len(types) == 10
    assert task.tokenizer.decode(ids, skip_special_tokens=False).split()[0] == "[CLS]"
    assert list(np.flatnonzero(ids == 2)) == [5, 9] or list(np.flatnonzero(ids == 2)) == [4, 9]
    np.testing.assert_array_equal(types, np.arange(10) > np.flatnonzero(ids == 2)[0])
    # neither truncation nor padding of the file itself
    assert max(map(len, task.train["input_ids"])) == 10
    _, batch = next(iter(data.train_batches(task.train, 4, seed=0, buckets=(10,))))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "weight"}


def read_tsv(file: Path) -> pa.Table:
    names, *rows = [line.split("\t") for line in file.read_text().splitlines()]
    return pa.Table.from_pydict({names[0]: [row[0] for row in rows], names[1]: [int(row[1]) for row in rows]})


def test_one_form_of_the_rows_is_as_good_as_another(tmp_path, glue):
    """Parquet shards, jsonl, json and csv of the same rows, in folders as the hub lays them out, give the same task."""
    expected = load("sst2", data_dir=glue)
    table, dev = (read_tsv(glue / "SST-2" / f"{split}.tsv") for split in ("train", "dev"))
    shards = tmp_path / "parquet" / "sst2"
    shards.mkdir(parents=True)
    for number, rows in enumerate((table[:25], table[25:])):
        pa.parquet.write_table(rows, shards / f"train-0000{number}-of-00002.parquet")
    pa.parquet.write_table(dev, shards / "validation-00000-of-00001.parquet")
    pa.parquet.write_table(dev.set_column(1, "label", [[-1] * 9]), shards / "test-00000-of-00001.parquet")
    for split, rows in (("train", table), ("validation", dev)):
        write(tmp_path / "jsonl" / "data" / f"{split}.jsonl", [json.dumps(row) for row in rows.to_pylist()])
        pairs = [f'"{row["sentence"]}",{row["label"]}' for row in rows.to_pylist()]
        write(tmp_path / "csv" / f"{split}.csv", ["text,labels", *pairs])
    for folder in ("parquet", "jsonl", "csv"):
        found = load("sst2", data_dir=tmp_path / folder)
        for split in ("train", "validation", "test"):
            for column in ("text", "labels"):
                np.testing.assert_array_equal(getattr(found, split)[column], getattr(expected, split)[column])


def test_splits_are_stratified_disjoint_and_the_same_for_every_seed(glue):
    one, other = (load("sst2", data_dir=glue, validation_size=0.2, train_size=30, seed=seed) for seed in (0, 1))
    for task in (one, other):
        assert Counter(task.train["labels"].tolist()) == {0: 10, 1: 20}
        assert Counter(task.validation["labels"].tolist()) == {0: 4, 1: 8}
        assert not set(task.train["text"]) & set(task.validation["text"])
    np.testing.assert_array_equal(one.validation["text"], other.validation["text"])
    np.testing.assert_array_equal(one.test["text"], other.test["text"])
    assert set(one.train["text"]) != set(other.train["text"])
    again = load("sst2", data_dir=glue, validation_size=0.2, train_size=30, seed=1)
    np.testing.assert_array_equal(again.train["text"], other.train["text"])
    assert load("sst2", data_dir=glue, test_size=3).test.rows == 3


def test_rows_beyond_a_test_sample_are_the_others(glue):
    whole, sample, others, some = (
        set(load("sst2", data_dir=glue, **sizes).test["text"])
        for sizes in ({}, {"test_size": 3}, {"test_beyond": 3}, {"test_beyond": 3, "test_size": 2})
    )
    assert sample | others == whole
    assert not sample & others
    assert some < others
    with pytest.raises(ValueError, match="test_beyond: expected fewer than all"):
        load("sst2", data_dir=glue, test_beyond=len(whole))


def test_a_test_split_of_our_own_has_no_input_of_the_others(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i % 30}", "label": i % 2} for i in range(120)]
    write(tmp_path / "train.jsonl", [json.dumps(row) for row in rows])
    task = load("rotten_tomatoes", data_dir=tmp_path, validation_size=5)
    assert "20% of its train split, ours" in task.source
    held = [set(split["text"]) for split in (task.train, task.validation, task.test)]
    assert [len(one) for one in held] == [19, 5, 6]
    assert len(set.union(*held)) == 30


def test_digits_need_nothing():
    task = load("digits", image_size=14, train_size=200)
    assert (task.kind, task.num_labels) == ("image-classification", 10)
    assert (task.train.rows, task.test.rows) == (200, 359)
    assert task.train["image"].max() == 255
    _, batch = next(iter(data.train_batches(task.train, 8, seed=0)))
    assert batch["pixel_values"].shape == (8, 14, 14, 3)
    assert abs(batch["pixel_values"]).max() < 3


def test_all_rows_of_fashion_mnist(tmp_path, monkeypatch):
    """Its splits lie in one array each, and a run without --test-size takes the test split as it lies."""
    draw = np.random.default_rng(0)
    images = {name: draw.integers(0, 256, (rows, 28, 28), np.uint8) for name, rows in (("train", 40), ("t10k", 10))}
    for name, pixels in images.items():
        labels = np.arange(len(pixels), dtype=np.uint8) % 10
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    monkeypatch.setattr(sources, "asset", lambda name: tmp_path)
    task = load("fashion_mnist", validation_size=10, train_size=20)
    np.testing.assert_array_equal(task.test["image"], images["t10k"])
    assert (task.train.rows, task.validation.rows) == (20, 10)


def test_images_of_a_hub_folder(tmp_path):
    def png(value: int) -> dict:
        stream = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    folder = tmp_path / "plain_text"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 10)):
        table = pa.table({"img": [png(i) for i in range(count)], "label": [i % 10 for i in range(count)]})
        pa.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    task = load("cifar10", data_dir=tmp_path, validation_size=10, image_size=8)
    assert task.train["image"].shape == (30, 4, 4, 3)
    np.testing.assert_array_equal(task.test["image"][:, 0, 0, 0], np.arange(10))


@pytest.fixture
def solved(tmp_path) -> Path:
    def line(i: int) -> str:
        work = "= " * (i % 5) + f"<<{i}+{i}={2 * i}>>"
        return json.dumps({"question": f"a b {i} ?", "answer": f"c {i} {work}\n#### {2 * i}"})

    write(tmp_path / "gsm8k" / "train.jsonl", [line(i) for i in range(30)])
    write(tmp_path / "gsm8k" / "test.jsonl", [line(i) for i in range(7)])
    return tmp_path


def test_the_loss_is_on_the_answer_and_its_end(solved, tokenizer):
    task = load("gsm8k", data_dir=solved, tokenizer=tokenizer, max_length=40)
    assert (task.kind, task.num_labels, task.metric) == ("causal-lm", 0, "exact_match")
    (batch,) = data.evaluation_batches(task.test, 7, buckets=(40,))
    for row in range(7):
        answer = batch["labels"][row][batch["labels"][row] != data.IGNORED]
        assert answer[-1] == task.end_id == task.tokenizer.token_to_id("</s>")
        assert "<<" not in task.tokenizer.decode(answer)
        assert task.tokenizer.decode(answer).split()[0] == "c"
        held = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        np.testing.assert_array_equal(held, [*task.test["prompt_ids"][row], *answer])
    (prompts,) = data.prompt_batches(task.test, 7, buckets=(32,))
    assert prompts["attention_mask"][:, -1].all()
    assert tasks.exact_match("so #### 12", task.test["answer"][6])
    assert not tasks.exact_match("so #### 13", task.test["answer"][6])


def test_rows_that_do_not_fit_are_left_out_of_train_only(solved, tokenizer, caplog):
    longest = max(map(len, load("gsm8k", data_dir=solved, tokenizer=tokenizer, max_length=60).train["input_ids"]))
    task = load("gsm8k", data_dir=solved, tokenizer=tokenizer, max_length=longest - 1)
    assert 0 < task.train.rows < 27
    assert "train rows have more than max_length" in caplog.text
    assert (task.validation.rows, task.test.rows) == (3, 7)
    assert all(ids[-1] == task.end_id for ids in task.train["input_ids"])
    with pytest.raises(ValueError, match=r"max_length: expected more than the \d+ tokens of the longest prompt, got 8"):
        load("gsm8k", data_dir=solved, tokenizer=tokenizer, max_length=8)


def test_a_chat_model_gets_its_turns(solved):
    words = {
        word: number for number, word in enumerate(["[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant", "a"])
    }
    chat = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    chat.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat.pre_tokenizer = pre_tokenizers.Whitespace()
    task = load("gsm8k", data_dir=solved, tokenizer=chat, max_length=60)
    prompt = chat.decode(task.test["prompt_ids"][0], skip_special_tokens=False).split()
    assert prompt[:3] == ["<|im_start|>", "user", "a"]
    assert prompt[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]
    assert task.end_id == 2
    assert chat.truncation is None  # the caller's tokenizer is not touched


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 4.\n#### 72", 72),
        ("#### -1,234.50", Decimal("-1234.5")),
        ("#### $18.00 and #### 3", 18),
        ("####5.", 5),
        ("the answer is 72", None),
        ("#### none", None),
        ("#### -", None),
    ],
)
def test_answers_as_gsm8k_reads_them(text, number):
    assert tasks.extract_answer(text) == number
    assert tasks.exact_match(text, f"#### {72 if number is None else number}") == (number is not None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 13 - 10 = 3 books, 3 and 13 together make 16.", 16),
        ("16\n#### 17", 17),
        ("he pays $1,234.50.", Decimal("1234.5")),
        ("it falls to -3 degrees", -3),
        ("which is 5-3", 3),
        ("no idea", None),
    ],
)
def test_an_answer_without_its_mark_is_read_by_its_last_number(text, number):
    assert tasks.last_number(text) == number
    truth = f"#### {number}"
    assert tasks.exact_match(text, truth, marked=False) == (number is not None)
    assert tasks.exact_match(text, truth) == ("####" in text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 * 4 = $\\boxed{16}$.The answer is: 16", 16),
        ("The answer is 3. No: The final answer is: $1,234.50.", Decimal("1234.5")),
        ("The answer is: 20/14", None),
        ("The answer is: x", None),
        ("#### 18 The answer is: 19", 18),
    ],
)
def test_answers_as_metamath_marks_them(text, number):
    """A reference of GSM8K, an answer in the form of either."""
    assert tasks.marked_answer(text) == number
    assert tasks.exact_match(text, f"#### {number}") == (number is not None)


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        ("so #### B", "since ... #### B", True),
        ("so #### c", "since ... #### B", False),
        ("B", "since ... #### B", False),  # not where it was to stand
        ("#### 1/2", "half, #### 1/2", True),
        ("#### 1/3", "half, #### 1/2", False),
        ("#### 1e4", "#### 1e3", False),
        ("#### 12 / day", "#### 12 / day", True),
        ("The answer is yes", "the answer  is Yes", True),
    ],
)
def test_what_is_marked_and_no_number_is_compared_as_text(generated, reference, right):
    assert tasks.exact_match(generated, reference) == right


def test_metamath_is_tested_on_gsm8k_and_on_nothing_else(tmp_path, tokenizer):
    rows = [json.dumps({"query": f"a {i} ?", "response": f"b The answer is: {i}", "type": "GSM"}) for i in range(30)]
    write(tmp_path / "MetaMathQA" / "MetaMathQA-395K.json", ["[", ",\n".join(rows), "]"])
    with pytest.raises(ValueError, match=r"expected a test split beside it, got none. Put test.jsonl of GSM8K"):
        load("metamath", data_dir=tmp_path)
    write(tmp_path / "MetaMathQA" / "test.jsonl", [json.dumps({"question": "a ?", "answer": "b #### 3"})])
    template = "Question: {} Think.\nAnswer:"
    whole = {"tokenizer": tokenizer, "max_length": 40, "prompt_template": template}
    task = load("metamath", data_dir=tmp_path, validation_size=5, **whole)
    assert (task.train.rows, task.validation.rows, task.test.rows) == (25, 5, 1)
    assert task.tokenizer is not None
    assert task.test["prompt_ids"][0].tolist() == task.tokenizer.encode("Question: a ? Think.\nAnswer:").ids
    for wrong in ("no place", "{} and {}"):
        with pytest.raises(ValueError, match=r"--prompt-template: expected text with one \{\}"):
            load("metamath", data_dir=tmp_path, prompt_template=wrong)


def test_the_hub_is_asked_for_the_files_of_the_task(glue, monkeypatch):
    asked = {}

    def snapshot(repository, **arguments):
        asked[repository] = arguments
        return str(glue)

    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", snapshot)
    task = load("rte", data_dir="hub")
    assert task.source.startswith("hub:nyu-mll/glue@")
    assert asked["nyu-mll/glue"]["repo_type"] == "dataset"
    assert "rte/*.parquet" in asked["nyu-mll/glue"]["allow_patterns"]
    load("sst2", data_dir="hub:me/mine")
    assert "*.jsonl" in asked["me/mine"]["allow_patterns"]
    with pytest.raises(AssetError, match='expected "hub:owner/name" or no data_dir'):
        load("digits", data_dir="hub")

    def offline(*_, **__):
        raise sources.huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(AssetError, match=r"expected the data set nyu-mll/glue from the hub, got .*no network"):
        load("rte", data_dir="hub")


def rows(*lines: str) -> list[str]:
    return ["sentence\tlabel", *lines]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["phrase\tlabel", "good\t1"], "expected a column sentence or text or content, got phrase, label. Name it: --text"),
        (rows("good\t1", "bad\t2"), "train split: expected a label out of negative, positive (or its number from 0) in row 1,"),
        (rows("good\t-1"), "got '-1' (a split without labels, as GLUE's test)"),
        (rows("good\t1", " \t0"), "train split: expected text in text of row 1, got ' '"),
        (rows(), "train split: expected at least one row, got none"),
        (rows("good\t1\t1"), "cannot be read"),
        (rows(*["good a\t1"] * 5, "bad\t0"), "expected 2 of 6 rows of all classes, at least one row"),
    ],
)  # fmt: skip
def test_errors_say_where(tmp_path, train, message):
    write(tmp_path / "train.tsv", train)
    write(tmp_path / "dev.tsv", rows("good\t1"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load("sst2", data_dir=tmp_path, validation_size=2)


def test_what_cannot_be_found(tmp_path, glue, tokenizer):
    with pytest.raises(ValueError, match=r"task: expected one of rte, .*got 'mnli'"):
        load("mnli")
    with pytest.raises(
        ValueError, match=r"--image-column: expected --data-dir beside it, for the columns of digits's own"
    ):
        load("digits", image_column="photo")
    with pytest.raises(AssetError, match="rte: expected a data_dir, for no asset has its rows"):
        load("rte")
    with pytest.raises(FileNotFoundError, match=r"gsm8k: expected train\..*found \['RTE', 'SST-2'\]"):
        load("gsm8k", data_dir=glue)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load("rte", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json or a folder with one"):
        load("rte", data_dir=glue, tokenizer=glue)
    with pytest.raises(ValueError, match="train_size: expected a size of 1 to 54 rows, or a fraction of them, got 99"):
        load("sst2", data_dir=glue, train_size=99)
    (glue / "RTE" / "train.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="expected one file of the split, got"):
        load("rte", data_dir=glue)


# -------------------------------------------------------------------------------------- real assets

COUNTS = {  # rows of test, classes, a class's share of train at least
    "rotten_tomatoes": (1706, 2, 0.49),
    "imdb": (4981, 2, 0.49),
    "newsgroups": (7528, 20, 0.03),
    "fashion_mnist": (10_000, 10, 0.099),
    "cifar10": (2000, 10, 0.099),
}


def real(name: str) -> Path:
    try:
        return asset(name, fetch=False)
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_real_classification(name):
    real("reviews" if name in ("rotten_tomatoes", "imdb") else name)
    tokenizer = real("minilm") if TASKS[name].kind == "sequence-classification" else None
    task = load(name, tokenizer=tokenizer, train_size=2000)
    count, classes, share = COUNTS[name]
    assert task.test.rows == count
    assert np.bincount(task.train["labels"], minlength=classes).min() >= share * 2000
    _, batch = next(iter(data.train_batches(task.train, 8, seed=0, buckets=(128,))))
    assert np.isfinite(batch.get("pixel_values", batch.get("input_ids"))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "longest"),
    [("gsm_symbolic", [4500, 500, 500], 1500), ("gsm_symbolic_short", [1800, 200, 400], 300)],
)
def test_real_templates_of_math(name, rows, longest):
    real("gsm_symbolic")
    one, other = load(name), load(name)
    np.testing.assert_array_equal(one.train["answer"], other.train["answer"])
    held = [set(split["question"]) for split in (one.train, one.validation, one.test)]
    assert [len(questions) for questions in held] == rows
    assert len(set.union(*held)) == sum(rows)
    # characters; the short form is what it says
    pairs = zip(one.test["question"], one.test["answer"], strict=True)
    assert longest / 2 < max(len(question + answer) for question, answer in pairs) < longest
    assert all(tasks.extract_answer(answer) is not None for answer in one.train["answer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rte", "sst2", "gsm8k"])
def test_shared_data(name):
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    task = load(name, data_dir=folder)
    assert task.test.rows == {"rte": 363, "sst2": 872, "gsm8k": 660}[name]
