"""Write the tiny models of ``tests/fixtures/images`` anew, and what transformers makes of them.

    PYTHON -m tests.models.record_images      # a Python with torch, transformers and Pillow

Every parameter is drawn at random. Outputs are computed in float64, for images that are higher and narrower than those that the
positions were made for.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.models.recording import draw_model

TARGET = Path(__file__).parents[1] / "fixtures" / "images"

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "num_labels": 3,
    "layer_norm_eps": 1e-3,
}  # fmt: skip
PLAIN = SIZES | {"intermediate_size": 24}
DINO = SIZES | {"mlp_ratio": 2}
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", PLAIN, "ViTImageProcessorPil"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PLAIN, "DeiTImageProcessorPil"),
    "deit-distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN, "DeiTImageProcessorPil"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO, "BitImageProcessorPil"),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 3},
        "BitImageProcessorPil",
    ),
    "dinov2-giant": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}, "BitImageProcessorPil"),
}


def main() -> None:
    for seed, (name, (model_class, config_class, sizes, processor_class)) in enumerate(MODELS.items()):
        folder = TARGET / name
        model, rng = draw_model(folder, model_class, config_class, sizes, seed)
        processor = getattr(transformers, processor_class)()
        processor.save_pretrained(folder)
        raw = rng.integers(0, 256, (2, 3, 20, 8), dtype=np.uint8)
        sized = (
            {"do_resize": False, "do_center_crop": False}
            if "crop_size" in processor.to_dict()
            else {"do_resize": False}
        )
        pixels = processor(list(raw), input_data_format="channels_first", return_tensors="np", **sized)["pixel_values"]
        options = {} if "Dinov2" in model_class else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            output = model.double()(torch.tensor(pixels).double(), output_hidden_states=True, **options)
            hidden = getattr(model, model.base_model_prefix, model).layernorm(output.hidden_states[-1])
        recorded = {"image": raw.transpose(0, 2, 3, 1), "pixel_values": pixels.transpose(0, 2, 3, 1)}
        recorded["last_hidden_state"] = hidden.numpy()
        if "last_hidden_state" in output:
            recorded["last_hidden_state"] = output.last_hidden_state.numpy()
        if "logits" in output:
            recorded["logits"] = output.logits.numpy()
        np.savez_compressed(folder / "recorded.npz", **recorded)
    versions = f"transformers {transformers.__version__}, and what torch {torch.__version__.split('+')[0]}"
    (TARGET / "README.md").write_text(
        f"Tiny random models of images, saved by {versions} makes of them in float64: `python -m tests.models.record_images`.\n"
    )


if __name__ == "__main__":
    main()
