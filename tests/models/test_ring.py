"""A layer with a window and a soft cap, decoded token by token out of its ring, on every implementation that runs here.

Tolerance: 1e-5 of the largest number, tens of roundings in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import flash
from ntk_prefix.attention import softmax_attention
from ntk_prefix.models import AttentionCore, AttentionKind, AttentionLayer, KeyValueCache

WINDOW, LENGTH, CHUNKS = 4, 14, (6, 1, 6, 1)


class Core(AttentionCore):
    """Softmax attention by one implementation."""

    def __init__(self, implementation: str):
        self.implementation = implementation

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        return softmax_attention(query, key, value, implementation=self.implementation, **options)


@pytest.fixture(params=["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "splash"))])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "splash":
        monkeypatch.setattr(flash.splash, "INTERPRET", True)
        monkeypatch.setitem(flash.BACKENDS, "splash", flash.BACKENDS["splash"]._replace(platform=None))
        flash.splash._kernel.cache_clear()
    return request.param


def test_a_capped_layer_decodes_out_of_its_ring_as_it_reads_the_whole(implementation: str) -> None:
    """Chunks longer than the window and single tokens; one row is padded on the left."""

    def layer(cap: float | None, implementation: str) -> AttentionLayer:
        kind = AttentionKind(window=WINDOW, soft_cap=cap)
        made = AttentionLayer(16, 2, num_key_heads=1, head_dim=64, kind=kind, rngs=nnx.Rngs(0))
        made.query.kernel[...] *= 4  # scores beyond the cap
        made.core = Core(implementation)
        return made

    x = jax.random.normal(jax.random.key(1), (2, LENGTH, 16), jnp.float32)
    mask = jnp.arange(LENGTH)[None] >= jnp.asarray([[0], [2]])
    whole, _ = layer(1.5, "reference")(x, mask=mask[:, None, None], is_causal=True)
    uncapped, _ = layer(None, "reference")(x, mask=mask[:, None, None], is_causal=True)
    decoder = layer(1.5, implementation)
    step = nnx.jit(
        lambda layer, x, cache, start: layer(x, mask=mask[:, None, None], is_causal=True, cache=cache, start=start)
    )
    cache = KeyValueCache(*(jnp.zeros((2, WINDOW, 1, 64), jnp.float32) for _ in range(2)))
    pieces, start = [], 0
    for length in CHUNKS:
        piece, cache = step(decoder, x[:, start : start + length], cache, jnp.int32(start))
        pieces.append(piece)
        start += length
    found, real = np.concatenate(pieces, axis=1), np.asarray(mask)
    assert start == LENGTH
    largest = np.abs(whole[real]).max()
    np.testing.assert_allclose(found[real], whole[real], rtol=0, atol=1e-5 * largest)
    assert np.abs(found - uncapped)[real].max() > 1e-2 * largest  # the control
