"""What a table of ``train.compare`` has in it: rows, tasks, sizes, learning rates; a profile is one such choice."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from train.config import CONFIGS

Row = tuple[str, str, tuple[str, ...]]
"""Label, method, changes of its configuration."""

ABLATION_ROWS: tuple[Row, ...] = (
    ("ntk", "ntk_attention", ()),
    ("features not white", "ntk_attention", ("whiten=false",)),
    ("absolute mass", "ntk_attention", ("mass=absolute",)),
    ("neither: published", "ntk_attention_published", ()),
    ("published, from a prefix", "ntk_attention_published", ("init=from_prefix",)),
    ("k = 0", "ntk_attention", ("train_k=false",)),
    ("k = 0, elu", "ntk_attention", ("train_k=false", "feature_map=elu")),
    ("k = 0, gelu", "ntk_attention", ("train_k=false", "feature_map=gelu")),
    (
        "32 positive random features",
        "ntk_attention",
        ("feature_map=positive_random", 'feature_map_options=[["features",32]]'),
    ),
    (
        "32 anchors",
        "ntk_attention",
        ("feature_map=normalized_anchors", 'feature_map_options=[["features",32]]'),
    ),
    ("rank 4", "ntk_attention", ("rank=4",)),
    ("rank 8", "ntk_attention", ("rank=8",)),
)
"""Of NTK-Attention itself; a rate of its own for k is ``--set k_learning_rate=...``."""

LONG_ROWS: tuple[Row, ...] = (
    ("lora r=8", "lora", ()),
    ("prefix 16", "prefix_tuning", ("num_tokens=16",)),
    ("propagation 32", "prefix_propagation", ("num_prefix_tokens=32",)),
    # half of the weights of the row above it: what the paper's claim is about
    ("propagation 16", "prefix_propagation", ("num_prefix_tokens=16",)),
    ("propagation 16, mean", "prefix_propagation", ("num_prefix_tokens=16", "pool=model")),
    ("ntk", "ntk_attention", ()),
)
"""Of long documents: MiniLM's 6 layers of 384; 32 propagated rows are as much as 16 tokens of prefix tuning."""

YARDSTICK_ROWS: tuple[Row, ...] = (
    ("full", "full", ()),
    ("lora r=32", "lora", ("r=32", "alpha=64")),
    # as peft starts its embedding, and as its init_weights="zero" does
    ("prefix 200", "prefix_tuning", ("num_tokens=200", "init_scale=1.0", "shift_positions=true")),
    ("prefix 200, zero", "prefix_tuning", ("num_tokens=200", "init_scale=0.0", "shift_positions=true")),
    # the third version of arXiv 2506.13674 calls Prefix-Tuning+ so: a trained memory matrix behind a feature map, outside
    # of the softmax, which is what prefix_tuning_plus computes. Its code was not to be had here: whether its feature map
    # or its start differ from those of the second version's is not known
    ("prefixmemory", "prefix_tuning_plus", ()),
    ("ntk", "ntk_attention", ()),
)
"""Of the method comparison of Hugging Face's peft (``method_comparison/MetaMathQA`` at 5d602fd), with its settings of the
rows that it has, and the methods of states that it has not. Its best prefix, 50 tokens whose keys and values start as those
of a system prompt, is missing: ours do not start from text."""

_RANKING_ROWS: tuple[Row, ...] = (
    ("full", "full", ()),
    # W alone: twice as many numbers as an adapter
    ("projection", "head", ()),
    # and adapters without it, within 4 % of each other
    ("lora r=8", "lora", ("train_head=false",)),
    ("prefix 16", "prefix_tuning", ("num_tokens=16", "train_head=false")),
    ("ntk", "ntk_attention", ("train_head=false",)),
)
_BESIDE_GENERATED = tuple((f"{label}, generated", method, fields) for label, method, fields in _RANKING_ROWS)
RANKING_ROWS = _RANKING_ROWS + _BESIDE_GENERATED
"""Of a ranker made of MiniLM; the second half is of the task whose rows bring what a decoder wrote."""

SHARED_ROWS: tuple[Row, ...] = (
    ("full", "full", ()),
    ("head", "head", ()),
    ("bitfit", "bitfit", ()),
)

MODEL_ROWS: dict[str, tuple[Row, ...]] = {
    # 12 heads of 32 in 6 layers: r = 8, 16 tokens and a full state are within 4 % of each other
    "minilm": (
        *SHARED_ROWS,
        ("lora r=8", "lora", ()),
        ("prefix 16", "prefix_tuning", ("num_tokens=16",)),
        ("prefix-tuning+", "prefix_tuning_plus", ()),
        ("ntk published", "ntk_attention_published", ()),
        ("ntk", "ntk_attention", ()),
    ),
    # 6 heads of 64 in 12 layers: a state is as much as r = 16 or 32 tokens; rank 16 as much as r = 8
    "vit": (
        *SHARED_ROWS,
        ("lora r=8", "lora", ()),
        ("lora r=16", "lora", ("r=16",)),
        ("prefix 32", "prefix_tuning", ("num_tokens=32",)),
        ("prefix-tuning+", "prefix_tuning_plus", ()),
        ("ntk published", "ntk_attention_published", ()),
        ("ntk rank 16", "ntk_attention", ("rank=16",)),
        ("ntk", "ntk_attention", ()),
    ),
    # 9 heads of 64 that share 3 of keys, in 30 layers; no biases and no head to train
    "smollm2": (
        ("full", "full", ()),
        ("lora r=19", "lora", ("r=19",)),
        ("prefix 96", "prefix_tuning", ("num_tokens=96",)),
        ("prefix-tuning+", "prefix_tuning_plus", ()),
        ("ntk published", "ntk_attention_published", ()),
        ("ntk", "ntk_attention", ()),
    ),
}
"""The rows of a task's table, by its model; count-matched groups as the comments say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One table."""

    tasks: dict[str, dict[str, Any]]
    """Its tasks, with what it changes in the configuration of each; the same for every method."""
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What it changes in all of them."""
    rows: tuple[Row, ...] = ()
    """Its methods; those of each task's model for none."""
    labels: tuple[str, ...] = ()
    """Those of them that it has; all for none."""
    without: tuple[tuple[str, str], ...] = ()
    """Tasks and labels of rows that it leaves out."""
    grid: tuple[float, ...] = (5e-5, 5e-4, 5e-3, 5e-2)
    """Learning rates that every row is tuned over: low enough for all weights, high enough for a prefix."""
    own_grids: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Labels of rows with learning rates of their own, where a setting is somebody else's."""
    references: tuple[str, ...] = ()
    """Tasks that also have the rows of :mod:`train.ranking_references`, for which nothing is trained."""
    seeds: int = 3
    """Runs of each row's best rate."""

    def rows_of(self, task: str) -> tuple[Row, ...]:
        """Return the rows of a task."""
        rows = self.rows or MODEL_ROWS[CONFIGS[task][1].model]
        return tuple(
            row for row in rows if (not self.labels or row[0] in self.labels) and (task, row[0]) not in self.without
        )


def _all_of_it(steps: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Tasks with all of their data and these steps, for a GPU."""
    whole = {"train_size": None, "test_size": None, "batch_size": 32}
    return {name: {**whole, "steps": count, "evaluate_every": count // 20} for name, count in steps.items()}


Name = Literal[
    "small",
    "confirm",
    "full",
    "ablation",
    "math",
    "math_short",
    "long",
    "long_full",
    "yardstick",
    "yardstick_small",
    "ranking",
]

_YARDSTICK: dict[str, Any] = {
    "model": "meta-llama/Llama-3.2-3B",
    "prompt_template": "Question: {} Think step by step.\nAnswer:",
    "max_length": 768,
    "batch_size": 4,
    "grouped": 20,
    "steps": 5000,
    "warmup": 0.1,
    "weight_decay": 0.1,
    "validation_size": 50,
    "evaluate_every": 250,
    "checkpoint_every": 1000,
    "patience": 0,
    "max_new_tokens": 300,
    "before": False,
    "precision": "bfloat16",
    "param_dtype": "bfloat16",
    "unrelated_rows": 100,
    "unrelated_length": 768,
}
"""What the method comparison of peft has for all rows: steps, rows of a step, AdamW with warm-up and cosine decay, lengths,
prompt and bfloat16. What differs here: the loss is of the answer alone, each row's own mean (theirs also of the question,
each token alike); the answer ends in the end token in every row (theirs not in the longest of a batch); rows above 768
tokens are left out (theirs by 1,300 characters); the weights that are kept are those with the lowest validation loss (theirs
the last); forgetting is on film reviews, unless ``--set unrelated=FILE`` names their wiki pages; three seeds (theirs one)."""

_SAMPLE = {"train_size": 4000, "checkpoint_every": 200, "patience": 0}

_SMALL_SHARED = {**_SAMPLE, "batch_size": 16, "validation_size": 300, "evaluate_every": 50}

_SMALL_TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"steps": 200},
    "fashion_mnist": {"steps": 150, "test_size": 1500},
    "newsgroups": {"steps": 100, "test_size": 1000},
    "rte": {"steps": 100, "validation_size": 250, "train_size": None},
}

PROFILES: dict[Name, Profile] = {
    # about three hours of two cores in all
    "small": Profile(tasks=_SMALL_TASKS, shared=_SMALL_SHARED),
    # the rows of equal count on test rows that nothing was designed on, steps and rates chosen by the validation loss;
    # the grid goes one step beyond the rate that prefixes chose: about three hours of one core
    "confirm": Profile(
        tasks={
            "newsgroups": {"steps": 200, "test_beyond": 1000, "test_size": 3000},
            "fashion_mnist": {"steps": 150, "test_beyond": 1500, "test_size": 3000},
            "rotten_tomatoes": {"steps": 200},
        },
        shared={**_SMALL_SHARED, "validation_size": 500, "choose_by": "loss"},
        labels=("lora r=8", "lora r=16", "prefix 16", "prefix 32", "ntk published", "ntk"),
        without=(("fashion_mnist", "lora r=8"),),
        grid=(5e-4, 5e-3, 5e-2, 5e-1),
    ),
    "full": Profile(
        tasks=_all_of_it(
            {
                "rte": 2000,
                "sst2": 6000,
                "newsgroups": 4000,
                "rotten_tomatoes": 2000,
                "fashion_mnist": 6000,
                "cifar10": 3000,
            }
        )
    ),
    # what each part of the parametrization is for, in the setting of the table: about two hours of two cores
    "ablation": Profile(
        tasks={name: _SMALL_TASKS[name] for name in ("sst2", "fashion_mnist", "newsgroups")},
        shared=_SMALL_SHARED,
        rows=ABLATION_ROWS,
        # one of the ViT's heads has keys of mass e^215, which no float32 state of absolute mass can hold
        without=(("fashion_mnist", "published, from a prefix"),),
        grid=(5e-4, 5e-3, 5e-2),
    ),
    # generated school mathematics, exact match by generation: about two hours of two cores
    "math": Profile(
        tasks={"gsm_symbolic": {"steps": 40, "evaluate_every": 40, "validation_size": 40, "test_size": 64}},
        grid=(1e-4, 1e-3, 1e-2),
        seeds=1,
    ),
    # eight kinds of it, which so few steps can teach: two to three hours of one core
    "math_short": Profile(
        tasks={"gsm_symbolic_short": {"steps": 40, "evaluate_every": 40, "test_size": 96}},
        grid=(1e-4, 1e-3, 1e-2),
        seeds=1,
    ),
    # long documents, 8 per step: about three hours of two cores in all
    "long": Profile(
        tasks={"newsgroups_long": {}, "imdb": {}},
        shared={
            **_SAMPLE,
            "batch_size": 8,
            "validation_size": 200,
            "test_size": 500,
            "steps": 80,
            "evaluate_every": 40,
        },
        rows=LONG_ROWS,
        grid=(5e-4, 5e-3, 5e-2),
    ),
    # all of them, and reviews of up to 1024 tokens through windows; the grid's ends are those of arXiv 2305.12086
    "long_full": Profile(
        tasks=_all_of_it({"newsgroups_long": 6000, "imdb": 6000, "imdb_longer": 6000}),
        rows=LONG_ROWS,
        grid=(5e-4, 1e-3, 5e-3, 1e-2, 5e-2),
    ),
    # which continuation fits: with what python -m train.write_negatives ranking_generated wrote for the sizes below and each
    # seed, --set generated=FILE, and people's choices,
    # --set human=FILE; about 40 minutes of two cores with one seed. A row beside generated negatives has the rate that
    # was chosen without them, with seed 0; all weights, for which that was the lowest of the grid, a lower one beside it
    "ranking": Profile(
        tasks={"ranking_reviews": {}, "ranking_generated": {}},
        shared={
            # each pair once
            "train_size": 1280,
            "validation_size": 128,
            "steps": 80,
            "evaluate_every": 80,
            "checkpoint_every": 40,
            "patience": 0,
        },
        rows=RANKING_ROWS,
        without=(
            *(("ranking_reviews", row[0]) for row in _BESIDE_GENERATED),
            *(("ranking_generated", row[0]) for row in _RANKING_ROWS),
        ),
        grid=(1e-4, 1e-3, 5e-3),
        own_grids=tuple(
            (f"{label}, generated", tuple(rates))
            for label, *rates in (
                ("full", 3e-5, 1e-4),
                ("projection", 1e-3),
                ("lora r=8", 5e-3),
                ("prefix 16", 5e-3),
                ("ntk", 5e-3),
            )
        ),
        references=("ranking_reviews",),
    ),
    # peft's own comparison, for a GPU: --data-dir with MetaMathQA, GSM8K, or both; --set model=FOLDER for another decoder.
    # Rows of theirs have their rates; the two that they have not are tuned on the validation loss
    "yardstick": Profile(
        tasks={"metamath": {}, "gsm8k": {}},
        shared=_YARDSTICK,
        rows=YARDSTICK_ROWS,
        grid=(1e-4, 1e-3, 1e-2),
        own_grids=(
            ("full", (1e-5,)),
            ("lora r=32", (1e-4,)),
            ("prefix 200", (1e-3,)),
            ("prefix 200, zero", (5e-3,)),
        ),
    ),
    # its rows for SmolLM2 on GSM8K, 80 examples a run, 15 cells, about 90 minutes of one core. One rate a row, those that
    # the table of math_short chose on its validation split; half of that for LoRA, whose scale is twice that table's.
    # With --seeds 1 first it is a whole table sooner
    "yardstick_small": Profile(
        tasks={
            "gsm8k": {
                "steps": 40,
                "batch_size": 2,
                "validation_size": 16,
                "evaluate_every": 40,
                "checkpoint_every": 10,
                "test_size": 32,
                "max_new_tokens": 128,
                "before": False,
                "warmup": 0.1,
                "patience": 0,
            }
        },
        rows=YARDSTICK_ROWS,
        without=(("gsm8k", "prefix 200"),),
        grid=(1e-2,),
        own_grids=(("full", (1e-4,)), ("lora r=32", (5e-3,)), ("prefixmemory", (1e-3,))),
    ),
}
"""Every table of ours, by name."""
