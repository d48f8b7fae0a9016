"""The files of a run: read by schema, written whole, held by one process, with where they came from beside them.

Reading: :func:`read_json` checks a file's size, its syntax and the type of every field before anybody uses it. Writing:
:func:`write_whole` leaves a whole file or none, also when the power goes; :func:`json_text` refuses numbers that are not
finite, by name, since JSON has none and a text among numbers is found out by the next reader only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from ntk_prefix.checks import NonFiniteError, UsageError, expected

__all__ = [
    "CHECKOUT",
    "append",
    "check_new",
    "checked",
    "cores",
    "decode_json",
    "finite_or_none",
    "held",
    "json_text",
    "new_folder",
    "peak_memory",
    "peak_resident_memory",
    "provenance",
    "read_array",
    "read_bytes",
    "read_json",
    "write_figure",
    "write_whole",
]

CHECKOUT = Path(__file__).resolve().parent.parent
"""Where this package is run from; a checkout, unless it was installed as a wheel."""

LARGEST_JSON = 2**26
"""Bytes of a JSON file that is read whole; a tokenizer's, the largest that is usual, has a tenth of it."""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------ reading


def read_json(path: Path, kind: type[T] | GenericAlias, *, largest: int = LARGEST_JSON) -> T:
    """Return what a JSON file holds, checked against a type.

    Args:
        path: of the file.
        kind: a dataclass, a ``TypedDict``, ``dict[str, int]`` and the like; ``msgspec.Meta`` bounds numbers. Fields that
            it does not name are left out.
        largest: bytes; a longer file is not read.

    Raises:
        UsageError: there is no such file; it is too long, not JSON, nested too deep, or a field is of another type; the
            text names the file and the field.
    """
    return decode_json(read_bytes(path, largest), kind, str(path))


def decode_json(content: bytes | str, kind: type[T] | GenericAlias, name: str) -> T:
    """Return JSON of any origin, checked against a type.

    Raises:
        UsageError: as :func:`read_json`, beginning with ``name``.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise expected(name, "fields of the right types", f"this: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise expected(name, "JSON", f"a file that is broken: {error}") from None
    except RecursionError:
        raise expected(name, "JSON", "values nested too deep to be read") from None


def checked(value: Any, kind: Any, name: str) -> Any:
    """Return a value that came from any file, checked against a type as :func:`read_json` does.

    Raises:
        UsageError: it is of another type; beginning with ``name``.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise expected(name, "values of the right types", f"this: {error}") from None


def read_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, mapped from the disk: what is not looked at is not read.

    The header is compared with the file's length before anything is allocated, so that a damaged one costs nothing.

    Raises:
        UsageError: there is no such file, it is no .npy file, its header does not fit what follows it, or its entries are
            Python objects, which are never run; the text names the file.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, start = _npy_header(file, name)
            length = os.fstat(file.fileno()).st_size - start
    except FileNotFoundError:
        raise expected(name, "an existing file", "none") from None
    except OSError as error:
        raise expected(name, "a file that can be read", error.strerror) from None
    if dtype.hasobject:
        raise expected(name, "numbers", "Python objects, which are never loaded", "Save x.astype(float)")
    if not all(0 <= side < 2**48 for side in shape) or math.prod(shape) * dtype.itemsize != length:
        wanted = f"{math.prod(shape) * dtype.itemsize:,} bytes of numbers, as its header's shape {shape} says"
        raise expected(name, wanted, f"{length:,}", "Save it again: it is damaged")
    order: Literal["C", "F"] = "F" if fortran else "C"
    if length == 0:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", start, shape, order).view(np.ndarray)


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, whether columns come first, type of the entries, and where they start."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return tuple(int(side) for side in shape), fortran, dtype, file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as a Python literal: damage comes as any of a dozen errors
        told = " ".join(str(error).split())[:200]
        raise expected(name, "a .npy file", f"this: {told}", "Save one array with np.save") from None


def read_bytes(path: Path, largest: int, name: str = "") -> bytes:
    """Return what a file holds, if that is not too much.

    Args:
        path: of the file.
        largest: bytes; a longer file is not read.
        name: who names the file, for errors; they name it too.

    Raises:
        UsageError: there is no such file, it is none (a folder, a pipe), too long, or cannot be read.
    """
    name = f"{name}: {path}" if name else str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise expected(name, "a file", "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe")
        if status.st_size > largest:
            raise expected(name, f"at most {largest:,} bytes", f"{status.st_size:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise expected(name, "an existing file", "none") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        if isinstance(error, UsageError):
            raise
        raise expected(name, "a file that can be read", getattr(error, "strerror", error)) from None


# ------------------------------------------------------------------------------------------ writing


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: under another name, onto the disk, then moved into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with _named(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def append(path: Path, line: str) -> None:
    """Write a line at the end of a file; where that fails, or the process ends within it, a part of it may be there."""
    with _named(path), path.open("a") as file:
        file.write(line)


def write_figure(path: Path, figure: Any, **options: Any) -> None:
    """Write a Matplotlib figure, whole or not at all; options are those of ``savefig``, the format is the path's ending."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), **options)
    write_whole(path, picture.getvalue())


UNFINISHED = ".ntk_prefix-unfinished"
"""File in a folder that is being filled, held by who fills it: where nobody holds it, whoever did was killed."""


def check_new(path: Path, name: str) -> None:
    """Refuse a path that is in use: a file, or a folder with files that :func:`new_folder` has not left unfinished.

    Raises:
        UsageError: it begins with ``name``.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / UNFINISHED).is_file())):
        raise expected(name, "a new folder", f"{path}, which is in use", "Name another")


@contextlib.contextmanager
def new_folder(path: Path, name: str) -> Iterator[None]:
    """Make a folder, or take an empty one, and take away what was put there if what stands inside of this fails.

    Where the process is killed inside of it, the next one to fill the folder takes it away.

    Args:
        path: of the folder.
        name: who names it, for errors.

    Raises:
        UsageError: the folder is in use, or another process fills it.
    """
    check_new(path, name)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with held(path / UNFINISHED, name):
            _clear(path)
            try:
                yield
            except BaseException:
                _clear(path)
                raise
            finally:
                (path / UNFINISHED).unlink()
    except BaseException:
        if made and not any(path.iterdir()):
            path.rmdir()
        raise


def _clear(folder: Path) -> None:
    """Remove the files of a folder that is being filled."""
    for file in folder.iterdir():
        if file.name != UNFINISHED:
            file.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let what the system refuses within it name the file: of a disk that is full, it names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Put the folder's own entries onto the disk, where the system can."""
    with contextlib.suppress(OSError):  # not on Windows, and not on every network file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_text(value: Any, indent: int | None = 2) -> str:
    """Return JSON that any parser reads; paths become strings.

    Raises:
        NonFiniteError: a number is infinite or NaN, which JSON has not; the text names it.
    """
    return json.dumps(_plain(value, ""), indent=indent, allow_nan=False) + "\n"


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{name or 'value'}: expected a finite number, got {value}.")
    return str(value) if isinstance(value, Path) else value


def finite_or_none(value: float) -> float | None:
    """Return a number, or None in the place of one that JSON has not."""
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def held(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file within it, so that two processes do not write one folder.

    Raises:
        UsageError: another process holds it; it begins with ``what``.
    """
    import filelock

    try:
        lease = filelock.FileLock(lock).acquire(timeout=0)
    except filelock.Timeout:
        raise expected(
            what, "a folder that nobody writes", f"{lock.parent}, which another process holds", "Wait, or name another"
        ) from None
    with lease:
        yield


# ------------------------------------------------------------------------------------- where from


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


def _git() -> str:
    """Return the commit, with a mark if files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=CHECKOUT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown (no git)"
    return described.stdout.strip() or "unknown (not a checkout)"


def cores() -> int:
    """Return how many independent things to do at once: one per core; one on an accelerator, whose memory is not shared."""
    import jax

    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the most bytes this process has held: of an accelerator's memory if there is one, else resident.

    On Linux the resident peak is ``VmHWM``, which starts anew with the program; ``ru_maxrss`` is inherited across fork
    and exec, so that under a large parent it would say the parent's.
    """
    import jax

    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Return the most bytes of main memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
