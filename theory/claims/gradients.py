"""The closed-form gradients are the gradients: against autodiff, and against finite differences of fitted order."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_prefix.one_layer import (
    attention_mass,
    fixed_jacobian,
    fixed_outputs,
    tied_jacobian,
    tied_outputs,
)
from ntk_prefix.typing import Array
from theory import figures, fits
from theory.claim import Check, Claim, Control, Evidence, Undecidable, relative_error
from theory.descent import MODELS, build
from theory.problem import Problem

TOKENS = 64
SPACINGS = np.logspace(-1, -3, 9)
"""Of finite differences, in units of 1 / max|x_i|: what counts is by how much scores move."""
CENTER = SPACINGS[len(SPACINGS) // 2]
WIDEST = 0.1
"""Of a fitted order, from 2."""
OUTPUTS = {"tied": tied_outputs, "fixed": fixed_outputs}
JACOBIANS = {"tied": tied_jacobian, "fixed": fixed_jacobian}


def _uncentered(model: str) -> Callable[[Array, Array, Array], Array]:
    """Return the gradient without its centering term: what one gets by forgetting that softmax is normalized."""

    def jacobian(weights: Array, signs: Array, inputs: Array) -> Array:
        mass = attention_mass(weights, inputs)
        values = signs * weights if model == "tied" else signs
        through_key = jnp.einsum("im,mk,ic->ikmc", mass, values, inputs)
        if model == "fixed":
            return through_key
        return through_key + jnp.einsum("im,m,kc->ikmc", mass, signs[:, 0], jnp.eye(inputs.shape[1]))

    return jacobian


def _compare(problem: Problem, jacobians: dict[str, Callable[..., Array]]) -> Evidence:
    checks: list[Check] = []
    errors = {}
    for name in MODELS:
        model = build(problem, name, TOKENS, "gradients", symmetric=False)
        weights, signs, inputs = model.weights[...], model.signs[...], problem.inputs[:4]

        def outputs(weights: Array, name: str = name, signs: Array = signs, inputs: Array = inputs) -> Array:
            return OUTPUTS[name](weights, signs, inputs)

        closed = jacobians[name](weights, signs, inputs)
        exact = JACOBIANS[name](weights, signs, inputs)
        centering = relative_error(_uncentered(name)(weights, signs, inputs), exact)
        # autodiff and the formula round a sum of m terms differently: about m eps of what centering leaves over
        autodiff = relative_error(closed, jax.jacrev(outputs)(weights))
        allowed = TOKENS * 2**-52 * (1 + centering)
        checks.append(Check(f"{name}: relative difference from autodiff", autodiff, allowed, part=name))
        direction = jax.random.normal(problem.key("direction"), weights.shape) / jnp.linalg.norm(inputs, axis=1).max()
        along, exactly = (jnp.einsum("ikmc,mc->ik", jacobian, direction) for jacobian in (closed, exact))
        differences = [
            (outputs(weights + h * direction) - outputs(weights - h * direction)) / (2 * h) for h in SPACINGS
        ]
        errors[name] = np.array([relative_error(difference, along) for difference in differences])
        if centering < (own := relative_error(differences[len(SPACINGS) // 2], exactly)):
            raise Undecidable(
                f"undecidable by finite differences: at sigma = {problem.sigma:g} centering is {centering:.1e} of the gradient "
                f"({name}), and their own error is {own:.1e}: take a larger sigma, or longer rows"
            )
        order = fits.exponent(SPACINGS, errors[name])
        checks.append(Check(f"{name}: |order of central differences - 2|", order.distance(2), WIDEST, part=name))
    return Evidence(tuple(checks), {"tokens": TOKENS, "inputs": 4}, {"errors": errors})


def _without_centering(problem: Problem) -> Evidence:
    return _compare(problem, {name: _uncentered(name) for name in MODELS})


def _draw(evidence: Evidence, control: Evidence) -> Figure:
    figure, (both, order) = figures.panels(2)
    for name, thick in zip(MODELS, (5, 1.4), strict=True):  # the second is drawn on the first
        found, color = evidence.series["errors"][name], figures.COLORS[name]
        both.plot(SPACINGS[::-1], control.series["errors"][name][::-1], ":", color=color, label=f"{name}, uncentered")
        both.plot(SPACINGS, found, "-", color=color, linewidth=thick, alpha=0.4 if thick > 2 else 1, label=name)
        order.plot(SPACINGS[::-1], (found / SPACINGS**2)[::-1], "o-", color=color, label=name)
    middle = np.mean([evidence.series["errors"][name][len(SPACINGS) // 2] for name in MODELS])
    for off, color in ((0, "black"), (-WIDEST, figures.COLORS["control"]), (WIDEST, figures.COLORS["control"])):
        guide = middle / CENTER**2 * (SPACINGS / CENTER) ** off
        order.plot(SPACINGS[::-1], guide[::-1], "--", color=color, linewidth=0.9, label=f"order {2 + off:g}")
    figures.label(
        both,
        title="Central differences beside the closed form",
        x="spacing h",
        y="relative difference",
        log="xy",
        direct=True,
    )
    figures.label(order, title="Their order", x="spacing h", y="relative difference / h^2", log="x", direct=True)
    return figure


CLAIM = Claim(
    name="gradients",
    title="The gradients in closed form",
    statement="tied: dF_k/dw_r = m S_r [a_r e_k + (a_r w_rk - sum_j S_j a_j w_jk) x];  "
    "fixed: dF_k/dw_r = m S_r (a_kr - <a_k, S>) x",
    proof="2",
    computed_by=("one_layer.tied_jacobian", "one_layer.fixed_jacobian"),
    source="derived (theory/README.md)",
    measure=lambda problem: _compare(problem, dict(JACOBIANS)),
    controls=tuple(
        Control(
            f"{name} uncentered",
            "the same gradient without the centering term, as if softmax were not normalized",
            _without_centering,
            name,
        )
        for name in MODELS
    ),
    draw=_draw,
    caption="Left: relative difference between the closed-form directional derivative and central differences of spacing h; "
    "fixed (thin) lies on tied (wide); dotted: without the centering term the difference does not vanish. Right: the same "
    "over h^2, which is flat for differences of order 2; dashed gray: the orders beyond which the claim fails.",
)
