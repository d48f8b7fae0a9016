"""What one layer of prefix attention is: the two stylized models, their prefix, and the real layer."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntk_prefix import FixedValuePrefixModel, PrefixAttentionLayer, RandomPrefix, TiedPrefixModel
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.one_layer import (
    Frozen,
    attend,
    attention_mass,
    fixed_jacobian,
    fixed_outputs,
    tied_jacobian,
    tied_outputs,
)
from ntk_prefix.random_prefix import TILE
from ntk_prefix.training import Trainer, half_squared_error

N, D, M, OUTPUTS = 3, 2, 6, 4
EPS = float(np.finfo(np.float64).eps)

# one shape for every example: hypothesis chooses values, so nothing is compiled twice
examples = settings(deadline=None, max_examples=30)


def matrices(rows: int, columns: int, bound: float = 3.0) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, (rows, columns), elements=st.floats(-bound, bound, allow_subnormal=False))


def inputs(rows: int = N, d: int = D, dtype: object = None) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (rows, d), dtype or float) / math.sqrt(d)


def parts(model: str, symmetric: bool = True) -> tuple[Callable, Callable, jax.Array, jax.Array]:
    """The pure functions of a model, and the weights and signs of a small one."""
    built = (
        TiedPrefixModel(D, M, symmetric=symmetric, rngs=nnx.Rngs(0))
        if model == "tied"
        else FixedValuePrefixModel(D, M, OUTPUTS, symmetric=symmetric, rngs=nnx.Rngs(0))
    )
    functions = (tied_outputs, tied_jacobian) if model == "tied" else (fixed_outputs, fixed_jacobian)
    return *functions, built.weights[...], built.signs[...]


both_models = pytest.mark.parametrize("model", ["tied", "fixed"])
symmetric_or_not = pytest.mark.parametrize("symmetric", [True, False])


class TestAttentionMass:
    @examples
    @given(weights=matrices(M, D), x=matrices(N, D))
    def test_rows_are_positive_and_sum_to_m(self, weights: np.ndarray, x: np.ndarray) -> None:
        mass = attention_mass(jnp.asarray(weights), jnp.asarray(x))
        assert mass.shape == (N, M)
        assert (mass >= 0).all()
        # |scores| <= 18: exp amplifies a rounding of the score by as much
        np.testing.assert_allclose(mass.sum(1), M, rtol=40 * EPS)

    @examples
    @given(weights=matrices(M, D), x=matrices(N, D), shift=matrices(1, D))
    def test_shifting_every_token_alike_changes_nothing(
        self, weights: np.ndarray, x: np.ndarray, shift: np.ndarray
    ) -> None:
        """softmax(W x + s . x) = softmax(W x): only differences between tokens matter."""
        mass = attention_mass(jnp.asarray(weights), jnp.asarray(x))
        shifted = attention_mass(jnp.asarray(weights + shift), jnp.asarray(x))
        # scores below 36 in absolute value carry 36 eps each before and after the exponential
        np.testing.assert_allclose(shifted, mass, rtol=200 * EPS)

    def test_shifting_one_token_does(self) -> None:
        _, _, weights, _ = parts("tied")
        moved = attention_mass(weights.at[0].add(1.0), inputs())
        assert abs(moved - attention_mass(weights, inputs())).max() > 0.1

    @examples
    @given(weights=matrices(M, D), x=matrices(N, D), order=st.permutations(range(M)))
    def test_the_order_of_the_tokens_does_not_matter(
        self, weights: np.ndarray, x: np.ndarray, order: list[int]
    ) -> None:
        mass = attention_mass(jnp.asarray(weights), jnp.asarray(x))
        permuted = attention_mass(jnp.asarray(weights[order]), jnp.asarray(x))
        np.testing.assert_allclose(permuted, mass[:, np.array(order)], rtol=40 * EPS)

    def test_equal_tokens_share_equally(self) -> None:
        mass = attention_mass(jnp.ones((M, D)), inputs())
        np.testing.assert_allclose(mass, 1, rtol=4 * EPS)

    @pytest.mark.parametrize("x64", [True, False], indirect=True)
    @pytest.mark.parametrize("score", [1e4, -1e4])
    def test_extreme_scores_stay_finite(self, score: float, x64: bool) -> None:
        """One token ahead by 1e4 takes everything, one behind by 1e4 nothing; a naive exponential is inf / inf."""
        weights = jnp.zeros((M, 1)).at[0].set(score)
        mass = attention_mass(weights, jnp.ones((1, 1)))[0]
        expected = [M] + [0] * (M - 1) if score > 0 else [0] + [M / (M - 1)] * (M - 1)
        # scores of 1e4 are kept to 1e4 eps
        np.testing.assert_allclose(mass, np.array(expected), rtol=1e4 * np.finfo(weights.dtype).eps)
        naive = jnp.exp(weights[:, 0])
        if score > 0:
            assert not jnp.isfinite(naive / naive.sum()).all()

    @both_models
    def test_extreme_scores_have_finite_outputs_and_gradients(self, model: str) -> None:
        outputs, jacobian, weights, signs = parts(model)
        for scale in (1e4, -1e4):
            assert jnp.isfinite(outputs(scale * weights, signs, inputs())).all()
            assert jnp.isfinite(jacobian(scale * weights, signs, inputs())).all()
            assert jnp.isfinite(jax.jacrev(outputs)(scale * weights, signs, inputs())).all()


class TestStylizedModels:
    @both_models
    def test_the_formula_written_out(self, model: str) -> None:
        outputs, _, weights, signs = parts(model, symmetric=False)
        expected = np.zeros((N, D if model == "tied" else OUTPUTS))
        for i, x in enumerate(np.array(inputs())):
            exponentials = [math.exp(w @ x) for w in np.array(weights)]
            for k in range(expected.shape[1]):
                for r in range(M):
                    value = signs[r, 0] * weights[r, k] if model == "tied" else signs[r, k]
                    expected[i, k] += M * exponentials[r] / sum(exponentials) * value
        # sums of M terms of order M
        np.testing.assert_allclose(outputs(weights, signs, inputs()), expected, atol=M * M * EPS)

    @both_models
    def test_symmetric_initialization_starts_at_zero(self, model: str) -> None:
        outputs, _, weights, signs = parts(model, symmetric=True)
        # pairs cancel term by term; the matrix product may add them in another order
        np.testing.assert_allclose(outputs(weights, signs, inputs()), 0, atol=4 * M * EPS)
        outputs, _, weights, signs = parts(model, symmetric=False)
        assert abs(outputs(weights, signs, inputs())).max() > 0.1

    @both_models
    @symmetric_or_not
    def test_the_jacobian_is_what_autodiff_says(self, model: str, symmetric: bool) -> None:
        outputs, jacobian, weights, signs = parts(model, symmetric)
        weights = weights + 0.3 * jax.random.normal(jax.random.key(3), weights.shape)  # as after training
        closed = jacobian(weights, signs, inputs())
        autodiff = jax.jacrev(outputs)(weights, signs, inputs())
        assert closed.shape == (N, D if model == "tied" else OUTPUTS, M, D)
        # both are a few products and sums over M tokens of terms of order one to ten
        np.testing.assert_allclose(closed, autodiff, atol=1e-13)

    @both_models
    @symmetric_or_not
    def test_finite_differences_approach_the_jacobian_with_order_two(self, model: str, symmetric: bool) -> None:
        outputs, jacobian, weights, signs = parts(model, symmetric)
        direction = jax.random.normal(jax.random.key(4), weights.shape)
        steps = np.geomspace(1e-3, 3e-2, 5)  # above, the next order shows; below, roundings do

        def slope(exact: jax.Array) -> float:
            along = jnp.einsum("ikrc,rc->ik", exact, direction)
            errors = []
            for step in steps:
                ahead, behind = (outputs(weights + s * direction, signs, inputs()) for s in (step, -step))
                errors.append(float(jnp.abs((ahead - behind) / (2 * step) - along).max()))
            return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])

        closed = jacobian(weights, signs, inputs())
        assert slope(closed) == pytest.approx(2, abs=0.02)
        # control: a derivative wrong by one part in a thousand is not approached at all
        assert slope(closed * 1.001) < 1.5

    @both_models
    def test_gradient_norms_are_those_of_the_jacobian(self, model: str) -> None:
        _, jacobian, weights, signs = parts(model, symmetric=False)
        kinds = {
            "tied": lambda: TiedPrefixModel(D, M, symmetric=False, rngs=nnx.Rngs(0)),
            "fixed": lambda: FixedValuePrefixModel(D, M, OUTPUTS, symmetric=False, rngs=nnx.Rngs(0)),
        }
        expected = np.sqrt(np.square(jacobian(weights, signs, inputs())).sum((1, 3)))
        # the square is a sum of terms of both signs, of order one to ten
        np.testing.assert_allclose(kinds[model]().token_gradient_norms(inputs()), expected, rtol=1e-12)

    @both_models
    def test_the_module_is_the_function(self, model: str) -> None:
        outputs, _, weights, signs = parts(model)
        module = (
            TiedPrefixModel(D, M, rngs=nnx.Rngs(0))
            if model == "tied"
            else FixedValuePrefixModel(D, M, OUTPUTS, rngs=nnx.Rngs(0))
        )
        assert module.m == M
        np.testing.assert_array_equal(module(inputs()), outputs(weights, signs, inputs()))

    @pytest.mark.parametrize("kind", [TiedPrefixModel, FixedValuePrefixModel])
    def test_only_the_weights_are_trainable(self, kind: type) -> None:
        model = kind(D, M, rngs=nnx.Rngs(0))
        assert set(nnx.state(model, nnx.Param)) == {"weights"}
        assert set(nnx.state(model, Frozen)) == {"signs"}
        assert set(np.unique(model.signs[...])) <= {-1, 1}

    @both_models
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("x64", [True, False], indirect=True)
    def test_narrow_dtypes_are_kept_and_accumulate_in_float32(self, model: str, dtype: str, x64: bool) -> None:
        m = 512
        kinds = {"tied": TiedPrefixModel, "fixed": FixedValuePrefixModel}
        built = kinds[model](D, m, symmetric=False, dtype=dtype, rngs=nnx.Rngs(0))
        x = inputs().astype(dtype)
        got = built(x)
        assert got.dtype == x.dtype == built.weights.dtype

        weights, signs, queries = (np.asarray(a, np.float64) for a in (built.weights[...], built.signs[...], x))
        exponentials = np.exp(queries @ weights.T)
        values = signs * weights if model == "tied" else signs
        terms = m * exponentials / exponentials.sum(1, keepdims=True)
        # one rounding of the result to its dtype, and sqrt(m) random ones of float32 on a sum of |terms|
        accumulated = math.sqrt(m) * float(jnp.finfo("float32").eps) * (terms @ abs(values)).max()
        tolerance = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(got, np.float64), terms @ values, rtol=tolerance, atol=accumulated)


class TestRandomPrefix:
    def prefix(self, **changes: object) -> RandomPrefix:
        settings = {"key": jax.random.key(0), "d": D, "m": 100} | changes
        return RandomPrefix(**settings)  # type: ignore[arg-type]

    @both_models
    def test_materialized_is_the_tiles_in_order(self, model: str) -> None:
        rows = 2 * TILE + 10
        prefix = self.prefix(m=rows, symmetric=False, model=model)
        weights, signs = prefix.materialise()
        assert prefix.tiles == 3
        assert weights.shape == (rows, D)
        assert signs.shape == (rows, 1 if model == "tied" else D)
        for index in range(prefix.tiles):
            tile_weights, tile_signs = prefix.tile(index)
            here = slice(index * TILE, min((index + 1) * TILE, rows))
            kept = here.stop - here.start
            np.testing.assert_array_equal(weights[here], tile_weights[:kept])
            np.testing.assert_array_equal(signs[here], tile_signs[:kept])

    @both_models
    @symmetric_or_not
    def test_a_shorter_prefix_is_the_beginning_of_a_longer_one(self, model: str, symmetric: bool) -> None:
        short = self.prefix(m=100, symmetric=symmetric, model=model).materialise()
        long = self.prefix(m=TILE + 100, symmetric=symmetric, model=model).materialise()
        for less, more in zip(short, long, strict=True):
            np.testing.assert_array_equal(less, more[:100])

    @both_models
    def test_symmetric_rows_come_in_neighboring_pairs(self, model: str) -> None:
        weights, signs = self.prefix(model=model).materialise()
        np.testing.assert_array_equal(weights[::2], weights[1::2])
        np.testing.assert_array_equal(signs[::2], -signs[1::2])
        weights, signs = self.prefix(model=model, symmetric=False).materialise()
        assert (weights[::2] != weights[1::2]).all()

    def test_a_symmetric_prefix_has_the_rows_of_one_that_is_not(self) -> None:
        paired = self.prefix(m=200).materialise()[0]
        single = self.prefix(m=100, symmetric=False).materialise()[0]
        np.testing.assert_array_equal(paired[::2], single)

    def test_moments_are_those_of_the_distribution(self) -> None:
        sigma, m = 0.5, 4 * TILE
        weights, signs = self.prefix(m=m, sigma=sigma, symmetric=False, d=4, model="fixed").materialise()
        standard = np.array(weights) / sigma
        # five standard errors: false alarm once in 10^6, and the seed is fixed
        five = 5 / math.sqrt(m)
        np.testing.assert_allclose(standard.mean(0), 0, atol=five)
        np.testing.assert_allclose(standard.T @ standard / m, np.eye(4), atol=five * math.sqrt(2))
        np.testing.assert_allclose((standard**4).mean(0), 3, atol=five * math.sqrt(96))
        np.testing.assert_allclose(signs.mean(0), 0, atol=five)
        np.testing.assert_allclose(signs.T @ signs / m, np.eye(4), atol=five)  # outputs have signs of their own
        np.testing.assert_allclose(standard.T @ np.array(signs) / m, 0, atol=five)  # and none knows the weights

    def test_tiles_and_keys_differ(self) -> None:
        prefix = self.prefix(m=2 * TILE, symmetric=False)
        other = self.prefix(m=2 * TILE, symmetric=False, key=jax.random.key(1))
        assert (prefix.tile(0)[0] != prefix.tile(1)[0]).any(axis=1).all()
        assert (prefix.tile(0)[0] != other.tile(0)[0]).any(axis=1).all()

    @pytest.mark.parametrize("kind", ["tied", "fixed"])
    def test_models_start_from_exactly_these_rows(self, kind: str) -> None:
        prefix = self.prefix(m=M, key=nnx.Rngs(0).params(), model=kind)
        built = {"tied": TiedPrefixModel, "fixed": FixedValuePrefixModel}[kind](D, M, rngs=nnx.Rngs(0))
        weights, signs = prefix.materialise()
        np.testing.assert_array_equal(built.weights[...], weights)
        np.testing.assert_array_equal(built.signs[...], signs)

    @pytest.mark.parametrize("x64", [True, False], indirect=True)
    def test_the_dtype_is_jax_s_default_or_the_one_asked_for(self, x64: bool) -> None:
        assert self.prefix().materialise()[0].dtype == (jnp.float64 if x64 else jnp.float32)
        for dtype in ("float32", "bfloat16"):
            assert {part.dtype for part in self.prefix(dtype=dtype).materialise()} == {jnp.dtype(dtype)}

    def test_it_is_a_pytree_whose_only_leaf_is_the_key(self) -> None:
        prefix = self.prefix()
        assert jax.tree.leaves(prefix) == [prefix.key]
        np.testing.assert_array_equal(jax.jit(lambda p: p.materialise()[0])(prefix), prefix.materialise()[0])

    def test_it_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.prefix().m = 10  # type: ignore[misc]


class TestPrefixAttentionLayer:
    LENGTH = 4

    def layer(self, **options: object) -> PrefixAttentionLayer:
        return PrefixAttentionLayer(D, M, rngs=nnx.Rngs(0), **options)  # type: ignore[arg-type]

    def sequence(self, *batch: int) -> jax.Array:
        return jax.random.normal(jax.random.key(5), (*batch, self.LENGTH, D))

    def test_the_formula_written_out(self) -> None:
        layer, x = self.layer(), np.array(self.sequence())
        prefix, query, key, value = (
            np.array(part[...])
            for part in (layer.prefix, layer.query_projection, layer.key_projection, layer.value_projection)
        )
        sequence = np.concatenate([prefix, x])
        scores = np.exp(x @ query @ (sequence @ key).T / math.sqrt(D))
        expected = scores / scores.sum(1, keepdims=True) @ sequence @ value
        # a dozen roundings on sums of M + LENGTH terms of order one
        np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-14)
        # control: without the prefix it is another function
        without = attend(jnp.zeros((0, D)), *map(jnp.asarray, (x, query, key, value)))
        assert abs(without - expected).max() > 0.1

    def test_a_batch_is_a_loop_over_sequences(self) -> None:
        layer, x = self.layer(), self.sequence(2, 3)
        batched = layer(x)
        assert batched.shape == (2, 3, self.LENGTH, D)
        for i in range(2):
            for j in range(3):
                # batched products may be ordered differently
                np.testing.assert_allclose(batched[i, j], layer(x[i, j]), atol=1e-14)

    def test_gradients_reach_the_prefix_and_nothing_else(self) -> None:
        layer, x = self.layer(), self.sequence()
        gradients = nnx.grad(lambda layer: half_squared_error(layer, (x, x)))(layer)
        assert set(gradients) == {"prefix"}
        assert (abs(gradients["prefix"][...]) > 0).all()

    def test_training_moves_the_prefix_and_leaves_the_projections(self) -> None:
        layer, x = self.layer(), self.sequence()
        trainer = Trainer(loss=half_squared_error, optimizer=optax.sgd(0.1))
        state, metrics = trainer.stepper(layer)(trainer.init(layer), (x, x))
        trained = trainer.model(layer, state)
        assert (trained.prefix[...] != layer.prefix[...]).all()
        for name in ("query_projection", "key_projection", "value_projection"):
            np.testing.assert_array_equal(getattr(trained, name)[...], getattr(layer, name)[...])
        assert metrics["loss"] > half_squared_error(trained, (x, x)) / self.LENGTH

    def test_extreme_scores_stay_finite(self) -> None:
        layer, x = self.layer(), self.sequence()
        layer.prefix[...] = 1e4 * layer.prefix[...]
        assert jnp.isfinite(layer(x)).all()
        gradients = nnx.grad(lambda layer: half_squared_error(layer, (x, x)))(layer)
        assert jnp.isfinite(gradients["prefix"][...]).all()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_dtype_of_the_inputs_is_kept(self, dtype: str) -> None:
        narrow, x = self.layer(dtype=dtype), self.sequence().astype(dtype)
        got = narrow(x)
        assert got.dtype == x.dtype
        wide = attend(
            *(
                part.astype("float64")
                for part in (
                    narrow.prefix[...],
                    x,
                    narrow.query_projection[...],
                    narrow.key_projection[...],
                    narrow.value_projection[...],
                )
            )
        )
        # float32 all the way, then one rounding to the inputs' dtype
        tolerance = float(jnp.finfo(dtype).eps) / 2 + 20 * float(jnp.finfo("float32").eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), wide, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("without_annotations")
class TestWrongUseIsTold:
    @pytest.mark.parametrize("kind", [TiedPrefixModel, FixedValuePrefixModel])
    def test_inputs_of_the_models(self, kind: type) -> None:
        model = kind(D, M, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"finite numbers, got nan at row 1, column 0.*Drop or impute"):
            model(inputs().at[1, 0].set(jnp.nan))
        with pytest.raises(ValueError, match="finite numbers, got -inf"):
            model(inputs().at[0, 0].set(-jnp.inf))
        with pytest.raises(ValueError, match=r"matrix \[n, d\].*got shape \(2,\).*x\[None, :\] for a single one"):
            model(inputs()[0])
        with pytest.raises(ValueError, match=r"matrix \[n, d\].*got shape \(0, 2\)"):
            model(jnp.zeros((0, D)))
        with pytest.raises(ValueError, match=r"expected d = 2 columns.*got 3"):
            model(jnp.zeros((N, 3)))
        with pytest.raises(ValueError, match=r"floating point numbers, got int64.*astype\(float\)"):
            model(jnp.ones((N, D), int))

    def test_finiteness_is_not_asked_under_jit(self) -> None:
        """A tracer has no values: a compiled call must not fail, and NaN then comes out as NaN."""
        model = TiedPrefixModel(D, M, rngs=nnx.Rngs(0))
        assert jnp.isnan(jax.jit(lambda x: model(x))(inputs().at[1, 0].set(jnp.nan))[1]).all()

    @pytest.mark.parametrize("kind", [TiedPrefixModel, FixedValuePrefixModel])
    def test_what_cannot_be_drawn(self, kind: type) -> None:
        with pytest.raises(ValueError, match=r"even number.*got 5\. Use m=6, or symmetric=False"):
            kind(D, 5, rngs=nnx.Rngs(0))
        kind(D, 5, symmetric=False, rngs=nnx.Rngs(0))
        for message, options in {
            "m: expected a whole number >= 1": {"d": D, "m": 0},
            "d: expected a whole number >= 1": {"d": 0, "m": M},
            "m: expected a whole number >= 1, got 6.0": {"d": D, "m": 6.0},
            "sigma: expected a finite number > 0": {"d": D, "m": M, "sigma": -1.0},
        }.items():
            with pytest.raises(ValueError, match=message):
                kind(**options, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"rngs: expected flax's nnx.Rngs, got int. Use rngs=nnx.Rngs\(3\)"):
            kind(D, M, rngs=3)
        with pytest.raises(ValueError, match="sigma: expected a finite number > 0, got nan"):
            kind(D, M, sigma=math.nan, rngs=nnx.Rngs(0))

    def test_a_random_prefix(self) -> None:
        key = jax.random.key(0)
        with pytest.raises(ValueError, match='expected "tied" or "fixed", got \'both\''):
            RandomPrefix(key=key, d=D, m=M, model="both")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="outputs: expected None or d = 2 for the tied model, got 3"):
            RandomPrefix(key=key, d=D, m=M, outputs=3)
        with pytest.raises(ValueError, match="outputs: expected a whole number >= 1, got 0"):
            RandomPrefix(key=key, d=D, m=M, model="fixed", outputs=0)

    def test_sequences_of_the_layer(self) -> None:
        layer = PrefixAttentionLayer(D, M, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"\[\.\.\., L, d = 2\], got shape \(2,\)"):
            layer(jnp.zeros(D))
        with pytest.raises(ValueError, match=r"\[\.\.\., L, d = 2\], got shape \(4, 3\)"):
            layer(jnp.zeros((4, 3)))
        with pytest.raises(ValueError, match=r"floating point numbers, got int64.*astype\(float\)"):
            layer(jnp.ones((4, D), int))
        with pytest.raises(ValueError, match="finite numbers, got nan at row 1, column 0"):
            layer(jnp.zeros((2, 4, D)).at[0, 1, 0].set(jnp.nan))
        with pytest.raises(ValueError, match="m: expected a whole number >= 1"):
            PrefixAttentionLayer(D, 0, rngs=nnx.Rngs(0))

    def test_shapes_that_would_broadcast(self) -> None:
        weights, signs, x = jnp.ones((M, D)), jnp.ones((M, 1)), jnp.ones((N, D))
        square = jnp.eye(D)
        for message, call in {
            r"signs: expected \[6, 1\], got \(1, 1\)": lambda: tied_outputs(weights, signs[:1], x),
            r"signs: expected \[6, outputs\], got \(1, 1\)": lambda: fixed_outputs(weights, signs[:1], x),
            r"signs: expected \[6, 1\], got \(6,\)": lambda: tied_jacobian(weights, signs[:, 0], x),
            r"signs: expected \[6, outputs\], got \(3, 1\)": lambda: fixed_jacobian(weights, signs[:3], x),
            r"inputs: expected \[n, 2\], got \(3, 1\)": lambda: attention_mass(weights, x[:, :1]),
            "weights: expected floating point numbers, got int": lambda: attention_mass(weights.astype(int), x),
            r"prefix: expected \[m, 2\], got \(6, 1\)": lambda: attend(weights[:, :1], x, square, square, square),
            r"key_projection: expected \[2, 2\], got \(2, 1\)": lambda: attend(
                weights, x, square, square[:, :1], square
            ),
        }.items():
            with pytest.raises(ValueError, match=message):
                call()

    def test_a_tied_model_whose_signs_are_not_signs(self) -> None:
        """Its kernel was off by nine tenths, and a certificate for it was none."""
        model = TiedPrefixModel(D, M, rngs=nnx.Rngs(0))
        model.signs[...] = model.signs[...].at[2, 0].set(3.0)
        for call in (prefix_ntk, lambda model, x: model.token_gradient_norms(x)):
            with pytest.raises(
                ValueError, match=r"signs: expected -1 or .1 for every token of a tied model, got 3 at token 2"
            ):
                call(model, inputs())
        fixed = FixedValuePrefixModel(D, M, rngs=nnx.Rngs(0))
        fixed.signs[...] = 3 * fixed.signs[...]
        assert jnp.isfinite(fixed.token_gradient_norms(inputs())).all()


class TestNumbersThatOverflow:
    def test_scores_beyond_the_dtype_are_refused_rather_than_made_nan(self) -> None:
        with pytest.raises(FloatingPointError, match=r"the scores w_r . x_i: expected numbers that float32 holds"):
            attention_mass(jnp.full((3, 2), 1e20, jnp.float32), jnp.full((2, 2), 1e20, jnp.float32))
        square = 1e30 * jnp.eye(2, dtype=jnp.float32)
        with pytest.raises(FloatingPointError, match="attention of scores and values so large"):
            attend(square, square, square, square, square)

    def test_no_token_is_refused(self) -> None:
        with pytest.raises(ValueError, match="weights: expected at least one prefix token, got none"):
            attention_mass(jnp.zeros((0, 2)), jnp.ones((1, 2)))

    @pytest.mark.parametrize("sigma", [1e300, 1e-300])
    def test_a_sigma_whose_draws_the_dtype_does_not_hold_is_refused(self, sigma: float) -> None:
        with pytest.raises(ValueError, match=r"sigma: expected a number from .* whose draws float32 holds"):
            RandomPrefix(key=jax.random.key(0), d=2, m=4, sigma=sigma, dtype=jnp.float32)
