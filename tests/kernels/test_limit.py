"""The kernel of an infinite prefix: it is the limit, and it is the expectation, each found in another way.

Two independent references. The finite kernel must approach it as m^(-1/2), which is fitted over seeds. And it is an
expectation over one Gaussian token, which Gauss-Hermite quadrature computes to 1e-13 in one or two dimensions without
the algebra behind the closed form.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntk_prefix import PrefixAttentionLayer, RandomPrefix
from ntk_prefix.kernels import limit_ntk, prefix_ntk, real_layer_limit_ntk
from ntk_prefix.one_layer import attend

N, D = 4, 2
SEEDS = 24
LENGTHS = (2**8, 2**11, 2**14)

every_kernel = pytest.mark.parametrize(
    ("model", "part"), [("tied", "full"), ("tied", "key"), ("fixed", "full"), ("fixed", "key")]
)


def inputs(rows: int = N, d: int = D) -> jax.Array:
    x = jax.random.normal(jax.random.key(7), (rows, d))
    return x / jnp.linalg.norm(x, axis=1).max()


def projections(d: int = D) -> dict[str, jax.Array]:
    names = ("query_projection", "key_projection", "value_projection")
    return dict(zip(names, jax.random.normal(jax.random.key(3), (3, d, d)) / np.sqrt(d), strict=True))


def matrix(kernel: jax.Array) -> np.ndarray:
    return np.asarray(kernel, float).reshape(kernel.shape[0] * kernel.shape[1], -1)


def slope(errors: np.ndarray) -> tuple[float, float]:
    """Of log error [seeds, lengths] against log m: the mean over seeds and the half width of its 95 % interval."""
    slopes = np.polyfit(np.log(LENGTHS), np.log(errors).T, 1)[0]
    return slopes.mean(), scipy.stats.t.ppf(0.975, len(slopes) - 1) * scipy.stats.sem(slopes)


def distances(kernels: list[jax.Array], limit: jax.Array) -> np.ndarray:
    """Relative Frobenius errors [seeds, lengths] of kernels [seeds, n, d, n, d], one array a length."""
    norm = np.linalg.norm(limit)
    return np.stack([np.sqrt(np.square(np.asarray(k - limit[None])).sum((1, 2, 3, 4))) / norm for k in kernels], 1)


class TestItIsTheLimit:
    @pytest.mark.parametrize(("model", "part"), [("tied", "full"), ("tied", "key"), ("fixed", "full")])
    def test_finite_kernels_approach_it_as_one_over_the_root_of_m(self, model: str, part: str) -> None:
        """With sigma |x| <= 1/2, where squared masses spread by e^(4 sigma^2 |x|^2) = 3; at 1 it is 55."""
        x, keys = inputs(), jax.random.split(jax.random.key(0), SEEDS)

        def kernels(m: int) -> jax.Array:
            def kernel(key: jax.Array) -> jax.Array:
                return prefix_ntk(RandomPrefix(key=key, d=D, m=m, sigma=0.5, model=model), x, part=part)  # type: ignore[arg-type]

            return jax.jit(jax.vmap(kernel))(keys)

        finite = [kernels(m) for m in LENGTHS]
        fitted, half_width = slope(distances(finite, limit_ntk(x, model=model, part=part, sigma=0.5)))  # type: ignore[arg-type]
        assert half_width < 0.1
        assert abs(fitted + 0.5) < half_width + 0.02  # 0.02: the next order, 1/m, at the shortest lengths
        # control: a limit of another sigma is not approached
        fitted, half_width = slope(distances(finite, limit_ntk(x, model=model, part=part, sigma=0.6)))  # type: ignore[arg-type]
        assert fitted + half_width > -0.25

    def test_so_does_the_real_layer_with_its_inputs_present(self) -> None:
        x, frozen = inputs(), projections()
        keys = jax.random.split(jax.random.key(0), SEEDS)

        def kernels(m: int) -> jax.Array:
            def kernel(key: jax.Array) -> jax.Array:
                prefix = jax.random.normal(key, (m, D))
                jacobian = jax.jacrev(lambda prefix: attend(prefix, x, *frozen.values()))(prefix)
                return m * jnp.einsum("ikrc,jlrc->ikjl", jacobian, jacobian)

            return jax.jit(jax.vmap(kernel))(keys)

        finite = [kernels(m) for m in LENGTHS]
        fitted, half_width = slope(distances(finite, real_layer_limit_ntk(x, **frozen)))
        assert half_width < 0.1
        assert abs(fitted + 0.5) < half_width + 0.04  # 0.04: the inputs drown as 1/m, from N of 2^8 on
        fitted, half_width = slope(distances(finite, real_layer_limit_ntk(x, **frozen, sigma=1.2)))
        assert fitted + half_width > -0.25


def expectation(d: int, sigma: float, integrand: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Of a function of one token w ~ N(0, sigma^2 I_d), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    weights = weights / weights.sum()
    total: np.ndarray = np.zeros(())
    for point in itertools.product(range(len(nodes)), repeat=d):
        total = total + weights[list(point)].prod() * integrand(sigma * nodes[list(point)])
    return total


class TestItIsTheExpectation:
    """H* = E[ <dF_k(x_i)/dw, dF_l(x_j)/dw> ] over one token, its mass exp(w . x - sigma^2 |x|^2 / 2)."""

    @every_kernel
    @pytest.mark.parametrize(("d", "sigma"), [(1, 1.0), (1, 0.5), (2, 1.0)])
    def test_of_the_stylized_models(self, model: str, part: str, d: int, sigma: float) -> None:
        x = np.asarray(inputs(d=d))

        def summand(token: np.ndarray) -> np.ndarray:
            mass = np.exp(x @ token - sigma**2 * (x**2).sum(1) / 2)
            if model == "fixed":  # signs of different outputs are independent, and the center vanishes
                return np.einsum("ij,ij,kl->ikjl", np.outer(mass, mass), x @ x.T, np.eye(d))
            gradients = np.einsum("k,ic->ikc", token, x)  # by the key
            if part == "full":
                gradients = gradients + np.eye(d)  # and by the value
            return np.einsum("i,ikc,j,jlc->ikjl", mass, gradients, mass, gradients)

        expected = expectation(d, sigma, summand)
        kernel = limit_ntk(inputs(d=d), sigma=sigma, model=model, part=part)  # type: ignore[arg-type]
        # the integrand is entire of order one: 48 nodes leave roundings only
        np.testing.assert_allclose(kernel, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("sigma", [1.0, 0.5])
    def test_of_the_real_layer(self, sigma: float) -> None:
        x, frozen = np.asarray(inputs()), projections()
        query, key, value = map(np.asarray, frozen.values())
        u = x @ query @ key.T / np.sqrt(D)  # score of a token p: u . p

        def summand(token: np.ndarray) -> np.ndarray:
            mass = np.exp(u @ token - sigma**2 * (u**2).sum(1) / 2)
            centered = (token - sigma**2 * u) @ value  # sigma^2 u is the mean of the tilted tokens
            gradients = value.T + np.einsum("ik,ic->ikc", centered, u)
            return np.einsum("i,ikc,j,jlc->ikjl", mass, gradients, mass, gradients)

        kernel = real_layer_limit_ntk(inputs(), **frozen, sigma=sigma)
        np.testing.assert_allclose(kernel, expectation(D, sigma, summand), rtol=1e-10, atol=1e-12)

    def test_the_quadrature_itself(self) -> None:
        """Control: it knows E w^2 and E e^w, and a kernel of another sigma is told apart."""
        assert expectation(1, 0.5, lambda w: (w**2).sum()) == pytest.approx(0.25, rel=1e-13)
        assert expectation(2, 1.0, lambda w: np.exp(w.sum())) == pytest.approx(np.e, rel=1e-13)
        assert abs(limit_ntk(inputs(), sigma=1.0) - limit_ntk(inputs(), sigma=1.001)).max() > 1e-3


class TestItIsAKernel:
    @every_kernel
    def test_shape_and_symmetry(self, model: str, part: str) -> None:
        kernel = limit_ntk(inputs(), model=model, part=part)  # type: ignore[arg-type]
        assert kernel.shape == (N, D, N, D)
        # the two orders of one product and sum
        np.testing.assert_allclose(kernel, kernel.transpose(2, 3, 0, 1), rtol=1e-14, atol=1e-14)

    @settings(deadline=None, max_examples=40)
    @given(x=arrays(np.float64, (3, D), elements=st.floats(-0.7, 0.7).map(lambda v: round(v, 2))))
    @pytest.mark.parametrize("model", ["tied", "fixed"])
    def test_positive_definite_exactly_where_inputs_are_distinct(self, model: str, x: np.ndarray) -> None:
        """Distinct inputs (and not zero, for the fixed model): lambda_min > 0. A duplicate: lambda_min = 0."""
        gaps = [np.linalg.norm(x[i] - x[j]) for i, j in itertools.combinations(range(3), 2)]
        assume(min(gaps) > 0.1)
        if model == "fixed":
            assume(np.linalg.norm(x, axis=1).min() > 0.1)
        rounding = 100 * np.finfo(float).eps
        eigenvalues = np.linalg.eigvalsh(matrix(limit_ntk(jnp.asarray(x), model=model)))  # type: ignore[arg-type]
        assert eigenvalues[0] > rounding * eigenvalues[-1]
        twice = np.concatenate([x, x[:1]])
        eigenvalues = np.linalg.eigvalsh(matrix(limit_ntk(jnp.asarray(twice), model=model)))  # type: ignore[arg-type]
        assert abs(eigenvalues[:D]).max() < rounding * eigenvalues[-1]

    def test_the_fixed_model_learns_nothing_at_zero(self) -> None:
        x = inputs().at[0].set(0)
        assert abs(limit_ntk(x, model="fixed")[0]).max() == 0
        # the tied one does, through the values
        assert abs(limit_ntk(x)[0, :, 0] - np.eye(D)).max() == 0

    @every_kernel
    def test_other_points_are_other_blocks_of_it(self, model: str, part: str) -> None:
        x = inputs()
        whole = limit_ntk(x, model=model, part=part)  # type: ignore[arg-type]
        block = limit_ntk(x[:3], x[2:], model=model, part=part)  # type: ignore[arg-type]
        np.testing.assert_allclose(block, whole[:3, :, 2:], rtol=1e-14, atol=1e-14)

    def test_other_points_of_the_real_layer(self) -> None:
        x, frozen = inputs(), projections()
        whole = real_layer_limit_ntk(x, **frozen)
        np.testing.assert_allclose(
            real_layer_limit_ntk(x[:3], x[2:], **frozen), whole[:3, :, 2:], rtol=1e-13, atol=1e-14
        )
        np.testing.assert_allclose(whole, whole.transpose(2, 3, 0, 1), rtol=1e-13, atol=1e-14)
        assert np.linalg.eigvalsh(matrix(whole))[0] > 0

    def test_outputs_of_the_fixed_model_are_independent_copies(self) -> None:
        kernel = limit_ntk(inputs(), model="fixed", outputs=3)
        assert kernel.shape == (N, 3, N, 3)
        for k, j in itertools.product(range(3), repeat=2):
            expected = limit_ntk(inputs(), model="fixed", outputs=1)[:, 0, :, 0]
            np.testing.assert_array_equal(kernel[:, k, :, j], expected if k == j else 0 * expected)

    def test_a_prefix_of_no_spread_only_learns_values(self) -> None:
        """sigma -> 0: tokens are alike, attention is uniform and F_k = sum_r a_r w_{r,k} + O(w^2) has kernel I."""
        x = inputs()
        np.testing.assert_allclose(matrix(limit_ntk(x, sigma=1e-8)), np.kron(np.ones((N, N)), np.eye(D)), atol=1e-15)

    @every_kernel
    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_in_float32(self, model: str, part: str, x64: bool) -> None:
        x = inputs()
        kernel = limit_ntk(x, model=model, part=part)  # type: ignore[arg-type]
        with jax.enable_x64(True):
            wide = limit_ntk(x.astype(float), model=model, part=part)  # type: ignore[arg-type]
        assert kernel.dtype == jnp.float32
        # a dozen roundings
        np.testing.assert_allclose(kernel, wide, rtol=12 * np.finfo("float32").eps, atol=1e-6)


@pytest.mark.usefixtures("without_annotations")
class TestWrongUseIsTold:
    @pytest.mark.parametrize(
        "kernel",
        [limit_ntk, lambda *x, **options: real_layer_limit_ntk(*x, **projections(), **options)],
        ids=["stylized", "real layer"],
    )
    def test_of_inputs(self, kernel: Callable) -> None:
        x = inputs()
        with pytest.raises(ValueError, match=r"x1: expected finite numbers, got nan at row 1, column 0"):
            kernel(x.at[1, 0].set(jnp.nan))
        with pytest.raises(ValueError, match=r"x2: expected finite numbers, got inf"):
            kernel(x, x.at[1, 0].set(jnp.inf))
        with pytest.raises(ValueError, match=r"x1: expected a matrix \[n, d\].*got shape \(2,\)"):
            kernel(x[0])
        with pytest.raises(ValueError, match=r"x2: expected d = 2 columns.*got 3"):
            kernel(x, jnp.zeros((N, 3)))
        with pytest.raises(ValueError, match=r"x1: expected floating point numbers, got int64"):
            kernel(jnp.ones((N, D), int))
        with pytest.raises(ValueError, match=r"sigma: expected a finite number > 0, got 0"):
            kernel(x, sigma=0)

    def test_of_options(self) -> None:
        with pytest.raises(ValueError, match=r'model: expected "tied" or "fixed", got \'real\''):
            limit_ntk(inputs(), model="real")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r'part: expected "full" or "key", got \'value\''):
            limit_ntk(inputs(), part="value")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"outputs: expected None or d = 2 for the tied model, got 3"):
            limit_ntk(inputs(), outputs=3)
        with pytest.raises(ValueError, match=r"outputs: expected a whole number >= 1, got 0"):
            limit_ntk(inputs(), model="fixed", outputs=0)

    def test_the_layer_has_the_projections_it_is_asked_for(self) -> None:
        """The names are the attributes of the layer, so its own limit is one line."""
        layer = PrefixAttentionLayer(D, 4, rngs=nnx.Rngs(0))
        own = {name: getattr(layer, name)[...] for name in projections()}
        assert real_layer_limit_ntk(inputs(), **own).shape == (N, D, N, D)


@pytest.mark.parametrize("sigma", [1e160, 1e30])
def test_a_kernel_that_overflows_is_refused_by_name(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"^(sigma|the kernel of inputs and a sigma so large): expected"):
        limit_ntk(jnp.ones((2, 2)), sigma=sigma)
