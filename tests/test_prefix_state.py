"""PrefixState: sums over any length, and the fit that makes them good."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix.attention import ntk_attention, prefix_attention
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Elu1, Taylor
from ntk_prefix.prefix_fit import FitOptions, Samples, fit_prefix
from ntk_prefix.prefix_state import PrefixState


def prefix(tokens, heads=2, size=4, seed=0, spread=1.0, dtype=jnp.float64):
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(spread * draw.standard_normal((tokens, heads, size)), dtype) for _ in range(2))


def related(tokens, heads=2, size=4, seed=0):
    """A prefix as real ones are: a value that has to do with its key, v = A k + b + noise."""
    draw = np.random.default_rng(seed)
    key = draw.standard_normal((tokens, heads, size))
    matrix, offset = draw.standard_normal((heads, size, size)), draw.standard_normal((1, heads, size))
    value = np.einsum("mnr,nrh->mnh", key, matrix) + offset + 0.3 * draw.standard_normal(key.shape)
    return jnp.asarray(key), jnp.asarray(value)


def layer(batch=6, length=32, heads=2, size=4, seed=1):
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(draw.standard_normal((batch, length, heads, size))) for _ in range(3))


class TestFromPrefix:
    @pytest.mark.parametrize("phi", [Elu1(), Taylor(2)])
    def test_is_the_sums(self, phi):
        key, value = prefix(23)
        state = PrefixState.from_prefix(key, value, feature_map=phi, block=5)
        features = phi(key / math.sqrt(2.0))  # H = 4, H ** 0.25
        np.testing.assert_allclose(state.z, jnp.einsum("mnr,mnh->nrh", features, value), atol=1e-12)
        np.testing.assert_allclose(state.k, jnp.sum(features, axis=0), atol=1e-12)

    def test_does_not_depend_on_how_it_is_streamed(self):
        key, value = prefix(23)
        whole = PrefixState.from_prefix(key, value)
        pieces = PrefixState.from_blocks((key[i : i + 7], value[i : i + 7]) for i in range(0, 23, 7))
        for other in (pieces, PrefixState.from_prefix(key, value, block=4)):
            np.testing.assert_allclose(other.z, whole.z, atol=1e-12)
            np.testing.assert_allclose(other.k, whole.k, atol=1e-12)

    def test_a_generator_of_any_length_needs_one_block_of_memory(self):
        block = prefix(64, dtype=jnp.float32)
        taken = []
        stream = (taken.append(i) or block for i in itertools.count())
        state = PrefixState.from_blocks(itertools.islice(stream, 50))
        assert len(taken) == 50
        once = PrefixState.from_prefix(*block)
        np.testing.assert_allclose(state.k, 50 * once.k, rtol=1e-6)

    def test_rounding_does_not_grow_with_the_prefix(self):
        """50,000 blocks in float32: a plain running sum is off by 1e-4, the compensated one by a rounding."""
        key, value = prefix(1, heads=1, size=2, dtype=jnp.float32)
        tokens = 50_000
        many = (jnp.tile(key, (tokens, 1, 1)), jnp.tile(value, (tokens, 1, 1)))
        one = np.asarray(Elu1()(jnp.asarray(key, jnp.float64) / 2**0.25))[0]
        state = PrefixState.from_prefix(*many, block=1)
        np.testing.assert_allclose(state.k, tokens * one, rtol=2e-7)
        plain, _ = jax.lax.scan(
            lambda s, _: (s + jnp.float32(one), None), jnp.zeros((1, 2), jnp.float32), length=tokens
        )
        assert np.max(np.abs(plain / (tokens * one) - 1)) > 5e-6

    def test_an_empty_prefix_is_the_zero_state(self):
        state = PrefixState.from_prefix(*prefix(0))
        assert not np.any(state.z)
        assert not np.any(state.k)
        with pytest.raises(ValueError, match="at least one block"):
            PrefixState.from_blocks([])

    def test_grouped_heads_share_their_keys_state(self):
        state = PrefixState.from_prefix(*prefix(9), num_heads=6)
        np.testing.assert_array_equal(state.k[0], state.k[2])
        assert state.z.shape == (6, 4, 4)
        with pytest.raises(ValueError, match="multiple of the 2 key heads"):
            PrefixState.from_prefix(*prefix(9), num_heads=3)

    def test_gradients_reach_the_prefix(self):
        key, value = prefix(7)

        def loss(key, block):
            return jnp.sum(jnp.sin(PrefixState.from_prefix(key, value, block=block).z))

        np.testing.assert_allclose(jax.grad(loss)(key, 3), jax.grad(loss)(key, 7), atol=1e-12)

    def test_size_does_not_depend_on_the_prefix(self):
        small, large = (jax.tree.leaves(PrefixState.from_prefix(*prefix(m))) for m in (10, 1000))
        assert [x.shape for x in small] == [x.shape for x in large]

    def test_scale_is_that_of_the_scores(self):
        """The scale of the scores is that of the features: a state made with another one is a wrong state."""
        key, value = prefix(30, spread=0.5)
        query, own_key, own_value = layer(batch=1)
        scaled = PrefixState.from_prefix(key, value, feature_map=Taylor(4), scale=0.2)
        exact = prefix_attention(query, own_key, own_value, key, value, scale=0.2)
        np.testing.assert_allclose(scaled.attend(query, own_key, own_value), exact, atol=2e-2)
        unscaled = PrefixState.from_prefix(key, value, feature_map=Taylor(4))
        wrong = ntk_attention(query, own_key, own_value, unscaled.z, unscaled.k, feature_map=Taylor(4), scale=0.2)
        assert np.max(np.abs(wrong - exact)) > 2e-2

    def test_is_a_pytree_of_z_and_k(self):
        state = PrefixState.from_prefix(*prefix(5))
        assert len(jax.tree.leaves(state)) == 2
        doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(state)
        assert doubled.feature_map == state.feature_map
        np.testing.assert_array_equal(doubled.k, 2 * state.k)


class TestError:
    def test_is_not_a_number_where_the_state_is_none(self):
        """The other head has its own; an error of 0 would call such a state exact."""
        key, value = prefix(20)
        query, *own = layer()
        state = PrefixState.from_prefix(key, value, feature_map="taylor")
        broken = PrefixState(state.z.at[0, 0, 0].set(math.nan), state.k, state.feature_map)
        error, other = (s.error(query, key, value, *own) for s in (broken, state))
        assert jnp.isnan(error[0])
        assert error[1] == other[1] > 0

    def test_is_zero_of_what_is_the_same(self):
        key, value = prefix(0)
        assert not PrefixState.from_prefix(key, value).error(layer()[0], key, value).any()

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
    def test_values_of_any_size_have_one(self, size):
        """Also those whose squares no float32 has; where both outputs are zero there is none."""
        query, key, value = (x[:1].astype(jnp.float32) for x in layer())
        prefix_key, prefix_value = prefix(9, dtype=jnp.float32)
        given, own = (prefix_key, size * prefix_value), (key, size * value)
        error = PrefixState.from_prefix(*given).error(query, *given, *own)
        plain = PrefixState.from_prefix(prefix_key, prefix_value).error(query, prefix_key, prefix_value, key, value)
        np.testing.assert_allclose(error, plain if size else 0 * plain, rtol=1e-4)
        assert np.all(plain > 0.01)

    def test_falls_to_zero_as_the_features_become_exact(self):
        key, value = prefix(40, spread=0.5)
        query, own_key, own_value = layer(batch=1)
        errors = []
        for degree in (0, 2, 4):
            state = PrefixState.from_prefix(key, value, feature_map=Taylor(degree))
            errors.append(float(np.max(state.error(0.5 * query, key, value, own_key, own_value))))
        assert errors[0] > 10 * errors[1] > 100 * errors[2]

    def test_is_the_relative_norm_per_head(self):
        key, value = prefix(40)
        query, own_key, own_value = layer(batch=2)
        state = PrefixState.from_prefix(key, value)
        exact = np.asarray(prefix_attention(query, own_key, own_value, key, value))
        distance = np.asarray(state.attend(query, own_key, own_value)) - exact
        expected = [np.linalg.norm(distance[:, :, n]) / np.linalg.norm(exact[:, :, n]) for n in range(2)]
        np.testing.assert_allclose(state.error(query, key, value, own_key, own_value), expected, rtol=1e-10)


class TestFit:
    @pytest.mark.parametrize("own_keys", [True, False])
    def test_elu1_is_several_times_closer_than_its_raw_sums(self, own_keys):
        """How many times depends on the layer: elu1 has no more to give than its H features."""
        key, value = related(1000, size=32)
        query, *own = layer(size=32, length=100)
        state, report = PrefixState.fit_with_report(0.5 * query, key, value, *(own if own_keys else ()))
        assert np.all(state.k >= 0)
        assert np.median(report.raw_error / report.held_out_error) > 4
        if own_keys:
            assert np.all(report.held_out_error < report.no_prefix_error)

    def test_what_it_reports_holds_on_queries_it_never_saw(self):
        key, value = related(500)
        query, own_key, own_value = layer()
        state, report = PrefixState.fit_with_report(query, key, value, own_key, own_value)
        fresh = layer(seed=77)
        np.testing.assert_allclose(state.error(fresh[0], key, value, *fresh[1:]), report.held_out_error, rtol=0.5)

    def test_recovers_a_state_that_is_exact(self):
        """Scores below 1/2 are a state of Taylor features up to 1e-4: fit and sums must both find it."""
        key, value = prefix(3, spread=0.4)
        query, own_key, own_value = layer()
        query = 0.4 * query
        phi = Taylor(4)
        _, report = PrefixState.fit_with_report(query, key, value, own_key, own_value, feature_map=phi)
        assert np.max(report.held_out_error) < 1e-4
        assert np.max(report.raw_error) < 1e-3

    def test_descent_improves_on_the_fit_of_the_masses(self):
        key, value = related(500)
        query, own_key, own_value = layer()
        _, start = PrefixState.fit_with_report(query, key, value, own_key, own_value, iterations=0)
        _, found = PrefixState.fit_with_report(query, key, value, own_key, own_value)
        assert np.all(found.training_error <= start.training_error * (1 + 1e-6))

    def test_a_feature_without_mass_has_no_value(self):
        """Far from the samples such a feature may be all that a query finds: its value would be divided by nothing."""
        draw = np.random.default_rng(0)
        features, values = draw.uniform(0.1, 1, (1, 60, 3)), draw.standard_normal((1, 60, 2))
        masses = features[..., 0] - 0.5 * features[..., 1] + 0.5  # less with more of feature 1, which a mass cannot be
        samples = Samples(features, np.ones((1, 60)), 0 * values, masses, values, np.ones((1, 60)), 60)
        raw = np.zeros((1, 3, 2)), np.zeros((1, 3))
        fit = fit_prefix(samples, FitOptions(iterations=0), positive=True, raw=raw, alone=False)
        np.testing.assert_array_equal(fit.k[0] > 0, [True, False, True])
        np.testing.assert_array_equal(fit.z[0].any(axis=1), [True, False, True])

    def test_more_starts_are_never_worse_on_the_samples(self):
        key, value = related(500)
        query, own_key, own_value = layer()
        _, one = PrefixState.fit_with_report(query, key, value, own_key, own_value)
        _, five = PrefixState.fit_with_report(query, key, value, own_key, own_value, starts=5)
        assert np.all(five.training_error <= one.training_error * (1 + 1e-12))
        assert np.any(five.training_error != one.training_error)
        with pytest.raises(ValueError, match="starts: expected a whole number >= 1, got 0"):
            PrefixState.fit(query, key, value, starts=0)

    def test_scores_far_from_zero_are_no_trouble(self):
        """Masses of e^60 beside masses of e^60: only ratios matter."""
        key, value = prefix(50)
        query, own_key, own_value = layer()
        query, shift = query.at[..., 0].set(10.0), jnp.zeros((1, 1, 4)).at[..., 0].set(12.0)
        state, report = PrefixState.fit_with_report(query, key + shift, value, own_key + shift[None], own_value)
        assert np.all(np.isfinite(state.z))
        assert np.max(report.held_out_error) < 0.5

    def test_a_state_that_float32_cannot_hold_is_refused(self):
        """A head of the ViT has masses of e^215: its state was infinite, and the first step NaN."""
        key, value = prefix(50)
        query, own_key, own_value = layer()
        shift = jnp.zeros((1, 2, 4)).at[0, 1, 0].set(40.0)  # of the second head's keys: masses of e^200
        arrays = (query.at[..., 0].set(10.0), key + shift, value, own_key + shift[None], own_value)
        assert np.isfinite(PrefixState.fit(*arrays, iterations=2).z).all()
        with pytest.raises(ValueError, match=r"fits into float32, got one of size e\^\d+ in heads \[1\]"):
            PrefixState.fit(*(array.astype(jnp.float32) for array in arrays), iterations=2)
        with pytest.raises(ValueError, match=r"expected masses e\^lse between e\^-300 and e\^300"):
            PrefixState.fit(4 * arrays[0], *arrays[1:], iterations=2)

    def test_grouped_heads_and_masks(self):
        key, value = prefix(100)
        query = jnp.concatenate([layer()[0], layer(seed=5)[0]], axis=2)
        _, own_key, own_value = layer()
        mask = jnp.ones((6, 1, 1, 32), bool).at[:, :, :, 20:].set(False)
        state, report = PrefixState.fit_with_report(query, key, value, own_key, own_value, mask=mask, is_causal=True)
        assert state.z.shape == (4, 4, 4)
        error = state.error(query, key, value, own_key, own_value, mask=mask, is_causal=True)
        assert np.max(error) < 2 * np.max(report.held_out_error)

    def test_a_soft_cap_and_a_window_are_the_layers(self):
        """As close as the report says to the prefix with both; fitted without them (the control), several times as far."""
        key, value = related(200)
        query, *own = layer()
        transform = dict(logits_soft_cap=1.0, local_window_size=(3, 2))
        state, report = PrefixState.fit_with_report(2 * query, key, value, *own, iterations=50, **transform)
        plain = PrefixState.fit(2 * query, key, value, *own, iterations=50)
        error, other = (np.max(s.error(2 * query, key, value, *own, **transform)) for s in (state, plain))
        assert error < 1.5 * np.max(report.held_out_error)
        assert other > 2 * error

    def test_anchors_are_fitted_to_the_layer_with_all_that_it_says_of_its_scores(self):
        """The error over all queries lies between those that are reported of the fitted and of the held-out ones."""
        draw = np.random.default_rng(0)
        query, prefix_key, prefix_value, key, value, bias = (
            jnp.asarray(draw.standard_normal(shape))
            for shape in ((4, 12, 4, 4), (12, 2, 4), (12, 2, 4), (4, 12, 2, 4), (4, 12, 2, 4), (1, 4, 12, 12))
        )
        mask = jnp.asarray(draw.random((4, 1, 1, 12)) < 0.7)
        own = {"bias": 2 * bias, "mask": mask, "is_causal": True, "local_window_size": 4, "logits_soft_cap": 1.0}
        given, options = (2 * query, prefix_key, prefix_value, key, value), {"feature_map": "anchors", "features": 3}
        state, report = PrefixState.fit_with_report(*given, **options, **own, scale=0.9, iterations=5)
        reported = np.sort([report.training_error, report.held_out_error], axis=0)
        error = state.error(*given, **own)
        assert np.all((reported[0] < error) & (error < reported[1]))
        nothing = PrefixState(0 * state.z, 0 * state.k, state.feature_map, 0.9).error(*given, **own)
        np.testing.assert_allclose(report.no_prefix_error, nothing, rtol=0.5)
        assert np.all(error < 0.6 * nothing)
        other = state.error(*given, **{**own, "bias": None})  # the control: of another layer
        assert not np.all((reported[0] < other) & (other < reported[1]))

    def test_anchors_are_closer_than_elu1_with_fewer_numbers_and_the_report_holds(self):
        """Two query heads share a key head, and scores are capped: 24 anchors of 9 numbers, 8 elu1 features twice."""
        prefix_key, prefix_value = related(200, heads=1)
        query = layer(heads=2, seed=3)[0] * 2
        key, value = (x[:, :, :1] for x in layer(heads=2, seed=4)[:2])
        own = {"is_causal": True, "logits_soft_cap": 8.0}
        given = (query, prefix_key, prefix_value, key, value)
        state, report = PrefixState.fit_with_report(*given, feature_map="anchors", features=16, iterations=50, **own)
        assert state.z.shape == (1, 16, 4)
        elu1 = PrefixState.fit(*given, **own)
        # queries that it has never seen, drawn like the others
        unseen = layer(heads=2, seed=5)[0] * 2, prefix_key, prefix_value, key, value
        errors = state.error(*unseen, **own)
        assert np.all(errors < 0.3 * elu1.error(*unseen, **own))
        np.testing.assert_allclose(errors, report.held_out_error, rtol=0.5)
        assert np.all(report.training_error < report.no_prefix_error / 5)

    def test_all_keys_as_anchors_are_the_prefix(self):
        prefix_key, prefix_value = prefix(12)
        query = layer()[0]
        state = PrefixState.fit(query, prefix_key, prefix_value, feature_map="anchors", features=12, iterations=0)
        # masses by multiplicative steps, not to the end: two digits, and the values make up for most of the rest
        assert np.all(state.error(query, prefix_key, prefix_value) < 0.02)

    @pytest.mark.parametrize("options", [{}, {"feature_map": "anchors", "features": 3}])
    def test_values_of_zero_are_fitted_by_masses_alone(self, options):
        key, value = prefix(20)
        query, own_key, own_value = layer()
        state = PrefixState.fit(query, key, 0 * value, own_key, 0 * own_value, **options)
        assert jnp.isfinite(state.k).all()
        assert not state.z.any()

    @pytest.mark.parametrize("options", [{}, {"feature_map": "anchors", "features": 3}])
    @pytest.mark.parametrize("name", ["query", "prefix_key", "prefix_value", "key", "value", "bias"])
    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_numbers_that_are_not_finite_are_named(self, name, number, options):
        key, value = prefix(20)
        arrays = dict(zip(("query", "key", "value"), layer(), strict=True), prefix_key=key, prefix_value=value)
        arrays["bias"] = jnp.zeros((1, 1, 32, 32)).at[..., 20:].set(-math.inf)  # which hides keys
        arrays[name] = arrays[name].at[0].set(number)
        with pytest.raises(UsageError, match=f"{name}: expected finite numbers, got {number}"):
            PrefixState.fit(**arrays, **options)

    def test_too_few_samples_are_refused(self):
        key, value = prefix(20)
        with pytest.raises(ValueError, match="samples to fit 4 features"):
            PrefixState.fit(layer(batch=1, length=4)[0], key, value)
        with pytest.raises(ValueError, match="key, value: expected both, or neither"):
            PrefixState.fit(layer()[0], key, value, layer()[1])


class TestArguments:
    """What does not fit is refused by name, before any work; nothing broadcasts."""

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 1, 4)), r"prefix_value: expected \[5, 2, 4\], got"),
            (lambda f: PrefixState.from_prefix(f(5, 2), f(5, 2)), r"prefix_key: expected \[M, K, H\], got"),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4).astype(int), f(5, 2, 4)), "prefix_key: expected floating"),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4), scale=math.nan), "scale: expected a finite"),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4), scale=0), "scale: expected a finite"),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4), num_heads=0), "num_heads: expected a whole"),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4), block=0), "block: expected a whole"),
            (
                lambda f: PrefixState.from_blocks([(f(5, 1, 4), f(5, 1, 4)), (f(5, 2, 4), f(5, 2, 4))]),
                r"of a block: expected \[M, 1, 4\], got \(5, 2, 4\)",
            ),
            (
                lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), held_out=2.0),
                "held_out: expected a frac",
            ),
            (
                lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), held_out=0.0),
                "held_out: expected a frac",
            ),
            (lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), iterations=-1), "iterations: expected"),
            (lambda f: PrefixState.fit(f(2, 9, 2, 4), f(0, 2, 4), f(0, 2, 4)), "at least one token"),
            (lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), features=3), "features: expected None"),
            *(
                (
                    lambda f, changes=changes: PrefixState.fit(
                        f(2, 9, 2, 4), f(50, 2, 4), f(50, 2, 4), feature_map="anchors", **changes
                    ),
                    message,
                )
                for changes, message in [
                    ({"features": 51}, "features: expected at most the prefix's 50 tokens, got 51"),
                    ({"features": 0}, "features: expected"),
                    ({"features": 40}, "query: expected at least 40 queries for as many anchors, got 14"),
                    ({"starts": 2}, "starts: expected 1"),
                ]
            ),
            (lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 3, 4), f(5, 3, 4)), "multiple of the 3 key heads"),
            *(
                (
                    lambda f, changes=changes: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), **changes),
                    message,
                )
                for changes, message in [
                    ({"held_out": "0.5"}, "held_out: expected a fraction in"),
                    ({"seed": 2**63}, r"seed: expected a whole number below 2\^63"),
                    ({"is_causal": "no"}, "is_causal: expected True or False"),
                    ({"feature_map": "anchors", "features": 3, "local_window_size": -1}, "local_window_size: expected"),
                ]
            ),
            *(
                (lambda f, blocks=blocks: PrefixState.from_blocks(blocks(f)), rf"blocks: expected pairs .*, got {came}")
                for blocks, came in [
                    (lambda f: [f(5, 1, 4)], "another ArrayImpl"),
                    (lambda f: None, "NoneType"),
                    (lambda f: [None], "another NoneType"),
                    (lambda f: [([[[1.0]], [[1.0, 2.0]]], f(2, 1, 1))], "another tuple"),
                ]
            ),
            (
                lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4)).error(
                    f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), f(2, 3, 2, 4)
                ),
                "key, value: expected both, or neither",
            ),
            (lambda f: PrefixState.from_prefix(f(5, 2, 4), f(5, 2, 4)).padded(5.5), "features: expected a whole"),
            (lambda f: PrefixState.fit(f(2, 9, 2), f(5, 2, 4), f(5, 2, 4)), r"query: expected \[B, T, N, H\]"),
            (
                lambda f: PrefixState.fit(f(2, 9, 2, 4), f(5, 2, 4), f(5, 2, 4), f(2, 3, 1, 4), f(2, 3, 1, 4)),
                r"key: expected \[2, S, 2, 4\]",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, call, message, without_annotations):
        with pytest.raises(ValueError, match=message):
            call(lambda *shape: jnp.ones(shape))
