"""The three formats that weights come in, each read into one form: a Hugging Face checkpoint.

=====================  ==================================================================================
a folder               ``config.json`` and ``model.safetensors``, or shards with an index
``.gguf``              dequantized by the ``gguf`` package; hyper-parameters and tokenizer from the metadata
``.onnx``              a torch export of a vision transformer in DINOv2 layout, mapped by node names
=====================  ==================================================================================

Reading is lazy: a tensor is converted when it is asked for, so no second copy of a model is ever held.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ntk_prefix.checks import UsageError

if TYPE_CHECKING:
    import tokenizers
    from onnx import GraphProto

logger = logging.getLogger(__name__)

__all__ = ["Checkpoint", "gguf_chat_template", "gguf_tokenizer", "read_checkpoint"]


class Checkpoint(NamedTuple):
    """A checkpoint in Hugging Face's terms.

    Args:
        config: what config.json holds.
        tensors: name -> a function that reads it, in torch's layout ([out, in] of a linear map).
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], np.ndarray]]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or an ONNX file.

    Raises:
        FileNotFoundError: nothing there, or a folder that lacks a file.
        ValueError: not one of the three formats, or an architecture that is not built here.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a Hugging Face folder, a .gguf or an .onnx file, found nothing at {path}")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.suffix == ".onnx":
        return _read_onnx(path)
    raise UsageError(f"expected a Hugging Face folder, a .gguf or an .onnx file, got {path}")


# ---------------------------------------------------------------------------- Hugging Face's folder


def _read_folder(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    config = folder / "config.json"
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not config.exists() or not (single.exists() or index.exists()):
        raise FileNotFoundError(
            f"expected config.json and model.safetensors (or {index.name}) in {folder}, "
            f"found {sorted(f.name for f in folder.iterdir())}. Convert other weights with transformers' "
            "save_pretrained."
        )
    shards = [single]
    if not single.exists():
        shards = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"{index.name} names {shard.name}, which is not in {folder}")
        try:
            file = safe_open(shard, framework="np")
        except SafetensorError as error:
            raise UsageError(f"{shard}: expected a safetensors file, got one that is broken: {error}") from error
        tensors |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(_read_json(config), tensors)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}: expected JSON, got a file that is broken: {error}") from error


# --------------------------------------------------------------------------------------------- GGUF

_GGUF_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _gguf_metadata(path: Path) -> tuple[dict[str, Any], Any]:
    """Return a GGUF's key-value pairs and its tensors."""
    from gguf import GGUFReader

    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a .gguf file, found nothing at {path}")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise UsageError(f"{path}: expected a GGUF file, got one that is broken: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def _read_gguf(path: Path) -> Checkpoint:
    from gguf import dequantize

    metadata, all_tensors = _gguf_metadata(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UsageError(f"{path}: expected a GGUF of architecture 'llama', got {architecture!r}")
    stored = {name: metadata.get(f"llama.{key}") for name, key in _GGUF_CONFIG.items()}
    config = {name: value for name, value in stored.items() if value is not None}
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = {"rope_type": scaling}
    quantized = {tensor.name: tensor for tensor in all_tensors}
    if "token_embd.weight" in quantized:
        config["vocab_size"] = int(quantized["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in quantized
    config["attention_bias"] = "blk.0.attn_q.bias" in quantized
    config["model_type"] = architecture

    def read(name: str, heads: int) -> np.ndarray:
        values = dequantize(quantized[name].data, quantized[name].tensor_type)
        if not heads:
            return values
        # llama.cpp turns neighbors (2 j, 2 j + 1) where Hugging Face turns (j, j + H/2), and has sorted the rows so
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for name in quantized:
        module, _, parameter = name.rpartition(".")
        block = re.match(r"blk\.(\d+)\.", module)
        template = re.sub(r"^blk\.\d+\.", "blk.{i}.", module)
        number = block[1] if block else ""
        heads = {
            "blk.{i}.attn_q": config.get("num_attention_heads", 1),
            "blk.{i}.attn_k": config.get("num_key_value_heads", config.get("num_attention_heads", 1)),
        }.get(template, 0)
        known = _GGUF_NAMES.get(template, template).format(i=number)
        tensors[f"{known}.{parameter}"] = functools.partial(read, name, heads)
    return Checkpoint(config, tensors)


def gguf_chat_template(path: str | Path) -> str | None:
    """Return the chat template (Jinja) that a GGUF carries, or None."""
    return _gguf_metadata(Path(path))[0].get("tokenizer.chat_template")


def gguf_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """Rebuild the tokenizer that a GGUF carries: byte-level BPE, as GPT-2 and SmolLM have it.

    Control tokens and user-defined tokens are added tokens: they are found in text before anything is split. As in
    Hugging Face's, ``encode`` puts a token in front only if the metadata asks for it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another tokenizer than byte-level BPE, or a way of splitting text that is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    metadata, _ = _gguf_metadata(Path(path))
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    splits = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(llama3), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    if kind != "gpt2" or split not in splits:
        raise UsageError(
            f"{path}: expected a byte-level BPE tokenizer (tokenizer.ggml.model 'gpt2') that splits text as one of "
            f"{sorted(splits)}, got {kind!r} and {split!r}. Use the model's own tokenizer.json."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=split == "llama-bpe")
    )
    tokenizer.pre_tokenizer = splits[split]
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf's TokenType
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == control:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == user_defined:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if metadata.get("tokenizer.ggml.add_bos_token"):
        first = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", pair=f"{tokens[first]} $A $B", special_tokens=[(tokens[first], first)]
        )
    return tokenizer


# --------------------------------------------------------------------------------------------- ONNX


def _read_onnx(path: Path) -> Checkpoint:
    """Read a torch export, whose nodes are named by module: ``/backbone/encoder/layer.0/norm1/Add``."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.numpy_helper import to_array

    try:
        graph: GraphProto = onnx.load(path).graph
    except DecodeError as error:
        raise UsageError(f"{path}: expected an ONNX file, got one that is broken: {error}") from error
    weights = {tensor.name: functools.partial(to_array, tensor) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    constants = {
        node.output[0]: to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    patches = next((n for n in nodes if n.endswith("/embeddings/patch_embeddings/projection/Conv")), None)
    first = patches and patches.removesuffix("embeddings/patch_embeddings/projection/Conv")
    if not first or f"{first}encoder/layer.0/norm1/Add" not in nodes:
        raise UsageError(
            f"{path}: expected torch's export of a vision transformer in DINOv2 layout, with nodes named "
            f".../embeddings/patch_embeddings/projection/Conv and .../encoder/layer.0/norm1/Add, got "
            f"{graph.name!r} with {len(nodes)} nodes"
        )
    prefix = first.strip("/").replace("/", ".") + "." if first.strip("/") else ""

    def named(tensor: str) -> bool:
        return tensor.startswith(prefix) and "::" not in tensor

    if dropped := sorted(name for name in weights if not named(name) and "::" not in name):
        logger.info("%s: not used, outside of %s: %s", path, prefix, ", ".join(dropped))
    tensors: dict[str, Callable[[], np.ndarray]] = {
        name.removeprefix(prefix): read for name, read in weights.items() if named(name)
    }
    for name, node in nodes.items():
        # the exporter transposes the weights of linear maps and calls them onnx::MatMul_<n>
        if node.op_type == "MatMul" and name.startswith(first) and node.input[1] in weights:
            module = name.removeprefix(first).removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = functools.partial(_transposed, weights[node.input[1]])
    # and cuts the position embeddings into those of the class token and those of the grid
    here = {n.name: n for n in graph.node if re.fullmatch(rf"{first}embeddings/(Reshape|Concat)(_\d+)?", n.name)}
    parts = [
        weights[i]
        for op in ("Concat", "Reshape")
        for n in here.values()
        if n.op_type == op
        for i in n.input
        if i in weights and not named(i) and weights[i]().ndim == 3
    ]
    tensors["embeddings.position_embeddings"] = lambda: np.concatenate([part() for part in parts], axis=1)

    def constant(node: str) -> list[np.ndarray]:
        return [constants[i] for i in nodes[f"{first}{node}"].input if i in constants]

    kernel = weights[nodes[patches or ""].input[1]]()
    heads = constant("encoder/layer.0/attention/attention/Concat")[0].item()
    grid = round((tensors["embeddings.position_embeddings"]().shape[1] - 1) ** 0.5)
    config = {
        "model_type": "dinov2",
        "hidden_size": kernel.shape[0],
        "num_channels": kernel.shape[1],
        "patch_size": kernel.shape[2],
        "image_size": grid * kernel.shape[2],
        "num_hidden_layers": sum(bool(re.fullmatch(rf"{first}encoder/layer\.\d+/norm1/Add", n)) for n in nodes),
        "num_attention_heads": heads,
        "intermediate_size": tensors["encoder.layer.0.mlp.fc1.bias"]().shape[0],
        "layer_norm_eps": constant("encoder/layer.0/norm1/Add")[0].item(),
    }
    return Checkpoint(config, tensors)


def _transposed(read: Callable[[], np.ndarray]) -> np.ndarray:
    return read().T
