"""``python -m train.compress``: a prompt in, an adapter and a report out."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ntk_prefix import anchor_fit, compression, peft, prefixed_model
from ntk_prefix.artifacts import held
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.models import from_pretrained
from ntk_prefix.peft.sites import attention_sites
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.typing import Array
from tests.train.tiny_model import write_model
from train import compress
from train.compress import Options, main
from train.prompts import padded

WORDS = ["[UNK]", *(f"w{i}" for i in range(30))]
TOKENS, POSITIONS, WINDOW = 40, 64, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer decoder, a prompt and texts that could follow it."""
    folder = tmp_path_factory.mktemp("compress")
    write_model(folder / "model", WORDS, max_position_embeddings=POSITIONS)
    write_model(folder / "windowed", WORDS, max_position_embeddings=POSITIONS)
    config = json.loads((folder / "windowed" / "config.json").read_text())
    mistral = {"model_type": "mistral", "sliding_window": WINDOW, "num_key_value_heads": 4}
    (folder / "windowed" / "config.json").write_text(json.dumps(config | mistral))
    drawn = np.random.default_rng(0)
    (folder / "prompt.txt").write_text(" ".join(drawn.choice(WORDS[1:], TOKENS)))
    lines = [" ".join(drawn.choice(WORDS[1:], 9 + i % 4)) for i in range(24)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n\n")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def options(place: Path, **changes: Any) -> Options:
    given = {"queries": place / "texts.txt", "budget": 6, "steps": 20, "held_out": 0.25} | changes
    return Options(model=str(place / "model"), prompt=place / "prompt.txt", **given)


def test_the_adapter_is_nearly_the_prompt_and_loads_elsewhere(place: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    main(options(place, out=tmp_path / "out"), Console(file=said, width=400))
    assert f"reach over {TOKENS + 128} positions, and the model was trained on {POSITIONS}" in said.getvalue()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prompt_tokens"] == TOKENS
    assert np.sum(report["anchors"]) <= 6 * np.size(report["anchors"])
    assert report["texts"] == {"fitted": 18, "held_out": 6}
    assert report["kl"]["mean"] < 0.35 * report["kl_without_prompt"]["mean"]
    assert report["agreement"] >= report["agreement_without_prompt"]
    assert 0 <= report["bounds"]["agreement_at_least"] < report["agreement"]
    assert np.shape(report["held_out_error"]) == np.shape(report["error"])
    assert np.mean(report["error"]) < np.mean(report["held_out_error"]) < 1
    assert {"versions", "git", "options"} <= report.keys()
    assert "data:image/png;base64," in (tmp_path / "out" / "index.html").read_text()

    fresh = from_pretrained(place / "model", task="causal-lm")
    texts = jnp.asarray(np.random.default_rng(1).integers(1, len(WORDS), (2, 8)), jnp.int32)
    prompt = jnp.asarray(ids_of((place / "prompt.txt").read_text()), jnp.int32)
    # the real thing: prompt and text in one sequence
    whole = jnp.concatenate([jnp.broadcast_to(prompt, (2, TOKENS)), texts], axis=1)
    exact, bare = fresh(whole).logits[:, TOKENS:], fresh(texts).logits
    peft.load_adapter(fresh, tmp_path / "out" / "adapter")
    ours = fresh(texts).logits
    assert jnp.linalg.norm(ours - exact) < 0.5 * jnp.linalg.norm(bare - exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_adapter_in_fewer_bytes_is_the_one_that_the_report_is_about(place: Path, tmp_path: Path, dtype: Any) -> None:
    given, reports = options(place, budget=10, steps=0, out=tmp_path / "wide"), {}
    for each in (given, dataclasses.replace(given, out=tmp_path / "narrow", dtype=dtype)):
        main(each, Console(quiet=True))
        reports[each.dtype] = json.loads((each.out / "report.json").read_text())
    wide, narrow = reports["float32"], reports[dtype]
    assert narrow["adapter_bytes"] < 0.75 * wide["adapter_bytes"]  # names and shapes take the same room
    model = from_pretrained(place / "model", task="causal-lm")
    prefix = prefixed_model.read_prompt(model, jnp.asarray(ids_of((place / "prompt.txt").read_text()), jnp.int32))
    lines = (place / "texts.txt").read_text().split("\n")[:-2]
    texts = compress._split(padded([ids_of(line) for line in lines], given.tokens), given)[1]
    with prefixed_model.attending(model, prefix):
        exact = jax.nn.log_softmax(jnp.asarray(model(**texts).logits))
    peft.load_adapter(model, tmp_path / "narrow" / "adapter")
    ours, seen = jax.nn.log_softmax(model(**texts).logits), texts["attention_mask"]
    kl = jnp.sum(seen * jnp.sum(jnp.exp(exact) * (exact - ours), axis=-1)) / jnp.sum(seen)
    assert kl == pytest.approx(narrow["kl"]["mean"], rel=1e-4)
    assert abs(wide["kl"]["mean"] / narrow["kl"]["mean"] - 1) > 1e-3


def test_a_dtype_that_does_not_hold_the_adapter_is_said_and_another_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compress.compress

    def heavy(*args: Any, **named: Any) -> Any:
        found = plain(*args, **named)
        states = {path: dataclasses.replace(state, k=state.k * 1e5) for path, state in found.states.items()}
        return dataclasses.replace(found, states=states)

    monkeypatch.setattr(compress, "compress", heavy)
    given = options(place, steps=0, out=tmp_path / "out", dtype="float16")
    with pytest.raises(
        UsageError, match=r"--dtype: expected one that holds .* got float16. The same command with --dtype bf"
    ):
        main(given, Console(quiet=True))

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what was fitted is fitted again")

    monkeypatch.setattr(compression, "fit_chosen", again)
    main(dataclasses.replace(given, dtype="bfloat16"), Console(quiet=True))


def test_the_prefix_behind_which_texts_begin_at_zero_is_the_prompt(place: Path) -> None:
    """Exactly: keys are read at negative positions, and only differences count."""
    model = from_pretrained(place / "model", task="causal-lm")
    prompt, text = (jnp.asarray([[*range(a, b)]], jnp.int32) for a, b in ((1, 13), (13, 20)))
    prefix = prefixed_model.read_prompt(model, prompt[0])
    with prefixed_model.attending(model, prefix):
        behind = model(text).logits
    exact = model(jnp.concatenate([prompt, text], axis=1)).logits[:, 12:]
    np.testing.assert_allclose(behind, exact, atol=2e-5)
    assert jnp.max(jnp.abs(model(text).logits - exact)) > 1e-2


def test_a_prompt_is_read_in_parts_as_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_pretrained(place / "model", task="causal-lm")
    prompt = jnp.arange(1, 20, dtype=jnp.int32)
    whole = prefixed_model.read_prompt(model, prompt)
    monkeypatch.setattr(prefixed_model, "PROMPT_AT_ONCE", 8)
    for path, each in prefixed_model.read_prompt(model, prompt).items():
        np.testing.assert_allclose(each.key, whole[path].key, atol=1e-5)
        np.testing.assert_allclose(each.value, whole[path].value, atol=1e-5)


def test_sensitivity_foretells_what_an_error_costs(place: Path) -> None:
    """An error of the same size in each head: its KL is half the error's square times the sensitivity, up to H."""
    model = from_pretrained(place / "model", task="causal-lm")
    prefix = prefixed_model.read_prompt(model, jnp.arange(1, 13, dtype=jnp.int32))
    ids = jnp.asarray(np.random.default_rng(2).integers(1, len(WORDS), (64, 6)), jnp.int32)
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    found = prefixed_model.sensitivity(model, prefix, texts)
    draws = np.random.default_rng(3)

    def shaken(path: str, head: int) -> float:
        # values of the prefix moved: what comes out is off in one key head's query heads
        site = dict(attention_sites(model))[path]
        moved = dict(prefix)
        size = 0.05 * draws.normal(size=site.head_dim).astype(np.float32)
        value: Array = prefix[path].value.at[:, head].add(size)
        moved[path] = prefix[path]._replace(value=value)
        with prefixed_model.attending(model, prefix):
            exact = np.asarray(jnp.asarray(model(ids).logits))
        with prefixed_model.attending(model, moved):
            ours = np.asarray(model(ids).logits)
        exact, ours = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, ours))
        return float(np.mean(np.sum(np.exp(exact) * (exact - ours), axis=-1)) / np.sum(size**2))

    paths = list(found)
    costs = {path: np.mean([[shaken(path, head) for head in range(2)] for _ in range(6)]) for path in paths}
    # which layer costs more is foretold
    predicted = {path: found[path].mean() for path in paths}
    assert max(costs, key=costs.__getitem__) == max(predicted, key=predicted.__getitem__)


def test_an_uneven_budget_loses_less_than_an_even_one(place: Path) -> None:
    model = from_pretrained(place / "model", task="causal-lm")
    prefix = prefixed_model.read_prompt(model, jnp.asarray(np.random.default_rng(4).integers(1, 31, 40), jnp.int32))
    ids = jnp.asarray(np.random.default_rng(5).integers(1, len(WORDS), (12, 12)), jnp.int32)
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    uneven = compression.compress(model, prefix, texts, 4, steps=0)
    even = compression.compress(model, prefix, texts, 4, steps=0, even=True)
    assert uneven.anchors.sum() <= even.anchors.sum() == 4 * even.anchors.size
    predicted = [np.sum(each.sensitivity * each.chosen_error) for each in (uneven, even)]
    assert predicted[0] < predicted[1]


def test_states_of_different_sizes_attend_as_the_adapter_does(place: Path) -> None:
    """To run its layers as one program a model gives all states the largest size; an adapter keeps its own."""
    model = from_pretrained(place / "model", task="causal-lm")
    ids = jnp.asarray(np.random.default_rng(5).integers(1, len(WORDS), (2, 9)), jnp.int32)
    drawn = np.random.default_rng(7)
    states: dict[str | int, PrefixState] = {}
    for size, (path, site) in zip((2, 5), attention_sites(model), strict=True):
        points, z = (drawn.normal(size=(site.num_key_heads, size, site.head_dim)).astype(np.float32) for _ in range(2))
        masses = jnp.asarray(drawn.uniform(size=z.shape[:2]), jnp.float32)
        states[path] = PrefixState(jnp.asarray(z), masses, Anchors(jnp.asarray(points)))
    with prefixed_model.attending(model, {str(path): state for path, state in states.items()}):
        assert model.scan_layers
        within = model(ids).logits
    assert not model.scan_layers
    bare = model(ids).logits
    peft.apply_states(model, states)
    np.testing.assert_allclose(model(ids).logits, within, atol=1e-5)
    assert jnp.max(jnp.abs(within - bare)) > 0.01


def test_as_many_anchors_as_queries_are_enough(place: Path) -> None:
    """A head is filled up to a size that is compiled for, but never beyond the queries."""
    model = from_pretrained(place / "model", task="causal-lm")
    prefix = prefixed_model.read_prompt(model, jnp.arange(1, 31, dtype=jnp.int32))
    ids = jnp.asarray(np.random.default_rng(6).integers(1, len(WORDS), (2, 10)), jnp.int32)
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    found = compression.compress(model, prefix, texts, 20, steps=0, even=True)
    assert found.anchors.max() > anchor_fit.SIZES[0]
    assert np.all(found.error < 1)


def test_an_interrupted_run_goes_on_where_it_was(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(place, steps=0, distil=2, out=tmp_path / "out")
    fit, calls = compression.fit_chosen, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(compression, "cores", lambda: 1)  # one layer after the other
    monkeypatch.setattr(compression, "fit_chosen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(given, Console(quiet=True))
    assert not (tmp_path / "out" / "report.json").exists()

    def again(*args: Any, **options: Any) -> Any:
        raise AssertionError("done before")

    calls.clear()
    monkeypatch.setattr(compression, "fit_chosen", lambda *args, **options: calls.append(args) or fit(*args, **options))
    monkeypatch.setattr(compression, "sensitivity", again)
    monkeypatch.setattr(compression, "choose", again)
    main(given, Console(quiet=True))
    assert len(calls) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kl"]["mean"] != report["kl_before_distillation"]["mean"]
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        ".lock",
        "adapter",
        "errors.png",
        "index.html",
        "report.json",
    ]
    # another configuration begins anew
    with pytest.raises(AssertionError, match="done before"):
        main(options(place, steps=0, distil=2, seed=1, out=tmp_path / "out"), Console(quiet=True))


def test_what_is_of_another_model_is_refused(place: Path) -> None:
    model = from_pretrained(place / "model", task="causal-lm")
    prefix = prefixed_model.read_prompt(model, jnp.arange(1, 13, dtype=jnp.int32))
    ids = jnp.asarray(np.random.default_rng(6).integers(1, len(WORDS), (2, 10)), jnp.int32)
    texts = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    with pytest.raises(UsageError, match="input_ids"):
        compression.compress(model, prefix, {**texts, "input_ids": ids + len(WORDS)}, 4)
    path = next(iter(prefix))
    others = {**prefix, path: prefixed_model.Prefix(prefix[path].key[..., :2], prefix[path].value)}
    with pytest.raises(UsageError, match=r"key of the prefix in layers.0.attention: expected \[M, "):
        compression.compress(model, others, texts, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": TOKENS + 1}, f"--budget: expected at most the prompt's {TOKENS} tokens"),
        ({"budget": 0}, "--budget: expected at least 1"),
        ({"held_out": 1.0}, "--held-out: expected a part"),
        ({"model": "no-such-model"}, "--model: expected"),
        ({"budget": 40, "queries": "two lines"}, "queries: expected at least 40 tokens"),
        ({"queries": "no column"}, "a column text"),
        ({"queries": "one line"}, "at least two texts"),
        ({"prompt": "empty"}, "--prompt: expected some text"),
        ({"prompt": "latin"}, "--prompt: expected text in UTF-8"),
        ({"out": "others"}, "--out: expected a new folder"),
        ({"out": "another program's"}, "--out: expected a new folder"),
        ({"out": "unfinished work"}, "--out: expected a new folder"),
        ({"queries": None, "self_study": 2, "tokens": 5}, "--self-study: expected at least 6 tokens to fit to"),
        ({"model": "windowed"}, f"--budget: expected at most the {WINDOW} tokens that a layer with a window keeps"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(place: Path, tmp_path: Path, changes: Any, message: str) -> None:
    files = {"two lines": b"w1 w2\nw3 w4\n", "one line": b"w1 w2\n", "empty": b" \n", "latin": b"caf\xe9"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "no column.jsonl").write_text('{"body": "w1"}\n{"body": "w2"}\n')
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letters.txt").touch()
    (tmp_path / "another program's").mkdir()
    (tmp_path / "another program's" / "report.json").write_text('{"claims": []}')
    (tmp_path / "unfinished work" / "unfinished").mkdir(parents=True)
    (tmp_path / "unfinished work" / "unfinished" / "novel.txt").touch()
    given: dict[str, Any] = {"queries": place / "texts.txt", "out": tmp_path / "out", "budget": 6} | changes
    for field in ("queries", "prompt", "out"):
        if isinstance(given.get(field), str):
            kind = "" if field == "out" else ".jsonl" if given[field] == "no column" else ".txt"
            given[field] = tmp_path / f"{given[field]}{kind}"
    if given.get("model") == "windowed":
        given["model"] = str(place / "windowed")
    given = {"model": str(place / "model"), "prompt": place / "prompt.txt"} | given
    with pytest.raises(UsageError, match=message):
        main(Options(**given), Console(quiet=True))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "unfinished work" / "unfinished" / "novel.txt").is_file()


def test_a_folder_that_another_run_writes_is_left_alone_and_one_that_stopped_at_once_is_taken(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with held(out / ".lock", "test"), pytest.raises(UsageError, match=r"--out: .* which another process holds"):
        main(options(place, out=out), Console(quiet=True))
    assert [file.name for file in out.iterdir()] == [".lock"]

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "_run", stopped)
    said, flags = io.StringIO(), ["--model", str(place / "model"), "--prompt", str(place / "prompt.txt")]
    monkeypatch.setattr("sys.argv", ["compress", *flags, "--self-study", "8", "--out", str(out)])
    assert compress._compress(Console(file=said)) == 130
    assert "the same command goes on" in said.getvalue()


def test_what_a_killed_run_leaves_is_taken_and_what_is_damaged_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(place, out=tmp_path / "out")
    unfinished = given.out / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / ".of.12345.new").touch()  # killed while it wrote down whose the folder is
    given.check()

    def begun() -> compress._Unfinished:
        return compress._Unfinished(given, place / "model", np.arange(3), None)

    for name in ("one", "two"):
        begun()(name, lambda: {"x": np.ones(2)})
    assert begun()("one", lambda: pytest.fail("kept before"))["x"].tolist() == [1, 1]
    for damaged in (b"", (unfinished / "two.npz").read_bytes()[:100]):
        (unfinished / "two.npz").write_bytes(damaged)
        assert begun()("two", lambda: {"x": np.zeros(1)})["x"].tolist() == [0]

    unlink, removed = Path.unlink, []

    def killed(file: Path, **options: Any) -> None:
        unlink(file, **options)
        removed.append(file.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        begun().remove()
    assert len(removed) == 1
    given.check()


def test_no_text_stands_behind_the_token_that_ends_texts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.add_special_tokens(["w1", "w2"])
    tokenizer.post_processor = TemplateProcessing(single="w1 $A w2", special_tokens=[("w1", 2), ("w2", 3)])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "prompt.txt").write_text("w7 w8 w9")
    found: list[np.ndarray] = []
    monkeypatch.setattr(compress, "_run", lambda options, console, model, prompt, *_: found.append(prompt))
    given = {"prompt": tmp_path / "prompt.txt", "queries": place / "texts.txt", "budget": 2, "out": tmp_path / "out"}
    main(Options(model=str(tmp_path / "model"), **given), Console(quiet=True))
    assert found[0].tolist() == [tokenizer.token_to_id(word) for word in ("w1", "w7", "w8", "w9")]


def test_without_texts_the_model_writes_them_and_of_a_window_it_is_said_what_is_kept(
    place: Path, tmp_path: Path
) -> None:
    said = io.StringIO()
    windowed = {"budget": 3, "out": tmp_path / "out"}
    given = options(place, queries=None, self_study=8, tokens=6, steps=0, **windowed)
    main(dataclasses.replace(given, model=str(place / "windowed")), Console(file=said, width=400))
    assert "positions" not in said.getvalue()
    assert f"Layers with a window of {WINDOW} tokens keep so many of the prompt's" in said.getvalue()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["texts"] == {"fitted": 6, "held_out": 2}
    assert report["numbers_of_the_cache"] == 2 * WINDOW * 24 * 2  # keys and values of 4 heads of 6, two layers
    assert report["kl"]["mean"] < report["kl_without_prompt"]["mean"]
