"""What a run is: one frozen record, from a name and what the command line changes in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import msgspec

from ntk_prefix import peft
from ntk_prefix.artifacts import read_json
from ntk_prefix.checks import UsageError, expected
from train.command import Checked, at_least, field_types, typed_changes

__all__ = [
    "CONFIGS",
    "FIELD_TYPES",
    "METHODS",
    "DataConfig",
    "DeviceConfig",
    "EvalConfig",
    "OptimConfig",
    "RematPolicy",
    "TrainConfig",
    "adapter_config",
]

RematPolicy = Literal["full", "dots", "dots_saveable"]
"""The names of models.backbone.REMAT_POLICIES, for the command line."""

METHODS = peft.PRESETS
"""The methods by the names that the command line and the tables use; ``adapter`` changes their fields."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What rows there are, and how they are read."""

    data_dir: str | None = None
    """A file of rows (csv, tsv, jsonl, json, parquet, arrow), a folder with one of each split (Hugging Face or GLUE layout,
    or what datasets.save_to_disk wrote), or hub:owner/name; None takes the task's own source."""
    text_column: str | None = None
    """What the column with the text is called in your files; None tries the usual names."""
    text_pair_column: str | None = None
    """The second text of a pair."""
    image_column: str | None = None
    """Images, or their paths beside the file."""
    label_column: str | None = None
    """Classes: names, numbers such as stars from 1 to 5, or true and false."""
    question_column: str | None = None
    """What is asked (instruct, math)."""
    answer_column: str | None = None
    """What shall be answered (instruct, math)."""
    train_size: int | None = None
    """Training examples to sample; None is all."""
    validation_size: int | float | None = 500
    """Examples split off the training data, for early stopping and for choosing; a number below 1 is a share of them, None
    a tenth, 1,000 at most."""
    test_size: int | None = None
    """Test examples to sample; None is all."""
    test_beyond: int = 0
    """Leave out the test examples that a sample of this size has, so that these are ones no earlier table has read."""
    max_length: int = 128
    """Tokens after which a text is cut; a BERT with fewer positions gets its own again."""
    image_size: int = 56
    """Height and width that images are resized to."""
    grouped: int = 32
    """Batches of text that are drawn together and divided by length, for less padding; 1 leaves them as drawn."""
    suffix_length: int = 64
    """Tokens after which a continuation is cut (ranking); max_length is of the beginning, whose last ones are read."""
    negatives: int = 1
    """Other spans of its document that a row brings to the batch (ranking)."""
    generated: str | None = None
    """File of continuations that a decoder wrote, of python -m train.write_negatives (ranking)."""
    generated_negatives: int = 0
    """Of these, how many a row brings to the batch; the test split is measured on all."""
    human: str | None = None
    """File of people's choices between two continuations, that a ranker's are compared with at the end: lines with prefix,
    ranked, sampled, votes_ranked, votes_sampled (ranking)."""
    prompt_template: str | None = None
    """What a question is put into, at its {} (instruct, math); None is the turns of a chat model, or a plain form."""
    unrelated: str | None = None
    """Text that a decoder's forgetting is measured on: reviews (an asset), a .txt file of texts parted by empty lines, a
    table with a column "text", or none; None is the reviews if they can be had."""
    unrelated_rows: int = 32
    """How many texts of it."""
    unrelated_length: int = 128
    """Tokens after which each is cut."""

    @property
    def columns(self) -> dict[str, str | None]:
        """Our name of a column -> its name in the files, None where that is not said."""
        ours = ("text", "text_pair", "image", "label", "question", "answer")
        return {name: getattr(self, f"{name}_column") for name in ours}

    def check(self) -> None:
        """Refuse sizes that no data can have."""
        for name in ("train_size", "test_size", "image_size", "grouped", "unrelated_rows"):
            at_least(name, getattr(self, name), 1)
        at_least("validation_size", self.validation_size, 0)
        if self.validation_size is not None and not (
            0 < self.validation_size < 1 or (self.validation_size >= 1 and float(self.validation_size).is_integer())
        ):
            raise expected("--validation-size", "a number of rows, or a share of them below 1", self.validation_size)
        for name in ("test_beyond", "negatives", "generated_negatives"):
            at_least(name, getattr(self, name), 0)
        if self.generated_negatives and self.generated is None:
            raise expected("--generated-negatives", "--generated beside it", self.generated_negatives)
        at_least("suffix_length", self.suffix_length, 4)
        at_least("max_length", self.max_length, 8)
        at_least("unrelated_length", self.unrelated_length, 2)
        if self.prompt_template is not None and self.prompt_template.count("{}") != 1:
            raise expected("--prompt-template", "text with one {}, for the question", repr(self.prompt_template))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """What is descended, in which steps."""

    steps: int = 500
    """Optimizer steps. More for a finished run: it goes on, see train/README.md."""
    batch_size: int = 32
    """Examples per step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Parts that a step's batch is computed in, one after the other."""
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
    temperature: float = 0.05
    """What cosines are divided by in the loss (ranking)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def check(self) -> None:
        """Refuse steps that mean nothing: rates are finite and do not climb."""
        for name in ("steps", "batch_size", "accumulate"):
            at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "head_learning_rate", "k_learning_rate", "weight_decay", "clip"):
            at_least(name, getattr(self, name), 0)
        if self.batch_size % self.accumulate:
            raise expected("--accumulate", f"a divisor of the batch size {self.batch_size}", self.accumulate)
        # cosines over less are no numbers of float32
        at_least("temperature", self.temperature, 1e-30)
        if not 0 <= self.warmup < 1:
            raise expected("--warmup", "a fraction of the steps in [0, 1)", self.warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
    """When the validation split is evaluated, and which step is kept."""

    evaluate_every: int = 100
    """Steps between evaluations on the validation split."""
    choose_by: Literal["score", "loss"] = "score"
    """What says on the validation split which step to keep: the score, the loss breaking ties, or the loss alone, which a
    few hundred examples measure better."""
    patience: int = 5
    """Evaluations without improvement after which training stops; 0 never stops."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    max_new_tokens: int = 160
    """Of generated answers (math)."""
    test: bool = True
    """Read the test split at the end; a run that did not is brought up to it by the same command with it."""
    before: bool = True
    """With the test split, also answer it as the model was at the start (math), which takes as long again."""

    def check(self) -> None:
        """Refuse intervals below one step."""
        for name in ("evaluate_every", "checkpoint_every", "max_new_tokens"):
            at_least(name, getattr(self, name), 1)
        at_least("patience", self.patience, 0)

    def selection_metric(self, score: float, loss: float) -> float:
        """Return how good a state is by what the validation split says of it; larger is better."""
        # a split of a few hundred rows has ties in the score
        return -loss if self.choose_by == "loss" else score - 1e-6 * loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceConfig(Checked):
    """Where it is computed, and in which numbers."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations and frozen linear maps; what is trained, norms, embeddings and optimizer stay in float32."""
    param_dtype: Literal["float32", "bfloat16", "file"] = "float32"
    """What the pretrained weights are kept in; file is each tensor's own, so that a bfloat16 checkpoint is held once, in
    bfloat16. What is trained is float32."""
    remat: bool | RematPolicy = False
    """Recompute the activations of each layer in the backward pass: all of them (alone, or "full"), or all but products with
    weights ("dots"), or all but any matrix product ("dots_saveable")."""
    scan_layers: bool = False
    """Run layers as a loop over one: same numbers; a deep model compiles in the time of one layer, and a CPU widens bfloat16
    weights one layer at a time. Layers have to be alike."""
    parallel: Literal["jit", "pmap"] = "jit"
    """One program over a mesh, or one per device."""
    fsdp: int = 1
    """Devices among which rows are divided and weights are shared, each gathered where it is used (jit only)."""
    tensor: int = 1
    """Devices among which heads, the MLP's width and the vocabulary are divided; a divisor of the key-value heads (jit
    only). What is left of the devices divides rows alone."""
    devices: int | None = None
    """How many devices to use; None is all."""

    def check(self) -> None:
        """Refuse counts that no machine has; whether this one has them is found out when they are taken."""
        at_least("devices", self.devices, 1)
        for name in ("fsdp", "tensor"):
            at_least(name, size := getattr(self, name), 1)
            if size > 1 and self.parallel == "pmap":
                raise expected(f"--{name}", "1 with --parallel pmap, which has a replica on every device", size)


SECTIONS: dict[str, type[Checked]] = {
    "data": DataConfig,
    "optim": OptimConfig,
    "eval": EvalConfig,
    "device": DeviceConfig,
}
"""The parts of a :class:`TrainConfig`."""

SECTION_OF: dict[str, str] = {
    field.name: name
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)  # type: ignore[arg-type]
}
"""The section of each field; a field's name is in one only, so that a flag needs no prefix."""

LARGEST_SEED = 2**32 - 2
"""NumPy takes 32 bits, and the adapter is drawn by the seed after this one."""


class _Sectioned(type):
    """Lets a configuration be made by flat keywords as well.

    ``TrainConfig(..., max_length=16)``, and ``dataclasses.replace(config, max_length=16)``.
    """

    def __call__(cls, **values: Any) -> Any:
        for name in [name for name in values if name in SECTION_OF]:
            section = SECTION_OF[name]
            before: Any = values.get(section) or SECTIONS[section]()
            values[section] = dataclasses.replace(before, **{name: values.pop(name)})
        return super().__call__(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked, metaclass=_Sectioned):
    """One fine-tuning run.

    Its parts are :class:`DataConfig`, :class:`OptimConfig`, :class:`EvalConfig` and :class:`DeviceConfig`; their fields may
    be given as keywords of this class, which knows whose they are.
    """

    model: str
    """An asset (minilm, vit, smollm2), a Hugging Face folder, a .gguf or .onnx file, or tiny-vit (random weights)."""
    task: str
    """One of train.sources.TASKS; text, pair, image, instruct and ranking are for your own rows, see --data-dir."""
    method: str = "ntk_attention"
    """One of train.config.METHODS."""
    adapter: tuple[str, ...] = ()
    """Fields of the method's configuration to change, such as ``r=16`` or ``target=layers.0``; values are JSON or text."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How a classifier reads the sequence; prefix propagation has its own way, --adapter pool=prefix, cls or model."""
    window: int | None = None
    """Tokens that a token of an encoder sees to each side; all if None."""
    seed: int = 0
    """Of the split, the order, the head and the adapter."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    device: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)

    def check(self) -> None:
        """Refuse what cannot run, before anything is loaded."""
        for section in SECTIONS:
            getattr(self, section).check()
        if self.method not in METHODS:
            raise expected("--method", f"one of {', '.join(METHODS)}", repr(self.method))
        if self.window is not None and self.window < 1:
            raise expected("--window", "at least 1 token to each side, or None", self.window)
        at_least("window", self.window, 1)
        if not 0 <= self.seed <= LARGEST_SEED:
            raise expected("--seed", f"an integer from 0 to {LARGEST_SEED}", self.seed)
        configs = adapter_config(self.method, self.adapter)
        own = [c.pooling for c in configs if c.pooling is not None]
        if own and self.pooling != "mean":
            raise expected(
                "--pooling",
                f"it left alone with {self.method}, which reads its own {own[0]!r} row",
                repr(self.pooling),
                "Use --adapter pool=cls, or pool=model to read as --pooling says",
            )

    def changed(self, **fields: Any) -> TrainConfig:
        """Return this configuration with some fields changed, those of its parts included."""
        return dataclasses.replace(self, **fields)

    def flat(self) -> dict[str, Any]:
        """Return every field by its name, without sections."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for section in SECTIONS:
            part = values.pop(section)
            values |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return values

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for files: nested as the configuration is."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, name: str = "configuration") -> TrainConfig:
        """Return the configuration of a file, with sections or, as older versions wrote it, without.

        A field that is not there, for its version did not have it, is what it is by default.

        Raises:
            UsageError: a field is unknown, missing or of another type, or its value cannot be meant; it begins with
                ``name``.
        """
        if not isinstance(values, dict):
            raise expected(name, "an object of fields", type(values).__name__)
        nested: dict[str, Any] = {key: value for key, value in values.items() if key not in SECTION_OF}
        for key in values.keys() & SECTION_OF.keys():
            part = nested.setdefault(SECTION_OF[key], {})
            if not isinstance(part, dict):
                raise expected(f"{name}: {SECTION_OF[key]}", "an object of fields", type(part).__name__)
            nested[SECTION_OF[key]] = {**part, key: values[key]}
        known = {None: {field.name for field in dataclasses.fields(cls)}} | {
            section: {field for field, of in SECTION_OF.items() if of == section} for section in SECTIONS
        }
        for section, fields in known.items():
            there = nested if section is None else nested.get(section, {})
            if unknown := sorted(set(there) - fields) if isinstance(there, dict) else []:
                where = name if section is None else f"{name}: {section}"
                raise expected(where, f"fields of {', '.join(sorted(fields))}", ", ".join(map(repr, unknown)))
        try:
            return msgspec.convert(nested, cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, UsageError):  # a check of ours
                raise UsageError(f"{name}: {error.__cause__}") from None
            raise expected(name, "fields of the right types", f"this: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> TrainConfig:
        """Return the configuration of a config.json.

        Raises:
            UsageError: as :meth:`from_dict`, naming the file; or there is none.
        """
        return cls.from_dict(read_json(path, dict[str, Any]), str(path))


_OWNERS: tuple[type, ...] = (TrainConfig, *SECTIONS.values())

FIELD_TYPES: dict[str, Any] = {
    name: kind for owner in _OWNERS for name, kind in field_types(owner).items() if name not in SECTIONS
}
"""The type of every field of a run, by its flat name."""


def adapter_config(method: str, changes: tuple[str, ...] = ()) -> tuple[peft.AdapterConfig, ...]:
    """Return the method's configurations with ``field=value`` changes applied.

    Raises:
        UsageError: a change without "=", of a field that no configuration of the method has, or to a value of another
            type.
    """
    configs = METHODS[method]
    kinds = {name: kind for config in configs for name, kind in field_types(type(config)).items()}
    values = typed_changes("--adapter", changes, kinds, of=f" for {method}")

    def changed(config: peft.AdapterConfig) -> peft.AdapterConfig:
        # all at once: a map and its options only make sense together
        own = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **{name: value for name, value in values.items() if name in own})

    return tuple(map(changed, configs))


RANKING = TrainConfig(
    model="minilm",
    task="ranking",
    data=DataConfig(max_length=96, suffix_length=48, validation_size=None),
    # W starts as the identity
    optim=OptimConfig(batch_size=16, head_learning_rate=1e-3),
    eval=EvalConfig(choose_by="loss"),
)
"""What the rankings have in common."""

RANKING_SIZES: dict[str, Any] = {"validation_size": 64, "test_size": 200}
"""Of the large ones, each row of which is measured among up to 27 other texts."""

CONFIGS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "digits with a random two-layer vision transformer: seconds, no downloads; to see that everything runs",
        TrainConfig(
            model="tiny-vit",
            task="digits",
            method="full",
            data=DataConfig(image_size=8),
            # the head's rate is that of everything else: nothing of it is pretrained
            optim=OptimConfig(steps=60, batch_size=64, learning_rate=3e-3, head_learning_rate=3e-3),
            eval=EvalConfig(evaluate_every=20, checkpoint_every=20),
        ),
    ),
    "text": (
        "your own texts and classes, MiniLM: --data-dir FILE --text-column NAME --label-column NAME",
        TrainConfig(model="minilm", task="text", data=DataConfig(validation_size=None)),
    ),
    "pair": (
        "your own pairs of texts and classes, MiniLM: --data-dir FILE --text-column NAME --text-pair-column NAME ...",
        TrainConfig(model="minilm", task="pair", data=DataConfig(validation_size=None)),
    ),
    "image": (
        "your own images and classes, the ViT at 112 pixels: --data-dir FILE --image-column NAME --label-column NAME",
        TrainConfig(model="vit", task="image", data=DataConfig(image_size=112, validation_size=None)),
    ),
    "instruct": (
        "your own questions and answers, SmolLM2: --data-dir FILE --question-column NAME --answer-column NAME",
        TrainConfig(
            model="smollm2",
            task="instruct",
            data=DataConfig(max_length=256, validation_size=None),
            optim=OptimConfig(batch_size=8),
            eval=EvalConfig(choose_by="loss"),
        ),
    ),
    "ranking": (
        "which continuation fits, your own documents or pairs, MiniLM: --data-dir FILE --text-column NAME",
        RANKING,
    ),
    "ranking_reviews": (
        "which continuation fits, MiniLM, film reviews",
        RANKING.changed(**RANKING_SIZES),
    ),
    "ranking_generated": (
        "the same beside continuations that a decoder wrote: --generated FILE",
        RANKING.changed(**RANKING_SIZES, generated="generated.jsonl", generated_negatives=1),
    ),
    "ranking_newsgroups": (
        "which continuation fits, MiniLM, newsgroups",
        RANKING.changed(**RANKING_SIZES, task="ranking_newsgroups"),
    ),
    "rte": (
        "textual entailment, MiniLM",
        TrainConfig(model="minilm", task="rte", data=DataConfig(max_length=128, validation_size=250)),
    ),
    "sst2": (
        "sentiment of sentences, MiniLM",
        TrainConfig(model="minilm", task="sst2", data=DataConfig(max_length=64, train_size=4000)),
    ),
    "rotten_tomatoes": (
        "sentiment of short reviews, MiniLM",
        TrainConfig(model="minilm", task="rotten_tomatoes", data=DataConfig(max_length=64)),
    ),
    "newsgroups": (
        "twenty newsgroups, MiniLM, 128 tokens",
        TrainConfig(model="minilm", task="newsgroups", data=DataConfig(train_size=4000, max_length=128)),
    ),
    "newsgroups_long": (
        "twenty newsgroups, MiniLM, 512 tokens",
        TrainConfig(
            model="minilm", task="newsgroups", data=DataConfig(max_length=512), optim=OptimConfig(batch_size=8)
        ),
    ),
    "imdb": (
        "sentiment of film reviews, MiniLM, 512 tokens",
        TrainConfig(model="minilm", task="imdb", data=DataConfig(max_length=512), optim=OptimConfig(batch_size=8)),
    ),
    "imdb_longer": (
        "sentiment of film reviews, MiniLM, 1024 tokens through windows of 128 to each side",
        TrainConfig(
            model="minilm", task="imdb", window=128, data=DataConfig(max_length=1024), optim=OptimConfig(batch_size=8)
        ),
    ),
    "fashion_mnist": (
        "clothes, the ViT at 56 pixels",
        TrainConfig(model="vit", task="fashion_mnist", data=DataConfig(train_size=4000, image_size=56)),
    ),
    "cifar10": (
        "photographs, the ViT at 112 pixels",
        TrainConfig(model="vit", task="cifar10", data=DataConfig(image_size=112)),
    ),
    "gsm_symbolic": (
        "generated school mathematics, SmolLM2; exact match by generation",
        TrainConfig(
            model="smollm2",
            task="gsm_symbolic",
            data=DataConfig(train_size=500, test_size=100, max_length=256),
            optim=OptimConfig(batch_size=8),
            eval=EvalConfig(choose_by="loss"),
        ),
    ),
    "gsm_symbolic_short": (
        "the eight shortest kinds of generated school mathematics, SmolLM2; exact match by generation",
        TrainConfig(
            model="smollm2",
            task="gsm_symbolic_short",
            data=DataConfig(train_size=1000, validation_size=100, max_length=128),
            optim=OptimConfig(batch_size=8),
            eval=EvalConfig(max_new_tokens=80, choose_by="loss"),
        ),
    ),
    "metamath": (
        "MetaMathQA to GSM8K, SmolLM2: --data-dir with MetaMathQA-395K.json and GSM8K's test.jsonl",
        TrainConfig(
            model="smollm2",
            task="metamath",
            data=DataConfig(max_length=512, validation_size=50),
            optim=OptimConfig(batch_size=8),
            eval=EvalConfig(max_new_tokens=300, choose_by="loss"),
        ),
    ),
    "gsm8k": (
        "school mathematics, SmolLM2; exact match by generation",
        TrainConfig(
            model="smollm2",
            task="gsm8k",
            data=DataConfig(max_length=256),
            optim=OptimConfig(batch_size=8),
            eval=EvalConfig(choose_by="loss"),
        ),
    ),
}
"""Where a run starts from: ``python -m train NAME``."""
