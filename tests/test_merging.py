"""Attention with its log-sum-exp, merged attention, a prefix with a bias, queries that stand behind a cache.

Tolerances, in float64 throughout: 1e-8 for gradients through two layers, 1e-12 for values and one layer: thousands of
roundings.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import flash
from ntk_prefix.attention import attention_with_lse, merge_attention, ntk_attention, prefix_attention, softmax_attention

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, SIZE, PREFIX = 2, 7, 9, 4, 2, 4, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows and columns, so that several meet."""
    cpu = dataclasses.replace(flash.xla.TUNINGS["cpu"], queries=3, keys=4)
    monkeypatch.setitem(flash.xla.TUNINGS, "cpu", cpu)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def arrays(queries=QUERIES, keys=KEYS):
    return dict(
        query=normal(0, BATCH, queries, HEADS, SIZE),
        key=normal(1, BATCH, keys, KEY_HEADS, SIZE),
        value=normal(2, BATCH, keys, KEY_HEADS, SIZE),
    )


def close(got, wanted, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), got, wanted)


def two_layers(attend, a, *, is_causal=True):
    """A scalar of two layers: the lower one's output and log-sum-exp feed the upper one, whose own are in the loss."""
    x, lse = attend(**a["lower"], is_causal=is_causal)
    query = jnp.sin(x) + 0.3 * lse[..., None]
    key, value = jnp.cos(x[:, :, ::2]), x[:, :, 1::2] * jnp.tanh(lse[:, :, ::2, None])
    y, top = attend(query=query, key=key, value=value, is_causal=is_causal, **a["upper"])
    weights = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
    return jnp.sum(y * weights) + jnp.sum(jnp.sin(2 * top) * weights[..., 0])


def two_layer_arrays():
    lower = arrays(keys=QUERIES) | {"bias": normal(3, 1, HEADS, QUERIES, QUERIES)}
    return {"lower": lower, "upper": {"bias": normal(4, BATCH, 1, QUERIES, 1)}}


def stopped(*args, **options):
    """What jax.nn offers: the right number, and no derivative."""
    output, lse = attention_with_lse(*args, **options)
    return output, jax.lax.stop_gradient(lse)


def worst(got, wanted):
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, wanted)
    return max(jax.tree.leaves(errors))


class TestAttentionWithLse:
    def grads(self, attend, implementation):
        layer = functools.partial(attend, implementation=implementation)
        return jax.jit(jax.value_and_grad(functools.partial(two_layers, layer)))(two_layer_arrays())

    def test_gradients_through_two_layers_are_those_of_autodiff_and_stopping_the_lse_fails_this(self):
        loss, wanted = self.grads(attention_with_lse, "reference")
        got_loss, got = self.grads(attention_with_lse, "xla")
        assert abs(got_loss - loss) <= 1e-12 * abs(loss)
        assert worst(got, wanted) <= 1e-8
        for implementation in ("reference", "xla"):
            stopped_loss, wrong = self.grads(stopped, implementation)
            assert abs(stopped_loss - loss) <= 1e-12 * abs(loss)  # the loss does not tell
            assert worst(wrong, wanted) > 0.1

    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    def test_is_the_log_sum_exp_of_the_scores_and_minus_infinity_without_keys(self, implementation):
        a = arrays()
        mask = jnp.ones((1, 1, QUERIES, KEYS), bool).at[:, :, 2].set(False)
        run = jax.jit(functools.partial(attention_with_lse, implementation=implementation, mask=mask))
        (output, lse), pull = jax.vjp(lambda a: run(**a), a)
        scores = jnp.einsum("btnh,bsnh->btns", a["query"], jnp.repeat(a["key"], 2, axis=2)) / math.sqrt(SIZE)
        wanted = jax.nn.logsumexp(jnp.where(mask.transpose(0, 2, 1, 3), scores, -jnp.inf), axis=-1)
        close(lse, wanted)
        assert np.all(lse[:, 2] == -np.inf)
        assert np.all(output[:, 2] == 0)
        # whatever is made of an infinite number, NaN included, stays in its row
        (grads,) = pull((output, jnp.where(jnp.isfinite(lse), lse, jnp.nan)))
        assert all(np.isfinite(x).all() for x in grads.values())
        assert np.all(grads["query"][:, 2] == 0)


class TestMergeAttention:
    def parts(self, a, cuts, **options):
        edges = [0, *cuts, KEYS]
        return zip(
            *[
                attention_with_lse(a["query"], a["key"][:, i:j], a["value"][:, i:j], **options)
                for i, j in itertools.pairwise(edges)
            ],
            strict=True,
        )

    def test_parts_are_the_whole_in_value_and_gradient(self):
        def loss(attend):
            def of(a):
                output, lse = attend(a)
                return jnp.sum(jnp.sin(3 * output)) + jnp.sum(jnp.cos(lse)), (output, lse)

            return jax.jit(jax.grad(of, has_aux=True))

        got = loss(lambda a: merge_attention(*self.parts(a, (2, 2))))(arrays())  # the middle part is empty
        wanted = loss(lambda a: attention_with_lse(**a, implementation="reference"))(arrays())
        close(got, wanted)

    def test_a_state_merges_as_one_more_part(self):
        """phi(q) Z / phi(q).k is the output of the prefix, log(phi(q).k) its log-sum-exp."""
        state = normal(5, HEADS, SIZE, SIZE), abs(normal(6, HEADS, SIZE))

        def merged(a, z, k):
            scaled = a["query"] * SIZE**-0.25
            phi = jnp.exp(jnp.minimum(scaled, 0)) + jnp.maximum(scaled, 0)
            mass = jnp.einsum("btnr,nr->btn", phi, k)
            own, lse = attention_with_lse(**a)
            return merge_attention([own, jnp.einsum("btnr,nrh->btnh", phi, z) / mass[..., None]], [lse, jnp.log(mass)])[
                0
            ]

        a = arrays()
        close(jax.jit(merged)(a, *state), jax.jit(ntk_attention)(**a, z=state[0], k=state[1]))

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_no_finite_log_sum_exp_gives_a_nan(self, dtype):
        rows = [(-math.inf, -math.inf), (1e9, 1e9), (-1e9, 3.0), (-math.inf, -1e9), (3e38, -3e38), (0.0, 0.0)]
        lses = jnp.asarray(rows, dtype).T[:, None, :, None]
        outputs = jnp.stack([jnp.full((1, 6, 1, 2), x, dtype) for x in (1, 3)])

        def loss(outputs, lses):
            output, lse = merge_attention(outputs, lses)
            return jnp.sum(output) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * 1e-9), (output, lse)

        grads, (output, lse) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(outputs, lses)
        np.testing.assert_array_equal(output[0, :, 0, 0], [0, 2, 3, 3, 1, 2])
        np.testing.assert_allclose(lse[0, :, 0], np.logaddexp(*np.array(rows).T), rtol=1e-6)
        assert all(np.isfinite(x).all() for x in grads)
        assert np.all(grads[0][:, :, 0] == 0)

    @pytest.mark.parametrize("lse", [math.nan, math.inf])
    def test_what_is_no_log_sum_exp_makes_its_row_nan_and_no_other(self, lse):
        lses = jnp.zeros((2, 1, 3, 1)).at[0, 0, 1, 0].set(lse)
        for found in merge_attention(jnp.ones((2, 1, 3, 1, 2)), lses):
            np.testing.assert_array_equal(np.isnan(found).reshape(3, -1).all(axis=1), [False, True, False])
            assert np.isnan(found).sum() == found.size / 3

    def test_keeps_the_dtype_of_the_outputs(self):
        a = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays())
        output, lse = jax.eval_shape(lambda a: merge_attention(*self.parts(a, (4,))), a)
        assert (output.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)

    @pytest.mark.parametrize(
        ("outputs", "lses", "message"),
        [
            ([], [], "outputs and lses: expected as many of either, at least one, got 0 and 0"),
            ([jnp.ones((1, 2, 3, 4))], [], "got 1 and 0"),
            ([jnp.ones((1, 2, 3, 4))], [jnp.ones((1, 3, 2))], r"lses\[0\]: expected \[1, 2, 3\], got \(1, 3, 2\)"),
            ([jnp.ones((1, 2, 3, 4)), jnp.ones((2, 2, 3, 4))], [jnp.ones((1, 2, 3))] * 2, r"outputs\[1\]: expected"),
        ],
    )
    def test_what_does_not_fit_is_named(self, without_annotations, outputs, lses, message):
        with pytest.raises(ValueError, match=message):
            merge_attention(outputs, lses)


class TestPrefixBias:
    @pytest.mark.parametrize(
        ("implementation", "shared", "axes"),
        [
            ("xla", True, (0, 1, 0, 1)),
            ("xla", True, (1, 1, 1, 1)),
            ("xla", False, (0, 1, 1, 0)),
            ("reference", True, (1, 0, 1, 1)),
        ],
    )
    def test_is_that_of_virtual_tokens_in_value_and_gradient(self, implementation, shared, axes):
        full = (BATCH, HEADS, QUERIES, PREFIX)
        shape = (PREFIX, KEY_HEADS, SIZE) if shared else (BATCH, PREFIX, KEY_HEADS, SIZE)
        a = arrays() | {
            "prefix_key": normal(7, *shape),
            "prefix_value": normal(8, *shape),
            "prefix_bias": normal(9, *(n if whole else 1 for n, whole in zip(full, axes, strict=True))),
            "bias": normal(10, 1, HEADS, 1, KEYS),
        }

        def virtual(query, key, value, prefix_key, prefix_value, prefix_bias, bias):
            whole = (BATCH, PREFIX, KEY_HEADS, SIZE)
            key = jnp.concatenate([jnp.broadcast_to(prefix_key, whole), key], axis=1)
            value = jnp.concatenate([jnp.broadcast_to(prefix_value, whole), value], axis=1)
            both = [jnp.broadcast_to(prefix_bias, full), jnp.broadcast_to(bias, (*full[:3], KEYS))]
            return softmax_attention(query, key, value, bias=jnp.concatenate(both, -1), implementation="reference")

        def run(attend):
            def loss(a):
                output = attend(**a)
                return jnp.sum(jnp.sin(3 * output)), output

            return jax.jit(jax.grad(loss, has_aux=True))(a)

        close(run(functools.partial(prefix_attention, implementation=implementation)), run(virtual))

    def test_the_log_of_a_count_is_that_many_tokens(self):
        a = arrays()
        prefix = normal(7, 3, KEY_HEADS, SIZE)
        counted = prefix_attention(
            **a, prefix_key=prefix, prefix_value=prefix, prefix_bias=jnp.full((1,) * 4, np.log(4))
        )
        repeated = jnp.concatenate([prefix] * 4)
        close(counted, prefix_attention(**a, prefix_key=repeated, prefix_value=repeated))

    def test_what_does_not_fit_is_named(self, without_annotations):
        prefix = normal(7, 3, KEY_HEADS, SIZE)
        with pytest.raises(ValueError, match=r"prefix_bias: expected \(2, 4, 7, 3\), each axis possibly 1, got \(3,\)"):
            prefix_attention(**arrays(), prefix_key=prefix, prefix_value=prefix, prefix_bias=jnp.ones(3))


class TestQueryOffset:
    """Queries at a place in a cache that is longer than what is written: the same as a mask of queries and slots."""

    @pytest.mark.parametrize("offset", [0, 5])
    def test_is_that_of_the_mask_in_value_and_gradient_known_or_not(self, offset):
        a = arrays(queries=3, keys=13)
        padding = jnp.ones((BATCH, 1, 1, 13), bool).at[1, :, :, 0].set(False)
        written = (jnp.arange(13)[None] <= offset + jnp.arange(3)[:, None])[None, None]

        def run(attend, *rest):
            def loss(a, *rest):
                output = attend(a, *rest)
                return jnp.sum(jnp.sin(3 * output)), output

            return jax.jit(jax.grad(loss, has_aux=True))(a, *rest)

        def causal(implementation):
            return lambda a, offset: softmax_attention(
                **a, mask=padding, is_causal=True, query_offset=offset, implementation=implementation
            )

        wanted = run(lambda a: softmax_attention(**a, mask=padding & written, implementation="reference"))
        close(run(causal("reference"), jnp.int32(offset)), wanted)
        close(run(causal("xla"), jnp.int32(offset)), wanted)
        close(run(lambda a: causal("xla")(a, offset)), wanted)
        short = {name: x if name == "query" else x[:, : offset + 3] for name, x in a.items()}
        if offset:  # the control: counted from 0, the keys of the cache are not seen
            assert np.abs(softmax_attention(**short, is_causal=True) - wanted[1]).max() > 1e-2

    def test_slots_that_are_not_written_are_not_looked_at(self):
        """Not one NaN of a block behind the last query reaches the result."""
        a = arrays(queries=2, keys=16)
        a = {name: x if name == "query" else x.at[:, 8:].set(jnp.nan) for name, x in a.items()}
        run = jax.jit(lambda offset: softmax_attention(**a, is_causal=True, query_offset=offset, implementation="xla"))
        assert np.isfinite(run(5)).all()
        assert np.isnan(run(7)).any()  # the control: the next block is looked at

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                dict(query_offset=1),
                "query_offset: expected 0 without is_causal or a window, got 1. Hide keys with mask",
            ),
            (dict(query_offset=1.5, is_causal=True), "query_offset: expected a whole number, or an integer array"),
            (dict(query_offset=jnp.arange(2), is_causal=True), "query_offset: expected a whole number, or an integer"),
        ],
    )
    def test_what_does_not_fit_is_named(self, without_annotations, options, message):
        with pytest.raises(ValueError, match=message):
            softmax_attention(**arrays(), **options)
