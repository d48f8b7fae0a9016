"""A classifier on a backbone, for sequences and images alike: it pools the hidden states and maps them to logits.

Some families' files bring a head of two layers: what stands before the linear map is a :class:`HeadTransform`, which
comes from the file and is frozen unless an adapter names it. A new head is the linear map alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx

from ntk_prefix.checks import check_rngs, expected
from ntk_prefix.models.backbone import Backbone, BackboneConfig, Output, Pooling
from ntk_prefix.models.elementwise import ACTIVATIONS
from ntk_prefix.models.run import Runnable, RunOptions
from ntk_prefix.models.vit import VitConfig
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int

__all__ = ["Classifier", "HeadTransform", "pooled_states"]


def pooled_states(pooling: Pooling) -> int:
    """Return how many states of D features a head reads."""
    return 1 + ("+" in pooling)


class HeadTransform(nnx.Module):
    """What stands before a head's linear map: ``norm(activation(dense(x)))``.

    Args:
        features: D.
        activation: a name of :data:`~ntk_prefix.models.elementwise.ACTIVATIONS`.
        use_bias: of the map.
        norm: makes the norm; none if None.
        rngs: for weights that a checkpoint will replace.
    """

    def __init__(
        self,
        features: int,
        activation: str,
        *,
        use_bias: bool = True,
        norm: Callable[[], nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.dense = nnx.Linear(features, features, use_bias=use_bias, rngs=rngs)
        self.norm = None if norm is None else norm()

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Return what the linear map reads."""
        x = ACTIVATIONS[self.activation](self.dense(x))
        return x if self.norm is None else cast(Callable[[Array], Array], self.norm)(x)


class Classifier(Runnable, nnx.Module):
    """A linear map on a pooled backbone, for sequences and images alike: logits [B, labels].

    Args:
        backbone: any of the three.
        num_labels: >= 1.
        pooling: "mean" over the tokens that are attended to, "cls" the first token, "last" the last one attended to; of
            images, "cls+mean" the first token and behind it the mean over patches (DINOv2's), "cls+distillation" the first
            two tokens, one behind the other (DeiT's).
        transform: what stands between the pooled state and the linear map; nothing if None.
        rngs: for the head.

    Raises:
        ValueError: an unknown pooling, or fewer than one label.

    Numerics: pooling and head are in float32 whatever the backbone computes in.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_labels: int,
        *,
        pooling: Pooling = "mean",
        transform: HeadTransform | None = None,
        rngs: nnx.Rngs,
    ):
        if pooling not in backbone.poolings:
            raise expected("pooling", f"one of {backbone.poolings}", repr(pooling))
        if num_labels < 1:
            raise expected("num_labels", "at least 1", num_labels)
        check_rngs(rngs)
        self.backbone = backbone
        self.pooling = pooling
        self.transform = transform
        # as small as transformers are initialized: the first loss is that of a guess
        init = nnx.initializers.normal(0.02)
        features = backbone.config.hidden_size * pooled_states(pooling)
        self.head = nnx.Linear(features, num_labels, kernel_init=init, rngs=rngs)

    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B height width channels"] | None = None,
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
        **named: Any,
    ) -> Output:
        """Return hidden states and logits.

        Args:
            inputs: what is classified; by the backbone's own name, ``input_ids`` or ``pixel_values``, as well.
            attention_mask: where there are tokens; all if None.
            named: all that the backbone takes, by its names.

        Raises:
            TypeError: what is classified is given twice, or not at all, or an argument is one that the backbone has not.
        """
        first = self.backbone.input_names[0]
        if inputs is not None:
            if first in named:
                raise TypeError(f"{first}: expected it once, got it as inputs too")
            named[first] = inputs
        if attention_mask is not None:
            named["attention_mask"] = attention_mask
        output = cast(Callable[..., Output], self.backbone)(**named)
        pooled = self._pool(output, attention_mask)
        logits = self.head(pooled if self.transform is None else self.transform(pooled))
        return dataclasses.replace(output, logits=logits, cache=None)

    def _pool(self, output: Output, mask: Array | None) -> Float[Array, "B D"]:
        leading = self.backbone.leading
        pooling = (leading.pooling if leading is not None else None) or self.pooling
        hidden = output.leading_states if pooling == "prefix" else output.last_hidden_state
        hidden = hidden.astype(accumulation_dtype(hidden.dtype))
        if pooling == "prefix" and pooled_states(self.pooling) > 1:
            raise expected(
                "pooling", "a head on one state beside leading rows", self.pooling, 'Load it with pooling="cls"'
            )
        if pooling in ("cls", "prefix"):
            return hidden[:, 0]
        if pooling == "last":
            if mask is None:
                return hidden[:, -1]
            last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1].astype(bool), axis=1)
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        if pooling == "cls+distillation":
            return hidden[:, :2].reshape(len(hidden), -1)
        if pooling == "cls+mean":
            patches = hidden[:, cast(VitConfig, self.config).own_tokens :]
            return jnp.concatenate([hidden[:, 0], patches.mean(axis=1)], axis=1)
        if mask is None:
            return hidden.mean(axis=1)
        weights = mask.astype(bool).astype(hidden.dtype)
        return jnp.einsum("btd,bt->bd", hidden, weights) / jnp.maximum(weights.sum(axis=1), 1)[:, None]

    # what a caller may ask or set on any model

    @property
    def config(self) -> BackboneConfig:
        """The backbone's sizes."""
        return self.backbone.config

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of what a call takes of a batch."""
        return self.backbone.input_names

    @property
    def run(self) -> RunOptions:
        """How the backbone is run."""
        return self.backbone.run

    @run.setter
    def run(self, options: RunOptions) -> None:
        self.backbone.run = options
