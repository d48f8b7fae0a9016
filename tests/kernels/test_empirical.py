"""The empirical kernel of any Flax model: right numbers, our layout, any batch size, clear errors."""

import functools
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.kernels.empirical import KernelFallbackWarning, empirical_ntk
from ntk_prefix.one_layer import FixedValuePrefixModel, TiedPrefixModel

# Kernels are sums of about a hundred products of order one in float64 (2.2e-16 each), in different orders: 1e-12.
# The project asks for 1e-10 between implementations.
EXACT = 1e-12

IMPLEMENTATIONS = ["structured", "jacobian", "vector_products", "neural_tangents"]
MODELS = ["tied", "fixed"]


def inputs(seed: int, n: int, d: int = 3) -> jax.Array:
    """Rows in the unit ball."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    return jnp.asarray(x / np.maximum(1.0, np.linalg.norm(x, axis=1, keepdims=True)))


def relative_error(value: jax.Array, truth: jax.Array) -> float:
    assert value.shape == truth.shape
    # in NumPy, as everything here that is not under test: nothing to compile
    return float(np.abs(np.asarray(value) - np.asarray(truth)).max() / np.abs(truth).max())


def nnx_model(name: str) -> TiedPrefixModel | FixedValuePrefixModel:
    # without symmetric initialization, so that nothing cancels
    if name == "tied":
        return TiedPrefixModel(3, 6, symmetric=False, rngs=nnx.Rngs(0))
    return FixedValuePrefixModel(3, 6, outputs=2, symmetric=False, rngs=nnx.Rngs(0))


class LinenPrefixModel(linen.Module):
    """The same two models, written in Linen from their formula: F(x) = m softmax(W x) (a * W, or a)."""

    tied: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights = self.param("weights", linen.initializers.normal(), (6, 3))
        signs = self.variable("frozen", "signs", jnp.ones, (6, 1 if self.tied else 2)).value
        values = signs * weights if self.tied else signs
        return weights.shape[0] * jax.nn.softmax(x @ weights.T, axis=-1) @ values


def linen_twin(name: str) -> linen.Module:
    model = nnx_model(name)
    variables = {"params": {"weights": model.weights[...]}, "frozen": {"signs": model.signs[...]}}
    return LinenPrefixModel(tied=name == "tied").bind(variables)


def kernel_by_jacrev(model: nnx.Module, x1: jax.Array, x2: jax.Array) -> jax.Array:
    """J J^T from reverse mode, [n1, d, n2, d]."""
    graph, trainable, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def kernel(x1: jax.Array, x2: jax.Array) -> jax.Array:
        def rows(x: jax.Array) -> jax.Array:
            jacobian = jax.jacrev(lambda trainable: nnx.merge(graph, trainable, rest)(x))(trainable)
            shape = jax.eval_shape(nnx.merge(graph, trainable, rest), x).shape
            flat = [leaf.reshape(*shape, -1) for leaf in jax.tree.leaves(jacobian)]
            return jnp.concatenate(flat, axis=-1)

        return jnp.tensordot(rows(x1), rows(x2), axes=(-1, -1))

    return kernel(x1, x2)


@functools.cache
def problem(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """4 inputs, 3 others, and the kernel between them."""
    x = inputs(1, 7)
    return x[:4], x[4:], symmetric_truth(name)[:4, :, 4:]


@functools.cache
def symmetric_truth(name: str) -> jax.Array:
    """The kernel of all 7 inputs."""
    return kernel_by_jacrev(nnx_model(name), inputs(1, 7), inputs(1, 7))


# ------------------------------------------------------------------------------------------ Numbers


@pytest.mark.parametrize(
    ("name", "framework", "implementation"),
    [
        *itertools.product(MODELS, (nnx_model, linen_twin), IMPLEMENTATIONS[:3]),
        # compiles the other three and takes one of them: each model and each framework once
        ("tied", nnx_model, "neural_tangents"),
        ("fixed", linen_twin, "neural_tangents"),
    ],
)
def test_every_implementation_gives_the_kernel(name: str, framework: Callable, implementation: str) -> None:
    """The four implementations, nnx and Linen, tied and fixed: one kernel, that of reverse mode."""
    x1, x2, truth = problem(name)
    assert relative_error(empirical_ntk(framework(name), x1, x2, implementation=implementation), truth) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_it_is_m_times_the_closed_form(name: str) -> None:
    """Theta sums over the prefix, H(W) divides by its length."""
    model, x = nnx_model(name), inputs(1, 7)
    assert relative_error(model.m * prefix_ntk(model, x), symmetric_truth(name)) < EXACT
    assert relative_error(empirical_ntk(model, x), model.m * prefix_ntk(model, x)) < EXACT


def test_the_comparison_sees_a_small_difference() -> None:
    """Negative control: one weight moved by 1e-8 is told from the right one."""
    x1, x2, truth = problem("tied")
    model = nnx_model("tied")
    model.weights[...] = model.weights[...].at[0, 0].add(1e-8)
    assert relative_error(empirical_ntk(model, x1, x2), truth) > 10 * EXACT


@pytest.mark.parametrize("x64", [False], indirect=True)
def test_float32_stays_float32(x64: bool) -> None:
    model, x = nnx_model("fixed"), inputs(1, 4)
    kernel = empirical_ntk(model, x)
    assert kernel.dtype == jnp.float32
    # eps = 1.2e-7, some ten roundings in softmax and a sum over 18 parameters
    assert relative_error(kernel, kernel_by_jacrev(model, x, x)) < 1e-5


def test_only_the_parameters_asked_for_count() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
            self.extra = nnx.LoRAParam(jnp.ones((4, 2)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(self.inner(x)) @ self.extra[...]

    model, x = Two(), inputs(1, 3)
    adapters = empirical_ntk(model, x, wrt=nnx.LoRAParam)
    hidden = jnp.tanh(model.inner(x))
    by_hand = jnp.einsum("ip,jp,kl->ikjl", hidden, hidden, jnp.eye(2))
    assert relative_error(adapters, by_hand) < EXACT
    kernel_weights = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    whole = empirical_ntk(model, x, wrt=nnx.Any(nnx.Param, nnx.LoRAParam))
    assert relative_error(adapters + empirical_ntk(model, x, wrt=kernel_weights), whole) < EXACT


# ------------------------------------------------------------------------------------------- Layout


@pytest.mark.parametrize("implementation", ["structured", "jacobian"])
def test_a_trace_is_a_sum_and_a_diagonal_is_kept_once(implementation: str) -> None:
    model, (x1, x2, full) = nnx_model("tied"), problem("tied")
    trace = empirical_ntk(model, x1, x2, implementation=implementation, trace_axes=-1)
    assert relative_error(trace, np.einsum("ikjk->ij", full)) < EXACT
    # control: neural-tangents' mean is off by exactly d
    assert relative_error(trace / 3, np.einsum("ikjk->ij", full)) == pytest.approx(2 / 3)
    diagonal = empirical_ntk(model, x1, x2, implementation=implementation, diagonal_axes=(1,))
    assert relative_error(diagonal, np.einsum("ikjk->ikj", full)) < EXACT


def test_outputs_may_have_several_axes() -> None:
    class Images(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.asarray(np.random.default_rng(3).normal(size=(3, 2, 4))))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(jnp.einsum("nc,cab->nab", x, self.weights[...]))

    model, x1, x2 = Images(), inputs(1, 5), inputs(2, 3)
    full = kernel_by_jacrev(model, x1, x2)
    assert full.shape == (5, 2, 4, 3, 2, 4)
    assert relative_error(empirical_ntk(model, x1, x2), full) < EXACT
    mixed = empirical_ntk(model, x1, x2, trace_axes=1, diagonal_axes=-1, batch_size=2)
    assert relative_error(mixed, np.einsum("iabjab->ibj", full)) < EXACT


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5])
def test_any_batch_size_gives_the_same_kernel(batch_size: int | None) -> None:
    """4 and 3 rows: no size above 1 divides both."""
    x1, x2, truth = problem("fixed")
    kernel = empirical_ntk(nnx_model("fixed"), x1, x2, batch_size=batch_size, implementation="jacobian")
    assert relative_error(kernel, truth) < EXACT


@pytest.mark.parametrize(("implementation", "batch_size"), [("structured", None), ("jacobian", None), ("jacobian", 3)])
def test_without_x2_it_is_symmetric_to_the_last_bit(implementation: str, batch_size: int | None) -> None:
    kernel = empirical_ntk(nnx_model("tied"), inputs(1, 7), implementation=implementation, batch_size=batch_size)
    assert relative_error(kernel, symmetric_truth("tied")) < EXACT
    assert (kernel == kernel.transpose(2, 3, 0, 1)).all()


def test_a_diagonal_without_x2_is_symmetric_too() -> None:
    options = {"implementation": "jacobian", "batch_size": 3, "diagonal_axes": 1}
    diagonal = empirical_ntk(nnx_model("fixed"), inputs(1, 7), **options)
    assert (diagonal == diagonal.transpose(2, 1, 0)).all()


def test_only_one_triangle_of_blocks_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntk_prefix.kernels import empirical

    calls = []
    compiled = empirical._compiled_block
    monkeypatch.setattr(empirical, "_compiled_block", lambda *a: (calls.append(1), compiled(*a))[1])
    empirical_ntk(nnx_model("fixed"), inputs(1, 7), batch_size=2, implementation="jacobian")
    assert len(calls) == 4 + 3 + 2 + 1


@pytest.mark.parametrize("name", MODELS)
def test_structured_derivatives_store_no_more_than_they_must(name: str) -> None:
    """fixed: the keys' structure is followed, through ``x @ w.T``. tied: key and value differ, one Jacobian is stored."""
    n, d, m = 8, 8, 512
    options = {"symmetric": False, "rngs": nnx.Rngs(0)}
    model = TiedPrefixModel(d, m, **options) if name == "tied" else FixedValuePrefixModel(d, m, **options)
    program = jax.jit(lambda x: empirical_ntk(model, x)).lower(inputs(1, n, d)).compile()
    used = program.memory_analysis().temp_size_in_bytes
    jacobian, dense_block = 8 * n * d * m * d, 8 * n * m * m
    assert used < (0.5 * jacobian if name == "fixed" else 4 * jacobian)
    assert used < 0.5 * dense_block  # what neural-tangents as released would store for tied


def test_a_second_call_compiles_nothing() -> None:
    from ntk_prefix.kernels import empirical

    empirical_ntk(nnx_model("fixed"), inputs(1, 7), batch_size=2, implementation="jacobian")
    programs = empirical._compiled_block._cache_size()
    other = FixedValuePrefixModel(3, 6, outputs=2, symmetric=False, rngs=nnx.Rngs(1))
    empirical_ntk(other, inputs(2, 5), batch_size=2, implementation="jacobian")
    assert empirical._compiled_block._cache_size() == programs


def test_it_can_be_compiled() -> None:
    model, (x1, x2, truth) = nnx_model("fixed"), problem("fixed")
    compiled = jax.jit(lambda x: empirical_ntk(model, x, x2))
    assert relative_error(compiled(x1), truth) < EXACT


# ---------------------------------------------------------------------------- Models that need care


class Centered(nnx.Module):
    """Rows interact: the mean over the batch is subtracted."""

    def __init__(self) -> None:
        self.weights = nnx.Param(jnp.asarray(np.random.default_rng(4).normal(size=(3, 2))))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ self.weights[...])
        return hidden - hidden.mean(axis=0, keepdims=True)


def test_rows_that_interact_need_vmap_axes_none() -> None:
    model, x = Centered(), inputs(1, 4)
    truth = kernel_by_jacrev(model, x, x)
    assert relative_error(empirical_ntk(model, x, vmap_axes=None), truth) < EXACT
    # control: taken row by row, every output is zero
    assert float(jnp.abs(empirical_ntk(model, x)).max()) == 0.0
    with pytest.raises(ValueError, match="batch_size: expected None for rows that interact"):
        empirical_ntk(model, x, vmap_axes=None, batch_size=2)


# ------------------------------------------------------------------------ Models that write as they run


class Recurrent(nnx.Module):
    """Splits a key, also in evaluation."""

    def __init__(self) -> None:
        self.recurrent = nnx.RNN(nnx.SimpleCell(3, 2, rngs=nnx.Rngs(0)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.recurrent(x)[:, -1]


class Trained(nnx.Module):
    """Batch statistics and a dropout counter, in training mode."""

    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(1))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(jnp.sin(self.norm(self.linear(x))))


class LinenTrained(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.BatchNorm(use_running_average=False)(linen.Dense(2)(x))
        return linen.Dropout(0.5, deterministic=False)(jnp.sin(x))


def numbers(state: object) -> list[np.ndarray]:
    """Copies of all arrays of a state, keys included."""
    leaves = jax.tree.leaves(state)
    return [np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def gram(jacobian: object, n: int) -> jax.Array:
    rows = [leaf.reshape(n, 2, -1) for leaf in jax.tree.leaves(jacobian)]
    return sum(jnp.einsum("ikp,jlp->ikjl", row, row) for row in rows)


@pytest.mark.parametrize(
    ("make", "shape", "vmap_axes"), [(Recurrent, (3, 4, 3), 0), (Trained, (4, 3), None)], ids=["recurrent", "trained"]
)
def test_models_that_write_state_keep_it(make: Callable, shape: tuple, vmap_axes: int | None) -> None:
    """Against jacrev of the same model on copies of its state; what it wrote is not seen in the model after."""
    model, x = make(), jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    before = numbers(rest)
    jacobian = jax.jacrev(lambda w: nnx.merge(graph, w, rest, copy=True)(x))(weights)
    kernel = empirical_ntk(model, x, vmap_axes=vmap_axes, implementation="jacobian")
    np.testing.assert_allclose(kernel, gram(jacobian, len(x)), rtol=1e-4, atol=1e-5)  # float32, sums of some ten
    jax.tree.map(np.testing.assert_array_equal, before, numbers(nnx.split(model, nnx.Param, ...)[2]))


def test_linen_models_that_write_state() -> None:
    module, x = LinenTrained(), jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))
    streams = {"dropout": jax.random.key(2)}
    variables = module.init({"params": jax.random.key(1), **streams}, x)

    def outputs(parameters: object) -> jax.Array:
        return module.apply({**variables, "params": parameters}, x, rngs=streams, mutable=["batch_stats"])[0]

    kernel = empirical_ntk(module.bind(variables, rngs=streams), x, vmap_axes=None, implementation="jacobian")
    np.testing.assert_allclose(kernel, gram(jax.jacrev(outputs)(variables["params"]), 4), rtol=1e-6, atol=1e-9)


def test_auto_falls_back_and_says_so() -> None:
    @jax.custom_vjp
    def sine_and_cosine(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(w), jnp.cos(w)

    sine_and_cosine.defvjp(lambda w: (sine_and_cosine(w), w), lambda w, ct: (ct[0] * jnp.cos(w) - ct[1] * jnp.sin(w),))

    class TwoOutputs(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.array([[0.1, 0.2, 0.3]]))

        def __call__(self, x: jax.Array) -> jax.Array:
            sine, cosine = sine_and_cosine(self.weights[...])
            return x * sine + cosine

    model, x = TwoOutputs(), inputs(1, 4)
    with pytest.warns(KernelFallbackWarning, match="'custom_lin' with 2"):
        kernel = empirical_ntk(model, x)
    assert relative_error(kernel, kernel_by_jacrev(model, x, x)) < EXACT
    with pytest.raises(NotImplementedError, match='Use implementation="jacobian"'):
        empirical_ntk(model, x, implementation="structured")


# ------------------------------------------------------------------------------------------- Errors


class TwoResults(nnx.Module):
    def __init__(self) -> None:
        self.weights = nnx.Param(jnp.ones((3, 2)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ self.weights[...], x


class Pooled(TwoResults):
    def __call__(self, x: jax.Array) -> jax.Array:
        return (x @ self.weights[...]).sum(0, keepdims=True)


GOOD = object()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (GOOD, {"implementation": "fast"}, "implementation: expected one of auto, .*structured.*, got 'fast'"),
        (GOOD, {"vmap_axes": 1}, "vmap_axes: expected 0 .* or None .*, got 1"),
        (GOOD, {"batch_size": 0}, "batch_size: expected a whole number >= 1"),
        (GOOD, {"trace_axes": 0}, "trace_axes: expected different axes of the output from 1 to 1 .*, got 0"),
        (GOOD, {"diagonal_axes": (1, -1)}, "diagonal_axes: expected different axes"),
        (GOOD, {"trace_axes": 1, "diagonal_axes": 1}, "trace_axes and diagonal_axes: expected different axes"),
        (GOOD, {"wrt": nnx.BatchStat}, "wrt: expected a filter that matches .* has: Frozen, Param"),
        (TwoResults, {}, "expected model(x) to be one floating point array with 3 rows"),
        (Pooled, {}, "expected model(x) to be one floating point array with 3 rows"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_wrong_options_are_explained(model: object, options: dict, message: str) -> None:
    chosen = nnx_model("tied") if model is GOOD else model()  # type: ignore[operator]
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        empirical_ntk(chosen, inputs(1, 3), **options)


@pytest.mark.usefixtures("without_annotations")
def test_wrong_models_are_explained() -> None:
    x = inputs(1, 3)
    with pytest.raises(TypeError, match=r"expected a flax nnx.Module or a bound linen.Module, got function"):
        empirical_ntk(lambda x: x, x)
    with pytest.raises(TypeError, match=r"unbound LinenPrefixModel. Use module.bind\(variables\)"):
        empirical_ntk(LinenPrefixModel(tied=True), x)
    with pytest.raises(TypeError, match="expected the name of a Linen collection"):
        empirical_ntk(linen_twin("tied"), x, wrt=nnx.BatchStat)
    with pytest.raises(ValueError, match=r"which matches none\. The model has: frozen, params"):
        empirical_ntk(linen_twin("tied"), x, wrt="adapters")


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_numbers_that_are_not_finite_are_refused_before_any_work(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntk_prefix.kernels import neural_tangents

    monkeypatch.setattr(neural_tangents, "load", lambda: pytest.fail("work was begun"))
    x = inputs(1, 3)
    model = nnx_model("tied")
    with pytest.raises(ValueError, match=rf"x1: expected finite numbers, got {bad} at \[1, 2\]"):
        empirical_ntk(model, x.at[1, 2].set(bad))
    with pytest.raises(ValueError, match="x2: expected finite numbers"):
        empirical_ntk(model, x, x.at[0, 0].set(bad))
    model.weights[...] = model.weights[...].at[0, 0].set(bad)
    with pytest.raises(ValueError, match="the model's parameters: expected finite numbers"):
        empirical_ntk(model, x)


def test_an_axis_that_is_no_whole_number_is_refused() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="trace_axes: expected whole numbers, got True"):
        empirical_ntk(model, jnp.ones((3, 2)), trace_axes=True)
