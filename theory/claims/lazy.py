"""The longer the prefix, the less its tokens move and its kernel changes: the lazy regime, and its exponents."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from ntk_prefix import FixedValuePrefixModel, TiedPrefixModel, bounds
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.one_layer import Frozen, fixed_outputs, tied_outputs
from ntk_prefix.random_prefix import ModelName
from ntk_prefix.typing import Array, Float, Inputs
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, relative_error
from theory.descent import MODELS, Model, descend, gram, smallest_eigenvalue, spectrum, with_weights
from theory.problem import Problem
from theory.scales import training_lengths

STEPS = 200

NEAR = 2e-3
"""Distance of the tokens' displacement from the linearized one, over the largest of it: 4e-4 on digits, after a first
measurement; of an average it is of order 1, and 7e-3 even where that hardly learns (n = 2, d = 1, sigma = 5)."""


class _Tied(TiedPrefixModel):
    """The tied model times a factor, which programs take as an array: with and without it they are the same program."""

    factor: Frozen

    def __call__(self, inputs: Inputs) -> Array:
        return self.factor[...] * super().__call__(inputs)


class _Fixed(FixedValuePrefixModel):
    """The fixed model times a factor."""

    factor: Frozen

    def __call__(self, inputs: Inputs) -> Array:
        return self.factor[...] * super().__call__(inputs)


def _build(problem: Problem, name: ModelName, m: int, factor: float) -> Model:
    rngs = nnx.Rngs(problem.key(name, m, "lazy"))
    model = (
        _Tied(problem.d, m, problem.sigma, rngs=rngs)
        if name == "tied"
        else _Fixed(problem.d, m, None, problem.sigma, rngs=rngs)
    )
    model.factor = Frozen(jnp.asarray(factor, float))
    return model


@jax.jit
def _steepest(graph_and_state: tuple[nnx.GraphDef[Model], nnx.State], inputs: Inputs) -> Array:
    """Return the largest norm of a token's derivative, of all outputs together."""
    return jnp.linalg.norm(nnx.merge(*graph_and_state).token_gradient_norms(inputs), axis=0).max()


def _linearized(
    name: ModelName, model: Model, data: tuple[Array, Array], factor: float, step_size: float
) -> Float[Array, "m d"]:
    """Return the displacement of the linearized run, -J^T Theta^-1 (I - (I - eta Theta)^T) e(0)."""
    inputs, targets = data
    outputs = tied_outputs if name == "tied" else fixed_outputs
    found, pull_back = jax.vjp(lambda weights: factor * outputs(weights, model.signs[...], inputs), model.weights[...])
    values, basis = jnp.linalg.eigh(factor**2 * model.m * gram(prefix_ntk(model, inputs)))
    gone = -jnp.expm1(STEPS * jnp.log1p(-step_size * values)) / values
    return -pull_back((basis @ (gone * (basis.T @ (found - targets).ravel()))).reshape(found.shape))[0]


def _train(problem: Problem, factor: Callable[[int], float], speed: Callable[[int], float]) -> Evidence:
    """Train the model times ``factor(m)`` at each length, with ``speed(m)`` times the largest stable step without it."""
    checks: list[Check] = []
    found: dict[tuple[str, str], np.ndarray] = {}
    slopes: dict[tuple[str, str], fits.Exponent] = {}
    lengths = training_lengths(problem)
    for name in MODELS:
        movements, drifts, allowed = [], [], []
        for m in lengths:
            model = _build(problem, name, m, factor(m))
            start = prefix_ntk(model, problem.inputs)
            eigenvalues = spectrum(start)
            step_size = speed(m) * bounds.largest_stable_step(largest=float(eigenvalues[-1]), tokens=m)
            path = descend(model, problem.inputs, problem.targets, step_size=step_size, steps=STEPS)
            trained = with_weights(model, path.final)
            movements.append(float(path.movement.max()))
            drifts.append(relative_error(prefix_ntk(trained, problem.inputs), start))
            if m not in (lengths[0], lengths[-1]):
                continue  # the bound is far above at every length: it is drawn at its ends
            steepest = max(float(_steepest(nnx.split(at), problem.inputs)) for at in (model, trained))
            error = float(jnp.sqrt(path.squared_error(problem.targets)[0]))
            allowed.append(
                bounds.token_movement(
                    smallest=smallest_eigenvalue(eigenvalues, f"the drawn kernel ({name}, m = {m})"),
                    tokens=m,
                    initial_error=error,
                    steepest=steepest,
                )
            )
        for what, values in (("movement", movements), ("drift", drifts)):
            found[name, what] = np.array(values)
            slopes[name, what] = fits.exponent(lengths, values)
        found[name, "allowed"] = np.array(allowed)
        # what is left are the model and the run of the longest prefix
        along = _linearized(name, model, (problem.inputs, problem.targets), factor(m), step_size)
        moved = path.final - model.weights[...]
        apart = jnp.linalg.norm(moved - along, axis=1).max() / jnp.linalg.norm(along, axis=1).max()
        drift = slopes[name, "drift"]
        fits.check_apart(drift, -1.0, f"the kernel's drift ({name})")
        checks += [
            Check(f"{name}: relative distance from the linearized movement at m = {m}", float(apart), NEAR, part=name),
            Check(f"{name}: exponent of the relative kernel drift, upper end of {drift}", drift.high, -1.0, part=name),
            Check(f"{name}: largest movement / its bound at m = {m}", movements[-1] / allowed[-1], 1.0),
        ]
    parameters = {"tokens": lengths[-1], "shortest": lengths[0], "steps": STEPS}
    return Evidence(tuple(checks), parameters, {"lengths": lengths, "found": found, "slopes": slopes})


def _averages(problem: Problem) -> Evidence:
    # dividing the outputs by m divides the NTK by m^2; the factor 1/40 keeps the descent stable as tokens move
    return _train(problem, lambda m: 1 / m, lambda m: 0.25 / 40 * m**2)


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, axes = figures.panels(2)
    for axis, what, title in zip(
        axes, ("movement", "drift"), ("max_r |w_r(T) - w_r(0)|", "|H(T) - H(0)| / |H(0)|"), strict=True
    ):
        for name in MODELS:
            values = {
                m: np.array([v])
                for m, v in zip(evidence.series["lengths"], evidence.series["found"][name, what], strict=True)
            }
            figures.power_law(axis, values, name, figures.COLORS[name], evidence.series["slopes"][name, what])
            if what == "movement":
                ends = [evidence.series["lengths"][place] for place in (0, -1)]
                allowed = evidence.series["found"][name, "allowed"]
                axis.plot(ends, allowed, "--", color=figures.COLORS[name], linewidth=1, label=f"{name}, bound")
            axis.plot(
                list(values),
                control.series["found"][name, what],
                ":",
                color=figures.COLORS[name],
                label=f"{name}, without the factor m",
            )
        figures.label(
            axis,
            title="Tokens move less" if what == "movement" else "The kernel changes less",
            x="prefix length m",
            y=title,
            log="xy",
        )
    return figure


CLAIM = Claim(
    name="lazy",
    title="Long prefixes train lazily",
    statement="the longer the prefix, the nearer w_r(t) - w_r(0) is to the linearized displacement, and |H(W(t)) - H(W(0))| "
    "falls faster than 1/m from starts in pairs; max_r |w_r(t) - w_r(0)| <= 4 max_r |J_r| |F(0) - Y| / (m lambda)",
    proof="8",
    computed_by=("bounds.token_movement",),
    source="that they fall: after arXiv 2406.14036; the bound: derived (theory/README.md); the exponents are measured",
    measure=lambda problem: _train(problem, lambda m: 1.0, lambda m: 0.25),
    controls=tuple(
        Control(
            f"{name} as an average",
            "the same model without the factor m (mean-field scaling), with steps to match: "
            "neither movement nor drift falls",
            _averages,
            name,
        )
        for name in MODELS
    ),
    draw=_draw,
    caption="Largest movement of a token and relative change of the kernel over training; dashed: the bound on the "
    "movement; dotted: the same models without the factor m, which learn features instead.",
)
