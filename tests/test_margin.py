"""The certificate for labels: what it promises of descent is kept, and what it cannot promise is refused in a line."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix.certificate import MarginCertificate, certify, find_m
from ntk_prefix.certificate.margin import Ball, classes_of, compared, largest_margins, separates
from ntk_prefix.checks import UsageError
from ntk_prefix.one_layer import TiedPrefixModel
from ntk_prefix.random_prefix import RandomPrefix
from theory.problem import centered_digits

N, D = 6, 3


class Problem(NamedTuple):
    """Inputs, labels, a prefix and its certificate; one shape, so that all share their programs."""

    inputs: np.ndarray
    labels: np.ndarray
    prefix: RandomPrefix
    certificate: MarginCertificate


def problem(seed: int) -> Problem:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(N, D)) * draw.choice([0.5, 1.0])
    direction = draw.normal(size=D)
    direction /= np.linalg.norm(direction)
    labels = np.where(draw.permutation(N) < draw.integers(1, N), 1.0, -1.0)
    if draw.random() < 0.8:  # what a direction separates, with a margin that may be small
        labels = np.where(x @ direction > np.median(x @ direction), 1.0, -1.0)
        x += draw.uniform(0, 0.5) * labels[:, None] * direction
    m, sigma = 2 * int(2 ** draw.uniform(10, 15)), float(draw.choice([0.1, 0.3, 0.5]))
    loss = float(draw.choice([0.3, 0.5, 0.6, 0.65]))
    prefix = RandomPrefix(key=jax.random.key(seed), d=D, m=m, sigma=sigma, model="fixed", outputs=1)
    return Problem(x, labels, prefix, certify(jnp.asarray(x), labels=labels, model=prefix, loss=loss))


def gradient(weights: np.ndarray, signs: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F, [n], and J, [n, m, d], by the formula of the model."""
    scores = x @ weights.T
    mass = np.exp(scores - scores.max(1, keepdims=True))
    mass *= len(weights) / mass.sum(1, keepdims=True)
    mean = mass @ signs / len(weights)
    return len(weights) * mean, (mass * (signs[None] - mean[:, None]))[:, :, None] * x[:, None]


def check_promises(found: Problem) -> None:
    """Follow descent for as long as the certificate is about it, or for 20 steps."""
    certificate = found.certificate
    weights, signs = (np.asarray(x) for x in found.prefix.materialise())
    start, signs = weights, signs[:, 0]
    _, first = gradient(start, signs, found.inputs)
    root = math.sqrt(found.prefix.m)
    steps = min(certificate.steps_needed, 20)
    curve = certificate.curve(certificate.steps_needed)
    losses = []
    for _ in range(steps + 1):
        outputs, jacobian = gradient(weights, signs, found.inputs)
        losses.append(np.logaddexp(0, -found.labels * outputs).mean())
        slope = -found.labels / (1 + np.exp(found.labels * outputs)) / N
        moved = np.linalg.norm(weights - start)
        assert moved <= certificate.radius
        assert np.linalg.norm(jacobian - first, axis=(1, 2)).max() / root <= certificate.drift
        assert np.linalg.norm(jacobian, axis=(1, 2)).max() / root <= certificate.gradient
        weights = weights - certificate.step_size * np.tensordot(slope, jacobian, 1)
    assert np.all(np.array(losses) <= curve[: steps + 1] * (1 + 1e-12))
    assert np.all(np.diff(losses) <= 1e-15)
    if steps == certificate.steps_needed:
        assert losses[-1] <= certificate.loss <= certificate.wanted
        assert (found.labels * outputs <= 0).sum() <= certificate.errors


def promises_of(seeds: range) -> None:
    found = [problem(seed) for seed in seeds]
    certified = [each for each in found if each.certificate.holds]
    for each in certified:
        check_promises(each)
    assert len(certified) >= 0.4 * len(found)
    assert len(certified) < len(found)


def test_descent_keeps_what_was_certified() -> None:
    promises_of(range(12))


def classified(seed: int) -> Problem:
    """Three classes, which three directions tell apart."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(N, D))
    labels = draw.permutation(np.arange(N) % 3)
    x += 1.5 * np.linalg.qr(draw.normal(size=(D, D)))[0][labels]
    prefix = RandomPrefix(key=jax.random.key(seed), d=D, m=2**14, sigma=0.1, model="fixed", outputs=3)
    certificate = certify(jnp.asarray(x), labels=labels, model=prefix, loss=0.9)
    return Problem(x, labels, prefix, certificate)


def check_classes(found: Problem) -> None:
    """The same as ``check_promises``, of the cross-entropy, where J is that of two outputs' difference."""
    certificate = found.certificate
    start, signs = (np.asarray(x) for x in found.prefix.materialise())
    own = np.eye(3)[found.labels]

    def at(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [gradient(weights, signs[:, k], found.inputs) for k in range(3)]
        return np.stack([f for f, _ in parts], axis=1), np.stack([jacobian for _, jacobian in parts], axis=1)

    def largest(jacobian: np.ndarray) -> float:
        return float(np.linalg.norm(jacobian[:, :, None] - jacobian[:, None], axis=(3, 4)).max()) / math.sqrt(
            len(start)
        )

    weights, first = start, at(start)[1]
    steps = min(certificate.steps_needed, 8)
    losses = []
    for _ in range(steps + 1):
        outputs, jacobian = at(weights)
        likelihood = np.exp(outputs - outputs.max(1, keepdims=True))
        likelihood /= likelihood.sum(1, keepdims=True)
        losses.append(-np.log((likelihood * own).sum(1)).mean())
        assert np.linalg.norm(weights - start) <= certificate.radius
        assert largest(jacobian - first) <= certificate.drift
        assert largest(jacobian) <= certificate.gradient
        weights = weights - certificate.step_size * np.tensordot((likelihood - own) / N, jacobian, 2)
    assert np.all(np.array(losses) <= certificate.curve(certificate.steps_needed)[: steps + 1] * (1 + 1e-12))
    assert np.all(np.diff(losses) < 0)


def test_descent_on_three_classes_keeps_what_was_certified() -> None:
    found = [classified(seed) for seed in range(5)]
    certified = [each for each in found if each.certificate.holds]
    assert 0.4 * len(found) <= len(certified) < len(found)
    for each in certified:
        check_classes(each)
    one = certified[0].certificate
    assert "cross-entropy of 3 classes" in one.explain()
    # two thirds of the bound on J would be false
    with pytest.raises(AssertionError):
        check_classes(certified[0]._replace(certificate=dataclasses.replace(one, gradient=one.gradient / 1.5)))


@pytest.mark.slow
def test_descent_keeps_what_was_certified_of_many() -> None:
    promises_of(range(200))


@pytest.mark.parametrize("wrong", ["radius", "loss"])
def test_a_promise_that_is_too_good_is_seen(wrong: str) -> None:
    found = next(each for each in map(problem, range(20)) if each.certificate.holds)
    shorter: dict[str, Any] = {
        "radius": {"radius": 1e-6},
        "loss": {"bounds": found.certificate.bounds * [1e-3, 1e-3, 1]},
    }
    better = found.certificate.__class__(**{**vars(found.certificate), **shorter[wrong]})
    with pytest.raises(AssertionError):
        check_promises(found._replace(certificate=better))


def test_the_margin_of_orthonormal_examples_and_of_a_pair() -> None:
    margins, weights, _ = largest_margins(np.eye(4), np.array([1.0, -1, 1, -1]))
    np.testing.assert_allclose(margins, 0.5, rtol=1e-9)
    np.testing.assert_allclose(weights, weights[0], rtol=1e-9)
    # points 1 and 3 on a line from the origin, alike: the nearer one carries the margin
    margins, weights, _ = largest_margins(np.outer([1.0, 3.0], [1.0, 3.0]), np.array([1.0, 1.0]))
    np.testing.assert_allclose(margins, [1, 3], rtol=1e-9)
    assert weights[1] < 1e-9 * weights[0]
    assert largest_margins(np.ones((2, 2)), np.array([1.0, -1.0]))[0].min() <= 0


def test_the_margin_is_lowered_by_what_the_kernel_may_be_off_by() -> None:
    kernel, labels = np.eye(4), np.array([1.0, -1, 1, -1])
    lowered = largest_margins(kernel, labels, 0.01)[0].min()
    draw = np.random.default_rng(0)
    for _ in range(20):
        off = draw.normal(size=(4, 4))
        off = 0.01 * (off + off.T) / np.linalg.norm(off + off.T)
        alpha = largest_margins(kernel, labels)[1]
        signed = (kernel + off) * np.outer(labels, labels)
        assert lowered <= (signed @ alpha).min() / math.sqrt(alpha @ signed @ alpha)


def test_a_length_is_found_and_a_shorter_one_is_refused() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)) * 0.5)
    labels = np.asarray(x[:, 0] > 0).astype(int)
    tried: dict[int, bool] = {}
    found = find_m(x, labels=labels, sigma=0.5, loss=0.5, progress=tried.__setitem__)
    assert found.holds
    assert min(tried) == 64
    assert found.m == min(m for m, holds in tried.items() if holds)
    assert max(m for m, holds in tried.items() if not holds) > 0.98 * found.m
    assert not certify(x, labels=labels, sigma=0.5, loss=0.5, m=2 * round(0.45 * found.m)).holds
    assert "A longer prefix would do" in certify(x, labels=labels, sigma=0.5, loss=0.5, m=8).explain()


def test_without_a_loss_no_label_may_be_wrong() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)) * 0.5)
    labels = np.asarray(x[:, 0] > 0)
    found = certify(x, labels=labels, sigma=0.5, m=2**17)
    assert found.holds
    assert found.loss < math.log(2) / N
    assert found.errors == 0
    assert "none of the labels is wrong" in found.explain()


def test_the_margin_of_three_orthonormal_classes() -> None:
    # U weighs six differences of outputs alike; each has the square 2, and 1 with the other of its example
    signed, rounding = compared(np.eye(9), np.arange(3), 0.01)
    margins, _, _ = largest_margins(signed, np.ones(6), 0.0)
    np.testing.assert_allclose(margins, 3 / math.sqrt(6 * 3), rtol=1e-9)
    assert np.linalg.eigvalsh(signed)[-1] == pytest.approx(3)
    assert rounding == pytest.approx(0.03)


@pytest.mark.parametrize("width", [D, pytest.param(8, marks=pytest.mark.slow)])
def test_threes_and_eights_have_a_length_and_are_refused_at_a_tenth_of_it(width: int) -> None:
    n, loss = (N, 0.5) if width == D else (32, 0.45)
    centered, directions, kinds = centered_digits()
    rows = np.random.default_rng(0).permutation(np.flatnonzero((kinds == 3) | (kinds == 8)))[:n]
    x = centered[rows] @ directions[:width].T
    x = jnp.asarray(x / np.linalg.norm(x, axis=1).max())
    found = find_m(x, labels=kinds[rows], sigma=0.5, loss=loss, resolution=0.1)
    assert found.holds
    refused = certify(x, labels=kinds[rows], sigma=0.5, loss=loss, m=found.m // 20 * 2)
    assert not refused.holds
    assert "The step that fails: the comparison point's loss is small" in refused.explain()


def test_equal_inputs_of_other_labels_are_refused_whatever_the_length() -> None:
    x = jnp.asarray(np.repeat(np.random.default_rng(0).normal(size=(N // 2, D)), 2, axis=0))
    labels = np.tile([0, 1], N // 2)
    assert not separates(x, labels, 1.0)
    assert not separates(x, np.tile([0, 1, 2], N // 3), 1.0)
    refused = certify(x, labels=labels)
    assert not refused.holds
    assert "No length mends it" in refused.explain()
    assert "nan" not in refused.explain()
    with pytest.raises(UsageError, match="does not hold"):
        refused.curve(1)


def test_a_step_that_is_too_large_is_refused() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)) * 0.5)
    refused = certify(x, labels=np.asarray(x[:, 0] > 0), sigma=0.5, m=2**12, loss=0.5, step_size=1.0)
    assert not refused.holds
    assert "smaller step_size" in refused.explain()


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [0] * N}, "1 kinds"),
        ({"labels": np.arange(N)}, f"got {N} kinds"),
        ({"labels": [0, 1]}, "vector of 6"),
        ({"labels": [0, 1] * 3, "model": "tied"}, "expected the fixed one"),
        ({"labels": [0, 1] * 3, "symmetric": False, "m": 8}, "symmetric start"),
        ({"labels": [0, 1] * 3, "delta": 0.1}, "None beside labels"),
        ({"labels": [0, 1] * 3, "loss": 0.0, "m": 8}, "loss: expected a finite number > 0"),
        ({"labels": [0, 1] * 3, "y": np.ones((N, 1))}, "one of the two, got both"),
        ({"loss": 0.1, "y": np.ones((N, 1))}, "None without labels"),
        ({}, "got neither"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))
    with pytest.raises(UsageError, match=message):
        certify(x, **given)


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [0, 1] * 3, "y": np.ones((N, 1))}, "one of the two, got both"),
        ({}, "got neither"),
        ({"labels": [0, 1] * 3, "remove_offset": True}, "remove_offset: expected None beside labels"),
        ({"y": np.ones((N, 1)), "loss": 0.1}, "loss: expected None without labels"),
        ({"labels": [0, 1] * 3, "model": None}, r"certify\(x, labels=labels, model=model\)"),
    ],
)
def test_what_no_search_can_mean_is_refused(given: dict[str, Any], message: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))
    with pytest.raises(UsageError, match=message):
        find_m(x, **given)


def test_a_tied_model_is_refused() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))
    with pytest.raises(UsageError, match="got tied"):
        certify(x, labels=[0, 1] * 3, model=TiedPrefixModel(D, 8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("radius", "kinds"), [(1e-3, 2), (0.05, 2), (0.05, 3)])
def test_the_bounds_of_the_ball_are_met_by_one_heavy_token(radius: float, kinds: int) -> None:
    """Where one token weighs much more than the rest, and yet little of all, two thirds of either bound would be false."""
    m, heavy = 2**16, 80.0
    weights = np.zeros((m, 1))
    weights[:2] = math.log(heavy)
    signs = np.where(np.arange(m) % 2, -1.0, 1.0)
    x = np.ones((1, 1))

    def jacobian(moved: float) -> np.ndarray:
        there = weights.copy()
        there[0] += moved
        # of two outputs' difference a token's value is 2 or -2
        return gradient(there, signs, x)[1] * (1 if kinds == 2 else 2)

    start, near, edge = (jacobian(part * radius) for part in (0.0, 0.99, 1.0))
    mass = np.abs(gradient(weights, signs, x)[1])[0, :, 0]
    size = np.sqrt(np.square(mass).mean(keepdims=True))
    ball = Ball(norms=np.ones(1), spread=size, largest=mass.max(keepdims=True), sizes=size, m=m, slack=0.0, kinds=kinds)
    drift, lipschitz, _ = ball.at(radius)
    changed, slope = np.linalg.norm(edge - start) / m**0.5, np.linalg.norm(edge - near) / (0.01 * radius)
    assert drift[0] / 1.5 < changed <= drift[0]
    assert lipschitz[0] / 1.5 < slope <= lipschitz[0]


@pytest.mark.parametrize("kinds", [2, 3])
def test_the_mean_value_moves_as_far_as_its_bound_where_a_pair_parts(kinds: int) -> None:
    """The only two tokens: two thirds of the bound would be false."""
    radius, one = 0.05, np.ones(1)
    weights = radius / math.sqrt(2) * np.array([[1.0], [-1.0]])
    outputs, _ = gradient(weights, np.array([1.0, -1.0]) * (1 if kinds == 2 else 2), one[:, None])
    ball = Ball(norms=one, spread=one, largest=one, sizes=one, m=2, slack=0.0, kinds=kinds)
    bound = ball.center(radius)[0]
    assert bound / 1.5 < outputs[0] / 2 <= bound


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.array([0.0, np.nan, 0.0]), "numbers or texts, one for each row, got NaN among them"),
        (["a", None, "a"], "numbers or texts, one for each row, got object"),
        (np.array([1j, 2, 1j]), "numbers or texts, one for each row, got complex128"),
        ([[1], [2, 3], 4], "a vector of 3 labels, got lists of different lengths"),
    ],
    ids=["nan", "none", "complex", "ragged"],
)
def test_labels_that_are_none_are_refused(labels: object, told: str) -> None:
    with pytest.raises(ValueError, match=f"labels: expected a vector of 3 {told.removeprefix('a vector of 3 ')}"):
        classes_of(labels, 3)


def test_a_step_that_is_flushed_to_zero_is_refused() -> None:
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"step_size: expected at least 2\.23e-308"):
        certify(jnp.array([[0.5], [-0.5]]), labels=[0, 1], m=64, step_size=5e-324)
