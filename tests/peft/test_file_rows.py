"""Heads of different length in a file: nothing of them is lost, what fills them up is left out, damage is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ntk_prefix import peft
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.peft.file_rows import MOST, ROWS, lengthened, shortened
from ntk_prefix.prefix_state import PrefixState
from tests.peft.cases import inputs
from tests.peft.test_files import read
from tests.peft.tiny import HEAD_DIM, tiny

LENGTHS = (3, 16)
"""Anchors of two key heads."""


def uneven(model):
    """Put a state on a model's first layer, of heads that are filled up as a fit does it."""
    random = np.random.default_rng(0)
    points, z, k = (random.uniform(0.5, 1, (2, max(LENGTHS), *rest)) for rest in ((HEAD_DIM,), (HEAD_DIM,), ()))
    for head, length in enumerate(LENGTHS):
        points[head, length:], z[head, length:], k[head, length:] = points[head, length - 1], 0, 0
    z, k, points = (jnp.asarray(x, jnp.float32) for x in (z, k, points))
    return peft.apply_states(model, {0: PrefixState(z, k, Anchors(points))})


@pytest.mark.parametrize("dtype", [None, "float16", "int8"])
def test_a_file_has_the_rows_that_heads_have_and_nothing_is_lost(tmp_path, dtype):
    peft.save_pretrained(uneven(tiny()), tmp_path / "first", dtype=dtype)
    _, held = read(tmp_path / "first")
    shapes = {name.rpartition("self.")[2]: x.shape for name, x in held.items()}
    # of the zeros one stays
    assert shapes["points"] == (1, sum(LENGTHS), HEAD_DIM)
    assert shapes["z"] == (1, sum(LENGTHS) + 1, HEAD_DIM)
    assert shapes["k"] == (1, sum(LENGTHS) + 1)
    assert {name for name, x in held.items() if x.dtype == np.int32} == {name for name in held if name.endswith(ROWS)}
    loaded = peft.load_adapter(tiny(), tmp_path / "first")
    np.testing.assert_allclose(loaded(*inputs()), uneven(tiny())(*inputs()), atol=0 if dtype is None else 0.02)
    peft.save_pretrained(loaded, tmp_path / "second", dtype=dtype)
    first, second = (read(tmp_path / folder)[1] for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(np.allclose(first[name], second[name], rtol=1e-6, atol=0) for name in first)


def test_heads_of_one_length_are_written_as_they_are(tmp_path):
    points, z, k = (jnp.ones((2, 1, *rest)) for rest in ((HEAD_DIM,), (HEAD_DIM,), ()))
    peft.save_pretrained(peft.apply_states(tiny(), {0: PrefixState(z, k, Anchors(points))}), tmp_path)
    assert not any(name.endswith(ROWS) for name in read(tmp_path)[1])


@given(
    array=array_shapes(min_dims=2, max_dims=4, max_side=5).flatmap(
        # few values, so that rows are often alike
        lambda shape: arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0, 2.0]))
    )
)
def test_every_array_comes_back(array):
    held = shortened("z", array)
    found = lengthened("file", held)
    assert found.keys() == {"z"}
    np.testing.assert_array_equal(found["z"], array)
    assert held["z"].size <= array.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows + 1, "lengths: expected numbers of rows that sum up to"),
        (lambda rows: rows[:1], "lengths: expected numbers of rows that sum up to"),
        (lambda rows: rows - rows, "lengths: expected numbers above 0, one for each head"),
        (lambda rows: rows[:0], "lengths: expected numbers above 0, one for each head"),
        (lambda rows: rows[None], "lengths: expected numbers above 0, one for each head"),
        (lambda rows: rows.astype(np.int64), "expected floating point weights"),
    ],
)
def test_numbers_of_rows_that_do_not_fit_are_refused(tmp_path, change, message):
    peft.save_pretrained(uneven(tiny()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safetensors.safe_open(file, framework="np") as content:
        metadata = content.metadata()
    _, held = read(tmp_path)
    damaged = {name: change(x) if name.endswith(ROWS) else x for name, x in held.items()}
    safetensors.numpy.save_file(damaged, file, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(tiny(), tmp_path)


def test_a_file_that_would_grow_beyond_measure_is_refused():
    heads = 2 * MOST
    counts = np.array([heads, *[1] * (heads - 1)], np.int32)
    with pytest.raises(
        ValueError, match=r"file: z\.lengths: expected heads of 128 times 511 rows in all at most, got 256 of 256"
    ):
        lengthened("file", {"z": np.zeros((1, counts.sum(), 1), np.float32), "z.lengths": counts})


@pytest.mark.parametrize("side", [MOST, 2 * MOST, 3 * MOST])
def test_what_is_written_can_be_read_also_where_nearly_all_of_it_repeats(side):
    """As of a state that was never trained: zeros, in many heads of many features."""
    array = np.zeros((side, side), np.float32)
    np.testing.assert_array_equal(lengthened("file", shortened("z", array))["z"], array)


def test_rows_of_no_array_are_refused():
    with pytest.raises(
        ValueError, match=r"file: z\.lengths: expected numbers above 0, one for each head of an array beside it"
    ):
        lengthened("file", {"z.lengths": np.ones(2, np.int32)})
