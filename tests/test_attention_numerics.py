"""Attention at the ends of floating point: rows masked by a bias, states that overflow, masses that underflow.

The reference is the formula in float64 on scores rounded as the operator rounds them, for a bias of -1e9 takes all
digits of a float32 score with it. Tolerances, relative to the largest entry of each gradient: one unit in the last place
of a score of 1e4 (1e-3 in float32), of one of 1e9 in float64 (1.2e-7), and a few of an output in bfloat16 (2^-8).
"""

import dataclasses
import functools
import logging
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_prefix import flash
from ntk_prefix.attention import attention_with_lse, ntk_attention, prefix_attention, softmax_attention

QUERIES, KEYS, HEADS, SIZE = 4, 6, 2, 8
TOLERANCE = {"float64": 1e-6, "float32": 3e-3, "bfloat16": 5e-2}
FILLS = [0.0, -1e4, -1e9, "min", -math.inf]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows and columns, so that several meet."""
    cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=3, keys=4)
    monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)


def arrays(dtype, seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)  # noqa: E731
    return dict(
        query=normal(1, QUERIES, HEADS, SIZE),
        key=normal(1, KEYS, 1, SIZE),
        value=normal(1, KEYS, 1, SIZE),
        z=normal(HEADS, SIZE, SIZE),
        k=abs(normal(HEADS, SIZE)) + jnp.asarray(0.1, dtype),
    )


COTANGENT = np.random.default_rng(9).standard_normal((1, QUERIES, HEADS, SIZE))


@functools.partial(jax.jit, static_argnames=("mass", "implementation"))
def ours(a, mask, *, mass, implementation="xla"):
    """Output and all gradients."""
    if mass == "none":
        attend = lambda a: softmax_attention(  # noqa: E731
            a["query"], a["key"], a["value"], bias=a["bias"], mask=mask, implementation=implementation
        )
    else:
        attend = lambda a: ntk_attention(**a, mask=mask, mass=mass, implementation=implementation)  # noqa: E731
    output, pull = jax.vjp(attend, a)
    return output, pull(jnp.asarray(COTANGENT, output.dtype))[0]


@functools.partial(jax.jit, static_argnames="mass")
def formula(scores, query, value, z, k, *, mass):
    """The definition, in float64, on given scores: output, and gradients of all five."""

    def attend(scores, query, value, z, k):
        features = jnp.exp(jnp.minimum(query * SIZE**-0.25, 0)) + jnp.maximum(query * SIZE**-0.25, 0)
        numerator = jnp.einsum("btnr,nrh->bnth", features, z)
        prefix_mass = jnp.einsum("btnr,nr->bnt", features, k)
        largest = scores.max(-1)
        if mass == "absolute":
            largest = jnp.maximum(largest, jnp.log(prefix_mass))
        largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
        weights = jnp.exp(scores - largest[..., None])
        above = jnp.einsum("bnts,bsh->bnth", weights, value[:, :, 0])
        below = weights.sum(-1)
        if mass == "absolute":
            above, below = above + jnp.exp(-largest)[..., None] * numerator, below + jnp.exp(-largest) * prefix_mass
        total = above / jnp.where(below == 0, 1, below)[..., None]
        if mass == "relative":
            total = (total + numerator) / (1 + prefix_mass)[..., None]
        return total.transpose(0, 2, 1, 3)

    output, pull = jax.vjp(attend, scores, query, value, z, k)
    return output, pull(jnp.asarray(COTANGENT, output.dtype))


def expected(a, mask, mass):
    """Output and all gradients, from :func:`formula` and the chain rule through the scores."""
    dtype = np.float64 if a["query"].dtype == jnp.float64 else np.float32
    wide = {name: np.asarray(x).astype(dtype) for name, x in a.items()}
    scores = dtype(SIZE**-0.5) * np.einsum("btnh,bsh->bnts", wide["query"], wide["key"][:, :, 0])
    scores = np.where(mask, (scores + wide["bias"]).astype(np.float64), -np.inf)
    wide = {name: x.astype(np.float64) for name, x in wide.items()}
    output, (d_scores, d_query, d_value, d_z, d_k) = formula(
        scores, wide["query"], wide["value"], wide["z"], wide["k"], mass=mass
    )
    through = SIZE**-0.5 * np.einsum("bnts,bsh->btnh", d_scores, wide["key"][:, :, 0])
    grads = dict(
        query=d_query + through,
        key=SIZE**-0.5 * np.einsum("bnts,btnh->bsh", d_scores, wide["query"])[:, :, None],
        value=d_value,
        bias=d_scores.sum(1, keepdims=True),
    )
    return output, grads | ({} if mass == "none" else {"z": d_z, "k": d_k})


def assert_near(got, wanted, tolerance):
    for name, x in wanted.items():
        given, x = np.asarray(got[name], np.float64), np.asarray(x)
        assert np.isfinite(given).all(), name
        assert np.abs(given - x).max() <= tolerance * max(np.abs(x).max(), 1), name


fills = st.sampled_from(FILLS)


class TestRowsMaskedByABias:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        rows=st.lists(fills, min_size=QUERIES, max_size=QUERIES),
        columns=st.lists(fills, min_size=KEYS, max_size=KEYS),
        mask_bits=st.integers(0, 2 ** (QUERIES * KEYS) - 1) | st.just(2 ** (QUERIES * KEYS) - 1),
        program=st.sampled_from(
            [
                ("float64", "absolute"),
                ("float32", "none"),
                ("float32", "absolute"),
                ("float32", "relative"),
                ("bfloat16", "absolute"),
            ]
        ),
    )
    def test_value_and_all_gradients_are_those_of_the_formula(self, rows, columns, mask_bits, program):
        dtype, mass = program
        lowest = float(jnp.finfo(dtype).min)
        number = lambda fill: lowest if fill == "min" else fill  # noqa: E731
        with np.errstate(over="ignore"):
            bias = np.add.outer([number(r) for r in rows], [number(c) for c in columns])[None, None]
            bias = jnp.asarray(bias, dtype)
        mask = np.array([mask_bits >> i & 1 for i in range(QUERIES * KEYS)], bool).reshape(1, 1, QUERIES, KEYS)
        a = arrays(dtype) | {"bias": bias}
        output, grads = ours(a, jnp.asarray(mask), mass=mass)
        wanted, wanted_grads = expected(a, mask, mass)
        assert_near({"output": output, **grads}, {"output": wanted, **wanted_grads}, TOLERANCE[dtype])

    @pytest.mark.parametrize("fill", [-1e9, 1e9, float(np.finfo(np.float32).min)])
    def test_gradients_of_the_values_add_up_to_the_cotangent(self, fill):
        """Rows of probabilities sum to 1; with max + log(sum) in one float32 they summed to S."""
        a = arrays(jnp.float32) | {"bias": jnp.full((1, 1, QUERIES, 1), fill, jnp.float32)}
        _, grads = ours(a, jnp.ones((1, 1, 1, 1), bool), mass="none")
        np.testing.assert_allclose(grads["value"].sum((0, 1, 2)), COTANGENT.sum((0, 1, 2)), rtol=1e-5)

    def test_a_prefix_beside_such_a_row_is_all_that_it_sees(self):
        a = arrays(jnp.float32)
        bias = jnp.full((1, 1, QUERIES, KEYS), -1e9, jnp.float32)
        prefix = jnp.asarray(np.random.default_rng(1).standard_normal((3, 1, SIZE)), jnp.float32)
        attend = functools.partial(prefix_attention, a["query"], prefix_key=prefix, prefix_value=prefix)
        alone = attend(jnp.zeros((1, 0, 1, SIZE)), jnp.zeros((1, 0, 1, SIZE)))
        np.testing.assert_allclose(attend(a["key"], a["value"], bias=bias), alone, atol=1e-6)


class TestStatesAtTheEndsOfAFloat:
    @pytest.mark.parametrize("mass", ["absolute", "relative"])
    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    @pytest.mark.parametrize("factor", [1e25, 1e37])
    def test_sums_that_overflow_are_right(self, mass, implementation, factor):
        """phi . k and phi Z are beyond float32; their quotient is not."""
        a = arrays(jnp.float32) | {"bias": jnp.zeros((1, 1, 1, 1), jnp.float32)}
        a |= {name: a[name] * np.float32(factor) for name in ("z", "k")}
        mask = np.ones((1, 1, 1, 1), bool)
        output, grads = ours(a, mask, mass=mass, implementation=implementation)
        wanted, wanted_grads = expected(a, mask, mass)
        np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)
        for name in ("query", "z", "k"):
            scale = max(
                np.abs(wanted_grads[name]).max(), 1e-30
            )  # of z and k, 1 / factor: below float32's normal numbers
            np.testing.assert_allclose(grads[name] / scale, wanted_grads[name] / scale, atol=1e-4, err_msg=name)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("factor", [0, 1e-30, 1, 1e4, 3e38])
    def test_no_finite_input_gives_a_nan(self, dtype, factor):
        """Own masses from e^-82 down, where e^{-2 L} overflows, with the whole range of k beside them."""
        factor = min(factor, float(jnp.finfo(dtype).max) / 16)
        a = arrays(dtype)
        a["k"] = jnp.minimum(a["k"], 4) * jnp.asarray(factor, dtype)
        for fill in (-60, -82, -1e4):
            a["bias"] = jnp.full((1, 1, 1, 1), fill, dtype)
            for mass in ("absolute", "relative"):
                output, grads = ours(a, jnp.ones((1, 1, 1, 1), bool), mass=mass)
                assert np.isfinite(np.float32(output)).all()
                if dtype != "float16":  # where gradients beyond 65504 overflow, which is what loss scaling looks for
                    assert all(np.isfinite(np.float32(x)).all() for x in grads.values())


# --------------------------------------------------------- cuDNN, by a stand-in with its one statistic


class _Half:
    """One cuDNN primitive, computed in float32 as the kernels do: probabilities are exp(score - lse)."""

    def __init__(self, function):
        self.bind = function


def _scores(query, key, bias, parameters):
    scores = parameters["scale"] * jnp.einsum("btnh,bsnh->bnts", query.astype("f4"), _heads(key, query).astype("f4"))
    if bias.size:  # two infinities would be subtracted in the kernel
        scores = scores + jnp.where(jnp.isfinite(bias), bias.astype("f4"), jnp.nan)
    seen = (
        np.tri(*scores.shape[2:], dtype=bool)
        if parameters["mask_type"] == "causal"
        else np.ones(scores.shape[2:], bool)
    )
    if length := parameters["sliding_window_length"]:
        seen &= ~np.tri(*scores.shape[2:], -length, dtype=bool)
    return jnp.where(seen[None, None], scores, -jnp.inf)


def _heads(x, query):
    return jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)


def _forward(query, key, value, bias, *_, is_training, **parameters):
    scores = _scores(query, key, bias, parameters)
    lse = jax.nn.logsumexp(scores, axis=-1)
    output = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), _heads(value, query).astype("f4"))
    return output.astype(query.dtype), lse


def _backward(query, key, value, bias, *rest, **parameters):
    lse, output, d_output = rest[-3:]
    weights = jnp.exp(_scores(query, key, bias, parameters) - lse[..., None])
    projection = (d_output.astype("f4") * output.astype("f4")).sum(-1).transpose(0, 2, 1)[..., None]
    d_weights = jnp.einsum("btnh,bsnh->bnts", d_output.astype("f4"), _heads(value, query).astype("f4"))
    d_scores = weights * (d_weights - projection)
    d_query = parameters["scale"] * jnp.einsum("bnts,bsnh->btnh", d_scores, _heads(key, query).astype("f4"))
    d_key = parameters["scale"] * jnp.einsum("bnts,btnh->bsnh", d_scores, query.astype("f4"))
    d_value = jnp.einsum("bnts,btnh->bsnh", weights, d_output.astype("f4"))
    group = lambda x: x.sum(2, keepdims=True)  # noqa: E731  one key head
    grads = d_query, group(d_key), group(d_value)
    d_bias = d_scores.sum(1, keepdims=True) if bias.size and bias.shape[1] == 1 else d_scores
    return tuple(x.astype(query.dtype) for x in (*grads, d_bias))


@pytest.fixture
def cudnn(monkeypatch):
    stand_in = SimpleNamespace(
        _dot_product_attention_fwd_p_wrapper=_Half(_forward),
        _dot_product_attention_bwd_p_wrapper=_Half(_backward),
        MaskType=SimpleNamespace(CAUSAL="causal", NO_MASK="none"),
        AttentionLayout=SimpleNamespace(BTNH=SimpleNamespace(value=0)),
    )
    monkeypatch.setattr(flash.cudnn, "_cudnn", lambda: stand_in)
    monkeypatch.setitem(flash.BACKENDS, "cudnn", flash.BACKENDS["cudnn"]._replace(platform=None))


class TestCudnn:
    """What is handed to cuDNN and what is made of its answer; no GPU: see the stand-in."""

    @pytest.mark.parametrize(("dtype", "is_causal"), [("bfloat16", True), ("bfloat16", False), ("float16", False)])
    def test_rows_masked_by_a_bias_have_the_right_gradients(self, cudnn, dtype, is_causal):
        a = arrays(dtype)
        mask = jnp.ones((1, 1, QUERIES, KEYS), bool).at[..., -1].set(False)

        @functools.partial(jax.jit, static_argnums=0)
        def run(implementation, z, k, bias):
            def attend(query, key, value, bias):
                options = dict(bias=bias, mask=mask, is_causal=is_causal, implementation=implementation)
                return ntk_attention(query, key, value, z, k, **options)

            output, pull = jax.vjp(attend, a["query"], a["key"], a["value"], bias)
            return output, *pull(jnp.asarray(COTANGENT, dtype))

        for fill in (-1e9, float(jnp.finfo(dtype).min), 1e9, -1e4, -math.inf):
            fill = (
                max(min(fill, float(jnp.finfo(dtype).max)), float(jnp.finfo(dtype).min)) if fill > -math.inf else fill
            )
            # row 1 wholly, row 2 in what a causal query sees of it
            bias = jnp.zeros((1, 1, QUERIES, KEYS), dtype).at[:, :, 1].set(fill).at[:, :, 2, :3].set(fill)
            seen = np.where(np.asarray(mask) & np.tri(QUERIES, KEYS, dtype=bool) if is_causal else mask, bias, -np.inf)
            # without a prefix a row is what it is without its largest bias, and keeps the digits of its scores
            largest = np.maximum(seen.max(-1, keepdims=True), float(jnp.finfo(dtype).min))
            level = jnp.asarray(np.maximum(np.float64(bias) - largest, -1e4), dtype) if math.isfinite(fill) else bias
            nothing, prefix = (a["z"] * 0, a["k"] * 0), (a["z"], a["k"])
            for state, plain in ((nothing, level), (prefix, bias))[: 1 if fill > 0 else 2]:
                got, wanted = run("cudnn", *state, bias), run("xla", *state, plain)
                for name, x, y in zip(("output", "query", "key", "value", "bias"), got, wanted, strict=True):
                    x, y = np.float32(x), np.float32(y)
                    assert np.isfinite(x).all(), (name, fill)
                    assert np.abs(x - y).max() <= 5e-2 * max(np.abs(y).max(), 1), (name, fill)

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_a_cotangent_of_the_log_sum_exp_reaches_all(self, cudnn, with_bias):
        """In bfloat16, as the kernel takes it; without it, the loss has next to no gradient for the query."""
        a = arrays(jnp.bfloat16)
        bias = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, QUERIES, KEYS)), jnp.bfloat16)

        @functools.partial(jax.jit, static_argnums=0)
        def grads(implementation, a, bias):
            def loss(a, bias):
                options = dict(bias=bias if with_bias else None, is_causal=True, implementation=implementation)
                output, lse = attention_with_lse(a["query"], a["key"], a["value"], **options)
                return jnp.sum(jnp.sin(lse)) + 0.1 * jnp.sum(output.astype("f4") * COTANGENT.astype("f4"))

            return jax.grad(loss, (0, 1))(a, bias)

        got, wanted = grads("cudnn", a, bias), grads("xla", a, bias)
        for name in ("query", "key", "value"):
            x, y = np.float32(got[0][name]), np.float32(wanted[0][name])
            assert np.abs(x - y).max() <= 2e-2 * np.abs(y).max(), name
        assert np.abs(np.float32(got[1]) - np.float32(wanted[1])).max() <= 2e-2

    def test_a_window_to_the_left_is_handed_over(self, cudnn):
        a = arrays(jnp.bfloat16)

        @functools.partial(jax.jit, static_argnums=0)
        def run(implementation, a):
            options = dict(local_window_size=(2, 0), implementation=implementation)
            output, pull = jax.vjp(lambda a: ntk_attention(**a, **options), a)
            return {"output": output, **pull(jnp.asarray(COTANGENT, jnp.bfloat16))[0]}

        got, wanted = run("cudnn", a), run("xla", a)
        for name, y in wanted.items():
            assert np.abs(np.float32(got[name]) - np.float32(y)).max() <= 2e-2 * np.abs(np.float32(y)).max(), name
        wider = ntk_attention(**a, is_causal=True, local_window_size=3, implementation="xla")  # the control
        assert np.abs(np.float32(wider) - np.float32(wanted["output"])).max() > 5e-2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(logits_soft_cap=5.0), "cuDNN takes no soft cap"),
            (dict(local_window_size=2), r"windows to the left only, \(left, 0\), got \(2, 2\)"),
            (dict(local_window_size=(2, 0), mask=np.ones((1, 1, 1, 4), bool)), "without a bias and a mask only"),
        ],
    )
    def test_what_it_cannot_transform_is_named_and_xla_takes_it(self, cudnn, caplog, options, message):
        a = jax.tree.map(lambda x: jnp.zeros((1, 4, *x.shape[2:]), x.dtype), arrays(jnp.bfloat16))
        a = {name: a[name] for name in ("query", "key", "value")}
        options = {name: jnp.asarray(x) if name == "mask" else x for name, x in options.items()}
        with pytest.raises(ValueError, match=message):
            softmax_attention(**a, **options, implementation="cudnn")
        with caplog.at_level(logging.INFO, logger="ntk_prefix.attention"):
            softmax_attention(**a, **options)
        assert "attention runs on xla: cudnn" in caplog.messages[0]

    def test_an_ordinary_bias_is_handed_over_as_it_is(self, cudnn):
        a = arrays(jnp.bfloat16)
        bias = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, QUERIES, KEYS)), jnp.bfloat16)
        call = flash.cudnn._call(flash.Flash("cudnn", 1.0), a["query"], flash.Source(a["key"], a["value"], bias))
        np.testing.assert_array_equal(call.operands[0], bias)
        assert not np.any(call.shift)


class TestAcceleratorsSchedule:
    """Large blocks, long ones for few queries, and products of bfloat16 factors: computed here, on a CPU."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("length", "blocks"), [(1, 1), (2, 2), (5, 6)])
    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_computes_the_same(self, monkeypatch, dtype, length, blocks):
        called = []

        def platform():
            called.append(True)
            return "gpu"

        draw = np.random.default_rng(3)
        normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)  # noqa: E731
        a = dict(query=normal(1, length, 4, SIZE), key=normal(1, 7, 2, SIZE), value=normal(1, 7, 2, SIZE))
        a["bias"] = normal(1, 1, length, 7)
        mask = jnp.asarray(draw.random((1, 1, length, 7)) < 0.8)
        cotangent = normal(1, length, 4, SIZE)

        def run(a, implementation):
            attend = lambda a: softmax_attention(**a, mask=mask, implementation=implementation)  # noqa: E731
            output, pull = jax.vjp(attend, a)
            return output, pull(cotangent.astype(output.dtype))[0]

        wide = jax.tree.map(lambda x: x.astype(jnp.float32), a)
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), run(wide, "reference"))
        monkeypatch.setattr(flash.xla, "target_platform", platform)
        # as many scores as 4 heads of 2 queries and 4 keys have
        gpu = dataclasses.replace(flash.xla.TUNINGS["gpu"], queries=3, keys=4, scores=32)
        monkeypatch.setitem(flash.xla.TUNINGS, "gpu", gpu)
        schedule = flash.xla._Blocks.of(
            flash.base.Flash("xla", 1.0), a["query"], flash.base.Source(a["key"], a["value"])
        )
        assert schedule.factors == dtype
        assert len(schedule.pairs()) == blocks
        got = run(a, "xla")
        assert len(called) >= 3  # for the schedule above, and a forward and a backward pass
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
            # bfloat16: inputs are exact, probabilities, gradients of scores and results rounded to 2^-9 each
            assert error < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
