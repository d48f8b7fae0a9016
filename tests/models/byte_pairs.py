"""A tiny byte-level vocabulary as files, without a tokenizer.json; knows neither side that reads it."""

import json
from pathlib import Path
from typing import Any

MERGES = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("1", "2"), ("e", "r"), ("low", "er"), ("Ġ", "Ġ")]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
TEXTS = ["low lower  12 512", "é\n\nit's LOWER", "a<|endoftext|>b"]


def characters() -> list[str]:
    """Return GPT-2's characters for the 256 bytes: those that can be seen stand for themselves."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return sorted(map(chr, seen)) + [chr(256 + i) for i in range(len(hidden))]


def write(folder: Path, tokenizer_class: str | None, **settings: Any) -> Path:
    tokens = [*SPECIAL, *characters(), *("".join(pair) for pair in MERGES)]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    own = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    added = {"5": {"content": "<|endoftext|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added} | own | settings))
    return folder
