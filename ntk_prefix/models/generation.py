"""Generation with a key-value cache, greedy or drawn: a whole batch in one compiled program.

On a CPU the maps of a token are bound by how fast weights come from memory, if they are used as they lie. XLA's products
there copy a matrix ``[in, out]`` into another layout before a few rows are multiplied with it, each time, and widen
bfloat16 on the way: with 8 rows that is 3 times the time of reading the matrix. So for the length of a call

    with several rows, linear maps hold their matrices as ``[out, in]``, and those are the *left* factor of a product, whose
    copies are small (:class:`_Rows`);
    a model that computes in bfloat16 or float16, which CPUs widen at every step, computes in float32, with its weights
    rounded to that dtype once: the same model, fewer roundings.

Either is memory for one more copy of the linear maps' weights, in float32.

On a GPU it is the single row that is slow: XLA's product of a vector and a matrix is not that of its libraries. So a
prompt of its own is decoded as two (an H200, 1.2 B weights in bfloat16: 1.02 ms per token and not 1.46).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.checks import UsageError, check_count, expected
from ntk_prefix.models.backbone import check_tokens
from ntk_prefix.models.llama import Llama
from ntk_prefix.models.rotary import warn_beyond
from ntk_prefix.models.sampling import Sampling
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Bool, Float, Int, KeyArray, KeyArrays

__all__ = ["generate"]


def generate(
    model: Llama,
    input_ids: Int[Array, "B T"],
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
    max_new_tokens: int = 32,
    *,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
    sampling: Sampling | None = None,
    key: KeyArray | None = None,
    samples: int | None = None,
) -> Int[Array, "B *samples new"]:
    """Continue prompts, with a key-value cache, in one compiled program per shape: greedily, or drawing each token.

    Args:
        model: made with ``causal_lm``.
        input_ids: [B, T] prompts, padded on either side: a row's tokens are moved to the right, in their order.
        attention_mask: [B, T], zero at padding; no padding if None.
        max_new_tokens: length of the result.
        eos_token_id: a row ends with this token, or one of these; the loop ends when all rows have.
        pad_token_id: what follows the end of a row; the (first) end token if None.
        sampling: how tokens are drawn; None takes the likeliest. Its numbers may change without a new program.
        key: of the draws; what a row draws depends on it and on the row's place, not on the other rows.
        samples: of each prompt; None is one.

    Returns:
        [B, max_new_tokens], the new tokens only, of the dtype of ``input_ids``; [B, samples, max_new_tokens] if samples are
        asked for.

    Raises:
        UsageError: ids that the model has not or in whose dtype there is no room for all it has, no prompt or an empty one,
            no token to be made, an end token that the model has not, a model without logits, or a key or samples without a
            sampling.
    """
    if not isinstance(model, Llama) or not model.causal_lm:
        came = type(model).__name__ if not isinstance(model, Llama) else "a bare one"
        raise UsageError(f'expected a model made with causal_lm=True, got {came}: task="causal-lm" makes it')
    check_count("max_new_tokens", max_new_tokens)
    config = model.config
    vocabulary = config.vocab_size
    check_tokens(input_ids, attention_mask, vocabulary)
    if input_ids.shape[1] + max_new_tokens >= 2**31:
        raise expected("max_new_tokens", "less than 2147483648 tokens with the prompt's", max_new_tokens)
    if jnp.iinfo(input_ids.dtype).max < vocabulary - 1:
        hint = "Use input_ids.astype(jnp.int32)"
        raise expected("input_ids", f"a dtype that holds all {vocabulary} tokens", input_ids.dtype, hint)
    if sampling is None and (key is not None or samples is not None):
        raise expected("sampling", "a Sampling, which a key or samples are for", "None", "Use sampling=Sampling()")
    if sampling is not None:
        if not isinstance(sampling, Sampling):
            raise expected("sampling", "a Sampling", type(sampling).__name__)
        sampling.check()
        if not _is_key(key):
            shape = getattr(key, "shape", None)
            came = repr(key) if shape is None else f"shape {list(shape)}"
            raise expected("key", "a key beside a sampling", came, "Use key=jax.random.key(0)")
    if samples is not None:
        check_count("samples", samples)
    if attention_mask is None:
        attention_mask = jnp.ones(input_ids.shape, bool)
    elif not isinstance(attention_mask, jax.core.Tracer) and not np.asarray(attention_mask).any(axis=1).all():
        raise expected("attention_mask", "at least one token a row", "a row of padding")
    trained, rope = config.max_position_embeddings, config.rope
    warn_beyond(trained, input_ids.shape[1], attention_mask, more=max_new_tokens, rope=rope)
    ends = () if eos_token_id is None else tuple(np.atleast_1d(np.asarray(eos_token_id)).tolist())
    if any(not _is_whole(end) or not 0 <= end < vocabulary for end in ends):
        wanted = f"tokens from 0 to {vocabulary - 1}, the model's vocabulary"
        raise expected("eos_token_id", wanted, eos_token_id, "Use None for rows that do not end")
    padding = (*ends, 0)[0] if pad_token_id is None else np.asarray(pad_token_id).tolist()
    room = jnp.iinfo(input_ids.dtype)
    if not _is_whole(padding) or not room.min <= padding <= room.max:
        raise expected("pad_token_id", f"a whole number that {input_ids.dtype} holds", repr(padding))
    graph, state = nnx.split(model)
    special = (jnp.asarray(ends, input_ids.dtype), jnp.asarray(padding, input_ids.dtype))
    prompts, each = input_ids.shape[0], samples or 1
    for check in _methods(model, "check_rows"):
        check(prompts)
    platform, rows = _platform(model), prompts * each
    if platform == "gpu" and rows == 1:
        input_ids, attention_mask = (jnp.repeat(jnp.asarray(x), 2, axis=0) for x in (input_ids, attention_mask))
    drawn = None
    if sampling is not None and key is not None:
        drawn = sampling, jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(input_ids.shape[0] * each))
    tokens = _generate(
        graph, max_new_tokens, platform == "cpu", state, input_ids, attention_mask.astype(bool), *special, drawn
    )[:rows]
    return tokens if samples is None else tokens.reshape(prompts, samples, max_new_tokens)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _is_key(key: Any) -> bool:
    """Whether it is one key, typed or raw."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    return key.ndim == (0 if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)


def _methods(model: Llama, name: str) -> list[Any]:
    """Return the methods of this name that the model's adapters have."""
    found = (getattr(module, name, None) for _, module in nnx.iter_modules(model))
    return [method for method in found if method is not None]


def _platform(model: Llama) -> str:
    """Return where a model lies; under jit an array lies nowhere yet."""
    table = model.embeddings.embedding[...]
    return jax.default_backend() if isinstance(table, jax.core.Tracer) else next(iter(table.devices())).platform


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graph: nnx.GraphDef[Llama],
    new: int,
    on_cpu: bool,
    state: nnx.State,
    prompts: Array,
    mask: Array,
    ends: Array,
    padding: Array,
    drawn: tuple[Sampling, KeyArrays] | None,
) -> Array:
    model = nnx.merge(graph, state)
    for settle in _methods(model, "settle"):
        settle()
    # a single prompt may have been made two
    for repeat in _methods(model, "repeat_rows"):
        repeat(len(prompts))
    # as many rows as there are keys, of each prompt alike
    batch, length = len(prompts) if drawn is None else len(drawn[1]), prompts.shape[1]
    each = batch // len(prompts)
    if on_cpu and model.dtype.itemsize < 4:
        _widen(model)
    if on_cpu and batch > 1:
        _use_rows(model)
    # the last slot of a row is its last token, which the next one follows: padding goes to the left
    order = jnp.argsort(mask, axis=1, stable=True)
    prompts, mask = (jnp.take_along_axis(x, order, axis=1) for x in (prompts, mask))
    seen = _seen(prompts, mask, model.config.vocab_size) if drawn and drawn[0].repetition_penalty is not None else None
    mask = jnp.concatenate([mask, jnp.ones((len(prompts), new), bool)], axis=1)

    def repeated(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), tree) if each > 1 else tree

    def chosen(hidden: Array, step: Array | int, seen: Array | None) -> Array:
        logits = model.logits(hidden)[:, 0]
        if drawn is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            sampling, keys = drawn
            token = sampling.draw(jax.vmap(jax.random.fold_in, (0, None))(keys, step), logits, seen)
        return token.astype(prompts.dtype)

    def added(seen: Array | None, token: Array) -> Array | None:
        return None if seen is None else seen.at[jnp.arange(batch), token].set(True)

    def ended(token: Array) -> Array:
        return jnp.isin(token, ends)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, finished, *_ = carry
        return (step < new) & ~finished.all()

    def extend(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, last, finished, cache, seen = carry
        hidden, cache = model.hidden(last[:, None], mask, cache, length + step - 1)
        token = chosen(hidden, step, seen)
        token = jnp.where(finished, padding, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, tokens, token, finished | ended(token), cache, added(seen, token)

    # a prompt is read once, whatever is drawn behind it
    hidden, cache = model.hidden(prompts, mask, model.empty_cache(len(prompts), length + new), 0)
    hidden, cache, mask, seen = repeated((hidden[:, -1:], cache, mask, seen))
    for repeat in _methods(model, "repeat_rows"):
        repeat(batch)
    first = chosen(hidden, 0, seen)
    tokens = jnp.full((batch, new), padding, prompts.dtype).at[:, 0].set(first)
    start = (jnp.int32(1), tokens, first, ended(first), cache, added(seen, first))
    return jax.lax.while_loop(unfinished, extend, start)[1]


def _seen(prompts: Array, mask: Array, vocabulary: int) -> Bool[Array, "B V"]:
    """Return which tokens each row has; padding is none of them."""
    nothing = jnp.zeros((len(prompts), vocabulary), jnp.int32)
    return nothing.at[jnp.arange(len(prompts))[:, None], prompts].max(mask.astype(jnp.int32)) > 0


# ------------------------------------------------------------------------------ products on a CPU


class _Rows(nnx.Module):
    """A linear map whose matrix lies as ``[out, in]``.

    Args:
        matrix: [out, in], in the dtype of the inputs, which is that of the outputs.
        bias: [out] or None.
    """

    def __init__(self, matrix: Array, bias: Array | None):
        self.matrix = nnx.Param(_once(matrix))
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Return ``x W^T + b``."""
        matrix = self.matrix[...]
        rows = x.reshape(-1, x.shape[-1]).astype(matrix.dtype)
        contract = (((1,), (1,)), ((), ()))
        if rows.shape[0] <= FEW_ROWS:
            # the barrier: else XLA turns the transposed product back into one with the matrix on the right
            product = jax.lax.optimization_barrier(jax.lax.dot_general(matrix, rows, contract)).T
        else:
            product = jax.lax.dot_general(rows, matrix, contract)
        if self.bias is not None:
            product = product + self.bias[...].astype(product.dtype)[None]
        return product.reshape(*x.shape[:-1], -1)


FEW_ROWS = 96
"""Up to here a matrix is worth more on the left of a product. Measured on all products of ten layers and the logits of a model
of 135 M weights, 2 cores, medians of 7 in turns: 8 rows 21 ms on the left and 33 on the right, 36 rows 44 and 55, 96 rows 117
and 118, 256 rows 407 and 339."""


def _use_rows(model: Any) -> None:
    """Put :class:`_Rows` in the place of the model's linear maps, and of its logits' table."""
    for _, module in nnx.iter_modules(model):
        for name, linear in list(vars(module).items()):
            if type(linear) is nnx.Linear:
                bias = None if linear.bias is None else linear.bias[...]
                setattr(module, name, _Rows(linear.kernel[...].astype(model.dtype).T, bias))
    if model.lm_head is None:
        model.lm_head = nnx.data(_Rows(model.embeddings.embedding[...].astype(model.dtype), None))


def _widen(model: Any) -> None:
    """Let a model compute in float32, with its linear maps' and tables' weights rounded to what it computed in."""
    narrow, wide = model.dtype, accumulation_dtype(model.dtype)
    module: Any
    for _, module in nnx.iter_modules(model):
        computes_narrow = getattr(module, "dtype", None) == narrow
        if computes_narrow:
            module.dtype = wide
        # a table has no dtype of its own: what is looked up is rounded to the model's
        if isinstance(module, nnx.Embed) or (isinstance(module, nnx.Linear) and computes_narrow):
            for parameter in vars(module).values():
                if isinstance(parameter, nnx.Param):
                    parameter.set_value(_once(parameter[...].astype(narrow).astype(wide)))


def _once(x: Array) -> Array:
    """Keep a copy out of the loop over tokens: it is made once, and not folded into the products."""
    return jax.lax.optimization_barrier(x)
