"""What stands beside every result: where it came from; and files that are whole or not there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["CHECKOUT", "json_text", "provenance", "write_whole"]

CHECKOUT = Path(__file__).resolve().parent.parent
"""Where this package is run from; a checkout, unless it was installed as a wheel."""


def provenance(*packages: str, sources: tuple[str, ...] = ("ntk_prefix/**/*.py",)) -> dict[str, Any]:
    """Return versions, machine, commit, and a hash over the files that match ``sources`` in the checkout."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", *packages)
    files = sorted(path for pattern in sources for path in CHECKOUT.glob(pattern))
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": _git(),
        "sources_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest(),
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: under a name of this process's own, then moved into place."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def json_text(value: Any, indent: int | None = 2) -> str:
    """Return JSON that any parser reads: infinities and NaN, which JSON has not, become strings; paths too."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return str(value) if isinstance(value, Path) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False) + "\n"


def _git() -> str:
    """The commit, with a mark if files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=CHECKOUT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown (no git)"
    return described.stdout.strip() or "unknown (not a checkout)"
