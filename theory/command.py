"""What the programs of this folder share: their progress, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ntk_prefix.checks import check_arguments, explain

USAGE, STOPPED = 2, 130
"""Exit statuses: of what a user can mend, and of Ctrl-C."""


def counted(console: Console) -> Progress:
    """Return a bar of what is finished out of how many, with a word on what is being done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def ended(run: Callable[[], int], console: Console) -> int:
    """Return the exit status of a program that goes on where it was stopped; an error that a user can mend becomes one line.

    Raises:
        Exception: any other, with its traceback.
    """
    try:
        check_arguments(sys.argv[1:])
        return run()
    except KeyboardInterrupt:
        console.print("stopped; what is finished is kept, and the same command goes on", style="yellow")
        return STOPPED
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        return USAGE
