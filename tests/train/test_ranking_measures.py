"""Measures of rankings and of generated text: against numbers that are known beforehand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ntk_prefix.checks import UsageError
from train import ranking_measures
from train.ranking_measures import (
    agreement,
    distinct,
    divergence,
    frontier_area,
    interval,
    read_choices,
    repetition,
)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_area_of_histograms_is_known_at_its_ends(scale: float) -> None:
    p = np.array([3, 1, 6])
    assert frontier_area(p, p, scale) == pytest.approx(1, abs=1e-9)
    # of no common cell the curve is (l^c, (1 - l)^c), over which the integral is a Beta function
    known = math.gamma(scale + 1) ** 2 / math.gamma(2 * scale + 1)
    assert frontier_area(np.array([1, 0]), np.array([0, 2]), scale) == pytest.approx(known, abs=1e-3)


def test_the_area_falls_as_histograms_part_and_has_no_first_and_second() -> None:
    shifted = [np.array([5 - shift, 5 + shift]) for shift in range(6)]
    areas = [frontier_area(shifted[0], each) for each in shifted]
    assert areas == sorted(areas, reverse=True)
    assert len(set(areas)) == 6
    assert frontier_area(shifted[1], shifted[4]) == pytest.approx(frontier_area(shifted[4], shifted[1]), abs=1e-6)


def test_sets_of_one_distribution_are_near_and_of_two_are_far() -> None:
    draw = np.random.default_rng(0)
    ours, alike, other = (draw.normal(size=(200, 4)) + shift for shift in (0, 0, 3))
    near, far = divergence(ours, alike, clusters=8), divergence(ours, other, clusters=8)
    assert near > 0.9
    assert far < 0.1
    assert divergence(ours, alike, clusters=8) == near
    assert divergence(ours, ours) == pytest.approx(1)
    with pytest.raises(UsageError, match="clusters: expected 1 to 400"):
        divergence(ours, alike, clusters=401)


def test_clusters_are_a_tenth_of_all_texts_begun_with_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Means:
        def __init__(self, count: int, *, n_init: int, random_state: int):
            asked.append((count, random_state))

        def fit_predict(self, both: np.ndarray) -> np.ndarray:
            return np.zeros(len(both), int)

    monkeypatch.setattr(ranking_measures, "KMeans", Means)
    assert divergence(np.zeros((30, 2)), np.zeros((20, 2)), seed=3) == pytest.approx(1)
    divergence(np.zeros((3, 2)), np.zeros((2, 2)))
    assert asked == [(5, 3), (2, 0)]


def test_repetition_and_diversity_are_counted_by_hand() -> None:
    assert repetition([["a", "b", "a", "b", "a", "b"]], 2) == pytest.approx(3 / 5)
    assert repetition([["a", "b", "a", "b", "a", "b"], ["a"]], 2) == pytest.approx(3 / 10)
    assert repetition([["a", "b", "c"]], 1) == 0
    # another text's n-grams are no repetition, and no diversity
    assert repetition([["a", "b"], ["a", "b"]], 2) == 0
    assert distinct([["a", "b"], ["a", "b"]], 2) == 1 / 2
    assert distinct([["a", "b", "c"]], 2) == 1
    assert distinct([["a"]], 2) == 0


def choices(folder: Path, votes: list[tuple[int, int]]) -> Path:
    file = folder / "choices.jsonl"
    texts = {"prefix": "p", "ranked": "r", "sampled": "s"}
    rows = [
        {**texts, "votes_ranked": a, "votes_sampled": b, "generator": "g", "source": f"s{row % 2}"}
        for row, (a, b) in enumerate(votes)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_agreement_is_with_the_majority_and_ties_say_nothing(tmp_path: Path) -> None:
    found = read_choices(choices(tmp_path, [(3, 0), (1, 2), (2, 1), (1, 1), (0, 3)]))
    assert [each.first for each in found] == [True, False, True, False]
    scores = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 1.0]])
    said = agreement(found, scores)
    assert (said["agree"], said["of"]) == (2, 4)
    assert said["by"] == {"g": [2, 4], "s0": [1, 3], "s1": [1, 1]}
    assert agreement(found, -scores)["agree"] == 1  # equal scores prefer neither
    lower, upper = said["interval"]
    assert lower < 0.5 < upper


def test_choices_may_be_in_any_table(tmp_path: Path) -> None:
    lines = choices(tmp_path, [(3, 0), (1, 2)]).read_text()
    rows = [json.loads(line) | {"generator": None} for line in lines.splitlines()]
    file = tmp_path / "choices.csv"
    cells = [[*rows[0]], *([("" if cell is None else str(cell)) for cell in row.values()] for row in rows)]
    file.write_text("\n".join(",".join(row) for row in cells))
    found = read_choices(file)
    assert [(each.first, each.generator, each.source) for each in found] == [(True, "", "s0"), (False, "", "s1")]
    assert agreement(found, np.zeros((2, 2)))["by"] == {"s0": [0, 1], "s1": [0, 1]}
    nowhere = tmp_path / "nowhere.jsonl"
    nowhere.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_choices(nowhere) == found


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Clopper and Pearson's is never too short; for 54 of 100 the tables have 0.437 to 0.640."""
    assert interval(54, 100) == pytest.approx((0.4374, 0.6402), abs=1e-4)
    draws = np.random.default_rng(0).binomial(30, 0.3, 400)
    covered = [low <= 0.3 <= high for low, high in (interval(int(each), 30) for each in draws)]
    assert 0.94 < np.mean(covered) < 1
    assert np.mean([low <= 0.6 <= high for low, high in (interval(int(each), 30) for each in draws)]) < 0.3


def test_what_are_no_choices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--human: expected a file of choices, got no file"):
        read_choices(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="expected choices with a majority"):
        read_choices(choices(tmp_path, [(1, 1)]))
    with pytest.raises(UsageError, match="row 0: expected three texts and two numbers of votes"):
        read_choices(choices(tmp_path, [("many", 1)]))
