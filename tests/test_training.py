"""One train step, two ways of running it, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import TiedPrefixModel
from ntk_prefix.training import Trainer, half_squared_error

STEPS = 20


def data(rows: int = 8, d: int = 3) -> tuple[jax.Array, jax.Array]:
    x, y = jax.random.normal(jax.random.key(1), (2, rows, d))
    return x / 3, y


def run(trainer: Trainer, rows: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Losses and final weights after STEPS steps."""
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    batch = trainer.place(data(rows))
    state, step = trainer.init(model), trainer.stepper(model)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return np.array(losses), np.array(trainer.model(model, state).weights[...])


def trainer(**way: object) -> Trainer:
    return Trainer(**{"loss": half_squared_error, "optimizer": optax.adam(1e-3), **way})  # type: ignore[arg-type]


def mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("data", "fsdp")[: len(shape)]
    return jax.make_mesh(shape, names)


@pytest.mark.parametrize("x64", [True, False], indirect=True)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_way_and_device_count_trains_alike(reduction: str, x64: bool) -> None:
    alone_losses, alone_weights = run(trainer(reduction=reduction))
    # sums over rows in another order: a few roundings per step, and Adam divides by a root of them
    tolerance = 1e-12 if x64 else 2e-5
    ways: list[dict] = [{"mesh": mesh(8)}, {"parallel": "pmap"}]
    if reduction == "mean":
        ways += [{"mesh": mesh(4, 2)}, {"parallel": "pmap", "devices": tuple(jax.devices()[:4])}]
    for way in ways:
        losses, weights = run(trainer(reduction=reduction, **way))
        np.testing.assert_allclose(losses, alone_losses, rtol=tolerance, err_msg=str(way))
        np.testing.assert_allclose(weights, alone_weights, rtol=tolerance, atol=tolerance, err_msg=str(way))


def test_fsdp_shares_weights_and_optimizer_state_and_one_program_serves_all_steps() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    way = trainer(mesh=mesh(2, 4))
    state, step = way.init(model), way.stepper(model)
    for _ in range(3):
        state, _ = step(state, way.place(data()))
        for leaf in jax.tree.leaves((state.trained, state.optimizer)):
            share = 4 if leaf.ndim else 1
            assert leaf.addressable_shards[0].data.size == leaf.size // share, leaf.shape
    assert step._cache_size() == 1


def test_sum_is_rows_times_mean() -> None:
    """Plain gradient descent on the sum with step eta is that on the mean with n eta: the reduction is what it says."""
    summed = run(trainer(optimizer=optax.sgd(1e-3), reduction="sum"))
    meaned = run(trainer(optimizer=optax.sgd(8e-3), reduction="mean"))
    np.testing.assert_allclose(summed[1], meaned[1], rtol=1e-12)
    np.testing.assert_allclose(summed[0], 8 * meaned[0], rtol=1e-12)


def test_the_step_is_gradient_descent_by_hand() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    x, y = data()

    def loss(weights: jax.Array) -> jax.Array:
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        return half_squared_error(nnx.merge(graph, nnx.State({"weights": nnx.Param(weights)}), rest), (x, y))

    weights = model.weights[...]
    for _ in range(STEPS):
        weights = weights - 1e-3 * jax.grad(loss)(weights)
    trained = run(trainer(optimizer=optax.sgd(1e-3), reduction="sum"))[1]
    np.testing.assert_allclose(trained, weights, rtol=1e-13, atol=1e-13)


def test_frozen_signs_have_no_optimizer_state_and_stay() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    way = trainer()
    state = way.init(model)
    moments = [leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert moments == [32 * 3, 32 * 3]
    state, _ = way.stepper(model)(state, data())
    trained = way.model(model, state)
    assert (trained.signs[...] == model.signs[...]).all()
    assert (trained.weights[...] != model.weights[...]).all()


def test_the_given_model_survives_a_donating_step() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    before = np.array(model.weights[...])
    way = trainer()
    way.stepper(model)(way.init(model), data())
    np.testing.assert_array_equal(model.weights[...], before)


def test_the_step_compiles_once() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    way = trainer(mesh=mesh(8))
    state, step, batch = way.init(model), way.stepper(model), way.place(data())
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1


@pytest.mark.usefixtures("without_annotations")
def test_wrong_use_is_told() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rows divisible by the 8 devices, got 6.*Pad it to 8"):
        trainer(mesh=mesh(8)).place(data(6))
    with pytest.raises(ValueError, match="matches nothing"):
        trainer(wrt=nnx.BatchStat).init(model)
    with pytest.raises(ValueError, match=r'expected "jit" or "pmap", got "?.pjit'):
        trainer(parallel="pjit")
    with pytest.raises(ValueError, match='expected "sum" or "mean"'):
        trainer(reduction="average")
    with pytest.raises(ValueError, match="mesh: expected none"):
        trainer(parallel="pmap", mesh=mesh(8))
    with pytest.raises(ValueError, match="devices: expected none"):
        trainer(devices=tuple(jax.devices()))


def test_a_batch_is_any_pytree() -> None:
    model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))

    def loss(model: TiedPrefixModel, batch: dict) -> jax.Array:
        return half_squared_error(model, (batch["x"], batch["y"]))

    x, y = data()
    way = trainer(loss=loss, mesh=mesh(8))
    _, metrics = way.stepper(model)(way.init(model), way.place({"x": x, "y": y}))
    assert jnp.isfinite(metrics["gradient_norm"])
    assert metrics["update_norm"] > 0


class TestFrozen:
    """What is not trained is an argument of the step, taken by reference."""

    def test_no_step_and_no_model_made_of_a_state_copies_it(self) -> None:
        model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
        way, signs = trainer(), model.signs[...]
        state, step = way.init(model), way.stepper(model)
        assert {leaf.shape for leaf in jax.tree.leaves(state.trained)} == {(32, 3)}
        assert [leaf is signs for leaf in jax.tree.leaves(step.frozen)] == [True]
        state, _ = step(state, data())
        trained = way.model(model, state)
        assert trained.signs[...] is signs  # not donated either: it can still be read
        trained.signs = nnx.Param(2 * signs)
        assert model.signs[...] is signs

    def test_one_program_serves_other_frozen_weights(self) -> None:
        """They are no constants of it."""
        model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
        way = trainer()
        step = way.stepper(model)
        turned = jax.tree.map(jnp.ones_like, step.frozen)
        losses = [step.compiled(way.init(model), frozen, data())[1]["loss"] for frozen in (step.frozen, turned)]
        assert losses[0] != losses[1]
        assert step._cache_size() == 1

    def test_a_mesh_holds_it_once(self) -> None:
        model = TiedPrefixModel(3, 32, rngs=nnx.Rngs(0))
        way = trainer(mesh=mesh(2, 4))
        way.lay_out_frozen(model)
        (laid_out,) = jax.tree.leaves(way.stepper(model).frozen)
        here = [part.data.unsafe_buffer_pointer() for part in model.signs[...].addressable_shards]
        assert [part.data.unsafe_buffer_pointer() for part in laid_out.addressable_shards] == here
        assert laid_out.addressable_shards[0].data.size == laid_out.size // 4


def test_the_step_says_whether_what_it_leaves_is_finite() -> None:
    """The loss is of the weights before the update."""
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for rate, finite in ((0.1, True), (jnp.inf, False), (jnp.nan, False)):
        trainer = Trainer(loss=half_squared_error, optimizer=optax.sgd(rate))
        _, metrics = trainer.stepper(model)(trainer.init(model), (x, y))
        assert bool(jnp.isfinite(metrics["loss"]))
        assert bool(metrics["finite"]) is finite


def test_the_gradient_norm_of_accumulated_parts_is_that_of_the_whole_batch() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (6, 3)), jax.random.normal(keys[1], (6, 2))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    whole = Trainer(loss=half_squared_error, optimizer=optax.sgd(0.1))
    _, wanted = whole.stepper(model)(whole.init(model), (x, y))
    every = optax.MultiSteps(optax.sgd(0.1), 3)
    parts = Trainer(loss=half_squared_error, optimizer=optax.GradientTransformation(every.init, every.update))
    state, step = parts.init(model), parts.stepper(model)
    norms = []
    for part in range(3):
        state, metrics = step(state, (x[2 * part :][:2], y[2 * part :][:2]))
        norms.append(metrics["gradient_norm"])
    # three sums of two rows in place of one of six, and a running mean: a few roundings of float32
    np.testing.assert_allclose(norms[-1], wanted["gradient_norm"], rtol=1e-6)
    assert abs(norms[0] / wanted["gradient_norm"] - 1) > 1e-3  # control: a part is not the whole
