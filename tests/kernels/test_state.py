"""The kernel of a trained state is the Gram matrix of the operator's own derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import LowRank, PrefixState, ntk_attention
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Anchors, FeatureMap, feature_map
from ntk_prefix.kernels import state_ntk
from ntk_prefix.kernels.state import shares_of_state

B, T, S, N, H = 2, 3, 4, 2, 3


def drawn(phi: FeatureMap, states: int, scale: float = 1.0) -> tuple[Any, ...]:
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.normal(size=shape)) for shape in ((B, T, N, H), (B, S, 1, H), (B, S, 1, H)))
    features = phi.dim(H)
    z = jnp.asarray(draw.normal(size=(states, features, H)))
    k = jnp.asarray(draw.uniform(0.1, 1, size=(states, features)))
    return scale * query, scale * key, value, PrefixState(z, k, phi)


def by_autodiff(query: Any, key: Any, value: Any, state: PrefixState, mask: Any, trained: str) -> np.ndarray:
    def said(z: Any, k: Any) -> Any:
        out = ntk_attention(
            query, key, value, z, k, feature_map=state.feature_map, mask=mask, implementation="reference"
        )
        return out.transpose(2, 0, 1, 3).reshape(len(k), -1, H)

    jacobians = jax.jacrev(said, (0, 1))(state.z, state.k)
    chosen = {"both": jacobians, "z": jacobians[:1], "k": jacobians[1:]}[trained]
    states = len(state.k)
    flat = [np.asarray(x).reshape(*x.shape[:3], states, -1) for x in chosen]
    rows = np.concatenate([np.stack([x[j, :, :, j] for j in range(states)]) for x in flat], axis=-1)
    return np.einsum("jiap,jlbp->jialb", rows, rows)


@pytest.mark.parametrize("trained", ["both", "z", "k"])
@pytest.mark.parametrize(
    ("phi", "states"),
    [(feature_map("elu1"), 2), (Anchors(jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, H)))), 1)],
    ids=["elu1", "anchors shared by heads"],
)
def test_the_closed_form_is_the_operators_derivative(phi: FeatureMap, states: int, trained: Any) -> None:
    query, key, value, state = drawn(phi, states)
    mask = jnp.asarray(np.random.default_rng(2).random((B, 1, T, S)) < 0.7).at[..., 0].set(True)
    found = np.asarray(state_ntk(query, key, value, state, trained=trained, mask=mask))
    expected = by_autodiff(query, key, value, state, mask, trained)
    assert found.shape == (states, N // states * B * T, H, N // states * B * T, H)
    np.testing.assert_allclose(found, expected, atol=1e-13 * np.abs(expected).max())


def test_large_scores_are_safe() -> None:
    points = 300 * np.random.default_rng(1).normal(size=(1, 5, H))
    query, key, value, state = drawn(Anchors(jnp.asarray(points)), 1, scale=30.0)
    shares = np.asarray(shares_of_state(query, key, value, state)) @ np.diag(np.asarray(state.k)[0])
    # scores of anchors are thousands, above those of keys for some queries and below for others: all or nothing is theirs
    assert np.abs(np.asarray(query)).max() * np.abs(points).max() > 1e4
    np.testing.assert_allclose(shares.sum(-1), np.round(shares.sum(-1)), atol=1e-9)
    assert 0 < shares.sum(-1).mean() < 1
    assert np.isfinite(np.asarray(state_ntk(query, key, value, state))).all()


@pytest.mark.usefixtures("without_annotations")
def test_what_has_no_such_kernel_is_refused() -> None:
    query, key, value, state = drawn(feature_map("elu1"), 2)
    wrong: Any = "values"
    with pytest.raises(UsageError, match='expected "both", "z" or "k"'):
        state_ntk(query, key, value, state, trained=wrong)
    low = PrefixState(LowRank(state.z[..., :1], state.z[:, :1]), state.k, state.feature_map)
    with pytest.raises(UsageError, match="low rank"):
        state_ntk(query, key, value, low)
