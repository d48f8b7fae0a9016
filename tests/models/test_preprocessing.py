"""The files beside the weights: how pixels are normalized, and how text becomes tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from ntk_prefix import models
from ntk_prefix.checks import UsageError
from tests.models import byte_pairs

HALF = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.25]}


def normalization(folder: Path, **fields: Any) -> Any:
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return models.image_normalization(folder)


def test_images_are_normalized_as_the_folder_says(tmp_path: Path) -> None:
    assert models.image_normalization(tmp_path) is None
    mean, std = normalization(tmp_path, **HALF, rescale_factor=1 / 255)
    assert (mean, std) == ((0.5, 0.25, 0.125), (0.5, 0.5, 0.25))
    assert normalization(tmp_path, **HALF, do_rescale=True, size=224, crop_pct=0.9).mean == mean
    assert normalization(tmp_path, image_mean=0.5, image_std=0.25).std == (0.25, 0.25, 0.25)
    assert normalization(tmp_path, **HALF, do_normalize=False) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("factor", [1 / 127.5, None])
def test_other_scales_of_pixels_come_down_to_the_same_form(tmp_path: Path, factor: float | None) -> None:
    """(pixel * factor - mean) / std, by hand for one pixel; without rescaling the factor is 1."""
    fields = {"do_rescale": False} if factor is None else {"rescale_factor": factor}
    found = normalization(tmp_path, **HALF, **fields)
    for channel in range(3):
        want = (200 * (factor or 1) - HALF["image_mean"][channel]) / HALF["image_std"][channel]
        assert (200 / 255 - found.mean[channel]) / found.std[channel] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "image_mean, image_std: expected numbers"),
        ({**HALF, "image_std": [0.5, 0, 0.5]}, "Expected `float` > 0.0"),
        ({**HALF, "image_mean": [0.5, 0.5]}, "expected three numbers each"),
        ({**HALF, "image_mean": []}, "expected three numbers each"),
        ({**HALF, "image_mean": "0.5"}, "image_mean"),
        ({**HALF, "rescale_factor": -1}, "rescale_factor"),
    ],
)
def test_normalizations_that_cannot_be(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=rf"preprocessor_config\.json.*{problem}"):
        normalization(tmp_path, **fields)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", ",", "cafe"]


def words(folder: Path, vocabulary: list[str], **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return models.load_tokenizer(folder)


def test_a_berts_vocabulary(tmp_path: Path) -> None:
    """Text is cleaned, split at blanks and stops, and cut greedily from the left; by hand."""
    tokenizer = words(tmp_path / "lower", VOCABULARY)
    pair = tokenizer.encode("A films,\tCafé zebra", "film [MASK]")
    assert pair.tokens == ["[CLS]", "a", "film", "##s", ",", "cafe", "[UNK]", "[SEP]", "film", "[MASK]", "[SEP]"]
    assert pair.ids == [2, 5, 6, 7, 8, 9, 1, 3, 6, 4, 3]
    assert pair.type_ids == [0] * 8 + [1] * 3
    cased = words(tmp_path / "cased", [*VOCABULARY, "Film"], do_lower_case=False)
    assert cased.encode("Film films A").tokens == ["[CLS]", "Film", "film", "##s", "[UNK]", "[SEP]"]


def test_a_vocabulary_with_capitals_says_whether_it_is_cased(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: do_lower_case: expected true or false"):
        words(tmp_path, [*VOCABULARY, "Film"])


def test_other_vocabularies_are_told_how_to_become_a_tokenizer_json(tmp_path: Path) -> None:
    assert models.load_tokenizer(tmp_path) is None
    for name in ("vocab.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UsageError, match=rf"expected a tokenizer\.json.*{name}.*\. Write tokenizer\.json"):
            models.load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"expected a BertTokenizer beside a vocab\.txt, got RoFormerTokenizer"):
        words(tmp_path / "other", VOCABULARY, tokenizer_class="RoFormerTokenizer")
    assert words(tmp_path / "distilbert", VOCABULARY, tokenizer_class="DistilBertTokenizerFast") is not None
    with pytest.raises(UsageError, match=r"vocab\.txt: expected the token '\[CLS\]' \(cls_token\)"):
        words(tmp_path / "short", ["[UNK]", "a"])


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "nothing of the sort"}}')
    with pytest.raises(UsageError, match=r"tokenizer\.json: expected a tokenizer, got a file that is broken"):
        models.load_tokenizer(tmp_path)


RECORDED = {
    "GPT2Tokenizer": [
        [263, 264, 266, 226, 226, 265, 226, 26, 265],
        [133, 108, 204, 204, 78, 89, 12, 88, 226, 49, 52, 60, 42, 55],
        [70, 5, 71],
    ],
    "RobertaTokenizer": [
        [0, 263, 264, 266, 226, 226, 265, 226, 26, 265, 2],
        [0, 133, 108, 204, 204, 78, 89, 12, 88, 226, 49, 52, 60, 42, 55, 2],
        [0, 70, 5, 71, 2],
    ],
    "Qwen2Tokenizer": [
        [263, 264, 266, 226, 226, 22, 23, 226, 26, 22, 23],
        [133, 108, 204, 204, 78, 89, 12, 88, 226, 49, 52, 60, 42, 55],
        [70, 5, 71],
    ],
}
"""What transformers 5.24 makes of the texts by the same two files (``AutoTokenizer``'s class by name)."""


@pytest.mark.parametrize("kind", RECORDED)
def test_vocabularies_of_byte_pairs_are_read_as_transformers_does(tmp_path: Path, kind: str) -> None:
    tokenizer = models.load_tokenizer(byte_pairs.write(tmp_path, kind))
    assert tokenizer is not None
    assert [tokenizer.encode(text).ids for text in byte_pairs.TEXTS] == RECORDED[kind]
    assert tokenizer.decode(RECORDED[kind][0]) == byte_pairs.TEXTS[0]
    model_type = {"GPT2Tokenizer": "gpt2", "RobertaTokenizer": "roberta", "Qwen2Tokenizer": "qwen3"}[kind]
    bare = byte_pairs.write(tmp_path / "bare", None)
    (bare / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert models.load_tokenizer(bare).encode(byte_pairs.TEXTS[0]).ids == RECORDED[kind][0]


def test_byte_pairs_that_cannot_be_are_named(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UsageError, match=message):
            models.load_tokenizer(tmp_path)

    byte_pairs.write(tmp_path, None)
    refused(r"tokenizer_class one of .*got none, of a None\. Write tokenizer\.json")
    byte_pairs.write(tmp_path, "BloomTokenizer")
    refused("got BloomTokenizer")
    byte_pairs.write(tmp_path, "GPT2Tokenizer", added_tokens_decoder={"9999": {"content": "<new>", "special": True}})
    refused("'<new>' to be token 9999")
    byte_pairs.write(tmp_path, "RobertaTokenizer", sep_token="[END]")
    refused(r"vocab\.json: expected the token '\[END\]' \(sep_token\)")
    (tmp_path / "merges.txt").write_text("a b c\n")
    refused(r"merges\.txt: expected merges of two tokens")
    (tmp_path / "vocab.json").write_text("[]")
    refused(r"vocab\.json")
