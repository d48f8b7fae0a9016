"""``python -m train.rank``: what it keeps is what the ranker likes best, and a run is taken up where it stopped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.checks import UsageError
from tests.train.tiny_model import write_model
from train import rank
from train.rank import Beam, Rerank, Score, Search, Writer, beam_search, main, reranked

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


def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    pairs = table(tmp_path / "pairs.jsonl", [{"text": "a"}])
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine\n")
    known: dict[str, Any] = {"pairs": pairs}
    for make, message in (
        (lambda: Score(pooling="last", **known), "--pooling: expected mean or cls"),
        (lambda: Score(out=tmp_path, **known), "--out: expected a file"),
        (lambda: Rerank(prompts=pairs, samples=0), "--samples"),
        (lambda: Rerank(prompts=pairs, top_p=0.0), "top_p"),
        (lambda: Rerank(prompts=pairs, stop=("",)), "--stop"),
        (lambda: Beam(prompts=pairs, total=5), "--total: expected at least 20"),
        (lambda: Search(prompts=pairs, among=pairs, top=0), "--top"),
        (lambda: main(Score(**known), Console(quiet=True)), "expected a column 'prefix'"),
        (lambda: main(Score(pairs=table(pairs, PAIRS), out=mine), Console(quiet=True)), "--out: expected a new file"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    assert mine.read_text() == "mine\n"


def test_one_command_leaves_the_results_of_another_alone() -> None:
    file = Path("file")
    asked = (Score(pairs=file), Search(prompts=file, among=file), Rerank(prompts=file), Beam(prompts=file))
    assert [each.results.name for each in asked] == ["score.jsonl", "search.jsonl", "rerank.jsonl", "beam.jsonl"]
    assert Score(pairs=file, out=file).results == file
