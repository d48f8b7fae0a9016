"""What the one-layer theory says of a stack: its limits carried up the stream, and where no limit or no laziness is left."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from ntk_prefix import PrefixAttentionLayer, RandomPrefix, TiedPrefixModel, bounds
from ntk_prefix.kernels import empirical_ntk, limit_ntk, real_layer_limit_ntk
from ntk_prefix.one_layer import Frozen
from ntk_prefix.training import TrainState
from ntk_prefix.typing import Array, Float, Inputs, Kernel
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, Undecidable, relative_error
from theory.descent import TRAINER, begin, smallest_eigenvalue, spectrum
from theory.problem import Problem
from theory.scales import ASYMPTOTIC_SIGMA, FALLING, beyond, expected_error, indistinct

INPUTS = 3
"""Rows of the data that a stack is looked at on: its kernel holds a dense Jacobian of n d rows."""

DEPTHS = (1, 2, 3, 4)
REPEATS = 4
NEAR, DISTINCT = 2.0, 0.2
"""Distance of a drawn kernel from its limit over that between draws at the longest prefix, at most: independent draws are
sqrt(2) times as far from one another as from their limit. And the distance between draws where there is no limit, at least,
set after a first measurement (0.6 to 0.8)."""
ALLOWED = 0.05
"""How far an exponent's interval may be from -1/2: what short prefixes leave of terms beyond the first."""

LOSS = 0.5
"""What training brings the loss down to, over the loss at the start, in at most STEPS steps."""
STEPS = 20_000


class Stack(nnx.Module):
    """Prefix attention layers on one residual stream, every layer with a prefix of its own.

        x_0 = x ,   x_l = x_{l-1} + scale A_l(x_{l-1}) ,   F(x) = readout (x_D - x)

    Args:
        layers: models [n, d] -> [n, d].
        scale: of every layer's output. ``readout``, 1 until it is set, multiplies what the stack adds to its input.
    """

    def __init__(self, layers: Sequence[nnx.Module], scale: float = 1.0) -> None:
        self.layers = nnx.List(list(layers))
        # arrays, so that stacks that differ in them alone share their compiled programs
        self.scale, self.readout = Frozen(jnp.array(scale, float)), Frozen(jnp.ones(()))

    def __call__(self, inputs: Inputs) -> Float[Array, "n d"]:
        """Return [n, d] for [n, d]; rows of real layers are one sequence."""
        stream = inputs
        for layer in self.layers:
            stream = stream + self.scale[...] * layer(stream)
        return self.readout[...] * (stream - inputs)


def lengths(problem: Problem) -> list[int]:
    """Return prefix lengths."""
    return [2**power for power in (range(6, 17, 2) if problem.full else (8, 11, 14))]


def _frozen(problem: Problem) -> list[PrefixAttentionLayer]:
    """Return the layers of the real stacks without their prefixes: projections are the same in all draws."""
    keys = jax.random.split(problem.key("depth"), DEPTHS[-1])
    return [PrefixAttentionLayer(problem.d, 2, problem.sigma, rngs=nnx.Rngs(key)) for key in keys]


def _prefixes(problem: Problem, depth: int, m: int, repeat: int, paired: bool = False) -> list[tuple[Array, Array]]:
    """Return one prefix a layer, weights and signs: the beginning of the longest, so that one program draws them all."""
    prefixes = [
        RandomPrefix(key=key, d=problem.d, m=lengths(problem)[-1], sigma=problem.sigma, symmetric=paired).materialise()
        for key in jax.random.split(problem.key("depth", m, repeat), depth)
    ]
    return [(weights[:m], signs[:m]) for weights, signs in prefixes]


def _real(frozen: list[PrefixAttentionLayer], problem: Problem, depth: int, m: int, repeat: int) -> Stack:
    """Return real layers, softmax averages of values, with a prefix of m tokens each."""
    layers = [nnx.clone(layer) for layer in frozen[:depth]]
    for layer, (weights, _) in zip(layers, _prefixes(problem, depth, m, repeat), strict=True):
        layer.prefix = nnx.Param(weights)
    return Stack(layers)


def _tied(problem: Problem, depth: int, m: int, repeat: int, *, power: float, paired: bool) -> Stack:
    """Return tied models whose outputs, of scale m as the one-layer theory has them, are multiplied by m^(power - 1)."""
    layers = []
    for weights, signs in _prefixes(problem, depth, m, repeat, paired):
        layer = TiedPrefixModel(problem.d, 2, problem.sigma, rngs=nnx.Rngs(0))
        layer.weights, layer.signs = nnx.Param(weights), Frozen(signs)
        layers.append(layer)
    return Stack(layers, scale=m ** (power - 1))


class Scaling(NamedTuple):
    """A stylized stack's scaling, and whether its kernel has a limit."""

    power: float
    paired: bool
    limit: bool
    color: str


SCALINGS = {
    "scale m, paired signs": Scaling(1.0, True, True, figures.COLORS["tied"]),
    "average, random signs": Scaling(0.0, False, True, figures.COLORS["bound"]),
    "scale sqrt(m), random signs": Scaling(0.5, False, False, figures.COLORS["fixed"]),
    "scale m, random signs": Scaling(1.0, False, False, figures.COLORS["control"]),
}
"""With paired signs every layer is zero at the start, whatever its scale: one scale stands for all."""


def kernel(stack: Stack, inputs: Inputs) -> Kernel:
    """Return the empirical NTK with respect to all prefixes."""
    # rows of a real layer are one sequence: they interact
    return empirical_ntk(stack, inputs, implementation="jacobian", vmap_axes=None)


class Carried(NamedTuple):
    """The limit of a stack, and what is proved of its smallest eigenvalue."""

    kernel: Kernel
    smallest: float
    """lambda_min(K_D) + s_min(M_D)^2 lambda_min(Theta_{D-1}), a lower bound."""


def stack_limits(frozen: list[PrefixAttentionLayer], problem: Problem, carried: bool = True) -> dict[int, Carried]:
    """Return the limits of m Theta of stacks of real layers as m grows, by depth (derived, theory/README.md).

        Theta_l = M_l^T Theta_{l-1} M_l + K_l(x_{l-1}) ,   M_l = I + sigma^2 W_Q W_K^T W_V / sqrt(d) ,   x_l = x_{l-1} M_l

    with K_l the one-layer limit (``real_layer_limit_ntk``) of layer l. Not ``carried`` is the control: the sum of the
    layers' one-layer limits, each at the raw inputs.
    """
    stream, total = problem.inputs, jnp.zeros((problem.n, problem.d) * 2)
    found = {}
    for depth, layer in enumerate(frozen, start=1):
        query, key, value = layer.query_projection[...], layer.key_projection[...], layer.value_projection[...]
        own = real_layer_limit_ntk(
            stream, query_projection=query, key_projection=key, value_projection=value, sigma=problem.sigma
        )
        moved = jnp.eye(problem.d)
        if carried:
            moved += problem.sigma**2 * query @ key.T @ value / jnp.sqrt(problem.d)
        below = float(jnp.linalg.svd(moved, compute_uv=False)[-1]) ** 2 * float(spectrum(total)[0])
        total = jnp.einsum("ka,lb,ikjl->iajb", moved, moved, total) + own
        stream = stream @ moved
        found[depth] = Carried(total, float(spectrum(own)[0]) + below)
    return found


def _small(problem: Problem, sigma: float) -> Problem:
    """Return a few of the problem's rows, and its sigma if it is smaller."""
    return dataclasses.replace(
        problem,
        inputs=problem.inputs[:INPUTS],
        targets=problem.targets[:INPUTS],
        sigma=min(problem.sigma, sigma),
    )


class Distances(NamedTuple):
    """How far drawn kernels are from a limit, relative to it."""

    errors: dict[int, np.ndarray]
    """By prefix length, of each draw."""
    between: float
    """The median distance between two draws at the longest."""

    @classmethod
    def of(cls, kernels: dict[int, list[Kernel]], limit: Kernel) -> Distances:
        """Return those of kernels by prefix length, two draws of each at least."""
        size = float(jnp.linalg.norm(limit.ravel()))
        pairs = [jnp.linalg.norm((a - b).ravel()) for a, b in itertools.combinations(kernels[max(kernels)], 2)]
        errors = {m: np.array([relative_error(k, limit) for k in found]) for m, found in kernels.items()}
        return cls(errors, float(np.median(pairs)) / size)


def _rate(name: str, distances: Distances, part: str = "", apart: float = np.inf) -> tuple[fits.Exponent, list[Check]]:
    """Return the m^(-1/2) of independent tokens, and a distance at the longest prefix that a wrong limit does not reach.

    Args:
        name: of the stack.
        distances: of its draws from the limit.
        part: as in ``Check``.
        apart: relative distance of the limit from a wrong one.

    Raises:
        Undecidable: draws are too far from one another to tell the two.
    """
    errors = distances.errors
    last, farthest = max(errors), NEAR * distances.between
    if farthest > apart / 2:
        raise Undecidable(
            f"undecidable at lengths one can run: the limit of {name} and the one of the control differ by {apart:.1e} of "
            f"themselves, and kernels drawn at m = {last} from one another by {distances.between:.1e}: take another sigma"
        )
    slope = fits.exponent(*zip(*[(m, error) for m, found in errors.items() for error in found], strict=True))
    nearness = float(np.median(errors[last])) / distances.between
    return slope, [
        Check(f"{name}: distance of the exponent's interval {slope} from -1/2", slope.gap(-0.5), ALLOWED, part=part),
        Check(f"{name}: distance from the limit at m = {last} / between draws, medians", nearness, NEAR, part=part),
    ]


def _eigenvalue(name: str, kernels: list[Kernel], limit: float) -> Check:
    """Return how far the smallest eigenvalue of drawn kernels is from the limit's, as a factor."""
    drawn = float(np.median([spectrum(kernel)[0] for kernel in kernels]))
    factor = max(drawn / limit, limit / drawn) if drawn > 0 else np.inf
    return Check(f"{name}: smallest eigenvalue, factor between drawn and limit", factor, 1.1)


def _limits_apart(frozen: list[PrefixAttentionLayer], problem: Problem, carried: bool = True) -> dict[int, float]:
    """Return the distance of the limit from the one that is not carried, relative to the first, or to the second, by depth."""
    own, other = (stack_limits(frozen, problem, each) for each in (carried, not carried))
    return {depth: relative_error(other[depth].kernel, own[depth].kernel) for depth in DEPTHS[1:]}


def _undecidable(problem: Problem) -> str | None:
    """Ask whether the stacks' rates can be seen at all, layer by layer up the stream."""
    problem = _small(problem, np.inf)
    frozen, stream, used = _frozen(problem), problem.inputs, lengths(problem)
    for layer in frozen:
        query, key, value = layer.query_projection[...], layer.key_projection[...], layer.value_projection[...]
        effective = query @ key.T / problem.d**0.5
        spread = problem.sigma * float(jnp.linalg.norm(stream @ effective, axis=1).max())
        if (reason := beyond(spread, used[0], problem, "a stack's kernel", linear=False)) is not None:
            return reason
        stream = stream + problem.sigma**2 * stream @ effective @ value
    error = expected_error(spread, used[-1])
    return indistinct(min(_limits_apart(frozen, problem).values()), error, used[-1], problem)


def _stacked(problem: Problem, carried: bool = True, repeats: int = REPEATS) -> Evidence:
    """Compare real stacks against their limit, and their smallest eigenvalues."""
    checks: list[Check] = []
    errors: dict[int, dict[int, np.ndarray]] = {}
    slopes: dict[int, fits.Exponent] = {}
    frozen = _frozen(problem)
    limits = stack_limits(frozen, problem, carried)
    smallest = {
        depth: smallest_eigenvalue(spectrum(limit.kernel), f"the limit of {depth} layers")
        for depth, limit in limits.items()
    }
    apart, drawn = _limits_apart(frozen, problem, carried), {}
    for depth in DEPTHS[1:]:
        kernels = {
            m: [m * kernel(_real(frozen, problem, depth, m, repeat), problem.inputs) for repeat in range(repeats)]
            for m in lengths(problem)
        }
        distances = Distances.of(kernels, limits[depth].kernel)
        errors[depth] = distances.errors
        slopes[depth], rate = _rate(f"{depth} real layers", distances, f"{depth} layers", apart[depth])
        if carried:
            fits.check_settled(slopes[depth], -0.5, ALLOWED, f"the error of {depth} real layers")
        longest = kernels[max(kernels)]
        checks += [*rate, _eigenvalue(f"{depth} real layers", longest, smallest[depth])]
        drawn[depth] = float(np.median([spectrum(k)[0] for k in longest]))
    least = min(smallest[depth] / limits[depth].smallest for depth in DEPTHS[1:])
    checks.append(
        Check("limit: smallest eigenvalue over its lower bound from the layer below", least, 1, at_least=True)
    )
    series = {"errors": errors, "slopes": slopes, "limits": smallest, "drawn": drawn}
    return Evidence(tuple(checks), {}, series)


def _not_carried(problem: Problem) -> Evidence:
    return _stacked(_small(problem, np.inf), carried=False, repeats=2)


def _stylized(problem: Problem) -> Evidence:
    """Compare tied stacks in every scaling: against depth times H* where there is a limit, draw against draw everywhere."""
    checks: list[Check] = []
    apart: dict[str, dict[int, np.ndarray]] = {}
    one = limit_ntk(problem.inputs, sigma=problem.sigma, model="tied")
    smallest = {depth: depth * float(spectrum(one)[0]) for depth in DEPTHS}
    for name, scaling in SCALINGS.items():
        for depth in DEPTHS[1:] if problem.full and scaling.limit else (2,):
            kernels = {}
            for m in lengths(problem):
                stacks = [
                    _tied(problem, depth, m, repeat, power=scaling.power, paired=scaling.paired)
                    for repeat in range(REPEATS if scaling.limit else 2 * REPEATS)
                ]
                kernels[m] = [m ** (1 - 2 * scaling.power) * kernel(stack, problem.inputs) for stack in stacks]
            longest = kernels[max(kernels)]
            if scaling.limit:
                what = f"{depth} tied layers, {name}"
                slope, rate = _rate(what, Distances.of(kernels, depth * one))
                fits.check_settled(slope, -0.5, ALLOWED, f"the error of {what}")
                checks += rate
                checks.append(_eigenvalue(what, longest, smallest[depth]))
            if depth == 2:
                apart[name] = {
                    m: np.array([_apart(a, b) for a, b in itertools.combinations(ks, 2)]) for m, ks in kernels.items()
                }
        if not scaling.limit:
            distance = float(apart[name][max(kernels)].mean())
            text = f"2 tied layers, {name}: mean distance between draws at m = {max(kernels)}"
            checks.append(Check(text, distance, DISTINCT, at_least=True))
    return Evidence(tuple(checks), {}, {"apart": apart, "limits": smallest})


def _apart(a: Kernel, b: Kernel) -> float:
    """Return the distance of two draws between 0 and 1: some have no typical size to compare with."""
    return float(jnp.linalg.norm((a - b).ravel()) / (jnp.linalg.norm(a.ravel()) + jnp.linalg.norm(b.ravel())))


# ----------------------------------------------------------------------------------------- Training


class Trained(NamedTuple):
    """A stack that is trained, and whether its kernel stays put as m grows (derived)."""

    layers: str
    depth: int
    readout: float
    """The outputs are multiplied by m to this power."""
    lazy: bool
    speed: float = 0.25
    """Step size over the largest stable one at the start."""


TRAINED = {
    "1 tied layer, scale m": Trained("tied", 1, 0.0, True),
    "2 tied layers, scale m": Trained("tied", 2, 0.0, False),
    "2 real layers, as they are": Trained("real", 2, 0.0, False, 0.25 / 40),  # their tokens move: as in `lazy`
    "2 real layers, read out with sqrt(m)": Trained("real", 2, 0.5, True),
}


def _drift(stack: Stack, problem: Problem, speed: float = 0.25) -> float:
    """Return the relative change of the kernel over gradient descent to LOSS times the first loss; NaN if it is not reached.

    Targets are relative to the outputs at the start, so that every stack has the same way to go.
    """
    start = kernel(stack, problem.inputs)
    step = speed * bounds.largest_stable_step(largest=float(spectrum(start)[-1]), tokens=1)
    batch = (problem.inputs, stack(problem.inputs) + problem.targets)
    goal = LOSS * jnp.square(problem.targets).sum() / 2
    frozen = TRAINER.frozen(stack)
    final, loss = _descend(nnx.graphdef(stack), begin(stack, step), frozen, batch, goal)
    if not loss <= goal:
        return np.nan
    return relative_error(kernel(nnx.merge(nnx.graphdef(stack), final.trained, frozen), problem.inputs), start)


@functools.partial(jax.jit, static_argnames="graph")
def _descend(
    graph: nnx.GraphDef[Stack], state: TrainState, frozen: nnx.State, batch: tuple[Array, Array], goal: Array
) -> tuple[TrainState, Array]:
    """Run full-batch gradient descent until a loss is reached; the state, and the loss one step before it."""
    update = TRAINER.update(nnx.merge(graph, state.trained, frozen))

    def step(carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, metrics = update(carry[0], frozen, batch)
        return state, metrics["loss"]

    return jax.lax.while_loop(
        lambda carry: (carry[1] > goal) & (carry[0].step < STEPS), step, (state, jnp.full_like(goal, jnp.inf))
    )


def _trained(problem: Problem) -> Evidence:
    """Measure the drift of the kernel over training, by prefix length."""
    checks: list[Check] = []
    drifts: dict[str, dict[int, np.ndarray]] = {}
    slopes: dict[str, fits.Exponent] = {}
    small = {"tied": _small(problem, ASYMPTOTIC_SIGMA), "real": _small(problem, np.inf)}
    draw = {
        "tied": functools.partial(_tied, small["tied"], power=1.0, paired=True),
        "real": functools.partial(_real, _frozen(small["real"]), small["real"]),
    }
    for name, trained in TRAINED.items():
        drifts[name] = {}
        for m in lengths(problem):
            stacks = [
                draw[trained.layers](trained.depth, m, repeat) for repeat in range(REPEATS if problem.full else 2)
            ]
            for stack in stacks:
                stack.readout[...] = jnp.array(m**trained.readout, float)
            drifts[name][m] = np.array([_drift(stack, small[trained.layers], trained.speed) for stack in stacks])
        points = [(m, drift) for m, found in drifts[name].items() for drift in found]
        if not np.isfinite([drift for _, drift in points]).all():
            raise Undecidable(f"undecidable here: {name} did not halve their loss within {STEPS:,} steps")
        slope = slopes[name] = fits.exponent(*zip(*points, strict=True))
        if trained.lazy:
            what = f"{name}: exponent of the kernel's drift in training {slope}, upper end"
            checks.append(Check(what, slope.high, FALLING))
        else:
            # medians: in some draws single tokens run away, and then the kernel changes by more
            first, *_, last = (float(np.median(found)) for found in drifts[name].values())
            what = f"{name}: kernel's drift in training at the longest prefix over that at the shortest"
            # expected: 1; nearer to it, as a power, than to the m^(-1/2) of a stack that stays put
            nearer = (max(drifts[name]) / min(drifts[name])) ** -0.25
            checks.append(Check(what, last / first, nearer, at_least=True))
    return Evidence(tuple(checks), {}, {"drifts": drifts, "slopes": slopes})


def _measure(problem: Problem) -> Evidence:
    parts = {
        "stacked": _stacked(_small(problem, np.inf)),
        "stylized": _stylized(_small(problem, ASYMPTOTIC_SIGMA)),
        "trained": _trained(problem),
    }
    parameters = {
        "tokens": lengths(problem)[-1],
        "shortest": lengths(problem)[0],
        "inputs": INPUTS,
        "width": problem.d,
        "sigma": problem.sigma,
        "sigma_of_the_tied": min(problem.sigma, ASYMPTOTIC_SIGMA),
        "repeats": REPEATS,
        **{
            f"smallest_eigenvalue_{name}_by_depth": list(parts[part].series["limits"].values())
            for name, part in (("real", "stacked"), ("tied", "stylized"))
        },
    }
    checks = tuple(check for part in parts.values() for check in part.checks)
    return Evidence(checks, parameters, {name: part.series for name, part in parts.items()})


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (real, tied, drift, smallest) = figures.panels(4, width=3.8, height=4.3)
    stacked, stylized, trained = (evidence.series[name] for name in ("stacked", "stylized", "trained"))
    shades = dict(zip(DEPTHS[1:], ("#b9a3d6", "#6b3fa0", "#2e1650"), strict=True))
    for depth, color in shades.items():
        figures.power_law(real, stacked["errors"][depth], f"D = {depth}", color, stacked["slopes"][depth])
        wrong = {m: np.median(found) for m, found in control.series["errors"][depth].items()}
        text = "not carried up the stream (control)" if depth == DEPTHS[-1] else None
        real.plot(list(wrong), list(wrong.values()), ":", color=figures.COLORS["control"], label=text)
    figures.label(real, title="D real layers: a limit", x="prefix length m", y="|m Theta - limit| / |limit|", log="xy")
    for name, found in stylized["apart"].items():
        tied.plot(
            list(found), [values.mean() for values in found.values()], "o-", color=SCALINGS[name].color, label=name
        )
    figures.label(tied, title="Two tied layers", x="prefix length m", y="distance between draws (at most 1)", log="xy")
    for name, what in TRAINED.items():
        found = trained["drifts"][name]
        drift.plot(
            list(found), [np.median(values) for values in found.values()], "o-" if what.lazy else "s--",
            color=figures.COLORS[what.layers], label=f"{name}: slope {trained['slopes'][name].value:.2f}",
        )  # fmt: skip
    figures.label(
        drift,
        title="Kernel's change in training",
        x="prefix length m",
        y="|Theta(T) - Theta(0)| / |Theta(0)|",
        log="xy",
    )
    for name, color in (("stacked", "real"), ("stylized", "tied")):
        limits = evidence.series[name]["limits"]
        text = "real layers, limit" if name == "stacked" else "tied layers, D H*"
        smallest.plot(list(limits), list(limits.values()), "o-", color=figures.COLORS[color], label=text)
    drawn = stacked["drawn"]
    smallest.plot(list(drawn), list(drawn.values()), "x", color="black", markersize=7, label="real layers, drawn")
    figures.label(smallest, title="Smallest eigenvalue", x="layers D", y="lambda_min", log="y")
    smallest.set_xticks(DEPTHS)
    return figure


CLAIM = Claim(
    name="depth",
    title="What the one-layer theory says of deeper stacks",
    statement="real layers x_l = x_(l-1) + A_l(x_(l-1)): m Theta -> M_D^T Theta_(D-1) M_D + K_D(x_(D-1)) as m^(-1/2), "
    "one-layer limits K carried up the stream by M = I + sigma^2 W_Q W_K^T W_V / sqrt(d); tied layers: D H* with paired signs "
    "or as averages, no limit with random signs at scale m or sqrt(m); a stack's kernel stays put in training only if its "
    "stream does: not at the one-layer theory's scale m, but with averages read out with sqrt(m)",
    proof="17",
    computed_by=("kernels.empirical_ntk", "kernels.real_layer_limit_ntk"),
    source="derived (theory/README.md); arXiv 2406.14036 treats one layer",
    measure=_measure,
    controls=tuple(
        Control(
            f"{depth} layers, not carried",
            "the sum of the layers' one-layer limits at the raw inputs, not carried up the stream",
            _not_carried,
            f"{depth} layers",
        )
        for depth in DEPTHS[1:]
    ),
    draw=_draw,
    undecidable=_undecidable,
    caption="From the left: distance of the kernel of D stacked real layers from the derived limit, dotted from the limit "
    "that is not carried; mean distance between draws of two tied layers, |Theta - Theta'| / (|Theta| + |Theta'|), by "
    "scaling; relative change of the kernel over gradient descent to half of the loss; smallest eigenvalue by depth.",
)
