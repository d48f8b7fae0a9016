"""Peak memory of this process, not of the one that started it."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Largest resident set so far.

    On Linux this is ``VmHWM``, which starts anew with the program; ``ru_maxrss`` is inherited across fork and exec, so
    that under a large parent it would say the parent's.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
