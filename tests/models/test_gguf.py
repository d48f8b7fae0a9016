"""GGUF's kinds of numbers, each by its definition in ggml, element by element; and what is refused.

The reader goes through the gguf package; the formulas here share no line with it.
"""

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from ntk_prefix import models
from ntk_prefix.checks import UsageError
from ntk_prefix.models.formats import read_checkpoint

WIDTH, HEADS = 256, 2
FAMILIES = ("llama", "qwen3", "gemma3")


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def q4_0(block: bytes) -> list[float]:
    """16 bytes after a scale: element i in the low half of byte i, element 16 + i in the high half, 8 below."""
    d, nibbles = half(block, 0), block[2:18]
    return [d * ((nibbles[i % 16] >> (4 if i >= 16 else 0) & 15) - 8) for i in range(32)]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * int(np.int8(np.uint8(byte))) for byte in block[2:34]]


def scale_and_least(packed: bytes, j: int) -> tuple[int, int]:
    """Eight scales and eight minima of 6 bits in 12 bytes: ggml's ``get_scale_min_k4``."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4


def q4_k(block: bytes, high: bytes = bytes(32), at: int = 16) -> list[float]:
    """Eight groups of 32; two groups share 32 bytes, one in the low halves. Of Q5_K, group j has its fifth bits in bit j."""
    d, least, found = half(block, 0), half(block, 2), []
    for i in range(256):
        group, place = divmod(i, 32)
        nibble = block[at + group // 2 * 32 + place] >> (4 if group % 2 else 0) & 15
        scale, minimum = scale_and_least(block[4:16], group)
        found.append(d * scale * (nibble + 16 * (high[place] >> group & 1)) - least * minimum)
    return found


def q5_k(block: bytes) -> list[float]:
    return q4_k(block, block[16:48], 48)


def q6_k(block: bytes) -> list[float]:
    """Of each half: four low bits in 64 bytes, two high bits in 32, a signed scale for 16 elements; 32 below."""
    low, high, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
    found = []
    for i in range(256):
        side, rest = divmod(i, 128)
        quarter, place = divmod(rest, 32)
        four = low[side * 64 + quarter % 2 * 32 + place] >> (4 if quarter >= 2 else 0) & 15
        two = high[side * 32 + place] >> (2 * quarter) & 3
        found.append(d * int(np.int8(np.uint8(scales[i // 16]))) * ((four | two << 4) - 32))
    return found


BLOCKS: dict[Kind, tuple[int, int, Any, tuple[int, ...]]] = {
    Kind.Q4_0: (32, 18, q4_0, (0,)),
    Kind.Q8_0: (32, 34, q8_0, (0,)),
    Kind.Q4_K: (256, 144, q4_k, (0, 2)),
    Kind.Q5_K: (256, 176, q5_k, (0, 2)),
    Kind.Q6_K: (256, 210, q6_k, (208,)),
}
"""Elements and bytes of a block, its formula, and where its float16 scales are."""

FILES = {
    "Q4_0": (Kind.Q4_0, Kind.Q4_0),
    "Q8_0": (Kind.Q8_0, Kind.Q8_0),
    "Q4_K_M": (Kind.Q4_K, Kind.Q6_K),
    "Q5_K_M": (Kind.Q5_K, Kind.Q6_K),
    "Q6_K": (Kind.Q6_K, Kind.Q6_K),
    "F16": (Kind.F16, Kind.F16),
    "BF16": (Kind.BF16, Kind.BF16),
}
"""What llama.cpp's names of files stand for: the kind of most maps, and that of the values and of half of the down maps."""


def drawn(kind: Kind, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a tensor as a file has it, of any bytes, and its numbers by the formula."""
    if kind in (Kind.F16, Kind.BF16):
        numbers = rng.normal(size=shape).astype(np.float16 if kind == Kind.F16 else ml_dtypes.bfloat16)
        return numbers if kind == Kind.F16 else numbers.view(np.uint8), numbers.astype(np.float32)
    size, length, formula, scales = BLOCKS[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // size, length), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.uniform(1e-3, 1e-2, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    numbers = np.array([formula(block.tobytes()) for block in blocks], np.float64).reshape(shape)
    return blocks.reshape(shape[0], -1), numbers


def in_hugging_faces_order(numbers: np.ndarray) -> np.ndarray:
    """llama.cpp has the rows j and j + H/2 of a head side by side."""
    heads = numbers.reshape(HEADS, -1, 2, numbers.shape[1])
    return np.concatenate([np.concatenate([head[:, 0], head[:, 1]]) for head in heads])


def write(path: Path, architecture: str, kinds: tuple[Kind, Kind], **fields: Any) -> dict[str, np.ndarray]:
    """Write one layer; return its matrices by their places here, [in, out]."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "gemma3":
        writer.add_sliding_window(8)
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    width, found = HEADS * 16, {}
    places = {
        "attn_q": ("attention.query", width, WIDTH), "attn_k": ("attention.key", width, WIDTH),
        "attn_v": ("attention.value", width, WIDTH), "attn_output": ("attention.out", 16, None),
        "ffn_gate": ("mlp.gate", 16, None), "ffn_up": ("mlp.up", 16, None), "ffn_down": ("mlp.down", 16, None),
    }  # fmt: skip
    for name, (place, rows, columns) in places.items():
        # maps onto more features than are worth a formula are plain
        kind = kinds[name == "attn_v"] if columns else Kind.F32
        if columns:
            stored, numbers = drawn(kind, (rows, columns), rng)
        else:
            shape = (WIDTH, width) if name == "attn_output" else (WIDTH, WIDTH)
            stored = numbers = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.weight", stored, raw_dtype=kind)
        if architecture == "llama" and name in ("attn_q", "attn_k"):
            numbers = in_hugging_faces_order(numbers)
        found[place] = numbers.T
    stored, numbers = drawn(kinds[1], (8, WIDTH), rng)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kinds[1])
    found["embeddings"] = numbers
    norms = ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]
    norms += ["blk.0.post_attention_norm", "blk.0.post_ffw_norm"] if architecture == "gemma3" else []
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("blk.0.attn_q_norm", "blk.0.attn_k_norm") if architecture != "llama" else ():
        writer.add_tensor(f"{name}.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("number", range(len(FILES)), ids=FILES)
def test_every_kind_of_number_is_what_ggml_defines_in_decoders_of_each_layout(tmp_path: Path, number: int) -> None:
    """A Mistral is a llama there. The formula in float64, the package in float32: a rounding of each factor apart."""
    name, architecture = list(FILES)[number], FAMILIES[number % len(FAMILIES)]
    wanted = write(tmp_path / "a.gguf", architecture, FILES[name])
    model: Any = models.from_pretrained(tmp_path / "a.gguf", "causal-lm")
    assert model.config.num_hidden_layers == 1
    for place, numbers in wanted.items():
        module = model
        for part in ("layers.0." * (place != "embeddings") + place).split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        ours = np.asarray((module.embedding if place == "embeddings" else module.kernel)[...])
        np.testing.assert_allclose(ours, numbers, rtol=0, atol=4e-7 * np.abs(numbers).max(), err_msg=place)
        if place == "attention.value" and FILES[name][0] in BLOCKS:
            assert np.abs(np.roll(ours, 1, axis=0) - numbers).max() > 1e-2  # the control


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_split_file_is_refused_with_the_way_on(tmp_path: Path, part: int) -> None:
    """Only the first part says what it is a part of."""
    path = tmp_path / f"model-{part + 1:05d}-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", part)
    writer.add_uint16("split.count", 3)
    if part:
        writer.kv_data[0].pop("general.architecture")
    writer.add_tensor("token_embd.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"a whole model, got one of 3 parts\. llama-gguf-split --merge") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling_type": gguf.RopeScalingType.LONGROPE},
            "rope_type: expected one of 'default', .*, got 'longrope'",
        ),
        ({"expert_count": 4}, "a plain qwen3, got one with .*expert_count"),
    ],
)
def test_what_a_gguf_asks_for_beyond_us_is_said_in_one_line(tmp_path: Path, fields: Any, message: str) -> None:
    write(tmp_path / "a.gguf", "qwen3", FILES["F16"], **fields)
    with pytest.raises(UsageError, match=message) as caught:
        models.from_pretrained(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
