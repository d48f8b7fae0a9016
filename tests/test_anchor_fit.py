"""Anchors for a prefix: what is chosen, how a budget is divided, and what the descent makes of it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import PrefixState, anchor_fit
from ntk_prefix.anchor_budget import divide, steps_for
from ntk_prefix.anchor_fit import choose, descend, fit_chosen
from ntk_prefix.checks import NonFiniteError, UsageError
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.query_shares import Rows, around, outputs, rows_of

BATCH, LENGTH, HEADS, KEY_HEADS, DIM, TOKENS = 3, 20, 4, 2, 8, 24
ROOT = DIM**-0.25


def drawn(kinds: int = TOKENS, size: float = 1.0) -> tuple[jax.Array, ...]:
    """Queries, a prefix of so many different tokens, and the queries' own keys and values."""
    draw = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(draw.normal(size=(BATCH, LENGTH, n, DIM)) * scale)
        for n, scale in ((HEADS, size), (KEY_HEADS, 1.0), (KEY_HEADS, 1.0))
    )
    again = np.arange(TOKENS) % kinds
    prefix_key, prefix_value = (jnp.asarray(draw.normal(size=(kinds, KEY_HEADS, DIM))[again]) for _ in range(2))
    return query, prefix_key, prefix_value, key, value


def of_heads(prefix_value: jax.Array) -> jax.Array:
    return jnp.swapaxes(prefix_value, 0, 1)


def scaled(prefix_key: jax.Array) -> jax.Array:
    return jnp.swapaxes(prefix_key, 0, 1) * ROOT


def test_rows_are_the_shares_of_the_exact_attention() -> None:
    query, prefix_key, prefix_value, key, value = drawn()
    rows = rows_of(*drawn(), is_causal=True)
    # head 3 meets key head 1; rows of a key head stand as [B, T, group]
    b, t, head = 1, 7, 3
    q, keys, values = query[b, t, head] / DIM**0.5, key[b, : t + 1, 1], value[b, : t + 1, 1]
    own, prefix = jnp.exp(keys @ q), jnp.exp(prefix_key[:, 1] @ q)
    total = own.sum() + prefix.sum()
    at = (b * LENGTH + t) * (HEADS // KEY_HEADS) + head % 2
    np.testing.assert_allclose(rows.query[1, at], query[b, t, head] * ROOT, rtol=1e-12)
    np.testing.assert_allclose(rows.log_total[1, at], jnp.log(total), rtol=1e-12)
    np.testing.assert_allclose(rows.mass[1, at], prefix.sum() / total, rtol=1e-12)
    np.testing.assert_allclose(rows.own[1, at], own @ values / own.sum(), rtol=1e-11)
    np.testing.assert_allclose(rows.log_own[1, at], jnp.log(own.sum() / total), rtol=1e-11)
    np.testing.assert_allclose(rows.part[1, at], prefix @ prefix_value[:, 1] / total, rtol=1e-11)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_queries_around_those_seen_are_answered_by_the_prefix(cap: float | None) -> None:
    """Alone they are what the exact attention makes of them; with keys of their own their share of these stays."""
    query, prefix_key, prefix_value, *own = drawn()
    places = scaled(prefix_key), of_heads(prefix_value)
    some: dict[str, Any] = {"spread": 0.5, "logits_soft_cap": cap}
    alone = rows_of(query, prefix_key, prefix_value, logits_soft_cap=cap)
    count = alone.query.shape[1] + 7
    found = around(alone, *places, count, jax.random.key(0), **some)
    apart = np.abs(found.query - alone.query[:, np.arange(count) % alone.query.shape[1]]).max(axis=(0, 2))
    assert np.mean(apart > 0) > 0.9  # two that are drawn may be one
    for head in range(KEY_HEADS):
        asked = found.query[head][None, :, None] / ROOT
        exact = rows_of(asked, prefix_key[:, [head]], prefix_value[:, [head]], logits_soft_cap=cap)
        for name in ("log_total", "part", "mass"):
            np.testing.assert_allclose(getattr(found, name)[head], getattr(exact, name)[0], rtol=1e-11, atol=1e-14)
    rows = rows_of(query, prefix_key, prefix_value, *own, is_causal=True, logits_soft_cap=cap)
    found = around(rows, *places, count, jax.random.key(0), **some)
    again = np.arange(count) % rows.query.shape[1]
    for name in ("own", "log_own", "mass"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name)[:, again])
    same = around(rows, *places, count, jax.random.key(0), spread=0.0, logits_soft_cap=cap)
    for x, y in zip(same, rows.take(again), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-14)


def test_queries_around_those_seen_spread_as_those_do() -> None:
    """Their covariance is 1 + s^2 times that of the queries, in every direction."""
    query, prefix_key, prefix_value, *own = drawn()
    query = query * jnp.linspace(0.1, 2.0, DIM).reshape(1, 1, 1, DIM)
    rows = rows_of(query, prefix_key, prefix_value, *own)
    found = around(rows, scaled(prefix_key), of_heads(prefix_value), 60_000, jax.random.key(1), spread=0.7)
    for seen, more in zip(rows.query, found.query, strict=True):
        # 60,000 draws: a variance is known to one part in 170
        np.testing.assert_allclose(np.cov(more.T), 1.49 * np.cov(seen.T), atol=0.02 * np.cov(seen.T).max())


def test_of_a_prefix_that_is_not_seen_queries_around_are_finite() -> None:
    query, prefix_key, prefix_value, *own = (x.astype(jnp.float32) for x in drawn())
    query = query.at[..., 0].set(1.0)
    prefix_key = prefix_key.at[..., 0].add(-1e3)
    rows = rows_of(query, prefix_key, prefix_value, *own)
    assert not np.any(rows.mass)
    found = around(rows, scaled(prefix_key), of_heads(prefix_value), 100, jax.random.key(0), spread=0.3)
    assert all(np.isfinite(x).all() for x in found)
    assert not np.any(found.part)


def test_other_queries_lose_less_when_queries_around_those_seen_are_fitted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries, many anchors: without them the fit is better on the queries seen, and worse on others."""
    query, prefix_key, prefix_value, *own = drawn()
    places = scaled(prefix_key), of_heads(prefix_value)
    rows = rows_of(query, prefix_key, prefix_value, *own, is_causal=True)
    seen, others = rows.take(slice(0, 40)), rows.take(slice(80, None))
    tokens = choose(seen, places[0], 10).tokens

    def lost(around: int, enough: int = 10_000, few: int = 9) -> tuple[np.ndarray, np.ndarray]:
        for name, value in (("AROUND", around), ("ENOUGH", enough), ("FEW", few)):
            monkeypatch.setattr(anchor_fit, name, value)
        fit = fit_chosen(seen, *places, tokens, np.array([10, 10]), steps=100)
        found = outputs(others, fit.z, fit.k, Anchors(fit.points))
        return np.asarray(fit.after), np.sum((found - others.target) ** 2, axis=(1, 2)) / others.size

    without, with_them = lost(0), lost(4)
    assert np.all(with_them[0] > without[0])
    assert np.all(with_them[1] < 0.9 * without[1])
    np.testing.assert_array_equal(lost(4, enough=40), without)  # so many are enough
    np.testing.assert_array_equal(lost(4, few=10), without)  # so few anchors do without


def test_a_prefix_of_four_kinds_of_tokens_is_four_anchors() -> None:
    """And nothing is left of the error; with three there is."""
    rows, prefix_key = rows_of(*drawn(kinds=4), is_causal=True), drawn(kinds=4)[1]
    chosen = choose(rows, scaled(prefix_key), 8)
    assert np.all(np.diff(chosen.left) <= 0)
    assert np.all(chosen.useful == 4)
    assert all(len({token % 4 for token in tokens[:4]}) == 4 for tokens in chosen.tokens)
    left = chosen.left / chosen.left[:, :1]
    assert np.all(left[:, 4] < 1e-6)
    assert np.all(left[:, 3] > 1e-4)


def test_the_state_of_these_anchors_is_the_prefix() -> None:
    query, prefix_key, prefix_value, key, value = drawn(kinds=4)
    rows = rows_of(query, prefix_key, prefix_value, key, value, is_causal=True)
    start = scaled(prefix_key)[:, :4]
    fit = descend(rows, start, jnp.ones((KEY_HEADS, 4), bool), steps=0)
    state = PrefixState(fit.z, fit.k, Anchors(fit.points))
    # the ridge leaves a part of about RIDGE, the masses' multiplicative steps are not at their end
    assert np.all(state.error(query, prefix_key, prefix_value, key, value, is_causal=True) < 1e-2)
    np.testing.assert_allclose(fit.k, TOKENS / 4, rtol=0.2)
    fewer = descend(rows, start[:, :2], jnp.ones((KEY_HEADS, 2), bool), steps=0)
    state = PrefixState(fewer.z, fewer.k, Anchors(fewer.points))
    assert np.all(state.error(query, prefix_key, prefix_value, key, value, is_causal=True) > 2e-2)


@pytest.mark.parametrize(("size", "cap"), [(1.0, None), (300.0, None), (5.0, 2.0)])
def test_descent_moves_points_to_where_less_is_lost(size: float, cap: float | None) -> None:
    """Scores are up to a few thousand at the larger size; sums of their exponentials are in no float."""
    layer: dict[str, Any] = {"is_causal": True, "logits_soft_cap": cap}
    query, prefix_key, *others = drawn(size=size)
    if size > 100:
        assert jnp.max(jnp.einsum("btnh,mnh->btnm", query[:, :, ::2], prefix_key)) * DIM**-0.5 > 1e3
    rows = rows_of(query, prefix_key, *others, **layer)
    tokens = choose(rows, scaled(prefix_key), 6, logits_soft_cap=cap).tokens
    start = jnp.take_along_axis(scaled(prefix_key), jnp.asarray(tokens)[..., None], axis=1)
    valid = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2])
    fit = descend(rows, start, valid, steps=40, logits_soft_cap=cap)
    assert all(np.isfinite(x).all() for x in fit)
    assert np.all(fit.k >= 0)
    assert np.all(fit.after <= fit.before)
    if size < 100:
        assert np.all(fit.after < (0.8 if cap is None else 0.9) * fit.before)
    for x in (fit.points, fit.z, fit.k):
        assert np.all(np.asarray(x)[1, 4:] == 0)
    # what is reported is what the state does
    state = PrefixState(fit.z, fit.k, Anchors(fit.points, cap))
    output = state.attend(query, others[1], others[2], **layer)
    exact = rows.target.reshape(KEY_HEADS, BATCH, LENGTH, 2, DIM).transpose(1, 2, 0, 3, 4).reshape(query.shape)
    lost = jnp.sum((output - exact) ** 2, axis=(0, 1, 3)).reshape(KEY_HEADS, 2).sum(axis=1)
    np.testing.assert_allclose(lost / jnp.sum(rows.part**2, axis=(1, 2)), fit.after, rtol=1e-3, atol=1e-12)


def test_a_descent_in_batches_sees_all_queries() -> None:
    """On two batches in turn it comes to 0.61 and 0.59 of the error at the start; on the first alone to 0.81 and 0.71."""
    query, prefix_key, *others = drawn()
    rows = rows_of(query, prefix_key, *others, is_causal=True)
    tokens = choose(rows, scaled(prefix_key), 6).tokens
    start = jnp.take_along_axis(scaled(prefix_key), jnp.asarray(tokens)[..., None], axis=1)
    fit = descend(rows, start, jnp.ones((KEY_HEADS, 6), bool), steps=100, batch=24)
    assert np.all(fit.after < 0.65 * fit.before)


def test_a_budget_goes_to_where_it_lowers_the_sum_most() -> None:
    """Equal to trying all divisions, for convex curves; of curves that are not, their envelopes are descended."""
    curves = np.array([[9.0, 4, 2, 1.5, 1.4], [3, 2.5, 2.2, 2, 2], [5, 1, 0.5, 0.5, 0.5]])
    for total in range(9):
        counts = divide(curves, total)
        assert counts.sum() <= total
        best = min(
            sum(curve[n] for curve, n in zip(curves, tried, strict=True))
            for tried in itertools.product(range(5), repeat=3)
            if sum(tried) <= total
        )
        assert sum(curve[n] for curve, n in zip(curves, counts, strict=True)) == pytest.approx(best)
    assert list(divide(curves, 100)) == [4, 3, 2]
    late = np.array([[4.0, 4, 4, 0], [3, 2, 1, 0.5]])
    assert list(divide(late, 3)) == [3, 0]


def test_heads_of_little_error_take_a_third_of_the_steps() -> None:
    errors = np.array([0.02, 5.0, 0.0, 0.5, 3.0, 0.3])  # of which the least three are 3.6 %, the least four 9 %
    assert list(steps_for(errors, 300)) == [100, 300, 100, 300, 300, 100]
    assert list(steps_for(np.full(4, 7.0), 10)) == [10] * 4  # the control: none has little
    assert list(steps_for(errors, 0)) == [0] * 6
    assert list(steps_for(np.zeros(2), 300)) == [100] * 2


def test_heads_take_steps_of_their_own() -> None:
    query, prefix_key, prefix_value, *own = drawn()
    rows = rows_of(query, prefix_key, prefix_value, *own, is_causal=True)
    keys, values = scaled(prefix_key), of_heads(prefix_value)
    tokens, anchors = choose(rows, keys, 6).tokens, np.array([6, 6])

    def fit(steps: int | np.ndarray) -> jax.Array:
        return fit_chosen(rows, keys, values, tokens, anchors, steps=steps).points

    both = fit(np.array([5, 40]))
    np.testing.assert_array_equal(both[0], fit(5)[0])
    np.testing.assert_array_equal(both[1], fit(40)[1])
    assert np.abs(both[1] - fit(5)[1]).max() > 1e-3


def test_a_head_with_fewer_anchors_is_filled_up_where_nothing_is_hidden() -> None:
    """With its last point, of mass 0: at the origin a score could be the largest by far, and its unit that of the row."""
    query, prefix_key, prefix_value, *own = drawn()
    rows, keys = rows_of(query, prefix_key, prefix_value, *own, is_causal=True), scaled(prefix_key)
    fit = fit_chosen(rows, keys, of_heads(prefix_value), choose(rows, keys, 6).tokens, np.array([6, 4]), steps=5)
    np.testing.assert_array_equal(fit.points[1, 4:], np.repeat(fit.points[1, 3:4], 2, axis=0))
    assert not np.any(fit.k[1, 4:])
    assert not np.any(fit.z[1, 4:])
    assert np.all(np.asarray(fit.k)[1, :4] > 0)


def test_the_unit_of_values_chooses_nothing() -> None:
    """Output and denominator count alike, in whatever unit the output is."""
    query, prefix_key, prefix_value, key, value = drawn()
    chosen, other = (
        choose(
            rows_of(query, prefix_key, unit * prefix_value, key, unit * value, is_causal=True), scaled(prefix_key), 6
        )
        for unit in (1.0, 1e3)
    )
    np.testing.assert_array_equal(chosen.tokens, other.tokens)
    np.testing.assert_allclose(1e6 * chosen.left, other.left, rtol=1e-8)


def test_values_of_zero_are_a_prefix_too() -> None:
    """Their mass takes from what the queries' own keys give."""
    query, prefix_key, prefix_value, *own = drawn()
    rows = rows_of(query, prefix_key, 0 * prefix_value, *own, is_causal=True)
    chosen = choose(rows, scaled(prefix_key), 6)
    assert np.all(chosen.useful == 6)
    assert np.all(chosen.left[:, 6] < 0.1 * chosen.left[:, 0])


def test_a_prefix_that_no_query_finds_gets_no_anchor_and_errors_stay_finite() -> None:
    """Its share is below e^-200, whose square no float32 has; the queries' own keys are all there is."""
    query, prefix_key, prefix_value, key, value = (x.astype(jnp.float32) for x in drawn())
    query = query.at[..., 0].set(1.0)
    rows = rows_of(query, prefix_key.at[..., 0].add(-1e3), prefix_value, key, value, is_causal=True)
    chosen = choose(rows, scaled(prefix_key), 6)
    assert not chosen.useful.any()
    fit = fit_chosen(rows, scaled(prefix_key), of_heads(prefix_value), chosen.tokens, chosen.useful)
    assert not np.any(fit.k)
    for error in (fit.before, fit.after):
        np.testing.assert_array_equal(error, 0)
    # the control: where the prefix counts, leaving it out is an error, the one that the outputs have
    rows = rows_of(query, prefix_key, prefix_value, key, value, is_causal=True)
    fit = fit_chosen(rows, scaled(prefix_key), of_heads(prefix_value), chosen.tokens, chosen.useful)
    found = outputs(rows, fit.z, fit.k, Anchors(fit.points))
    lost = jnp.sum((found - rows.target) ** 2, axis=(1, 2)) / jnp.sum(rows.part**2, axis=(1, 2))
    np.testing.assert_allclose(fit.after, lost, rtol=1e-5)
    assert np.all(fit.after > 0.1)


def test_outputs_are_those_of_attention_however_large_or_small_a_state_is_beside_the_keys() -> None:
    query, prefix_key, prefix_value, key, value = (x.astype(jnp.float32) for x in drawn())
    query = query.at[..., 0].set(1.0)
    rows = rows_of(query, prefix_key, prefix_value, key, value, is_causal=True)
    z, k = jnp.swapaxes(prefix_value, 0, 1), jnp.ones((KEY_HEADS, TOKENS), jnp.float32)
    for shift in (0.0, 400.0, -400.0):
        phi = Anchors(scaled(prefix_key).at[..., 0].add(shift))
        exact = PrefixState(z, k, phi).attend(query, key, value, is_causal=True)
        exact = exact.reshape(BATCH, LENGTH, KEY_HEADS, -1, DIM).transpose(2, 0, 1, 3, 4).reshape(rows.own.shape)
        np.testing.assert_allclose(outputs(rows, z, k, phi), exact, atol=2e-5)


def test_what_is_not_finite_is_refused() -> None:
    query, prefix_key, *others = drawn()
    rows = rows_of(query, prefix_key.at[0, 0, 0].set(jnp.nan), *others, is_causal=True)
    with pytest.raises(NonFiniteError, match="numbers whose squares are finite, got others"):
        choose(rows, scaled(prefix_key), 6)
    tokens, anchors = np.tile(np.arange(6), (KEY_HEADS, 1)), np.full(KEY_HEADS, 6)
    with pytest.raises(NonFiniteError, match="numbers whose anchors are finite, got others"):
        fit_chosen(rows, scaled(prefix_key).at[0, 0, 0].set(jnp.nan), of_heads(others[0]), tokens, anchors, steps=1)


def test_fewer_queries_than_anchors_are_refused() -> None:
    rows = rows_of(*drawn())
    few = Rows(*(x[:, :3] for x in rows))
    with pytest.raises(UsageError, match="at least 4 queries for as many anchors, got 3"):
        descend(few, jnp.zeros((KEY_HEADS, 4, DIM)), jnp.ones((KEY_HEADS, 4), bool))
