"""A small random model that knows a few words, as a folder."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.formulas import CONFIGS, draw, write


def write_model(
    folder: Path, words: Sequence[str], special: Sequence[str] = (), kind: str = "llama_tied", **changes: int
) -> Path:
    """Write it with a tokenizer of these words, one token each, "[UNK]" among them; special ones are no text.

    ``changes`` are fields of its config.json.
    """
    config = {**CONFIGS[kind], "vocab_size": len(words), **changes}
    write(folder, config, draw(config))
    known = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    known.add_special_tokens([*special])
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    known.save(str(folder / "tokenizer.json"))
    return folder
