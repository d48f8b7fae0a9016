"""Write ``head.npz`` anew: keys and queries of one head of a pretrained encoder, for the claim ``equivalence``.

    python -m theory.record_head

The head is MiniLM-L6's first of its fourth layer, chosen before anything was measured. Its keys are those of 1,024 tokens
of film reviews, which are the prefix, its queries those of 1,088 tokens of other reviews, drawn; scaled, so that scores are
plain products. Only these vectors are kept, in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ntk_prefix import models
from ntk_prefix.models.attention import AttentionCore
from ntk_prefix.typing import Array
from train.assets import asset
from train.sources import reviews

TARGET = Path(__file__).parent / "head.npz"
LAYER, HEAD = 3, 0
KEYS, QUERIES, TEXTS, LENGTH = 1024, 1088, 192, 48


class _Recorder(AttentionCore):
    """Keeps the queries and keys of its last call."""

    seen: ClassVar[dict[str, np.ndarray]] = {}

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        self.seen.update(query=np.asarray(query), key=np.asarray(key))
        return super().__call__(query, key, value, **options)


def main() -> None:
    """Run the encoder once, and keep what one head sees."""
    folder = asset("minilm")
    model: Any = models.from_pretrained(folder)
    layer = model.layers[LAYER].attention
    layer.core = _Recorder()
    texts = list(reviews("rotten_tomatoes")["train"]["text"])
    random = np.random.default_rng(0)
    chosen = [texts[i] for i in random.permutation(len(texts))[:TEXTS]]
    tokenizer: Any = models.load_tokenizer(folder)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(chosen)
    ids, mask = (jnp.asarray([getattr(text, name) for text in encoded]) for name in ("ids", "attention_mask"))
    model(ids, attention_mask=mask)
    half, kept = TEXTS // 2, np.asarray(mask, bool)
    keys = _Recorder.seen["key"][:half, :, HEAD][kept[:half]][:KEYS]
    queries = _Recorder.seen["query"][half:, :, HEAD][kept[half:]]
    queries = queries[np.sort(random.permutation(len(queries))[:QUERIES])]
    root = keys.shape[-1] ** -0.25
    np.savez_compressed(TARGET, keys=(keys * root).astype(np.float16), queries=(queries * root).astype(np.float16))
    print(f"{TARGET.name}: {len(keys)} keys and {len(queries)} queries of width {keys.shape[1]}")


if __name__ == "__main__":
    main()
