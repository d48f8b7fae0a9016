"""The other side of :mod:`tests.peft.interop`: runs under torch, transformers and Hugging Face peft; knows no JAX."""

import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

HIDDEN = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
LLAMA = {
    **HIDDEN, "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LAYERS = {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"layer.1.attention.self.value": 3}}

FAMILIES: dict[str, dict] = {
    "Llama": {"rope_parameters": LLAMA_3},
    "Mistral": {"sliding_window": 64, "head_dim": 16},
    "Gemma2": {"sliding_window": 64, "head_dim": 16},
    "Gemma3": {"sliding_window": 64, "head_dim": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
}
FILES = {"Gemma3": "Gemma3Text"}
DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma2", "Gemma3")
IMAGES = {**HIDDEN, "image_size": 24, "patch_size": 6}

CASES = {
    "bert lora": ("AutoModel", LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16)),
    "bert lora, a regex and patterns": (
        "AutoModel",
        LoraConfig(
            task_type="FEATURE_EXTRACTION", r=4, target_modules=r".*\.attention\..*(query|value|dense)", **LAYERS
        ),
    ),
    "bert rslora, two layers": (
        "AutoModel",
        LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=4,
            use_rslora=True,
            target_modules=["key", "output.dense"],
            layers_to_transform=[1, 3],
        ),
    ),
    "bert prefix": ("AutoModel", PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=10)),
    "bert prefix, projected": (
        "AutoModel",
        PrefixTuningConfig(
            task_type="FEATURE_EXTRACTION", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=32
        ),
    ),
    **{
        f"{family.lower()} {case}": (
            f"{FILES.get(family, family) if end != 'ForCausalLM' else family}{end}",
            LoraConfig(
                task_type=task, r=4, target_modules="all-linear" if end == "ForCausalLM" else ["q_proj", "v_proj"]
            ),
        )
        for family in DECODERS
        for case, end, task in (
            ("lora", "ForCausalLM", "CAUSAL_LM"),
            ("bare lora", "Model", "FEATURE_EXTRACTION"),
            ("classifier lora", "ForSequenceClassification", "SEQ_CLS"),
        )
    },
    **{
        f"{family.lower()} prefix": (
            f"{family}ForCausalLM",
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        )
        for family in DECODERS
    },
    "llama classifier prefix": (
        "LlamaForSequenceClassification",
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    ),
    **{
        f"{family.lower()} bare lora": (
            f"{family}Model",
            LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=modules),
        )
        for family, modules in (
            ("Roberta", ["query", "value"]),
            ("DistilBert", ["q_lin", "v_lin"]),
            ("ViT", ["q_proj", "v_proj", "fc1"]),
            ("ModernBert", ["Wqkv", "Wo"]),
        )
    },
    **{
        f"{family.lower()} classifier lora": (
            f"{family}ForImageClassification",
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        )
        for family in ("ViT", "DeiT", "Dinov2")
    },
    "bert classifier lora": ("AutoModelForSequenceClassification", LoraConfig(task_type="SEQ_CLS", r=4)),
    "bert's own classifier lora": ("BertForSequenceClassification", LoraConfig(task_type="SEQ_CLS", r=4)),
    "roberta classifier lora": ("RobertaForSequenceClassification", LoraConfig(task_type="SEQ_CLS", r=4)),
    **{
        f"{family.lower()} prefix": (
            f"{family}Model",
            PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5),
        )
        for family in ("Roberta", "DistilBert", "ViT")
    },
    "distilbert classifier lora": (
        "DistilBertForSequenceClassification",
        LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            target_modules=["q_lin", "v_lin"],
            modules_to_save=["pre_classifier", "classifier"],
        ),
    ),
}

ENCODERS = {
    "Bert": {**HIDDEN, "vocab_size": 99},
    "Roberta": {**HIDDEN, "vocab_size": 99, "pad_token_id": 0, "type_vocab_size": 1},
    "DistilBert": {"vocab_size": 99, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "pad_token_id": 0},
    "ModernBert": {**HIDDEN, "vocab_size": 99, "pad_token_id": 0, "local_attention": 6}
    | {f"{name}_token_id": None for name in ("cls", "bos", "eos", "sep")},
    "ViT": IMAGES,
    "DeiT": IMAGES,
    "Dinov2": {**IMAGES, "mlp_ratio": 2},
}


def base(kind: str, folder: Path) -> torch.nn.Module:
    """Load a model, made on the first call if it is not MiniLM."""
    place = folder / "models" / kind
    if not place.exists():
        family = kind.partition("For")[0].removesuffix("Model")
        sizes = ENCODERS.get(family, {**LLAMA, **FAMILIES.get(family.removesuffix("Text"), {})})
        sizes = sizes | ({"num_labels": 3} if "Classification" in kind else {})
        config = getattr(transformers, f"{FILES.get(family, family)}Config")(**sizes)
        getattr(transformers, kind)(config).save_pretrained(place)
    return getattr(transformers, kind).from_pretrained(place, attn_implementation="eager", dtype=torch.float32).eval()


def outputs(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    # ours has channels last
    inputs = {key: value.permute(0, 3, 1, 2) if key == "pixel_values" else value for key, value in inputs.items()}
    result = model(**inputs, output_hidden_states=True)
    # MiniLM's file has no classifier: compare what comes before it
    if "logits" in result and model.name_or_path.rpartition("/")[2] != "AutoModelForSequenceClassification":
        return result.logits
    return result.last_hidden_state if "last_hidden_state" in result else result.hidden_states[-1]


def batch(kind: str) -> dict[str, torch.Tensor]:
    if any(family in kind for family in ("ViT", "DeiT", "Dinov2")):
        return {"pixel_values": torch.randn(4, 24, 24, 3)}
    ids = torch.randint(1, 99, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def train(case: str, folder: Path) -> None:
    inputs = batch(CASES[case][0])
    model = base(CASES[case][0], folder)
    with torch.no_grad():
        frozen = outputs(model, inputs)
    model = get_peft_model(model, CASES[case][1]).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn_like(frozen)
    for _ in range(5):
        optimizer.zero_grad()
        (outputs(model, inputs) - target).square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder / case / "theirs")
    with torch.no_grad():
        trained = outputs(model, inputs)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    np.savez(folder / case / "theirs.npz", frozen=frozen, trained=trained, target=target, **arrays)


def evaluate(case: str, folder: Path) -> None:
    arrays = np.load(folder / case / "theirs.npz")
    inputs = {key: torch.tensor(arrays[key]) for key in arrays if key not in ("frozen", "trained", "target")}
    # our file of a BERT classifier is one of the bare model: its head is no head of theirs
    kind = "AutoModel" if case == "bert classifier lora" else CASES[case][0]
    model = PeftModel.from_pretrained(base(kind, folder), folder / case / "ours").eval()
    with torch.no_grad():
        found = {"trained": outputs(model, inputs)}
        if (folder / case / "merged").exists():
            model = getattr(transformers, kind).from_pretrained(folder / case / "merged", attn_implementation="eager")
            found["merged"] = outputs(model.eval(), inputs)
    np.savez(folder / case / "ours.npz", **found)


if __name__ == "__main__":
    what, where, only = sys.argv[1:]
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    for name in filter(re.compile(only).search, CASES):
        (Path(where) / name).mkdir(exist_ok=True)
        if what == "evaluate" and not (Path(where) / name / "ours").exists():
            continue  # refused on either side before
        try:
            {"train": train, "evaluate": evaluate}[what](name, Path(where))
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
            # told by the other side: what peft cannot do there is a result
            (Path(where) / name / f"{what}.failed").write_text(
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
