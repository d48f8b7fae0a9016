"""Write the tiny encoders of ``tests/fixtures/encoders`` and ``ranker`` anew, and what transformers makes of them.

    PYTHON -m tests.models.record_encoders      # a Python with torch and transformers

Every parameter is drawn at random. Outputs are computed in float64, for two rows padded on the right, one on the left and one
not at all, longer than every window. "ranker" is a T5 encoder in the layout of RankGen's authors, with their map behind it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.models.recording import draw_model

TARGET = Path(__file__).parents[1] / "fixtures" / "encoders"
LENGTH, VOCABULARY, PADDING = 14, 40, 1

BERT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "num_labels": 3,
    "vocab_size": VOCABULARY, "max_position_embeddings": 20, "pad_token_id": PADDING,
}  # fmt: skip
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24} | {
    name: BERT[name] for name in ("num_labels", "vocab_size", "max_position_embeddings", "pad_token_id")
}
MODERN = {**BERT, "num_hidden_layers": 4, "local_attention": 6, "global_rope_theta": 500.0, "local_rope_theta": 50.0}
MODERN |= {"cls_token_id": 2, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
T5 = {
    "d_model": 16, "d_kv": 6, "num_layers": 2, "num_heads": 4, "d_ff": 24, "vocab_size": VOCABULARY,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
}  # fmt: skip
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", {**BERT, "type_vocab_size": 1}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", MODERN),
    "modernbert-mean": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**MODERN, "num_hidden_layers": 2, "classifier_pooling": "mean", "norm_bias": True, "attention_bias": True},
    ),
    "t5": ("T5EncoderModel", "T5Config", T5),
}


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four rows: whole, padded on the right (twice) and on the left."""
    mask = np.ones((4, LENGTH), np.int64)
    mask[1, 9:] = mask[2, 2:] = mask[3, :5] = 0
    ids = np.where(mask, rng.integers(4, VOCABULARY, mask.shape), PADDING)
    return {"input_ids": ids, "attention_mask": mask}


class Ranker(torch.nn.Module):
    """An encoder as RankGen's authors publish theirs: the first token's state through a map without a bias."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.t5_encoder = encoder
        self.projection = torch.nn.Linear(encoder.config.d_model, encoder.config.d_model, bias=False)

    def forward(self, **inputs: Any) -> Any:
        return self.projection(self.t5_encoder(**inputs).last_hidden_state[:, 0])


def record_ranker(seed: int) -> None:
    """Write a ranker's folder: every tensor by the authors' name, the embedding by both that it has."""
    folder = TARGET.parent / "ranker"
    encoder, rng = draw_model(folder, "T5EncoderModel", "T5Config", T5, seed)
    model = Ranker(encoder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    # of a row that is padded on the left, the first token's state is that of padding: whoever asks for it does not rank
    inputs = {name: x[:3] for name, x in batch(rng).items()}
    with torch.no_grad():
        vectors = model.double()(**{name: torch.tensor(x) for name, x in inputs.items()})
    np.savez(folder / "recorded.npz", **inputs, vectors=vectors.numpy())
    print("ranker", sorted(tensors)[-3:], vectors.shape)


def main() -> None:
    for seed, (name, (model_class, config_class, sizes)) in enumerate(MODELS.items()):
        folder = TARGET / name
        model, rng = draw_model(folder, model_class, config_class, sizes, seed)
        inputs = batch(rng)
        with torch.no_grad():
            output = model.double()(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
        recorded = {**inputs, "last_hidden_state": output.hidden_states[-1].numpy()}
        if "last_hidden_state" in output:
            recorded["last_hidden_state"] = output.last_hidden_state.numpy()
        if "logits" in output:
            recorded["logits"] = output.logits.numpy()
        np.savez(folder / "recorded.npz", **recorded)
        print(name, {key: value.shape for key, value in recorded.items()})
    record_ranker(len(MODELS))
    (TARGET / "README.md").write_text(
        "Tiny random encoders, saved by transformers "
        f"{transformers.__version__}, and what torch {torch.__version__.split('+')[0]} makes of them in float64: "
        "`python -m tests.models.record_encoders`.\n"
    )


if __name__ == "__main__":
    main()
