"""Methods that train weights of the model itself: all of them, or its biases."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flax import nnx

from ntk_prefix.peft.base import AdapterConfig, AdapterParam, widened

__all__ = ["BitFitConfig", "FullConfig"]


class _InPlaceConfig(AdapterConfig):
    in_place: ClassVar[bool] = True

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Make the chosen weights trainable, where they stand; narrow ones become float32."""
        for attribute, variable in list(vars(module).items()):
            if isinstance(variable, nnx.Param) and self.takes(attribute):
                setattr(module, attribute, AdapterParam(widened(variable[...])))
        return module

    def hosts(self, module: nnx.Module) -> bool:
        """Any module with weights of its own that the method takes."""
        return any(isinstance(v, nnx.Param) and self.takes(a) for a, v in vars(module).items())

    def takes(self, attribute: str) -> bool:
        """Return whether a weight of this name is trained."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(_InPlaceConfig):
    """Full fine-tuning: every weight whose module's path matches ``target``, all by default."""

    method: ClassVar[str] = "full"

    def takes(self, attribute: str) -> bool:
        """All of them."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(_InPlaceConfig):
    """Biases only, those of norms included.

    Source: Ben Zaken et al., arXiv 2106.10199.
    """

    method: ClassVar[str] = "bitfit"

    def takes(self, attribute: str) -> bool:
        """Biases."""
        return attribute == "bias"
