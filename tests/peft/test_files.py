"""Adapters as files: names and layouts, what is understood of Hugging Face's, round trips, refusals."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ntk_prefix import models, peft
from ntk_prefix.models.attention import AttentionKind
from ntk_prefix.peft.base import targets
from ntk_prefix.peft.methods import lora
from ntk_prefix.peft.names import Fields, Names
from tests.peft.cases import METHODS, bits, frozen, inputs, put, same, structure, train, trained
from tests.peft.tiny import FEATURES, HEAD_DIM, KEY_HEADS, LAYERS, tiny

QUERY, VALUE = (f"base_model.model.tiny.encoder.layer.{{}}.attention.self.{x}" for x in ("query", "value"))
SELF = "base_model.model.tiny.encoder.layer.{}.attention.self"

HUGGING_FACE_LORA = dict.fromkeys(["auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "lora_bias"]) | {
    "qalora_group_size": 16,
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "modules_to_save": ["classifier", "score"],
    "peft_type": "LORA",
    "peft_version": "0.21.0",
    "r": 3,
    "rank_pattern": {},
    "target_modules": ["query", "value"],
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
}
"""As peft 0.21 writes it, all of the fields that have a value among them."""


def read(directory) -> tuple[dict, dict]:
    with safe_open(directory / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return json.loads((directory / "adapter_config.json").read_text()), tensors


def write(directory, form, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(form))
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def drawn(**shapes):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def lora_tensors(modules, r=3):
    """Return a file's tensors for LoRA on modules of our model, by their Hugging Face name and width."""
    shapes = {}
    for module, width in modules.items():
        rank = r(module) if callable(r) else r
        shapes |= {f"{module}.lora_A.weight": (rank, FEATURES), f"{module}.lora_B.weight": (width, rank)}
    return drawn(**shapes)


def query_and_value(layers=range(LAYERS)):
    return {QUERY.format(i): FEATURES for i in layers} | {VALUE.format(i): KEY_HEADS * HEAD_DIM for i in layers}


def with_added(tensors, scales):
    """Return what the model computes with ``scale B A`` added to weights, and a head put in place, by hand."""
    model = tiny()
    for module, scale in scales.items():
        layer, name = re.search(r"layer\.(\d)\.attention\.(?:self\.)?(.*)$", module).groups()
        linear = getattr(model.layers[int(layer)].attention, name.replace("output.dense", "out"))
        addition = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        linear.kernel[...] = linear.kernel[...] + np.float32(scale) * addition.T
    if "base_model.model.classifier.weight" in tensors:
        model.head.kernel[...] = jnp.asarray(tensors["base_model.model.classifier.weight"].T)
        model.head.bias[...] = jnp.asarray(tensors["base_model.model.classifier.bias"])
    return np.asarray(model(*inputs()))


# -------------------------------------------------------------------------------- names and layouts


def test_lora_has_the_names_and_layouts_of_peft(tmp_path):
    model = trained("lora")
    peft.save_pretrained(model, tmp_path, base_model_name_or_path="someone/tiny")
    form, tensors = read(tmp_path)
    modules = query_and_value()
    expected = {f"{module}.{part}.weight" for module in modules for part in ("lora_A", "lora_B")}
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert set(tensors) == expected | heads
    for module, width in modules.items():
        assert tensors[f"{module}.lora_A.weight"].shape == (3, FEATURES)
        assert tensors[f"{module}.lora_B.weight"].shape == (width, 3)
    factors = model.layers[1].attention.value.adapters["default"]
    np.testing.assert_array_equal(tensors[f"{VALUE.format(1)}.lora_A.weight"], factors.a[...].T)
    np.testing.assert_array_equal(tensors[f"{VALUE.format(1)}.lora_B.weight"], factors.b[...].T)
    kernel = model.head.adapters["default"].kernel[...]
    np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], kernel.T)
    wanted = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 3, "lora_alpha": 6, "use_rslora": False}
    wanted |= {"bias": "none", "base_model_name_or_path": "someone/tiny", "modules_to_save": ["classifier"]}
    wanted |= {"target_modules": ["attention.self.query", "attention.self.value"]}
    assert wanted.items() <= form.items()


def test_a_prefix_lies_as_peft_lays_it(tmp_path):
    # measured on peft: column ((2 layer + key or value) K + head) H + i
    model = put(tiny(), "shifting prefix")
    for index, layer in enumerate(model.layers):
        tokens = layer.attention.core.adapters["default"]
        for part, variable in enumerate((tokens.key, tokens.value)):
            token, head, i = np.indices((5, KEY_HEADS, HEAD_DIM))
            columns = ((2 * index + part) * KEY_HEADS + head) * HEAD_DIM + i
            variable[...] = jnp.asarray(1000 * token + columns, jnp.float32)
    peft.save_pretrained(model, tmp_path)
    form, tensors = read(tmp_path)
    width = LAYERS * 2 * KEY_HEADS * HEAD_DIM
    expected = 1000 * np.arange(5)[:, None] + np.arange(width)[None]
    np.testing.assert_array_equal(tensors["prompt_embeddings"], expected)
    # the head is one step nearer than with LoRA: peft wraps no module here
    assert set(tensors) == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}
    wanted = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "num_layers": LAYERS}
    wanted |= {"token_dim": KEY_HEADS * HEAD_DIM, "num_attention_heads": KEY_HEADS, "prefix_projection": False}
    assert wanted.items() <= form.items()
    assert "shift_positions" not in form


@pytest.mark.parametrize(
    ("method", "kind", "names"),
    [
        ("ntk", "NTK_ATTENTION", {"z", "k"}),
        ("ntk low rank", "NTK_ATTENTION", {"z_left", "z_right", "k"}),
        ("ntk taylor", "NTK_ATTENTION", {"z"}),
        ("prefix tuning plus", "PREFIX_TUNING_PLUS", {"z"}),
        ("prefix in one layer", "NTK_PREFIX", {"prefix_key", "prefix_value"}),
        ("head", "HEAD", set()),
    ],
)
def test_our_methods_are_under_the_same_names(tmp_path, method, kind, names):
    peft.save_pretrained(trained(method), tmp_path)
    form, tensors = read(tmp_path)
    assert form["peft_type"] == kind
    layers = [1] if method == "prefix in one layer" else range(LAYERS)
    expected = {f"{SELF.format(i)}.{name}" for i in layers for name in names}
    if METHODS[method][0].train_head or method == "head":
        expected |= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert set(tensors) == expected


def test_what_is_stored_is_the_state_that_attention_takes(tmp_path):
    model = trained("ntk white")
    state = model.layers[0].attention.core.adapters["default"]
    peft.save_pretrained(model, tmp_path)
    form, tensors = read(tmp_path)
    z, k = state.state()
    assert np.abs(np.asarray(z - state.z[...])).max() > 1e-3
    np.testing.assert_array_equal(tensors[f"{SELF.format(0)}.z"], z)
    np.testing.assert_array_equal(tensors[f"{SELF.format(0)}.k"], k)
    assert form["methods"][0]["mass"] == "absolute"
    assert form["methods"][0]["whiten"] is False


def test_a_prefix_in_some_layers_is_stored_layer_by_layer(tmp_path):
    model = trained("prefix in one layer")
    peft.save_pretrained(model, tmp_path)
    tokens, tensors = model.layers[1].attention.core.adapters["default"], read(tmp_path)[1]
    np.testing.assert_array_equal(tensors[f"{SELF.format(1)}.prefix_key"], tokens.key[...])
    np.testing.assert_array_equal(tensors[f"{SELF.format(1)}.prefix_value"], tokens.value[...])


def test_a_model_is_called_as_its_task_is(tmp_path):
    config = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 7}
    llama = models.LlamaConfig(num_hidden_layers=1, hidden_act="silu", **config)
    language = models.Llama(llama, rngs=nnx.Rngs(0))
    bare = models.Llama(llama, causal_lm=False, rngs=nnx.Rngs(0))
    sorts = models.Classifier(
        models.Llama(llama, causal_lm=False, rngs=nnx.Rngs(0)), 2, pooling="last", rngs=nnx.Rngs(0)
    )
    bert = models.Bert(models.BertConfig(num_hidden_layers=1, **config), rngs=nnx.Rngs(0))
    judges = models.Classifier(bert, 2, rngs=nnx.Rngs(0))
    expected = {
        "language": ("CAUSAL_LM", "model.layers.0.self_attn.q_proj", None),
        "bare": ("FEATURE_EXTRACTION", "layers.0.self_attn.q_proj", None),
        "sorts": ("SEQ_CLS", "model.layers.0.self_attn.q_proj", "score"),
        # Hugging Face's classifier stands behind a pooler, ours does not: the file is one of the bare model
        "judges": ("FEATURE_EXTRACTION", "encoder.layer.0.attention.self.query", "head"),
    }
    for name, model in (("language", language), ("bare", bare), ("sorts", sorts), ("judges", judges)):
        task, query, head = expected[name]
        peft.apply(model, peft.LoraConfig(target="(query|lm_head)$"))
        peft.save_pretrained(model, tmp_path / name)
        form, tensors = read(tmp_path / name)
        assert form["task_type"] == task
        modules = {key.rsplit(".lora_", 1)[0] for key in tensors if "lora" in key}
        outside = {"base_model.model.lm_head"} if name == "language" else set()
        assert modules == {f"base_model.model.{query}"} | outside
        heads = {key for key in tensors if "lora" not in key}
        assert heads == ({f"base_model.model.{head}.{x}" for x in ("weight", "bias")} if head else set())
    # a file of one fits the other, as long as it has what the other has
    peft.delete_adapter(bare, "default")
    peft.load_adapter(bare, tmp_path / "sorts", load_head=False)
    with pytest.raises(ValueError, match="expected a head that this model has, got score"):
        peft.load_adapter(models.Llama(llama, causal_lm=False, rngs=nnx.Rngs(0)), tmp_path / "sorts")
    # Llama's head has no bias there
    form, tensors = read(tmp_path / "sorts")
    without = {key: value for key, value in tensors.items() if key != "base_model.model.score.bias"}
    assert len(without) == len(tensors) - 1
    peft.load_adapter(sorts, write(tmp_path / "theirs", form, without), "theirs")
    assert not sorts.head.adapters["theirs"].bias[...].any()


# ----------------------------------------------------------------------------------- Hugging Face's


def test_lora_of_peft_computes_what_the_weights_say(tmp_path):
    tensors = lora_tensors(query_and_value()) | drawn(
        **{"base_model.model.classifier.weight": (3, FEATURES), "base_model.model.classifier.bias": (3,)}
    )
    model = peft.load_adapter(tiny(), write(tmp_path, HUGGING_FACE_LORA, tensors))
    expected = with_added(tensors, dict.fromkeys(query_and_value(), 2))
    np.testing.assert_allclose(model(*inputs()), expected, rtol=1e-5, atol=1e-5)
    # the bare model's names do as well, and a pooler's LoRA has nothing to change here
    bare = {key.replace("tiny.", ""): value for key, value in tensors.items()}
    bare |= drawn(**{f"base_model.model.pooler.dense.lora_{x}.weight": (3, 16) for x in "AB"})
    again = peft.load_adapter(tiny(), write(tmp_path, HUGGING_FACE_LORA, bare))
    np.testing.assert_array_equal(again(*inputs()), model(*inputs()))


OUT = "base_model.model.tiny.encoder.layer.{}.attention.output.dense"


@pytest.mark.parametrize(
    ("changes", "modules", "rank", "scale"),
    [
        ({"target_modules": r".*\.layer\.1\..*(query|value)"}, query_and_value([1]), 3, lambda _: 2),
        ({"target_modules": r"tiny\.encoder.*value"}, {VALUE.format(i): 8 for i in range(2)}, 3, lambda _: 2),
        ({"layers_to_transform": [0]}, query_and_value([0]), 3, lambda _: 2),
        ({"layers_to_transform": 1, "layers_pattern": "layer"}, query_and_value([1]), 3, lambda _: 2),
        ({"exclude_modules": ["value"]}, {QUERY.format(i): FEATURES for i in range(2)}, 3, lambda _: 2),
        ({"target_modules": ["output.dense"]}, {OUT.format(i): FEATURES for i in range(2)}, 3, lambda _: 2),
        ({"use_rslora": True}, query_and_value(), 3, lambda _: 6 / np.sqrt(3)),
        (
            {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 1}},
            query_and_value(),
            lambda module: 2 if module == QUERY.format(0) else 3,
            lambda module: 3 if module == QUERY.format(0) else 1 / 3 if "value" in module else 2,
        ),
        (
            {"rank_pattern": {r"layer\.\d\.attention.*query": 1}},
            query_and_value(),
            lambda module: 1 if "query" in module else 3,
            lambda module: 6 if "query" in module else 2,
        ),
        (
            {"target_modules": "all-linear"},
            query_and_value()
            | {QUERY.format(i).replace("query", "key"): KEY_HEADS * HEAD_DIM for i in range(2)}
            | {OUT.format(i): FEATURES for i in range(2)},
            3,
            lambda _: 2,
        ),
    ],
)
def test_modules_ranks_and_scales_are_chosen_as_peft_chooses(tmp_path, changes, modules, rank, scale):
    tensors = lora_tensors(modules, rank)
    model = peft.load_adapter(tiny(), write(tmp_path, HUGGING_FACE_LORA | changes, tensors))
    expected = with_added(tensors, {module: scale(module) for module in modules})
    np.testing.assert_allclose(model(*inputs()), expected, rtol=1e-5, atol=1e-5)
    # and as it was read it is written
    peft.save_pretrained(model, tmp_path / "again")
    again = peft.load_adapter(tiny(), tmp_path / "again")
    np.testing.assert_array_equal(again(*inputs()), model(*inputs()))
    assert read(tmp_path / "again")[1].keys() == tensors.keys()


@settings(max_examples=25)
@given(st.sets(st.sampled_from(targets(tiny(head=False), peft.LoraConfig(target=""))), min_size=1))
def test_any_choice_of_modules_survives_the_way_through_target_modules(chosen):
    model = tiny(head=False)
    names = Names(model)
    fields = Fields(HUGGING_FACE_LORA | {"target_modules": lora.target_modules(chosen, model, names)}, "a file")
    (config,), _ = peft.LoraConfig.from_hugging_face(fields, model, names, {})
    assert set(targets(model, config)) == chosen


def test_a_prefix_of_peft_shifts_positions_and_ours_says_so(tmp_path):
    width = LAYERS * 2 * KEY_HEADS * HEAD_DIM
    form = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "num_layers": LAYERS, "prefix_projection": True}
    form |= {"encoder_hidden_size": 99, "num_transformer_submodules": 1, "token_dim": 8, "task_type": "SEQ_CLS"}
    prompt = drawn(prompt_embeddings=(5, width))
    model = peft.load_adapter(tiny(), write(tmp_path, form, prompt))
    assert model.position_offset == 5
    shifted = np.asarray(model(*inputs()))
    peft.delete_adapter(model, "default")
    write(tmp_path, form | {"shift_positions": False}, prompt)
    peft.load_adapter(model, tmp_path)
    assert model.position_offset == 0
    assert np.abs(shifted - np.asarray(model(*inputs()))).max() > 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("loftq_config", {"bits": 4}),
        ("of_a_later_version", 1),
        # these start from weights of the model that they have changed
        *(("init_lora_weights", start) for start in ("pissa", "olora", "loftq", "corda")),
    ],
)
def test_fields_that_change_what_is_computed_are_refused_by_name(tmp_path, field, value):
    write(tmp_path, HUGGING_FACE_LORA | {field: value}, lora_tensors(query_and_value()))
    with pytest.raises(ValueError, match=rf"expected (fields that are known here or off, got .*)?{field}"):
        peft.load_adapter(tiny(), tmp_path)


def test_fields_of_later_versions_are_taken_as_long_as_they_are_off(tmp_path):
    later = {"a": None, "b": False, "c": {}, "d": [], "e": "none", "f": ""}
    write(tmp_path, HUGGING_FACE_LORA | later, lora_tensors(query_and_value()))
    peft.load_adapter(tiny(), tmp_path)
    peft.save_pretrained(trained("ntk"), tmp_path)
    form, _ = read(tmp_path)
    form["methods"][0]["later"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(form))
    peft.load_adapter(tiny(), tmp_path)
    form["methods"][0]["later"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(form))
    with pytest.raises(ValueError, match=r"got \{'later': 3\}"):
        peft.load_adapter(tiny(), tmp_path)


# ----------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_computes_the_same_and_trains_on(tmp_path, method):
    model = trained(method)
    peft.save_pretrained(model, tmp_path)
    loaded = peft.load_adapter(put(tiny(), "head", "other") if method not in ("bitfit", "full") else tiny(), tmp_path)
    computed = np.asarray(loaded(*inputs()))
    np.testing.assert_allclose(computed, model(*inputs()), rtol=1e-6, atol=1e-6)
    assert np.abs(computed - frozen()).max() > 1e-3
    assert peft.trainable_parameters(loaded)[0] == METHODS[method][1]
    peft.save_pretrained(loaded, tmp_path / "again")
    (form, tensors), (form_again, again) = read(tmp_path), read(tmp_path / "again")
    # LoRA's target is spelled anew, but means the same
    assert form == form_again
    assert same(tensors, again)
    train(loaded, 1)
    assert np.abs(np.asarray(loaded(*inputs())) - computed).max() > 1e-4


def test_without_a_head_the_rest_is_loaded(tmp_path):
    peft.save_pretrained(trained("ntk"), tmp_path)
    model = peft.load_adapter(tiny(), tmp_path, load_head=False)
    assert structure(model.head) == structure(tiny().head)
    z = model.layers[1].attention.core.adapters["default"].z[...]
    np.testing.assert_array_equal(z, trained("ntk").layers[1].attention.core.adapters["default"].z[...])
    other = peft.load_adapter(tiny(head=False), tmp_path, load_head=False)
    assert same(bits(other, peft.AdapterParam), bits(model, peft.AdapterParam))


def test_the_active_adapter_is_saved_or_the_named_one(tmp_path):
    model = put(trained("ntk"), "lora", name="second")
    peft.save_pretrained(model, tmp_path / "active")
    peft.save_pretrained(model, tmp_path / "named", "default")
    assert read(tmp_path / "active")[0]["peft_type"] == "LORA"
    assert read(tmp_path / "named")[0]["peft_type"] == "NTK_ATTENTION"
    peft.activate(model, None)
    with pytest.raises(ValueError, match=r"expected an adapter among \['default', 'second'\], got None\. Activate one"):
        peft.save_pretrained(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"expected one with an adapter, got Linear without any\. ntk_prefix\.peft\.apply"
    ):
        peft.save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)


def test_a_prefix_trained_on_its_own_positions_warns_peft_of_it(tmp_path, caplog):
    peft.save_pretrained(trained("prefix"), tmp_path)
    assert "shift positions by the prefix" in caplog.text
    assert read(tmp_path)[0]["shift_positions"] is False


def test_a_prefix_before_a_window_warns_of_where_peft_leaves_it_behind(tmp_path, caplog):
    model = trained("prefix")
    peft.save_pretrained(model, tmp_path)
    assert "window" not in caplog.text  # control: there is none
    for layer in model.layers:
        layer.attention.kind = AttentionKind(window=8)
    for way in (peft.save_pretrained, peft.load_adapter):
        caplog.clear()
        way(model, tmp_path, "default" if way is peft.save_pretrained else "second")
        assert "prefix of 5 tokens in layers with a window of 8: the same as peft's up to token 3" in caplog.text


def test_weights_in_bfloat16_are_read(tmp_path):
    peft.save_pretrained(trained("lora"), tmp_path)
    _, tensors = read(tmp_path)
    narrow = {key: np.asarray(jnp.asarray(value, jnp.bfloat16)) for key, value in tensors.items()}
    safetensors.numpy.save_file(narrow, tmp_path / "adapter_model.safetensors")
    model = peft.load_adapter(tiny(), tmp_path)
    assert model.layers[0].attention.query.adapters["default"].a.dtype == jnp.float32
    np.testing.assert_allclose(model(*inputs()), trained("lora")(*inputs()), atol=0.05)


# ----------------------------------------------------------------------------------------- refusals


def damaged(directory, damage):
    """Return a directory with a good LoRA adapter that something has happened to."""
    form, tensors = dict(HUGGING_FACE_LORA), lora_tensors(query_and_value())
    key = f"{QUERY.format(1)}.lora_B.weight"
    if damage == "foreign":
        form["peft_type"] = "IA3"
    elif damage == "missing":
        del tensors[key]
    elif damage == "left over":
        tensors[key.replace("query", "key")] = tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:-1]
    elif damage == "labels":
        tensors |= drawn(**{"base_model.model.classifier.weight": (2, FEATURES)})
    elif damage == "no module":
        form["target_modules"] = ["q_proj"]
    elif damage == "method":
        form = {"peft_type": "NEW", "methods": [{"method": "new"}]}
    elif damage == "prompt":
        form = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}
        tensors = drawn(prompt_embeddings=(5, 16))
    elif damage == "two models":
        form = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "num_transformer_submodules": 2}
    write(directory, form, tensors)
    if damage == "no config":
        (directory / "adapter_config.json").unlink()
    elif damage == "no weights":
        (directory / "adapter_model.safetensors").unlink()
    elif damage == "half a config":
        (directory / "adapter_config.json").write_text('{"peft_type": "LO')
    elif damage == "half the weights":
        file = directory / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    return directory


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no config", FileNotFoundError, "found no adapter_config.json"),
        ("no weights", FileNotFoundError, "found no adapter_model.safetensors"),
        ("half a config", ValueError, "adapter_config.json: expected JSON, got a file that is broken"),
        ("half the weights", ValueError, "adapter_model.safetensors: expected safetensors, got a file that is broken"),
        ("foreign", ValueError, "expected peft_type LORA, PREFIX_TUNING or .*, got 'IA3'"),
        ("method", ValueError, "expected a method among .*, got 'new'"),
        ("missing", ValueError, r"expected a tensor encoder.layer.1.*query.lora_B.weight \(16, 3\) .*, got none"),
        ("left over", ValueError, r"got also \['encoder.layer.1.attention.self.key.lora_B.weight'\]"),
        ("shape", ValueError, r"1.attention.self.query.lora_B.weight of shape \(16, 3\) .*, got \(15, 3\)"),
        ("labels", ValueError, r"head.weight of shape \(3, 16\) for this model, got \(2, 16\)"),
        ("no module", ValueError, r"got \['q_proj'\], which selects none"),
        ("prompt", ValueError, r"expected prompt_embeddings of shape \(5, 32\).*, got \(5, 16\).*prefix_projection"),
        ("two models", ValueError, "num_transformer_submodules 1"),
    ],
)
def test_a_file_that_does_not_fit_says_why_and_changes_nothing(tmp_path, damage, error, message):
    model = trained("ntk")
    before, places = bits(model), structure(model)
    with pytest.raises(error, match=message):
        peft.load_adapter(model, damaged(tmp_path, damage), "second")
    assert same(bits(model), before)
    assert structure(model) == places
    assert list(peft.configs(model)) == ["default"]


def test_a_name_that_is_taken_is_refused(tmp_path):
    peft.save_pretrained(trained("lora"), tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        peft.load_adapter(trained("ntk"), tmp_path)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    model = trained("ntk")
    k = model.layers[0].attention.core.adapters["default"].k
    k[...] = k[...] - 1
    with pytest.raises(
        ValueError, match=r"layer\.0\..*k of adapter 'default': expected weights >= 0, .*peft\.non_negative"
    ):
        peft.save_pretrained(model, tmp_path)
    assert not any(tmp_path.iterdir())
