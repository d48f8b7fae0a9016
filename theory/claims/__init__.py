"""The claims, one module each; :data:`NAMES` is the list of them, in the order of the report."""

from __future__ import annotations

import difflib
import importlib

from ntk_prefix.checks import expected
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
    "margin",
    "state",
    "dynamics",
    "real_layer",
    "approximation",
    "compression",
    "equivalence",
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
        near = difflib.get_close_matches(unknown[0], NAMES, 1)
        hint = f"Did you mean {near[0]}" if near else ""
        raise expected("CLAIM", f"names out of {', '.join(NAMES)}", ", ".join(unknown), hint)
    return [importlib.import_module(f"theory.claims.{name}").CLAIM for name in NAMES if not names or name in names]


def table(chosen: list[Claim]) -> str:
    """Return the table of theory/README.md, in Markdown."""
    lines = [
        "| claim | what it says | proof | what computes it | its controls, each of which must fail |",
        "|---|---|---|---|---|",
    ]
    for claim in chosen:
        proof = f"[{claim.proof}]({claim.proof})" if claim.proof.endswith(".md") else f"§{claim.proof}"
        computed = ", ".join(f"`{name}`" for name in claim.computed_by)
        controls = "; ".join(control.name for control in claim.controls)
        lines.append(f"| `{claim.name}` | {claim.title} | {proof} | {computed} | {controls} |")
    return "\n".join(lines)
