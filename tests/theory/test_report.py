"""The command, its report, and what happens when it is killed, misled or sabotaged."""

import dataclasses
import html.parser
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

import theory.__main__ as command
from ntk_prefix.artifacts import CHECKOUT
from ntk_prefix.random_prefix import ModelName
from tests.compiling import quickly
from tests.fuzz import damaged_bytes, damaged_json, fuzzed, read_whole, survives
from theory import figures, fits, jobs
from theory.claim import Check, Claim, Control, Evidence, Undecidable, examine
from theory.claims import NAMES, certificate, claims, convergence
from theory.events import failures
from theory.page import markdown
from theory.problem import Problem, load
from theory.record import FORMATS, finish
from theory.report import Folder, configuration


def npy(array: object, **options: bool) -> bytes:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


CHEAP = ("gradients", "positivity")
SMALL = (*CHEAP, "--inputs", "4", "--width", "3", "--jobs", "2")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, but for how programs are compiled."""
    command = [sys.executable, "-m", "theory", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=quickly())


@pytest.fixture
def problem() -> Problem:
    return load("digits", inputs=5, width=3, sigma=1.0, seed=0, profile="quick")


def evidence(holds: bool) -> Evidence:
    return Evidence((Check("a check with a | in it", 1.0, 2.0 if holds else 0.5),), {"tokens": 64})


def control(holds: bool, name: str = "another") -> Control:
    return Control(name, "what must fail", lambda problem: evidence(holds))


def invented(holds: bool = True, control_holds: bool = False, name: str = "positivity") -> Claim:
    """A claim that measures nothing, to test what is made of its result."""
    return dataclasses.replace(
        claims((name,))[0],
        measure=lambda problem: evidence(holds),
        controls=(control(control_holds),),
        undecidable=lambda problem: None,
        draw=lambda evidence, control: figures.panels()[0],
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report of two claims, measured side by side."""
    out = tmp_path_factory.mktemp("report")
    done = run(*SMALL, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class TestReport:
    def test_everything_a_reader_needs_is_written(self, report: Path) -> None:
        assert {path.name for path in report.iterdir()} == {
            "index.html", "report.md", "claims.json", "claims.tex", "configuration.json", "figures", ".lock",
        }  # fmt: skip
        records = json.loads((report / "claims.json").read_text())
        assert [record["name"] for record in records] == list(CHEAP)
        for record in records:
            assert set(record) >= {
                "name", "statement", "source", "holds", "measured", "bound", "margin", "control", "control_failed",
                "seconds", "parameters",
            }  # fmt: skip
            assert record["holds"]
            assert record["control_failed"]
        page = (report / "index.html").read_text()
        html.parser.HTMLParser().feed(page)
        assert page.count("data:image/png;base64,") == len(CHEAP)
        assert not re.search(r'(src|href)="(?!#|data:)', page), "the page must not need any other file"
        config = json.loads((report / "configuration.json").read_text())
        assert config["versions"]["jax"]
        assert re.match(r"[0-9a-f]{40}|unknown", config["git"])
        markdown = (report / "report.md").read_text()
        for name in CHEAP:
            assert f"figures/{name}.png" in markdown
            starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "csv": b"panel,curve,x,y\n"}
            for kind in FORMATS:
                assert (report / "figures" / f"{name}.{kind}").read_bytes().startswith(starts[kind])
        assert page.count("<summary>Proof: theory/") == len(CHEAP)
        assert page.count("<math") > 50

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
        monkeypatch.setattr(module, "CLAIM", invented(holds=True, control_holds=True, name=name))
        assert command.main((name,), out=tmp_path) == 1
        assert "not tested" in (tmp_path / "index.html").read_text()

    def test_a_sound_one_ends_it_with_0(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(importlib.import_module("theory.claims.limit"), "CLAIM", invented(name="limit"))
        assert command.main(("limit",), out=tmp_path) == 0

    def test_every_control_must_fail(self, problem: Problem, tmp_path: Path) -> None:
        claim = dataclasses.replace(invented(), controls=(control(False, "sharp"), control(True, "blunt [/x]")))
        console = Console(record=True, width=200)
        outcome = command.verify(problem, [claim], tmp_path, console)
        console.print(command.summary(outcome))
        (record,) = outcome.records
        assert (record["holds"], record["control_failed"], outcome.status) == (False, False, 1)
        assert [(found["name"], found["failed"]) for found in record["controls"]] == [
            ("sharp", True), ("blunt [/x]", False)
        ]  # fmt: skip
        assert "DID NOT FAIL: blunt [/x]" in console.export_text()
        assert "not tested: a control holds too" in (tmp_path / "report.md").read_text()
        assert "blunt [/x]: what must fail" in (tmp_path / "index.html").read_text()

    @pytest.mark.parametrize(
        ("checks", "failed"),
        [
            ((Check("", 3.0, 2.0), Check("", 3.0, 2.0)), True),
            ((Check("", 3.0, 2.0), Check("", 1.0, 2.0)), False),
            ((Check("", float("nan"), 2.0),), False),
            ((Check("", float("inf"), 2.0),), True),
            ((), False),
        ],
        ids=["all fail", "one part holds", "no number", "diverged", "nothing measured"],
    )
    def test_a_control_fails_when_each_of_its_parts_does(
        self, checks: tuple[Check, ...], failed: bool, problem: Problem
    ) -> None:
        claim = dataclasses.replace(invented(), controls=(Control("", "", lambda problem: Evidence(checks)),))
        result = examine(claim, problem)
        assert (result.controls[0].failed, result.holds) == (failed, failed)

    def test_a_shared_measurement_is_made_once_and_each_control_takes_its_part(self, problem: Problem) -> None:
        calls = []

        def both(problem: Problem) -> Evidence:
            calls.append(problem)
            return Evidence((Check("", 3.0, 2.0, part="tied"), Check("", 1.0, 2.0, part="fixed")))

        parts = tuple(Control(part, "", both, part) for part in ("tied", "fixed", "absent"))
        result = examine(dataclasses.replace(invented(), controls=parts), problem)
        assert len(calls) == 1
        assert [found.failed for found in result.controls] == [True, False, False]

    def test_what_measures_seconds_says_so_and_is_measured_alone(
        self, problem: Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for claim in claims():
            source = Path(importlib.import_module(f"theory.claims.{claim.name}").__file__).read_text()
            assert claim.timed == ("perf_counter" in source), claim.name
        running, beside = set(), {}

        def measured(name: str) -> str:
            running.add(name)
            time.sleep(0.01)
            beside[name] = frozenset(running - {name})
            running.remove(name)
            return name

        monkeypatch.setattr(jobs, "_measured", measured)
        monkeypatch.setattr(jobs, "_processes", lambda count, problem: ThreadPoolExecutor(count))
        found = [(claim.name, name) for claim, name in jobs.measure(claims(), problem, 3)]
        assert sorted(found) == sorted((name, name) for name in NAMES)
        assert any(beside.values())
        assert all(not beside[claim.name] for claim in claims() if claim.timed)

    def test_every_claim_has_controls_with_names_of_their_own(self) -> None:
        for claim in claims():
            names = [control.name for control in claim.controls]
            assert names, claim.name
            assert len(set(names)) == len(names), claim.name

    def test_the_shown_check_is_the_tightest_whatever_its_numbers(self, problem: Problem, tmp_path: Path) -> None:
        """Two checks with equal numbers: found again by them, the first would be shown."""
        checks = (Check("first", 1.0, 2.0), Check("second", 1.0, 2.0, at_least=True))
        claim = dataclasses.replace(invented(), measure=lambda problem: Evidence(checks))
        (record,) = command.verify(problem, [claim], tmp_path, Console(quiet=True)).records
        assert record["tightest"] == 1
        assert "| second |" in (tmp_path / "report.md").read_text().split("## positivity")[0]

    def test_figures_are_the_same_bytes_each_time(self, problem: Problem, tmp_path: Path) -> None:
        def drawn(evidence: Evidence, control: Evidence) -> Figure:
            figure = figures.panels()[0]
            figure.axes[0].plot([0, 1], [1, 0])
            return figure

        claim = dataclasses.replace(invented(), draw=drawn)
        for folder in ("first", "second"):
            command.verify(problem, [claim], tmp_path / folder, Console(quiet=True))
        for kind in FORMATS:
            first, second = (
                (tmp_path / folder / f"figures/positivity.{kind}").read_bytes() for folder in ("first", "second")
            )
            assert first == second, kind

    def test_numbers_that_are_not_finite_are_missing_and_no_texts(self, problem: Problem, tmp_path: Path) -> None:
        parameters = {"tokens": float("inf"), "found": [1.0, float("nan")]}
        claim = dataclasses.replace(
            invented(), measure=lambda problem: Evidence((Check("", float("inf"), 1.0),), parameters)
        )
        command.verify(problem, [claim], tmp_path, Console(quiet=True))
        (record,) = json.loads((tmp_path / "claims.json").read_text(), parse_constant=pytest.fail)
        assert record["measured"] is None
        assert record["parameters"] == {"tokens": None, "found": [1.0, None]}

    def test_a_real_control_that_is_sabotaged_is_noticed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The same with a real measurement: the control that forgets to duplicate an input."""
        module = importlib.import_module("theory.claims.positivity")
        sound, duplicated, *others = module.CLAIM.controls
        forgetful = dataclasses.replace(duplicated, measure=module.CLAIM.measure)
        monkeypatch.setattr(module, "CLAIM", dataclasses.replace(module.CLAIM, controls=(sound, forgetful, *others)))
        assert command.main(("positivity",), out=tmp_path, inputs=4, width=3) == 1

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


class TestUndecided:
    """What float64 cannot tell is neither true nor false: a verdict of its own, and status 2."""

    def test_a_measurement_may_say_so(self, problem: Problem, tmp_path: Path) -> None:
        def undecided(problem: Problem) -> Evidence:
            raise Undecidable("undecidable in float64: <rounding>")

        chosen = [invented(name="gradients"), dataclasses.replace(invented(), measure=undecided)]
        outcome = command.verify(problem, chosen, tmp_path, Console(quiet=True))
        assert [record["holds"] for record in outcome.records] == [True, False]
        assert outcome.records[1]["undecided"] == "undecidable in float64: <rounding>"
        assert outcome.status == 2
        assert "undecidable in float64: &lt;rounding&gt;" in (tmp_path / "index.html").read_text()
        assert "1 of 2 claims hold, 1 undecided" in (tmp_path / "report.md").read_text()
        assert not (tmp_path / "figures" / "positivity.png").exists()

    def test_a_failing_claim_weighs_more(self, problem: Problem, tmp_path: Path) -> None:
        beyond = dataclasses.replace(invented(), undecidable=lambda problem: "beyond float64")
        outcome = command.verify(problem, [invented(False, name="kernel"), beyond], tmp_path, Console(quiet=True))
        assert outcome.status == 1

    def test_with_nothing_to_decide_nothing_is_done(self, problem: Problem, tmp_path: Path) -> None:
        beyond = dataclasses.replace(invented(), undecidable=lambda problem: "beyond float64", measure=pytest.fail)
        with pytest.raises(ValueError, match="positivity: beyond float64"):
            command.verify(problem, [beyond], tmp_path / "out", Console(quiet=True))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("sigma", [1.2, 5.0])
    def test_a_rate_beyond_the_longest_prefix_is_refused_with_the_largest_sigma(
        self, sigma: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command.main(("limit",), inputs=8, width=3, sigma=sigma, out=tmp_path / "out") == 2
        told = " ".join(capsys.readouterr().out.split())
        (largest,) = re.findall(r"the largest sigma for these rows and this profile is ([0-9.]+)", told)
        assert not (tmp_path / "out").exists()
        limit, data = claims(("limit",))[0], {"inputs": 8, "width": 3, "seed": 0, "profile": "quick"}
        assert limit.refused(load("digits", sigma=float(largest) * 0.99, **data)) is None
        assert limit.refused(load("digits", sigma=float(largest) * 1.01, **data)) is not None

    @pytest.mark.parametrize("name", ["limit", "dynamics", "real_layer", "depth"])
    @pytest.mark.parametrize("sigma", [0.01, 15.0])
    def test_absurd_sigmas_are_refused_before_any_work(self, name: str, sigma: float, problem: Problem) -> None:
        """Or cut to what can be run, as ``dynamics`` does above 0.5."""
        (claim,) = claims((name,))
        reason = claim.refused(dataclasses.replace(problem, sigma=sigma))
        assert (reason is None) == (name == "dynamics" and sigma > 0.5)

    def test_an_envelope_that_rounding_hides_is_not_compared(self) -> None:
        spectra = {m: np.array([1.0, 1e3]) for m in (64, 128)}
        convergence._check_decidable("tied", [64, 128], 1.0, spectra)
        with pytest.raises(Undecidable, match="at 1 of 2 lengths up to m = 128"):
            convergence._check_decidable("tied", [128], 1.0, spectra)
        with pytest.raises(Undecidable, match=r"falls by 1\.0e-15 of itself"):
            convergence._check_decidable("tied", [64, 128], 1e-12, spectra)

    def test_rows_whose_kernel_is_rounding_are_no_counterexample(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Distinct rows, so that the theorem holds, at distances of 1e-9: their smallest eigenvalue is lost."""
        rows = np.array([[0.5, 0.1], [0.5, 0.1 + 1e-9], [0.5, 0.1 - 1e-9]])
        np.save(tmp_path / "near.npy", rows)
        assert command.main(("positivity",), data=str(tmp_path / "near.npy"), out=tmp_path / "out") == 2
        assert "undecided" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_a_kernel_that_is_rounding_has_no_limits_to_keep(self, name: ModelName, problem: Problem) -> None:
        near = problem.inputs.at[1].set(problem.inputs[0] * (1 + 1e-9))
        with pytest.raises(Undecidable, match="is below the bound of its rounding"):
            failures(dataclasses.replace(problem, inputs=near), name)


class TestErrors:
    @pytest.mark.parametrize("error", [TypeError, ValueError, KeyError])
    def test_ours_keep_their_traceback(
        self, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def broken(problem: Problem) -> Evidence:
            raise error("a mistake of ours")

        module = importlib.import_module("theory.claims.positivity")
        monkeypatch.setattr(module, "CLAIM", dataclasses.replace(invented(), measure=broken))
        with pytest.raises(error, match="a mistake of ours"):
            command.main(("positivity",), out=tmp_path)


class TestInterruption:
    def test_a_killed_run_leaves_no_report_and_is_taken_up(
        self, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is left is measured alone, to the numbers that it has beside the other."""
        arguments = [sys.executable, "-m", "theory", *SMALL, "--out", str(tmp_path)]
        options = {"cwd": CHECKOUT, "env": quickly(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(arguments, **options) as process:
            until = time.monotonic() + 300
            while not (tmp_path / ".unfinished" / "positivity.json").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            measuring = children.read_text().split() if children.exists() else []
            os.kill(process.pid, signal.SIGKILL)
        while any(Path("/proc", child).exists() for child in measuring):
            assert time.monotonic() < until, "a claim is measured for nobody"
            time.sleep(0.05)
        assert not {path.name for path in tmp_path.iterdir()} & {"index.html", "report.md", "claims.json", "figures"}
        before = (tmp_path / ".unfinished" / "positivity.json").read_bytes()
        assert command.main(CHEAP, inputs=4, width=3, jobs=2, out=tmp_path) == 0
        assert "from the interrupted run" in capsys.readouterr().out
        records = json.loads((tmp_path / "claims.json").read_text())
        assert records[1] == json.loads(before)
        beside = json.loads((report / "claims.json").read_text())
        assert [record | {"seconds": 0} for record in records] == [record | {"seconds": 0} for record in beside]
        assert not (tmp_path / ".unfinished").exists()

    def test_ctrl_c_is_told_how_to_go_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*given: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "verify", stopped)
        assert command.main(CHEAP, inputs=4, width=3, out=tmp_path) == 130
        assert "the same command goes on" in capsys.readouterr().out

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

    @fuzzed
    @given(data=st.data())
    def test_a_damaged_record_is_measured_again(self, problem: Problem, tmp_path: Path, data: st.DataObject) -> None:
        claim = invented()
        folder = Folder(tmp_path, {"claims": [claim.name]})
        kept = tmp_path / ".unfinished" / f"{claim.name}.json"
        if not kept.exists():
            with folder.held():
                folder.keep(claim, finish(examine(claim, problem)))
        whole = kept.with_suffix(".whole")
        if not whole.exists():
            whole.write_bytes(kept.read_bytes())
        kept.write_bytes(data.draw(damaged_json(json.loads(whole.read_text()))))
        with survives(kept):
            record = folder.finished(claim)
            if record is not None:
                markdown([claim], [record], configuration(problem, [claim]) | {"git": ""})
        kept.write_bytes(whole.read_bytes())
        assert folder.finished(claim) is not None

    def test_a_report_of_an_older_version_is_left_until_the_new_one_is_done(
        self, problem: Problem, tmp_path: Path
    ) -> None:
        """Its finished claims have no named controls, and the numbers are another version's: measured again."""
        unfinished = tmp_path / ".unfinished"
        unfinished.mkdir()
        (unfinished / "configuration.json").write_text('{"claims": ["positivity"], "git": "a340712"}')
        (unfinished / "positivity.json").write_text('{"name": "positivity", "holds": true, "control_failed": true}')
        (unfinished / "positivity.png").write_bytes(b"")
        (tmp_path / "claims.json").write_text("[]")
        outcome = command.verify(problem, [invented()], tmp_path, Console(quiet=True))
        assert outcome.holds
        assert not unfinished.exists()

    def test_an_older_report_stays_whole_until_the_new_one_is_done(self, problem: Problem, tmp_path: Path) -> None:
        command.verify(problem, [invented()], tmp_path, Console(quiet=True))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

        def killed(problem: Problem) -> Evidence:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            command.verify(
                problem,
                [dataclasses.replace(invented(), controls=(Control("", "", killed),))],
                tmp_path,
                Console(quiet=True),
            )
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
            (
                np.array([[3e-300, 4e-300], [1e-300, 0]]),
                r"--sigma: expected a number from 2e\+293 to 3\.2e\+300 for these",
            ),
            (np.ones((70, 64)) * np.linspace(0.01, 0.1, 70)[:, None], r"expected n \* d <= 4096, got 70 \* 64"),
        ],
        ids=["nan", "outside", "duplicate", "zero", "vector", "cube", "integer", "denormal squares", "large"],
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
            ({"claim": ("limt",)}, "Did you mean limit"),
            ({"inputs": 1}, "expected 2 <= --inputs"),
            ({"inputs": 0}, "--inputs: expected at least 1 row, got 0"),
            ({"seed": 99999999999999999999}, "--seed: expected a whole number from 0 to 4294967295"),
            ({"seed": -1}, "--seed: expected a whole number from 0 to 4294967295, got -1"),
            ({"sigma": 1e300}, "--sigma: expected a number from .* to 16 for these rows, got 1e.300"),
            ({"width": 65}, "1 <= --width <= 64"),
            ({"width": 3, "data": "mine.npy"}, "--width: expected it left out beside a file"),
            ({"markdown": True}, "--markdown: expected it beside --list"),
            ({"sigma": -1.0}, "sigma: expected a finite number > 0, got -1.0"),
            ({"jobs": 0}, "--jobs: expected at least 1 claim at once, got 0"),
        ],
        ids=[
            "claim",
            "file",
            "near",
            "inputs",
            "none",
            "seed",
            "negative",
            "huge",
            "width",
            "of a file",
            "table",
            "sigma",
            "jobs",
        ],
    )
    def test_arguments(self, arguments: dict, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = arguments.pop("claim", ())
        assert command.main(names, out=tmp_path / "out", **arguments) == 2
        assert re.search(told, " ".join(capsys.readouterr().out.split()))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"", "expected a .npy file"),
            (b"PK\x03\x04 an archive under that name", "expected a .npy file"),
            (
                b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (3000000000,), }",
                "expected",
            ),
            (npy(np.float64(0.5)), r"expected a matrix \[n, d\] with n, d >= 1, got shape \(\)"),
            (npy(np.zeros((0, 3))), r"got shape \(0, 3\)"),
            (npy(np.full((2, 2), 0.1))[:-8], "expected 32 bytes of numbers.*got 24"),
            (npy(np.array([[0.1, None]]), allow_pickle=True), "got Python objects, which are never loaded"),
            (npy(np.array([[0.1, 1j]])), "expected floating point numbers, got complex128"),
            (npy(np.array([[np.longdouble("1e4000")]])), "expected finite numbers, got inf"),
        ],
        ids=["empty", "archive", "22 GiB", "0-d", "no rows", "cut", "objects", "complex", "wider than float64"],
    )
    def test_files_that_are_none(
        self, content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "rows.npy").write_bytes(content)
        assert command.main(data=str(tmp_path / "rows.npy"), out=tmp_path / "out") == 2
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(told, said), said
        assert "rows.npy" in said

    @fuzzed
    @given(content=damaged_bytes(npy(np.random.default_rng(0).uniform(-0.4, 0.4, (6, 4))), head=128))
    def test_damaged_files(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "rows.npy"
        file.write_bytes(content)

        def read() -> tuple[np.ndarray, ...]:
            problem = load(str(file), inputs=None, width=8, sigma=1.0, seed=0, profile="quick")
            return np.asarray(problem.inputs), np.asarray(problem.targets)

        read_whole(file, read)

    def test_more_rows_than_there_are(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "rows.npy").write_bytes(npy(np.full((1, 2), 0.1)))
        assert command.main(data=str(tmp_path / "rows.npy"), inputs=2, out=tmp_path / "out") == 2
        assert "--inputs: expected at most 1, the rows of" in " ".join(capsys.readouterr().out.split())


class TestNames:
    """Names of files are shown as they are, and nothing is decided by them."""

    def test_a_file_called_digits_is_the_user_s(self, tmp_path: Path) -> None:
        file = tmp_path / "my_digits.npy"
        file.write_bytes(npy(np.random.default_rng(0).uniform(-0.4, 0.4, (6, 4))))
        problem = load(str(file), inputs=None, width=8, sigma=1.0, seed=0, profile="quick")
        assert problem.source == "file"
        np.testing.assert_array_equal(certificate.at_size(problem, 5).inputs, problem.inputs[:5])

    def test_brackets_tags_and_folders(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(importlib.import_module("theory.claims.limit"), "CLAIM", invented(name="limit"))
        monkeypatch.chdir(tmp_path)
        Path("<img src=x onerror=alert(1)>[red]|_*.npy").write_bytes(npy(np.array([[0.1, 0.2], [0.3, 0.1]])))
        data, out = "<img src=x onerror=alert(1)>[red]|_*.npy", "x[/b][red]"
        assert command.main(("limit",), data=data, out=Path(out)) == 0
        assert f"report: {tmp_path / out / 'index.html'}" in capsys.readouterr().out.splitlines()
        for name in ("report.md", "index.html"):
            text = (tmp_path / out / name).read_text()
            assert "<img src=x" not in text
            assert "&lt;img src=x" in text
        assert command.main(("limit",), data="[/b].npy", out=Path(out)) == 2
        assert "got '[/b].npy'" in capsys.readouterr().out


def test_the_table_of_the_readme_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(list_claims=True, markdown=True) == 0
    table = capsys.readouterr().out.strip()
    assert table in (CHECKOUT / "theory" / "README.md").read_text(), "python -m theory --list --markdown"


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
