"""Claims on few rows, and rows and sigmas at the ends of what is accepted: decided, or said to be undecidable."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.claim import Undecidable
from theory.claims import certificate, convergence, gradients, perturbation
from theory.descent import above_rounding
from theory.problem import Problem


def problem(rows: list[list[float]], sigma: float = 1.0) -> Problem:
    x = jnp.asarray(rows)
    y = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, x.shape) / math.sqrt(x.shape[1]))
    return Problem(name="few rows", source="file", inputs=x, targets=y, sigma=sigma)


@pytest.mark.parametrize(("scale", "sigma"), [(0.05, 1.0), (1.0, 16.0)], ids=["short rows", "large sigma"])
def test_gradients_are_told_from_wrong_ones(scale: float, sigma: float) -> None:
    with jax.enable_x64(True):
        given = problem((scale * np.eye(2)).tolist(), sigma)
        right, wrong = gradients._compare(given, gradients.JACOBIANS), gradients._without_centering(given)
    assert right.holds
    assert not any(check.holds for check in wrong.checks)


def test_centering_that_finite_differences_cannot_see_is_undecidable() -> None:
    with jax.enable_x64(True), pytest.raises(Undecidable, match="by finite differences: at sigma = 1e-06 centering is"):
        gradients._compare(problem([[0.6, 0.8], [0.8, -0.6]], 1e-6), gradients.JACOBIANS)


def test_a_stated_bound_beyond_float64_is_infinite() -> None:
    assert perturbation._stated(1.0, 4, 4, 1e3) == math.inf


def test_no_more_is_promised_than_that_nothing_is_left_after_a_step() -> None:
    with jax.enable_x64(True):
        given = problem([[0.5]])
        found = [convergence._train(given, convergence.STABILITY, [256, 1024], 20, faster) for faster in (1.0, 10.0)]
    assert found[0].holds
    assert not any(check.holds for check in found[1].checks)


def test_a_loss_at_its_rounding_is_not_judged() -> None:
    with jax.enable_x64(True):
        given = problem([[0.5]])
    assert above_rounding(np.array([1.0, 1e-10, 1e-29, 1e-12]), given, 16, "fixed") == 2
    assert above_rounding(np.array([1.0, 1e-10]), given, 16, "fixed") == 2
    with pytest.raises(Undecidable, match="a step takes the loss"):
        above_rounding(np.array([1.0, 1e-40]), given, 16, "fixed")


def test_controls_of_the_certificate_fail_on_three_rows_and_are_drawn_beside_them() -> None:
    with jax.enable_x64(True):
        found = certificate._sabotage(problem([[0.1], [-0.5], [0.9]]))
    for part in ("too short", "rate", "too good", "another kernel", "between the inputs"):
        assert [check.holds for check in found.checks if check.part == part] == [False], part
    assert found.series["other"][0] == "fixed, n = 3"


def test_a_band_that_is_wider_than_what_the_control_changes_is_undecidable() -> None:
    with (
        jax.enable_x64(True),
        pytest.raises(Undecidable, match=r"times as wide as what a kernel 1\.2 times as large changes"),
    ):
        certificate._sabotage(dataclasses.replace(problem([[0.5]]), targets=jnp.array([[0.3]])))
