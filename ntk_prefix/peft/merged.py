"""A model with its adapter merged, as a Hugging Face folder that needs nothing of ours.

The folder is the base model's, but for the tensors that merging has changed: names, dtypes, shards and all other files are
the base's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ntk_prefix.artifacts import check_new, json_text, new_folder, read_json, write_whole
from ntk_prefix.checks import NonFiniteError, expected
from ntk_prefix.peft.files import own_weights
from ntk_prefix.peft.inject import merge
from ntk_prefix.peft.names import Names
from ntk_prefix.typing import Array

__all__ = ["HEAD_FILE", "save_merged"]

HEAD_FILE = "head.safetensors"
"""A classifier's head that the Hugging Face class has no place for: ``weight`` [labels, D] and ``bias`` [labels]."""

CONFIG = "config.json"

INDEX = "model.safetensors.index.json"

COPIED = {".json", ".txt", ".model", ".jinja"}
"""Endings of a folder's other files: configuration and tokenizer."""


def save_merged(
    model: Any, base: str | Path, directory: str | Path, *, config: Mapping[str, Any] | None = None
) -> list[str]:
    """Merge the active adapter into the weights and write the model as a Hugging Face folder.

    Its config.json is written last, so that a folder with one is whole; where writing fails, what was written is removed, and
    what is left by a process that was killed, by the next one to write there.

    Args:
        model: with an active adapter that is an addition to weights, such as LoRA; it is merged, as by
            :func:`ntk_prefix.peft.merge`.
        base: the folder that the model was loaded from, with config.json and safetensors.
        directory: a new folder. A classifier's head is among the weights where the family's Hugging Face class pools as the
            model does, and in :data:`HEAD_FILE` elsewhere.
        config: what config.json says beside, or in the place of, what the base's does.

    Returns:
        The names of the tensors that are not the base's.

    Raises:
        UsageError: a base that is no such folder, or another model's; a directory with files in it; an adapter that no
            weight can stand for.
        NonFiniteError: a weight that the file's dtype cannot hold.

    Numerics: a changed weight is rounded once, from float32 to the dtype that the base's file has.
    """
    base, directory = Path(base), Path(directory)
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    if not files or not (base / CONFIG).is_file():
        raise expected("base", "a Hugging Face folder with config.json and safetensors", base)
    check_new(directory, "directory")
    names = Names(model)
    before = {name: np.asarray(x) for name, x in own_weights(model, names).items()}
    merge(model)
    after = {name: np.asarray(x) for name, x in own_weights(model, names).items()}
    changed = {name for name, x in after.items() if name not in before or not np.array_equal(before[name], x)}
    head = {name: after[name] for name in changed if name.startswith(names.heads)}
    hosted = head if names.head != "head" else {}
    merged = _Merged(names, after, changed - head.keys(), _missing_prefix(files, names) if hosted else "")
    own = {names.key(name).removeprefix("base_model.model."): jnp.asarray(x) for name, x in hosted.items()}
    written: list[str] = []
    places: dict[str, str] = {}
    with new_folder(directory, "directory"):
        for file in files:
            tensors, new = merged.file(file)
            tensors |= own if file == files[-1] else {}
            _write(directory / file.name, tensors)
            written += new
            places |= dict.fromkeys(tensors, file.name)
        left = merged.changed - {names.canonical(name) for name in written} - merged.in_wholes
        if left:
            raise expected(
                "base", f"the folder that the model was loaded from, with {min(left)}", f"{base}, without it"
            )
        for file in base.iterdir():
            if file.suffix in COPIED and file.is_file() and file.name != CONFIG:
                shutil.copyfile(file, directory / file.name)
        if (index := directory / INDEX).is_file():
            write_whole(index, json_text({**read_json(index, dict[str, Any]), "weight_map": places}).encode())
        if head and not hosted:
            _write(directory / HEAD_FILE, {name.removeprefix("head."): jnp.asarray(x) for name, x in head.items()})
        said = (base / CONFIG).read_bytes()
        if config:
            said = json_text({**read_json(base / CONFIG, dict[str, Any]), **config}).encode()
        write_whole(directory / CONFIG, said)
    return sorted(written + list(own))


class _Merged(NamedTuple):
    """A merged model's own weights, by canonical name."""

    names: Names
    weights: Mapping[str, np.ndarray]
    changed: set[str]
    prefix: str
    """That a file's names lack for a class with a head."""

    @property
    def in_wholes(self) -> set[str]:
        """Those that a file has as a part of a larger map."""
        return {name for name in self.changed if name.rpartition(".")[0].rpartition(".")[0] in self.names.fused}

    def file(self, file: Path) -> tuple[dict[str, Array], list[str]]:
        """Return a file's tensors by their new names, and the names of those that merging has changed."""
        from safetensors import safe_open

        tensors, written = {}, []
        with safe_open(file, framework="flax") as content:
            for name in content.keys():  # noqa: SIM118
                stored: Array = content.get_tensor(name)
                new = self._of(self.names.canonical(name))
                if new is not None:
                    if new.shape != stored.shape:
                        raise expected(f"{file}: {name}", f"{new.shape}, as the model has it", stored.shape)
                    stored = jnp.asarray(new).astype(stored.dtype)
                    if not jnp.isfinite(stored).all():
                        raise NonFiniteError(f"{name}: expected numbers that {stored.dtype} holds, got larger ones.")
                    written.append(self.prefix + name)
                tensors[self.prefix + name] = stored
        return tensors, written

    def _of(self, name: str) -> np.ndarray | None:
        """Return a tensor's new numbers, None if it is not changed."""
        if name in self.changed:
            return self.weights[name]
        whole, _, end = name.rpartition(".")
        parts = [f"{whole}.{part}.{end}" for part in self.names.fused.get(whole, ())]
        return np.concatenate([self.weights[part] for part in parts]) if self.changed & set(parts) else None


def _missing_prefix(files: list[Path], names: Names) -> str:
    """Return what a bare model's names lack for a class with a head, which reads them behind the model's name."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="np") as content:
            if any(name.startswith(names.prefix) for name in content.keys()):  # noqa: SIM118
                return ""
    return names.prefix


def _write(file: Path, tensors: Mapping[str, Array]) -> None:
    from safetensors.flax import save

    write_whole(file, save(dict(tensors), {"format": "pt"}))
