"""What is handed to tokamax and what is made of its answer: by a stand-in, and by the package itself where it is installed.

The package's kernels want a GPU; its operator in plain XLA has the same signature, residuals and arguments of a backward.
Tolerance in float32: 1e-5 of the largest entry.
"""

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import flash
from ntk_prefix.attention import attention_with_lse, ntk_attention, softmax_attention

LOWEST = float(np.finfo(np.float32).min)


class CausalMask(NamedTuple):
    offset: int
    window_size: int | None


class Mask:
    def __init__(self, bool_mask, *, causal_mask):
        self.bool_mask, self.causal_mask = bool_mask, causal_mask


class Operator:
    """tokamax's attention with residuals (maximum, denominator), and its backward that takes them."""

    def bind(self, *args, **options):
        return SimpleNamespace(args=args, kwargs={**options, "return_residuals": False})

    def scores(self, query, key, logits_scale, logits_soft_cap, bias, mask):
        scores = logits_scale * jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, query.shape[2] // key.shape[2], 2))
        scores = scores if bias is None else scores + bias
        scores = scores if logits_soft_cap is None else logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
        scores = scores if mask.bool_mask is None else jnp.where(mask.bool_mask, scores, LOWEST)
        if mask.causal_mask is not None:
            offset, size = mask.causal_mask
            seen = jnp.tri(*scores.shape[2:], offset, dtype=bool)
            if size is not None:
                seen &= ~jnp.tri(*scores.shape[2:], offset - size, dtype=bool)
            scores = jnp.where(seen[None, None], scores, LOWEST)
        return scores

    def __call__(self, query, key, value, *, return_residuals, **options):
        assert return_residuals
        scores = self.scores(query, key, **options)
        maximum = scores.max(-1)
        weights = jnp.exp(scores - maximum[..., None])
        above = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, query.shape[2] // value.shape[2], 2))
        return above / weights.sum(-1).transpose(0, 2, 1)[..., None], (maximum, weights.sum(-1))

    def vjp(self, residuals, out, dout, query, key, value, **options):
        maximum, denominator = residuals
        bias, static = options["bias"], {name: options[name] for name in ("mask", "logits_scale", "logits_soft_cap")}
        scores, pull = jax.vjp(lambda q, k, b: self.scores(q, k, bias=b, **static), query, key, bias)
        weights = jnp.exp(scores - maximum[..., None]) / denominator[..., None]
        groups = query.shape[2] // value.shape[2]
        d_weights = jnp.einsum("btnh,bsnh->bnts", dout, jnp.repeat(value, groups, 2))
        d_scores = weights * (d_weights - (out * dout).sum(-1).transpose(0, 2, 1)[..., None])
        d_value = jnp.einsum("bnts,btnh->bsnh", weights, dout)
        d_value = d_value.reshape(*d_value.shape[:2], value.shape[2], groups, -1).sum(3)
        d_query, d_key, d_bias = pull(d_scores)
        return {"q": d_query, "k": d_key, "v": d_value, "bias": d_bias}


@pytest.fixture(params=["stand-in", "package"])
def operator(request, monkeypatch):
    if request.param == "package":
        if importlib.util.find_spec("tokamax") is None:
            pytest.skip("tokamax is not installed: it wants Python 3.12 and JAX 0.11.1")
        from tokamax._src.ops.attention import base

        made = base.DotProductAttention(vjp=base.DotProductAttentionVjp())
    else:
        made = Operator()
        name = "tokamax._src.ops.attention"
        module = ModuleType(name)
        module.base = SimpleNamespace(CausalMask=CausalMask, Mask=Mask)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash.tokamax, "_operator", lambda: made)
    monkeypatch.setitem(flash.BACKENDS, "tokamax", flash.BACKENDS["tokamax"]._replace(platform=None))
    return made


def arrays(queries=7, keys=9):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)  # noqa: E731
    a = dict(query=normal(2, queries, 4, 8), key=normal(2, keys, 2, 8), value=normal(2, keys, 2, 8))
    return a | {"z": normal(4, 8, 8), "k": abs(normal(4, 8)), "bias": normal(1, 4, queries, keys)}


def worst(got, wanted):
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)), got, wanted)
    return max(jax.tree.leaves(errors))


@pytest.mark.filterwarnings("ignore:core.Jaxpr is missing a DebugInfo object:DeprecationWarning")  # tokamax's own
@pytest.mark.parametrize("x64", [False], indirect=True)
@pytest.mark.parametrize("place", [{}, {"query_offset": 2}, {"local_window_size": 2, "logits_soft_cap": 1.5}])
def test_gradients_with_the_log_sum_exp_in_the_loss(x64, operator, place):
    """Grouped heads, a bias or a cap, a mask that leaves one row without a key; causal, from an offset, in a window."""
    mask = jnp.ones((1, 1, 7, 9), bool).at[:, :, 3].set(False)

    def loss(implementation, a):
        options = dict(mask=mask, is_causal=True, implementation=implementation, **place)
        a = a | ({"bias": None} if "logits_soft_cap" in place else {})
        if isinstance(operator, Operator):
            x = ntk_attention(**a, **options)
        else:  # its backward in XLA is right for rows that sum to 1 alone: merged statistics are for its kernels
            y = softmax_attention(a["query"], a["key"], a["value"], bias=a["bias"], **options)
            return jnp.sum(jnp.sin(3 * y)) + 0 * jnp.sum(a["z"]) + 0 * jnp.sum(a["k"]), (y, y)
        own = {name: a[name] for name in ("key", "value", "bias")}
        y, lse = attention_with_lse(jnp.sin(x), **own, **options)
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(3 * y)) + jnp.sum(jnp.cos(3 * lse)), (y, lse)

    def run(implementation):
        return jax.jit(jax.grad(functools.partial(loss, implementation), has_aux=True))(arrays())

    assert worst(run("tokamax"), run("reference")) <= 1e-5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"is_causal": True, "query_offset": jnp.int32(1)}, "tokamax takes a query_offset that is known"),
        ({"local_window_size": (2, 1)}, "tokamax takes windows to the left only"),
        ({"logits_soft_cap": 3.0, "bias": jnp.ones((1, 1, 5, 5))}, "tokamax caps scores with their bias"),
        ({}, "tokamax's kernels|expected this package, got none of that name|runs on a GPU, and this is a CPU"),
    ],
)
@pytest.mark.parametrize("platform", ["gpu", None])
def test_what_it_cannot_take_and_that_it_is_not_there_is_named(
    without_annotations, monkeypatch, options, why, platform
):
    monkeypatch.setitem(flash.BACKENDS, "tokamax", flash.BACKENDS["tokamax"]._replace(platform=platform))
    ones = jnp.ones((1, 5, 2, 8))
    with pytest.raises(ValueError, match=f"{why}|runs on a GPU" if platform else why):
        softmax_attention(ones, ones, ones, **options, implementation="tokamax")


def test_nobody_gets_it_who_has_not_named_it(operator, caplog):
    """Though it comes before xla, would run here and takes these arguments."""
    a = arrays()
    with caplog.at_level("INFO", logger="ntk_prefix"):
        softmax_attention(a["query"], a["key"], a["value"])
    assert flash.BACKENDS["tokamax"].not_here(a["query"]) is None
    assert "attention runs on xla" in caplog.text
    assert "where they are named" in caplog.text
