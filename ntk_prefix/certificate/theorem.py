"""Whether gradient descent is certain to converge, decided before the first step: theory/certificate.md."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.certificate.closure import PASSES, SEARCHES, close
from ntk_prefix.certificate.curve import Forecast
from ntk_prefix.certificate.data import Drawn, Search, Start, check_data, outputs_wanted
from ntk_prefix.certificate.elsewhere import elsewhere
from ntk_prefix.certificate.length import Progress, search
from ntk_prefix.certificate.margin import MarginCertificate, certify_margin, classes_of, outputs_for, separates
from ntk_prefix.certificate.prior import Prior
from ntk_prefix.certificate.reference import Reference, Step
from ntk_prefix.certificate.result import Certificate
from ntk_prefix.certificate.rounding import OUTWARD, eigen_enclosure
from ntk_prefix.certificate.tokens import Prefix, Tokens
from ntk_prefix.checks import check_count, check_inputs, check_positive, expected
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.kernels.limit import limit_ntk
from ntk_prefix.random_prefix import ModelName, RandomPrefix
from ntk_prefix.typing import Array, Float, Inputs, KeyArray, OtherInputs

__all__ = ["Certificate", "certify", "find_m"]

STABILITY = 0.5
"""m eta (sqrt(lambda_max) + drift)^2 at the step size chosen here: a quarter of the largest stable one."""

LARGEST_EXPONENT_A_PRIORI = 100.0
"""sigma^2 |x|^2 up to which the sixth power of e^{sigma^2 |x|^2} is a float64."""

SMALLEST_ERROR = 1e-140
"""|F(0) - Y| down to which its square, and a millionth of it, are normal float64."""

LONGEST_A_PRIORI = 1e300

SMALLEST_FAILURE = 1e-300
"""delta from which on its parts, and what is divided by them, are normal float64."""


@overload
def certify(
    x: Inputs,
    y: Float[Array, "n o"],
    *,
    delta: float | None = ...,
    x_test: OtherInputs | None = ...,
    remove_offset: bool = ...,
    **start: Unpack[Start],
) -> Certificate: ...


@overload
def certify(
    x: Inputs, *, labels: Sequence[Any] | Array | np.ndarray, loss: float | None = ..., **start: Unpack[Start]
) -> MarginCertificate: ...


def certify(
    x: Inputs,
    y: Float[Array, "n o"] | None = None,
    *,
    labels: Sequence[Any] | Array | np.ndarray | None = None,
    loss: float | None = None,
    sigma: float = 1.0,
    model: ModelName | Prefix = "fixed",
    m: int | None = None,
    delta: float | None = None,
    key: KeyArray | None = None,
    symmetric: bool = True,
    step_size: float | None = None,
    x_test: OtherInputs | None = None,
    remove_offset: bool = False,
) -> Certificate | MarginCertificate:
    """Certify that gradient descent on L = 1/2 sum_i |F(x_i) - y_i|^2 converges, before it starts.

    With ``labels`` it is on the logistic loss R = mean_i log(1 + exp(-y_i F(x_i))), of more than two classes on the
    cross-entropy of an output for each, and certified is that it gets small.

    Args:
        x: [n, d] inputs, distinct, float64. Nothing is assumed of their norms.
        y: [n, outputs] targets, float64; d of them for the tied model. None with labels.
        labels: [n] of two kinds, of which the larger is y_i = 1, the other -1: for the fixed model with one output and a
            symmetric start, without delta, x_test and remove_offset. Of more kinds the model has an output for each.
        loss: with labels, what R is certified to fall to; None is log 2 / n, below which every label is right.
        sigma: standard deviation of the prefix at initialization.
        model: "fixed" or "tied"; or a model, or a ``RandomPrefix``: then its own weights are the starting point (a
            trained model restarts the certificate where it stands), and sigma, m, key and symmetric are its own.
        m: prefix length; None searches for the smallest (``find_m``) that holds, at ``step_size`` if one is given.
        delta: None for the a-posteriori certificate of the prefix drawn with ``key``: nothing is left to chance. A
            number in (0, 1) for the a-priori one: of any prefix that will be drawn, with probability 1 - delta.
        key: of the prefix, as in ``RandomPrefix``; ``jax.random.key(0)`` if None.
        symmetric: pairs of tokens with opposite signs, so that F(0) = 0.
        step_size: eta; None takes a quarter of the largest stable one.
        x_test: [n2, d] inputs that are not trained on, float64, for ``Certificate.predict``; not with delta.
        remove_offset: train F - F(0), which is gradient descent on the targets y + F(0): then a start without pairs needs
            about as long a prefix as one with them.

    Returns:
        the certificate, of labels a :class:`~ntk_prefix.certificate.margin.MarginCertificate`; look at ``holds`` first, and
        print ``explain()``.

    Raises:
        ValueError: inputs that are not float64 or of the wrong shape, JAX without 64-bit numbers, m, key or delta beside
            a model that brings its own prefix, a tied model whose signs are not -1 or +1; labels of one kind,
            or of as many as rows.

    Numerics: every bound is rounded outward (``certificate.rounding`` lists what is assumed of the machine). What is
    certified is gradient descent in exact arithmetic from the drawn floats.

    Source: derived; the theorems and their proofs are theory/certificate.md and, of labels, theory/margin.md.
    """
    if (y is None) == (labels is None):
        raise expected("y and labels", "one of the two", "neither" if y is None else "both")
    if step_size is not None:
        check_positive("step_size", step_size)
    if labels is not None:
        for name, given in (("delta", delta), ("x_test", x_test), ("remove_offset", remove_offset or None)):
            if given is not None:
                raise expected(name, "None beside labels", given)
        tied = model.variant.has_value_part if isinstance(model, Prefix) else model == "tied"
        check_inputs("x", x)
        classes = classes_of(labels, len(x))
        outputs = outputs_for(classes)
        if tied or (isinstance(model, Prefix) and model.output_width != outputs):
            got = "tied" if tied or not isinstance(model, Prefix) else f"{model.output_width} outputs"
            raise expected("model", f"the fixed one, with outputs={outputs}, beside these labels", got)
        y = jnp.zeros((len(x), outputs))
    elif loss is not None:
        raise expected("loss", "None without labels", loss)
    assert y is not None
    if x_test is not None:
        check_inputs("x", x)
        check_inputs("x_test", x_test, features=x.shape[1])
        if x_test.dtype != jnp.float64:
            raise expected("x_test", "float64", x_test.dtype, "Use x_test.astype(float) under x64")
        if delta is not None:
            raise expected(
                "x_test", "None beside delta: predictions are those of a given prefix", f"shape {x_test.shape}"
            )
    if not isinstance(model, str):
        for name, given in (("m", m), ("delta", delta), ("key", key)):
            if given is not None:
                raise expected(name, "None beside a model, which is its own prefix", given)
        prefix = model
    else:
        check_data(x, y, model, None)
        check_positive("sigma", sigma)
        if delta is not None:
            return _before_drawing(x, y, sigma, model, m, delta, symmetric, step_size)
        if m is None:
            drawn: Drawn = {"sigma": sigma, "model": model, "key": key, "symmetric": symmetric, "step_size": step_size}
            if labels is not None:
                return find_m(x, labels=labels, loss=loss, **drawn)
            found = find_m(x, y, remove_offset=remove_offset, **drawn)
            if x_test is None or not found.holds:
                return found
            m = found.m
        prefix = RandomPrefix(
            key=jax.random.key(0) if key is None else key,
            d=x.shape[1],
            m=m,
            sigma=sigma,
            symmetric=symmetric,
            model=model,
            outputs=outputs_wanted(y, model),
        )
    check_data(x, y, prefix.variant.name if isinstance(prefix, Prefix) else "fixed", prefix)
    if labels is not None:
        return certify_margin(Tokens(prefix, x), classes, wanted=loss, step_size=step_size)
    others = None if x_test is None else np.asarray(x_test)
    return _certify(Tokens(prefix, x), np.asarray(y), step_size, others, remove_offset)


def _before_drawing(
    x: Array,
    y: Array,
    sigma: float,
    model: ModelName,
    m: int | None,
    delta: float,
    symmetric: bool,
    step_size: float | None,
) -> Certificate:
    """Return the a-priori certificate at m, or at the smallest power of 2^(1/4) that has one."""
    if not isinstance(delta, int | float) or not SMALLEST_FAILURE <= delta < 1:
        raise expected("delta", f"a probability from {SMALLEST_FAILURE:g} to 1", repr(delta))
    if not symmetric:
        raise expected(
            "symmetric",
            "True: the a-priori certificate needs pairs of tokens, which make F(0) = 0",
            False,
            "Use symmetric=True, or delta=None for the certificate of a given draw",
        )
    if m is not None:
        check_count("m", m, 2)
        if m % 2:
            raise expected("m", "an even number of prefix tokens, which are drawn in pairs", m, f"Use m={m + 1}")
        if m > LONGEST_A_PRIORI:
            raise expected("m", f"at most {LONGEST_A_PRIORI:g} prefix tokens", f"one of {len(str(m))} digits")
    spread = float(sigma) * float(np.linalg.norm(np.asarray(x), axis=1).max())
    if spread * spread > LARGEST_EXPONENT_A_PRIORI:
        raise expected(
            "x",
            f"sigma^2 |x_i|^2 <= {LARGEST_EXPONENT_A_PRIORI:g}",
            f"{spread * spread:.3g}, beyond which moments overflow",
            "Scale the data, or take a smaller sigma",
        )
    prior = Prior(inputs=np.asarray(x), targets=np.asarray(y), sigma=sigma, model=model, failure=delta)
    if m is not None:
        return _prior_certificate(prior, m, step_size)
    for power in range(4 * 8, 4 * 80):
        found = _prior_certificate(prior, 2 * round(2 ** (power / 4 - 1)), step_size)
        if found.holds:
            break
    return found


def _prior_certificate(prior: Prior, m: int, step_size: float | None) -> Certificate:
    values = prior.kernel.values
    # the drawn kernel is at most half as large again as its limit
    rate = (
        STABILITY / (1.6 * max(float(values[-1]), float(np.finfo(float).tiny))) if step_size is None else m * step_size
    )
    certificate = Certificate(
        holds=False,
        model=prior.model,
        m=m,
        step_size=rate / m,
        rate=0.0,
        radius=math.inf,
        deviation=math.inf,
        smallest=float(values[0]),
        largest=float(values[-1]),
        drift=math.inf,
        initial_error=OUTWARD * float(np.linalg.norm(prior.targets)),
        steps=(
            prior.positive,
            Step("the step is stable: m eta lambda_max(H*)", OUTWARD * rate * float(values[-1]), 0.99),
        ),
        failure=prior.failure,
    )
    if not all(step.holds for step in certificate.steps):
        return certificate
    _check_not_vanishing(prior.targets, rate * float(values[0]))
    reference = prior.reference(m, rate)
    if isinstance(reference, Step):
        return dataclasses.replace(certificate, steps=(*certificate.steps, reference))
    drift, total = 0.0, prior.total(m, reference, 0.0)
    for _ in range(PASSES):
        small, parts = prior.drift(m, total)
        computed = sum(parts.values())
        steps = [small, *reference.steps(drift)]
        if drift:
            steps.append(
                Step("the drift implies itself: computed in the ball, over the one assumed", computed / drift, 1.0)
            )
        if not all(step.holds for step in steps[:3]) or not computed or (drift and steps[3].holds):
            break
        drift = 2 * computed
        if not all(step.holds for step in reference.steps(drift)):
            steps[1:3] = reference.steps(drift)
            break
        total = prior.total(m, reference, drift)
    last, decrease = descent(reference, drift)
    steps = [*certificate.steps, *steps, last]
    holds = (drift > 0 or not computed) and all(step.holds for step in steps)
    return dataclasses.replace(
        certificate,
        holds=holds,
        rate=decrease if holds else 0.0,
        radius=total,
        deviation=total,
        smallest=reference.smallest,
        largest=reference.largest,
        drift=drift,
        steps=tuple(steps),
        drift_parts=parts,
        forecast=Forecast(reference, drift, decrease) if holds else None,
    )


@overload
def find_m(
    x: Inputs, y: Float[Array, "n o"], *, remove_offset: bool = ..., **wanted: Unpack[Search]
) -> Certificate: ...


@overload
def find_m(
    x: Inputs, *, labels: Sequence[Any] | Array | np.ndarray, loss: float | None = ..., **wanted: Unpack[Search]
) -> MarginCertificate: ...


def find_m(
    x: Inputs,
    y: Float[Array, "n o"] | None = None,
    *,
    labels: Sequence[Any] | Array | np.ndarray | None = None,
    loss: float | None = None,
    sigma: float = 1.0,
    model: ModelName | Prefix = "fixed",
    key: KeyArray | None = None,
    symmetric: bool = True,
    step_size: float | None = None,
    remove_offset: bool = False,
    start: int = 64,
    largest: int = 2**24,
    resolution: float = 0.02,
    progress: Progress = lambda *_: None,
) -> Certificate | MarginCertificate:
    """Return the smallest certified prefix length: powers of two until one is certified, then bisection.

    A longer prefix is the shorter one continued (same ``key``), but whether it is certified need not be monotone: the
    result is certified, and a length ``resolution`` shorter was refused (or is 2).

    Args:
        x, y, labels, loss, sigma, key, symmetric, step_size, remove_offset: as in ``certify``. (A given step is too large for
            some length on, since m eta lambda_max grows with m: then none may be found.)
        model: "fixed" or "tied"; with labels "fixed".
        start: the first length tried, even; if it is certified, shorter ones are tried too.
        largest: the last one; the certificate returned for it does not hold if none did.
        resolution: relative width at which the bisection stops.
        progress: told of each length that was tried and whether it is certified: a search may take minutes.

    Returns:
        The certificate. If the limit kernel itself is singular, or does not separate the labels, one that does not hold, at
        ``start``, as no length mends it.

    Raises:
        ValueError: as ``certify``; lengths that are odd or not in order, a resolution that is not positive.
    """
    if not isinstance(model, str):
        given = "y" if labels is None else "labels=labels"
        raise expected(
            "model", '"tied" or "fixed"', type(model).__name__, f"certify(x, {given}, model=model) certifies a model"
        )
    if (y is None) == (labels is None):
        raise expected("y and labels", "one of the two", "neither" if y is None else "both")
    if y is not None:
        check_data(x, y, model, None)
    check_positive("sigma", sigma)
    check_positive("resolution", resolution)
    for name, length in (("start", start), ("largest", largest)):
        check_count(name, length, 2)
        if length % 2:
            raise expected(name, "an even number of prefix tokens", length)
    if largest < start:
        raise expected("largest", f"at least start = {start}", largest)
    drawn: Drawn = {"sigma": sigma, "model": model, "key": key, "symmetric": symmetric, "step_size": step_size}
    if labels is not None:
        if remove_offset:
            raise expected("remove_offset", "None beside labels", remove_offset)
        check_inputs("x", x)
        classes = classes_of(labels, len(x))
        return search(
            lambda m: certify(x, labels=labels, loss=loss, m=m, **drawn),
            start,
            largest,
            resolution,
            lambda _: not separates(x, classes, sigma),
            progress,
        )
    if loss is not None:
        raise expected("loss", "None without labels", loss)
    targets = y
    assert targets is not None
    return search(
        lambda m: certify(x, targets, remove_offset=remove_offset, m=m, **drawn),
        start,
        largest,
        resolution,
        lambda _: _singular(x, targets, sigma, model),
        progress,
    )


def _singular(x: Array, y: Array, sigma: float, model: ModelName) -> bool:
    """Whether lambda_min of the limit kernel is within rounding of zero, as for equal inputs."""
    limit = np.asarray(limit_ntk(x, sigma=sigma, model=model, outputs=outputs_wanted(y, model)))
    if not np.isfinite(limit).all():
        return False
    enclosure = eigen_enclosure(limit.reshape(y.size, -1))
    return float(enclosure.values[0]) <= float(enclosure.radius)


def _certify(
    tokens: Tokens, targets: np.ndarray, step_size: float | None, x_test: np.ndarray | None, remove_offset: bool
) -> Certificate:
    """Return the a-posteriori certificate: theory/certificate.md, section 5, in its order."""
    spread, kernel_error = tokens.second_moments()
    kernel = np.asarray(prefix_ntk(tokens.prefix, jnp.asarray(tokens.inputs)))
    enclosure = eigen_enclosure(kernel.reshape(targets.size, -1))
    smallest = float(enclosure.values[0]) - OUTWARD * (kernel_error + float(enclosure.radius))
    top, tiny = float(enclosure.values[-1]), float(np.finfo(float).tiny)
    if step_size is None:
        rate = STABILITY / (math.sqrt(max(top, tiny)) + math.sqrt(max(smallest, 0)) / 10) ** 2
    else:
        rate = tokens.m * step_size
    outputs, outputs_error = (np.zeros_like(targets), 0.0) if remove_offset else tokens.outputs_now()
    error = (outputs - targets).ravel()
    rounding = outputs_error + float(np.finfo(float).eps * np.linalg.norm(error))
    first = [
        Step(
            "the kernel is positive: rounding of lambda_min below lambda_min",
            OUTWARD * float(enclosure.values[0]) - smallest + tiny,
            smallest,
        ),
        Step("the step is stable: m eta lambda_max of the linearized run", OUTWARD * rate * top, 0.99),
    ]
    refused = Certificate(
        holds=False,
        model=tokens.variant.name,
        m=tokens.m,
        step_size=rate / tokens.m,
        rate=0.0,
        radius=math.inf,
        deviation=math.inf,
        smallest=smallest,
        largest=top,
        drift=math.inf,
        initial_error=OUTWARD * (float(np.linalg.norm(error)) + rounding),
        steps=tuple(first),
    )
    if not all(step.holds for step in first):
        return refused

    _check_not_vanishing(error, rate * smallest)
    reference = Reference(enclosure, kernel_error, error, rounding, rate)
    path, between = reference.polygon()
    movement = tokens.movement(path.reshape(-1, *targets.shape), between)
    for growth in SEARCHES:
        closure = close(tokens, reference, movement, spread, growth)
        last, decrease = descent(reference, closure.drift)
        steps = (*first, *closure.steps, last)
        holds, total = all(step.holds for step in steps), closure.claimed.total
        if holds:
            break
    radii = (movement.ravel()[: tokens.rows] + total) * OUTWARD
    forecast = Forecast(reference, closure.drift, decrease) if holds else None
    return dataclasses.replace(
        refused,
        holds=holds,
        rate=decrease if holds else 0.0,
        radius=float(radii.max()),
        deviation=total,
        smallest=reference.smallest,
        largest=reference.largest,
        drift=closure.drift,
        steps=steps,
        drift_parts=closure.parts,
        radii=np.repeat(radii, 2) if tokens.paired else radii,
        forecast=forecast,
        elsewhere=None
        if forecast is None or x_test is None
        else elsewhere(tokens, kernel_error, movement, total, forecast, x_test),
    )


def _check_not_vanishing(error: np.ndarray, slowest: float) -> None:
    """Refuse numbers whose squares underflow; an error of zero is one."""
    largest = float(np.abs(error).max())
    if 0 < largest < SMALLEST_ERROR or slowest < SMALLEST_ERROR:
        raise expected(
            "y and step_size",
            f"|F(0) - Y| and m eta lambda_min above {SMALLEST_ERROR:g}, whose squares are floats",
            f"|F(0) - Y| = {largest:.3g} and m eta lambda_min = {slowest:.3g}",
        )


def descent(reference: Reference, drift: float) -> tuple[Step, float]:
    """Return the inequality that every step descends, and by how much: the last step of the proof.

        |e(t+1)|^2 <= |e(t)|^2 - m eta lambda_min ( 2 (1 - 2 eps - eps^2) - beta (1 + eps)^2 ) |e(t)|^2

    with eps = drift / sqrt(lambda_min), beta = m eta (sqrt(lambda_max) + drift)^2.
    """
    relative = OUTWARD * drift / math.sqrt(reference.smallest)
    stability = OUTWARD * reference.rate * (math.sqrt(reference.largest) + drift) ** 2
    against = OUTWARD * (4 * relative + 2 * relative**2 + stability * (1 + relative) ** 2)
    decrease = reference.rate * reference.smallest * (2 - against) / OUTWARD
    return Step("every step descends: 4 eps + 2 eps^2 + beta (1 + eps)^2", against, 2 / OUTWARD), decrease
