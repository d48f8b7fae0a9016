"""What a signature says of shapes is executed in tests, of nested functions too, whose checks are made only once."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ntk_prefix.typing import Array, Float
from tests import check


def nested(result: Any) -> Callable[[Array, Array], Any]:
    """Return a function made anew at every call, as those inside of others are."""

    @jaxtyping.jaxtyped(typechecker=check)
    def inner(x: Float[Array, "n"], y: Float[Array, "n"]) -> Float[Array, "n"]:
        return x + y if result is None else result

    return inner


def test_a_nested_function_refuses_wrong_shapes_each_time_it_is_made() -> None:
    for size in (2, 3, 2):
        good = jnp.ones(size)
        np.testing.assert_array_equal(nested(None)(good, good), 2 * np.ones(size))
        for wrong in (jnp.ones(size + 1), jnp.ones((size, 1)), jnp.ones(size, int)):
            with pytest.raises(jaxtyping.TypeCheckError):
                nested(None)(good, wrong)
            with pytest.raises(jaxtyping.TypeCheckError):
                nested(wrong)(good, good)


def test_functions_of_one_name_with_other_annotations_have_checks_of_their_own() -> None:
    def made(axes: str) -> Callable[[Array], Array]:
        @jaxtyping.jaxtyped(typechecker=check)
        def inner(x: Float[Array, axes]) -> Array:
            return x

        return inner

    vector, matrix = made("n"), made("n m")
    vector(jnp.ones(2)), matrix(jnp.ones((2, 2)))
    for function, wrong in ((vector, jnp.ones((2, 2))), (matrix, jnp.ones(2))):
        with pytest.raises(jaxtyping.TypeCheckError):
            function(wrong)
