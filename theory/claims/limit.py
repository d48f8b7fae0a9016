"""The kernel of a drawn prefix tends to the closed-form limit at the Monte-Carlo rate."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix import RandomPrefix
from ntk_prefix.certificate.cubature import degree_five
from ntk_prefix.kernels import limit_ntk, prefix_ntk
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Kernel
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, Undecidable, relative_error
from theory.descent import MODELS, limit_of
from theory.problem import Problem
from theory.scales import asymptotic_length, beyond, expected_error, indistinct

TYPICAL = 1.1
"""Largest median of a distance over its derived root mean square: a quantity that is skewed to the right has it below 1."""

REPEATS = (3, 24)
"""Fewest and most draws of one length; between them as many as share the tokens of the fewest at the longest."""


WRONG = 1.1
"""The control's sigma, over the right one."""

TOKENS, INPUTS, CONSTANT_SIGMA = 1024, 4, 0.25
"""Where the constant is measured: at larger sigma the squares have heavy tails."""

DRAWS, MOST_DRAWS = 200, 1600

NEAR, LARGER = 0.25, 1.5
"""How far the mean square may be from the derived one, over it: five standard errors; and the control's constant."""

NARROW = 0.12
"""Largest half width of an interval that is to tell -1/2 from 0."""

ALLOWED = 0.02
"""How far an interval may be from -1/2: what lengths that a computer has leave of terms beyond the first."""

FITTED = 3
"""Lengths that a slope is fitted to, at least."""


def _lengths(problem: Problem) -> list[int]:
    return [2**power for power in (range(6, 25, 2) if problem.full else (6, 8, 10, 12, 14, 15, 16, 17, 18, 19))]


def _spread(problem: Problem, sigma: float) -> float:
    return sigma * float(np.linalg.norm(problem.inputs, axis=1).max())


def _undecidable(problem: Problem) -> str | None:
    lengths, spread = _lengths(problem), _spread(problem, problem.sigma)
    if (reason := beyond(spread, lengths[-FITTED], problem)) is not None:
        return reason
    wrong = dataclasses.replace(problem, sigma=WRONG * problem.sigma)
    apart = min(relative_error(limit_of(wrong, model), limit_of(problem, model)) for model in MODELS)
    return indistinct(apart, expected_error(spread, lengths[-1]), lengths[-1], problem, times=3)


def _measure(problem: Problem) -> Evidence:
    found = _approach(problem)
    return dataclasses.replace(found, checks=found.checks + tuple(_constant(problem)))


def _approach(problem: Problem, repeats: tuple[int, int] = REPEATS, wrong_sigma: float = 1.0) -> Evidence:
    """Measure errors against the limit, for both models; ``wrong_sigma`` multiplies the sigma of the limit."""
    lengths = _lengths(problem)
    fewest, most = repeats
    checks: list[Check] = []
    errors: dict[str, dict[int, np.ndarray]] = {}
    slopes: dict[str, fits.Exponent] = {}
    for sigma in [problem.sigma] + ([0.5] if problem.full and problem.sigma != 0.5 else []):
        start = asymptotic_length(_spread(problem, sigma))
        for model in MODELS:
            name = f"{model}, sigma = {sigma:g}"
            limit = limit_ntk(problem.inputs, sigma=sigma * wrong_sigma, model=model)
            found = {
                m: np.array(
                    [
                        _errors(problem, model, sigma, m, repeat, limit)
                        for repeat in range(min(most, fewest * lengths[-1] // m) if m >= start else 2 * fewest)
                    ]
                )
                for m in lengths
            }
            errors[name] = {m: both[:, 0] for m, both in found.items()}
            points = [(m, error) for m, found in errors[name].items() if m >= start for error in found]
            slopes[name] = fits.exponent(*zip(*points, strict=True))
            slope = slopes[name]
            if wrong_sigma == 1:
                fits.check_narrow(slope, NARROW, f"the kernel's error ({name})")
                fits.check_settled(slope, -0.5, ALLOWED, f"the kernel's error ({name})")
            what = f"{name}: distance of the slope's interval {slope} from -1/2"
            checks.append(Check(what, slope.gap(-0.5), ALLOWED, part=model))
            if problem.full:  # enough draws for the estimate itself to be held to a tolerance
                checks.append(Check(f"{name}: |slope + 1/2|", abs(slope.value + 0.5), 0.05, part=model))
            derived = math.sqrt(variance(np.asarray(problem.inputs[:INPUTS]), sigma, model))
            scaled = np.concatenate([math.sqrt(m) * both[:, 1] for m, both in found.items() if m >= start])
            what = f"{name}: median |H(W(0)) - H*| sqrt(m) / derived, first {min(INPUTS, problem.n)} rows"
            checks.append(Check(what, float(np.median(scaled)) / derived, TYPICAL, part=model))
    parameters = {
        "tokens": lengths[-1],
        "fitted_from": asymptotic_length(_spread(problem, problem.sigma)),
        "fewest_repeats": fewest,
        "most_repeats": most,
    }
    return Evidence(tuple(checks), parameters, {"errors": errors, "slopes": slopes})


@functools.cache
def _squared_distance(problem: Problem, model: ModelName, narrow: float) -> float:
    """Return m times the mean of |H(W(0)) - H*|^2 over as many draws as bring its standard error below ``narrow``.

    Raises:
        Undecidable: no number of draws that one can make does.
    """
    inputs = problem.inputs[:INPUTS]
    limit = np.asarray(limit_ntk(inputs, sigma=problem.sigma, model=model))
    found: list[float] = []
    while len(found) < MOST_DRAWS:
        for _ in range(DRAWS):
            key = problem.key("limit", model, "constant", len(found))
            prefix = RandomPrefix(key=key, d=problem.d, m=TOKENS, sigma=problem.sigma, model=model, symmetric=False)
            found.append(TOKENS * float(np.square(np.asarray(prefix_ntk(prefix, inputs)) - limit).sum()))
        # of one entry or two the squares scatter more: there the draws may be half as many as wanted
        if np.std(found) <= (narrow if len(found) < MOST_DRAWS else 2 * narrow) * math.sqrt(len(found)):
            return float(np.mean(found))
    raise Undecidable(
        f"undecidable by {MOST_DRAWS} draws: at sigma = {problem.sigma:g} the squared distance of a drawn kernel ({model}, "
        f"m = {TOKENS}) has too heavy a tail: take a smaller sigma"
    )


def variance(x: np.ndarray, sigma: float, model: ModelName) -> float:
    """Return lim m E|H(W(0)) - H*|_F^2 for m independent tokens (theory/README.md, section 4).

        sum_ij E| t_i t_j M_ij(w) - (t_i + t_j - 1) H*_ij |_F^2 ,    t_i = e^(w.x_i - s |x_i|^2 / 2) ,    s = sigma^2

    with M_ij = I + x_j w^T + w x_i^T + c w w^T (tied), c a a^T (fixed).
    """
    limit = np.asarray(limit_ntk(jnp.asarray(x), sigma=sigma, model=model)).transpose(0, 2, 1, 3)
    places = itertools.product(range(len(x)), repeat=2)
    return sum(_block_variance(x[i], x[j], limit[i, j], sigma, model) for i, j in places)


def _block_variance(left: np.ndarray, right: np.ndarray, block: np.ndarray, sigma: float, model: ModelName) -> float:
    """Return one summand: tilts move the Gaussian, and what is left is a polynomial of degree 4, integrated exactly."""
    c, s, width = float(left @ right), sigma**2, len(left)
    nodes, weights = degree_five(width)

    def mean(a: int, b: int, squared: bool) -> float:
        """E t_i^a t_j^b of |M|^2, or of <M, H*>."""
        shift = a * left + b * right
        tilt = math.exp(s / 2 * float(shift @ shift - a * left @ left - b * right @ right))
        if model == "fixed":  # signs are independent of keys, and a square has the mean 1
            return tilt * (width**2 * c**2 if squared else c * float(np.trace(block)))
        w = sigma * nodes + s * shift
        token = np.eye(width) + right[:, None] * w[:, None] + w[:, :, None] * left + c * w[:, :, None] * w[:, None]
        return tilt * float(weights @ (token * (token if squared else block)).sum((1, 2)))

    crossed = mean(2, 1, False) + mean(1, 2, False) - mean(1, 1, False)
    own = math.exp(s * left @ left) + math.exp(s * right @ right) + 2 * math.exp(s * c) - 3
    return mean(2, 2, True) - 2 * crossed + own * float(np.square(block).sum())


def _constant(problem: Problem, larger: float = 1.0) -> list[Check]:
    """Hold the mean square distance to its constant over m, or to a ``larger`` one: an exponent alone lets any pass."""
    checks = []
    problem = dataclasses.replace(problem, sigma=min(problem.sigma, CONSTANT_SIGMA))
    for model in MODELS:
        derived = variance(np.asarray(problem.inputs[:INPUTS]), problem.sigma, model)
        found = _squared_distance(problem, model, NEAR / 5 * derived)
        what = f"{model}: |m E|H(W(0)) - H*|^2 / derived - 1|, m = {TOKENS}, sigma = {problem.sigma:g}"
        checks.append(Check(what, abs(found / (larger * derived) - 1), NEAR, part=f"{model}, constant"))
    return checks


def _other_sigma(problem: Problem) -> Evidence:
    return _approach(problem, repeats=(1, 3), wrong_sigma=WRONG)


def _larger(problem: Problem) -> Evidence:
    return Evidence(tuple(_constant(problem, LARGER)))


def _errors(
    problem: Problem, model: ModelName, sigma: float, m: int, repeat: int, limit: Kernel
) -> tuple[float, float]:
    """Return a drawn kernel's relative distance from the limit, and the distance of its first rows' part."""
    key = problem.key("limit", model, m, repeat)
    # m independent tokens: of a symmetric prefix only m / 2 are, and its error is that of half the length
    prefix = RandomPrefix(key=key, d=problem.d, m=m, sigma=sigma, model=model, symmetric=False)
    found = prefix_ntk(prefix, problem.inputs)
    first = (found - limit)[:INPUTS, :, :INPUTS]
    return relative_error(found, limit), float(jnp.linalg.norm(first))


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(len(evidence.series["errors"]) // 2)
    for index, (name, errors) in enumerate(evidence.series["errors"].items()):
        axis, model = axes[index // 2], name.split(",")[0]
        figures.power_law(axis, errors, model, figures.COLORS[model], evidence.series["slopes"][name])
        wrong = control.series["errors"][name]
        axis.plot(
            list(wrong),
            [np.median(found) for found in wrong.values()],
            ":",
            color=figures.COLORS[model],
            label=f"{model}, control",
        )
        if index % 2:
            last = max(errors)
            figures.guide(
                axis, list(errors), 0.6 * np.median(errors[last]) * (last / min(errors)) ** 0.5, -0.5, "slope -1/2"
            )
            figures.label(
                axis,
                title=name.split(", ")[1],
                x="prefix length m",
                y="|H(W(0)) - H*| / |H*|  (Frobenius)",
                log="xy",
            )
    return figure


CLAIM = Claim(
    name="limit",
    title="The kernel of an infinite prefix",
    statement="H(W(0)) -> H* as m^(-1/2), m E|H(W(0)) - H*|^2 tends to a closed form;  tied: "
    "H* = e^(s c)[(1 + s c) I + x_j mu^T + mu x_i^T + c mu mu^T], "
    "fixed: H* = c e^(s c) I, with s = sigma^2, c = x_i.x_j, mu = s (x_i + x_j)",
    proof="4",
    computed_by=("kernels.limit_ntk",),
    source="derived (theory/README.md); the paper assumes a limit and gives no formula",
    measure=_measure,
    controls=(
        *(
            Control(f"{model}, another sigma", "the same limit at a sigma that is 10 % too large", _other_sigma, model)
            for model in MODELS
        ),
        *(
            Control(f"{model}, another constant", "one that is a half larger", _larger, f"{model}, constant")
            for model in MODELS
        ),
    ),
    draw=_draw,
    undecidable=_undecidable,
    caption="Relative distance between the kernel of a drawn prefix and the closed-form limit: median over draws, band "
    "from the smallest to the largest; slopes are fitted from the length at which the variance is seen "
    "(theory/README.md, section 4), with 95 % intervals. Dotted: the limit at a wrong sigma.",
)
