"""``python -m train.rank``: what it keeps is what the ranker likes best, and a run is taken up where it stopped."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

from ntk_prefix import models
from ntk_prefix.artifacts import held
from ntk_prefix.checks import UsageError
from tests.train.tiny_model import write_model
from train import rank
from train.decoders import load_decoder
from train.prompts import prompt_ids
from train.rank import Beam, Rerank, Score, Search, beam_search, main, reranked
from train.writer import Writer

WORDS = ("[UNK]", "<|endoftext|>", "pre", "suffi", "the", "film", "was", "good", "bad", "very", "and", "long", ".")
KEY = jax.random.key(0)


class Letters:
    """A writer that knows what it will say: of every text all letters, so many times as tokens are asked for."""

    def __init__(self, letters: str, ends: str = ""):
        self.letters, self.ends = letters, ends

    def __call__(self, texts: Sequence[str], samples: int, tokens: int, key: Any) -> list[list[tuple[str, bool]]]:
        return [[(each * tokens, each in self.ends) for each in self.letters[:samples]] for _ in texts]


def like(wanted: str) -> Any:
    """Return a ranker that counts the places at which a text is the wanted one, and likes none behind its end."""

    def scored(prefixes: Sequence[str], suffixes: Sequence[str]) -> np.ndarray:
        return np.array([sum(a == b for a, b in zip(text, wanted, strict=False)) for text in suffixes], float)

    return scored


def test_samples_are_sorted_by_their_scores() -> None:
    writer: Any = Letters("abc")
    found = reranked("x", writer, like("bb"), 3, 2, KEY)
    assert [each.text for each in found] == ["bb", "aa", "cc"]
    assert [each.score for each in found] == [2, 0, 0]


def test_a_beam_goes_on_from_the_best_and_finds_what_samples_do_not() -> None:
    writer: Any = Letters("abc")
    found = beam_search("x", writer, like("aabbcc"), samples=3, tokens=2, beams=2, total=6, key=KEY)
    assert found[0] == ("aabbcc", 6)
    assert len(found) == 2
    # what is left is shorter than a step
    assert beam_search("x", writer, like("aab"), samples=3, tokens=2, beams=1, total=3, key=KEY)[0].text == "aab"


def test_what_has_ended_stays_as_it_is_and_may_win() -> None:
    writer: Any = Letters("ab", ends="b")
    found = beam_search("x", writer, like("aabb"), samples=2, tokens=2, beams=2, total=8, key=KEY)
    assert found[0].text == "aabb"
    assert {len(each.text) for each in found} <= {4, 6, 8}
    alone: Any = Letters("b", ends="b")
    assert beam_search("x", alone, like("a"), samples=1, tokens=2, beams=2, total=8, key=KEY) == [("bb", 0.0)]


def test_a_stop_text_that_began_with_an_earlier_step_is_one_too() -> None:
    writer: Any = Letters("ab")
    some: dict[str, Any] = {"samples": 2, "tokens": 1, "beams": 2, "total": 4, "key": KEY}
    assert beam_search("x", writer, like("abab"), **some)[0].text == "abab"
    stopped = beam_search("x", writer, like("abab"), **some, stop=("ba",))
    assert not any("ba" in each.text for each in stopped)
    assert stopped[0].text == "abbb"  # the second letter is the last that may be wanted


def test_every_draw_of_a_beam_has_a_key_of_its_own() -> None:
    keys: list[str] = []

    def writer(texts: Sequence[str], samples: int, tokens: int, key: Any) -> list[list[tuple[str, bool]]]:
        keys.append(str(jax.random.key_data(key)))
        return [[("a" * tokens, False), ("b" * tokens, False)] for _ in texts]

    kept: Any = writer
    beam_search("x", kept, like("abab"), samples=2, tokens=1, beams=2, total=3, key=KEY)
    assert len(keys) == len(set(keys)) == 5  # of one beginning, and then of two twice


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("encoder"), WORDS, kind="bert"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("decoder"), WORDS, ("<|endoftext|>",)))


def table(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


PAIRS = [{"prefix": "the film", "suffix": "was good"}, {"prefix": "very long", "suffix": "and bad ."}]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pairs_get_scores_and_a_search_finds_the_best(encoder: str, tmp_path: Path) -> None:
    console, pairs = Console(quiet=True), table(tmp_path / "pairs.jsonl", PAIRS)
    lines = main(Score(ranker=encoder, pairs=pairs, out=tmp_path / "scores.jsonl"), console)
    ranker = models.load_ranker(encoder)
    columns = [[pair[name] for pair in PAIRS] for name in ("prefix", "suffix")]
    np.testing.assert_allclose([line["score"] for line in lines], ranker.score(*columns), rtol=1e-5)
    assert read(tmp_path / "scores.jsonl") == lines
    found = main(
        Search(ranker=encoder, cosine=True, prompts=pairs, among=pairs, top=1, out=tmp_path / "found.jsonl"), console
    )
    vectors = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(ranker.encode_texts, columns, ("prefix", "suffix"))
    ]
    cosines = vectors[0] @ vectors[1].T
    assert [line["best"] for line in found] == [PAIRS[best]["suffix"] for best in cosines.argmax(axis=1)]
    np.testing.assert_allclose([line["candidates"][0]["score"] for line in found], cosines.max(axis=1), rtol=1e-5)


def test_a_decoder_writes_what_is_ranked_and_a_stopped_run_goes_on(
    encoder: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, prompts = Console(quiet=True), table(tmp_path / "prompts.jsonl", PAIRS)
    options: dict[str, Any] = {"ranker": encoder, "model": decoder, "prompts": prompts, "samples": 3, "stop": ("long",)}
    whole = main(Rerank(**options, tokens=4, out=tmp_path / "whole.jsonl"), console)
    for line in whole:
        scores = [each["score"] for each in line["candidates"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert line["best"] == line["candidates"][0]["text"]
        assert not any("long" in each["text"] or "endoftext" in each["text"] for each in line["candidates"])
    # as if it had been stopped while its second line was written
    out = tmp_path / "whole.jsonl"
    out.write_text(out.read_text()[:-9])
    calls: list[str] = []

    def counted(prompt: str, *rest: Any) -> Any:
        calls.append(prompt)
        return reranked(prompt, *rest)

    def counted_with(prompt: str, writer: Any, scored: Any, **some: Any) -> Any:
        return counted(prompt, writer, scored, some["samples"], some["tokens"], some["key"])

    monkeypatch.setattr(rank, "reranked", counted_with)
    assert main(Rerank(**options, tokens=4, out=out), console) == whole
    assert calls == [PAIRS[1]["prefix"]]
    assert main(Rerank(**options, tokens=4, out=out), console) == whole
    assert len(calls) == 1
    # another question begins anew
    main(Rerank(**(options | {"seed": 1}), tokens=4, out=out), console)
    assert len(calls) == 3


def test_a_text_ends_where_the_model_or_a_stop_text_says() -> None:
    class Tokenizer:
        def token_to_id(self, token: str) -> int | None:
            return 1 if token == "<|endoftext|>" else None

        def decode(self, ids: list[int]) -> str:
            return " ".join(WORDS[i] for i in ids)

    model: Any = None
    writer = Writer(model, Tokenizer(), models.Sampling(), 8, (". the", "bad"))
    ids = {word: i for i, word in enumerate(WORDS)}
    assert writer._text([ids["was"], ids["good"], 1, ids["bad"]]) == ("was good", True)
    assert writer._text([ids["good"], ids["."], ids["the"], ids["bad"]]) == ("good ", True)
    assert writer._text([ids["good"], ids["."]]) == ("good .", False)
    # behind a prompt a text begins with what stands between the two
    assert writer._text([ids["good"], 1], [ids["very"]]) == (" good", True)


def test_a_decoder_reads_the_ends_of_prompts_one_beside_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, Any] = {}

    def generate(model: Any, ids: Any, mask: Any, tokens: int, **options: Any) -> np.ndarray:
        read.update(
            ids=np.asarray(ids)[:, -3:].tolist(), mask=np.asarray(mask).sum(1).tolist(), tokens=tokens, **options
        )
        return np.array([[[WORDS.index("good"), 1]] * 2] * len(ids))

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(models, "generate", generate)
    model: Any = None
    sampling = models.Sampling(top_p=0.5)
    written = Writer(model, tokenizer, sampling, 3)(["the film was long", "bad"], 2, 7, KEY)
    assert written == [[(" good", True)] * 2] * 2
    assert read == {
        "ids": [[WORDS.index(word) for word in ("film", "was", "long")], [0, 0, WORDS.index("bad")]],
        "mask": [3, 1],
        "tokens": 7,
        "sampling": sampling,
        "key": KEY,
        "samples": 2,
        "eos_token_id": 1,
    }


def test_a_text_has_no_part_of_a_character() -> None:
    """Of bytes, of which a character here has three; the last that fit are two."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model: Any = None
    ids = tokenizer.encode("\u65e5\u8a9e").ids
    writer = Writer(model, tokenizer, models.Sampling(), 8)
    assert [writer._text(ids[:count])[0] for count in range(2, 7)] == ["", *["\u65e5"] * 3, "\u65e5\u8a9e"]


def test_of_a_long_prompt_the_end_is_read_behind_what_begins_every_text() -> None:
    words = ("<s>", "</s>", *"abcd")
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert prompt_ids(tokenizer, "a b c d", 3) == [3, 4, 5]
    tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    assert prompt_ids(tokenizer, "a b c d", 3) == [0, 4, 5]
    assert prompt_ids(tokenizer, "a b", 8) == [0, 2, 3]
    assert prompt_ids(tokenizer, "a b", 1) == [0, 3]
    assert prompt_ids(tokenizer, "", 8) == [0, 1]


def test_results_are_those_of_what_was_asked_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a file as it was, nor of a model or an adapter that has been trained anew since; nor do two write one file."""
    calls: list[Sequence[str]] = []

    def load_scorer(*_: Any) -> Any:
        return lambda prefixes, suffixes: calls.append(suffixes) or np.zeros(len(suffixes))

    monkeypatch.setattr(rank, "load_scorer", load_scorer)
    prompts, among = table(tmp_path / "prompts.jsonl", PAIRS), table(tmp_path / "among.jsonl", PAIRS)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"1")
    options = Search(prompts=prompts, among=among, adapter=tmp_path, out=tmp_path / "found" / "found.jsonl")
    assert len(main(options, Console(quiet=True))) == len(calls) == 2
    main(options, Console(quiet=True))
    assert len(calls) == 2
    table(among, [{"text": "another"}])
    assert main(options, Console(quiet=True))[0]["best"] == "another"
    assert len(calls) == 4
    weights.write_bytes(b"2")
    main(options, Console(quiet=True))
    assert len(calls) == 6
    own = dataclasses.replace(options, ranker=str(tmp_path / "ranker"))
    (tmp_path / "ranker").mkdir()
    for content in (b"1", b"22"):
        (tmp_path / "ranker" / "model.safetensors").write_bytes(content)
        main(own, Console(quiet=True))
    assert len(calls) == 10
    with (
        held(tmp_path / "found" / "found.jsonl.lock", "other"),
        pytest.raises(UsageError, match="another process holds"),
    ):
        main(options, Console(quiet=True))


def test_a_stopped_run_scores_the_pairs_together_that_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a score is rounded depends on what is read beside it."""
    calls: list[Sequence[str]] = []
    monkeypatch.setattr(rank, "PAIRS_AT_ONCE", 2)
    monkeypatch.setattr(
        rank, "load_scorer", lambda *_: lambda _, suffixes: calls.append(suffixes) or np.ones(len(suffixes))
    )
    pairs = table(tmp_path / "pairs.jsonl", [{"prefix": "a", "suffix": letter} for letter in "bcdef"])
    options = Score(pairs=pairs, out=tmp_path / "out.jsonl")
    options.results.touch()  # all that a run leaves that was killed before it could say whose file this is
    whole = main(options, Console(quiet=True))
    assert calls == [["b", "c"], ["d", "e"], ["f"]]
    lines = options.results.read_text().splitlines(keepends=True)
    options.results.write_text("".join(lines[:3]))
    assert main(options, Console(quiet=True)) == whole
    assert calls[3:] == [["d", "e"], ["f"]]
    assert options.results.read_text() == "".join(lines)


def test_what_is_asked_for_is_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[dict[str, Any]] = []

    class Recorded:
        def __init__(self, model: Any, tokenizer: Any, sampling: models.Sampling, context: int, stop: tuple[str, ...]):
            done.append({"sampling": sampling, "context": context, "stop": stop})

    def found(prompt: str, _: Any, scored: Any, key: Any, **options: Any) -> list[rank.Candidate]:
        done.append({"prompt": prompt, "key": jax.random.key_data(key).tolist(), **options})
        return [rank.Candidate("a", 0.0)]

    monkeypatch.setattr(rank, "load_scorer", lambda *_: lambda _, suffixes: np.arange(len(suffixes)))
    monkeypatch.setattr(rank, "load_decoder", lambda name: (name, None))
    monkeypatch.setattr(rank, "Writer", Recorded)
    for name in ("reranked", "beam_search"):
        monkeypatch.setattr(rank, name, found)
    prompts, quiet = table(tmp_path / "prompts.jsonl", PAIRS), Console(quiet=True)
    common: dict[str, Any] = {"prompts": prompts, "temperature": 0.7, "top_p": 0.6, "context": 5, "stop": (".",)}
    main(Beam(**common, samples=3, tokens=4, beams=5, total=6, seed=1, out=tmp_path / "beam.jsonl"), quiet)
    main(Rerank(**common, samples=3, tokens=4, out=tmp_path / "rerank.jsonl"), quiet)
    beam, writer = done[1], done[0]
    assert writer == {"sampling": models.Sampling(temperature=0.7, top_p=0.6), "context": 5, "stop": (".",)} == done[3]
    asked = {"samples": 3, "tokens": 4, "beams": 5, "total": 6, "stop": (".",), "prompt": "the film"}
    assert {name: value for name, value in beam.items() if name != "key"} == asked
    draws = [str(each["key"]) for each in done if "key" in each]
    assert len(set(draws)) == 4  # of two prompts with two seeds
    # pairs are scored some at a time, and each has its own score
    monkeypatch.setattr(rank, "PAIRS_AT_ONCE", 2)
    lines = main(Score(pairs=table(tmp_path / "three.jsonl", [*PAIRS, PAIRS[0]]), out=tmp_path / "score.jsonl"), quiet)
    assert [(line["suffix"], line["score"]) for line in lines] == [("was good", 0), ("and bad .", 1), ("was good", 0)]
    best = main(Search(prompts=prompts, among=prompts, top=1, out=tmp_path / "search.jsonl"), quiet)
    assert [len(line["candidates"]) for line in best] == [1, 1]


def test_a_file_that_is_searched_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Ranker:
        def encode_prefixes(self, texts: Sequence[str]) -> np.ndarray:
            return np.ones((len(texts), 2))

        def encode_suffixes(self, texts: Sequence[str]) -> np.ndarray:
            read.append(len(texts))
            return np.ones((len(texts), 2))

    loaded: dict[str, Any] = {}
    monkeypatch.setattr(rank, "model_path", lambda *_: Path("folder"))
    monkeypatch.setattr(rank.models, "load_ranker", lambda *_, **options: loaded.update(options) or Ranker())
    scored = rank.load_scorer("minilm", Path("adapter"), "cls", True)
    assert (loaded["adapter"], loaded["pooling"], loaded["cosine"]) == (Path("adapter"), "cls", True)
    for prompt in range(3 * rank.KNOWN):
        scored([str(prompt)], ["a", "b", "c"])
    assert read == [3]


def test_a_file_of_text_is_a_prompt_without_its_last_line_break(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_bytes("\ufeffthe film\r\nwas\r\n".encode())
    assert rank._asked(Rerank(prompts=file)) == [{"prefix": "the film\r\nwas"}]
    # and as some editors write tables
    for name, content in (("a.json", json.dumps(PAIRS)), ("a.jsonl", "\r\n".join(map(json.dumps, PAIRS)))):
        (tmp_path / name).write_bytes(f"\ufeff{content}".encode())
        assert rank._asked(Score(pairs=tmp_path / name)) == PAIRS


def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(encoder: str, tmp_path: Path) -> None:
    pairs = table(tmp_path / "pairs.jsonl", [{"text": "a"}])
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine\n")
    known: dict[str, Any] = {"pairs": pairs}
    none = table(tmp_path / "none.jsonl", [])
    gaps = table(tmp_path / "gaps.jsonl", [PAIRS[0], {"prefix": " "}])
    for make, message in (
        (lambda: Score(pooling="last", **known), "--pooling: expected mean or cls"),
        (lambda: Score(out=tmp_path, **known), "--out: expected a file"),
        (lambda: Rerank(prompts=pairs, samples=0), "--samples"),
        (lambda: Rerank(prompts=pairs, top_p=0.0), "^--top-p: expected a number in"),
        (lambda: Rerank(prompts=pairs, stop=("",)), "--stop"),
        (lambda: Beam(prompts=pairs, total=5), "--total: expected at least 20"),
        (lambda: Search(prompts=pairs, among=pairs, top=0), "--top"),
        (lambda: Score(pairs=mine, out=mine), "--out: expected another file than --pairs"),
        (lambda: main(Score(**known), Console(quiet=True)), "expected a column 'prefix'"),
        (lambda: main(Score(pairs=none), Console(quiet=True)), "expected a column 'prefix', got none"),
        (lambda: rank.load_scorer("nonsense", None, flag="--judge"), "--judge: expected an asset"),
        (lambda: load_decoder("nonsense", "--writer"), "--writer: expected an asset"),
        (lambda: load_decoder(encoder, "--writer"), "--writer: expected a decoder, such as smollm2, got .*'bert'"),
        (
            lambda: main(Score(pairs=gaps), Console(quiet=True)),
            "gaps.jsonl, row 1: expected a text in 'suffix', got None",
        ),
        (lambda: main(Rerank(prompts=gaps), Console(quiet=True)), "gaps.jsonl, row 1: expected some text, got ' '"),
        (lambda: main(Score(pairs=table(pairs, PAIRS), out=mine), Console(quiet=True)), "--out: expected a new file"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    assert mine.read_text() == "mine\n"


def test_one_command_leaves_the_results_of_another_alone() -> None:
    file = Path("file")
    asked = (Score(pairs=file), Search(prompts=file, among=file), Rerank(prompts=file), Beam(prompts=file))
    assert [each.results.name for each in asked] == ["score.jsonl", "search.jsonl", "rerank.jsonl", "beam.jsonl"]
    assert Score(pairs=file, out=Path("mine")).results == Path("mine")
