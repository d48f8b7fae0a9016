"""One layer of prefix attention: the stylized model of the theory, and the real thing.

An infinitely long prefix drowns the L inputs of a sequence, so the theory keeps the prefix only. Each prefix token
r is one trainable row ``w_r``; a query x attends to all m of them,

    S(x) = softmax(W x) in R^m ,        T_r(x) = m S_r(x)   (of order one, whatever m is)

and two models differ in what a token carries as its value:

    tied    F_k(x) = sum_r T_r(x) a_r w_{r,k}      the prefix is key and, up to a fixed sign, value
    fixed   F_k(x) = sum_r T_r(x) a_{r,k}          the values are fixed signs, only the keys are trained

======================  ============================  ===========================================
here                    the papers                    shape
======================  ============================  ===========================================
``weights``             W, rows w_r                   [m, d]
``signs``               a, uniform in {-1, +1}        [m, d]; tied: one sign a row, so [m, 1]
``mass``                T = m S                       [n, m]
``center``              <a, S> (fixed), beta S (tied) [n, d]: the prefix's output over m
======================  ============================  ===========================================

Sources: the tied model has the form after Liang et al. (arXiv 2406.14036), constants not verified against the text;
 the fixed model is the softmax regression of arXiv 2405.03251; the gradients are derived here and checked by
``python -m theory gradients``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from ntk_prefix.checks import check_array, check_held, check_inputs, check_rngs, expected
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.random_prefix import FIXED, TIED, RandomPrefix, Variant
from ntk_prefix.typing import Array, Float, Inputs, Signs, Weights

__all__ = [
    "FixedValuePrefixModel",
    "Frozen",
    "PrefixAttentionLayer",
    "TiedPrefixModel",
    "attend",
    "attention_mass",
    "check_signs",
    "fixed_jacobian",
    "fixed_outputs",
    "tied_jacobian",
    "tied_outputs",
]


class Frozen(nnx.Variable):
    """An array that belongs to a model and is never trained: signs, projections."""


# ----------------------------------------------------------------------------------- Pure functions


def attention_mass(weights: Weights, inputs: Inputs) -> Float[Array, "n m"]:
    """Attention of every input on every prefix token, times m.

        T_{ir} = m softmax_r(w_r . x_i)

    Args:
        weights: prefix tokens w_r, [m, d].
        inputs: queries x_i, [n, d]; no 1/sqrt(d) is applied.

    Returns:
        T, [n, m], in the accumulation dtype (float32 at least). Rows sum to m.

    Raises:
        UsageError: shapes that do not fit, no token, scores beyond the dtype.

    Numerics: the maximum is subtracted and m enters as log m, so no finite scores give NaN.
    """
    check_array("weights", weights, "m", "d")
    if not weights.shape[0]:
        raise expected("weights", "at least one prefix token", "none")
    check_array("inputs", inputs, "n", weights.shape[1])
    dtype = accumulation_dtype(weights, inputs)
    scores = jnp.matmul(inputs.astype(dtype), weights.astype(dtype).T)
    normalizer = jax.nn.logsumexp(scores, axis=1, keepdims=True)
    mass = jnp.exp(scores - normalizer + math.log(weights.shape[0]))
    check_held("the scores w_r . x_i", mass)
    return mass


def tied_outputs(weights: Weights, signs: Float[Array, "m 1"], inputs: Inputs) -> Float[Array, "n d"]:
    """Return outputs of the tied model, ``F_k(x) = m sum_r S_r a_r w_{r,k}``: [n, d], in the inputs' dtype."""
    mass = attention_mass(weights, inputs)
    check_array("signs", signs, weights.shape[0], 1)
    return jnp.matmul(mass, (signs * weights).astype(mass.dtype)).astype(inputs.dtype)


def fixed_outputs(weights: Weights, signs: Signs, inputs: Inputs) -> Float[Array, "n o"]:
    """Return outputs of the fixed-value model, ``F_k(x) = m sum_r S_r a_{r,k}``: [n, outputs], in the inputs' dtype."""
    mass = attention_mass(weights, inputs)
    check_array("signs", signs, weights.shape[0], "outputs")
    return jnp.matmul(mass, signs.astype(mass.dtype)).astype(inputs.dtype)


def tied_jacobian(weights: Weights, signs: Float[Array, "m 1"], inputs: Inputs) -> Float[Array, "n d m d"]:
    """Return derivative of every output of the tied model by every prefix token, in closed form.

        dF_k(x) / dw_r = m S_r [ a_r e_k + (a_r w_{r,k} - sum_j S_j a_j w_{j,k}) x ]

    Args:
        weights, signs, inputs: as in ``tied_outputs``.

    Returns:
        [n, d, m, d]: input, output, token, coordinate of the token. It is dense: for small m only
        (``kernels.prefix_ntk`` never forms it).

    Source: derived; checked against autodiff and finite differences by the claim ``gradients``.
    """
    mass = attention_mass(weights, inputs)
    check_array("signs", signs, weights.shape[0], 1)
    values = (signs * weights).astype(mass.dtype)
    center = jnp.matmul(mass, values) / weights.shape[0]
    through_key = jnp.einsum("im,imk,ic->ikmc", mass, values[None] - center[:, None], inputs.astype(mass.dtype))
    through_value = jnp.einsum(
        "im,m,kc->ikmc", mass, signs[:, 0].astype(mass.dtype), jnp.eye(weights.shape[1], dtype=mass.dtype)
    )
    return through_key + through_value


def fixed_jacobian(weights: Weights, signs: Signs, inputs: Inputs) -> Float[Array, "n o m d"]:
    """Return derivative of every output of the fixed-value model by every prefix token, in closed form.

        dF_k(x) / dw_r = m S_r ( a_{r,k} - <a_k, S> ) x

    Returns:
        [n, outputs, m, d], dense, as ``tied_jacobian``.

    Source: derived; checked by the claim ``gradients``.
    """
    mass = attention_mass(weights, inputs)
    check_array("signs", signs, weights.shape[0], "outputs")
    signs = signs.astype(mass.dtype)
    center = jnp.matmul(mass, signs) / weights.shape[0]
    return jnp.einsum("im,imk,ic->ikmc", mass, signs[None] - center[:, None], inputs.astype(mass.dtype))


def attend(
    prefix: Float[Array, "m d"],
    inputs: Float[Array, "L d"],
    query_projection: Float[Array, "d d"],
    key_projection: Float[Array, "d d"],
    value_projection: Float[Array, "d d"],
) -> Float[Array, "L d"]:
    """Prefix attention of one sequence, with the inputs present.

        PrefixAttn(X, P) = softmax( X W_Q (S W_K)^T / sqrt(d) ) S W_V ,     S = [P; X]

    Args:
        prefix: P, [m, d], m >= 0.
        inputs: X, [L, d].
        query_projection, key_projection, value_projection: W_Q, W_K, W_V, [d, d]; applied from the right.

    Returns:
        [L, d], in the inputs' dtype; the softmax is accumulated in float32 at least.

    Source: Liang et al., arXiv 2406.14036 (read in the authors' public code).
    """
    check_array("inputs", inputs, "L", "d")
    width = inputs.shape[1]
    check_array("prefix", prefix, "m", width)
    for name, projection in (
        ("query_projection", query_projection),
        ("key_projection", key_projection),
        ("value_projection", value_projection),
    ):
        check_array(name, projection, width, width)
    dtype = accumulation_dtype(prefix, inputs)
    sequence = jnp.concatenate([prefix, inputs]).astype(dtype)
    queries = jnp.matmul(inputs.astype(dtype), query_projection.astype(dtype))
    keys = jnp.matmul(sequence, key_projection.astype(dtype))
    values = jnp.matmul(sequence, value_projection.astype(dtype))
    probabilities = jax.nn.softmax(jnp.matmul(queries, keys.T) / math.sqrt(inputs.shape[-1]), axis=-1)
    outputs = jnp.matmul(probabilities, values).astype(inputs.dtype)
    check_held("attention of scores and values so large", outputs)
    return outputs


# ------------------------------------------------------------------------------------------ Modules


class _PrefixOnlyModel(nnx.Module):
    """The shared start of the two stylized models: m trainable rows, fixed signs."""

    variant: ClassVar[Variant]

    def __init__(
        self,
        d: int,
        m: int,
        *,
        outputs: int | None = None,
        sigma: float,
        symmetric: bool,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ) -> None:
        check_rngs(rngs)
        prefix = RandomPrefix(
            key=rngs.params(),
            d=d,
            m=m,
            sigma=sigma,
            symmetric=symmetric,
            model=self.variant.name,
            outputs=outputs,
            dtype=dtype,
        )
        weights, signs = prefix.materialise()
        self.weights = nnx.Param(weights)
        self.signs = Frozen(signs)

    @property
    def m(self) -> int:
        """Number of prefix tokens."""
        return self.weights.shape[0]

    @property
    def output_width(self) -> int:
        """Number of outputs of the model."""
        return self.weights.shape[1] if self.variant.has_value_part else self.signs.shape[1]

    def token_gradient_norms(self, inputs: Inputs) -> Float[Array, "n m"]:
        """How strongly each token acts on each input: the Frobenius norm of dF(x_i)/dw_r, without forming it.

            tied    |J_ir|^2 = T_ir^2 ( d + 2 a_r g_ir . x_i + |g_ir|^2 |x_i|^2 ) ,   g_ir = a_r w_r - <a w, S_i>
            fixed   |J_ir|^2 = T_ir^2 |g_ir|^2 |x_i|^2 ,                              g_ir = a_r - <a, S_i>

        Source: derived, from ``tied_jacobian`` and ``fixed_jacobian``.
        """
        check_signs(self)
        weights, signs = self.weights[...], self.signs[...]
        mass = attention_mass(weights, inputs)
        values = self.variant.values(weights, signs)
        centered = values[None] - (jnp.matmul(mass, values) / self.m)[:, None]
        squares = jnp.square(inputs).sum(1, keepdims=True) * jnp.square(centered).sum(2)
        if self.variant.has_value_part:
            squares += weights.shape[1] + 2 * signs.T * jnp.einsum("irk,ik->ir", centered, inputs)
        norms = mass * jnp.sqrt(squares)
        check_held("norms of gradients", norms)
        return norms


def check_signs(model: _PrefixOnlyModel) -> None:
    """Refuse a tied model whose signs are not -1 or +1: its kernel is stated, and certified, for ``a_r^2 = 1``.

    The fixed model's values may be any numbers.

    Raises:
        UsageError: with the first such sign and its token.
    """
    signs = model.signs[...]
    if not model.variant.has_value_part or isinstance(signs, jax.core.Tracer):
        return
    values = np.asarray(signs, np.float64).ravel()
    if (wrong := np.flatnonzero(np.abs(values) != 1)).size:
        raise expected(
            "signs",
            "-1 or +1 for every token of a tied model",
            f"{values[wrong[0]]:g} at token {wrong[0]}",
            "Put the size into the weights, or use the fixed model, whose values may be any numbers",
        )


class TiedPrefixModel(_PrefixOnlyModel):
    """The stylized model whose prefix is both key and value.

        F_k(x) = m sum_r softmax_r(W x) a_r w_{r,k}

    ============  =========  ==============  =======================================
    attribute     paper      shape           kind
    ============  =========  ==============  =======================================
    ``weights``   W          [m, d]          ``nnx.Param``; N(0, sigma^2) at the start
    ``signs``     a          [m, 1]          ``Frozen``; +-1
    ============  =========  ==============  =======================================

    Args:
        d: width of inputs and outputs.
        m: prefix tokens; even with symmetric initialization.
        sigma: standard deviation of the rows at the start.
        symmetric: pair the rows with opposite signs, so that F = 0 at the start.
        dtype: of the weights; None is JAX's default float.
        rngs: flax random streams; the stream ``params`` is used.

    Raises:
        ValueError: see ``RandomPrefix``.

    Source: form after Liang et al., arXiv 2406.14036; constants not verified against the text.
    """

    variant = TIED

    def __init__(
        self,
        d: int,
        m: int,
        sigma: float = 1.0,
        symmetric: bool = True,
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(d, m, sigma=sigma, symmetric=symmetric, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Inputs) -> Float[Array, "n d"]:
        """[n, d] -> [n, d]."""
        check_inputs("inputs", inputs, features=self.weights.shape[1])
        return tied_outputs(self.weights[...], self.signs[...], inputs)


class FixedValuePrefixModel(_PrefixOnlyModel):
    """The stylized model whose values are fixed signs: softmax regression.

        F_k(x) = m sum_r softmax_r(W x) a_{r,k}

    ============  =========  ==============  =======================================
    attribute     paper      shape           kind
    ============  =========  ==============  =======================================
    ``weights``   W          [m, d]          ``nnx.Param``; N(0, sigma^2) at the start
    ``signs``     a          [m, outputs]    ``Frozen``; +-1
    ============  =========  ==============  =======================================

    Args:
        d: width of inputs.
        m: prefix tokens; even with symmetric initialization.
        outputs: width of the outputs; d if None.
        sigma, symmetric, dtype, rngs: as in ``TiedPrefixModel``.

    Raises:
        ValueError: see ``RandomPrefix``.

    Source: arXiv 2405.03251 (softmax regression), in the scaling of Liang et al.
    """

    variant = FIXED

    def __init__(
        self,
        d: int,
        m: int,
        outputs: int | None = None,
        sigma: float = 1.0,
        symmetric: bool = True,
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(d, m, outputs=outputs, sigma=sigma, symmetric=symmetric, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Inputs) -> Float[Array, "n o"]:
        """[n, d] -> [n, outputs]."""
        check_inputs("inputs", inputs, features=self.weights.shape[1])
        return fixed_outputs(self.weights[...], self.signs[...], inputs)


class PrefixAttentionLayer(nnx.Module):
    """Real one-layer prefix attention: inputs present, projections frozen, the prefix trained.

        PrefixAttn(X, P) = softmax( X W_Q ([P; X] W_K)^T / sqrt(d) ) [P; X] W_V

    ====================  =========  ========  ======================================================
    attribute             paper      shape     kind
    ====================  =========  ========  ======================================================
    ``prefix``            P          [m, d]    ``nnx.Param``; N(0, sigma^2) at the start
    ``query_projection``  W_Q        [d, d]    ``Frozen``; N(0, 1/d)
    ``key_projection``    W_K        [d, d]    ``Frozen``; N(0, 1/d)
    ``value_projection``  W_V        [d, d]    ``Frozen``; N(0, 1/d)
    ====================  =========  ========  ======================================================

    Args:
        d: width.
        m: prefix tokens.
        sigma: standard deviation of the prefix at the start.
        dtype: of the weights; None is JAX's default float.
        rngs: flax random streams; the stream ``params`` is used.

    Raises:
        ValueError: d, m or sigma not positive.

    Source: Liang et al., arXiv 2406.14036 (read in the authors' public code), one head.
    """

    def __init__(self, d: int, m: int, sigma: float = 1.0, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        drawn = RandomPrefix(key=rngs.params(), d=d, m=m, sigma=sigma, symmetric=False, dtype=dtype)
        self.prefix = nnx.Param(drawn.materialise()[0])

        def projection() -> Frozen:
            return Frozen(jax.random.normal(rngs.params(), (d, d), self.prefix.dtype) / math.sqrt(d))

        self.query_projection, self.key_projection, self.value_projection = (
            projection(),
            projection(),
            projection(),
        )

    def __call__(self, inputs: Float[Array, "*B L d"]) -> Float[Array, "*B L d"]:
        """One sequence [L, d], or any batch of them [..., L, d]; floating point and finite."""
        if inputs.ndim < 2 or inputs.shape[-1] != self.prefix.shape[1]:
            raise expected("inputs", f"[..., L, d = {self.prefix.shape[1]}]", f"shape {inputs.shape}")
        check_inputs("inputs", inputs.reshape(-1, inputs.shape[-1]))
        layer = lambda sequence: attend(  # noqa: E731
            self.prefix[...],
            sequence,
            self.query_projection[...],
            self.key_projection[...],
            self.value_projection[...],
        )
        for _ in inputs.shape[:-2]:
            layer = jax.vmap(layer)
        return layer(inputs)
