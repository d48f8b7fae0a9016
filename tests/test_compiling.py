"""What the suite does to JAX, so that tests do not depend on how many came before."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import pjit

from tests import compiling


@pytest.mark.skipif(not compiling.KNOWN, reason="another JAX, whose tables are not looked into")
def test_a_full_table_of_programs_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI failed in one order of its tests: the worker had 8,192 programs, and later ones were not remembered."""
    for name in ("_cpp_pjit_cache_fun_only", "_cpp_pjit_cache_explicit_attributes"):
        monkeypatch.setattr(pjit, name, type(getattr(pjit, name))(capacity=4))

    def remembered() -> int:
        program = jax.jit(lambda x: x + 1)
        program(jnp.ones(()))
        programs.append(program)
        return program._cache_size()

    programs: list = []
    assert remembered() == 1
    for _ in range(4):
        remembered()
    assert remembered() == 0  # full: what users of more than 8,192 programs see
    compiling.leave_room()
    assert remembered() == 1
