"""The grid of certificates: a stopped run goes on, and a cell without a certificate has its reason."""

from pathlib import Path

import jax
import pytest

from ntk_prefix.certificate.length import Progress
from theory import sweep
from theory.problem import Problem, load

GRID = {"sigma": (0.5, 1.0), "d": (2,), "n": (3, 4), "longest": 2**14}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[sweep.Cell]:
    """The cells that are measured, in their order; what is certified of them is invented."""
    cells: list[sweep.Cell] = []

    def certified(problem: Problem, model: str, longest: int, of: str, tried: Progress) -> sweep.Row:
        cells.append((model, problem.sigma, problem.d, problem.n))
        row: sweep.Row = {
            "of": of, "model": model, "sigma": problem.sigma, "d": problem.d, "n": problem.n, "refused": None,
            "m": 1024 * problem.n, "rate": 1e-3, "margin": 1.1, "steps": 50, "times": [1.0, 50.0],
            "lower": [0.5, 0.005], "upper": [0.6, 0.01],
        }  # fmt: skip
        if model == "tied":
            row |= {"refused": "m = 16,384: the drift is small", "m": None, "rate": None, "margin": None, "steps": None}
            row |= {"times": [], "lower": [], "upper": []}
        return row

    monkeypatch.setattr(sweep, "certified", certified)
    return cells


def test_table_and_figure_of_every_cell(
    measured: list[sweep.Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main("certificate", out=tmp_path, **GRID) == 0
    assert len(measured) == 8
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 8
    assert lines[2] == "| fixed | 0.5 | 2 | 3 | 3,072 | 0.001 | 50 | - |"
    assert lines[-1].endswith("| - | - | - | m = 16,384: the drift is small |")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "figure.png" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_a_larger_grid_takes_over(
    measured: list[sweep.Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invented = sweep.certified
    monkeypatch.setattr(sweep, "picture", lambda rows, longest: b"")

    def stopped(*of: object) -> sweep.Row:
        if len(measured) == 3:
            raise KeyboardInterrupt
        return invented(*of)

    monkeypatch.setattr(sweep, "certified", stopped)
    assert sweep.main("certificate", out=tmp_path, **GRID) == 130
    assert not (tmp_path / "table.md").exists()
    # as a crash of the machine leaves it
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"of": "seed 0')
    monkeypatch.setattr(sweep, "certified", invented)
    assert sweep.main("certificate", out=tmp_path, **GRID) == 0
    assert len(measured) == len(set(measured)) == 8
    assert sweep.main("certificate", out=tmp_path, **GRID | {"n": (3, 4, 5)}) == 0
    assert {n for *_, n in measured[8:]} == {5}


def test_another_seed_takes_nothing_over(
    measured: list[sweep.Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "picture", lambda rows, longest: b"")
    for seed in (0, 1):
        assert sweep.main("certificate", out=tmp_path, seed=seed, **GRID) == 0
    assert len(measured) == 16


def test_cells_of_other_grids_and_settings_are_kept(
    measured: list[sweep.Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "picture", lambda rows, longest: b"")
    for change in ({}, {"sigma": (2.0,)}, {"longest": 2**10}, {}):
        assert sweep.main("certificate", out=tmp_path, **GRID | change) == 0
    assert len(measured) == 8 + 4 + 8
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + 8


def test_a_real_cell() -> None:
    with jax.enable_x64(True):
        problem = load("digits", inputs=2, width=8, sigma=1.0, seed=0, profile="quick")
        found, none = (sweep.certified(problem, "fixed", longest, "") for longest in (2**13, 64))
    assert found["refused"] is None
    assert found["m"] <= 2**13
    assert 0 < found["upper"][-1] <= sweep.ACCURACY < found["upper"][-2]
    assert found["times"][-1] == found["steps"]
    assert all(low <= up for low, up in zip(found["lower"], found["upper"], strict=True))
    assert none["m"] is None
    assert none["refused"].startswith("m = 64: ")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n": ()}, "--n: expected at least one, got none"),
        ({"longest": 1023}, "--longest: expected an even number of tokens"),
        ({"d": (65,)}, "--width <= 64"),
        ({"sigma": (-1.0,)}, "--sigma: expected a finite number > 0"),
        ({"n": (2000,)}, "--inputs <= 1797"),
    ],
)
def test_a_grid_that_cannot_be_meant(
    given: dict, told: str, measured: list[sweep.Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main("certificate", out=tmp_path / "out", **GRID | given) == 2
    assert told in " ".join(capsys.readouterr().out.split())
    assert not measured
    assert not (tmp_path / "out").exists()
