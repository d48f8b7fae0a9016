"""Linear jaxprs as neural-tangents reads them: flat, single-output, each parameter used in one way.

Structured derivatives walk the linearization of a model equation by equation and know the structure of each one. What
``jax.linearize`` returns is rewritten for them here. No number changes:

1. wrappers (jit, checkpoint, custom derivatives) are opened, and ``split`` becomes slices;
2. a product with a transposed matrix (``x @ w.T``) becomes a product with the matrix, whose rows keep their structure;
3. a parameter goes through a copy where its structure does not pay: where it is used in ways of different structure
   (as key and as value), of which neural-tangents keeps what all share, mostly nothing: a dense m x m block for a prefix
   of m tokens, or an error; and where following the structure stores more than the Jacobian, which is what is stored
   behind a copy;
4. what does not depend on the parameters is computed, and what nothing depends on is dropped.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend.core
import jax.interpreters.ad
import jax.numpy as jnp
from jax import lax

__all__ = ["equation_jvp", "equation_vjp", "linear_jaxpr"]


def linear_jaxpr(
    pushforward: Callable[..., Any], primals_in: Any, get_structure: Callable[[Any, list[Any], int], Any]
) -> tuple[SimpleNamespace, list[Any]]:
    """Rewrite a linear map for structured derivatives.

    Args:
        pushforward: the map, as ``jax.linearize`` returns it.
        primals_in: trees of its inputs, of which shapes and dtypes count.
        get_structure: of one equation with respect to one operand, given all operands' avals: neural-tangents' rule.

    Returns:
        The program, and the values of its constants, which may be tracers.

    Raises:
        NotImplementedError: an equation has several outputs.
    """
    nested = jax.make_jaxpr(pushforward)(*jax.tree.map(_abstract, primals_in))
    flat = jax.make_jaxpr(functools.partial(_evaluate, nested.jaxpr, nested.consts))(*nested.in_avals)
    equations = _live(flat.jaxpr.eqns, flat.jaxpr.outvars)
    for equation in equations:
        if len(equation.outvars) > 1:
            raise NotImplementedError(
                f"structured derivatives expect primitives with one output, got {equation.primitive.name!r} with "
                f'{len(equation.outvars)}. Use implementation="jacobian" for this function.'
            )

    copied = _needs_copy(flat.jaxpr, equations, get_structure)
    if any(copied):
        before = flat

        def through_copies(*inputs: Any) -> list[Any]:
            chosen = [lax.copy_p.bind(x) if copy else x for x, copy in zip(inputs, copied, strict=True)]
            return _evaluate(before.jaxpr, before.consts, *chosen)

        flat = jax.make_jaxpr(through_copies)(*before.in_avals)

    # what does not depend on the inputs is a constant here, and is computed once: in `values`
    values = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    linear = set(flat.jaxpr.invars)
    equations = []
    for equation in _live(flat.jaxpr.eqns, flat.jaxpr.outvars):
        if any(not _is_literal(atom) and atom in linear for atom in equation.invars):
            linear.update(equation.outvars)
            equations.append(equation)
        else:
            operands = [atom.val if _is_literal(atom) else values[atom] for atom in equation.invars]
            values.update(zip(equation.outvars, _apply(equation.primitive, equation.params, operands), strict=True))
    # the four fields that neural-tangents reads; how a Jaxpr keeps its constants differs between versions of JAX
    program = SimpleNamespace(
        constvars=list(values), invars=flat.jaxpr.invars, outvars=flat.jaxpr.outvars, eqns=equations
    )
    return program, list(values.values())


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, jax.extend.core.Literal)


def _live(equations: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Return the equations that an output depends on: a dead one would cost, and could be one that has no rule."""
    needed = {atom for atom in outputs if not _is_literal(atom)}
    kept = []
    for equation in reversed(equations):
        if any(variable in needed for variable in equation.outvars):
            needed.update(atom for atom in equation.invars if not _is_literal(atom))
            kept.append(equation)
    return kept[::-1]


def _needs_copy(jaxpr: Any, equations: Sequence[Any], get_structure: Callable[..., Any]) -> list[bool]:
    """Which inputs are used in ways of different structure, or in ways that store more than their Jacobian."""
    outputs = sum(math.prod(atom.aval.shape) for atom in jaxpr.outvars)
    kinds: dict[Any, set[Any]] = {variable: set() for variable in jaxpr.invars}
    stored: dict[Any, int] = dict.fromkeys(jaxpr.invars, 0)
    for equation in equations:
        avals = [atom.aval for atom in equation.invars]
        result = equation.outvars[0].aval.shape
        for index, atom in enumerate(equation.invars):
            if _is_literal(atom) or atom not in kinds:
                continue
            structure = get_structure(equation, avals, index)
            diagonal = [
                (axis, axes[index]) for axis, axes in zip(structure.out_diagonal, structure.in_diagonal, strict=True)
            ]
            kinds[atom].add((frozenset(structure.in_trace), frozenset(diagonal)))
            rows = [
                size for axis, size in enumerate(result) if axis not in (*structure.out_trace, *structure.out_broadcast)
            ]
            inside = (*structure.in_trace, *(axis for _, axis in diagonal))
            columns = [size for axis, size in enumerate(atom.aval.shape) if axis not in inside]
            # df/dy and what is left of dy/dw
            stored[atom] += outputs * math.prod(result) + math.prod(rows) * math.prod(columns)
    for atom in jaxpr.outvars:
        if not _is_literal(atom) and atom in kinds:
            kinds[atom].add((frozenset(range(len(atom.aval.shape))), frozenset()))
    return [
        len(kinds[variable]) > 1 or stored[variable] > outputs * math.prod(variable.aval.shape)
        for variable in jaxpr.invars
    ]


# primitives that only wrap a program, and the parameter that holds it
_WRAPPERS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def _evaluate(jaxpr: Any, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """Run a program equation by equation, going into whatever only wraps another program."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    transposes: dict[Any, tuple[Any, Sequence[int]]] = {}

    def read(atom: Any) -> Any:
        return atom.val if _is_literal(atom) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        parameters = equation.params
        if equation.primitive is lax.transpose_p:
            transposes[equation.outvars[0]] = operands[0], parameters["permutation"]
        if equation.primitive is lax.dot_general_p:
            for index, atom in enumerate(equation.invars):
                if not _is_literal(atom) and atom in transposes:
                    operands[index], parameters = _untransposed(index, *transposes[atom], operands[index], parameters)
        outputs = _apply(equation.primitive, parameters, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _untransposed(
    index: int, source: Any, permutation: Sequence[int], transposed: Any, parameters: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Operand ``index`` of a dot_general before its transposition, and the parameters that then give the same product."""
    dimensions = [list(both) for both in parameters["dimension_numbers"]]
    contracted, batch = dimensions[0][index], dimensions[1][index]
    free = [permutation[axis] for axis in range(len(permutation)) if axis not in (*contracted, *batch)]
    if free != sorted(free):
        return transposed, parameters  # the free axes would come out in another order
    for both in dimensions:
        both[index] = tuple(permutation[axis] for axis in both[index])
    return source, {**parameters, "dimension_numbers": tuple(map(tuple, dimensions))}


def _apply(primitive: Any, parameters: dict[str, Any], operands: Sequence[Any]) -> Sequence[Any]:
    """Return the outputs of one equation, with wrappers opened and ``split`` as slices (one output each)."""
    if primitive.name in _WRAPPERS:
        inner = parameters[_WRAPPERS[primitive.name]]
        # a Jaxpr, or a ClosedJaxpr that holds one and its constants
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *operands)
    if primitive.name == "split":
        sizes, axis = parameters["sizes"], parameters["axis"]
        ends = itertools.accumulate(sizes)
        return [
            lax.slice_in_dim(operands[0], end - size, end, axis=axis) for size, end in zip(sizes, ends, strict=True)
        ]
    outputs = primitive.bind(*operands, **parameters)
    return outputs if primitive.multiple_results else [outputs]


def equation_jvp(original: Callable[..., Any], equation: Any, index: int, tangent: Any, *operands: Any) -> Any:
    """One linear equation applied to a tangent of one of its operands."""
    ad = jax.interpreters.ad
    if equation is None or equation.primitive in ad.primitive_jvps:
        return original(equation, index, tangent, *operands)
    # the tangent of a custom_vjp is known by its transpose only: transpose that once more
    output = equation.outvars[0].aval
    transposed = jax.linear_transpose(
        lambda cotangent: equation_vjp(equation, cotangent, *operands)[index],
        jax.ShapeDtypeStruct(output.shape, output.dtype),
    )
    return transposed(tangent)[0]


def equation_vjp(equation: Any, cotangent: Any, *operands: Any) -> Sequence[Any]:
    """Cotangents of one linear equation's operands; the equation None is the identity.

    An operand is a value, an ``UndefinedPrimal`` (linear in it), or a bare shape whose value does not matter.
    """
    if equation is None:
        return (cotangent,)
    ad = jax.interpreters.ad
    linear = [index for index, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    outputs: list[Any] = [None] * len(operands)
    if isinstance(cotangent, ad.Zero):
        for index in linear:
            outputs[index] = ad.Zero(operands[index].aval)
        return outputs

    known = [
        jnp.zeros(operand.shape, operand.dtype) if isinstance(operand, jax.core.ShapedArray) else operand
        for operand in operands
    ]

    def apply(*arguments: Any) -> Any:
        merged = list(known)
        for index, argument in zip(linear, arguments, strict=True):
            merged[index] = argument
        outputs = equation.primitive.bind(*merged, **equation.params)
        return outputs[0] if equation.primitive.multiple_results else outputs

    avals = [operands[index].aval for index in linear]
    transposed = jax.linear_transpose(apply, *[jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals])
    for index, value in zip(linear, transposed(cotangent), strict=True):
        outputs[index] = value
    return outputs
