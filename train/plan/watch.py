"""A compiler that ends its process, as libtpu does where it meets what it cannot do: said in a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

__all__ = ["watched"]

CHILD = "NTK_PREFIX_WATCHED"
"""Set in the process that does the work."""


def watched(module: str) -> None:
    """Run ``python -m module`` with this command line in a process of its own, and end with its exit status.

    In that process it does nothing. Where a signal ended it, a line on stderr says so, and the exit status is 128 and the
    signal's number, as a shell's.

    Args:
        module: the program that calls this, before it imports what takes long.
    """
    if os.environ.get(CHILD):
        return
    with subprocess.Popen([sys.executable, "-m", module, *sys.argv[1:]], env={**os.environ, CHILD: "1"}) as child:
        while child.poll() is None:
            try:
                child.wait()
            except KeyboardInterrupt:  # a terminal's Ctrl-C has reached the other process too, which ends by itself
                continue
    if child.returncode >= 0:
        sys.exit(child.returncode)
    name = signal.Signals(-child.returncode).name
    print(
        f"The compiler ended by {name}; the reason that it gave stands above. Try with --remat or --scan-layers, or without "
        "them, or another --topology.",
        file=sys.stderr,
    )
    sys.exit(128 - child.returncode)
