"""Where loaded weights lie, in which numbers, and what memory that takes on the way."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ntk_prefix import models, peft
from ntk_prefix.artifacts import CHECKOUT
from ntk_prefix.checks import NonFiniteError, UsageError
from ntk_prefix.models.formats import checkpoint, read_checkpoint
from ntk_prefix.models.formats.checkpoint import StoredTensor
from ntk_prefix.sharding import AXES, weight_sharding
from tests.models.formulas import CONFIGS, draw, write
from tests.models.test_loading import write_gguf, write_onnx


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor), AXES)


def stored(kind: str, path: Path, dtype: Any = np.float32) -> Path:
    tensors = {name: tensor.astype(dtype) for name, tensor in draw(CONFIGS[kind]).items()}
    return write(path, CONFIGS[kind], tensors, shards=2)


def weights(model: Any) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# -------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("llama", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("llama_tied", {"fsdp": 8}),
        ("bert", {"fsdp": 2, "tensor": 4}),
        ("vit", {"data": 2, "fsdp": 4}),
    ],
)
def test_each_device_holds_its_slice_and_nothing_else(
    kind: str, shares: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 50)  # two rows: slices begin and end within blocks
    folder = stored(kind, tmp_path)
    whole = weights(models.from_pretrained(folder))
    placed = weights(models.from_pretrained(folder, mesh=(devices := mesh(**shares))))
    assert placed.keys() == whole.keys()
    held: dict[str, int] = dict.fromkeys(map(str, devices.devices.flat), 0)
    for path, value in placed.items():
        assert value.sharding == weight_sharding(devices, path, value.shape), path
        for shard in value.addressable_shards:
            assert same_bits(shard.data, np.asarray(whole[path])[shard.index]), path
            held[str(shard.device)] += shard.data.size
    # tables of positions and norms are whole everywhere, by the rules
    assert max(held.values()) < sum(value.size for value in whole.values()) / 2


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_files_that_are_read_whole_are_placed_alike(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 50)
    path = tmp_path / f"a.{kind}"
    name, writer = {"gguf": ("llama_tied", write_gguf), "onnx": ("dinov2", write_onnx)}[kind]
    writer(path, CONFIGS[name], draw(CONFIGS[name]))
    whole, placed = (weights(models.from_pretrained(path, mesh=each)) for each in (None, mesh(fsdp=4)))
    for name, value in placed.items():
        assert same_bits(value, whole[name]), name
    assert any(not value.is_fully_replicated for value in placed.values())


def test_a_head_lies_on_the_mesh_too_and_is_float32(tmp_path: Path) -> None:
    bare = {n: t.astype(ml_dtypes.bfloat16) for n, t in draw(CONFIGS["llama"]).items()}
    for name, extra in (("new", {}), ("stored", {"score.weight": np.ones((5, 24), ml_dtypes.bfloat16)})):
        folder = write(tmp_path / name, CONFIGS["llama"], bare | extra)
        model = models.from_pretrained(
            folder, "sequence-classification", num_labels=5, param_dtype="file", mesh=mesh(fsdp=4)
        )
        assert isinstance(model, models.Classifier)
        assert model.head.bias is not None
        for variable in (model.head.kernel, model.head.bias):
            assert len(variable[...].sharding.device_set) == 4
            assert variable.dtype == jnp.float32
        assert bool((model.head.kernel[...] == 1).all()) == (name == "stored")


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_weight_is_kept_in_the_files_numbers_or_in_others_rounded_once(tmp_path: Path, dtype: Any) -> None:
    folder = stored("llama", tmp_path, dtype)
    wide = weights(models.from_pretrained(folder))
    assert {value.dtype.name for value in wide.values()} == {"float32"}
    for asked, kept in (("file", dtype), (jnp.bfloat16, jnp.bfloat16), ("float32", np.float32)):
        found = weights(models.from_pretrained(folder, param_dtype=asked))
        for path, value in found.items():
            assert same_bits(value, np.asarray(wide[path]).astype(kept)), path


def test_each_tensor_has_its_own_numbers(tmp_path: Path, x64: bool) -> None:
    tensors = draw(CONFIGS["llama_tied"])
    kinds = {"input_layernorm": np.float32, "q_proj": np.float16, "mlp": np.float64}
    mixed = {
        name: tensor.astype(next((kind for word, kind in kinds.items() if word in name), ml_dtypes.bfloat16))
        for name, tensor in tensors.items()
    }
    folder = write(tmp_path, CONFIGS["llama_tied"], mixed)
    model: Any = models.from_pretrained(folder, param_dtype="file")
    layer = model.layers[0]
    found = [model.embeddings.embedding, layer.attention_norm.scale, layer.attention.query.kernel, layer.mlp.up.kernel]
    assert [value.dtype.name for value in found] == ["bfloat16", "float32", "float16", "float64"]
    with jax.enable_x64(False):
        model = models.from_pretrained(folder, param_dtype="file")
        assert model.layers[0].mlp.up.kernel.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["bert", "llama_tied"])
def test_narrow_weights_compute_what_the_same_numbers_do_in_float32(tmp_path: Path, kind: str) -> None:
    """A layer computes in its dtype, whatever its weights are kept in."""
    config = {**CONFIGS[kind], "num_hidden_layers": 1}
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in draw(config).items()}
    folder = write(tmp_path, config, tensors)
    run = nnx.jit(lambda model: model(jnp.arange(6)[None]).last_hidden_state)
    wide, narrow = (run(models.from_pretrained(folder, param_dtype=kept)) for kept in ("float32", "file"))
    assert wide.dtype == narrow.dtype == jnp.float32
    # 2^-16 of the hidden states' size: the order of a few sums in float32, far below bfloat16's 2^-8
    np.testing.assert_allclose(wide, narrow, atol=2**-16 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize("x64", [False], indirect=True)
@pytest.mark.parametrize("method", [peft.FullConfig(), peft.BitFitConfig(), peft.HeadConfig(target="mlp.up")])
def test_what_is_trained_of_narrow_weights_is_float32_and_the_rest_stays_narrow(
    tmp_path: Path, method: peft.AdapterConfig, x64: bool
) -> None:
    """The weights that training starts from are the file's, to the bit."""
    folder = stored("llama", tmp_path, ml_dtypes.bfloat16)
    before = weights(models.from_pretrained(folder, "causal-lm", param_dtype="file"))
    model = peft.apply(models.from_pretrained(folder, "causal-lm", param_dtype="file"), method)
    peft.narrow_frozen(model)
    trained = set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        kept = isinstance(variable, peft.AdapterParam)
        trained.add(kept)
        assert variable.dtype == (jnp.float32 if kept else jnp.bfloat16)
        name = ".".join(map(str, path)).replace(".base.", ".").replace(".adapters.default.", ".")
        if name in before:  # a head that had no bias gets one
            np.testing.assert_array_equal(variable[...], before[name].astype(variable.dtype))
    assert True in trained


def test_narrow_frozen_makes_nothing_wider(tmp_path: Path) -> None:
    folder = stored("bert", tmp_path, ml_dtypes.bfloat16)
    for dtype, kept in ((jnp.float32, "file"), (jnp.bfloat16, "float32")):
        model: Any = peft.narrow_frozen(models.from_pretrained(folder, dtype=dtype, param_dtype=kept))
        assert model.layers[0].mlp.up.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize(("number", "asked"), [(3.4e38, jnp.bfloat16), (1e5, jnp.float16), (np.nan, "file")])
def test_numbers_are_finite_in_what_they_are_kept_in(tmp_path: Path, number: float, asked: Any) -> None:
    tensors = draw(CONFIGS["bert"])
    tensors["encoder.layer.1.output.dense.weight"][-1, -1] = number
    folder = write(tmp_path, CONFIGS["bert"], tensors)
    with pytest.raises(NonFiniteError, match=r"encoder.layer.1.output.dense.weight: expected finite numbers, got .*"):
        models.from_pretrained(folder, param_dtype=asked)
    if np.isfinite(number):
        models.from_pretrained(folder)


# ------------------------------------------------------------------------------------------ progress


def test_progress_is_told_in_bytes_of_the_model_up_to_all_of_them(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    model = models.from_pretrained(
        stored("llama", tmp_path), param_dtype=jnp.bfloat16, progress=lambda *counts: told.append(counts)
    )
    total = sum(value.nbytes for value in weights(model).values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][0] < total
    assert {of for _, of in told} == {total}
    assert told[-1] == (total, total)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "llama",
            lambda: {"mesh": mesh(tensor=4)},
            "mesh: tensor: expected a divisor of the model's 2 key-value heads",
        ),
        ("vit", lambda: {"mesh": mesh(tensor=2)}, "mesh: tensor: expected a divisor of the model's 3 query heads"),
        ("bert", lambda: {"mesh": mesh(fsdp=5)}, "mesh: fsdp: expected a divisor of the model's 24 features, got 5"),
        ("bert", lambda: {"mesh": 8}, "mesh: expected a jax.sharding.Mesh or None, got int"),
        ("bert", lambda: {"param_dtype": "int8"}, "param_dtype: expected 'file', or floating point .*, got int8"),
        ("bert", lambda: {"param_dtype": jnp.float8_e4m3fn}, "param_dtype: .* got float8_e4m3fn"),
        ("bert", lambda: {"param_dtype": "files"}, "param_dtype: .* got 'files'"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_what_does_not_fit_is_refused_before_a_tensor_is_read(
    tmp_path: Path, kind: str, options: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(kind, tmp_path)

    def read(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "blocks", read)
    with pytest.raises(UsageError, match=said) as refused:
        models.from_pretrained(folder, **options())
    assert "\n" not in str(refused.value)
    with pytest.raises(AssertionError, match="a tensor was read"):  # the control
        models.from_pretrained(folder)


def test_float64_is_no_dtype_of_weights_without_x64(tmp_path: Path) -> None:
    folder = stored("bert", tmp_path)
    assert {v.dtype.name for v in weights(models.from_pretrained(folder, param_dtype=float)).values()} == {"float64"}
    with jax.enable_x64(False), pytest.raises(UsageError, match=r"param_dtype: .* got float64"):
        models.from_pretrained(folder, param_dtype=np.float64)


# --------------------------------------------------------------------------------------------- GGUF


def test_rows_of_a_quantized_tensor_are_unpacked_as_the_whole_is(tmp_path: Path) -> None:
    """Bit for bit what the gguf package makes of it, for every kind that the package unpacks."""
    import gguf

    rng = np.random.default_rng(0)
    tensors, kinds = {}, []
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (40, 512 // block * size), np.uint8)
        try:
            with np.errstate(all="ignore"):
                tensors[kind] = data, gguf.dequantize(data, kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    assert len(kinds) >= 20
    writer = gguf.GGUFWriter(path := tmp_path / "a.gguf", "llama")
    writer.add_layer_norm_rms_eps(1e-6)
    for kind in kinds:
        writer.add_tensor(kind.name, tensors[kind][0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = {tensor.name: tensor for tensor in read_checkpoint(path).tensors.values()}
    bounds = [slice(0, 17), slice(17, 18), slice(18, 40)]
    for kind in kinds:
        rows = np.concatenate(list(opened[kind.name].load(bounds)))
        assert rows.astype(np.float32).tobytes() == tensors[kind][1].tobytes(), kind.name


# -------------------------------------------------------------------------------------------- memory

PROGRAM = """
import ctypes, gc, json, pathlib, sys
import gguf, jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from flax import nnx
from safetensors import safe_open
from jax.sharding import Mesh
from ntk_prefix import models
from ntk_prefix.artifacts import peak_resident_memory as peak

folder = sys.argv[1]
jnp.zeros(3).block_until_ready()
found = {}

def measure(name, load):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system,
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # and the peak begins anew
    before, held = peak(), {}
    loaded = load()
    for leaf in jax.tree.leaves(loaded):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    found[name] = peak() - before, held

def ours(path, mesh=None):
    model = models.from_pretrained(path, "causal-lm", param_dtype="file", mesh=mesh)
    return nnx.state(model, nnx.Param)

def old_way():
    opened = safe_open(folder + "/model.safetensors", framework="np")
    return [jnp.asarray(opened.get_tensor(name).T) for name in opened.keys()], opened

measure("one device", lambda: ours(folder))
measure("eight", lambda: ours(folder, Mesh(np.array(jax.devices()), ("fsdp",))))
measure("gguf", lambda: ours(folder + "/a.gguf"))
measure("old way", lambda: old_way()[0])
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is looked at as Linux shows it")
def test_loading_takes_the_weights_and_at_most_two_of_the_largest_tensors(tmp_path: Path) -> None:
    """By the resident peak of a process, mapped pages of the file included; the old way held the file as well."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = {**CONFIGS["llama_tied"], **sizes, "intermediate_size": 4096, "vocab_size": 8192}
    rows = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16)
    tensors = {
        name: np.resize(rows, shape)
        for name, shape in {
            "model.embed_tokens": (8192, 2048),
            "model.norm": (2048,),
            **{f"model.layers.0.{name}": (2048,) for name in ("input_layernorm", "post_attention_layernorm")},
            **{f"model.layers.0.self_attn.{name}_proj": (2048, 2048) for name in "qo"},
            **{f"model.layers.0.self_attn.{name}_proj": (1024, 2048) for name in "kv"},
            **{f"model.layers.0.mlp.{name}_proj": (4096, 2048) for name in ("gate", "up")},
            "model.layers.0.mlp.down_proj": (2048, 4096),
        }.items()
    }
    folder = write(tmp_path, config, {f"{name}.weight": tensor for name, tensor in tensors.items()})
    half = {f"{name}.weight": tensor.astype(np.float16) for name, tensor in tensors.items()}
    write_gguf(folder / "a.gguf", config, half)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    size = sum(tensor.nbytes for tensor in tensors.values())
    bound = size + 2 * max(tensor.nbytes for tensor in tensors.values())
    assert found["one device"][0] <= bound
    assert found["eight"][0] <= bound
    assert found["gguf"][0] <= bound
    assert found["old way"][0] > bound  # the control
    # vectors are repeated, and they are nothing
    assert max(found["eight"][1].values()) < 1.01 * size / 8
    assert len(found["eight"][1]) == 8
