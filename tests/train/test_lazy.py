"""The kernel view: what it says of a linear model, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ntk_prefix import models, peft
from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import NonFiniteError
from ntk_prefix.kernels import empirical_ntk
from tests.fuzz import damaged_json, fuzzed, read_whole
from train import data, lazy
from train.lazy import Options, cached_view, main, view
from train.setup import model_inputs

BERT = Path("tests/fixtures/a340712/bert")

TINY = {
    "config": "tiny",
    "train_size": 30,
    "validation_size": 20,
    "test_size": 20,
    "steps": 4,
    "learning_rates": (1e-4, 1e-2),
}


def test_of_the_head_alone_there_is_one_kernel(tmp_path: Path) -> None:
    """Logits are linear in the head, each in its own weights: ten equal kernels, and nothing beside them."""
    seen = view(Options(**TINY | {"learning_rates": (1e-2,)}, out=tmp_path), "head", 0, Console(quiet=True))
    assert seen.joint_score == seen.regression_score
    assert seen.eigenvalues.shape == (300,)
    blocks = seen.eigenvalues.reshape(30, 10)
    np.testing.assert_allclose(blocks, blocks[:, :1] + np.zeros(10), atol=1e-6 * seen.eigenvalues[0])
    assert seen.eigenvalues.sum() == pytest.approx(1)


@pytest.mark.parametrize("method", [peft.HeadConfig(), peft.NTKAttentionConfig(train_head=False)])
def test_the_head_s_kernel_is_what_its_gradients_say(method: peft.AdapterConfig) -> None:
    model = models.from_pretrained(BERT, task="sequence-classification", num_labels=3, rngs=nnx.Rngs(0))
    peft.apply(model, method)
    seen = lazy._Logits(model)
    x = jnp.stack([jnp.arange(18).reshape(3, 6) % 9, jnp.ones((3, 6), int), jnp.zeros((3, 6), int)], axis=-1)
    if method.method != "head":
        with pytest.raises(ValueError, match="expected a head that is trained"):
            lazy.head_ntk(seen, x, 2)
        return
    wanted = empirical_ntk(seen, x, x[:2], wrt=lazy.HEAD, implementation="jacobian")
    np.testing.assert_allclose(lazy.head_ntk(seen, x, 2), wanted, atol=1e-5 * np.abs(wanted).max())
    assert seen.model.head is model.head


def test_a_view_ends_in_a_figure_and_the_rate_that_validation_prefers(tmp_path: Path) -> None:
    main(Options(**TINY, methods=("lora",), seeds=1, out=tmp_path))
    document = json.loads((tmp_path / "lazy.json").read_text())
    (lora,) = document["views"]
    losses = {
        rate: json.loads((tmp_path / "runs" / f"tiny-lora-{rate:g}-0" / "summary.json").read_text())["validation_loss"]
        for rate in TINY["learning_rates"]
    }
    assert lora["learning_rate"] == min(losses, key=losses.get)
    assert len(set(losses.values())) == 2
    # control: blocks of equal eigenvalues are the head's alone
    assert np.ptp(np.reshape(lora["eigenvalues"], (30, 10)), axis=1).max() > 1e-3 * lora["eigenvalues"][0]
    assert (tmp_path / "lazy.png").stat().st_size > 1000


def test_views_that_were_made_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def made(options: Options, method: str, seed: int, console: Console) -> lazy.View:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((method, seed))
        score = 0.5 + 0.1 * seed
        return lazy.View(method, seed, 7, np.array([3.0, 1.0]), 1e-3, score, score, 1e-2, score + 0.1)

    monkeypatch.setattr(lazy, "view", made)
    options = {**TINY, "methods": ("head", "lora"), "seeds": 2, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        main(Options(**options))
    asked_before = asked.copy()
    asked.clear()
    main(Options(**options))
    assert (asked_before, asked) == ([("head", 0), ("lora", 0), ("head", 1)], [("lora", 1)])
    assert len(json.loads((tmp_path / "lazy.json").read_text())["views"]) == 4
    with pytest.raises(ValueError, match="--out: expected a new folder"):
        main(Options(**options | {"steps": 5}))


def test_a_view_of_rows_that_have_changed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lazy, "view", lambda *_: lazy.View("lora", 0, 7, np.array([3.0, 1.0]), 1e-3, 0.5, 0.5, 1e-2, 0.6)
    )
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    options = Options(**TINY | {"config": "text", "data_dir": str(file), "out": tmp_path})
    for _ in range(2):
        lazy.cached_view(options, "lora", 0, Console(quiet=True))
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"--out: .* is of .*rows\.jsonl before it changed"):
        lazy.cached_view(options, "lora", 0, Console(quiet=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("lora", "magic")}, "--methods: expected some of .* got magic"),
        ({"seeds": 0}, "--seeds: expected at least one, got 0"),
        ({"config": "magic"}, "--config: expected one of tiny, .* got 'magic'"),
        ({"config": "gsm8k"}, "--config: expected one of tiny, .* got 'gsm8k'"),
        ({"learning_rates": ()}, "--learning-rates: expected at least one"),
        ({"learning_rates": (1e-3, float("nan"))}, "--learning-rate: expected a finite number"),
        ({"learning_rates": (0.01, 0.010000001)}, "--learning-rates: expected rates that differ"),
        ({"max_length": 4}, "--max-length: expected at least 8"),
        ({"steps": 0}, "--steps: expected at least 1"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_the_kernel_is_that_of_the_function_that_is_trained() -> None:
    """Of a pair, the second sentence's tokens are of another type; and padding is what the mask says, not what an id is."""
    model = models.from_pretrained(BERT, task="sequence-classification", num_labels=2, rngs=nnx.Rngs(0))
    ids = [np.array(row, np.int32) for row in ([2, 5, 3, 6, 0, 3], [2, 7, 8, 3, 9, 3, 3], [2, 4, 3])]
    types = [np.arange(len(row), dtype=np.int32) // 3 % 2 for row in ids]
    columns = {"labels": np.zeros(3, np.int32)}
    for name, rows in (("input_ids", ids), ("token_type_ids", types)):
        columns[name] = np.empty(3, object)
        columns[name][:] = rows
    split = data.Dataset(columns, pad_id=0)
    (batch,) = data.evaluation_batches(split, 3, buckets=(8,))
    trained = model(**model_inputs(model, batch)).logits
    seen = lazy._Logits(model)(lazy._inputs(split, 8))
    np.testing.assert_array_equal(seen, trained)
    # control: types and mask both matter here
    plain = {name: value for name, value in batch.items() if name != "token_type_ids"}
    assert np.abs(model(**model_inputs(model, plain)).logits - trained).max() > 1e-4
    masked = {**batch, "attention_mask": batch["input_ids"] != 0}
    assert np.abs(model(**model_inputs(model, masked)).logits - trained).max() > 1e-4


def test_logits_that_are_not_finite_are_no_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest of NaN is the first class: it would look like a score."""
    monkeypatch.setattr(lazy._Logits, "__call__", lambda self, x: jnp.full((len(x), 10), jnp.nan))
    with pytest.raises(NonFiniteError, match="logits: expected finite numbers, got 700 others"):
        view(Options(**TINY, out=tmp_path), "head", 0, Console(quiet=True))


VIEW = {"method": "lora", "seed": 0, "parameters": 7, "eigenvalues": [3.0, 1.0], "ridge": 1e-3, "learning_rate": 1e-2}
VIEW |= dict.fromkeys(("regression_score", "joint_score", "fine_tuned_score"), 0.5)


@fuzzed
@given(damage=st.data())
def test_a_damaged_view_is_read_or_refused_by_name(damage: st.DataObject, tmp_path: Path) -> None:
    options = Options(**TINY, methods=("lora",), out=tmp_path)  # checked method by method, for every damage
    free = ("methods", "seeds", "out")
    asked = json.loads(json_text({k: v for k, v in dataclasses.asdict(options).items() if k not in free}))
    file = tmp_path / "views" / "tiny-lora-0.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(damage.draw(damaged_json({"options": asked, "view": VIEW})))
    read_whole(
        file, lambda: (seen := cached_view(options, "lora", 0, Console(quiet=True))) and (seen.eigenvalues, seen.scores)
    )
