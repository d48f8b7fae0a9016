"""From a compiled step to what it holds, computes and sends, and how long that must take at least.

Time is a roofline: each of a chip's three means (matrix units, main memory, links) at the vendor's figure, for as long as its
work takes. If all of it overlaps a step takes the longest of the three, if none does the sum: it lies in between at best,
for no chip reaches its vendor's figures. Assumed is that

    matrix units   do the larger of what the compiler counts and of the model's own count (the compiler counts neither
                   kernels nor the turns of a loop), in bfloat16, also where numbers are float32
    main memory    is read and written as the compiler counts for each fusion, and no cache helps
    links          of a chip send together at their full rate, and collectives go round rings
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from ntk_prefix import peft
from ntk_prefix.models import Llama, Vit
from ntk_prefix.models.attention import AttentionLayer
from train.plan.collectives import Collective, collectives, gathers, role, summary
from train.plan.hlo import Computation, Instruction, Program, parse, trace, union
from train.plan.step import Compiled
from train.plan.topology import Chip

__all__ = ["Estimate", "estimate", "model_flops"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step holds, computes and sends; bytes and operations are those of one chip, times are seconds of a step."""

    memory: dict[str, int]
    """Bytes by kind. What the compiler pads arguments by is negative where the program does not take all of them, such as
    the head of the checkpoint beside a trained one."""
    flops: dict[str, float]
    """Of a whole step: ``compiled``, and ``model``, this chip's share of the model's own count."""
    bytes_accessed: float
    collectives: list[Collective]
    gathers: dict[str, float]
    """How often each weight is gathered in one part of a step."""
    kernels: int
    """Calls of Mosaic kernels in the program's text."""
    largest_square: int
    """Bytes of the largest buffer of T x T, such as attention's scores; 0 if there is none."""
    seconds: dict[str, float]
    """``compute``, ``memory``, ``links``; ``least`` if all overlap, ``most`` if nothing does."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for files."""
        return {
            "memory": self.memory,
            "flops": self.flops,
            "bytes_accessed": self.bytes_accessed,
            "collectives": summary(self.collectives),
            "largest_collectives": [
                each.as_dict() for each in sorted(self.collectives, key=lambda each: -each.bytes)[:40]
            ],
            "weights_gathered_at_most": max(self.gathers.values(), default=0.0),
            "kernels": self.kernels,
            "largest_square_bytes": self.largest_square,
            "seconds": self.seconds,
        }


def estimate(
    compiled: Compiled, chip: Chip, *, parts: int, chips: int, model_count: float, length: int, states: frozenset[int]
) -> Estimate:
    """Return what a step costs.

    Args:
        compiled: one part of a step.
        chip: what it runs on.
        parts: of a step (``--accumulate``).
        chips: among which the model's own count is shared.
        model_count: :func:`model_flops` of one part.
        length: tokens of a row.
        states: see :func:`largest_square`.
    """
    program = parse(compiled.text)
    found = collectives(program)
    kept = activations(program)
    memory = compiled.memory
    flops = {"compiled": parts * compiled.flops, "model": parts * model_count / chips}
    seconds = {
        "compute": max(flops.values()) / chip.flops,
        "memory": parts * compiled.bytes_accessed / chip.memory_bandwidth,
        "links": parts * sum(each.moved for each in found) / chip.link_bandwidth,
    }
    known = sum(compiled.arguments.values())
    return Estimate(
        memory={
            **compiled.arguments,
            "padding of arguments": memory["argument"] - known,
            "output": memory["output"] - memory["alias"],
            "activations": min(kept, memory["temp"]),
            "other temporaries": memory["temp"] - min(kept, memory["temp"]),
            "program": memory["code"],
            "total": compiled.total,
        },
        flops=flops,
        bytes_accessed=parts * compiled.bytes_accessed,
        collectives=found,
        gathers=gathers(found, program),
        kernels=len(re.findall(r'custom_call_target="tpu_custom_call"', compiled.text)),
        largest_square=largest_square(program, length, states),
        seconds={**seconds, "least": max(seconds.values()), "most": sum(seconds.values())},
    )


# ------------------------------------------------------------------------------------------ memory


def activations(program: Program) -> int:
    """Return the bytes of main memory that the forward pass leaves to the backward pass, made of the batch.

    JAX calls what it differentiates ``jvp(...)`` and its backward pass ``transpose(jvp(...))``. Each value that an operation
    of the backward pass takes is followed back through copies and tuples to the operation that made it; if that is one
    of the forward pass, the last place on the way that lies in main memory is counted, once.
    """
    arguments = program.parameters()
    batch = sum(1 << i for i, each in enumerate(arguments) if role(each.op_name) == "batch")
    reached: set[str] = set()

    def visit(each: Instruction, computation: Computation, operands: Iterable[Any], times: int) -> None:
        if computation is program.entry and any(union(made) & batch for made in operands):
            reached.add(each.name)

    trace(program, visit)
    kept: dict[tuple[str, int | None], int] = {}
    for each in program.entry.instructions.values():
        if _backward(each) and each.opcode not in _RENAMES:
            for name in each.operands:
                for way in _ways(program.entry.instructions, name, None):
                    maker = program.entry.instructions[way[-1][0]]
                    place = next(((n, e, size) for n, e, size in way if size), None)
                    if place and maker.name in reached and _forward(maker):
                        kept[place[:2]] = place[2]
    return sum(kept.values())


_RENAMES = ("get-tuple-element", "bitcast", "tuple", "copy-start", "copy-done", "copy", "optimization-barrier")


def _ways(entry: dict[str, Instruction], name: str, element: int | None) -> list[list[tuple[str, int | None, int]]]:
    """Return, for each array in a value, the places from where it is taken back to where it was made.

    A place is an instruction, the part of its result, and its bytes of main memory: 0 in a core's own.
    """
    if name not in entry:
        return []
    each = entry[name]
    arrays = each.elements[element] if element is not None and element < len(each.elements) else each.arrays
    here = (name, element, 0 if each.opcode == "tuple" else sum(part.bytes for part in arrays if not part.on_chip))
    if each.opcode == "get-tuple-element":
        return _ways(entry, each.operands[0], int(each.attribute("index") or 0))
    if each.opcode == "tuple":
        chosen = each.operands if element is None else each.operands[element : element + 1]
        return [way for part in chosen for way in _ways(entry, part, None)]
    if each.opcode == "copy-start":
        here = (name, None, sum(part.bytes for part in each.elements[0] if not part.on_chip))
    if each.opcode in _RENAMES and each.operands:
        deeper = _ways(entry, each.operands[0], element if each.opcode == "optimization-barrier" else None)
        # a bitcast is the same memory under another name
        return [way if each.opcode == "bitcast" else [here, *way] for way in deeper]
    return [[here]]


def _forward(each: Instruction) -> bool:
    return "jvp(" in each.op_name and "transpose(" not in each.op_name


def _backward(each: Instruction) -> bool:
    return "transpose(" in each.op_name


def largest_square(program: Program, length: int, states: frozenset[int]) -> int:
    """Return the bytes of the largest buffer with ``length`` entries along two axes, such as attention's scores; 0 for none.

    Not meant are weights and hidden states, which are of that form where a text is as long as the model is wide.

    Args:
        program: a step.
        length: tokens of a row.
        states: entries of what a device has of hidden states, rows x length x features, of the model and of its MLP.
    """
    weights = {tuple(sorted(each.arrays[0].shape)) for each in program.parameters()}
    largest, loops = 0, _loops(program)
    for computation in program.computations.values():
        if computation is not program.entry and computation.name not in loops:
            continue  # inside of a fusion nothing is a buffer
        for each in computation.instructions.values():
            for array in each.arrays:
                square = sum(side == length for side in array.shape) >= 2
                if square and array.size not in states and tuple(sorted(array.shape)) not in weights:
                    largest = max(largest, array.bytes)
    return largest


def _loops(program: Program) -> set[str]:
    return {
        name
        for computation in program.computations.values()
        for each in computation.instructions.values()
        if each.opcode in ("while", "conditional", "call")
        for names in each.called.values()
        for name in names
    }


# ------------------------------------------------------------------------------------------- flops


def model_flops(model: Any, rows: int, length: int, *, remat: bool) -> float:
    """Return a step's operations by the usual count, over all devices: matrix products of the model, no more.

    Of N weights in linear maps and D tokens: 2 N D forward, 2 N D for the gradient of their inputs, and 2 N D for their own,
    which only trained ones have: 4 N D of a frozen model, 6 N D of a trained one. ``remat`` computes the forward pass
    twice. Attention has 4 T^2 N_heads H a row and layer forward, half of it where a token does not see those after it, and
    twice that backward. A tied embedding counts where it makes logits; look-ups, norms and softmax do not count.

    Args:
        model: of shapes.
        rows, length: of the batch; length counts tokens, of images patches and the class token.
        remat: ``--remat`` in full; with a policy that keeps products none is computed twice.
    """
    trained = {id(each) for _, each in nnx.iter_graph(model) if isinstance(each, peft.AdapterParam)}
    tokens, per_token, seen = rows * length, 0.0, 0.0
    passes = 3 if remat else 2
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear) and "head" not in path:
            own = 1 if id(module.kernel) in trained else 0
            per_token += 2 * module.kernel.size * (passes + own)
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, Llama) and backbone.causal_lm and backbone.lm_head is None:
        table = backbone.embeddings.embedding
        per_token += 2 * table.size * (passes + (1 if id(table) in trained else 0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AttentionLayer):
            # keys of a token: all, or half of them on average where it sees those before it, or those of its window
            window = min(module.kind.window or length, length)
            keys = length if backbone.encoder else window * (1 - window / (2 * length))
            seen += keys * module.num_heads * module.head_dim
    attention = 4 * seen * (passes + 1)
    # an adapter's own matrices: both factors of a low rank, trained
    adapters = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, peft.AdapterParam))
        if getattr(path[-2] if len(path) > 1 else None, "key", "") in ("a", "b") and leaf.ndim == 2
    )
    return tokens * (per_token + attention + 2 * adapters * (passes + 1))


def row_length(model: Any, batch: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Return the tokens of a row: of an image its patches and the class token."""
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, Vit):
        return (batch["pixel_values"].shape[1] // backbone.config.patch_size) ** 2 + 1
    return int(batch["input_ids"].shape[1])
