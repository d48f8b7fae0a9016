"""``==`` between results that have arrays: an answer, where the arrays' own is none."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import PrefixState, certificate, feature_map, kernels
from ntk_prefix.compression import Compression
from ntk_prefix.models.backbone import Output

X, Y = np.eye(3, 4) / 2, np.zeros((3, 4))


def results() -> list[Any]:
    """One of each kind, made anew."""
    key, value = jnp.linspace(0, 1, 40).reshape(5, 2, 4), jnp.ones((5, 2, 4))
    found = certificate.certify(jnp.asarray(X), jnp.asarray(Y), sigma=1.0, model="tied", m=64, delta=0.1)
    return [
        PrefixState.from_prefix(key, value),
        PrefixState(key, key[..., 0]),
        Output(last_hidden_state=key, cache=(key, value)),
        kernels.predict(jnp.eye(3), jnp.ones((3, 2)), learning_rate=0.1, steps=jnp.arange(3)),
        dataclasses.replace(found, radii=np.ones(3)),
        Compression(
            states={"layer": PrefixState.from_prefix(key, value)},
            anchors=np.ones((1, 2), int),
            **dict.fromkeys(("chosen_error", "error", "sensitivity"), np.ones((1, 2))),
        ),
    ]


@pytest.mark.usefixtures("without_annotations")  # an array of another shape is put in
def test_the_same_numbers_are_equal_and_others_are_not() -> None:
    made = results()
    for place, (one, other) in enumerate(zip(made, results(), strict=True)):
        assert one == other == copy.deepcopy(one)
        assert made.index(one) == place
        assert one != 3
        [name, *_] = [field.name for field in dataclasses.fields(one) if hasattr(getattr(one, field.name), "dtype")]
        array = getattr(one, name)
        for changed in (array + 1, array.astype(jnp.float16), array[:-1]):
            assert one != dataclasses.replace(one, **{name: changed})


def test_settings_count_and_nan_equals_nothing() -> None:
    state = PrefixState(jnp.ones((2, 4, 4)), jnp.ones((2, 4)))
    assert state != dataclasses.replace(state, scale=0.5)
    assert state != dataclasses.replace(state, feature_map=feature_map("taylor", degree=2))
    nan = dataclasses.replace(state, k=state.k * jnp.nan)
    assert nan != nan


def test_nothing_of_this_kind_is_hashed_and_all_of_it_passes_through_jit() -> None:
    state = PrefixState(jnp.ones((2, 4, 4)), jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)
    assert jax.jit(lambda state: state)(state) == state
