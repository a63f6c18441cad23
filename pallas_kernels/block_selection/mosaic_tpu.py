"""Block selection on TPU: the importances of a tile of queries stay in VMEM, and the top n are found by counting.

Tokens lie on lanes and blocks on sublanes. Importances are not negative, so that their bits order as integers: each
token's threshold is bisected on them until exactly n blocks reach it. The chosen ones become a bitmask of 32 blocks a
word, whose set bits are then listed in ascending order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Float32, Int, Int32

from pallas_kernels import tpu
from pallas_kernels.common import ArrayLike, Scalar, query_indices, zero_where

_NAME = "block_selection"
_TOKENS = tpu.LANES
_CHUNK = 256
_WORD = 32
_FORCED = 0x7F000000  # bits of a float beyond every importance
_NO_CANDIDATE = -1
_OCTAVE = 1 << 23  # a factor of two, in a float's bits


def block_selection(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    lse: Float32[ArrayLike, "B T N G"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> Int32[jax.Array, "B T N n"]:
    """Chooses blocks; arguments and results as in `api.block_selection`."""
    q, k_blocks, lse = (jnp.asarray(x) for x in (q, k_blocks, lse))
    tpu.check_arrays(_NAME, q)
    batch, queries, heads, _, _ = q.shape
    if 0 in (batch, queries):
        return jnp.zeros((batch, queries, heads, block_count), jnp.int32)
    if lengths is not None:
        q = zero_where(query_indices(queries, q_offset) >= jnp.asarray(lengths)[:, None], q)
    padded = -(-queries // _TOKENS) * _TOKENS
    return group_major_selection(
        tpu.group_major(q, padded),
        k_blocks,
        tpu.group_major(lse, padded),
        queries=queries,
        block_size=block_size,
        block_count=block_count,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        q_offset=q_offset,
        lengths=lengths,
    )


def group_major_selection(
    q: Float[jax.Array, "B N G padded D"],
    k_blocks: Float[jax.Array, "B M N D"],
    lse: Float32[jax.Array, "B N G padded"],
    *,
    queries: int,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> Int32[jax.Array, "B T N n"]:
    """`block_selection` of T = `queries` as the kernel takes them, T padded to 128s, zeros past the lengths."""
    batch, heads, group, _, size = q.shape
    t = query_indices(queries, q_offset)
    current = jnp.broadcast_to(t // block_size, (batch, queries))
    if lengths is not None:
        current = jnp.where(t >= jnp.asarray(lengths)[:, None], -1, current)

    tiles = -(-queries // _TOKENS)
    # One block more than there are complete ones: a partial last block can be the current one.
    blocks = -(-(k_blocks.shape[1] + 1) // _CHUNK) * _CHUNK
    current = jnp.where(jnp.arange(tiles * _TOKENS) < queries, tpu.pad_axis(current, 1, tiles * _TOKENS), -1)
    last = jnp.max(current.reshape(batch * tiles, _TOKENS), axis=1)
    arrays = q, tpu.keys_head_major(k_blocks, blocks)
    limit = tpu.vmem_limit(
        _NAME,
        {
            "queries": 2 * group * tpu.buffer_bytes((_TOKENS, size), q.dtype),
            "block means": tpu.buffer_bytes((blocks, size), q.dtype, 2),
            "importances": tpu.buffer_bytes((blocks, _TOKENS), jnp.int32),
            "logits": tpu.buffer_bytes((_CHUNK, group * _TOKENS), jnp.float32, 2),
            "indices": tpu.buffer_bytes((block_count, _TOKENS), jnp.int32, 2),
        },
    )
    out = jax.ShapeDtypeStruct((batch, heads, block_count, tiles * _TOKENS), jnp.int32)
    logits = batch * heads * group * queries * blocks / 2
    chosen = pl.pallas_call(
        functools.partial(_kernel, group, size**-0.5, init_blocks, max(local_blocks, 1)),
        name=_NAME,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiles),
            in_specs=[
                pl.BlockSpec((1, 1, group, _TOKENS, size), lambda b, n, i, last: (b, n, 0, i, 0)),
                pl.BlockSpec((1, 1, blocks, size), lambda b, n, i, last: (b, n, 0, 0)),
                pl.BlockSpec((1, 1, group, _TOKENS), lambda b, n, i, last: (b, n, 0, i)),
                pl.BlockSpec((1, 1, _TOKENS), lambda b, n, i, last: (b, 0, i)),
            ],
            out_specs=pl.BlockSpec((1, 1, block_count, _TOKENS), lambda b, n, i, last: (b, n, 0, i)),
            scratch_shapes=[
                pltpu.VMEM((blocks, _TOKENS), jnp.int32),
                pltpu.VMEM((blocks // _WORD, _TOKENS), jnp.int32),
            ],
        ),
        compiler_params=tpu.compiler_params(("parallel",) * 3, limit),
        cost_estimate=tpu.cost(2 * size * logits, logits, *arrays, lse, out),
        interpret=tpu.interpreted(),
    )(last, *arrays, lse, current[:, None])
    return jnp.moveaxis(chosen[..., :queries], 2, 3).swapaxes(1, 2)


def _kernel(
    group: int,
    scale: float,
    init_blocks: int,
    local_blocks: int,
    last_ref: Any,
    q_ref: Any,
    k_ref: Any,
    lse_ref: Any,
    current_ref: Any,
    chosen_ref: Any,
    keys_ref: Any,
    words_ref: Any,
) -> None:
    last = last_ref[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)]
    chunks = jax.lax.div(last + _CHUNK, jnp.int32(_CHUNK))
    current = current_ref[0]
    precision = tpu.dot_precision(q_ref.dtype)
    q = q_ref[0, 0].reshape(group * _TOKENS, q_ref.shape[-1])
    lse = lse_ref[0, 0] * tpu.LOG2_E

    def score(c: Any, top: Any) -> Any:
        place = pl.ds(pl.multiple_of(c * _CHUNK, _CHUNK), _CHUNK)
        dimensions = (((1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(
            k_ref[0, 0, place], q, dimensions, preferred_element_type=jnp.float32, precision=precision
        )
        importance = jnp.zeros((_CHUNK, _TOKENS), jnp.float32)
        for g in range(group):
            head = logits[:, g * _TOKENS : (g + 1) * _TOKENS]
            importance += jnp.exp2(head * (scale * tpu.LOG2_E) - lse[g : g + 1])
        j = c * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, importance.shape, 0)
        forced = (j < init_blocks) | (j > current - local_blocks)
        bits = jnp.where(forced, _NO_CANDIDATE, jax.lax.bitcast_convert_type(importance, jnp.int32))
        keys_ref[place] = jnp.where(j > current, _NO_CANDIDATE, jnp.where(forced, _FORCED, bits))
        return jnp.maximum(top, _over_sublanes(jnp.maximum, jnp.where(j > current, _NO_CANDIDATE, bits)))

    top = jax.lax.fori_loop(0, chunks, score, jnp.full((tpu.SUBLANES, _TOKENS), _NO_CANDIDATE, jnp.int32))
    top = jnp.max(top, axis=0, keepdims=True)

    count = functools.partial(_count, keys_ref, chunks)
    places = chosen_ref.shape[2]
    forced = jnp.minimum(current + 1, init_blocks + local_blocks)
    threshold, tie_end = _threshold(count, places, top, forced, current + 1, keys_ref.shape[0])
    sublane = jax.lax.broadcasted_iota(jnp.int32, (tpu.SUBLANES, _TOKENS), 0)

    @pl.loop(0, chunks)
    def _(c: Any) -> None:
        for w in range(_CHUNK // _WORD):
            bits = jnp.zeros((tpu.SUBLANES, _TOKENS), jnp.int32)
            for row in range(0, _WORD, tpu.SUBLANES):
                index = c * _CHUNK + w * _WORD + row
                keys = keys_ref[pl.ds(pl.multiple_of(index, tpu.SUBLANES), tpu.SUBLANES)]
                reach = jnp.where(sublane < tie_end - index, threshold, threshold + 1)
                bits |= jnp.where(keys >= reach, jnp.int32(1) << (sublane + row), 0)
            words_ref[pl.ds(c * (_CHUNK // _WORD) + w, 1)] = jnp.sum(bits, axis=0, keepdims=True)

    chosen_ref[0, 0] = _set_bits(words_ref, chunks, places)


def _over_sublanes(fold: Any, x: Any) -> Any:
    """Folds [rows, lanes] to [8, lanes] without crossing sublanes."""
    parts = [x[i : i + tpu.SUBLANES] for i in range(0, x.shape[0], tpu.SUBLANES)]
    while len(parts) > 1:
        parts = [fold(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _count(keys_ref: Any, chunks: Any, holds: Any) -> Int32[jax.Array, "1 tokens"]:
    """How many blocks of each token `holds(keys, index)` is true of."""

    def body(c: Any, total: Any) -> Any:
        keys = keys_ref[pl.ds(pl.multiple_of(c * _CHUNK, _CHUNK), _CHUNK)]
        index = c * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0)
        return total + _over_sublanes(jnp.add, holds(keys, index).astype(jnp.int32))

    total = jax.lax.fori_loop(0, chunks, body, jnp.zeros((tpu.SUBLANES, _TOKENS), jnp.int32))
    return jnp.sum(total, axis=0, keepdims=True)


def _threshold(
    count: Any, places: int, top: Any, forced: Any, candidates: Any, blocks: int
) -> tuple[Int32[jax.Array, "1 tokens"], Int32[jax.Array, "1 tokens"]]:
    """Per token the key that a taken block reaches, and the index below which a block of just that key is taken.

    Args:
      count: see `_count`.
      places: n.
      top: the highest key that is not forced.
      forced: how many blocks are forced, at most `places`.
      candidates: how many blocks there are to choose from.
      blocks: more than any index.
    """

    def bisecting(state: Any) -> Bool[jax.Array, ""]:
        low, high, at_low, _, _ = state
        return _any((at_low > places) & (high - low > 1))

    def bisect(state: Any) -> Any:
        low, high, at_low, at_high, step = state
        middle = low + jax.lax.shift_right_logical(high - low, 1)
        # Most thresholds lie within eight octaves of the best block.
        guess = top - 8 * _OCTAVE
        middle = jnp.where((step == 0) & (guess > low) & (guess < high), guess, middle)
        at_middle = count(lambda keys, _: keys >= middle)
        enough = at_middle >= places
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, at_middle, at_low),
            jnp.where(enough, at_high, at_middle),
            step + 1,
        )

    # `places` blocks or more reach `low`, fewer reach `high`.
    full = forced >= places
    zero = jnp.zeros_like(top)
    low, high = jnp.where(full, _FORCED, 0), jnp.where(full, _FORCED, top) + 1
    state = low, high, jnp.where(full, places, candidates), jnp.where(full, 0, forced), jnp.int32(0)
    low, _, at_low, at_high, _ = jax.lax.while_loop(bisecting, bisect, state)

    tied = at_low > places
    missing = places - at_high

    def bisect_place(state: Any) -> Any:
        below, reach = state
        middle = jax.lax.shift_right_logical(below + reach, 1)
        enough = count(lambda keys, index: (keys == low) & (index < middle)) >= missing
        return jnp.where(enough, below, middle), jnp.where(enough, middle, reach)

    def bisecting_place(state: Any) -> Bool[jax.Array, ""]:
        return _any(tied & (state[1] - state[0] > 1))

    _, reach = jax.lax.while_loop(bisecting_place, bisect_place, (zero, jnp.full_like(top, blocks)))
    return low, jnp.where(tied, reach, blocks)


def _any(x: Bool[jax.Array, "1 tokens"]) -> Bool[jax.Array, ""]:
    return jnp.max(x.astype(jnp.int32)) > 0


def _set_bits(words_ref: Any, chunks: Any, places: int) -> Int32[jax.Array, "places tokens"]:
    """Indices of the set bits of each token's words, ascending, -1 past the last."""
    rows = _CHUNK // _WORD
    place = jax.lax.broadcasted_iota(jnp.int32, (places, _TOKENS), 0)

    def find_words(c: Any, state: Any) -> Any:
        before, word, word_index, word_before = state
        words = words_ref[pl.ds(pl.multiple_of(c * rows, rows), rows)]
        bits = jax.lax.population_count(words)
        for r in range(rows):
            # The word of a place is the last one with no more set bits before it.
            reached = before <= place
            word = jnp.where(reached, words[r : r + 1], word)
            word_index = jnp.where(reached, c * rows + r, word_index)
            word_before = jnp.where(reached, before, word_before)
            before = before + bits[r : r + 1]
        return before, word, word_index, word_before

    zero = jnp.zeros((places, _TOKENS), jnp.int32)
    total, word, word_index, before = jax.lax.fori_loop(
        0, chunks, find_words, (jnp.zeros((1, _TOKENS), jnp.int32), zero, zero, zero)
    )

    rank, position = place - before, zero
    for width in (16, 8, 4, 2, 1):
        lower = jax.lax.population_count(word & ((1 << width) - 1))
        upper = rank >= lower
        rank = jnp.where(upper, rank - lower, rank)
        word = jnp.where(upper, jax.lax.shift_right_logical(word, width), word)
        position = jnp.where(upper, position + width, position)
    return jnp.where(place < total, word_index * _WORD + position, -1)
