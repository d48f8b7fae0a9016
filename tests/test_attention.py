"""What NTK-Attention and prefix attention are, said as tests.

Tolerances: 1e-12 in float64 and 2e-6 in float32, relative to the largest output, are thousands and tens of
roundings; 1e-8 for gradients is set by central differences of step 1e-5 (error 1e-10).
"""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntk_prefix import flash
from ntk_prefix.attention import LowRank, ntk_attention, prefix_attention
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Anchors, Concatenated, Elu1, Nearest, Projected, Taylor, feature_map

CPU_IMPLEMENTATIONS = ["reference", "xla"]
STATIC = ("is_causal", "scale", "implementation")
attend = jax.jit(ntk_attention, static_argnames=STATIC)
attend_prefix = jax.jit(prefix_attention, static_argnames=STATIC)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem: shapes, and what surrounds the scores."""

    batch: int = 2
    queries: int = 7
    keys: int = 5
    key_heads: int = 2
    groups: int = 2
    head_dim: int = 4
    is_causal: bool = False
    scale: float | None = None
    bias_axes: tuple[bool, bool, bool, bool] | None = None  # which axes are full; None is no bias
    mask_axes: tuple[bool, bool, bool, bool] | None = None
    phi: str = "elu1"
    seed: int = 0

    @property
    def heads(self):
        return self.key_heads * self.groups

    def shape(self, axes):
        full = (self.batch, self.heads, self.queries, self.keys)
        return tuple(n if whole else 1 for n, whole in zip(full, axes, strict=True))

    def map(self):
        """The feature map; its arrays, if it has any, have the heads of the keys."""
        draw = np.random.default_rng(self.seed + 2)

        def normal(*shape):
            return jnp.asarray(draw.standard_normal(shape))

        anchors, size = functools.partial(normal, self.key_heads, 3), self.head_dim
        return {
            "elu1": Elu1,
            "taylor": Taylor,
            "anchors": lambda: Anchors(anchors(size)),
            "nearest": lambda: Nearest(anchors(size)),
            "concatenated": lambda: Concatenated((Anchors(anchors(size), 1.5), Elu1())),
            "projected": lambda: Projected(Taylor(2), normal(self.key_heads, 2, size)),
        }[self.phi]()

    def arrays(self, dtype=jnp.float64):
        draw = np.random.default_rng(self.seed)

        def normal(*shape):
            return jnp.asarray(draw.standard_normal(shape), dtype)

        features = self.map().dim(self.head_dim)
        arrays = dict(
            query=normal(self.batch, self.queries, self.heads, self.head_dim),
            key=normal(self.batch, self.keys, self.key_heads, self.head_dim),
            value=normal(self.batch, self.keys, self.key_heads, self.head_dim),
            z=normal(self.heads, features, self.head_dim),
            k=jnp.asarray(np.abs(draw.standard_normal((self.heads, features))), dtype),
        )
        if self.bias_axes is not None:
            arrays["bias"] = normal(*self.shape(self.bias_axes))
        return arrays

    def options(self):
        mask = None
        if self.mask_axes is not None:
            mask = jnp.asarray(np.random.default_rng(self.seed + 1).random(self.shape(self.mask_axes)) < 0.7)
        return dict(mask=mask, is_causal=self.is_causal, scale=self.scale, feature_map=self.map())


@jax.jit
def features_of(phi, x):
    return jnp.swapaxes(phi(jnp.swapaxes(x, 1, 2)), 1, 2)


def literal(case: Case, dtype=jnp.float64) -> np.ndarray:
    """(A V + phi(q) Z) / (A 1 + phi(q) k), in numpy and float64, a head at a time, as it is written."""
    a = {name: np.asarray(x, np.float64) for name, x in case.arrays(dtype).items()}
    mask = case.options()["mask"]
    full = (case.batch, case.heads, case.queries, case.keys)
    bias = np.broadcast_to(a.get("bias", np.zeros((1, 1, 1, 1))), full)
    allowed = np.broadcast_to(np.ones((1, 1, 1, 1), bool) if mask is None else np.asarray(mask), full)
    if case.is_causal:
        allowed = allowed & (np.arange(case.keys)[None, :] <= np.arange(case.queries)[:, None])
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    phis = np.asarray(features_of(case.map(), a["query"] * math.sqrt(scale)))
    out = np.zeros((case.batch, case.queries, case.heads, case.head_dim))
    for b in range(case.batch):
        for n in range(case.heads):
            query, group = a["query"][b, :, n], n // case.groups
            scores = scale * query @ a["key"][b, :, group].T + bias[b, n]
            attention = np.exp(scores) * allowed[b, n]
            phi = phis[b, :, n]
            mass = np.maximum(phi @ a["k"][n], 0)
            above = attention @ a["value"][b, :, group] + phi @ a["z"][n]
            below = attention.sum(axis=1) + mass
            out[b, :, n] = np.where(below[:, None] == 0, 0, above / np.where(below == 0, 1, below)[:, None])
    return out


def run(case: Case, implementation: str, dtype=jnp.float64):
    return attend(**case.arrays(dtype), implementation=implementation, **case.options())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small arrays are cut in several, unevenly."""
    cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=3, keys=4)
    monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)


axes = st.none() | st.tuples(*[st.booleans()] * 4)
cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    queries=st.integers(1, 8),
    keys=st.integers(1, 9),
    key_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 5]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, 2.0]),
    bias_axes=axes,
    mask_axes=axes,
    phi=st.sampled_from(["elu1", "taylor", "anchors", "nearest", "concatenated", "projected"]),
    seed=st.integers(0, 1000),
)
sweep = settings(max_examples=6, deadline=None, derandomize=True)


class TestAgainstTheFormula:
    @sweep
    @given(case=cases, implementation=st.sampled_from(CPU_IMPLEMENTATIONS))
    def test_float64(self, case, implementation):
        expected = literal(case)
        error = np.max(np.abs(run(case, implementation) - expected))
        assert error <= 1e-12 * max(1, np.max(np.abs(expected)))

    @pytest.mark.slow
    @settings(max_examples=200, deadline=None)
    @given(case=cases, implementation=st.sampled_from(CPU_IMPLEMENTATIONS))
    def test_float64_long(self, case, implementation):
        expected = literal(case)
        error = np.max(np.abs(run(case, implementation) - expected))
        assert error <= 1e-12 * max(1, np.max(np.abs(expected)))

    @sweep
    @given(case=cases, implementation=st.sampled_from(CPU_IMPLEMENTATIONS))
    def test_float32(self, case, implementation):
        expected = literal(case, jnp.float32)
        got = run(case, implementation, jnp.float32)
        assert got.dtype == jnp.float32
        assert np.max(np.abs(got - expected)) <= 2e-6 * max(1, np.max(np.abs(expected)))

    @sweep
    @given(case=cases, implementation=st.sampled_from(CPU_IMPLEMENTATIONS))
    def test_bfloat16_is_within_two_ulps_of_the_float32_result(self, case, implementation):
        expected = literal(case, jnp.bfloat16)
        got = run(case, implementation, jnp.bfloat16)
        assert got.dtype == jnp.bfloat16
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(expected), 1e-30))) - 7)
        assert np.all(np.abs(np.float32(got) - expected) <= 2 * ulp + 1e-6)

    @pytest.mark.parametrize("x64", [True, False], indirect=True)
    def test_both_precisions_of_the_house(self, x64):
        case = Case(is_causal=True, bias_axes=(False, True, True, True))
        result = run(case, "xla", jnp.float64 if x64 else jnp.float32)
        assert result.dtype == (jnp.float64 if x64 else jnp.float32)

    def test_a_wrong_scale_of_the_features_is_seen(self):
        """Negative control: phi(q) in the place of phi(q sqrt(scale)) is far outside the tolerance."""
        case = Case()
        arrays = case.arrays()
        quarter = case.head_dim**0.25
        wrong = attend(**{**arrays, "query": arrays["query"] * quarter, "key": arrays["key"] / quarter})
        assert np.max(np.abs(wrong - literal(case))) > 1e-2

    def test_low_rank_z_is_its_product(self):
        arrays = Case().arrays()
        z = arrays.pop("z")
        left, right = z[..., :2], z[:, :2, :]
        whole = attend(**arrays, z=left @ right)
        np.testing.assert_allclose(attend(**arrays, z=LowRank(left, right)), whole, atol=1e-13)


# ---------------------------------------------------------------------------- gradients, two layers


def two_layers(attend, arrays):
    """A scalar of two attention layers: the lower one feeds queries, keys and values of the upper one."""
    lower, upper = arrays["lower"], arrays["upper"]
    x = attend(**lower)
    groups = lower["query"].shape[2] // lower["key"].shape[2]
    y = attend(query=jnp.sin(x), key=x[:, :, ::groups], value=jnp.cos(x[:, :, ::groups]), **upper)
    return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size)


def two_layer_arrays(case: Case):
    lower = case.arrays()
    top = dataclasses.replace(case, keys=case.queries, seed=case.seed + 7).arrays()
    upper = {name: top[name] for name in ("z", "k", "bias") if name in top}
    return {"lower": lower, "upper": upper}


def merged_under_stop_gradient(query, key, value, z, k, *, is_causal=False, bias=None):
    """The tempting version: merge on the log-sum-exp that jax.nn returns, which is under stop_gradient."""
    phi = feature_map("elu1")(query * query.shape[-1] ** -0.25)
    output, lse = jax.nn.dot_product_attention(query, key, value, bias, is_causal=is_causal, return_residual=True)
    mass = jnp.exp(lse)[..., None]
    prefix = jnp.einsum("btnr,nrh->btnh", phi, z)
    return (mass * output + prefix) / (mass + jnp.einsum("btnr,nr->btn", phi, k)[..., None])


GRADIENT_CASES = [
    Case(queries=7, keys=7, is_causal=True, bias_axes=(False, True, True, True)),
    Case(queries=5, keys=9, groups=1, bias_axes=(True, False, True, False), scale=0.7),
]


class TestGradients:
    @pytest.mark.parametrize("case", GRADIENT_CASES)
    def test_two_layers_agree_with_autodiff_of_the_reference(self, case):
        arrays = two_layer_arrays(case)
        grads = {
            implementation: jax.jit(
                jax.grad(
                    functools.partial(
                        two_layers,
                        functools.partial(
                            ntk_attention,
                            implementation=implementation,
                            is_causal=case.is_causal,
                            scale=case.scale,
                        ),
                    )
                )
            )(arrays)
            for implementation in CPU_IMPLEMENTATIONS
        }
        for path, expected in jax.tree_util.tree_leaves_with_path(grads["reference"]):
            got = functools.reduce(lambda tree, entry: tree[entry.key], path, grads["xla"])
            np.testing.assert_allclose(got, expected, atol=1e-8, err_msg=str(path))
            assert np.max(np.abs(expected)) > 1e-4, f"{path}: a zero gradient tests nothing"

    @pytest.mark.parametrize(("case", "implementation"), [(GRADIENT_CASES[0], "reference"), (GRADIENT_CASES[1], "xla")])
    def test_two_layers_agree_with_finite_differences(self, case, implementation):
        arrays = two_layer_arrays(case)
        layer = functools.partial(
            ntk_attention, implementation=implementation, is_causal=case.is_causal, scale=case.scale
        )
        loss = jax.jit(functools.partial(two_layers, layer))
        assert worst_directional_error(loss, jax.jit(jax.grad(loss))(arrays), arrays) <= 1e-8

    def test_merging_on_a_stopped_residual_fails_this_very_test(self):
        """Negative control: right loss, right top state, wrong below; one layer cannot see it."""
        case = Case(queries=7, keys=7, groups=1, is_causal=True)
        arrays = jax.tree.map(jnp.float32, two_layer_arrays(case))
        with jax.enable_x64(False):  # jax.nn works in float32
            right, wrong = (
                jax.jit(jax.value_and_grad(functools.partial(two_layers, functools.partial(attend, is_causal=True))))(
                    arrays
                )
                for attend in (ntk_attention, merged_under_stop_gradient)
            )
        relative = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(a), right[1], wrong[1])
        assert abs(right[0] - wrong[0]) < 1e-5
        assert relative["upper"]["z"] < 1e-4
        assert relative["upper"]["k"] < 1e-4
        assert relative["lower"]["query"] > 0.05
        assert relative["lower"]["key"] > 0.05

    def test_jvp_of_grad_works_for_both(self):
        arrays = GRADIENT_CASES[0].arrays()

        def hessian_vector(implementation):
            options = dict(implementation=implementation, is_causal=True)
            grad = jax.grad(lambda a: jnp.sum(jnp.sin(ntk_attention(**a, **options))))
            return jax.jit(lambda a: jax.jvp(grad, (a,), (jax.tree.map(jnp.cos, a),))[1])(arrays)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8),
            hessian_vector("xla"),
            hessian_vector("reference"),
        )

    def test_forward_mode_alone_is_for_the_reference(self):
        arrays = Case().arrays()
        tangent = jax.tree.map(jnp.ones_like, arrays)
        reference = functools.partial(ntk_attention, implementation="reference")
        jax.eval_shape(lambda a, t: jax.jvp(lambda a: reference(**a), (a,), (t,)), arrays, tangent)
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda a: ntk_attention(**a, implementation="xla"), (arrays,), (tangent,))

    @pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
    def test_bfloat16_gradients_have_the_dtypes_of_their_inputs(self, implementation):
        arrays = Case(bias_axes=(False, False, True, True)).arrays(jnp.bfloat16)
        arrays |= {name: arrays[name].astype(jnp.float32) for name in ("z", "k", "bias")}

        def loss(a):
            return jnp.sum(ntk_attention(**a, implementation=implementation))

        grads = jax.eval_shape(jax.grad(loss), arrays)
        assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, arrays)


def worst_directional_error(loss, grads, arrays, step=1e-5):
    """Return the largest |central difference - gradient . direction|, along one unit direction a leaf."""
    leaves, tree = jax.tree.flatten(arrays)
    draw = np.random.default_rng(3)
    errors = []
    for index, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        direction = draw.standard_normal(leaf.shape)
        direction /= np.linalg.norm(direction)
        values = [
            loss(tree.unflatten([*leaves[:index], leaf + sign * step * direction, *leaves[index + 1 :]]))
            for sign in (1, -1)
        ]
        errors.append(abs((values[0] - values[1]) / (2 * step) - np.sum(grad * direction)))
    return max(errors)


# ----------------------------------------------------------------------------------- the zero state


class TestZeroState:
    @pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
    @pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
    def test_is_attention_without_a_prefix_bit_for_bit(self, implementation, dtype):
        case = Case(is_causal=True, bias_axes=(True,) * 4)
        arrays = case.arrays(dtype)
        z, k = arrays.pop("z"), arrays.pop("k")
        options = dict(implementation=implementation, is_causal=True)
        zero = attend(**arrays, z=0 * z, k=0 * k, **options)
        nothing = jnp.zeros((0, case.key_heads, case.head_dim), dtype)
        plain = attend_prefix(**arrays, prefix_key=nothing, prefix_value=nothing, **options)
        np.testing.assert_array_equal(zero, plain)

    def test_is_jax_nn_up_to_rounding(self):
        arrays = Case(is_causal=True).arrays(jnp.float32)
        z, k = arrays.pop("z"), arrays.pop("k")
        np.testing.assert_allclose(
            attend(**arrays, z=0 * z, k=0 * k, is_causal=True),
            jax.nn.dot_product_attention(**arrays, is_causal=True),
            atol=2e-6,
        )

    @pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
    def test_k_has_its_gradient_there(self, implementation):
        """By differences on the feasible side, k >= 0; through abs there would be no gradient."""
        arrays = Case().arrays()
        k = jnp.zeros_like(arrays.pop("k"))
        loss = jax.jit(lambda k: jnp.sum(jnp.sin(ntk_attention(**arrays, k=k, implementation=implementation))))
        direction = jnp.abs(jnp.cos(jnp.arange(k.size, dtype=k.dtype))).reshape(k.shape)
        slope = jnp.sum(jax.grad(loss)(k) * direction)
        step = 1e-5  # second-order one-sided difference
        values = [loss(t * step * direction) for t in range(3)]
        difference = (-3 * values[0] + 4 * values[1] - values[2]) / (2 * step)
        assert abs(slope) > 1e-2
        assert abs(slope - difference) < 1e-8
        assert jnp.all(jax.grad(lambda k: loss(jnp.abs(k) * jnp.sign(k)))(k) == 0)  # the control: |k| = k sign(k)

    def test_a_mass_below_zero_counts_as_zero(self):
        arrays = Case().arrays()
        k = arrays.pop("k")
        negative = attend(**arrays, k=-k)
        np.testing.assert_array_equal(negative, attend(**arrays, k=0 * k))


# ----------------------------------------------------------------------------------------- extremes


def value_and_grads(implementation, arrays, **options):
    def loss(a):
        output = ntk_attention(**a, implementation=implementation, **options)
        return jnp.sum(output**2), output

    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return output, grads


@jax.jit
def prefix_alone(arrays):
    """phi(q) Z / (phi(q) k): what a query sees where it sees no key."""
    phi = feature_map("elu1")(arrays["query"] * arrays["query"].shape[-1] ** -0.25)
    mass = jnp.einsum("btnr,nr->btn", phi, arrays["k"])
    return jnp.einsum("btnr,nrh->btnh", phi, arrays["z"]) / mass[..., None]


def assert_finite(tree):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32])
class TestExtremes:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("prefix", [True, False])
    def test_scores_of_ten_thousand(self, implementation, dtype, sign, prefix):
        """At +1e4 the prefix vanishes beside the keys, at -1e4 the keys vanish beside the prefix."""
        arrays = Case(groups=1, keys=7).arrays(dtype)
        if not prefix:
            arrays |= {"z": 0 * arrays["z"], "k": 0 * arrays["k"]}
        bias = jnp.full((1, 1, 1, 1), sign * 1e4, dtype)
        output, grads = value_and_grads(implementation, {**arrays, "bias": bias})
        assert_finite((output, grads))
        if sign > 0 or not prefix:
            expected = jax.nn.dot_product_attention(*(jnp.float32(arrays[name]) for name in ("query", "key", "value")))
        else:
            expected = prefix_alone(arrays)
        # float32 scores of 1e4 carry an absolute error of 1e-3, whichever way attention is computed
        np.testing.assert_allclose(output, expected, atol=2e-2)

    def test_large_queries(self, implementation, dtype):
        arrays = Case(groups=1, queries=6, keys=7).arrays(dtype)
        arrays["query"] = arrays["query"] * 1e4
        output, grads = value_and_grads(implementation, arrays)
        assert_finite((output, grads))
        """One key wins each row with a large score outright, and its value is the output."""
        scores = np.einsum("btnh,bsnh->btns", arrays["query"], arrays["key"])
        winners = np.take_along_axis(np.asarray(arrays["value"]), np.argmax(scores, axis=-1)[..., None], axis=1)
        clear = np.max(scores, axis=-1) > 1e3
        assert np.sum(clear) > 10
        np.testing.assert_allclose(output[clear], winners[clear], atol=1e-6)

    @pytest.mark.parametrize("prefix", [True, False])
    def test_a_fully_masked_row_sees_the_prefix_alone_or_nothing(self, implementation, dtype, prefix):
        arrays = Case(groups=1).arrays(dtype)
        if not prefix:
            arrays |= {"z": 0 * arrays["z"], "k": 0 * arrays["k"]}
        mask = jnp.ones((1, 1, 7, 5), bool).at[:, :, 2].set(False)
        output, grads = value_and_grads(implementation, arrays, mask=mask)
        assert_finite((output, grads))
        if prefix:
            np.testing.assert_allclose(output[:, 2], prefix_alone(arrays)[:, 2], rtol=2e-5, atol=2e-5)
        else:
            np.testing.assert_array_equal(output[:, 2], 0)
            np.testing.assert_array_equal(grads["query"][:, 2], 0)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (5, 1), (3, 0)])
    def test_one_query_one_key_no_key(self, implementation, dtype, queries, keys):
        case = Case(queries=queries, keys=keys, is_causal=True)
        output, grads = value_and_grads(implementation, case.arrays(dtype), is_causal=True)
        assert_finite((output, grads))
        tolerance = 2e-6
        np.testing.assert_allclose(output, literal(case), atol=tolerance * (1 + np.max(np.abs(literal(case)))))


# --------------------------------------------------------------------------- exact prefix attention


def by_concatenation(query, key, value, prefix_key, prefix_value, *, is_causal):
    """The prefix as virtual tokens before the keys: what the two merged passes must equal."""
    batch, length = query.shape[:2]
    shape = (batch, *prefix_key.shape[-3:])
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(p, shape), x], axis=1) for p, x in ((prefix_key, key), (prefix_value, value))
    )
    seen = jnp.ones((length, shape[1]), bool)
    own = jnp.tri(length, key.shape[1], dtype=bool) if is_causal else jnp.ones((length, key.shape[1]), bool)
    scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(keys, query.shape[2] // key.shape[2], axis=2)) / math.sqrt(
        query.shape[-1]
    )
    allowed = jnp.concatenate([seen, own], axis=1)[None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(values, query.shape[2] // key.shape[2], axis=2))


class TestPrefixAttention:
    @pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
    @pytest.mark.parametrize(("shared", "is_causal"), [(True, True), (False, False)])
    def test_equals_virtual_tokens_in_value_and_gradient(self, implementation, shared, is_causal):
        case = Case(queries=7, keys=7)
        arrays = case.arrays()
        del arrays["z"], arrays["k"]
        draw = np.random.default_rng(5)
        shape = (11, case.key_heads, case.head_dim) if shared else (2, 11, case.key_heads, case.head_dim)
        arrays |= {name: jnp.asarray(draw.standard_normal(shape)) for name in ("prefix_key", "prefix_value")}
        ours = functools.partial(prefix_attention, implementation=implementation, is_causal=is_causal)
        theirs = functools.partial(by_concatenation, is_causal=is_causal)

        def weigh(attend):
            return lambda a: jnp.sum(jnp.sin(3 * attend(**a)))

        np.testing.assert_allclose(jax.jit(ours)(**arrays), jax.jit(theirs)(**arrays), atol=1e-12)
        got, expected = (jax.jit(jax.grad(weigh(attend)))(arrays) for attend in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)

    def test_taylor_sums_converge_to_it(self):
        """The two operators meet: a state of Taylor features of rising degree approaches the exact prefix."""
        arrays = Case(head_dim=3).arrays()
        del arrays["z"], arrays["k"]
        draw = np.random.default_rng(5)
        prefix_key, prefix_value = (jnp.asarray(draw.uniform(-0.5, 0.5, (64, 2, 3))) for _ in range(2))
        slow = dict(implementation="reference")
        exact = attend_prefix(**arrays, prefix_key=prefix_key, prefix_value=prefix_value, **slow)
        errors = []
        for degree in (0, 2):
            phi = feature_map("taylor", degree=degree)
            features = jnp.repeat(phi(prefix_key * 3**-0.25), 2, axis=1)
            z = jnp.einsum("mnr,mnh->nrh", features, jnp.repeat(prefix_value, 2, axis=1))
            state = dict(z=z, k=jnp.sum(features, axis=0), feature_map=phi)
            errors.append(float(jnp.max(jnp.abs(attend(**arrays, **state, **slow) - exact))))
        assert errors[0] > 1e-2
        assert errors[-1] < errors[0] / 10


# -------------------------------------------------------------------------- living in a JAX program


class TestDecoding:
    def test_one_token_at_a_time_with_a_cache_is_the_causal_pass(self):
        """The cache holds the keys and nothing else; positions start at 0, prefix or not."""
        case = Case(queries=6, keys=6)
        arrays = case.arrays()
        whole = attend(**arrays, is_causal=True)
        cache = {name: jnp.zeros_like(arrays[name]) for name in ("key", "value")}

        @jax.jit
        def step(cache, t):
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    x, jax.lax.dynamic_slice_in_dim(arrays[name], t, 1, axis=1), t, axis=1
                )
                for name, x in cache.items()
            }
            mask = (jnp.arange(6) <= t)[None, None, None]
            query = jax.lax.dynamic_slice_in_dim(arrays["query"], t, 1, axis=1)
            return cache, ntk_attention(query, **cache, z=arrays["z"], k=arrays["k"], mask=mask)

        tokens = []
        for t in range(6):
            cache, token = step(cache, t)
            tokens.append(token)
        assert cache["key"].shape == arrays["key"].shape
        np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), whole, atol=1e-13)


def causal_loss(arrays):
    return jnp.sum(jnp.sin(ntk_attention(**arrays, is_causal=True)))


causal_grad = jax.jit(jax.grad(causal_loss))


class TestTransformations:
    def one_by_one(self, cases):
        return jax.tree.map(lambda *a: np.stack(a), *[causal_grad(a) for a in cases])

    def same(self, got, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)

    def test_remat(self):
        arrays = Case(queries=6, keys=6).arrays()
        self.same(jax.jit(jax.grad(jax.checkpoint(causal_loss)))(arrays), causal_grad(arrays))

    def test_scan_over_layers(self):
        case = Case(queries=6, keys=6, groups=1)
        x = case.arrays()["query"]
        layers = [dataclasses.replace(case, seed=s).arrays() for s in range(3)]
        states = jax.tree.map(lambda *a: jnp.stack(a), *[(a["z"], a["k"]) for a in layers])

        def layer(x, state):
            return x + ntk_attention(x, jnp.sin(x), jnp.cos(x), *state, is_causal=True), None

        def scanned(states):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, states)[0])

        def looped(states):
            return jnp.sum(
                functools.reduce(lambda x, i: layer(x, jax.tree.map(lambda s: s[i], states))[0], range(3), x)
            )

        self.same(jax.jit(jax.grad(scanned))(states), jax.jit(jax.grad(looped))(states))

    def test_vmap_over_an_inner_axis(self):
        axis = 2
        cases = [Case(queries=6, keys=6, seed=s).arrays() for s in range(2)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a, axis), *cases)
        self.same(jax.jit(jax.vmap(jax.grad(causal_loss), in_axes=axis))(stacked), self.one_by_one(cases))

    def test_pmap(self):
        cases = [Case(queries=6, keys=6, seed=s).arrays() for s in range(2)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *cases)
        got = jax.pmap(jax.grad(causal_loss), devices=jax.devices()[:2])(stacked)
        self.same(got, self.one_by_one(cases))

    def test_jit_with_sharded_batch_and_heads_needs_no_communication(self):
        case = Case(batch=2, queries=6, keys=6, key_heads=4, groups=2)
        arrays = case.arrays()
        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
        tokens, state = PartitionSpec("data", None, "model"), PartitionSpec("model")
        specs = {"query": tokens, "key": tokens, "value": tokens, "z": state, "k": state}
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
        got = attend(**placed, is_causal=True)
        self.same(got, attend(**arrays, is_causal=True))
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, tokens), got.ndim)
        program = attend.lower(**placed, is_causal=True).compile().as_text()
        assert "all-gather" not in program
        assert "all-to-all" not in program
        self.same(causal_grad(placed), causal_grad(arrays))


class TestMemory:
    def temporary_bytes(self, implementation, length):
        shapes = {name: jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for name in ("query", "key", "value")}
        shapes |= {
            "z": jax.ShapeDtypeStruct((2, 8, 8), jnp.float32),
            "k": jax.ShapeDtypeStruct((2, 8), jnp.float32),
        }

        def loss(a):
            return jnp.sum(ntk_attention(**a, implementation=implementation))

        compiled = jax.jit(jax.value_and_grad(loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def test_is_linear_in_length_forward_and_backward(self, monkeypatch):
        cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=64, keys=64)
        monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)
        growth = {i: self.temporary_bytes(i, 1024) / self.temporary_bytes(i, 512) for i in CPU_IMPLEMENTATIONS}
        assert growth["xla"] < 2.2
        assert growth["reference"] > 3.5  # the control: T x S arrays


class TestLowering:
    """jax.export proves from a CPU that forward and backward compile for the target."""

    def lower(self, platform, implementation, dtype, **options):
        arrays = Case(queries=8, keys=8, head_dim=8, bias_axes=(False, True, True, True)).arrays(dtype)
        arrays |= {name: arrays[name].astype(jnp.float32) for name in ("z", "k")}

        def loss(a):
            return jnp.sum(ntk_attention(**a, implementation=implementation, **options))

        calls = [f"__cudnn$fmha{kind}{half}" for kind in ("Softmax", "ScaleBiasSoftmax") for half in ("", "Backward")]
        exported = export.export(
            jax.jit(jax.value_and_grad(loss)),
            platforms=[platform],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(call) for call in calls],
        )(arrays)
        return exported.mlir_module()

    @pytest.mark.parametrize("platform", ["cuda", "tpu"])
    @pytest.mark.parametrize("implementation", [None, *CPU_IMPLEMENTATIONS])
    def test_plain_xla_lowers_everywhere(self, platform, implementation):
        assert "custom_call" not in self.lower(platform, implementation, jnp.bfloat16, is_causal=True)

    @pytest.mark.parametrize("masked", [True, False])
    def test_cudnn_lowers_with_its_own_backward(self, masked):
        mask = jnp.ones((1, 1, 8, 8), bool) if masked else None
        program = self.lower("cuda", "cudnn", jnp.bfloat16, is_causal=True, mask=mask)
        assert program.count("custom_call @__cudnn$fmhaScaleBiasSoftmax(") == 1
        assert program.count("custom_call @__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1

    def test_cudnn_prefix_attention_lowers_as_two_passes(self):
        arrays = Case(queries=8, keys=8, head_dim=8).arrays(jnp.bfloat16)
        prefix = jnp.ones((6, 2, 8), jnp.bfloat16)

        def call(q, p):
            return prefix_attention(q, arrays["key"], arrays["value"], p, p, implementation="cudnn")

        exported = export.export(
            jax.jit(call),
            platforms=["cuda"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")],
        )(arrays["query"], prefix)
        assert exported.mlir_module().count("custom_call @__cudnn$fmhaSoftmax(") == 2


class TestArguments:
    def test_the_default_falls_back_to_xla_and_says_why(self, caplog):
        with caplog.at_level(logging.INFO, logger="ntk_prefix.attention"):
            for head_dim in (4, 8):
                jax.eval_shape(ntk_attention, **Case(head_dim=head_dim).arrays(jnp.bfloat16))
        assert "xla: cudnn: cuDNN takes head dimensions" in caplog.messages[0]
        assert "cudnn: it runs on a GPU, and this is a CPU" in caplog.messages[1]

    @pytest.mark.parametrize(("name", "where"), [("cudnn", "GPU"), ("splash", "TPU")])
    def test_another_platforms_implementation_is_refused_where_it_would_run(self, name, where):
        arrays = Case(head_dim=8).arrays(jnp.bfloat16)
        with pytest.raises(UsageError, match=f"implementation='{name}': it runs on a {where}, and this is a CPU. Take"):
            ntk_attention(**arrays, implementation=name)
        jax.eval_shape(functools.partial(ntk_attention, implementation=name), **arrays)  # to be compiled for one

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(k=jnp.ones((4, 3))), "state: expected k"),
            (dict(z=jnp.ones((2, 4, 4))), "state: expected k"),
            (dict(implementation="flash"), "implementation: expected one of"),
            (dict(implementation="cudnn"), "bfloat16"),
            (dict(scale=-1.0), "scale: expected a finite number > 0"),
            (dict(scale=math.inf), "scale: expected a finite number > 0"),
            (dict(z=jnp.ones((4, 4, 1))), "state: expected k"),
            (dict(z=LowRank(jnp.ones((4, 4, 3)), jnp.ones((4, 3, 1)))), "state: expected k .* got .* left"),
            (dict(z=LowRank(jnp.ones((4, 4, 3)), jnp.ones((4, 2, 4)))), "state: expected k .* got .* left"),
            (dict(query=jnp.ones((2, 7, 4, 4), int)), "query: expected floating point numbers, got int"),
            (dict(key=jnp.ones((2, 5, 2, 4), bool)), "key: expected floating point numbers, got bool"),
            (dict(value=jnp.ones((2, 5, 2, 4), complex)), "value: expected floating point numbers, got complex"),
            (dict(bias=jnp.ones((1, 1, 7, 5), int)), "bias: expected floating point numbers, got int"),
            (dict(z=jnp.ones((4, 4, 4), int)), "z: expected floating point numbers, got int"),
            (dict(mask=jnp.ones((1, 1, 7, 5))), "mask: expected booleans"),
            (dict(mass="both"), "mass: expected"),
            (dict(feature_map="relu"), "feature_map: expected one of"),
            (dict(value=jnp.ones((2, 6, 2, 4))), "value: expected the key's shape"),
            (dict(key=jnp.ones((2, 5, 3, 4)), value=jnp.ones((2, 5, 3, 4))), "a divisor of 4"),
            (dict(bias=jnp.ones((1, 2, 7, 5))), "bias: expected"),
            (dict(z=[[1.0]]), "z: expected an array, got list"),
            (dict(z=(jnp.ones((4, 4, 3)), jnp.ones((4, 3, 4)))), "z: expected an array, got tuple"),
            (dict(k=None), "k: expected an array, got NoneType"),
            (dict(z=LowRank(jnp.ones((4, 4, 3)), [1.0])), "z.right: expected an array, got list"),
            (dict(query=jnp.ones((2, 7, 0, 4))), "query: expected .* with N, H >= 1"),
            (dict(is_causal="no"), "is_causal: expected True or False, got 'no'"),
            (dict(is_causal=jnp.array(True)), "is_causal: expected True or False"),
            (dict(is_causal=True, query_offset=2**31), "query_offset: expected a place within 536,870,912 of 0"),
            (dict(scale=1e300), "scale: expected a number from 1e-30 to 1e30"),
            (dict(implementation=["xla"]), "implementation: expected one of"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change, message, without_annotations):
        with pytest.raises(ValueError, match=message):
            ntk_attention(**{**Case().arrays(), **change})

    @pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
    @pytest.mark.parametrize(("offset", "as_if"), [(2**40, 100), (-(2**40), -100)])
    def test_an_offset_beyond_int32_does_not_wrap_around(self, offset, as_if, implementation):
        options = dict(is_causal=True, implementation=implementation, **Case().arrays())
        far, near = (ntk_attention(**options, query_offset=jnp.int64(place)) for place in (offset, as_if))
        np.testing.assert_array_equal(far, near)

    def test_a_prefix_with_the_heads_of_the_query_is_named(self, without_annotations):
        arrays = Case().arrays()
        prefix = jnp.ones((3, 4, 4))
        with pytest.raises(ValueError, match="key's heads"):
            prefix_attention(arrays["query"], arrays["key"], arrays["value"], prefix, prefix)
