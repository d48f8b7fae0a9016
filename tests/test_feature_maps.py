"""Feature maps: their kernels, their dimensions, and bounds that hold and are not idle."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ntk_prefix import feature_maps as module
from ntk_prefix.attention import ntk_attention
from ntk_prefix.feature_maps import (
    Elu1,
    FeatureMap,
    PositiveRandom,
    Taylor,
    attention_error_bound,
    feature_map,
    feature_maps,
)
from ntk_prefix.feature_maps.base import _MAPS

MAPS = [phi for kind in feature_maps().values() for phi in kind.examples()]


def vectors(count, size, norm, seed=0):
    """Vectors of norm at most ``norm``, the first at exactly that norm."""
    x = np.random.default_rng(seed).standard_normal((count, size))
    return jnp.asarray(norm * x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("phi", MAPS)
class TestEveryMap:
    def test_has_the_dimension_it_states(self, phi):
        for size in (3,) if jax.tree.leaves(phi) else (1, 3, 4):
            assert phi(jnp.ones((2, 5, size))).shape == (2, 5, phi.dim(size))

    def test_is_positive_exactly_if_it_says_so(self, phi):
        assert bool(jnp.all(phi(vectors(200, 3, 2.0)) >= 0)) == phi.positive

    def test_is_a_tree_of_its_arrays_and_static_without_any(self, phi):
        x = jnp.ones((1, 3))
        run = jax.jit(lambda phi, x: phi(x))
        np.testing.assert_array_equal(run(phi, x), phi(x))
        again = type(phi)(**vars(phi))
        assert again == phi == jax.tree.map(lambda leaf: leaf, phi)
        if jax.tree.leaves(phi):
            assert jax.tree.map(lambda leaf: 2 * leaf, phi) != phi
            with pytest.raises(TypeError, match="owns arrays: make it an argument that is traced, not a static one"):
                hash(phi)
        else:
            assert hash(phi) == hash(again)
            assert jax.jit(lambda phi, x: phi(x), static_argnums=0)(phi, x).shape == (1, phi.dim(3))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_follows_the_dtype(self, phi, dtype):
        features, unit = phi.per_head(jnp.ones((1, 2, 3), dtype))
        assert phi(jnp.ones((1, 3), dtype)).dtype == features.dtype == dtype
        assert unit is None or unit.dtype == dtype

    def test_keeps_its_bound(self, phi):
        norm = 0.8
        x = vectors(60, 3, norm)
        exact = jnp.exp(x @ x.T)
        error = jnp.abs(phi(x) @ phi(x).T / exact - 1)
        if isinstance(phi, PositiveRandom):  # a bound in probability, for one pair
            assert jnp.mean(error > phi.error_bound(norm)) <= phi.failure_probability
        else:
            assert jnp.max(error) <= phi.error_bound(norm)


class TestElu1:
    def test_is_elu_plus_one(self):
        x = jnp.linspace(-30, 30, 101)
        np.testing.assert_allclose(Elu1()(x), jax.nn.elu(x) + 1, atol=1e-15)

    def test_keeps_the_digits_of_small_features(self):
        """elu(x) + 1 computed as such is exactly 0 at -40 in float32: a feature that never learns."""
        x = jnp.float32([-40.0])
        assert jax.nn.elu(x)[0] + 1 == 0
        np.testing.assert_allclose(Elu1()(x), np.exp(-40.0), rtol=1e-5)
        assert jax.grad(lambda x: Elu1()(x)[0])(x)[0] > 0

    def test_has_the_derivative_of_elu_and_1_at_0(self):
        """Two pieces chosen by `where` have 1/2 there: half of `minimum`'s ties."""
        x = jnp.linspace(-30, 30, 102)
        slope = jax.grad(lambda x: Elu1()(x).sum())
        np.testing.assert_allclose(slope(x), jnp.exp(jnp.minimum(x, 0)), rtol=1e-15)
        assert slope(jnp.zeros(1)) == 1
        check_grads(lambda x: Elu1()(jnp.asarray(x)), (x,), order=2)

    def test_approximates_nothing(self):
        assert Elu1().error_bound(1e-3) == math.inf
        x = vectors(10, 4, 1e-3)
        assert jnp.min(Elu1()(x) @ Elu1()(x).T) > 3.9  # exp(q . k) is 1 there


class TestTaylor:
    @pytest.mark.parametrize("degree", range(5))
    def test_kernel_is_the_truncated_series(self, degree):
        x, y = vectors(20, 3, 1.5, seed=1), vectors(20, 3, 1.5, seed=2)
        series = sum((x @ y.T) ** t / math.factorial(t) for t in range(degree + 1))
        np.testing.assert_allclose(Taylor(degree)(x) @ Taylor(degree)(y).T, series, atol=1e-13)

    def test_monomials_are_merged(self):
        assert Taylor(2).dim(64) == math.comb(66, 2)
        assert Taylor(2).dim(64) < 1 + 64 + 64**2  # the control: without merging

    def test_even_degrees_give_a_positive_kernel_and_odd_ones_do_not(self):
        x = vectors(200, 2, 2.0)
        assert jnp.min(Taylor(2)(x) @ Taylor(2)(x).T) > 0
        assert jnp.min(Taylor(3)(x) @ Taylor(3)(x).T) < 0

    def test_bound_has_the_order_of_the_error(self):
        """Slope of log error against log norm is 2 (g + 1), for the error and for its bound."""
        norms = np.geomspace(0.05, 0.4, 6)
        for degree in (1, 2, 3):
            errors, bounds = [], []
            for norm in norms:
                x = vectors(1, 3, norm)
                exact = jnp.exp(x @ x.T)
                errors.append(jnp.abs(Taylor(degree)(x) @ Taylor(degree)(x).T / exact - 1)[0, 0])
                bounds.append(Taylor(degree).error_bound(norm))
            slopes = [np.polyfit(np.log(norms), np.log(np.array(y)), 1)[0] for y in (errors, bounds)]
            np.testing.assert_allclose(slopes, 2 * (degree + 1), atol=0.25)

    def test_bound_of_huge_and_of_no_vectors(self):
        assert Taylor(4).error_bound(100.0) == math.inf
        assert Taylor(4).error_bound(0.0) == 0


class TestPositiveRandom:
    @pytest.mark.parametrize("size", [1.0, 10.0, 40.0])
    def test_a_prefix_does_not_vanish_for_queries_of_any_size(self, size):
        """Features of float32 are e^-|q|^2/2, which is 0 from |q| = 14 on."""
        phi = PositiveRandom(16)
        query, key, value = size * vectors(3, 8, 1), vectors(9, 8, 0.5, seed=1), vectors(9, 8, 1.0, seed=2)
        k, z = jnp.sum(phi(key), axis=0)[None], (phi(key).T @ value)[None]
        narrow = (x.astype(jnp.float32) for x in (query[None, :, None], jnp.zeros((2, 1, 0, 1, 8)), z, k))
        query32, (none, _), z32, k32 = narrow
        output = ntk_attention(query32, none, none, z32, k32, feature_map=phi, scale=1.0)
        features = phi.per_head(query[None])[0][0]
        np.testing.assert_allclose(output[0, :, 0], features @ z[0] / (features @ k[0])[:, None], rtol=1e-3, atol=1e-4)

    def test_is_unbiased_and_its_error_falls_as_one_over_the_root(self):
        x = vectors(1, 4, 0.7)
        y = vectors(1, 4, 0.7, seed=1)
        exact = float(jnp.exp(x @ y.T)[0, 0])
        counts = [16, 64, 256]
        spread = []
        for count in counts:
            maps = [PositiveRandom(count, seed=seed) for seed in range(60)]
            estimates = np.array([float((phi(x) @ phi(y).T)[0, 0]) for phi in maps])
            deviation = np.std(estimates)
            assert abs(np.mean(estimates) - exact) < 4 * deviation / math.sqrt(len(maps))
            spread.append(deviation)
        slope = np.polyfit(np.log(counts), np.log(spread), 1)[0]
        assert -0.75 < slope < -0.25

    def test_directions_are_orthogonal_in_blocks_and_a_function_of_the_seed(self):
        phi = PositiveRandom(6, seed=3)
        basis = jnp.log(phi(jnp.eye(3)) * math.sqrt(6)) + 0.5  # [H, R]: rows of W, transposed
        gram = basis.T @ basis
        np.testing.assert_allclose(gram[:3, :3] - jnp.diag(jnp.diag(gram[:3, :3])), 0, atol=1e-12)
        x = jnp.ones((1, 3))
        np.testing.assert_array_equal(phi(x), PositiveRandom(6, seed=3)(x))
        assert jnp.max(jnp.abs(phi(x) - PositiveRandom(6, seed=4)(x))) > 1e-3


class TestRegistry:
    def test_makes_maps_by_name(self):
        assert feature_map("elu1") == Elu1()
        assert feature_map("taylor", degree=4) == Taylor(4)
        assert feature_map("positive_random", features=8, seed=1) == PositiveRandom(8, seed=1)
        assert feature_map(Taylor(4)) == Taylor(4)

    def test_names_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="feature_map: expected one of"):
            feature_map("softmax")
        with pytest.raises(ValueError, match="options: expected none beside"):
            feature_map(Elu1(), degree=2)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("taylor", {"degree": -1}, "degree: expected a whole number >= 0, got -1"),
            ("taylor", {"degree": 2.0}, "degree: expected a whole number >= 0, got 2.0"),
            ("taylor", {"degree": True}, "degree: expected a whole number >= 0, got True"),
            ("taylor", {"degre": 2}, r"expected options among \['degree'\], got \['degre'\]"),
            ("positive_random", {}, r"expected its options \['features'\], got none"),
            ("positive_random", {"features": 0}, "features: expected a whole number >= 1"),
            ("positive_random", {"features": 10**9}, "at most 1,048,576 features, got 1,000,000,000"),
            ("positive_random", {"features": 8, "seed": -1}, "seed: expected a whole number >= 0"),
            ("positive_random", {"features": 8, "failure_probability": 1.0}, r"failure_probability: .* in \(0, 1\)"),
            ("elu1", {"degree": 2}, "expected options among"),
            ({"elu1": 1}, {}, "feature_map: expected one of"),
        ],
    )
    def test_wrong_options_are_explained(self, name, options, message, without_annotations):
        with pytest.raises(ValueError, match=message):
            feature_map(name, **options)

    def test_more_features_than_fit_are_refused_before_any_is_made(self):
        with pytest.raises(ValueError, match=r"at most 1,048,576 features, got .* for a head dimension of 64"):
            Taylor(8)(jnp.ones((1, 64)))

    def test_a_map_of_your_own_is_known_by_its_name(self):
        try:

            @dataclasses.dataclass(frozen=True)
            class Doubled(Elu1):
                name = "doubled"

                def __call__(self, x):
                    return 2 * super().__call__(x)

            assert feature_map("doubled") == Doubled()
            with pytest.raises(TypeError, match="a name of its own, got 'doubled'"):
                type("Other", (Elu1,), {"name": "doubled"})
        finally:
            _MAPS.pop("doubled", None)

    def test_a_map_that_is_not_whole_is_refused_where_it_is_written(self):
        with pytest.raises(TypeError, match=r"Half: expected .*, got one without positive, error_bound"):
            type("Half", (FeatureMap,), {"name": "half", "dim": lambda *_: 1, "__call__": lambda *_: None})
        with pytest.raises(TypeError, match="got one without a name"):
            type("Nameless", (Elu1,), {"name": None})
        assert not {"half", None} & set(feature_maps())

    def test_the_table_has_every_map(self):
        rows = [line for line in module.__doc__.splitlines() if line.startswith('``"')]
        named = {name for line in rows for name in re.findall(r'"(\w+)"', line)}
        assert named == {kind.name for kind in feature_maps().values() if kind.__module__.startswith(module.__name__)}


def test_kernel_error_bounds_the_error_of_attention():
    """|T - PrefixAttn|_max <= 2 eps / (1 - eps) max|V|, for prefix-only attention with Taylor features."""
    norm, phi = 0.7, Taylor(2)
    query, key = vectors(30, 3, norm, seed=1), vectors(50, 3, norm, seed=2)
    value = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (50, 3)))
    exact = jax.nn.softmax(query @ key.T, axis=-1) @ value
    kernel = phi(query) @ phi(key).T
    error = jnp.max(jnp.abs(kernel @ value / jnp.sum(kernel, axis=1, keepdims=True) - exact))
    bound = attention_error_bound(phi.error_bound(norm), float(jnp.max(jnp.abs(value))))
    assert error <= bound < math.inf
    assert error > bound / 100
    assert attention_error_bound(1.0, 1.0) == math.inf
