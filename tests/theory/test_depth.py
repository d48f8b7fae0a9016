"""The pieces of the claim ``depth``: stacks, their limit, and training that says when it did not arrive."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import PrefixAttentionLayer
from ntk_prefix.kernels import prefix_ntk, real_layer_limit_ntk
from theory.claim import Undecidable, relative_error
from theory.claims import depth as claim
from theory.problem import Problem, load
from theory.scales import ASYMPTOTIC_SIGMA


@pytest.fixture
def problem() -> Problem:
    return claim._small(load("digits", inputs=5, width=3, sigma=1.0, seed=0, profile="quick"), ASYMPTOTIC_SIGMA)


def tied(problem: Problem, depth: int, m: int, **options: object) -> claim.Stack:
    return claim._tied(problem, depth, m, 0, **{"power": 1.0, "paired": True, **options})


def real(problem: Problem, depth: int, m: int, repeat: int = 0) -> claim.Stack:
    return claim._real(claim._frozen(problem), problem, depth, m, repeat)


class TestStack:
    def test_is_its_layers_on_one_stream(self, problem: Problem) -> None:
        stack = tied(problem, 2, 16, power=0.5, paired=False)
        first, second = stack.layers
        middle = problem.inputs + first(problem.inputs) / 4
        output = middle + second(middle) / 4 - problem.inputs
        np.testing.assert_allclose(stack(problem.inputs), output, atol=1e-13)
        stack.readout[...] = jnp.array(3.0)
        np.testing.assert_allclose(stack(problem.inputs), 3 * output, atol=1e-13)

    def test_layers_have_prefixes_of_their_own_and_draws_share_projections(self, problem: Problem) -> None:
        one, other = real(problem, 2, 8), real(problem, 2, 8, repeat=1)
        assert one.layers[0].prefix.shape == (8, problem.d)
        assert jnp.abs(one.layers[0].prefix[...] - one.layers[1].prefix[...]).max() > 0.1
        assert jnp.abs(one.layers[0].prefix[...] - other.layers[0].prefix[...]).max() > 0.1
        for a, b in zip(one.layers, other.layers, strict=True):
            np.testing.assert_array_equal(a.key_projection[...], b.key_projection[...])
        assert jnp.abs(one.layers[0].key_projection[...] - one.layers[1].key_projection[...]).max() > 0.1

    def test_of_paired_layers_has_the_sum_of_their_kernels(self, problem: Problem) -> None:
        """Every layer is zero at the start, so the stream is the input and nothing is carried: exact at any length."""
        stack = tied(problem, 3, 32)
        np.testing.assert_allclose(stack(problem.inputs), 0, atol=1e-12)
        expected = sum(32 * prefix_ntk(layer, problem.inputs) for layer in stack.layers)
        assert relative_error(claim.kernel(stack, problem.inputs), expected) < 1e-12


class TestRate:
    def distances(self, off: float, scatter: float) -> claim.Distances:
        """Kernels whose entries scatter as m^(-1/2) about a limit that is off by so much of itself."""
        draw, limit = np.random.default_rng(0), np.ones((2, 3, 2, 3))
        kernels = {
            m: [jnp.asarray(limit + scatter / m**0.5 * draw.normal(size=limit.shape)) for _ in range(4)]
            for m in (64, 512, 4096)
        }
        return claim.Distances.of(kernels, jnp.asarray(limit / (1 + off)))

    @pytest.mark.parametrize("scatter", [0.1, 10.0])
    def test_draws_are_nearer_to_their_limit_than_to_one_another_however_far_they_scatter(self, scatter: float) -> None:
        _, checks = claim._rate("stack", self.distances(0.0, scatter))
        assert all(check.holds for check in checks)
        assert checks[1].measured == pytest.approx(0.5**0.5, rel=0.1)

    def test_a_limit_that_is_off_by_four_deviations_is_seen(self) -> None:
        _, checks = claim._rate("stack", self.distances(4 * 0.1 / 64, 0.1))
        assert not checks[1].holds

    def test_limits_that_draws_cannot_tell_apart_are_undecided(self) -> None:
        with pytest.raises(Undecidable, match=r"differ by 1\.0e-01 of themselves, and kernels drawn at m = 4096"):
            claim._rate("stack", self.distances(0.0, 10.0), apart=0.1)


class TestLimit:
    def test_of_one_layer_is_the_layer_s(self, problem: Problem) -> None:
        layer = claim._frozen(problem)[0]
        one = real_layer_limit_ntk(
            problem.inputs,
            query_projection=layer.query_projection[...],
            key_projection=layer.key_projection[...],
            value_projection=layer.value_projection[...],
            sigma=problem.sigma,
        )
        np.testing.assert_allclose(claim.stack_limits([layer], problem)[1].kernel, one, atol=1e-14)

    def test_of_a_layer_that_passes_its_input_on_is_that_below(self, problem: Problem) -> None:
        """Zero values: the upper layer moves nothing, so M = I, and its own kernel is zero."""
        below, above = claim._frozen(problem)[:2]
        above.value_projection[...] = jnp.zeros((problem.d, problem.d))
        limits = claim.stack_limits([below, above], problem)
        np.testing.assert_allclose(limits[2].kernel, limits[1].kernel, atol=1e-14)

    def test_is_what_drawn_stacks_tend_to(self, problem: Problem) -> None:
        """Values three times as large, so that what is carried up the stream is not small."""
        frozen = claim._frozen(problem)[:2]
        for layer in frozen:
            layer.value_projection[...] = 3 * layer.value_projection[...]
        m = 2**14
        drawn = m * claim.kernel(claim._real(frozen, problem, 2, m, 0), problem.inputs)
        assert relative_error(drawn, claim.stack_limits(frozen, problem)[2].kernel) < 0.05
        assert relative_error(drawn, claim.stack_limits(frozen, problem, carried=False)[2].kernel) > 0.15

    def test_the_lower_bound_of_its_smallest_eigenvalue_holds(self, problem: Problem) -> None:
        for found in claim.stack_limits(claim._frozen(problem), problem).values():
            assert float(claim.spectrum(found.kernel)[0]) >= found.smallest * (1 - 1e-9) - 1e-12


class TestMeasures:
    def test_draws_are_at_most_one_apart(self) -> None:
        ones = jnp.ones((2, 2, 2, 2))
        assert claim._apart(ones, ones) == 0
        assert claim._apart(ones, -ones) == pytest.approx(1)
        assert claim._apart(ones, 1e9 * ones) == pytest.approx(1)

    def test_a_rate_that_is_none_does_not_hold(self) -> None:
        sizes = (64, 512, 4096)
        falling = {m: np.array([0.9, 1.0, 1.1]) * m**-0.5 for m in sizes}
        flat = {m: np.array([0.9, 1.0, 1.1]) * 0.4 for m in sizes}
        assert all(check.holds for check in claim._rate("", claim.Distances(falling, 1 / 64))[1])
        assert not any(check.holds for check in claim._rate("", claim.Distances(flat, 1 / 64))[1])

    def test_a_negative_eigenvalue_does_not_hold(self) -> None:
        kernel = jnp.eye(4).reshape(2, 2, 2, 2)
        assert claim._eigenvalue("", [kernel], 1.1).holds
        assert not claim._eigenvalue("", [kernel], 2.0).holds
        assert not claim._eigenvalue("", [-kernel], 1.0).holds


class TestTraining:
    def test_one_layer_stays_put_and_two_do_not(self, problem: Problem) -> None:
        draw = functools.partial(tied, problem)
        assert claim._drift(draw(1, 512), problem) < 1e-3
        assert claim._drift(draw(2, 512), problem) > 1e-2

    def test_a_loss_that_is_not_reached_is_no_drift(self, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claim, "STEPS", 1)
        assert np.isnan(claim._drift(tied(problem, 1, 34), problem))

    def test_the_model_that_is_given_is_not_trained(self, problem: Problem) -> None:
        stack = tied(problem, 1, 512)
        before = nnx.state(stack)
        claim._drift(stack, problem)
        np.testing.assert_array_equal(stack.layers[0].weights[...], before["layers"][0]["weights"][...])


def test_a_layer_s_own_start_is_replaced(problem: Problem) -> None:
    """The template's two tokens must not be left over."""
    assert isinstance(real(problem, 1, 6).layers[0], PrefixAttentionLayer)
    assert tied(problem, 1, 6).layers[0].weights.shape == (6, problem.d)
    assert tied(problem, 1, 6).layers[0].signs.shape == (6, 1)
