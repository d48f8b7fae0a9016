"""The empirical neural tangent kernel of any Flax model, computed by neural-tangents.

With theta the trainable parameters of a model F, and x_i, x_j two inputs,

    Theta_{(i,k),(j,l)} = < dF_k(x_i)/dtheta , dF_l(x_j)/dtheta >

It governs gradient descent on ``1/2 |F - y|^2``. For the stylized models of ``one_layer`` it is ``m H(W)``, where H is
what ``prefix_ntk`` returns.

neural-tangents orders a kernel [n1, n2, d, d] and its ``trace_axes`` take a *mean*. Here a kernel is [n1, d, n2, d] and
a trace is a sum. The two meet in one place, ``_our_layout``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen, nnx

from ntk_prefix.checks import check_count, check_finite, expected
from ntk_prefix.kernels import neural_tangents
from ntk_prefix.typing import Array, Float

__all__ = ["Implementation", "KernelFallbackWarning", "empirical_ntk"]

Implementation = Literal["auto", "jacobian", "vector_products", "structured", "neural_tangents"]

_NUMBERS = {"neural_tangents": 0, "jacobian": 1, "vector_products": 2, "structured": 3}
"""What neural-tangents calls its implementations; its 0 measures the other three and takes the cheapest."""


class KernelFallbackWarning(UserWarning):
    """Structured derivatives do not know this model; the slower Jacobian contraction was used."""


def empirical_ntk(
    model: nnx.Module | linen.Module,
    x1: Array,
    x2: Array | None = None,
    *,
    wrt: Any = nnx.Param,
    implementation: Implementation = "auto",
    vmap_axes: int | None = 0,
    trace_axes: int | Sequence[int] = (),
    diagonal_axes: int | Sequence[int] = (),
    batch_size: int | None = None,
) -> Float[Array, "..."]:
    """Empirical neural tangent kernel of a model with respect to some of its parameters.

        Theta_{(i,k),(j,l)} = sum_theta  dF_k(x_i)/dtheta  dF_l(x_j)/dtheta

    Args:
        model: called as ``model(x)``, [n, ...] -> [n, *out]. An ``nnx.Module``, or a bound Linen module,
            ``module.bind(variables)``. One that writes state as it runs (batch norm in training, dropout's counter, a
            recurrent carry) is evaluated from the state it has now, every time, and keeps it; with ``vmap_axes=0`` a row
            is a batch of its own there, so dropout masks the same entries of each.
        x1: first inputs, [n1, ...], of any dtype the model takes; floating point inputs must be finite.
        x2: second inputs, [n2, ...]. None means x1: the result is then symmetric to the last bit.
        wrt: the parameters that count: any nnx filter, or the name of a Linen collection ("params" if left alone).
        implementation: how it is computed; all agree to rounding. "structured": structured derivatives, the fastest by
            far where outputs are many and a parameter is used in one way (the fixed-value prefix); one used in several
            (the tied prefix) costs what its Jacobian costs; "auto": the same, and "jacobian" with a
            ``KernelFallbackWarning`` for a model it does not know; "jacobian": both Jacobians and their product. The
            plainest; memory n d times the number of parameters; "vector_products": no stored Jacobian with
            ``vmap_axes=None``, more forward passes; "neural_tangents": compiles all three and takes the fewest flops.
            Not under ``jax.jit``.
        vmap_axes: 0 if row i of the output depends on row i of the input only; None for models whose rows interact
            (batch norm in training, attention over the batch), which is slower. 0 for such a model is silently wrong.
        trace_axes: output axes (1, 2, .. or negative) to sum the diagonal over: ``sum_k Theta_{(i,k),(j,k)}``, no 1/d.
        diagonal_axes: output axes of which only the diagonal is kept, once: ``Theta_{(i,k),(j,k)}``.
        batch_size: rows of x1 and of x2 taken at a time, which bounds the memory. It need not divide n1 or n2. With
            x2=None only the blocks on and above the diagonal are computed.

    Returns:
        [n1, *out, n2, *out]; [n1, d, n2, d] for vectors. ``trace_axes`` are missing on both sides, ``diagonal_axes`` on
        the second: [n1, n2] and [n1, d, n2].

    Raises:
        TypeError: the model is not a Flax module, or is an unbound Linen module.
        ValueError: an input or parameter is not finite, ``wrt`` matches nothing, an option is unknown, the output is
            not one floating point array with a row for every input.
        ImportError: neural-tangents is missing or unsuitable.

    Numerics: the dtype of parameters and inputs; matrix products run in that dtype with JAX's default precision
    (on a GPU or TPU wrap the call in ``jax.default_matmul_precision("highest")``). Tracing structured derivatives takes
    seconds; the compiled program is kept and used again for the same model structure and shapes.

    Source: Jacot et al., arXiv 1806.07572; Novak et al., arXiv 2206.08720 (the implementations).
    """
    if implementation != "auto" and implementation not in _NUMBERS:
        known = ", ".join(["auto", *_NUMBERS])
        raise expected("implementation", f"one of {known}", repr(implementation))
    if vmap_axes not in (0, None):
        raise expected("vmap_axes", "0 (rows are independent) or None (they interact)", repr(vmap_axes))
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if batch_size is not None and vmap_axes is None:
        raise expected("batch_size", "None for rows that interact", batch_size, "Leave it out, or use vmap_axes=0")
    x1 = jnp.asarray(x1)
    x2 = None if x2 is None else jnp.asarray(x2)
    function, parameters, constants = _split(model, wrt)
    check_finite("the model's parameters", parameters)
    for name, inputs in (("x1", x1), ("x2", x2)):
        if inputs is not None:
            check_finite(name, inputs)

    outputs = [_output(function, parameters, constants, x) for x in (x1, x2) if x is not None]
    if outputs[0].shape[1:] != outputs[-1].shape[1:]:
        raise expected(
            "x2",
            f"outputs of the shape of the first, [n, {outputs[0].shape[1:]}]",
            outputs[-1].shape,
        )
    task = _Task(
        function=function,
        implementation=_NUMBERS["structured" if implementation == "auto" else implementation],
        vmap_axes=vmap_axes,
        trace_axes=_output_axes("trace_axes", trace_axes, outputs[0].ndim),
        diagonal_axes=_output_axes("diagonal_axes", diagonal_axes, outputs[0].ndim),
        output_shape=outputs[0].shape[1:],
    )
    if set(task.trace_axes) & set(task.diagonal_axes):
        raise expected(
            "trace_axes and diagonal_axes",
            "different axes",
            f"{trace_axes} and {diagonal_axes}",
        )
    try:
        return _blocks(task, parameters, constants, x1, x2, batch_size)
    except NotImplementedError as error:
        if implementation != "auto":
            raise
        warnings.warn(
            f'{error} Now using it, since implementation="auto"; it holds both Jacobians: mind batch_size.',
            KernelFallbackWarning,
            stacklevel=2,
        )
        task = dataclasses.replace(task, implementation=_NUMBERS["jacobian"])
        return _blocks(task, parameters, constants, x1, x2, batch_size)


# --------------------------------------------------------------------- The model as a pure function


@dataclasses.dataclass(frozen=True)
class _NnxFunction:
    """``F(parameters, constants, x)`` of an nnx model; hashable, so that ``jax.jit`` knows it again."""

    graph: nnx.GraphDef[Any]
    structure: Any

    def __call__(self, parameters: tuple[Array, ...], constants: Any, x: Array) -> Any:
        trainable = jax.tree.unflatten(self.structure, parameters)
        # what the model writes as it runs (statistics, counters, carries) goes to a copy: every evaluation starts from
        # the state that the model has now, and leaves it as it is
        return nnx.merge(self.graph, trainable, constants, copy=True)(x)


@dataclasses.dataclass(frozen=True)
class _LinenFunction:
    """``F(parameters, constants, x)`` of a Linen module."""

    module: linen.Module
    collection: str
    structure: Any

    def __call__(self, parameters: tuple[Array, ...], constants: Any, x: Array) -> Any:
        trainable = jax.tree.unflatten(self.structure, parameters)
        variables, rngs = constants
        output, _ = self.module.apply(
            {**variables, self.collection: trainable}, x, rngs=rngs, mutable=linen.DenyList(self.collection)
        )
        return output


_Function = _NnxFunction | _LinenFunction


def _split(model: object, wrt: Any) -> tuple[_Function, tuple[Array, ...], Any]:
    """Return the model as a pure function, its parameters that count, and all its other state."""
    constants: Any
    if isinstance(model, nnx.Module):
        graph, *states = nnx.split(model, wrt, ...)
        trainable, constants = states[0], states[1]
        parameters, structure = jax.tree.flatten(trainable)
        found = {type(value).__name__ for _, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)}
        function: _Function = _NnxFunction(graph, structure)
    elif isinstance(model, linen.Module):
        if model.scope is None:
            raise TypeError(
                f"model: expected a bound Linen module, got an unbound {type(model).__name__}. "
                "Use module.bind(variables), with the variables that module.init returned."
            )
        module, variables = model.unbind()
        collection = "params" if wrt is nnx.Param else wrt
        if not isinstance(collection, str):
            raise TypeError(f'wrt: expected the name of a Linen collection, such as "params", got {wrt!r}.')
        rngs = {name: stream.as_jax_rng() for name, stream in model.scope.rngs.items()}
        constants = {name: value for name, value in variables.items() if name != collection}, rngs
        parameters, structure = jax.tree.flatten(variables.get(collection, {}))
        found = set(variables)
        function = _LinenFunction(module, collection, structure)
    else:
        raise TypeError(
            f"model: expected a flax nnx.Module or a bound linen.Module, got {type(model).__name__}. For a plain "
            "function f(params, x) use ntk_prefix.kernels.neural_tangents.load().empirical_ntk_fn."
        )
    if not parameters:
        raise expected(
            "wrt",
            f"a filter that matches parameters of {type(model).__name__}",
            f"{wrt!r}, which matches none",
            f"The model has: {', '.join(sorted(found)) or 'no variables at all'}",
        )
    return function, tuple(parameters), constants


def _output(function: _Function, parameters: Any, constants: Any, x: Array) -> jax.ShapeDtypeStruct:
    """Shape of the model's output, without computing it."""
    output = jax.eval_shape(function, parameters, constants, x)
    if (
        not isinstance(output, jax.ShapeDtypeStruct)
        or output.shape[:1] != x.shape[:1]
        or not jnp.issubdtype(output.dtype, jnp.floating)
    ):
        raise expected(
            "model",
            f"model(x) to be one floating point array with {x.shape[0]} rows, one for each of x",
            output,
            "Wrap the model so that it returns the outputs whose kernel is meant",
        )
    return output


def _output_axes(name: str, axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes of the output counted from 0, without the row axis."""
    given = tuple(axes) if isinstance(axes, Sequence) and not isinstance(axes, str) else (axes,)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in given):
        raise expected(name, "whole numbers", repr(axes))
    canonical = tuple(axis + ndim if axis < 0 else axis for axis in given)
    if not all(1 <= axis < ndim for axis in canonical) or len(set(canonical)) < len(canonical):
        raise expected(
            name,
            f"different axes of the output from 1 to {ndim - 1} (0 is the row), or negative ones",
            axes,
        )
    return tuple(sorted(canonical))


# ----------------------------------------------------------------------- The kernel, block by block


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """Everything about a kernel but its numbers; hashable."""

    function: _Function
    implementation: int
    vmap_axes: int | None
    trace_axes: tuple[int, ...]
    diagonal_axes: tuple[int, ...]
    output_shape: tuple[int, ...]

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Where neural-tangents puts the first and the second argument's axes; and the transposed kernel, in our order.

        It zips the axes, (n1, n2, d, d), with traced ones missing and diagonal ones single.
        """
        first: list[int] = []
        second: list[int] = []
        paired: list[tuple[int, int]] = []
        position = 0
        for axis in range(len(self.output_shape) + 1):
            if axis in self.trace_axes:
                continue
            if axis in self.diagonal_axes:
                first.append(position)
                position += 1
                continue
            paired.append((len(first), len(second)))
            first.append(position)
            second.append(position + 1)
            position += 2
        transposed = list(range(position))
        for left, right in paired:
            transposed[left], transposed[len(first) + right] = len(first) + right, left
        return tuple(first), tuple(second), tuple(transposed)

    def transpose(self, kernel: Array) -> Array:
        """Return the kernel with its two arguments exchanged, in our layout."""
        return jnp.transpose(kernel, self.axes()[2])


def _our_layout(task: _Task, kernel: Array) -> Array:
    """neural-tangents' (n1, n2, d, d), traces being means, as our (n1, d, n2, d), traces being sums."""
    first, second, _ = task.axes()
    size = math.prod(task.output_shape[axis - 1] for axis in task.trace_axes)
    return size * jnp.transpose(kernel, first + second)


def _kernel_function(task: _Task, constants: Any) -> Callable[..., Array]:
    """neural-tangents' kernel of the model as a function of (x1, x2, parameters)."""
    return neural_tangents.load().empirical_ntk_fn(
        lambda trainable, x: task.function(trainable, constants, x),
        trace_axes=task.trace_axes,
        diagonal_axes=task.diagonal_axes,
        vmap_axes=task.vmap_axes,
        implementation=task.implementation,
    )


def _block(task: _Task, kernel_function: Callable[..., Array], parameters: Any, x1: Array, x2: Array | None) -> Array:
    """One block of the kernel."""
    kernel = _our_layout(task, kernel_function(x1, x2, parameters))
    # rounding differs on the two sides of the diagonal; what reads a kernel (eigh, Cholesky) reads one of them
    return (kernel + task.transpose(kernel)) / 2 if x2 is None else kernel


@functools.partial(jax.jit, static_argnums=0)
def _compiled_block(task: _Task, constants: Any, parameters: Any, x1: Array, x2: Array | None) -> Array:
    """One block of the kernel, in one program that is kept for the next call with the same task and shapes."""
    return _block(task, _kernel_function(task, constants), parameters, x1, x2)


def _blocks(task: _Task, parameters: Any, constants: Any, x1: Array, x2: Array | None, batch_size: int | None) -> Array:
    """Return the kernel, assembled from blocks of at most ``batch_size`` rows and columns."""
    if task.implementation == _NUMBERS["neural_tangents"]:
        # its own choice compiles and measures, which cannot be done on tracers, and is kept in the function
        block = functools.partial(_block, task, _kernel_function(task, constants), parameters)
    else:
        block = functools.partial(_compiled_block, task, constants, parameters)

    def cut(x: Array) -> list[Array]:
        size = min(batch_size or x.shape[0], x.shape[0])
        count = -(-x.shape[0] // size)
        # the last block repeats rows to be full, so that one program serves all; they are dropped below
        padded = x[jnp.minimum(jnp.arange(count * size), x.shape[0] - 1)] if count * size > x.shape[0] else x
        return [padded[start : start + size] for start in range(0, count * size, size)]

    lefts = cut(x1)
    columns = len(task.axes()[0])
    if x2 is None:
        rows: list[list[Array]] = [[] for _ in lefts]
        for i, left in enumerate(lefts):
            rows[i] = [task.transpose(rows[j][i]) for j in range(i)]
            rows[i] += [block(left, None if j == i else lefts[j]) for j in range(i, len(lefts))]
        n2 = x1.shape[0]
    else:
        rows = [[block(left, right) for right in cut(x2)] for left in lefts]
        n2 = x2.shape[0]
    whole = jnp.concatenate([jnp.concatenate(row, axis=columns) for row in rows], axis=0)
    return jax.lax.slice_in_dim(whole[: x1.shape[0]], 0, n2, axis=columns)
