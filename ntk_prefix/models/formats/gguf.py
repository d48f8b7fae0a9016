"""GGUF, the format of llama.cpp: weights of a decoder, quantized or not, with hyper-parameters and tokenizer beside them."""

from __future__ import annotations

import contextlib
import functools
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from ntk_prefix.artifacts import checked
from ntk_prefix.checks import UsageError, expected, extra
from ntk_prefix.models.formats.checkpoint import Checkpoint, StoredTensor

if TYPE_CHECKING:
    import tokenizers

__all__ = ["gguf_chat_template", "gguf_tokenizer", "read_gguf"]

LONGEST_ARRAY = 2**22
"""Entries of an array in the metadata; the longest that is usual is a vocabulary, of a few 100,000 tokens."""

_CONFIG = {
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
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Hugging Face's field -> the key, after the architecture."""

_CHANGES = (
    "attention.scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
    "rope.scaling.attn_factor",
    "expert_count",
)
"""Keys that change what a model computes, in ways that are not built here."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_GEMMA_NAMES = {
    **_NAMES,
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}


class _Family(NamedTuple):
    """What llama.cpp does to one architecture's checkpoints.

    Args:
        model_type: Hugging Face's.
        names: of its modules.
        neighbors: rotary pairs are (2 j, 2 j + 1), and the rows of queries and keys are sorted so.
        whole_norms: 1 is added to the weights of norms.
        wide: layers of the model whose scores are scaled by ``(D / N)^(-1/2)``; the file does not say so.
    """

    model_type: str
    names: dict[str, str] = _NAMES
    neighbors: bool = False
    whole_norms: bool = False
    wide: int = 0


_FAMILIES = {
    "llama": _Family("llama", neighbors=True),
    "smollm3": _Family("smollm3", neighbors=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "gemma2": _Family("gemma2", _GEMMA_NAMES, whole_norms=True, wide=46),
    "gemma3": _Family("gemma3_text", _GEMMA_NAMES, whole_norms=True, wide=62),
}
"""By llama.cpp's name of the architecture."""


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    """Call the gguf package within it: what it raises about a broken file becomes one line."""
    try:
        with np.errstate(all="ignore"):
            yield
    except UsageError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError, RecursionError) as error:
        raise expected(path, "a GGUF file", f"one that is broken: {error}") from None


class _File:
    """An opened GGUF: metadata and tensors."""

    def __init__(self, path: Path):
        with extra("models"):
            from gguf import GGUFReader

        class Reader(GGUFReader):
            """The package's, which takes what lies beyond the end of a file for nothing, and counts on."""

            def _get(self, offset: Any, dtype: Any, count: Any = 1, *args: Any, **options: Any) -> Any:
                if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.size:
                    raise ValueError("it is cut short")
                return super()._get(offset, dtype, count, *args, **options)

            def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
                array = 9  # gguf's GGUFValueType
                if raw_type == array:
                    kind, length = self._get(orig_offs, np.uint32)[0], self._get(orig_offs + 4, np.uint64)[0]
                    if kind == array or length > LONGEST_ARRAY:
                        raise ValueError(f"an array of {length} entries of type {kind} in its metadata")
                return super()._get_field_parts(orig_offs, raw_type)

        if not path.is_file():
            raise FileNotFoundError(f"expected a .gguf file, found nothing at {path}")
        self.path = path
        with _mapped(path):
            self._reader = Reader(path)
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, kind: Any = Any, default: Any = None) -> Any:
        """Return a value of the metadata, checked against a type; the default if it is not there."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        with _mapped(self.path):
            value = field.contents()
        return checked(value, kind, f"{self.path}: {key}")


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        UsageError: a broken file, or an architecture that is not built here.
    """
    file = _File(path)
    # first: only the first part says what it is a part of
    if (parts := file.get("split.count", int, 1)) > 1:
        way = "llama-gguf-split --merge FIRST-PART NEW-FILE joins them"
        raise expected(str(path), "a whole model", f"one of {parts} parts", way)
    architecture = file.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise expected(
            path,
            f"a GGUF of an architecture among {sorted(_FAMILIES)}",
            repr(architecture),
            "Take the folder that it was made from, if its model_type is one of ours",
        )
    family = _FAMILIES[architecture]
    if changes := {key: value for key in _CHANGES if (value := file.get(f"{architecture}.{key}"))}:
        raise expected(str(path), f"a plain {architecture}", f"one with {changes}")
    stored = {name: file.get(f"{architecture}.{key}") for name, key in _CONFIG.items()}
    config = {name: value for name, value in stored.items() if value is not None}
    if "rms_norm_eps" not in config:  # Hugging Face has a default for it, llama.cpp has not
        raise expected(f"{path}: {architecture}.{_CONFIG['rms_norm_eps']}", "a number", "none")
    heads = config.get("num_attention_heads")
    if (scaling := file.get(f"{architecture}.rope.scaling.type", default="none")) != "none":
        keys = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}
        given = {ours: file.get(f"{architecture}.rope.scaling.{theirs}") for ours, theirs in keys.items()}
        config["rope_scaling"] = {"rope_type": scaling, **given}
    turned = file.get(f"{architecture}.rope.dimension_count", int | None)
    if turned and isinstance(heads, int) and heads and isinstance(config.get("hidden_size"), int):
        config["partial_rotary_factor"] = turned / (config.get("head_dim") or config["hidden_size"] // heads or 1)
    tensors = _tensors(file, family, heads, config)
    if "model.embed_tokens.weight" in tensors:
        config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    config["model_type"] = family.model_type
    if family.whole_norms:
        config["norm_offset"] = 0.0
        width, wide = config.get("hidden_size"), config.get("num_hidden_layers") == family.wide
        if wide and isinstance(heads, int) and heads and isinstance(width, int):
            config["query_pre_attn_scalar"] = width / heads
        else:
            config["query_pre_attn_scalar"] = config.get("head_dim")
    if (factors := tensors.pop("rope_freqs.weight", None)) is not None:
        # Llama 3.1's scaling of the frequencies, as llama.cpp keeps it
        config["rope_factors"] = factors.read().tolist()
    return Checkpoint(path, path, config, tensors)


def _tensors(file: _File, family: _Family, heads: Any, config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Return a GGUF's tensors by Hugging Face's names."""
    from gguf import GGMLQuantizationType

    kinds = GGMLQuantizationType
    integers = {kinds[f"I{bits}"] for bits in (8, 16, 32, 64)}
    numbers = {kinds.F16: np.float16, kinds.BF16: ml_dtypes.bfloat16}
    found: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        module, _, parameter = name.rpartition(".")
        block = re.match(r"blk\.(\d+)\.", module)
        template = re.sub(r"^blk\.\d+\.", "blk.{i}.", module)
        sorted_rows = {
            "blk.{i}.attn_q": heads,
            "blk.{i}.attn_k": config.get("num_key_value_heads") or heads,
        }
        groups = sorted_rows.get(template) if family.neighbors else None
        known = family.names.get(template, template).replace("{i}", block[1] if block else "")
        kind = tensor.tensor_type
        found[f"{known}.{parameter}"] = StoredTensor(
            file.path,
            name,
            tuple(int(size) for size in reversed(tensor.shape)),
            kind.name,
            None if kind in integers else np.dtype(numbers.get(kind, np.float32)),
            functools.partial(_rows, file.path, tensor, groups),
        )
    return found


def _rows(path: Path, tensor: Any, groups: int | None, bounds: Iterable[slice]) -> Iterator[np.ndarray]:
    """Yield rows of a tensor, in float32.

    Args:
        path: of the file.
        tensor: the package's.
        groups: heads of a map onto queries or keys, whose rows are in another order; None of any other map.
        bounds: of rows.
    """
    from gguf import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    for rows in bounds:
        with _mapped(path):
            picked: Any = rows
            if groups:
                # llama.cpp turns neighbors (2 j, 2 j + 1) where Hugging Face turns (j, j + H/2), and has sorted the rows so
                order = np.arange(shape[0]).reshape(groups, -1, 2).swapaxes(1, 2).ravel()
                picked = order[rows]
            stored = tensor.data.reshape(shape[0], -1)[picked]
            # blocks of a quantized tensor are whole within a row, so all rows may be one: the package takes 16 at a time
            values = dequantize(stored.reshape(1, -1), tensor.tensor_type).reshape(-1, *shape[1:])
        yield values
    _forget(tensor.data)


def _forget(values: Any) -> None:
    """Give back the pages of a mapped file that were looked at, where the system can: they count as this process' memory."""
    while isinstance(values, np.ndarray):
        values = values.base
    if isinstance(values, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        values.madvise(mmap.MADV_DONTNEED)


def gguf_chat_template(path: str | Path) -> str | None:
    """Return the chat template (Jinja) that a GGUF carries, or None."""
    return _File(Path(path)).get("tokenizer.chat_template", str | None)


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before any merge."""

_LIKE_LLAMA_3 = {"llama-bpe", "llama3", "llama-v3"}
"""llama.cpp's words for one way of splitting, which also begins every text with BOS unless the file says otherwise."""


def gguf_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """Rebuild the tokenizer that a GGUF carries: byte-level BPE, as GPT-2, SmolLM and Llama 3 have it.

    Control tokens and user-defined tokens are added tokens: they are found in text before anything is split. ``encode``
    puts a token in front and at the end as llama.cpp does: where the metadata asks for it, and in front for Llama 3's way
    of splitting unless the metadata says no.

    Raises:
        FileNotFoundError: no such file.
        UsageError: a broken file, another tokenizer than byte-level BPE, or a way of splitting text that is not known
            here.
    """
    with extra("models"):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    file = _File(Path(path))
    kind, split = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", default="default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits: dict[Any, Any] = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        **dict.fromkeys(
            _LIKE_LLAMA_3,
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
    }
    if kind != "gpt2" or not isinstance(split, str) or split not in splits:
        raise expected(
            path,
            f"a byte-level BPE tokenizer (tokenizer.ggml.model 'gpt2') that splits text as one of {sorted(splits)}",
            f"{kind!r} and {split!r}",
            "Use the model's own tokenizer.json",
        )
    tokens: list[str] = file.get("tokenizer.ggml.tokens", list[str], [])
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list[str], [])]
    types: list[int] = file.get("tokenizer.ggml.token_type", list[int], [])
    if not tokens or any(len(merge) != 2 for merge in merges):
        raise expected(f"{path}: tokenizer.ggml.merges", "tokens, and merges of two each", f"{len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in _LIKE_LLAMA_3))
    except Exception as error:  # tokenizers has no class of its own for this
        raise expected(f"{path}: tokenizer.ggml.merges", "merges of its tokens", error) from None
    tokenizer.pre_tokenizer = splits[split]
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf's TokenType
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == control:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == user_defined:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    around = {}
    for end, default in (("bos", split in _LIKE_LLAMA_3), ("eos", False)):
        if file.get(f"tokenizer.ggml.add_{end}_token", bool, default):
            index = file.get(f"tokenizer.ggml.{end}_token_id", int, -1)
            if not 0 <= index < len(tokens):
                raise expected(f"{path}: tokenizer.ggml.{end}_token_id", f"one of its {len(tokens)} tokens", index)
            around[end] = (tokens[index], index)
    if around:
        # a token's number, not its text, which may have any characters
        first, last = (f"{end} " if end in around else "" for end in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A {last}".strip(),
            pair=f"{first}$A {last}$B {last}".strip(),
            special_tokens=[{"id": end, "ids": [index], "tokens": [token]} for end, (token, index) in around.items()],
        )
    return tokenizer
