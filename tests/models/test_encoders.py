"""Encoder families beside what transformers made of the same tiny files: ``tests/fixtures/encoders``.

Tolerance: 1e-5 of the largest number in float32, tens of roundings; theirs is computed in float64.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.models.families.t5 import relative_buckets
from ntk_prefix.peft import AdapterParam
from tests.models.calling import call, quick
from tests.models.recording import recorded

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


pytestmark = pytest.mark.parametrize("x64", [False], indirect=True)


def inputs(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(recorded(FIXTURES / name)[key], jnp.int32) for key in ("input_ids", "attention_mask")}


def loaded(name: str, **options: Any) -> Any:
    task = "sequence-classification" if "logits" in recorded(FIXTURES / name) or options else None
    return models.from_pretrained(FIXTURES / name, task, **options)


def error(ours: Any, theirs: np.ndarray, where: np.ndarray) -> float:
    return np.abs(np.asarray(ours, np.float64) - theirs)[where].max() / np.abs(theirs[where]).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_logits_are_those_of_transformers(name: str) -> None:
    """Whole, padded on the right and on the left, longer than any window; a head of two layers as it stands in the file."""
    model, theirs = loaded(name), recorded(FIXTURES / name)
    output = call(model, **inputs(name))
    real = theirs["attention_mask"].astype(bool)
    assert error(output.last_hidden_state, theirs["last_hidden_state"], real) <= 1e-5
    if "logits" in theirs:
        # what a first token that is padding sees in a window of padding is nobody's business
        rows = real[:, 0] if model.pooling == "cls" else np.ones(len(real), bool)
        assert error(output.logits, theirs["logits"], rows) <= 1e-5
    shifted = np.roll(theirs["last_hidden_state"], 1, axis=1)  # the control
    assert error(output.last_hidden_state, shifted, real) > 0.1


SHARED = {"roberta", "distilbert"}
"""Families whose layers are BERT's: what is not of their embeddings is quick for another one."""


def each(*without: str) -> Any:
    names = [name for name in FAMILIES if name not in without]
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow) if n in SHARED else n for n in names]
    )


@each("bert", "xlm-roberta", "modernbert")
def test_ntk_attention_trains_two_steps(name: str) -> None:
    """Each family once; BERT is trained elsewhere."""
    model = peft.apply(loaded(name, num_labels=3, pooling="mean"), peft.NTKAttentionConfig())
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=AdapterParam)
    labels = jnp.asarray([0, 1, 2, 1])

    @quick
    def step(state: Any, x: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)

        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(**x).logits, labels).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value, grads

    graph, state = nnx.split((model, optimizer))
    losses = []
    for _ in range(2):
        state, value, grads = step(state, inputs(name))
        losses.append(value)
        for leaf in jax.tree.leaves(grads):
            assert np.isfinite(leaf).all()
            assert np.any(leaf != 0)
    assert losses[1] < losses[0]


@each("bert", "xlm-roberta", "modernbert", "modernbert-mean")
def test_lora_has_hugging_faces_names_and_goes_there_and_back(name: str, tmp_path: Path) -> None:
    target = r"layers\.\d\.(attention\.out|mlp\.down)$"
    model = peft.apply(loaded(name), peft.LoraConfig(target=target, r=2, train_head=False))
    draw = np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, AdapterParam):
            leaf.set_value(jnp.asarray(draw.normal(size=leaf.shape), jnp.float32))
    peft.save_pretrained(model, tmp_path)
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in load_file(_only(tmp_path))}
    in_file = {key.rpartition(".")[0] for key in load_file(FIXTURES / name / "model.safetensors")}
    prefix = getattr(model, "backbone", model).hugging_face_prefix
    bare = {name.removeprefix(prefix) for name in in_file}
    assert len(names) == 2 * len(getattr(model, "backbone", model).layers)
    assert {name.removeprefix(prefix) for name in names} <= bare
    again = peft.load_adapter(loaded(name), tmp_path)
    ours, theirs = (nnx.to_flat_state(nnx.state(m, AdapterParam)) for m in (again, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[...], other[...])


def _only(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_has_beyond_the_model_is_named(name: str, tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / name / "model.safetensors")
    model = loaded(name)
    prefix = getattr(model, "backbone", model).hugging_face_prefix
    save_file({**tensors, f"{prefix}rogue.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    with pytest.raises(UsageError, match=r"tensors left over: rogue\.weight"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["modernbert", "t5"])
def test_leading_rows_stand_outside_of_positions_and_windows(name: str) -> None:
    """Rows before the tokens, all zero and seen by all, leave room for every option: the shapes and the names fit."""
    model = peft.apply(loaded(name, num_labels=2), peft.PrefixPropagationConfig(num_prefix_tokens=3))
    output = jax.eval_shape(lambda x: model(**x), inputs(name))
    assert output.leading_states.shape == (4, 3, 16)
    assert output.logits.shape == (4, 2)


def test_a_first_layer_of_another_build_runs_before_the_loop_over_the_others() -> None:
    """ModernBERT's, which has no norm; its layers with a window and the others are in the loop."""
    model, theirs = loaded("modernbert"), recorded(FIXTURES / "modernbert")
    model.scan_layers = True
    real = theirs["attention_mask"].astype(bool)
    assert error(call(model, **inputs("modernbert")).last_hidden_state, theirs["last_hidden_state"], real) <= 1e-5


def test_a_window_is_refused_beside_a_position_bias() -> None:
    model = loaded("t5")
    model.window = 3
    with pytest.raises(UsageError, match="a position bias"):
        jax.eval_shape(lambda x: model(**x), inputs("t5"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj: expected a gated one"),
        ("t5", {"relative_attention_max_distance": 2}, "relative_attention_max_distance: expected more than a quarter"),
        (
            "modernbert",
            {"layer_types": ["full_attention"]},
            "layer_types: expected one for each of the 4 layers, got 1",
        ),
        ("modernbert", {"local_attention": 1}, "local_attention: expected at least 2"),
        ("modernbert", {"num_attention_heads": 16}, "heads of an even size"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'default' for a ModernBERT",
        ),
        ("modernbert", {"classifier_activation": "swish"}, "classifier_activation: expected one of"),
        ("distilbert", {"n_layers": 3}, "num_hidden_layers: expected at most the 2"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id"),
        ("roberta", {"pad_token_id": 30}, "pad_token_id: expected less than the 20 positions"),
    ],
)
def test_a_config_that_does_not_fit_is_named(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(FIXTURES / name / "model.safetensors")
    with pytest.raises(UsageError, match=message):
        models.from_pretrained(tmp_path)


def test_a_whole_t5_is_refused_with_the_way_on_and_a_table_may_stand_twice(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "t5" / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / "t5" / "config.json").read_text())
    save_file(
        {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].copy()}, tmp_path / "model.safetensors"
    )
    np.testing.assert_array_equal(models.from_pretrained(tmp_path).embeddings.embedding[...], tensors["shared.weight"])
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="another table in encoder"):
        models.from_pretrained(tmp_path)
    save_file({**tensors, "decoder.final_layer_norm.weight": np.ones(16, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="T5EncoderModel"):
        models.from_pretrained(tmp_path)


def test_relative_buckets_are_those_of_the_paper() -> None:
    """Of 8: distances 0 and 1 one each, then 2 to 4 and 5 and beyond, which is 9 at most; keys after the query apart."""
    found = relative_buckets(np.arange(-12, 13), 8, 9)
    assert found[12:].tolist() == [0, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]
    assert found[:12].tolist() == [3] * 8 + [2] * 3 + [1]


def test_roberta_counts_tokens_and_extends_behind_the_paddings_rows() -> None:
    model = loaded("roberta", num_labels=2).backbone
    ids = jnp.asarray([[1, 1, 5, 6, 1, 7]])
    assert model.places(ids, 0).tolist() == [[1, 1, 2, 3, 1, 4]]
    assert model.places(ids, 4).tolist() == [[1, 1, 6, 7, 1, 8]]
    before = np.asarray(model.embeddings.positions.embedding[...])
    assert model.config.max_tokens == 18
    model.extend_positions(40)
    after = np.asarray(model.embeddings.positions.embedding[...])
    np.testing.assert_array_equal(after[:20], before)
    np.testing.assert_array_equal(after[20:38], before[2:])
    assert model.config.max_tokens == 40
    with pytest.raises(UsageError, match="at most 40 positions"):
        model(jnp.ones((1, 41), jnp.int32))


@pytest.mark.parametrize("trained", [False, True], ids=["linear map", "both layers"])
def test_robertas_head_is_saved_whole_and_read_as_it_was_trained(trained: bool, tmp_path: Path) -> None:
    """Hugging Face's peft knows the head as one module, "classifier", whatever of it is trained."""
    chosen = [peft.LoraConfig(r=2), *([peft.HeadConfig(target=r"^transform\.dense$")] if trained else [])]
    model = peft.apply(loaded("roberta"), chosen)
    for _, leaf in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        leaf.set_value(leaf[...] + 1)
    peft.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    keys = {key for key in load_file(_only(tmp_path)) if "lora" not in key}
    assert keys == {f"base_model.model.classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")}
    again = peft.load_adapter(loaded("roberta"), tmp_path)
    ours, theirs = (nnx.to_flat_state(nnx.state(m, AdapterParam)) for m in (again, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert any("transform" in path for path, _ in ours) is trained
