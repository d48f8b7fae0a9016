"""The claim ``perturbation``: what it takes for the largest drift."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.claims import perturbation


@pytest.mark.parametrize("name", ["fixed", "tied"])
def test_the_ascent_finds_the_largest_drift_where_every_move_can_be_tried(name: str) -> None:
    """One column: a token moves up or down, and nothing turns."""
    random = np.random.default_rng(0)
    weights, signs, x, radius = (
        random.normal(size=(4, 1)),
        np.array([[1.0], [-1], [1], [-1]]),
        np.array([[1.0], [-0.4]]),
        0.01,
    )
    with jax.enable_x64(True):
        kernel = partial(perturbation._kernel, signs=jnp.asarray(signs), inputs=jnp.asarray(x), model=name)
        start = np.asarray(kernel(jnp.asarray(weights)))
        moves = radius * np.array(list(itertools.product((-1.0, 1.0), repeat=4)))[:, :, None]
        moved = np.asarray(jax.vmap(kernel)(jnp.asarray(weights + moves)))
        drifts = np.linalg.norm((moved - start).reshape(16, -1), axis=1)
        direction = moves[np.argmin(drifts)]
        found = perturbation._largest_drift(weights, signs, x, radius, direction, name)
    assert drifts.min() < 0.5 * drifts.max()
    assert 0.95 * drifts.max() < found <= (1 + 1e-9) * drifts.max()
