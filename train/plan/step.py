"""The real training step, compiled for devices that need not be there, and what the compiler says of it."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix import sharding
from ntk_prefix.checks import expected
from ntk_prefix.training import Trainer, TrainState
from train import setup
from train.config import TrainConfig
from train.plan.shapes import abstract_batch
from train.sources import spec_of

__all__ = ["Compiled", "DoesNotFitError", "check_mesh", "compile_step", "program_text"]


class DoesNotFitError(Exception):
    """The compiler found no way to lay the step out in the device's memory.

    Args:
        needed: bytes that it would take, None where the compiler does not say.
        available: bytes that there are for programs.
    """

    def __init__(self, needed: int | None, available: int | None):
        super().__init__(f"needs {needed} of {available} bytes")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is known of a compiled step; all bytes are those of one device."""

    text: str
    """The program."""
    arguments: dict[str, int]
    """Bytes of weights (frozen), adapters (trained), optimizer with the step's number, and batch, without padding."""
    memory: dict[str, int]
    """What the compiler allots: argument, output, alias (output that takes an argument's place), temp, code."""
    flops: float
    """Of the compiler's cost analysis: loops count once, kernels of Pallas not at all."""
    bytes_accessed: float
    """Of main memory, the same."""
    seconds: dict[str, float]
    """To trace, to lower and to compile."""

    @property
    def total(self) -> int:
        """Bytes that the step takes of a device."""
        memory = self.memory
        return memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["code"]


def check_mesh(config: TrainConfig, model: Any, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Return where a run would lie on these devices.

    Raises:
        UsageError: devices that do not divide as the flags say, or a model that they do not divide.
    """
    if config.device.parallel == "pmap":
        raise expected("--parallel", "jit: a plan is of one program over a mesh", "pmap")
    placement = setup.placement_of(config, devices)
    if "mesh" not in placement:
        # also of one device: what is traced for a mesh knows what it is compiled for
        placement = {"mesh": jax.sharding.Mesh([devices[0]], ("data",))}
    shape = placement["mesh"].shape
    sharding.check_divides(model.config, fsdp=shape.get("fsdp", 1), tensor=shape.get("tensor", 1))
    return placement


def abstract_arguments(
    trainer: Trainer, model: Any, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[TrainState, Any, dict[str, jax.ShapeDtypeStruct]]:
    """Return the step's arguments (state, frozen, batch) as shapes that say where they lie."""
    mesh = trainer.mesh
    assert mesh is not None
    trained = nnx.state(model, trainer.wrt)
    state = jax.eval_shape(lambda t: TrainState(jnp.zeros((), jnp.int32), t, trainer.optimizer.init(t)), trained)
    rows = sharding.batch_sharding(mesh)

    def placed(tree: Any) -> Any:
        return jax.tree.map(_at, tree, sharding.tree_shardings(mesh, tree))

    return placed(state), placed(trainer.frozen(model)), {name: _at(each, rows) for name, each in batch.items()}


def _at(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def bytes_on_a_device(tree: Any) -> int:
    """Return what a device holds of arrays that are divided among devices."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_step(config: TrainConfig, model: Any, placement: Mapping[str, Any]) -> Compiled:
    """Compile one part of a step (all of it with ``accumulate`` 1) for the devices of a placement.

    Args:
        config: of the run.
        model: of :func:`train.plan.shapes.abstract_model`.
        placement: of :func:`check_mesh`.

    Raises:
        DoesNotFitError: the devices' memory is too small.
    """
    kind = spec_of(config.task).kind
    trainer = setup.trainer_of(config, kind, placement)
    rows = config.optim.batch_size // config.optim.accumulate
    state, frozen, batch = abstract_arguments(trainer, model, abstract_batch(config, kind, rows))
    platform = trainer.mesh.devices.flat[0].platform if trainer.mesh is not None else "cpu"
    begun = time.perf_counter()
    traced = trainer.program(model).trace(state, frozen, batch)
    after_trace = time.perf_counter()
    lowered = traced.lower(lowering_platforms=(platform,))
    after_lower = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(*out_of_memory(str(error))) from None
    done = time.perf_counter()
    text = program_text(lowered, compiled)
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    parts = {"argument": "argument", "output": "output", "alias": "alias", "temp": "temp", "code": "generated_code"}
    return Compiled(
        text=text,
        arguments={
            "weights": bytes_on_a_device(frozen),
            "adapters": bytes_on_a_device(state.trained),
            "optimizer": bytes_on_a_device((state.optimizer, state.step)),
            "batch": bytes_on_a_device(batch),
        },
        memory={name: int(getattr(stats, f"{of}_size_in_bytes")) for name, of in parts.items()},
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        seconds={
            "trace": after_trace - begun,
            "lower": after_lower - after_trace,
            "compile": done - after_lower,
        },
    )


def program_text(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> str:
    """Return the compiled program as text, written by the compiler itself where JAX cannot read what it has made.

    A compiler that is newer than JAX has instructions that JAX does not know: libtpu 0.0.52 fuses a collective and what
    runs beside it into an ``async-update`` of several operands on a v5p, at which JAX 0.10.2 ends. It is compiled again
    then, into a folder.
    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        return _last_program(Path(folder))


def _last_program(folder: Path) -> str:
    """Return the text of the program that a compiler has written into a folder after its last pass.

    Raises:
        UsageError: there is none, or several.
    """
    found = sorted(folder.glob("*after_optimizations_after_buffer_assignment.txt"))
    if len(found) != 1:
        raise expected(
            "libtpu", "the text of one compiled program", f"{len(found)} files of it",
            "Plan another topology, or with the JAX that this libtpu was made for",
        )  # fmt: skip
    return found[0].read_text()


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


_OUT_OF_MEMORY = (
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)
"""How versions of libtpu say it."""


def out_of_memory(message: str) -> tuple[int | None, int | None]:
    """Return what a compiler that ran out of memory says it would need at least, and what there is."""
    found = next((m for pattern in _OUT_OF_MEMORY if (m := re.search(pattern, message))), None)
    if found is None:
        return None, None
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
