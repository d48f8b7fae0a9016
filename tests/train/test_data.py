"""Batches: a pure function of seed and number, on any number of processes; nothing lost, nothing twice."""

import itertools
import re

import numpy as np
import pytest

from train import data
from train.data import Dataset, ImageFormat

LENGTHS = [3, 9, 4, 2, 7, 5, 8]


def tokens(lengths: list[int]) -> np.ndarray:
    column = np.empty(len(lengths), object)
    for row, length in enumerate(lengths):
        column[row] = np.arange(1, length + 1, dtype=np.int32) + 100 * row
    return column


@pytest.fixture
def split() -> Dataset:
    return Dataset({"input_ids": tokens(LENGTHS), "labels": np.arange(7, dtype=np.int32)}, pad_id=9)


def taken(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def assert_same(one: data.Batch, other: data.Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


def test_a_batch_is_a_function_of_seed_and_number(split):
    whole = taken(data.train_batches(split, 4, seed=5), 9)
    assert [number for number, _ in whole] == list(range(9))
    for start in (0, 1, 3, 8):
        ((number, batch),) = taken(data.train_batches(split, 4, seed=5, start=start), 1)
        assert number == start
        assert_same(batch, whole[start][1])


def test_each_epoch_has_each_row_once_in_an_order_of_its_own(split):
    # 7 batches of 4 rows are 4 epochs of 7: batches run over the ends of epochs
    labels = np.concatenate([batch["labels"] for _, batch in taken(data.train_batches(split, 4, seed=0), 7)])
    epochs = labels.reshape(4, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(7), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_grouped_batches_hold_the_rows_that_would_have_been_drawn_with_less_padding():
    rows = 60
    lengths = np.random.default_rng(0).integers(1, 17, rows)
    split = Dataset({"input_ids": tokens(lengths), "labels": np.arange(rows, dtype=np.int32)})
    buckets = tuple(range(1, 17))

    def batches(count, **options):
        return [b for _, b in taken(data.train_batches(split, 4, seed=2, buckets=buckets, **options), count)]

    plain, grouped = batches(10), batches(10, grouped=5)
    for first in (0, 5):
        drawn, divided = (
            np.sort(np.concatenate([b["labels"] for b in side[first : first + 5]])) for side in (plain, grouped)
        )
        np.testing.assert_array_equal(drawn, divided)
    padded = [sum(b["input_ids"].size for b in side) for side in (plain, grouped)]
    assert padded[1] < 0.8 * padded[0]
    # not in order of length, and the same from any start
    assert any(np.diff([b["input_ids"].shape[1] for b in grouped[:5]]) < 0)
    (late,) = batches(1, grouped=5, start=7)
    assert_same(late, grouped[7])


def test_rows_in_order_of_length_find_their_way_back(split):
    ordered, places = data.by_length(split)
    lengths = [len(ids) for ids in ordered["input_ids"]]
    assert lengths == sorted(lengths)
    np.testing.assert_array_equal(ordered["labels"][places], split["labels"])


def test_neighboring_seeds_share_no_epoch():
    split = Dataset({"input_ids": tokens([2] * 50), "labels": np.arange(50, dtype=np.int32)})
    epochs = {
        tuple(batch["labels"])
        for seed in range(3)
        for _, batch in taken(data.train_batches(split, 50, seed=seed, buckets=(2,)), 3)
    }
    assert len(epochs) == 9


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_shares_of_the_same_batch(split, count):
    whole = taken(data.train_batches(split, 4, seed=3, buckets=(4, 6, 9)), 5)
    shares = [
        taken(data.train_batches(split, 4, 3, buckets=(4, 6, 9), process_index=p, process_count=count), 5)
        for p in range(count)
    ]
    for number, batch in whole:
        # also the same bucket: shapes must agree between processes
        joined = {name: np.concatenate([share[number][1][name] for share in shares]) for name in batch}
        assert_same(joined, batch)


def test_text_is_padded_to_the_smallest_bucket(split):
    for _, batch in taken(data.train_batches(split, 2, seed=1, buckets=(4, 8, 16)), 12):
        lengths = np.array(LENGTHS)[batch["labels"]]
        assert batch["input_ids"].shape[1] == next(bucket for bucket in (4, 8, 16) if bucket >= lengths.max())
        np.testing.assert_array_equal(batch["attention_mask"].sum(axis=1), lengths)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            np.testing.assert_array_equal(ids[mask == 1], split["input_ids"][label])
            assert (ids[mask == 0] == 9).all()


def test_evaluation_is_every_row_once_in_order(split):
    batches = list(data.evaluation_batches(split, 3, buckets=(16,)))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 16)] * 3
    weight = np.concatenate([batch["weight"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    np.testing.assert_array_equal(weight, [1] * 7 + [0] * 2)
    np.testing.assert_array_equal(labels[weight == 1], np.arange(7))
    shares = [list(data.evaluation_batches(split, 4, (16,), process_index=p, process_count=2)) for p in range(2)]
    for number, batch in enumerate(data.evaluation_batches(split, 4, (16,))):
        assert_same({k: np.concatenate([share[number][k] for share in shares]) for k in batch}, batch)


def test_token_types_are_padded_with_zero():
    types = np.empty(2, object)
    types[:] = [np.array([0, 1, 1], np.int32), np.array([0, 1], np.int32)]
    split = Dataset({"input_ids": tokens([3, 2]), "token_type_ids": types, "labels": np.zeros(2, np.int32)}, pad_id=7)
    (batch,) = data.evaluation_batches(split, 2, (4,))
    np.testing.assert_array_equal(batch["token_type_ids"], [[0, 1, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(batch["input_ids"][1], [101, 102, 7, 7])


def test_the_loss_of_a_language_model_is_on_the_answer_only():
    split = Dataset(
        {
            "input_ids": tokens([5, 3]),
            "prompt_ids": tokens([2, 1]),
            "prompt_length": np.array([2, 1], np.int32),
        },
        pad_id=103,  # a token that also stands in the text: the mask says what is padding
    )
    (batch,) = data.evaluation_batches(split, 2, (6,))
    np.testing.assert_array_equal(
        batch["labels"], [[-100, -100, 3, 4, 5, -100], [-100, 102, 103, -100, -100, -100]]
    )  # fmt: skip
    (left,) = data.prompt_batches(split, 2, (4,))
    np.testing.assert_array_equal(left["input_ids"], [[103, 103, 1, 2], [103, 103, 103, 101]])
    np.testing.assert_array_equal(left["attention_mask"], [[0, 0, 1, 1], [0, 0, 0, 1]])
    *_, right = data.prompt_batches(split, 3, (4,), side="right")
    np.testing.assert_array_equal(right["attention_mask"][:2], [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(right["weight"], [1, 1, 0])


def test_images_are_resized_and_normalized():
    gray = np.zeros((2, 4, 4), np.uint8)
    gray[1] = 255
    wanted = ImageFormat(size=6, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    split = Dataset({"image": gray, "labels": np.arange(2, dtype=np.int32)}, image=wanted)
    (batch,) = data.evaluation_batches(split, 2)
    assert batch["pixel_values"].shape == (2, 6, 6, 3)
    assert batch["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(batch["pixel_values"][0, 0, 0], [-1, -0.5, 0], atol=1e-6)
    np.testing.assert_allclose(batch["pixel_values"][1, 5, 5], [1, 1.5, 0.5], atol=1e-6)
    # bilinear: a ramp stays a ramp away from the borders
    ramp = np.tile(np.arange(0, 160, 20, dtype=np.uint8), (8, 1))[None]
    one = Dataset(
        {"image": ramp, "labels": np.zeros(1, np.int32)}, image=ImageFormat(size=16, mean=(0,) * 3, std=(1,) * 3)
    )
    (_, batch), *_ = taken(data.train_batches(one, 1, seed=0), 1)
    np.testing.assert_allclose(np.diff(batch["pixel_values"][0, 8, 2:14, 0]) * 255, 10, atol=1.01)


def test_a_split_is_read_only_and_checked(split):
    assert split.rows == 7
    assert set(split) == {"input_ids", "labels"}
    with pytest.raises(ValueError, match="read-only"):
        split["labels"][0] = 3
    with pytest.raises(ValueError, match="equal lengths of at least one row"):
        Dataset({"input_ids": tokens([1, 2]), "labels": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="equal lengths of at least one row"):
        Dataset({"labels": np.zeros(0, np.int32)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": (4, 8)}, "expected one that holds the longest row, 9 tokens, got (4, 8)"),
        ({"buckets": (16, 8)}, "expected lengths in growing order"),
        ({"buckets": ()}, "expected lengths in growing order"),
        ({"process_count": 3}, "expected a positive multiple of the 3 processes, got 4"),
        ({"process_index": 2, "process_count": 2}, "expected 0 to 1, got 2"),
        ({"batch_size": 0}, "expected a positive multiple"),
    ],
)
def test_what_cannot_be_batched_is_refused_at_the_call(split, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.train_batches(split, arguments.pop("batch_size", 4), seed=0, **arguments)


def test_text_without_tokens_is_refused():
    split = Dataset({"text": tokens([1, 2]), "labels": np.zeros(2, np.int32)})
    with pytest.raises(ValueError, match=r"expected a column input_ids \(give tasks.load a tokenizer\)"):
        data.evaluation_batches(split, 2)


def test_parts_of_a_batch_are_its_rows_in_their_order() -> None:
    batch = {"input_ids": np.arange(12).reshape(6, 2), "weight": np.arange(6.0)}
    found = data.parts(batch, 3)
    assert [part["input_ids"].shape for part in found] == [(2, 2)] * 3
    for name, column in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in found]), column)
    with pytest.raises(
        ValueError, match="--accumulate: expected a divisor of the 6 rows of a step that a process holds, got 4"
    ):
        data.parts(batch, 4)
