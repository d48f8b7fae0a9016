"""Whether gradient descent on the logistic loss is certain to get labels right, before the first step: theory/margin.md.

The smallest eigenvalue of the kernel, which the certificate for the squared loss divides by, is of no account here. What
counts is the margin with which the kernel separates the labels, and that hardly falls with the number of examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy

from ntk_prefix.certificate.reference import Step
from ntk_prefix.certificate.rounding import OUTWARD, gamma
from ntk_prefix.certificate.tokens import LARGEST_EXPONENT, Tokens
from ntk_prefix.checks import UsageError, check_count, check_positive, expected
from ntk_prefix.equality import EqualByValue
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.kernels.limit import limit_ntk
from ntk_prefix.typing import Array, Float

__all__ = ["MarginCertificate", "certify_margin", "classes_of", "contrasts", "outputs_for", "separates"]

REACHES = np.geomspace(0.1, 1e4, 160)
"""S = sqrt(m) s of the comparison points W(0) + s U that are tried: any of them proves something, the best is taken."""

EXCESSES = (0.02, 0.05, 0.1, 0.21, 0.5, 1.0)
"""theta: by how much of s^2 the distance to the comparison point may grow."""

TINY = float(np.finfo(float).tiny)

RIDGE = 1e-12
"""Added to the kernel's eigenvalues while a margin is looked for, relative to its mean one."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MarginCertificate(EqualByValue):
    """What is certain of gradient descent W <- W - eta grad R on R = mean_i log(1 + exp(-y_i F(x_i))), y_i = -1 or +1.

    With more than two classes R is the cross-entropy mean_i log sum_k exp(F_k(x_i) - F_y(x_i)).

    If ``holds``: R falls at every step up to ``steps_needed``, it is then at most ``loss``, so that at most ``errors`` of the
    labels are wrong, and |W(t) - W(0)|_F has stayed below ``radius``.

    Args:
        holds: whether the proof goes through for the loss that was asked for. If not, ``explain()`` says why.
        m: prefix length, of the fixed model with one output, or one for each of more classes, and a symmetric start.
        examples: n; kinds: classes.
        step_size: eta; NaN if none was given and the proof failed before it takes one.
        margin: a lower bound on max over |U|_F = 1 of min_i y_i J_i(0) . U / sqrt(m), of more classes of the least
            (J_iy(0) - J_ik(0)) . U / sqrt(m).
        wanted: the loss that was asked for.
        loss: the bound on the loss after ``steps_needed`` steps; infinite if there is none.
        steps_needed: the steps T.
        radius: the bound on |W(t) - W(0)|_F up to T.
        drift: the bound on max_i |J_i(W) - J_i(W(0))|_F / sqrt(m) there, of more classes on that of J_ik - J_il.
        gradient: the bound on max_i |J_i(W)|_F / sqrt(m) there, of more classes on that of J_ik - J_il.
        support: examples that the margin of the kernel rests on, as the solver found them. No certificate, but a fact about
            the classifier of largest margin: over draws of n examples its expected error on another one, when it is
            trained on n - 1, is at most E[support] / n.
        steps: the inequalities of the proof.
        bounds: of comparison points [points, 3]: s^2, l(kappa), and up to which step it bounds the loss.
    """

    holds: bool
    m: int
    examples: int
    kinds: int
    step_size: float
    margin: float
    wanted: float
    loss: float
    steps_needed: int
    radius: float
    drift: float
    gradient: float
    support: int
    steps: tuple[Step, ...]
    bounds: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def errors(self) -> int:
        """How many labels may be wrong after ``steps_needed`` steps, at most: each of them costs log 2 / n."""
        return min(math.floor(OUTWARD * self.examples * self.loss / math.log(2)), self.examples) if self.holds else -1

    def curve(self, steps: int) -> Float[np.ndarray, "steps"]:
        """Return the largest loss at t = 0..steps, known before the first one: ``min(log kinds, s^2 / (eta t) + 2 l(kappa))``.

        Args:
            steps: at most ``steps_needed``.

        Raises:
            UsageError: the certificate does not hold, or says nothing of so many steps.
        """
        check_count("steps", steps, 0)
        if not self.holds:
            raise UsageError(f"curve: this certificate does not hold.\n{self.explain()}")
        if steps > self.steps_needed:
            raise expected("steps", f"at most the {self.steps_needed} that the certificate is about", steps)
        times = np.arange(1, steps + 1)
        best = np.full(steps + 1, OUTWARD * math.log(self.kinds))
        for square, tail, last in self.bounds:
            valid = times <= last
            best[1:][valid] = np.minimum(
                best[1:][valid], OUTWARD * (square / (self.step_size * times) + 2 * tail)[valid]
            )
        return best

    def explain(self) -> str:
        """Return the proof in numbers, or the inequality at which it fails and what would mend it."""
        step = "" if math.isnan(self.step_size) else f"eta = {self.step_size:.4g}, "
        loss = "logistic loss" if self.kinds == 2 else f"cross-entropy of {self.kinds} classes"
        head = f"{loss}, {self.examples} examples, m = {self.m:,}, {step}margin {self.margin:.4g}"
        if self.holds:
            wrong = "none of the labels is" if not self.errors else f"at most {self.errors} of the labels are"
            lines = [
                f"certified: {head}.",
                f"After {self.steps_needed:,} steps the loss is at most {self.loss:.4g} and {wrong} wrong; it falls at every "
                f"step, and |W(t) - W(0)| stays below {self.radius:.3g}.",
            ]
        else:
            failed = next(step for step in self.steps if not step.holds)
            way = (
                "No length mends it: the kernel does not separate these labels, or only by its rounding."
                if "positive" in failed.what
                else "Take a smaller step_size, or None."
                if "stable" in failed.what
                else "A longer prefix would do, which certificate.find_m(x, labels=labels) finds, or a larger loss."
            )
            lines = [
                f"not certified: {head}.",
                f"The step that fails: {failed.what}: {failed.used:.4g} is not at most {failed.allowed:.4g}.",
                way,
            ]
        lines += [f"  {'ok ' if s.holds else 'NO '} {s.what}: {s.used:.4g} <= {s.allowed:.4g}" for s in self.steps]
        lines.append(f"  {self.support} of {self.examples} examples carry the margin (no part of the proof)")
        return "\n".join(lines)


def classes_of(labels: Sequence[Any] | Array | np.ndarray, rows: int) -> np.ndarray:
    """Return labels as the place of their kind among all of them in order, 0 to kinds - 1, [n].

    Raises:
        UsageError: not a vector of ``rows`` labels of two kinds at least, fewer than there are rows if more than two.
    """
    try:
        found = np.asarray(labels)
    except ValueError:
        raise expected("labels", f"a vector of {rows} labels", "lists of different lengths") from None
    if found.dtype.kind not in "biufSU" or (found.dtype.kind == "f" and np.isnan(found).any()):
        got = "NaN among them" if found.dtype.kind == "f" else found.dtype
        raise expected("labels", f"a vector of {rows} numbers or texts, one for each row", got)
    kinds, place = np.unique(found, return_inverse=True) if found.ndim == 1 else (found, found)
    if found.shape != (rows,) or not 2 <= len(kinds) < max(rows, 3):
        got = f"shape {found.shape}" if found.shape != (rows,) else f"{len(kinds)} kinds"
        raise expected("labels", f"a vector of {rows} labels of two kinds or more, fewer than rows", got)
    return place


def outputs_for(classes: np.ndarray) -> int:
    """Return the outputs that tell classes apart: one for two of them, else one for each."""
    return 1 if classes.max() == 1 else int(classes.max()) + 1


def contrasts(classes: np.ndarray) -> Float[np.ndarray, "n k o"]:
    """Return what of the outputs must be positive, k rows an example: ``y_i`` of one output, else ``e_y - e_k``, k != y."""
    outputs = outputs_for(classes)
    if outputs == 1:
        return (2.0 * classes - 1)[:, None, None]
    own = np.eye(outputs)
    return np.stack([own[label] - np.delete(own, label, axis=0) for label in classes])


def compared(kernel: Float[np.ndarray, "N N"], classes: np.ndarray, rounding: float) -> tuple[np.ndarray, float]:
    """Return the kernel of what must be positive, and its rounding in Frobenius norm.

    Of two classes it is y_i F(x_i), [n, n]. Of more it is F_y(x_i) - F_k(x_i) for every k but y, an example's beside one
    another, [n (kinds - 1), n (kinds - 1)]: rows of one example have a Gram matrix I + 1 1^T of norm ``kinds``.
    """
    n, outputs = len(classes), outputs_for(classes)
    if outputs == 1:
        signs = 2.0 * classes - 1
        return kernel * np.outer(signs, signs), rounding
    rows = np.zeros((n, outputs - 1, n, outputs))
    rows[np.arange(n), :, np.arange(n)] = contrasts(classes)
    flat = rows.reshape(n * (outputs - 1), -1)
    # an entry has four terms
    off = gamma(4) * float(np.linalg.norm(np.abs(flat) @ np.abs(kernel) @ np.abs(flat).T))
    return flat @ kernel @ flat.T, OUTWARD * (outputs * rounding + off)


def certify_margin(
    tokens: Tokens, classes: np.ndarray, *, wanted: float | None = None, step_size: float | None = None
) -> MarginCertificate:
    """Return the certificate of a prefix: theory/margin.md, in its order.

    Args:
        tokens: of a fixed model with the outputs ``outputs_for(classes)`` and a symmetric start, at the inputs.
        classes: [n], whole numbers from 0.
        wanted: the loss to be certified; None is what makes every label right, log 2 / n.
        step_size: eta; None takes the largest that the proof allows.

    Raises:
        UsageError: another model, or a plain start.
    """
    n, outputs = len(classes), outputs_for(classes)
    if tokens.variant.has_value_part or tokens.outputs != outputs or not tokens.paired:
        raise expected(
            "labels",
            f"the fixed model with {outputs} outputs and a symmetric start",
            f"the {tokens.variant.name} model, {tokens.outputs} outputs, {'symmetric' if tokens.paired else 'plain'} start",
        )
    wanted = math.log(2) / n / OUTWARD**2 if wanted is None else wanted
    check_positive("loss", wanted)
    if step_size is not None:
        check_positive("step_size", step_size)
        if step_size < TINY:
            raise expected("step_size", f"at least {TINY:.3g}", step_size)
    _, rounding = tokens.second_moments()
    kernel = np.asarray(prefix_ntk(tokens.prefix, jnp.asarray(tokens.inputs))).reshape(n * outputs, -1)
    signed, off = compared(kernel, classes, rounding)
    each, weights, doubt = largest_margins(signed, np.ones(len(signed)), off)
    margins, weights = each.reshape(n, -1).min(1), weights.reshape(n, -1).max(1)
    ball = Ball.of(tokens, kernel, rounding)
    first = Step(
        "the margin is positive: its rounding over what was computed",
        doubt,
        OUTWARD * max(float(margins.min()) + doubt, 0) if math.isfinite(doubt) else 0.0,
    )
    found = None
    if first.holds and margins.min() > 0:
        found = _best(margins, ball, wanted, step_size, tokens.m)
    certificate = MarginCertificate(
        holds=False,
        m=tokens.m,
        examples=n,
        kinds=ball.kinds,
        step_size=math.nan if step_size is None else step_size,
        margin=max(0.0, float(margins.min())),
        wanted=wanted,
        loss=math.inf,
        steps_needed=0,
        radius=math.inf,
        drift=math.inf,
        gradient=math.inf,
        support=int((weights > 1e-6 * weights.max()).sum()),
        steps=(first,),
        bounds=np.empty((0, 3)),
    )
    if found is None:
        return certificate
    return dataclasses.replace(certificate, **(found | {"steps": (first, *found["steps"])}))


# ------------------------------------------------------------------------------------ the margin


def _separating(kernel: np.ndarray) -> np.ndarray:
    """Return weights alpha >= 0 of U = sum_i alpha_i y_i J_i with a large margin: those that minimize a' K a / 2 - sum a.

    Whatever the solver returns, the margin that is then computed of it is a lower bound.
    """
    floor = RIDGE * float(np.mean(np.diag(kernel))) + np.finfo(float).tiny
    values, basis = np.linalg.eigh(kernel)
    root = np.sqrt(np.maximum(values, 0) + floor)
    # a' K a / 2 - sum a is |A a - b|^2 / 2 up to a constant, with K = A' A and A' b = 1
    return scipy.optimize.nnls((basis * root).T, (basis / root).sum(0), maxiter=20 * len(kernel))[0]


def largest_margins(
    kernel: Float[np.ndarray, "n n"], labels: np.ndarray, rounding: float = 0.0
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"], float]:
    r"""Return what a kernel separates labels by, for the direction in which the least of it is largest.

    .. math::  \gamma_i = (K \alpha)_i / (\alpha^T K \alpha)^{1/2} ,  K_{ij} = y_i y_j H_{ij}

    Args:
        kernel: H.
        labels: y, -1 or +1.
        rounding: the Frobenius norm of what H may be off by.

    Returns:
        Lower bounds on gamma_i, the weights alpha >= 0, and the rounding that the bounds have been lowered by.
    """
    signed = kernel * np.outer(labels, labels)
    alpha = _separating(signed)
    n, length = len(alpha), float(np.linalg.norm(alpha))
    absolute = np.abs(kernel) @ alpha
    off = OUTWARD * (rounding * length + gamma(n + 2) * float(absolute.max()))
    square = float(alpha @ signed @ alpha)
    square_off = OUTWARD * (rounding * length**2 + gamma(2 * n + 4) * float(alpha @ absolute))
    longest, shortest = (math.sqrt(max(square + sign * square_off, 0.0)) for sign in (1, -1))
    if shortest == 0:
        return np.full(n, -math.inf), alpha, math.inf
    lower = signed @ alpha - off
    # below 0 the bound is lower for a shorter direction
    return np.where(lower > 0, lower / (OUTWARD * longest), OUTWARD * lower / shortest), alpha, off / shortest


def separates(x: Array, classes: np.ndarray, sigma: float) -> bool:
    """Whether the kernel of an infinite prefix separates the classes, beyond what float64 can be off by."""
    outputs = outputs_for(classes)
    kernel = np.asarray(limit_ntk(x, sigma=sigma, model="fixed", outputs=outputs)).reshape(len(classes) * outputs, -1)
    signed, rounding = compared(kernel, classes, 1e-12 * float(np.linalg.norm(kernel)))
    return bool(largest_margins(signed, np.ones(len(signed)), rounding)[0].min() > 0)


# ------------------------------------------------------------------------------------- the ball


@dataclasses.dataclass(frozen=True)
class Ball:
    """What bounds J_i in |W - W(0)|_F <= rho: theory/margin.md, section 3; of more than two classes every J_ik - J_il."""

    norms: np.ndarray
    """|x_i|, [n]."""
    spread: np.ndarray
    """tau_i = (mean_r T_ir^2)^(1/2), from above."""
    largest: np.ndarray
    """max_r T_ir, from above."""
    sizes: np.ndarray
    """|J_i(0)| / sqrt(m), from above."""
    m: int
    slack: float
    kinds: int = 2

    @property
    def reach(self) -> float:
        """max_r of a token's value: of more than two classes 2, as values are differences of -1 and 1."""
        return 1.0 if self.kinds == 2 else 2.0

    @classmethod
    def of(cls, tokens: Tokens, kernel: np.ndarray, rounding: float) -> Ball:
        norms, n, outputs = tokens.norms, len(tokens.inputs), tokens.outputs
        blocks = kernel.reshape(n, outputs, n, outputs)[np.arange(n), :, np.arange(n)]
        own = np.diagonal(blocks, axis1=1, axis2=2)
        # for pairs c = 0 and |J_ik|^2 = |x_i|^2 sum_r T_ir^2
        sizes = np.sqrt(own.max(1) + rounding) * OUTWARD
        exact = np.linalg.norm(tokens.inputs, axis=1)
        spread = np.where(exact > 0, sizes / np.where(exact > 0, exact, 1), 0) * (1 + gamma(tokens.inputs.shape[1] + 9))
        if outputs > 1:  # |J_ik - J_il|^2, a difference of four entries
            apart = own[:, :, None] + own[:, None] - 2 * blocks
            sizes = np.sqrt(apart.max((1, 2)) + 2 * rounding + 4 * gamma(4) * own.max(1)) * OUTWARD
        largest = tokens.largest_mass * (1 + tokens.slack)
        return cls(norms, spread, largest, sizes, tokens.m, tokens.slack, max(outputs, 2))

    def normalizer(self, radius: float) -> np.ndarray:
        """Return h_i, the bound on |log sum_r S_ir(0) e^{x_i . u_r}|, [n], for |u| = |W - W(0)|_F <= radius."""
        x = self.norms * radius
        return x * _secant(x) * self.spread / math.sqrt(self.m)

    def center(self, radius: float) -> np.ndarray:
        """Return s_i, the bound on |c_i(W)|, [n], for |W - W(0)|_F <= radius: its numerator moves by h_i as well."""
        normalizer = self.normalizer(radius)
        return self.reach * OUTWARD * (1 + self.slack) * np.exp(normalizer) * normalizer

    def at(self, radius: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Return Delta_i and Lambda_i = sqrt(m) L_i, [n], and the largest exponent, for |W - W(0)|_F <= radius."""
        root = math.sqrt(self.m)
        x, normalizer, center = self.norms * radius, self.normalizer(radius), self.center(radius)
        exponent = x + normalizer
        growth, size = _secant(exponent), np.exp(exponent)
        lipschitz = (self.reach + center) * self.norms**2 * (size * self.largest + 2 * size**2 * self.spread**2)
        drift = self.norms * (
            self.reach * growth * (self.largest * x / root + normalizer * self.spread) + center * self.spread * size
        )
        up = OUTWARD * (1 + self.slack)
        return up * drift, up * lipschitz, float(exponent.max()) * up


def _secant(size: np.ndarray) -> np.ndarray:
    """(e^y - 1) / y, the largest |e^t - 1| / |t| over |t| <= y."""
    return np.where(size > 0, np.expm1(size) / np.where(size > 0, size, 1), 1)


# ------------------------------------------------------------------------------------- the proof


def _best(margins: np.ndarray, ball: Ball, wanted: float, step_size: float | None, m: int) -> dict[str, Any]:
    """Return the comparison point that needs the fewest steps, or the one that comes nearest."""
    best: tuple[Any, ...] | None = None
    points = []
    for reach in REACHES:
        for excess in EXCESSES:
            point = _at(margins, ball, wanted, step_size, m, float(reach), excess)
            if point is None:
                continue
            points.append(point["bound"])
            rank = (not point["holds"], point["steps_needed"] if point["holds"] else point["nearness"])
            if best is None or rank < best[0]:
                best = rank, point
    if best is None:  # of m = 2 and the like
        least = float(ball.norms.max()) * 2 * float(REACHES[0]) / math.sqrt(m)
        return {"steps": (Step("exponents are small: |x_i| rho", least, LARGEST_EXPONENT),)}
    chosen = best[1]
    step = chosen["step_size"]
    # other points bound the loss of the same run if they allow its step
    bounds = np.array([(s2, tail, last / step) for s2, tail, last, largest in points if step <= largest])
    names = ("holds", "step_size", "loss", "steps_needed", "radius", "drift", "gradient", "steps")
    return {name: chosen[name] for name in names} | {"bounds": _front(bounds) if chosen["holds"] else np.empty((0, 3))}


def _front(bounds: np.ndarray) -> np.ndarray:
    """Return the points that no other beats in all three numbers."""
    cost = bounds * np.array([1, 1, -1])
    as_good = (cost[:, None] <= cost[None]).all(2)
    better = as_good & (cost[:, None] < cost[None]).any(2)
    return bounds[~better.any(0)]


def _at(
    margins: np.ndarray,
    ball: Ball,
    wanted: float,
    step_size: float | None,
    m: int,
    reach: float,
    excess: float,
) -> dict[str, Any] | None:
    """Return what one comparison point proves, None where exponents are far too large."""
    root = math.sqrt(m)
    square = (reach / root) ** 2
    radius = OUTWARD * (1 + math.sqrt(1 + excess)) * reach / root
    if ball.norms.max() * radius > LARGEST_EXPONENT:
        return None
    drift, lipschitz, exponent = ball.at(radius)
    if not math.isfinite(exponent + float(drift.max())):
        return None
    gradient = float((ball.sizes + drift).max()) * OUTWARD
    largest = 1 / (m * gradient**2) / OUTWARD
    step = largest if step_size is None else step_size
    loses = reach * drift + lipschitz * radius**2 / 2
    kappa = float((reach * margins / OUTWARD - OUTWARD * loses).min())
    tail = OUTWARD * (math.log1p((ball.kinds - 1) * math.exp(-kappa)) if kappa > -700 else math.inf)
    left = wanted / OUTWARD - 2 * tail
    each = step * left  # 0 where float64 has no smaller step
    needed = math.ceil(OUTWARD * square / each) if left > 0 and math.isfinite(OUTWARD * square / max(each, TINY)) else 0
    last = excess * square / (2 * tail) / OUTWARD  # eta T, at most
    loss = OUTWARD * (square / (step * needed) + 2 * tail) if needed else math.inf
    steps = (
        Step("exponents are small: |x_i| rho + h_i", exponent, LARGEST_EXPONENT),
        Step("the step is stable: m eta B^2", step * m * gradient**2, 1.0),
        Step(
            "every step descends: eta Lambda / 2 + m eta B^2 / 8",
            OUTWARD * step * (float(lipschitz.max()) / 2 + m * gradient**2 / 8),
            1.0,
        ),
        Step("the comparison point's loss is small: 2 l(kappa)", 2 * tail, wanted),
        Step("the run stays in the ball: eta T, over what it allows", step * needed / last if last else math.inf, 1.0),
        Step("the loss after T steps", loss, wanted),
    )
    return {
        "holds": all(each.holds for each in steps),
        "step_size": step,
        "loss": loss,
        "steps_needed": needed,
        "radius": radius,
        "drift": float(drift.max()),
        "gradient": gradient,
        "steps": steps,
        "nearness": max(each.used / each.allowed for each in steps if each.allowed > 0),
        "bound": (square, tail, last, largest),
    }
