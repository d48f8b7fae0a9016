"""The shortest prefix that has a certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ntk_prefix.certificate.margin import MarginCertificate
from ntk_prefix.certificate.result import Certificate

__all__ = ["Progress", "search"]

Progress = Callable[[int, bool], Any]
"""Told of a length that was tried, and whether it is certified."""

Found = TypeVar("Found", Certificate, MarginCertificate)


def search(
    attempt: Callable[[int], Found],
    start: int = 64,
    largest: int = 2**24,
    resolution: float = 0.02,
    hopeless: Callable[[Found], bool] = lambda _: False,
    progress: Progress = lambda *_: None,
) -> Found:
    """Return the certificate of the smallest length that has one: see :func:`~ntk_prefix.certificate.theorem.find_m`.

    Args:
        attempt: the certificate of a length.
        start, largest, resolution: of :func:`~ntk_prefix.certificate.theorem.find_m`.
        hopeless: whether a first one that does not hold says that no length will do.
        progress: told after each length.
    """

    def tried(m: int) -> Found:
        found = attempt(m)
        progress(m, found.holds)
        return found

    refused, found = 2, tried(start)
    if not found.holds and hopeless(found):
        return found
    while not found.holds and found.m < largest:
        refused, found = found.m, tried(min(2 * found.m, largest))
    while found.holds and found.m - refused > max(2, resolution * found.m):
        middle = tried(2 * round((refused * found.m) ** 0.5 / 2))
        if middle.holds:
            found = middle
        else:
            refused = middle.m
    return found
