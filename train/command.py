"""What the programs of this package share: their command line, and how they end.

Exit statuses: 0 good, 2 what a user can mend (said in one line), 3 a run that diverged, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import json
import math
import os
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import rich.progress
from rich.console import Console

from ntk_prefix.checks import NonFiniteError, check_arguments, expected, explain

__all__ = [
    "DIVERGED",
    "USAGE",
    "Checked",
    "DivergedError",
    "Terminal",
    "byte_progress",
    "ended",
    "parsed",
    "resumable",
    "show_error",
    "typed_changes",
]

USAGE, DIVERGED, STOPPED = 2, 3, 130
"""Exit statuses: of what a user can mend, of a run whose numbers are not finite any more, and of Ctrl-C."""

T = TypeVar("T")

_deferred: contextvars.ContextVar[bool] = contextvars.ContextVar("deferred", default=False)


class DivergedError(NonFiniteError):
    """Training made a number that is not finite; one in a file that is read is no divergence."""


class Checked:
    """A dataclass that checks itself: when it is made, and for the command line after all of it is parsed.

    tyro frames a ValueError of a constructor in a box of its own; checked afterwards, a wrong value is one line.
    """

    def __post_init__(self) -> None:
        """Check, unless the command line is being parsed."""
        if not _deferred.get():
            self.check()

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: naming the flag.
        """


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def parsed(parse: Callable[[], T]) -> T:
    """Return what ``parse`` makes of the command line, in which no :class:`Checked` is checked yet."""
    with _unchecked():
        return parse()


class Terminal(Console):
    """A console whose reader may go, as ``| head`` does: the rest is not printed, and the work is done all the same."""

    def on_broken_pipe(self) -> None:
        """Print nothing any more; rich would end the process before its result is written."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on a terminal, from the first call of what is yielded: ``progress(done, total)``."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def show_error(console: Console, line: str) -> None:
    """Print one line in red, word for word: brackets in it, such as those of a path, are no markup."""
    console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def ended(run: Callable[[], int], console: Console) -> int:
    """Return the exit status of a program; Ctrl-C, and an error that a user can mend, become one line.

    Raises:
        Exception: any other, with its traceback.
    """
    try:
        check_arguments(sys.argv[1:])
        return run()
    except KeyboardInterrupt:
        console.print("stopped", style="yellow")
        return STOPPED
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        show_error(console, line)
        return DIVERGED if isinstance(error, DivergedError) else USAGE


def resumable(run: Callable[[], object], console: Console) -> int:
    """Return the exit status of a program that goes on where Ctrl-C has stopped it."""
    try:
        run()
    except KeyboardInterrupt:
        console.print("stopped; what is finished is kept, and the same command goes on", style="yellow")
        return STOPPED
    return 0


# ----------------------------------------------------------------------------------- field=value


def typed_changes(flag: str, changes: tuple[str, ...], kinds: dict[str, Any], *, of: str = "") -> dict[str, Any]:
    """Return ``field=value`` texts as values of the fields' types.

    A value is JSON or plain text, and None for none: ``rank=4``, ``whiten=false``, ``target=layers.0``.

    Args:
        flag: that they came with.
        changes: the texts.
        kinds: the type of each field there is.
        of: whose fields they are, for the message.

    Raises:
        UsageError: no "=", a field that there is not, a value of another type or a number that is not finite.
    """
    values: dict[str, Any] = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise expected(flag, "field=value", repr(change))
        if field not in kinds:
            raise expected(flag, f"one of {', '.join(sorted(kinds))}{of}", repr(field))
        values[field] = _typed(f"{flag} {field}", text, kinds[field])
    return values


def _typed(name: str, text: str, kind: Any) -> Any:
    try:
        value = json.loads({"None": "null"}.get(text, text))
    except (json.JSONDecodeError, RecursionError):
        value = text
    # as it reads; as text where text is meant, such as a folder called 3; 4e3 for a whole number
    candidates = [value, text]
    if isinstance(value, float) and value.is_integer():
        candidates.insert(1, int(value))
    for candidate in candidates:
        with contextlib.suppress(msgspec.ValidationError):
            found = msgspec.convert(candidate, kind)
            check_finite(name, found)
            return found
    shown = inspect.formatannotation(kind).replace("typing.", "")
    raise expected(name, f"a value of type {shown}", repr(text))


def check_finite(name: str, value: Any) -> None:
    """Refuse infinite and NaN numbers, and counts beyond 32 bits, also within lists.

    Raises:
        UsageError: naming it.
    """
    if isinstance(value, tuple | list):
        for entry in value:
            check_finite(name, entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise expected(name, "a finite number", value)
    elif isinstance(value, int) and value > LARGEST_COUNT:
        raise expected(name, f"at most {LARGEST_COUNT}", value)


def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


LARGEST_COUNT = 2**31 - 1
"""Of steps, rows and tokens: what the 32 bits of a step counter and of an index hold."""


def at_least(name: str, value: float | None, lowest: float) -> None:
    """Refuse a flag's number that is not finite, below ``lowest`` or a count beyond 32 bits; None passes.

    Raises:
        UsageError: naming the flag.
    """
    if value is None:
        return
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, int):  # first: the largest whole numbers are beyond what is finite as a float
        if value > LARGEST_COUNT:
            raise expected(flag, f"at most {LARGEST_COUNT}", value)
    elif not math.isfinite(value):
        raise expected(flag, "a finite number", value)
    if value < lowest:
        raise expected(flag, f"at least {lowest}", value)


def check_rates(flag: str, rates: tuple[float, ...]) -> None:
    """Refuse learning rates that are not finite, or that share a folder, whose name has six digits of them.

    Raises:
        UsageError: naming the flag.
    """
    check_finite(flag, rates)
    named: dict[str, float] = {}
    for rate in rates:
        if named.setdefault(f"{rate:g}", rate) != rate:
            raise expected(flag, "rates that differ in their first six digits", f"{named[f'{rate:g}']} and {rate}")
