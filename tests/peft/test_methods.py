"""What the methods compute and start from, against formulas in numpy."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ntk_prefix as npx
from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.models.attention import AttentionLayer
from ntk_prefix.peft.base import LARGEST_NUMBER
from ntk_prefix.peft.methods.ntk_attention import RIDGE
from tests.peft.cases import inputs, put, trained
from tests.peft.tiny import FEATURES, HEAD_DIM, HEADS, KEY_HEADS, TOKENS, Tiny, tiny


def heads(is_causal=False, seed=0):
    """Return query [B, T, N, H], key and value [B, S, K, H] of a core, and a mask [B, 1, 1, S], in numpy."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(2, TOKENS, HEADS, HEAD_DIM)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, TOKENS, KEY_HEADS, HEAD_DIM)).astype(np.float32)
    mask = np.ones((2, 1, 1, TOKENS), bool)
    mask[1, ..., 4:] = False
    return query, key, value, mask


def core(method):
    return trained(method).layers[1].attention.core


def attend(method, *arrays):
    """Return what a trained core makes of query, key, value and mask."""
    query, key, value, mask = map(jnp.asarray, arrays)
    return core(method)(query, key, value, mask=mask)


def exponentials(query, key, mask):
    """Return e^{scores} [B, N, T, S]; query head n meets key head n // (N / K)."""
    scores = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, HEADS // KEY_HEADS, axis=2)) / np.sqrt(HEAD_DIM)
    return np.where(mask, np.exp(scores), 0)


@pytest.mark.parametrize("method", ["ntk", "ntk low rank", "ntk white and relative", "prefix tuning plus"])
def test_a_state_adds_to_numerator_and_denominator_of_each_query_head(method):
    query, key, value, mask = heads()
    state = core(method).adapters["default"]
    z, k = state.state()
    z = np.asarray(z.left @ z.right if isinstance(z, npx.LowRank) else z)
    scaled = query / HEAD_DIM**0.25
    elu = np.where(scaled > 0, scaled, np.expm1(np.minimum(scaled, 0)))
    features = elu if method == "prefix tuning plus" else elu + 1
    weights = exponentials(query, key, mask)
    own = np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, HEADS // KEY_HEADS, axis=2))
    own_mass = weights.sum(axis=-1).transpose(0, 2, 1)[..., None]
    added = np.einsum("btnr,nrh->btnh", features, z)
    added_mass = np.einsum("btnr,nr->btn", features, np.asarray(k))[..., None]
    if state.mass == "relative":
        added, added_mass = own_mass * added, own_mass * added_mass
    expected = (own + added) / (own_mass + added_mass)
    np.testing.assert_allclose(attend(method, query, key, value, mask), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(added / own_mass).max() > 1e-2
    assert (np.abs(added_mass).max() > 0) == (method != "prefix tuning plus")


def test_a_prefix_stands_before_the_keys_of_each_key_head():
    query, key, value, mask = heads()
    tokens = core("prefix").adapters["default"]
    prefix = [np.broadcast_to(np.asarray(x[...]), (2, *x.shape)) for x in (tokens.key, tokens.value)]
    key, value = np.concatenate([prefix[0], key], axis=1), np.concatenate([prefix[1], value], axis=1)
    seen = np.concatenate([np.ones((2, 1, 1, 5), bool), mask], axis=-1)
    weights = exponentials(query, key, seen)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, HEADS // KEY_HEADS, axis=2))
    _, own_key, own_value, _ = heads()
    np.testing.assert_allclose(attend("prefix", query, own_key, own_value, mask), expected, rtol=1e-4, atol=1e-5)


def test_trained_weights_are_loras_to_other_libraries():
    assert issubclass(peft.AdapterParam, nnx.LoRAParam)
    trained_leaves = jax.tree.leaves(nnx.state(trained("ntk"), nnx.LoRAParam))
    assert sum(leaf.size for leaf in trained_leaves) == peft.trainable_parameters(trained("ntk"))[0]


# -------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_record_is_what_each_core_saw(is_causal):
    class Causal(Tiny):
        def __call__(self, x, attention_mask=None):
            for layer in self.layers:
                x = x + layer.attention(x, is_causal=is_causal, mask=attention_mask[:, None, None, :].astype(bool))[0]
            return x

    model = Causal()
    x, mask = inputs()
    cores = [layer.attention.core for layer in model.layers]
    records = peft.record(model, {"x": x, "attention_mask": mask})
    assert [layer.attention.core for layer in model.layers] == cores
    assert set(records) == {"layers.0.attention", "layers.1.attention"}
    seen = records["layers.0.attention"]
    attention = model.layers[0].attention
    np.testing.assert_allclose(seen.query, attention.query(x).reshape(8, TOKENS, HEADS, HEAD_DIM), rtol=1e-6)
    np.testing.assert_allclose(seen.value, attention.value(x).reshape(8, TOKENS, KEY_HEADS, HEAD_DIM), rtol=1e-6)
    np.testing.assert_array_equal(seen.seen, mask.astype(bool))
    visible = np.asarray(mask, bool)[:, None, None, :] & (np.tri(TOKENS, dtype=bool) if is_causal else True)
    weights = exponentials(np.asarray(seen.query), np.asarray(seen.key), visible)
    np.testing.assert_allclose(seen.log_mass(), np.log(weights.sum(axis=-1)).transpose(0, 2, 1), rtol=1e-5, atol=1e-5)
    shares = weights / weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", shares, np.repeat(np.asarray(seen.value), 2, axis=2))
    np.testing.assert_allclose(seen.output, expected, rtol=1e-4, atol=1e-5)


def test_a_record_need_not_outlive_its_layer():
    """Calibration of a deep model holds what one layer saw, not all; the default, which keeps it, is the control."""
    alive = []

    def keep(path, seen):
        alive.append((sum(query() is not None for query in queries), path))
        queries.append(weakref.ref(seen.query))
        return path

    queries: list[weakref.ref] = []
    x, mask = inputs()
    assert set(peft.record(tiny(), {"x": x, "attention_mask": mask}, keep)) == {f"layers.{i}.attention" for i in (0, 1)}
    assert alive == [(0, "layers.0.attention"), (0, "layers.1.attention")]
    kept = peft.record(tiny(), {"x": x, "attention_mask": mask}, lambda path, seen: (keep(path, seen), seen))
    assert alive[2:] == [(0, "layers.0.attention"), (1, "layers.1.attention")]
    assert len(kept) == 2


def test_a_model_that_recomputes_its_layers_is_recorded_too():
    model = tiny()
    model.remat = True
    records = peft.record(model, {"x": inputs()[0]})
    assert model.remat
    np.testing.assert_array_equal(
        records["layers.1.attention"].query, peft.record(tiny(), {"x": inputs()[0]})["layers.1.attention"].query
    )


@pytest.mark.parametrize("method", ["ntk white", "ntk white and relative"])
def test_in_its_basis_features_are_white_and_a_unit_is_the_heads_own(method):
    x, mask = inputs()
    seen = peft.record(tiny(), {"x": x, "attention_mask": mask})["layers.1.attention"]
    state = put(tiny(), method).layers[1].attention.core.adapters["default"]
    real = np.asarray(mask, bool)
    scaled = np.asarray(seen.query, np.float64)[real] / HEAD_DIM**0.25
    features = np.where(scaled > 0, scaled + 1, np.exp(np.minimum(scaled, 0)))
    size = np.sqrt((np.asarray(seen.output, np.float64)[real] ** 2).mean(axis=(0, 2)))
    masses = np.exp(np.median(np.asarray(seen.log_mass(), np.float64)[real], axis=0))
    own = masses if method == "ntk white" else np.ones_like(masses)
    for head in range(HEADS):
        moments = features[:, head].T @ features[:, head] / len(features)
        white = np.asarray(state.basis[...], np.float64)[head] / (size * own)[head]
        eigenvalues = np.linalg.eigvalsh(moments)
        # what the ridge leaves: lambda / (lambda + ridge lambda_max), close to 1 for all that is not tiny
        expected = eigenvalues / (eigenvalues + RIDGE * eigenvalues[-1])
        np.testing.assert_allclose(np.linalg.eigvalsh(white.T @ moments @ white), expected, rtol=1e-4)
        assert expected[eigenvalues > 0.1 * eigenvalues[-1]].min() > 0.98
        # k' = 1 weighs the prefix, on average, as much as the head's own keys
        weight = (features[:, head].sum(axis=-1) * np.asarray(state.unit[...])[head]).mean()
        np.testing.assert_allclose(weight, own[head], rtol=1e-4)
    assert np.linalg.cond(moments) > 10


@pytest.mark.parametrize("loud", [1, 1000])
def test_a_head_whose_mass_float32_cannot_hold_stays_as_it_is(loud):
    """A head of the ViT has masses of e^215: its coordinates were infinite, and the first step NaN."""
    x, mask = inputs()
    calibration = {"x": x, "attention_mask": mask}
    model = tiny()
    key = model.layers[1].attention.key.kernel
    key[...] = loud * key[...]
    if loud > 1:
        with pytest.raises(ValueError, match=r"layers\.1\.attention: .*expected masses .* leave the layer out"):
            peft.apply(model, peft.NTKAttentionConfig(init="from_prefix"), calibration=calibration)
    plain = model(x, mask)
    masses = np.median(peft.record(model, calibration)["layers.1.attention"].log_mass(), axis=(0, 1))
    config = peft.NTKAttentionConfig(whiten=True, target=r"\.1\.attention$")
    model = peft.apply(model, config, calibration=calibration)
    state = model.layers[1].attention.core.adapters["default"]
    state.z[...], state.k[...] = jnp.ones_like(state.z[...]), jnp.ones_like(state.k[...])
    z, k = (np.abs(np.asarray(array)).max(axis=-1) for array in state.state())
    beyond = masses > 80
    assert beyond.any() == (loud > 1)
    assert np.isfinite(model(x, mask)).all()
    assert not z[beyond].any()
    assert not k[beyond].any()
    assert (z[~beyond] > 0).all()
    assert beyond.all() == np.array_equal(model(x, mask), plain)


def test_padding_is_not_calibrated_on():
    x, mask = inputs()
    config = peft.NTKAttentionConfig(whiten=True)

    def basis(x):
        model = peft.apply(tiny(), config, calibration={"x": x, "attention_mask": mask})
        return np.asarray(model.layers[0].attention.core.adapters["default"].basis[...])

    other = jnp.where(mask[..., None] == 1, x, 7.0)
    np.testing.assert_allclose(basis(x), basis(other), rtol=1e-4, atol=1e-5)
    unmasked = peft.apply(tiny(), config, calibration={"x": other})
    assert np.abs(basis(x) - unmasked.layers[0].attention.core.adapters["default"].basis[...]).max() > 1e-2


def test_low_rank_starts_at_zero_and_stays_low():
    state = put(tiny(), "ntk low rank").layers[0].attention.core.adapters["default"].state()[0]
    assert not np.asarray(state.left @ state.right).any()
    z = core("ntk low rank").adapters["default"].state()[0]
    values = np.linalg.svd(np.asarray(z.left @ z.right), compute_uv=False)
    assert (values[:, 0] > 1e-3).all()
    assert (values[:, 2:] < 1e-6).all()


def test_a_prefix_of_text_is_what_the_state_starts_as():
    x = jax.random.normal(jax.random.key(3), (16, TOKENS, FEATURES), jnp.float32)
    config = peft.NTKAttentionConfig(init="from_prefix", target=r"\.0\.attention$")
    model = peft.apply(tiny(), config, calibration={"x": x})
    seen = peft.record(tiny(), {"x": x})["layers.0.attention"]
    query, key, value = (array[1:] for array in (seen.query, seen.key, seen.value))
    exact = npx.prefix_attention(query, key, value, seen.key[0], seen.value[0])
    started = model.layers[0].attention.core(query, key, value)
    plain = npx.softmax_attention(query, key, value)
    # fitted to these queries with 4 features: much of what the prefix does is there, and none of k is below 0
    assert np.linalg.norm(started - exact) < 0.75 * np.linalg.norm(plain - exact)
    assert model.layers[0].attention.core.adapters["default"].k[...].min() >= 0
    assert isinstance(model.layers[1].attention, AttentionLayer)
    assert type(model.layers[1].attention.core).__name__ == "AttentionCore"


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("lora", "r", 1.5),
        ("lora", "r", True),
        ("lora", "target", ["query"]),
        ("lora", "alpha", np.nan),
        ("lora", "use_rslora", "no"),
        ("head", "train_head", None),
        ("ntk_attention", "mass", "relativ"),
        ("ntk_attention", "rank", "2"),
        ("ntk_attention", "feature_map_options", 2),
        ("prefix_tuning", "num_tokens", 4.0),
        ("prefix_tuning", "init_scale", np.inf),
        ("prefix_tuning", "init_scale", 1e30),
        ("prefix_tuning", "init_scale", 10**30),
        ("prefix_propagation", "init_scale", -0.1),
        ("prefix_propagation", "lengthscale", 1e15),
        ("prefix_propagation", "alpha", None),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_a_configuration_refuses_what_is_not_of_its_fields_types_by_name(method, field, value):
    with pytest.raises(UsageError, match=rf"^{field}: expected .*, got "):
        peft.METHODS[method](**{field: value})


def test_what_ends_an_application_half_way_leaves_the_model_as_it_was():
    class Broken(peft.LoraConfig):
        def inject(self, module, name, rngs, measured=None):
            if next(places) == 2:
                raise MemoryError
            return super().inject(module, name, rngs, measured)

    model, places = tiny(), iter(range(9))
    before = jax.tree.structure(nnx.state(model))
    with pytest.raises(MemoryError):
        peft.apply(model, Broken())
    assert jax.tree.structure(nnx.state(model)) == before
    assert peft.trainable_parameters(peft.apply(model, peft.LoraConfig()))[0] > 0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (peft.PrefixTuningConfig(num_tokens=3), "init_scale"),
        (peft.PrefixPropagationConfig(num_prefix_tokens=2), "init_scale"),
        (peft.PrefixPropagationConfig(num_prefix_tokens=2, kernel="exp"), "alpha"),
        (peft.PrefixPropagationConfig(num_prefix_tokens=2, kernel="rbf"), "alpha"),
    ],
)
def test_the_largest_numbers_of_a_configuration_make_no_nan(config, field):
    model = peft.apply(tiny(), dataclasses.replace(config, **{field: LARGEST_NUMBER}))
    assert np.isfinite(model(*inputs())).all()


@pytest.mark.usefixtures("without_annotations")
def test_a_seed_in_the_place_of_random_streams_is_refused_before_anything_is_changed():
    model = tiny()
    for call in (
        lambda: peft.apply(model, peft.LoraConfig(r=2), rngs=5),
        lambda: models.Classifier(model, 2, rngs=5),
    ):
        with pytest.raises(UsageError, match=r"rngs: expected flax's nnx.Rngs, got int. Use rngs=nnx.Rngs\(5\)"):
            call()
    assert not peft.configs(model)
