"""The three architectures once more, in numpy and float64, from a checkpoint's tensors by their Hugging Face names.

Written from the papers' formulas, one head and one row at a time where that is clearer; shares no line with
``ntk_prefix.models``. Also draws small random checkpoints and writes them as folders.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20, "vocab_size": 31}
IMAGE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**TEXT, "model_type": "bert", "hidden_act": "gelu", "max_position_embeddings": 40, "layer_norm_eps": 1e-3},
    "vit": {**IMAGE, "model_type": "vit", "hidden_act": "gelu", "intermediate_size": 20, "layer_norm_eps": 1e-3},
    "dinov2": {**IMAGE, "model_type": "dinov2", "hidden_act": "gelu", "mlp_ratio": 2, "layer_norm_eps": 1e-3},
    "llama": {
        **TEXT,
        "model_type": "llama",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": False,
    },
    "llama_tied": {**TEXT, "model_type": "llama", "rope_theta": 100.0, "tie_word_embeddings": True},
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, as torch lays them out."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    hidden = config.get("intermediate_size", config.get("mlp_ratio", 0) * d)
    linear: dict[str, tuple[int, int]] = {}  # with a bias
    vectors: list[str] = []
    result: dict[str, tuple[int, ...]] = {}
    if config["model_type"] == "bert":
        result["embeddings.word_embeddings.weight"] = (config["vocab_size"], d)
        result["embeddings.position_embeddings.weight"] = (config["max_position_embeddings"], d)
        result["embeddings.token_type_embeddings.weight"] = (2, d)
        vectors += ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
        for i in range(layers):
            at = f"encoder.layer.{i}."
            linear |= {f"{at}attention.self.{n}": (d, d) for n in ("query", "key", "value")}
            linear[f"{at}attention.output.dense"] = (d, d)
            linear |= {f"{at}intermediate.dense": (hidden, d), f"{at}output.dense": (d, hidden)}
            vectors += [f"{at}{n}.LayerNorm.{p}" for n in ("attention.output", "output") for p in ("weight", "bias")]
    elif config["model_type"] == "llama":
        heads, n = config["num_attention_heads"], config.get("head_dim", d // config["num_attention_heads"])
        keys = config.get("num_key_value_heads", heads)
        result["model.embed_tokens.weight"] = (config["vocab_size"], d)
        if not config["tie_word_embeddings"]:
            result["lm_head.weight"] = (config["vocab_size"], d)
        for i in range(layers):
            at = f"model.layers.{i}."
            maps = {"q": (heads * n, d), "k": (keys * n, d), "v": (keys * n, d), "o": (d, heads * n)}
            for name, shape in maps.items():
                result[f"{at}self_attn.{name}_proj.weight"] = shape
                if config.get("attention_bias"):
                    result[f"{at}self_attn.{name}_proj.bias"] = shape[:1]
            result |= {f"{at}mlp.{n}_proj.weight": (hidden, d) for n in ("gate", "up")}
            result[f"{at}mlp.down_proj.weight"] = (d, hidden)
            vectors += [f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight"]
        vectors.append("model.norm.weight")
    else:
        size = config["patch_size"]
        result["embeddings.cls_token"] = (1, 1, d)
        result["embeddings.position_embeddings"] = (1, 1 + (config["image_size"] // size) ** 2, d)
        result["embeddings.patch_embeddings.projection.weight"] = (d, 3, size, size)
        vectors += ["embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias"]
        dinov2 = config["model_type"] == "dinov2"
        for i in range(layers):
            at = f"encoder.layer.{i}."
            linear |= {f"{at}attention.attention.{n}": (d, d) for n in ("query", "key", "value")}
            linear[f"{at}attention.output.dense"] = (d, d)
            up, down = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
            linear |= {f"{at}{up}": (hidden, d), f"{at}{down}": (d, hidden)}
            norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
            vectors += [f"{at}{n}.{p}" for n in norms for p in ("weight", "bias")]
            if dinov2:
                vectors += [f"{at}layer_scale{j}.lambda1" for j in (1, 2)]
    result |= {name: (d,) for name in vectors}
    result |= {f"{name}.weight": shape for name, shape in linear.items()}
    return result | {f"{name}.bias": shape[:1] for name, shape in linear.items()}


def draw(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random float32 tensors; maps keep the size of what goes through, scales lie around 1."""
    rng = np.random.default_rng(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        around = 1.0 if len(shape) == 1 and name.endswith(("weight", "lambda1")) else 0.0
        width = 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 0.5
        return (around + width * rng.normal(size=shape)).astype(np.float32)

    return {name: tensor(name, shape) for name, shape in shapes(config).items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------- the formulas


def linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors.get(f"{name}.bias", 0)


def layer_norm(tensors: Tensors, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normal * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * scipy.special.ndtr(x)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int, seen: np.ndarray) -> np.ndarray:
    """query [T, N H], key and value [S, K H], seen [T, S] -> [T, N H]; a row that sees nothing is 0."""
    width = query.shape[1] // heads
    group = heads // (key.shape[1] // width)
    result = np.zeros(query.shape)
    for n in range(heads):
        mine, shared = slice(n * width, (n + 1) * width), slice(n // group * width, (n // group + 1) * width)
        for t in range(len(query)):
            if seen[t].any():
                scores = key[seen[t]][:, shared] @ query[t, mine] / math.sqrt(width)
                result[t, mine] = scipy.special.softmax(scores) @ value[seen[t]][:, shared]
    return result


def bert(
    config: dict[str, Any],
    tensors: Tensors,
    ids: np.ndarray,
    mask: np.ndarray,
    types: np.ndarray,
    offset: int = 0,
    prefix: np.ndarray | None = None,
) -> np.ndarray:
    """Hidden states; with prefix [layers, j, D], those of j rows more, which start at 0 and are raised before each layer."""
    eps, rows = config["layer_norm_eps"], []
    for row, row_mask, row_types in zip(ids, mask.astype(bool), types, strict=True):
        x = (
            tensors["embeddings.word_embeddings.weight"][row].astype(np.float64)
            + tensors["embeddings.token_type_embeddings.weight"][row_types]
            + tensors["embeddings.position_embeddings.weight"][offset + np.arange(len(row))]
        )
        x = layer_norm(tensors, "embeddings.LayerNorm", x, eps)
        if prefix is not None:
            x = np.concatenate([np.zeros(prefix.shape[1:]), x])
            row_mask = np.concatenate([np.ones(prefix.shape[1], bool), row_mask])
        for i in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            if prefix is not None:
                x[: prefix.shape[1]] += prefix[i]
            q, k, v = (linear(tensors, f"{at}attention.self.{n}", x) for n in ("query", "key", "value"))
            seen = np.broadcast_to(row_mask, (len(x), len(x)))
            mixed = attention(q, k, v, config["num_attention_heads"], seen)
            mixed = linear(tensors, f"{at}attention.output.dense", mixed)
            x = layer_norm(tensors, f"{at}attention.output.LayerNorm", x + mixed, eps)
            hidden = gelu(linear(tensors, f"{at}intermediate.dense", x))
            x = layer_norm(tensors, f"{at}output.LayerNorm", x + linear(tensors, f"{at}output.dense", hidden), eps)
        rows.append(x)
    return np.stack(rows)


def keys_kernel(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resample(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bicubic, pixel by pixel: [h, w, D] -> [rows, columns, D]."""
    h, w, _ = grid.shape
    result = np.zeros((rows, columns, grid.shape[2]))
    for i in range(rows):
        y = (i + 0.5) * h / rows - 0.5
        for j in range(columns):
            x = (j + 0.5) * w / columns - 0.5
            for p in range(math.floor(y) - 2, math.floor(y) + 4):
                for q in range(math.floor(x) - 2, math.floor(x) + 4):
                    weight = keys_kernel(y - p) * keys_kernel(x - q)
                    result[i, j] += weight * grid[min(max(p, 0), h - 1), min(max(q, 0), w - 1)]
    return result


def vit(config: dict[str, Any], tensors: Tensors, pixels: np.ndarray) -> np.ndarray:
    eps, size, d = config["layer_norm_eps"], config["patch_size"], config["hidden_size"]
    rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
    positions = tensors["embeddings.position_embeddings"][0].astype(np.float64)
    side = config["image_size"] // size
    grid = positions[1:].reshape(side, side, d)
    grid = grid if rows == columns == side else resample(grid, rows, columns)
    kernel = tensors["embeddings.patch_embeddings.projection.weight"].astype(np.float64)
    dinov2 = config["model_type"] == "dinov2"
    images = []
    for image in pixels:
        tokens = [tensors["embeddings.cls_token"][0, 0] + positions[0]]
        for i in range(rows):
            for j in range(columns):
                patch = image[i * size : (i + 1) * size, j * size : (j + 1) * size]
                bias = tensors["embeddings.patch_embeddings.projection.bias"]
                tokens.append(np.einsum("dcyx,yxc->d", kernel, patch) + bias + grid[i, j])
        x = np.stack(tokens)
        for layer in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}."
            norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
            up, down = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
            scales = [tensors[f"{at}layer_scale{j}.lambda1"] if dinov2 else 1.0 for j in (1, 2)]
            normal = layer_norm(tensors, at + norms[0], x, eps)
            q, k, v = (linear(tensors, f"{at}attention.attention.{n}", normal) for n in ("query", "key", "value"))
            mixed = attention(q, k, v, config["num_attention_heads"], np.ones((len(x), len(x)), bool))
            x = x + scales[0] * linear(tensors, f"{at}attention.output.dense", mixed)
            hidden = gelu(linear(tensors, at + up, layer_norm(tensors, at + norms[1], x, eps)))
            x = x + scales[1] * linear(tensors, at + down, hidden)
        images.append(layer_norm(tensors, "layernorm", x, eps))
    return np.stack(images)


def llama(
    config: dict[str, Any], tensors: Tensors, ids: np.ndarray, mask: np.ndarray, offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits."""
    heads, eps = config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    width = config.get("head_dim", config["hidden_size"] // heads)
    theta = config.get("rope_parameters", config)["rope_theta"]

    def rms_norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"]

    def turn(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Complex numbers out of halves, times e^{i position theta^(-2j/H)}."""
        parts = x.reshape(len(x), -1, 2, width // 2)
        angles = positions[:, None] * theta ** (-2 * np.arange(width // 2) / width)
        turned = (parts[:, :, 0] + 1j * parts[:, :, 1]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)

    rows = []
    for row, row_mask in zip(ids, mask.astype(bool), strict=True):
        positions = np.maximum(np.cumsum(row_mask) - 1, 0) + offset
        seen = np.tri(len(row), dtype=bool) & row_mask
        x = tensors["model.embed_tokens.weight"][row].astype(np.float64)
        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}."
            normal = rms_norm(f"{at}input_layernorm", x)
            q, k, v = (linear(tensors, f"{at}self_attn.{n}_proj", normal) for n in "qkv")
            mixed = attention(turn(q, positions), turn(k, positions), v, heads, seen)
            x = x + linear(tensors, f"{at}self_attn.o_proj", mixed)
            normal = rms_norm(f"{at}post_attention_layernorm", x)
            gate = linear(tensors, f"{at}mlp.gate_proj", normal)
            hidden = gate * scipy.special.expit(gate) * linear(tensors, f"{at}mlp.up_proj", normal)
            x = x + linear(tensors, f"{at}mlp.down_proj", hidden)
        rows.append(rms_norm("model.norm", x))
    result = np.stack(rows)
    table = tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return result, result @ table.astype(np.float64).T
