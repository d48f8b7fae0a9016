"""Feature maps that own arrays, in attention: anchors are a prefix's own keys, and need no care at any size of scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix.attention import LowRank, ntk_attention, prefix_attention
from ntk_prefix.feature_maps import Anchors, Concatenated, Elu1, Nearest, Projected, Taylor, feature_map
from ntk_prefix.feature_maps.base import _MAPS
from ntk_prefix.prefix_state import PrefixState

BOTH = ["reference", "xla"]

# one program each, where an operation at a time would be one for each
values = jax.jit(lambda phi, x: phi(x))
per_head = jax.jit(lambda phi, x: phi.per_head(x))
attend = jax.jit(lambda state, arrays, options: state.attend(**arrays, **options), static_argnums=2)


class Options(dict):
    """Options of attention that are static."""

    def __hash__(self):
        return hash(tuple(self.items()))


def by_head(query):
    """[B, T, N, H] -> [B, N, T, H]."""
    return jnp.asarray(np.swapaxes(query, 1, 2))


def drawn(seed=0, *, batch=2, length=5, heads=4, key_heads=2, size=4, tokens=6, dtype=jnp.float64):
    """A layer's arrays, and a prefix."""
    draw = np.random.default_rng(seed)
    shapes = dict(
        query=(batch, length, heads, size),
        key=(batch, length, key_heads, size),
        value=(batch, length, key_heads, size),
        prefix_key=(tokens, key_heads, size),
        prefix_value=(tokens, key_heads, size),
    )
    arrays = {name: jnp.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}
    prefix = arrays.pop("prefix_key"), arrays.pop("prefix_value")
    return arrays, prefix


def whole(prefix, **options):
    """The state that is the prefix: all keys as anchors, k = 1, its values."""
    key, value = prefix
    return PrefixState(
        jnp.swapaxes(value, 0, 1), jnp.ones(key.shape[1::-1], key.dtype), Anchors.of_keys(key, **options)
    )


class TestAllKeysAsAnchors:
    """With every key an anchor, k = 1 and Z the values, the state is the exact prefix."""

    @pytest.mark.parametrize("implementation", BOTH)
    @pytest.mark.parametrize("cap", [2.0, None])
    def test_are_the_exact_prefix_with_grouped_heads_a_window_and_a_soft_cap(self, implementation, cap):
        """In float64, at scores of 1e4 too."""
        arrays, prefix = drawn()
        options = Options(implementation=implementation, is_causal=True, local_window_size=2, logits_soft_cap=cap)
        exact = jax.jit(lambda a, p: prefix_attention(**a, prefix_key=p[0], prefix_value=p[1], **options))
        state = whole(prefix, logits_soft_cap=cap)
        wanted = exact(arrays, prefix)
        np.testing.assert_allclose(attend(state, arrays, options), wanted, atol=1e-12)
        less = dataclasses.replace(state, k=0.99 * state.k)
        assert np.max(np.abs(attend(less, arrays, options) - wanted)) > 1e-3
        arrays["query"] = 1e4 * arrays["query"]
        np.testing.assert_allclose(attend(state, arrays, options), exact(arrays, prefix), atol=1e-12)

    def test_one_state_for_a_group_is_that_state_for_each_of_its_heads(self):
        arrays, prefix = drawn()
        shared = whole(prefix)
        each = dataclasses.replace(shared, z=np.repeat(shared.z, 2, axis=0), k=np.repeat(shared.k, 2, axis=0))
        low_rank = dataclasses.replace(shared, z=LowRank(shared.z, jnp.asarray(np.tile(np.eye(4), (2, 1, 1)))))
        each = jax.tree.map(jnp.asarray, each)
        for other in (each, low_rank):
            np.testing.assert_allclose(attend(other, arrays, Options()), attend(shared, arrays, Options()), atol=1e-14)

    @pytest.mark.parametrize("shape", [dict(batch=0), dict(length=0), dict(size=1, heads=6, key_heads=1)])
    def test_have_the_shapes_of_attention(self, shape):
        arrays, prefix = drawn(**shape)
        assert jax.eval_shape(PrefixState.attend, whole(prefix), **arrays).shape == arrays["query"].shape


def two_layers(arrays, phi, states, **options):
    """A scalar of two layers, each with a state of these features."""
    x = ntk_attention(**arrays, z=states[0][0], k=states[0][1], feature_map=phi, **options)
    upper = dict(query=jnp.sin(x), key=x[:, :, ::2], value=jnp.cos(x[:, :, ::2]))
    y = ntk_attention(**upper, z=states[1][0], k=states[1][1], feature_map=phi, **options)
    return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size)


def states_of(phi, heads=2, size=4, seed=5):
    draw = np.random.default_rng(seed)
    shape = (heads, phi.dim(size))
    return [(jnp.asarray(draw.standard_normal((*shape, size))), jnp.asarray(draw.random(shape))) for _ in range(2)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Leaking(Anchors):
    """The control: the unit has its gradient, the features do not know of it."""

    name = "leaking"

    def per_head(self, x):
        scores = self._scores(x)
        largest = jnp.max(scores, axis=-1)
        return jnp.exp(scores - largest[..., None]), jax.lax.stop_gradient(largest)


_MAPS.pop("leaking")  # it is no map to be found by others


class TestGradients:
    @pytest.mark.parametrize("mass", ["absolute", "relative"])
    def test_are_those_of_finite_differences_and_half_a_stopped_unit_fails_this(self, mass):
        """Through two layers."""
        arrays, (key, _) = drawn()
        phi = Concatenated((Anchors.of_keys(key), Elu1()))
        wrong = Concatenated((Leaking.of_keys(key), Elu1()))
        loss = functools.partial(two_layers, mass=mass, is_causal=True)
        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        at = (arrays, phi, states_of(phi))
        leaves, tree = jax.tree.flatten(at)
        draw = np.random.default_rng(3)
        directions = [x / np.linalg.norm(x) for x in (draw.standard_normal(leaf.shape) for leaf in leaves)]
        numbered = list(enumerate(zip(leaves, directions, strict=True)))

        @jax.jit
        def difference(index, step=1e-5):
            moved = [tree.unflatten([leaf + (i == index) * s * d for i, (leaf, d) in numbered]) for s in (step, -step)]
            return (loss(*moved[0]) - loss(*moved[1])) / (2 * step)

        differences = [difference(i) for i in range(len(leaves))]

        def errors(grads):
            slopes = [np.sum(np.asarray(g) * d) for g, d in zip(jax.tree.leaves(grads), directions, strict=True)]
            return [abs(a - b) for a, b in zip(differences, slopes, strict=True)]

        assert max(errors(grad(*at))) <= 1e-8
        assert max(errors(grad(arrays, wrong, at[2]))) > 1e-3

    def test_forward_over_reverse(self):
        arrays, (key, _) = drawn()
        phi = Anchors.of_keys(key)
        at = (arrays, phi, states_of(phi)[0])

        def product(implementation):
            def both_masses(at):
                arrays, phi, (z, k) = at
                attend = functools.partial(ntk_attention, **arrays, z=z, k=k, feature_map=phi)
                outputs = [attend(mass=mass, implementation=implementation) for mass in ("absolute", "relative")]
                return jnp.sum(jnp.sin(outputs[0]) + jnp.cos(2 * outputs[1]))

            return jax.jit(lambda at: jax.jvp(jax.grad(both_masses), (at,), (jax.tree.map(jnp.cos, at),))[1])(at)

        both = [product(implementation) for implementation in BOTH]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), *both)


class TestExtremes:
    @pytest.mark.parametrize("mass", ["absolute", "relative"])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_scores_of_ten_thousand_either_way_are_finite_forward_and_backward(self, mass, dtype):
        """With k = 0 too, where a training starts; the exponentials as such (the control) are not."""
        arrays, (key, _) = drawn(dtype=dtype)
        arrays["query"] = 1e4 * arrays["query"]
        phi = Anchors.of_keys(key)
        assert not np.all(np.isfinite(values(phi, by_head(arrays["query"]))))

        @jax.jit
        def run(at):
            def loss(at):
                arrays, phi, (z, k) = at
                output = ntk_attention(**arrays, z=z, k=k, feature_map=phi, mass=mass)
                return jnp.sum(output.astype(jnp.float32)), output

            return jax.value_and_grad(loss, has_aux=True)(at)

        z, k = jax.tree.map(lambda x: x.astype(dtype), states_of(phi)[0])
        for state in ((z, k), (0 * z, 0 * k)):
            for leaf in jax.tree.leaves(run((arrays, phi, state))):
                assert np.all(np.isfinite(leaf))

    def test_features_of_a_row_with_large_scores_are_right(self):
        """The prefix's heaviest anchor alone is what a query of 1e4 sees of it, relative mass or not."""
        arrays, prefix = drawn(dtype=jnp.float32)
        arrays["query"] = 1e4 * arrays["query"]
        state = whole(prefix)
        phi = state.feature_map
        assert isinstance(phi, Anchors)
        scores = np.einsum("btnh,nrh->btnr", arrays["query"], np.repeat(phi.points, 2, axis=0))
        value = np.repeat(prefix[1], 2, axis=1)
        wanted = np.take_along_axis(value[None, None], np.argmax(scores, axis=-1)[:, :, None, :, None], axis=2)[:, :, 0]
        relative = attend(state, arrays, Options(mass="relative"))
        seen = np.max(scores, axis=-1) > 100
        assert np.sum(seen) > 20
        np.testing.assert_allclose(relative[seen], wanted[seen], atol=1e-5)


class TestMaps:
    def test_anchors_for_each_key_head_meet_the_heads_of_their_group(self):
        arrays, (key, _) = drawn()
        x = by_head(arrays["query"])
        phi = Anchors.of_keys(key, scale=0.25)
        whole, (features, unit) = values(phi, x), per_head(phi, x)
        for n in range(4):
            scores = np.asarray(x)[:, n] @ np.asarray(key)[:, n // 2].T / 2
            np.testing.assert_allclose(whole[:, n], np.exp(scores), rtol=1e-13)
        np.testing.assert_allclose(features * np.exp(unit)[..., None], whole, rtol=1e-13)
        assert np.max(features) == 1

    def test_nearest_is_the_nearest_centroid_and_has_no_gradient(self):
        draw = np.random.default_rng(0)
        x, centroids = draw.standard_normal((2, 4, 5, 3)), 3 * draw.standard_normal((2, 6, 3))
        distance = np.linalg.norm(x[:, :, :, None] - np.repeat(centroids, 2, axis=0)[None, :, None], axis=-1)
        phi = Nearest(jnp.asarray(centroids))
        np.testing.assert_array_equal(np.argmax(values(phi, jnp.asarray(x)), axis=-1), np.argmin(distance, axis=-1))
        assert np.any(
            np.argmin(distance, axis=-1) != np.argmax(x @ np.repeat(centroids, 2, axis=0).swapaxes(1, 2), axis=-1)
        )
        grads = jax.jit(jax.grad(lambda x, phi: jnp.sum(phi(x) ** 2), argnums=(0, 1)))(jnp.asarray(x), phi)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))

    def test_concatenated_is_all_features_in_one_unit(self):
        arrays, (key, _) = drawn()
        x = by_head(arrays["query"])
        maps = Anchors.of_keys(key), Elu1(), Projected(Taylor(2), jnp.asarray(np.swapaxes(key[:2], 0, 1)))
        features, unit = per_head(Concatenated(maps), x)
        wanted = np.concatenate([values(phi, x) for phi in maps], axis=-1)
        np.testing.assert_allclose(features * np.exp(unit)[..., None], wanted, rtol=1e-13)
        assert per_head(Concatenated((Elu1(), Taylor(1))), x)[1] is None

    def test_projected_taylor_on_all_directions_is_taylor_up_to_a_rotation(self):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
        turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
        phi = Projected(Taylor(3), jnp.asarray(turn)[None])
        turned, plain = (np.asarray(values(map_, x)) for map_ in (phi, Taylor(3)))
        np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, rtol=1e-12)

    def test_are_made_by_name(self, without_annotations):
        points = np.ones((1, 2, 3))
        assert feature_map("anchors", points=points, logits_soft_cap=2.0) == Anchors(jnp.asarray(points), 2.0)
        assert feature_map("concatenated", maps=(Elu1(), Taylor(2))).dim(3) == 13

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: feature_map("anchors"), r"'anchors': expected its options \['points'\], got none"),
            (lambda: Anchors(jnp.ones((2, 3))), r"points: expected \[K, R, H\], got \(2, 3\)"),
            (lambda: Anchors(jnp.ones((2, 0, 3))), r"points: expected \[K, R, H\] with K, R, H >= 1"),
            (lambda: Anchors(jnp.ones((2, 2, 3), int)), "points: expected floating point"),
            (lambda: Anchors(jnp.ones((2, 2, 3)), -1.0), "logits_soft_cap: expected a number > 0"),
            (lambda: Anchors.of_keys(jnp.ones((2, 2, 3)), scale=0.0), "scale: expected a finite number > 0"),
            (lambda: Concatenated(()), "maps: expected at least one feature map"),
            (lambda: Concatenated(("elu1",)), "maps: expected feature maps, got 'elu1'"),
            (lambda: Projected("elu1", jnp.ones((1, 2, 3))), "inner: expected feature maps"),
            (
                lambda: attend_with(Anchors(jnp.ones((3, 2, 4)))),
                r"points: expected \[K, ., 4\] with K a divisor of the 4",
            ),
            (lambda: attend_with(Nearest(jnp.ones((2, 2, 3)))), r"centroids: expected \[K, ., 4\] .* got \(2, 2, 3\)"),
            (lambda: attend_with(Elu1(), heads=3), r"state: expected k \(4, 4\) .* a divisor of 4"),
            (
                lambda: Anchors(jnp.ones((2, 2, 3)))(jnp.ones((5, 3))),
                r"x: expected \[\*batch, N, T, H\] for points of 2",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, call, message, without_annotations):
        with pytest.raises(ValueError, match=message):
            call()


def attend_with(phi, heads=2):
    arrays, _ = drawn()
    features = phi.dim(4)
    return ntk_attention(**arrays, z=jnp.ones((heads, features, 4)), k=jnp.ones((heads, features)), feature_map=phi)


class TestPrefixState:
    def test_is_a_tree_of_z_k_and_the_maps_arrays(self):
        _, prefix = drawn()
        state = whole(prefix)
        assert len(jax.tree.leaves(state)) == 3
        same = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
        assert same.feature_map == state.feature_map

    def test_states_of_layers_are_stacked_and_mapped_over(self):
        layers = [drawn(seed) for seed in range(2)]
        stack = functools.partial(jax.tree.map, lambda *x: jnp.asarray(np.stack(x)))
        arrays, states = stack(*[a for a, _ in layers]), stack(*[whole(p) for _, p in layers])
        got = jax.jit(jax.vmap(lambda a, s: s.attend(**a)))(arrays, states)
        for i, (own, prefix) in enumerate(layers):
            np.testing.assert_allclose(got[i], attend(whole(prefix), own, Options()), atol=1e-14)
        longer = states.padded(states.k.shape[-1] + 2)
        same = jax.jit(jax.vmap(lambda a, s: s.attend(**a)))(arrays, longer)
        np.testing.assert_allclose(same, got, atol=1e-14)

    def test_sums_of_anchors_are_sums_of_exponentials(self):
        arrays, (key, value) = drawn()
        phi = Anchors.of_keys(key[:3])
        state = PrefixState.from_prefix(key, value, feature_map=phi)
        features = np.exp(np.einsum("mkh,krh->mkr", key / 4**0.25, phi.points))
        np.testing.assert_allclose(state.k, np.sum(features, axis=0), rtol=1e-13)
        np.testing.assert_allclose(state.z, np.einsum("mkr,mkh->krh", features, value), atol=1e-12)
        pieces = PrefixState.from_blocks([(key[:4], value[:4]), (key[4:], value[4:])], feature_map=phi, num_heads=4)
        both = [attend(each, arrays, Options()) for each in (pieces, state)]
        np.testing.assert_allclose(*both, atol=1e-13)

    def test_is_fitted_to_anchors_of_each_key_head(self):
        """With all keys as anchors the fit is the prefix; with those of the other heads (the control) it is not."""
        arrays, (key, value) = drawn(batch=8, length=8)
        fit = functools.partial(PrefixState.fit_with_report, arrays["query"], key, value, iterations=0)
        _, report = fit(feature_map=Anchors.of_keys(key))
        assert np.max(report.held_out_error) < 1e-5
        _, wrong = fit(feature_map=Anchors.of_keys(key[:, ::-1]))
        assert np.min(wrong.held_out_error) > 1e-2
        # keys among themselves have scores of 1e4, and queries moderate ones
        far = 100 * key
        _, report = PrefixState.fit_with_report(
            arrays["query"] / 100, far, value, iterations=0, feature_map=Anchors.of_keys(far)
        )
        assert np.max(report.held_out_error) < 1e-5
        assert np.all(np.isnan(report.raw_error))
