"""The other side of ``tests.models.parity``: the torch originals, run by a Python that has them.

Reads ``request.json`` in the given folder, writes ``reference.npz`` (inputs and outputs) and a few small random models
as transformers saves them. Imports nothing of ours.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers

PROMPTS = (
    "The capital of France is",
    "Q: A shop sells 3 apples for 2 dollars. How much are 12 apples?\nA:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
)
TEXTS = (
    *PROMPTS,
    "<|im_start|>user\nWhat is 12,345.67 + 89?<|im_end|>\n<|im_start|>assistant\n",
    "It's the naïve café's 2nd   test —\t\ttabs, 日本語, 🙂🙂 and\r\n\r\n  newlines.  ",
    "",
    " leading, x=1;y=22;z=333 ''' don't WE'LL they've",
)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def minilm(folder: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = transformers.BertModel.from_pretrained(folder).eval()
    ids = rng.integers(1000, 30000, (4, 48))
    types = rng.integers(0, 2, (4, 48))
    mask = (np.arange(48) < np.array([48, 5, 31, 17])[:, None]).astype(np.int64)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    tensors = {k: torch.tensor(v) for k, v in given.items()}
    shifted = torch.arange(48)[None] + 50
    return {
        **given,
        "hidden": numpy_of(model(**tensors).last_hidden_state),
        "hidden_shifted": numpy_of(model(**tensors, position_ids=shifted).last_hidden_state),
    }


def vit(file: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    hidden = session.get_outputs()[-1].name
    result = {}
    for height, width in ((224, 224), (112, 112), (56, 84)):
        pixels = rng.normal(size=(2, height, width, 3)).astype(np.float32)
        [output] = session.run([hidden], {session.get_inputs()[0].name: pixels.transpose(0, 3, 1, 2)})
        result |= {f"pixels_{height}x{width}": pixels, f"hidden_{height}x{width}": output}
    return result


def smollm2(file: str) -> dict[str, np.ndarray]:
    path = Path(file)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    result: dict[str, np.ndarray] = {}
    result["texts"] = np.array(TEXTS)
    for i, text in enumerate(TEXTS):
        result[f"encoded_{i}"] = np.array(tokenizer(text)["input_ids"], np.int64)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    length = max(map(len, encoded))
    ids = np.array([[2] * (length - len(e)) + e for e in encoded])
    mask = np.array([[0] * (length - len(e)) + [1] * len(e) for e in encoded])
    result |= {"input_ids": ids, "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clip(0)
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        result["logits"] = numpy_of(model(**given, position_ids=torch.tensor(positions)).logits)
        tokens = model.generate(
            **given, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        result["greedy"] = tokens[:, length:].numpy()
    return result


def small_models(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random models in every layout, saved by transformers itself; every parameter is drawn, norms and biases too."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    image = {**text, "image_size": 32, "patch_size": 8}
    models = {
        "bert": transformers.BertModel(transformers.BertConfig(**text, vocab_size=60, hidden_act="gelu_new")),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**image, num_labels=5)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**image, mlp_ratio=2)),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **text, vocab_size=60, num_key_value_heads=2, head_dim=12, rope_theta=5e4, attention_bias=True
            )
        ),
        "llama_classifier": transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**text, vocab_size=60, num_labels=3, pad_token_id=0)
        ),
    }
    ids = rng.integers(1, 60, (3, 10))
    pixels = rng.normal(size=(2, 48, 40, 3)).astype(np.float32)
    result: dict[str, np.ndarray] = {"input_ids": ids, "pixels": pixels}
    for name, model in models.items():
        model.eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.tensor(rng.normal(size=parameter.shape), dtype=torch.float32)
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "llama" else "1GB")
        if name in ("vit", "dinov2"):
            options = {"interpolate_pos_encoding": True} if name == "vit" else {}
            output = model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)), **options)
        else:
            output = model(input_ids=torch.tensor(ids))
        key = "logits" if hasattr(output, "logits") else "last_hidden_state"
        result[f"{name}.{key}"] = numpy_of(output[key])
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    parts = {
        "minilm": minilm(request["minilm"], rng),
        "vit": vit(request["vit"], rng),
        "smollm2": smollm2(request["smollm2"]),
        "small": small_models(folder, rng),
    }
    versions = {m.__name__: m.__version__ for m in (torch, transformers, onnxruntime)}
    np.savez(
        folder / "reference.npz",
        versions=json.dumps(versions),
        **{f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()},
    )


if __name__ == "__main__":
    main()
