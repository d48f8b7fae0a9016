"""The text of a compiled program: its computations, and which of the program's arguments each value is made of.

XLA's text is the one description of a program that all its compilers give (``compiled.as_text()``). It is read as far as
is needed to follow values from the entry's parameters through fusions, calls, loops and tuples, and no further.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ntk_prefix.checks import expected

__all__ = ["Array", "Computation", "Instruction", "Made", "Program", "arrays", "parse", "trace", "union"]

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Of one entry, by XLA's name of its type; types that begin with f8 have one byte."""

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array: of an instruction's result, or of a part of it."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding."""
        width = 1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0)
        return int(self.size * width)

    @property
    def on_chip(self) -> bool:
        """Whether it lies in a TPU core's own fast memory, not in the chip's main memory."""
        return "S(" in self.layout

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def arrays(type_text: str) -> list[Array]:
    """Return the arrays of a type as XLA writes it, tuples flattened: ``(bf16[4,8]{1,0}, u32[])``."""
    return [
        Array(dtype, tuple(int(side) for side in sides.split(",") if side), layout or "")
        for dtype, sides, layout in _ARRAY.findall(type_text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type_text: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, as they are written; of a parameter and a constant, what stands in their parentheses before them."""
    root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """Of the result."""
        return arrays(self.type_text)

    @functools.cached_property
    def elements(self) -> list[list[Array]]:
        """Of the result's parts, where it is a tuple, each flattened."""
        return (
            [arrays(part) for part in split(self.type_text[1:-1])] if self.type_text.startswith("(") else [self.arrays]
        )

    @functools.cached_property
    def op_name(self) -> str:
        """What JAX called the operation, or the argument; empty where that is not known."""
        found = _OP_NAME.search(self.rest)
        return found[1].replace("\\'", "'").replace('\\"', '"') if found else ""

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations by the attribute that names them."""
        return {key: tuple(_NAME.findall(names)) for key, names in _CALLED.findall(self.rest)}

    def attribute(self, name: str) -> str | None:
        """Return an attribute's text up to the next comma outside brackets; None if there is none."""
        found = re.search(rf"\b{name}=", self.rest)
        return split(self.rest[found.end() :])[0] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in an order in which each comes after what it takes: the schedule, of a compiled program."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(each for each in self.instructions.values() if each.root)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    """Devices that it is divided among."""

    def parameters(self) -> list[Instruction]:
        """Return the entry's parameters in order; their ``op_name`` is the argument that each is."""
        found = [each for each in self.entry.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.rest.partition(")")[0]))


def split(text: str) -> list[str]:
    """Return what stands between the commas that are outside all brackets and quotes, stripped."""
    parts, depth, start, quoted = [], 0, 0, False
    for at, letter in enumerate(text):
        if letter == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis that opens at ``opening`` is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise expected("program", "balanced parentheses", repr(text[opening : opening + 60]))


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    text = line[found.end() :]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    opcode, closing = text[end:opening].strip(), _closing(text, opening)
    if opcode in ("parameter", "constant"):
        operands: tuple[str, ...] = ()
        rest = text[opening + 1 :]
    else:
        operands, rest = tuple(_NAME.findall(text[opening:closing])), text[closing + 1 :]
    return Instruction(found[2], text[:end], opcode, operands, rest, bool(found[1]))


def parse(text: str) -> Program:
    """Return the program that ``compiled.as_text()`` tells of.

    Raises:
        UsageError: it is no such text.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    for line in _whole_lines(text):
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = Computation(header[2], {})
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (each := _instruction(line)) is not None:
            current.instructions[each.name] = each
    if entry is None:
        raise expected("program", "the text of a compiled program, with an ENTRY", repr(text[:40]))
    partitions = re.search(r"num_partitions=(\d+)", text)
    replicas = re.search(r"replica_count=(\d+)", text)
    devices = int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)
    return Program(computations, entry, devices)


def _whole_lines(text: str) -> Iterator[str]:
    """Yield the lines of a program, with what a kernel says of itself, which is several, on the line of its call."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


# ------------------------------------------------------------------------------------ where from

Made = Any
"""Which arguments a value is made of: a number whose bit i is argument i, or a tuple of such for a tuple."""

Visit = Callable[[Instruction, Computation, Sequence[Made], int], None]
"""What is called with each instruction, the computation it stands in, what its operands are made of, and how often it
runs."""


def union(made: Made) -> int:
    """Return all arguments of a value, as one number."""
    if isinstance(made, int):
        return made
    return functools.reduce(lambda left, part: left | union(part), made, 0)


def _merged(left: Made, right: Made) -> Made:
    if isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right):
        return tuple(map(_merged, left, right))
    return left if left == right else union(left) | union(right)


def trace(program: Program, visit: Visit, mark: Callable[[Instruction], int] = lambda each: 0) -> None:
    """Follow every value from the entry's parameters on, and call ``visit`` with every instruction on the way.

    Args:
        program: what to follow.
        visit: called once for each way in which an instruction is reached: a computation that is called with values made
            of different arguments is gone through again. ``times`` is how often it runs in one run of the program: the
            product of the trip counts around it.
        mark: bits beyond the arguments' that an instruction adds to what its result is made of.
    """
    done: dict[tuple[str, tuple[Made, ...], int], Made] = {}

    def called(name: str, arguments: tuple[Made, ...], times: int) -> Made:
        key = (name, arguments, times)
        if key not in done:
            done[key] = run(program.computations[name], arguments, times)
        return done[key]

    def run(computation: Computation, arguments: tuple[Made, ...], times: int) -> Made:
        made: dict[str, Made] = {}
        result: Made = 0
        for each in computation.instructions.values():
            operands = [made[name] for name in each.operands if name in made]
            made[each.name] = value(each, computation, arguments, operands, times)
            visit(each, computation, operands, times)
            result = made[each.name] if each.root else result
        return result

    def value(
        each: Instruction, computation: Computation, arguments: tuple[Made, ...], operands: list[Made], times: int
    ) -> Made:
        opcode = each.opcode
        if opcode == "parameter":
            number = int(each.rest.partition(")")[0])
            return arguments[number] if number < len(arguments) else 0
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element" and operands:
            index = int(each.attribute("index") or 0)
            whole = operands[0]
            return whole[index] if isinstance(whole, tuple) and index < len(whole) else union(whole)
        if opcode == "while":
            trips = times * _trip_count(each, program)
            state = operands[0]
            while True:
                called(each.called["condition"][0], (state,), trips)
                after = _merged(state, called(each.called["body"][0], (state,), trips))
                if after == state:
                    return state
                state = after
        if opcode == "conditional":
            names = [
                name
                for key in ("branch_computations", "true_computation", "false_computation")
                for name in each.called.get(key, ())
            ]
            branches = zip(names, operands[1:], strict=True)
            return functools.reduce(_merged, [called(name, (argument,), times) for name, argument in branches])
        if opcode in ("fusion", "call", "async-start") or (opcode == "custom-call" and "calls" in each.called):
            name = (each.called.get("calls") or each.called["to_apply"])[0]
            result = called(name, tuple(operands), times)
            return (tuple(operands), result, 0) if opcode == "async-start" else result
        if opcode in ("async-update", "optimization-barrier", "copy", "bitcast") and len(operands) == 1:
            return operands[0]
        if opcode == "async-done":
            whole = operands[0]
            return whole[1] if isinstance(whole, tuple) else whole
        return union(tuple(operands)) | mark(each)

    entry = tuple(1 << number for number in range(len(program.parameters())))
    run(program.entry, entry, 1)


def _trip_count(loop: Instruction, program: Program) -> int:
    """Return how often a loop runs: what XLA says of it, or the constant that its condition compares with; else 1."""
    if found := _TRIPS.search(loop.rest):
        return int(found[1])
    constants = [int(number) for number in _bounds(program.computations[loop.called["condition"][0]], program)]
    return max(constants, default=1) or 1


def _bounds(condition: Computation, program: Program) -> Iterator[str]:
    for each in condition.instructions.values():
        if each.opcode == "constant" and (found := re.match(r"(\d+)\)", each.rest)):
            yield found[1]
        for names in each.called.values():
            for name in names:
                yield from _bounds(program.computations[name], program)
