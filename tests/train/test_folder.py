"""What a run's files may have become: damaged, cut short by a power failure, another's, of an older version."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_prefix.artifacts import json_text
from ntk_prefix.checks import NonFiniteError, UsageError, explain
from tests.fuzz import damaged_bytes, damaged_json, fuzzed, read_whole, survives
from train.config import CONFIGS, TrainConfig
from train.folder import Metrics, RunFolder, read_summary
from train.loop import _kept

CONFIG = CONFIGS["imdb_longer"][1].changed(method="ntk_attention", adapter=("rank=4", "target=layers.0"), steps=8)

SUMMARY: dict[str, Any] = {
    "task": "imdb",
    "method": "lora",
    "metric": "accuracy",
    "test_score": 0.5,
    "test_loss": 0.7,
    "test_score_before": None,
    "test_rows": 40,
    "validation_score": 0.6,
    "validation_loss": 0.6,
    "best_step": 4,
    "steps": 8,
    "trainable_parameters": 100,
    "parameters": 1000,
    "seconds_a_step": 0.1,
    "peak_memory_bytes": 10**9,
    "adapter_bytes": 400,
    "label_names": ["negative", "positive"],
    "config": json.loads(json_text(CONFIG.as_dict())),
    "macro_f1": 0.5,
    "reliability": [{"rows": 40, "confidence": 0.6, "accuracy": 0.5}],
}

LINES = [
    {"step": 4, "loss": 0.7, "gradient_norm": 1.0, "update_norm": 0.1, "seconds_a_step": 0.25},
    {"step": 4, "validation_score": 0.5, "validation_loss": 0.7},
    {"step": 8, "loss": 0.6, "gradient_norm": 1.0, "update_norm": 0.1, "seconds_a_step": 0.5},
    {"step": 8, "validation_score": 0.6, "validation_loss": 0.6},
]
METRICS = "".join(json_text(line, indent=None) for line in LINES).encode()


@fuzzed
@given(content=damaged_json(SUMMARY["config"]) | damaged_json(CONFIG.flat()))
def test_a_damaged_config_is_read_or_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    # what is read is a configuration that can be written again: nothing in it is not finite
    read_whole(file, lambda: json_text(TrainConfig.from_file(file).as_dict()) and None)


@fuzzed
@given(content=damaged_json(SUMMARY))
def test_a_damaged_summary_is_read_or_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    with survives(file):
        summary = read_summary(file)
        json_text(summary)
        score, median = summary["validation_score"] - 1e-6 * summary["validation_loss"], summary["peak_memory_bytes"]
        f"{score:.4f} {median:,} {summary['trainable_parameters']:,}"  # as the table does
        TrainConfig.from_dict(summary["config"], str(file))


@fuzzed
@given(content=damaged_bytes(METRICS), length=st.sampled_from((len(METRICS), 100, 10**15)))
def test_of_damaged_metrics_the_whole_lines_are_kept_and_nothing_is_made_up(
    content: bytes, length: int, tmp_path: Path
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(content)
    with survives(metrics.path):
        said = metrics.cut(length, 8)
    kept = metrics.path.read_bytes()
    assert len(kept) <= len(content)
    assert b"\0" not in kept
    found = [json.loads(line) for line in kept.splitlines()]
    assert all(line["step"] <= 8 for line in found)
    assert set(kept.splitlines(keepends=True)) <= set(content.splitlines(keepends=True))
    if content[:length] != METRICS[:length] or len(content) < length:
        assert said is None or "whole lines" in said
    seconds = metrics.seconds_a_step()
    assert seconds is None or seconds >= 0


def test_a_file_that_is_whole_is_cut_where_the_checkpoint_was(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for line in LINES[:2]:
        metrics.append(**line)
    length = metrics.sync()
    for line in LINES[2:]:
        metrics.append(**line)
    assert metrics.path.read_bytes() == METRICS
    assert metrics.cut(length, 4) is None
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == LINES[:2]
    assert metrics.seconds_a_step() == 0.25
    with pytest.raises(NonFiniteError, match="loss: expected a finite number, got nan"):
        metrics.append(step=5, loss=float("nan"))


@pytest.mark.parametrize(("lost", "kept"), [(1, 3), (len(METRICS) // 2, 2), (len(METRICS), 0)])
def test_a_file_that_a_power_failure_shortened_keeps_its_whole_lines(lost: int, kept: int, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(METRICS[: len(METRICS) - lost])
    said = metrics.cut(len(METRICS), 8)
    assert said is not None
    assert f"{kept} whole lines of it are kept" in said
    assert len(metrics.path.read_text().splitlines()) == kept


def folder(path: Path, config: TrainConfig, **changes: Any) -> RunFolder:
    made = RunFolder(path)
    made.write_config(config)
    written = {**SUMMARY, "config": json.loads(json_text(config.as_dict())), **changes}
    made.summary.write_text(json_text(written))
    return made


def test_a_path_that_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    """Checkpoints cannot be written there, which would only be said at the end."""
    with pytest.raises(UsageError, match="--workdir: expected a path that is UTF-8") as caught:
        RunFolder(tmp_path / "\udcff")
    assert "--workdir" in (explain(caught.value) or "")
    assert (explain(FileNotFoundError(2, "none", "\udcff")) or "").encode() == b"?: none."


class TestWhoseAFolderIs:
    def test_of_the_same_configuration_it_is_finished(self, tmp_path: Path) -> None:
        summary = folder(tmp_path, CONFIG).finished(CONFIG)
        assert summary is not None
        assert summary["test_score"] == 0.5

    def test_without_the_test_split_it_is_for_who_does_not_want_that(self, tmp_path: Path) -> None:
        made = folder(tmp_path, CONFIG.changed(test=False), test_score=None)
        assert made.finished(CONFIG) is None
        assert made.finished(CONFIG.changed(test=False)) is not None

    def test_for_more_steps_it_goes_on_and_for_fewer_it_is_another(self, tmp_path: Path) -> None:
        made = folder(tmp_path, CONFIG)
        assert made.finished(CONFIG.changed(steps=9)) is None
        with pytest.raises(UsageError, match="differs in steps"):
            made.finished(CONFIG.changed(steps=7))
        with pytest.raises(UsageError, match="differs in learning_rate"):
            made.finished(CONFIG.changed(steps=9, learning_rate=0.5))

    def test_of_an_older_version_it_is_the_same(self, tmp_path: Path) -> None:
        """Its configuration had no sections, and a field less."""
        made = folder(tmp_path, CONFIG)
        flat = json.loads(json_text(CONFIG.flat()))
        del flat["clip"]
        made.config.write_text(json.dumps(flat))
        assert made.finished(CONFIG) is not None


def test_a_checkpoint_says_what_it_said_under_older_names_and_nothing_that_is_not_finite() -> None:
    info = {"best_step": 4, "stopped": False, "metrics_bytes": 100}
    new = {**info, "selection_metric": 0.5, "evaluations_since": 1}
    assert _kept({**info, "best_score": 0.5, "looks_since": 1}) == _kept(new) == new
    for wrong in ({}, {**new, "metrics_bytes": -1}, {**new, "stopped": 3}, {**new, "selection_metric": float("nan")}):
        with pytest.raises(UsageError, match="info: expected"):
            _kept(wrong)
