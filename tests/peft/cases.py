"""The methods that the matrix of behaviors runs over, and what all of its tests need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ntk_prefix import peft
from tests.peft.tiny import FEATURES, HEAD_DIM, HEADS, KEY_HEADS, LABELS, LAYERS, TOKENS, tiny

HEAD = FEATURES * LABELS + LABELS
STATE = HEADS * HEAD_DIM * (HEAD_DIM + 1)
LORA = 3 * (FEATURES + HEADS * HEAD_DIM) + 3 * (FEATURES + KEY_HEADS * HEAD_DIM)
BIASES = 2 * HEADS * HEAD_DIM + 2 * KEY_HEADS * HEAD_DIM + FEATURES

METHODS = {
    "lora": (peft.LoraConfig(r=3, alpha=6), LAYERS * LORA + HEAD),
    "rslora on one layer": (
        peft.LoraConfig(target=r"layers\.1\.attention\.(key|out)$", r=3, use_rslora=True),
        3 * (FEATURES + KEY_HEADS * HEAD_DIM) + 3 * (HEADS * HEAD_DIM + FEATURES) + HEAD,
    ),
    "prefix": (peft.PrefixTuningConfig(num_tokens=5), LAYERS * 2 * 5 * KEY_HEADS * HEAD_DIM + HEAD),
    "shifting prefix": (
        peft.PrefixTuningConfig(num_tokens=5, shift_positions=True),
        LAYERS * 2 * 5 * KEY_HEADS * HEAD_DIM + HEAD,
    ),
    "prefix in one layer": (
        peft.PrefixTuningConfig(target=r"\.1\.attention$", num_tokens=5, train_head=False),
        2 * 5 * KEY_HEADS * HEAD_DIM,
    ),
    "ntk": (peft.NTKAttentionConfig(), LAYERS * STATE + HEAD),
    "ntk relative": (peft.NTKAttentionConfig(mass="relative", train_head=False), LAYERS * STATE),
    "ntk white": (peft.NTKAttentionConfig(whiten=True), LAYERS * STATE + HEAD),
    "ntk white and relative": (peft.NTKAttentionConfig(whiten=True, mass="relative"), LAYERS * STATE + HEAD),
    "ntk low rank": (
        peft.NTKAttentionConfig(rank=2, whiten=True),
        LAYERS * HEADS * (2 * (HEAD_DIM + HEAD_DIM) + HEAD_DIM) + HEAD,
    ),
    "ntk taylor": (
        peft.NTKAttentionConfig(feature_map="taylor", feature_map_options=(("degree", 2),), train_k=False),
        LAYERS * HEADS * 15 * HEAD_DIM + HEAD,
    ),
    "propagation": (peft.PrefixPropagationConfig(num_prefix_tokens=5), LAYERS * 5 * FEATURES + HEAD),
    "propagation and prefix": (
        peft.PrefixPropagationConfig(num_prefix_tokens=6, combine=True),
        LAYERS * (3 * FEATURES + 2 * 3 * KEY_HEADS * HEAD_DIM) + HEAD,
    ),
    "prefix tuning plus": (peft.PrefixTuningPlusConfig(), LAYERS * HEADS * HEAD_DIM * HEAD_DIM + HEAD),
    "lora and ntk": ([peft.LoraConfig(r=3), peft.NTKAttentionConfig()], LAYERS * (LORA + STATE) + HEAD),
    "head": (peft.HeadConfig(), HEAD),
    "bitfit": (peft.BitFitConfig(), LAYERS * BIASES + HEAD),
    "full": (peft.FullConfig(), sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tiny(), nnx.Param)))),
}
IN_PLACE = {"bitfit", "full"}
HOSTED = [name for name in METHODS if name not in IN_PLACE]
ELSEWHERE = {name for name in METHODS if "prefix" in name or "propagation" in name} - {"prefix tuning plus"}
"""Methods that do not start at the frozen model."""


@functools.cache
def inputs(rows: int = 8) -> tuple[jax.Array, jax.Array]:
    """Return x [B, T, D] and a mask with padding at two rows' ends."""
    x = jax.random.normal(jax.random.key(1), (rows, TOKENS, FEATURES), jnp.float32)
    return x, jnp.ones((rows, TOKENS), jnp.int32).at[1, 4:].set(0).at[3, 2:].set(0)


def put(model, method: str, name: str = "default", seed: int = 0):
    config = METHODS[method][0]
    x, mask = inputs()
    calibration = {"x": x, "attention_mask": mask}
    return peft.apply(model, config, name=name, calibration=calibration, rngs=nnx.Rngs(seed))


def step(model, optimizer, x, mask):
    """Take one step of training; the targets are numbers drawn once."""

    def loss(model):
        return jnp.mean((model(x, mask) - jax.random.normal(jax.random.key(2), (len(x), LABELS), jnp.float32)) ** 2)

    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, peft.AdapterParam))(model)
    optimizer.update(model, gradients)
    return gradients


def train(model, steps: int = 2):
    optimizer = nnx.Optimizer(model, peft.non_negative(optax.adam(3e-2)), wrt=peft.AdapterParam)
    for _ in range(steps):
        # not compiled: a program for each method and number of adapters would take the time of twenty such steps
        step(model, optimizer, *inputs())
    return model


@functools.cache
def _trained(method: str):
    return train(put(tiny(), method))


def trained(method: str):
    """Return a model with a trained adapter, "default"; a copy, so that a test may change it."""
    return nnx.clone(_trained(method))


@functools.cache
def frozen() -> np.ndarray:
    """Return what the model computes without an adapter."""
    return np.asarray(tiny()(*inputs()))


def structure(model) -> list:
    return [(path, type(module)) for path, module in nnx.iter_modules(model)]


def bits(model, *kinds) -> dict:
    """Return the arrays of a model by path; keys of random streams are never written."""
    flat = nnx.to_flat_state(nnx.state(model, *kinds))
    return {path: np.asarray(leaf[...]) for path, leaf in flat if not isinstance(leaf, nnx.RngKey)}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
