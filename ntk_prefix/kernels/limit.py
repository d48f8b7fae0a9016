"""The kernel of an infinitely long prefix, in closed form.

As m grows the attention mass of token r becomes an exponential tilt of its Gaussian,

    T_{ir} = m S_{ir} -> exp(w_r . x_i - sigma^2 |x_i|^2 / 2) ,

and the product of two tilts is e^{sigma^2 c} times the density of N(mu, sigma^2 I), with c = x_i . x_j and
mu = sigma^2 (x_i + x_j). So every kernel here is e^{sigma^2 c} times a second moment of that Gaussian. The finite
kernel approaches it as m^{-1/2} (claim ``limit``), and it is positive definite for distinct inputs (claim
``positivity``, proof in theory/README.md).
"""

from __future__ import annotations

import jax.numpy as jnp

from ntk_prefix.checks import check_array, check_finite, check_inputs, check_positive, expected
from ntk_prefix.kernels.closed_form import KernelPart
from ntk_prefix.random_prefix import ModelName, variant_named
from ntk_prefix.typing import Array, Float, Inputs, Kernel, OtherInputs

__all__ = ["limit_ntk", "real_layer_limit_ntk"]


def limit_ntk(
    x1: Inputs,
    x2: OtherInputs | None = None,
    *,
    sigma: float = 1.0,
    model: ModelName = "tied",
    outputs: int | None = None,
    part: KernelPart = "full",
) -> Kernel:
    """Return the infinite-prefix kernel H* of a stylized prefix model: the limit of ``prefix_ntk`` as m grows.

        tied    H*_{(i,.),(j,.)} = e^{sigma^2 c} [ (1 + sigma^2 c) I + x_j mu^T + mu x_i^T + c mu mu^T ]
        fixed   H*_{(i,.),(j,.)} = c e^{sigma^2 c} I

    with c = x_i . x_j and mu = sigma^2 (x_i + x_j); rows are outputs of x_i, columns outputs of x_j.

    Args:
        x1: [n1, d] inputs, finite.
        x2: [n2, d] inputs; None means x1.
        sigma: standard deviation of a prefix token's coordinates at initialization.
        model: "tied" or "fixed", as in ``one_layer``.
        outputs: number of outputs of the fixed model; d if None.
        part: "full", or "key" for the x x^T part alone: c e^{sigma^2 c} (sigma^2 I + mu mu^T) for the tied model.

    Returns:
        [n1, d, n2, d] (outputs in place of d for the fixed model), in the inputs' dtype.

    Raises:
        ValueError: inputs that are not finite [n, d] of one width, sigma <= 0, an unknown model or part, a kernel that
            overflows.

    Source: derived here; the paper assumes the limit and has no formula for it.
    """
    x2 = x1 if x2 is None else x2
    check_inputs("x1", x1)
    check_inputs("x2", x2, features=x1.shape[1])
    sigma = _checked_sigma(sigma)
    if part not in ("full", "key"):
        raise expected("part", '"full" or "key"', repr(part))
    variant = variant_named(model)
    outputs = variant.outputs(x1.shape[1], outputs)
    inner = jnp.matmul(x1, x2.T)
    tilt = jnp.exp(sigma**2 * inner)
    identity = jnp.eye(outputs, dtype=inner.dtype)
    if not variant.has_value_part:
        return _checked(_outer(inner * tilt, identity))
    mean = sigma**2 * (x1[:, None] + x2[None])
    through_key = _outer(sigma**2 * inner, identity) + jnp.einsum("ij,ijk,ijl->ikjl", inner, mean, mean)
    if part == "key":
        return _checked(tilt[:, None, :, None] * through_key)
    mixed = jnp.einsum("jk,ijl->ikjl", x2, mean) + jnp.einsum("ijk,il->ikjl", mean, x1)
    return _checked(tilt[:, None, :, None] * (_outer(jnp.ones_like(inner), identity) + mixed + through_key))


def real_layer_limit_ntk(
    x1: Inputs,
    x2: OtherInputs | None = None,
    *,
    query_projection: Float[Array, "d d"],
    key_projection: Float[Array, "d d"],
    value_projection: Float[Array, "d d"],
    sigma: float = 1.0,
) -> Kernel:
    """Return the infinite-prefix kernel of ``PrefixAttentionLayer``: the limit of m times its NTK as m grows past L.

    Here values carry no signs: a token's value is W_V^T p and the output tends to the tilted mean, so the center does
    not vanish as it does in the stylized models. With u_i = W_K W_Q^T x_i / sqrt(d), A = W_V^T, c = u_i . u_j,

        lim m Theta = e^{sigma^2 c} [ (1 + sigma^2 c) A A^T + (2 sigma^2 + sigma^4 c) A u_j (A u_i)^T ]

    Args:
        x1, x2: [n1, d] and [n2, d] tokens that query the prefix; which sequence they stand in no longer matters.
        query_projection, key_projection, value_projection: W_Q, W_K, W_V, [d, d], applied from the right.
        sigma: standard deviation of the prefix at initialization.

    Returns:
        [n1, d, n2, d], in the inputs' dtype.

    Raises:
        ValueError: inputs that are not finite [n, d] of one width, sigma <= 0, a kernel that overflows.

    Source: derived here (theory/README.md); checked by the claim ``real_layer``.
    """
    x2 = x1 if x2 is None else x2
    check_inputs("x1", x1)
    check_inputs("x2", x2, features=x1.shape[1])
    sigma = _checked_sigma(sigma)
    width = x1.shape[1]
    for name, projection in (
        ("query_projection", query_projection),
        ("key_projection", key_projection),
        ("value_projection", value_projection),
    ):
        check_array(name, projection, width, width)
        check_finite(name, projection)
    effective = jnp.matmul(query_projection, key_projection.T) / jnp.sqrt(jnp.asarray(x1.shape[1], x1.dtype))
    u1, u2 = jnp.matmul(x1, effective), jnp.matmul(x2, effective)
    inner = jnp.matmul(u1, u2.T)
    pushed1, pushed2 = jnp.matmul(u1, value_projection), jnp.matmul(u2, value_projection)
    spread = jnp.matmul(value_projection.T, value_projection)
    bracket = _outer(1 + sigma**2 * inner, spread) + jnp.einsum(
        "ij,jk,il->ikjl", 2 * sigma**2 + sigma**4 * inner, pushed2, pushed1
    )
    return _checked(jnp.exp(sigma**2 * inner)[:, None, :, None] * bracket)


def _checked_sigma(sigma: float) -> float:
    check_positive("sigma", sigma)
    if sigma > 1e150:
        raise expected("sigma", "a number whose square float64 holds", sigma)
    return float(sigma)


def _checked(kernel: Kernel) -> Kernel:
    """Refuse a kernel whose exponentials overflowed: ``e^{sigma^2 c}`` does from c = 88 / sigma^2 on in float32."""
    check_finite("the kernel of inputs and a sigma so large", kernel)
    return kernel


def _outer(over_inputs: Float[Array, "n1 n2"], over_outputs: Float[Array, "d1 d2"]) -> Kernel:
    """Kronecker product in the layout [n1, d, n2, d]."""
    return jnp.einsum("ij,kl->ikjl", over_inputs, over_outputs)
