"""Gradient descent on a stylized model with everything the theory speaks of recorded on the way."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import ArrayLike

from ntk_prefix.kernels import limit_ntk
from ntk_prefix.one_layer import FixedValuePrefixModel, TiedPrefixModel
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.training import Trainer, TrainState, half_squared_error
from ntk_prefix.typing import Array, Float, Inputs
from theory.claim import Undecidable
from theory.problem import Problem

MODELS: tuple[ModelName, ...] = ("tied", "fixed")
Model = TiedPrefixModel | FixedValuePrefixModel


class Trajectory(NamedTuple):
    """Gradient descent from step 0 to T."""

    outputs: Float[Array, "steps n d"]
    """F(t) at t = 0..T."""
    movement: Float[Array, "steps"]
    """max_r |w_r(t) - w_r(0)| at t = 0..T."""
    final: Float[Array, "m d"]
    """W(T)."""

    def squared_error(self, targets: Array) -> Float[Array, "steps"]:
        """Return |F(t) - Y|_F^2 at t = 0..T."""
        return jnp.square(self.outputs - targets[None]).sum((1, 2))


def build(problem: Problem, model: ModelName, m: int, *labels: int | str, symmetric: bool = True) -> Model:
    """Return a freshly drawn model of m prefix tokens for a problem."""
    rngs = nnx.Rngs(problem.key(model, m, *labels))
    if model == "tied":
        return TiedPrefixModel(problem.d, m, problem.sigma, symmetric, rngs=rngs)
    return FixedValuePrefixModel(problem.d, m, None, problem.sigma, symmetric, rngs=rngs)


# one optimizer for every step size (it lives in the state), so that a step compiles once per shape
TRAINER = Trainer(
    loss=half_squared_error, optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), reduction="sum"
)


def descend(model: Model, inputs: Inputs, targets: Array, *, step_size: float, steps: int) -> Trajectory:
    """Run plain gradient descent on L = 1/2 sum_i |F(x_i) - y_i|^2 with the package's own train step."""
    frozen = TRAINER.frozen(model)
    return _descend(nnx.graphdef(model), begin(model, step_size), frozen, (inputs, targets), steps)


def begin(model: nnx.Module, step_size: float) -> TrainState:
    """Return the state of :data:`TRAINER` before its first step."""
    state = TRAINER.init(model)
    state.optimizer.hyperparams["learning_rate"] = jnp.asarray(step_size, float)
    return state


@functools.partial(jax.jit, static_argnames=("graph", "steps"))
def _descend(
    graph: nnx.GraphDef[Model], state: TrainState, frozen: nnx.State, batch: tuple[Array, Array], steps: int
) -> Trajectory:
    model = nnx.merge(graph, state.trained, frozen)
    start = model.weights[...]
    update = TRAINER.update(model)

    def observe(state: TrainState) -> tuple[Array, Array]:
        current = nnx.merge(graph, state.trained, frozen)
        return current(batch[0]), jnp.linalg.norm(current.weights[...] - start, axis=1).max()

    final, before = jax.lax.scan(
        lambda state, _: (update(state, frozen, batch)[0], observe(state)), state, length=steps
    )
    outputs, movement = jax.tree.map(lambda old, last: jnp.concatenate([old, last[None]]), before, observe(final))
    return Trajectory(outputs, movement, nnx.merge(graph, final.trained, frozen).weights[...])


def gram(kernel: Array) -> Float[Array, "nd nd"]:
    """Return the Gram matrix of a kernel [n, d, n, d]."""
    rows = kernel.shape[0] * kernel.shape[1]
    return kernel.reshape(rows, -1)


def spectrum(kernel: Array) -> Float[Array, "nd"]:
    """Return eigenvalues of a kernel [n, d, n, d], ascending."""
    return jnp.linalg.eigvalsh(gram(kernel))


def rounding(eigenvalues: ArrayLike) -> float:
    """Return the most by which ascending eigenvalues computed in float64 are off.

    It is p(N) eps |H| for an N x N matrix H; p(N) = 10 N is generous for LAPACK's syevd.
    """
    values = np.asarray(eigenvalues)
    return float(10 * len(values) * 2**-52 * abs(values[-1]))


def smallest_eigenvalue(eigenvalues: ArrayLike, kernel: str) -> float:
    """Return the smallest of ascending eigenvalues, which a claim divides by.

    Raises:
        Undecidable: it is below its rounding; the text names ``kernel``.
    """
    smallest, floor = float(np.asarray(eigenvalues)[0]), rounding(eigenvalues)
    if not smallest > floor:
        raise Undecidable(
            f"undecidable in float64: the smallest eigenvalue of {kernel}, {smallest:.1e}, is below its rounding, {floor:.1e}"
        )
    return smallest


def above_rounding(error: np.ndarray, problem: Problem, m: int, name: str) -> int:
    """Return how many squared errors of a run, from the first, are more than rounding leaves of sums over m tokens.

    Raises:
        Undecidable: the second is not.
    """
    floor = problem.n * problem.d * (m * 2.0**-52 * max(problem.sigma, 1)) ** 2
    below = np.flatnonzero(error <= floor)
    if below.size and below[0] < 2:
        raise Undecidable(
            f"undecidable in float64: a step takes the loss ({name}, m = {m}) to its rounding, {floor:.1e}"
        )
    return int(below[0]) if below.size else len(error)


def limit_of(problem: Problem, model: ModelName) -> Float[Array, "n d n d"]:
    """Return H* on the problem's inputs."""
    return limit_ntk(problem.inputs, sigma=problem.sigma, model=model)


def with_weights(model: Model, weights: Array) -> Model:
    """Return the same model at other weights."""
    same = nnx.clone(model)
    same.weights[...] = weights
    return same
