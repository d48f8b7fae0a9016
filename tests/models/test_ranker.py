"""A ranker: two roles of one encoder, the authors' layout, and scores that do not depend on what else is read."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.models import ranker as ranking
from ntk_prefix.models.ranker import _round_up, marked_ids, save_settings
from tests.models.recording import recorded
from tests.train.tiny_model import write_model

THEIRS = Path(__file__).parents[1] / "fixtures" / "ranker"
WORDS = ("[UNK]", "[CLS]", "[SEP]", "pre", "suffi", "the", "film", "was", "good", "bad", "very", "and", "long", ".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("ranker"), WORDS, ("[CLS]", "[SEP]"), kind="bert")


@pytest.fixture(scope="module")
def ranker(folder: Path) -> models.Ranker:
    loaded = models.load_ranker(folder, lengths=(8, 6))
    loaded.tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return loaded


def ids_of(*words: str) -> jnp.ndarray:
    return jnp.asarray([[WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]])


def test_a_vector_is_the_pooled_state_through_the_map(folder: Path, ranker: models.Ranker) -> None:
    draw = np.random.default_rng(0)
    size = ranker.config.hidden_size
    before = ranker.head.kernel[...]
    ranker.head.kernel[...] = jnp.asarray(draw.normal(size=(size, size)), jnp.float32)
    try:
        found = ranker.encode_prefixes(["the film"])[0]
        states = models.from_pretrained(folder)(ids_of("pre", "the", "film")).last_hidden_state[0]
        np.testing.assert_allclose(found, np.asarray(states.mean(0) @ ranker.head.kernel[...]), rtol=1e-4, atol=1e-5)
        assert not np.allclose(found, ranker.encode_suffixes(["the film"])[0], atol=1e-3)
    finally:
        ranker.head.kernel[...] = before


def test_a_score_is_the_product_of_a_pair_whatever_stands_beside_it(ranker: models.Ranker) -> None:
    prefixes = ["the film", "the very long film", "good", "bad and long"]
    suffixes = ["was good .", "", "very very bad .", "was long"]  # one that ends at once is one too
    vectors = ranker.encode_prefixes(prefixes), ranker.encode_suffixes(suffixes)
    together = ranker.score(prefixes, suffixes)
    np.testing.assert_allclose(together, np.sum(vectors[0] * vectors[1], axis=1), rtol=1e-6)
    alone = [ranker.score([p], [s])[0] for p, s in zip(prefixes, suffixes, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(ranker.score(prefixes, suffixes, batch_size=3), together, rtol=1e-5)
    np.testing.assert_allclose(ranker.score(prefixes[:1], suffixes), vectors[1] @ vectors[0][0], rtol=1e-5)
    assert len(np.unique(np.round(together, 4))) == 4


def test_a_cosine_is_that_of_vectors_of_any_length(ranker: models.Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ranker.config.hidden_size
    made = np.zeros((4, size), np.float32)
    made[:3, :2] = np.array([[3, 4]]) * np.array([[1], [1e25], [1e-30]])
    monkeypatch.setattr(ranking, "_vectors", lambda *_: made)
    monkeypatch.setattr(ranker, "cosine", True)
    found = ranker.encode_texts(["the", "film", "was", "good"], "prefix")
    np.testing.assert_allclose(found[:, :2], [[0.6, 0.8]] * 3 + [[0, 0]], rtol=1e-6)
    assert found.dtype == np.float32


def test_batches_that_are_read_side_by_side_have_their_own_vectors_and_are_counted(ranker: models.Ranker) -> None:
    texts = [" ".join(WORDS[5 + (i + j) % 8] for j in range(1 + i % 4)) for i in range(24)]
    counts: list[int] = []
    found = ranker.encode_suffixes(texts, batch_size=2, progress=lambda done, _: counts.append(done))
    np.testing.assert_allclose(found, [ranker.encode_suffixes([text])[0] for text in texts], rtol=1e-5, atol=1e-6)
    assert counts == list(range(2, 25, 2))

    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranker.encode_suffixes(texts, batch_size=2, progress=stop)


def test_of_a_long_beginning_the_end_is_read_and_of_a_continuation_the_beginning(ranker: models.Ranker) -> None:
    """Lengths of 8 and 6, with the mark and a token at either end."""
    words = ["the", "film", "was", "very", "very", "long", "and", "good"]
    kept = ranker.encode_prefixes([" ".join(words)])
    np.testing.assert_allclose(kept, ranker.encode_prefixes([" ".join(words[-5:])]), rtol=1e-6)
    assert not np.allclose(kept, ranker.encode_prefixes([" ".join(words[:5])]), atol=1e-3)
    ids = ranker._ids(" ".join(words), "suffix")
    assert [WORDS[i] for i in ids] == ["[CLS]", "suffi", "the", "film", "was", "very"]
    np.testing.assert_array_equal(ranker._ids("the   film\n", "prefix"), ids_of("pre", "the", "film")[0])


def test_a_character_of_several_tokens_is_read_whole_or_not_at_all() -> None:
    """Of bytes, which is what rare characters are to RoBERTa and ModernBERT; with 3 of each, any cut but one is in one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_bytes = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    by_bytes.pre_tokenizer, by_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for most, kept in (
        (7, "pre b"),
        (8, "pre b"),
        (9, "pre \u8a9e b"),
        (11, "pre \u8a9e b"),
        (12, "pre \u65e5\u8a9e b"),
    ):
        assert by_bytes.decode(marked_ids(by_bytes, "\u65e5\u8a9e b", "prefix", most)) == kept
    with pytest.raises(UsageError, match="lengths: expected room for the mark and a character of the text, got 6"):
        marked_ids(by_bytes, "\u65e5", "prefix", 6)
    # where the blank before a word is of its token, as of T5, it is no token more
    pieces = Tokenizer(
        Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in ("\u2581pre", "\u2581a", "\u2581b", "\u2581"))], 0)
    )
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    assert pieces.encode("pre b").ids == marked_ids(pieces, "a a b", "prefix", 2)


def test_no_more_is_read_than_the_encoder_has_positions(tmp_path: Path) -> None:
    loaded = models.load_ranker(write_model(tmp_path, WORDS, kind="bert", max_position_embeddings=7))
    ids = loaded._ids("the film was good and very long and bad", "prefix")
    assert [WORDS[i] for i in ids] == ["pre", "good", "and", "very", "long", "and", "bad"]
    assert next(loaded._batches([ids], "prefix", 1, None))[1].shape == (1, 7)
    loaded.backbone.position_offset = 2
    assert len(loaded._ids("the film was good and very long and bad", "suffix")) == 5
    assert [_round_up(length, 2**20) for length in (3, 9, 100, 20_000)] == [8, 12, 128, 24_576]


def test_the_authors_layout_has_the_vectors_that_torch_has(tmp_path: Path) -> None:
    """``t5_encoder.*`` and ``projection.weight``, [out, in], on the first token's state, in float64."""
    loaded, asked = models.load_ranker(THEIRS), recorded(THEIRS)
    ids, mask = jnp.asarray(asked["input_ids"], jnp.int32), jnp.asarray(asked["attention_mask"])
    wanted = asked["vectors"]
    assert loaded.pooling == "cls"
    assert np.abs(loaded(ids, mask).logits - wanted).max() <= 1e-5 * np.abs(wanted).max()

    tensors = load_file(THEIRS / "model.safetensors")
    hidden = models.from_pretrained(THEIRS)(ids, mask).last_hidden_state
    transposed = np.asarray(hidden[:, 0]) @ tensors["projection.weight"]
    assert np.abs(transposed - wanted).max() > 0.1 * np.abs(wanted).max()

    (tmp_path / "config.json").write_text((THEIRS / "config.json").read_text())
    save_file(tensors | {"projection.weight": tensors["projection.weight"][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"projection.weight: expected shape"):
        models.load_ranker(tmp_path)


def test_an_adapter_goes_on_it_as_on_a_classifier(ranker: models.Ranker) -> None:
    before = ranker.score(["the film"], ["was good"])
    peft.apply(ranker, peft.PRESETS["lora"], name="tried")
    np.testing.assert_allclose(ranker.score(["the film"], ["was good"]), before, rtol=1e-5)
    peft.delete_adapter(ranker, "tried")


def test_an_adapter_says_how_its_ranker_makes_scores(folder: Path, tmp_path: Path) -> None:
    trained = models.load_ranker(folder, pooling="cls", cosine=True)
    peft.apply(trained, peft.HeadConfig())
    peft.save_pretrained(trained, tmp_path)
    save_settings(trained, tmp_path)
    loaded = models.load_ranker(folder, adapter=tmp_path)
    assert (loaded.pooling, loaded.cosine) == ("cls", True)
    otherwise = models.load_ranker(folder, adapter=tmp_path, pooling="last", cosine=False)
    assert (otherwise.pooling, otherwise.cosine) == ("last", False)


@pytest.mark.usefixtures("without_annotations")
def test_what_cannot_be_ranked_is_refused(ranker: models.Ranker, tmp_path: Path) -> None:
    no_texts: Any = [3]
    one: Any = (8,)
    for call, message in (
        (lambda: ranker.encode_prefixes([]), "texts: expected at least one"),
        (lambda: ranker.encode_prefixes(["a \ud83d"]), r"texts: expected characters of Unicode, got 'a \\ud83d'"),
        (lambda: ranker.encode_prefixes(no_texts), "texts: expected texts, got 3"),
        (lambda: ranker.encode_suffixes("the film"), "texts: expected a list of texts, got the text 'the film'"),
        (lambda: ranker.score("the", ["a", "b", "c"]), "prefixes: expected a list of texts, got the text 'the'"),
        (
            lambda: ranker.score(["the", "film"], ["was"]),
            r"prefixes: expected one, or as many as suffixes \(1\), got 2",
        ),
        (lambda: models.Ranker(ranker.backbone).encode_prefixes(["the"]), "tokenizer: expected the backbone's"),
        (lambda: models.Ranker(ranker.backbone, lengths=(8, 0)), "lengths"),
        (
            lambda: models.Ranker(ranker.backbone, lengths=one),
            "lengths: expected that of a prefix and that of a suffix",
        ),
        (lambda: models.load_ranker(write_model(tmp_path, WORDS)), "expected an encoder of text, got Llama"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
