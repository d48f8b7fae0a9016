"""The claim ``margin`` on labels of a reader's own: they are what is certified, trained on and controlled."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from theory.claim import examine
from theory.claims import margin
from theory.jobs import estimate
from theory.problem import Problem, load
from theory.record import record_of

KINDS = np.array(["oak", "elm", "ash"])[np.arange(9) % 3]


def read(folder: Path, labels: np.ndarray) -> Problem:
    """Nine rows around three corners, one after the other."""
    corners = np.array([[0.8, 0.0], [-0.4, 0.7], [-0.4, -0.7]])[np.arange(9) % 3]
    np.save(folder / "rows.npy", corners + 0.05 * np.random.default_rng(0).normal(size=(9, 2)))
    np.save(folder / "labels.npy", labels)
    rows, told = str(folder / "rows.npy"), str(folder / "labels.npy")
    return load(rows, inputs=None, width=8, sigma=0.5, seed=0, profile="quick", targets=told)


def test_labels_of_a_file_are_certified_and_trained_on(tmp_path: Path) -> None:
    problem = read(tmp_path, KINDS)
    assert problem.labels == (2, 1, 0) * 3, "places among the kinds in order"
    result = examine(margin.CLAIM, problem)
    assert result.holds
    assert (result.evidence.parameters["examples"], result.evidence.parameters["kinds"]) == (9, 3)
    assert len(result.controls) == len(margin.CLAIM.controls)
    assert "drawn from the seed" not in record_of(result)["source"]
    assert "of their own" not in estimate(problem, [margin.CLAIM], 1)
    assert "of their own: margin" in estimate(dataclasses.replace(problem, labels=None), [margin.CLAIM], 1)


def test_labels_that_have_nothing_to_do_with_the_rows_are_undecided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(margin, "LONGEST", 4096)
    mixed = examine(margin.CLAIM, read(tmp_path, np.random.default_rng(0).permutation(KINDS)))
    assert (
        "undecidable at lengths one can run: not certified: cross-entropy of 3 classes, 9 examples" in mixed.undecided
    )
    each = margin.CLAIM.refused(read(tmp_path, np.arange(9)))
    assert each == "undecidable on these rows: 9 kinds of labels for 9 rows: give fewer kinds than rows"


def test_shuffled_labels_are_harder_than_the_right_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not, controls could hold, and the claim is undecided instead."""
    problem = read(tmp_path, KINDS)
    case = margin.Case(problem.inputs, np.array(problem.labels), None, 0.5)
    rough = np.exp(np.asarray(problem.inputs @ problem.inputs.T))
    monkeypatch.setattr(margin, "_case", lambda _: case)
    monkeypatch.setattr(margin, "_kernel", lambda _: np.kron(rough, np.eye(3)))
    margin._shuffled.cache_clear()
    harder = margin._direction(margin._kernel(case), margin._shuffled(problem))[0]
    assert harder < margin._direction(margin._kernel(case), case.classes)[0] / margin.EASIER
    margin._shuffled.cache_clear()
    monkeypatch.setattr(margin, "_kernel", lambda _: np.eye(27))
    with pytest.raises(margin.Undecidable, match="too little to do with the rows"):
        margin._shuffled(problem)
