"""A decoder that continues texts, with the tokenizer that it reads and writes them by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix import models
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.models.formats import read_checkpoint
from ntk_prefix.models.loading import MODELS
from train.assets import model_path
from train.command import byte_progress
from train.prompts import prompt_ids
from train.tasks import ending_token

__all__ = ["Writer", "before_stop", "decoder", "load_decoder", "loaded", "text_model"]


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


def text_model(name: str, flag: str = "--model") -> tuple[Path, Any, bool]:
    """Return where a model's files are, its tokenizer, which neither pads nor cuts, and whether it is a decoder.

    Raises:
        UsageError: it has no tokenizer; ``flag`` is what named it.
    """
    path = model_path(name, flag)
    tokenizer = None if path is None else models.load_tokenizer(path)
    if path is None or tokenizer is None:
        raise expected(flag, "a model of text with a tokenizer", name)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    known = MODELS.get(str(read_checkpoint(path).config.get("model_type")))
    return path, tokenizer, known is not None and issubclass(known[1], models.Llama)


def decoder(name: str, flag: str = "--model") -> tuple[Path, Any]:
    """Return where a decoder's files are, and its tokenizer, which neither pads nor cuts.

    Raises:
        UsageError: it is none, or has none; ``flag`` is what named it.
    """
    path, tokenizer, decodes = text_model(name, flag)
    if not decodes:
        kind = read_checkpoint(path).config.get("model_type")
        raise expected(flag, "a decoder, such as smollm2", f"{name}, of model_type {kind!r}")
    return path, tokenizer


def load_decoder(name: str, flag: str = "--model") -> tuple[models.Llama, Any]:
    """Return a decoder of a name with its tokenizer, which neither pads nor cuts.

    Raises:
        UsageError: it is none, or has none; ``flag`` is what named it.
    """
    path, tokenizer = decoder(name, flag)
    return loaded(path, name, flag), tokenizer


def loaded(path: Path, name: str, flag: str = "--model") -> models.Llama:
    """Return the decoder of these files, showing how far it is.

    Raises:
        UsageError: files that cannot be read; ``flag`` and ``name`` are what named them.
    """
    with byte_progress(f"loading {name}") as progress:
        try:
            model = models.from_pretrained(path, task="causal-lm", progress=progress)
        except UsageError as error:
            raise UsageError(f"{flag} {name}: {error}") from None
    assert isinstance(model, models.Llama)
    return model
