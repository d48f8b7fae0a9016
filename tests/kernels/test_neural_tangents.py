"""neural-tangents works on the JAX that is installed, every part of it, and JAX is left as it was."""

import functools
import importlib.metadata
import subprocess
import sys
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen, nnx
from jax import lax

from ntk_prefix.kernels import neural_tangents as adapter

# Kernels are sums of a few hundred products of order one in float64 (2.2e-16 each): 1e-12 leaves room for the
# different orders of summation and is far below any wrong term.
EXACT = 1e-12

IMPLEMENTATIONS = {"auto": 0, "jacobian": 1, "vector products": 2, "structured": 3}

nt = adapter.load()


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def relative_error(value: jax.Array, truth: jax.Array) -> float:
    assert value.shape == truth.shape
    # in NumPy, as everything here that is not under test: nothing to compile
    return float(np.abs(np.asarray(value) - np.asarray(truth)).max() / np.abs(truth).max())


@functools.partial(jax.jit, static_argnums=0)
def kernel_by_jacrev(function: Callable, parameters: object, x1: jax.Array, x2: jax.Array) -> jax.Array:
    """J J^T from reverse mode, in neural-tangents' order of axes."""

    def rows(x: jax.Array) -> jax.Array:
        jacobian = jax.jacrev(function)(parameters, x)
        size = function(parameters, x).size
        return jnp.concatenate([leaf.reshape(size, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)

    shapes = function(parameters, x1).shape + function(parameters, x2).shape
    half = len(shapes) // 2
    return (rows(x1) @ rows(x2).T).reshape(shapes).transpose([i + j * half for i in range(half) for j in range(2)])


# ------------------------------------------------------------------------------------------ Loading


def test_it_is_loaded_when_asked_for_and_nothing_else_is_touched() -> None:
    """In a fresh process, with warnings as errors: import, load from eight threads at once, look around."""
    script = """
        import sys, threading
        import jax, jax.core, jax.interpreters.ad
        places = (jax.core, jax.interpreters.ad)
        before = [set(vars(place)) for place in places]
        from ntk_prefix.kernels import dynamics, empirical, neural_tangents
        assert "neural_tangents" not in sys.modules, "imported too early"
        loaded = []
        threads = [threading.Thread(target=lambda: loaded.append(neural_tangents.load())) for _ in range(8)]
        [thread.start() for thread in threads]; [thread.join() for thread in threads]
        assert len(loaded) == 8 and len(set(map(id, loaded))) == 1
        assert [set(vars(place)) for place in places] == before, "jax was changed"
        assert not {"jax.util", "tensorflow", "tf2jax"} & set(sys.modules)
        import neural_tangents as plain
        assert plain is loaded[0] and not vars(plain.experimental).get("empirical_ntk_fn_tf")
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=60)


@pytest.mark.parametrize("missing", ["neural-tangents", "frozendict"])
def test_a_missing_package_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"need {missing}.*pip install --no-deps neural-tangents==0.6.5 frozendict"):
        adapter._load.__wrapped__()  # what the first call of load() does


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.2")
    with pytest.raises(ImportError, match=r"expected neural-tangents 0\.6\.5, got 0\.6\.2"):
        adapter._check_versions()


def test_an_older_jax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version__", "0.9.1")
    with pytest.raises(ImportError, match=r"expected jax >= 0\.10\.2, got 0\.9\.1"):
        adapter._check_versions()


@pytest.mark.parametrize("version", ["0.10.3", "0.13.0", "0.10.2.dev20260101"])
def test_an_untested_jax_is_warned_about(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version__", version)
    with pytest.warns(adapter.UntestedJaxWarning, match=version):
        adapter._check_versions()


def test_a_package_imported_by_somebody_else_is_refused() -> None:
    with pytest.raises(ImportError, match="imported before ntk_prefix could adapt it"):
        adapter._load.__wrapped__()


# ----------------------------------------------------------------------- Kernels of plain functions


@jax.custom_vjp
def layer_with_its_own_backward(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    inner = cotangent * (1 - jnp.tanh(x @ w) ** 2)
    return inner @ w.T, x.T @ inner


layer_with_its_own_backward.defvjp(lambda x, w: (layer_with_its_own_backward(x, w), (x, w)), _backward)


def attention(p: dict, x: jax.Array) -> jax.Array:
    query, key, value = jnp.split(x @ p["w"], 3, axis=-1)
    return jax.nn.softmax(query @ jnp.swapaxes(key, -1, -2), axis=-1) @ value


# a function of (parameters, x); the parameters' shapes; the shape of one x
FUNCTIONS: dict[str, tuple[Callable, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "two layers": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": (3, 4), "b": (4, 2)}, (3,)),
    "softmax, tied": (lambda p, x: jax.nn.softmax(x @ p["a"].T, axis=-1) @ p["a"], {"a": (5, 3)}, (3,)),
    "logsumexp of exp": (
        lambda p, x: jax.nn.logsumexp(jnp.exp(x @ p["a"]), axis=-1, keepdims=True),
        {"a": (3, 4)},
        (3,),
    ),
    "gelu, bias": (lambda p, x: jax.nn.gelu(x @ p["a"] + p["b"]), {"a": (3, 2), "b": (1, 2)}, (3,)),
    "attention": (attention, {"w": (3, 6)}, (4, 3)),
    "jitted, custom jvp": (jax.jit(lambda p, x: jax.nn.relu(x @ p["a"])), {"a": (3, 2)}, (3,)),
    "checkpoint": (
        jax.checkpoint(lambda p, x: jnp.sin(jnp.sin(x @ p["a"]) @ p["b"])),
        {"a": (3, 4), "b": (4, 2)},
        (3,),
    ),
    "scan over layers": (
        lambda p, x: lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, p["w"])[0],
        {"w": (2, 3, 3)},
        (3,),
    ),
    "custom vjp": (lambda p, x: layer_with_its_own_backward(x, p["a"]), {"a": (3, 4)}, (3,)),
    "gather, no rule": (
        lambda p, x: x * p["a"][jnp.array([0, 2, 0])].sum(0, keepdims=True),
        {"a": (3, 3)},
        (3,),
    ),
    "parameter as output": (lambda p, x: jnp.broadcast_to(p["a"], x.shape), {"a": (1, 3)}, (3,)),
}


def drawn(name: str) -> tuple[Callable, dict[str, jax.Array], tuple[int, ...]]:
    function, shapes, shape = FUNCTIONS[name]
    return function, {leaf: normal(index, *sizes) for index, (leaf, sizes) in enumerate(shapes.items())}, shape


def check_kernel(name: str, implementation: int) -> None:
    function, parameters, shape = drawn(name)
    x1, x2 = normal(20, 3, *shape), normal(21, 2, *shape)
    kernel_fn = nt.empirical_ntk_fn(function, trace_axes=(), vmap_axes=0, implementation=implementation)
    if implementation != IMPLEMENTATIONS["auto"]:  # which cannot be traced
        kernel_fn = jax.jit(kernel_fn)
    truth = kernel_by_jacrev(function, parameters, x1, x2)
    assert relative_error(kernel_fn(x1, x2, parameters), truth) < EXACT


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structured_derivatives_equal_jacrev(name: str) -> None:
    check_kernel(name, IMPLEMENTATIONS["structured"])


@pytest.mark.parametrize("implementation", ["jacobian", "vector products"])
@pytest.mark.parametrize("name", ["softmax, tied", "attention"])
def test_other_implementations_equal_jacrev(name: str, implementation: str) -> None:
    check_kernel(name, IMPLEMENTATIONS[implementation])


def test_auto_equals_jacrev_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    check_kernel("gelu, bias", IMPLEMENTATIONS["auto"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_parameters_may_be_a_flax_state(framework: str) -> None:
    """nnx.State and Linen's dict go in as they are, for every implementation; so they do into linearize."""
    x1, x2 = normal(22, 3, 3), normal(23, 2, 3)
    if framework == "nnx":
        graph, parameters = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
        function = lambda state, x: jnp.tanh(nnx.merge(graph, state)(x))  # noqa: E731
    else:
        module = linen.Dense(2, param_dtype=jnp.float64)
        parameters = module.init(jax.random.key(0), x1)
        function = lambda variables, x: jnp.tanh(module.apply(variables, x))  # noqa: E731
    truth = kernel_by_jacrev(function, parameters, x1, x2)
    for name, implementation in IMPLEMENTATIONS.items():
        kernel_fn = nt.empirical_ntk_fn(function, trace_axes=(), vmap_axes=0, implementation=implementation)
        kernel_fn = kernel_fn if name == "auto" else jax.jit(kernel_fn)
        assert relative_error(kernel_fn(x1, x2, parameters), truth) < EXACT, name
    assert relative_error(nt.linearize(function, parameters)(parameters, x1), function(parameters, x1)) < EXACT


def test_the_comparison_sees_a_small_difference() -> None:
    """Negative control: weights moved by 1e-6 are told from the right ones."""
    function, parameters, shape = drawn("softmax, tied")
    x = normal(20, 3, *shape)
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), parameters)
    kernel = jax.jit(nt.empirical_ntk_fn(function, trace_axes=(), vmap_axes=0, implementation=3))(x, None, moved)
    assert relative_error(kernel, kernel_by_jacrev(function, parameters, x, x)) > 1e5 * EXACT


def test_a_parameter_whose_axes_come_out_in_different_places() -> None:
    """neural-tangents as released pairs the wrong axes here, and raises: the parameter goes through a copy."""

    def function(p: dict, x: jax.Array) -> jax.Array:
        def rows(batch_axis: int) -> jax.Array:
            return lax.dot_general(p["w"], x, (((1 - batch_axis,), (1 - batch_axis,)), ((batch_axis,), (batch_axis,))))

        return p["w"] * x + rows(0)[:, None] + rows(1)[:, None]

    p, x1, x2 = {"w": normal(30, 3, 3)}, normal(31, 3, 3), normal(32, 3, 3)
    kernel = jax.jit(nt.empirical_ntk_fn(function, trace_axes=(), implementation=3))(x1, x2, p)
    assert relative_error(kernel, kernel_by_jacrev(function, p, x1, x2)) < EXACT


def test_what_structured_derivatives_do_not_know_is_named() -> None:
    @jax.custom_vjp
    def two_outputs(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(w), jnp.cos(w)

    two_outputs.defvjp(lambda w: (two_outputs(w), w), lambda w, ct: (ct[0] * jnp.cos(w) - ct[1] * jnp.sin(w),))
    kernel_fn = nt.empirical_ntk_fn(lambda w, x: x * sum(two_outputs(w)), vmap_axes=0, implementation=3)
    with pytest.raises(NotImplementedError, match=r'one output, got .* with 2. Use implementation="jacobian"'):
        kernel_fn(normal(33, 3, 2), None, normal(34, 1, 2))


# ---------------------------- The rest of the package, each part against an independent computation


def test_linearize_is_the_jvp() -> None:
    function, p, shape = drawn("two layers")
    x = normal(40, 3, *shape)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(leaf), p)
    difference = jax.tree.map(jnp.subtract, moved, p)
    value, tangent = jax.jvp(lambda p: function(p, x), (p,), (difference,))
    assert relative_error(nt.linearize(function, p)(moved, x), value + tangent) < EXACT
    assert relative_error(function(moved, x), value + tangent) > 1e-3  # control: the function is not linear


def test_taylor_expand_is_the_second_order_polynomial() -> None:
    def function(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.exp(x @ w)

    w, x = normal(41, 3), normal(42, 4, 3)
    step = 0.2 * normal(43, 3)
    along = x @ step
    expected = jnp.exp(x @ w) * (1 + along + along**2 / 2)
    assert relative_error(nt.taylor_expand(function, w, 2)(w + step, x), expected) < EXACT
    assert relative_error(nt.taylor_expand(function, w, 1)(w + step, x), expected) > 1e-4  # control


def random_kernel() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gram matrices of 5 training and 3 test points with 2 outputs, targets, and a first guess."""
    train, test = normal(50, 5, 12), normal(51, 3, 12)
    return train @ train.T, test @ train.T, normal(52, 5, 2), normal(53, 5, 2)


def test_predict_gradient_descent_mse_is_the_matrix_exponential() -> None:
    kernel, cross, targets, start = random_kernel()
    time, rate = 3.0, 0.2
    predict_fn = nt.predict.gradient_descent_mse(kernel, targets, learning_rate=rate)
    train, test = predict_fn(time, start, jnp.zeros((3, 2)), cross)
    decay = scipy.linalg.expm(-kernel * time * rate / targets.size)
    residual = decay @ (start - targets)
    assert relative_error(train, targets + residual) < EXACT
    moved = cross @ np.linalg.solve(kernel, residual - (start - targets))
    assert relative_error(test, moved) < 1e-10  # the condition number of the solve, about 1e2
    limit, _ = predict_fn(None, start, jnp.zeros((3, 2)), cross)
    assert relative_error(limit, targets) < EXACT


def test_predict_of_a_singular_kernel_is_finite() -> None:
    """As released, an eigenvalue of exactly 0 makes every test prediction NaN."""
    kernel, cross = jnp.diag(jnp.array([0.0, 2.0])), jnp.array([[1.0, 1.0]])
    predict_fn = nt.predict.gradient_descent_mse(kernel, jnp.ones((2, 1)))
    _, test = predict_fn(4.0, jnp.zeros((2, 1)), jnp.zeros((1, 1)), cross)
    # per direction: the integral of exp(-x s / 2) over time 4, halved: 2 for x = 0
    assert relative_error(test, jnp.array([[2.0 + (1 - jnp.exp(-4.0)) / 2]])) < EXACT


def test_predict_gradient_descent_is_its_closed_form_for_mse() -> None:
    kernel, cross, targets, start = random_kernel()
    loss = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)  # noqa: E731
    arguments = (3.0, start, jnp.zeros((3, 2)), cross)
    by_ode = nt.predict.gradient_descent(loss, kernel, targets, learning_rate=0.2)(*arguments)
    exact = nt.predict.gradient_descent_mse(kernel, targets, learning_rate=0.2)(*arguments)
    for value, truth in zip(by_ode, exact, strict=True):
        assert relative_error(value, truth) < 1e-6  # the ODE solver's own tolerance is 1.4e-8 per step


def test_gp_inference_and_the_ensemble_are_kernel_regression() -> None:
    kernel, cross, targets, _ = random_kernel()
    regression = cross @ np.linalg.solve(kernel, targets)
    prior = normal(51, 3, 12) @ normal(51, 3, 12).T

    mean, covariance = nt.predict.gp_inference(kernel, targets)("nngp", cross, prior)
    assert relative_error(mean, regression) < 1e-10  # the condition number of the solve, about 1e2
    assert relative_error(covariance, prior - cross @ np.linalg.solve(kernel, cross.T)) < 1e-10

    # the NTK of one linear layer is x.x' / 12; regression does not see the factor
    linear = nt.stax.Dense(1)[2]
    ensemble = nt.predict.gradient_descent_mse_ensemble(linear, normal(50, 5, 12), targets)
    assert relative_error(ensemble(x_test=normal(51, 3, 12), get="ntk"), regression) < 1e-10
    # and after a finite time it is the flow from zero, in the same units
    flow = nt.predict.gradient_descent_mse(kernel / 12, targets)(30.0, jnp.zeros((5, 2)), jnp.zeros((3, 2)), cross / 12)
    assert relative_error(ensemble(t=30.0, x_test=normal(51, 3, 12), get="ntk"), flow[1]) < 1e-10


def test_max_learning_rate_is_where_descent_starts_to_diverge() -> None:
    kernel = random_kernel()[0]
    largest = np.linalg.norm(kernel, 2)
    assert abs(nt.predict.max_learning_rate(kernel) * largest / (2 * 5) - 1) < EXACT
    # in neural-tangents' layout, pairs of axes: Theta (x) I_2 has the same largest eigenvalue, and twice the size
    pairs = kernel[:, :, None, None] * jnp.eye(2)[None, None]
    assert abs(nt.predict.max_learning_rate(pairs, momentum=0.5) * largest / (2 * 1.5 * 10) - 1) < EXACT


def test_batch_equals_the_whole() -> None:
    function, p, shape = drawn("two layers")
    x1, x2 = normal(60, 4, *shape), normal(61, 6, *shape)
    kernel_fn = jax.jit(nt.empirical_ntk_fn(function, trace_axes=(), implementation=1, vmap_axes=0))
    whole = kernel_fn(x1, x2, p)
    batched = nt.batch(kernel_fn, batch_size=2, device_count=0)(x1, x2, p)
    assert relative_error(batched, whole) < EXACT
    on_two_devices = nt.batch(kernel_fn, batch_size=1, device_count=2)(x1, x2, p)
    assert relative_error(on_two_devices, whole) < EXACT


def relu_network(width: int) -> tuple[Callable, Callable, Callable]:
    return nt.stax.serial(nt.stax.Dense(width), nt.stax.Relu(), nt.stax.Dense(1))


def test_stax_is_the_arc_cosine_kernel() -> None:
    """Cho & Saul 2009: E[relu(u) relu(v)] = |a||b| (sin t + (pi-t) cos t) / (2 pi), E[1(u) 1(v)] = (pi-t) / (2 pi)."""
    x = normal(70, 4, 3)
    with jax.numpy_rank_promotion("allow"):
        kernel = relu_network(1)[2](x, None, ("nngp", "ntk"))
    gram = np.asarray(x @ x.T / 3)
    norms = np.sqrt(np.diag(gram))
    outer = np.outer(norms, norms)
    angle = np.arccos(np.clip(gram / outer, -1, 1))
    nngp = outer * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    # arccos turns a rounding of 1e-16 next to 1 into 1e-8
    assert relative_error(kernel.nngp, nngp) < 1e-7
    assert relative_error(kernel.ntk, nngp + gram * (np.pi - angle) / (2 * np.pi)) < 1e-7


def test_monte_carlo_approaches_stax() -> None:
    x = normal(71, 3, 3)
    width, samples = 512, 4
    init_fn, apply_fn, kernel_fn = relu_network(width)
    with jax.numpy_rank_promotion("allow"):
        sampled = nt.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(5), samples, vmap_axes=0, device_count=0)
        estimate, exact = sampled(x, None, "ntk"), kernel_fn(x, None, "ntk")
    # each entry averages `width` units `samples` times: five standard errors of order-one terms
    tolerance = 5 / (width * samples) ** 0.5
    assert relative_error(estimate, exact) < tolerance
    assert relative_error(1.2 * estimate, exact) > tolerance  # control
