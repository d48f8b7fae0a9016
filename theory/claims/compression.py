"""A prefix in few tokens: exact where it is asked to be, bounded at every query, and bounded on texts not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntk_prefix import PrefixState, feature_map, ntk_attention, prefix_attention
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.quadrature import caratheodory, moment_rule_error, representing_prefix
from ntk_prefix.statistics import expected_error_bound
from ntk_prefix.typing import Array
from theory import figures
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.problem import Problem

HEAD_DIM, TOKENS = 8, 2000
EXACT = 1e-12
"""Some hundred roundings of float64, relative: what `caratheodory` promises at a hundred conditions."""

THIN, DEGREES, SCORES = 3, range(1, 7), (1.0, 2.0, 4.0)
"""Dimensions that the scores of the moment rule use, its degrees, and the largest scores."""

TEXTS, TEXT_LENGTH, HELD_OUT, DELTA = 1000, 8, 12, 0.1
"""Of the population that texts are drawn from, with its expectation known exactly; and how the bound is asked for."""

OWN = 4
"""Keys that queries see beside the prefix, where whole outputs are compared."""


def _random(problem: Problem, label: str) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(problem.key("compression", label))))


# ------------------------------------------------------------------------------------- 1. exact on samples


class _Samples(NamedTuple):
    """A prefix and n queries."""

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray

    @property
    def features(self) -> np.ndarray:
        """[M, n], each token's part of a query's mass."""
        return _shares(self.keys, self.queries)

    def tokens_used(self) -> tuple[np.ndarray, np.ndarray]:
        return caratheodory(self.features, np.ones(len(self.keys)))


def _shares(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    scores = keys @ queries.T
    weights = np.exp(scores - scores.max(0))
    return weights / weights.sum(0)


def _counts(problem: Problem) -> tuple[int, ...]:
    return (6, 12, 24, 48, 96, 192) if problem.full else (6, 24, 96)


def _samples(problem: Problem, count: int) -> _Samples:
    random = _random(problem, f"samples {count}")
    drawn = (random.normal(size=(rows, HEAD_DIM)) for rows in (TOKENS, TOKENS, count))
    return _Samples(*drawn)


def _mass_error(samples: _Samples, tokens: np.ndarray, masses: np.ndarray) -> float:
    """Return the largest relative error of a mass; the features are relative to it."""
    return float(np.abs(masses @ samples.features[tokens] - 1).max())


def _exact_with(what: str, tokens: int, allowed: int, error: float) -> Check:
    """Return that so many tokens are exact: more of them than allowed are not even compared.

    Of their number alone nothing could fail, as a rule takes as many as there are conditions.
    """
    text = f"{what}: largest relative error with at most {allowed} tokens"
    return Check(text, error if tokens <= allowed else math.inf, EXACT)


def _exact(problem: Problem) -> Evidence:
    checks, errors = [], {}
    for count in _counts(problem):
        samples = _samples(problem, count)
        tokens, masses = samples.tokens_used()
        errors[count] = _mass_error(samples, tokens, masses)
        checks.append(_exact_with(f"{count} queries", len(tokens), count, errors[count]))
    samples = _samples(problem, _counts(problem)[1])
    checks.append(
        Check("outputs with own keys, values by solving: largest error", _output_error(samples, problem), 1e-9)
    )
    return Evidence(tuple(checks), {"tokens": TOKENS}, {"exact": errors})


def _output_error(samples: _Samples, problem: Problem) -> float:
    """Return how far attention with the rule's state is from exact prefix attention at the rule's own queries."""
    tokens, masses = samples.tokens_used()
    # in natural units: relative ones times the mass of each query
    natural = np.exp(samples.keys @ samples.queries.T)
    z = np.linalg.solve(natural[tokens].T, natural.T @ samples.values)
    random = _random(problem, "own")
    own = (jnp.asarray(random.normal(size=(1, OWN, 1, HEAD_DIM))) for _ in range(2))
    prefix = (jnp.asarray(samples.keys)[:, None], jnp.asarray(samples.values)[:, None])
    anchors = Anchors.of_keys(jnp.asarray(samples.keys[tokens])[:, None], scale=1.0)
    state = PrefixState(jnp.asarray(z)[None], jnp.asarray(masses)[None], anchors, 1.0)
    return float(_distance(state, prefix, jnp.asarray(samples.queries)[None, :, None], *own))


@jax.jit
def _distance(state: PrefixState, prefix: tuple[Array, Array], query: Array, key: Array, value: Array) -> Array:
    """Return the largest distance between attention with a state and with a prefix."""
    exact = prefix_attention(query, key, value, *prefix, scale=1.0, implementation="reference")
    return jnp.abs(state.attend(query, key, value, implementation="reference") - exact).max()


def _one_fewer(problem: Problem) -> Evidence:
    """Leave out the lightest token, and give all masses anew; and give all tokens one mass."""
    checks, fewer, equal = [], {}, {}
    for count in _counts(problem):
        samples = _samples(problem, count)
        tokens, masses = samples.tokens_used()
        left = np.delete(tokens, np.argmin(masses))
        refitted, _ = scipy.optimize.nnls(samples.features[left].T, np.ones(count), maxiter=100 * count)
        fewer[count] = _mass_error(samples, left, refitted)
        equal[count] = _mass_error(samples, tokens, np.full(len(tokens), TOKENS / len(tokens)))
        text = f"{count} queries: largest relative error of a mass"
        checks += [Check(text, fewer[count], EXACT, part="fewer"), Check(text, equal[count], EXACT, part="equal")]
    return Evidence(tuple(checks), {}, {"fewer": fewer, "equal": equal})


# ---------------------------------------------------------------------------------- 2. bounded everywhere


def _everywhere(problem: Problem) -> Evidence:
    """Measure rules exact on moments against their bound, and against Taylor's features of the same count."""
    random = _random(problem, "moments")
    keys, drawn = random.uniform(-1, 1, (TOKENS, THIN)), random.normal(size=(128, THIN))
    at_scores = {score: drawn * score / np.abs(drawn @ keys.T).max(1, keepdims=True) for score in SCORES}
    phi = jax.jit(feature_map("taylor", degree=max(DEGREES)))
    monomials, *monomials_at = np.split(
        np.asarray(phi(jnp.asarray(np.concatenate([keys, *at_scores.values()])))),
        TOKENS + len(drawn) * np.arange(len(SCORES)),
    )
    found: dict[float, np.ndarray] = {}
    worst, above, missed = 0.0, 0.0, 0.0
    for (score, queries), features in zip(at_scores.items(), monomials_at, strict=True):
        scores = queries @ keys.T
        exact = np.exp(scores).sum(1)
        center, half = (scores.max(1) + scores.min(1)) / 2, (scores.max(1) - scores.min(1)) / 2
        rows = []
        for degree in DEGREES:
            count = math.comb(THIN + degree, degree)
            tokens, masses = caratheodory(monomials[:, :count], np.ones(TOKENS))
            on_moments = np.abs(masses @ monomials[tokens, :count] - monomials[:, :count].sum(0)).max()
            missed = max(missed, on_moments / TOKENS if len(tokens) <= count else math.inf)
            errors = np.abs(np.exp(scores[:, tokens]) @ masses / exact - 1)
            taylor = np.abs(features[:, :count] @ monomials[:, :count].sum(0) / exact - 1).max()
            means = scores.mean(1) - center
            bounds = np.array([moment_rule_error(degree, *of) for of in zip(half, means, strict=True)])
            plain = 2 * math.exp(2 * score) * score ** (degree + 1) / math.factorial(degree + 1)
            worst, above = max(worst, float((errors / bounds).max())), max(above, float(bounds.max() / plain))
            rows.append((count, errors.max(), taylor, bounds.max(), plain))
        found[score] = np.array(rows)
    # of degree 2 and below Taylor's polynomial may have luck: a prefix without a skew has no third moment to miss
    beyond = max(float((rows[2:, 1] / rows[2:, 2]).max()) for rows in found.values())
    checks = (
        Check("moments: largest error of a mean with at most as many tokens as moments", float(missed), EXACT),
        Check("moments: largest error / its bound, over queries, degrees and scores", worst, 1.0),
        Check("moments: its bound / 2 e^(2s) s^(g+1)/(g+1)!", above, 1.0),
        Check("moments: largest error / Taylor's at the same count, from degree 3 on", beyond, 1.0),
        Check("moments: two rules as far apart as they can be / the bound", min(_apart(0)), 0.5, at_least=True),
        Check("moments: the same", max(_apart(0)), 1.0),
    )
    return Evidence(checks, {"dimensions": THIN, "degrees": list(DEGREES)}, {"everywhere": found})


def _apart(degrees_off: int) -> list[float]:
    """Return how far two measures apart that agree on moments up to a degree, over the bound for one that is higher.

    They lie where the Chebyshev polynomial of the next degree is 1 and where it is -1: no two are further apart.
    """
    ratios = []
    for score in SCORES:
        for degree in DEGREES:
            place = np.arange(degree + 2)
            masses = np.where((place == 0) | (place == degree + 1), 0.5, 1.0) * 2 / (degree + 1)
            points = score * np.cos(place * math.pi / (degree + 1))
            distance = abs(float(np.sum((-1.0) ** place * masses * np.exp(points))))
            ratios.append(distance / moment_rule_error(degree + degrees_off, score, 0.0))
    return ratios


def _lower_degree(problem: Problem) -> Evidence:
    """Two rules of a degree against the bound of the next: at scores that it is made for, s <= 1."""
    ratios = _apart(1)[: len(DEGREES)]
    return Evidence((Check("moments: two rules of the degree below / the bound", min(ratios), 1.0),))


# ------------------------------------------------------------------------------- 3. bounded on other texts


def _losses(problem: Problem) -> dict[str, np.ndarray]:
    """Return for each map the losses of a population of texts, [texts, tokens], each in [0, 1].

    Queries of one text lie around a topic of its own. The loss is a relative error of the mass, cut at 1.
    """
    random = _random(problem, "texts")
    keys = random.normal(size=(TOKENS, HEAD_DIM))

    def queries(texts: int) -> np.ndarray:
        topics = random.normal(size=(texts, 1, HEAD_DIM)) * random.uniform(0.2, 1.2, (texts, 1, 1))
        return topics + 0.05 * random.normal(size=(texts, TEXT_LENGTH, HEAD_DIM))

    fitted, population = queries(8).reshape(-1, HEAD_DIM), queries(TEXTS).reshape(-1, HEAD_DIM)

    exact = np.concatenate([np.exp(part @ keys.T).sum(1) for part in np.array_split(population, 8)])

    def loss(found: np.ndarray) -> np.ndarray:
        return np.minimum(np.abs(found / exact - 1), 1).reshape(TEXTS, TEXT_LENGTH)

    tokens, masses = caratheodory(_shares(keys, fitted), np.ones(TOKENS))
    relative = np.exp(fitted @ keys.T).sum(1)
    k, _ = scipy.optimize.nnls(_elu1(fitted) / relative[:, None], np.ones(len(fitted)))
    quadratic = TOKENS + population @ keys.sum(0) + np.einsum("qh,hi,qi->q", population, keys.T @ keys, population) / 2
    return {
        "anchors": loss(np.exp(population @ keys[tokens].T) @ masses),
        "elu1": loss(_elu1(population) @ k),
        "Taylor": loss(quadratic),
    }


def _elu1(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _draws(problem: Problem) -> int:
    return 2000 if problem.full else 200


def _covered(problem: Problem, losses: np.ndarray, bound: str) -> tuple[float, float]:
    """Return in what part of the draws of texts the bound holds, and the bound's mean."""
    random, expectation = _random(problem, "draws"), losses.mean()
    found = []
    for _ in range(_draws(problem)):
        drawn = losses[random.integers(len(losses), size=HELD_OUT)]
        if bound == "mean":
            found.append(float(drawn.mean()))
        else:
            sample = drawn.mean(1) if bound == "texts" else drawn.reshape(-1)
            found.append(expected_error_bound(sample, DELTA, 1.0))
    return float(np.mean(np.array(found) >= expectation)), float(np.mean(found))


def _on_other_texts(problem: Problem) -> Evidence:
    checks, coverage, bounds = [], {}, {}
    for name, losses in _losses(problem).items():
        coverage[name], bounds[name] = _covered(problem, losses, "texts")
        truth = float(losses.mean())
        text = f"{name}: part of {_draws(problem)} draws of {HELD_OUT} texts in which the bound holds"
        checks.append(Check(text, coverage[name], 1 - DELTA, at_least=True))
        # it must also say something: on average no less than Hoeffding's inequality does
        allowed = truth + math.sqrt(math.log(1 / DELTA) / (2 * HELD_OUT))
        checks.append(Check(f"{name}: mean bound / (expected loss + Hoeffding's term)", bounds[name] / allowed, 1.0))
    return Evidence(tuple(checks), {"held_out_texts": HELD_OUT, "delta": DELTA}, {"coverage": coverage})


def _careless(problem: Problem) -> Evidence:
    """Take the mean for the bound, and tokens for texts."""
    checks, careless = [], {}
    for name, losses in _losses(problem).items():
        for part in ("mean", "tokens") if name == "anchors" else ("mean",):
            careless[name, part], _ = _covered(problem, losses, part)
            text = f"{name}: part of the draws in which the {part} bound holds"
            checks.append(Check(text, careless[name, part], 1 - DELTA, at_least=True, part=part))
    return Evidence(tuple(checks), {}, {"careless": careless})


# ----------------------------------------------------------------------------------------- 4. elu1 states


class _State(NamedTuple):
    z: np.ndarray
    k: np.ndarray

    def attended(self) -> PrefixState:
        return PrefixState(jnp.asarray(self.z)[None], jnp.asarray(self.k)[None], scale=1.0)


@jax.jit
def _trained(prefix: tuple[Array, Array], query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Return z [1, H, H] and k > 0 [1, H] after 100 steps of Adam on the outputs of a prefix."""
    optimizer = optax.adam(0.05)
    target = prefix_attention(query, key, value, *prefix, scale=1.0, implementation="reference")

    def loss(parameters: tuple[Array, Array]) -> Array:
        z, log_k = parameters
        output = ntk_attention(query, key, value, z, jnp.exp(log_k), scale=1.0, implementation="reference")
        return jnp.mean((output - target) ** 2)

    def step(_: Array, carry: tuple[tuple[Array, Array], optax.OptState]) -> tuple[tuple[Array, Array], optax.OptState]:
        parameters, state = carry
        update, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (parameters[0] + update[0], parameters[1] + update[1]), state

    start = (jnp.zeros((1, HEAD_DIM, HEAD_DIM)), jnp.zeros((1, HEAD_DIM)))
    (z, log_k), _ = jax.lax.fori_loop(0, 100, step, (start, optimizer.init(start)))
    return z, jnp.exp(log_k)


def _states(problem: Problem) -> tuple[dict[int, _State], list[Array]]:
    """Return by their rank a trained state and what is left of it in fewer directions, and what it attends to."""
    random = _random(problem, "trained")
    query, key, value = (jnp.asarray(random.normal(size=(1, rows, 1, HEAD_DIM))) for rows in (64, OWN, OWN))
    prefix = tuple(jnp.asarray(random.normal(size=(64, 1, HEAD_DIM))) for _ in range(2))
    z, k = (np.asarray(x[0]) for x in _trained(prefix, query, key, value))
    left, singular, right = np.linalg.svd(z)
    ranks = (1, 2, 4, HEAD_DIM - 1, HEAD_DIM)
    return {r: _State((left[:, :r] * singular[:r]) @ right[:r], k) for r in ranks}, [query, key, value]


def _represented(problem: Problem) -> Evidence:
    states, rest = _states(problem)
    checks, tokens = [], {}
    for rank, state in states.items():
        keys, values = representing_prefix(state.z, state.k)
        tokens[rank] = len(keys)
        features = _elu1(keys)
        error = max(relative_error(features.sum(0), state.k), relative_error(features.T @ values, state.z))
        checks.append(_exact_with(f"elu1, rank {rank}, the prefix's sums", len(keys), min(rank + 1, HEAD_DIM), error))
    again = PrefixState.from_prefix(jnp.asarray(keys)[:, None], jnp.asarray(values)[:, None], scale=1.0)
    found, trained = (jax.jit(PrefixState.attend)(each, *rest) for each in (again, state.attended()))
    checks.append(Check("elu1: relative distance of the outputs", relative_error(found, trained), 1e-10))
    return Evidence(tuple(checks), {"head_dim": HEAD_DIM}, {"represented": tokens})


def _not_represented(problem: Problem) -> Evidence:
    """The nearest there is: to a state whose k has a negative entry, and with one token fewer than the rank."""
    states, _ = _states(problem)
    checks, rank_below = [], {}
    full = states[HEAD_DIM]
    outside = full.k * np.where(np.arange(HEAD_DIM) == np.argmin(full.k), -1, 1)
    # any sum of positive features is positive: no nearer to a negative entry than 0
    checks.append(
        Check(
            "elu1: least relative distance of any prefix's k",
            relative_error(np.maximum(outside, 0), outside),
            1e-10,
            part="outside",
        )
    )
    for rank, state in states.items():
        singular = np.linalg.svd(state.z, compute_uv=False)
        rank_below[rank] = float(singular[rank - 1] / np.linalg.norm(singular))
        text = f"elu1, rank {rank}: least relative distance of z over all prefixes of {rank - 1} tokens"
        checks.append(Check(text, rank_below[rank], 1e-10, part="shorter"))
    return Evidence(tuple(checks), {}, {"shorter": rank_below})


# -------------------------------------------------------------------------------------------- together


def _measure(problem: Problem) -> Evidence:
    parts = [part(problem) for part in (_exact, _everywhere, _on_other_texts, _represented)]
    checks = tuple(check for part in parts for check in part.checks)
    parameters, series = (
        {k: v for part in parts for k, v in getattr(part, name).items()} for name in ("parameters", "series")
    )
    return Evidence(checks, parameters, series)


def _ticks(axis: Axes, counts: Iterable[int]) -> None:
    """Name the counts themselves on a logarithmic axis."""
    axis.set_xticks(list(counts), [str(count) for count in counts])
    axis.minorticks_off()


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (exact, everywhere, texts, states) = figures.panels(4, width=3.7)
    found, wrong = evidence.series, control.series
    blue, gray, green = (figures.COLORS[name] for name in ("tied", "control", "bound"))

    for errors, name, style, color in (
        (wrong["equal"], "the same tokens, equal masses (control)", "o:", gray),
        (wrong["fewer"], "one token fewer (control)", "o--", gray),
        (found["exact"], "at most n tokens, by Caratheodory", "o-", blue),
    ):
        exact.plot(list(errors), list(errors.values()), style, color=color, label=name)
    exact.axhline(EXACT, color=green, linestyle="--", linewidth=1, label="1e-12")
    figures.label(exact, title=f"{TOKENS:,} tokens in n", x="queries n", y="largest relative error at them", log="xy")
    _ticks(exact, found["exact"])

    shades = dict(zip(SCORES, ("#9dbfe3", "#1f5fa8", "#0b2c54"), strict=True))
    for score, (counts, error, taylor, bound, plain) in ((s, rows.T) for s, rows in found["everywhere"].items()):
        last = score == SCORES[-1]
        everywhere.plot(counts, error, "o-", color=shades[score], label=f"anchors, scores up to {score:g}")
        everywhere.plot(counts, taylor, ":", color=shades[score], label="Taylor's features (dotted)" if last else None)
        everywhere.plot(counts, bound, "--", color=shades[score], label="bound (dashed)" if last else None)
        if score == SCORES[0]:
            everywhere.plot(counts, plain, "-.", color=green, label="2 e^(2s) s^(g+1)/(g+1)! at s = 1")
    everywhere.set_ylim(1e-8, 1e3)
    figures.label(everywhere, title="Exact on moments", x="numbers kept", y="largest relative error", log="xy")
    _ticks(everywhere, counts.astype(int))

    names, places = list(found["coverage"]), np.arange(len(found["coverage"]))
    texts.bar(places - 0.2, list(found["coverage"].values()), 0.35, color=blue, label="the bound")
    texts.bar(
        places + 0.2, [wrong["careless"][each, "mean"] for each in names], 0.35, color=gray, label="the mean (control)"
    )
    for (name, part), covered in wrong["careless"].items():
        if part == "tokens":
            texts.plot(names.index(name) - 0.2, covered, "v", color="black", label="tokens taken for texts (control)")
    texts.axhline(1 - DELTA, color=green, linestyle="--", linewidth=1, label=f"1 - delta = {1 - DELTA:g}")
    texts.set_xticks(places, names)
    figures.label(texts, title=f"Expected loss, from {HELD_OUT} texts", x="", y="part of draws in which it holds")

    ranks, tokens = zip(*found["represented"].items(), strict=True)
    states.plot(ranks, tokens, "o-", color=blue, label="tokens of a prefix that is the state")
    states.plot(ranks, ranks, "--", color=green, label="rank of Z: none has fewer")
    for rank, lost in wrong["shorter"].items():
        states.annotate(f"{lost:.0e}", (rank, rank - 0.75), fontsize=7, color=gray, ha="center")
    states.plot([], [], "s", color=gray, label="what one fewer loses of Z, at least (control)")
    figures.label(states, title=f"Trained elu1 states, H = {HEAD_DIM}", x="rank of Z", y="tokens")
    states.set_xlim(0.4, HEAD_DIM + 0.6)  # room for the first number
    states.set_ylim(0, HEAD_DIM + 0.5)
    return figure


CLAIM = Claim(
    name="compression",
    title="A few tokens do the work of a prefix",
    statement="for n queries at most n of a prefix's tokens with masses k >= 0 have its mass exactly; exact on moments up to "
    "degree g, its relative error is at most 4 e^(-mean) sum_(t>g) I_t(s) <= 2 e^(2s) s^(g+1)/(g+1)!; held-out texts bound "
    "the expected loss of any map with probability 1 - delta; every elu1 state with k > 0 is that of at most "
    "min(rank Z + 1, H) tokens",
    proof="equivalence.md",
    computed_by=(
        "quadrature.caratheodory",
        "quadrature.moment_rule_error",
        "quadrature.representing_prefix",
        "statistics.expected_error_bound",
    ),
    source="derived (theory/equivalence.md), from Caratheodory's theorem; the statistical bound by betting, arXiv 2010.09686",
    measure=_measure,
    controls=(
        Control("one token fewer", "n - 1 of the tokens, with masses fitted anew", _one_fewer, "fewer"),
        Control("equal masses", "the same tokens, each with the same mass", _one_fewer, "equal"),
        Control("a lower degree", "rules that are exact to one degree less, held to the bound", _lower_degree),
        Control("no concentration term", "the mean of the held-out losses, taken for a bound", _careless, "mean"),
        Control(
            "tokens taken for texts",
            "the bound from all tokens' losses, as if they were independent",
            _careless,
            "tokens",
        ),
        Control("outside of the cone", "a state whose k has a negative entry", _not_represented, "outside"),
        Control("shorter than the rank", "prefixes of one token fewer than the rank of Z", _not_represented, "shorter"),
    ),
    draw=_draw,
    caption="Left: largest relative error of the mass at n queries, with at most n tokens. Second: at 128 other queries, of "
    "rules that are exact on moments, with their bounds and Taylor's features of the same count. Third: how often a bound "
    "from 12 texts holds, at delta = 0.1. Right: tokens of the shortest prefix found whose state is a trained one.",
    drawn=True,
)
