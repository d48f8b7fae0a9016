"""How a model is run: what is recomputed, what a token sees, where positions begin. None of it is a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from ntk_prefix.checks import check_count, expected

__all__ = ["REMAT_POLICIES", "RunOptions", "Runnable", "jit_reading"]

REMAT_POLICIES: Mapping[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
}
"""What of a layer is kept where the rest is recomputed: nothing; products with weights; all matrix products, scores too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a model is run; none of it is a weight, and each may be changed at any time.

    Args:
        remat: recompute each layer in the backward pass instead of keeping its activations; same numbers. True is "full",
            other policies (:data:`REMAT_POLICIES`) keep a part of them.
        scan_layers: run layers, which have to be alike, as a loop over one (:mod:`ntk_prefix.models.scan`): same numbers, and
            a deep model compiles in the time of one layer. With a cache they stand one after another in any case.
        window: tokens that a token of an encoder sees to each side; all if None.
        position_offset: added to all positions. Hugging Face's prefix tuning numbers the first token M.

    Raises:
        UsageError: an unknown policy, ``scan_layers`` that is neither True nor False, a window below 1 or an offset below 0.
    """

    remat: bool | str = False
    scan_layers: bool = False
    window: int | None = None
    position_offset: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.remat, bool) and self.remat not in REMAT_POLICIES:
            raise expected("remat", f"False, True or one of {sorted(REMAT_POLICIES)}", repr(self.remat))
        if not isinstance(self.scan_layers, bool):
            raise expected("scan_layers", "True or False", repr(self.scan_layers))
        if self.window is not None:  # to each side
            check_count("window", self.window)
        check_count("position_offset", self.position_offset, 0)


def _option(name: str) -> Any:
    """Return an attribute that reads and writes one of the run options."""

    def write(model: Any, value: Any) -> None:
        model.run = dataclasses.replace(model.run, **{name: value})

    return property(lambda model: getattr(model.run, name), write, doc=f"``run.{name}``, see :class:`RunOptions`.")


class Runnable:
    """What has run options, as one record ``run`` and as an attribute each: ``model.remat = True``."""

    run: RunOptions
    remat: bool | str = _option("remat")
    scan_layers: bool = _option("scan_layers")
    window: int | None = _option("window")
    position_offset: int = _option("position_offset")


def jit_reading(function: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    """Return ``function(model, *args)``, compiled, for a model that it only reads.

    ``nnx.jit`` also returns the model as it is after the call: a new copy of every weight, each time.

    Args:
        function: of a model and arrays. What it changes of the model is lost.
        donate: which argument may be overwritten, counted with the model as 0.
    """
    run = jax.jit(
        lambda graph, state, *args: function(nnx.merge(graph, state), *args),
        static_argnums=0,
        donate_argnums=() if donate is None else donate + 1,
    )
    return lambda model, *args: run(*nnx.split(model), *args)
