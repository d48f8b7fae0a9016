"""Every right-hand side of the theory: one function per statement, its constants as arguments.

The functions take and return plain floats, in float64, and name the quantities in words:

==================  ==============  =================================================================================
here                the papers      what
==================  ==============  =================================================================================
``smallest``        lambda          lambda_min(H*) or of whichever kernel the statement is used with, > 0
``inputs``          n               number of inputs
``outputs``         d               outputs of the model
``failure``         delta           probability that the statement does not hold
``scale``           B               max(C sigma sqrt(log(nd/delta)), 1): bounds |w_r . x_i| and |w_{r,k}| for all r
``step_size``       eta             of gradient descent on L = 1/2 |F - Y|^2
==================  ==============  =================================================================================

Statements marked *recalled* have the form after Liang et al., arXiv 2406.14036; constants not verified
against the text, so every constant is a named parameter whose default is the recalled value. Statements marked
*derived* are ours, with proofs in theory/README.md.
"""

from __future__ import annotations

import math
import numbers

import jax.numpy as jnp

from ntk_prefix.checks import NonFiniteError, check_count, check_inputs, check_non_negative, check_positive, expected
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.one_layer import FixedValuePrefixModel, TiedPrefixModel, attention_mass
from ntk_prefix.typing import Inputs

__all__ = [
    "gradient_descent_steps",
    "kernel_drift",
    "largest_stable_step",
    "log10_prefix_length",
    "loss_envelope",
    "measured_kernel_drift",
    "theory_step_size",
    "token_movement",
    "weight_scale",
]


def weight_scale(*, sigma: float, inputs: int, outputs: int, failure: float, constant: float = 1.0) -> float:
    """How large the prefix scores may get: ``B = max( C sigma sqrt(log(n d / delta)), 1 )``.

    Raises:
        ValueError: a size or sigma not positive, failure outside (0, 1).

    Source: recalled; the constant C is not verified against the text.
    """
    _check_sizes(inputs, outputs)
    check_positive("sigma", sigma)
    check_positive("constant", constant)
    _check_failure(failure)
    return max(constant * sigma * math.sqrt(math.log(inputs * outputs / failure)), 1.0)


def log10_prefix_length(
    *,
    smallest: float,
    inputs: int,
    outputs: int,
    scale: float,
    failure: float,
    exponent: float = 18.0,
    constant: float = 1.0,
) -> float:
    """log10 of the prefix length the convergence theorem asks for.

        m = C lambda^{-2} n^2 d^2 e^{18 B} log^2(n d / delta)

    Args:
        smallest: lambda, > 0.
        inputs, outputs: n, d.
        scale: B, from ``weight_scale``.
        failure: delta.
        exponent: the 18 in e^{18 B}.
        constant: C, hidden in the Omega.

    Returns:
        log10 m: the number itself overflows float64 already for B around 39.

    Raises:
        ValueError: lambda, a size or a constant not positive, failure outside (0, 1).

    Source: recalled.
    """
    _check_sizes(inputs, outputs)
    check_positive("smallest", smallest)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    check_positive("constant", constant)
    _check_failure(failure)
    size = inputs * outputs
    logarithm = math.log(size / failure)
    natural = math.log(constant) + 2 * math.log(size / smallest) + exponent * scale + 2 * math.log(logarithm)
    return natural / math.log(10)


def theory_step_size(
    *,
    smallest: float,
    tokens: int,
    inputs: int,
    outputs: int,
    scale: float,
    exponent: float = 16.0,
    constant: float = 0.1,
) -> float:
    """Return the step size of the convergence theorem, ``eta = 0.1 lambda / (m n^2 d^2 e^{16 B})``.

    Source: recalled.
    """
    _check_sizes(inputs, outputs)
    check_positive("smallest", smallest)
    check_positive("tokens", tokens)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    check_positive("constant", constant)
    return constant * smallest / (tokens * (inputs * outputs) ** 2) * math.exp(-exponent * scale)


def gradient_descent_steps(
    *,
    smallest: float,
    tokens: int,
    step_size: float,
    inputs: int,
    outputs: int,
    accuracy: float,
    constant: float = 1.0,
) -> float:
    """Return steps after which the loss is below ``accuracy``: ``T = C (m eta lambda)^{-1} log(n d / eps)``.

    Source: recalled.
    """
    _check_sizes(inputs, outputs)
    check_positive("accuracy", accuracy)
    check_positive("constant", constant)
    # an accuracy above n d asks for no step, rather than for a negative number of them
    return constant / _contraction(smallest, tokens, step_size) * max(math.log(inputs * outputs / accuracy), 0.0)


def loss_envelope(*, steps: int, smallest: float, tokens: int, step_size: float, initial: float) -> float:
    """Largest |F(t) - Y|^2 the convergence theorem allows: ``(1 - m eta lambda / 2)^t |F(0) - Y|^2``.

    Args:
        steps: t.
        smallest: lambda, in the normalization of H(W), that is of the NTK over m.
        tokens: m.
        step_size: eta.
        initial: |F(0) - Y|^2.

    Raises:
        ValueError: where m eta lambda / 2 is not in (0, 1]: the envelope says nothing there.

    Source: recalled; that it holds at every step is what the claim ``convergence`` measures.
    """
    check_count("steps", steps, 0)
    check_non_negative("initial", initial)
    contraction = _contraction(smallest, tokens, step_size) / 2
    if contraction > 1 + 1e-12:  # a step of 2 / (m lambda), rounded, is still one
        raise expected("step_size", "m eta lambda / 2 <= 1", f"{contraction:.3g}", "Take a smaller step")
    return initial * (1 - min(contraction, 1.0)) ** steps


def kernel_drift(*, radius: float, inputs: int, outputs: int, scale: float, exponent: float = 10.0) -> float:
    """Largest |H(W) - H(W(0))|_F while every token stays within ``radius``: ``R n d e^{10 B}``.

    Source: recalled; the claim ``perturbation`` measures the drift against it, and the exponent of R.
    """
    _check_sizes(inputs, outputs)
    check_non_negative("radius", radius)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    try:
        return radius * inputs * outputs * math.exp(exponent * scale)
    except OverflowError:
        raise NonFiniteError(
            f"scale: expected a bound that float64 holds, got one of e^({exponent} * {scale})."
        ) from None


def measured_kernel_drift(model: TiedPrefixModel | FixedValuePrefixModel, inputs: Inputs, *, radius: float) -> float:
    """Largest |H(W) - H(W(0))|_F while every token stays within ``radius``, computed from W(0) itself.

        |H(W) - H(W(0))|_F <= 2 sqrt(lambda_max(H(W(0)))) delta + delta^2 ,
        m delta^2 = sum_{i,r} ( g_i |J_ir| + (1 + g_i) T_ir |x_i| s_i )^2 ,    g_i = e^{2 R |x_i|} - 1

    with |J_ir| the Frobenius norm of the derivative of F(x_i) by token r, and s_i a bound on how far the centered value
    of any token moves: 2 tanh(R |x_i| / 2) max_r |a_r| for the fixed model, 2 R + g_i sum_r S_ir |w_r| for the tied one.

    Args:
        model: at W(0).
        inputs: [n, d].
        radius: R >= 0.

    Returns:
        the bound, in the normalization of H(W).

    Numerics: evaluated in floating point without directed rounding: a bound up to a relative error of about m eps.

    Source: derived, proof in theory/README.md. A score moves by at most R |x_i|, so a softmax weight by a factor within
    e^{+-2 R |x_i|}; the rest is the triangle inequality.
    """
    check_non_negative("radius", radius)
    check_inputs("inputs", inputs, features=model.weights.shape[1])
    weights = model.weights[...]
    mass = attention_mass(weights, inputs)
    lengths = jnp.linalg.norm(inputs, axis=1)
    growth = jnp.expm1(2 * radius * lengths)
    if model.variant.has_value_part:
        mean_length = jnp.matmul(mass, jnp.linalg.norm(weights, axis=1)) / model.m
        shift = 2 * radius + growth * mean_length
    else:
        shift = 2 * jnp.tanh(radius * lengths / 2) * jnp.linalg.norm(model.signs[...], axis=1).max()
    steps = growth[:, None] * model.token_gradient_norms(inputs) + ((1 + growth) * lengths * shift)[:, None] * mass
    delta = jnp.linalg.norm(steps) / math.sqrt(model.m)
    kernel = prefix_ntk(model, inputs)
    largest = jnp.linalg.eigvalsh(kernel.reshape(kernel.shape[0] * kernel.shape[1], -1))[-1]
    return float(2 * jnp.sqrt(largest) * delta + delta**2)


def token_movement(*, smallest: float, tokens: int, initial_error: float, steepest: float) -> float:
    """How far one prefix token can move during all of training, while the loss stays under its envelope.

        |w_r(t) - w_r(0)| <= eta sum_s |J_r(s)| |F(s) - Y| <= 4 max_s |J_r(s)| |F(0) - Y| / (m lambda)

    Args:
        smallest: lambda, in the normalization of H(W).
        tokens: m.
        initial_error: |F(0) - Y|_F.
        steepest: largest norm of J_r, the [n d, d] derivative of all outputs by one token, along the way.

    Source: derived (theory/README.md): a geometric series of ratio sqrt(1 - x) <= 1 - x / 2 at x = m eta lambda / 2.
    """
    check_positive("smallest", smallest)
    check_positive("tokens", tokens)
    check_non_negative("initial_error", initial_error)
    check_non_negative("steepest", steepest)
    return 4 * steepest * initial_error / (tokens * smallest)


def largest_stable_step(*, largest: float, tokens: int) -> float:
    """Step size above which gradient descent on the linearized model diverges: ``2 / (m lambda_max)``.

    Source: derived; exact for a quadratic loss, and the negative control of the claim ``convergence``.
    """
    check_positive("largest", largest)
    check_positive("tokens", tokens)
    return 2 / (tokens * largest)


def _contraction(smallest: float, tokens: int, step_size: float) -> float:
    """m eta lambda, all three positive."""
    check_positive("smallest", smallest)
    check_positive("tokens", tokens)
    check_positive("step_size", step_size)
    return tokens * step_size * smallest


def _check_failure(failure: float) -> None:
    if not (isinstance(failure, numbers.Real) and 0 < failure < 1):
        raise expected("failure", "a probability in (0, 1)", failure)


def _check_sizes(inputs: int, outputs: int) -> None:
    check_positive("inputs", inputs)
    check_positive("outputs", outputs)
