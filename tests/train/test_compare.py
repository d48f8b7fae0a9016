"""The table: every row the same tuning budget, nothing run twice, counts that match where the table says so."""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ntk_prefix import models, peft
from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import UsageError
from train.__main__ import parse
from train.compare import compare
from train.comparison import run
from train.comparison.plan import Cell, Comparison
from train.config import CONFIGS, METHODS, TrainConfig, adapter_config
from train.fingerprint import fingerprint
from train.profiles import ABLATION_ROWS, LONG_ROWS, MODEL_ROWS, PROFILES, YARDSTICK_ROWS

QUIET = Console(quiet=True)


def comparison(out: Path, **changes: object) -> Comparison:
    settings = {"tasks": ("sst2",), "rows": ("lora r=8", "ntk"), "seeds": 3, "grid": (1e-3, 1e-2), "out": out}
    return Comparison(**{**settings, **changes})  # type: ignore[arg-type]


def summary(cell: Cell) -> dict:
    """A run whose validation prefers the second rate, and whose test score tells method and seed."""
    return {
        "metric": "accuracy",
        "steps": 3,
        "parameters": 1000,
        "config": {},
        "validation_score": 0.5 + cell.learning_rate,
        "validation_loss": 1.0,
        "test_score": (0.6 if cell.row[0] == "ntk" else 0.5) + 0.01 * cell.seed,
        "test_loss": 0.7,
        "trainable_parameters": 100 if cell.row[0] == "ntk" else 90,
        "test_rows": 10,
        "seconds_a_step": 0.5,
        "peak_memory_bytes": 2**30,
        "adapter_bytes": 1000,
        "macro_f1": 0.4,
        "calibration_error": 0.1,
        "calibration_error_scaled": 0.02,
        "temperature": 1.5,
        "reliability": [
            {"rows": 20, "confidence": 0.6, "accuracy": 0.5},
            {"rows": 5, "confidence": 0.9, "accuracy": 1},
        ],
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Cell, bool]]:
    """Cells as they are run, and whether on test; no training."""
    cells: list[tuple[Cell, bool]] = []

    def fake(comparison: Comparison, cell: Cell, console: Console, test: bool) -> dict:
        cells.append((cell, test))
        return summary(cell)

    monkeypatch.setattr(run, "run_cell", fake)
    return cells


def finish(comparison: Comparison, cell: Cell) -> None:
    """Leave a cell as ``python -m train`` does."""
    folder = comparison.out / cell.folder
    folder.mkdir(parents=True)
    config = comparison.config(cell).as_dict()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary(cell)))


class TestTuning:
    def test_every_row_runs_the_grid_once_and_the_best_rate_with_the_other_seeds(
        self, ran: list[tuple[Cell, bool]], tmp_path: Path
    ) -> None:
        compare(comparison(tmp_path), QUIET)
        for label in ("lora r=8", "ntk"):
            done = [(cell.learning_rate, cell.seed, test) for cell, test in ran if cell.row[0] == label]
            grid, chosen = [(1e-3, 0, False), (1e-2, 0, False)], [(1e-2, seed, True) for seed in range(3)]
            assert done == grid + chosen

    def test_the_table_has_mean_and_spread_of_the_chosen_rate_only(
        self, ran: list[tuple[Cell, bool]], tmp_path: Path
    ) -> None:
        lines = compare(comparison(tmp_path), QUIET)
        assert [line["row"] for line in lines] == ["lora r=8", "ntk"]
        np.testing.assert_allclose([line["mean"] for line in lines], [0.51, 0.61])
        np.testing.assert_allclose([line["spread"] for line in lines], 0.01)
        assert all(line["learning_rate"] == 1e-2 and len(line["scores"]) == 3 for line in lines)
        document = json.loads((tmp_path / "table.json").read_text())
        assert document["git"]
        assert len(document["lines"]) == 2
        text = (tmp_path / "table.md").read_text()
        assert "| sst2 | ntk | 61.0 | 1.0 | - | 0.700 | - | 40.0 | 10.0 | 2.0 | 100 |" in text
        # 0.01 / sqrt(3) each, independent
        assert "| sst2 | lora r=8 | 51.0 | 1.0 | +10.0 ± 0.8 | 0.700 | - | 40.0 |" in text
        assert "before" not in text.splitlines()[2]  # no run said
        for name in ("table.png", "reliability.png"):
            assert (tmp_path / name).stat().st_size > 1000

    def test_the_test_score_does_not_choose(
        self, ran: list[tuple[Cell, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control: a rate that is better on test and worse on validation is not taken."""

        def fake(comparison: Comparison, cell: Cell, console: Console, test: bool) -> dict:
            return summary(cell) | {"test_score": 1 - cell.learning_rate}

        monkeypatch.setattr(run, "run_cell", fake)
        assert {line["learning_rate"] for line in compare(comparison(tmp_path), QUIET)} == {1e-2}

    @pytest.mark.parametrize(("changes", "chosen"), [((), 1e-2), (("choose_by=loss",), 1e-3)])
    def test_the_rate_is_chosen_by_what_keeps_a_step(
        self, changes: tuple[str, ...], chosen: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The higher rate has the better score and the higher loss."""
        monkeypatch.setattr(
            run, "run_cell", lambda _, cell, __, test: summary(cell) | {"validation_loss": 1 + cell.learning_rate}
        )
        lines = compare(comparison(tmp_path, set=changes), QUIET)
        assert {line["learning_rate"] for line in lines} == {chosen}

    @pytest.mark.parametrize(("grid", "shown"), [((1e-3, 1e-2), "| 0.01* |"), ((1e-3, 1e-2, 1e-1), "| 0.01 |")])
    def test_a_rate_at_an_end_of_the_grid_is_marked(
        self, grid: tuple[float, ...], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        best = {"validation_score": 1.0}
        monkeypatch.setattr(
            run, "run_cell", lambda _, cell, __, test: summary(cell) | (best if cell.learning_rate == 1e-2 else {})
        )
        compare(comparison(tmp_path, grid=grid), QUIET)
        assert (tmp_path / "table.md").read_text().count(shown) == 2

    def test_of_language_it_says_what_was_right_at_the_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = {
            "test_score_before": 0.0,
            "test_last_number_before": 0.25,
            "test_last_number": 0.75,
            "test_loss_before": 2.0,
        }
        monkeypatch.setattr(
            run, "run_cell", lambda _, cell, __, test: summary(cell) | said | {"forgetting": 0.5 + 0.1 * cell.seed}
        )
        compare(comparison(tmp_path), QUIET)
        lines = (tmp_path / "table.md").read_text().splitlines()
        assert (
            "| before | score | spread | ntk is ahead by | last number before | last number | loss before |" in lines[2]
        )
        assert lines[-1].startswith(
            "| sst2 | ntk | 0.0 | 61.0 | 1.0 | - | 25.0 | 75.0 | 2.000 | 0.700 | 0.600 ± 0.100 |"
        )

    def test_a_row_with_a_single_rate_is_run_with_it_and_not_tuned(
        self, ran: list[tuple[Cell, bool]], tmp_path: Path
    ) -> None:
        """As in the yardstick, whose rows have the rates of their own experiments."""
        chosen = comparison(tmp_path, profile="yardstick", tasks=("gsm8k",), rows=("full", "ntk"), grid=(), seeds=1)
        compare(chosen, QUIET)
        done = [(cell.row[0], cell.learning_rate, test) for cell, test in ran]
        assert done[0] == ("full", 1e-5, True)
        assert done[1:] == [("ntk", rate, False) for rate in (1e-4, 1e-3, 1e-2)] + [
            ("ntk", 1e-4, True)
        ]  # of equal losses
        text = (tmp_path / "table.md").read_text()
        assert "out of 0.0001, 0.001, 0.01 with seed 0" in text
        assert "one learning rate for some rows" in text
        assert "| 1e-05 |" in text
        assert "| 0.0001* |" in text


class TestCells:
    def test_a_finished_one_is_read_and_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=lambda *a, **k: pytest.fail("it was run")))
        chosen = comparison(tmp_path, rows=("ntk",), seeds=1, grid=(1e-3,))
        cell = Cell("sst2", MODEL_ROWS["minilm"][-1], 1e-3, 0)
        finish(chosen, cell)
        (line,) = compare(chosen, QUIET)
        assert line["mean"] == summary(cell)["test_score"]

    def test_the_chosen_one_is_run_again_for_the_test_split_and_no_other_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen, asked = comparison(tmp_path, rows=("ntk",), seeds=1), []

        def popen(command: list[str], **_: object) -> contextlib.AbstractContextManager:
            config = parse(command[3:]).config
            asked.append((command[-1], config.eval.test))
            cell = Cell("sst2", MODEL_ROWS["minilm"][-1], config.optim.learning_rate, 0)
            assert config == chosen.config(cell).changed(test=config.eval.test)
            folder = tmp_path / cell.folder
            found = summary(cell) | ({} if config.eval.test else {"test_score": None})
            (folder / "summary.json").write_text(json.dumps(found))
            return contextlib.nullcontext(SimpleNamespace(returncode=0, communicate=lambda: ("", None)))

        monkeypatch.setattr(run, "subprocess", SimpleNamespace(PIPE=0, STDOUT=0, Popen=popen))
        (line,) = compare(chosen, QUIET)
        assert line["mean"] == 0.6
        folders = [str(tmp_path / f"cells/sst2/ntk/{rate}-seed0") for rate in ("0.001", "0.01")]
        assert asked == [(folders[0], False), (folders[1], False), (folders[1], True)]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("steps=20",), "steps=200"),
            (("data_dir=there",), "data_dir=None"),
            # the same by another spelling
            (("steps=200", "train_size=4e3", "validation_size=300", "data_dir=None"), None),
        ],
    )
    def test_one_of_another_configuration_is_not_taken_for_ours(
        self, change: tuple[str, ...], said: str | None, ran: list[tuple[Cell, bool]], tmp_path: Path
    ) -> None:
        """Found before any cell is run, also where only a later one differs."""
        before = comparison(tmp_path)
        finish(before, Cell("sst2", MODEL_ROWS["minilm"][-1], 1e-2, 2))
        changed = dataclasses.replace(before, set=change)
        if said is None:
            compare(changed, QUIET)
            return
        with pytest.raises(ValueError, match=f"ntk/0.01-seed2 .* {said}"):
            compare(changed, QUIET)
        assert not ran

    @pytest.mark.parametrize("ending", ["summary.json", "diverged.txt"])
    def test_nor_is_one_of_another_default_finished_or_diverged(
        self, ending: str, ran: list[tuple[Cell, bool]], tmp_path: Path
    ) -> None:
        """No field of the table names the head's rate of this row: only the file of the cell does."""
        chosen, cell = comparison(tmp_path), Cell("sst2", MODEL_ROWS["minilm"][-1], 1e-3, 0)
        finish(chosen, cell)
        folder = tmp_path / cell.folder
        (folder / "summary.json").rename(folder / ending)
        config = json.loads((folder / "config.json").read_text())
        config["optim"]["head_learning_rate"] = 1e-3
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"run with head_learning_rate=0\.001"):
            compare(chosen, QUIET)
        assert not ran

    def test_nor_is_one_on_rows_that_have_changed(self, ran: list[tuple[Cell, bool]], tmp_path: Path) -> None:
        file = tmp_path / "data" / "sst2" / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        chosen = comparison(tmp_path, data_dir=tmp_path / "data")
        finish(chosen, cell := Cell("sst2", MODEL_ROWS["minilm"][-1], 1e-2, 2))
        rows = fingerprint("sst2", str(tmp_path / "data"))
        (tmp_path / cell.folder / "data.json").write_text(json.dumps({"sha256": rows}))
        compare(chosen, QUIET)
        ran.clear()
        file.write_text("[]")
        with pytest.raises(ValueError, match=r"--out: .*ntk/0\.01-seed2 .* which read .*data before it changed"):
            compare(chosen, QUIET)
        assert not ran

    @pytest.mark.parametrize(
        ("status", "said"), [(3, "whatever"), (2, "expected a finite loss, got [nan]"), (1, "no such file")]
    )
    def test_one_that_diverged_has_no_score_and_is_counted_any_other_failure_ends_the_table(
        self, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The exit status says so, and no word of what the run printed."""
        ended = SimpleNamespace(returncode=status, communicate=lambda: (said, None))
        monkeypatch.setattr(
            run,
            "subprocess",
            SimpleNamespace(PIPE=0, STDOUT=0, Popen=lambda *a, **k: contextlib.nullcontext(ended)),
        )
        chosen = comparison(tmp_path, rows=("ntk",), seeds=1, grid=(1e-3,))
        if status != 3:
            with pytest.raises(ValueError, match=re.escape(said)):
                compare(chosen, QUIET)
            return
        (line,) = compare(chosen, QUIET)
        assert (line["scores"], line["mean"], line["diverged"]) == ([None], None, 1)
        assert json.loads((tmp_path / "table.json").read_text())["lines"] == [line]
        assert "| sst2 | ntk | 1 of 1 |" in (tmp_path / "table.md").read_text()

    def test_one_that_an_older_version_finished_with_nan_has_no_score(self, tmp_path: Path) -> None:
        """It wrote numbers that are not finite as text, and the table of the next version could not be read."""
        chosen = comparison(tmp_path, rows=("ntk",), seeds=1)
        for rate, changes in ((1e-3, {}), (1e-2, {"test_loss": "nan", "validation_loss": "nan"})):
            finish(chosen, cell := Cell("sst2", MODEL_ROWS["minilm"][-1], rate, 0))
            (tmp_path / cell.folder / "summary.json").write_text(json.dumps(summary(cell) | changes))
        (line,) = compare(chosen, QUIET)
        assert line["learning_rate"] == 1e-3
        assert line["grid"]["0.01"] is None

    @pytest.mark.parametrize("content", ["{}", "[]", '{"config": {}}', "{", ""])
    def test_one_that_is_damaged_is_named(self, content: str, tmp_path: Path) -> None:
        chosen = comparison(tmp_path, rows=("ntk",), seeds=1)
        finish(chosen, cell := Cell("sst2", MODEL_ROWS["minilm"][-1], 1e-3, 0))
        (tmp_path / cell.folder / "summary.json").write_text(content)
        with pytest.raises(UsageError, match=r"0\.001-seed0/summary\.json: expected"):
            compare(chosen, QUIET)

    def test_the_head_alone_is_tuned_and_beside_an_adapter_left_alone(self, tmp_path: Path) -> None:
        rates = {
            row[0]: comparison(tmp_path).config(Cell("sst2", row, 0.3, 0)).optim.head_learning_rate
            for row in MODEL_ROWS["minilm"]
        }
        assert {label for label, rate in rates.items() if rate == 0.3} == {"head"}
        assert {rate for label, rate in rates.items() if label != "head"} == {
            CONFIGS["sst2"][1].optim.head_learning_rate
        }

        # also where all others are given another
        given = comparison(tmp_path, set=("head_learning_rate=0.1",))
        assert {given.config(Cell("sst2", row, 0.3, 0)).optim.head_learning_rate for row in MODEL_ROWS["minilm"]} == {
            0.1,
            0.3,
        }

    @pytest.mark.parametrize("profile", PROFILES)
    def test_all_have_a_configuration_that_can_be_written_and_read(self, profile: str, tmp_path: Path) -> None:
        chosen = comparison(tmp_path, profile=profile, tasks=(), rows=())
        for cell in chosen.grid_cells():
            config = chosen.config(cell)
            assert TrainConfig.from_dict(json.loads(json_text(config.as_dict()))) == config
            assert config.optim.learning_rate == cell.learning_rate

    def test_what_every_cell_gets_is_typed(self, tmp_path: Path) -> None:
        chosen = comparison(tmp_path, set=("remat=true", "train_size=4e3", "data_dir=None", "k_learning_rate=1"))
        config = chosen.config(next(chosen.grid_cells()))
        assert (config.device.remat, config.data.train_size, config.data.data_dir) == (True, 4000, None)
        assert isinstance(config.data.train_size, int)
        assert isinstance(config.optim.k_learning_rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("magic",)}, "--tasks: expected some of sst2"),
        ({"rows": ("magic",)}, "--rows"),
        ({"seeds": 0}, "--seeds: expected at least one"),
        ({"set": ("steps",)}, "--set: expected field=value"),
        ({"set": ("stepz=3",)}, "--set: expected one of .*got 'stepz'"),
        ({"set": ("steps=many",)}, "--set steps: expected a value of type int, got 'many'"),
        ({"set": ("learning_rate=nan",)}, "--set learning_rate: expected"),
        ({"grid": (float("nan"),)}, "--grid: expected a finite number"),
        ({"grid": (0.01, 0.010000001)}, "--grid: expected rates that differ in their first six digits"),
        ({"set": ("seed=3",)}, "--set seed: expected it left alone.*--seeds"),
        ({"set": ("method=lora",)}, "--set method: expected it left alone.*--rows"),
        ({"set": ("learning_rate=0.1",)}, "--set learning_rate: expected it left alone.*--grid"),
        ({"set": ("test=false",)}, "--set test: expected it left alone"),
        ({"grid": (-1.0,)}, "--learning-rate: expected at least 0"),
    ],
)
def test_nonsense_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **change)


def test_a_task_whose_rows_are_nowhere_is_refused_before_a_cell(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").touch()
    here = comparison(tmp_path, profile="yardstick", tasks=(), rows=(), grid=(), data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metamath: expected train or MetaMathQA-395K.*found"):
        here.check_sources()
    dataclasses.replace(here, tasks=("gsm8k",)).check_sources()
    with pytest.raises(ValueError, match=r"gsm8k: expected a data_dir.*openai/gsm8k"):
        dataclasses.replace(here, tasks=("gsm8k",), data_dir=None).check_sources()


def backbone(name: str) -> models.Backbone:
    """One layer with the heads of the table's models; all layers get as much, and what adapters do not see is tiny."""
    if name == "minilm":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 12}
        return models.Bert(
            models.BertConfig(hidden_size=384, intermediate_size=8, vocab_size=8, **sizes), rngs=nnx.Rngs(0)
        )
    if name == "smollm2":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3}
        decoder = models.LlamaConfig(hidden_size=576, intermediate_size=8, vocab_size=8, **sizes)
        return models.Llama(decoder, rngs=nnx.Rngs(0))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 6, "image_size": 28, "patch_size": 14}
    config = models.VitConfig(model_type="dinov2", hidden_size=384, intermediate_size=8, **sizes)
    return models.Vit(config, rngs=nnx.Rngs(0))


LABELED = {**MODEL_ROWS, "yardstick": YARDSTICK_ROWS, "minilm": MODEL_ROWS["minilm"] + LONG_ROWS + ABLATION_ROWS}
MATCHED = {
    "smollm2": [("lora r=19", "prefix 96", "prefix-tuning+", "ntk published", "ntk")],
    "minilm": [
        ("lora r=8", "prefix 16", "propagation 32", "ntk"),
        ("propagation 16", "propagation 16, mean"),
        ("lora r=8", "prefix 16", "prefix-tuning+", "ntk published", "ntk"),
    ],
    "vit": [("lora r=8", "ntk rank 16"), ("lora r=16", "prefix 32", "prefix-tuning+", "ntk published", "ntk")],
}


@pytest.mark.parametrize("name", MATCHED)
def test_rows_that_the_table_calls_matched_train_as_much_within_four_percent(name: str) -> None:
    rows = {row[0]: row for row in LABELED[name]}
    ids = {"pixel_values": jnp.ones((2, 28, 28, 3))} if name == "vit" else {"input_ids": jnp.ones((2, 4), int)}

    @functools.cache
    def count(label: str) -> int:
        configs = adapter_config(*rows[label][1:])

        def adapted() -> models.Backbone:
            model = backbone(name)
            peft.apply(model, configs, calibration=ids)
            return model

        # shapes are enough to count, but a basis of whitened features is found in numbers
        whitened = any(getattr(config, "whiten", False) for config in configs)
        return peft.trainable_parameters(adapted() if whitened else nnx.eval_shape(adapted))[0]

    for group in MATCHED[name]:
        counts = {label: count(label) for label in group}
        assert max(counts.values()) <= 1.04 * min(counts.values()), counts


def test_every_row_names_a_method() -> None:
    assert {row[1] for rows in LABELED.values() for row in rows} <= set(METHODS)
