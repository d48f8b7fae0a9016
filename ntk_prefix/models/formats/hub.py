"""A model of the Hugging Face hub, by its name: its files in Hugging Face's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from ntk_prefix.checks import UsageError

__all__ = ["local_files", "pinned"]

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

_WANTED = (
    "*.json", "*.safetensors", "vocab.txt", "merges.txt", "tokenizer.model", "*.jinja",
)  # fmt: skip
_LEFT = ("*/*",)
"""Folders of a repository hold copies for other libraries."""


def local_files(path: str | Path) -> Path:
    """Return where a model's files are: the path itself where there is one, else what the hub has of that name.

    Args:
        path: of a folder or file, or "owner/name" or "owner/name@revision" of the hub. What is in Hugging Face's cache is
            taken from there; ``HF_HUB_OFFLINE=1`` takes nothing else.

    Raises:
        FileNotFoundError: the hub does not have it, cannot be reached, or needs a package that is not installed.
    """
    local = Path(path).expanduser()
    named = _NAME.fullmatch(Path(path).as_posix())
    if named is None or local.exists() or local.suffix in (".gguf", ".onnx"):
        return local
    repository, revision = named["repository"], named["revision"]
    here = f"expected a Hugging Face folder, a .gguf or an .onnx file, found nothing at {path}"
    by_hand = f"`hf download {repository} --local-dir DIR` makes a folder of a model of the hub, where there is network"
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f'{here}. A model of the hub is taken by its name with pip install "huggingface-hub"; {by_hand}.'
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_LEFT)
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{here}, and none on the hub: {type(error).__name__}: {why}. {by_hand}.") from None
    return Path(folder)


def pinned(path: str | Path) -> str:
    """Return the name with the revision that :func:`local_files` takes, for a record; a path of one's own as it is.

    Raises:
        FileNotFoundError: as :func:`local_files`.
    """
    files = local_files(path)
    if files == Path(path).expanduser():
        return str(path)
    if files.parent.name != "snapshots":
        raise UsageError(f"{path}: expected a snapshot in Hugging Face's cache, got {files}")
    return f"{str(path).partition('@')[0]}@{files.name}"
