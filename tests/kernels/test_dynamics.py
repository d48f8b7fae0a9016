"""Training predicted from a kernel is the training that happens, for a model that is linear in its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from ntk_prefix.kernels.dynamics import Prediction, predict
from ntk_prefix.kernels.empirical import empirical_ntk

# Both sides run 50 steps in float64 (2.2e-16 a rounding) on a kernel with a condition number under 1e4.
EXACT = 1e-10
RATE = 0.02
STEPS = jnp.arange(51)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def relative_error(value: jax.Array, truth: jax.Array) -> float:
    assert value.shape == truth.shape
    # in NumPy, as everything here that is not under test: nothing to compile
    return float(np.abs(np.asarray(value) - np.asarray(truth)).max() / np.abs(truth).max())


class LinearModel:
    """F(x) = F_0(x) + J(x) w with w = 0 at the start, 5 training and 4 test points, 3 outputs."""

    def __init__(self) -> None:
        self.train, self.test = normal(1, 5, 3, 20), normal(2, 4, 3, 20)
        self.targets = normal(3, 5, 3)
        self.start = {"f_train_0": normal(4, 5, 3), "f_test_0": normal(5, 4, 3)}

    def kernels(self) -> tuple[jax.Array, jax.Array]:
        gram = lambda left: jnp.asarray(np.tensordot(left, self.train, axes=(-1, -1)))  # noqa: E731
        return gram(self.train), gram(self.test)

    def descend(self, rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Gradient descent on 1/2 sum |F - y|^2, actually run."""
        jacobian, test_jacobian, start = np.asarray(self.train), np.asarray(self.test), self.start
        weights, train, test = np.zeros(20), [], []
        for _ in range(steps + 1):
            train.append(np.asarray(start["f_train_0"]) + jacobian @ weights)
            test.append(np.asarray(start["f_test_0"]) + test_jacobian @ weights)
            weights -= rate * np.tensordot(train[-1] - np.asarray(self.targets), jacobian, axes=2)
        return np.stack(train), np.stack(test)


@pytest.fixture
def model(x64: bool) -> LinearModel:
    return LinearModel()


def in_layout(kernel: jax.Array, layout: str) -> jax.Array:
    subscripts, scale = {"diagonal": ("ikjk->ikj", 1), "alike": ("ikjk->ij", 3)}[layout]
    return jnp.asarray(np.einsum(subscripts, kernel) / scale)


def as_full(kernel: jax.Array) -> jax.Array:
    """A diagonal or alike kernel written out as [n, d, n, d]."""
    written = np.asarray(kernel)
    if written.ndim == 2:
        written = np.repeat(written[:, None, :], 3, axis=1)
    return jnp.asarray(np.einsum("ikj,kl->ikjl", written, np.eye(3)))


# ----------------------------------------------------------------------------------- Discrete steps


def test_fifty_steps_of_descent(model: LinearModel) -> None:
    kernel, cross = model.kernels()
    predicted = predict(kernel, model.targets, learning_rate=RATE, steps=STEPS, ntk_test_train=cross, **model.start)
    train, test = model.descend(RATE, 50)
    assert relative_error(predicted.train, train) < EXACT
    assert relative_error(predicted.test, test) < EXACT
    assert relative_error(predicted.loss, 0.5 * ((train - np.asarray(model.targets)) ** 2).sum((1, 2))) < EXACT
    assert predicted.loss[-1] < 0.5 * predicted.loss[0]  # control: something was learned


def test_the_comparison_sees_a_wrong_rate(model: LinearModel) -> None:
    """Negative control: a step size off by a millionth does not pass."""
    kernel, _ = model.kernels()
    start = model.start["f_train_0"]
    predicted = predict(kernel, model.targets, learning_rate=RATE * (1 + 1e-6), steps=STEPS, f_train_0=start)
    assert relative_error(predicted.train, model.descend(RATE, 50)[0]) > 100 * EXACT


def test_a_real_model_with_its_empirical_kernel() -> None:
    """An nnx.Linear layer, its kernel from neural-tangents, its training by plain gradient descent."""
    layer = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x, y, x_test = normal(6, 6, 4), normal(7, 6, 2), normal(8, 3, 4)
    predicted = predict(
        empirical_ntk(layer, x),
        y,
        learning_rate=RATE,
        steps=jnp.array([50]),
        f_train_0=layer(x),
        ntk_test_train=empirical_ntk(layer, x_test, x),
        f_test_0=layer(x_test),
    )

    @nnx.jit
    def step(layer: nnx.Linear) -> None:
        gradient = nnx.grad(lambda layer: 0.5 * jnp.sum((layer(x) - y) ** 2))(layer)
        nnx.update(layer, jax.tree.map(lambda value, slope: value - RATE * slope, nnx.state(layer), gradient))

    for _ in range(50):
        step(layer)
    assert relative_error(predicted.train[0], layer(x)) < EXACT
    assert relative_error(predicted.test[0], layer(x_test)) < EXACT


def test_a_step_too_large_diverges_and_one_below_does_not(model: LinearModel) -> None:
    kernel, _ = model.kernels()
    limit = 2 / float(np.linalg.eigvalsh(np.asarray(kernel).reshape(15, 15))[-1])
    losses = {
        factor: predict(kernel, model.targets, learning_rate=factor * limit, steps=jnp.array([0, 2000])).loss
        for factor in (0.99, 1.01)
    }
    assert losses[0.99][1] < losses[0.99][0]
    assert losses[1.01][1] > 1e6 * losses[1.01][0]


def test_small_rates_keep_their_digits() -> None:
    """(1 - x)^t - 1 for x = 1e-14, t = 1e3, which 1 - x in float64 would get wrong in the first digit or so."""
    predicted = predict(jnp.array([[1e-14]]), jnp.ones((1, 1)), learning_rate=1.0, steps=jnp.array([1000]))
    assert relative_error(predicted.train, jnp.array([[[1e-11]]])) < 1e-8  # the next order, x t


# ---------------------------------------------------------------------------------- Continuous time


def test_the_flow_is_the_matrix_exponential(model: LinearModel) -> None:
    kernel, cross = model.kernels()
    times = jnp.array([0.0, 0.5, 3.25, 40.0])
    predicted = predict(
        kernel, model.targets, learning_rate=RATE, steps=times, flow=True, ntk_test_train=cross, **model.start
    )
    matrix = np.asarray(kernel).reshape(15, 15)
    before = np.asarray(model.start["f_train_0"] - model.targets).reshape(15)
    for index, time in enumerate(times):
        residual = scipy.linalg.expm(-RATE * float(time) * matrix) @ before
        assert relative_error(predicted.train[index], np.asarray(model.targets) + residual.reshape(5, 3)) < EXACT
        moved = np.asarray(cross).reshape(12, 15) @ np.linalg.solve(matrix, residual - before)
        assert relative_error(predicted.test[index], np.asarray(model.start["f_test_0"]) + moved.reshape(4, 3)) < EXACT


def test_descent_approaches_the_flow_to_first_order(model: LinearModel) -> None:
    """Halving the step and doubling their number halves the distance: order 1, fitted."""
    kernel, _ = model.kernels()

    def distance(refinement: int) -> float:
        rate, steps = RATE / refinement, jnp.array([20 * refinement])
        both = [predict(kernel, model.targets, learning_rate=rate, steps=steps, flow=flow) for flow in (False, True)]
        return float(jnp.abs(both[0].train - both[1].train).max())

    slope = np.log2(distance(64) / distance(128))
    assert slope == pytest.approx(1.0, abs=0.02)  # the next order contributes about RATE / 64


def test_the_mean_loss_is_the_sum_at_a_rate_divided_by_its_size(model: LinearModel) -> None:
    kernel, _ = model.kernels()
    for flow in (False, True):
        mean = predict(kernel, model.targets, learning_rate=RATE, steps=STEPS, loss="mse-mean", flow=flow)
        total = predict(kernel, model.targets, learning_rate=RATE / 15, steps=STEPS, flow=flow)
        assert relative_error(mean.train, total.train) < EXACT
        assert relative_error(15 * mean.loss, total.loss) < EXACT


# ---------------------------------------------------------------------------- Full, diagonal, alike


@pytest.mark.parametrize("flow", [False, True], ids=["descent", "flow"])
@pytest.mark.parametrize("layout", ["diagonal", "alike"])
def test_smaller_kernels_act_as_the_full_ones_they_stand_for(layout: str, flow: bool, model: LinearModel) -> None:
    kernel, cross = (in_layout(whole, layout) for whole in model.kernels())
    small = predict(
        kernel, model.targets, learning_rate=RATE, steps=STEPS, flow=flow, ntk_test_train=cross, **model.start
    )
    written_out = predict(
        as_full(kernel),
        model.targets,
        learning_rate=RATE,
        steps=STEPS,
        flow=flow,
        ntk_test_train=as_full(cross),
        **model.start,
    )
    assert relative_error(small.train, written_out.train) < EXACT
    assert relative_error(small.test, written_out.test) < EXACT
    # control: dropping the other entries of the true kernel is an approximation, and seen as one
    full = predict(
        model.kernels()[0],
        model.targets,
        learning_rate=RATE,
        steps=STEPS,
        flow=flow,
        **{"f_train_0": model.start["f_train_0"]},
    )
    assert relative_error(small.train, full.train) > 1e-3


@pytest.mark.parametrize("flow", [False, True], ids=["descent", "flow"])
def test_a_singular_kernel_is_fine(flow: bool) -> None:
    """Two equal inputs of a linear model move together, and their difference stays."""
    row = normal(9, 3)
    kernel = jnp.stack([row, row, 0 * row]) @ jnp.stack([row, row, 0 * row]).T
    cross = (row @ jnp.stack([row, row, 0 * row]).T)[None]
    targets = jnp.array([[1.0], [0.0], [1.0]])
    predicted = predict(
        kernel, targets, learning_rate=0.1 / float(row @ row), steps=jnp.array([5000]), flow=flow, ntk_test_train=cross
    )
    assert relative_error(predicted.train[0], jnp.array([[0.5], [0.5], [0.0]])) < EXACT
    assert relative_error(predicted.test[0], jnp.array([[0.5]])) < EXACT


@pytest.mark.parametrize("flow", [False, True], ids=["descent", "flow"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rounding_of_a_singular_kernel_stays_rounding(flow: bool, dtype: jnp.dtype) -> None:
    """60 points, 10 parameters: eigenvalues of -1e-6 to the power 10^8 were 2e7 where the loss of descent never grows."""
    features, test = normal(10, 60, 10), normal(11, 5, 10)
    kernel, cross = (x.astype(dtype) @ features.astype(dtype).T for x in (features, test))
    targets = jnp.sign(normal(12, 60, 1))
    rate = 1 / float(np.linalg.eigvalsh(np.asarray(kernel))[-1])
    predicted = predict(
        kernel,
        targets.astype(dtype),
        learning_rate=rate,
        steps=jnp.array([0, 100, 10**4, 10**6, 10**8]),
        flow=flow,
        ntk_test_train=cross,
    )
    loss = np.asarray(predicted.loss)
    assert np.all(np.diff(loss) <= 1e-5 * loss[0])
    solved = np.linalg.lstsq(np.asarray(features), np.asarray(targets), rcond=None)[0]  # where descent goes to
    tolerance = 1e-3 if dtype == jnp.float32 else EXACT
    assert relative_error(predicted.train[-1].astype(float), features @ solved) < tolerance
    assert relative_error(predicted.test[-1].astype(float), test @ solved) < tolerance


def test_descent_can_be_compiled(model: LinearModel) -> None:
    kernel, _ = model.kernels()
    predicted = jax.jit(lambda y: predict(kernel, y, learning_rate=RATE, steps=STEPS).train)(model.targets)
    assert relative_error(predicted, predict(kernel, model.targets, learning_rate=RATE, steps=STEPS).train) < EXACT


def test_without_test_points_there_is_no_test() -> None:
    predicted = predict(jnp.eye(2), jnp.ones((2, 1)), learning_rate=0.5, steps=jnp.arange(3))
    assert isinstance(predicted, Prediction)
    assert predicted.test is None
    assert relative_error(predicted.train[:, 0, 0], jnp.array([0.0, 0.5, 0.75])) < EXACT


@pytest.mark.parametrize("x64", [False], indirect=True)
@pytest.mark.parametrize("flow", [False, True])
def test_float32_stays_float32(flow: bool, x64: bool) -> None:
    kernel, targets = jnp.eye(2), jnp.ones((2, 1))
    predicted = predict(kernel, targets, learning_rate=0.5, steps=jnp.arange(3), flow=flow, ntk_test_train=kernel)
    assert {predicted.train.dtype, predicted.test.dtype, predicted.loss.dtype} == {jnp.dtype("float32")}


# ------------------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ntk_train_train": lambda k: k.transpose(0, 2, 1, 3)}, r"neural-tangents' own \[n1, n2, d, d\] needs"),
        ({"ntk_train_train": lambda k: k.at[0, 0, 1, 1].add(1.0)}, "expected a symmetric kernel"),
        (
            {"ntk_train_train": lambda k: k.at[0, 0, 0, 0].set(jnp.nan)},
            "ntk_train_train: expected finite numbers, got nan",
        ),
        ({"ntk_train_train": lambda k: k[:3]}, "expected as many rows as there are targets"),
        ({"ntk_test_train": lambda k: k[..., 0]}, "ntk_test_train: expected 4 axes"),
        ({"y_train": lambda y: y.at[0, 0].set(jnp.inf)}, "y_train: expected finite numbers, got inf"),
        ({"f_train_0": lambda f: f[:, :2]}, r"f_train_0: expected \[5, 3\], got \(5, 2\)"),
        ({"f_test_0": lambda f: f[:1]}, r"f_test_0: expected \[4, 3\], got \(1, 3\)"),
        ({"ntk_test_train": lambda k: None}, "f_test_0: expected it beside ntk_test_train"),
        ({"learning_rate": lambda r: -r}, "learning_rate: expected a finite number > 0"),
        ({"loss": lambda _: "l1"}, "loss: expected"),
        ({"y_train": lambda y: y[:, 0]}, r"y_train: expected \[n, d\], got \(5,\)"),
        ({"y_train": lambda y: y.astype(int)}, "y_train: expected floating point numbers, got int"),
        ({"ntk_train_train": lambda k: -k}, "expected a positive semidefinite kernel"),
        ({"steps": lambda s: s - 1}, "steps: expected finite times >= 0"),
        ({"steps": lambda s: s / 2}, "steps: expected whole numbers, .* flow=True"),
        ({"steps": lambda s: s[0]}, r"steps: expected a vector of times, \[T\], got shape \(\)"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_wrong_arguments_are_explained(change: dict, message: str, model: LinearModel) -> None:
    kernel, cross = model.kernels()
    arguments = {
        "ntk_train_train": kernel,
        "y_train": model.targets,
        "learning_rate": RATE,
        "steps": STEPS,
        "loss": "mse-sum",
        "ntk_test_train": cross,
        **model.start,
    }
    for name, transform in change.items():
        arguments[name] = transform(arguments[name])
    with pytest.raises(ValueError, match=message):
        predict(**arguments)


def test_empty_targets_and_times_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"y_train: expected \[n, d\] with n, d >= 1"):
        predict(jnp.zeros((2, 2)), jnp.zeros((2, 0)), learning_rate=0.1, steps=jnp.array([1]))
    with pytest.raises(ValueError, match="ntk_test_train: expected at least one test input"):
        predict(jnp.eye(2), jnp.ones((2, 1)), learning_rate=0.1, steps=jnp.array([1]), ntk_test_train=jnp.zeros((0, 2)))
    small = jnp.eye(2, dtype=jnp.float32)
    with pytest.raises(ValueError, match="steps: expected times that float32 holds"):
        predict(small, jnp.ones((2, 1), jnp.float32), learning_rate=0.1, steps=jnp.array([1e300]), flow=True)


def test_half_precision_is_predicted_in_float32() -> None:
    half = jnp.bfloat16
    found = predict(jnp.eye(1, dtype=half), jnp.ones((1, 1), half), learning_rate=0.5, steps=jnp.array([1, 257]))
    assert found.train.dtype == jnp.float32
    np.testing.assert_array_equal(found.steps, [1, 257])


def test_times_may_be_made_within_a_compiled_function() -> None:
    found = jax.jit(lambda k: predict(k, jnp.ones((2, 1)), learning_rate=0.5, steps=jnp.arange(3)).train)(jnp.eye(2))
    np.testing.assert_allclose(found[:, 0, 0], [0, 0.5, 0.75], rtol=1e-6)
