"""Write ``tests/fixtures/peft`` anew: LoRA adapters of Hugging Face peft on the tiny models that are here, heads included.

    PYTHON -m tests.peft.record_adapters      # a Python with torch, transformers and peft; nothing of ours is imported

Every trained number is drawn at random. Beside each adapter stands what the model makes of an input with it, in float64.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

from tests.models.drawing import draw_tensor

TESTS = Path(__file__).parents[1]
TARGET = TESTS / "fixtures" / "peft"

CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "roberta": ("RobertaForSequenceClassification", "encoders/roberta", {"task_type": "SEQ_CLS"}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "encoders/distilbert",
        {"target_modules": ["q_lin", "v_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "encoders/modernbert",
        {"target_modules": ["Wqkv", "Wi", "attn.Wo"], "modules_to_save": ["classifier"]},
    ),
    "vit": ("ViTForImageClassification", "images/vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        "images/dinov2-registers",
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    ),
    **{
        case.replace(" ", "-"): (f"{family}ForCausalLM", None, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"})
        for case, family in (
            ("llama llama3", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("smollm3", "SmolLM3"),
            ("gemma2", "Gemma2"), ("gemma3", "Gemma3"),
        )
    },
}  # fmt: skip


def decoder(case: str, folder: Path) -> Path:
    """Write the decoder of ``tests/models/decoders.npz`` of that name as a folder."""
    with np.load(TESTS / "models" / "decoders.npz") as file:
        (folder / "config.json").write_text(str(file[f"{case}/config"]))
        shapes = json.loads(str(file[f"{case}/shapes"]))
    tensors = {name: draw_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    for seed, (name, (model_class, where, settings)) in enumerate(CASES.items()):
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as temporary:
            folder = decoder(name.replace("-", " "), Path(temporary)) if where is None else TESTS / "fixtures" / where
            model = getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager")
        model = peft.get_peft_model(model.eval(), peft.LoraConfig(r=2, lora_alpha=3, **settings)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.tensor(rng.normal(size=parameter.shape)).float()
        model.save_pretrained(TARGET / name)
        (TARGET / name / "README.md").unlink(missing_ok=True)
        if "images" in (where or ""):
            inputs = {"pixel_values": rng.normal(size=(1, 12, 12, 3))}
            given = {"pixel_values": torch.tensor(inputs["pixel_values"]).permute(0, 3, 1, 2)}
        else:
            inputs = {"input_ids": rng.integers(4, 40, (1, 9))}
            given = {"input_ids": torch.tensor(inputs["input_ids"])}
        with torch.no_grad():
            logits = model.double()(**given).logits.numpy()
            with model.disable_adapter():
                frozen = model(**given).logits.numpy()
        np.savez_compressed(TARGET / name / "recorded.npz", **inputs, logits=logits, frozen=frozen)
    (TARGET / "README.md").write_text(
        f"LoRA adapters that peft {peft.__version__} saved under transformers {transformers.__version__}, and the logits "
        "with them: `python -m tests.peft.record_adapters`.\n"
    )


if __name__ == "__main__":
    main()
