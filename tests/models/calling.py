"""A model's call as one program, compiled fast: most of the time of these tests would be LLVM's."""

import functools
from typing import Any

import jax
from flax import nnx

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick, static_argnums=0)
def _run(graph: Any, state: nnx.State, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    model = nnx.merge(graph, state)
    return model(*inputs, **options), nnx.state(model)


def call(model: Any, *inputs: Any, **options: Any) -> Any:
    """Return ``model(*inputs, **options)``; equal models share the program."""
    output, state = _run(*nnx.split(model), inputs, options)
    nnx.update(model, state)
    return output
