"""What a frozen model's attention layers see on real inputs: for calibration, and for prefixes made of text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.checks import expected
from ntk_prefix.models.attention import AttentionCore, AttentionKind, AttentionOptions
from ntk_prefix.models.run import Runnable
from ntk_prefix.models.window import seen_in_windows, windowed
from ntk_prefix.peft.sites import AttentionSite, attention_sites
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["LayerRecord", "record", "replaced_cores", "stand_in"]


class LayerRecord(NamedTuple):
    """The inputs and the output of one attention layer's core on one batch of whole sequences.

    ``mask`` says what each query saw: padding, causality and a window are in it. ``scores`` is what else attention was told
    of its scores: ``scale``, ``logits_soft_cap``, ``bias``, where they are not at their defaults.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    mask: Bool[Array, "B N T S"]
    output: Float[Array, "B T N H"]
    scores: Mapping[str, Any] = MappingProxyType({})

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.scores.get("scale") or self.query.shape[-1] ** -0.5

    @property
    def seen(self) -> Bool[Array, "B T"]:
        """Tokens that other tokens may see: all but the padding."""
        return self.mask.any(axis=(1, 2))

    def log_mass(self) -> Float[Array, "B T N"]:
        """Return ``lse``: the log of what the layer's own keys add up to, ``log sum_s exp(score_s)``."""
        groups = self.query.shape[2] // self.key.shape[2]
        scores = jnp.einsum("btnh,bsnh->bnts", self.query, jnp.repeat(self.key, groups, axis=2))
        scores = scores * self.scale
        if (cap := self.scores.get("logits_soft_cap")) is not None:
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(self.mask, scores + self.scores.get("bias", 0), -jnp.inf)
        return jax.nn.logsumexp(scores, axis=-1).transpose(0, 2, 1)


class _Recorder(AttentionCore):
    """Stands in the place of a core, and remembers."""

    whole: ClassVar[bool] = True

    def __init__(self, core: AttentionCore, remember: Callable[[LayerRecord], None]):
        self.core, self.remember = core, remember

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        window: int | None = None,
        leading: int = 0,
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        windows = {} if window is None else {"window": window, "leading": leading}
        core = self.core if window is None else functools.partial(windowed, self.core)
        output = core(query, key, value, **options, **windows)
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        said: dict[str, Any] = dict(options)
        mask, is_causal, first = said.pop("mask", None), said.pop("is_causal", False), said.pop("query_offset", 0)
        near = said.pop("local_window_size", None)
        whole = jnp.broadcast_to(True if mask is None else mask, shape)
        before, after = near if isinstance(near, tuple) else (near, near)
        older = first + jnp.arange(shape[2])[:, None] - jnp.arange(shape[3])[None]
        if is_causal:
            whole = whole & (older >= 0)[None, None]
        if near is not None:
            whole = whole & ((older <= before) & (older >= -after))[None, None]
        if window is not None:
            whole = whole & seen_in_windows(shape[2], window, leading)[None, None]
        self.remember(LayerRecord(query, key, value, whole, output, said))
        return output


def stand_in(layer: AttentionSite, least: int = 1) -> LayerRecord:
    """Return a record of made-up numbers with a layer's heads, of so many tokens at least.

    Of what is measured on it, the shapes are right.

    The numbers are there even while a program is traced, for a method measures with NumPy.
    """
    with jax.ensure_compile_time_eval():
        rows, tokens, dim = 2, max(8, -(-least // 2)), layer.head_dim
        heads = {"query": layer.num_heads, "key": layer.num_key_heads, "value": layer.num_key_heads}
        draw = np.random.default_rng(0)
        made = {name: jnp.asarray(draw.normal(size=(rows, tokens, n, dim)), jnp.float32) for name, n in heads.items()}
        mask = jnp.ones((rows, layer.num_heads, tokens, tokens), bool)
        kind: AttentionKind | None = getattr(layer, "kind", None)
        return LayerRecord(**made, mask=mask, output=made["query"], scores=kind.scores() if kind else {})


def record(
    model: Any, inputs: Mapping[str, Any], keep: Callable[[str, LayerRecord], Any] = lambda path, seen: seen
) -> dict[str, Any]:
    """Run the model once and return what each attention layer saw, by the layer's dotted path.

    Args:
        model: any with attention that :mod:`ntk_prefix.peft.sites` finds; it is left as it was.
        inputs: its keyword arguments, a small batch of real inputs.
        keep: what to keep of a layer, given its path and its :class:`LayerRecord` as soon as it has run; by default all
            of it, which is as much memory as the model has layers.

    Raises:
        ValueError: there is no attention layer.
    """
    records: dict[str, Any] = {}

    def remember(path: str) -> Callable[[LayerRecord], None]:
        return lambda seen: records.__setitem__(path, keep(path, seen))

    with replaced_cores(model, lambda path, core: _Recorder(core, remember(path))):
        model(**inputs)
    return records


@contextlib.contextmanager
def replaced_cores(model: Any, replacement: Callable[[str, AttentionCore], AttentionCore]) -> Iterator[None]:
    """Let each attention layer of a model attend with another core for a while, one layer after the other.

    Args:
        model: any with attention that :mod:`ntk_prefix.peft.sites` finds; it is left as it was.
        replacement: from a layer's dotted path and its core to the core in its place.

    Raises:
        UsageError: there is no attention layer.
    """
    layers = dict(attention_sites(model))
    if not layers:
        raise expected("model", "one with attention layers", f"{type(model).__name__} without any")
    cores = {path: layer.core for path, layer in layers.items()}
    # what a recomputed layer sees, or one in a loop, cannot be kept beyond it, and differs from layer to layer
    options = [(module, module.run) for _, module in nnx.iter_modules(model) if isinstance(module, Runnable)]
    try:
        for module, run in options:
            module.run = dataclasses.replace(run, remat=False, scan_layers=False)
        for path, layer in layers.items():
            layer.core = replacement(path, cores[path])
        yield
    finally:
        for path, layer in layers.items():
            layer.core = cores[path]
        for module, run in options:
            module.run = run
