"""Runs as users start them: in processes of their own, several together, killed at any moment."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntk_prefix.artifacts import CHECKOUT

pytestmark = pytest.mark.slow

KILLS = 50


def start(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "train", "tiny", "--workdir", str(workdir), "--method", "lora", *arguments]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def weights(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "adapter" / "adapter_model.safetensors")


def committed(workdir: Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()}


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_sigterm_saves_and_exits_with_zero(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "4000")
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in finish(process)
    assert committed(tmp_path)


@pytest.mark.parametrize("way", [("--parallel", "jit"), ("--parallel", "jit", "--fsdp", "2"), ("--parallel", "pmap")])
def test_two_processes_train_and_save_together(way: tuple[str, ...], tmp_path: Path) -> None:
    common = ("--steps", "20", "--checkpoint-every", "10", "--evaluate-every", "10", *way)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--distributed", "--coordinator", address, "--processes", "2", "--process")
    both = [start(tmp_path / "both", *common, *together, str(index), devices=2) for index in range(2)]
    for process in both:
        finish(process)
    finish(start(tmp_path / "alone", "--steps", "20", "--checkpoint-every", "10", "--evaluate-every", "10"))
    assert 20 in committed(tmp_path / "both")
    # gradients are summed in another order, and Adam divides small ones by their size
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "alone"), rtol=1e-5)


def test_one_of_two_processes_is_asked_to_stop_and_both_save_the_same_step(tmp_path: Path) -> None:
    """Each stopped at its own step before, and waited for the other for ever."""
    far = ("--steps", "1000000", "--checkpoint-every", "1000000", "--evaluate-every", "1000000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--distributed", "--coordinator", address, "--processes", "2", "--process")
    both = [start(tmp_path, *far, *together, str(index)) for index in range(2)]
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.2)
        assert all(process.poll() is None for process in both)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        assert "the same command goes on" in finish(process)
    assert len(committed(tmp_path)) == 1


def test_killed_at_any_moment_it_loses_nothing_and_ends_bit_identical(tmp_path: Path) -> None:
    """The run is made so long that most of the kills fall into steps and saves, not into starting up."""
    arguments = ("--steps", "1500", "--checkpoint-every", "5", "--evaluate-every", "50", "--patience", "0")
    finish(start(tmp_path / "unbroken", *arguments))
    generator, workdir, kills = random.Random(0), tmp_path / "killed", 0
    newest = 0
    while not (workdir / "summary.json").exists():
        process = start(workdir, *arguments)
        if kills < KILLS:
            while process.poll() is None and max(committed(workdir), default=0) <= newest:
                time.sleep(0.05)
            time.sleep(generator.uniform(0, 1))
        if kills < KILLS and process.poll() is None:
            seen = max(committed(workdir), default=0)
            process.kill()
            process.communicate()
            kills += 1
            assert max(committed(workdir), default=0) >= seen >= newest, "a committed checkpoint was lost"
            newest = seen
        else:
            finish(process)
    assert kills == KILLS
    ours, theirs = weights(workdir), weights(tmp_path / "unbroken")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
