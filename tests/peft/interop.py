"""Our adapters beside Hugging Face peft's: ``python -m tests.peft.interop --torch-python PYTHON --model DIR``.

peft trains LoRA and prefix-tuning adapters for a few steps, on MiniLM (DIR) and on small random models, saves them,
and they are loaded here; then the same are trained here, saved, and loaded there. Those of LoRA are also merged here, and
transformers reads the folder.

Errors are ``max |ours - theirs| / max |theirs|`` of hidden states or logits in float32, over tokens that are not padding.
"effect" is how far the adapter has moved the frozen model, in the same unit: an error says something only far below it.
Exit 1 if an error is above 1e-4 or an effect below 1e-2.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.peft.inject import module_at

LIMIT, EFFECT = 1e-4, 1e-2

REFUSED = re.compile(r"required for prefix tuning|specify `token_dim`|ViTConfig' object has no attribute 'vocab_size'")
"""What peft 0.21 says where it trains no prefix under transformers 5.24 (DistilBERT, ViT): that is no fault of a file."""

DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma2", "Gemma3")
TEXT = {"Gemma3": "Gemma3Text"}
HEADS_WITHOUT_BIAS = tuple(f"{TEXT.get(family, family)}ForSequenceClassification" for family in DECODERS)

OURS: dict[str, tuple[str, str | None, list[peft.AdapterConfig]]] = {
    "bert lora": ("AutoModel", None, [peft.LoraConfig(r=8, alpha=16)]),
    "bert lora, a regex and patterns": (
        "AutoModel",
        None,
        [
            peft.LoraConfig(target=r"layers\.\d\.attention\.(query|out)$", r=4, alpha=2),
            peft.LoraConfig(target=r"layers\.[23]\.mlp\.down$", r=2),
        ],
    ),
    "bert rslora, two layers": (
        "AutoModel",
        None,
        [peft.LoraConfig(target=r"layers\.[13]\..*\.(key|down)$", r=4, alpha=8, use_rslora=True)],
    ),
    "bert prefix": ("AutoModel", None, [peft.PrefixTuningConfig(num_tokens=10, shift_positions=True)]),
    "bert prefix, projected": ("AutoModel", None, [peft.PrefixTuningConfig(num_tokens=5, shift_positions=True)]),
    **{
        f"{family.lower()} lora": (
            f"{family}ForCausalLM",
            "causal-lm",
            [peft.LoraConfig(target=r"layers\..*(query|key|value|out|up|down|gate)$", r=4)],
        )
        for family in DECODERS
    },
    **{
        f"{family.lower()} bare lora": (f"{TEXT.get(family, family)}Model", None, [peft.LoraConfig(r=4)])
        for family in (*DECODERS, "Roberta", "DistilBert", "ViT", "ModernBert")
    },
    **{
        f"{family.lower()} classifier lora": (
            f"{TEXT.get(family, family)}ForSequenceClassification",
            "sequence-classification",
            [peft.LoraConfig(r=4)],
        )
        for family in DECODERS
    },
    **{
        f"{family.lower()} classifier lora": (
            f"{family}ForImageClassification",
            "image-classification",
            [peft.LoraConfig(r=4)],
        )
        for family in ("ViT", "DeiT", "Dinov2")
    },
    **{
        f"{family.lower()} prefix": (
            f"{family}ForCausalLM",
            "causal-lm",
            [peft.PrefixTuningConfig(num_tokens=5, shift_positions=True)],
        )
        for family in DECODERS
    },
    "llama classifier prefix": (
        "LlamaForSequenceClassification",
        "sequence-classification",
        [peft.PrefixTuningConfig(num_tokens=5, shift_positions=True)],
    ),
    "bert classifier lora": (
        "AutoModelForSequenceClassification",
        "sequence-classification",
        [peft.LoraConfig(target=r"layers\.[0-4]\.attention\.(query|key)$", r=4)],
    ),
    "bert's own classifier lora": (
        "BertForSequenceClassification",
        "sequence-classification",
        [peft.LoraConfig(r=4)],
    ),
    "roberta classifier lora": (
        "RobertaForSequenceClassification",
        "sequence-classification",
        [peft.LoraConfig(r=4), peft.HeadConfig(target=r"^transform\.dense$")],
    ),
    **{
        f"{family.lower()} prefix": (
            f"{family}Model",
            None,
            [peft.PrefixTuningConfig(num_tokens=5, shift_positions=True)],
        )
        for family in ("Roberta", "DistilBert", "ViT")
    },
    "distilbert classifier lora": (
        "DistilBertForSequenceClassification",
        "sequence-classification",
        [peft.LoraConfig(r=4), peft.HeadConfig(target=r"^transform\.dense$")],
    ),
}


def outputs(model: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    result = model(*inputs.values())
    # MiniLM's file has no classifier: compare what comes before it
    if result.logits is None or (isinstance(getattr(model, "backbone", None), models.Bert) and model.transform is None):
        return result.last_hidden_state
    return result.logits


def train(model: Any, inputs: dict[str, jax.Array], target: jax.Array, *, bias: bool) -> None:
    """Take five steps, as peft does; ``bias`` says whether Hugging Face's head has one."""
    if not bias:
        # what their head cannot have is not trained either
        head = module_at(model, "head").adapters["default"]
        head.bias = nnx.Param(head.bias[...])
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=peft.AdapterParam)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> None:
        def loss(model: Any) -> jax.Array:
            return jnp.mean((outputs(model, inputs) - target) ** 2)

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, peft.AdapterParam))(model))

    for _ in range(5):
        step(model, optimizer)


def compare(folder: Path, torch_side: list[str], only: str) -> bool:
    subprocess.run([*torch_side, "train", str(folder), only], check=True)
    measured: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for case, (kind, task, configs) in ((name, case) for name, case in OURS.items() if re.search(only, name)):
        if (why := folder / case / "train.failed").exists():
            refused[case] = f"peft does not train it: {why.read_text()}"
            continue
        try:
            measured[case] = both(folder, case, kind, task, configs)
        except (UsageError, FileNotFoundError) as error:
            refused[case] = f"not here: {error}"
    subprocess.run([*torch_side, "evaluate", str(folder), only], check=True)
    failed = False
    print(
        f"{'':34s}{'trained there, loaded here':>30s}{'trained here, loaded there':>30s}{'merged here, read there':>30s}"
    )
    for case, (ours_of_theirs, theirs, ours, frozen, mask) in measured.items():
        keep = np.ones(theirs.shape[:-1], bool) if mask is None else mask.astype(bool)
        line = ""
        directions = [(ours_of_theirs, theirs)]
        if (why := folder / case / "evaluate.failed").exists():
            refused[f"{case}, ours"] = f"peft does not read it: {why.read_text()}"
        else:
            directions += [(ours, found) for found in np.load(folder / case / "ours.npz").values()]
        for mine, other in directions:
            unit = np.abs(other[keep]).max()
            error = np.abs(np.asarray(mine) - other)[keep].max() / unit
            effect = np.abs(frozen - other)[keep].max() / unit
            failed |= not (error <= LIMIT and effect >= EFFECT)
            line += f"   error {error:.1e}, effect {effect:.2f}"
        print(f"{case:34s}{line}", flush=True)
    for case, why_not in refused.items():
        print(f"{case:34s}   {why_not[:300]}")
        failed |= REFUSED.search(why_not) is None
    return failed


def both(folder: Path, case: str, kind: str, task: str | None, configs: list[peft.AdapterConfig]) -> tuple[Any, ...]:
    """Load what peft has trained, and train and save our own."""
    arrays = dict(np.load(folder / case / "theirs.npz"))
    theirs, frozen, target = (arrays.pop(key) for key in ("trained", "frozen", "target"))
    inputs = {key: jnp.asarray(value) for key, value in arrays.items()}
    bert_classifier = kind == "AutoModelForSequenceClassification"
    model = models.from_pretrained(folder / "models" / kind, task, num_labels=2 if bert_classifier else None)
    peft.load_adapter(model, folder / case / "theirs", "theirs", load_head=not bert_classifier)
    ours_of_theirs = outputs(model, inputs)
    peft.delete_adapter(model, "theirs")
    peft.apply(model, configs)
    train(model, inputs, jnp.asarray(target), bias=kind not in HEADS_WITHOUT_BIAS)
    peft.save_pretrained(model, folder / case / "ours")
    mask = arrays.get("attention_mask") if theirs.ndim == 3 else None
    ours = outputs(model, inputs)
    # a classifier on a file without one keeps its head in a file of its own, which is not transformers'
    if any(isinstance(config, peft.LoraConfig) for config in configs) and not bert_classifier:
        peft.save_merged(model, folder / "models" / kind, folder / case / "merged")
    return ours_of_theirs, theirs, ours, frozen, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--model", required=True, type=Path, help="MiniLM's Hugging Face folder")
    parser.add_argument("--only", default="", help="a regular expression of cases, such as lora or '^qwen3'")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "models").mkdir()
        for kind in ("AutoModel", "AutoModelForSequenceClassification"):
            (folder / "models" / kind).symlink_to(options.model.resolve())
        side = [options.torch_python, "-W", "ignore", str(Path(__file__).with_name("interop_peft.py"))]
        sys.exit(compare(folder, side, options.only))


if __name__ == "__main__":
    main()
