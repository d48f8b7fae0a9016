"""The task ``ranking``: pairs out of documents, the loss on any devices, runs that go on, adapters that rank."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.training import Trainer
from tests.train.tiny_model import write_model
from train import loop, ranking, setup, tasks
from train.config import CONFIGS, METHODS, DataConfig, TrainConfig
from train.data import Dataset
from train.ranking_data import cut, encoded, pairs, read_generated

WORDS = ("[UNK]", "[PAD]", "pre", "suffi", ".", *"abcdefghijklmnopqrstuvwxyz")
ROWS = 16


def document(seed: int, sentences: int = 12, letters: int = 6) -> str:
    """Sentences of five words, of letters that are this document's."""
    draw = np.random.default_rng(seed)
    own = draw.choice([*"abcdefghijklmnopqrstuvwxyz"], letters, replace=False)
    return " ".join(" ".join(draw.choice(own, 4)) + f" {own[0]}." for _ in range(sentences))


class TestACut:
    TEXT = document(0, 30)

    def test_is_where_a_sentence_begins_and_the_others_touch_neither(self) -> None:
        pair = cut(self.TEXT, 20, 10)
        assert pair is not None
        words = self.TEXT.split()
        both = f"{pair.prefix} {pair.suffix}"
        assert both in self.TEXT
        assert pair.prefix.endswith(".")
        assert [len(each.split()) for each in (pair.prefix, pair.suffix)] == [20, 10]
        assert len(pair.others) == 9
        for other in pair.others:
            assert len(other.split()) == 10
            assert other in self.TEXT
            assert other not in both
        # spans that have a word in common with the pair would be told by that word
        first = next(i for i in range(len(words)) if " ".join(words[i : i + 30]) == both)
        left = " ".join(words[:first]), " ".join(words[first + 30 :])
        assert all(any(other in part for part in left) for other in pair.others)

    def test_is_a_function_of_the_text(self) -> None:
        assert cut(self.TEXT, 20, 10) == cut(self.TEXT, 20, 10)
        cuts = {cut(document(seed, 30), 20, 10).prefix.count(" ") for seed in range(3)}
        assert cuts == {19}

    def test_of_a_short_text_is_short_or_none(self) -> None:
        pair = cut(document(0, 4), 20, 10)
        assert pair is not None
        assert pair.others == ()
        assert cut("a b c", 20, 10) is None
        assert cut("", 2, 2) is None

    def test_of_a_text_without_sentences_is_between_words(self) -> None:
        pair = cut("a b c d e f g h i j", 4, 2)
        assert pair is not None
        assert f"{pair.prefix} {pair.suffix}" in "a b c d e f g h i j"

    def test_of_documents_too_short_is_refused(self) -> None:
        with pytest.raises(UsageError, match="ours: expected documents of 15 words or more, got none so long"):
            pairs("ours", {"text": ["a b"]}, 27, 13)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("encoder"), WORDS, ("[PAD]",), kind="bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document(seed)}) + "\n" for seed in range(60)))
    return file


@pytest.fixture(scope="module")
def config(folder: Path, documents: Path) -> TrainConfig:
    return CONFIGS["ranking"][1].changed(
        model=str(folder),
        data_dir=str(documents),
        method="lora",
        max_length=16,
        suffix_length=8,
        validation_size=8,
        test_size=8,
        batch_size=ROWS,
        grouped=1,
        steps=4,
        evaluate_every=2,
        checkpoint_every=2,
        learning_rate=1e-2,
        devices=1,
    )


class TestATask:
    COMMON: ClassVar[dict[str, Any]] = {"max_length": 16, "suffix_length": 8, "validation_size": 8}

    def test_has_documents_or_pairs_of_a_users(self, documents: Path, tmp_path: Path) -> None:
        task = tasks.load("ranking", DataConfig(**self.COMMON, data_dir=str(documents), negatives=2))
        assert task.metric == "identification"
        assert task.train["candidates"].shape == (task.train.rows, 3)
        assert task.test["candidates"].shape[1] == 1 + 9 + 9
        assert not {*task.train["prefix"]} & {*task.test["prefix"]}
        file = tmp_path / "pairs.jsonl"
        rows = [{"prefix": f"a {i}", "suffix": f"b {i}"} for i in range(20)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = tasks.load("ranking", DataConfig(data_dir=str(file), validation_size=2))
        for prefix, texts in zip(own.train["prefix"], own.train["texts"], strict=True):
            assert texts == [prefix.replace("a", "b")]
        assert own.train["candidates"].tolist() == [[1, 0]] * own.train.rows

    def test_has_what_was_written_behind_its_prefixes(self, documents: Path, tmp_path: Path) -> None:
        file = tmp_path / "written.jsonl"
        common = {**self.COMMON, "data_dir": str(documents)}
        bare = tasks.load("ranking", DataConfig(**common))
        prefixes = [*bare.train["prefix"], *bare.test["prefix"]]
        lines = [json.dumps({"prefix": prefix, "generated": ["x y", "z"]}) + "\n" for prefix in prefixes]
        file.write_text("".join(lines) + '{"prefix": "cut o')  # stopped while it was written
        task = tasks.load("ranking", DataConfig(**common, generated=str(file), generated_negatives=1))
        assert all(texts[-1] == "x y" for texts in task.train["texts"])
        assert all(texts[-2:] == ["x y", "z"] for texts in task.test["texts"])
        assert len(read_generated(file)) == len(prefixes)
        assert not (task.validation["candidates"] == 3).any()
        # a run that is only measured on them needs none of its training rows
        file.write_text("".join(lines[-bare.test.rows :]))
        task = tasks.load("ranking", DataConfig(**common, generated=str(file)))
        assert (task.test["candidates"] == 3).sum() == 2 * bare.test.rows
        with pytest.raises(UsageError, match="what was written behind prefixes of this run"):
            tasks.load("ranking", DataConfig(**common, generated=str(file), generated_negatives=1))
        file.write_text("\n" + lines[0].replace('["x y", "z"]', '"x y"'))
        with pytest.raises(UsageError, match="line 2: expected"):
            read_generated(file)
        file.write_text(lines[0] + "{}\n" + lines[1])
        with pytest.raises(UsageError, match="line 2: expected"):
            read_generated(file)
        file.write_text(lines[0])
        with pytest.raises(UsageError, match="what was written behind prefixes of this run"):
            read_generated(file, ["another"])

    def test_refuses_what_would_be_another_loss(self, config: TrainConfig, folder: Path) -> None:
        with pytest.raises(UsageError, match="--accumulate: expected 1 for a ranking"):
            setup.build(config.changed(accumulate=2))
        with pytest.raises(UsageError, match="--generated beside it"):
            config.changed(generated_negatives=1)
        with pytest.raises(UsageError, match="--temperature"):
            config.changed(temperature=0.0)
        # a file that is read at the end is looked at before a step is taken
        with pytest.raises(UsageError, match="expected a column prefix"):
            setup.build(config.changed(human=config.data.data_dir))


# ----------------------------------------------------------------------------------------------- loss


def batch_of(rows: int, each: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    kinds = np.ones((rows, each), np.int8)
    kinds[::3, -1] = 0  # some have one less
    mask = np.ones((rows, each, tokens), np.int32) * (kinds > 0)[:, :, None]
    mask[1::2, :, -1] = 0
    return {
        "input_ids": draw.integers(2, len(WORDS), (rows, 6)).astype(np.int32),
        "attention_mask": np.ones((rows, 6), np.int32),
        "candidate_ids": draw.integers(2, len(WORDS), (rows, each, tokens)).astype(np.int32),
        "candidate_mask": mask.astype(np.int32),
        "candidates": kinds,
        "pair": np.array([0, 0, *range(2, rows)], np.int32),  # the first two are one row
        "weight": (np.arange(rows) != 2).astype(np.float32),  # one only fills the batch
    }


def written_out(model: Callable[..., Any], batch: dict[str, np.ndarray], temperature: float) -> float:
    """The formula, a row at a time."""

    def unit(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        vector = np.asarray(model(jnp.asarray(ids[None]), jnp.asarray(mask[None])).logits, np.float64)[0]
        return vector / np.linalg.norm(vector)

    rows, each = batch["candidates"].shape
    suffixes = {
        (j, c): unit(batch["candidate_ids"][j, c], batch["candidate_mask"][j, c])
        for j in range(rows)
        for c in range(each)
        if batch["candidates"][j, c]
    }
    total = 0.0
    for i in range(rows):
        prefix = unit(batch["input_ids"][i], batch["attention_mask"][i])
        same = batch["pair"] == batch["pair"][i]
        scores = {
            jc: prefix @ s / temperature
            for jc, s in suffixes.items()
            if not (same[jc[0]] and jc[0] != i and jc[1] == 0)
        }
        total += batch["weight"][i] * (np.logaddexp.reduce([*scores.values()]) - scores[i, 0])
    return total


class TestTheLoss:
    def test_is_the_formula_and_counts_no_true_suffix_among_the_others(self, folder: Path) -> None:
        ranker = models.load_ranker(folder)
        run = nnx.jit(lambda model, *inputs: model(*inputs))
        batch = batch_of(4, 2, 5)
        found = ranking.contrastive_loss(ranker, jax.tree.map(jnp.asarray, batch), 0.1)
        ours = written_out(lambda *inputs: run(ranker, *inputs), batch, 0.1)
        assert float(found) == pytest.approx(ours, rel=1e-5)
        apart = {**batch, "pair": np.arange(4, dtype=np.int32)}
        assert float(ranking.contrastive_loss(ranker, jax.tree.map(jnp.asarray, apart), 0.1)) > float(found) + 1e-3

    def test_of_eight_devices_is_that_of_one(self, config: TrainConfig) -> None:
        """By shards of one program, and in replicas; with replicas that see their own rows alone it is another."""
        batch, size = batch_of(ROWS, 2, 5), {"batch_size": ROWS}

        def step(**device: Any) -> tuple[float, Any]:
            own = config.changed(**size, **device)
            model = setup.load_model(own, Path(own.model), "ranking", 0)
            setup.adapt(model, own, {})
            trainer = setup.trainer_of(own, "ranking", setup.placement_of(own, jax.devices()))
            state, metrics = trainer.stepper(model)(trainer.init(model), trainer.place(batch))
            return float(metrics["loss"]), jax.tree.map(np.asarray, trainer.single(state.trained))

        loss, trained = step()
        for device in ({"devices": 8}, {"devices": 8, "parallel": "pmap"}):
            other, theirs = step(**device)
            assert other == pytest.approx(loss, rel=1e-6), device
            for ours, same in zip(jax.tree.leaves(trained), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(same, ours, atol=1e-5)
        with pytest.MonkeyPatch.context() as patch:
            whole = ranking.contrastive_loss
            patch.setattr(setup, "contrastive_loss", lambda m, b, t, axis: whole(m, b, t, None))
            assert step(devices=8, parallel="pmap")[0] < loss - 0.1

    @pytest.mark.parametrize("method", METHODS)
    def test_can_be_descended_by_every_method(self, method: str, folder: Path, config: TrainConfig) -> None:
        own = config.changed(method=method)
        model: Any = models.load_ranker(folder, cosine=True)
        model.tokenizer = nnx.static(None)
        batch = batch_of(4, 2, 5)
        shape = jax.ShapeDtypeStruct(batch["input_ids"].shape, np.int32)
        setup.adapt(model, own, {"input_ids": shape, "attention_mask": shape})
        trainer: Trainer = setup.trainer_of(own, "ranking", {})
        state = jax.eval_shape(trainer.init, model)
        after, metrics = jax.eval_shape(trainer.update(model), state, trainer.frozen(model), batch)
        assert metrics["loss"].shape == ()
        assert jax.tree.structure(after) == jax.tree.structure(state)
        # W is trained too, and has no bias
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.trained)]
        assert len([path for path in paths if "head" in path]) == 1, paths


# ------------------------------------------------------------------------------------- identification


def split_of(rows: int, same: int) -> Dataset:
    columns = {
        "prefix": [f"p{i}" for i in range(rows)],
        "suffix": [f"s{i}" for i in range(rows)],
        "others": [[f"o{i}" for i in range(same)]] * rows,
    }
    return Dataset(encoded(None, columns, (8, 8), (9, 9), {}))


class TestIdentification:
    def test_is_of_a_true_suffix_among_nine_others(self) -> None:
        for kind, rows in ranking.ten(split_of(30, 4)).items():
            for row, candidates in enumerate(rows):
                assert candidates[0] == (row, 0)
                assert len(set(candidates)) == 10
                own = [place for other, place in candidates[1:] if other == row]
                assert own == ([] if kind == "random" else [1, 2, 3, 4])
        assert set(ranking.ten(split_of(30, 0))) == {"random"}
        with pytest.raises(UsageError, match="at least two rows of different suffixes in a split, got 1 of one suffix"):
            ranking.ten(split_of(1, 4))

    def test_has_no_true_suffix_among_the_others(self) -> None:
        """Of documents that are there twice, and a decoder that says what the author did."""
        columns = {
            "prefix": [f"p{i}" for i in range(20)],
            "suffix": [f"s{i // 2}" for i in range(20)],
            "others": [[]] * 20,
        }
        split = Dataset(encoded(None, columns, (8, 8), (9, 9), {f"p{i}": [f"s{i // 2}", "x"] for i in range(20)}))
        assert split["pair"].tolist() == [i // 2 * 2 for i in range(20)]
        for kind, rows in ranking.ten(split).items():
            for row, (_, *others) in enumerate(rows):
                texts = [split["texts"][other][place] for other, place in others]
                assert len(texts) == 9
                assert split["texts"][row][0] not in texts, kind
                assert ("x" in texts) == (kind == "generated")

    def test_is_right_if_the_true_one_is_above_all_others(self) -> None:
        split, draw = split_of(1000, 9), np.random.default_rng(0)
        known = ranking.identification(split, lambda _, row, some: np.array([each == (row, 0) for each in some], float))
        assert {kind: right.mean() for kind, right in known.right.items()} == {"random": 1, "same document": 1}
        # one that says nothing is never right, one that guesses in a tenth of the cases
        assert not ranking.identification(split, lambda _, row, some: np.zeros(len(some))).right["random"].any()
        guessed = ranking.identification(split, lambda _, row, some: draw.normal(size=len(some)))
        assert guessed.right["random"].mean() == pytest.approx(0.1, abs=0.03)
        even = ranking.identification(split, lambda _, row, some: np.zeros(len(some)), 0.1)
        assert even.loss["random"] == pytest.approx(np.log(10))

    def test_by_an_encoder_is_by_the_products_of_each_prefix(self) -> None:
        """One that counts letters, of rows of a letter each: it knows them all, whatever it is asked of first."""
        tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        letters = [*"abcdefghijklmnopqrst"]
        columns = {
            "prefix": letters,
            "suffix": [f"{letter} " * 3 for letter in letters],
            "others": [["u v w x y z"]] * 20,
        }
        split = Dataset(encoded(tokenizer, columns, (8, 8), (1, 0), {}))

        def counts(batch: Any) -> np.ndarray:
            rows = zip(np.asarray(batch["input_ids"]), np.asarray(batch["attention_mask"]), strict=True)
            return np.stack([np.bincount(ids[mask > 0], minlength=len(WORDS))[5:] for ids, mask in rows])

        by = ranking.by_encoder(counts, split, 7, 1.0)
        assert {kind: right.all() for kind, right in by.right.items()} == {"random": True, "same document": True}
        product = ranking.by_encoder(counts, split, 7, 1.0, cosine=False)
        # true suffixes have a product of 3, or a cosine of 1, and all others of 0
        assert product.loss["random"] == pytest.approx(np.log(1 + 9 * np.exp(-3)))
        assert by.loss["random"] == pytest.approx(np.log(1 + 9 * np.exp(-1)))

    def test_is_compared_row_by_row(self) -> None:
        rows, draw = 4000, np.random.default_rng(0)
        hard = draw.uniform(size=(2, rows))

        def run(skill: float) -> dict[str, str]:
            right = {kind: row < skill for kind, row in zip(("random", "generated"), hard, strict=True)}
            return ranking.Identification(right, {}).summary()["right"]

        ahead, error = ranking.lead([run(0.58), run(0.62)], run(0.5)) or (0, 0)
        shares = np.mean([np.mean(hard < skill, axis=0) for skill in (0.58, 0.62)], axis=0) - np.mean(
            hard < 0.5, axis=0
        )
        assert (ahead, error) == pytest.approx((shares.mean(), shares.std(ddof=1) / rows**0.5))
        assert abs(ahead - 0.1) < 3 * error
        # alone each has an error of its own, and what they share is in neither difference
        assert error < 0.7 * (2 * 0.25 / (2 * rows)) ** 0.5
        assert ranking.lead([run(0.5)], run(0.5)) == (0, 0)
        for runs, other in (([None], run(0.5)), ([run(0.5)], None), ([], run(0.5)), ([{"random": "01"}], run(0.5))):
            assert ranking.lead(runs, other) is None


# ----------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def unbroken(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with jax.enable_x64(False):
        workdir = tmp_path_factory.mktemp("unbroken")
        loop.run(config, workdir)
    return workdir


class TestARun:
    def test_says_what_it_identifies(self, unbroken: Path) -> None:
        summary = json.loads((unbroken / "summary.json").read_text())
        assert summary["metric"] == "identification"
        assert set(summary["identification"]) == {"random", "same document"}
        for kind, right in summary["right"].items():
            assert len(right) == summary["test_rows"]
            assert right.count("1") / len(right) == pytest.approx(summary["identification"][kind])
        assert summary["test_score"] == pytest.approx(np.mean([*summary["identification"].values()]))
        assert summary["agreement"] is None

    def test_goes_on_bit_for_bit(self, config: TrainConfig, unbroken: Path, tmp_path: Path) -> None:
        """Steps that are added later do not come with another schedule here: it is asked to stop."""

        class Asked(loop.Signals):
            def __enter__(self) -> "Asked":
                self.received = True
                return self

            def __exit__(self, *_: object) -> None:
                pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "Signals", Asked)
            for step in (1, 2):
                with pytest.raises(loop.Interrupted, match=f"step {step} of 4"):
                    loop.run(config, tmp_path)
        loop.run(config, tmp_path)
        ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (tmp_path, unbroken))
        np.testing.assert_equal(ours, theirs)
        assert not np.array_equal(
            ours["base_model.model.head.weight"], np.eye(len(ours["base_model.model.head.weight"]))
        )

    def test_leaves_an_adapter_that_ranks_by_cosines(self, config: TrainConfig, unbroken: Path, folder: Path) -> None:
        adapter = unbroken / "adapter"
        ranker, frozen = models.load_ranker(folder, adapter=adapter), models.load_ranker(folder)
        assert ranker.cosine
        assert not any("bias" in key for key in load_file(adapter / "adapter_model.safetensors") if "head" in key)
        prefixes, suffixes = ["a b c", "d e f"], ["b c .", "x y"]
        scores = ranker.score(prefixes, suffixes)
        found = [ranker.encode_prefixes(prefixes), ranker.encode_suffixes(suffixes)]
        np.testing.assert_allclose([np.linalg.norm(each, axis=1) for each in found], 1, rtol=1e-5)
        np.testing.assert_allclose(scores, np.sum(found[0] * found[1], axis=1), rtol=1e-5)
        assert not np.allclose(scores, models.load_ranker(folder, cosine=True).score(prefixes, suffixes), atol=1e-3)
        # an inner product if it is asked for
        inner = models.load_ranker(folder, adapter=adapter, cosine=False).score(prefixes, suffixes)
        assert not np.allclose(inner, scores, atol=1e-3)
        peft.activate(ranker, None)
        plain = frozen.encode_prefixes(prefixes)
        plain /= np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(ranker.encode_prefixes(prefixes), plain, rtol=1e-4, atol=1e-5)

    def test_learns_what_is_in_the_pairs(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Documents of two letters each. The control: training pairs that are of two documents."""
        file = tmp_path / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": document(seed, letters=2)}) + "\n" for seed in range(300)))
        own = config.changed(data_dir=str(file), negatives=0, validation_size=40, test=False)
        own = own.changed(steps=20, evaluate_every=20, checkpoint_every=20)
        learned = loop.run(own, tmp_path / "true")["validation_loss"]
        load = tasks.load

        def mixed(*arguments: Any, **options: Any) -> tasks.Task:
            task = load(*arguments, **options)
            columns = {
                name: np.roll(column, 1, axis=0) if name.startswith("candidate") else column.copy()
                for name, column in task.train.items()
            }
            return dataclasses.replace(task, train=dataclasses.replace(task.train, columns=columns))

        monkeypatch.setattr(tasks, "load", mixed)
        assert learned < loop.run(own, tmp_path / "mixed")["validation_loss"] - 0.5
