"""What all methods share: parameters that are trained by their type, configurations, and modules that can host adapters."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_prefix.checks import UsageError
from ntk_prefix.typing import Array, Float, Int

__all__ = ["AdapterConfig", "AdapterParam", "Calibration", "Host", "NonNegativeParam", "RestingParam", "gather_rows"]


class AdapterParam(nnx.LoRAParam):
    """A weight that is trained; ``wrt=AdapterParam`` is all that an optimizer or a train step has to know.

    A subclass of ``nnx.LoRAParam``, so fine-tuners that select by that type train and save it unchanged.
    """


class NonNegativeParam(AdapterParam):
    """A trained weight that must stay >= 0: :func:`ntk_prefix.peft.non_negative` projects it after each update."""


class RestingParam(nnx.Param):
    """A weight of an adapter that is not the active one: kept and saved, not trained."""


class Calibration(nnx.Variable):
    """Numbers measured once on real inputs, such as a whitening matrix: saved with the adapter, never trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method's configuration has.

    Args:
        target: regular expression that is searched in the dotted paths of modules, such as
            ``layers.0.attention.query``; only modules of the kind the method changes are looked at.
        train_head: also train the classifier's head, if the model has one; each adapter keeps a head of its own.
    """

    method: ClassVar[str]
    in_place: ClassVar[bool] = False
    """True if the method changes the model's own weights, so that it cannot be switched off or shared."""
    target: str = ""
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse a target that is no regular expression."""
        try:
            re.compile(self.target)
        except re.error as error:
            raise UsageError(f"expected a regular expression as target, got {self.target!r}: {error}") from error

    def selects(self, path: str, module: nnx.Module) -> bool:
        """Return whether the method changes this module."""
        return self.hosts(module) and re.search(self.target, path) is not None

    def hosts(self, module: nnx.Module) -> bool:
        """Return whether the module is of the kind that the method changes."""
        raise NotImplementedError

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module that stands in the place of ``module`` and hosts an adapter called ``name``."""
        raise NotImplementedError


class Host(nnx.Module):
    """A module that stands beside frozen weights and hosts adapters by name.

    Exactly one adapter is active, or none (then the module computes what the frozen model does), or ``rows`` names an
    adapter for each row of the batch.

    Attributes:
        adapters: name -> the adapter's weights.
        active: name of the active adapter, or None.
        rows: [B] indices into ``names``, -1 for no adapter; None outside :func:`ntk_prefix.peft.mixed`.
    """

    def __init__(self) -> None:
        self.adapters: Any = nnx.Dict()
        self.active: str | None = None
        self.rows: Int[Array, "B"] | None = nnx.data(None)
        self.names: tuple[str, ...] = ()

    def add(self, name: str, adapter: nnx.Module) -> None:
        """Host one more adapter.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.adapters:
            raise UsageError(f"expected a new adapter name, got {name!r}, which is there already: delete it first")
        self.adapters[name] = adapter
        self.names = (*self.names, name)

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self.adapters[name]
        self.names = tuple(other for other in self.names if other != name)
        self.active = None if self.active == name else self.active

    def current(self) -> Any:
        """Return the active adapter of this module, None if it has none under the active name."""
        if self.active is None or self.active not in self.adapters:
            return None
        return self.adapters[self.active]


def gather_rows(arrays: list[Array], rows: Int[Array, "B"]) -> Float[Array, "B ..."]:
    """Return for each row the array of its adapter, zeros where ``rows`` is -1.

    Raises:
        ValueError: the adapters are not of one shape.
    """
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise UsageError(f"expected adapters of one shape in a mixed batch, got {sorted(shapes)}: train them alike")
    return jnp.stack([*arrays, jnp.zeros_like(arrays[0])])[rows]


def stacked(factors: list[Any], rows: Int[Array, "B"]) -> Any:
    """As :func:`gather_rows`, for arrays and for low-rank pairs."""
    if len({jax.tree.structure(factor) for factor in factors}) > 1:
        raise UsageError("expected adapters of one shape in a mixed batch, got full and low rank: train them alike")
    return jax.tree.map(lambda *leaves: gather_rows(list(leaves), rows), *factors)
