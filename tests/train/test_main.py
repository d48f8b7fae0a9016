"""``python -m train`` as it is typed: what is wrong is said before anything runs, with exit status 2."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import NonFiniteError, UsageError, explain
from train import compare_compression, compress, write_negatives
from train.__main__ import main, parse
from train.command import DivergedError, Terminal, ended
from train.comparison.plan import Comparison
from train.config import CONFIGS
from train.lazy import Options
from train.plan import __main__ as plan


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        return main()
    except SystemExit as stop:  # tyro's way
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sst2", "--method", "magic"), "--method: expected one of"),
        (("sst2", "--adapter", "magic=3"), "for ntk_attention, got 'magic'"),
        (("sst2", "--adapter", "rank"), "expected field=value, got 'rank'"),
        (("tiny", "--steps", "0"), "--steps: expected at least 1, got 0"),
        (("tiny", "--accumulate", "3"), "a divisor of the batch size 64, got 3"),
        (("tiny", "--parallel", "pmap", "--fsdp", "2"), "expected 1 with --parallel pmap"),
        (("tiny", "--window", "0"), "--window: expected at least 1 token"),
        (("imdb", "--method", "prefix_propagation", "--pooling", "cls"), "Use --adapter pool=cls"),
        (("nosuch",), "newsgroups_long"),
        (("tiny", "--devices", "99"), "--devices: expected at most the 8 that are here, got 99"),
        (("tiny", "--batch-size", "12"), "--batch-size: expected rows divisible by the 8 devices"),
        (("tiny", "--validation-size", "0.99999"), "--validation-size: expected fewer than all 1438 training rows"),
        (("tiny", "--image-size", "9"), "--image-size: expected a multiple of the model's patches of 2, got 9"),
        (("tiny", "--model", "/nowhere"), "an existing path, or owner/name of the hub, got '/nowhere'"),
        (("sst2", "--data-dir", "/nowhere", "--model", "tiny-vit"), "in /nowhere or in a folder sst2 there"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, *arguments, "--workdir", str(tmp_path)) == 2
    shown = capsys.readouterr()
    # boxes and line breaks are the terminal's
    text = " ".join(word for word in (shown.out + shown.err).split() if word != "│")
    assert said in text
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}  # nothing that takes the folder


@pytest.mark.parametrize("of", [main, plan.main, write_negatives.main], ids=["train", "plan", "negatives"])
def test_without_a_word_a_program_names_the_configurations_that_there_are(
    of: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as stop:
        of()
    assert stop.value.code == 2
    assert "rotten_tomatoes" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ["[]", "{}", '{"config"', '{"config": 3}', "\x00" * 9])
def test_a_damaged_folder_is_one_line_that_names_the_file(
    file: str, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "x[/b]"  # brackets are no markup
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json_text(CONFIGS["tiny"][1].as_dict()))
    (folder / file).write_text(content)
    assert run(monkeypatch, "tiny", "--workdir", str(folder)) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert f"x[/b]/{file}: expected" in line


def test_a_folder_keeps_its_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json_text(CONFIGS["tiny"][1].changed(batch_size=32).as_dict()))
    assert run(monkeypatch, "tiny", "--workdir", str(tmp_path)) == 2
    assert "differs in batch_size" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("a.json: expected this, got that."), 2),
        (NonFiniteError("model.safetensors: expected finite numbers, got nan."), 2),
        (DivergedError("step 3: expected a finite loss, got nan."), 3),
        (FileNotFoundError(2, "No such file or directory", "/x[/b]"), 2),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_divergence_a_status_of_its_own(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise error

    assert ended(fails, Console(width=40)) == status
    assert capsys.readouterr().out == f"{explain(error)}\n"


@pytest.mark.parametrize("error", [ValueError("shapes"), TypeError("ours"), KeyError("ours"), RuntimeError("XLA")])
def test_what_is_ours_keeps_its_traceback(error: Exception) -> None:
    def fails() -> int:
        raise error

    with pytest.raises(type(error)):
        ended(fails, Console(quiet=True))


def test_a_reader_that_goes_does_not_end_the_work() -> None:
    """As ``| head`` does; the result is still to be written."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        console = Terminal(file=pipe)
        for _ in range(2):
            console.print("a line")
    assert console.quiet


class TestFlags:
    @pytest.mark.parametrize(
        ("arguments", "changed"),
        [
            (("sst2", "--method", "lora", "--adapter", "r=16", "--data-dir", "x"),
             {"method": "lora", "adapter": ("r=16",), "data_dir": "x"}),
            (("sst2", "--optim.learning-rate", "0.5", "--device.remat", "--eval.no-test", "--data.max_length=32"),
             {"learning_rate": 0.5, "remat": True, "test": False, "max_length": 32}),
        ],
    )  # fmt: skip
    def test_a_section_may_be_named_and_need_not(self, arguments: tuple[str, ...], changed: dict) -> None:
        assert parse(list(arguments)).config == CONFIGS["sst2"][1].changed(**changed)

    @pytest.mark.parametrize(
        ("arguments", "flag"),
        [
            (("sst2", "--image-size", "32"), "--image-size"),
            (("sst2", "--eval.max-new-tokens=5"), "--max-new-tokens"),
            (("tiny", "--max_length", "32"), "--max-length"),
            (("tiny", "--window", "4"), "--window"),
            (("gsm8k", "--pooling", "cls"), "--pooling"),
            (("gsm8k", "--window", "8"), "--window"),
            (("sst2", "--prompt-template", "Q: {}"), "--prompt-template"),
            (("sst2", "--unrelated", "/nowhere.txt"), "--unrelated"),
            (("tiny", "--eval.no-before"), "--no-before"),
            (("ranking_reviews", "--unrelated-rows", "3"), "--unrelated-rows"),
        ],
    )
    def test_one_that_means_nothing_to_the_task_is_refused(self, arguments: tuple[str, ...], flag: str) -> None:
        with pytest.raises(UsageError, match=f"{flag}: expected it left alone, since it means nothing to the task"):
            parse(list(arguments))

    @pytest.mark.parametrize(
        ("method", "adapter", "rate"),
        [
            ("lora", "r=2", "k-learning-rate"),
            ("ntk_attention", "train_k=false", "k-learning-rate"),
            ("head", "", "learning-rate"),
            ("lora", "train_head=false", "head-learning-rate"),
        ],
    )
    def test_a_rate_at_which_nothing_is_trained_is_refused(self, method: str, adapter: str, rate: str) -> None:
        changed = ("sst2", "--method", method, *(("--adapter", adapter) if adapter else ()))
        with pytest.raises(UsageError, match=f"--{rate}: expected it left alone, .* to the method {method}"):
            parse([*changed, f"--{rate}", "0.1"])
        parse([*changed, *(f"--{name}=0.1" for name in {"learning-rate", "head-learning-rate"} - {rate})])

    def test_a_field_of_another_section_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert run(monkeypatch, "tiny", "--data.learning-rate", "1") == 2

    @pytest.mark.parametrize("form", ["nested", "flat"])
    def test_a_file_is_a_configuration_that_flags_change(self, form: str, tmp_path: Path) -> None:
        """Nested as it is written now, flat as it was before."""
        config = CONFIGS["imdb_longer"][1].changed(method="lora", adapter=("r=4",), learning_rate=1e-5)
        (tmp_path / "config.json").write_text(json_text(config.as_dict() if form == "nested" else config.flat()))
        command = parse(["--config", str(tmp_path / "config.json"), "--steps", "7"])
        assert command.config == config.changed(steps=7)

    @pytest.mark.parametrize(
        ("flag", "value", "said"),
        [
            *((f"--{name}", value, f"--{name}: expected a")
              for name in ("learning-rate", "head-learning-rate", "k-learning-rate", "weight-decay", "clip")
              for value in ("nan", "inf", "-1")),
            ("--adapter", "r=abc", "--adapter r: expected a value of type int, got 'abc'"),
            ("--adapter", "r=8.5", "--adapter r: expected a value of type int, got '8.5'"),
            ("--adapter", "r=true", "--adapter r: expected a value of type int, got 'true'"),
            ("--adapter", "alpha=NaN", "--adapter alpha: expected"),
            ("--adapter", "alpha=1e999", "--adapter alpha: expected a finite number"),
            ("--adapter", "r=" + "9" * 26, "--adapter r: expected at most 2147483647"),
            ("--adapter", "use_rslora=3", "--adapter use_rslora: expected a value of type bool, got '3'"),
            ("--seed", "-1", "--seed: expected an integer from 0"),
            ("--seed", "4294967295", "--seed: expected an integer from 0"),
            ("--devices", "0", "--devices: expected at least 1, got 0"),
            ("--coordinator", "127.0.0.1:8476", "--coordinator: expected --distributed beside it"),
            ("--process", "0", "--process: expected --distributed beside it, got 0"),
            ("--steps", "99999999999999999999", "--steps: expected at most 2147483647"),
            ("--steps", "9" * 400, "--steps: expected at most 2147483647"),
            ("--validation-size", "9" * 400, "--validation-size: expected at most 2147483647"),
            ("--window", "9" * 20, "--window: expected at most 2147483647"),
            ("--devices", "-1", "--devices: expected at least 1, got -1"),
            ("--validation-size", "0", "--validation-size: expected"),
            ("--max-length", "1", "--max-length: expected at least 8"),
        ],
    )  # fmt: skip
    def test_a_value_that_cannot_be_meant_is_refused(self, flag: str, value: str, said: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse(["sst2", "--method", "lora", flag, value])
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


COMMANDS = sorted(
    {
        found.group()
        for file in ("README.md", "train/README.md")
        for found in re.finditer(
            r"python -m train(\.(compare_compression|compare|compress|lazy))?( [^`#\n]+)", Path(file).read_text()
        )
        if not re.search(r"[A-Z]{3}|\.\.\.|--help| · ", found.group())  # placeholders
    }
)


def test_the_documentation_has_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documentation_is_understood(command: str) -> None:
    """Of the tables that stand there too: whoever made one can ask for it again."""
    _, _, program, *arguments = shlex.split(command)
    match program:
        case "train":
            assert parse(arguments).config
        case "train.compare":
            assert tyro.cli(Comparison, args=arguments)
        case "train.lazy":
            assert tyro.cli(Options, args=arguments)
        case "train.compress":
            assert tyro.cli(compress.Options, args=arguments)
        case "train.compare_compression":
            assert tyro.cli(compare_compression.Options, args=arguments)
        case _:
            raise AssertionError(f"no program is known as {program}")
