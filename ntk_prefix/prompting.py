"""A softmax transformer of one layer and one head that reads a table out of its prompt: fixed weights, free prompt.

A prompt token is one line of a table: *row i, asked at x_i = c in context number a, answers y*. The weights know a grid
and a bound on the functions, never the function. With cells of side h = 1/G, beta = tau G^2, and X in [0, 1]^(L x d):

    feed-forward 1   m(x) = sum_k max_g (2 x_k c_g - c_g^2), exactly (its slope is the quantizer); x_j moved to place j;
                     the answer of a prompt token moved to slot a
    attention        score(row i, prompt) = beta (2 x_i.c - |c|^2 - m(x_i)) - row_penalty * [of another row]
                     score(row i, inputs) = log(input_share K / L)
    feed-forward 2   out_i = max_a ( slot_a - M dist(x_others, cell a) ), a tree of ReLU maxima

Attention finds the nearest line and brings the context along, in units of the inputs' small share.
Theorem and proof: theory/README.md, section 14.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy

from ntk_prefix.checks import check_positive, expected

__all__ = ["Construction", "Function", "Transformer", "apply"]

Function = Callable[[np.ndarray], np.ndarray]
"""A sequence-to-sequence function, [B, L, d] -> [B, L, d]."""

SCORES = 2**18
"""Attention scores held at a time: 2 MiB in float64, which a cache holds."""


class Transformer(NamedTuple):
    """Every weight; D is the width of the stream, W that of the values.

    Args:
        embed: [d, D], of an input token.
        position: [L, D], added to it.
        hidden, bias, out: [D, H], [H], [H, D]: the feed-forward layer before attention, with a skip connection.
        query, key, value: [D, r], [D, r], [D, W]; scores are not scaled.
        layers: affine maps (weight, bias) of the feed-forward part after it, on [stream, attention], ReLU in between.
    """

    embed: np.ndarray
    position: np.ndarray
    hidden: np.ndarray
    bias: np.ndarray
    out: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]


def apply(weights: Transformer, prompt: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Return answers [B, L, d] to inputs [B, L, d] in [0, 1] under a prompt [L_p, D]: softmax attention over [prompt; inputs].

    In numpy: every grid has shapes of its own, and compiling for them would take longer than all of the arithmetic.
    """

    def feed(stream: np.ndarray) -> np.ndarray:
        return stream + np.maximum(stream @ weights.hidden + weights.bias, 0) @ weights.out

    stream_of_prompt = feed(prompt)
    prompt_key, prompt_value = stream_of_prompt @ weights.key, stream_of_prompt @ weights.value

    def some(x: np.ndarray) -> np.ndarray:
        # one row after the other for the products that all rows share, one sequence after the other among its own rows
        stream = feed((x @ weights.embed + weights.position).reshape(-1, prompt.shape[1]))
        query, key, value = (
            (stream @ part).reshape(*x.shape[:2], -1) for part in (weights.query, weights.key, weights.value)
        )
        own = (query @ key.swapaxes(1, 2)).reshape(len(stream), -1)
        shares = scipy.special.softmax(np.concatenate([query.reshape(len(stream), -1) @ prompt_key.T, own], 1), 1)
        from_prompt, own = np.split(shares, [len(prompt)], 1)
        from_inputs = (own.reshape(*x.shape[:2], -1) @ value).reshape(len(stream), -1)
        state = np.concatenate([stream, from_prompt @ prompt_value + from_inputs], 1)
        for weight, bias in weights.layers[:-1]:
            state = np.maximum(state @ weight + bias, 0)
        weight, bias = weights.layers[-1]
        return (state @ weight + bias).reshape(*x.shape[:2], -1)

    pieces = -(-inputs.shape[0] * inputs.shape[1] * len(prompt) // SCORES)
    return np.concatenate([some(x) for x in np.array_split(inputs, min(pieces, len(inputs)))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Construction:
    """The fixed weights for all functions of a class, and the prompt of each.

    The class: f from [0, 1]^(L x d) to [-size, size]^(L x d) with |f(X) - f(X')|_max <= lipschitz |X - X'|_max.

    Args:
        d: width of tokens and answers.
        length: L, tokens of a sequence.
        grid: G, cells a side.
        contexts: False for weights that do not look at the other tokens (one slot).
        sharpness: tau > 0; a neighboring cell's line weighs e^(-2 tau t) at relative distance t from the border.
        input_share: attention that the inputs get at most, relative to the prompt.
        row_penalty: what lines of other rows lose in score.
        lipschitz, size: of the class.

    Raises:
        ValueError: sizes below 1, or numbers that are not positive.
    """

    d: int
    length: int
    grid: int
    contexts: bool = True
    sharpness: float = 64.0
    input_share: float = 1e-8
    row_penalty: float = 60.0
    lipschitz: float = 1.0
    size: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no table can be made of."""
        for name in ("d", "length", "grid"):
            if getattr(self, name) < 1:
                raise expected(name, "at least 1", getattr(self, name))
        for name in ("sharpness", "input_share", "row_penalty", "size"):
            check_positive(name, getattr(self, name))
        if not self.lipschitz >= 0:
            raise expected("lipschitz", "a number >= 0", self.lipschitz)

    @property
    def slots(self) -> int:
        """K, the cells of the other tokens; 1 without contexts."""
        return self.grid ** (self.d * (self.length - 1)) if self.contexts else 1

    @property
    def tokens(self) -> int:
        """L_p = L G^(dL), the prompt of a function."""
        return self.length * self.grid ** (self.d * self.length)

    @property
    def numbers(self) -> int:
        """What a prompt token is free to say: c, its row, |c|^2, the slot, the answer, and that it is one."""
        return 2 * self.d + self.length + 3

    @property
    def centers(self) -> np.ndarray:
        """Of the cells, along one coordinate."""
        return (np.arange(self.grid) + 0.5) / self.grid

    @property
    def mass(self) -> float:
        """theta^d: what all lines of a slot weigh together is between 1 and this."""
        tau, m = self.sharpness, np.arange(1, 60)
        return float(1 + np.exp(-tau * m * (m - 1)).sum() + np.exp(-tau * m * m).sum()) ** self.d

    @property
    def tail(self) -> float:
        """t(tau): what the softmax may add to half a cell, in cells and per coordinate."""
        tau, m = self.sharpness, np.arange(1, 60)
        near, far = (m[1:] - 0.5) * np.exp(-tau * m[1:] * (m[1:] - 1)), m * np.exp(-tau * m * m)
        return float(1 / (2 * math.e * tau) + near.sum() + far.sum())

    @property
    def stray_share(self) -> float:
        """Largest share of attention that goes to the inputs and to other rows' lines."""
        return self.input_share + (self.length - 1) * self.mass * math.exp(-self.row_penalty)

    @property
    def smallest_input_share(self) -> float:
        """Smallest share of attention that goes to the inputs: the unit in which the context arrives."""
        return self.input_share / (self.input_share + self.mass * (1 + (self.length - 1) * math.exp(-self.row_penalty)))

    @property
    def bound(self) -> float:
        """The theorem: sup |out - f|_max <= lipschitz h (1/2 + d t(tau)) + 2 size stray_share, for the whole class."""
        return self.lipschitz / self.grid * (0.5 + self.d * self.tail) + 2 * self.size * self.stray_share

    # ----------------------------------------------------------------------------------- The prompt

    @functools.cached_property
    def columns(self) -> dict[str, slice]:
        """Where the stream keeps what: of inputs, of prompt tokens, and what the first feed-forward layer writes."""
        d, length = self.d, self.length
        widths = {
            "x": d, "position": length, "input": 1,
            "at": d, "row": length, "square": 1, "slot": 1, "answer": d, "prompt": 1,
            "envelope": 1, "context": length * d, "slots": self.slots * d,
        }  # fmt: skip
        ends = list(itertools.accumulate(widths.values()))
        return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}

    @property
    def width(self) -> int:
        """D of the stream."""
        return self.columns["slots"].stop

    def lines(self, row: np.ndarray, at: np.ndarray, slot: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """Return prompt tokens [n, D] that say: row ``row`` [n] at x = ``at`` [n, d] in context ``slot`` [n] answers [n, d]."""
        prompt, where = np.zeros((len(row), self.width)), self.columns
        prompt[:, where["at"]], prompt[:, where["answer"]] = at, answer
        prompt[:, where["row"]] = np.eye(self.length)[row]
        prompt[:, where["square"]] = (at**2).sum(1, keepdims=True)
        prompt[:, where["slot"]], prompt[:, where["prompt"]] = slot[:, None], 1.0
        return prompt

    def prompt(self, function: Function) -> np.ndarray:
        """Return the table of a function on the grid, [L_p, D]: for every row, one token a cell of [0, 1]^(L x d).

        Args:
            function: [B, L, d] -> [B, L, d]; the theorem is about those of the class.

        Raises:
            ValueError: answers of another shape, or larger than ``size``.
        """
        d, length = self.d, self.length
        axes = np.meshgrid(*[np.arange(self.grid)] * (d * length), indexing="ij")
        cell = np.stack(axes, -1).reshape(-1, length, d)
        answers = np.asarray(function(self.centers[cell]))
        if answers.shape != cell.shape:
            raise expected("function", f"answers {cell.shape}, [B, L, d] as the inputs", answers.shape)
        if not np.abs(answers).max() <= self.size:
            raise expected(
                "function",
                f"|f| <= size = {self.size:g}",
                f"{np.abs(answers).max():.3g}: pass size=, and lipschitz= if it is steeper than 1",
            )
        places = self.grid ** np.arange(d * (length - 1))
        tables = []
        for i in range(length):
            others = np.delete(cell, i, axis=1).reshape(len(cell), -1)
            slot = others @ places if self.contexts else np.zeros(len(cell))
            tables.append(self.lines(np.full(len(cell), i), self.centers[cell[:, i]], slot, answers[:, i]))
        return np.concatenate(tables)

    # ---------------------------------------------------------------------------------- The weights

    @functools.cached_property
    def transformer(self) -> Transformer:
        """The fixed weights."""
        embed, position = np.zeros((self.d, self.width)), np.zeros((self.length, self.width))
        embed[:, self.columns["x"]] = np.eye(self.d)
        position[:, self.columns["position"]] = np.eye(self.length)
        position[:, self.columns["input"]] = 1.0
        # an input is no line of any slot
        position[:, self.columns["slot"]] = -1.0
        return Transformer(embed, position, *self._before(), *self._attention(), self._after())

    def _before(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the feed-forward layer before attention, one unit after the other: what it reads, its bias, what it writes."""
        units: list[tuple[dict[int, float], float, dict[int, float]]] = []
        where, d, h, size = {name: part.start for name, part in self.columns.items()}, self.d, 1 / self.grid, self.size
        first = h / 2
        # m(x): slope 2 c_g in cell g, so 2 h more behind every edge
        units.append(({}, 1.0, {where["envelope"]: -d * first**2}))
        for k in range(d):
            units.append(({where["x"] + k: 1.0}, 0.0, {where["envelope"]: 2 * first}))
            units += [({where["x"] + k: 1.0}, -g * h, {where["envelope"]: 2 * h}) for g in range(1, self.grid)]
        # x_k in place j, where the position is j
        for j, k in itertools.product(range(self.length), range(d)):
            units.append(({where["x"] + k: 1.0, where["position"] + j: 1.0}, -1.0, {where["context"] + j * d + k: 1.0}))
        # (answer + size) [slot = a]: with t = slot - a, relu(y + s + 2st) - relu(y - s + 4st) + 2s relu(t - 1)
        for a, k in itertools.product(range(self.slots), range(d)):
            into, slot, answer = where["slots"] + a * d + k, where["slot"], where["answer"] + k
            units.append(({answer: 1.0, slot: 2 * size}, size - 2 * size * a, {into: 1.0}))
            units.append(({answer: 1.0, slot: 4 * size}, -size - 4 * size * a, {into: -1.0}))
            units.append(({slot: 1.0}, -a - 1.0, {into: 2 * size}))
        hidden, out = np.zeros((self.width, len(units))), np.zeros((len(units), self.width))
        for unit, (reads, _, writes) in enumerate(units):
            hidden[list(reads), unit] = list(reads.values())
            out[unit, list(writes)] = list(writes.values())
        return hidden, np.array([bias for _, bias, _ in units]), out

    def _attention(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return queries and keys on [c, row, |c|^2, prompt, input]; values [slots, context, input]."""
        where, d, beta = self.columns, self.d, self.sharpness * self.grid**2
        widths = (d, self.length, 1, 1, 1)
        at, row, square, prompt, given = (
            slice(end - width, end) for width, end in zip(widths, itertools.accumulate(widths), strict=True)
        )
        query, key = np.zeros((self.width, sum(widths))), np.zeros((self.width, sum(widths)))
        for part, name in ((at, "at"), (row, "row"), (square, "square"), (prompt, "prompt"), (given, "input")):
            key[where[name], part] = np.eye(part.stop - part.start)
        query[where["x"], at] = 2 * beta * np.eye(d)
        query[where["position"], row] = self.row_penalty * np.eye(self.length)
        query[where["input"], square] = -beta
        query[where["input"], prompt] = -self.row_penalty
        query[where["envelope"], prompt] = -beta
        query[where["input"], given] = math.log(self.input_share * self.slots / self.length)
        read = [
            *range(*where["slots"].indices(self.width)),
            *range(*where["context"].indices(self.width)),
            where["input"].start,
        ]
        return query, key, np.eye(self.width)[:, read]

    def _after(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return distances from the cells of the context in units of the inputs' share, then the largest slot."""
        d, length, slots = self.d, self.length, self.slots
        answers, total = slots * d, self.width + slots * d + length * d + 1
        context, share = self.width + answers, total - 1
        # a slot holds a sum over c of weights / K: bring it back
        keep = np.zeros((total, answers))
        keep[self.width : context] = slots * np.eye(answers)
        units, biases, pays = [keep], [np.zeros(answers)], [np.eye(answers)]
        if self.contexts:
            penalty = self.lipschitz / self.smallest_input_share
            places = np.arange(slots)[:, None] // self.grid ** np.arange(d * (length - 1)) % self.grid
            for i, (j, k), g in itertools.product(
                range(length), itertools.product(range(length), range(d)), range(self.grid)
            ):
                if i == j:
                    continue
                for sign in (1.0, -1.0):
                    unit, pay = np.zeros((total, 1)), np.zeros((1, answers))
                    unit[context + j * d + k] = sign * length
                    unit[share] = -sign * self.centers[g] - 0.5 / self.grid
                    # silent for other rows, whose arguments stay below 1
                    unit[self.columns["position"].start + i] = 2.0
                    # the context of row i leaves out row i
                    pay[0] = -penalty * np.repeat(places[:, (j - (j > i)) * d + k] == g, d)
                    units.append(unit)
                    biases.append(np.full(1, -2.0))
                    pays.append(pay)
        layers = [(np.concatenate(units, axis=1), np.concatenate(biases))]
        carried, left = np.concatenate(pays), slots
        while left > 1:
            split, merge = _maxima(left, d)
            layers.append((carried @ split, np.zeros(split.shape[1])))
            carried, left = merge, (left + 1) // 2
        return (*layers, (carried, np.full(d, -self.size)))


def _maxima(count: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return max(a, b) = relu(a - b) + relu(b) - relu(-b) over neighbors of ``count`` d-vectors: before and after the ReLU."""
    half = (count + 1) // 2
    split, merge = np.zeros((count, 3 * half)), np.zeros((3 * half, half))
    for pair in range(half):
        last = min(2 * pair + 1, count - 1)
        split[2 * pair, 3 * pair] += 1.0
        split[last, 3 * pair] -= 1.0
        split[last, 3 * pair + 1], split[last, 3 * pair + 2] = 1.0, -1.0
        merge[3 * pair : 3 * pair + 3, pair] = 1.0, 1.0, -1.0
    return np.kron(split, np.eye(d)), np.kron(merge, np.eye(d))
