"""Splash attention, interpreted on a CPU in the quick tests and compiled for TPUs in the slow ones.

Tolerance in float32: 1e-5 of the largest entry of each array, tens of roundings through two layers.
"""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntk_prefix import flash, sharding
from ntk_prefix.attention import attention_with_lse, ntk_attention, prefix_attention, softmax_attention
from ntk_prefix.feature_maps import Anchors
from tests.bench.compile_attention import ENVIRONMENT

HEADS, KEY_HEADS, SIZE = 4, 2, 64


@pytest.fixture(autouse=True)
def small_and_interpreted(monkeypatch):
    """Two blocks of the least size, and rows of a batch one after the other."""
    monkeypatch.setattr(flash.splash, "INTERPRET", True)
    monkeypatch.setitem(flash.BACKENDS, "splash", flash.BACKENDS["splash"]._replace(platform=None))
    monkeypatch.setattr(flash.splash, "BLOCK", 128)
    monkeypatch.setattr(flash.splash, "ROWS_BYTES", 1)
    flash.splash._kernel.cache_clear()
    yield
    flash.splash._kernel.cache_clear()


def arrays(batch, queries, keys, heads=HEADS, key_heads=KEY_HEADS, size=SIZE):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)  # noqa: E731
    return dict(
        query=normal(batch, queries, heads, size),
        key=normal(batch, keys, key_heads, size),
        value=normal(batch, keys, key_heads, size),
        z=0.3 * normal(heads, size, size),
        k=abs(normal(heads, size)),
    )


def worst(got, wanted):
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, wanted)
    return max(jax.tree.leaves(errors))


def grads(loss, implementation, a):
    return jax.jit(jax.grad(functools.partial(loss, implementation), has_aux=True))(a)


class TestInterpreted:
    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_two_layers_with_the_log_sum_exp_in_the_loss(self, x64):
        """Causal, grouped heads, 200 tokens in two blocks; the lse under stop_gradient (the control) fails this."""

        def loss(implementation, a, stop=False):
            options = dict(is_causal=True, implementation=implementation)
            x = ntk_attention(**a, **options)
            y, lse = attention_with_lse(jnp.sin(x), x[:, :, ::2], jnp.cos(x[:, :, 1::2]), **options)
            lse = jax.lax.stop_gradient(lse) if stop else lse
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(3 * lse)), (y, lse)

        a = arrays(1, 200, 200)
        got, wanted = grads(loss, "splash", a), grads(loss, "reference", a)
        assert worst(got, wanted) <= 1e-5
        assert worst(grads(functools.partial(loss, stop=True), "reference", a)[0], wanted[0]) > 0.1

    def test_a_padding_mask_rows_without_a_key_and_a_prefix_that_the_batch_shares(self, x64):
        a = arrays(2, 50, 150)
        del a["z"], a["k"]
        a |= {"prefix_key": a["key"][0, :9], "prefix_value": a["value"][0, 1:10]}
        seen = jnp.arange(150)[None, :] < jnp.asarray([[0], [70]])
        mask = seen[:, None, None]

        def loss(implementation, a):
            output = prefix_attention(**a, mask=mask, implementation=implementation)
            own, lse = attention_with_lse(a["query"], a["key"], a["value"], mask=mask, implementation=implementation)
            return jnp.sum(jnp.sin(3 * output)) + jnp.sum(jnp.cos(own)) + jnp.sum(jnp.sin(lse[1])), (
                output,
                own,
                lse[1],
            )

        got, wanted = grads(loss, "splash", a), grads(loss, "reference", a)
        assert worst(got, wanted) <= 1e-5
        assert np.all(got[1][1][0] == 0)

    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_windows_and_a_soft_cap_through_two_layers(self, x64):
        """Two blocks, a state of anchors that both heads share and all see; without the cap (the control) this fails."""

        def loss(implementation, a, cap=2.0):
            options = dict(
                local_window_size=(70, 9), query_offset=30, logits_soft_cap=cap, implementation=implementation
            )
            x = ntk_attention(**a, **options)
            y, lse = attention_with_lse(jnp.sin(x), x[:, :, :1], jnp.cos(x[:, :, 1:]), **options)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(3 * lse)), (y, lse)

        a = arrays(1, 200, 200, heads=2, key_heads=1)
        a |= {"z": a["z"][:1, :9], "k": a["k"][:1, :9], "feature_map": Anchors.of_keys(a["key"][0, :9])}
        got, wanted = grads(loss, "splash", a), grads(loss, "reference", a)
        assert worst(got, wanted) <= 1e-5
        assert worst(grads(functools.partial(loss, cap=None), "reference", a)[0], wanted[0]) > 0.1

    @pytest.mark.parametrize("x64", [True, False], indirect=True)
    def test_queries_behind_a_cache(self, x64):
        a = arrays(1, 3, 300)
        run = lambda implementation: softmax_attention(  # noqa: E731
            a["query"], a["key"], a["value"], is_causal=True, query_offset=140, implementation=implementation
        )
        assert worst(run("splash"), run("reference")) <= 1e-5

    def test_rows_whose_window_is_empty_are_zero_whether_their_blocks_are_visited_or_not(self, x64):
        a = arrays(1, 400, 100, heads=2, key_heads=1)
        del a["z"], a["k"]

        def loss(implementation, a):
            output, lse = attention_with_lse(**a, local_window_size=50, implementation=implementation)
            return jnp.sum(jnp.sin(output)) + jnp.sum(lse[:, :150]), output

        (got, output), wanted = grads(loss, "splash", a), grads(loss, "reference", a)
        assert worst((got, output), wanted) <= 1e-5
        assert np.all(output[:, 150:] == 0)
        assert np.all(got["query"][:, 150:] == 0)

    def test_one_causal_row_on_a_mesh_keeps_its_places(self, x64):
        """Queries of one row are divided where every key is seen; counted from 0 on each device, half would be wrong."""
        a = arrays(1, 256, 256, heads=2, key_heads=1)
        del a["z"], a["k"]
        mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1), sharding.AXES)
        placed = jax.device_put(a, NamedSharding(mesh, PartitionSpec()))

        @functools.partial(jax.jit, static_argnums=0)
        def run(is_causal, a):
            with sharding.on(mesh):
                return softmax_attention(**a, is_causal=is_causal, implementation="splash")

        for is_causal in (True, False):
            wanted = softmax_attention(**a, is_causal=is_causal, implementation="reference")
            assert worst(run(is_causal, placed), wanted) <= 1e-5

    def test_each_device_of_a_mesh_computes_its_rows_and_heads_and_nothing_is_gathered(self, x64):
        a = arrays(4, 20, 20, size=8)
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES)

        def loss(a, implementation):
            prefix = a["key"][0, :3]
            output = prefix_attention(**a, prefix_key=prefix, prefix_value=prefix, implementation=implementation)
            return jnp.sum(jnp.sin(3 * output))

        def on_mesh(a):
            with sharding.on(mesh):
                return jax.grad(loss)(a, "splash")

        del a["z"], a["k"]
        names = {name: ("batch", None, "heads" if name == "query" else "key_heads", None) for name in a}
        placed = {
            name: jax.device_put(x, NamedSharding(mesh, sharding.spec(mesh, names[name], x.shape)))
            for name, x in a.items()
        }
        program = jax.jit(on_mesh).lower(placed).compile()
        assert worst(program(placed), jax.jit(jax.grad(loss), static_argnums=1)(a, "reference")) <= 1e-5
        whole = f"{a['query'].shape[0]},{a['query'].shape[1]},"
        gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line or " all-to-all(" in line]
        assert not [line for line in gathered if whole in line], gathered


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(query=jnp.ones((1, 5, 2, 8), jnp.float16)), "splash takes bfloat16 and float32, got float16"),
            (dict(bias=jnp.ones((1, 1, 1, 5))), "splash takes no bias"),
            (
                dict(mask=jnp.ones((1, 1, 5, 5), bool)),
                r"splash takes masks of keys, \[B, 1, 1, S\], got \(1, 1, 5, 5\)",
            ),
            (dict(is_causal=True, query_offset=-1), "splash takes a query_offset >= 0"),
            (dict(local_window_size=2, query_offset=9), "splash needs a key in the window of a query"),
            (dict(key=jnp.ones((1, 0, 2, 8)), value=jnp.ones((1, 0, 2, 8))), "needs a query and a key, got T=5, S=0"),
        ],
    )
    def test_what_it_cannot_take_is_named(self, without_annotations, change, message):
        ones = {name: jnp.ones((1, 5, 2, 8), jnp.float32) for name in ("query", "key", "value")}
        with pytest.raises(ValueError, match=message):
            softmax_attention(**{**ones, **change}, implementation="splash")

    def test_on_a_tpu_it_is_what_runs_where_it_can(self, monkeypatch, caplog):
        monkeypatch.setattr(flash.base, "target_platform", lambda: "tpu")
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        shape = jax.ShapeDtypeStruct((1, 5, 2, 8), jnp.float32)
        with caplog.at_level(logging.INFO, logger="ntk_prefix.attention"):
            jax.eval_shape(softmax_attention, shape, shape, shape)
            jax.eval_shape(functools.partial(softmax_attention, bias=jnp.ones((1, 1, 1, 5))), shape, shape, shape)
        assert caplog.messages[0].startswith("attention runs on splash")
        assert caplog.messages[1].startswith("attention runs on xla")
        assert "splash takes no bias" in caplog.messages[1]

    def test_several_tpus_without_a_mesh_are_left_to_the_compiler(self, monkeypatch):
        monkeypatch.setattr(flash.base, "target_platform", lambda: "tpu")
        assert "none is set" in flash.splash._unavailable(jnp.ones((1, 5, 2, 8)))

    def test_a_jax_without_its_halves_is_named(self, monkeypatch):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

        monkeypatch.delattr(splash_attention_kernel, "_splash_attention_bwd_dq")
        with pytest.raises(ValueError, match=r"moved splash attention's halves: \['_splash_attention_bwd_dq'\]"):
            flash.splash._library()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra tpu")
class TestCompiledForTpu:
    """The real TPU compiler, in a process of its own; see tests/bench/compile_attention.py."""

    def programs(self, *arguments):
        command = [sys.executable, "-m", "tests.bench.compile_attention", "--implementation", "default", *arguments]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    @pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    def test_it_is_a_kernel_within_its_memory(self, topology):
        """B=4 T=4096 N=16 H=128: q, k, v and the output are 64 MiB each, and one T x S of all heads 1 GiB in bfloat16."""
        for program in self.programs("--topology", topology):
            forward = program["program"] == "forward"
            assert program["mosaic_kernels"] == (1 if forward else 3), program
            assert program["square"] is None
            assert program["temporaries_mib"] <= (256 if forward else 580), program

    @pytest.mark.parametrize("transform", [["--local-window-size", "1023"], ["--logits-soft-cap", "50"]])
    def test_windows_and_soft_caps(self, transform):
        """At the shapes of the first test: the same kernels within the same memory."""
        for program in self.programs(*transform, "--mass", "absolute"):
            forward = program["program"] == "forward"
            assert program["mosaic_kernels"] == (1 if forward else 3), program
            assert program["square"] is None
            assert program["temporaries_mib"] <= (256 if forward else 580), program

    @pytest.mark.parametrize("head_dim", [64, 80, 256])
    def test_other_heads_and_lengths(self, head_dim):
        shape = ["--batch", "2", "--length", "77", "--heads", "8", "--key-heads", "2", "--head-dim", str(head_dim)]
        assert [program["mosaic_kernels"] for program in self.programs(*shape, "--mass", "absolute")] == [1, 3]

    def test_on_a_mesh_nothing_is_gathered(self):
        axes = ["--topology", "v5e:2x4", "--data", "2", "--fsdp", "2", "--tensor", "2"]
        shape = ["--length", "512", "--heads", "8", "--key-heads", "2"]
        for program in self.programs(*axes, *shape, "--mass", "absolute"):
            assert program["mosaic_kernels"] == (1 if program["program"] == "forward" else 3), program
            assert set(program["collectives"]) <= {"all-reduce"}, program  # of the state's gradients
