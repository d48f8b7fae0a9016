"""Checkpoints: bit-identical, on any devices; damaged ones are passed over; killing the process loses nothing."""

import contextlib
import gc
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.small_disk import largest_file
from train.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[2]


def damaged(test):
    """Orbax reads many arrays at once; when the first error ends that, the others' go unheard, here and now."""
    unheard = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return unheard(pytest.mark.usefixtures("collected")(test))


@pytest.fixture
def collected():
    """The test's garbage is collected at its own end: its errors do not reach a later test."""
    yield
    gc.collect()


def tree(step: int) -> dict:
    """A tree of every kind of leaf; its values tell the step."""
    return {
        "weights": [jnp.arange(16, dtype=jnp.float32).reshape(8, 2) + step, jnp.full((3,), step, jnp.bfloat16)],
        "moments": np.arange(4, dtype=np.float64) * step,
        # large enough to be stored outside of the nodes that OCDBT itself checks
        "noise": np.random.default_rng(step).normal(size=2000),
        "empty": jnp.zeros((0, 2)),
        "key": jax.random.key(step),
        "step": step,
        "scale": step / 3,
        "done": step > 2,
        "count": jnp.int32(step),
    }


def raw(leaf) -> bytes:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(one) is type(other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
        assert raw(one) == raw(other)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"step": step})
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A directory with the checkpoints of steps 2 and 3: a copy, so that a test may damage it."""
    return shutil.copytree(saved_once, tmp_path / "run")


def test_what_is_saved_comes_back(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        step, restored, info = checkpoints.restore_latest(tree(0))
    assert step == 3
    assert info == {"step": 3}
    assert_same(restored, tree(3))


@damaged
@pytest.mark.parametrize("waited", [True, False])
def test_a_disk_that_is_full_is_one_line(tmp_path, caplog, waited):
    """Orbax writes a traceback into the log of what it raises: nothing of that is shown."""

    def save() -> None:
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, {"x": np.arange(5000)})
            if waited:
                checkpoints.wait()

    with largest_file(100), pytest.raises(CheckpointError) as caught:
        save()
    assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if record.exc_info]
    # not saved to again: in this process threads of Orbax still write what has failed
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore_latest({"x": np.arange(5000)}) is None


def test_a_new_directory_has_none(tmp_path):
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.restore_latest(tree(0)) is None


def test_donation_after_a_save_does_no_harm(tmp_path):
    @jax.jit
    def value(x):
        return jnp.cos(x)

    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    state = value(jnp.arange(1 << 16, dtype=jnp.float32))
    expected = np.array(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"state": state})
        for _ in range(20):
            state = step(state)
        state.block_until_ready()
        restored = checkpoints.restore_latest({"state": state}).tree
    np.testing.assert_array_equal(restored["state"], expected)


def test_numpy_arrays_may_change_after_a_save(tmp_path):
    state = {"state": np.zeros(1 << 16)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state["state"] += 1
        assert not checkpoints.restore_latest(state).tree["state"].any()


@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8), (4, 1), (1, 4)])
def test_restores_onto_another_number_of_devices(tmp_path, before, after):
    def over(count: int, replicated: bool) -> NamedSharding:
        spec = PartitionSpec() if replicated else PartitionSpec("rows")
        return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("rows",)), spec)

    values = {"sharded": np.arange(16, dtype=np.float32).reshape(8, 2), "replicated": np.arange(5, dtype=np.int32)}
    placed = {name: jax.device_put(x, over(before, name == "replicated")) for name, x in values.items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, placed)
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over(after, name == "replicated"))
            for name, x in values.items()
        }
        restored = checkpoints.restore_latest(like).tree
    for name, x in values.items():
        np.testing.assert_array_equal(restored[name], x)
        assert restored[name].sharding == like[name].sharding


def test_a_step_is_written_once_and_never_before_a_later_one(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(3, tree(7))
        assert_same(checkpoints.restore_latest(tree(0)).tree, tree(3))
        with pytest.raises(CheckpointError, match="expected a step after 3, which is saved there, got 1"):
            checkpoints.save(1, tree(1))
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Checkpoints(saved, keep=0)


# --------------------------------------------------------------------------------- damaged, foreign


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def lose_the_arrays(folder: Path) -> None:
    for path in [path for path in folder.rglob("d/*") if path.is_file()]:
        path.unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def lose_the_record(folder: Path) -> None:
    shutil.rmtree(folder / "record")


def swap_the_record(folder: Path) -> None:
    (folder / "record" / "metadata").write_text('{"leaves": 3}')


DAMAGES = [flip_a_bit, cut_short, lose_the_arrays, empty, lose_the_record, swap_the_record]


@damaged
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_good_one_is_used(saved, damage, caplog):
    damage(saved / "3")
    with caplog.at_level(logging.WARNING, "train.checkpoint"), Checkpoints(saved) as checkpoints:
        step, restored, _ = checkpoints.restore_latest(tree(0))
        assert step == 2
        assert_same(restored, tree(2))
        assert f"checkpoint {saved / '3'} cannot be used: " in caplog.text
        # the run goes on and saves that step again
        checkpoints.save(3, tree(3))
        assert_same(checkpoints.restore_latest(tree(0)).tree, tree(3))
    assert (saved / "3.unusable-1").is_dir()


@damaged
def test_every_bit_counts(saved):
    """Whatever byte of the arrays' files is flipped: the old values come back, or the checkpoint is refused."""
    shutil.rmtree(saved / "2")
    files = [path for path in (saved / "3").rglob("*") if path.is_file() and "/d/" in str(path)]
    assert files
    refused = 0
    for number in range(12):
        path = files[number % len(files)]
        intact = path.read_bytes()
        data = bytearray(intact)
        data[random.Random(number).randrange(len(data))] ^= 1 << number % 8
        path.write_bytes(data)
        with Checkpoints(saved) as checkpoints:
            try:
                assert_same(checkpoints.restore_latest(tree(0)).tree, tree(3))
            except CheckpointError:
                refused += 1
        path.write_bytes(intact)
    assert refused


@damaged
def test_none_good_is_an_error_and_changes_nothing(saved):
    for step in ("2", "3"):
        flip_a_bit(saved / step)
    before = sorted(saved.rglob("*"))
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=r"found none \(") as caught:
        checkpoints.restore_latest(tree(0))
    assert str(saved / "2") in str(caught.value)
    assert str(saved / "3") in str(caught.value)
    assert sorted(saved.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": [jnp.zeros((8, 3), jnp.float32), jnp.zeros(3, jnp.bfloat16)]},
            r"weights.*\[8, 3\].*got.*\[8, 2\]",
        ),
        ({"count": jnp.float32(0)}, "count.*float32.*got.*int32"),
        ({"another": np.zeros(2)}, "it does not have .*another"),
        ({"key": jax.random.key(0, impl="rbg")}, "key.*rbg"),
    ],
)
def test_one_of_another_model_is_refused(saved, change, message):
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=rf"it is of another model or optimizer: .*{message}"):
            checkpoints.restore_latest(tree(0) | change)
        with pytest.raises(CheckpointError, match=r"it also has .*scale"):
            checkpoints.restore_latest({name: leaf for name, leaf in tree(0).items() if name != "scale"})


def test_strangers_and_leftovers_are_named(saved, caplog):
    (saved / "notes.txt").write_text("mine")
    (saved / "9").write_text("a file, no folder")
    (saved / "old").mkdir()
    (saved / "4.orbax-checkpoint-tmp").mkdir()
    with caplog.at_level(logging.WARNING, "train.checkpoint"), Checkpoints(saved) as checkpoints:
        assert checkpoints.restore_latest(tree(0)).step == 3
    for name in ("notes.txt", "9", "old"):
        assert f"{saved / name} is no checkpoint: it is left alone" in caplog.text
        assert (saved / name).exists()
    assert "4.orbax-checkpoint-tmp was half-written when its run was killed: it is removed" in caplog.text
    assert not (saved / "4.orbax-checkpoint-tmp").exists()


# ------------------------------------------------------------------------------------------ kill -9


def advanced(state: dict, step: int) -> dict:
    """One deterministic step of a little run: numpy only, the same in every process."""
    return {"weights": np.sin(state["weights"] * 1.5 + step), "momentum": state["momentum"] * 0.9 + state["weights"]}


def beginning() -> dict:
    return {"weights": np.linspace(0, 1, 4096), "momentum": np.zeros(4096)}


def run(directory: str) -> None:
    """Train for ever, saving every step; says which step is committed. The parent kills this."""
    with Checkpoints(directory) as checkpoints:
        step, state, _ = checkpoints.restore_latest(beginning()) or (0, beginning(), None)
        print("ready", step, flush=True)
        while True:
            step, state = step + 1, advanced(state, step + 1)
            checkpoints.save(step, state, {"step": step})
            if step % 3 == 0:
                checkpoints.wait()
            committed = checkpoints.steps()
            if committed:
                print("committed", committed[-1], flush=True)


def kill_and_check(directory: Path, kills: int, seed: int) -> None:
    rng, committed, state, at = random.Random(seed), 0, beginning(), 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.train.test_checkpoint", str(directory)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with contextlib.closing(child.stdout):
            assert child.stdout.readline().startswith("ready"), "the run did not start: its directory is unreadable"
            # it gets on between the kills, however slow the machine is
            lines = [child.stdout.readline().rstrip("\n") for _ in range(2)]
            time.sleep(rng.uniform(0, 0.5))
            child.kill()
            child.wait()
            lines += child.stdout.read().split("\n")[:-1]  # the last one may be half a line
        committed = max([committed, *(int(line.split()[1]) for line in lines)])
        with Checkpoints(directory) as checkpoints:
            step, found, info = checkpoints.restore_latest(beginning())
        assert step >= committed
        assert info == {"step": step}
        while at < step:
            at += 1
            state = advanced(state, at)
        assert_same(found, state)
        committed = step
    assert committed >= kills
    assert not list(directory.glob("*unusable*"))


def test_killing_loses_nothing(tmp_path):
    kill_and_check(tmp_path / "run", kills=2, seed=0)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path):
    kill_and_check(tmp_path / "run", kills=50, seed=1)


if __name__ == "__main__":
    run(sys.argv[1])
