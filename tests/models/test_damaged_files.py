"""Every kind of file that a model is read from, damaged: refused in one line that names it, soon and in little memory.

300 damaged files of each kind (:mod:`tests.fuzz`); what is read in spite of the damage has finite numbers only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors

from ntk_prefix import models
from ntk_prefix.models.formats import read_checkpoint
from tests.fuzz import damaged_bytes, damaged_json, fuzzed, read_whole, survives
from tests.models.formulas import CONFIGS, draw, write
from tests.models.test_loading import write_gguf, write_onnx

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**CONFIGS["bert"], **SMALL, "intermediate_size": 4, "max_position_embeddings": 6, "vocab_size": 7}
LLAMA = {
    **CONFIGS["llama_tied"], **SMALL, "intermediate_size": 4, "vocab_size": 7, "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DINO = {**CONFIGS["dinov2"], **SMALL, "num_attention_heads": 1, "image_size": 4, "patch_size": 2}


def weights(path: Path, task: str | None = None) -> Callable[[], Any]:
    """A whole load: what a model computes with."""
    return lambda: nnx.state(models.from_pretrained(path, task), nnx.Param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def replaced(folder: Path, name: str, config: dict[str, Any], shards: int = 1) -> Path:
    """A good folder, of which one file is damaged."""
    if not folder.is_dir():
        write(folder, config, draw(config), shards)
    return folder / name


@fuzzed
@given(content=damaged_json(BERT))
def test_config_json_of_bert(folder: Path, content: bytes) -> None:
    file = replaced(folder / "bert", "config.json", BERT)
    file.write_bytes(content)
    read_whole(file, weights(file.parent))


@fuzzed
@given(content=damaged_json({**LLAMA, "rope_scaling": LLAMA_3}))
def test_config_json_of_llama(folder: Path, content: bytes) -> None:
    file = replaced(folder / "llama", "config.json", LLAMA)
    file.write_bytes(content)
    read_whole(file, weights(file.parent, "causal-lm"))


@fuzzed
@given(content=damaged_json({**DINO, "image_size": [4, 4], "patch_size": [2, 2]}))
def test_config_json_of_a_vision_transformer(folder: Path, content: bytes) -> None:
    file = replaced(folder / "dinov2", "config.json", DINO)
    file.write_bytes(content)
    read_whole(file, weights(file.parent))


@pytest.fixture(scope="module")
def index(folder: Path) -> Any:
    file = replaced(folder / "shards", "model.safetensors.index.json", BERT, 2)
    return json.loads(file.read_text())


@fuzzed
@given(data=st.data())
def test_the_index_of_shards(folder: Path, index: Any, data: st.DataObject) -> None:
    file = folder / "shards" / "model.safetensors.index.json"
    file.write_bytes(data.draw(damaged_json(index)))
    read_whole(file, weights(file.parent))


@pytest.fixture(scope="module")
def safetensors(folder: Path) -> bytes:
    return replaced(folder / "weights", "model.safetensors", BERT).read_bytes()


@fuzzed
@given(data=st.data())
def test_safetensors(folder: Path, safetensors: bytes, data: st.DataObject) -> None:
    file = folder / "weights" / "model.safetensors"
    file.write_bytes(data.draw(damaged_bytes(safetensors)))
    read_whole(file, weights(file.parent))


TOKENS = ["<s>", "</s>", "Ġ", "a", "b", "ab", "Ġab"]


@pytest.fixture(scope="module")
def gguf(folder: Path) -> bytes:
    tokenizer = {
        "tokenizer_model": "gpt2", "tokenizer_pre": "llama-bpe", "token_list": TOKENS, "bos_token_id": 0,
        "eos_token_id": 1, "token_types": [3, 3, 1, 1, 1, 1, 1], "token_merges": ["a b", "Ġ ab"],
        "chat_template": "{{ messages }}",
    }  # fmt: skip
    return write_gguf(folder / "good.gguf", LLAMA, draw(LLAMA), tokenizer).read_bytes()


@fuzzed
@given(data=st.data())
def test_gguf(folder: Path, gguf: bytes, data: st.DataObject) -> None:
    """Half of the damage is done among the weights, the file's last bytes, half in its head, with the tokenizer."""
    head = data.draw(st.sampled_from([2048, len(gguf)]))
    file = folder / "damaged.gguf"
    file.write_bytes(data.draw(damaged_bytes(gguf, head=head)))
    if head == len(gguf):
        read_whole(file, weights(file, "causal-lm"))
        return
    with survives(file):
        models.gguf_tokenizer(file).encode("ab ab</s>")
        models.gguf_chat_template(file)
        read_checkpoint(file)


@pytest.fixture(scope="module")
def onnx(folder: Path) -> bytes:
    return write_onnx(folder / "good.onnx", DINO, draw(DINO)).read_bytes()


@fuzzed
@given(data=st.data())
def test_onnx(folder: Path, onnx: bytes, data: st.DataObject) -> None:
    file = folder / "damaged.onnx"
    file.write_bytes(data.draw(damaged_bytes(onnx, head=len(onnx))))
    read_whole(file, weights(file))


def tokenizer_json() -> Any:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b"), ("Ġ", "ab")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return json.loads(tokenizer.to_str())


@fuzzed
@given(content=damaged_json(tokenizer_json()))
def test_tokenizer_json(folder: Path, content: bytes) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(content)
    with survives(file):
        models.load_tokenizer(folder)


@fuzzed
@given(content=damaged_bytes("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nfilm\n##s\nö\n".encode()))
def test_vocab_txt(folder: Path, content: bytes) -> None:
    (folder / "words").mkdir(exist_ok=True)
    file = folder / "words" / "vocab.txt"
    file.write_bytes(content)
    with survives(file.parent):  # whether it is cased, another file says
        models.load_tokenizer(file.parent)


PREPROCESSOR = {
    "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2], "size": {"height": 8, "width": 8},
}  # fmt: skip


@fuzzed
@given(content=damaged_json(PREPROCESSOR))
def test_preprocessor_config_json(folder: Path, content: bytes) -> None:
    file = folder / "preprocessor_config.json"
    file.write_bytes(content)
    with survives(file):
        found = models.image_normalization(folder)
        assert found is None or np.isfinite(np.array(found)).all()
