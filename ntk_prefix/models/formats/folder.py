"""Hugging Face's folder: ``config.json`` and ``model.safetensors``, or shards with an index."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from ntk_prefix.artifacts import read_json
from ntk_prefix.checks import expected, extra
from ntk_prefix.models.formats.checkpoint import Checkpoint, StoredTensor

__all__ = ["read_folder"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FLOATING: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""safetensors' words for what a weight may be here."""

MAPPED = 2**26
"""Bytes of a file that are looked at before it is mapped anew: what was read of a mapped file is memory of this process
until it is closed."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_folder(folder: Path) -> Checkpoint:
    """Open a folder.

    Raises:
        FileNotFoundError: a file is missing.
        UsageError: a broken file, or an index that names a file outside of the folder.
    """
    config = folder / "config.json"
    single, index = folder / SINGLE, folder / INDEX
    if not config.is_file() or not (single.is_file() or index.is_file()):
        raise FileNotFoundError(_missing(folder))
    tensors: dict[str, StoredTensor] = {}
    if single.is_file():
        tensors = _tensors(single)
    else:
        where = read_json(index, _Index).weight_map
        for shard in sorted(set(where.values())):
            if (
                Path(shard).name != shard
                or not 0 < len(shard.encode()) < 256
                or shard == ".."
                or "\\" in shard
                or "\0" in shard
            ):
                raise expected(f"{index}: weight_map", "names of files beside it", repr(shard[:80]))
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{index}: names {shard}, which is not in {folder}")
            found = _tensors(folder / shard)
            if twice := sorted(tensors.keys() & found.keys()):
                raise expected(f"{index}: {shard}", "each tensor in one file", f"{twice[0]} once more")
            tensors |= found
        if lost := sorted(where.keys() - tensors.keys()):
            raise expected(str(index), "names of tensors in these files", f"{lost[0][:80]}, which is in none")
    weights = single if single.is_file() else index
    return Checkpoint(config, weights, read_json(config, dict[str, Any]), tensors)


def _missing(folder: Path) -> str:
    """Return what to say of a folder that is not one."""
    names = sorted(file.name for file in folder.iterdir())
    text = f"expected config.json and {SINGLE} (or {INDEX}) in {folder}, found {names[:20]}"
    if "adapter_config.json" in names:
        return f"{text}. It holds an adapter: load its base model, then ntk_prefix.peft.load_adapter"
    if any(name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for name in names):
        return (
            f"{text}. Weights are read from safetensors only. Where torch is, in that folder: python -c 'import torch, "
            'safetensors.torch as s; s.save_file({name: x.clone() for name, x in torch.load("pytorch_model.bin").items()}, '
            """"model.safetensors")'"""
        )
    return text


def _tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file; its header is read, no more."""
    opened = _opened(file)
    found = {}
    for name in opened.keys():  # noqa: SIM118
        header = opened.get_slice(name)
        kind = header.get_dtype()
        numbers = np.dtype(FLOATING[kind]) if kind in FLOATING else None
        load = functools.partial(_rows, file, name)
        found[name] = StoredTensor(file, name, tuple(header.get_shape()), kind, numbers, load)
    return found


def _rows(file: Path, name: str, bounds: Iterable[slice]) -> Iterator[np.ndarray]:
    """Yield rows of a tensor."""
    opened, seen = None, 0
    for rows in bounds:
        opened = opened or _opened(file).get_slice(name)
        values = opened[rows]
        if (seen := seen + values.nbytes) >= MAPPED:
            opened, seen = None, 0
        yield values


def _opened(file: Path) -> Any:
    """Return a safetensors file, whose header the package has compared with its length."""
    with extra("models"):
        from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except OSError as error:
        raise expected(file, "a file that can be read", f"this: {error}") from None
    except SafetensorError as error:
        with file.open("rb") as content:
            if content.read(8) == b"version ":
                raise expected(
                    file,
                    "a safetensors file",
                    "the pointer that git-lfs leaves in its place",
                    "Fetch the file: git lfs pull",
                ) from None
        raise expected(file, "a safetensors file", f"one that is broken: {error}") from None
