"""Checkpoints that survive being killed at any moment: Orbax, asynchronous, every array checked when it comes back.

    with Checkpoints(directory) as checkpoints:
        found = checkpoints.restore_latest(like=tree)      # (step, tree, info), or None in a new directory
        checkpoints.save(step, tree, info)                 # returns at once, a thread writes
        checkpoints.wait()                                 # now it is committed

A checkpoint is written beside the others and renamed when it is whole, and an older one is removed only after that.
With it go the name, shape, dtype and CRC-32 of every leaf, so one that was damaged, or belongs to another model, is
told from a good one: it is passed over with a warning, and moved aside when an older one is good.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ntk_prefix.checks import UsageError, expected

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

logger = logging.getLogger(__name__)


def _told_here(record: logging.LogRecord) -> bool:
    """Whether a line of the log is kept: of what Orbax raises it also writes a traceback, and we say it in one line."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


logging.getLogger("absl").addFilter(_told_here)

PyTree = Any


class CheckpointError(UsageError):
    """Checkpoints are there and none can be used, or one cannot be written; the message says why."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tree: PyTree
    info: dict[str, Any]


class _Leaf(TypedDict):
    """What a checkpoint says of one of its arrays."""

    shape: list[int]
    dtype: str
    crc32: int | None
    key: str | None
    """The kind, of a random key."""


class _Record(TypedDict):
    """What a checkpoint says of itself."""

    leaves: dict[str, _Leaf]
    info: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Args:
        directory: made if need be; on several processes one that all of them see.
        keep: how many committed checkpoints stay.

    Raises:
        ValueError: ``keep`` below 1.
    """

    def __init__(self, directory: Path | str, keep: int = 2) -> None:
        if keep < 1:
            raise expected("keep", "at least 1", keep)
        self.directory = Path(directory).expanduser().resolve()
        if self.directory.is_dir():
            self._report_foreign_files()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )

    def save(self, step: int, tree: PyTree, info: Mapping[str, Any] | None = None) -> None:
        """Copy the tree to the host and write it in the background; waits for the save before to be committed.

        Args:
            step: larger than any saved before; a step that is there already is not written again.
            tree: any pytree of arrays (of any sharding), typed keys, ints, floats and bools. Donating it afterwards is
                safe. Replicas of ``jax.pmap`` are saved as they are: take one first, or they restore on as many only.
            info: what JSON can hold.

        Raises:
            CheckpointError: a later step is there, or the save before this one failed.
        """
        self.wait()
        committed = self.steps()
        if step in committed:
            return
        if committed and step < committed[-1]:
            raise CheckpointError(
                f"{self.directory}: expected a step after {committed[-1]}, which is saved there, got {step}. "
                "Restore it first, or give the run another directory."
            )
        names, leaves = _flattened(tree)
        stored = [_storable(leaf) for leaf in leaves]
        described = {
            name: _described(leaf)
            | {"crc32": _crc(copy), "key": str(jax.random.key_impl(leaf)) if _is_key(leaf) else None}
            for name, leaf, copy in zip(names, leaves, stored, strict=True)
        }
        content = ocp.args.Composite(
            # Orbax refuses arrays without elements
            tree=ocp.args.StandardSave({name: leaf for name, leaf in zip(names, stored, strict=True) if leaf.size}),
            record=ocp.args.JsonSave({"leaves": described, "info": dict(info or {})}),
        )
        with self._in_one_line(f"step {step} cannot be saved"):
            self._manager.save(step, args=content)

    def wait(self) -> None:
        """Return when everything saved is committed.

        Raises:
            CheckpointError: a save failed.
        """
        with self._in_one_line("the last save failed"):
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the committed steps, the oldest first."""
        # what stands on disk: the manager's own list has what is underway, too
        return sorted(ocp.path.step.checkpoint_steps(self.directory))

    def restore_latest(self, like: PyTree, check: Callable[[dict[str, Any]], Any] = dict) -> Restored | None:
        """Return the newest checkpoint that is whole and fits.

        Args:
            like: a tree as the one saved, of arrays or ``jax.ShapeDtypeStruct``: structure, shapes, dtypes, and the
                shardings to restore to, which need not be those it was saved with. A numpy array, int, float or bool
                comes back as that.
            check: what ``info`` has to pass, and what it makes of it; a checkpoint that it refuses is a damaged one.

        Returns:
            (step, tree, info), or None if nothing was ever committed here.

        Raises:
            CheckpointError: there are checkpoints, and none can be used. They are left as they are.
        """
        self.wait()
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, fault = self._restore(step, like, check)
            if restored is None:
                faults[step] = fault
                logger.warning("checkpoint %s cannot be used: %s", self.directory / str(step), fault)
                continue
            self._set_aside(list(faults))
            return restored
        if faults:
            listed = "; ".join(f"{self.directory / str(step)}: {fault}" for step, fault in faults.items())
            raise CheckpointError(
                f"{self.directory}: expected a checkpoint that can be used, found none ({listed}). "
                "Nothing was changed. Give the run another directory, or remove these to start over."
            )
        return None

    def close(self) -> None:
        """Wait, and let go of the threads.

        Raises:
            CheckpointError: a save failed.
        """
        self.wait()
        with self._in_one_line("the last save failed"):
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as later:
            if error is None:
                raise
            if not isinstance(error, CheckpointError):  # which has said it
                logger.warning("%s", later)

    @contextlib.contextmanager
    def _in_one_line(self, what: str) -> Iterator[None]:
        """Say what failed, and of Orbax's error, which it is the cause of, the first line."""
        try:
            yield
        except Exception as error:  # whatever a disk that is full, or a folder that is gone, leads to in Orbax
            raise CheckpointError(f"{self.directory}: {what}: {_first_line(error)}") from error

    def _report_foreign_files(self) -> None:
        """Say what in the directory is no checkpoint; Orbax removes what it left half-written itself."""
        for path in sorted(self.directory.iterdir()):
            if ".orbax-checkpoint-tmp" in path.name:
                logger.warning("%s was half-written when its run was killed: it is removed", path)
            elif not path.name.isdecimal() or not path.is_dir():
                logger.warning("%s is no checkpoint: it is left alone", path)

    def _restore(self, step: int, like: PyTree, check: Callable[[dict[str, Any]], Any]) -> tuple[Restored | None, str]:
        """Return what a checkpoint holds, or what is wrong with it."""
        restored, fault = None, ""
        try:
            restored = self._read(step, like)
            restored = restored._replace(info=check(restored.info))
        except Exception as error:  # whatever a damaged file leads to
            fault = _first_line(error)
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(restored is not None)).all():
            return None, fault or "another process cannot read it"
        return restored, fault

    def _read(self, step: int, like: PyTree) -> Restored:
        names, leaves = _flattened(like)
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        try:
            held = msgspec.convert(record, _Record)["leaves"]
        except msgspec.ValidationError as error:
            raise expected("record", "the leaves and the info of a checkpoint", f"this: {error}") from None
        for name in {*names} ^ {*held}:
            what = "does not have" if name in names else "also has"
            raise UsageError(f"it is of another model or optimizer: expected the leaves of this one, it {what} {name}")
        wanted = {name: _described(leaf) for name, leaf in zip(names, leaves, strict=True)}
        for name, description in wanted.items():
            found = {"shape": held[name]["shape"], "dtype": held[name]["dtype"]}
            if found != description:
                raise expected("it is of another model or optimizer", f"{name} to be {description}", found)
        abstract = {name: _abstract(leaf) for name, leaf in zip(names, leaves, strict=True)}
        full = {name: leaf for name, leaf in abstract.items() if leaf.size}
        arrays = self._manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(full)))["tree"]
        arrays |= {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.items() if not leaf.size}
        for name in names:
            crc = held[name]["crc32"]
            if crc is not None and crc != _crc(arrays[name]):
                raise expected(f"{name} is damaged", f"CRC-32 {crc}", _crc(arrays[name]))
        back = [_as(leaf, arrays[name], held[name]["key"]) for name, leaf in zip(names, leaves, strict=True)]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), back), record["info"])

    def _set_aside(self, steps: list[int]) -> None:
        """Rename what cannot be used, so that the run can save these steps again."""
        if jax.process_index() == 0:
            for step in steps:
                path = self.directory / str(step)
                place = next(
                    free
                    for number in range(1, 1000)
                    if not (free := self.directory / f"{step}.unusable-{number}").exists()
                )
                path.rename(place)
                logger.warning("checkpoint %s was moved to %s", path, place)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("ntk_prefix: checkpoints set aside")
            self._manager.reload()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:400]


def _flattened(tree: PyTree) -> tuple[list[str], list[Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> np.ndarray | jax.Array:
    """Return a copy on the host, so that the leaf may be donated; what lies on several processes stays there."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return leaf
    return np.array(leaf)


def _described(leaf: Any) -> dict[str, Any]:
    """Return what must agree between a checkpoint and the tree that it is restored into."""
    if not hasattr(leaf, "dtype"):
        leaf = np.array(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _crc(leaf: Any) -> int | None:
    """Of the values' bytes, in C order; None if no process has all of them."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    return zlib.crc32(np.ascontiguousarray(leaf).tobytes())


def _abstract(leaf: Any) -> Any:
    """How Orbax is to restore a leaf: on the devices of ``like``, or as numpy."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(data.shape, data.dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.empty_like(np.array(leaf))


def _as(like: Any, array: Any, kind: str | None) -> Any:
    """Return a restored array as the kind of leaf that was given; ``kind`` is that of a key."""
    if _is_key(like):
        return jax.device_put(jax.random.wrap_key_data(array, impl=kind), like.sharding)
    if isinstance(like, bool | int | float):
        return type(like)(array)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct) and not isinstance(array, jax.Array):
        return jax.device_put(array, like.sharding)
    return array
