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

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from ntk_prefix.checks import UsageError, check_array, check_count, check_inputs, check_positive, expected
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Float, Inputs, KeyArray, Signs, Weights

__all__ = [
    "FixedValuePrefixModel",
    "Frozen",
    "PrefixAttentionLayer",
    "RandomPrefix",
    "TiedPrefixModel",
    "Variant",
    "attend",
    "attention_mass",
    "check_signs",
    "fixed_jacobian",
    "fixed_outputs",
    "tied_jacobian",
    "tied_outputs",
    "variant_named",
]

ModelName = Literal["tied", "fixed"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """In what the two stylized models differ: what a token carries as its value.

    Args:
        name: "tied" or "fixed".
        has_value_part: whether the value moves with the token, so that F depends on it through key and value.
    """

    name: ModelName
    has_value_part: bool

    def values(self, weights: Array, signs: Array) -> Array:
        """Return the values ``v_r`` of tokens, [.., outputs]: ``a_r w_r`` or ``a_r``."""
        return signs * weights if self.has_value_part else signs

    def outputs(self, d: int, outputs: int | None) -> int:
        """Return how many outputs a model of inputs of width d has that was asked for so many; None is d.

        Raises:
            UsageError: the tied model has d, and other ones were asked for.
        """
        if outputs is None:
            return d
        check_count("outputs", outputs)
        if self.has_value_part and outputs != d:
            raise UsageError(f"outputs: the tied model has d = {d} outputs, got {outputs}. Leave it out.")
        return outputs

    def sign_columns(self, outputs: int) -> int:
        """Return the columns of ``a``: one for each output, or one in all."""
        return 1 if self.has_value_part else outputs


TIED, FIXED = Variant("tied", True), Variant("fixed", False)


def variant_named(name: str) -> Variant:
    """Return the variant of that name.

    Raises:
        UsageError: there is none.
    """
    for variant in (TIED, FIXED):
        if variant.name == name:
            return variant
    raise UsageError(f'model: expected "tied" or "fixed", got {name!r}.')


TILE = 8192
"""Distinct prefix rows drawn from one counter. A constant of the format: with it changes every drawn prefix."""


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

    Numerics: the maximum is subtracted and m enters as log m, so no finite input gives NaN.
    """
    check_array("weights", weights, "m", "d")
    check_array("inputs", inputs, "n", weights.shape[1])
    dtype = accumulation_dtype(weights, inputs)
    scores = jnp.matmul(inputs.astype(dtype), weights.astype(dtype).T)
    normalizer = jax.nn.logsumexp(scores, axis=1, keepdims=True)
    return jnp.exp(scores - normalizer + math.log(weights.shape[0]))


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
    return jnp.matmul(probabilities, values).astype(inputs.dtype)


# ------------------------------------------------------------------- A prefix described by its seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPrefix:
    """A prefix of m tokens at initialization, described by its seed instead of its m rows.

        w_r ~ N(0, sigma^2 I_d) ,   a uniform in {-1, +1}

    Row blocks are drawn from a counter (``jax.random.fold_in(key, tile)``), so any part of the prefix can be
    recomputed anywhere: a prefix of 10^9 tokens takes no memory, does not depend on how many devices share it, and a
    shorter one with the same key is its beginning. The models below start from exactly these rows.

    With ``symmetric`` the rows come in neighboring pairs ``(w, a), (w, -a)``, which makes F = 0 at the start.

    Args:
        key: a ``jax.random.key``.
        d: width of a token.
        m: number of tokens; even if symmetric.
        sigma: standard deviation of every coordinate.
        symmetric: pair the rows.
        model: "tied" (one sign a token) or "fixed" (one sign a token and output).
        outputs: width of the output of the fixed model; d if None. The tied model has d outputs.
        dtype: of the rows; None is JAX's default float.

    Raises:
        ValueError: m odd with symmetric, m, d or sigma not positive, outputs given for the tied model.
    """

    key: KeyArray
    d: int
    m: int
    sigma: float = 1.0
    symmetric: bool = True
    model: ModelName = "tied"
    outputs: int | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        check_count("d", self.d)
        check_count("m", self.m)
        check_positive("sigma", self.sigma)
        if self.symmetric and self.m % 2:
            raise UsageError(
                "m: expected an even number of prefix tokens, since symmetric initialization draws pairs, "
                f"got {self.m}. Use m={self.m + 1}, or symmetric=False."
            )
        self.variant.outputs(self.d, self.outputs)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise expected("dtype", "a floating point dtype or None", self.dtype)

    @property
    def variant(self) -> Variant:
        """Which of the two models these are the tokens of."""
        return variant_named(self.model)

    @property
    def output_width(self) -> int:
        """Number of outputs of the model."""
        return self.variant.outputs(self.d, self.outputs)

    @property
    def rows(self) -> int:
        """Distinct rows: m / 2 with symmetric initialization, else m."""
        return self.m // 2 if self.symmetric else self.m

    @property
    def tile_dtype(self) -> jnp.dtype:
        """Dtype of the rows: the one asked for, or JAX's default float."""
        return jnp.dtype(self.dtype or jnp.result_type(float))

    @property
    def tiles(self) -> int:
        """Number of row blocks, each ``TILE`` rows (the last one is cut)."""
        return -(-self.rows // TILE)

    def tile(self, index: Array | int) -> tuple[Float[Array, "tile d"], Float[Array, "tile o"]]:
        """Draw the ``index``-th block of distinct rows: weights [TILE, d] and signs [TILE, 1 or outputs]."""
        dtype = self.tile_dtype
        weight_key, sign_key = jax.random.split(jax.random.fold_in(self.key, index))
        weights = self.sigma * jax.random.normal(weight_key, (TILE, self.d), dtype)
        columns = self.variant.sign_columns(self.output_width)
        bits = jax.random.bits(sign_key, (TILE, columns), jnp.uint8) & 1
        return weights.astype(dtype), 2 * bits.astype(dtype) - 1

    @jax.jit
    def materialise(self) -> tuple[Weights, Signs]:
        """All m rows: weights [m, d] and signs [m, 1 or outputs]."""
        weights, signs = jax.lax.map(self.tile, jnp.arange(self.tiles))
        weights = weights.reshape(-1, weights.shape[-1])[: self.rows]
        signs = signs.reshape(-1, signs.shape[-1])[: self.rows]
        if self.symmetric:
            weights = jnp.repeat(weights, 2, axis=0)
            signs = jnp.stack([signs, -signs], axis=1).reshape(self.m, -1)
        return weights, signs


jax.tree_util.register_dataclass(
    RandomPrefix,
    data_fields=["key"],
    meta_fields=["d", "m", "sigma", "symmetric", "model", "outputs", "dtype"],
)


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
        return mass * jnp.sqrt(squares)


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
            raise UsageError(f"inputs: expected [..., L, d = {self.prefix.shape[1]}], got shape {inputs.shape}.")
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
