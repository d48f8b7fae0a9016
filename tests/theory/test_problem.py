"""A reader's own rows and what to learn from them: scaled, labeled, or refused in a line before any claim runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from theory.claims import claims
from theory.jobs import estimate
from theory.problem import Problem, load

ROWS = np.array([[3.0, 40.0], [1.0, -20.0], [-2.0, 10.0], [0.5, 30.0], [4.0, 5.0]])


def saved(folder: Path, name: str, array: np.ndarray) -> str:
    np.save(folder / name, array)
    return str(folder / name)


def read(folder: Path, targets: np.ndarray | None = None, **options: object) -> Problem:
    given = {"inputs": None, "width": 8, "sigma": 1.0, "seed": 0, "profile": "quick", "scaling": "ball"} | options
    told = None if targets is None else saved(folder, "targets.npy", targets)
    return load(saved(folder, "rows.npy", ROWS), targets=told, **given)


def test_rows_are_scaled_into_the_ball_and_keep_their_directions(tmp_path: Path) -> None:
    found = np.asarray(read(tmp_path).inputs)
    np.testing.assert_allclose(found, ROWS / np.linalg.norm(ROWS, axis=1).max(), rtol=1e-14)


def test_standardized_columns_have_one_mean_and_one_deviation(tmp_path: Path) -> None:
    found = np.asarray(read(tmp_path, scaling="standard").inputs)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-15)
    np.testing.assert_allclose(*found.std(0), rtol=1e-14)
    assert np.linalg.norm(found, axis=1).max() == pytest.approx(1)


def test_columns_of_the_largest_numbers_are_scaled_too(tmp_path: Path) -> None:
    np.save(tmp_path / "huge.npy", ROWS / 40 * 1e307)
    for scaling in ("ball", "standard"):
        options = {"inputs": None, "width": 8, "sigma": 1.0, "seed": 0, "profile": "quick", "scaling": scaling}
        found = load(str(tmp_path / "huge.npy"), **options)
        np.testing.assert_allclose(found.inputs, read(tmp_path, scaling=scaling).inputs, rtol=1e-12)


@pytest.mark.parametrize("labels", [np.array([0, 1, 0, 1, 1]), np.array(["a", "b", "a", "b", "b"])])
def test_a_label_stands_for_the_mean_of_its_rows(labels: np.ndarray, tmp_path: Path) -> None:
    problem = read(tmp_path, labels)
    x, y = np.asarray(problem.inputs), np.asarray(problem.targets)
    np.testing.assert_allclose(y[[0, 2]], np.tile(x[[0, 2]].mean(0), (2, 1)), rtol=1e-14)
    np.testing.assert_allclose(y[[1, 3, 4]], np.tile(x[[1, 3, 4]].mean(0), (3, 1)), rtol=1e-14)
    assert "targets of targets.npy" in problem.name


@pytest.mark.parametrize("numbers", [np.arange(1.0, 6.0), np.arange(1.0, 11.0).reshape(5, 2), np.full(5, 0.25)])
def test_numbers_are_targets_divided_by_their_largest_norm_if_that_is_above_one(
    numbers: np.ndarray, tmp_path: Path
) -> None:
    found = np.asarray(read(tmp_path, numbers).targets)
    wanted = numbers.reshape(5, -1) / max(np.linalg.norm(numbers.reshape(5, -1), axis=1).max(), 1)
    np.testing.assert_allclose(found[:, : wanted.shape[1]], wanted, rtol=1e-14)
    assert not found[:, wanted.shape[1] :].any()


def test_targets_go_with_their_rows(tmp_path: Path) -> None:
    some, every = (np.asarray(read(tmp_path, np.arange(1.0, 6.0) / 5, inputs=n).targets) for n in (3, "all"))
    np.testing.assert_array_equal(some, every[:3])


@pytest.mark.parametrize(
    ("targets", "options", "told"),
    [
        (None, {"scaling": "none"}, "expected rows in the unit ball.*Or take --scaling ball"),
        (np.arange(4.0), {}, r"targets.npy: expected numbers \[5\] or \[5, outputs\].* got shape \(4,\)"),
        (np.ones((5, 3)), {}, "expected at most 2 outputs, as many as columns of --data, got 3"),
        (np.array([1.0, np.inf, 0, 0, 0]), {}, "targets.npy: expected finite numbers"),
        (np.zeros(5, int), {}, "expected labels of at least two kinds, got 1"),
        (np.zeros((5, 2), int), {}, r"expected floats, or labels \[5\]"),
        (np.zeros(5, complex), {}, r"expected floats, or labels \[5\]"),
        (np.zeros(5), {}, "targets.npy: expected targets of at least 1e-09, got 0 at most. Scale them up"),
        (np.full((5, 2), 1e-200), {}, "targets.npy: expected targets of at least 1e-09, got 1e-200 at most"),
        (np.zeros((5, 0)), {}, "targets.npy: expected targets of at least 1e-09, got 0 at most"),
    ],
    ids=["unscaled", "rows", "outputs", "infinite", "one kind", "matrix of labels", "complex", "zeros", "tiny", "none"],
)
def test_what_cannot_be_meant_is_refused(targets: np.ndarray | None, options: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read(tmp_path, targets, **options)


def test_labels_whose_rows_have_no_mean_are_refused(tmp_path: Path) -> None:
    told = saved(tmp_path, "labels.npy", np.array([0, 0, 1, 1]))
    rows = saved(tmp_path, "opposite.npy", np.array([[0.5, 0.1], [-0.5, -0.1], [0.2, 0.3], [-0.2, -0.3]]))
    with pytest.raises(ValueError, match=r"labels\.npy: expected labels whose rows have means of at least 1e-09"):
        load(rows, inputs=None, width=8, sigma=1.0, seed=0, profile="quick", targets=told)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_rows_normalized_in_their_own_precision_are_in_the_ball(dtype: type, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(dtype)
    name = saved(tmp_path, "own.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True).astype(dtype))
    found = np.asarray(load(name, inputs=None, width=8, sigma=1.0, seed=0, profile="quick").inputs)
    norms = np.linalg.norm(found, axis=1)
    assert norms.max() <= 1 + 2**-51
    np.testing.assert_allclose(norms, 1, rtol=4 * np.finfo(dtype).eps + 2**-51)


@pytest.mark.parametrize("largest", [1.00000006, 1.2345649, 5.0, 1e200])
def test_the_factor_that_is_proposed_brings_rows_into_the_ball(largest: float, tmp_path: Path) -> None:
    rows = np.array([[largest * 0.6, largest * 0.8], [0.1, 0.2]])
    options = {"inputs": None, "width": 8, "sigma": 1.0, "seed": 0, "profile": "quick"}
    with pytest.raises(ValueError, match="expected rows in the unit ball") as refused:
        load(saved(tmp_path, "long.npy", rows), **options)
    factor = re.search(r"x / (\S+?)\. ", str(refused.value))
    assert factor is not None
    shorter = saved(tmp_path, "shorter.npy", rows / float(factor[1]))
    assert 0.9999 < float(np.linalg.norm(load(shorter, **options | {"sigma": 1.0}).inputs[0])) <= 1 + 2**-51


def test_a_column_without_a_deviation_is_named(tmp_path: Path) -> None:
    flat = saved(tmp_path, "flat.npy", np.column_stack([ROWS, np.full(5, 7.0)]))
    with pytest.raises(ValueError, match="got one number in all of column 2"):
        load(flat, inputs=None, width=8, sigma=1.0, seed=0, profile="quick", scaling="standard")


@pytest.mark.parametrize("given", [{"targets": "mine.npy"}, {"scaling": "ball"}])
def test_digits_have_their_own_targets_and_scale(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected it beside a file of --data"):
        load("digits", inputs=4, width=3, sigma=1.0, seed=0, profile="quick", **given)


def test_all_digits_are_too_many_for_a_gram_matrix() -> None:
    with pytest.raises(ValueError, match=r"got 1797 \* 8.*Take fewer rows with --inputs 512"):
        load("digits", inputs="all", width=8, sigma=1.0, seed=0, profile="quick")


def test_the_time_is_estimated_from_the_size(tmp_path: Path) -> None:
    chosen = claims(("limit", "positivity"))
    small = estimate(read(tmp_path), chosen, 2)
    assert small.startswith("n = 5, d = 2: about ")
    assert "for 2 claims, 2 at once" in small
    large = load("digits", inputs=64, width=32, sigma=1.0, seed=0, profile="quick")
    assert "minutes" in estimate(large, chosen, 2)
    assert "--inputs" not in estimate(large, chosen, 2)  # nor are digits a file
    rows = saved(tmp_path, "many.npy", np.random.default_rng(0).uniform(-0.1, 0.1, (100, 20)))
    many = load(rows, inputs=None, width=8, sigma=1.0, seed=0, profile="quick")
    assert "; --inputs takes fewer rows" in estimate(many, chosen, 2)


def test_claims_that_do_not_take_a_file_s_rows_are_named(tmp_path: Path) -> None:
    chosen = claims(("limit", "margin"))
    assert "not on the rows of --data, but on inputs of their own: margin" in estimate(read(tmp_path), chosen, 2)
    assert "of their own" not in estimate(read(tmp_path), claims(("limit",)), 2)
    digits = load("digits", inputs=4, width=4, sigma=1.0, seed=0, profile="quick")
    assert "of their own" not in estimate(digits, chosen, 2)
