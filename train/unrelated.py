"""Text that has nothing to do with a task: by how much a run makes its loss rise is what the model has forgotten.

Forgetting is the mean cross entropy per token on this text after training, less that of the model before, without its
adapter: a prefix that starts at random has not forgotten less for having begun badly. The texts, their order and their
tokens are the same for every run of a model. It is of decoders only; an encoder has no loss of language to rise.

As in the method comparison of Hugging Face's peft (``method_comparison/MetaMathQA``), but for the text: that takes the
first 100 pages of finewiki, 768 tokens of each, which are fetched over the network; here it is film reviews out of an
asset of ours, or a file, which may be those pages. A model may have seen such text before; the *rise* of its loss is
measured all the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ntk_prefix.artifacts import read_bytes
from ntk_prefix.checks import UsageError, expected
from train.assets import AssetError
from train.readers import ENDINGS, open_table
from train.sources import reviews

__all__ = ["NONE", "REVIEWS", "texts"]

REVIEWS, NONE = "reviews", "none"
"""What may stand in the place of a file: the film reviews of the asset, and nothing to be measured."""

LARGEST = 2**28
"""Bytes of a text file."""


def texts(source: str, rows: int) -> list[str]:
    """Return so many texts, spread evenly over what there is; fewer if there are not as many.

    Args:
        source: :data:`REVIEWS`; a .txt file, its texts parted by empty lines; or a table with a column "text".
        rows: how many.

    Raises:
        UsageError: no file, one of another form, or one without text.
        AssetError: the reviews cannot be fetched.
    """
    if source == REVIEWS:
        try:
            found = reviews("imdb")["train"]["text"]
        except AssetError as error:
            hint = f"give --unrelated a file of text, or {NONE} to measure no forgetting"
            raise AssetError(f"--unrelated: {str(error).rstrip('.')}; {hint}.") from None
    else:
        found = _of_file(Path(source).expanduser())
    found = [text for text in found if isinstance(text, str) and text.strip()]
    if not found:
        raise expected("--unrelated", "text", f"none in {source}")
    chosen = np.linspace(0, len(found), min(rows, len(found)), endpoint=False).astype(int)
    return [found[row] for row in chosen]


def _of_file(file: Path) -> list[str]:
    if not file.is_file():
        raise expected("--unrelated", f"{REVIEWS}, {NONE} or a file", repr(str(file)))
    if file.suffix != ".txt":
        if file.suffix not in ENDINGS:
            raise expected("--unrelated", f"a file that ends in .txt, {', '.join(ENDINGS)}", repr(file.name))
        return open_table(file).column("text")
    try:
        whole = read_bytes(file, LARGEST, "--unrelated").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"--unrelated: expected text in UTF-8, got other bytes in {file}.") from None
    return whole.replace("\r\n", "\n").split("\n\n")
