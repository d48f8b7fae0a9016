"""``python -m train.compare_compression``: each way to compress is what it says, and a table is taken up where it stopped."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ntk_prefix import compression, peft, prefixed_model
from ntk_prefix.checks import NonFiniteError, UsageError
from ntk_prefix.distillation import FITTED_RATE, UNFITTED_RATE
from ntk_prefix.models import from_pretrained
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.query_shares import rows_of
from tests.small_disk import largest_file
from tests.train.tiny_model import write_model
from train import compare_compression, compression_case, compressors
from train.compare_compression import Judge, Options, main
from train.compression_case import Case, Compressed, Layer, _pursued, seen_by_layers
from train.compression_table import Results
from train.compressors import METHODS, Method

WORDS = ["[UNK]", *(f"w{i}" for i in range(30))]
TOKENS, HEAD_DIM, HEADS = 24, 6, 4
"""Of the prompt; and of the model, which has one layer."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random decoder, prompts, texts that could follow, and others."""
    folder = tmp_path_factory.mktemp("compare")
    write_model(folder / "model", WORDS, num_hidden_layers=1)
    drawn = np.random.default_rng(0)
    (folder / "prompt.txt").write_text(" ".join(drawn.choice(WORDS[1:], TOKENS)))
    (folder / "other.txt").write_text("\n\n".join(" ".join(drawn.choice(WORDS[1:], 8)) for _ in range(4)))
    (folder / "texts.txt").write_text("\n".join(" ".join(drawn.choice(WORDS[1:], 7 + i % 4)) for i in range(24)))
    return folder


@pytest.fixture(scope="module")
def case(place: Path) -> Case:
    model = from_pretrained(place / "model", task="causal-lm")
    drawn = np.random.default_rng(1)
    prompt = jnp.asarray(drawn.integers(1, 31, TOKENS), jnp.int32)
    prefix, texts = prefixed_model.read_prompt(model, prompt), ids(8, 10)
    layers = seen_by_layers(model, prefix, texts)
    return Case(model, prefix, texts, layers, prompt, TOKENS, 0, steps=20, distil=20, distil_rate=0.1)


@pytest.fixture(scope="module")
def judge(case: Case) -> Judge:
    return Judge(case.model, dict(case.prefix), ids(4, 10, seed=2), ids(4, 10, seed=3))


def ids(rows: int, tokens: int, seed: int = 1) -> dict[str, Any]:
    found = jnp.asarray(np.random.default_rng(seed).integers(1, len(WORDS), (rows, tokens)), jnp.int32)
    return {"input_ids": found, "attention_mask": jnp.ones_like(found)}


def made(case: Case, method: str, size: int) -> Compressed:
    """What a method makes, once for all tests."""
    name = f"{method} for tests, {size}"
    if name not in case.known:
        case.known[name] = METHODS[method].make(case, size)
    assert case.known[name] is not None
    return case.known[name]


def states_of(found: Compressed) -> dict[str, PrefixState]:
    """What a method puts in the place of the prompt."""
    return cast(Any, found.attached).keywords["to"]


# ------------------------------------------------------------------------------------- the methods


def test_no_prompt_is_the_bare_model(case: Case, judge: Judge) -> None:
    found = judge.measure(made(case, "none", 0).attached)
    texts, model = ids(4, 10, seed=2), case.model
    with prefixed_model.attending(model, case.prefix):
        exact = jax.nn.log_softmax(model(**texts).logits)
    bare = jax.nn.log_softmax(model(**texts).logits)
    kl = np.asarray(jnp.sum(jnp.exp(exact) * (exact - bare), axis=-1))
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_median"] == pytest.approx(np.median(kl), rel=1e-4)
    assert found["agreement"] == np.mean(np.argmax(exact, axis=-1) == np.argmax(bare, axis=-1))
    assert found["unrelated"] == 0


@pytest.mark.parametrize("method", ["prompt", "last", "heaviest"])
def test_all_tokens_as_they_are_are_the_prompt(case: Case, judge: Judge, method: str) -> None:
    found = made(case, method, TOKENS)
    measured = judge.measure(found.attached)
    assert found.numbers == 2 * HEAD_DIM * TOKENS * HEADS
    assert abs(measured["kl"]) < 1e-6
    assert measured["agreement"] == 1
    assert abs(measured["unrelated"]) > 1e-3  # elsewhere the prompt is no use


@pytest.mark.parametrize("method", ["matching", "matching-omp"])
def test_attention_matching_with_all_keys_is_the_prompt(case: Case, judge: Judge, method: str) -> None:
    measured = judge.measure(made(case, method, TOKENS).attached)
    assert abs(measured["kl"]) < 1e-4
    assert judge.measure(made(case, method, 4).attached)["kl"] > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        # of the trained ones some are enough, within minutes
        pytest.param(name, marks=pytest.mark.slow if name in ("ours-distilled", "cartridge-random") else ())
        for name, method in METHODS.items()
        if method.sized
    ],
)
def test_a_method_keeps_its_budget_and_is_better_than_no_prompt(case: Case, judge: Judge, method: str) -> None:
    size = 8 if method == "lora" else 4  # one of rank 1 is as large as four anchors and a half
    found = made(case, method, size)
    room = size * (2 * HEAD_DIM + 1) * HEADS
    assert 0.4 * room < found.numbers <= 1.01 * room
    assert not peft.configs(case.model)  # it is left as it was
    nothing = judge.measure(made(case, "none", 0).attached)["kl"]
    # no promise of these two: their points are the prompt's last, or none
    assert judge.measure(found.attached)["kl"] < (1.5 if method in ("last", "taylor") else 1) * nothing


def test_states_of_the_same_shapes_are_compiled_once(case: Case, judge: Judge) -> None:
    judge.measure(made(case, "heaviest", 4).attached)
    before = prefixed_model.answers._cache_size()
    judge.measure(made(case, "matching", 4).attached)
    assert prefixed_model.answers._cache_size() == before
    judge.measure(made(case, "heaviest", 5).attached)
    assert prefixed_model.answers._cache_size() == before + 1


def test_tokens_are_the_first_ones_and_the_last_ones(case: Case) -> None:
    for path, state in states_of(made(case, "last", 7)).items():
        value = np.asarray(case.prefix[path].value).swapaxes(0, 1)
        kept = [*range(3), *range(TOKENS - 4, TOKENS)]
        np.testing.assert_array_equal(state.z, value[:, kept])
        # a layer with a window may have fewer than are asked for: all of them, each once
        fewer = states_of(made(case, "last", TOKENS + 3))[path]
        np.testing.assert_array_equal(fewer.z, value)


def test_the_heaviest_tokens_have_the_largest_shares_of_attention(case: Case) -> None:
    path, layer = next(iter(case.layers.items()))
    scores = np.einsum("kqh,kmh->kqm", layer.rows.query, layer.key) - np.asarray(layer.rows.log_total)[..., None]
    weight = np.mean(np.exp(2 * scores), axis=1)
    np.testing.assert_array_equal(case.heaviest[path], np.argsort(-weight, axis=1))
    # shares are of the whole denominator: the prompt's own part is what they add up to
    np.testing.assert_allclose(np.exp(scores).sum(axis=2), layer.rows.mass, rtol=1e-4)


def test_matching_pursuit_takes_the_key_that_correlates_most_with_the_mass_that_is_left(case: Case) -> None:
    path, layer = next(iter(case.layers.items()))
    scores = np.einsum("kqh,kmh->kqm", layer.rows.query, layer.key) - np.asarray(layer.rows.log_total)[..., None]
    shares, mass = np.exp(scores[0]).astype(np.float64), np.asarray(layer.rows.mass[0], np.float64)
    chosen: list[int] = []
    left = mass
    for _ in range(5):
        correlation = shares.T @ left
        correlation[chosen] = -np.inf
        chosen.append(int(np.argmax(correlation)))
        masses = np.maximum(np.linalg.lstsq(shares[:, chosen], mass, rcond=None)[0], 0)
        left = mass - shares[:, chosen] @ masses
    np.testing.assert_array_equal(case.pursued(path, 5)[0], chosen)


def test_matching_pursuit_of_a_budget_is_the_same_beside_larger_budgets(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are taken over by runs with other budgets."""
    monkeypatch.setattr(compression_case, "PURSUED", 1)
    path = next(iter(case.layers))
    order = case.heaviest[path][:, ::-1]  # so that it matters among which it searches
    monkeypatch.setattr(compression_case, "_heaviest", lambda layer: order)

    def pursued(size: int, most: int) -> np.ndarray:
        return dataclasses.replace(case, most=most, known={}).pursued(path, size)

    sizes, among_all = range(1, 5), pursued(TOKENS, TOKENS)
    for size in sizes:
        np.testing.assert_array_equal(pursued(size, size), pursued(size, TOKENS))
    # control: among more keys it finds others
    assert any((pursued(size, size) != among_all[:, :size]).any() for size in sizes)


@pytest.mark.parametrize("apart", [0, 1e-6, 1e-3])
def test_matching_pursuit_takes_keys_that_are_nearly_alike(apart: float) -> None:
    draws, (tokens, head_dim) = np.random.default_rng(0), (60, 8)
    key = draws.normal(size=(1, 1, head_dim)) + apart * draws.normal(size=(tokens, 1, head_dim))
    query, value = draws.normal(size=(1, 1000, 1, head_dim)), draws.normal(size=(tokens, 1, head_dim))
    query, key, value = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    scaled = jnp.moveaxis(key, 1, 0) / head_dim**0.25
    layer = Layer(rows_of(query, key, value), scaled, jnp.moveaxis(value, 1, 0), 1, None, None)
    (found,) = _pursued(layer, np.arange(tokens)[None], tokens)
    assert sorted(found) == [*range(tokens)]


def test_ours_lowers_what_is_fitted_at_least_as_far_as_attention_matching(case: Case) -> None:
    """At equal bytes: squared errors of heads, each times what an error there costs."""
    made(case, "ours", 4)
    cost, total = case.known["ours 4"].sensitivity, {}
    size = np.stack([jnp.sum(layer.rows.part**2, axis=(1, 2)) for layer in case.layers.values()])
    for method in ("ours", "matching", "matching-omp", "heaviest"):
        states = states_of(made(case, method, 4))
        relative = compression.errors(case.model, case.prefix, states, case.texts)
        total[method] = float(np.sum(cost * size * relative))
    assert total["ours"] <= min(total["matching"], total["matching-omp"])
    assert total["matching"] < total["heaviest"]  # the control: values that are not fitted


def test_a_cartridge_is_a_cache_of_as_many_tokens_that_is_trained(case: Case) -> None:
    start = prefixed_model.read_prompt(case.model, case.prompt[:4])
    for path, state in states_of(made(case, "cartridge", 4)).items():
        np.testing.assert_array_equal(state.k, 1)
        moved = np.asarray(state.z) - np.swapaxes(start[path].value, 0, 1)
        assert np.abs(moved).max() > 0.01
        assert np.linalg.norm(moved) < np.linalg.norm(start[path].value)


@pytest.mark.slow
def test_training_on_answers_lowers_the_divergence_from_where_it_starts(case: Case) -> None:
    """On the texts that are trained on."""
    told = Judge(case.model, dict(case.prefix), dict(case.texts), ids(4, 10, seed=3))
    fitted, trained = (told.measure(made(case, method, 4).attached)["kl"] for method in ("ours", "ours-distilled"))
    assert trained < 0.9 * fitted


def test_a_state_of_query_heads_has_each_heads_own_queries(case: Case) -> None:
    layer = next(iter(case.layers.values()))
    grouped = layer._replace(rows=type(layer.rows)(*(x[:2] for x in layer.rows)), heads=4, key=layer.key[:2])
    parted = grouped.by_query_head().rows.query
    np.testing.assert_array_equal(parted[1], grouped.rows.query[0, 1::2])
    np.testing.assert_array_equal(parted[2], grouped.rows.query[1, ::2])


# ------------------------------------------------------------------------------------- the program


def options(place: Path, out: Path, **changes: Any) -> Options:
    given: dict[str, Any] = {
        "model": str(place / "model"),
        "prompts": (place / "prompt.txt",),
        "queries": (place / "texts.txt",),
        "unrelated": str(place / "other.txt"),
        "methods": ("none", "taylor", "heaviest"),
        "budgets": (3, 6),
        "fitted": 4,
        "held_out": 4,
        "unrelated_texts": 4,
        "tokens": 10,
        "out": out,
    }
    return Options(**given | changes)


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_rows_become_a_table_and_a_figure_and_are_taken_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise NonFiniteError("expected a state that float32 holds, got one beyond it.")

    # one row that cannot be: the others go on
    monkeypatch.setitem(METHODS, "taylor", Method("Taylor", fails, sized=False))
    lines = main(options(place, tmp_path, seeds=2), Console(quiet=True))
    rows = rows_in(tmp_path)
    assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [
        (method, budget, seed)
        for seed in range(2)
        for method, budget in (("none", 0), ("taylor", 0), ("heaviest", 3), ("heaviest", 6))
    ]
    named = {(line["method"], line["budget"]): line for line in lines}
    assert named["heaviest", 6]["kl"] == pytest.approx(
        np.mean([row["kl"] for row in rows if row.get("numbers") == 288])
    )
    assert named["none", 0]["on_front"]
    table = (tmp_path / "table.md").read_text()
    assert "| **no prompt** | 0 | 0 |" in table
    assert "| - | Taylor | - | - | failed |" in table
    assert "Taylor at 0, prompt: expected a state that float32 holds" in table
    assert {"versions", "git", "options"} <= json.loads((tmp_path / "settings.json").read_text()).keys()
    assert (tmp_path / "pareto.png").stat().st_size > 10_000

    def nothing(*_: Any) -> Any:
        raise AssertionError("what is finished is run again")

    monkeypatch.setattr(compare_compression, "draw", lambda *_, **__: Figure())  # once is enough
    with monkeypatch.context() as patch:
        patch.setattr(compare_compression, "_case", nothing)
        assert main(options(place, tmp_path, seeds=2), Console(quiet=True)) == lines
        assert len(main(options(place, tmp_path, methods=("none",)), Console(quiet=True))) == 1
        # steps of a descent are nothing to what does not descend
        assert main(options(place, tmp_path, seeds=2, steps=7, distil=7), Console(quiet=True)) == lines
        # another draw of lengths is another measurement; so is a method that is asked for anew
        for changes in ({"tokens": 9}, {"again": ("heaviest",)}):
            with pytest.raises(AssertionError, match="run again"):
                main(options(place, tmp_path, **changes), Console(quiet=True))
    assert rows_in(tmp_path) == rows

    # the process ended within a line: that row is measured again, and is what it was
    content = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(content[: content.rindex(b'"kl"')])
    assert main(options(place, tmp_path, seeds=2), Console(quiet=True))[-1]["kl"] == lines[-1]["kl"]
    assert [row.get("kl") for row in rows_in(tmp_path)] == [row.get("kl") for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": 3}\n' + content)
    with pytest.raises(UsageError, match="line 1: expected a row of results"):
        main(options(place, tmp_path), Console(quiet=True))


def test_a_folder_that_was_only_begun_is_new(place: Path, tmp_path: Path) -> None:
    """By a run that was killed before it could say whose the folder is."""
    for name in (".lock", ".settings.json.12.new"):
        (tmp_path / name).touch()
    options(place, tmp_path).check()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="--out: expected a new folder, or one of this program"):
        options(place, tmp_path).check()


def test_rows_that_stand_before_a_broken_line_stay_where_the_disk_is_full(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "method": "none",
        "budget": 0,
        "settings": "s",
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "git": "g",
    }
    whole = "".join(json.dumps(row | {"seed": seed}) + "\n" for seed in range(9))
    (tmp_path / "rows.jsonl").write_text(whole + '{"prompt": ')
    with largest_file(200), pytest.raises(OSError, match="File too large"):
        Results(tmp_path / "rows.jsonl")
    assert len(Results(tmp_path / "rows.jsonl").rows) == 9
    assert (tmp_path / "rows.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"steps": 7}, {"ours", "ours-distilled"}),
        ({"distil": 7}, {"ours-distilled", "cartridge", "cartridge-random", "lora"}),
        ({"distil_rate": 0.1}, {"ours-distilled", "cartridge", "cartridge-random", "lora"}),
        ({"fitted": 5}, set(METHODS)),
    ],
)
def test_an_option_makes_the_rows_anew_that_depend_on_it(
    place: Path, tmp_path: Path, changed: dict[str, Any], again: set[str]
) -> None:
    inputs = compare_compression.Inputs("prompt", np.arange(3), {"input_ids": np.ones((2, 2))})
    before, after = (
        {method: compare_compression._hash(options(place, tmp_path, **given), inputs, {}, method) for method in METHODS}
        for given in ({}, changed)
    )
    assert {method for method in METHODS if before[method] != after[method]} == again


def test_what_begins_as_a_fit_is_trained_with_a_lower_rate_unless_one_is_given(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def asked(*_: Any, learning_rate: float, **__: Any) -> Any:
        rates.append(learning_rate)
        raise InterruptedError

    for name in ("distil", "distil_states"):
        monkeypatch.setattr(compressors, name, asked)
    for given in (None, 0.1):
        for method in ("ours-distilled", "cartridge", "cartridge-random", "lora"):
            with pytest.raises(InterruptedError):
                METHODS[method].make(dataclasses.replace(case, distil_rate=given), 4)
    assert rates == [FITTED_RATE, *[UNFITTED_RATE] * 3, *[0.1] * 4]
    assert FITTED_RATE < UNFITTED_RATE


def test_other_weights_under_the_same_name_make_all_rows_anew(place: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", WORDS, num_hidden_layers=1)
    given = options(place, tmp_path / "out", model=str(tmp_path / "model"))
    inputs = compare_compression.Inputs("prompt", np.arange(3), {"input_ids": np.ones((2, 2))})

    def known() -> str:
        compare_compression._weights.cache_clear()  # as in another process
        return compare_compression._hash(given, inputs, {}, "none")

    before = known()
    assert known() == before
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 0))
    assert known() != before


def test_an_encoder_is_compared_by_its_hidden_states(place: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "bert", WORDS, kind="bert", num_hidden_layers=1)
    given = {"model": str(tmp_path / "bert"), "methods": ("none", "prompt")}
    lines = main(options(place, tmp_path / "out", **given), Console(quiet=True))
    none, whole = (line["kl"] for line in sorted(lines, key=lambda line: line["numbers"]))
    assert whole < 1e-9 < 1e-3 < none
    assert all(line["agreement"] is None for line in lines)
    assert "error" in (tmp_path / "out" / "table.md").read_text()


def test_standard_errors_are_of_texts_and_not_of_tokens() -> None:
    means = np.random.default_rng(0).normal(size=9)
    mean, error = compare_compression._clustered([np.full(50, each) for each in means])
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("none", "gzip")}, "--methods: expected among none, prompt, .*, got gzip"),
        ({"again": ("gzip",)}, "--again: expected among"),
        ({"budgets": (TOKENS + 1,)}, f"--budgets: expected at most the {TOKENS} tokens"),
        ({"budgets": (0,)}, "--budgets: expected at least 1"),
        ({"budgets": ()}, "--budgets: expected at least one"),
        ({"budgets": (3, 6, 3)}, "--budgets: expected each once, got 3, 6, 3"),
        ({"methods": ("none", "none")}, "--methods: expected each once"),
        ({"methods": ("none",), "again": ("heaviest",)}, "--again: expected some of --methods, got heaviest"),
        ({"distil": -1}, "--distil: expected at least 0"),
        ({"prompts": ("empty.txt",)}, "--prompts: expected some text"),
        ({"prompts": ("none.txt",)}, "--prompts: .*expected an existing file"),
        ({"prompts": ("prompt.txt", "again/prompt.txt")}, "--prompts: expected files of different names"),
        ({"queries": ("empty.txt",)}, "--queries: expected some text"),
        ({"fitted": 40}, "--queries: expected at least 44 texts"),
        ({"fitted": 1, "tokens": 4, "budgets": (5,)}, "--queries: expected at least 5 tokens"),
        ({"unrelated": "none.txt"}, "--unrelated: expected"),
        ({"unrelated": "words.txt"}, "--unrelated: expected at least 1 texts of 2 tokens or more, got 0"),
        ({"model": "no-such-model"}, "--model: expected"),
        ({"out": "."}, "--out: expected a new folder"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(place: Path, tmp_path: Path, changes: Any, message: str) -> None:
    (place / "empty.txt").write_text(" \n")
    (place / "words.txt").write_text("w1\n\nw2\n\nw3")
    if changes.get("unrelated") == "words.txt":
        changes = {"unrelated": str(place / "words.txt")}
    for field in ("prompts", "queries"):
        if field in changes:
            changes = changes | {field: tuple(place / name for name in changes[field])}
    given = changes | ({"out": place} if "out" in changes else {})
    with pytest.raises(UsageError, match=message):
        main(options(place, given.pop("out", tmp_path / "out"), **given), Console(quiet=True))
    assert not (tmp_path / "out").exists()
