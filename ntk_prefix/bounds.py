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
import sys

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
        ValueError: a size below 1, sigma not positive, failure outside (0, 1).
        NonFiniteError: a B that float64 does not hold.

    Source: recalled; the constant C is not verified against the text.
    """
    check_positive("sigma", sigma)
    check_positive("constant", constant)
    _check_failure(failure)
    return _held("sigma", max(constant * sigma * math.sqrt(_log_size(inputs, outputs) - math.log(failure)), 1.0))


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
        ValueError: lambda or a constant not positive, a size below 1, failure outside (0, 1).
        NonFiniteError: a log10 m that float64 does not hold.

    Source: recalled.
    """
    size = _log_size(inputs, outputs)
    check_positive("smallest", smallest)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    check_positive("constant", constant)
    _check_failure(failure)
    # sums of logarithms: quotients by the smallest numbers overflow
    shares = 2 * (size - math.log(smallest)) + 2 * math.log(size - math.log(failure))
    return _held("scale", (math.log(constant) + shares + exponent * scale) / math.log(10))


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

    Raises:
        ValueError: lambda or a constant not positive, tokens or a size below 1, a step so short that float64 has 0 for it.

    Source: recalled.
    """
    size = _log_size(inputs, outputs)
    check_positive("smallest", smallest)
    _check_at_least_one("tokens", tokens)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    check_positive("constant", constant)
    logarithm = math.log(constant) + math.log(smallest) - math.log(tokens) - 2 * size - exponent * scale
    if not logarithm > math.log(sys.float_info.min):
        raise expected("scale", "a step size that float64 holds", f"one of e^({logarithm:.4g})")
    return math.exp(logarithm)


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

    Raises:
        ValueError: lambda, a step size, an accuracy or a constant not positive, tokens or a size below 1.
        NonFiniteError: a number of steps that float64 does not hold.

    Source: recalled.
    """
    size = _log_size(inputs, outputs)
    check_positive("accuracy", accuracy)
    check_positive("constant", constant)
    # an accuracy above n d asks for no step, rather than for a negative number of them
    needed = constant * max(size - math.log(accuracy), 0.0)
    return _held("step_size", needed / _contraction(smallest, tokens, step_size))


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

    Raises:
        ValueError: a radius or a scale below 0, a size below 1.
        NonFiniteError: a bound that float64 does not hold.

    Source: recalled; the claim ``perturbation`` measures the drift against it, and the exponent of R.
    """
    size = _log_size(inputs, outputs)
    check_non_negative("radius", radius)
    check_non_negative("scale", scale)
    check_non_negative("exponent", exponent)
    if radius == 0:
        return 0.0
    logarithm = math.log(radius) + size + exponent * scale
    if not logarithm < math.log(sys.float_info.max):
        raise NonFiniteError(f"scale: expected a bound that float64 holds, got one of e^({logarithm:.4g}).")
    return math.exp(logarithm)


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

    Raises:
        ValueError: a radius below 0, inputs that are not a finite [n, d].
        NonFiniteError: a bound that the inputs' dtype does not hold, as of R |x_i| in the hundreds.

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
    return _held("radius", float(2 * jnp.sqrt(largest) * delta + delta**2))


def token_movement(*, smallest: float, tokens: int, initial_error: float, steepest: float) -> float:
    """How far one prefix token can move during all of training, while the loss stays under its envelope.

        |w_r(t) - w_r(0)| <= eta sum_s |J_r(s)| |F(s) - Y| <= 4 max_s |J_r(s)| |F(0) - Y| / (m lambda)

    Args:
        smallest: lambda, in the normalization of H(W).
        tokens: m.
        initial_error: |F(0) - Y|_F.
        steepest: largest norm of J_r, the [n d, d] derivative of all outputs by one token, along the way.

    Raises:
        ValueError: lambda not positive, tokens below 1, an error or a norm below 0.
        NonFiniteError: a distance that float64 does not hold.

    Source: derived (theory/README.md): a geometric series of ratio sqrt(1 - x) <= 1 - x / 2 at x = m eta lambda / 2.
    """
    check_positive("smallest", smallest)
    _check_at_least_one("tokens", tokens)
    check_non_negative("initial_error", initial_error)
    check_non_negative("steepest", steepest)
    return _held("smallest", 4 * steepest * initial_error / tokens / smallest)


def largest_stable_step(*, largest: float, tokens: int) -> float:
    """Step size above which gradient descent on the linearized model diverges: ``2 / (m lambda_max)``.

    Raises:
        ValueError: lambda_max not positive, tokens below 1.
        NonFiniteError: a step that float64 does not hold.

    Source: derived; exact for a quadratic loss, and the negative control of the claim ``convergence``.
    """
    check_positive("largest", largest)
    _check_at_least_one("tokens", tokens)
    return _held("largest", 2 / tokens / largest)


def _contraction(smallest: float, tokens: int, step_size: float) -> float:
    """m eta lambda, all three positive; refused where float64 has 0 for it."""
    check_positive("smallest", smallest)
    _check_at_least_one("tokens", tokens)
    check_positive("step_size", step_size)
    contraction = tokens * step_size * smallest
    if not contraction:
        raise expected("step_size", "m eta lambda > 0 in float64", f"{tokens} * {step_size} * {smallest}")
    return contraction


def _held(name: str, bound: float) -> float:
    """Return a bound; one that is not finite bounds nothing."""
    if not math.isfinite(bound):
        raise NonFiniteError(f"{name}: expected a bound that float64 holds, got {bound}.")
    return bound


def _check_failure(failure: float) -> None:
    if not (isinstance(failure, numbers.Real) and 0 < failure < 1):
        raise expected("failure", "a probability in (0, 1)", failure)


def _check_at_least_one(name: str, value: float) -> None:
    check_positive(name, value)
    if value < 1:
        raise expected(name, "at least 1", value)


def _log_size(inputs: int, outputs: int) -> float:
    """log(n d), of sizes from 1 on."""
    _check_at_least_one("inputs", inputs)
    _check_at_least_one("outputs", outputs)
    return math.log(inputs) + math.log(outputs)
