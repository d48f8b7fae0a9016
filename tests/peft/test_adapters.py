"""One matrix of behaviors over methods, as in Hugging Face peft's tests, and what only some methods have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_prefix import models, peft
from ntk_prefix.peft.base import Adapter, InactiveParam
from tests.peft.cases import (
    ELSEWHERE,
    HOSTED,
    IN_PLACE,
    METHODS,
    bits,
    frozen,
    inputs,
    put,
    same,
    step,
    structure,
    train,
    trained,
)
from tests.peft.tiny import LABELS, tiny

EXACT = {"rtol": 2e-6, "atol": 2e-6}
"""Float32 sums of some tens of terms, in another order."""

BASIC = ["prefix", "ntk white and relative", "prefix tuning plus", "lora and ntk"]
"""One of a kind, for what has to be compiled each time."""


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


# -------------------------------------------------------------------------------------------- start


def test_starts_where_it_should(method):
    start = put(tiny(), method)(*inputs())
    if method in ELSEWHERE:
        assert np.abs(start - frozen()).max() > 1e-4
    else:
        # but for the head's copy, which adds its bias after the product, bit for bit
        np.testing.assert_allclose(start, frozen(), **EXACT)


def test_trained_weights_are_counted_by_the_formula(method, capsys):
    model = put(tiny(), method)
    count = METHODS[method][1]
    assert peft.trainable_parameters(model)[0] == count
    peft.print_trainable_parameters(model)
    assert capsys.readouterr().out.startswith(f"trainable params: {count:,} || all params: ")


def test_only_adapters_get_gradients_and_optimizer_state_and_all_of_them_do(method):
    model = put(tiny(), method)
    count = METHODS[method][1]
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=peft.AdapterParam)
    moments = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if leaf.ndim)
    assert moments == 2 * count
    gradients = bits(step(model, optimizer, *inputs()))
    assert sum(gradient.size for gradient in gradients.values()) == count
    # of a product whose one factor starts at 0, only that factor moves first; a shared shift of all scores moves none
    still = {("a",), ("z_left",)}
    dead = {path for path, gradient in gradients.items() if not np.abs(gradient).max() > 1e-9}
    assert {path for path in dead if path[-1:] not in still and path[-2:] != ("key", "bias")} == set()
    if "ntk" in method and method != "ntk taylor":
        assert any(path[-1] == "k" for path in gradients)


def test_training_moves_the_adapter_and_nothing_else(method):
    before, after = bits(put(tiny(), method)), bits(trained(method))
    types = dict(nnx.to_flat_state(nnx.state(trained(method))))
    changed = {path for path in after if not np.array_equal(before[path], after[path])}
    trained_paths = {path for path, leaf in types.items() if isinstance(leaf, peft.AdapterParam)}
    assert changed <= trained_paths
    assert len(changed) >= 0.9 * len(trained_paths)
    assert np.abs(np.asarray(trained(method)(*inputs())) - frozen()).max() > 1e-2


# --------------------------------------------------------------------------- off, on, several, gone


@pytest.mark.parametrize("method", HOSTED)
def test_without_its_adapter_a_model_is_the_frozen_one_bit_for_bit(method):
    model = trained(method)
    before = np.asarray(model(*inputs()))
    with peft.disable_adapter(model):
        np.testing.assert_array_equal(model(*inputs()), frozen())
        assert peft.trainable_parameters(model)[0] == 0
    np.testing.assert_array_equal(model(*inputs()), before)
    assert peft.trainable_parameters(model)[0] == METHODS[method][1]
    peft.delete_adapter(model, "default")
    np.testing.assert_array_equal(model(*inputs()), frozen())
    assert same(bits(model), bits(tiny()))


@pytest.mark.parametrize("method", sorted(IN_PLACE))
def test_what_changes_the_weights_themselves_stands_alone(method):
    model = trained(method)
    for forbidden in (lambda: peft.activate(model, None), lambda: peft.delete_adapter(model, "default")):
        with pytest.raises(ValueError, match="changed the weights themselves"):
            forbidden()
    with pytest.raises(ValueError, match="stand alone"):
        peft.apply(model, peft.LoraConfig(), name="second")
    with pytest.raises(ValueError, match="stand alone"):
        put(put(tiny(), "lora"), method, name="second")


@pytest.mark.parametrize("method", HOSTED)
def test_training_one_adapter_leaves_the_other_alone(method):
    model = trained(method)
    alone = np.asarray(model(*inputs()))
    put(model, method, name="second", seed=1)
    resting = bits(model, InactiveParam)
    train(model, 1)
    assert same(bits(model, InactiveParam), resting)
    second = np.asarray(model(*inputs()))
    peft.activate(model, "default")
    np.testing.assert_array_equal(model(*inputs()), alone)
    assert np.abs(second - alone).max() > 1e-3
    peft.delete_adapter(model, "default")
    assert list(peft.configs(model)) == ["second"]
    np.testing.assert_array_equal(model(*inputs()), frozen())
    peft.activate(model, "second")
    np.testing.assert_array_equal(model(*inputs()), second)


@pytest.mark.parametrize("method", [m for m in METHODS if "ntk" in m or m == "prefix tuning plus"])
def test_settled_as_for_generation_it_computes_the_same(method):
    model = trained(method)
    before = np.asarray(model(*inputs()))
    settled = [module for _, module in nnx.iter_modules(model) if isinstance(module, Adapter)]
    assert settled
    for each in settled:
        each.settle()
    np.testing.assert_allclose(model(*inputs()), before, atol=1e-5)


def test_different_methods_take_turns_on_one_model():
    model = trained("ntk")
    ntk = np.asarray(model(*inputs()))
    train(put(model, "lora", name="second"))
    np.testing.assert_array_equal(model(*inputs()), trained("lora")(*inputs()))
    peft.activate(model, "default")
    np.testing.assert_array_equal(model(*inputs()), ntk)
    # a prefix needs the core that NTK-Attention has
    with pytest.raises(ValueError, match="Two methods that replace attention"):
        put(model, "prefix", name="third")
    np.testing.assert_array_equal(model(*inputs()), ntk)
    peft.delete_adapter(model, "default")
    put(model, "prefix", name="third")


def test_a_failed_apply_changes_nothing():
    model = tiny()
    with pytest.raises(ValueError, match="Two methods that replace attention"):
        peft.apply(model, [peft.LoraConfig(), peft.NTKAttentionConfig(), peft.PrefixTuningConfig()])
    assert peft.configs(model) == {}
    assert structure(model) == structure(tiny())


def test_together_each_method_adds_what_it_adds():
    model = trained("lora and ntk")
    whole = np.asarray(model(*inputs()))
    for layer in model.layers:
        layer.attention.query.active = layer.attention.value.active = None
    without_lora = np.asarray(model(*inputs()))
    for layer in model.layers:
        layer.attention.core.active = None
    without_both = np.asarray(model(*inputs()))
    assert np.abs(whole - without_lora).max() > 1e-3
    assert np.abs(without_lora - without_both).max() > 1e-3


# ------------------------------------------------------------------------------------ mixed batches


def pair(method):
    """Two adapters of one method, the second trained otherwise."""
    model = put(trained(method), method, name="second", seed=1)
    return train(model, 1)


@pytest.mark.parametrize("method", [*BASIC, "ntk low rank", "prefix in one layer"])
def test_each_row_of_a_mixed_batch_goes_through_its_own_adapter_in_one_program(method):
    model = pair(method)
    x, mask = inputs()
    expected = []
    for name in ("default", "second", None):
        peft.activate(model, name)
        expected.append(np.asarray(model(x, mask)))
    graph, state = nnx.split(model)
    compilations = []

    @jax.jit
    def run(state, rows):
        compilations.append(rows)
        model = nnx.merge(graph, state)
        with peft.mixed(model, rows, ["default", "second"]):
            return model(x, mask)

    for seed in range(3):
        rows = np.random.default_rng(seed).integers(-1, 2, len(x))
        wanted = np.stack(expected)[rows, np.arange(len(x))]
        np.testing.assert_allclose(run(state, jnp.asarray(rows)), wanted, **EXACT)
    assert len(compilations) == 1
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    # and the model is as it was
    np.testing.assert_array_equal(model(x, mask), frozen())


def test_a_mixed_batch_of_adapters_trained_in_other_ways_is_refused():
    model = put(trained("lora"), "lora", name="second")
    rows = jnp.zeros(8, int)
    with pytest.raises(ValueError, match=r"names: expected adapters among \['default', 'second'\], got \['third'\]"):
        peft.mixed(model, rows, ["default", "third"]).__enter__()
    peft.apply(model, peft.LoraConfig(r=5, target=r"(query|value)$"), name="wide")
    with pytest.raises(ValueError, match="adapters of one shape"), peft.mixed(model, rows, ["default", "wide"]):
        model(*inputs())
    np.testing.assert_allclose(model(*inputs()), frozen(), **EXACT)
    peft.apply(model, peft.LoraConfig(target="key$"), name="other")
    with pytest.raises(ValueError, match="the same modules"):
        peft.mixed(model, rows, ["default", "other"]).__enter__()
    with pytest.raises(ValueError, match="leave positions alone"):
        peft.mixed(trained("shifting prefix"), rows, ["default"]).__enter__()
    with pytest.raises(ValueError, match="beside frozen weights"):
        peft.mixed(trained("full"), rows, ["default"]).__enter__()
    model = peft.apply(trained("ntk"), peft.NTKAttentionConfig(rank=1), name="second")
    with pytest.raises(ValueError, match="in a mixed batch"), peft.mixed(model, rows, ["default", "second"]):
        model(*inputs())
    model = put(trained("ntk"), "ntk white and relative", name="second")
    with (
        pytest.raises(ValueError, match="one feature map and one mass"),
        peft.mixed(model, rows, ["default", "second"]),
    ):
        model(*inputs())


def test_a_mixed_batch_does_not_have_the_shift_of_the_adapter_that_is_active():
    model = put(trained("prefix"), "shifting prefix", name="second")
    assert model.position_offset == 5
    with peft.mixed(model, jnp.full(8, -1), ["default"]):
        np.testing.assert_array_equal(model(*inputs()), frozen())
    assert model.position_offset == 5
    peft.activate(model, "default")
    assert model.position_offset == 0


# -------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("method", ["lora", "rslora on one layer", "head"])
def test_merged_is_unmerged(method):
    model = trained(method)
    put(model, "ntk", name="other")
    peft.activate(model, "default")
    unmerged = np.asarray(model(*inputs()))
    merged = peft.merge(model)
    np.testing.assert_allclose(merged(*inputs()), unmerged, **EXACT)
    assert np.abs(unmerged - frozen()).max() > 1e-2
    # nothing is left of adapters: the model is of the frozen one's structure, and trains what it is told to
    assert structure(merged) == structure(tiny())
    assert peft.configs(merged) == {}


def test_a_merged_head_is_as_narrow_as_the_model_s_was():
    model = tiny()
    for parameter in (model.head.kernel, model.head.bias):
        parameter.set_value(parameter[...].astype(jnp.bfloat16))
    head = peft.merge(train(put(model, "head"))).head
    assert head.kernel.dtype == head.bias.dtype == jnp.bfloat16


def test_merging_what_is_in_place_makes_it_frozen():
    model = trained("bitfit")
    before = np.asarray(model(*inputs()))
    peft.merge(model)
    np.testing.assert_allclose(model(*inputs()), before, **EXACT)
    put(model, "lora")
    assert peft.trainable_parameters(model)[0] == METHODS["lora"][1]


@pytest.mark.parametrize(
    ("method", "name"), [("ntk", "StateCore"), ("lora and ntk", "StateCore"), ("prefix", "PrefixCore")]
)
def test_what_no_weight_can_stand_for_is_not_merged(method, name):
    model = trained(method)
    before = np.asarray(model(*inputs()))
    with pytest.raises(ValueError, match=rf"got \['{name}'\]: .*nonlinear function of the query.*keep the adapter"):
        peft.merge(model)
    np.testing.assert_array_equal(model(*inputs()), before)


def test_with_no_adapter_active_nothing_is_merged_and_nothing_is_lost():
    model = trained("lora")
    put(model, "ntk", name="other")
    peft.delete_adapter(model, "other")
    with pytest.raises(ValueError, match=r"expected an active adapter among \['default'\], got none"):
        peft.merge(model)
    assert list(peft.configs(model)) == ["default"]


# ---------------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("method", BASIC)
def test_jit_and_vmap_change_nothing(method):
    model = trained(method)
    x, mask = inputs()
    graph, state = nnx.split(model)

    @jax.jit
    def rows(state, x, mask):
        return jax.vmap(lambda x, mask: nnx.merge(graph, state)(x[None], mask[None])[0])(x, mask)

    np.testing.assert_allclose(rows(state, x, mask), model(x, mask), **EXACT)


@pytest.mark.parametrize("method", ["lora and ntk"])
def test_recomputing_layers_leaves_gradients_as_they_are(method):
    def gradients(remat):
        model = trained(method)
        model.remat = remat
        optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=peft.AdapterParam)
        return bits(step(model, optimizer, *inputs()))

    plain, recomputed = gradients(False), gradients(True)
    for path, gradient in plain.items():
        np.testing.assert_allclose(recomputed[path], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["prefix", "lora and ntk"])
def test_bfloat16_activations(method):
    narrow = put(tiny(dtype=jnp.dtype("bfloat16")), method)
    for path, leaf in nnx.to_flat_state(nnx.state(trained(method), peft.AdapterParam)):
        holder = narrow
        for part in path[:-1]:
            holder = holder[part] if isinstance(part, int) else getattr(holder, part, None) or holder[part]
        getattr(holder, path[-1])[...] = leaf[...]
    wide = trained(method)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, peft.AdapterParam))} <= {
        jnp.dtype("float32"),
        jnp.dtype("float64"),
    }
    x, mask = inputs()
    attended = narrow.layers[0].attention(x.astype(jnp.bfloat16))[0]
    assert attended.dtype == jnp.bfloat16
    # two layers of 8-bit significands
    np.testing.assert_allclose(narrow(x, mask), wide(x, mask), atol=0.1)


@pytest.mark.parametrize("method", ["prefix", "lora and ntk", "bitfit"])
def test_frozen_maps_are_stored_as_narrow_as_they_compute(method):
    """Bit for bit: what was rounded in every step is rounded once."""

    def outcome(narrow):
        model = put(tiny(dtype=jnp.dtype("bfloat16")), method)
        if narrow:
            peft.narrow_frozen(model)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=peft.AdapterParam)
        return model(*inputs()), bits(step(model, optimizer, *inputs())), model

    (wide_output, wide_gradients, _), (output, gradients, model) = outcome(False), outcome(True)
    np.testing.assert_array_equal(output, wide_output)
    assert gradients.keys() == wide_gradients.keys()
    for path, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, wide_gradients[path], err_msg=str(path))
    for _, module in nnx.iter_modules(model):
        for parameter in vars(module).values():
            if isinstance(parameter, nnx.Param):
                narrow = isinstance(module, nnx.Linear) and module.dtype is not None and type(parameter) is nnx.Param
                assert parameter.dtype == (jnp.bfloat16 if narrow else jnp.float32), type(module)


@pytest.fixture(scope="module")
def llama():
    config = models.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=24,
        vocab_size=31,
        hidden_act="silu",
    )
    return models.Llama(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("method", ["lora and ntk", "shifting prefix", "ntk white and relative"])
def test_decoding_token_by_token_is_the_causal_pass_over_all_tokens(llama, method):
    model = nnx.clone(llama)
    ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 31)
    config = METHODS[method][0]
    peft.apply(model, config, calibration={"input_ids": ids})
    rngs = np.random.default_rng(0)
    for leaf in jax.tree.leaves(nnx.state(model, peft.AdapterParam), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        # anywhere but at the start
        leaf[...] = leaf[...] + np.abs(rngs.normal(size=leaf.shape, scale=0.3)).astype(leaf.dtype)
    whole = np.asarray(model(ids).logits)
    # a prefix, a state or LoRA adds no cache entry: the buffer is as long as the text
    cache = model.empty_cache(2, 6)
    for t in range(6):
        output = model(ids[:, t : t + 1], cache=cache, start=jnp.int32(t))
        cache = output.cache
        np.testing.assert_allclose(output.logits[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)
    assert np.abs(whole - np.asarray(llama(ids).logits)).max() > 1e-2


# ---------------------------------------------------------------------------------- what k is about


def test_k_leaves_zero_and_stays_above():
    model = trained("ntk")
    ks = [np.asarray(layer.attention.core.adapters["default"].k[...]) for layer in model.layers]
    assert all(k.min() >= 0 for k in ks)
    assert any((k > 0).any() for k in ks)
    assert any((k == 0).any() for k in ks)


@settings(max_examples=20)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.floats(-5, 5))
def test_any_update_leaves_k_at_or_above_zero_and_others_free(k, update):
    parameters = {
        "k": peft.AdapterParam(jnp.abs(jnp.array(k)), non_negative=True),
        "z": peft.AdapterParam(jnp.array(k)),
    }
    optimizer = peft.non_negative(optax.identity())
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, update), parameters)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    moved = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(moved["k"][...], np.maximum(np.abs(k) + update, 0), atol=1e-6)
    np.testing.assert_allclose(moved["z"][...], np.array(k) + update, atol=1e-6)


# ----------------------------------------------------------------------------------------- messages


def test_a_target_that_matches_nothing_says_what_there_is():
    with pytest.raises(ValueError, match=r"for lora, got 'q_proj', which matches none of .*layers.0.attention.query"):
        peft.apply(tiny(), peft.LoraConfig(target="q_proj"))
    with pytest.raises(ValueError, match=r"matches none of \['layers.0.attention', 'layers.1.attention'\]"):
        peft.apply(tiny(), peft.NTKAttentionConfig(target="query"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.LoraConfig(target="("), "expected a regular expression"),
        (lambda: peft.LoraConfig(r=0), "r: expected a rank of at least 1, got 0"),
        (lambda: peft.PrefixTuningConfig(num_tokens=0), "num_tokens: expected at least 1, got 0"),
        (lambda: peft.NTKAttentionConfig(rank=0), "rank: expected at least 1, or None for a full Z, got 0"),
        (lambda: peft.NTKAttentionConfig(feature_map="gelu"), "feature_map: expected a positive map"),
        (lambda: peft.NTKAttentionConfig(init="from_prefix", whiten=True), "init: expected mass=.absolute"),
        (lambda: peft.apply(tiny(), []), "at least one configuration"),
        (lambda: peft.apply(tiny(), peft.LoraConfig(), name="a.b"), "name without dots"),
        (lambda: put(trained("lora"), "ntk"), "is there already. Delete it first"),
        (lambda: peft.apply(tiny(), peft.NTKAttentionConfig(whiten=True)), "calibration: expected a batch"),
        (lambda: peft.activate(trained("lora"), "x"), r"expected an adapter among \['default'\], got 'x'"),
        (lambda: peft.delete_adapter(trained("lora"), "x"), r"expected an adapter among \['default'\], got 'x'"),
        (lambda: peft.record(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}), "attention layers"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("without_annotations")
def test_a_calibration_batch_has_the_names_of_arguments():
    with pytest.raises(
        ValueError, match=r"calibration: expected a batch by the names of the model's arguments, .* got tuple"
    ):
        peft.apply(tiny(), peft.NTKAttentionConfig(whiten=True), calibration=(1, 2))


def test_a_head_named_beside_another_method_is_trained_once():
    model = peft.apply(tiny(), [peft.LoraConfig(r=3, alpha=6), peft.HeadConfig()])
    assert peft.trainable_parameters(model)[0] == METHODS["lora"][1]


def test_a_model_without_a_head_has_none_to_train():
    model = peft.apply(tiny(head=False), peft.NTKAttentionConfig())
    assert peft.trainable_parameters(model)[0] == METHODS["ntk"][1] - 16 * LABELS - LABELS
