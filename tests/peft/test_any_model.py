"""Adapters on models that are nobody's but the user's: nnx with Flax's own attention, a core of one's own, Linen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

from ntk_prefix import ntk_attention, peft, softmax_attention
from ntk_prefix.models.attention import AttentionCore

HEADS, KEY_HEADS, DIM = 4, 2, 4


class Block(nnx.Module):
    """What anybody writes: norm, Flax's attention with grouped heads, a residual connection, a map."""

    def __init__(self, rngs, **options):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, 16, num_kv_heads=KEY_HEADS, decode=False, rngs=rngs, **options)
        self.up = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, mask=None, is_causal=True, **options):
        x = x + self.attn(self.norm(x), mask=mask, is_causal=is_causal, **options)
        return x + nnx.gelu(self.up(x))


class Model(nnx.Module):
    def __init__(self, seed=0, **options):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List(Block(rngs, **options) for _ in range(2))
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x, mask=None, **options):
        for block in self.blocks:
            x = block(x, mask, **options)
        return self.head(x.mean(axis=1))


def inputs(rows=3):
    x = jax.random.normal(jax.random.key(1), (rows, 6, 16), jnp.float32)
    return {"x": x, "mask": nnx.make_attention_mask(jnp.ones((1, 6)), jnp.arange(6)[None] < 5)}  # of floats


def randomized(model, seed=0):
    """Give every adapter's weights values that are not their start."""
    state = nnx.state(model, peft.AdapterParam)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [0.3 * jnp.abs(jax.random.normal(key, x.shape, x.dtype)) for key, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(structure, made))
    return model


CONFIGS = {
    "ntk_attention": peft.NTKAttentionConfig(),
    "whitened": peft.NTKAttentionConfig(mass="relative", whiten=True),
    "prefix_tuning": peft.PrefixTuningConfig(num_tokens=3),
    "lora_all": peft.LoraConfig(r=2, target=r"\.(query|key|value|out|up)$"),
    "together": [peft.LoraConfig(r=2), peft.NTKAttentionConfig()],
}


@pytest.mark.parametrize("x64", [False], indirect=True)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_is_put_on_trained_saved_loaded_mixed_and_taken_off(x64, config, tmp_path):
    batch = inputs()
    frozen = np.asarray(Model()(**batch))
    model = peft.apply(Model(), config, calibration=batch)
    if config is not CONFIGS["prefix_tuning"]:
        np.testing.assert_allclose(model(**batch), frozen, rtol=0, atol=1e-6)

    # two steps on what is trained, by a loop of the user's own
    optimizer = nnx.Optimizer(model, peft.non_negative(optax.adam(1e-2)), wrt=peft.AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        by_adapter = nnx.value_and_grad(argnums=nnx.DiffState(0, peft.AdapterParam))
        loss, grads = by_adapter(lambda m: jnp.mean((m(**batch) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    trained, whole = peft.trainable_parameters(model)
    assert 0 < trained < whole

    randomized(model)
    peft.save_pretrained(model, tmp_path)
    elsewhere = peft.load_adapter(Model(), tmp_path, name="loaded")
    outputs = np.asarray(model(**batch))
    assert np.abs(outputs - frozen).max() > 1e-3
    np.testing.assert_allclose(elsewhere(**batch), outputs, rtol=0, atol=2e-5)

    with peft.disable_adapter(elsewhere):
        np.testing.assert_array_equal(elsewhere(**batch), frozen)
    peft.load_adapter(elsewhere, tmp_path, name="second")
    randomized(elsewhere, seed=7)
    second = np.asarray(elsewhere(**batch))
    with peft.mixed(elsewhere, jnp.array([1, -1, 0]), ["loaded", "second"]):
        rows = np.asarray(elsewhere(**batch))
    np.testing.assert_allclose(rows, [second[0], frozen[1], outputs[2]], rtol=0, atol=2e-5)

    for name in ("loaded", "second"):
        peft.delete_adapter(elsewhere, name)
    assert all(block.attn.attention_fn is nnx.dot_product_attention for block in elsewhere.blocks)
    assert nnx.graphdef(elsewhere.blocks) == nnx.graphdef(Model().blocks)


def test_the_state_meets_each_query_as_the_operator_says():
    """One layer by hand: Flax's own maps around ntk_attention; masked, causal, on two batch axes."""
    model = randomized(peft.apply(Model(), peft.NTKAttentionConfig()))
    attn = model.blocks[0].attn
    x = jax.random.normal(jax.random.key(2), (2, 3, 6, 16))
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 1, 1, 6, 6))
    state = attn.attention_fn.core.current()
    got = attn(x, mask=mask, is_causal=True)
    flat, seen = x.reshape(6, 6, 16), jnp.repeat(mask[:, 0], 3, axis=0)
    heads = ntk_attention(attn.query(flat), attn.key(flat), attn.value(flat), *state.state(), mask=seen, is_causal=True)
    np.testing.assert_allclose(got.reshape(6, 6, 16), attn.out(heads), rtol=0, atol=1e-6)


def test_a_merged_lora_is_the_model_with_it():
    batch = inputs()
    model = randomized(peft.apply(Model(), CONFIGS["lora_all"]))
    with_adapter = np.asarray(model(**batch))
    peft.merge(model)
    assert isinstance(model.blocks[0].attn.query, nnx.LinearGeneral)
    np.testing.assert_allclose(model(**batch), with_adapter, rtol=0, atol=1e-5)


class Own(nnx.Module):
    """Attention of one's own that offers the hook."""

    def __init__(self, rngs):
        self.num_heads, self.num_key_heads, self.head_dim = 2, 2, 8
        self.qkv, self.core = nnx.Linear(16, 48, rngs=rngs), AttentionCore()

    def __call__(self, x):
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, 2, 8), 2, 0)
        return x + self.core(query, key, value, is_causal=True).reshape(x.shape)


def test_a_core_of_ones_own_is_found_by_its_hook(tmp_path):
    x = inputs()["x"]
    model = nnx.Sequential(Own(nnx.Rngs(0)), Own(nnx.Rngs(1)))
    frozen = model(x)
    peft.apply(model, peft.NTKAttentionConfig(mass="relative", whiten=True), calibration={"x": x})
    np.testing.assert_allclose(model(x), frozen, rtol=0, atol=1e-6)
    outputs = randomized(model)(x)
    peft.save_pretrained(model, tmp_path)
    other = peft.load_adapter(nnx.Sequential(Own(nnx.Rngs(0)), Own(nnx.Rngs(1))), tmp_path)
    np.testing.assert_allclose(other(x), outputs, rtol=0, atol=1e-5)
    assert np.abs(outputs - frozen).max() > 1e-3


class LinenModel(nn.Module):
    """In Linen, and in attention written by hand, the state is the model's own parameters."""

    adapted: bool = True

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            attention_fn = nn.dot_product_attention
            if self.adapted:
                z = self.param(f"z{i}", nn.initializers.zeros, (HEADS, DIM, DIM))
                k = self.param(f"k{i}", nn.initializers.zeros, (HEADS, DIM))
                attention_fn = peft.attention_fn(z, k)
            x = x + nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, name=f"attention{i}")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


def test_linen_takes_the_state_as_its_own_parameters():
    x = inputs()["x"]
    base = LinenModel(adapted=False).init(jax.random.key(0), x)["params"]
    zeros = {name: v for name, v in LinenModel().init(jax.random.key(0), x)["params"].items() if name[0] in "zk"}
    frozen = LinenModel(adapted=False).apply({"params": base}, x)
    np.testing.assert_allclose(LinenModel().apply({"params": base | zeros}, x), frozen, rtol=0, atol=1e-6)

    optimizer = optax.adam(1e-2)
    state, opt_state = zeros, optimizer.init(zeros)

    @jax.jit
    def step(state, opt_state):
        loss = lambda state: jnp.mean((LinenModel().apply({"params": base | state}, x) - 1) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state)
        updates, opt_state = optimizer.update(grads, opt_state)
        state = optax.apply_updates(state, updates)
        return {name: jnp.maximum(v, 0) if name[0] == "k" else v for name, v in state.items()}, opt_state, value

    losses = []
    for _ in range(3):
        state, opt_state, value = step(state, opt_state)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]
    loaded = jax.tree.map(jnp.asarray, serialization.from_bytes(zeros, serialization.to_bytes(state)))
    trained = LinenModel().apply({"params": base | state}, x)
    np.testing.assert_array_equal(LinenModel().apply({"params": base | loaded}, x), trained)
    assert np.abs(trained - frozen).max() > 1e-4


class TestRefused:
    def test_attention_whose_probabilities_are_dropped_or_kept(self, without_annotations):
        model = peft.apply(Model(dropout_rate=0.1, deterministic=False), peft.NTKAttentionConfig())
        with pytest.raises(ValueError, match="dropout_rate: expected 0, or deterministic=True"):
            model(**inputs())
        with peft.disable_adapter(model):
            frozen = model(**inputs(), deterministic=True)
        np.testing.assert_allclose(model(**inputs(), deterministic=True), frozen, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="sow_weights: expected False"):
            model(**inputs(), deterministic=True, sow_weights=True)

    def test_an_attention_fn_of_ones_own_whose_meaning_nobody_knows(self):
        model = Model(attention_fn=functools.partial(nnx.dot_product_attention))
        with pytest.raises(ValueError, match="attention_fn: expected Flax's own"):
            peft.apply(model, peft.NTKAttentionConfig())
        model(**inputs())

    def test_a_model_without_attention(self):
        with pytest.raises(ValueError, match="Linear has no module that the method changes"):
            peft.apply(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), peft.NTKAttentionConfig())

    def test_the_hook_is_wrong_where_its_sizes_are_not_there(self):
        class Half(nnx.Module):
            def __init__(self):
                self.core = AttentionCore()

        with pytest.raises(ValueError, match="no module that the method changes"):
            peft.apply(nnx.Sequential(Half()), peft.NTKAttentionConfig())


def test_plain_softmax_is_what_flax_computes():
    """The control of all the above: the two libraries mean the same by a mask of floats."""
    q = jax.random.normal(jax.random.key(0), (2, 6, HEADS, DIM))
    mask = inputs()["mask"]
    mine = softmax_attention(q, q, q, mask=mask.astype(bool), is_causal=True)
    np.testing.assert_allclose(mine, nnx.dot_product_attention(q, q, q, mask=mask, is_causal=True), atol=1e-6)
