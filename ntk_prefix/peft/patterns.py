"""Regular expressions that come from a file: whatever they are, matching them ends.

A pattern may take exponential time, so only plain ones are matched here: at most two repetitions, none of a group, over
names of bounded length. Any other is matched by a process of its own, which is ended when its time is over.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable

from ntk_prefix.checks import expected

__all__ = ["matching"]

LONGEST = 2000
"""Characters of a pattern."""

SECONDS = 1.5
"""For one pattern and all names of a model; one that is meant well needs milliseconds."""

_PROGRAM = (
    "import json, re, sys; p, w, ns = json.load(sys.stdin); m = getattr(re.compile(p), w); "
    "print(json.dumps([n for n in ns if m(n)]))"
)


def matching(pattern: str, names: Iterable[str], where: str, *, how: str = "fullmatch") -> frozenset[str]:
    """Return those of the names that a pattern matches.

    Args:
        pattern: a regular expression.
        names: of modules.
        where: the field it comes from, for errors.
        how: "fullmatch", or "search" for a match anywhere.

    Raises:
        UsageError: no regular expression, a very long one, or one that takes too long.
    """
    return _matching(pattern, tuple(sorted(set(names))), where, how)


@functools.lru_cache(maxsize=256)
def _matching(pattern: str, names: tuple[str, ...], where: str, how: str) -> frozenset[str]:
    if len(pattern) > LONGEST:
        raise expected(where, f"a regular expression of at most {LONGEST:,} characters", f"{len(pattern):,}")
    try:
        match = getattr(re.compile(pattern), how)
    except (re.error, OverflowError, RecursionError) as error:
        raise expected(where, "a regular expression", f"{pattern[:100]!r} ({error})") from None
    if plain(pattern):
        return frozenset(name for name in names if match(name))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([pattern, how, names]), capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise expected(
            where, f"a regular expression that is matched within {SECONDS:g} s", f"{pattern[:100]!r}",
            "Repetitions within repetitions take that long; list the modules' names",
        ) from None  # fmt: skip
    if done.returncode:
        raise expected(where, "a regular expression that can be matched", f"{pattern[:100]!r}")
    return frozenset(json.loads(done.stdout))


def plain(pattern: str) -> bool:
    """Return whether matching takes at most quadratic time whatever the name: conservative, by the look of the text."""
    return len(re.findall(r"[*+{]", pattern)) <= 2 and re.search(r"\)[*+?{]|\\\d", pattern) is None
