"""Attention in almost linear time is possible while entries stay below sqrt(log n), and what it costs above.

B is the largest entry of queries and keys, and a score is ``s = q . k / d``, so that |s| <= B^2 whatever the width d is: the
scale in which the threshold is B = sqrt(log n). A layer that divides by sqrt(d) has it at B = sqrt(log n / sqrt(d)).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import brentq
from scipy.special import gammaln, lambertw

from ntk_prefix import feature_map, softmax_attention
from ntk_prefix.feature_maps import attention_error_bound
from ntk_prefix.polynomial import BLOCK, polynomial_attention, polynomial_degree
from theory import figures, fits, nearest
from theory.claim import Check, Claim, Control, Evidence
from theory.problem import Problem

ERROR = 1e-2
"""Of the outputs, over max|V|, for the worst values there are."""

POWERS = range(10, 21)
"""n = 2^power tokens of width d = power = log2 n: the least width that has n different sign vectors."""

FEWER = 0.8
"""The nearest polynomial's degree over Taylor's, at most, from a largest score of 1 on."""

FAR = (125, 250, 500, 1000)
"""Powers of two at which the exponents of the formulas are read off: no data, logarithms only."""

PROVED_GROWTH = math.exp(1 + float(lambertw(math.exp(-1)).real))
"""k (log k - 1) = 1: the degree proved to suffice grows as k times the largest score (derived)."""

ROUNDING = 1e-12
"""Below it a bound is a statement about float64, not about polynomials."""

Scores = Callable[[float], float]

SMALL: dict[str, Scores] = {"B = 1/2": lambda log_n: 1 / 4, "B = (log n)^(1/4)": math.sqrt}
"""The largest score S = B^2 as a function of log n, where it is o(log n)."""

CRITICAL = {"beta = 1/4": 1 / 4, "beta = 1/2": 1 / 2, "beta = 1": 1.0}
"""beta = B / sqrt(log n), where B is of that order."""


def _largest(beta: float) -> Scores:
    return lambda log_n: beta**2 * log_n


REGIMES = SMALL | {name: _largest(beta) for name, beta in CRITICAL.items()}
BELOW, ABOVE = ("B = 1/2", "beta = 1/4"), "beta = 1"
BETAS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25)
GRID = {f"{beta:g}": _largest(beta) for beta in BETAS}


class Tokens(NamedTuple):
    """How many keys every sampled query sees at which score; scores are in units of the largest, B^2."""

    score: np.ndarray
    """[queries, levels], in [-1, 1]."""
    keys: np.ndarray
    """[queries, levels]."""


# ---------------------------------- Sequences, and how far the polynomial is from attention on them


@functools.lru_cache(maxsize=1)
def _drawn(seed: int, longest: int) -> np.ndarray:
    """Return signs [n, d] of the longest sequence: every token is its own query and its own key, so the score B^2 occurs.

    Shorter sequences are its beginning. Entries +-B use the norm up: none of that norm score higher.
    """
    return 2 * np.random.default_rng([seed, 16]).integers(0, 2, (2**longest, longest), np.int8) - 1


def _sampled(n: int, queries: int, causal: bool) -> np.ndarray:
    """Return positions of the queries to look at; with a causal mask they see from all to few of the keys."""
    if causal:
        return np.unique((n * 2.0 ** -np.linspace(0, math.log2(n), queries)).astype(int)) - 1
    return np.linspace(0, n - 1, queries).astype(int)


def _signs(problem: Problem, power: int, causal: bool) -> Tokens:
    """Return entries +-B: the score of two tokens that differ in h places is B^2 (1 - 2 h / d), so counting h is enough."""
    keys = _drawn(problem.seed, POWERS[-1])[: 2**power, :power].astype(np.float32)
    rows = _sampled(2**power, 64 if problem.full else 16, causal)
    count = np.zeros((len(rows), power + 1))
    for start in range(0, len(keys), 2**16):  # streamed: [queries, n] scores would not fit for long sequences
        places = np.rint((power - keys[rows] @ keys[start : start + 2**16].T) / 2).astype(int)
        for query, (row, found) in enumerate(zip(rows, places, strict=True)):
            seen = found[: max(0, row + 1 - start)] if causal else found
            count[query] += np.bincount(seen, minlength=power + 1)
    return Tokens(np.broadcast_to(1 - 2 * np.arange(power + 1) / power, count.shape), count)


def _uniform(problem: Problem, power: int) -> Tokens:
    """Return entries uniform in (-B, B): the same norm, but no score comes near B^2."""
    random = np.random.default_rng([problem.seed, 17, power])
    keys = random.uniform(-1, 1, (2**power, power))
    score = keys[_sampled(2**power, 16, False)] @ keys.T / power
    return Tokens(score, np.ones_like(score))


def _distances(tokens: Tokens, largest: float, degrees: int) -> np.ndarray:
    """Return the output error of every degree 0..degrees, for the worst values in [-1, 1] and the worst sampled query.

    Attention rows p and p' of the exponential and the polynomial differ by sum_j |p'_j - p_j|, which is the largest
    |sum_j (p'_j - p_j) v_j| over |v| <= 1. The polynomial is evaluated on scores: the features give the same number.
    """
    worst = np.zeros(degrees + 1)
    for unit, count in zip(*tokens, strict=True):  # one query at a time: n numbers
        scores = largest * unit
        exact = count * np.exp(scores - largest)
        exact /= exact.sum()
        term = count.copy()
        total = count.copy()
        for degree in range(degrees + 1):
            if degree:
                term *= scores / degree
                total += term
            worst[degree] = max(worst[degree], np.abs(total / total.sum() - exact).sum())
    return worst


def _needed(errors: np.ndarray) -> int:
    """Return the smallest degree from which on every one keeps the error."""
    return int(np.flatnonzero(~(errors <= ERROR)).max(initial=-1)) + 1


def _between(errors: np.ndarray) -> float:
    """Return the same between whole degrees, log error interpolated: for curves without the steps of whole numbers."""
    whole = _needed(errors)
    if whole == 0:
        return 0.0
    above, below = np.log(errors[whole - 1 : whole + 1] / ERROR)
    return whole + float(below / (above - below))


# ------------------------------------------------------------------------------ What a degree costs


def log_rank(width: int, degree: float) -> float:
    """Return log C(d + g, g)."""
    return float(gammaln(width + degree + 1) - gammaln(width + 1) - gammaln(degree + 1))


def operations(power: int, degree: float, causal: bool = False) -> float:
    """Return multiplications of polynomial attention over n = 2^power tokens of width d = power.

    Every token's features once as a key and once as a query (one product a feature), then R (d + 1) products to add
    it to the state and as many to read it; causal: a block's own scores, their polynomial and their values.
    """
    own = BLOCK * (2 * power + 1 + degree) if causal else 0
    return 2.0**power * (math.exp(log_rank(power, degree)) * (2 * (power + 1) + 2) + own)


def exact_operations(power: int, causal: bool = False) -> float:
    """Return multiplications of softmax attention: scores, and values with the column of ones, for every pair that is seen."""
    return 4.0**power * (2 * power + 1) / (2 if causal else 1)


def rank_exponent(growth: float) -> float:
    """Return lim log r / log n for d = log2 n and a degree g = growth log n: Stirling's formula on C(d + g, g).

    (w + growth) log(w + growth) - w log w - growth log growth,  w = 1 / log 2.
    """
    width = 1 / math.log(2)
    return (width + growth) * math.log(width + growth) - width * math.log(width) - growth * math.log(growth)


# ---------------------------------------------------------------------------------------- The claim


class _Errors(NamedTuple):
    found: dict[tuple[str, str], dict[int, np.ndarray]]
    """By kind of sequence and regime, for every power: the error of each degree up to the proved one."""
    proved: dict[str, dict[int, int]]


def _errors(problem: Problem, regimes: dict[str, Scores], kinds: tuple[str, ...]) -> _Errors:
    """Return errors of all degrees over all lengths; the uniform kind over shorter sequences in the quick profile."""
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    proved: dict[str, dict[int, int]] = {name: {} for name in regimes}
    for power in POWERS:
        for kind in kinds:
            if kind == "uniform" and not problem.full and power > 13:
                continue
            tokens = _uniform(problem, power) if kind == "uniform" else _signs(problem, power, kind == "causal")
            for name, score in regimes.items():
                largest = score(power * math.log(2))
                proved[name][power] = polynomial_degree(largest, ERROR)
                found.setdefault((kind, name), {})[power] = _distances(tokens, largest, proved[name][power])
    return _Errors(found, proved)


def _accuracy(errors: _Errors, degrees: dict[str, dict[int, int]]) -> list[Check]:
    """Whether given degrees keep the error everywhere, by regime."""
    checks = []
    for name, used in degrees.items():
        worst = max(
            float(found[used[power]])
            for (_, regime), lengths in errors.found.items()
            if regime == name
            for power, found in lengths.items()
        )
        checks.append(Check(f"{name}: largest error of the degree used, n = 2^10 to 2^20", worst, ERROR, part=name))
    return checks


def _nearest(problem: Problem, degrees: dict[str, nearest.Degrees]) -> list[Check]:
    """Whether given degrees of the nearest polynomial keep the error, by regime, where there is one."""
    tokens = functools.partial(_signs, problem)
    found = {name: nearest.largest_error(REGIMES[name], used, tokens, ERROR) for name, used in degrees.items()}
    what = f"largest error of the nearest polynomial's proved degree, up to S = {nearest.LARGEST_SCORE:g}"
    return [Check(f"{name}: {what}", worst, ERROR, part=name) for name, worst in found.items()]


def _bounded(errors: _Errors) -> Check:
    """Measure every error of every degree that the bound speaks of, over the bound."""
    worst = 0.0
    for (_, name), lengths in errors.found.items():
        for power, found in lengths.items():
            norm = math.sqrt((REGIMES | GRID)[name](power * math.log(2)))
            for degree, error in enumerate(found):
                bound = attention_error_bound(feature_map("taylor", degree=degree).error_bound(norm), 1.0)
                worst = max(worst, float(error) / max(bound, ROUNDING))
    return Check("largest error / Taylor's bound, every degree and length", worst, 1)


def _measure(problem: Problem) -> Evidence:
    errors = _errors(problem, REGIMES | GRID, ("full", "causal"))
    checks = [*_accuracy(errors, {name: errors.proved[name] for name in REGIMES}), _bounded(errors)]
    degrees = {
        (kind, name): {power: _needed(e) for power, e in errors.found[kind, name].items()}
        for kind in ("full", "causal")
        for name in REGIMES
    } | {("proved", name): errors.proved[name] for name in REGIMES}
    near = {name: nearest.degrees(score, ERROR) for name, score in REGIMES.items()}
    share = max(nearest.share_of_taylor(REGIMES[name], used, ERROR) for name, used in near.items())
    checks += _nearest(problem, near)
    checks.append(Check("the nearest polynomial's proved degree / Taylor's, scores from 1 to 8", share, FEWER))
    checks += _counted(degrees) + _far() + _same_numbers(problem)
    seconds, timed = _timed(problem, degrees["full", "beta = 1/4"])
    crossing = _crossing(errors)
    typical = _errors(problem, {name: REGIMES[name] for name in ("beta = 1/2", "beta = 1")}, ("uniform",)).found
    parameters = {
        "tokens": 2 ** POWERS[-1],
        "width": POWERS[-1],
        "error": ERROR,
        "beta_where_the_proved_degree_costs_n_squared": brentq(
            lambda beta: rank_exponent(PROVED_GROWTH * beta**2) - 1, 0.1, 1
        ),
        "beta_where_that_of_chebyshev_s_series_does": brentq(
            lambda beta: rank_exponent(nearest.PROVED_GROWTH * beta**2) - 1, 0.1, 1
        ),
        **{f"nearest_{name}_degrees": list(found.values()) for name, found in near.items()},
        **{
            # where the fitted exponent of the operations, which rises with beta, passes that of exact attention
            f"beta_where_it_costs_n_squared_to_2^20_{kind}": float(np.interp(2, np.maximum.accumulate(slopes), BETAS))
            for kind, slopes in crossing.items()
        },
        **{f"{kind}_{name}_degrees": list(found.values()) for (kind, name), found in degrees.items()},
        **{f"uniform_{name}_degrees": [_needed(e) for e in lengths.values()] for (_, name), lengths in typical.items()},
    }
    series = {"degrees": degrees, "seconds": seconds, "crossing": crossing}
    return Evidence(tuple(checks + timed), parameters, series)


def _slope(kind: str, degrees: Mapping[int, float]) -> fits.Exponent:
    return fits.exponent(
        [2.0**power for power in degrees],
        [operations(power, degree, kind == "causal") for power, degree in degrees.items()],
    )


def _counted(degrees: dict[tuple[str, str], dict[int, int]]) -> list[Check]:
    """Return exponents of counted multiplications over n = 2^10 to 2^20, and who is cheaper at the longest."""
    checks = []
    last = POWERS[-1]
    for kind in ("full", "causal"):
        exact = exact_operations(last, kind == "causal")
        for name in (*BELOW, ABOVE):
            above = name == ABOVE
            slope = _slope(kind, degrees[kind, name])
            end = slope.low if above else slope.high
            checks.append(Check(f"{kind}, {name}: exponent of the operations {slope}", end, 2, at_least=above))
            ratio = operations(last, degrees[kind, name][last], kind == "causal") / exact
            checks.append(
                Check(f"{kind}, {name}: operations over those of exact attention, n = 2^20", ratio, 1, at_least=above)
            )
    return checks


def _far() -> list[Check]:
    """Return the exponent of the rank of the proved degree, read between lengths that no machine holds."""
    local = {}
    for name, score in REGIMES.items():
        ranks = [log_rank(power, polynomial_degree(score(power * math.log(2)), ERROR)) for power in FAR]
        local[name] = np.diff(ranks) / (np.diff(FAR) * math.log(2))
    checks = []
    for name in SMALL:
        falling = float((local[name][1:] / local[name][:-1]).max())
        shown = " ".join(f"{exponent:.3f}" for exponent in local[name])
        checks.append(
            Check(f"{name}: exponents of the rank on the way to n = 2^1000, {shown}, next / last", falling, 1)
        )
    for name, beta in CRITICAL.items():
        limit = rank_exponent(PROVED_GROWTH * beta**2)
        off = float(abs(local[name][-1] / limit - 1))
        checks.append(
            Check(f"{name}: exponent of the rank at n = 2^1000, relative distance from {limit:.3f}", off, 0.01)
        )
    return checks


def _crossing(errors: _Errors) -> dict[str, list[float]]:
    """Return exponents of the operations over a grid of beta: of the degree needed, and of the one proved to suffice."""
    found = {
        kind: [
            _slope(kind, {power: _between(e) for power, e in errors.found[kind, name].items()}).value for name in GRID
        ]
        for kind in ("full", "causal")
    }
    return found | {"proved": [_slope("full", errors.proved[name]).value for name in GRID]}


# ----------------------------------------------------------------------------- The algorithm itself


def _sequence(problem: Problem, n: int, width: int, norm: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, keys and values [1, n, 1, d], queries and keys uniform in (-norm, norm), values in (-1, 1)."""
    random = np.random.default_rng([problem.seed, 18, n, width])
    query, key, value = (jnp.asarray(size * random.uniform(-1, 1, (1, n, 1, width))) for size in (norm, norm, 1.0))
    return query, key, value


def _same_numbers(problem: Problem) -> list[Check]:
    """Compare features, summed over all tokens, with the polynomial of the scores of a few queries, pair by pair."""
    apart: list[float] = []
    off: list[float] = []
    for power in (10, 14, 17, 20) if problem.full else (10, 20):
        for width in (2, 3, 4) if problem.full else (3,):
            largest = REGIMES["beta = 1/4"](power * math.log(2))
            degree = polynomial_degree(largest, ERROR)
            query, key, value = _sequence(problem, 2**power, width, math.sqrt(largest))
            for causal in (False, True):
                output = polynomial_attention(query, key, value, degree=degree, is_causal=causal, scale=1 / width)
                rows = _sampled(2**power, 4, causal)
                scores = np.asarray(query[0, rows, 0]) @ np.asarray(key[0, :, 0]).T / width
                seen = np.arange(2**power)[None] <= rows[:, None] if causal else np.ones((1, 1), bool)
                polynomial = np.polyval([1 / math.factorial(t) for t in range(degree, -1, -1)], scores)
                for weights, found in ((polynomial * seen, apart), (np.exp(scores) * seen, off)):
                    expected = weights @ np.asarray(value[0, :, 0]) / weights.sum(1, keepdims=True)
                    found.append(float(np.abs(np.asarray(output[0, rows, 0]) - expected).max()))
    return [
        Check(
            "the algorithm on features against the polynomial of scores, full and causal, n to 2^20", max(apart), 1e-10
        ),
        Check("the algorithm of the proved degree against softmax attention, n to 2^20", max(off), ERROR),
    ]


def _seconds(call: Callable[[], jax.Array]) -> float:
    """Return the quickest of three, after one that compiles."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _timed(problem: Problem, below: dict[int, int]) -> tuple[dict[str, dict[int, float]], list[Check]]:
    """Measure wall-clock times, and (in full, where they are long) checks of their exponents.

    The machine is shared and caches have sizes, so the tolerances are wide; quick only draws what it measures.
    """
    above = {}
    for power in (5, 6, 7, 8) if problem.full else ():  # seconds to compile, and only operations decide
        largest = REGIMES[ABOVE](power * math.log(2))
        above[power] = _needed(_distances(_signs(problem, power, False), largest, polynomial_degree(largest, ERROR)))
    long, short = ((12, 14, 16, 18, 20), (11, 12, 13, 14, 15)) if problem.full else ((11, 14, 17), (10, 12, 13))
    # what is expected: 1 and 2 up to the width and the rank, which grow as powers of log n; slower than exact above
    runs: tuple[tuple[str, dict[int, int | None], bool, float], ...] = (
        ("polynomial, beta = 1/4", {power: below[power] for power in long}, False, 1.7),
        ("the same, causal", {power: below[power] for power in long}, True, 1.7),
        ("exact", dict.fromkeys(short), False, 1.5),
        ("polynomial, beta = 1", dict(above), False, 1.7),
    )
    seconds: dict[str, dict[int, float]] = {}
    checks = []
    for name, degrees, causal, bound in runs:
        if not degrees:
            continue
        seconds[name] = {}
        for power, degree in degrees.items():
            # times depend on sizes alone, so entries of one norm serve all
            drawn = _sequence(problem, 2**power, power, 0.5)
            attend = functools.partial(softmax_attention, scale=1 / power)
            if degree is not None:
                attend = functools.partial(polynomial_attention, degree=degree, is_causal=causal, scale=1 / power)
            seconds[name][power] = _seconds(functools.partial(attend, *drawn))
        slope = fits.exponent([2.0**power for power in degrees], list(seconds[name].values()))
        at_least = name in ("exact", "polynomial, beta = 1")
        if problem.full:
            checks.append(Check(f"{name}: exponent of the time {slope}", slope.value, bound, at_least))
    return seconds, checks


def _control(problem: Problem) -> Evidence:
    """Measure the degrees that suffice at beta = 1/4, in every regime, of both polynomials."""
    errors = _errors(problem, {name: REGIMES[name] for name in CRITICAL}, ("full",))
    low, near = errors.proved["beta = 1/4"], nearest.degrees(REGIMES["beta = 1/4"], ERROR)
    checks = _accuracy(errors, dict.fromkeys(CRITICAL, low)) + _nearest(problem, dict.fromkeys(CRITICAL, near))
    return Evidence(tuple(checks))


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (degrees, work, exponents, times) = figures.panels(4, width=3.8, height=4.3)
    shades = dict(zip(REGIMES, ("#9fd0b4", "#2a7f4f", "#9dbfe3", "#1f5fa8", "#c8531c"), strict=True))
    lengths = [2.0**power for power in POWERS]
    for name, color in shades.items():
        for kind, style in (("full", "-"), ("causal", "--"), ("proved", ":")):
            found = list(evidence.series["degrees"][kind, name].values())
            degrees.plot(lengths, found, style, color=color, label=name if kind == "full" else f"_{name}, {kind}")
        found = [operations(power, degree) for power, degree in evidence.series["degrees"]["full", name].items()]
        work.plot(lengths, found, color=color, label=name)
    work.plot(lengths, [exact_operations(power) for power in POWERS], "--", color="black", label="exact attention")
    figures.label(degrees, title="Degree for an error of 1 %", x="tokens n", y="degree g", log="xy", direct=True)
    below = [
        Line2D([], [], linestyle="-", color="black", label="full attention"),
        Line2D([], [], linestyle="--", color="black", label="the same, causal"),
        Line2D([], [], linestyle=":", color="black", label="proved to suffice"),
    ]
    degrees.legend(handles=below, loc="upper left", bbox_to_anchor=(0, -0.17))
    degrees.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    degrees.minorticks_off()
    figures.label(work, title="Operations, full attention", x="tokens n", y="multiplications", log="xy", direct=True)
    crossing = evidence.series["crossing"]
    for kind, color in (("full", "tied"), ("causal", "fixed"), ("proved", "bound")):
        name = "proved to suffice" if kind == "proved" else f"needed, {kind}"
        exponents.plot(BETAS, crossing[kind], "o-", color=figures.COLORS[color], label=name)
    exponents.axhline(2, color="black", linewidth=0.9, linestyle="--", label="exact attention")
    figures.label(exponents, title="Exponent of the operations", x="beta = B / sqrt(log n)", y="exponent in n")
    colors = ("tied", "real", "control", "fixed")
    for (name, seconds), color in zip(evidence.series["seconds"].items(), colors, strict=False):
        sizes = [2.0**power for power in seconds]
        slope = fits.exponent(sizes, list(seconds.values())).value
        times.plot(sizes, list(seconds.values()), "o-", color=figures.COLORS[color], label=f"{name}: slope {slope:.1f}")
    figures.label(times, title="Time on this machine", x="tokens n", y="seconds", log="xy")
    return figure


CLAIM = Claim(
    name="phase_transition",
    title="Almost linear time below B = sqrt(log n), and what it costs above",
    statement="polynomial attention of degree g errs by <= 2 eps / (1 - eps) max|V|, eps = e^S S^(g+1) / (g+1)!, "
    "S = max|q.k| / d <= B^2; with d = log2 n and B^2 = o(log n) its rank C(d+g, g) is n^o(1); with B^2 = beta^2 log n "
    "the degree proved to suffice grows as 3.59 beta^2 log n and its rank as n^rho, rho(beta) in closed form, "
    "rho = 1 at beta = 0.34; of the nearest polynomial 2.23 and 0.44; any mask, the causal one too, keeps the bound",
    proof="16",
    computed_by=("polynomial_attention", "polynomial_degree"),
    source="that there is a transition: abstract of arXiv 2411.16525, recalled; the degree, the "
    "exponents and the causal form: derived (theory/README.md); that no other algorithm does better above is theirs "
    "(under SETH) and is not tested here",
    measure=_measure,
    controls=tuple(
        Control(
            f"{name} at a low degree",
            "the degree that is proved to suffice at beta = 1/4 does not here",
            _control,
            name,
        )
        for name in CRITICAL
        if name != "beta = 1/4"
    ),
    timed=True,
    draw=_draw,
    caption="Sequences of random signs +-B, which reach the largest score of their norm. From the left: degree from which on "
    "the output error for the worst values in [-1, 1] stays below 1 %; multiplications of features and sums; the exponent "
    "fitted to them over n = 2^10 to 2^20 (of degrees interpolated between whole ones); seconds of the algorithm and of exact "
    "blockwise attention.",
    drawn=True,
)
