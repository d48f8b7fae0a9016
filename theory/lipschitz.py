"""Functions with a known Lipschitz constant, and how far a prompted transformer is from them."""

from __future__ import annotations

import math

import numpy as np

from ntk_prefix.prompting import Construction, Function, apply


def functions(random: np.random.Generator, d: int, length: int) -> dict[str, Function]:
    """Return functions [B, L, d] -> [B, L, d] into [-1, 1] whose Lipschitz constant in the max-norm is 1.

    ``cones`` are distances to eight random sequences, ``waves`` sin(w.X + phase) / |w|_1, with other sequences and waves
    for every answer; ``shift`` answers with the next token, which a row cannot know without its context.
    """
    apex = random.uniform(size=(8, length, d, length, d))
    wave, phase = random.normal(size=(length, d, length, d)), random.uniform(0, 2 * math.pi, size=(length, d))
    wave *= 4 / np.abs(wave).sum((2, 3), keepdims=True)

    def cones(x: np.ndarray) -> np.ndarray:
        # one apex at a time: [B, 8, L, d, L, d] would not fit
        return np.min([np.abs(x[:, None, None] - one[None]).max((3, 4)) for one in apex], axis=0)

    return {
        "cones": cones,
        "waves": lambda x: np.sin(np.einsum("bjk,iqjk->biq", x, wave) + phase) / 4,
        "shift": lambda x: np.roll(x, -1, axis=1),
    }


def tents(random: np.random.Generator, d: int, length: int, side: int) -> Function:
    """Return a random sign times a tent on each of side^(dL) cells, height and half-width 1 / (2 side): slope 1."""
    signs = random.choice((-1.0, 1.0), size=(side,) * (d * length) + (length, d))

    def function(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1)
        cell = np.minimum((flat * side).astype(int), side - 1)
        height = 0.5 / side - np.abs(flat - (cell + 0.5) / side).max(1)
        return signs[tuple(cell.T)] * height[:, None, None]

    return function


def largest_error(
    construction: Construction,
    function: Function,
    prompt: np.ndarray,
    random: np.random.Generator,
    points: int = 512,
) -> float:
    """Return the largest |out - f| found: uniform inputs, inputs beside the cells' corners, then twice around the worst."""
    d, length, grid = construction.d, construction.length, construction.grid

    def errors(x: np.ndarray) -> np.ndarray:
        return np.abs(apply(construction.transformer, prompt, x) - function(x)).max((1, 2))

    half = points // 2
    corners = random.integers(0, grid + 1, size=(half, length, d)) + random.uniform(-0.1, 0.1, size=(half, length, d))
    inputs = np.concatenate([random.uniform(size=(points - half, length, d)), np.clip(corners / grid, 0, 1)])
    found, best = errors(inputs), 0.0
    for radius in (0.2, 0.04):
        worst = inputs[np.argsort(found)[-32:]].repeat(points // 32, axis=0)
        inputs = np.clip(worst + random.uniform(-radius, radius, size=worst.shape) / grid, 0, 1)
        found, best = errors(inputs), max(best, float(found.max()))
    return max(best, float(found.max()))
