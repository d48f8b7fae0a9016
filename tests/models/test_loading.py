"""What a checkpoint may look like, and what is said about one that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from flax import nnx
from safetensors.numpy import save_file

from ntk_prefix import models
from tests.models import formulas
from tests.models.formulas import CONFIGS, Tensors, draw, write


def holds(model: Any, kind: str, tensors: Tensors) -> None:
    """Every parameter is the checkpoint's: kernels turned, everything else as it stands."""
    backbone = getattr(model, "backbone", model)
    flat = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(backbone, nnx.Param))}
    names = models.module_names(backbone)
    used = set()
    for path, value in flat.items():
        module, _, parameter = path.rpartition(".")
        suffix = "bias" if parameter == "bias" else "weight"
        name = names.get(path) or f"{names[module]}.{suffix}"
        tensor = tensors[name].astype(np.float32)
        if parameter == "kernel":
            tensor = np.moveaxis(tensor, 1, -1).reshape(len(tensor), -1).T
        np.testing.assert_array_equal(value, tensor, err_msg=path)
        assert value.dtype == jnp.float32
        used.add(name)
    extra = {"lm_head.weight"} if "llama" in kind and not getattr(backbone, "causal_lm", True) else set()
    assert used == tensors.keys() - extra


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder(tmp_path: Path, kind: str, shards: int) -> None:
    tensors = draw(CONFIGS[kind])
    holds(models.from_pretrained(write(tmp_path, CONFIGS[kind], tensors, shards)), kind, tensors)


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_of_task_models_and_of_bare_ones(tmp_path: Path, kind: str) -> None:
    """``BertForX`` puts "bert." in front; a bare ``LlamaModel`` leaves "model." out. Heads and poolers may be there."""
    tensors = draw(CONFIGS[kind])
    model_type = CONFIGS[kind]["model_type"]
    if model_type == "llama":
        stored = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    else:
        stored = {f"{model_type}.{n}": t for n, t in tensors.items()}
        stored[f"{model_type}.pooler.dense.weight"] = stored["classifier.weight"] = np.zeros((2, 24), np.float32)
    holds(models.from_pretrained(write(tmp_path, CONFIGS[kind], stored)), kind, tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_tensors_become_float32(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in draw(CONFIGS["bert"]).items()}
    holds(models.from_pretrained(write(tmp_path, CONFIGS["bert"], tensors)), "bert", tensors)


# -------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("kind", "task", "name"),
    [("vit", "image-classification", "classifier"), ("llama", "sequence-classification", "score")],
)
def test_a_head_of_the_checkpoint_is_used(tmp_path: Path, kind: str, task: str, name: str) -> None:
    rng = np.random.default_rng(1)
    tensors = draw(CONFIGS[kind]) | {f"{name}.weight": rng.normal(size=(5, 24)).astype(np.float32)}
    if kind == "vit":
        tensors["classifier.bias"] = rng.normal(size=5).astype(np.float32)
    folder = write(tmp_path, CONFIGS[kind], tensors)
    for num_labels in (None, 5):
        model = models.from_pretrained(folder, task, num_labels=num_labels)
        assert isinstance(model, models.Classifier)
        assert model.pooling == {"vit": "cls", "llama": "last"}[kind]
        np.testing.assert_array_equal(model.head.kernel[...].T, tensors[f"{name}.weight"])
        np.testing.assert_array_equal(model.head.bias[...], tensors.get(f"{name}.bias", np.zeros(5)))
    for options in ({"num_labels": 4}, {"num_labels": 5, "pooling": "mean"}):
        model = models.from_pretrained(folder, task, **options, rngs=nnx.Rngs(2))
        assert isinstance(model, models.Classifier)
        assert model.head.out_features == options["num_labels"]
        assert not np.isin(model.head.kernel[...], tensors[f"{name}.weight"]).any()


def test_a_new_head_comes_from_the_given_stream(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIGS["bert"], draw(CONFIGS["bert"]))

    def head(seed: int | None) -> Any:
        rngs = None if seed is None else nnx.Rngs(seed)
        model = models.from_pretrained(folder, "sequence-classification", num_labels=3, rngs=rngs)
        assert isinstance(model, models.Classifier)
        return np.asarray(model.head.kernel[...])

    np.testing.assert_array_equal(head(None), head(0))
    assert (head(1) != head(0)).all()
    assert 0.01 < head(0).std() < 0.03


# --------------------------------------------------------------------------------------------- GGUF


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: pairs (j, j + H/2) side by side."""
    return np.concatenate([head[np.arange(len(head)).reshape(2, -1).T.ravel()] for head in np.split(weight, heads)])


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    tokens: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    for key, value in (tokens or {}).items():
        getattr(writer, f"add_{key}")(value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    spelling = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    neighbors = architecture in ("llama", "smollm3")
    for name, tensor in tensors.items():
        if architecture.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        elif ".q_proj." in name and neighbors:
            tensor = permuted(tensor, heads)
        elif ".k_proj." in name and neighbors:
            tensor = permuted(tensor, config.get("num_key_value_heads", heads))
        writer.add_tensor(spelling.get_name(name, (".weight", ".bias")), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    """The names and the order of rows are written here by the gguf package and by the definition."""
    config = CONFIGS[kind]
    if kind == "llama":  # llama.cpp has no bias of the output map
        config = {**config, "attention_bias": False}
    tensors = draw(config)
    model = models.from_pretrained(write_gguf(tmp_path / "a.gguf", config, tensors), "causal-lm")
    assert isinstance(model, models.Llama)
    holds(model, kind, tensors)
    loaded = models.from_pretrained(write(tmp_path / "folder", config, tensors), "causal-lm")
    assert {**vars(model.config), "max_position_embeddings": 0, "rms_norm_eps": 0} == {
        **vars(loaded.config),
        "max_position_embeddings": 0,
        "rms_norm_eps": 0,
    }
    assert model.config.rms_norm_eps == pytest.approx(config.get("rms_norm_eps", 1e-6))  # stored in float32
    assert model.config.max_position_embeddings == 64


def test_gguf_tokenizer(tmp_path: Path) -> None:
    tokens = ["<|end|>", "<|user|>", "<mark>", "Ġ", "a", "b", "1", "2", "ab", "Ġab", "12", "Ċ"]
    kinds = [3, 3, 4] + [1] * 9
    stored = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": kinds,
        "token_merges": ["a b", "Ġ ab", "1 2"],
        "chat_template": "{{ messages }}",
    }
    config = CONFIGS["llama_tied"]
    path = write_gguf(tmp_path / "a.gguf", config, draw(config), stored)
    tokenizer = models.gguf_tokenizer(path)
    text = "<|user|>ab ab<mark>a12\n<|end|>"
    wanted = ["<|user|>", "ab", "Ġab", "<mark>", "a", "1", "2", "Ċ", "<|end|>"]  # digits one by one, merge or not
    assert tokenizer.encode(text).tokens == wanted
    assert tokenizer.encode(text).ids == [tokens.index(token) for token in wanted]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text).ids) == "ab ab<mark>a12\n"
    assert models.gguf_chat_template(path) == "{{ messages }}"
    stored |= {"tokenizer_pre": "gpt-2", "bos_token_id": 1, "add_bos_token": True}
    path = write_gguf(tmp_path / "b.gguf", config, draw(config), stored)
    assert models.gguf_tokenizer(path).encode("a12").tokens == ["<|user|>", "a", "12"]
    for change in ({"tokenizer_model": "llama"}, {"tokenizer_pre": "gpt-9"}):
        path = write_gguf(tmp_path / "c.gguf", config, draw(config), stored | change)
        with pytest.raises(ValueError, match="expected a byte-level BPE tokenizer"):
            models.gguf_tokenizer(path)
    with pytest.raises(FileNotFoundError, match=r"expected a \.gguf file"):
        models.gguf_tokenizer(tmp_path / "none.gguf")


# --------------------------------------------------------------------------------------------- ONNX


def write_onnx(path: Path, config: dict[str, Any], tensors: Tensors, prefix: str = "backbone") -> Path:
    """As torch exports: linear maps transposed and nameless, positions cut in two, constants for the sizes."""
    nodes, weights = [], {}
    at = f"/{prefix}/" if prefix else "/"

    def node(op: str, name: str, inputs: list[str], **attributes: Any) -> None:
        nodes.append(onnx.helper.make_node(op, inputs, [f"{at}{name}_output"], name=f"{at}{name}", **attributes))

    def constant(name: str, value: Any) -> str:
        node("Constant", name, [], value=onnx.numpy_helper.from_array(np.asarray(value)))
        return f"{at}{name}_output"

    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            weights |= {"onnx::Reshape_1": tensor[:, 1:], "onnx::Concat_2": tensor[:, :1]}
            node("Reshape", "embeddings/Reshape_1", ["onnx::Reshape_1", "shape"])
            node("Concat", "embeddings/Concat_6", ["onnx::Concat_2", "other"], axis=1)
        elif parameter == "weight" and tensor.ndim == 2:
            weights[f"onnx::MatMul_{len(weights) + 9}"] = tensor.T
            node("MatMul", f"{module.replace('.', '/').replace('layer/', 'layer.')}/MatMul", ["x", list(weights)[-1]])
        else:
            weights[f"{prefix}.{name}".lstrip(".")] = tensor
    projection = f"{prefix}.embeddings.patch_embeddings.projection".lstrip(".")
    node("Concat", "embeddings/Concat_1", [f"{prefix}.embeddings.cls_token".lstrip("."), "x"], axis=1)
    node("Conv", "embeddings/patch_embeddings/projection/Conv", ["x", f"{projection}.weight", f"{projection}.bias"])
    for i in range(config["num_hidden_layers"]):
        block = f"encoder/layer.{i}"
        eps = constant(f"{block}/norm1/Constant", np.float32(config["layer_norm_eps"]))
        node("Add", f"{block}/norm1/Add", ["x", eps])
        sizes = [constant(f"{block}/attention/attention/Constant_{j}", [n]) for j, n in enumerate((3, 8))]
        node("Concat", f"{block}/attention/attention/Concat", ["b", "t", *sizes], axis=0)
    weights["decoder.weight"] = np.zeros(3, np.float32)
    graph = onnx.helper.make_graph(
        nodes, "main", [], [], [onnx.numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items()]
    )
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_onnx(tmp_path: Path) -> None:
    config = CONFIGS["dinov2"]
    tensors = draw(config)
    model = models.from_pretrained(write_onnx(tmp_path / "a.onnx", config, tensors))
    assert isinstance(model, models.Vit)
    holds(model, "dinov2", tensors)
    loaded = models.from_pretrained(write(tmp_path / "folder", config, tensors))
    assert vars(model.config) == vars(loaded.config) | {"layer_norm_eps": model.config.layer_norm_eps}
    assert model.config.layer_norm_eps == pytest.approx(config["layer_norm_eps"])


def test_onnx_of_something_else(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], name="/relu")], "net", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="expected torch's export of a vision transformer in DINOv2 layout"):
        models.from_pretrained(tmp_path / "a.onnx")


# ------------------------------------------------------------------------------------------- errors


def changed(**changes: Any) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: config.update(changes)


def drop(*names: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: [tensors.pop(name) for name in names] and None


QUERY = "encoder.layer.1.attention.self.query.weight"
EXTRA = np.zeros((1, 2), np.float32)


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        (
            "bert",
            changed(model_type="gpt2"),
            r"expected model_type among \['bert', .*'vit', .*\], got 'gpt2'",
        ),
        ("bert", lambda config, _: config.pop("model_type"), "expected model_type among .*, got None"),
        ("bert", lambda config, _: config.pop("hidden_size"), r"config.json: expected \['hidden_size'\]"),
        ("bert", changed(position_embedding_type="relative_key"), "absolute positions, got .*relative_key"),
        ("bert", changed(is_decoder=True), "expected a BERT encoder"),
        ("bert", changed(hidden_act="sinh"), "hidden_act: expected one of .*, got 'sinh'"),
        ("dinov2", changed(use_swiglu_ffn=True), r"missing: encoder\.layer\.0\.mlp\.weights_in\.gate"),
        ("llama", changed(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0}), "factor: expected a number"),
        (
            "llama_tied",
            changed(rope_scaling={"type": "longrope", "factor": 2.0}),
            "'yarn', 'llama3', got 'longrope'. Take",
        ),
        ("llama_tied", changed(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1"),
        ("bert", drop(QUERY), f"expected tensors that are missing: {QUERY}"),
        ("bert", drop(*(n for n in formulas.shapes(CONFIGS["bert"]) if "layer.0" in n)), "missing: .* and 4 more"),
        (
            "bert",
            changed(num_hidden_layers=3),
            "num_hidden_layers: expected at most the 2 of the file's tensors, got 3",
        ),
        ("bert", lambda _, tensors: tensors.update({"encoder.rogue.weight": EXTRA}), "left over: encoder.rogue.weight"),
        ("bert", changed(num_hidden_layers=1), r"left over: encoder\.layer\.1\."),
        (
            "vit",
            lambda _, t: t.update({"embeddings.cls_token": EXTRA}),
            r"cls_token expected \(1, 1, 24\), got \(1, 2\)",
        ),
        (
            "bert",
            changed(intermediate_size=21),
            r"layer.0.intermediate.dense.weight expected \(24, 21\), got \(24, 20\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, kind: str, change: Any, problem: str) -> None:
    config, tensors = dict(CONFIGS[kind]), draw(CONFIGS[kind])
    change(config, tensors)
    with pytest.raises(ValueError, match=problem):
        models.from_pretrained(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("bert", {"task": "causal-lm"}, r"task: expected None or one of \('sequence-classification',\) for a bert"),
        ("vit", {"task": "sequence-classification", "num_labels": 2}, "'image-classification'"),
        ("llama", {"task": "image-classification"}, "'causal-lm', 'sequence-classification'"),
        ("bert", {"task": "sequence-classification"}, "num_labels: expected a number"),
        ("vit", {"task": "image-classification"}, "num_labels: expected a number"),
        ("bert", {"num_labels": 2}, "only with a classification task, got task None"),
        ("llama", {"task": "causal-lm", "pooling": "mean"}, "only with a classification task"),
    ],
)
def test_tasks_that_do_not_fit(tmp_path: Path, kind: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        models.from_pretrained(write(tmp_path, CONFIGS[kind], draw(CONFIGS[kind])), **options)


@pytest.mark.parametrize("kind", ["bert", "dinov2"])
def test_heads_that_cannot_be_taken(tmp_path: Path, kind: str) -> None:
    """BERT's head stands behind a pooler, which is missing; DINOv2's reads two pooled states, and not one: neither is taken."""
    task = "sequence-classification" if kind == "bert" else "image-classification"
    tensors = draw(CONFIGS[kind]) | {"classifier.weight": np.zeros((2, 24), np.float32)}
    with pytest.raises(ValueError, match=r"num_labels: expected a number, .* brings no head"):
        models.from_pretrained(write(tmp_path, CONFIGS[kind], tensors), task)


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*nowhere"):
        models.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected config\.json and model\.safetensors"):
        models.from_pretrained(tmp_path)
    other = tmp_path / "weights.bin"
    other.touch()
    with pytest.raises(ValueError, match=r"expected a Hugging Face folder, a \.gguf or an \.onnx file, got .*\.bin"):
        models.from_pretrained(other)
    folder = write(tmp_path / "shards", CONFIGS["bert"], draw(CONFIGS["bert"]), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002\.safetensors"):
        models.from_pretrained(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        models.from_pretrained(folder)


def test_files_that_are_broken(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", CONFIGS["bert"], draw(CONFIGS["bert"]))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a safetensors file, got one that is broken"):
        models.from_pretrained(folder)
    save_file(draw(CONFIGS["bert"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS["bert"])[:-1])
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        models.from_pretrained(folder)
    for name in ("a.gguf", "a.onnx"):
        (tmp_path / name).write_bytes(b"nothing of the sort")
        with pytest.raises(ValueError, match=f"expected a {name[2:].upper()}|expected an {name[2:].upper()}"):
            models.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("architecture", ["mamba"])
def test_gguf_of_something_else(tmp_path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"expected a GGUF of an architecture among \['gemma2', .*\], got 'mamba'. Take"
    ):
        models.from_pretrained(tmp_path / "a.gguf")
