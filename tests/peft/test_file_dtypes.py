"""Adapters in files of fewer bytes: how far numbers are off, what is kept as it is, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntk_prefix import peft
from ntk_prefix.peft import file_dtypes
from tests.peft.cases import inputs, trained
from tests.peft.test_files import read
from tests.peft.tiny import tiny


@pytest.mark.parametrize("dtype", [jnp.float16, "bfloat16", np.float32])
def test_a_file_may_hold_rounded_numbers(tmp_path, dtype):
    peft.save_pretrained(trained("ntk"), tmp_path / "own")
    peft.save_pretrained(trained("ntk"), tmp_path / "rounded", dtype=dtype)
    (fields, own), (rounded_fields, rounded) = read(tmp_path / "own"), read(tmp_path / "rounded")
    assert fields == rounded_fields
    for key, value in own.items():
        np.testing.assert_array_equal(rounded[key], value.astype(jnp.dtype(dtype)), err_msg=key)
        assert rounded[key].dtype == jnp.dtype(dtype)
    loaded = peft.load_adapter(tiny(), tmp_path / "rounded")
    np.testing.assert_allclose(loaded(*inputs()), trained("ntk")(*inputs()), atol=0.05)


def test_a_state_in_int8_keeps_its_masses_and_a_unit_for_each_row(tmp_path):
    peft.save_pretrained(trained("ntk"), tmp_path / "own")
    peft.save_pretrained(trained("ntk"), tmp_path / "rounded", dtype="int8")
    (fields, own), (rounded_fields, packed) = read(tmp_path / "own"), read(tmp_path / "rounded")
    assert fields == rounded_fields
    for key, value in own.items():
        if key.endswith(".z"):
            unit = packed[f"{key}.scale"]
            assert unit.shape == (*value.shape[:-1], 1)
            assert np.abs(packed[key] * unit - value).max() > 0
            assert (np.abs(packed[key] * unit - value) <= 0.501 * unit).all()
            assert packed[key].dtype == np.int8
        else:
            np.testing.assert_array_equal(packed[key], value)
    loaded = peft.load_adapter(tiny(), tmp_path / "rounded")
    np.testing.assert_allclose(loaded(*inputs()), trained("ntk")(*inputs()), atol=0.02)
    with pytest.raises(ValueError, match=r"dtype: expected float32, float16 or bfloat16 .* got int8 of LoraConfig"):
        peft.save_pretrained(trained("lora"), tmp_path / "lora", dtype="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: None, "expected floating point weights .* or I8 beside .*scale in F32, got I8"),
        (lambda scale: scale[..., 0], "scale: expected a unit for each row of"),
        (lambda scale: scale.astype(np.float16), "or I8 beside .*scale in F32, got I8"),
        (lambda scale: scale * np.nan, "expected finite float32 numbers"),
        (lambda scale: np.full_like(scale, 3e38), "expected finite float32 numbers"),
    ],
)
def test_numbers_in_int8_whose_units_are_damaged_are_refused(tmp_path, change, message):
    peft.save_pretrained(trained("ntk"), tmp_path, dtype="int8")
    _, tensors = read(tmp_path)
    key = next(key for key in tensors if key.endswith(".scale"))
    if (scale := change(tensors.pop(key))) is not None:
        tensors[key] = scale
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(tiny(), tmp_path)


@given(x=arrays(np.float32, (2, 3, 4), elements=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False)))
@settings(deadline=None, max_examples=50)
def test_int8_is_off_by_half_a_unit_of_its_row(x):
    largest = np.abs(x).max(axis=-1, keepdims=True)
    found = np.asarray(file_dtypes.rounded(jnp.asarray(x), "int8"))
    assert (np.abs(found - x.astype(np.float64)) <= largest / 254 * (1 + 1e-5) + 1e-44).all()


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (jnp.float16, r"k: expected numbers that float16 holds, got .*bfloat16 and float32 hold larger ones"),
        (jnp.int16, "dtype: expected one of float32, float16, bfloat16, int8, or None"),
        ("float31", "dtype: expected one of float32, float16, bfloat16, int8, or None"),
    ],
)
def test_a_dtype_that_does_not_hold_the_numbers_leaves_no_file(tmp_path, dtype, message):
    model = trained("ntk")
    k = model.layers[0].attention.core.adapters["default"].k
    k[...] = k[...] + 1e5
    with pytest.raises(ValueError, match=message):
        peft.save_pretrained(model, tmp_path, dtype=dtype)
    assert not any(tmp_path.iterdir())
