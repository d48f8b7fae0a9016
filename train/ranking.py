r"""The task ``ranking``: the loss of a ranking encoder, and how often it knows the true continuation.

Of a batch with unit vectors p_i of the prefixes and s_j of all candidates, the suffixes of all rows and their negatives,

.. math::  L = - \sum_i \log \frac{e^{p_i \cdot s_i / t}}{\sum_j e^{p_i \cdot s_j / t}} ,

t the temperature; left out of the sum over j is what is not there, and a true suffix that another row of the batch has too. The
candidates are those of the whole batch, whichever device holds them: by shards of one program the compiler gathers them, in
replicas ``all_gather`` does, so that the loss does not depend on the number of devices.

Source: RankGen (arXiv 2205.09726), with cosines; InfoNCE (arXiv 1807.03748).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix import sharding
from ntk_prefix.checks import expected
from ntk_prefix.typing import Array, Float
from train import data
from train.data import Batch, Dataset
from train.ranking_data import KINDS, OTHERS

__all__ = ["by_encoder", "contrastive_loss", "identification", "lead", "ten", "vectors"]

DRAW = 20_26
"""Draws the suffixes of other rows that a true one is to be told from: the same for every run."""


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Return vectors of length 1; of zero, whose direction has no gradient, zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def contrastive_loss(
    model: Callable[..., Any], batch: Mapping[str, Array], temperature: float, axis: str | None = None
) -> Float[Array, ""]:
    """Return the loss above, summed over this device's rows.

    Args:
        model: a :class:`ntk_prefix.models.Ranker`, adapted or not.
        batch: of :func:`train.data.train_batches`: ``input_ids`` and ``attention_mask`` [B, T] of the prefixes,
            ``candidate_ids`` and ``candidate_mask`` [B, C, S], the true one first, ``candidates`` [B, C], 0 for none, and
            ``pair`` [B], equal for rows of equal true suffixes.
        temperature: t.
        axis: of the replicas that share the batch; None for one program.

    Numerics: products of float32.
    """
    rows, each, tokens = batch["candidate_ids"].shape
    prefixes = unit(model(batch["input_ids"], batch["attention_mask"]).logits.astype(jnp.float32))
    # what is not there sees its first token all the same: a row of padding has no mean
    mask = batch["candidate_mask"].at[:, :, 0].set(1)
    candidates = model(batch["candidate_ids"].reshape(-1, tokens), mask.reshape(-1, tokens)).logits
    suffixes = unit(candidates.astype(jnp.float32)).reshape(rows, each, -1)
    there, pair, first = batch["candidates"] > 0, batch["pair"], jnp.zeros((), jnp.int32)
    if axis is not None:
        suffixes, there, pair = jax.lax.all_gather((suffixes, there, pair), axis, tiled=True)
        first = jax.lax.axis_index(axis) * rows
    suffixes, there, pair = (sharding.constrain(whole, None) for whole in (suffixes, there, pair))
    own = jnp.arange(len(pair))[None] == (first + jnp.arange(rows))[:, None]
    again = (pair[None] == batch["pair"][:, None]) & ~own
    said = jnp.einsum("id,jcd->ijc", prefixes, suffixes) / temperature
    seen = there[None] & ~(again[:, :, None] & (jnp.arange(each) == 0)[None, None])
    said = jnp.where(seen, said, -jnp.inf)
    true = jnp.sum(jnp.where(own, said[:, :, 0], 0), axis=1)
    losses = jax.nn.logsumexp(said.reshape(rows, -1), axis=1) - true
    return jnp.sum(losses * batch["weight"])


# -------------------------------------------------------------------------------------------- measured


def ten(split: Dataset) -> dict[str, list[list[tuple[int, int]]]]:
    """Return for each kind of candidate the ones that each row's true suffix is to be told from, and it, first.

    A candidate is (row, place). Of a kind of which a row has fewer than nine, other rows' true suffixes fill them up:
    the kind "random" has nothing else. A text that is the true suffix is none of the others. What no row has is no kind.

    Raises:
        UsageError: a row beside which there is none of another suffix.
    """
    kinds, rows, texts = split["candidates"], split.rows, split["texts"]
    draw = np.random.default_rng(DRAW)
    suffixes = np.array([row[0] for row in texts], object)
    drawn = [draw.permutation(np.delete(np.arange(rows), row)) for row in range(rows)]
    drawn = [some[suffixes[some] != suffixes[row]][:OTHERS] for row, some in enumerate(drawn)]
    if any(not len(some) for some in drawn):
        raise expected("ranking", "at least two rows of different suffixes in a split", f"{rows} of one suffix")
    found = {}
    for number, kind in enumerate(("random", *KINDS[2:]), start=1):
        own = [
            [(row, int(place)) for place in np.flatnonzero(kinds[row] == number) if texts[row][place] != texts[row][0]]
            for row in range(rows)
        ]
        if number == 1:
            own = [[] for _ in range(rows)]
        elif not any(own):
            continue
        found[kind] = [
            [(row, 0), *mine[:OTHERS], *[(int(other), 0) for other in drawn[row][: OTHERS - len(mine[:OTHERS])]]]
            for row, mine in enumerate(own)
        ]
    return found


@dataclasses.dataclass(frozen=True)
class Identification:
    """How a scorer tells true suffixes from others."""

    right: dict[str, np.ndarray]
    """Kind -> [rows], whether the true one has the highest score of all, alone."""
    loss: dict[str, float]
    """Kind -> mean cross entropy of the true one, by scores over the temperature."""

    def summary(self) -> dict[str, Any]:
        """Return for each kind how often it is right, ``identification``, and in which rows, ``right``, a 0 or 1 for each."""
        return {
            "identification": {kind: float(right.mean()) for kind, right in self.right.items()},
            "right": {kind: "".join("01"[each] for each in right.astype(int)) for kind, right in self.right.items()},
        }


def lead(runs: Sequence[Mapping[str, str] | None], other: Mapping[str, str] | None) -> tuple[float, float] | None:
    """Return by how much runs are right more often than another scorer, the mean over kinds, and its standard error.

    The test rows are the sample: all are asked the same of the same rows, so differences are taken row by row, of the mean
    over the runs.

    Args:
        runs, other: ``right`` of :meth:`Identification.summary`; None of one that is not known.

    Returns:
        None where one is not known, or they are not of the same kinds and rows.
    """

    def shares(right: Mapping[str, str]) -> Float[np.ndarray, "rows"]:
        return np.mean([[int(each) for each in right[kind]] for kind in sorted(right)], axis=0)

    known = [run for run in runs if run]
    sizes = [{kind: len(rows) for kind, rows in each.items()} for each in (*known, other or {})]
    if not known or len(known) < len(runs) or not other or any(size != sizes[0] for size in sizes):
        return None
    difference = np.mean([shares(run) for run in known], axis=0) - shares(other)
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def identification(
    split: Dataset, score: Callable[[str, int, list[tuple[int, int]]], np.ndarray], temperature: float = 1.0
) -> Identification:
    """Return how often the true suffix of a row is told from nine others.

    Args:
        split: of the task.
        score: ``score(kind, row, candidates)``, a number for each candidate of :func:`ten` behind the row's prefix.
        temperature: that scores are divided by, for the loss.
    """
    right, loss = {}, {}
    for kind, rows in ten(split).items():
        scores = [np.asarray(score(kind, row, candidates), np.float64) for row, candidates in enumerate(rows)]
        right[kind] = np.array([s[0] > s[1:].max() for s in scores])
        loss[kind] = float(np.mean([np.logaddexp.reduce((s - s[0]) / temperature) for s in scores]))
    return Identification(right, loss)


def vectors(
    encode: Callable[[Batch], np.ndarray],
    texts: list[np.ndarray],
    batch_size: int,
    *,
    cosine: bool = True,
    longest: int | None = None,
) -> Float[np.ndarray, "n D"]:
    """Return the vectors of texts that are tokens already, in their order; like lengths are read together.

    Args:
        encode: from a batch of ``input_ids`` and ``attention_mask`` to vectors [B, D].
        texts: [tokens] each, with their marks.
        batch_size: read at once.
        cosine: make them of length 1.
        longest: as of :class:`~train.data.Dataset`.
    """
    columns = {"input_ids": data.objects(texts), "labels": np.zeros(len(texts), np.int32)}
    split, places = data.by_length(Dataset(columns, longest=longest))
    found = [np.asarray(encode(batch), np.float64) for batch in data.evaluation_batches(split, batch_size)]
    whole = np.concatenate(found)[: len(texts)][places]
    return whole / np.linalg.norm(whole, axis=1, keepdims=True).clip(1e-12) if cosine else whole


def by_encoder(
    encode: Callable[[Batch], np.ndarray], split: Dataset, batch_size: int, temperature: float, *, cosine: bool = True
) -> Identification:
    """Return what an encoder's cosines identify, or its inner products.

    Args:
        encode: see :func:`vectors`.
        split: of the task, with tokens.
        batch_size: read at once.
        temperature: of the loss.
        cosine: whether it is cosines.
    """
    there = [(row, place) for row, place in zip(*np.nonzero(split["candidates"]), strict=True)]
    ids, mask = split["candidate_ids"], split["candidate_mask"]
    suffixes = [ids[each][mask[each] == 1] for each in there]
    whole = vectors(encode, [*split["input_ids"], *suffixes], batch_size, cosine=cosine, longest=split.longest)
    number = {(int(row), int(place)): split.rows + i for i, (row, place) in enumerate(there)}

    def score(_: str, row: int, candidates: list[tuple[int, int]]) -> np.ndarray:
        return whole[[number[each] for each in candidates]] @ whole[row]

    return identification(split, score, temperature)
