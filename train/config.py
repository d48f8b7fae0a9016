"""What a run is: one frozen record, from a name and what the command line changes in it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from ntk_prefix import peft
from ntk_prefix.checks import UsageError

__all__ = ["CONFIGS", "METHODS", "TrainConfig", "adapter_config"]

METHODS: dict[str, tuple[peft.AdapterConfig, ...]] = {
    "full": (peft.FullConfig(),),
    "head": (peft.HeadConfig(),),
    "bitfit": (peft.BitFitConfig(),),
    "lora": (peft.LoraConfig(),),
    "prefix_tuning": (peft.PrefixTuningConfig(),),
    "prefix_propagation": (peft.PrefixPropagationConfig(),),
    "prefix_tuning_plus": (peft.PrefixTuningPlusConfig(),),
    "ntk_attention": (peft.NTKAttentionConfig(mass="relative", whiten=True),),
    "ntk_attention_published": (peft.NTKAttentionConfig(),),
    "lora_ntk": (peft.LoraConfig(), peft.NTKAttentionConfig(mass="relative", whiten=True)),
}
"""The methods by the names that the command line and the tables use; ``adapter`` changes their fields."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run."""

    model: str
    """An asset (minilm, vit, smollm2), a Hugging Face folder, a .gguf or .onnx file, or tiny-vit (random weights)."""
    task: str
    """See ``train.tasks``."""
    method: str = "ntk_attention"
    """One of train.config.METHODS."""
    adapter: tuple[str, ...] = ()
    """Fields of the method's configuration to change, such as ``r=16`` or ``target=layers.0``; values are JSON or text."""
    data_dir: str | None = None
    """A folder in Hugging Face or GLUE layout, or hub:owner/name; None takes the task's own source."""
    train_size: int | None = None
    """Training examples to sample; None is all."""
    validation_size: int = 500
    """Examples split off the training data, for early stopping and for choosing."""
    test_size: int | None = None
    """Test examples to sample; None is all."""
    test_beyond: int = 0
    """Leave out the test examples that a sample of this size has, so that these are ones no earlier table has read."""
    max_length: int = 128
    """Tokens after which a text is cut; a BERT with fewer positions gets its own again."""
    window: int | None = None
    """Tokens that a token of an encoder sees to each side; all if None."""
    image_size: int = 56
    """Height and width that images are resized to."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How a classifier reads the sequence; prefix propagation has its own way, --adapter pool=prefix, cls or model."""

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 32
    """Examples a step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Parts that a step's batch is computed in, one after the other."""
    grouped: int = 32
    """Batches of text that are drawn together and divided by length, for less padding; 1 leaves them as drawn."""
    learning_rate: float = 1e-3
    """Of the adapter, at the top of the schedule."""
    head_learning_rate: float = 1e-2
    """Of the head, the same schedule. Alone it wants 5e-3 to 2.5e-2; with 1e-3 it is not trained in a few hundred steps,
    and adapters are then compared by how well they make up for that."""
    k_learning_rate: float | None = None
    """Of NTK-Attention's k, the same schedule; the adapter's if None."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, to 0."""
    warmup: float = 0.06
    """Fraction of the steps in which the rate rises linearly."""
    weight_decay: float = 0.0
    """Of AdamW, on trained weights."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations and frozen linear maps; what is trained, norms, embeddings and optimizer stay in float32."""
    remat: bool = False
    """Recompute the activations of each layer in the backward pass."""
    parallel: Literal["jit", "pmap"] = "jit"
    """One program over a mesh, or one a device."""
    fsdp: int = 1
    """Devices among which weights are shared (jit only)."""
    devices: int | None = None
    """How many devices to use; None is all."""

    evaluate_every: int = 100
    """Steps between looks at the validation split."""
    choose_by: Literal["score", "loss"] = "score"
    """What says on the validation split which step to keep: the score, the loss breaking ties, or the loss alone, which a
    few hundred examples measure better."""
    patience: int = 5
    """Looks without improvement after which training stops; 0 never stops."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    max_new_tokens: int = 160
    """Of generated answers (math)."""
    seed: int = 0
    """Of the split, the order, the head and the adapter."""
    test: bool = True
    """Look at the test split at the end; a run that did not is brought up to it by the same command with it."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded."""
        if self.method not in METHODS:
            raise UsageError(f"--method: expected one of {', '.join(METHODS)}, got {self.method!r}.")
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "checkpoint_every", "fsdp", "grouped"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--accumulate: expected a divisor of the batch size {self.batch_size}, got {self.accumulate}."
            )
        if self.fsdp > 1 and self.parallel == "pmap":
            raise UsageError("--fsdp: expected 1 with --parallel pmap, which has a replica on every device.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"--warmup: expected a fraction of the steps in [0, 1), got {self.warmup}.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"--window: expected at least 1 token to each side, or None, got {self.window}.")
        configs = adapter_config(self.method, self.adapter)
        own = [c.pool for c in configs if isinstance(c, peft.PrefixPropagationConfig) and c.pool != "model"]
        if own and self.pooling != "mean":
            raise UsageError(
                f"--pooling: expected it left alone with {self.method}, which reads its own {own[0]!r} row, got "
                f"{self.pooling!r}. Use --adapter pool=cls, or pool=model to read as --pooling says."
            )

    def worth(self, score: float, loss: float) -> float:
        """How good a state is by what the validation split says of it; larger is better."""
        # a split of a few hundred rows has ties in the score
        return -loss if self.choose_by == "loss" else score - 1e-6 * loss

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        return dataclasses.asdict(self)


def adapter_config(method: str, changes: tuple[str, ...] = ()) -> tuple[peft.AdapterConfig, ...]:
    """Return the method's configurations with ``field=value`` changes applied.

    Raises:
        ValueError: a change without "=", or of a field that no configuration of the method has.
    """
    configs = METHODS[method]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise UsageError(f"--adapter: expected field=value, got {change!r}.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if isinstance(value, list):
            value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
        if field not in known:
            raise UsageError(f"--adapter: expected one of {', '.join(sorted(known))} for {method}, got {field!r}.")
        values[field] = value

    def changed(config: peft.AdapterConfig) -> peft.AdapterConfig:
        # all at once: a map and its options only make sense together
        own = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **{name: value for name, value in values.items() if name in own})

    return tuple(map(changed, configs))


CONFIGS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "digits with a random two-layer vision transformer: seconds, no downloads; to see that everything runs",
        TrainConfig(
            model="tiny-vit",
            task="digits",
            method="full",
            image_size=8,
            steps=60,
            batch_size=64,
            learning_rate=3e-3,
            head_learning_rate=3e-3,  # as everything else: nothing of it is pretrained
            evaluate_every=20,
            checkpoint_every=20,
        ),
    ),
    "rte": (
        "textual entailment, MiniLM",
        TrainConfig(model="minilm", task="rte", max_length=128, validation_size=250),
    ),
    "sst2": (
        "sentiment of sentences, MiniLM",
        TrainConfig(model="minilm", task="sst2", max_length=64, train_size=4000),
    ),
    "rotten_tomatoes": (
        "sentiment of short reviews, MiniLM",
        TrainConfig(model="minilm", task="rotten_tomatoes", max_length=64),
    ),
    "newsgroups": (
        "twenty newsgroups, MiniLM, 128 tokens",
        TrainConfig(model="minilm", task="newsgroups", train_size=4000, max_length=128),
    ),
    "newsgroups_long": (
        "twenty newsgroups, MiniLM, 512 tokens",
        TrainConfig(model="minilm", task="newsgroups", max_length=512, batch_size=8),
    ),
    "imdb": (
        "sentiment of film reviews, MiniLM, 512 tokens",
        TrainConfig(model="minilm", task="imdb", max_length=512, batch_size=8),
    ),
    "imdb_longer": (
        "sentiment of film reviews, MiniLM, 1024 tokens through windows of 128 to each side",
        TrainConfig(model="minilm", task="imdb", max_length=1024, window=128, batch_size=8),
    ),
    "fashion_mnist": (
        "clothes, the ViT at 56 pixels",
        TrainConfig(model="vit", task="fashion_mnist", train_size=4000, image_size=56),
    ),
    "cifar10": (
        "photographs, the ViT at 112 pixels",
        TrainConfig(model="vit", task="cifar10", image_size=112),
    ),
    "gsm_symbolic": (
        "generated school mathematics, SmolLM2; exact match by generation",
        TrainConfig(
            model="smollm2",
            task="gsm_symbolic",
            train_size=500,
            test_size=100,
            max_length=256,
            batch_size=8,
            choose_by="loss",
        ),
    ),
    "gsm_symbolic_short": (
        "the eight shortest kinds of generated school mathematics, SmolLM2; exact match by generation",
        TrainConfig(
            model="smollm2",
            task="gsm_symbolic_short",
            train_size=1000,
            validation_size=100,
            max_length=128,
            batch_size=8,
            max_new_tokens=80,
            choose_by="loss",
        ),
    ),
    "gsm8k": (
        "school mathematics, SmolLM2; exact match by generation",
        TrainConfig(model="smollm2", task="gsm8k", max_length=256, batch_size=8, choose_by="loss"),
    ),
}
"""Where a run starts from: ``python -m train NAME``."""
