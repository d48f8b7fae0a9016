"""Gradient descent predicted from a kernel.

Where the kernel Theta of a model stays what it was at the start (exactly for a linear model, in the limit of an
infinite prefix for ours), the outputs F_t of gradient descent on ``L = 1/2 |F - y|^2`` with step eta are known in
advance:

    discrete   F_t - y = (I - eta Theta)^t (F_0 - y)          t = 0, 1, 2, ...
    flow       F_t - y = exp(-eta Theta t) (F_0 - y)          t >= 0 real

and so are those on other inputs, through the kernel between them and the training inputs. Both come from one
eigendecomposition. (neural-tangents has the flow, ``nt.predict.gradient_descent_mse``; it takes the eigenvalues of a
singular kernel as they are computed.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import check_array, check_finite, check_floating, check_positive, expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Float

__all__ = ["Prediction", "predict"]

Loss = Literal["mse-sum", "mse-mean"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prediction(EqualByValue):
    """Outputs predicted at every requested time.

    ==========  ============  ===============================================
    attribute   shape         what
    ==========  ============  ===============================================
    ``steps``   [T]           the times, in steps of gradient descent
    ``train``   [T, n, d]     F_t on the training inputs
    ``loss``    [T]           the training loss, in the convention asked for
    ``test``    [T, n2, d]    F_t on the test inputs; None if none were given
    ==========  ============  ===============================================
    """

    steps: Float[Array, "T"]
    train: Float[Array, "T n d"]
    loss: Float[Array, "T"]
    test: Float[Array, "T n2 d"] | None = None


def predict(
    ntk_train_train: Float[Array, "..."],
    y_train: Float[Array, "n d"],
    *,
    learning_rate: float,
    steps: Array,
    flow: bool = False,
    loss: Loss = "mse-sum",
    f_train_0: Float[Array, "n d"] | None = None,
    ntk_test_train: Float[Array, "..."] | None = None,
    f_test_0: Float[Array, "n2 d"] | None = None,
) -> Prediction:
    """Predict gradient descent from the kernel at its start.

        F_t - y = (I - eta Theta)^t (F_0 - y)
        F_t(x)  = F_0(x) - eta Theta(x, X) sum_{s < t} (I - eta Theta)^s (F_0 - y)

    Args:
        ntk_train_train: Theta of the training inputs, the sum over parameters as ``empirical_ntk`` gives it (m times
            ``prefix_ntk``, whose H has a 1/m). Its shape says how it acts:
            [n, d, n, d]  full;
            [n, d, n]     diagonal: output k has its own kernel ``[:, k, :]``, and outputs do not mix;
            [n, n]        the same kernel for every output, Theta (x) I_d. From a trace: ``trace / d``.
        y_train: targets, [n, d].
        learning_rate: eta, the step of plain gradient descent on the loss. Above ``2 / lambda_max`` the discrete form
            diverges, as gradient descent does.
        steps: times, [T], counted in steps: whole numbers >= 0, or any real >= 0 with ``flow``.
        flow: predict the gradient flow instead, at time ``eta * steps``.
        loss: "mse-sum" is the theory's ``1/2 sum |F - y|^2``; "mse-mean" is that over n d, neural-tangents' own, under
            which eta counts for eta / (n d).
        f_train_0: outputs on the training inputs at the start, [n, d]; None is 0 (symmetric initialization).
        ntk_test_train: kernel between test and training inputs: [n2, d, n, d], [n2, d, n] or [n2, n], as the other one.
        f_test_0: outputs on the test inputs at the start, [n2, d]; None is 0.

    Returns:
        A ``Prediction``: train [T, n, d], loss [T] and, given ``ntk_test_train``, test [T, n2, d].

    Raises:
        ValueError: shapes that do not belong together, numbers that are not finite, a learning rate that is not
            positive, steps that are negative, not whole, or beyond the dtype, a kernel with negative eigenvalues beyond half
            its digits.

    Numerics: the common dtype of kernel and targets, float32 at least; float64 for long times. A run that diverges beyond it
    ends in infinities and NaN. A kernel [n, d, n, d] is read in (n, d)
    order, so its matrix is symmetric. Singular kernels are fine: a kernel is positive semidefinite, and what its
    eigenvalues are below zero, or above it by up to N eps lambda_max, is rounding (Weyl: N x N entries, each rounded by
    eps of at most lambda_max; eps is that of the kernel's own dtype), which a power of 10^8 would make 10^6. Such
    directions do not move.

    Source: Jacot et al., arXiv 1806.07572; Lee et al., arXiv 1902.06720; the discrete form is the same with powers.
    """
    check_positive("learning_rate", learning_rate)
    if loss not in ("mse-sum", "mse-mean"):
        raise expected("loss", '"mse-sum" or "mse-mean"', repr(loss))
    check_array("y_train", y_train, "n", "d")
    if 0 in y_train.shape:
        raise expected("y_train", "[n, d] with n, d >= 1", f"shape {y_train.shape}")
    kernels = _matrices("ntk_train_train", ntk_train_train, y_train.shape)
    _check_symmetric("ntk_train_train", kernels)
    f_train_0 = jnp.zeros_like(y_train) if f_train_0 is None else f_train_0
    check_array("f_train_0", f_train_0, *y_train.shape)
    cross = None
    if ntk_test_train is not None:
        check_floating("ntk_test_train", ntk_test_train)
        if ntk_test_train.ndim != ntk_train_train.ndim:
            raise expected(
                "ntk_test_train",
                f"{ntk_train_train.ndim} axes, as ntk_train_train has",
                f"shape {ntk_test_train.shape}",
            )
        cross = _matrices("ntk_test_train", ntk_test_train, y_train.shape)
        if not len(ntk_test_train):
            raise expected("ntk_test_train", "at least one test input", f"shape {ntk_test_train.shape}")
        test_shape = (ntk_test_train.shape[0], y_train.shape[1])
        f_test_0 = jnp.zeros(test_shape, y_train.dtype) if f_test_0 is None else f_test_0
        check_array("f_test_0", f_test_0, *test_shape)
    elif f_test_0 is not None:
        raise expected("f_test_0", "it beside ntk_test_train, the kernel between test and training inputs", "it alone")
    for name, array in (("y_train", y_train), ("f_train_0", f_train_0), ("f_test_0", f_test_0)):
        check_finite(name, array)

    eps = float(jnp.finfo(kernels.dtype).eps)
    dtype = accumulation_dtype(kernels, y_train, f_train_0)
    times = _check_steps(steps, flow, dtype)
    kernels, residual = kernels.astype(dtype), _columns(f_train_0 - y_train, ntk_train_train.ndim).astype(dtype)
    scale = 1.0 if loss == "mse-sum" else 1.0 / y_train.size
    spectrum = _spectrum(kernels, eps=eps)
    _check_semidefinite("ntk_train_train", spectrum, eps)
    changes, test_changes = _evolve(spectrum, residual, cross, learning_rate * scale, times, flow=flow)

    def outputs(start: Array, change: Array) -> Array:
        return start[None] + _rows(change, start.shape, ntk_train_train.ndim)

    train = outputs(f_train_0, changes)
    return Prediction(
        steps=times,
        train=train,
        loss=0.5 * scale * jnp.sum((train - y_train[None]) ** 2, axis=(1, 2)),
        test=None if f_test_0 is None or test_changes is None else outputs(f_test_0, test_changes),
    )


# -------------- Every kind of kernel as a batch of matrices [g, N2, N], acting on columns [g, N, c]
#
#   full      g = 1, N = n d, c = 1
#   diagonal  g = d, N = n,   c = 1
#   alike     g = 1, N = n,   c = d


def _matrices(name: str, kernel: Array, target_shape: tuple[int, ...]) -> Array:
    """Return a kernel of any of the three kinds as [g, N2, N]."""
    check_floating(name, kernel)
    n, d = target_shape
    if kernel.shape[1:] != {4: (d, n, d), 3: (d, n), 2: (n,)}.get(kernel.ndim):
        raise expected(
            name,
            f"[.., {d}, {n}, {d}] (full), [.., {d}, {n}] (diagonal) or [.., {n}] (alike) for targets [{n}, {d}]",
            f"{kernel.shape}. neural-tangents' own [n1, n2, d, d] needs kernel.transpose(0, 2, 1, 3)",
        )
    check_finite(name, kernel)
    if kernel.ndim == 4:
        return kernel.reshape(1, -1, n * d)
    return jnp.moveaxis(kernel, 1, 0) if kernel.ndim == 3 else kernel[None]


def _columns(values: Array, kernel_ndim: int) -> Array:
    """Return outputs [n, d] as the columns [g, N, c] that the matrices act on."""
    if kernel_ndim == 4:
        return values.reshape(1, -1, 1)
    return values.T[:, :, None] if kernel_ndim == 3 else values[None]


def _rows(columns: Array, shape: tuple[int, ...], kernel_ndim: int) -> Array:
    """Columns [g, T, N, c] as outputs [T, n, d]."""
    if kernel_ndim == 3:
        return jnp.moveaxis(columns[..., 0], 0, -1)
    return columns[0].reshape(-1, *shape)


def _check_symmetric(name: str, kernels: Array) -> None:
    """Refuse matrices that are not symmetric up to rounding: mostly axes in another order."""
    if kernels.shape[1] != kernels.shape[2]:
        raise expected(name, "as many rows as there are targets", f"matrices {kernels.shape[1:]}")
    if isinstance(kernels, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        skew = float(jnp.abs(kernels - jnp.swapaxes(kernels, 1, 2)).max())
        largest = float(jnp.abs(kernels).max())
    # half the digits: rounding never costs so many, axes in the wrong order always do
    if skew > float(jnp.finfo(kernels.dtype).eps) ** 0.5 * largest:
        raise expected(
            name,
            "a symmetric kernel in the order [n, d, n, d]",
            f"one that differs from its transpose by {skew:.3g}. neural-tangents' own [n, n, d, "
            "d] needs kernel.transpose(0, 2, 1, 3)",
        )


def _check_steps(steps: Array, flow: bool, dtype: jnp.dtype) -> Array:
    """Return the times as a vector of floats."""
    if isinstance(steps, jax.core.Tracer):
        if steps.ndim != 1 or jnp.issubdtype(steps.dtype, jnp.bool_):
            raise expected("steps", "a vector of times, [T]", f"{steps.dtype} of shape {steps.shape}")
        return steps.astype(dtype)
    times = np.asarray(steps)
    if not (np.issubdtype(times.dtype, np.integer) or np.issubdtype(times.dtype, np.floating)):
        raise expected("steps", "real numbers", times.dtype)
    if times.ndim != 1 or not times.size:
        raise expected("steps", "a vector of times, [T]", f"shape {times.shape}", "Use jnp.arange(T)")
    if not (np.isfinite(times) & (times >= 0)).all():
        raise expected("steps", "finite times >= 0", f"a range of {times.min()} to {times.max()}")
    if not flow and (times != np.round(times)).any():
        raise expected("steps", "whole numbers", "fractions", "Use flow=True for continuous time")
    with np.errstate(over="ignore"):
        held = times.astype(dtype)
    if not np.isfinite(held).all():
        raise expected("steps", f"times that {dtype} holds", f"{times.max()}", "Use float64, under jax.enable_x64")
    return jnp.asarray(held)


# ----------------------------------------- The two dynamics: changes of the outputs since the start


class _Spectrum(NamedTuple):
    """Kernels by their eigenvalues, those that are rounding set to 0, and their eigenvectors."""

    eigenvalues: Float[Array, "g N"]
    basis: Float[Array, "g N N"]
    lowest: Float[Array, "g"]
    """The smallest eigenvalue as computed, over the largest."""


@functools.partial(jax.jit, static_argnames="eps")
def _spectrum(kernels: Float[Array, "g N N"], *, eps: float) -> _Spectrum:
    eigenvalues, basis = jnp.linalg.eigh(kernels)
    largest = eigenvalues[:, -1:]
    rounding = kernels.shape[-1] * eps * jnp.abs(largest)
    lowest = eigenvalues[:, 0] / jnp.where(largest > 0, largest, 1)[:, 0]
    return _Spectrum(jnp.where(eigenvalues > rounding, eigenvalues, 0), basis, lowest)


def _check_semidefinite(name: str, spectrum: _Spectrum, eps: float) -> None:
    """Refuse kernels with negative eigenvalues that no rounding explains: half the digits, as for symmetry."""
    if isinstance(spectrum.lowest, jax.core.Tracer):
        return
    lowest = float(spectrum.lowest.min())
    if lowest < -(eps**0.5):
        raise expected(
            name, "a positive semidefinite kernel", f"one whose smallest eigenvalue is {lowest:.3g} of its largest"
        )


@functools.partial(jax.jit, static_argnames="flow")
def _evolve(
    spectrum: _Spectrum,
    residual: Float[Array, "g N c"],
    cross: Float[Array, "g N2 N"] | None,
    learning_rate: Float[Array, ""] | float,
    times: Float[Array, "T"],
    *,
    flow: bool,
) -> tuple[Float[Array, "g T N c"], Float[Array, "g T N2 c"] | None]:
    """Gradient descent or its flow, in the basis where the kernel is diagonal."""
    eigenvalues, basis, _ = spectrum
    coordinates = jnp.einsum("gji,gjc->gic", basis, residual)
    rates = learning_rate * eigenvalues[:, None, :]
    steps = times[None, :, None]
    if flow:
        decay = jnp.expm1(-rates * steps)
    else:
        # (1 - x)^t - 1: through log1p where rounding 1 - x would lose x, as a power where 1 - x may be negative
        small = rates < 0.5
        decay = jnp.where(
            small,
            jnp.expm1(steps * jnp.log1p(-jnp.where(small, rates, 0.0))),
            jnp.power(1.0 - rates, steps) - 1.0,
        )
    changes = jnp.einsum("gji,gti,gic->gtjc", basis, decay, coordinates)
    if cross is None:
        return changes, None
    # sum_{s < t} (1 - x)^s, or its integral; where training outputs do not move, no other output does: J^T v = 0
    zero = rates == 0.0
    total = jnp.where(zero, 0.0, -decay / jnp.where(zero, 1.0, rates))
    return changes, -learning_rate * jnp.einsum("gkj,gji,gti,gic->gtkc", cross, basis, total, coordinates)
