"""What the chips of a compiled program send each other: kind, how often, how much, and what it is.

A collective is counted **once for each channel**: the TPU compiler fuses one with the computation around it, and then the
same ``all-gather`` stands in the text where it starts, in every step on the way, and where it ends.

What a collective moves is read off where its operand comes from (see :func:`train.plan.hlo.trace`) and off its shape:

    weights      made of weights alone: nothing of the batch has reached it
    gradients    made of the batch too, in the backward pass or after it, and shaped as something that is trained (axes in
                 any order, each whole or divided among devices)
    inputs       made of the batch alone, as it came in: ids, masks, labels
    scalars      no more than 1,024 entries that are none of these: the loss, norms, whether all is finite
    activations  all other: the batch's rows on their way through the model
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from train.plan.hlo import Array, Computation, Instruction, Program, parse, trace, union

__all__ = ["Collective", "Contents", "collectives", "gathers", "role", "summary"]

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip

SCALARS = 1024
"""Entries up to which what is neither a weight nor a gradient is not worth a name of its own."""

Contents = Literal["weights", "gradients", "activations", "inputs", "scalars"]

ROLES = {"frozen": "frozen", "state.trained": "trained", "state.optimizer": "optimizer", "batch": "batch"}
"""What an argument of :meth:`ntk_prefix.training.Trainer.update`'s step is, by how its name begins."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one chip sees it."""

    kind: str
    channel: int | None
    """Its number; None where the program has no channels, such as one of ``pmap``."""
    times: int
    """How often it runs in one run of the program."""
    arrays: tuple[Array, ...]
    """The result, of a reduce-scatter the operand: the larger side."""
    group: int
    """Chips that take part together."""
    contents: Contents
    sources: tuple[str, ...]
    """Names of the arguments that it is made of; all of them, so many for an activation."""
    gathered_before: bool
    """Whether its operand is the result of a collective of weights: a gather over two axes comes in two steps."""
    op_name: str
    """What JAX calls the operation."""

    @property
    def bytes(self) -> int:
        """Size of the larger side, of all the times together."""
        return self.times * sum(each.bytes for each in self.arrays)

    @property
    def moved(self) -> float:
        """Bytes that leave a chip by a ring, the least there can be: of n chips, (n - 1) / n of the larger side.

        An all-reduce is a reduce-scatter and an all-gather; a permute sends all that it has.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / max(self.group, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for files; of the sources only how many, beyond four."""
        return {
            "kind": self.kind,
            "channel": self.channel,
            "times": self.times,
            "contents": self.contents,
            "shapes": [str(each) for each in self.arrays],
            "group": self.group,
            "bytes": self.bytes,
            "moved": self.moved,
            "sources": list(self.sources) if len(self.sources) <= 4 else len(self.sources),
            "op_name": self.op_name,
        }


def role(argument: str) -> str:
    """Return what an argument is, by its name: frozen, trained, optimizer, batch, or other."""
    return next((what for start, what in ROLES.items() if argument.startswith(start)), "other")


def collectives(program: str | Program) -> list[Collective]:
    """Return the collectives of a compiled program, in the order of the program.

    Args:
        program: ``compiled.as_text()`` of a training step whose arguments are called (state, frozen, batch), or what
            :func:`train.plan.hlo.parse` made of it.
    """
    program = parse(program) if isinstance(program, str) else program
    arguments = [each.op_name for each in program.parameters()]
    # channel, or the place where there is none -> each line of the text that it stands in -> what its operand is made of
    seen: dict[Any, dict[tuple[str, str], int]] = {}
    times: dict[tuple[str, str], int] = {}
    gathered = 1 << len(arguments)

    def visit(each: Instruction, computation: Computation, operands: Sequence[Any], runs: int) -> None:
        if _kind(each) is None:
            return
        channel, line = each.attribute("channel_id"), (computation.name, each.name)
        key = line if channel is None else int(channel)
        lines = seen.setdefault(key, {})
        lines[line] = lines.get(line, 0) | union(tuple(operands))
        times[line] = max(times.get(line, 0), runs)

    trace(program, visit, mark=lambda each: gathered if _kind(each) == "all-gather" else 0)
    roles = [role(name) for name in arguments]
    trained = {_sides(each.arrays[0]) for each in program.parameters() if role(each.op_name) == "trained"}
    found = []
    for key, lines in seen.items():
        computation, name = next(iter(lines))
        each = program.computations[computation].instructions[name]
        kind = _kind(each)
        assert kind is not None
        # a fused one stands beside other values on its way; where it starts it stands alone
        made = functools.reduce(lambda left, right: left & right, lines.values())
        sources = tuple(i for i in range(len(arguments)) if made >> i & 1)
        larger = _larger(each, program.computations[computation], kind)
        found.append(
            Collective(
                kind=kind,
                channel=key if isinstance(key, int) else None,
                # one that begins before a loop and goes on beside it stands in the loop as well
                times=min(times[line] for line in lines),
                arrays=larger,
                group=_group(each, program.partitions),
                contents=_contents({roles[i] for i in sources}, larger, trained, program.partitions, each.op_name),
                sources=tuple(arguments[i] for i in sources),
                gathered_before=bool(made & gathered),
                op_name=each.op_name,
            )
        )
    return found


def _kind(each: Instruction) -> str | None:
    """Return which collective an instruction is; None for others, and where one that began elsewhere ends."""
    opcode = each.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _larger(each: Instruction, computation: Computation, kind: str) -> tuple[Array, ...]:
    """Return the larger side of a collective: its operand if it scatters, else its result."""
    if kind == "reduce-scatter":
        return tuple(array for name in each.operands for array in computation.instructions[name].arrays)
    if each.opcode.endswith("-start") and kind != "all-reduce":
        return tuple(each.elements[1])  # (operand, result, what it waits on)
    return tuple(each.arrays)


def _group(each: Instruction, devices: int) -> int:
    """Return how many chips take part together, of the ways in which XLA writes ``replica_groups``."""
    if pairs := each.attribute("source_target_pairs"):
        return len({number for number in re.findall(r"\d+", pairs)}) if pairs != "{}" else devices
    groups = each.attribute("replica_groups") or ""
    if listed := re.match(r"\{\{([0-9,]*)\}", groups):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if counted := re.match(r"\[(\d+),(\d+)\]<=", groups):  # [groups,size]<=[...]
        return int(counted[2])
    if named := re.match(
        r"mesh\[(.*?)\]\s*\{(.*)\}", groups
    ):  # mesh['a'=2,'b'=4] {'b'}, or a part of an axis {'b':(1)2}
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        taken = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in taken)
    return devices


def _sides(array: Array) -> tuple[int, ...]:
    return tuple(sorted(side for side in array.shape if side > 1))


def _contents(
    made_of: set[str], moved: Iterable[Array], trained: set[tuple[int, ...]], devices: int, op_name: str
) -> Contents:
    """Return what a collective moves; the rule is in this module's docstring."""
    moved = list(moved)
    if "batch" not in made_of and made_of & {"frozen", "trained", "optimizer"}:
        return "weights"
    forward = "jvp(" in op_name and "transpose(" not in op_name
    like = [any(_divided(_sides(array), own, devices) for own in trained) for array in moved]
    if (
        not forward
        and any(like)
        and all(ours or array.size <= SCALARS for ours, array in zip(like, moved, strict=True))
    ):
        return "gradients"
    if made_of == {"batch"}:
        return "inputs"
    return "scalars" if sum(array.size for array in moved) <= SCALARS else "activations"


def _divided(sides: tuple[int, ...], own: tuple[int, ...], devices: int) -> bool:
    """Return whether an array has the axes of one that is divided among devices, in any order, some of them whole."""
    if len(sides) != len(own):
        return False

    def fit(order: tuple[int, ...]) -> bool:
        whole = all(side % part == 0 for side, part in zip(order, own, strict=True))
        return whole and devices % (math.prod(order) // math.prod(own)) == 0

    return any(map(fit, itertools.permutations(sides)))


# ---------------------------------------------------------------------------------------- all of them


def summary(found: Iterable[Collective]) -> dict[str, dict[str, dict[str, float]]]:
    """Return contents -> kind -> how many channels, how often they run, their bytes, and what leaves a chip."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for each in found:
        row = table.setdefault(each.contents, {}).setdefault(
            each.kind, {"channels": 0, "times": 0, "bytes": 0, "moved": 0.0}
        )
        row["channels"] += 1
        row["times"] += each.times
        row["bytes"] += each.bytes
        row["moved"] += each.moved
    return table


def gathers(found: Iterable[Collective], program: Program) -> dict[str, float]:
    """Return by weight how often it is gathered in one run: entries that its gathers make, over those they should make.

    A gather of several weights together, such as one layer of a stack in a loop, is shared among them by their sizes; the
    second step of a gather over two axes is none of its own.
    """
    sizes = {each.op_name: each.arrays[0].size for each in program.parameters()}
    often: dict[str, float] = {}
    for each in found:
        if each.contents == "weights" and each.kind == "all-gather" and not each.gathered_before:
            entries = each.times * sum(array.size for array in each.arrays)
            share = entries / each.group / sum(sizes[name] for name in each.sources)
            for name in each.sources:
                often[name] = often.get(name, 0.0) + share
    return often
