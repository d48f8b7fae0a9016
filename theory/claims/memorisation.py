"""How long a prompt must be to memorize: by construction, by training, and by counting what its numbers can tell apart."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from ntk_prefix.prompting import Construction, Function, apply
from ntk_prefix.typing import Array
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence
from theory.lipschitz import largest_error, tents
from theory.problem import Problem

D, LENGTH = 16, 2
"""Width of tokens and tokens of a sequence, of the sequences to memorize."""

FRACTIONS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Prompt lengths tried, in units of the length whose trained numbers equal the answers' in number."""

SEEDS, STARTS = 3, 4
"""Drawn tasks of every size, and first prompts of every task: the best of them counts, as one that trains is asked for."""

ERRORS = (0.3, 0.1, 0.03, 0.01)
"""Errors asked of the trained prompt; the claim is about the last."""

RATE = 0.1
"""Adam's, which the cosine ends at a hundredth of."""

GRIDS = {(1, 1): (5, 9, 17, 33, 65), (1, 2): (3, 5, 9, 13, 17, 25), (3, 1): (3, 5, 7, 9, 11)}
FULL_GRIDS = {
    (1, 1): (5, 17, 65, 257, 1025),
    (1, 2): (5, 9, 17, 33, 65),
    (3, 1): (5, 9, 13, 17, 25),
    (1, 3): (3, 5, 7, 9, 13),
    (2, 2): (3, 4, 5, 6, 7),
}
"""Grids by (d, L) that set the errors asked for on worst-case functions."""


def sizes(problem: Problem) -> tuple[int, ...]:
    """Return N, the numbers of sequences to memorize."""
    return (8, 16, 32, 64, 128) if problem.full else (8, 16, 32, 64)


def steps(problem: Problem) -> int:
    """Return the steps of Adam."""
    return 6000 if problem.full else 3000


# ------------------------------------- Trained: one attention layer, one head, fixed random weights


class Task(NamedTuple):
    """Sequences, answers, fixed weights and a first prompt; the arrays of several tasks are stacked in front.

    Args:
        stream: [N, L, D], the embedded tokens; answers: [N, L].
        query_key: [D, D], W_Q W_K^T / sqrt(D); value: [D], W_V and the readout.
        prompt: [M, D]; absent: [M], 0 or minus infinity for tokens that this task does not have.
    """

    stream: Array
    answers: Array
    query_key: Array
    value: Array
    prompt: Array
    absent: Array


def draw(problem: Problem, sequences: int, seed: int, tokens: int, start: int, longest: int) -> Task:
    """Return sequences uniform in [0, 1], answers in [-1, 1], Gaussian weights; float32, as prompts are trained."""
    random = np.random.default_rng([problem.seed, 15, sequences, seed])
    inputs = random.uniform(size=(sequences, LENGTH, D))
    embed, position = random.normal(size=(D, D)), random.normal(size=(LENGTH, D))
    query, key, value = random.normal(size=(3, D, D)) / D**0.5
    task = (
        # tokens of unit variance
        (inputs - 0.5) * (12 / D) ** 0.5 @ embed + position,
        random.uniform(-1, 1, size=(sequences, LENGTH)),
        query @ key.T / D**0.5,
        value @ random.normal(size=D) / D**0.5,
        random.spawn(STARTS)[start].normal(size=(longest, D)),
        np.where(np.arange(longest) < tokens, 0.0, -np.inf),
    )
    return Task(*(jnp.asarray(array, jnp.float32) for array in task))


def answer(task: Task, prompt: Array) -> Array:
    """Return softmax(Z W_Q ([P; Z] W_K)^T / sqrt(D)) [P; Z] W_V w, one number a row: [N, L]."""
    query = task.stream @ task.query_key
    own = jnp.einsum("nid,njd->nij", query, task.stream)
    scores = jnp.concatenate([query @ prompt.T + task.absent[None, None], own], axis=-1)
    from_prompt, from_inputs = jnp.split(jax.nn.softmax(scores), [len(prompt)], axis=-1)
    return from_prompt @ (prompt @ task.value) + jnp.einsum("nij,nj->ni", from_inputs, task.stream @ task.value)


@functools.partial(jax.jit, static_argnames="count")
def train(tasks: Task, count: int) -> Array:
    """Return the smallest max-error [tasks] on the way of Adam, full batch, cosine decay, on the prompt alone."""

    def one(task: Task) -> Array:
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, count, 0.01))

        def step(
            carry: tuple[Array, optax.OptState, Array], _: None
        ) -> tuple[tuple[Array, optax.OptState, Array], None]:
            prompt, state, best = carry
            answers, backward = jax.vjp(functools.partial(answer, task), prompt)
            error = answers - task.answers
            update, state = optimizer.update(backward(error * (2 / error.size))[0], state)
            return (optax.apply_updates(prompt, update), state, jnp.minimum(best, jnp.abs(error).max())), None

        start = (task.prompt, optimizer.init(task.prompt), jnp.float32(jnp.inf))
        return jax.lax.scan(step, start, None, length=count)[0][2]

    return jax.vmap(one)(tasks)


def counted(sequences: int, error: float) -> float:
    """Return the shortest float32 prompt that counting allows, but for one chance in a million.

    L_p tokens make 2^(32 D L_p) prompts, and N L numbers drawn from (-1, 1) are within the error of what one of them answers
    with probability at most 2^(32 D L_p) error^(N L).
    """
    return (sequences * LENGTH * math.log2(1 / error) - 20) / (32 * D)


def lengths(sequences: int) -> list[int]:
    """Return prompt lengths to train."""
    return sorted({max(1, round(fraction * sequences * LENGTH / D)) for fraction in FRACTIONS})


def trained(problem: Problem, sequences: int, used: list[int]) -> np.ndarray:
    """Return errors of trained prompts, [prompt lengths, seeds]; a seed has its sequences, answers and weights."""
    tasks = [
        draw(problem, sequences, seed, tokens, start, used[-1])
        for tokens in used
        for seed in range(SEEDS)
        for start in range(STARTS)
    ]
    errors = train(jax.tree.map(lambda *arrays: jnp.stack(arrays), *tasks), steps(problem))
    return np.asarray(errors, float).reshape(len(used), SEEDS, STARTS).min(-1)


def shortest(used: list[int], errors: np.ndarray, goal: float) -> np.ndarray:
    """Return the shortest trained prompt of each seed that reached the goal; infinite if none did."""
    reached = errors <= goal
    return np.where(reached.any(0), np.array(used)[reached.argmax(0)], np.inf)


# -------------------------------------------------------------------------------------- Constructed


def constructed(problem: Problem, sequences: int, error: float, *, shuffled: bool = False) -> tuple[int, float, float]:
    """Return tokens, largest error and its bound of a prompt that holds the sequences, one token a row."""
    random = np.random.default_rng([problem.seed, 16, sequences])
    inputs = random.uniform(size=(sequences, LENGTH, D))
    answers = random.uniform(-1, 1, size=inputs.shape)
    gaps = ((inputs[:, None] - inputs[None]) ** 2).sum(-1) + 1e9 * np.eye(sequences)[..., None]
    # every other line of the row weighs at most e^(-beta gap)
    beta = math.log(4 * sequences / error) / gaps.min()
    built = Construction(d=D, length=LENGTH, grid=1, contexts=False, sharpness=beta, input_share=error / 100)
    row, told = np.tile(np.arange(LENGTH), sequences), answers[::-1] if shuffled else answers
    prompt = built.lines(row, inputs.reshape(-1, D), np.zeros(len(row)), told.reshape(-1, D))
    found = np.abs(apply(built.transformer, prompt, inputs) - answers).max()
    others = np.exp(-beta * gaps).sum(1).max() + sequences * (LENGTH - 1) * math.exp(-built.row_penalty)
    return len(prompt), float(found), float(2 * (others + built.input_share))


def _worst_case(problem: Problem, d: int, length: int, grid: int) -> tuple[float, float]:
    """Return the error that a grid promises, and the shortest table that reaches it on random tents."""
    error = Construction(d=d, length=length, grid=grid).bound
    random = np.random.default_rng([problem.seed, 17, d, length, grid])
    targets = [_tents(random, d, length, error) for _ in range(2)]
    tokens = math.inf
    for cells in range(grid, 0, -1):
        built = Construction(d=d, length=length, grid=cells)
        if max(largest_error(built, target, built.prompt(target), random) for target in targets) > error:
            break
        tokens = built.tokens
    return error, tokens


def _tents(random: np.random.Generator, d: int, length: int, error: float) -> Function:
    """Return tents at least twice as high as the error: all of their signs must be known."""
    return tents(random, d, length, max(1, int(1 / (4 * error))))


def fewest(d: int, length: int, error: np.ndarray) -> np.ndarray:
    """Return the fewest lines of any table that serves every 1-Lipschitz function: L (1 / (2 error))^(dL), theory/README.md."""
    return length * (0.5 / error) ** (d * length)


def _half_table(problem: Problem) -> float:
    """Return the error over the promised one of a table that is half as fine, on the same tents."""
    (d, length), grids = next(iter(GRIDS.items()))
    error = Construction(d=d, length=length, grid=grids[-1]).bound
    built = Construction(d=d, length=length, grid=grids[-1] // 2)
    random = np.random.default_rng([problem.seed, 17, d, length, grids[-1]])
    target = _tents(random, d, length, error)
    return largest_error(built, target, built.prompt(target), random) / error


# ---------------------------------------------------------------------------------------- The claim


def _measure(problem: Problem) -> Evidence:
    """Measure prompt lengths of the three kinds, and what they must lie between."""
    goal, used = ERRORS[-1], {n: lengths(n) for n in sizes(problem)}
    errors = {n: trained(problem, n, tried) for n, tried in used.items()}
    reached = {n: {error: shortest(used[n], errors[n], error) for error in ERRORS} for n in used}
    found = {n: by_error[goal] for n, by_error in reached.items()}
    growth = fits.exponent(*zip(*[(n, tokens) for n, seeds in found.items() for tokens in seeds], strict=True))
    largest = max(used)
    slower = np.median(reached[largest][goal] / reached[largest][ERRORS[1]])
    held = {n: constructed(problem, n, goal) for n in used}
    checks = [
        Check("N sequences, constructed, one token a row: error / bound", max(e / b for _, e, b in held.values()), 1.0),
        Check(
            "trained tokens / N L: a trained prompt is the shorter",
            max(float(max(found[n])) / held[n][0] for n in used),
            1.0,
        ),
        Check(f"trained: farther end of the exponent in N {growth} from 1", growth.distance(1), 0.5),
        Check(
            f"trained, N = {largest}: tokens at error {goal:g} over those at {ERRORS[1]:g}, against log(1/error)",
            float(slower),
            math.log(goal) / math.log(ERRORS[1]),
        ),
    ]
    tables: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    slopes: dict[tuple[int, int], fits.Exponent] = {}
    for (d, length), grids in (FULL_GRIDS if problem.full else GRIDS).items():
        asked, tokens = np.array([_worst_case(problem, d, length, grid) for grid in grids]).T
        slope = fits.exponent(1 / asked, tokens)
        tables[d, length], slopes[d, length], name = (asked, tokens), slope, f"tents, d = {d}, L = {length}"
        checks += [
            Check(
                f"{name}: tokens / the fewest lines of any table", float((tokens / fewest(d, length, asked)).max()), 1.1
            ),
            Check(f"{name}: farther end of the exponent in 1/error {slope} from dL", slope.distance(d * length), 0.1),
        ]
    parameters = {
        "tokens": int(max(tokens.max() for _, tokens in tables.values())),
        "width": D,
        "sequence_length": LENGTH,
        "most_sequences": max(used),
        "goal": goal,
        "steps": steps(problem),
        "starts": STARTS,
        **{f"N{n}_trained_tokens": [float(tokens) for tokens in found[n]] for n in used},
        **{f"N{n}_constructed_tokens": held[n][0] for n in used},
        **{f"N{n}_counted_tokens": counted(n, goal) for n in used},
        **{f"d{d}_L{length}_exponent": slope.value for (d, length), slope in slopes.items()},
    }
    series = {"used": used, "errors": errors, "found": found, "growth": growth, "tables": tables, "slopes": slopes}
    return Evidence(tuple(checks), parameters, series)


def _control(problem: Problem) -> Evidence:
    """Measure a prompt of too few numbers, a table whose answers stand in other lines, and one that is too coarse."""
    goal, sequences = ERRORS[-1], sizes(problem)[-1]
    tokens = math.ceil(sequences * LENGTH / D) - 1
    _, error, bound = constructed(problem, sequences, goal, shuffled=True)
    best = float(trained(problem, sequences, [tokens]).min())
    checks = (
        Check(
            f"N = {sequences}, trained, tokens = {tokens}, fewer numbers than answers: error / goal",
            best / goal,
            1.0,
            part="counting",
        ),
        Check("constructed, answers of other sequences: error / bound", error / bound, 1.0, part="lookup"),
        Check("tents, a table half as fine: error / the promised one", _half_table(problem), 1.0, part="table"),
    )
    return Evidence(checks, {}, {"excluded": (sequences, tokens, best)})


def _figure(evidence: Evidence, control: Evidence) -> Figure:
    figure, (training, growth, worst) = figures.panels(3, width=4.0, height=4.6)
    series, goal = evidence.series, ERRORS[-1]
    shades = ("#9dbfe3", "#5c93cd", "#1f5fa8", "#0b2c54", "#c8531c", "#6b3fa0")
    for shade, (n, tried) in zip(shades, series["used"].items(), strict=False):
        # below a millionth the errors are float32's
        errors, ratio = np.maximum(np.median(series["errors"][n], 1), 1e-6), np.array(tried) * D / (n * LENGTH)
        training.plot(ratio, errors, "o-", color=shade, label=f"N = {n}")
    sequences, tokens, best = control.series["excluded"]
    training.plot(
        tokens * D / (sequences * LENGTH), best, "x", color=figures.COLORS["control"], label="control: too short"
    )
    training.axhline(goal, color="black", linestyle=":", linewidth=0.9, label=f"goal {goal:g}")
    figures.label(training, title="Trained prompts", x="trained numbers / answers", y="largest error", log="xy")
    used = list(series["found"])
    figures.power_law(growth, series["found"], "trained", figures.COLORS["tied"], series["growth"])
    growth.plot(used, [n * LENGTH for n in used], "s-", color=figures.COLORS["fixed"], label="constructed, N L")
    balanced = [n * LENGTH / D for n in used]
    growth.plot(used, balanced, ":", color="black", linewidth=0.9, label="as many numbers as answers")
    least = [counted(n, goal) for n in used]
    growth.plot(used, least, "--", color=figures.COLORS["bound"], label="lower bound, counting")
    figures.label(growth, title=f"N random sequences, error {goal:g}", x="sequences N", y="prompt tokens", log="xy")
    for axis, ticks in ((training, [0.125, 0.25, 0.5, 1, 2, 4]), (growth, used)):
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    colors = ("#0b2c54", "#1f5fa8", "#6b3fa0", "#c8531c", "#d99a2b")
    for shade, ((d, length), (asked, tokens)) in zip(colors, series["tables"].items(), strict=False):
        slope = series["slopes"][d, length]
        worst.plot(1 / asked, tokens, "o", color=shade, label=f"d = {d}, L = {length}: slope {slope.value:.2f}")
        worst.plot(1 / asked, fewest(d, length, asked), "-", color=shade, linewidth=0.9)
        worst.plot(1 / asked, length * (2 / asked) ** (d * length), ":", color=shade, linewidth=0.9)
    worst.plot([], [], "-", color="black", linewidth=0.9, label="lower bound for tables")
    worst.plot([], [], ":", color="black", linewidth=0.9, label="recalled form, constants unverified")
    figures.label(worst, title="Worst 1-Lipschitz functions", x="1 / error", y="prompt tokens", log="xy")
    return figure


CLAIM = Claim(
    name="memorisation",
    title="How long a prompt must be to memorize",
    statement="N random sequences: N L tokens of a lookup reach any error, a trained prompt of D-wide tokens needs a multiple "
    "of N L / D, no prompt of b-bit numbers fewer than N L log2(1/eps) / (b D). Worst C-Lipschitz functions: "
    "L (C/eps)^(dL) (1/2 + d t)^(dL) tokens do, L (C/eps)^(dL) 2^(-dL) lines any table needs",
    proof="15",
    computed_by=("prompting.Construction",),
    source="lookup and counting derived (theory/README.md, section 15); training measured; the lower bound of "
    "arXiv 2411.16525, of the same growth, is recalled",
    measure=_measure,
    controls=(
        Control(
            "too short to train",
            "a trained prompt of fewer numbers than the answers it has to give",
            _control,
            "counting",
        ),
        Control("answers shuffled", "a lookup with the answers of other sequences", _control, "lookup"),
        Control("half the table", "a table half as fine as the error asks", _control, "table"),
    ),
    draw=_figure,
    caption="Left: largest error of the best of a few trained prompts by length, median over tasks. Middle: "
    "shortest prompts that hold N random sequences. Right: shortest tables for random tents twice as high as the error.",
    drawn=True,
)
