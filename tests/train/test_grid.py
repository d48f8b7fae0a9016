"""Every method with every flag, through a whole run of two steps: on eight devices the numbers of one.

A flag that changes no number is held against a run on one device without any; bfloat16, which does, against the same run
in float32. Flags go together where each still shows, for compilation is most of the time; if such a run differs, each of
its flags is tried alone and the message names those that fail.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ntk_prefix import models, sharding
from ntk_prefix.checks import UsageError
from ntk_prefix.models import cross_entropy
from ntk_prefix.training import Trainer
from train import setup
from train.checkpoint import Checkpoints
from train.config import METHODS, TrainConfig
from train.loop import run

KEPT = Path(__file__).parents[1] / "fixtures" / "a340712"

MESH: dict[str, dict[str, Any]] = {
    "window": {"window": 3},
    "remat": {"remat": True},
    "accumulate 2": {"accumulate": 2},
    "fsdp 2": {"fsdp": 2},
    "tensor 2": {"tensor": 2},
    "resume": {"resume": True},
}
PMAP: dict[str, dict[str, Any]] = {"window": {"window": 3}, "pmap": {"parallel": "pmap"}}
NARROW: dict[str, dict[str, Any]] = {"window": {"window": 3}, "bfloat16": {"precision": "bfloat16"}}
"""Which flags go together, each by its name."""

WITHOUT_DRAWS = {"prefix_propagation": ("dropout=0",)}
"""Where a step's batch comes in parts: each of them draws its own dropout, as a step of its own would."""

EXACT = 1e-5
"""Sums over rows and heads in another order are a few roundings of float32 (6e-8) each, which Adam divides by roots of such
sums: seen are 2e-6 at most. A step of Adam on the wrong gradient is some 1e-3 of the largest weight."""

BFLOAT16 = 2**-6
"""Relative, of the losses: activations of one layer, rounded to 2^-9 some eight times in a row. Weights say nothing: Adam's
first steps are near the signs of their gradients."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    loss: float
    gradient_norm: float
    validation_loss: float
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BERT of one layer: the first of the one that is kept."""
    folder = shutil.copytree(KEPT / "bert", tmp_path_factory.mktemp("grid") / "bert")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    first = {name: value for name, value in tensors.items() if "layer.1." not in name}
    assert len(first) < len(tensors)
    save_file(first, folder / "model.safetensors")
    return folder


def once(program: Callable[..., Any]) -> Callable[..., Any]:
    """A run that goes on builds all anew but its step, which is a function of the same arguments: traced once."""
    made: list[Any] = []

    def same(trainer: Trainer, model: Any) -> Any:
        made[:] = made or [program(trainer, model)]
        return made[0]

    return same


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Result]]:
    """Return a function that takes two steps as ``python -m train`` does; what was run before is not run again."""
    saved: dict[str, np.ndarray] = {}

    def remember(checkpoints: Checkpoints, step: int, tree: Any, info: Any = None) -> None:
        saved.clear()
        saved.update({name: np.array(leaf) for name, leaf in tree.items() if name.startswith("trained/")})
        save(checkpoints, step, tree, info)

    def train(method: str, *, resume: bool = False, **flags: Any) -> Result:
        config = TrainConfig(
            model=str(encoder),
            task="sst2",
            method=method,
            data_dir=str(KEPT / "data" / "sst2"),
            # one length of text, so one program
            max_length=8,
            grouped=1,
            train_size=32,
            validation_size=8,
            batch_size=16,
            steps=2,
            evaluate_every=1,
            checkpoint_every=1 if resume else 2,
            # the same rates however many steps are asked for
            schedule="constant",
            warmup=0.0,
            test=False,
            **flags,
        )
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "program", once(Trainer.program))
            for steps in (1, 2) if resume else (2,):
                summary = run(config.changed(steps=steps), folder)
        assert (summary["steps"], summary["config"]["method"]) == (2, method)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "loss" in line][-1]
        # softmax does not see a number added to all scores of a query: that gradient is rounding, and Adam steps by its sign
        weights = {name: x for name, x in saved.items() if "key/bias" not in name}
        assert weights
        return Result(last["loss"], last["gradient_norm"], summary["validation_loss"], weights)

    save = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", remember)
        kept = functools.cache(lambda method, flags: train(method, **dict(flags)))

        def once_each(method: str, **flags: Any) -> Result:
            """Whatever the order of flags, and whether one is given that says nothing: the same run."""
            return kept(method, frozenset((name, value) for name, value in flags.items() if value not in ((), None)))

        yield once_each


def difference(found: Result, wanted: Result, *, weights: bool = True) -> float:
    """Return the largest difference of the last step's numbers, each relative to itself, and of weights, to the largest."""
    numbers = ("loss", "gradient_norm", "validation_loss")
    differences = [abs(getattr(found, name) / getattr(wanted, name) - 1) for name in numbers]
    if weights:
        assert found.weights.keys() == wanted.weights.keys()
        largest = max(np.abs(weight).max() for weight in wanted.weights.values())
        differences += [np.abs(found.weights[name] - w).max() / largest for name, w in wanted.weights.items()]
    return float(max(differences))


def failing(trained: Callable[..., Result], method: str, flags: dict[str, dict[str, Any]], tolerance: float) -> str:
    """Return which of the flags fail, by name, if they do together; nothing if they do not."""

    def differs(chosen: dict[str, Any]) -> bool:
        chosen = {"window": None, **chosen}
        if "accumulate" in chosen:
            chosen["adapter"] = WITHOUT_DRAWS.get(method, ())
        alone = trained(method, devices=1, window=chosen["window"], adapter=chosen.get("adapter", ()))
        return not difference(trained(method, **chosen), alone, weights=tolerance == EXACT) < tolerance

    if not differs({name: value for flag in flags.values() for name, value in flag.items()}):
        return ""
    return ", ".join(name for name, flag in flags.items() if differs(flag)) or f"only together: {', '.join(flags)}"


LIKE_ANOTHER = {"bitfit", "lora_ntk", "ntk_attention_published", "head"}
"""Methods whose layers are those of others, or of the frozen model: on replicas and in bfloat16 slow tests."""

every_method = pytest.mark.parametrize("method", METHODS)
one_of_a_kind = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in LIKE_ANOTHER else ()) for m in METHODS]
)


class TestEveryMethod:
    @every_method
    def test_on_a_mesh_trains_as_on_one_device(self, method: str, trained: Callable[..., Result]) -> None:
        assert not failing(trained, method, MESH, EXACT)

    @one_of_a_kind
    def test_on_replicas_trains_as_on_one_device(self, method: str, trained: Callable[..., Result]) -> None:
        assert not failing(trained, method, PMAP, EXACT)

    @one_of_a_kind
    def test_in_bfloat16_trains_nearly_so(self, method: str, trained: Callable[..., Result]) -> None:
        assert not failing(trained, method, NARROW, BFLOAT16)
        alone, narrow = trained(method, devices=1, window=3), trained(method, precision="bfloat16", window=3)
        assert difference(narrow, alone, weights=False) > EXACT  # it is another number format


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fsdp": 3}, "--fsdp: expected a divisor of the 8 devices, got 3"),
        ({"fsdp": 4, "tensor": 4}, "--fsdp times --tensor: expected a divisor of the 8 devices, got 4 x 4"),
        ({"tensor": 2, "batch_size": 6}, "--batch-size: expected rows divisible by the 4 devices"),
        ({"tensor": 8}, "--tensor: expected a divisor of the model's 4 query heads, got 8"),
        ({"fsdp": 3, "devices": 3, "batch_size": 9}, "--fsdp: expected a divisor of the model's 16 features, got 3"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_loaded(
    flags: dict[str, Any], message: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, what in ((setup, "load_model"), (models, "load_tokenizer")):
        monkeypatch.setattr(where, what, lambda *_: pytest.fail("something was loaded"))
    config = TrainConfig(model=str(encoder), task="sst2", data_dir=str(KEPT / "data" / "sst2"), **flags)
    with pytest.raises(UsageError, match=message):
        run(config, tmp_path)
    assert not any(tmp_path.glob("*.json"))


def test_a_gradient_that_is_not_reduced_is_seen(
    trained: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: each replica takes the gradient of its own rows."""
    alone = trained("lora", devices=1, window=3)
    monkeypatch.setattr(jax.lax, "psum", lambda tree, axis: tree)
    wrong = trained("lora", parallel="pmap", window=3, seed=0)
    assert difference(wrong, alone) > 100 * EXACT


def test_a_flag_that_changes_a_number_is_named(trained: Callable[..., Result]) -> None:
    """The other control: one flag of several does something else."""
    flags = {"a lower rate": {"learning_rate": 1e-4, "window": 3}, "two devices": {"devices": 2, "window": 3}}
    assert failing(trained, "lora", flags, EXACT) == "a lower rate"


@pytest.mark.parametrize("method", ["full", pytest.param("lora_ntk", marks=pytest.mark.slow)])
def test_a_decoder_on_a_mesh_trains_as_on_one_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is taken in parts of two tokens, and its table is looked up and multiplied where it lies."""
    ids = np.random.default_rng(0).integers(1, 32, (8, 12)).astype(np.int32)
    labels = np.where(np.arange(12)[None] < 5, -1, ids)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, "weight": np.ones(8, np.float32)}
    found = []
    for shape in (None, (2, 2, 2)):
        monkeypatch.setattr(cross_entropy, "PART_BYTES", 2 * 8 * 32 * 4 // (8 if shape else 1))
        mesh = None if shape is None else jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), sharding.AXES)
        config = TrainConfig(model="", task="gsm8k", method=method, schedule="constant", warmup=0.0)
        model = models.from_pretrained(KEPT / "llama", task="causal-lm", mesh=mesh)
        setup.adapt(model, config, setup.model_inputs(model, batch))
        trainer = setup.trainer_of(config, "causal-lm", {} if mesh is None else {"mesh": mesh})
        step, state = trainer.stepper(model), trainer.init(model)
        for _ in range(2):
            state, metrics = step(state, trainer.place(batch))
        weights = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state.trained)}
        found.append(Result(float(metrics["loss"]), float(metrics["gradient_norm"]), 1.0, weights))
    assert difference(found[1], found[0]) < EXACT
