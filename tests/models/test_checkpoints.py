"""What a checkpoint says of itself is believed in order: the file before its config, the numbers once they are checked."""

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from ntk_prefix import models
from ntk_prefix.checks import MissingPackageError, NonFiniteError, UsageError
from tests.fuzz import survives
from tests.models.formulas import CONFIGS, Tensors, draw, write
from tests.models.test_loading import holds, write_gguf, write_onnx

TIED = CONFIGS["llama_tied"]
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def loaded(folder: Path, config: dict[str, Any], tensors: Tensors, task: str | None = None) -> Any:
    return models.from_pretrained(write(folder, config, tensors), task)


# ---------------------------------------------------------------------------- the file before its config


def test_a_table_of_logits_that_differs_from_the_embeddings_is_used(tmp_path: Path) -> None:
    tensors = draw({**TIED, "tie_word_embeddings": False})
    model = loaded(tmp_path, TIED, tensors, "causal-lm")
    np.testing.assert_array_equal(model.lm_head.kernel[...].T, tensors[HEAD])
    np.testing.assert_array_equal(model.embeddings.embedding[...], tensors[TABLE])
    assert not model.config.tie_word_embeddings


def test_a_table_of_logits_that_is_the_embeddings_is_tied(tmp_path: Path) -> None:
    tensors = draw(TIED)
    model = loaded(tmp_path, TIED, {**tensors, HEAD: tensors[TABLE].copy()}, "causal-lm")
    assert model.lm_head is None
    holds(model, "llama_tied", tensors)


@pytest.mark.parametrize("task", [None, "causal-lm"])
def test_tied_embeddings_may_be_stored_as_the_table_of_logits(tmp_path: Path, task: str | None) -> None:
    tensors = draw(TIED)
    stored = {HEAD if name == TABLE else name: tensor for name, tensor in tensors.items()}
    holds(loaded(tmp_path, TIED, stored, task), "llama_tied", tensors)


def test_a_table_of_logits_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing: lm_head\.weight"):
        loaded(tmp_path, {**TIED, "tie_word_embeddings": False}, draw(TIED), "causal-lm")


def test_the_first_berts_call_a_norms_numbers_gamma_and_beta(tmp_path: Path) -> None:
    tensors = draw(CONFIGS["bert"])
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()}
    assert old.keys() != tensors.keys()
    holds(loaded(tmp_path, CONFIGS["bert"], {f"bert.{n}": t for n, t in old.items()}), "bert", tensors)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_module_names_of_transformers_5(tmp_path: Path, kind: str) -> None:
    """Its ``ViTModel`` has ``layers.0.attention.q_proj`` and ``mlp.fc1``, its ``Dinov2Model`` the first of these only."""
    words = {f"attention.attention.{long}": f"attention.{short}_proj" for long, short in
             (("query", "q"), ("key", "k"), ("value", "v"))}  # fmt: skip
    words["attention.output.dense"] = "attention.o_proj"
    if kind == "vit":
        words |= {"encoder.layer.": "layers.", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    tensors = draw(CONFIGS[kind])
    stored = {}
    for name, tensor in tensors.items():
        new = name
        for old, word in words.items():
            new = new.replace(old, word)
        stored[f"{kind}.{new}"] = tensor
    assert f"{kind}.{'layers' if kind == 'vit' else 'encoder.layer'}.1.attention.o_proj.bias" in stored
    holds(loaded(tmp_path, CONFIGS[kind], stored), kind, tensors)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = draw(CONFIGS["bert"])
    name = "embeddings.LayerNorm.weight"
    with pytest.raises(UsageError, match="each tensor once"):
        loaded(tmp_path, CONFIGS["bert"], {**tensors, f"bert.{name}": tensors[name] + 1})


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("bert", "embeddings.position_ids"),
        ("bert", "cls.predictions.transform.LayerNorm.gamma"),
        ("bert", "bert.pooler.dense.bias"),
        ("vit", "vit.embeddings.mask_token"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("llama", "score.weight"),
        *((kind, None) for kind in ("bert", "vit", "llama")),
    ],
)
def test_only_what_the_function_does_not_depend_on_is_left_out(tmp_path: Path, kind: str, extra: str | None) -> None:
    """A name that only begins like one of these is refused: it is another model's, or an adapter's."""
    tensors = draw(CONFIGS[kind])
    numbers = np.arange(3)  # integers are refused where they are used, and only there
    if extra is not None:
        loaded(tmp_path, CONFIGS[kind], {**tensors, extra: numbers})
        return
    for number, name in enumerate(
        ("pooler.rogue.weight", "classifier.lora_A.weight", "score.0.weight", "lm_head.bias")
    ):
        with pytest.raises(UsageError, match=f"left over: {name}"):
            loaded(tmp_path / str(number), CONFIGS[kind], {**tensors, name: numbers})


def test_a_tensor_of_no_numbers_is_nothing_beyond_a_model(tmp_path: Path) -> None:
    """Such as the registers of a DINOv2 that has none: [1, 0, features]."""
    tensors = draw(CONFIGS["vit"])
    loaded(tmp_path / "empty", CONFIGS["vit"], {**tensors, "embeddings.register_tokens": np.zeros((1, 0, 24), "f4")})
    with pytest.raises(UsageError, match=r"left over: embeddings\.register_tokens"):
        loaded(tmp_path / "one", CONFIGS["vit"], {**tensors, "embeddings.register_tokens": np.zeros((1, 1, 24), "f4")})


# ------------------------------------------------------------------------------------ what config.json means


@pytest.mark.parametrize("task", [None, "image-classification"])
def test_sizes_of_images_may_be_pairs(tmp_path: Path, task: str | None) -> None:
    config = CONFIGS["vit"]
    tensors = draw(config) | {"classifier.weight": np.zeros((2, 24), np.float32)}
    pairs = {name: [config[name]] * 2 for name in ("image_size", "patch_size")}
    for folder, given in (("one", config), ("two", {**config, **pairs})):
        assert loaded(tmp_path / folder, given, tensors, task).config.grid == 4
    with pytest.raises(UsageError, match=r"image_size: expected a number, or two equal ones"):
        loaded(tmp_path / "other", {**config, "image_size": [24, 48]}, tensors)


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def scaled(frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1's scaling, one frequency at a time, in wavelengths."""
    result = []
    for f in frequencies:
        wavelength = 2 * np.pi / f
        if wavelength < 64 / 4:
            result.append(f)
        elif wavelength > 64 / 1:
            result.append(f / 8)
        else:
            s = (64 / wavelength - 1) / (4 - 1)
            result.append((1 - s) * f / 8 + s * f)
    return np.array(result)


def test_rotary_frequencies_are_scaled_as_llama_3_and_linear_say() -> None:
    """Of 32 frequencies some are high, some low and some between; both ways of writing it mean the same."""
    sizes = {**TIED, "hidden_size": 64, "num_attention_heads": 1, "rope_theta": 500.0}
    plain = 500.0 ** (-np.arange(0, 64, 2) / 64)
    want = scaled(plain)
    ratios = plain / want
    assert (ratios == 1).any()
    assert np.isclose(ratios, 8).any()
    assert ((ratios > 1.01) & (ratios < 7.9)).any()
    for words in (
        {"rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALING}, "rope_theta": 1e4},
    ):
        config = models.LlamaConfig.from_hugging_face({**sizes, **words})
        np.testing.assert_allclose(config.frequencies(), want, rtol=1e-14)
    config = models.LlamaConfig.from_hugging_face({**sizes, "rope_scaling": {"type": "linear", "factor": 4.0}})
    np.testing.assert_allclose(config.frequencies(), plain / 4, rtol=1e-14)
    np.testing.assert_array_equal(models.LlamaConfig.from_hugging_face(sizes).frequencies(), plain)


def test_gguf_keeps_the_scaling_as_a_tensor(tmp_path: Path) -> None:
    """As llama.cpp's converter writes it: what each frequency is divided by."""
    tensors, factors = draw(TIED), np.array([1.0, 2.5, 8.0], np.float32)
    model: Any = models.from_pretrained(
        write_gguf(tmp_path / "a.gguf", TIED, {**tensors, "rope_freqs.weight": factors})
    )
    np.testing.assert_allclose(model.config.frequencies(), 100.0 ** (-np.arange(0, 6, 2) / 6) / factors, rtol=1e-7)
    path = write_gguf(tmp_path / "b.gguf", TIED, {**tensors, "rope_freqs.weight": factors[:2]})
    with pytest.raises(UsageError, match=r"b\.gguf: rope_factors: expected one for each of the 3 frequencies"):
        models.from_pretrained(path)


TOKENS = ["<s>", "</s>", "a", "b", "ab"]


@pytest.mark.parametrize(
    ("pre", "asked", "wanted"),
    [
        ("llama-bpe", {}, ["<s>", "ab"]),
        ("llama-bpe", {"add_bos_token": False}, ["ab"]),
        ("llama-bpe", {"add_eos_token": True}, ["<s>", "ab", "</s>"]),
        ("gpt-2", {}, ["ab"]),
        ("gpt-2", {"add_eos_token": True}, ["ab", "</s>"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "ab", "</s>"]),
    ],
)
def test_where_a_ggufs_text_begins_and_ends(
    tmp_path: Path, pre: str, asked: dict[str, bool], wanted: list[str]
) -> None:
    """As in llama.cpp, Llama 3's way of splitting puts BOS in front unless the file says no."""
    stored = {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_list": TOKENS, "token_types": [3, 3, 1, 1, 1],
              "token_merges": ["a b"], "bos_token_id": 0, "eos_token_id": 1, **asked}  # fmt: skip
    path = write_gguf(tmp_path / "a.gguf", TIED, draw(TIED), stored)
    encoded = models.load_tokenizer(path)
    assert encoded is not None
    assert encoded.encode("ab").tokens == wanted
    assert encoded.encode("ab").ids == [TOKENS.index(token) for token in wanted]


# ------------------------------------------------------------------------------------ numbers, checked at each


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["safetensors", "half", "gguf", "onnx"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, format: str, bad: float) -> None:
    kind = {"gguf": "llama_tied", "onnx": "dinov2"}.get(format, "bert")
    tensors = draw(CONFIGS[kind])
    name = next(n for n in tensors if "layer" in n and n.endswith("weight") and tensors[n].ndim == 2)
    tensors[name].flat[3] = bad
    if format == "half":
        tensors = {n: t.astype(np.float16) for n, t in tensors.items()}
    path = tmp_path / f"a.{format}"
    if format == "gguf":
        write_gguf(path, CONFIGS[kind], tensors)
    elif format == "onnx":
        write_onnx(path, CONFIGS[kind], tensors)
    else:
        write(path, CONFIGS[kind], tensors)
    word = {"gguf": "attn_q.weight", "onnx": "onnx::MatMul"}.get(format, name)
    with pytest.raises(NonFiniteError, match=f"{word}.*: expected finite numbers, got .*(nan|inf)"):
        models.from_pretrained(path)


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.astype(np.float64) for name, tensor in draw(CONFIGS["bert"]).items()}
    tensors["embeddings.LayerNorm.bias"][0] = 1e39
    with pytest.raises(NonFiniteError, match=r"model.safetensors: embeddings.LayerNorm.bias: expected finite"):
        loaded(tmp_path, CONFIGS["bert"], tensors)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (np.int8, "I8"),
        (np.uint64, "U64"),
        (np.bool_, "BOOL"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (np.complex64, "C64"),
    ],
)
def test_weights_are_floating_point(tmp_path: Path, dtype: Any, word: str) -> None:
    tensors = draw(CONFIGS["bert"])
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].astype(np.float32).astype(dtype)
    with pytest.raises(UsageError, match=f"{name}: expected floating point numbers .* got {word}"):
        loaded(tmp_path, CONFIGS["bert"], tensors)


def test_sizes_are_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    """A small file whose config claims terabytes is refused by its header."""
    config = CONFIGS["llama_tied"]
    huge = {"hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**24, "num_attention_heads": 2**10}
    folder = write(tmp_path, {**config, **huge}, draw(config))
    with survives(folder / "config.json"):
        models.from_pretrained(folder, "causal-lm")
    with pytest.raises(UsageError, match=r"config.json and model.safetensors: expected tensors of the config's shapes"):
        models.from_pretrained(folder, "causal-lm")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected `int` <= 1000, got 1000000000"),
        ({"num_hidden_layers": 999}, "num_hidden_layers: expected at most the 2 of the file's tensors, got 999"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected `int` >= 1, got 0"),
        ({"hidden_size": "24"}, "hidden_size: expected `int`, got '24'"),
        ({"hidden_size": [24]}, r"hidden_size: expected `int`, got \[24\]"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected `int` >= 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 24, got 5"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: expected `float` > 0.0, got 0"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps: expected `float` > 0.0"),
        ({"layer_norm_eps": 1e300}, "layer_norm_eps: expected `float` < 1.0"),
        ({"vocab_size": True}, "vocab_size: expected `int`, got True"),
        ({"hidden_act": 3}, "hidden_act: expected `str`, got 3"),
    ],
)
def test_fields_of_config_json_have_types_and_bounds(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=f"config.json.*: {problem}"):
        loaded(tmp_path, {**CONFIGS["bert"], **change}, draw(CONFIGS["bert"]))


def test_config_json_has_no_nan(tmp_path: Path) -> None:
    folder = write(tmp_path, {**CONFIGS["bert"], "layer_norm_eps": float("nan")}, draw(CONFIGS["bert"]))
    with pytest.raises(UsageError, match=r"config.json: expected JSON"):
        models.from_pretrained(folder)


def test_sizes_may_be_numpys() -> None:
    sizes = {name: np.int64(size) for name, size in CONFIGS["bert"].items() if isinstance(size, int)}
    config = models.BertConfig.from_hugging_face({**sizes, "layer_norm_eps": np.float32(0.5)})
    assert (type(config.hidden_size), config.hidden_size, config.layer_norm_eps) == (int, 24, 0.5)


# ----------------------------------------------------------------------------------- said so that it helps


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x" * 300])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    save_file(draw(CONFIGS["bert"]), tmp_path / "model.safetensors")
    folder = write(tmp_path / "folder", CONFIGS["bert"], draw(CONFIGS["bert"]), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embeddings.LayerNorm.bias": name}}))
    with pytest.raises(
        UsageError, match=r"model.safetensors.index.json: weight_map: expected names of files beside it"
    ):
        models.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "quantized by gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, None, "quantized by bitsandbytes"),
        ({}, "encoder.layer.0.output.dense.qweight", "such as encoder.layer.0.output.dense.qweight"),
        ({}, "encoder.layer.0.output.dense.weight.absmax", "such as .*absmax"),
        ({}, "encoder.layer.0.output.dense.SCB", "such as .*SCB"),
    ],
)
def test_quantized_folders(tmp_path: Path, config: dict[str, Any], tensor: str | None, said: str) -> None:
    tensors = draw(CONFIGS["bert"])
    if tensor is not None:
        tensors[tensor] = np.zeros(4, np.int32)
    with pytest.raises(UsageError, match=f"expected weights in floating point, got .*{said}.*dequantize"):
        loaded(tmp_path, {**CONFIGS["bert"], **config}, tensors)


def test_what_is_no_folder_of_ours_is_told_the_way_on(tmp_path: Path) -> None:
    for name, said in (
        ("pytorch_model.bin", "read from safetensors only.*save_file"),
        ("adapter_config.json", "holds an adapter: .*load_adapter"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for each in ("config.json", name):
            (folder / each).write_text("{}")
        with pytest.raises(FileNotFoundError, match=said):
            models.from_pretrained(folder)
    folder = write(tmp_path / "file", CONFIGS["bert"], draw(CONFIGS["bert"]))
    with pytest.raises(UsageError, match="Give the folder that it is in"):
        models.from_pretrained(folder / "model.safetensors")
    folder = write(tmp_path / "pointer", CONFIGS["bert"], draw(CONFIGS["bert"]))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        models.from_pretrained(folder)


@pytest.mark.parametrize(
    ("package", "read"),
    [
        ("safetensors", lambda path: models.from_pretrained(write(path, CONFIGS["bert"], draw(CONFIGS["bert"])))),
        ("gguf", lambda path: models.from_pretrained(path / "a.gguf")),
        ("onnx", lambda path: models.from_pretrained(path / "a.onnx")),
        ("tokenizers", models.load_tokenizer),
    ],
)
def test_a_package_that_is_missing(tmp_path: Path, package: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "a.onnx", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'{package}: .* pip install "ntk-prefix\[models\]"'):
        read(tmp_path)


def test_onnx_with_weights_in_another_file(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx", CONFIGS["dinov2"], draw(CONFIGS["dinov2"]))
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="b.bin", size_threshold=0)
    with pytest.raises(UsageError, match=r"a.onnx: .*: expected weights within the file"):
        models.from_pretrained(path)
