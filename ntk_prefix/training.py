"""One train step for everything: the one-layer model of the theory and the transformers of ``train``.

A ``Trainer`` splits a Flax NNX model into what is trained, by type (``wrt``), and what is not. What is trained is state:
copied once, donated to every step, checkpointed. What is frozen is an argument of the step: taken by reference, never
copied where it lies in the right place already, never donated; it gets no optimizer state and no gradient. The same loss
then runs in two ways that give the same numbers:

    jit     one program over a mesh: rows are divided over its axes "data" and "fsdp", weights over "fsdp", heads and
            widths over "tensor" (:mod:`ntk_prefix.sharding`)
    pmap    one program per device, gradients summed with ``psum``

The loss is a *sum* over the rows of a batch; ``reduction`` says what is descended: that sum (the theory's
L = 1/2 sum_i |F(x_i) - y_i|^2) or its mean over rows. Both are over the whole batch, never over one device's share.

The step runs the model in training mode (``model.train()``). What a layer draws there, such as dropout, is a function of
its key and of the step's number: no state to carry, and a run that goes on draws what an unbroken one would have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntk_prefix import sharding
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.typing import Array, Float

__all__ = ["Step", "TrainState", "Trainer", "half_squared_error"]

Batch = Any
"""A pytree of arrays whose leading axis is the rows of the batch."""


class TrainState(NamedTuple):
    """What changes in training: a pytree, so it can be saved, donated and scanned over."""

    step: Array
    trained: nnx.State
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step and the frozen weights that it is given: ``state, metrics = step(state, batch)``."""

    compiled: Any
    """The jitted function of (state, frozen, batch)."""
    frozen: nnx.State
    """Laid out on the devices."""
    replicas: bool
    """Whether metrics come once per device."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Return the next state and the metrics; the state given is donated."""
        state, metrics = self.compiled(state, self.frozen, batch)
        return state, jax.tree.map(lambda leaf: leaf[0], metrics) if self.replicas else metrics

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Return the lowered step, to look at its memory, cost or text; arguments may be ``jax.ShapeDtypeStruct``."""
        return self.compiled.lower(state, self.frozen, batch)

    def _cache_size(self) -> int:
        return int(self.compiled._cache_size())


def half_squared_error(model: Callable[[Array], Array], batch: tuple[Array, Array]) -> Float[Array, ""]:
    """Return the theory's loss: ``L = 1/2 sum_i |F(x_i) - y_i|^2`` over a batch (x, y) of [n, d] and [n, outputs]."""
    inputs, targets = batch
    return jnp.square(model(inputs) - targets).sum() / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """How a model is trained; holds no arrays.

    Args:
        loss: ``loss(model, batch)``, the sum of the losses of the batch's rows, a scalar.
        optimizer: any optax transformation.
        wrt: nnx filter of what is trained, e.g. ``nnx.Param`` or a subclass of it.
        reduction: "sum" descends the sum over rows, "mean" the mean.
        parallel: "jit" (a mesh, shardings) or "pmap" (a replica per device).
        mesh: devices of "jit", of all processes; rows are divided over all its axes but "tensor", weights and what an
            optimizer keeps of them over "fsdp" and "tensor". None is one device.
        devices: devices of "pmap"; None is all there are, those of other processes included.

    Raises:
        ValueError: an unknown way, a mesh with pmap or devices with jit; in ``step``, a batch that does not divide.

    Numerics: gradients of different ways and device counts differ by the order of one sum over devices; equal to a few
    roundings, which ``tests/test_training.py`` checks.
    """

    loss: Callable[[Any, Batch], Float[Array, ""]]
    optimizer: optax.GradientTransformation
    wrt: Any = nnx.Param
    reduction: Literal["sum", "mean"] = "mean"
    parallel: Literal["jit", "pmap"] = "jit"
    mesh: Mesh | None = None
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing."""
        if self.parallel not in ("jit", "pmap"):
            raise expected("parallel", '"jit" or "pmap"', repr(self.parallel))
        if self.reduction not in ("sum", "mean"):
            raise expected("reduction", '"sum" or "mean"', repr(self.reduction))
        if self.parallel == "pmap" and self.mesh is not None:
            raise UsageError('mesh: expected none with parallel="pmap", which takes `devices`.')
        if self.parallel == "jit" and self.devices is not None:
            raise UsageError('devices: expected none with parallel="jit", which takes a `mesh`.')
        if self.mesh is not None:
            object.__setattr__(self, "mesh", sharding.automatic(self.mesh))

    def init(self, model: nnx.Module) -> TrainState:
        """Return the state before the first step, laid out on the devices.

        Raises:
            ValueError: ``wrt`` selects nothing of the model.
        """
        trained = nnx.state(model, self.wrt)
        if not jax.tree.leaves(trained):
            raise expected(
                "wrt",
                "a filter that selects something to train",
                f"{self.wrt!r}, which matches nothing",
            )
        # copies: the model keeps its own arrays when the state's are donated
        trained = jax.tree.map(jnp.copy, trained)
        return self.lay_out(TrainState(jnp.zeros((), jnp.int32), trained, self.optimizer.init(trained)))

    def lay_out_frozen(self, model: nnx.Module) -> None:
        """Put the model's frozen weights over the mesh, in the model itself, so that there is one copy of them.

        Steps and models made of it afterwards share those arrays. Without a mesh nothing is moved: on one device
        weights lie where they should, and replicas of ``pmap`` have no place in a model.
        """
        if self.mesh is not None:
            nnx.update(model, self.lay_out(self.frozen(model)))

    def lay_out(self, tree: Any) -> Any:
        """Put a state, or a part of one, where the step wants it: once a device, or over the mesh."""
        if self.parallel == "pmap":
            devices = self._devices
            return jax.tree.map(lambda leaf: _replicate(leaf, devices), tree)
        if self.mesh is not None:
            return jax.tree.map(jax.device_put, tree, sharding.tree_shardings(self.mesh, tree))
        return tree

    def single(self, tree: Any) -> Any:
        """Return the opposite of :meth:`lay_out` for replicas: one of them; arrays over a mesh stay where they are."""
        if self.parallel == "pmap":
            return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], tree)
        return tree

    def place(self, batch: Batch) -> Batch:
        """Lay a batch out over the devices, rows divided among them; each process gives its own rows.

        Raises:
            ValueError: the number of rows does not divide by the number of devices.
        """
        if self.mesh is not None:
            shares = len(self.mesh.local_devices) // self.mesh.shape.get("tensor", 1)
        else:
            shares = 1 if self.parallel == "jit" else len(self._devices)
        rows = len(jax.tree.leaves(batch)[0])
        if rows % shares:
            raise expected(
                "batch",
                f"rows divisible by the {shares} devices",
                rows,
                f"Pad it to {-(-rows // shares) * shares} rows of zero loss, or drop {rows % shares}",
            )
        if self.parallel == "pmap":
            return jax.tree.map(lambda leaf: leaf.reshape(shares, rows // shares, *leaf.shape[1:]), batch)
        if self.mesh is not None:
            rows_lie = sharding.batch_sharding(self.mesh)
            return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(rows_lie, np.asarray(leaf)), batch)
        return batch

    def stepper(self, model: nnx.Module) -> Step:
        """Return the compiled step: ``state, metrics = step(state, trainer.place(batch))``.

        The state that goes in is donated; the model's frozen weights are laid out here, once, and shared. Metrics are
        scalars: ``loss`` (before the update, with the reduction applied), ``gradient_norm`` (where ``optax.MultiSteps``
        collects a batch's parts: of their mean so far), ``update_norm``, and ``finite``: whether the loss and every
        trained weight after the update are.
        """
        return Step(self.program(model), self.lay_out(self.frozen(model)), replicas=self.parallel == "pmap")

    def program(self, model: nnx.Module) -> Any:
        """Return the jitted step, ``(state, frozen, batch) -> (state, metrics)``; nothing is laid out.

        A model of ``jax.ShapeDtypeStruct`` is enough to lower and compile it.
        """
        update = self.update(model)
        if self.parallel == "pmap":
            # None, not a list of local devices: gradients are summed over those of all processes
            over_rows = functools.partial(update, axis="rows")
            return jax.pmap(over_rows, axis_name="rows", devices=self.devices, donate_argnums=0)
        mesh = self.mesh
        if mesh is None:
            return jax.jit(update, donate_argnums=0)

        def over_mesh(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
            with sharding.on(mesh):
                state, metrics = update(state, frozen, batch)
            # what goes out lies where it came in, so that the next step is the same program
            return jax.lax.with_sharding_constraint(state, sharding.tree_shardings(mesh, state)), metrics

        return jax.jit(over_mesh, donate_argnums=0)

    def frozen(self, model: nnx.Module) -> nnx.State:
        """Return what of a model is not trained, by reference: the second argument of :meth:`update`."""
        # Variables of its own around the same arrays: what is set on the model later is not seen here
        return jax.tree.map(lambda leaf: leaf, nnx.state(model, self.wrt, ...)[1])

    def update(self, model: nnx.Module) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
        """Return the step as a pure function, for a scan or a loop of one's own.

        Returns:
            ``(state, frozen, batch) -> (state, metrics)``, ``frozen`` being :meth:`frozen` of the model.
        """
        training = nnx.clone(model)  # shares the arrays
        training.train()
        graph = nnx.split(training, self.wrt, ...)[0]

        def update(
            state: TrainState, frozen: nnx.State, batch: Batch, axis: str | None = None
        ) -> tuple[TrainState, dict[str, Array]]:
            rows = len(jax.tree.leaves(batch)[0])

            def objective(trained: nnx.State) -> Float[Array, ""]:
                # copies of the Variables, not of the arrays: those made outside of the gradient's trace cannot be
                # written in it, which is what recomputation and dropout do
                model = nnx.merge(graph, trained, _with_draws_of(state.step, frozen), copy=True)
                return self.loss(model, batch)

            loss, gradients = jax.value_and_grad(objective)(state.trained)
            if axis is not None:
                loss, gradients = jax.lax.psum((loss, gradients), axis)
                rows *= jax.lax.axis_size(axis)
            if self.reduction == "mean":
                loss, gradients = jax.tree.map(lambda leaf: leaf / rows, (loss, gradients))
            changes, optimizer = self.optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, changes)
            metrics = {
                "loss": loss,
                "gradient_norm": optax.tree.norm(_accumulated(gradients, state.optimizer)),
                "update_norm": optax.tree.norm(changes),
                "finite": jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, trained))])),
            }
            return TrainState(state.step + 1, trained, optimizer), metrics

        return update

    def model(self, model: nnx.Module, state: TrainState) -> nnx.Module:
        """Return the model with the state's weights: a new module, which shares the arrays of what is frozen."""
        graph, *states = nnx.split(model, self.wrt, ...)
        frozen = states[1] if self.mesh is None else self.lay_out(states[1])
        return nnx.merge(graph, self.single(state.trained), frozen, copy=True)

    @property
    def _devices(self) -> tuple[jax.Device, ...]:
        return self.devices if self.devices is not None else tuple(jax.local_devices())


def _accumulated(gradients: Any, optimizer: optax.OptState) -> Any:
    """Return the mean gradient of a batch's parts so far, where ``optax.MultiSteps`` collects them; else what is given."""
    if not isinstance(optimizer, optax.MultiStepsState):
        return gradients
    parts = optimizer.mini_step + 1
    return jax.tree.map(lambda new, mean: mean + (new - mean) / parts, gradients, optimizer.acc_grads)


def _with_draws_of(step: Array, state: nnx.State) -> nnx.State:
    """Return a state whose random streams stand where this step begins: each may draw 1024 times in a step."""

    def at_step(variable: Any) -> Any:
        if not isinstance(variable, nnx.RngCount):
            return variable
        return variable.replace((1024 * step).astype(variable[...].dtype))

    return jax.tree.map(at_step, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _replicate(leaf: Array, devices: tuple[jax.Device, ...]) -> Array:
    """One copy a device, stacked along a leading axis sharded over them: what pmap takes without moving data."""
    mesh = Mesh(devices, ("rows",))
    stacked = jnp.broadcast_to(leaf[None], (len(devices), *leaf.shape))
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec("rows")))
