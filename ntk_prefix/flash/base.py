"""What every backend of flash attention shares: its statistics, its gradients, and how it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ntk_prefix.typing import Array, Bool, Float

__all__ = ["BACKENDS", "Backend", "Flash", "Gradients", "Statistics"]


class Statistics(NamedTuple):
    """What a flash forward returns: ``output = softmax(scores) V`` and ``lse = maximum + log_sum``.

    ``exp(scores - maximum) / exp(log_sum)`` are probabilities at scores of any finite size. A row without any
    key (all masked, or S = 0) has ``maximum = -inf``, ``log_sum = 0`` and output 0. The output is in the
    accumulation dtype if the library gives it so (``xla``), for whoever merges to round once.
    """

    output: Float[Array, "B T N H"]
    maximum: Float[Array, "B N T"]
    log_sum: Float[Array, "B N T"]

    @property
    def lse(self) -> Float[Array, "B N T"]:
        """``logsumexp(scores)``, rounded: from ``|maximum| = 1e9`` on float32 loses all of ``log_sum``."""
        return self.maximum + self.log_sum


class Gradients(NamedTuple):
    """What a flash backward returns."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    bias: Float[Array, "#B #N #T #S"] | None


@dataclasses.dataclass(frozen=True)
class Flash:
    """One flash attention: what is static about it, and its two halves.

    ``scores = scale * query . key + bias``, minus infinity where ``mask`` is False or, if causal, where s >
    t.
    """

    implementation: str
    scale: float
    is_causal: bool = False

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        bias: Float[Array, "#B #N #T #S"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
    ) -> Statistics:
        """Return ``softmax(scores) V`` and the statistics of its rows."""
        return BACKENDS[self.implementation].forward(self, query, key, value, bias, mask)

    def backward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        bias: Float[Array, "#B #N #T #S"] | None,
        mask: Bool[Array, "#B #N #T #S"] | None,
        statistics: Statistics,
        d_output: Float[Array, "B T N H"],
    ) -> Gradients:
        """Return the gradients, given the statistics that the rows were *finally* normalized with.

        ``P = exp(scores - lse)``, ``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(dO * O))``.

        Args:
            query, key, value, bias, mask: as in :meth:`forward`.
            statistics: what the layer's output was made of. Handing in merged ones is the point: rows of P
                then sum to less than 1, and the gradients are those of the merged attention. ``maximum =
                +inf`` switches a row off.
            d_output: the cotangent of the layer's output.
        """
        return BACKENDS[self.implementation].backward(self, query, key, value, bias, mask, statistics, d_output)


class Backend(NamedTuple):
    """The two halves of one library, called as :class:`Flash` calls them, with itself as the first argument."""

    forward: Callable[..., Statistics]
    backward: Callable[..., Gradients]


BACKENDS: dict[str, Backend] = {}
"""By name."""
