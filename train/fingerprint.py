"""What tells the rows of a run from others under the same name: the bytes of their files."""

from __future__ import annotations

import hashlib

from train.sources import find_folder, on_hub, spec_of, split_files

__all__ = ["fingerprint"]


def fingerprint(task: str, data_dir: str | None) -> str | None:
    """Return a hash of the files that a task's rows are read from.

    None for rows that a name pins, of an asset or of a hub, and where there are no files any more. Images that a table has the
    paths of are not looked at.

    Raises:
        UsageError: as :func:`train.sources.split_files`.
    """
    place = None if data_dir is None or on_hub(data_dir) else find_folder(task, data_dir)
    if place is None:
        return None
    whole = hashlib.sha256()
    for split, files in split_files(spec_of(task), place).items():
        for file in files:
            with file.open("rb") as stream:
                whole.update(f"{split} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
