"""What a drawn prefix keeps with the probability that the a-priori certificate counts on: how often it does, over draws."""

from __future__ import annotations

import functools

import numpy as np

from ntk_prefix.certificate.prior import Limits, Prior
from ntk_prefix.random_prefix import ModelName
from theory.claim import Check, Undecidable
from theory.problem import Problem
from theory.scales import FAILURE

DRAWS, TOKENS = 200, 256
"""Prefixes, and independent tokens of each: the limits are stated for any number of them."""

BEYOND = 0.25
"""Of other draws, how many are beyond a limit that is not to be kept. Chebyshev's limits are far from what 200 draws show where
tails are heavy, at large sigma, and a fixed part of them may be kept too."""


def _found(prior: Prior, random: np.random.Generator) -> Limits:
    """Return what the limits speak of, of one drawn prefix."""
    (n, d), outputs = prior.inputs.shape, prior.targets.shape[1]
    w = prior.sigma * random.normal(size=(TOKENS, d))
    tilts = np.exp(prior.inputs @ w.T - prior.sigma**2 / 2 * np.square(prior.inputs).sum(1)[:, None])
    tied = prior.variant.has_value_part
    signs = random.choice([-1.0, 1.0], size=(TOKENS, 1 if tied else outputs))
    blocks = np.einsum("ir,rk,ic->ikrc", tilts, signs * w if tied else signs, prior.inputs)
    if tied:
        blocks += np.einsum("ir,r,kc->ikrc", tilts, signs[:, 0], np.eye(d))
    values, basis = prior.kernel.values, prior.kernel.basis
    root, inverse = (basis * values**power @ basis.T for power in (0.5, -0.5))
    white = inverse @ blocks.reshape(n * outputs, -1)
    means = tilts.mean(1)
    return Limits(
        kernel=float(np.linalg.norm(white @ white.T / TOKENS - np.eye(len(white)))),
        normalizers=float(np.linalg.norm(inverse @ (np.repeat(means, outputs)[:, None] * root) - np.eye(len(white)))),
        least=float(means.min()),
        highest=tilts.max(1),
        squares=np.square(tilts).mean(1),
        longest=float(np.linalg.norm(w, axis=1).max()),
    )


@functools.lru_cache
def _drawn(problem: Problem, model: ModelName, stream: int = 8) -> tuple[Prior, list[Limits]]:
    """Return the a-priori certificate's view of the data, and prefixes; the measurement and its control share them.

    Raises:
        Undecidable: the limit kernel is not positive beyond its rounding, as the certificate bounds it.
    """
    inputs, targets = np.asarray(problem.inputs), np.asarray(problem.targets)
    prior = Prior(inputs=inputs, targets=targets, sigma=problem.sigma, model=model, failure=FAILURE)
    if not (positive := prior.positive).holds:
        raise Undecidable(
            f"undecidable in float64: half of the smallest eigenvalue of H* ({model}), {positive.allowed:.1e}, is below the "
            f"bound of its rounding, {positive.used:.1e}: take a smaller sigma, or rows that are less alike"
        )
    random = np.random.default_rng([problem.seed, stream])
    return prior, [_found(prior, random) for _ in range(DRAWS)]


def failures(problem: Problem, model: ModelName, nearer: float = 1.0) -> list[Check]:
    """Return for each limit the share of draws that do not keep it, which a sixth of delta allows.

    Args:
        problem: the data.
        model: of the prefix.
        nearer: divides the distances of the limits from what they are about: means and medians. Above 1 they are also no
            farther than where ``BEYOND`` of other draws are beyond them.

    Raises:
        Undecidable: their limit kernel is not positive beyond its rounding.
    """
    prior, drawn = _drawn(problem, model)
    others = _drawn(problem, model, 9)[1] if nearer > 1 else []
    limits = prior.limits(2 * TOKENS)
    spread = prior.sigma * np.linalg.norm(prior.inputs, axis=1)
    # of each, what it is expected to be at most: 0 of distances, the mean of means, the median token of extremes
    mean = Limits(
        0.0, 0.0, 1.0, np.exp(-(spread**2) / 2), np.exp(spread**2), prior.sigma * prior.inputs.shape[1] ** 0.5
    )
    checks = []
    for name in Limits._fields if prior.variant.has_value_part else Limits._fields[:-1]:
        center, limit = np.asarray(getattr(mean, name)), np.asarray(getattr(limits, name))
        sides = np.sign(limit - center)
        reach = np.abs(limit - center) / nearer
        if others:
            beyond = [sides * (np.asarray(getattr(each, name)) - center) for each in others]
            reach = np.minimum(reach, np.quantile(beyond, 1 - BEYOND, axis=0))
        failed = [bool((sides * (np.asarray(getattr(each, name)) - center) > reach).any()) for each in drawn]
        what = f"{prior.model}: share of {DRAWS} draws that do not keep the limit of {name}"
        checks.append(Check(what, float(np.mean(failed)), prior.failure / len(Limits._fields), part="events"))
    return checks
