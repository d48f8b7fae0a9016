"""Every benchmark runs from its command line, at its smallest, without the peers that are not installed here."""

import os
import subprocess
import sys

import pytest

SMALLEST = {
    "bench_attention": ["--rounds", "2"],
    "bench_decode": ["--batches", "1", "--prompt", "4", "--new", "2", "--rounds", "1"],
    "bench_fit": ["--tokens", "32", "--texts", "4", "--length", "16", "--starts", "1", "--layers", "0"],
    "bench_loading": ["--shape", "tiny", "--steps", "1"],
    "bench_prefix_ntk": ["--n", "4", "--d", "4", "--m", "64", "--rounds", "2"],
    "bench_ranker": ["--pairs", "8", "--lengths", "16", "8"],
    "bench_step": ["--repeats", "2", "--rows", "ntk", "full"],
}
"""Flags of each."""


@pytest.mark.slow
@pytest.mark.parametrize("bench", SMALLEST)
def test_a_benchmark_runs(bench: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = ["--out", str(tmp_path_factory.mktemp(bench))] if bench == "bench_fit" else []
    command = [sys.executable, "-m", f"tests.bench.{bench}", *SMALLEST[bench], *out]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    # 1: it ran, and so little work missed its target
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.strip()
