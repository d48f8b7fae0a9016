"""What stands beside the weights in a model's folder and decides what its inputs are: tokenizer and image normalization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from ntk_prefix.artifacts import read_json
from ntk_prefix.checks import expected, extra
from ntk_prefix.models.formats import gguf_tokenizer, local_files

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ImageNormalization", "image_normalization", "load_tokenizer"]


# ------------------------------------------------------------------------------------------- images


class ImageNormalization(NamedTuple):
    """What a backbone wants of its pixels, ``(pixel / 255 - mean) / std``: one number per channel, in the order RGB."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Preprocessor(msgspec.Struct):
    """The fields of preprocessor_config.json that say what is done to a pixel; transformers' defaults."""

    do_normalize: bool | None = True
    do_rescale: bool | None = True
    rescale_factor: _Positive | None = None
    image_mean: float | list[float] | None = None
    image_std: _Positive | list[_Positive] | None = None


def image_normalization(path: str | Path) -> ImageNormalization | None:
    """Return how the pixels of a pretrained model's images are normalized, by its preprocessor_config.json.

    Args:
        path: what :func:`ntk_prefix.models.from_pretrained` takes.

    Returns:
        Mean and deviation per channel of pixels in [0, 1], whatever factor the file rescales by; None where the model
        says nothing: a file, or a folder without preprocessor_config.json.

    Raises:
        UsageError: a file that cannot be read, a number missing or not positive, or other than three channels.
    """
    file = local_files(path) / "preprocessor_config.json"
    if not file.is_file():
        return None
    found = read_json(file, _Preprocessor)
    mean, std = (0.0, 1.0) if found.do_normalize is False else (found.image_mean, found.image_std)
    if mean is None or std is None:
        raise expected(f"{file}: image_mean, image_std", "numbers", f"{mean}, {std}", 'Or "do_normalize": false')
    factor = 1.0 if found.do_rescale is False else found.rescale_factor or 1 / 255
    # in units of [0, 1]: pixel * factor = pixel / 255 * (255 factor)
    return ImageNormalization(*(_per_channel(file, values, 255 * factor) for values in (mean, std)))


def _per_channel(file: Path, values: float | list[float], unit: float) -> tuple[float, float, float]:
    channels = values if isinstance(values, list) else [values] * 3
    if len(channels) != 3:
        raise expected(f"{file}: image_mean, image_std", "three numbers each, for red, green and blue", values)
    red, green, blue = channels
    return red / unit, green / unit, blue / unit


# --------------------------------------------------------------------------------------- tokenizers

_FOREIGN_VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_CONVERT = (
    "Write tokenizer.json: transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
)

_Token = str | dict[str, object] | None


class _TokenizerConfig(msgspec.Struct):
    """The fields of a BERT's tokenizer_config.json that say how text is cut; transformers' defaults."""

    tokenizer_class: str | None = None
    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = True
    unk_token: _Token = "[UNK]"
    cls_token: _Token = "[CLS]"
    sep_token: _Token = "[SEP]"
    pad_token: _Token = "[PAD]"
    mask_token: _Token = "[MASK]"


def load_tokenizer(path: str | Path) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of a pretrained model: its tokenizer.json, a BERT's vocab.txt, or what a GGUF carries.

    Args:
        path: what :func:`ntk_prefix.models.from_pretrained` takes.

    Returns:
        The tokenizer as the file has it, with the truncation and padding that it may ask for; None where there is
        nothing of the sort, as beside a model of images.

    Raises:
        UsageError: a broken file, or a vocabulary that has no tokenizer.json beside it and is not a BERT's.
        MissingPackageError: the package ``tokenizers`` is not installed.
    """
    path = local_files(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    if (path / "tokenizer.json").is_file():
        return _tokenizer_json(path / "tokenizer.json")
    if (path / "vocab.txt").is_file():
        return _word_pieces(path / "vocab.txt")
    if found := [name for name in _FOREIGN_VOCABULARIES if (path / name).is_file()]:
        raise expected(str(path), "a tokenizer.json, or the vocab.txt of a BERT", ", ".join(found), _CONVERT)
    return None


def _tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    with extra("models"):
        from tokenizers import Tokenizer

    read_json(file, dict)  # tokenizers' own parser does not bound the nesting
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own for this
        raise expected(str(file), "a tokenizer", f"a file that is broken: {error}") from None


def _word_pieces(file: Path) -> tokenizers.Tokenizer:
    """Build BERT's tokenizer from its vocabulary, as transformers' ``BertTokenizerFast`` does."""
    with extra("models"):
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    settings_file = file.with_name("tokenizer_config.json")
    settings = read_json(settings_file, _TokenizerConfig) if settings_file.is_file() else _TokenizerConfig()
    if settings.tokenizer_class not in (None, "BertTokenizer", "BertTokenizerFast"):
        raise expected(str(settings_file), "a BertTokenizer beside a vocab.txt", settings.tokenizer_class, _CONVERT)
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise expected(str(file), "text in UTF-8, one token a line", f"a file that is broken: {error}") from None
    vocabulary = {token.removesuffix("\r"): index for index, token in enumerate(lines)}
    special = {}
    for name in ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"):
        token = getattr(settings, name)
        token = token.get("content") if isinstance(token, dict) else token
        if token not in vocabulary:
            if name in ("pad_token", "mask_token"):
                continue
            raise expected(str(file), f"the token {token!r} ({name}) among {len(lines)} lines", "none")
        special[name] = token
    lower = settings.do_lower_case
    capitals = any(token != token.lower() for token in vocabulary if token not in special.values() and token[:1] != "[")
    if lower is None and capitals:
        raise expected(
            f"{settings_file}: do_lower_case",
            "true or false, since vocab.txt has tokens with capital letters",
            "nothing",
            'Write {"do_lower_case": false} for a cased model',
        )
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.tokenize_chinese_chars is not False,
        strip_accents=settings.strip_accents,
        lowercase=lower is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    first, last = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    return tokenizer
