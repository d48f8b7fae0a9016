"""``import ntk_prefix``: what comes with it, and what waits until it is named."""

import inspect
import pydoc
import subprocess
import sys

import pytest

import ntk_prefix as npx
from ntk_prefix import feature_maps

PROGRAM = """
import sys
import ntk_prefix as npx
assert not {"scipy.optimize", "scipy.linalg", "ntk_prefix.peft", "ntk_prefix.kernels"} & sys.modules.keys()
npx.peft
assert "ntk_prefix.peft" in sys.modules
import train.compress
assert not {"grain", "matplotlib", "orbax", "pyarrow", "sklearn"} & sys.modules.keys()
"""


def test_parts_are_imported_when_they_are_named() -> None:
    """All of them take as long as half of ``import jax, flax.nnx``; attention alone takes a twentieth.

    What reads rows, keeps checkpoints and draws takes 170 MiB, which are a prompt's while it is compressed.
    """
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_every_public_name_is_there() -> None:
    assert set(npx.__all__) <= set(dir(npx))
    for name in npx.__all__:
        assert getattr(npx, name) is not None
    with pytest.raises(AttributeError, match="module 'ntk_prefix' has no attribute 'nothing'"):
        npx.nothing  # noqa: B018


@pytest.mark.parametrize("part", [npx, npx.peft, npx.kernels, npx.models, feature_maps], ids=lambda part: part.__name__)
def test_help_is_short_and_names_every_class(part) -> None:
    """It prints all that classes inherit, 6,000 lines for ``npx.models``: ``__all__`` has none, the docstring names them."""
    assert pydoc.render_doc(part, renderer=pydoc.plaintext).count("\n") < 400
    assert not [name for name in part.__all__ if inspect.isclass(getattr(part, name))]
    classes = [
        name
        for name, member in vars(part).items()
        if inspect.isclass(member) and member.__module__.startswith("ntk_prefix.")
    ]
    assert classes
    assert not [name for name in classes if f"`{name}`" not in part.__doc__]
