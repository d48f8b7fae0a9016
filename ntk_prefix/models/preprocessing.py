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

_SENTENCE_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_CONVERT = (
    "Write tokenizer.json: transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
)

_Token = str | dict[str, object] | None

_BERTS = (None, "BertTokenizer", "DistilBertTokenizer")


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
    """Return the tokenizer of a pretrained model.

    That is its tokenizer.json, a BERT's vocab.txt, the vocab.json and merges.txt of a GPT-2, RoBERTa or Qwen, or what a GGUF
    carries.

    Args:
        path: what :func:`ntk_prefix.models.from_pretrained` takes.

    Returns:
        The tokenizer as the file has it, with the truncation and padding that it may ask for; None where there is
        nothing of the sort, as beside a model of images.

    Raises:
        UsageError: a broken file, or a vocabulary that has no tokenizer.json beside it and is none of those.
        MissingPackageError: the package ``tokenizers`` is not installed.
    """
    path = local_files(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    if (path / "tokenizer.json").is_file():
        return _tokenizer_json(path / "tokenizer.json")
    if (path / "vocab.txt").is_file():
        return _word_pieces(path / "vocab.txt")
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _byte_pairs(path)
    if found := [name for name in (*_SENTENCE_PIECES, "vocab.json", "merges.txt") if (path / name).is_file()]:
        raise expected(
            str(path), "a tokenizer.json, a BERT's vocab.txt, or vocab.json with merges.txt", ", ".join(found), _CONVERT
        )
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
    if settings.tokenizer_class is not None and settings.tokenizer_class.removesuffix("Fast") not in _BERTS:
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


class _ByteLevelConfig(msgspec.Struct):
    """The fields of a byte-level tokenizer_config.json that say how text is cut."""

    tokenizer_class: str | None = None
    add_prefix_space: bool = False
    add_bos_token: bool = False
    bos_token: _Token = None
    cls_token: _Token = "<s>"
    sep_token: _Token = "</s>"
    added_tokens_decoder: dict[str, dict[str, object]] = {}


class _ModelType(msgspec.Struct):
    model_type: str | None = None


_BYTE_LEVEL = {
    "GPT2Tokenizer": ("gpt2",),
    "RobertaTokenizer": ("roberta",),
    "Qwen2Tokenizer": ("qwen2", "qwen3"),
}
"""Classes of transformers, and the models that have one where no file says so."""

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_pairs(folder: Path) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer from vocab.json and merges.txt, as transformers does."""
    with extra("models"):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    settings_file, config_file = folder / "tokenizer_config.json", folder / "config.json"
    settings = read_json(settings_file, _ByteLevelConfig) if settings_file.is_file() else _ByteLevelConfig()
    model_type = read_json(config_file, _ModelType).model_type if config_file.is_file() else None
    kind = (settings.tokenizer_class or "").removesuffix("Fast") or next(
        (name for name, types in _BYTE_LEVEL.items() if model_type in types), ""
    )
    if kind not in _BYTE_LEVEL:
        wanted = f"tokenizer_class one of {sorted(_BYTE_LEVEL)} beside vocab.json and merges.txt"
        raise expected(str(settings_file), wanted, kind or f"none, of a {model_type}", _CONVERT)
    vocabulary = read_json(folder / "vocab.json", dict[str, int])
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [
            (first, second) for first, second in (line.split(" ") for line in lines if line and line[:8] != "#version")
        ]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # tokenizers has no class of its own for this
        raise expected(str(folder / "merges.txt"), "merges of two tokens each, all in vocab.json", error) from None
    qwen, space = kind == "Qwen2Tokenizer", settings.add_prefix_space
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=not qwen)
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    added = {int(i): token for i, token in settings.added_tokens_decoder.items() if i.isdecimal()}
    for index, token in sorted(added.items()):
        flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        own = AddedToken(str(token.get("content")), special=bool(token.get("special")), **flags)
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([own])
        if tokenizer.token_to_id(own.content) != index:
            raise expected(
                f"{settings_file}: added_tokens_decoder", f"{own.content!r} to be token {index}", "another", _CONVERT
            )

    def special(name: str, token: _Token) -> tuple[str, int]:
        text = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if not isinstance(text, str) or index is None:
            raise expected(str(folder / "vocab.json"), f"the token {text!r} ({name})", "none")
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        return text, index

    if kind == "RobertaTokenizer":
        ends = special("sep_token", settings.sep_token), special("cls_token", settings.cls_token)
        tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=space)
    elif kind == "GPT2Tokenizer" and settings.add_bos_token:
        first, index = special("bos_token", settings.bos_token or "<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="bos $A", pair="bos $A bos $B", special_tokens=[{"id": "bos", "ids": [index], "tokens": [first]}]
        )
    return tokenizer
