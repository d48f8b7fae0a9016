"""What ``make accelerator`` measures: parts of rows, each row a function that returns its figures.

A part is a function of the sizes; it yields names and functions, and a row that is in the results already is not called.
Names of figures end in their unit. Packages beside the library's own are optional here: who is missing says so in a row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ntk_prefix as npx
from ntk_prefix import models, peft
from ntk_prefix.attention import IMPLEMENTATIONS
from ntk_prefix.checks import UsageError
from ntk_prefix.flash.base import BACKENDS
from ntk_prefix.training import Trainer
from tests.bench import bench_attention, bench_prefix_ntk
from tests.bench.bench_attention import Programs, Timing, arrays, measure, said

Figures = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Figures]]]


_CASES_OF: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("causal", "causal, grouped, bias, mask", "log-sum-exp", "exact prefix", "window", "soft cap"),
    "float32": ("causal", "causal, grouped, bias, mask", "log-sum-exp", "exact prefix"),
    "float16": ("causal", "causal, grouped, bias, mask"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run: as the issue names it, or all of it small."""

    attention: tuple[int, int, int, int] = (8, 4096, 16, 128)
    accuracy: tuple[int, int, int, int] = (2, 512, 4, 128)
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    cases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: _CASES_OF)
    """By dtype. Each costs seconds of compilation; another dtype is other kernels, but not another window or cap."""
    causal: tuple[bool, ...] = (False, True)
    product: int = 8192
    kernel: tuple[int, int, int] = (64, 32, 65_536)
    models: tuple[tuple[str, models.LlamaConfig], ...] = ()
    methods: tuple[str, ...] = ("NTK-Attention", "LoRA r=8", "full")
    tokens: tuple[int, int] = (4, 2048)
    decode: tuple[tuple[int, ...], int, int] = ((1, 8, 64), 128, 64)
    decoders: tuple[str, ...] = ("without an adapter", "with a state of any prefix")
    rounds: int = 20
    within: float = 10.0
    """Seconds of one comparison's rounds, beyond the first three."""


LLAMA_1B = models.LlamaConfig(
    vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=8192, head_dim=64, max_position_embeddings=131_072, rope_theta=500_000.0, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_8B = models.LlamaConfig(
    vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14_336, max_position_embeddings=131_072, rope_theta=500_000.0,
)  # fmt: skip
TINY_MODEL = models.LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
)
FULL = Sizes(models=(("1B", LLAMA_1B), ("8B", LLAMA_8B)))
TINY = Sizes(
    attention=(1, 16, 2, 8), accuracy=(1, 16, 2, 8), implementations=IMPLEMENTATIONS[1:],
    cases={"bfloat16": ("causal",)}, causal=(True,), product=64, kernel=(2, 2, 64), models=(("tiny", TINY_MODEL),),
    methods=("LoRA r=8",), tokens=(2, 8), decode=((2,), 4, 3), decoders=("with a state of any prefix",), rounds=2,
)  # fmt: skip


# --------------------------------------------------------------------------------------- correctness

TOLERANCE = {"bfloat16": 8 * 2.0**-8, "float16": 2e-2, "float32": 2e-2}
"""Of |error| / |exact|. bfloat16: outputs and probabilities are each rounded to 2^-9, gradients sum a few such; float32:
an accelerator multiplies float32 in one bfloat16 or TF32 pass unless it is asked for more, so a tenth of that is usual;
float16 is multiplied in float32 or itself."""


CONTROL = "control: merged outside"
"""What has to be found wrong: attention merged with the prefix by a log-sum-exp without a gradient."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call attention."""

    verb: Callable[..., Any] = npx.ntk_attention
    is_causal: bool = False
    biased: bool = False
    """Two query heads per key head, a bias that lifts and lowers whole rows, and a mask that leaves two rows empty."""
    transform: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """A window, a soft cap."""


CASES = {
    "causal": Case(is_causal=True),
    "causal, grouped, bias, mask": Case(is_causal=True, biased=True),
    "log-sum-exp": Case(npx.attention_with_lse, is_causal=True),
    "exact prefix": Case(npx.prefix_attention),
    "window": Case(is_causal=True, transform={"local_window_size": 100}),
    "soft cap": Case(is_causal=True, transform={"logits_soft_cap": 2.0}),
}


def correctness(sizes: Sizes) -> Rows:
    """Outputs and gradients of every implementation beside the reference in float64 on the CPU; a control that fails."""
    here = []
    for name in sizes.implementations:
        query = jnp.zeros(sizes.accuracy, jnp.bfloat16)
        if name in BACKENDS and (why := BACKENDS[name].not_here(query)):
            yield name, functools.partial(dict, {"cannot run": why})
        else:
            here.append(name)
    for dtype, cases in sizes.cases.items():
        for name in here:
            for case in cases:
                yield f"{name}, {dtype}, {case}", functools.partial(_errors, name, dtype, case, sizes.accuracy)
        yield f"{CONTROL}, {dtype}", functools.partial(_errors, CONTROL, dtype, "causal", sizes.accuracy)
    yield "prefix_ntk, float32, highest precision", functools.partial(_kernel_error, sizes.kernel[:2])


def _errors(name: str, dtype: str, case: str, shape: tuple[int, int, int, int]) -> Figures:
    attend, arguments = called(case, dtype, shape)
    if name == CONTROL:
        run = functools.partial(merged_outside, is_causal=CASES[case].is_causal)
    else:
        run = functools.partial(attend, implementation=name)
    try:
        got = jax.block_until_ready(jax.jit(pulled_back(run))(arguments))
    except UsageError as error:  # it does not take this dtype
        return {"cannot run": said(error)}
    errors = {
        what: float(np.linalg.norm(np.asarray(got[what], np.float64) - exact) / np.linalg.norm(exact))
        for what, exact in _exact(dtype, case, shape).items()
    }
    holds = bool(max(errors.values()) <= TOLERANCE[dtype])
    return {**errors, "bound": TOLERANCE[dtype], "holds": not holds if name == CONTROL else holds}


def called(case: str, dtype: str, shape: tuple[int, int, int, int]) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Return attention as a case calls it, but for the implementation, and the arrays that it is differentiated by."""
    how, (batch, length, heads, _) = CASES[case], shape
    (query, key, value, z, k), _ = arrays(*shape, jnp.dtype(dtype))
    found = {"query": query, "key": key, "value": value}
    options: dict[str, Any] = {"is_causal": how.is_causal, **how.transform}
    if how.biased:
        found |= {"key": key[:, :, ::2], "value": value[:, :, ::2]}
        rows = jnp.arange(length)[:, None]
        # beyond what the digits of a float32 log-sum-exp can carry beside the scores, or those of bfloat16 the bias
        lifted = jnp.where(rows % 8 == 3, -16_384.0, jnp.where(rows % 8 == 5, 16_384.0, 0.0))
        noise = jax.random.normal(jax.random.key(1), (1, heads, length, length)).astype(dtype).astype(jnp.float32)
        found["bias"] = jnp.where(lifted == 0, noise, lifted)
        seen = jax.random.bernoulli(jax.random.key(2), 0.7, (batch, 1, length, length))
        options["mask"] = seen & (rows // 2 != length // 8)
    if how.verb is npx.ntk_attention:
        found |= {"z": z, "k": k}
    if how.verb is npx.prefix_attention:
        found |= {"prefix_key": key[0, ::2], "prefix_value": value[0, ::2]}

    def attend(arrays: dict[str, jax.Array], implementation: str) -> dict[str, jax.Array]:
        result = how.verb(**arrays, **options, implementation=implementation)
        return dict(zip(("output", "lse"), result if isinstance(result, tuple) else (result,), strict=False))

    return attend, found


def pulled_back(attend: Callable[..., dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
    """Return attention's outputs and, from fixed cotangents of all of them, the gradients of its arrays."""

    def both(arguments: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs, pull = jax.vjp(attend, arguments)
        ones = {name: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for name, x in outputs.items()}
        (gradients,) = pull({name: ones[name].astype(x.dtype) for name, x in outputs.items()})
        return {**outputs, **{f"d {name}": gradient for name, gradient in gradients.items()}}

    return both


@functools.cache
def _exact(dtype: str, case: str, shape: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """Return outputs and gradients of the definition, in float64 on the CPU, for the very numbers that ``dtype`` has."""
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        attend, arguments = called(case, dtype, shape)
        with jax.enable_x64(True):
            wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arguments.items()}
            exact = jax.jit(pulled_back(functools.partial(attend, implementation="reference")))(wide)
            return {name: np.asarray(x) for name, x in exact.items()}


def merged_outside(arrays: dict[str, jax.Array], is_causal: bool) -> dict[str, jax.Array]:
    """Attention with a prefix merged by a log-sum-exp that has no gradient, as jax.nn's residual: the wrong gradients."""
    query, key, value, z, k = (arrays[name] for name in ("query", "key", "value", "z", "k"))
    wide = jnp.float32
    root = query.shape[-1] ** -0.25
    scores = jnp.einsum("btnh,bsnh->bnts", query.astype(wide) * root**2, key.astype(wide))
    if is_causal:
        scores = jnp.where(np.tri(scores.shape[2], scores.shape[3], dtype=np.bool_)[None, None], scores, -jnp.inf)
    own = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value.astype(wide))
    lse = jax.lax.stop_gradient(jax.nn.logsumexp(scores, axis=-1)).transpose(0, 2, 1)[..., None]
    features = npx.feature_map("elu1")(query.astype(wide) * root)
    numerator = own + jnp.exp(-lse) * jnp.einsum("btnr,nrh->btnh", features, z)
    mass = jnp.exp(-lse) * jnp.einsum("btnr,nr->btn", features, k)[..., None]
    return {"output": (numerator / (1 + mass)).astype(query.dtype)}


def _kernel_error(shape: tuple[int, int]) -> Figures:
    n, d = shape
    x = np.asarray(bench_prefix_ntk.inputs(n, d))
    weights = np.asarray(npx.TiedPrefixModel(d, 256, rngs=nnx.Rngs(0)).weights[...])
    host = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        got = np.asarray(npx.kernels.prefix_ntk(_tied(weights), jnp.asarray(x)), np.float64)
    with jax.enable_x64(True), jax.default_device(host):
        exact = np.asarray(npx.kernels.prefix_ntk(_tied(weights.astype(np.float64)), jnp.asarray(x, jnp.float64)))
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return {"output": error, "bound": 1e-5, "holds": error <= 1e-5}


def _tied(weights: np.ndarray) -> npx.TiedPrefixModel:
    model = npx.TiedPrefixModel(weights.shape[1], weights.shape[0], rngs=nnx.Rngs(0))
    model.weights.set_value(jnp.asarray(weights))
    return model


# ----------------------------------------------------------------------------------------- attention


def attention(sizes: Sizes) -> Rows:
    """``bench_attention`` in bfloat16: each implementation, jax.nn's, and torch's where this Python has it."""
    yield "matrix product", functools.partial(_product, sizes)
    batch, length, heads, size = sizes.attention
    for title, programs, flops in bench_attention.accelerator_cases(batch, length, heads, size, sizes.causal):
        yield title, functools.partial(_compared, programs, flops, sizes)
    yield "torch SDPA", functools.partial(_torch, sizes)


def _compared(programs: Programs, flops: float, sizes: Sizes) -> Figures:
    return {"programs": {name: _figures(t, flops) for name, t in measure(programs, sizes.rounds, sizes.within).items()}}


def _figures(timing: Timing, flops: float | None = None) -> Figures:
    if timing.problem:
        return {"cannot run": timing.problem}
    low, middle, high = timing.quartiles()
    found = {
        "median ms": 1e3 * middle, "quartiles ms": [1e3 * low, 1e3 * high], "rounds": len(timing.seconds),
        "temporaries MiB": (timing.temporary or 0) / 2**20,
    }  # fmt: skip
    return found if flops is None else {**found, "TFLOP/s": flops / middle / 1e12}


def _product(sizes: Sizes) -> Figures:
    side = sizes.product
    square = jnp.ones((side, side), jnp.bfloat16)
    return _compared({f"{side}^3, bfloat16": (jnp.matmul, (square, square))}, 2.0 * side**3, sizes)


def _torch(sizes: Sizes) -> Figures:
    if importlib.util.find_spec("torch") is None:
        return {"cannot run": "this Python has no torch"}
    shape, found = sizes.attention, {}
    cases = [(*shape, "bfloat16", causal, backward) for causal in sizes.causal for backward in (False, True)]
    try:
        theirs = bench_attention.torch_attention(sys.executable, cases, sizes.rounds)
    except RuntimeError as error:
        return {"cannot run": str(error)}
    batch, length, heads, size = shape
    for (*_, causal, backward), seconds in zip(cases, theirs["seconds"], strict=False):
        flops = 4 * batch * heads * length**2 * size * (3.5 if backward else 1) / (2 if causal else 1)
        name = f"{'forward and backward' if backward else 'forward'}{', causal' if causal else ''}"
        found[name] = _figures(Timing(seconds), flops)
        del found[name]["temporaries MiB"]
    return {"version": theirs["version"], "device": theirs["device"], "programs": found}


# ---------------------------------------------------------------------------------------- prefix NTK


def prefix_ntk(sizes: Sizes) -> Rows:
    """``bench_prefix_ntk``: the closed form, drawn on the fly too, beside neural-tangents where it is installed."""
    ours = [bench_prefix_ntk.OURS, bench_prefix_ntk.DRAWN, bench_prefix_ntk.PRODUCT]
    yield "fixed model", functools.partial(_kernels, ours, sizes.kernel, sizes)
    # what XLA takes to choose neural-tangents' GPU kernels grows with m: at 1,024 tokens 10 s, at 8,192 not done in 14
    beside = [bench_prefix_ntk.OURS, bench_prefix_ntk.THEIRS]
    few = (*sizes.kernel[:2], min(1024, sizes.kernel[2]))
    yield "fixed model, beside neural-tangents", functools.partial(_kernels, beside, few, sizes)


def _kernels(names: list[str], shape: tuple[int, int, int], sizes: Sizes) -> Figures:
    n, d, m = shape
    if bench_prefix_ntk.THEIRS in names and importlib.util.find_spec("neural_tangents") is None:
        return {"cannot run": "this Python has no neural-tangents"}
    with jax.default_matmul_precision("highest"):
        seconds, first = bench_prefix_ntk.interleaved(names, "fixed", n, d, m, max(sizes.rounds // 2, 2))
    flops = {bench_prefix_ntk.PRODUCT: 2.0 * bench_prefix_ntk.SIDE**3}
    found = {name: _figures(Timing(seconds[name]), flops.get(name, bench_prefix_ntk.flops(n, d, m))) for name in names}
    for name, figures in found.items():
        del figures["temporaries MiB"]
        figures["compiled in s"] = first[name]
    return {"n, d, m": [n, d, m], "programs": found}


# ----------------------------------------------------------------------------------------- one step

METHODS: dict[str, peft.AdapterConfig] = {
    "NTK-Attention": peft.NTKAttentionConfig(mass="relative"),
    "LoRA r=8": peft.LoraConfig(r=8),
    "full": peft.FullConfig(),
}


def step(sizes: Sizes, which: str) -> Rows:
    """One training step of a Llama with random weights in bfloat16: every method, and one in a loop over the layers."""
    config = dict(sizes.models)[which]
    if which == sizes.models[0][0]:
        looped = functools.partial(_step, config, sizes.methods[0], sizes, scan_layers=True)
        yield f"{which}, {sizes.methods[0]}, layers in a loop", looped
    for method in sizes.methods:
        yield f"{which}, {method}", functools.partial(_step, config, method, sizes)


def random_llama(config: models.LlamaConfig) -> models.Llama:
    """Return a Llama of random weights in bfloat16, drawn on the device; norms are ones, in float32."""
    abstract = nnx.eval_shape(lambda: models.Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves, structure = jax.tree.flatten(state)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    drawn = [
        draw(jax.random.key(i), leaf.shape) if len(leaf.shape) > 1 else jnp.ones(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return nnx.merge(graph, jax.tree.unflatten(structure, drawn))


def next_token_loss(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Return the cross entropy of the next token, a row's mean, summed over rows."""
    ids = batch["input_ids"]
    hidden, _ = model.hidden(ids)
    labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return model.loss(hidden, labels, (labels >= 0) / jnp.float32(ids.shape[1] - 1))


def _step(config: models.LlamaConfig, method: str, sizes: Sizes, *, scan_layers: bool = False) -> Figures:
    """Return the figures of the largest batch of those that fit: halved until it does."""
    weights = linear_weights(config) + config.vocab_size * config.hidden_size
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if method == "full" and room is not None and 16 * weights > room:
        return {"cannot run": f"weights, gradients and two moments in float32 take {16 * weights / 2**30:.0f} GiB"}
    rows, length = sizes.tokens
    while True:
        try:
            return _step_of(config, method, rows, length, sizes, scan_layers)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if rows == 1:
                return {"cannot run": said(error)}
        rows //= 2


def _step_of(
    config: models.LlamaConfig, method: str, rows: int, length: int, sizes: Sizes, scan_layers: bool
) -> Figures:
    before = _peak_bytes()
    model = random_llama(config)
    peft.apply(model, METHODS[method])
    model.remat = config.num_hidden_layers > 16
    model.scan_layers = scan_layers
    optimizer = peft.non_negative(optax.adamw(1e-4))
    trainer = Trainer(loss=next_token_loss, optimizer=optimizer, wrt=peft.AdapterParam)
    state, run = trainer.init(model), trainer.stepper(model)
    del model
    ids = jax.random.randint(jax.random.key(0), (rows, length), 0, config.vocab_size)
    seconds: list[float] = []
    begun = time.perf_counter()
    state, metrics = jax.block_until_ready(run(state, {"input_ids": ids}))
    compiled = time.perf_counter() - begun
    begun = time.perf_counter()
    while len(seconds) < sizes.rounds and (len(seconds) < 3 or time.perf_counter() - begun < sizes.within):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(run(state, {"input_ids": ids}))
        seconds.append(time.perf_counter() - start)
    flops = step_flops(config, rows, length, full=method == "full")
    figures = _figures(Timing(seconds), flops)
    del figures["temporaries MiB"]
    side = sizes.product
    square = jnp.ones((side, side), jnp.bfloat16)
    product = measure({"product": (jnp.matmul, (square, square))}, sizes.rounds, 2)["product"]
    peak = _peak_bytes()
    return {
        **figures,
        "tokens": [rows, length],
        "layers recomputed": config.num_hidden_layers > 16,
        "tokens/s": rows * length / statistics.median(seconds),
        "share of the matrix rate": flops / statistics.median(seconds) / (2.0 * side**3 / product.median),
        "compiled in s": compiled,
        # the peak of a process never falls: where a row did not raise it, an earlier row's is all that is known
        "peak GiB": peak / 2**30 if peak > before else f"at most {peak / 2**30:.3g}" if peak else None,
        "finite": bool(metrics["finite"]),
    }


def _peak_bytes() -> int:
    """Return the device's memory that this process has held at most; 0 where that is not told."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def linear_weights(config: models.LlamaConfig) -> int:
    """Return the weights that a token is multiplied with: all linear maps, and the logits' table."""
    wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer = config.hidden_size * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def step_flops(config: models.LlamaConfig, rows: int, length: int, *, full: bool) -> float:
    """Return the flops that a step cannot do without: no recomputation, half of causal attention's scores.

    Forward 2 per weight and token; backward as much for the activations' gradients, and again for the weights' own where
    they are trained. Attention's products: 2 forward, 4 backward, 2 T^2 N H flops each, halved.
    """
    maps = 2.0 * linear_weights(config) * rows * length * (3 if full else 2)
    scores = 2.0 * length**2 * config.num_attention_heads * config.head_dim / 2
    return maps + rows * config.num_hidden_layers * 6 * scores


# ------------------------------------------------------------------------------------------ decoding


def decoding(sizes: Sizes) -> Rows:
    """Greedy generation by the smallest of the models in bfloat16, without an adapter and with a state of any prefix."""
    which, config = sizes.models[0]
    batches, prompt, new = sizes.decode
    for batch in batches:
        yield f"{which}, batch {batch}", functools.partial(_decode, config, batch, prompt, new, sizes)


def _decode(config: models.LlamaConfig, batch: int, prompt: int, new: int, sizes: Sizes) -> Figures:
    ids = jax.random.randint(jax.random.key(0), (batch, prompt), 0, config.vocab_size)
    seconds: dict[str, list[float]] = {}
    compared = {name: random_llama(config) for name in sizes.decoders}
    for name, model in compared.items():
        if name == "with a state of any prefix":
            peft.apply(model, METHODS["NTK-Attention"])
    for model in compared.values():
        for length in (1, new + 1):
            jax.block_until_ready(models.generate(model, ids, max_new_tokens=length))
    for _ in range(max(sizes.rounds // 4, 2)):
        for name, model in compared.items():
            taken = []
            for length in (1, new + 1):
                start = time.perf_counter()
                jax.block_until_ready(models.generate(model, ids, max_new_tokens=length))
                taken.append(time.perf_counter() - start)
            seconds.setdefault(name, []).append((taken[1] - taken[0]) / new)
    found = {}
    for name, each in seconds.items():
        found[name] = _figures(Timing(each))
        del found[name]["temporaries MiB"]
        found[name]["tokens/s"] = batch / statistics.median(each)
        found[name]["weights read, GB/s"] = 2 * linear_weights(config) / statistics.median(each) / 1e9
    return {"prompt": prompt, "new": new, "programs": found}


PARTS: dict[str, tuple[Callable[[Sizes], Rows], float]] = {
    "correctness": (correctness, 190),
    "attention": (attention, 130),
    "step": (lambda sizes: step(sizes, sizes.models[0][0]), 110),
    "decoding": (decoding, 120),
    "large step": (lambda sizes: step(sizes, sizes.models[-1][0]), 150),
    "prefix_ntk": (prefix_ntk, 90),
}
"""By name, in order: the rows, and the seconds after which it is stopped; what it has by then is kept."""
