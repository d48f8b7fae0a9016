"""The loss without logits: what it is with them, value and gradients, however the tokens are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntk_prefix import sharding
from ntk_prefix.models import cross_entropy

ROWS, LENGTH, FEATURES, VOCABULARY = 4, 7, 3, 11


def logits(table: jax.Array, hidden: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", hidden, table)


def whole(table: jax.Array, hidden: jax.Array, labels: jax.Array, coefficients: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits(table, hidden), labels)
    return jnp.sum(each * coefficients)


def in_parts(table: jax.Array, hidden: jax.Array, labels: jax.Array, coefficients: jax.Array) -> jax.Array:
    return cross_entropy.weighted_cross_entropy(logits, table, hidden, labels, coefficients, vocab_size=VOCABULARY)


@pytest.fixture(params=[1, 3, 1000], ids=lambda parts: f"{parts} parts at most")
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cross_entropy, "PART_BYTES", 4 * ROWS * LENGTH * VOCABULARY // request.param or 1)
    return request.param


def batch() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    coefficients = jax.random.uniform(keys[3], (ROWS, LENGTH)).at[:, :3].set(0)  # a prompt
    return (
        jax.random.normal(keys[0], (VOCABULARY, FEATURES)),
        jax.random.normal(keys[1], (ROWS, LENGTH, FEATURES)),
        jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCABULARY),
        coefficients,
    )


@pytest.mark.parametrize("wrt", [(), (1,), (0, 1)], ids=["loss", "hidden", "hidden and weights"])
def test_value_and_gradients_are_those_of_all_logits(wrt: tuple[int, ...], parts: int) -> None:
    arrays = batch()
    both = [jax.jit(jax.value_and_grad(f, argnums=wrt) if wrt else f) for f in (in_parts, whole)]
    # a sum of 16 terms in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-14), *(f(*arrays) for f in both))


def test_weights_that_are_not_trained_have_no_gradient_computed(parts: int) -> None:
    """Nothing of their shape but themselves, and what is not trained is not summed up."""
    arrays = batch()
    made = str(jax.make_jaxpr(jax.grad(in_parts, argnums=1))(*arrays))
    both = str(jax.make_jaxpr(jax.grad(in_parts, argnums=(0, 1)))(*arrays))
    shape = f"f64[{VOCABULARY},{FEATURES}] = "
    assert made.count(shape) == 0 < both.count(shape)


def test_parts_without_a_loss_are_passed_over() -> None:
    """What is not finite there is not seen."""
    table, hidden, labels, coefficients = batch()
    hidden = hidden.at[:, 0].set(jnp.inf)
    assert not jnp.isfinite(whole(table, hidden, labels, coefficients))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "PART_BYTES", 4 * ROWS * VOCABULARY)
        value, gradient = jax.value_and_grad(in_parts, argnums=1)(table, hidden, labels, coefficients)
    np.testing.assert_allclose(value, whole(table, hidden.at[:, 0].set(0), labels, coefficients), rtol=1e-13)
    assert jnp.isfinite(gradient).all()


def test_a_divided_batch_and_vocabulary_change_nothing(parts: int) -> None:
    table, hidden, labels, coefficients = batch()
    table = jnp.concatenate([table, table[:1]])  # twelve, to divide
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES)

    def divided(*arrays: jax.Array) -> jax.Array:
        with sharding.on(mesh):
            return in_parts(*arrays)

    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put(
        (table, hidden, labels, coefficients),
        (sharding.weight_sharding(mesh, "embeddings.embedding", table.shape), rows, rows, rows),
    )
    found = jax.jit(jax.value_and_grad(divided, argnums=(0, 1)))(*placed)
    wanted = jax.value_and_grad(whole, argnums=(0, 1))(table, hidden, labels, coefficients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-14), found, wanted)


def test_a_function_of_tokens_is_the_same_in_parts(parts: int) -> None:
    table, hidden, labels, _ = batch()

    def find(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(table, hidden)
        return scores.argmax(-1), cross_entropy.cross_entropy(scores, labels)

    found = jax.jit(lambda *arrays: cross_entropy.in_parts(find, VOCABULARY, *arrays))(hidden, labels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13), found, find(hidden, labels))
