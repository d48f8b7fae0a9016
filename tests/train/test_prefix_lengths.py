"""How many tokens a trained state is, from the files of an adapter."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from train.prefix_lengths import HeadLength, head_lengths, in_words

CONFIG = {"methods": [{"method": "ntk_attention", "feature_map": "elu1", "train_k": True}]}


def adapter(folder: Path, config: dict = CONFIG) -> Path:
    """Two layers of two heads of width 4: of rank 4, nearly 1, exactly 2, and with a k of 0."""
    random = np.random.default_rng(0)
    z, k = random.normal(size=(2, 2, 4, 4)), random.uniform(0.5, 1, (2, 2, 4))
    z[0, 1] = np.outer(z[0, 1, 0], z[0, 1, 1]) + 1e-4 * random.normal(size=(4, 4))
    z[1, 0] = 9 * z[1, 0][:, :2] @ z[1, 1][:2]
    k[1, 1, 2] = 0
    name = "base_model.model.encoder.layer.{}.attention.self.{}"
    tensors = {name.format(layer, part): of[layer] for layer in range(2) for part, of in (("z", z), ("k", k))}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_are_the_rank_and_one_more_but_at_most_the_width(tmp_path: Path) -> None:
    found = head_lengths(adapter(tmp_path))
    assert [(head.layer, head.head, head.tokens, head.nearly) for head in found] == [
        (0, 0, 4, 4), (0, 1, 4, 2), (1, 0, 3, 3), (1, 1, 0, 0)
    ]  # fmt: skip
    said = in_words(found)
    assert said.startswith("3 of 4 heads are the state of a prefix: of 3 to 4 tokens, to 1 % of 2 to 4 (median 3);")
    assert "largest Z: layer 1 head 0," in said


def test_other_maps_and_a_frozen_denominator_have_no_answer(tmp_path: Path) -> None:
    for changed in ({"feature_map": "taylor"}, {"train_k": False}):
        assert head_lengths(adapter(tmp_path, {"methods": [CONFIG["methods"][0] | changed]})) == []
    assert head_lengths(adapter(tmp_path, {"methods": []})) == []


def test_no_prefix_at_all() -> None:
    assert in_words([HeadLength(0, 0, 0, 0, 1.0)]) == (
        "0 of 1 heads are the state of a prefix; largest Z: layer 0 head 0"
    )
