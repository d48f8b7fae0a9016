"""RankGen's encoder: which continuation fits a beginning, by the inner product of two vectors of one model.

Beginnings and continuations are marked as what they are, "pre " and "suffi ", and go through the same encoder; the pooled
state goes through a square linear map without bias. The authors' checkpoints are T5 v1.1 encoders that pool the first token.

Source: RankGen (arXiv 2205.09726) and its public code.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ntk_prefix.artifacts import json_text, read_json, write_whole
from ntk_prefix.checks import check_count, expected
from ntk_prefix.models.backbone import Backbone, Pooling
from ntk_prefix.models.bert import Bert
from ntk_prefix.models.classifier import Classifier
from ntk_prefix.models.formats import read_checkpoint
from ntk_prefix.models.llama import Llama
from ntk_prefix.models.loading import from_pretrained
from ntk_prefix.models.placing import Slot, Target, placed
from ntk_prefix.models.preprocessing import load_tokenizer
from ntk_prefix.typing import Array, Float, Int

__all__ = ["Ranker", "load_ranker", "marked_ids", "save_settings"]

Role = Literal["prefix", "suffix"]

MARKS: dict[Role, str] = {"prefix": "pre ", "suffix": "suffi "}
"""What stands before a text of each role."""

LENGTHS: dict[Role, int] = {"prefix": 512, "suffix": 128}
"""Tokens of each, mark included, at most."""

CPU_TOKENS = 1024
"""Read at once on a CPU, at most: what they leave between two maps stays in the cache. Of MiniLM's tokens, in ms of an AMD
EPYC's processor at 256 a row: 0.28 each for 256 to 1,024 at once, 0.35 for 2,048, 0.40 for 5,120."""

CPU_BATCHES = 2
"""Read side by side on a CPU, by a thread each: one batch leaves a core idle a quarter of the time, between its products."""

SETTINGS = "ranker.json"
"""In the folder of an adapter: how the ranker that it was trained on makes scores."""


class _Settings(msgspec.Struct):
    pooling: Pooling
    cosine: bool


class Projection(nnx.Linear):
    """W, without a bias also where an adapter trains a copy of it: a constant in all vectors is no word on any."""

    without_bias: ClassVar[bool] = True


class Ranker(Classifier):
    """An encoder of beginnings and continuations: ``score = W h(prefix) . W h(suffix)``.

    It is a :class:`Classifier` whose head, W, is square and whose logits are the vector, so it is adapted and trained as one.

    Args:
        backbone: an encoder of text.
        pooling: as in :class:`Classifier`; the authors' is "cls".
        tokenizer: of the backbone, for texts; token ids go without one.
        lengths: tokens of a prefix and of a suffix, mark included, at most; no more are read than the encoder has positions,
            of a longer prefix the last ones, of a longer suffix the first.
        cosine: give texts vectors of length 1, so that a score is the cosine.
        rngs: as in :class:`Classifier`; W starts as the identity, whatever they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        pooling: Pooling = "mean",
        tokenizer: Any = None,
        lengths: tuple[int, int] = (LENGTHS["prefix"], LENGTHS["suffix"]),
        cosine: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        size, rngs = backbone.config.hidden_size, nnx.Rngs(0) if rngs is None else rngs
        super().__init__(backbone, size, pooling=pooling, rngs=rngs)
        if self.head.kernel.shape != (size, size):
            raise expected("pooling", "one that makes a single state", repr(pooling))
        self.head = Projection(size, size, use_bias=False, rngs=rngs)
        self.head.kernel[...] = jnp.eye(size, dtype=jnp.float32)
        if len(lengths) != 2:
            raise expected("lengths", "that of a prefix and that of a suffix", lengths)
        for length in lengths:
            check_count("lengths", length, 4)
        self.tokenizer = nnx.static(tokenizer)
        self.lengths = nnx.static(lengths)
        self.cosine = cosine

    def encode_prefixes(self, texts: Sequence[str], **options: Any) -> Float[np.ndarray, "n D"]:
        """Return the vectors of beginnings; options are those of :meth:`encode_texts`."""
        return self.encode_texts(texts, "prefix", **options)

    def encode_suffixes(self, texts: Sequence[str], **options: Any) -> Float[np.ndarray, "n D"]:
        """Return the vectors of continuations; options are those of :meth:`encode_texts`."""
        return self.encode_texts(texts, "suffix", **options)

    def score(self, prefixes: Sequence[str], suffixes: Sequence[str], **options: Any) -> Float[np.ndarray, "n"]:
        """Return the score of each pair; a single prefix is that of all suffixes.

        Args:
            prefixes, suffixes: texts, n each, or one prefix.
            options: of :meth:`encode_texts`.

        Raises:
            UsageError: as many prefixes as suffixes, or one, are not there.
        """
        for name, texts in (("prefixes", prefixes), ("suffixes", suffixes)):
            _check_texts(name, texts)
        if len(prefixes) not in (1, len(suffixes)):
            raise expected("prefixes", f"one, or as many as suffixes ({len(suffixes)})", len(prefixes))
        return np.sum(self.encode_prefixes(prefixes, **options) * self.encode_suffixes(suffixes, **options), axis=1)

    def encode_texts(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        batch_size: int = 32,
        progress: Callable[[int, int], Any] = lambda *_: None,
    ) -> Float[np.ndarray, "n D"]:
        """Return the vectors of texts, in their order.

        Texts of like length are read together, padded to the next of a few lengths: a program for each of these.

        Args:
            texts: without marks.
            role: what they are.
            batch_size: read at once, at most; a CPU reads ``CPU_TOKENS``.
            progress: told how many are done, and of how many.

        Raises:
            UsageError: no tokenizer, nothing to read, or what is no text; an empty text is one.
        """
        check_count("batch_size", batch_size)
        _check_texts("texts", texts)
        ids = [self._ids(text, role) for text in texts]
        if not ids:
            raise expected("texts", "at least one", "none")
        found = np.zeros((len(ids), self.config.hidden_size), np.float32)
        graph, state = nnx.split(self)
        on_cpu = jax.default_backend() == "cpu"

        def read(rows: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> int:
            found[rows] = np.asarray(_vectors(graph, state, jnp.asarray(tokens), jnp.asarray(mask)))[: len(rows)]
            return len(rows)

        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(ids))

        with ThreadPoolExecutor(CPU_BATCHES) as pool:
            begun: deque[Future[int]] = deque()
            compiled: set[tuple[int, ...]] = set()
            for batch in self._batches(ids, role, batch_size, CPU_TOKENS if on_cpu else None):
                shape = batch[1].shape
                if on_cpu and shape in compiled:
                    begun.append(pool.submit(read, *batch))
                    if len(begun) > CPU_BATCHES:
                        add(begun.popleft().result())
                else:  # a shape's first batch compiles: once, not once for each thread
                    compiled.add(shape)
                    add(read(*batch))
            for each in begun:
                add(each.result())
        if not self.cosine:
            return found
        # in float64, which no square of a float32 overflows, nor is it rounded to zero
        length = np.sqrt(np.einsum("nd,nd->n", found, found, dtype=np.float64))[:, None]
        return (found / np.where(length > 0, length, 1)).astype(np.float32)

    def _batches(
        self, ids: list[list[int]], role: Role, batch_size: int, tokens_at_once: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the places of some texts, their tokens and their mask, the longest first."""
        order = np.argsort([-len(each) for each in ids], kind="stable")
        start = 0
        while start < len(ids):
            # the longest is the first
            width = _round_up(len(ids[order[start]]), self._most(role))
            count = min(batch_size, len(ids))
            if tokens_at_once is not None:
                count = min(count, max(tokens_at_once // width, 1))
            rows = order[start : start + count]
            tokens = np.zeros((count, width), np.int32)
            mask = np.zeros_like(tokens)
            mask[:, 0] = 1  # rows that fill the batch up see something too
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            yield rows, tokens, mask
            start += len(rows)

    def _ids(self, text: str, role: Role) -> list[int]:
        if self.tokenizer is None:
            raise expected(
                "tokenizer", "the backbone's, for texts", "None", "load_ranker brings that of a model's folder"
            )
        if not isinstance(text, str):
            raise expected("texts", "texts", repr(text)[:60])
        return marked_ids(self.tokenizer, text, role, self._most(role))

    def _most(self, role: Role) -> int:
        """Return how many tokens are read; an adapter may have taken some of the encoder's positions."""
        asked, encoder = self.lengths[role == "suffix"], self.backbone
        return min(asked, encoder.config.max_tokens - encoder.position_offset) if isinstance(encoder, Bert) else asked


def _check_texts(name: str, texts: object) -> None:
    # a text is a sequence of texts too, of its letters
    if isinstance(texts, str):
        raise expected(name, "a list of texts", f"the text {texts[:60]!r}", "Put it in a list")


def marked_ids(tokenizer: Any, text: str, role: Role, most: int) -> list[int]:
    """Return the tokens of a text, marked as what it is: of a long prefix the last ones, of a suffix the first.

    Args:
        tokenizer: without truncation and padding.
        text: without its mark; white space is a blank.
        role: what it is.
        most: tokens, mark included, at most.

    Raises:
        UsageError: there is no room for the last character of a prefix, or a text is not of Unicode's characters.
    """
    mark, text = MARKS[role], " ".join(text.split())
    try:
        encoded = tokenizer.encode(mark + text)
    except TypeError:  # what tokenizers says of half a surrogate pair, which JSON can hold
        raise expected("texts", "characters of Unicode", ascii(text)[:60]) from None
    if role == "suffix":
        encoded.truncate(most)
        return list(encoded.ids)
    while len(encoded.ids) > most:
        # cut where the first token that stays begins, of the text; what stands at the ends is added anew
        begins = [max(start - len(mark), 0) for start, end in encoded.offsets if end > max(start, len(mark))]
        gone = begins[: len(encoded.ids) - most]
        # a character of several tokens stays or goes with all of them
        begin = next((each for each in begins[len(gone) :] if each > gone[-1]), None)
        if begin is None:
            raise expected("lengths", "room for the mark and a character of the text", most)
        text = text[begin:].lstrip()
        encoded = tokenizer.encode(mark + text)
    return list(encoded.ids)


@functools.partial(jax.jit, static_argnums=0)
def _vectors(graph: Any, state: Any, tokens: Int[Array, "B T"], mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    return nnx.merge(graph, state)(tokens, mask).logits


def _round_up(length: int, most: int) -> int:
    """Return the next power of two or half between two of them, at most the longest there is."""
    sizes: Iterable[int] = (s for power in itertools.count(3) for s in (2**power, 3 * 2 ** (power - 1)))
    return min(next(size for size in sizes if size >= length), max(most, length))


def load_ranker(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    pooling: Pooling | None = None,
    cosine: bool | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | Literal["file"] | None = None,
    mesh: Mesh | None = None,
    lengths: tuple[int, int] = (LENGTHS["prefix"], LENGTHS["suffix"]),
    progress: Callable[[int, int], None] | None = None,
) -> Ranker:
    """Load an encoder as a ranker, with its tokenizer: RankGen's own checkpoints, or any encoder of text.

    Args:
        path: see :func:`~ntk_prefix.models.from_pretrained`. A file in the authors' layout (``t5_encoder.*`` and
            ``projection.weight``) brings its W; another starts with the identity, so that a score is the inner product of
            pooled states.
        adapter: folder of an adapter that was trained on it, with a W of its own or without.
        pooling: None is what the adapter was trained with; without, "cls" for the authors' layout and else the family's own.
        cosine: see :class:`Ranker`; None is what the adapter was trained with, and without one False.
        dtype, param_dtype, mesh, progress: see :func:`~ntk_prefix.models.from_pretrained`.
        lengths: see :class:`Ranker`.

    Raises:
        UsageError: a model that is no encoder of text, a projection of another shape, an adapter of another model.
    """
    from ntk_prefix import peft

    trained: _Settings | None = None
    if adapter is not None and (Path(adapter) / SETTINGS).is_file():
        trained = read_json(Path(adapter) / SETTINGS, _Settings)
    model = from_pretrained(path, dtype=dtype, param_dtype=param_dtype, mesh=mesh, progress=progress)
    if not isinstance(model, Backbone) or isinstance(model, Llama) or model.input_names[0] != "input_ids":
        raise expected(f"{path}", "an encoder of text", type(model).__name__)
    projection = read_checkpoint(path).tensors.get("projection.weight")
    own: Pooling = trained.pooling if trained else "cls" if projection is not None else model.pooling
    normed = cosine if cosine is not None else bool(trained and trained.cosine)
    ranker = Ranker(model, pooling=pooling or own, tokenizer=load_tokenizer(path), lengths=lengths, cosine=normed)
    if ranker.tokenizer is not None:
        ranker.tokenizer.no_padding()
        ranker.tokenizer.no_truncation()
    if projection is not None:
        size = model.config.hidden_size
        if projection.shape != (size, size):
            raise expected(f"{path}: projection.weight", f"shape {(size, size)}", projection.shape)
        slot = Slot("head.kernel", ranker.head.kernel, True)
        slot.variable.set_value(placed(slot, projection, Target(np.dtype(np.float32), None, lambda done, total: None)))
    return ranker if adapter is None else peft.load_adapter(ranker, adapter)


def save_settings(ranker: Ranker, folder: str | Path) -> None:
    """Write beside an adapter how its ranker makes scores, for :func:`load_ranker`."""
    settings = {"pooling": ranker.pooling, "cosine": ranker.cosine}
    write_whole(Path(folder) / SETTINGS, json_text(settings).encode())
