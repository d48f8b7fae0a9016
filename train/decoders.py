"""A decoder by its name, with its tokenizer: found and refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntk_prefix import models
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.models.formats import read_checkpoint
from ntk_prefix.models.loading import MODELS
from train.assets import model_path
from train.command import byte_progress

__all__ = ["decoder", "load_decoder", "loaded", "text_model"]


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
