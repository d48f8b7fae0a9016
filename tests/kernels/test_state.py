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


class TestConvergenceOfBoth:
    """The two rates that theory/state.md, section 4, is made of, where they are met: 1.5 times either would be false."""

    OWN, QUERY = 2.0, np.array([0.6, 0.8])

    def slopes(self, z: np.ndarray, k: np.ndarray, output: float, target: float) -> tuple[float, float, float]:
        """L, and the derivatives of L and of |theta|^2 along the gradient flow, of one query and one output."""

        def loss(z: jax.Array, k: jax.Array) -> jax.Array:
            said = (self.OWN * output + self.QUERY @ z) / (self.OWN + self.QUERY @ k)
            return (said - target) ** 2 / 2

        value, (by_z, by_k) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(z), jnp.asarray(k))
        falling = -float(jnp.sum(by_z**2) + jnp.sum(by_k**2))
        return float(value), falling, -2 * float(z @ by_z + k @ by_k)

    def test_the_loss_falls_at_the_slowest_where_the_state_weighs_as_much_as_the_keys(self) -> None:
        start = self.OWN * self.QUERY
        value, falling, _ = self.slopes(np.zeros(2), start, 0.0, 1e-3)
        alpha = 2 * (self.OWN**2 + float(start @ start))
        rate = 2 * 1.0 / alpha
        assert rate * value <= -falling * (1 + 1e-9) < 1.5 * rate * value

    def test_the_state_grows_at_the_fastest_halfway_to_the_target(self) -> None:
        halfway = self.OWN * 0.5 * self.QUERY
        _, _, growing = self.slopes(halfway, 1e-6 * self.QUERY, 0.0, 1.0)
        assert 0.5 / 1.5 < growing <= 0.5 * (1 + 1e-5)


def test_a_query_that_sees_nothing_has_no_kernel() -> None:
    rows = jnp.ones((1, 2, 1, 2))
    state = PrefixState(jnp.ones((1, 2, 2)), jnp.zeros((1, 2)), feature_map("elu1"))
    mask = jnp.array([[[[False, False], [True, True]]]])
    found = np.asarray(state_ntk(rows, rows, rows, state, mask=mask))[0]
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert found[1, :, 1].any()
