"""Every right-hand side: its value by hand, the way it must lean, what it refuses, and a run it must dominate."""

import dataclasses
import functools
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

from ntk_prefix import FixedValuePrefixModel, TiedPrefixModel, bounds
from ntk_prefix.kernels import limit_ntk, prefix_ntk
from ntk_prefix.one_layer import fixed_jacobian, tied_jacobian
from ntk_prefix.training import Trainer, half_squared_error

positive = st.floats(1e-3, 1e3)
sizes = st.integers(1, 10**4)
probabilities = st.floats(1e-6, 0.5)

# one valid call of every function of numbers alone; the tests below change an argument at a time
CALLS: dict[str, dict[str, float]] = {
    "weight_scale": {"sigma": 1.0, "inputs": 16, "outputs": 8, "failure": 0.1},
    "log10_prefix_length": {"smallest": 0.01, "inputs": 16, "outputs": 8, "scale": 2.0, "failure": 0.1},
    "theory_step_size": {"smallest": 0.01, "tokens": 1024, "inputs": 16, "outputs": 8, "scale": 2.0},
    "gradient_descent_steps": {
        "smallest": 0.01, "tokens": 1024, "step_size": 1e-3, "inputs": 16, "outputs": 8, "accuracy": 1e-3
    },
    "loss_envelope": {"steps": 10, "smallest": 0.01, "tokens": 1024, "step_size": 1e-3, "initial": 5.0},
    "kernel_drift": {"radius": 0.1, "inputs": 16, "outputs": 8, "scale": 2.0},
    "token_movement": {"smallest": 0.01, "tokens": 1024, "initial_error": 3.0, "steepest": 2.0},
    "largest_stable_step": {"largest": 4.0, "tokens": 1024},
}  # fmt: skip


def call(name: str, **changes: float) -> float:
    return getattr(bounds, name)(**CALLS[name] | changes)


def test_every_function_is_here() -> None:
    assert sorted([*CALLS, "measured_kernel_drift"]) == sorted(bounds.__all__)


class TestValuesByHand:
    def test_weight_scale(self) -> None:
        # n d / delta = 8 e^2 / (8 e^-2) = e^4, whose logarithm has the root 2
        assert call("weight_scale", inputs=2, outputs=4, failure=8 * math.exp(-4)) == pytest.approx(2)
        assert call("weight_scale", inputs=2, outputs=4, failure=8 * math.exp(-4), sigma=3, constant=0.5) == (
            pytest.approx(3)
        )
        assert call("weight_scale", sigma=0.01) == 1

    def test_prefix_length(self) -> None:
        # m = 5 * 0.1^-2 * 1 * e^(18 * 0) * log^2(e^2) = 5 * 100 * 4
        assert call(
            "log10_prefix_length", smallest=0.1, inputs=1, outputs=1, scale=0, failure=math.exp(-2), constant=5
        ) == pytest.approx(math.log10(2000))
        # and e^(18 B) is 18 B / log(10) more
        steeper = call("log10_prefix_length", scale=3) - call("log10_prefix_length", scale=2)
        assert steeper == pytest.approx(18 / math.log(10))

    def test_the_papers_prefix_length_is_out_of_reach(self) -> None:
        """16 points, d = 8, sigma = 1: more tokens than there are atoms in a person, and no overflow for larger B."""
        x = jax.random.normal(jax.random.key(0), (16, 8))
        x = x / jnp.linalg.norm(x, axis=1).max()
        smallest = float(np.linalg.eigvalsh(limit_ntk(x).reshape(128, 128))[0])
        scale = call("weight_scale", failure=0.01)
        assert 28 < call("log10_prefix_length", smallest=smallest, scale=scale, failure=0.01) < 40
        assert math.isfinite(call("log10_prefix_length", scale=1e6))

    def test_step_size(self) -> None:
        # 0.1 * 2 / (10 * 3^2 * 4^2 * 1)
        assert call("theory_step_size", smallest=2, tokens=10, inputs=3, outputs=4, scale=0) == pytest.approx(
            0.2 / 1440
        )
        assert call("theory_step_size", scale=3) == pytest.approx(call("theory_step_size") * math.exp(-16))

    def test_steps(self) -> None:
        # log(2 * 3 / (6 / e^5)) / (10 * 0.1 * 0.5)
        steps = call(
            "gradient_descent_steps",
            smallest=0.5, tokens=10, step_size=0.1, inputs=2, outputs=3, accuracy=6 * math.exp(-5)
        )  # fmt: skip
        assert steps == pytest.approx(10)

    def test_envelope(self) -> None:
        # m eta lambda / 2 = 1/2, so the loss halves with every step
        envelope = functools.partial(call, "loss_envelope", smallest=0.1, tokens=10, step_size=1.0, initial=8)
        assert [envelope(steps=t) for t in range(4)] == pytest.approx([8, 4, 2, 1])
        assert call("loss_envelope", smallest=0.2, tokens=10, step_size=1.0) == 0

    def test_drift(self) -> None:
        assert call("kernel_drift", radius=0.5, inputs=2, outputs=3, scale=0.1) == pytest.approx(3 * math.e)

    def test_movement(self) -> None:
        assert call("token_movement", steepest=3, initial_error=5, tokens=10, smallest=2) == pytest.approx(3)

    def test_stable_step(self) -> None:
        assert call("largest_stable_step", largest=4, tokens=10) == pytest.approx(0.05)


# (function, argument, +1 where the bound grows with it, -1 where it falls, values)
LEANINGS: list[tuple[str, str, int, st.SearchStrategy]] = [
    ("weight_scale", "sigma", 1, positive),
    ("weight_scale", "inputs", 1, sizes),
    ("weight_scale", "outputs", 1, sizes),
    ("weight_scale", "failure", -1, probabilities),
    ("log10_prefix_length", "smallest", -1, positive),
    ("log10_prefix_length", "inputs", 1, sizes),
    ("log10_prefix_length", "outputs", 1, sizes),
    ("log10_prefix_length", "scale", 1, positive),
    ("log10_prefix_length", "failure", -1, probabilities),
    ("theory_step_size", "smallest", 1, positive),
    ("theory_step_size", "tokens", -1, sizes),
    ("theory_step_size", "inputs", -1, sizes),
    ("theory_step_size", "scale", -1, st.floats(1e-3, 40)),  # above, float64 has 0 for it
    ("gradient_descent_steps", "smallest", -1, positive),
    ("gradient_descent_steps", "tokens", -1, sizes),
    ("gradient_descent_steps", "step_size", -1, positive),
    ("gradient_descent_steps", "accuracy", -1, positive),
    ("loss_envelope", "steps", -1, sizes),
    ("loss_envelope", "smallest", -1, st.floats(1e-3, 1.9)),
    ("loss_envelope", "initial", 1, positive),
    ("kernel_drift", "radius", 1, positive),
    ("kernel_drift", "inputs", 1, sizes),
    ("kernel_drift", "scale", 1, st.floats(0, 60)),
    ("token_movement", "smallest", -1, positive),
    ("token_movement", "tokens", -1, sizes),
    ("token_movement", "initial_error", 1, positive),
    ("token_movement", "steepest", 1, positive),
    ("largest_stable_step", "largest", -1, positive),
    ("largest_stable_step", "tokens", -1, sizes),
]


@pytest.mark.parametrize(
    ("name", "argument", "sign", "values"), LEANINGS, ids=[f"{name}-{argument}" for name, argument, *_ in LEANINGS]
)
@settings(deadline=None)
@given(data=st.data())
def test_each_bound_leans_the_right_way(
    name: str, argument: str, sign: int, values: st.SearchStrategy, data: st.DataObject
) -> None:
    low, high = sorted((data.draw(values), data.draw(values)))
    assert sign * (call(name, **{argument: high}) - call(name, **{argument: low})) >= 0


@settings(deadline=None)
@given(sigma=positive, inputs=sizes, outputs=sizes, failure=probabilities)
def test_the_scale_is_at_least_one(sigma: float, inputs: int, outputs: int, failure: float) -> None:
    assert bounds.weight_scale(sigma=sigma, inputs=inputs, outputs=outputs, failure=failure) >= 1


@settings(deadline=None)
@given(
    smallest=st.floats(1e-6, 1.0), tokens=st.integers(1, 10**6), ratio=st.floats(1, 100), accuracy=st.floats(1e-8, 1)
)
def test_after_the_stated_steps_the_envelope_is_below_the_accuracy(
    smallest: float, tokens: int, ratio: float, accuracy: float
) -> None:
    """Twice the steps suffice from |F(0) - Y|^2 = n d on: (1 - x / 2)^(2 t) <= e^(-x t), whatever the constants."""
    step = bounds.largest_stable_step(largest=ratio * smallest, tokens=tokens)
    steps = bounds.gradient_descent_steps(
        smallest=smallest, tokens=tokens, step_size=step, inputs=3, outputs=2, accuracy=accuracy, constant=2.0
    )
    envelope = bounds.loss_envelope(
        steps=math.ceil(steps), smallest=smallest, tokens=tokens, step_size=step, initial=6.0
    )
    assert envelope <= accuracy * (1 + 1e-9)


class TestWrongUseIsTold:
    @pytest.mark.parametrize(
        ("name", "argument"),
        [
            (name, argument)
            for name, arguments in CALLS.items()
            for argument in arguments
            if argument in ("smallest", "largest", "tokens", "inputs", "outputs", "sigma", "step_size", "accuracy")
        ],
    )
    def test_what_must_be_positive(self, name: str, argument: str) -> None:
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"{argument}: expected a finite number > 0, got {wrong}"):
                call(name, **{argument: wrong})

    @pytest.mark.parametrize("name", ["weight_scale", "log10_prefix_length"])
    @pytest.mark.parametrize("failure", [0.0, 1.0, -0.1, math.nan])
    def test_a_failure_that_is_no_probability(self, name: str, failure: float) -> None:
        with pytest.raises(ValueError, match=r"failure: expected a probability in \(0, 1\)"):
            call(name, failure=failure)

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("weight_scale", {"sigma": 1e308}),
            ("log10_prefix_length", {"scale": 1e308}),
            ("gradient_descent_steps", {"smallest": 1e-200, "step_size": 1e-112}),
            ("kernel_drift", {"scale": 1e3}),
            ("kernel_drift", {"radius": 1e300, "scale": 5.0}),
            ("token_movement", {"smallest": 1e-300, "initial_error": 1e100}),
            ("largest_stable_step", {"largest": 1e-320}),
        ],
    )
    def test_a_bound_that_float64_has_no_room_for(self, name: str, changes: dict[str, float]) -> None:
        with pytest.raises(FloatingPointError, match="expected a bound that float64 holds"):
            call(name, **changes)

    def test_a_measured_bound_that_the_inputs_have_no_room_for(self) -> None:
        model = TiedPrefixModel(D, M, rngs=nnx.Rngs(0))
        with pytest.raises(FloatingPointError, match="radius: expected a bound that float64 holds"):
            bounds.measured_kernel_drift(model, jnp.ones((N, D)), radius=1e3)

    @pytest.mark.parametrize("name", ["gradient_descent_steps", "loss_envelope"])
    def test_a_contraction_that_float64_has_0_for(self, name: str) -> None:
        with pytest.raises(ValueError, match="step_size: expected m eta lambda > 0 in float64"):
            call(name, smallest=1e-200, step_size=1e-200)

    def test_a_step_that_float64_has_0_for(self) -> None:
        with pytest.raises(ValueError, match="scale: expected a step size that float64 holds"):
            call("theory_step_size", scale=1e3)

    def test_a_whole_number_beyond_float64(self) -> None:
        with pytest.raises(ValueError, match="inputs: expected a finite number > 0"):
            call("weight_scale", inputs=10**400)

    def test_numbers_near_the_ends_of_float64_overflow_nothing_on_the_way(self) -> None:
        # log10 of 5 * (1e-310)^-2 * log^2(e^2) = log10(20) + 620, the smallest number with fewer digits
        found = call(
            "log10_prefix_length", smallest=1e-310, inputs=1, outputs=1, scale=0, failure=math.exp(-2), constant=5
        )
        assert found == pytest.approx(math.log10(20) + 620, rel=1e-12)
        assert call("weight_scale", inputs=1, outputs=1, failure=1e-320) == pytest.approx(
            math.sqrt(320 * math.log(10)), rel=1e-3
        )

    @pytest.mark.parametrize("radius", [-0.1, math.inf, math.nan])
    def test_a_radius_that_is_none(self, radius: float) -> None:
        with pytest.raises(ValueError, match=r"radius: expected a finite number >= 0"):
            call("kernel_drift", radius=radius)
        model = TiedPrefixModel(D, M, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"radius: expected a finite number >= 0"):
            bounds.measured_kernel_drift(model, jnp.ones((N, D)), radius=radius)

    def test_a_step_beyond_the_envelope(self) -> None:
        with pytest.raises(ValueError, match=r"expected m eta lambda / 2 <= 1, got 5.12\. Take a smaller step"):
            call("loss_envelope", step_size=1.0)


def test_two_thirds_of_the_movement_are_exceeded_by_a_run_that_is_as_slow_as_its_envelope() -> None:
    """One weight w of output J w, with the J whose squared error falls exactly as the envelope does."""
    smallest, tokens, step_size = 0.1, 10, 0.02
    steepest = math.sqrt((1 - math.sqrt(1 - tokens * step_size * smallest / 2)) / step_size)
    weight = 0.0
    for t in range(1500):
        error = steepest * weight - 1
        envelope = bounds.loss_envelope(steps=t, smallest=smallest, tokens=tokens, step_size=step_size, initial=1.0)
        assert error**2 == pytest.approx(envelope, rel=1e-6)
        weight -= step_size * steepest * error
    bound = bounds.token_movement(smallest=smallest, tokens=tokens, initial_error=1.0, steepest=steepest)
    assert bound / 1.5 < weight <= bound


@dataclasses.dataclass(frozen=True)
class Run:
    """A short gradient descent of a small model: what the bounds speak about."""

    model: TiedPrefixModel | FixedValuePrefixModel
    """At the start."""
    inputs: jax.Array
    kernel: np.ndarray
    step_size: float
    losses: np.ndarray
    """|F(t) - Y|^2 before every step."""
    movement: float
    """max_r |w_r(T) - w_r(0)|, the largest over t."""
    steepest: float
    """Largest spectral norm of a token's Jacobian, over tokens and time."""
    drift: float
    """|H(W(T)) - H(W(0))|_F."""


N, D, M, STEPS = 4, 3, 256, 60


@functools.cache
def descend(kind: str, step: float = 0.5) -> Run:
    """Gradient descent with ``step`` / (m lambda_max), from zero output."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (N, D))
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        y = jax.random.uniform(jax.random.key(2), (N, D), minval=-1.0)
        build, jacobian = (
            (TiedPrefixModel, tied_jacobian) if kind == "tied" else (FixedValuePrefixModel, fixed_jacobian)
        )
        model = build(D, M, rngs=nnx.Rngs(0))
        kernel = np.asarray(prefix_ntk(model, x)).reshape(N * D, N * D)
        step_size = step / (M * np.linalg.eigvalsh(kernel)[-1])
        trainer = Trainer(loss=half_squared_error, optimizer=optax.sgd(step_size), reduction="sum")
        state, advance, slopes = trainer.init(model), trainer.stepper(model), jax.jit(jacobian)
        losses, movements, norms = [], [], []
        for t in range(STEPS):
            if t % 10 == 0:
                weights = jnp.copy(trainer.model(model, state).weights[...])  # type: ignore[attr-defined]
                by_token = np.asarray(slopes(weights, model.signs[...], x)).transpose(2, 0, 1, 3).reshape(M, N * D, D)
                norms.append(np.linalg.norm(by_token, ord=2, axis=(1, 2)).max())
                movements.append(np.linalg.norm(weights - model.weights[...], axis=1).max())
            state, metrics = advance(state, (x, y))
            losses.append(2 * float(metrics["loss"]))
        drift = np.linalg.norm(prefix_ntk(trainer.model(model, state), x).reshape(N * D, N * D) - kernel)  # type: ignore[arg-type]
        return Run(model, x, kernel, step_size, np.array(losses), max(movements), max(norms), float(drift))


@pytest.mark.parametrize("kind", ["tied", "fixed"])
class TestARunIsDominated:
    def smallest(self, run: Run) -> float:
        return float(np.linalg.eigvalsh(run.kernel)[0])

    def test_the_loss_by_its_envelope_at_every_step(self, kind: str) -> None:
        run = descend(kind)
        envelope: Callable[..., float] = functools.partial(
            bounds.loss_envelope, tokens=M, step_size=run.step_size, initial=run.losses[0]
        )
        assert all(loss <= envelope(steps=t, smallest=self.smallest(run)) for t, loss in enumerate(run.losses))
        # control: nothing decays as fast as the largest eigenvalue says
        largest = float(np.linalg.eigvalsh(run.kernel)[-1])
        assert run.losses[-1] > envelope(steps=STEPS - 1, smallest=largest)

    def test_the_movement_of_every_token(self, kind: str) -> None:
        run = descend(kind)
        bound = bounds.token_movement(
            smallest=self.smallest(run), tokens=M, initial_error=math.sqrt(run.losses[0]), steepest=run.steepest
        )
        assert 0 < run.movement <= bound
        # not vacuous: a bound a thousand times smaller would be broken
        assert run.movement > bound / 1e3

    def test_the_drift_of_the_kernel(self, kind: str) -> None:
        run = descend(kind)
        scale = bounds.weight_scale(sigma=1.0, inputs=N, outputs=D, failure=0.01)
        assert 0 < run.drift <= bounds.kernel_drift(radius=run.movement, inputs=N, outputs=D, scale=scale)
        # control: at a thousandth of the radius and without the exponential the form is no bound
        assert run.drift > bounds.kernel_drift(radius=run.movement / 1e3, inputs=N, outputs=D, scale=0)

    def test_the_drift_by_what_is_measured_at_the_start(self, kind: str) -> None:
        run = descend(kind)
        drift = functools.partial(bounds.measured_kernel_drift, run.model, run.inputs)
        assert 0 < run.drift <= drift(radius=run.movement)
        # not vacuous: moving every token outward by as much comes within a factor of 30 of it
        outward = nnx.clone(run.model)
        weights = outward.weights[...]
        outward.weights[...] = weights + run.movement * weights / jnp.linalg.norm(weights, axis=1, keepdims=True)
        worst = np.linalg.norm(prefix_ntk(outward, run.inputs).reshape(N * D, N * D) - run.kernel)
        assert drift(radius=run.movement) / 30 < worst <= drift(radius=run.movement)
        # nothing moves within radius 0, and the bound grows from there, at first in proportion
        assert drift(radius=0.0) == 0
        assert drift(radius=2e-9) == pytest.approx(2 * drift(radius=1e-9), rel=1e-6)
        assert drift(radius=0.2) > 2 * drift(radius=0.1)

    def test_two_thirds_of_what_is_measured_at_the_start_are_exceeded_by_a_heavy_token(self, kind: str) -> None:
        """One token weighs much more than the rest, and yet little of all: it moves along the input, all others against it."""
        tied, tokens, radius = kind == "tied", 4096, 1e-3
        weights, signs = np.zeros(tokens), np.ones(tokens)
        weights[0] = math.log(128)
        if not tied:  # a center at the other end: then it hardly moves, as is allowed for, and the sum loses a fifth
            signs[1:] = -1
        model = (TiedPrefixModel if tied else FixedValuePrefixModel)(1, tokens, rngs=nnx.Rngs(0))
        model.weights[...], model.signs[...] = jnp.asarray(weights)[:, None], jnp.asarray(signs)[:, None]
        bound = bounds.measured_kernel_drift(model, jnp.ones((1, 1)), radius=radius)

        def kernel(moved: float) -> float:
            there = weights - moved
            there[0] += 2 * moved
            mass = np.exp(there)
            mass *= tokens / mass.sum()
            values = signs * there if tied else signs
            return float(np.square(mass * (signs * tied + values - (mass * values).mean())).mean())

        assert bound / 1.5 < kernel(radius) - kernel(0.0) <= bound

    def test_the_largest_stable_step(self, kind: str) -> None:
        kernel = descend(kind).kernel
        limit = bounds.largest_stable_step(largest=float(np.linalg.eigvalsh(kernel)[-1]), tokens=M)

        def growth(step: float) -> float:  # of the linearized error, (I - eta m H)^t
            return float(np.abs(1 - step * M * np.linalg.eigvalsh(kernel)).max())

        assert growth(0.99 * limit) < 1 < growth(1.01 * limit)

    def test_steps_beyond_it_raise_the_loss_of_the_model_itself(self, kind: str) -> None:
        """A step of 2.5 instead of 2 over m lambda_max: the envelope breaks."""
        losses = descend(kind, step=2.5).losses
        assert losses[5] > losses[0]
