"""What every backend of flash attention shares: its statistics, its gradients, and how it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntk_prefix.checks import UsageError
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = [
    "BACKENDS",
    "Backend",
    "Flash",
    "Gradients",
    "Source",
    "Statistics",
    "lse_gradients",
    "problem",
    "target_platform",
]


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


class Source(NamedTuple):
    """Keys that queries are compared with; a key and value without a batch axis are shared by the batch.

    ``query_offset`` is a number known only at run time; one known before is static, see :class:`Flash`.
    """

    key: Float[Array, "*B S K H"]
    value: Float[Array, "*B S K H"]
    bias: Float[Array, "#B #N #T #S"] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    query_offset: Int[Array, ""] | None = None


class Gradients(NamedTuple):
    """What a flash backward returns."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    bias: Float[Array, "#B #N #T #S"] | None


@dataclasses.dataclass(frozen=True)
class Flash:
    """One flash attention: what is static about it, and its two halves.

    ``scores = cap(scale * query . key) + bias``, where ``cap(x) = logits_soft_cap * tanh(x / logits_soft_cap)``; minus
    infinity where ``mask`` is False and at keys s outside of what query t sees, ``t + query_offset - left <= s <= t +
    query_offset + right``.
    """

    implementation: str
    scale: float
    is_causal: bool = False
    query_offset: int = 0
    window: tuple[int | None, int | None] = (None, None)
    """(left, right), without an end where None; see :attr:`sees`."""
    logits_soft_cap: float | None = None

    @property
    def sees(self) -> tuple[int | None, int | None]:
        """How many keys a query sees before and after its own place, None is all: the window and causality in one."""
        return self.window[0], 0 if self.is_causal else self.window[1]

    def everywhere(self) -> Flash:
        """Return the same for keys that every query sees: those of a prefix."""
        return dataclasses.replace(self, is_causal=False, query_offset=0, window=(None, None))

    def problem(self, query: Float[Array, "B T N H"], source: Source) -> str | None:
        """Return why these arguments cannot be taken, wherever it is run; None if they can."""
        return BACKENDS[self.implementation].problem(self, query, source)

    def forward(self, query: Float[Array, "B T N H"], source: Source) -> Statistics:
        """Return ``softmax(scores) V`` and the statistics of its rows.

        Raises:
            UsageError: the library cannot take these arguments.
        """
        self._check(query, source)
        return BACKENDS[self.implementation].forward(self, query, source)

    def backward(
        self,
        query: Float[Array, "B T N H"],
        source: Source,
        statistics: Statistics,
        d_output: Float[Array, "B T N H"],
        d_lse: Float[Array, "B N T"] | None = None,
    ) -> Gradients:
        """Return the gradients, given the statistics that the rows were *finally* normalized with.

        ``P = exp(scores - lse)``, ``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(dO * O) + d_lse)``.

        Args:
            query, source: as in :meth:`forward`.
            statistics: what the layer's output was made of. Handing in merged ones is the point: rows of P
                then sum to less than 1, and the gradients are those of the merged attention. ``maximum =
                +inf`` switches a row off.
            d_output: the cotangent of the layer's output.
            d_lse: that of its log-sum-exp; None if nobody has looked at it.
        """
        self._check(query, source)
        return BACKENDS[self.implementation].backward(self, query, source, statistics, d_output, d_lse)

    def _check(self, query: Array, source: Source) -> None:
        if problem := self.problem(query, source):
            raise UsageError(problem)


class Backend(NamedTuple):
    """One library: its two halves and what stands against it, called as :class:`Flash` calls them, with itself first.

    ``problem`` looks at the arguments; ``unavailable``, at the machine and the versions, is asked only where nobody has
    named an implementation. Both return a sentence, or None. ``platform`` is the only one it runs on, None any;
    ``unproven`` says why it is taken where it is named alone, even where it runs.
    """

    forward: Callable[..., Statistics]
    backward: Callable[..., Gradients]
    problem: Callable[[Flash, Array, Source], str | None]
    unavailable: Callable[[Array], str | None]
    platform: str | None = None
    unproven: str | None = None

    def elsewhere(self) -> str | None:
        """Return that this is not its platform, in one sentence; None if it is."""
        if self.platform is None or self.platform == (here := target_platform()):
            return None
        return f"it runs on a {self.platform.upper()}, and this is a {here.upper()}"

    def not_here(self, query: Array) -> str | None:
        """Return why it does not run on this machine; None if it does."""
        return self.elsewhere() or self.unavailable(query)

    def not_chosen(self, query: Array) -> str | None:
        """Return why nobody gets it who has not named it."""
        return self.unproven or self.not_here(query)


BACKENDS: dict[str, Backend] = {}
"""By name, the one to be preferred first."""


def problem(flashes: Sequence[Flash], query: Array, sources: Sequence[Source]) -> str | None:
    """Return why one of these cannot take its source, wherever it is run; None if all can."""
    found = [flash.problem(query, source) for flash, source in zip(flashes, sources, strict=True)]
    return next(filter(None, found), None)


def lse_gradients(
    run: Callable[[Array, Array, Array], tuple[Array, ...]], source: Source, query: Array, d_lse: Float[Array, "B N T"]
) -> tuple[Array, ...]:
    """Return what a cotangent of the log-sum-exp adds, of a kernel whose backward takes none: the same kernel's answer.

    ``dS = P * d_lse`` is what it makes of V = 0, dO = 1 and O = -d_lse in one column of the head.

    Args:
        run: the backward of (value, output, d_output).
        source, query: as in :meth:`Flash.backward`.
        d_lse: rounded to the query's dtype.
    """
    column = jnp.zeros_like(query).at[..., 0].set(1)
    output = jnp.zeros_like(query).at[..., 0].set(-d_lse.transpose(0, 2, 1).astype(query.dtype))
    return run(jnp.zeros_like(source.value), output, column)


def target_platform() -> str:
    """Return what is compiled for, "cpu", "gpu" or "tpu": that of the mesh that is traced for, else the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()
