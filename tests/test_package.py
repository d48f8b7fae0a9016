"""``import ntk_prefix``: what comes with it, and what waits until it is named."""

import subprocess
import sys

import pytest

import ntk_prefix as npx

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
