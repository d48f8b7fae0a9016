"""The claims, one module each; :data:`NAMES` is the list of them, in the order of the report."""

from __future__ import annotations

import importlib

from ntk_prefix.checks import UsageError
from theory.claim import Claim

NAMES = (
    "gradients",
    "kernel",
    "limit",
    "positivity",
    "perturbation",
    "convergence",
    "lazy",
    "certificate",
    "dynamics",
    "real_layer",
    "approximation",
    "gaussian_prefix",
    "complexity",
    "universality",
    "memorisation",
    "phase_transition",
    "depth",
)


def claims(names: tuple[str, ...] = ()) -> list[Claim]:
    """Return the named claims, all of them for none, in the order of the report.

    Raises:
        UsageError: a name that is no claim.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise UsageError(f"CLAIM: expected names out of {', '.join(NAMES)}, got {', '.join(unknown)}.")
    return [importlib.import_module(f"theory.claims.{name}").CLAIM for name in NAMES if not names or name in names]
