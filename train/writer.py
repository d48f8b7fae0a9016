"""A decoder that continues texts, with the tokenizer that it reads and writes them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix import models
from ntk_prefix.checks import expected
from train.prompts import prompt_ids
from train.tasks import ending_token

__all__ = ["Writer", "before_stop"]


class Writer:
    """A decoder that continues texts: one compiled program for all of about a length.

    Args:
        model: made with ``causal_lm``.
        tokenizer: the model's.
        sampling: how tokens are drawn.
        context: tokens of a text that are read, the last ones.
        stop: texts that a continuation ends before.
    """

    def __init__(
        self, model: models.Llama, tokenizer: Any, sampling: models.Sampling, context: int, stop: tuple[str, ...] = ()
    ):
        self.model, self.tokenizer, self.sampling, self.context, self.stop = model, tokenizer, sampling, context, stop
        self.end = ending_token(tokenizer)

    def __call__(self, texts: Sequence[str], samples: int, tokens: int, key: jax.Array) -> list[list[tuple[str, bool]]]:
        """Return continuations of each text, and whether each has ended: by the model, or before a stop text."""
        ids = [prompt_ids(self.tokenizer, text, self.context) for text in texts]
        for text, each in zip(texts, ids, strict=True):
            if not each:
                raise expected("prompt", "at least one token", repr(text))
        longest = max(map(len, ids))
        width = min(-(-longest // 64) * 64, max(self.context, longest))
        array, mask = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), np.int32)
        for row, each in enumerate(ids):
            array[row, width - len(each) :], mask[row, width - len(each) :] = each, 1
        options: dict[str, Any] = {"sampling": self.sampling, "key": key, "samples": samples, "eos_token_id": self.end}
        new = np.asarray(models.generate(self.model, jnp.asarray(array), jnp.asarray(mask), tokens, **options))
        return [[self._text(each.tolist(), own) for each in rows] for own, rows in zip(ids, new, strict=True)]

    def _text(self, ids: list[int], prompt: Sequence[int] = ()) -> tuple[str, bool]:
        ended = self.end in ids
        ids = ids[: ids.index(self.end)] if ended else ids
        # read behind the prompt's end, for some tokenizers leave out the blank that a text begins with
        before = self.tokenizer.decode([*prompt[-8:]])
        text = self.tokenizer.decode([*prompt[-8:], *ids])
        text = text.removeprefix(before) if text.startswith(before) else self.tokenizer.decode(ids)
        # the last token may be the first bytes of a character
        text, stopped = before_stop(text.rstrip("\ufffd"), self.stop)
        return text, ended or stopped


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return what stands before the first stop text, and whether there is one."""
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
