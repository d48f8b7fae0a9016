"""Where a weight goes: a parameter of ours, a tensor of a file, and the devices that hold a part of it.

A tensor goes from the file to where it will lie a block of rows at a time: read, checked, converted, and put into the parts
that this process' devices hold. Beside the model that takes one tensor's local parts, and no more than that again where a
device wants them turned first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ntk_prefix.checks import expected
from ntk_prefix.models.formats import StoredTensor
from ntk_prefix.sharding import weight_sharding

__all__ = ["OLD_WORDS", "Slot", "Target", "parameter_dtype", "parameters", "placed"]


class Target(NamedTuple):
    """Where weights go, and as what; a dtype of None is the file's."""

    dtype: np.dtype | None
    mesh: Mesh | None
    progress: Callable[[int, int], None]

    def dtype_of(self, tensor: StoredTensor) -> np.dtype:
        """Return what a tensor's numbers become; what holds no floating point numbers is refused when it is read."""
        if self.dtype is not None:
            return self.dtype
        return jax.dtypes.canonicalize_dtype(np.float32 if tensor.numbers is None else tensor.numbers)


def parameter_dtype(param_dtype: DTypeLike | None) -> np.dtype | None:
    """Return what weights are kept in, None for the file's dtypes.

    Raises:
        UsageError: neither "file" nor floating point numbers of a width that weights may have.
    """
    if isinstance(param_dtype, str) and param_dtype == "file":
        return None
    try:
        dtype = jnp.dtype(np.float32 if param_dtype is None else param_dtype)
    except TypeError:
        dtype = None
    widest = jax.dtypes.canonicalize_dtype(np.float64).itemsize
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or not 2 <= dtype.itemsize <= widest:
        wanted = "'file', or floating point numbers of 16 or 32 bits (of 64 with jax_enable_x64)"
        raise expected("param_dtype", wanted, repr(param_dtype) if dtype is None else dtype)
    return dtype


class Slot(NamedTuple):
    """A parameter of ours by its path, and how a tensor gets there."""

    path: str
    variable: nnx.Variable
    linear: bool

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return a stored tensor's shape in our layout."""
        if not self.linear:
            return stored
        return (math.prod(stored[1:]), stored[0]) if len(stored) == 4 else stored[::-1]


def parameters(path: str, module: Any) -> Iterator[tuple[str, Slot]]:
    """Yield what a Hugging Face file calls a module's parameters, after the module's name, and their places here."""
    if isinstance(module, nnx.Variable):
        yield "", Slot(path, module, False)
    elif isinstance(module, nnx.Embed):
        yield ".weight", Slot(f"{path}.embedding", module.embedding, False)
    elif isinstance(module, nnx.Linear):
        yield ".weight", Slot(f"{path}.kernel", module.kernel, True)
    elif getattr(module, "scale", None) is not None:
        yield ".weight", Slot(f"{path}.scale", module.scale, False)
    if getattr(module, "bias", None) is not None:
        yield ".bias", Slot(f"{path}.bias", module.bias, False)


OLD_WORDS = {".weight": ".gamma", ".bias": ".beta"}
"""What BERT's first files, made by TensorFlow, call a norm's numbers."""


def placed(slot: Slot, tensor: StoredTensor, into: Target, read: Callable[[int], None] = lambda n: None) -> jax.Array:
    """Return a weight where it will lie: every row of the file is read once, and by those only who hold a part of it.

    A linear map is [out, in] in the file and [in, out] here; a patch convolution [out, channels, height, width] is a map
    from flat patches. They are put together as the file has them, and turned on their way to the device.

    Args:
        slot: whose weight it is.
        tensor: its numbers.
        into: as what, and over which mesh.
        read: told how many bytes are there, after each block.
    """
    dtype, shape = into.dtype_of(tensor), tuple(slot.variable.shape)
    order = slice(None, None, -1 if slot.linear else 1)
    sharding = None if into.mesh is None else weight_sharding(into.mesh, slot.path, shape)
    whole = tuple(slice(None) for _ in shape)
    lies: Mapping[Any, Any] = {None: whole} if sharding is None else sharding.addressable_devices_indices_map(shape)
    # by the part that they hold, in the file's order of axes: (start, stop) of each
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in lies.items():
        part = tuple(bounds.indices(size)[:2] for bounds, size in zip(index, shape, strict=True))[order]
        devices.setdefault(part, []).append(device)
    held = {part: np.empty([stop - start for start, stop in part], dtype) for part in devices}
    for first, last in sorted({part[0] for part in held}):
        sharers = [(part[1:], values) for part, values in held.items() if part[0] == (first, last)]
        for rows, block in tensor.blocks(dtype, first, last):
            if block.ndim == 4:
                block = block.transpose(0, 2, 3, 1)
            block = block.reshape(len(block), -1) if slot.linear else block
            for columns, values in sharers:
                values[rows.start - first : rows.stop - first] = block[
                    (slice(None), *(slice(*bounds) for bounds in columns))
                ]
            read(block.nbytes)
    arrays = []
    for part, its_devices in devices.items():
        values = held.pop(part)
        arrays += [jax.device_put(values.T if slot.linear else values, device) for device in its_devices]
        jax.block_until_ready(arrays)  # its numbers are read from `values` until then
    return arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, arrays)
