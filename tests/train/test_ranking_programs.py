"""What stands beside a trained ranker: what a decoder writes, what it finds likely, and rows that nothing was trained for."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tokenizers import processors

from ntk_prefix import models, peft
from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import UsageError
from ntk_prefix.models.ranker import save_settings
from tests.train.test_ranking import document
from tests.train.tiny_model import write_model
from train import compare_decoding, compress, ranking_references, write_negatives
from train.compare import compare
from train.comparison import run
from train.comparison.plan import Comparison
from train.config import CONFIGS, TrainConfig
from train.ranking_data import read_generated
from train.ranking_references import Likelihood, Options, references
from train.write_negatives import Command, write

WORDS = ("[UNK]", "[PAD]", "<|endoftext|>", "pre", "suffi", ".", *"abcdefghijklmnopqrstuvwxyz")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("programs")
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document(seed)}) + "\n" for seed in range(20)))
    encoder = write_model(folder / "encoder", WORDS, ("[PAD]",), kind="bert", num_hidden_layers=1)
    sizes = {"max_length": 16, "suffix_length": 8, "validation_size": 4, "test_size": 4}
    return CONFIGS["ranking"][1].changed(model=str(encoder), data_dir=str(file), **sizes)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("decoder"), WORDS, ("[PAD]", "<|endoftext|>"))


class Counting:
    """A writer that says a number, and knows what it was asked, and with which key."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.keys: dict[str, tuple[str, ...]] = {}
        self.tokens: set[int] = set()

    def __call__(self, texts: Sequence[str], samples: int, tokens: int, key: Any) -> list[list[tuple[str, bool]]]:
        self.asked += texts
        self.keys[str(jax.random.key_data(key))] = tuple(texts)
        self.tokens.add(tokens)
        return [[(f"{text[:3]} {sample}", False) for sample in range(samples)] for text in texts]


def test_negatives_are_written_once_and_a_stopped_program_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "negatives" / "generated.jsonl"
    command = Command(config, test_samples=2, rows=3, out=out)
    writer: Any = Counting()
    assert write(command, QUIET, writer) == len(writer.asked) > 8
    whole = read_generated(out)
    assert sorted(map(len, whole.values())) == [1] * (len(whole) - 4) + [2] * 4
    # as many tokens as are ranked; every three continuations are drawn with a key of their own
    assert writer.tokens == {8}
    assert sum(map(len, writer.keys.values())) == len(writer.asked)
    assert {len(texts) for texts in writer.keys.values()} <= {1, 2, 3}
    # as if it had been stopped while a line was written
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:-9])
    again: Any = Counting()
    write(command, QUIET, again)
    assert len(again.asked) == len(lines) - 5
    assert read_generated(out) == whole
    assert write(command, QUIET, None) == 0
    with pytest.raises(UsageError, match="task: expected a ranking, got digits"):
        write(Command(CONFIGS["tiny"][1], out=out), QUIET)


def test_a_decoder_writes_negatives_behind_all_of_a_beginning(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def writer(*arguments: Any) -> Counting:
        made.extend(arguments)
        return Counting()

    monkeypatch.setattr(write_negatives, "load_decoder", lambda *names: names)
    monkeypatch.setattr(write_negatives, "Writer", writer)
    monkeypatch.setattr(write_negatives, "model_version", lambda *_: version)
    version = [("model.safetensors", 1, 2)]
    command = Command(config, writer="one", top_p=0.5, out=tmp_path / "generated.jsonl")
    write(command, QUIET)
    assert made == ["one", "--writer", models.Sampling(top_p=0.5), 16]
    # its texts are not mixed with others
    assert write(command, QUIET) == 0
    with pytest.raises(UsageError, match=r"generated.jsonl: writer: expected one, got smollm2. Give another --out"):
        write(dataclasses.replace(command, writer="smollm2"), QUIET)
    with pytest.raises(UsageError, match=r"top-p: expected 0.5, got 0.9"):
        write(dataclasses.replace(command, top_p=0.9), QUIET)
    version = [("model.safetensors", 1, 3)]
    with pytest.raises(UsageError, match=r"the files of one: expected as they were, got others"):
        write(command, QUIET)


def test_a_nucleus_that_is_none_is_refused_by_its_flag(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match=r"^--top-p: expected a number in \(0, 1\], got 2"):
        Command(config, top_p=2).check()


def test_an_encoder_is_no_writer(config: TrainConfig, tmp_path: Path) -> None:
    """It is said in words about the flag, before its weights are read."""
    wrong = rf"--writer: expected a decoder, such as smollm2, got {config.model}, of model_type 'bert'"
    with pytest.raises(UsageError, match=wrong):
        write(Command(config, writer=config.model, out=tmp_path / "generated.jsonl"), QUIET)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h")
    with pytest.raises(UsageError, match=r"--model: expected a decoder, such as smollm2, got .*, of model_type 'bert'"):
        compress.main(compress.Options(model=config.model, prompt=text, budget=2), QUIET)


def test_a_likelihood_is_that_of_the_whole_text(decoder: Path) -> None:
    """The prefix is read once for all: the numbers are those of each text read alone, token by token."""
    model: Any = models.from_pretrained(decoder, "causal-lm")
    found = Likelihood(model, models.load_tokenizer(decoder))("x a b c", ["d e", "f g h"], (3, 4))
    ids = jnp.asarray(
        [[WORDS.index(word) for word in text] for text in ("abcdef", "abcfgh")]
    )  # of "x a b c" the last 3
    said = jax.nn.log_softmax(jax.jit(lambda ids: model(ids).logits)(ids))
    each = np.take_along_axis(np.asarray(said)[:, 2:-1], np.asarray(ids)[:, 3:, None], axis=2)[..., 0]
    sums = [each[0, :2].sum(), each[1].sum()]
    np.testing.assert_allclose(found[0], sums, rtol=1e-4)
    np.testing.assert_allclose(found[1], [sums[0] / 2, sums[1] / 3], rtol=1e-4)


def test_a_likelihood_begins_no_text_in_the_middle(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that begins texts with a token of its own."""
    model: Any = models.from_pretrained(decoder, "causal-lm")
    tokenizer: Any = models.load_tokenizer(decoder)
    tokenizer.post_processor = processors.TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", 1)])
    likelihood = Likelihood(model, tokenizer)
    read: list[Any] = []
    monkeypatch.setattr(likelihood, "_found", lambda _, *inputs: read.extend(inputs) or np.zeros((1, 4)))
    likelihood("x a b c", ["d e"], (3, 4))
    prefix, _, suffixes = ([[WORDS[i] for i in row] for row in each.tolist()] for each in read)
    assert (prefix, suffixes[0][:2]) == ([["[PAD]", "b", "c"]], ["d", "e"])


def test_rows_for_which_nothing_is_trained_are_measured_once(
    config: TrainConfig, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    human = tmp_path / "human.jsonl"
    choice = {"prefix": "a b", "ranked": "c .", "sampled": "d", "votes_ranked": 2, "votes_sampled": 1}
    human.write_text(json.dumps(choice) + "\n")
    file = tmp_path / "config.json"
    file.write_text(json_text(config.changed(human=str(human)).as_dict()))
    options = Options(config=file, decoder=str(decoder), likelihood_rows=3, out=tmp_path / "out")
    found = references(options, QUIET)
    assert list(found) == ["random", "frozen cosine", "frozen product", "likelihood, sum", "likelihood, mean"]
    for name, row in found.items():
        assert set(row["identification"]) == {"random", "same document"}
        assert row["rows"] == (3 if "likelihood" in name else 4)
        assert row["agreement"]["of"] == 1
    lines = (tmp_path / "out" / "references.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "references.jsonl").write_text("".join(lines[:-3]) + lines[-3][:-2])
    asked: list[str] = []
    call = Likelihood.__call__

    def counted(self: Likelihood, prefix: str, *rest: Any) -> Any:
        asked.append(prefix)
        return call(self, prefix, *rest)

    monkeypatch.setattr(Likelihood, "__call__", counted)
    assert references(options, QUIET) == found
    assert len(asked) == 1  # the two rows of results, and the choice
    monkeypatch.setattr(ranking_references, "_decoder", lambda name: pytest.fail("it was loaded again"))
    assert references(options, QUIET) == found
    file.write_text(json_text(config.as_dict()))
    with pytest.raises(UsageError, match="--out: expected a new folder"):
        references(options, QUIET)


def test_a_table_of_rankers_has_them_beside_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"random": 0.75, "same document": 0.5}
    summary = {
        "validation_score": 0.5,
        "validation_loss": 1.0,
        "test_score": 0.625,
        "test_rows": 150,
        "trainable_parameters": 73728,
        "identification": kinds,
        "right": {kind: "1101" if kind == "random" else "0101" for kind in kinds},
        "agreement": {"agree": 60, "of": 100},
    }
    monkeypatch.setattr(run, "run_cell", lambda *_, test: dict(summary))
    untrained = {"random": {"test_score": 0.1, "test_rows": 150, "validation_score": None, "identification": kinds}}
    untrained["frozen cosine"] = untrained["random"] | {"right": {kind: "0101" for kind in kinds}}
    monkeypatch.setattr(run, "run_references", lambda *_: untrained)
    files = [tmp_path / "generated.jsonl", tmp_path / "none.jsonl"]
    files[0].write_text("")
    settings: dict[str, Any] = {
        "profile": "ranking",
        "tasks": ("ranking_reviews",),
        "rows": ("ntk",),
        "out": tmp_path / "table",
    }
    comparison = Comparison(**settings, set=(f"generated={files[0]}",))
    comparison.check_sources()
    lines = compare(comparison, QUIET)
    assert [line["row"] for line in lines] == ["ntk", "random", "frozen cosine"]
    table = (tmp_path / "table" / "table.md").read_text().splitlines()
    header, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|"))
    ours, chance, _ = (dict(zip(header, row, strict=True)) for row in cells)
    assert (ours["among random"], ours["among same document"], ours["people"]) == ("75.0", "50.0", "60.0")
    # one row of four is right in one kind of two more: 1/8, and the standard error of (1/2, 0, 0, 0) is 1/8 too
    assert (ours["ahead of frozen cosine by"], chance["ahead of frozen cosine by"]) == ("+12.5 ± 12.5", "-")
    assert (chance["score"], chance["people"], chance["learning rate"]) == ("10.0", "-", "-")
    with pytest.raises(UsageError, match="--set generated: expected a file"):
        Comparison(**settings, set=(f"generated={files[1]}",)).check_sources()


class TestDecoding:
    """Ways to continue texts, with an adapter that ranks and one that judges."""

    def test_is_compared_and_a_stopped_comparison_goes_on(
        self, config: TrainConfig, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare_decoding, "DRAWS", 2)
        adapters = []
        for seed in range(2):
            ranker = models.load_ranker(config.model, cosine=True)
            peft.apply(ranker, peft.HeadConfig(), rngs=nnx.Rngs(seed))
            ranker.head.adapters["default"].kernel[...] += 0.5 * jax.random.normal(
                jax.random.key(seed), (ranker.config.hidden_size,) * 2
            )
            peft.save_pretrained(ranker, tmp_path / str(seed))
            save_settings(ranker, tmp_path / str(seed))
            adapters.append(tmp_path / str(seed))
        some: dict[str, Any] = {"ranker": config.model, "judge": config.model, "model": str(decoder)}
        sizes = {"prompts": 3, "context": 16, "tokens": 8, "samples": 3, "step": 8}
        some |= {"data_dir": config.data.data_dir, "out": tmp_path / "out", **sizes}
        options = compare_decoding.Options(**some, adapter=adapters[0], judge_adapter=adapters[1])
        lines = compare_decoding.compare_decoding(options, QUIET)
        by = {line["way"]: line for line in lines}
        assert list(by) == ["greedy", "nucleus", "typical", "re-ranked", "beam", "true"]
        # the best of several is as good as the first of them, for whom chooses
        assert by["re-ranked"]["ranker"][0] >= by["nucleus"]["ranker"][0]
        assert by["nucleus"]["judge_lead"] == [0.0, 0.0]
        # of the same texts the judge says something else
        assert by["true"]["judge"] != by["true"]["ranker"]
        file = tmp_path / "out" / "texts.jsonl"
        whole = file.read_text()
        file.write_text(whole[:-5])
        calls: list[str] = []
        beam_search = compare_decoding.beam_search

        def counted(prompt: str, *rest: Any, **options: Any) -> Any:
            calls.append(prompt)
            return beam_search(prompt, *rest, **options)

        monkeypatch.setattr(compare_decoding, "beam_search", counted)
        assert compare_decoding.compare_decoding(options, QUIET) == lines
        assert (len(calls), file.read_text()) == (1, whole)
        with pytest.raises(UsageError, match="--judge-adapter: expected another ranker than the one it judges"):
            compare_decoding.Options(**some, adapter=adapters[0], judge_adapter=adapters[0])
        with pytest.raises(UsageError, match=r"^--prompts: expected a size of 1 to \d+ rows"):
            compare_decoding.compare_decoding(dataclasses.replace(options, prompts=10**6), QUIET)

    def test_is_of_what_each_way_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Said:
            """A writer that says how it draws, and how many tokens of which sample these are."""

            def __init__(self, model: None, tokenizer: None, sampling: models.Sampling, context: int):
                drawn = {name: value for name, value in vars(sampling).items() if value is not None}
                self.said = f"{drawn} {context}"

            def __call__(
                self, texts: Sequence[str], samples: int, tokens: int, key: Any
            ) -> list[list[tuple[str, bool]]]:
                return [[(f"<{self.said} {tokens} {sample}>", False) for sample in range(samples)] for _ in texts]

        def scored(prefixes: Sequence[str], suffixes: Sequence[str]) -> np.ndarray:
            return np.array([float(each.endswith("2>")) for each in suffixes])

        monkeypatch.setattr(compare_decoding, "load_decoder", lambda name: (None, None))
        monkeypatch.setattr(compare_decoding, "Writer", Said)
        options: Any = SimpleNamespace(
            model="", context=9, typical=0.5, top_p=0.6, samples=3, step=3, tokens=4, beams=2
        )
        nucleus = "<{'temperature': 1.0, 'top_p': 0.6} 9 "
        assert compare_decoding._ways(options, scored)("x", jax.random.key(0)) == {
            "greedy": "<{'temperature': 1.0, 'top_k': 1} 9 4 0>",
            "nucleus": f"{nucleus}4 0>",
            "typical": "<{'temperature': 1.0, 'typical': 0.5} 9 4 0>",
            "re-ranked": f"{nucleus}4 2>",
            "beam": f"{nucleus}3 2>{nucleus}1 2>",
        }

    def test_of_true_texts_is_nearest_to_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The controls: texts that are the true ones, ones of another kind, ones that repeat themselves."""
        monkeypatch.setattr(compare_decoding, "DRAWS", 2)
        draw = np.random.default_rng(0)
        features = {"true": draw.normal(size=(40, 4)), "nucleus": draw.normal(size=(40, 4)) + 4}
        features["same"] = features["true"]
        texts = {"true": ["a b c d"] * 40, "nucleus": ["a a a a a"] * 40, "same": ["a b c d"] * 40}
        scores = {name: {way: draw.normal(size=40) for way in texts} for name in ("ranker", "judge")}
        by = {line["way"]: line for line in compare_decoding.measured(texts, features, scores)}
        assert by["same"]["divergence"] > 0.99 > 0.1 > by["nucleus"]["divergence"]
        assert (by["nucleus"]["rep_3"], by["same"]["rep_3"]) == (pytest.approx(2 / 3), 0)
        assert "divergence" not in by["true"]
        ahead = scores["judge"]["same"] - scores["judge"]["nucleus"]
        assert by["same"]["judge_lead"] == pytest.approx([ahead.mean(), ahead.std(ddof=1) / 40**0.5])
        assert by["same"]["ranker"][0] == pytest.approx(scores["ranker"]["same"].mean())
