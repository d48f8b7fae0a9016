"""Classify texts with an exported model: ``python predict.py "a gripping film" ["another" ...]``.

Beside this file: programs, each for a number of rows (``predict_1.bin``, ...), their weights, a tokenizer, and labels and
lengths in ``predictor.json``. Needs jax, safetensors and tokenizers alone. From Python: ``from predict import classify``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from safetensors.flax import load_file
from tokenizers import Tokenizer

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "predictor.json").read_text())
WEIGHTS = load_file(HERE / "weights.safetensors")
PROGRAMS = {
    int(file.stem.removeprefix("predict_")): jax.export.deserialize(bytearray(file.read_bytes()))
    for file in HERE.glob("predict_*.bin")
}


def probabilities(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the probabilities of the labels, [rows, labels], for arrays with any number of rows."""
    rows, found = len(next(iter(inputs.values()))), []
    fitting = [size for size in PROGRAMS if size >= rows]
    size = min(fitting) if fitting else max(PROGRAMS)
    for start in range(0, rows, size):
        part = {name: np.asarray(x[start : start + size]) for name, x in inputs.items()}
        short = size - len(next(iter(part.values())))
        part = {name: np.concatenate([x, np.repeat(x[:1], short, axis=0)]) for name, x in part.items()}
        found.append(np.asarray(PROGRAMS[size].call(WEIGHTS, part))[: size - short])
    return np.concatenate(found)


def tokens(texts: list[Any]) -> dict[str, np.ndarray]:
    """Return texts, or pairs of texts, as the program takes them."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_truncation(ABOUT["tokens"])
    tokenizer.enable_padding(length=ABOUT["tokens"])
    encoded = tokenizer.encode_batch(texts)
    columns = {
        "input_ids": [one.ids for one in encoded],
        "attention_mask": [one.attention_mask for one in encoded],
        "token_type_ids": [one.type_ids for one in encoded],
    }
    return {name: np.asarray(columns[name], np.int32) for name in ABOUT["inputs"]}


def classify(texts: list[Any]) -> list[tuple[str, float]]:
    """Return a label and its probability for each text, or pair of texts."""
    found = probabilities(tokens(list(texts)))
    return [(ABOUT["labels"][row.argmax()], float(row.max())) for row in found]


if __name__ == "__main__":
    if len(sys.argv) < 2 or ABOUT["tokens"] is None or ABOUT["pairs"]:
        sys.exit(__doc__ if len(sys.argv) < 2 else "From Python: probabilities(inputs), see predictor.json")
    for label, probability in classify(sys.argv[1:]):
        print(f"{label} {probability:.4f}")
