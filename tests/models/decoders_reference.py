"""What transformers computes for tiny decoders of every family: made anew by

    python tests/models/decoders_reference.py tests/models/decoders.npz

in an environment that has torch and transformers, and no need of this package. Weights are drawn by name, so the file holds
what transformers writes of them (config.json, names and shapes), and what it computes with them: logits of each text by
itself, and 24 tokens decoded greedily. Before it writes, the script sees to it that transformers agrees with itself: with and
without a cache, with padding on either side; and that no token hangs on a rounding.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from tests.models.drawing import draw_tensor
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from drawing import draw_tensor

NEW = 24
LENGTHS = (11, 5)
VOCABULARY = 40
WINDOW = 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
TIED = {"tie_word_embeddings": True, "head_dim": 8}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", rope("default")),
    "llama linear": ("Llama", rope("linear", factor=3.0)),
    "llama dynamic": ("Llama", {**rope("dynamic", factor=3.0), "max_position_embeddings": 8}),
    "llama yarn": ("Llama", {**rope("yarn", factor=4.0, original_max_position_embeddings=16), "head_dim": 16}),
    "llama yarn mscale": (
        "Llama",
        rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5, mscale=0.7,
            mscale_all_dim=1.3, truncate=False,
        ),
    ),
    "llama llama3": (
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "mistral": ("Mistral", {**rope("default"), "sliding_window": WINDOW, "head_dim": 8}),
    "qwen2": (
        "Qwen2",
        {**rope("default"), "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**rope("default"), "head_dim": 8}),
    "qwen3 windows": (
        "Qwen3",
        {
            **rope("default"), "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            **rope("default"), "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **TIED, **rope("default"), "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **TIED, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
}  # fmt: skip


def recorded(name: str) -> dict[str, np.ndarray]:
    import torch
    import transformers

    family, changes = CASES[name]
    causal = {"Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes}, attn_implementation="eager")
    made = getattr(transformers, causal)(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        from safetensors import safe_open

        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        from safetensors.numpy import save_file

        save_file({k: draw_tensor(k, tuple(s)) for k, s in shapes.items()}, Path(folder) / "model.safetensors")
        drawn = getattr(transformers, causal).from_pretrained(folder, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCABULARY, length) for length in LENGTHS]

    def logits(ids: Any, mask: Any = None) -> np.ndarray:
        model = copy.deepcopy(drawn)  # a dynamic base is a state
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.numpy()

    def greedy(text: np.ndarray, use_cache: bool) -> np.ndarray:
        ids = torch.tensor(text[None])
        out = copy.deepcopy(drawn).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=use_cache
        )
        return out[0, len(text) :].numpy()

    alone = [logits(torch.tensor(text[None]))[0] for text in texts]
    tokens = [greedy(text, use_cache=True) for text in texts]
    if "dynamic" not in name:
        whole = [logits(torch.tensor(np.append(text, new)[None]))[0] for text, new in zip(texts, tokens, strict=True)]
        for row, text in enumerate(texts):
            assert (greedy(text, use_cache=False) == tokens[row]).all(), name
            top = np.sort(whole[row][len(text) - 1 : -1], axis=1)
            gap = (top[:, -1] - top[:, -2]).min()
            assert gap > 1e-4, (name, gap)
        longest = max(LENGTHS)
        for left in (True, False):
            ids, mask = np.zeros((2, longest), int), np.zeros((2, longest), int)
            for row, text in enumerate(texts):
                place = slice(longest - len(text), None) if left else slice(len(text))
                ids[row, place], mask[row, place] = text, 1
            padded = logits(torch.tensor(ids), torch.tensor(mask))
            for row in range(2):
                error = np.abs(padded[row][mask[row] > 0] - alone[row]).max() / np.abs(alone[row]).max()
                assert error < 3e-6, (name, left, error)
    print(f"{name}: {len(shapes)} tensors, tokens {tokens[0][:8]} ...")
    return {
        "config": np.array(json.dumps(written)),
        "shapes": np.array(json.dumps(shapes)),
        "logits": np.concatenate(alone).astype(np.float32),
        "tokens": np.stack(tokens).astype(np.uint8),
        "texts": np.concatenate(texts).astype(np.uint8),
    }


def main() -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    parts = {f"{name}/{key}": value for name in CASES for key, value in recorded(name).items()}
    np.savez_compressed(sys.argv[1], versions=np.array(json.dumps(versions)), **parts)


if __name__ == "__main__":
    main()
