"""From a configuration to what a run needs: the backbone, the task's data, the adapter, the loss, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from jax.sharding import Mesh

from ntk_prefix import models, peft
from ntk_prefix.checks import expected
from ntk_prefix.models.backbone import BackboneConfig
from ntk_prefix.models.formats import read_checkpoint
from ntk_prefix.models.loading import MODELS
from ntk_prefix.models.scan import check_alike
from ntk_prefix.sharding import AXES, check_divides
from ntk_prefix.training import Trainer
from ntk_prefix.typing import Array, Float
from train import assets, data, tasks
from train.command import byte_progress
from train.config import OptimConfig, TrainConfig, adapter_config
from train.ranking import contrastive_loss
from train.sources import Kind, check_source, spec_of

__all__ = [
    "Setup",
    "adapt",
    "build",
    "check_image_size",
    "load_model",
    "model_inputs",
    "normalization",
    "optimizer",
    "placement_of",
    "set_context_length",
    "trainer_of",
]

TINY_VIT = models.VitConfig(
    model_type="vit",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    patch_size=2,
)
"""The random model called tiny-vit; its images are as large as the run's."""

CALIBRATION_ROWS, CALIBRATION_TOKENS = 32, 4096
"""Most training examples that an adapter is calibrated on, and most tokens of them together: the T x T scores of all are
held at once."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """All parts of a run, before the first step."""

    config: TrainConfig
    model: nnx.Module
    task: tasks.Task
    trainer: Trainer
    tokenizer: tokenizers.Tokenizer | None
    model_source: str
    """The model's name; of one from the hub with the revision that was loaded."""


def build(config: TrainConfig) -> Setup:
    """Load what the configuration names.

    Raises:
        ValueError: something in it that does not fit; told before any training.
    """
    kind = spec_of(config.task).kind
    placement = placement_of(config, jax.devices())
    if kind == "ranking" and config.optim.accumulate > 1:
        hint = "Take a smaller --batch-size, with fewer of them"
        raise expected(
            "--accumulate", "1 for a ranking, whose negatives are the whole batch", config.optim.accumulate, hint
        )
    if kind == "ranking" and config.data.human is not None:
        from train.ranking_measures import read_choices  # and scikit-learn, which no other task needs

        read_choices(config.data.human)  # now, not when all steps are taken
    if config.window is not None and kind != "sequence-classification":
        raise expected("--window", f"none for {config.task}: only encoders of text see through windows", config.window)
    check_source(config.task, config.data.data_dir)  # before a model is fetched for it
    path = assets.model_path(config.model)
    _check_model(path, config)
    tokenizer = None if path is None else models.load_tokenizer(path)
    mean, std = normalization(path)
    task = tasks.load(config.task, config.data, tokenizer=tokenizer, image_mean=mean, image_std=std, seed=config.seed)
    if kind != "image-classification" and tokenizer is None:
        raise expected("--model", f"one with a tokenizer, for {config.task} is text", f"{config.model}, which has none")
    model = load_model(config, path, task.kind, task.num_labels, placement.get("mesh"))
    _check_vocabulary(model, task, config.model)
    check_image_size(model, task.kind, config.data.image_size)
    set_context_length(model, config)
    rows = max(1, min(CALIBRATION_ROWS, CALIBRATION_TOKENS // config.data.max_length))
    _, first = next(data.train_batches(task.train, rows, config.seed))
    adapt(model, config, model_inputs(model, first))
    trainer = trainer_of(config, task.kind, placement)
    trainer.lay_out_frozen(model)
    own = config.model == "tiny-vit" or config.model in assets.ASSETS
    return Setup(config, model, task, trainer, tokenizer, config.model if own else models.pinned(config.model))


def adapt(model: Any, config: TrainConfig, calibration: Mapping[str, Any]) -> None:
    """Make a pretrained model what a run trains: with the method's adapter, in the run's numbers.

    Args:
        model: changed in place.
        config: of the run.
        calibration: see :func:`ntk_prefix.peft.apply`.

    Raises:
        UsageError: ``--scan-layers`` with layers that differ.
    """
    peft.apply(
        model,
        adapter_config(config.method, config.adapter),
        calibration=calibration,
        rngs=nnx.Rngs(config.seed + 1),
    )
    peft.narrow_frozen(model)
    model.remat, model.scan_layers = config.device.remat, config.device.scan_layers
    if model.scan_layers:
        backbone = getattr(model, "backbone", model)
        check_alike(backbone.layers[backbone.unlike_layers :])


def trainer_of(config: TrainConfig, kind: str, placement: Mapping[str, Any]) -> Trainer:
    """Return how a run trains, on the devices of ``placement``: a mesh, devices of pmap, or nothing."""
    return Trainer(
        loss=loss_of(kind, config),
        optimizer=optimizer(config.optim),
        wrt=peft.AdapterParam,
        parallel=config.device.parallel,
        **placement,
    )


def _check_vocabulary(model: Any, task: tasks.Task, name: str) -> None:
    """Refuse token ids that the model has no embedding of: it would read NaN in their place.

    A tokenizer may know more tokens than the model, as long as no text has one.
    """
    known = getattr(getattr(model, "backbone", model).config, "vocab_size", math.inf)
    for split in filter(None, (task.train, task.validation, task.test, task.unrelated)):
        for column in {"input_ids", "prompt_ids", "candidate_ids"} & split.keys():
            if (largest := max((int(ids.max()) for ids in split[column] if len(ids)), default=0)) >= known:
                raise expected(
                    "--model", f"a tokenizer whose ids are below {known}, the model's", f"{largest} from {name}"
                )


def check_image_size(model: Any, kind: Kind, size: int) -> None:
    """Refuse images that do not divide into the model's patches, before the run takes its folder."""
    if kind == "image-classification" and size % (patch := model.backbone.config.patch_size):
        raise expected("--image-size", f"a multiple of the model's patches of {patch}", size)


def normalization(path: Path | None) -> models.ImageNormalization:
    """Return the mean and deviation that a model was trained on: its folder's word, or ImageNet's."""
    found = None if path is None else models.image_normalization(path)
    return found or models.ImageNormalization(tasks.IMAGENET_MEAN, tasks.IMAGENET_STD)


def load_model(
    config: TrainConfig, path: Path | None, kind: Kind, num_labels: int, mesh: Mesh | None = None
) -> nnx.Module:
    """Return the pretrained model with a head for a task of a kind, its weights laid out over the mesh if there is one."""
    rngs, dtype = nnx.Rngs(config.seed), jnp.dtype(config.device.precision)
    if kind == "ranking":
        if path is None:
            raise expected("--model", f"an encoder of text, for {config.task} is text", config.model)
        own: dict[str, Any] = {"dtype": dtype, "param_dtype": config.device.param_dtype, "mesh": mesh}
        with byte_progress(f"loading {config.model}") as progress:
            ranker = models.load_ranker(path, pooling=config.pooling, cosine=True, **own, progress=progress)
        ranker.tokenizer = nnx.static(None)  # the task has it; programs of runs are then alike
        return ranker
    if path is None:
        if config.device.param_dtype == "bfloat16":
            raise expected("--param-dtype", f"float32 for {config.model}, which is no file", "bfloat16")
        vit = models.Vit(dataclasses.replace(TINY_VIT, image_size=config.data.image_size), dtype=dtype, rngs=rngs)
        return models.Classifier(vit, num_labels, pooling=config.pooling, rngs=rngs)
    # a head of the checkpoint is taken on the pooling that it was trained on only
    head: dict[str, Any] = {} if kind == "causal-lm" else {"num_labels": num_labels, "pooling": config.pooling}
    with byte_progress(f"loading {config.model}") as progress:
        return models.from_pretrained(
            path,
            task=kind,
            **head,
            dtype=dtype,
            param_dtype=config.device.param_dtype,
            mesh=mesh,
            rngs=rngs,
            progress=progress,
        )


def set_context_length(model: nnx.Module, config: TrainConfig) -> None:
    """Let a model read the texts of a run, through its window if it has one, at positions that its adapter may shift.

    Raises:
        ValueError: a window on a decoder.
    """
    backbone: Any = getattr(model, "backbone", model)
    window = config.window
    if window is not None and not backbone.encoder:
        raise expected("--window", f"None for a decoder such as {type(backbone).__name__}", window)
    backbone.window = window
    longest = config.data.max_length
    if spec_of(config.task).kind == "ranking":
        longest = max(longest, config.data.suffix_length)
    positions = longest + sum(each.position_shift for each in adapter_config(config.method, config.adapter))
    if isinstance(backbone, models.Bert) and positions > backbone.config.max_tokens:
        backbone.extend_positions(positions)


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Array]:
    """Return what a model takes of a batch, as keyword arguments."""
    return {name: jnp.asarray(batch[name]) for name in model.input_names if name in batch}


def loss_of(kind: str, config: TrainConfig) -> Callable[[Any, Mapping[str, Array]], Float[Array, ""]]:
    """Return the loss of a kind of task, summed over the batch's rows, as :class:`Trainer` wants it.

    Classification: cross entropy, no label smoothing. Language: cross entropy of the answer's tokens, averaged over
    each row's own, so that every example counts alike, whatever its length and whichever device holds it. Ranking: see
    :mod:`train.ranking`.
    """

    def classification(model: Any, batch: Mapping[str, Array]) -> Float[Array, ""]:
        logits = model(**model_inputs(model, batch)).logits.astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(each * batch["weight"])

    def language(model: Any, batch: Mapping[str, Array]) -> Float[Array, ""]:
        hidden, _ = model.hidden(**model_inputs(model, batch))
        # each position is to say the next token; the last has nothing to say
        labels = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        answer = labels >= 0
        share = batch["weight"] / jnp.maximum(answer.sum(axis=1), 1)
        return model.loss(hidden, labels, answer * share[:, None])

    def ranking(model: Any, batch: Mapping[str, Array]) -> Float[Array, ""]:
        replicas = config.device.parallel == "pmap"
        return contrastive_loss(model, batch, config.optim.temperature, "rows" if replicas else None)

    return {"causal-lm": language, "ranking": ranking}.get(kind, classification)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Return AdamW with the configured schedule; a rate of its own for the head; k projected to >= 0.

    Rates are data of the optimizer's state: runs that differ in nothing else share their compiled programs.
    """
    warmup = round(config.warmup * config.steps)
    decay = max(config.steps - warmup, 1)
    after: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(1, decay),
        "linear": optax.linear_schedule(1, 0, decay),
        "constant": optax.constant_schedule(1),
    }
    rise = optax.linear_schedule(1 / max(warmup, 1), 1, max(warmup - 1, 1))
    schedule = optax.join_schedules([rise, after[config.schedule]], [warmup])

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.adamw(schedule, weight_decay=config.weight_decay),
            optax.inject_hyperparams(optax.scale)(step_size=peak),
        )

    rates = {"adapter": config.learning_rate, "head": config.head_learning_rate}
    if config.k_learning_rate is not None:
        rates["k"] = config.k_learning_rate

    def group_of(path: tuple[Any, ...], _: Any) -> str:
        names = [str(getattr(key, "key", "")) for key in path]
        return next((name for name in ("head", "k") if name in rates and name in names), "adapter")

    def group(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(group_of, tree)

    parts = {name: adamw(peak) for name, peak in rates.items()}
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    whole = peft.non_negative(optax.chain(clip, optax.partition(parts, group)))
    if config.accumulate == 1:
        return whole
    every = optax.MultiSteps(whole, config.accumulate)
    return optax.GradientTransformation(every.init, every.update)


def _check_model(path: Path | None, config: TrainConfig) -> None:
    """Refuse what a model cannot do, by what its files say of it: before its weights are read.

    Raises:
        UsageError: a window for a decoder, a mesh that does not divide the model, or files that cannot be read.
    """
    device = config.device
    if config.window is None and device.fsdp == device.tensor == 1:
        return
    sizes: BackboneConfig = TINY_VIT
    if path is not None:
        described = read_checkpoint(path).config
        model_type = described.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODELS:
            return  # loading says so
        config_class, model_class = MODELS[model_type]
        if config.window is not None and not model_class.encoder:
            raise expected("--window", f"none for a decoder such as {model_type}", config.window)
        sizes = config_class.from_hugging_face(described)
    check_divides(sizes, fsdp=device.fsdp, tensor=device.tensor)


def placement_of(config: TrainConfig, there: Sequence[jax.Device]) -> dict[str, Any]:
    """Return the trainer's devices, of those that are there: a mesh (data, fsdp, tensor), a list for pmap, nothing for one.

    Raises:
        UsageError: more devices than there are, a mesh that they do not make, or rows of a step that do not divide among
            them.
    """
    wanted = config.device
    if wanted.devices is not None and jax.process_count() > 1:
        raise expected("--devices", "all of them with several processes", wanted.devices)
    if wanted.devices is not None and wanted.devices > len(there):
        raise expected("--devices", f"at most the {len(there)} that are here", wanted.devices)
    there = there[: wanted.devices]
    for name, size in (("fsdp", wanted.fsdp), ("tensor", wanted.tensor)):
        if len(there) % size:
            raise expected(f"--{name}", f"a divisor of the {len(there)} devices", size)
    if len(there) % (wanted.fsdp * wanted.tensor):
        sizes = f"{wanted.fsdp} x {wanted.tensor}"
        raise expected("--fsdp times --tensor", f"a divisor of the {len(there)} devices", sizes)
    here = len(there) // jax.process_count()
    if here % wanted.tensor:
        raise expected("--tensor", f"a divisor of the {here} devices of a process, which share rows", wanted.tensor)
    rows, shares = config.optim.batch_size // config.optim.accumulate, len(there) // wanted.tensor
    if rows % shares:
        raise expected(
            "--batch-size", f"rows divisible by the {shares} devices in each part of a step", f"{rows} per part"
        )
    if wanted.parallel == "pmap":
        return {} if wanted.devices is None else {"devices": tuple(there)}
    if len(there) == 1:
        return {}
    # tensor innermost: it talks most, over the shortest links
    return {"mesh": Mesh(np.array(there).reshape(-1, wanted.fsdp, wanted.tensor), AXES)}
