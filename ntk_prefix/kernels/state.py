r"""The kernel of what is trained in practice: a state (Z, k) beside a query's own keys.

With ``D_i = sum_s e^{s_is} + phi_i . k`` and ``T_i`` what the head says, ``dT_ia / dZ_rb = delta_ab phi_ir / D_i`` and
``dT_ia / dk_r = -T_ia phi_ir / D_i``. Hence

.. math::  \Theta_{(ia),(jb)} = \frac{\phi_i \cdot \phi_j}{D_i D_j} \, (\delta_{ab} + T_{ia} T_{jb}) ,

where the first term is Z's and the second k's. What follows from it for training is theory/state.md.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from ntk_prefix.attention import LowRank, attention_with_lse, ntk_attention
from ntk_prefix.checks import expected
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.typing import Array, Bool, Float

__all__ = ["shares_of_state", "state_ntk"]


def state_ntk(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: PrefixState,
    *,
    trained: Literal["both", "z", "k"] = "both",
    mask: Bool[Array, "#B #N #T #S"] | None = None,
) -> Float[Array, "J n H n H"]:
    """Return the NTK of a state's Z and k at some queries, in closed form: for each state, of the heads that share it.

    Args:
        query, key, value, mask: as in :func:`~ntk_prefix.ntk_attention`, whose derivative this is of.
        state: absolute, not of low rank; J states, each shared by N // J query heads.
        trained: "z" leaves k where it is, "k" the reverse.

    Returns:
        [J, n, H, n, H] with n = N // J * B * T, heads first, then rows, then tokens: ``reshape(J, n * H, n * H)`` are Gram
        matrices. In float64 for float64 inputs, otherwise in float32.

    Raises:
        UsageError: a state of low rank, or a name that is none of the three.

    Numerics: in log space, so scores of any finite size are safe; 0 for a query that sees no key while k is 0,
    as its output is.

    Source: derived, theory/state.md.
    """
    if trained not in ("both", "z", "k"):
        raise expected("trained", '"both", "z" or "k"', repr(trained))
    shares = shares_of_state(query, key, value, state, mask=mask)
    states, heads = len(shares), query.shape[2]
    kernel = jnp.einsum("jir,jlr->jil", shares, shares)[:, :, None, :, None]
    said = ntk_attention(
        query, key, value, state.z, state.k, feature_map=state.feature_map, mask=mask, scale=state.scale
    )
    said = said.transpose(2, 0, 1, 3).reshape(states, heads // states * said.shape[0] * said.shape[1], -1)
    of_z = kernel * jnp.eye(said.shape[-1])[None, None, :, None]
    of_k = kernel * said[:, :, :, None, None] * said[:, None, None]
    return {"z": of_z, "k": of_k, "both": of_z + of_k}[trained]


def shares_of_state(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: PrefixState,
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
) -> Float[Array, "J n R"]:
    """Return ``phi_i / D_i``, the features as shares of what a query's sum is divided by: see :func:`state_ntk`."""
    if isinstance(state.z, LowRank):
        raise expected("state", "a Z that is one array", "a Z of low rank")
    _, own = attention_with_lse(query, key, value, mask=mask, scale=state.scale)
    scale = query.shape[-1] ** -0.5 if state.scale is None else state.scale
    features, log_unit = state.feature_map.per_head(query.transpose(0, 2, 1, 3) * scale**0.5)
    batch, heads, length, size = features.shape
    states = len(state.k)
    by_state = features.reshape(batch, states, -1, size)
    mass = jnp.maximum(jnp.einsum("bjtr,jr->bjt", by_state, state.k), 0).reshape(batch, heads, length)
    unit = jnp.zeros(()) if log_unit is None else log_unit
    log_mass = jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)) + unit, -jnp.inf)
    total = jnp.logaddexp(own.transpose(0, 2, 1), log_mass)
    seen = total > -jnp.inf  # a row without a key and without mass says 0, whatever Z is
    shares = jnp.where(seen[..., None], features * jnp.exp(unit - jnp.where(seen, total, 0))[..., None], 0)
    return shares.transpose(1, 0, 2, 3).reshape(states, heads // states * batch * length, size)
