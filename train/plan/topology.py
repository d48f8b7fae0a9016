"""The machines that a step can be compiled for without having one, and what their vendor says of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jax reads the environment when it is imported: nothing here imports it at the top
    import jax

__all__ = ["CHIPS", "ENVIRONMENT", "Chip", "Topology", "set_environment"]

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip that two processes could fight for
}
"""With these libtpu compiles where there is no TPU, and does not ask the network what machine this is. The accelerator's
type is looked at, and that is all: the topology that is asked for is what is compiled for. Several processes may compile at
once: there is no chip that one of them could hold."""

_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, in the vendor's figures.

    Args:
        memory: bytes of its main memory (HBM).
        flops: bfloat16 operations per second, at most.
        memory_bandwidth: bytes per second from main memory.
        link_bandwidth: bytes per second that it sends to its neighbors, over all links together; half of what is called
            bidirectional.
        slices: topologies that are offered.
        source: where the figures stand.
        options: what JAX wants to know beside the topology's name.
    """

    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]
    source: str
    options: tuple[tuple[str, str], ...] = ()


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        memory=32 * 2**30,
        flops=275e12,
        memory_bandwidth=1200e9,
        link_bandwidth=300e9,
        slices=_3D,
        source="https://cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433",
        # one device a chip, as JAX has it on the machine itself
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(
        memory=16 * 2**30,
        flops=197e12,
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        slices=_2D,
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        memory=95 * 2**30,
        flops=459e12,
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        slices=_3D,
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        memory=32 * 2**30,
        flops=918e12,
        memory_bandwidth=1600e9,
        link_bandwidth=400e9,
        slices=_2D,
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
}
"""By the name before a topology's colon. Links: v4 2,400, v5e 1,600, v5p 4,800 and v6e 3,200 Gbit/s per chip."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are laid out, such as ``v5e:4x4``.

    Raises:
        UsageError: a name that is not known.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse a name that is not known."""
        from ntk_prefix.checks import expected

        kind, _, layout = self.name.partition(":")
        if kind not in CHIPS or layout not in CHIPS[kind].slices:
            known = "; ".join(f"{kind}:{{{','.join(chip.slices)}}}" for kind, chip in CHIPS.items())
            raise expected("--topology", f"one of {known}", repr(self.name))

    @property
    def chip(self) -> Chip:
        """What one of them is."""
        return CHIPS[self.name.partition(":")[0]]

    @property
    def chips(self) -> int:
        """How many."""
        count = 1
        for side in self.name.partition(":")[2].split("x"):
            count *= int(side)
        return count

    def devices(self) -> Sequence[jax.Device]:
        """Return what JAX takes for the chips: a program can be compiled for them, and run on none.

        Raises:
            MissingPackageError: libtpu is not installed.
            UsageError: it does not know the topology.
        """
        from ntk_prefix.checks import MissingPackageError, expected

        if importlib.util.find_spec("libtpu") is None:
            raise MissingPackageError(
                "libtpu: expected this package, the compiler for TPU, got none of that name. "
                'pip install "ntk-prefix[tpu]", or: make tpu'
            )
        import jax
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=self.name, **dict(self.chip.options)
            ).devices
        except jax.errors.JaxRuntimeError as error:
            raise expected("--topology", "one that libtpu knows", f"{self.name}: {str(error)[:200]}") from None
        return found


def set_environment() -> None:
    """Make this process one that compiles for TPU; to be called before jax is imported."""
    os.environ.update(ENVIRONMENT)
