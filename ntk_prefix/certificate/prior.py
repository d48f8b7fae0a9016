"""The a-priori certificate: what can be said of a prefix before it is drawn. theory/certificate.md, section 8.

The limit H* takes the place of the computed kernel, and what the passes over the tokens compute is bounded by moments
of log-normals. Only symmetric draws: without pairs F(0) is itself random and of size sqrt(m).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ntk_prefix.certificate.cubature import degree_five
from ntk_prefix.certificate.reference import Reference, Step
from ntk_prefix.certificate.rounding import OUTWARD, Enclosure, eigen_enclosure, gamma
from ntk_prefix.kernels.limit import limit_ntk
from ntk_prefix.random_prefix import ModelName, Variant, variant_named

__all__ = ["Limits", "Moments", "Prior"]

EVENTS = 6
"""Among which the failure probability is shared evenly."""


class Moments(NamedTuple):
    """Mean squares of what one drawn token adds to the whitened kernel and to the whitened normalizer."""

    kernel: float
    normalizer: float


class Limits(NamedTuple):
    """What a drawn prefix keeps, each with probability 1 - delta / 6: upper bounds, but of ``least``, which is a lower one."""

    kernel: float
    """|Omega|_F, of the whitened kernel without normalizers."""
    normalizers: float
    """|K|_F, of the whitened normalizers."""
    least: float
    """min_i n^_i."""
    highest: np.ndarray
    """max_r t_ir, [n]."""
    squares: np.ndarray
    """(1/M) sum_r t_ir^2, [n]."""
    longest: float
    """max_r |w_r|."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prior:
    """The data, and what their prefix is drawn from.

    Args:
        inputs: [n, d]; targets: [n, o].
        sigma, model: of the prefix.
        failure: delta.
    """

    inputs: np.ndarray
    targets: np.ndarray
    sigma: float
    model: ModelName
    failure: float
    kernel: Enclosure = dataclasses.field(init=False)
    kernel_error: float = dataclasses.field(init=False)
    moments: Moments = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Compute the limit, its spectrum, and the moments."""
        limit = np.asarray(
            limit_ntk(
                jnp.asarray(self.inputs),
                sigma=self.sigma,
                model=self.model,
                outputs=self.targets.shape[1] if not self.variant.has_value_part else None,
            )
        ).reshape(self.targets.size, -1)
        # an entry takes d products, an exponential and a dozen more operations; by absolute values its block is at most
        norms = np.linalg.norm(self.inputs, axis=1)
        inner, both = self.sigma**2 * np.outer(norms, norms), np.square(np.add.outer(norms, norms))
        root = math.sqrt(self.targets.shape[1])
        size = (
            np.outer(norms, norms) * root
            if not self.variant.has_value_part
            else (1 + inner) * root + self.sigma**2 * (1 + inner) * both
        )
        rounding = gamma(4 * (len(self.inputs[0]) + 16)) * float(np.linalg.norm((1 + inner) * np.exp(inner) * size))
        object.__setattr__(self, "kernel_error", rounding)
        object.__setattr__(self, "kernel", eigen_enclosure(limit))
        if self.positive.holds:
            object.__setattr__(self, "moments", self._moments(limit))

    @property
    def variant(self) -> Variant:
        """Which of the two models is to be drawn."""
        return variant_named(self.model)

    @property
    def positive(self) -> Step:
        """The first step of the proof."""
        smallest = float(self.kernel.values[0])
        error = OUTWARD * (self.kernel_error + float(self.kernel.radius)) + float(np.finfo(float).tiny)
        return Step("the limit kernel is positive: rounding of lambda_min below lambda_min", error, smallest / 2)

    def _moments(self, limit: np.ndarray) -> Moments:
        """E |H*^-1/2 X H*^-1/2|_F^2 of one token's X = J_r J_r^T, and E |H*^-1/2 (D - I) H*^1/2|_F^2 times the tokens.

            fixed   o^2 sum_ijkl C^-_ij c_jk C^-_kl c_li E[t_i t_j t_k t_l] ,     H* = C (x) I
            tied    sum_ijkl E[t_i t_j t_k t_l <M_ij, M_kl>] ,     M_ij = (I + x_i w^T) H^-_ij (I + w x_j^T)

        E[t_i t_j t_k t_l] = exp(sigma^2 times the sum of the six inner products), and it tilts w to
        N(sigma^2 (x_i + x_j + x_k + x_l), sigma^2 I), under which a polynomial of degree 4 is integrated exactly. Sums with
        signs are rounded relative to the sums of absolute values A. G -> sqrt(E tr(G X G X)) is a seminorm, at most
        sqrt(A) |G|, so what the enclosure does not know of the inverse adds that much to the root.
        """
        o, s = self.targets.shape[1], self.sigma**2
        inner = self.inputs @ self.inputs.T
        inverse = (self.kernel.basis / self.kernel.values[None]) @ self.kernel.basis.T
        least = float(self.kernel.values[0])
        unsure = OUTWARD * (
            (self.kernel_error + float(self.kernel.radius)) / least**2 * 2
            + (3 * float(self.kernel.tilt) + gamma(len(limit) + 8) * len(limit)) / least
        )
        """|computed inverse - H*^-1|_F."""
        covariance = np.kron(np.expm1(s * inner), np.ones((o, o)))
        normalizer = float((inverse * limit * covariance).sum())
        doubt = unsure + gamma(len(limit) ** 2 + 64) * math.sqrt(len(limit)) / least
        normalizer += doubt * float(np.linalg.norm(limit * covariance))
        normalizer += self.kernel_error * float(np.linalg.norm(inverse * covariance))
        pair = np.exp(s * inner)
        kernel, absolute = 0.0, 0.0
        for i, (c, t) in enumerate(zip(inner, pair, strict=True)):
            # [j, k, l]: the six pairs of distinct places among i, j, k, l
            expected = np.einsum("j,k,l,jk,jl,kl->jkl", t, t, t, pair, pair, pair)
            if not self.variant.has_value_part:
                term = o**2 * np.einsum("jk,l,jkl->jkl", inner, c, expected)
                kernel += float(np.einsum("j,kl,jkl->", inverse[i * o, ::o], inverse[::o, ::o], term))
                absolute += float(np.abs(term).sum())
            else:
                for j in range(len(inner)):
                    mean, sizes = self._tied_products(i, j, inverse)
                    kernel += float((expected[j] * mean).sum())
                    absolute += float((expected[j] * sizes).sum())
        kernel += gamma(len(inner) ** 4 + 10**5) / least**2 * absolute
        kernel = (math.sqrt(max(kernel, 0.0)) + doubt * math.sqrt(absolute)) ** 2
        return Moments(OUTWARD * kernel, OUTWARD * max(normalizer, 0.0))

    def _tied_products(self, i: int, j: int, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E <M_ij, M_kl> under the tilted Gaussian, for all k, l; and a bound on its terms, over |H^-|^2, all signs plus."""
        x, d = self.inputs, self.inputs.shape[1]
        nodes, weights = degree_five(d)
        # [k, l, node, d]
        w = self.sigma * nodes + self.sigma**2 * (x[i] + x[j] + x[:, None] + x[None])[:, :, None]
        blocks = inverse.reshape(len(x), d, len(x), d)

        def parts(block: np.ndarray, letters: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            right = np.einsum(f"{letters},klnb->klna", block, w, optimize=True)
            left = np.einsum(f"{letters},klna->klnb", block, w, optimize=True)
            return right, left, (right * w).sum(-1)

        first, second = blocks[i, :, j], blocks.transpose(0, 2, 1, 3)
        (r1, l1, q1), (r2, l2, q2) = parts(first, "ab"), parts(second, "klab")
        xk, xl = x[:, None, None], x[None, :, None]
        # M = B + (B w) x_j^T + x_i (B^T w)^T + (w^T B w) x_i x_j^T, and the same for k, l: sixteen inner products
        along_k, along_l = r1 @ x.T, l1 @ x.T  # not diagonal in k, l: taken below
        n = len(x)
        k, l = np.arange(n)[:, None], np.arange(n)[None]  # noqa: E741
        r1_k, l1_l = along_k[k, l, :, k], along_l[k, l, :, l]
        r2_i, l2_j = r2 @ x[i], l2 @ x[j]
        ik, jl = (x @ x[i])[:, None, None], (x @ x[j])[None, :, None]
        bx1, bx2 = first @ x.T, first.T @ x.T  # B_ij x_l and B_ij^T x_k, [d, n]
        total = (
            np.einsum("ab,klab->kl", first, second)[:, :, None]
            + np.einsum("klna,al->kln", r2, bx1)
            + np.einsum("klnb,bk->kln", l2, bx2)
            + q2 * np.einsum("ka,al->kl", x, bx1)[:, :, None]
            + np.einsum("klna,kla->kln", r1, second @ x[j])
            + (r1 * r2).sum(-1) * jl
            + r1_k * l2_j
            + q2 * r1_k * jl
            + np.einsum("klnb,klb->kln", l1, np.einsum("klab,a->klb", second, x[i]))
            + r2_i * l1_l
            + (l1 * l2).sum(-1) * ik
            + q2 * ik * l1_l
            + q1 * np.einsum("a,klab,b->kl", x[i], second, x[j])[:, :, None]
            + q1 * r2_i * jl
            + q1 * l2_j * ik
            + q1 * q2 * ik * jl
        )
        length, norms = np.linalg.norm(w, axis=-1), np.linalg.norm(x, axis=1)
        reach = (1 + norms[i] * length) * (1 + norms[j] * length)
        reach = reach * (1 + np.linalg.norm(xk, axis=-1) * length) * (1 + np.linalg.norm(xl, axis=-1) * length)
        return total @ weights, reach @ np.abs(weights)

    def limits(self, m: int) -> Limits:
        """Return (30) to (36) of the certificate: Chebyshev for means, Gaussian tails and a union for single tokens."""
        n, d = self.inputs.shape
        tokens, share, s = m // 2, self.failure / EVENTS, self.sigma**2
        variance = s * np.square(np.linalg.norm(self.inputs, axis=1) * OUTWARD)
        reach = math.sqrt(2 * math.log(n * tokens / share))
        return Limits(
            kernel=OUTWARD * math.sqrt(self.moments.kernel / (share * tokens)),
            normalizers=OUTWARD * math.sqrt(self.moments.normalizer / (share * tokens)),
            least=1 - math.sqrt(float(np.expm1(variance).sum()) / (tokens * share)),
            highest=np.exp(np.sqrt(variance) * reach - variance / 2),
            squares=np.exp(variance) + np.exp(3 * variance) * math.sqrt(n / (tokens * share)),
            longest=self.sigma * (math.sqrt(d) + math.sqrt(2 * math.log(tokens / share))),
        )

    def reference(self, m: int, rate: float) -> Reference | Step:
        """Return the linearized run on H*, or the step that fails because the drawn kernel is too uncertain at this m.

            H(W(0)) = D^-1 H~ D^-1 = H*^1/2 (I + K)^-1 (I + Omega) (I + K)^-T H*^1/2

        with |Omega|_F and |K|_F bounded by Chebyshev; D holds the normalizers, H~ the kernel without them.
        """
        limits = self.limits(m)
        omega, tilt = limits.kernel, limits.normalizers
        step = Step("the drawn kernel is near its limit: whitened normalizers", tilt, 0.5)
        if not step.holds:
            return step
        # whitening by H^ instead of H* costs as much as they differ
        apart = OUTWARD * (self.kernel_error + float(self.kernel.radius)) / float(self.kernel.values[0])
        relative = OUTWARD * ((1 + omega) / (1 - tilt) ** 2 - 1) * (1 + apart)
        step = Step("the drawn kernel is near its limit: whitened error", relative, 0.5)
        if not step.holds:
            return step
        return Reference(self.kernel, self.kernel_error, -self.targets.ravel(), 0.0, rate, relative)

    def drift(self, m: int, total: float) -> tuple[Step, dict[str, float]]:
        """Parts of the drift over sqrt(m) while |W - W(0)|_F <= total: section 4 with no share for the linearized run.

        Tokens are bounded by their maximum (Gaussian tails and a union), the mean of T_ir^2 by Chebyshev.
        """
        tied = self.variant.has_value_part
        x = np.linalg.norm(self.inputs, axis=1) * OUTWARD
        limits = self.limits(m)
        low = limits.least
        step = Step("the normalizers are positive: their deviation", OUTWARD * (1 - low), 0.5)
        if not step.holds:
            return step, {}
        length = limits.longest if tied else math.sqrt(self.targets.shape[1])
        highest, squares = limits.highest / low, limits.squares / low**2
        mean = np.sqrt(squares / m)  # sqrt(sum_r S_ir^2)
        normalizer = math.e * x * total * mean  # secant and exponential of exponents up to 1 are at most e
        step = Step("exponents are small", OUTWARD * float((x * total + normalizer).max()), 1.0)
        grow = math.exp(min(float((x * total + normalizer).max()), 1.0)) * OUTWARD
        step_size = grow * normalizer
        center = total * grow * mean * (x * length + tied)
        root = np.sqrt(squares)
        block = float(np.linalg.norm(highest * grow * x * (tied + x * length)))
        block += tied * float(np.linalg.norm(highest * grow * x))
        parts = {
            "deviations from W(0)": block * total / math.sqrt(m),
            "attention, through the values": float(np.linalg.norm(root * step_size * (tied + x * length))),
            "the mean value": float(np.linalg.norm(root * x * grow * center)),
        }
        return step, {name: value * OUTWARD for name, value in parts.items()}

    def total(self, m: int, reference: Reference, drift: float) -> float:
        """Bound on |W(t) - W(0)|_F: the linearized displacement, at most nu sqrt(e^T H*^-1 e / m), and the deviation."""
        return OUTWARD * (reference.nu * reference.norm + reference.paths(drift).deviation) / math.sqrt(m)
