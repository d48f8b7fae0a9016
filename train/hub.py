"""Adapters on the Hugging Face hub: a folder becomes a repository of models."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ntk_prefix.checks import UsageError, expected

__all__ = ["check", "push"]

FLAG = "--push-to-hub"


def check(name: str) -> None:
    """Refuse what could not be pushed once training is over: a name that is none, or nobody who is logged in.

    Raises:
        UsageError: in one line.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise expected(FLAG, "a name such as owner/my-adapter", repr(name)) from None
    try:
        huggingface_hub.whoami()
    except LocalTokenNotFoundError:
        raise expected(FLAG, "somebody logged in", "no token", "Run hf auth login, or set HF_TOKEN") from None
    except (OSError, HfHubHTTPError) as error:
        raise UsageError(f"{FLAG}: expected to reach the hub, got: {_first_line(error)}") from None


def push(folder: Path, name: str, message: str) -> str:
    """Put a folder's files into a repository, made if need be, and return its address.

    Args:
        folder: of an adapter, with its model card.
        name: of the repository, ``owner/name`` or ``name``.
        message: of the commit.

    Raises:
        UsageError: the hub did not take it; the same command tries again.
    """
    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except (OSError, HfHubHTTPError) as error:
        got = f"{_first_line(error)}. The run is whole; the same command tries again"
        raise UsageError(f"{FLAG}: expected the hub to take {folder}, got: {got}.") from None
    return str(made)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
