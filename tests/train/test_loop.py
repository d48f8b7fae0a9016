"""A run: from a configuration to a summary, broken off anywhere, the same numbers."""

import dataclasses
import itertools
import json
import shutil
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event

from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import NonFiniteError
from train import data, loop, tasks
from train.__main__ import main
from train.config import CONFIGS, TrainConfig, adapter_config
from train.folder import RunFolder
from train.loop import run
from train.setup import build, optimizer

TINY = dataclasses.replace(
    CONFIGS["tiny"][1],
    method="lora",
    steps=8,
    batch_size=16,
    train_size=200,
    validation_size=40,
    test_size=40,
    evaluate_every=4,
    checkpoint_every=4,
    devices=1,
)


def weights(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "adapter" / "adapter_model.safetensors")


def metrics(workdir: Path) -> list[dict]:
    """What was logged, without times, which no two runs share."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_a_step"} for line in lines]


def events(content: bytes) -> Iterator[Event]:
    """Read TensorBoard's records: length, its checksum, an event, its checksum."""
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    run(TINY, workdir, log="tensorboard")
    return workdir


class TestAFinishedRun:
    def test_leaves_its_result_with_configuration_versions_and_commit(self, unbroken: Path) -> None:
        summary = json.loads((unbroken / "summary.json").read_text())
        assert summary["config"] == json.loads((unbroken / "config.json").read_text())
        assert summary["git"]
        assert summary["versions"]["jax"] == jax.__version__
        assert summary["steps"] == TINY.optim.steps
        assert 0 <= summary["test_score"] <= 1
        assert summary["test_rows"] == TINY.data.test_size
        assert summary["adapter_bytes"] == (unbroken / "adapter" / "adapter_model.safetensors").stat().st_size
        assert sum(w.size for w in weights(unbroken).values()) >= summary["trainable_parameters"]

    def test_is_not_run_again(self, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "build", lambda config: pytest.fail("it was set up again"))
        assert run(TINY, unbroken) == json.loads((unbroken / "summary.json").read_text())

    def test_a_tracker_has_the_numbers_of_metrics_jsonl(self, unbroken: Path) -> None:
        (file,) = (unbroken / "tensorboard").glob("events*")
        found: dict[int, dict[str, float]] = {}
        for event in events(file.read_bytes()):
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
        wanted: dict[int, dict[str, float]] = {}
        for line in (unbroken / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            wanted.setdefault(values.pop("step"), {}).update(values)
        assert found.keys() == wanted.keys()
        for step, values in wanted.items():
            assert found[step] == pytest.approx(values, rel=1e-6)

    def test_is_pushed_with_its_card(
        self, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pushed = {}

        class Hub:
            def create_repo(self, name: str, exist_ok: bool) -> huggingface_hub.RepoUrl:
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

            def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
                pushed[repo_id] = {path.name for path in Path(folder_path).iterdir()}

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "me"})
        command = ["--config", str(unbroken / "config.json"), "--workdir", str(unbroken), "--push-to-hub", "me/mine"]
        monkeypatch.setattr(sys, "argv", ["train", *command])
        assert main() == 0
        assert pushed == {"me/mine": {"README.md", "adapter_config.json", "adapter_model.safetensors"}}
        assert "https://huggingface.co/me/mine" in capsys.readouterr().out


class TestTheTestSplit:
    def test_can_be_left_for_later(self, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A first run does not read it; the second reads it and takes no step."""
        evaluated = []
        evaluate = loop.Evaluator.__call__

        def counted(self: Any, state: Any, split: data.Dataset, **options: Any) -> Any:
            evaluated.append(split is self.setup.task.test)
            return evaluate(self, state, split, **options)

        monkeypatch.setattr(loop.Evaluator, "__call__", counted)
        first = run(dataclasses.replace(TINY, test=False), tmp_path)
        assert not any(evaluated)
        assert (first["test_score"], first["test_rows"], first.get("macro_f1")) == (None, None, None)
        assert run(dataclasses.replace(TINY, test=False), tmp_path) == first
        second = run(TINY, tmp_path)
        assert sum(evaluated) == 1
        assert metrics(tmp_path) == metrics(unbroken)
        whole = json.loads((unbroken / "summary.json").read_text())
        for name in ("test_score", "test_loss", "test_rows", "validation_loss", "macro_f1", "best_step", "config"):
            assert second[name] == whole[name], name
        assert second["seconds_a_step"] == first["seconds_a_step"]
        assert second["peak_memory_bytes"] >= first["peak_memory_bytes"]
        assert json.loads((tmp_path / "config.json").read_text()) == TINY.as_dict() | {"adapter": []}
        np.testing.assert_equal(weights(tmp_path), weights(unbroken))

    def test_once_read_is_not_forgotten(self, unbroken: Path) -> None:
        assert run(dataclasses.replace(TINY, test=False), unbroken)["test_rows"] == TINY.data.test_size


class TestWhatARunLearns:
    """A LoRA and a head on a random frozen transformer."""

    ABOVE_CHANCE = 0.2
    """Six standard errors above a tenth: 359 test digits."""

    CONFIG: ClassVar = dataclasses.replace(
        CONFIGS["tiny"][1],
        method="lora",
        steps=40,
        batch_size=32,
        learning_rate=3e-2,
        head_learning_rate=3e-2,
        validation_size=40,
        evaluate_every=40,
        checkpoint_every=40,
        devices=1,
    )

    def test_holds_on_rows_it_has_not_seen(self, tmp_path: Path) -> None:
        assert run(self.CONFIG, tmp_path)["test_score"] > self.ABOVE_CHANCE

    def test_is_in_the_labels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control: the same run with its training labels in random order stays at chance."""
        load = tasks.load

        def shuffled(*arguments: Any, **options: Any) -> tasks.Task:
            task = load(*arguments, **options)
            labels = np.random.default_rng(0).permutation(task.train["labels"])
            return dataclasses.replace(
                task, train=dataclasses.replace(task.train, columns={**task.train, "labels": labels})
            )

        monkeypatch.setattr(tasks, "load", shuffled)
        assert run(self.CONFIG, tmp_path)["test_score"] < self.ABOVE_CHANCE


class TestABrokenRun:
    def test_goes_on_bit_for_bit(self, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Asked(loop.Signals):
            """SIGTERM at the first step."""

            def __enter__(self) -> "Asked":
                self.received = True
                return self

            def __exit__(self, *_: object) -> None:
                pass

        with monkeypatch.context() as patch:
            patch.setattr(loop, "Signals", Asked)
            for step in (1, 2, 3):
                with pytest.raises(loop.Interrupted, match=f"step {step} of 8"):
                    run(TINY, tmp_path)
        run(TINY, tmp_path)
        ours, theirs = weights(tmp_path), weights(unbroken)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        evaluations = [[line for line in metrics(w) if "validation_score" in line] for w in (tmp_path, unbroken)]
        assert evaluations[0] == evaluations[1]

    @pytest.mark.parametrize(
        ("at", "said"), [("last step", "step 8 of 8"), ("test split", "between the last step and")]
    )
    def test_asked_to_stop_at_its_end_it_does_and_the_result_is_made_by_the_next(
        self, at: str, said: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Answering a test split takes a decoder minutes; no step is lost, and none taken again."""
        signals: list[loop.Signals] = []
        evaluate = loop.Evaluator.__call__

        class Kept(loop.Signals):
            def __enter__(self) -> loop.Signals:
                signals.append(self)
                return super().__enter__()

        def asking(self: Any, state: Any, split: data.Dataset, **options: Any) -> Any:
            last_evaluation = int(state.step) == TINY.optim.steps
            if split is self.setup.task.test if at == "test split" else last_evaluation:
                signals[-1]._hear(signal.SIGTERM, None)
            return evaluate(self, state, split, **options)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "Signals", Kept)
            patch.setattr(loop.Evaluator, "__call__", asking)
            with pytest.raises(loop.Interrupted, match=said):
                run(TINY, tmp_path)
        assert not (tmp_path / "summary.json").exists()
        run(TINY, tmp_path)
        np.testing.assert_equal(weights(tmp_path), weights(unbroken))
        assert metrics(tmp_path) == metrics(unbroken)

    def test_a_folder_that_another_run_holds_is_left_to_it(self, unbroken: Path) -> None:
        with RunFolder(unbroken).held(), pytest.raises(ValueError, match="which another process holds"):
            run(TINY, unbroken)
        assert run(TINY, unbroken)["steps"] == TINY.optim.steps

    def test_another_configuration_does_not_take_the_folder_over(self, unbroken: Path) -> None:
        with pytest.raises(ValueError, match=r"differs in learning_rate, seed"):
            run(dataclasses.replace(TINY, seed=1, learning_rate=1.0), unbroken)

    def test_a_run_of_an_earlier_version_goes_on_if_new_fields_are_at_their_defaults(
        self, unbroken: Path, tmp_path: Path
    ) -> None:
        older = json.loads((unbroken / "config.json").read_text())
        del older["window"]
        (tmp_path / "config.json").write_text(json.dumps(older))
        (tmp_path / "summary.json").write_bytes((unbroken / "summary.json").read_bytes())
        assert run(TINY, tmp_path)["test_score"] == json.loads((unbroken / "summary.json").read_text())["test_score"]
        with pytest.raises(ValueError, match=r"differs in window"):
            run(dataclasses.replace(TINY, window=3), tmp_path)

    def test_a_loss_that_is_not_finite_ends_it_and_is_not_saved(self, tmp_path: Path) -> None:
        wild = dataclasses.replace(TINY, method="full", learning_rate=1e30, head_learning_rate=1e30, clip=0)
        with pytest.raises(FloatingPointError, match="lower --learning-rate"):
            run(wild, tmp_path)
        assert not (tmp_path / "summary.json").exists()


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("rates", [{"learning_rate": 1e38}, {"head_learning_rate": 1e38}, {"weight_decay": 1e38}])
    def test_of_the_last_update_end_the_run_without_a_result(self, rates: dict, tmp_path: Path) -> None:
        """The loss is read before the update: of a single step it is finite."""
        diverging = dataclasses.replace(TINY, steps=1, warmup=0.0, **rates)
        for _ in range(2):  # the same command does not say that it is finished
            with pytest.raises(NonFiniteError, match=r"step 1: expected .*lower --learning-rate"):
                run(diverging, tmp_path)
            assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "checkpoints", ".lock"}
        assert not list((tmp_path / "checkpoints").iterdir())

    def test_end_the_program_with_a_status_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file.json").write_text(json_text(dataclasses.replace(TINY, learning_rate=1e38).as_dict()))
        command = ["train", "--config", str(tmp_path / "file.json"), "--workdir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", command)
        assert main() == 3
        assert "The last checkpoint is whole" in capsys.readouterr().out

    def test_of_an_evaluation_are_never_the_best_and_the_last_checkpoint_stands(
        self, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evaluate = loop.Evaluator.__call__

        def nan_at_the_end(self: Any, state: Any, split: data.Dataset, **options: Any) -> Any:
            seen = evaluate(self, state, split, **options)
            return seen._replace(loss=float("nan")) if int(state.step) == TINY.optim.steps else seen

        with monkeypatch.context() as patch:
            patch.setattr(loop.Evaluator, "__call__", nan_at_the_end)
            with pytest.raises(NonFiniteError, match="step 8: expected a finite validation loss, got nan"):
                run(TINY, tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
        assert not (tmp_path / "summary.json").exists()
        run(TINY, tmp_path)  # and once its cause is gone, it goes on as if nothing had been
        np.testing.assert_equal(weights(tmp_path), weights(unbroken))
        assert metrics(tmp_path) == metrics(unbroken)

    def test_of_the_test_split_leave_no_adapter_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        evaluate = loop.Evaluator.__call__

        def nan_on_test(self: Any, state: Any, split: data.Dataset, **options: Any) -> Any:
            seen = evaluate(self, state, split, **options)
            return seen._replace(loss=float("nan")) if split is self.setup.task.test else seen

        monkeypatch.setattr(loop.Evaluator, "__call__", nan_on_test)
        with pytest.raises(NonFiniteError, match="test_loss: expected a finite number, got nan"):
            run(TINY, tmp_path)
        assert not (tmp_path / "adapter").exists()
        assert not (tmp_path / "summary.json").exists()


class TestAFolderFromBefore:
    def test_goes_on_to_more_steps(self, unbroken: Path, tmp_path: Path) -> None:
        shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
        more = dataclasses.replace(TINY, steps=12)
        summary = run(more, tmp_path)
        assert (summary["steps"], summary["config"]["optim"]["steps"]) == (12, 12)
        assert metrics(tmp_path)[: len(metrics(unbroken))] == metrics(unbroken)
        assert [line["step"] for line in metrics(tmp_path)] == [4, 4, 8, 8, 12, 12]
        assert run(more, tmp_path) == summary
        with pytest.raises(ValueError, match="differs in steps"):
            run(TINY, tmp_path)

    @pytest.mark.parametrize("left", [0, 60])
    def test_whose_metrics_a_power_failure_shortened_still_ends(
        self, left: int, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
        (tmp_path / "summary.json").unlink()
        file = tmp_path / "metrics.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.index(b"\n") + 1 + left])
        summary = run(TINY, tmp_path, Console(width=400))
        assert file.read_bytes() == whole[: whole.index(b"\n") + 1]
        assert "1 whole lines of it are kept" in capsys.readouterr().out
        before = json.loads((unbroken / "summary.json").read_text())
        for name in ("test_score", "test_loss", "validation_loss", "best_step", "steps"):
            assert summary[name] == before[name]


class TestRates:
    """Of adapter, head and k: each its own, and none of them part of the program."""

    RATES: ClassVar = {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "k_learning_rate": 1e-4}

    @staticmethod
    def update(**changes: float | str) -> tuple[Any, str]:
        """The first update for gradients of 1, and the program that makes it."""
        parameters = {"z": jnp.ones(3), "head": jnp.ones(3), "k": jnp.ones(3)}
        made = optimizer(dataclasses.replace(TINY, clip=0, warmup=0, **{**TestRates.RATES, **changes}).optim)  # type: ignore[arg-type]
        state, step = made.init(parameters), jax.jit(made.update)
        return step(parameters, state, parameters)[0], step.lower(parameters, state, parameters).as_text()

    def test_each_group_has_its_own(self) -> None:
        step, _ = self.update()
        for name, rate in zip(("z", "head", "k"), self.RATES.values(), strict=True):
            # Adam's first step is the rate, up to 1 - 0.999 in float32: 2^-24 over 1e-3, halved by the root
            np.testing.assert_allclose(step[name], -rate, rtol=3e-5)

    def test_another_rate_is_the_same_program_and_another_schedule_is_not(self) -> None:
        _, program = self.update()
        assert self.update(learning_rate=3e-2, head_learning_rate=1.0)[1] == program
        assert self.update(schedule="constant")[1] != program


class TestEarlyStop:
    def test_stops_after_looks_without_improvement_and_keeps_the_best(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        still = dataclasses.replace(
            TINY, learning_rate=0.0, head_learning_rate=0.0, evaluate_every=1, patience=2, checkpoint_every=100
        )
        summary = run(still, tmp_path)
        assert (summary["best_step"], summary["steps"]) == (1, 3)

    @pytest.mark.parametrize(("choose_by", "kept"), [("score", 1), ("loss", 2)])
    def test_what_is_kept_is_what_the_configuration_chooses_by(
        self, choose_by: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two evaluations: the first is right more often, the second has the lower loss."""
        seen = [(True, 2.0), (False, 1.0), (False, 1.0)]
        evaluations = iter(loop.Predictions(np.array([right]), loss, None) for right, loss in seen)
        monkeypatch.setattr(loop.Evaluator, "__call__", lambda *_, **__: next(evaluations))
        config = dataclasses.replace(TINY, steps=2, evaluate_every=1, checkpoint_every=2, choose_by=choose_by)
        assert run(config, tmp_path)["best_step"] == kept

    def test_the_test_split_is_looked_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        evaluations = []
        whole = loop.Evaluator.__call__

        def counted(self: loop.Evaluator, state: object, split: object, **options: object) -> object:
            evaluations.append(split is self.setup.task.test)
            return whole(self, state, split, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(loop.Evaluator, "__call__", counted)
        run(TINY, tmp_path)
        assert evaluations.count(True) == 1
        assert evaluations[-1]


def losses_of_twenty_steps(**way: object) -> np.ndarray:
    """One transformer, the same batches, some way of spreading them; the step is one program throughout."""
    setup = build(dataclasses.replace(TINY, steps=20, **way))  # type: ignore[arg-type]
    state, step = setup.trainer.init(setup.model), setup.trainer.stepper(setup.model)
    losses = []
    for _, batch in itertools.islice(data.train_batches(setup.task.train, 16, seed=0), 20):
        state, seen = step(state, setup.trainer.place(batch))
        losses.append(seen["loss"])
    if way.get("parallel") != "pmap":
        assert step._cache_size() == 1  # type: ignore[attr-defined]
    return np.array(losses)


def test_eight_devices_train_like_one_for_twenty_steps_by_jit_and_by_pmap() -> None:
    """Eight partial sums instead of one: gradients differ by a few roundings (6e-8), which Adam passes on."""
    alone = losses_of_twenty_steps(devices=1)
    for way in ({"parallel": "jit", "fsdp": 2}, {"parallel": "jit"}, {"parallel": "pmap"}):
        np.testing.assert_allclose(losses_of_twenty_steps(devices=8, **way), alone, rtol=1e-6, err_msg=str(way))


def test_bfloat16_computes_in_it_and_trains_float32_weights(unbroken: Path, tmp_path: Path) -> None:
    run(dataclasses.replace(TINY, precision="bfloat16"), tmp_path)
    half, single = weights(tmp_path), weights(unbroken)
    assert {w.dtype for w in half.values()} == {np.dtype("float32")}
    assert any((half[name] != single[name]).any() for name in single)  # the control: it is not float32 all along
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (tmp_path, unbroken)]
    np.testing.assert_allclose(*losses, rtol=2**-8)  # half a unit in bfloat16's last place, of logits of order one


def test_activations_are_recomputed_where_that_is_asked_for(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the program: the flag was broken for every adapter while a test that set the attribute passed."""
    (tmp_path / "file.json").write_text(json_text(TINY.as_dict()))
    command = ["train", "--config", str(tmp_path / "file.json"), "--workdir", str(tmp_path / "run"), "--remat"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert TrainConfig.from_file(tmp_path / "run" / "config.json").device.remat
    ours, theirs = ([line["loss"] for line in metrics(w) if "loss" in line] for w in (tmp_path / "run", unbroken))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the same operations, fused in another way


def test_accumulated_parts_are_one_batch(unbroken: Path, tmp_path: Path) -> None:
    """The same rows in two halves: the same gradients up to rounding, so the same evaluations; and what is logged is of
    the whole batch, not of its last part.
    """
    run(dataclasses.replace(TINY, accumulate=2), tmp_path)
    for name in ("validation_loss", "loss", "gradient_norm", "update_norm"):
        ours, theirs = ([line[name] for line in metrics(w) if name in line] for w in (tmp_path, unbroken))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)


class TestConfigurations:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "magic"}, "--method: expected one of"),
            ({"steps": 0}, "--steps: expected at least 1"),
            ({"accumulate": 3}, "--accumulate: expected a divisor"),
            ({"fsdp": 2, "parallel": "pmap"}, "--fsdp"),
            ({"warmup": 1.0}, "--warmup"),
            ({"adapter": ("r",)}, "expected field=value"),
            ({"adapter": ("rank=2",)}, "expected one of .* for lora, got 'rank'"),
            ({"adapter": ("r=0",)}, "r: expected a rank of at least 1"),
        ],
    )
    def test_nonsense_is_refused_before_anything_is_loaded(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)

    def test_adapter_fields_are_read_as_json_or_text(self) -> None:
        (config,) = adapter_config("ntk_attention", ("rank=4", "target=layers.0", "whiten=false"))
        assert (config.rank, config.target, config.whiten) == (4, "layers.0", False)  # type: ignore[attr-defined]

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_named_configuration_is_whole(self, name: str) -> None:
        assert isinstance(CONFIGS[name][1], TrainConfig)
        assert CONFIGS[name][0]
