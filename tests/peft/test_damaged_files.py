"""Adapter files that are damaged, hostile, or hold more than an adapter: read whole or refused by name, the model as it was."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ntk_prefix import models, peft
from ntk_prefix.feature_maps import Elu1, FeatureMap, Taylor
from ntk_prefix.peft import files
from ntk_prefix.peft.patterns import matching
from tests import fuzz
from tests.peft.cases import put
from tests.peft.test_file_rows import uneven
from tests.peft.test_files import HUGGING_FACE_LORA, QUERY, lora_tensors, query_and_value, read, write
from tests.peft.tiny import tiny


def snapshot(model: Any) -> tuple[Any, list[Any]]:
    graph, state = nnx.split(model)
    return graph, jax.tree.leaves(state)


def unchanged(model: Any, before: tuple[Any, list[Any]]) -> bool:
    """Return whether the model is the same module tree around the very same arrays."""
    graph, leaves = snapshot(model)
    return graph == before[0] and all(a is b for a, b in zip(leaves, before[1], strict=True))


# ------------------------------------------------------------------------------------------------ fuzzing

MODEL = tiny(head=False)
"""One for all inputs: refusals leave it as it is, and what was read is put on copies."""


def saved(method: str, folder: Path) -> Path:
    if not folder.exists():
        if method == "huggingface":
            write(folder, HUGGING_FACE_LORA, lora_tensors(query_and_value()))
        else:
            bare = tiny(head=False)
            peft.save_pretrained(uneven(bare) if method == "uneven" else put(bare, method), folder)
        peft.load_adapter(nnx.clone(MODEL), folder)  # good as it is; and what is compiled once is not timed
    return folder


@pytest.mark.parametrize(
    ("file", "methods"),
    [
        ("adapter_config.json", ("huggingface", "ntk", "shifting prefix")),
        ("adapter_model.safetensors", ("lora", "ntk", "uneven")),
    ],
)
@fuzz.fuzzed
@given(data=st.data())
def test_no_damage_gets_through(
    file: str, methods: tuple[str, ...], tmp_path_factory: Any, data: st.DataObject
) -> None:
    """300 configurations and 300 weights: numbers that are finite, or one line that names the file and an unchanged model."""
    base = Path(tmp_path_factory.getbasetemp())
    method = data.draw(st.sampled_from(methods))
    good = saved(method, base / f"good-{method.split()[0]}")
    folder = base / "damaged"
    folder.mkdir(exist_ok=True)
    for name in (files.CONFIG, files.WEIGHTS):
        (folder / name).write_bytes((good / name).read_bytes())
    content = (good / file).read_bytes()
    damage = fuzz.damaged_json(json.loads(content)) if file == files.CONFIG else fuzz.damaged_bytes(content)
    (folder / file).write_bytes(data.draw(damage))
    before, copy = snapshot(MODEL), nnx.clone(MODEL)

    def load() -> Any:
        return nnx.state(peft.load_adapter(copy, folder), peft.AdapterParam)

    try:
        # weights that do not fit what the configuration says are named after their own file
        fuzz.read_whole(folder if file == files.CONFIG else folder / file, load)
    finally:
        assert unchanged(MODEL, before)
    if not peft.configs(copy):
        assert unchanged(copy, before)


# ------------------------------------------------------------------------------------- numbers at the border


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * np.nan, "z: expected finite float32 numbers"),
        (lambda value: value.astype(np.float64) + 1e300, "z: expected finite float32 numbers"),
        (lambda value: value.astype(np.float64) + 0.1, "z: expected numbers that float32 holds"),
        (lambda value: value.astype(np.int32), r"z: expected floating point weights .*, got I32"),
        (lambda value: value > 0, r"z: expected floating point weights .*, got BOOL"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_name(
    change: Callable[[np.ndarray], np.ndarray], message: str, tmp_path: Path
) -> None:
    peft.save_pretrained(put(tiny(head=False), "ntk"), tmp_path)
    _, tensors = read(tmp_path)
    key = next(key for key in tensors if key.endswith("layer.0.attention.self.z"))
    with np.errstate(invalid="ignore"):
        tensors[key] = np.ascontiguousarray(change(tensors[key]))
    safetensors.numpy.save_file(tensors, tmp_path / files.WEIGHTS)
    before = snapshot(MODEL)
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(MODEL, tmp_path)
    assert unchanged(MODEL, before)


def test_a_negative_k_is_refused(tmp_path: Path) -> None:
    peft.save_pretrained(put(tiny(head=False), "ntk"), tmp_path)
    _, tensors = read(tmp_path)
    key = next(key for key in tensors if key.endswith("1.attention.self.k"))
    tensors[key][0, 1] = -1e-3
    safetensors.numpy.save_file(tensors, tmp_path / files.WEIGHTS)
    with pytest.raises(ValueError, match=r"layer.1.attention.self.k: expected numbers >= 0.*got -0.001"):
        peft.load_adapter(tiny(head=False), tmp_path)


def test_float64_that_float32_holds_is_read(tmp_path: Path) -> None:
    tensors = lora_tensors(query_and_value())
    write(tmp_path, HUGGING_FACE_LORA, tensors)
    safetensors.numpy.save_file(
        {key: value.astype(np.float64) for key, value in tensors.items()}, tmp_path / files.WEIGHTS
    )
    model = peft.load_adapter(tiny(head=False), tmp_path)
    assert model.layers[0].attention.query.adapters["default"].a.dtype == jnp.float32


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = put(tiny(head=False), "ntk")
    peft.save_pretrained(model, tmp_path)
    before = (tmp_path / files.WEIGHTS).read_bytes()
    z = model.layers[1].attention.core.adapters["default"].z
    z[...] = z[...].at[0, 0, 0].set(jnp.inf)
    with pytest.raises(FloatingPointError, match=r"layer.1.attention.self.z of adapter 'default': expected finite"):
        peft.save_pretrained(model, tmp_path)
    assert (tmp_path / files.WEIGHTS).read_bytes() == before


# ------------------------------------------------------------------------------------- what is asked of us


@pytest.mark.parametrize(
    "changes",
    [{"r": 10**9}, {"r": 2**16}, {"rank_pattern": {"query": 10**9}}, {"lora_alpha": 1e300}, {"r": True}, {"r": "3"}],
)
def test_sizes_and_types_are_looked_at_before_anything_is_made(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, HUGGING_FACE_LORA | changes, lora_tensors(query_and_value()))
    with fuzz.survives(tmp_path), pytest.raises(ValueError, match=r"adapter_config|shape \(65536, 16\)"):
        peft.load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize("pattern", ["(([a-z.0-9])*)*!", "(a|[a-z.0-9])+$!", ".*.*.*.*.*.*.*.*.*.*!", r"(\w+\.?)+\d!"])
def test_a_regular_expression_that_would_run_for_ever_is_ended(pattern: str, tmp_path: Path) -> None:
    write(tmp_path, HUGGING_FACE_LORA | {"target_modules": pattern}, lora_tensors(query_and_value()))
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="target_modules"):
        peft.load_adapter(tiny(), tmp_path)
    assert time.perf_counter() - begun < fuzz.SECONDS


def test_a_target_that_would_run_for_ever_is_ended() -> None:
    """Also one that is typed: ``--adapter target=...``."""
    sizes = models.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
    )
    model = models.Bert(sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="target: expected a regular expression that is matched within"):
        peft.apply(model, peft.LoraConfig(target=r"((([a-z.0-9])*)*)*!"))


def test_regular_expressions_that_are_meant_well_select_what_they_say() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj", "lm_head"]
    assert matching(r".*\.(q_proj|v_proj)", names, "x") == {names[0]}
    assert matching(r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)+", names, "x") == set(names[:2])
    assert matching(r"model\.layers\.(0|1)\..*", names, "x") == {names[0]}
    with pytest.raises(ValueError, match="x: expected a regular expression, got '\\('"):
        matching("(", names, "x")


def test_layers_to_transform_may_be_an_empty_list(tmp_path: Path) -> None:
    write(tmp_path, HUGGING_FACE_LORA | {"layers_to_transform": []}, lora_tensors(query_and_value()))
    assert peft.trainable_parameters(peft.load_adapter(tiny(head=False), tmp_path))[0] > 0


# --------------------------------------------------------------------------------- every tensor accounted for


def llama(causal: bool = True) -> Any:
    config = models.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=7,
        hidden_act="silu", tie_word_embeddings=False,
    )  # fmt: skip
    if causal:
        return models.Llama(config, rngs=nnx.Rngs(0))
    bare = models.Llama(config, causal_lm=False, rngs=nnx.Rngs(0))
    return models.Classifier(bare, 3, pooling="last", rngs=nnx.Rngs(0))


IDS = jnp.arange(6).reshape(1, 6)


@pytest.mark.parametrize(
    ("causal", "config"),
    [
        (False, peft.LoraConfig(target=r"(query|^head)$", r=2, train_head=False)),
        (False, peft.LoraConfig(target=r"query$", r=2)),
        (True, peft.LoraConfig(target=r"(query|lm_head)$", r=2)),
        (True, [peft.LoraConfig(target=r"query$", r=2), peft.HeadConfig(target=r"^lm_head$")]),
    ],
    ids=["lora on the head", "the head whole", "lora on lm_head", "lm_head whole"],
)
def test_heads_are_saved_and_read_again(causal: bool, config: Any, tmp_path: Path) -> None:
    model = peft.apply(llama(causal), config)
    for leaf in jax.tree.leaves(nnx.state(model, peft.AdapterParam), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = leaf[...] + 0.1
    peft.save_pretrained(model, tmp_path)
    assert read(tmp_path)[0]["peft_type"] == "LORA"
    np.testing.assert_allclose(peft.load_adapter(llama(causal), tmp_path)(IDS).logits, model(IDS).logits, atol=1e-6)


def test_a_copy_of_a_frozen_weight_is_taken_if_it_is_one(tmp_path: Path) -> None:
    """As peft writes ``base_layer`` and embeddings beside LoRA."""
    peft.save_pretrained(peft.apply(llama(), peft.LoraConfig(target=r"(query|lm_head)$", r=2)), tmp_path)
    _, tensors = read(tmp_path)
    model = llama()
    copies = {
        "base_model.model.lm_head.base_layer.weight": np.asarray(model.lm_head.kernel[...].T),
        "base_model.model.model.embed_tokens.weight": np.asarray(model.embeddings.embedding[...]).astype(np.float16),
    }
    safetensors.numpy.save_file(
        tensors | {k: np.ascontiguousarray(v) for k, v in copies.items()}, tmp_path / files.WEIGHTS
    )
    peft.load_adapter(model, tmp_path)
    for key, value in copies.items():
        other, before = llama(), snapshot(llama())
        safetensors.numpy.save_file(tensors | {key: np.ascontiguousarray(value + 1)}, tmp_path / files.WEIGHTS)
        with pytest.raises(ValueError, match=r"expected a copy of the model's own weight"):
            peft.load_adapter(other, tmp_path)
        assert before[0] == snapshot(other)[0]


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight", "base_model.model.score.lora_A.weight", "base_model.model.cls.weight",
        f"{QUERY.format(0)}.magnitude", "base_model.model.tiny.embeddings.weight",
    ],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused_by_name(key: str, tmp_path: Path) -> None:
    tensors = lora_tensors(query_and_value()) | {key: np.ones((2, 2), np.float32)}
    name = key.removeprefix("base_model.model.").removeprefix("tiny.")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        peft.load_adapter(tiny(), write(tmp_path, HUGGING_FACE_LORA, tensors))


# ------------------------------------------------------------------------------------------- maps of one's own


class Sharp(Elu1):
    """A map of one's own, known by its name once its class is made."""

    name = "sharp"


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize("phi", [Elu1(), Taylor(degree=2), Sharp()])
def test_a_feature_map_given_as_an_object_is_saved_by_its_name(phi: FeatureMap, tmp_path: Path) -> None:
    config = peft.NTKAttentionConfig(feature_map=phi, train_k=phi.positive)  # type: ignore[arg-type]
    model = peft.apply(tiny(head=False), config)
    peft.save_pretrained(model, tmp_path)
    assert peft.load_adapter(tiny(head=False), tmp_path).layers[0].attention.core.adapters["default"].phi == phi


@pytest.mark.parametrize(
    ("field", "value"),
    [("of_a_later_version", 3), ("peft_type", "LORA"), ("peft_type", 3), ("peft_type", None), ("methods", [])],
)
def test_a_field_beside_our_methods_that_may_change_what_they_compute_is_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    folder = saved("ntk", tmp_path / "adapter")
    file = folder / files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    before = snapshot(MODEL)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*: expected .*({field}|length >= 1)"):
        peft.load_adapter(MODEL, folder)
    assert unchanged(MODEL, before)
