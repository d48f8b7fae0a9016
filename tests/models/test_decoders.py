"""Every family of decoders against what transformers computed with the same weights (``decoders_reference.py``)."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from ntk_prefix import models, peft
from ntk_prefix.checks import UsageError
from ntk_prefix.models.families.gemma2 import Gemma, Gemma2Config
from ntk_prefix.models.loading import MODELS
from ntk_prefix.models.rotary import Rope
from tests.models.calling import call, quick
from tests.models.decoders_reference import CASES, LENGTHS, NEW, VOCABULARY, WINDOW
from tests.models.drawing import draw_tensor
from tests.models.test_loading import write_gguf

LONGEST = max(LENGTHS)


def some(*quick: str) -> Any:
    """Return all cases; those are slow whose code another one runs."""
    return pytest.mark.parametrize(
        "case", [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
    )


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "decoders.npz") as file:
        return dict(file)


def parts(case: str) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return the config.json, the texts, their logits and the tokens that follow."""
    config, texts, logits, tokens = (recorded()[f"{case}/{key}"] for key in ("config", "texts", "logits", "tokens"))
    ends = np.cumsum(LENGTHS)[:-1]
    return json.loads(str(config)), np.split(texts.astype(int), ends), np.split(logits, ends), tokens.astype(int)


@functools.cache
def tensors(case: str) -> dict[str, np.ndarray]:
    return {
        name: draw_tensor(name, tuple(shape)) for name, shape in json.loads(str(recorded()[f"{case}/shapes"])).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def write(case: str) -> Path:
        path = tmp_path_factory.mktemp(case.replace(" ", "_"))
        (path / "config.json").write_text(json.dumps(parts(case)[0]))
        save_file(tensors(case), path / "model.safetensors")
        return path

    return write


@pytest.fixture(scope="module")
def load(folder: Any) -> Any:
    def loaded(case: str, **options: Any) -> models.Llama:
        model = models.from_pretrained(folder(case), "causal-lm", **options)
        assert isinstance(model, models.Llama)
        return model

    return loaded


def padded(texts: list[np.ndarray], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [B, T] of texts padded to the longest with a token that is none of theirs, and their mask."""
    longest = max(map(len, texts))
    ids, mask = np.zeros((len(texts), longest), int), np.zeros((len(texts), longest), bool)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, True
    return ids, mask


# --------------------------------------------------------------------------------- what transformers computed


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_padded_on_either_side_and_lead_to_its_tokens(load: Any, case: str) -> None:
    """Without a cache, of texts beyond the window, within 1e-5 of the largest logit; and in half of the rows all 24 tokens."""
    _, texts, logits, tokens = parts(case)
    whole = [np.append(text, new) for text, new in zip(texts, tokens, strict=True)]
    sides = [padded(whole, left) for left in (True, False)]
    ids, mask = (np.concatenate(each) for each in zip(*sides, strict=True))
    ours = np.asarray(call(load(case), jnp.asarray(ids), jnp.asarray(mask)).logits)
    for row in range(4):
        text, own = texts[row % 2], ours[row][mask[row]]
        if "dynamic" not in case:  # whose frequencies are those of the longer text
            want = logits[row % 2]
            np.testing.assert_allclose(own[: len(text)], want, rtol=0, atol=1e-5 * np.abs(want).max())
            np.testing.assert_array_equal(own[len(text) - 1 : -1].argmax(axis=1), tokens[row % 2])
    control = logits[0] + 2e-5 * np.abs(logits[0]).max()
    assert np.abs(control - logits[0]).max() > 1e-5 * np.abs(logits[0]).max()


def test_a_dynamic_base_is_that_of_the_texts_length_and_of_each_row_by_itself(load: Any) -> None:
    _, texts, logits, _ = parts("llama dynamic")
    ids, mask = padded(texts, left=True)
    ours = np.asarray(call(load("llama dynamic"), jnp.asarray(ids), jnp.asarray(mask)).logits)
    for row, want in enumerate(logits):
        np.testing.assert_allclose(ours[row][mask[row]], want, rtol=0, atol=1e-5 * np.abs(want).max())


@some("llama dynamic", "mistral", "gemma3")
def test_greedy_decoding_with_a_cache_is_that_of_transformers(load: Any, case: str) -> None:
    """Prompts padded on the left, on the right, and in the middle; one longer than the window, one that grows past it."""
    _, texts, _, tokens = parts(case)
    sides = [padded(texts, left=left) for left in (True, False)]
    ids, mask = (np.concatenate(each) for each in zip(*sides, strict=True))
    gap = [*range(2), *range(LENGTHS[1], LONGEST), *range(2, LENGTHS[1])]  # of the second text, padded on the right
    ids, mask = (np.concatenate([x, x[3:][:, gap]]) for x in (ids, mask))
    assert not mask[3, -1]
    assert mask[4, [0, -1]].all()
    new = models.generate(load(case), jnp.asarray(ids), jnp.asarray(mask), NEW)
    np.testing.assert_array_equal(new, tokens[[0, 1, 0, 1, 1]])


# --------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("case", ["gemma2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_rolling_cache_gives_the_logits_of_the_whole_text(load: Any, case: str, left: bool) -> None:
    """Chunks longer than the window, wherever they begin, and single tokens: in ``window`` slots."""
    model = load(case)
    _, texts, _, tokens = parts(case)
    ids, mask = (jnp.asarray(x) for x in padded([np.append(t, n) for t, n in zip(texts, tokens, strict=True)], left))
    whole = call(model, ids, mask).logits
    cache: Any = model.empty_cache(2, ids.shape[1])
    assert {c.key.shape[1] for c in cache} == {"mistral": {WINDOW}, "gemma2": {WINDOW, LONGEST + NEW}}[case]
    pieces, start = [], 0
    for length in (6, 1, 6, 6, 1, 1):
        output = call(model, ids[:, start : start + length], mask, cache, jnp.int32(start))
        pieces.append(output.logits)
        cache, start = output.cache, start + length
    real = np.asarray(mask)[:, :start]
    ours, wanted = np.concatenate(pieces, axis=1)[real], np.asarray(whole)[:, :start][real]
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_window_is_what_hides_older_tokens(load: Any) -> None:
    """The control: without it the logits are others, and a token beyond both layers' reach changes nothing with it."""
    model = load("mistral")
    ids = jnp.asarray(parts("mistral")[1][0])[None]
    reach = 2 * (WINDOW - 1) + 1
    one, other = (call(model, ids.at[:, 0].set(token)).logits[0] for token in (1, 2))
    np.testing.assert_array_equal(one[reach:], other[reach:])
    assert np.abs(one[reach - 1] - other[reach - 1]).max() > 1e-4


# -------------------------------------------------------------------------------------------- adapters on them


def test_gradients_through_two_layers_are_those_of_finite_differences() -> None:
    """With soft caps, a window and norms of queries and keys: NTK-Attention's and LoRA's, in float64."""
    with jax.enable_x64(True):
        config = dataclasses.replace(Gemma2Config.from_hugging_face(parts("gemma2")[0]), qk_norm=True)
        made = Gemma(config, dtype=jnp.float64, rngs=nnx.Rngs(0))
        model = peft.apply(made, [peft.LoraConfig(r=2), peft.NTKAttentionConfig()])
        graph, trained, frozen = nnx.split(model, peft.AdapterParam, ...)
        ids = jnp.asarray(parts("gemma2")[1][0])[None]
        draw = np.random.default_rng(0)
        leaves, tree = jax.tree.flatten(trained)
        point, toward = ([jnp.asarray(np.abs(draw.normal(size=x.shape)) * 0.1) for x in leaves] for _ in range(2))

        @quick
        def loss(leaves: Any) -> Any:
            def of(leaves: Any) -> Any:
                logits = nnx.merge(graph, jax.tree.unflatten(tree, leaves), frozen)(ids).logits
                return jnp.mean(jax.nn.log_softmax(logits)[:, :-1] * jax.nn.one_hot(ids[:, 1:], VOCABULARY))

            value, gradient = jax.value_and_grad(of)(leaves)
            return value, sum(jnp.vdot(g, t) for g, t in zip(gradient, toward, strict=True))

        def along(step: float) -> Any:
            return loss([p + step * t for p, t in zip(point, toward, strict=True)])[0]

        h = 2e-3
        numeric = sum(c * (along(i * h) - along(-i * h)) for i, c in ((1, 3 / 2), (2, -3 / 10), (3, 1 / 30))) / (2 * h)
        assert abs(numeric - loss(point)[1]) < 1e-8 * max(1, abs(numeric))
        assert abs(numeric) > 1e-4


@some("qwen2", "gemma3")
def test_ntk_attention_trains_two_steps(load: Any, case: str) -> None:
    model = peft.apply(load(case), peft.NTKAttentionConfig(mass="relative"))
    graph, trained, frozen = nnx.split(model, peft.AdapterParam, ...)
    ids, mask = (jnp.asarray(x) for x in padded(parts(case)[1], left=False))

    optimizer = peft.non_negative(optax.sgd(1e-3))

    @quick
    def step(trained: Any, state: Any) -> Any:
        def loss(trained: Any) -> Any:
            logits = nnx.merge(graph, trained, frozen)(ids, mask).logits
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], ids[:, 1:, None], axis=2))

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return value, optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    losses = []
    for _ in range(3):
        value, trained, state = step(trained, state)
        losses.append(float(value))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [peft.PrefixTuningConfig(num_tokens=3), *(peft.NTKAttentionConfig(mass=mass) for mass in ("absolute", "relative"))],
)
@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_adapters_decode_with_a_ring_as_without(load: Any, case: str, config: Any) -> None:
    """The tokens that a full pass over prompt and continuation has on top."""
    model = peft.apply(load(case), config)
    for _, weight in nnx.to_flat_state(nnx.state(model, peft.AdapterParam)):
        weight.set_value(0.5 * jnp.abs(jax.random.normal(jax.random.key(1), weight.shape)))
    ids, mask = (jnp.asarray(x) for x in padded(parts(case)[1], left=True))
    new = models.generate(model, ids, mask, NEW)
    assert (np.asarray(new) != parts(case)[3]).any()
    whole = jnp.concatenate([ids, new], axis=1), jnp.concatenate([mask, jnp.ones_like(new, bool)], axis=1)
    logits = call(model, *whole).logits
    np.testing.assert_array_equal(logits[:, LONGEST - 1 : -1].argmax(axis=2), new)


def test_a_calibration_batch_is_seen_at_the_layers_own_scale_cap_and_window(load: Any) -> None:
    model = load("gemma2")
    graph, state = nnx.split(model)
    said = {}

    @quick
    def recorded(state: Any, ids: Any) -> Any:
        seen = peft.record(nnx.merge(graph, state), {"input_ids": ids})["layers.0.attention"]
        said.update(seen.scores)
        return seen._replace(scores={}), seen.log_mass()

    seen, log_mass = recorded(state, jnp.asarray(parts("gemma2")[1][0])[None])
    assert said == {"scale": 24**-0.5, "logits_soft_cap": 2.0}
    pairs = np.tril(np.ones((LONGEST, LONGEST), bool)) & ~np.tril(np.ones((LONGEST, LONGEST), bool), -WINDOW)
    np.testing.assert_array_equal(seen.mask[0, 0], pairs)
    scores = jnp.einsum("btnh,bsnh->bnts", seen.query, jnp.repeat(seen.key, 2, axis=2)) * 24**-0.5
    weights = jnp.where(pairs, jnp.exp(2 * jnp.tanh(scores / 2)), 0)
    np.testing.assert_allclose(log_mass, jnp.log(weights.sum(axis=-1)).transpose(0, 2, 1), atol=1e-5)


def test_layers_of_two_kinds_run_in_a_loop_over_one(load: Any) -> None:
    model = load("gemma3")
    ids, mask = (jnp.asarray(x) for x in padded(parts("gemma3")[1], left=False))
    apart = call(model, ids, mask).logits
    model.scan_layers = True
    np.testing.assert_allclose(call(model, ids, mask).logits, apart, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "smollm3", "gemma2", "gemma3"])
def test_a_gguf_of_the_family_is_the_folder(load: Any, tmp_path: Path, case: str) -> None:
    """llama.cpp sorts rows of SmolLM3, and adds 1 to the norms of Gemma; windows are kept of Gemma alone."""
    config = {"head_dim": 4, "rope_theta": 100.0, **parts(case)[0]}
    config["rope_parameters"] = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    said = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0} if case == "gemma2" else {}
    names = tuple(said)
    said |= {"sliding_window": WINDOW} if "gemma" in case else {}
    stored = models.from_pretrained(write_gguf(tmp_path / "a.gguf", config, tensors(case), said, case), "causal-lm")
    folder = load(case)
    assert type(stored) is type(folder)
    assert isinstance(stored, models.Llama)
    for path, weight in nnx.to_flat_state(nnx.state(folder)):
        whole = 1 if "gemma" in case and "norm" in str(path[-2]) else 0
        own = nnx.state(stored)
        for key in path:
            own = own[key]
        np.testing.assert_array_equal(own[...], weight[...] + whole)
    ours, theirs = stored.config, folder.config
    for name in (
        "hidden_act",
        "tie_word_embeddings",
        "qk_norm",
        "qkv_bias",
        "update_norms",
        "scale_embeddings",
        *names,
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    if case == "gemma2":
        assert [k.window for k in ours.attention_kinds()] == [WINDOW, None]


SMALL = {
    "vocab_size": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
}


def test_null_is_what_hugging_face_takes_it_for() -> None:
    """A key-value head for each query head, whatever a family's default is; the default where a layer is counted."""
    sizes = {**SMALL, "num_key_value_heads": None}
    assert MODELS["mistral"][0].from_hugging_face(sizes).num_key_value_heads == SMALL["num_attention_heads"]
    words = {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": None}
    kinds = MODELS["qwen2"][0].from_hugging_face(words).attention_kinds()
    assert [kind.window for kind in kinds] == [None] * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("factor", [2.0, 1e12])
def test_a_dynamic_base_is_the_trained_one_up_to_the_trained_length(factor: float) -> None:
    """Of a factor of 1e12 the difference that the growth was the logarithm of had no digit left, and angles were NaN."""
    rope = Rope(head_dim=8, dynamic=(factor, 16))
    positions = jnp.arange(16)[None]
    for ours, plain in zip(rope.at(positions, jnp.float32), Rope(head_dim=8).at(positions, jnp.float32), strict=True):
        np.testing.assert_array_equal(ours, plain)
    beyond = rope.at(jnp.arange(32)[None], jnp.float32)
    base = 1e4 * (factor * 32 / 16 - factor + 1) ** (8 / 6)
    angles = 31 * base ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(beyond.sin[0, -1, :4], np.sin(angles), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("model_type", "words", "windows", "bases", "tied"),
    [
        ("mistral", {"sliding_window": 4096, "rope_theta": 1e4}, [4096] * 12, {1e4}, False),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6}, [None] * 12, {1e6}, False),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 131072, "rope_theta": 1e6}, [None] * 12, {1e6}, False),
        ("qwen3", {"sliding_window": None, "max_window_layers": 28, "rope_theta": 1e6}, [None] * 12, {1e6}, False),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 3, "rope_theta": 5e6}, [None] * 12, {5e6, None}, True),
        ("gemma2", {"sliding_window": 4096, "hidden_act": "gelu"}, [4096, None] * 6, {1e4}, True),
        (
            "gemma3_text",
            {
                "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "rope_scaling": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            },
            [512, 512, 512, 512, 512, None] * 2,
            {1e6, 1e4},
            True,
        ),
        # what transformers passes over, so do we
        ("llama", {"sliding_window": 4, "qk_norm": True, "no_rope_layers": [0] * 12}, [None] * 12, {1e4}, False),
    ],
)  # fmt: skip
def test_a_config_json_means_what_it_did_before_transformers_5(
    model_type: str, words: dict[str, Any], windows: list[int | None], bases: set[float | None], tied: bool
) -> None:
    config_class, model_class = MODELS[model_type]
    config = config_class.from_hugging_face({**SMALL, **words})
    kinds = config.attention_kinds()
    assert [kind.window for kind in kinds] == windows
    assert {kind.rope and kind.rope.theta for kind in kinds} == bases
    assert config.tie_word_embeddings == tied
    assert issubclass(model_class, models.Llama)
    gemma = model_type.startswith("gemma")
    assert config.hidden_act == ("gelu_pytorch_tanh" if gemma else "silu")
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (
        (50, 30) if model_type == "gemma2" else (None, None)
    )
    assert config.qk_norm == (model_type in ("qwen3", "gemma3_text"))


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "rope_type: expected one of 'default', .*, got 'su'"),
        ("llama", {"model_type": "phi3"}, "model_type among .*'qwen3'.*, got 'phi3'"),
        ("qwen3", {"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq .*dequantize"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected false"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types: .*\['chunked_attention'\]"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: expected one for each of the 2 layers, got 1"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "a window in all layers, .*Ministral"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "'default' for sliding"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": "2"}, "sliding_window_pattern: expected .* got `str`"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2.5}, "no_rope_layer_interval: expected"),
        ("smollm3", {"use_sliding_window": "false"}, "use_sliding_window: expected"),
        ("qwen3", {"use_sliding_window": "false"}, "use_sliding_window: expected"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers: expected"),
        ("mistral", {"layer_types": 7.0}, "layer_types: expected .* got `float`"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "the same for all layers of this family"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "above 1 for rope_type 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, "rope_parameters: expected .*>= 1e-12"),
        ("qwen2", {"model_type": "qwen3"}, "q_norm"),
        ("qwen3", {"model_type": "llama", "attention_bias": False}, "left over: layers.0.self_attn.k_norm"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_be_is_said_in_one_line(
    tmp_path: Path, case: str, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**parts(case)[0], **change}))
    save_file(tensors(case), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=message) as error:
        models.from_pretrained(tmp_path, "causal-lm")
    assert "\n" not in str(error.value)
