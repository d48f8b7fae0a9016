"""The command, its report, and what happens when it is killed, misled or sabotaged."""

import dataclasses
import html.parser
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import theory.__main__ as command
from ntk_prefix.artifacts import CHECKOUT
from theory import figures, fits
from theory.claim import Check, Claim, Evidence
from theory.claims import NAMES, claims
from theory.problem import Problem, load
from theory.report import configuration

CHEAP = ("gradients", "positivity")


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "theory", *map(str, arguments)], cwd=CHECKOUT, capture_output=True, text=True, **options
    )


@pytest.fixture
def problem() -> Problem:
    return load("digits", inputs=5, width=3, sigma=1.0, seed=0, profile="quick")


def invented(holds: bool = True, control_holds: bool = False, name: str = "positivity") -> Claim:
    """A claim that measures nothing, to test what is made of its result."""

    def evidence(holds: bool) -> Evidence:
        return Evidence((Check("a check with a | in it", 1.0, 2.0 if holds else 0.5),), {"tokens": 64})

    return dataclasses.replace(
        claims((name,))[0],
        measure=lambda problem: evidence(holds),
        control=lambda problem: evidence(control_holds),
        draw=lambda evidence, control: figures.panels()[0],
    )


class TestReport:
    def test_everything_a_reader_needs_is_written(self, tmp_path: Path) -> None:
        done = run(*CHEAP, "--out", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {
            "index.html", "report.md", "claims.json", "configuration.json", "figures", ".lock",
        }  # fmt: skip
        records = json.loads((tmp_path / "claims.json").read_text())
        assert [record["name"] for record in records] == list(CHEAP)
        for record in records:
            assert set(record) >= {
                "name", "statement", "source", "holds", "measured", "bound", "margin", "control", "control_failed",
                "seconds", "parameters",
            }  # fmt: skip
            assert record["holds"]
            assert record["control_failed"]
        page = (tmp_path / "index.html").read_text()
        html.parser.HTMLParser().feed(page)
        assert page.count("data:image/png;base64,") == len(CHEAP)
        assert not re.search(r'(src|href)="(?!#|data:)', page), "the page must not need any other file"
        config = json.loads((tmp_path / "configuration.json").read_text())
        assert config["versions"]["jax"]
        assert re.match(r"[0-9a-f]{40}|unknown", config["git"])
        markdown = (tmp_path / "report.md").read_text()
        for name in CHEAP:
            assert f"figures/{name}.png" in markdown
            assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    def test_a_bar_in_a_cell_does_not_end_it(self, problem: Problem, tmp_path: Path) -> None:
        command.verify(problem, [invented()], tmp_path, Console(quiet=True))
        assert "a check with a \\| in it" in (tmp_path / "report.md").read_text()


class TestVerdict:
    @pytest.mark.parametrize(("holds", "control_holds"), [(True, False), (False, False), (True, True), (False, True)])
    def test_a_claim_holds_only_with_a_failing_control(
        self, holds: bool, control_holds: bool, problem: Problem, tmp_path: Path
    ) -> None:
        outcome = command.verify(problem, [invented(holds, control_holds)], tmp_path, Console(quiet=True))
        assert outcome.holds == (holds and not control_holds)
        assert outcome.records[0]["control_failed"] == (not control_holds)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_sabotaged_control_ends_the_run_with_1(
        self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Replace one claim's control by one that holds: its verdict must turn, and with it the exit status."""
        module = importlib.import_module(f"theory.claims.{name}")
        monkeypatch.setattr(module, "CLAIM", invented(holds=True, control_holds=False, name=name))
        assert command.main((name,), out=tmp_path / "sound") == 0
        monkeypatch.setattr(module, "CLAIM", invented(holds=True, control_holds=True, name=name))
        assert command.main((name,), out=tmp_path / "sabotaged") == 1
        assert "not tested" in (tmp_path / "sabotaged" / "index.html").read_text()

    def test_a_real_control_that_is_sabotaged_is_noticed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The same with a real measurement: the control that forgets to duplicate an input."""
        module = importlib.import_module("theory.claims.positivity")
        monkeypatch.setattr(module, "CLAIM", dataclasses.replace(module.CLAIM, control=module.CLAIM.measure))
        assert command.main(("positivity",), out=tmp_path) == 1

    def test_nan_never_holds(self) -> None:
        for at_least in (True, False):
            assert not Check("", float("nan"), 1.0, at_least).holds
            assert not Check("", 1.0, float("nan"), at_least).holds
            assert Check("", float("nan"), 1.0, at_least).margin == 0

    def test_margin_is_at_least_one_exactly_when_a_check_holds(self) -> None:
        for at_least in (True, False):
            for measured in (-2.0, 0.0, 0.5, 1.0, 2.0):
                for bound in (-1.0, 0.0, 1.0):
                    check = Check("", measured, bound, at_least)
                    if min(measured, bound) > 0:
                        assert (check.margin >= 1) == check.holds
                    else:
                        assert (check.margin > 0) == check.holds


class TestInterruption:
    def test_a_killed_run_leaves_no_report_and_is_taken_up(self, tmp_path: Path) -> None:
        claims = ("gradients", "perturbation")
        arguments = [sys.executable, "-m", "theory", *claims, "--inputs", "4", "--width", "3", "--out", str(tmp_path)]
        with subprocess.Popen(arguments, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 300
            while not (tmp_path / ".unfinished" / "gradients.json").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
        assert not {path.name for path in tmp_path.iterdir()} & {"index.html", "report.md", "claims.json", "figures"}
        before = (tmp_path / ".unfinished" / "gradients.json").read_bytes()
        done = run(*arguments[3:])
        assert done.returncode == 0, done.stdout
        assert "from the interrupted run" in done.stdout
        records = json.loads((tmp_path / "claims.json").read_text())
        assert records[0] == json.loads(before)
        assert not (tmp_path / ".unfinished").exists()

    def test_another_configuration_starts_afresh(self, problem: Problem, tmp_path: Path) -> None:
        calls = []

        def counted(problem: Problem) -> Evidence:
            calls.append(problem.seed)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return Evidence((Check("", 1.0, 2.0),))

        first, second = invented(name="gradients"), invented(name="kernel")
        chosen = [dataclasses.replace(first, measure=counted), dataclasses.replace(second, measure=counted)]
        with pytest.raises(KeyboardInterrupt):
            command.verify(problem, chosen, tmp_path, Console(quiet=True))
        command.verify(problem, chosen, tmp_path, Console(quiet=True))
        assert calls == [0, 0, 0], "the first claim was finished and must not be measured again"
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            command.verify(problem, chosen, tmp_path, Console(quiet=True))
        command.verify(dataclasses.replace(problem, seed=1), chosen, tmp_path, Console(quiet=True))
        assert calls == [0, 0, 1, 1], "another seed must not take over what this one measured"

    def test_an_older_report_stays_whole_until_the_new_one_is_done(self, problem: Problem, tmp_path: Path) -> None:
        command.verify(problem, [invented()], tmp_path, Console(quiet=True))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

        def killed(problem: Problem) -> Evidence:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            command.verify(problem, [dataclasses.replace(invented(), control=killed)], tmp_path, Console(quiet=True))
        assert before == {path: path.read_bytes() for path in before}

    def test_two_runs_do_not_share_a_folder(self, problem: Problem, tmp_path: Path) -> None:
        def again(problem: Problem) -> Evidence:
            with pytest.raises(ValueError, match="which another process holds"):
                command.verify(problem, [invented()], tmp_path, Console(quiet=True))
            return Evidence((Check("", 1.0, 2.0),))

        outcome = command.verify(
            problem, [dataclasses.replace(invented(), measure=again)], tmp_path, Console(quiet=True)
        )
        assert outcome.holds


class TestBadInput:
    """Each is told before any claim runs, with status 2 and what to do."""

    @pytest.mark.parametrize(
        ("rows", "told"),
        [
            (np.array([[0.1, np.nan], [0.2, 0.3]]), "expected finite numbers, got nan at row 0, column 1"),
            (np.array([[3.0, 4.0], [0.2, 0.3]]), r"expected rows in the unit ball.*= 5\. Scale the data once: x / 5"),
            (np.array([[0.1, 0.2], [0.3, 0.1], [0.1, 0.2]]), "got row 2 equal to row 0.*drop duplicates"),
            (np.array([[0.1, 0.2], [0.0, 0.0]]), "expected non-zero rows, got zeros at row 1"),
            (np.array([0.1, 0.2]), r"expected a matrix \[n, d\]"),
            (np.zeros((2, 2, 2)) + 0.1, r"expected a matrix \[n, d\]"),
            (np.array([[1, 0], [0, 1]]), "expected floating point numbers.*got int64"),
            (np.ones((70, 64)) * np.linspace(0.01, 0.1, 70)[:, None], r"expected n \* d <= 4096, got 70 \* 64"),
        ],
        ids=["nan", "outside", "duplicate", "zero", "vector", "cube", "integer", "large"],
    )
    def test_rows_the_theory_cannot_take(
        self, rows: np.ndarray, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        np.save(tmp_path / "rows.npy", rows)
        assert command.main(data=str(tmp_path / "rows.npy"), out=tmp_path / "out") == 2
        assert re.search(told, " ".join(capsys.readouterr().out.split()))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ({"claim": ("limit", "limits")}, "expected names out of gradients, .* got limits"),
            ({"data": "nowhere.npy"}, r"expected \"digits\" or an existing \.npy file"),
            ({"inputs": 1}, "expected 2 <= --inputs"),
            ({"width": 65}, "1 <= --width <= 64"),
            ({"sigma": -1.0}, "sigma: expected a finite number > 0, got -1.0"),
        ],
        ids=["claim", "file", "inputs", "width", "sigma"],
    )
    def test_arguments(self, arguments: dict, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = arguments.pop("claim", ())
        assert command.main(names, out=tmp_path / "out", **arguments) == 2
        assert re.search(told, " ".join(capsys.readouterr().out.split()))
        assert not (tmp_path / "out").exists()


class TestProblem:
    def test_digits_are_distinct_rows_of_the_unit_ball_with_targets_in_it(self) -> None:
        problem = load("digits", inputs=64, width=8, sigma=1.0, seed=3, profile="quick")
        assert np.linalg.norm(problem.inputs, axis=1).max() <= 1 + 2**-50  # a division's rounding
        assert np.linalg.norm(problem.targets, axis=1).max() <= 1
        assert len(np.unique(np.asarray(problem.inputs), axis=0)) == 64

    def test_the_farthest_digit_is_on_the_sphere(self) -> None:
        """The rows fill the unit ball: smaller ones would make the bounds look better than they are."""
        problem = load("digits", inputs=16, width=8, sigma=1.0, seed=0, profile="quick")
        assert np.linalg.norm(problem.inputs, axis=1).max() == pytest.approx(1, abs=2**-50)

    def test_a_file_keeps_its_rows(self, tmp_path: Path) -> None:
        rows = np.random.default_rng(0).uniform(-0.4, 0.4, (6, 4)).astype(np.float32)
        np.save(tmp_path / "mine.npy", rows)
        problem = load(str(tmp_path / "mine.npy"), inputs=None, width=8, sigma=1.0, seed=0, profile="quick")
        np.testing.assert_array_equal(problem.inputs, rows.astype(np.float64))

    def test_every_use_has_a_key_of_its_own(self, problem: Problem) -> None:
        labels = [("a",), ("b",), ("a", 1), ("a", 2), (1, "a"), (1,)]
        keys = {str(problem.key(*label)) for label in labels}
        assert len(keys) == len(labels)

    def test_configuration_knows_its_data(self, problem: Problem) -> None:
        other = dataclasses.replace(problem, inputs=problem.inputs * 0.9)
        assert configuration(problem, [])["data_sha256"] != configuration(other, [])["data_sha256"]


class TestFits:
    def test_exponent_of_a_power_law(self) -> None:
        sizes = 2.0 ** np.arange(4, 12)
        fit = fits.exponent(sizes, 3 * sizes**-0.5)
        assert fit.value == pytest.approx(-0.5, abs=1e-12)
        assert fit.high - fit.low < 1e-10

    def test_the_interval_covers(self) -> None:
        """95 % of the intervals hold the truth; 400 trials leave 2.2 % of a standard error of 1.1 %."""
        random = np.random.default_rng(0)
        sizes = np.repeat(2.0 ** np.arange(4, 12), 3)
        fitted = [fits.exponent(sizes, sizes**-0.5 * np.exp(0.3 * random.normal(size=sizes.size))) for _ in range(400)]
        covered = np.mean([fit.low <= -0.5 <= fit.high for fit in fitted])
        assert 0.92 <= covered <= 0.98
