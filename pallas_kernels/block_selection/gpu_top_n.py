"""The n best blocks of each query on Hopper, by counting.

Importances are not negative, so that their bits order as integers. A warp keeps its queries' whole rows in registers
and narrows each row's threshold until exactly n blocks reach it; blocks that equal the threshold are then bisected by
their index. The result is a bit per block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from pallas_kernels.block_selection.gpu_config import LANES, Config
from pallas_kernels.gpu import TILE_ROWS, WARPS

_FORCED = 0x7F000000  # bits of a float beyond every importance
_NO_CANDIDATE = -1
_OCTAVE = 1 << 23  # a factor of two, in a float's bits

_SCORES = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, 1, LANES), (1,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
"""[rows, words, 32]: a row belongs to one warp, a block of each of its words to one thread."""

_ROWS = _SCORES.reduce((1, 2))
"""[rows]: one value per row."""


def choose(
    config: Config,
    interpret: Any,
    scores: Float32[jax.Array, "R C columns"],
    words: int,
    current: Int32[jax.Array, "B P"],
    last: Int32[jax.Array, "B tiles"],
    start: Int32[jax.Array, "1"],
    *,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
) -> Int32[jax.Array, "B C N W"]:
    """Takes the forced blocks and the most important others of each query.

    Args:
      config: rows per warp and variants.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
      scores: importances of this chunk's queries; columns past a query's candidates are ignored.
      words: words per row of the result (W); 32 x W columns at most are read.
      current: each query's own block, -1 where it takes none.
      last: the largest of every 64 queries' `current`.
      start: first query of this chunk, a multiple of 64.
      block_count: places per query (n).
      init_blocks: leading blocks that are always taken.
      local_blocks: trailing blocks that are always taken, at least 1.

    Returns:
      A bit per block, 32 to a word, the lowest index in the lowest bit.
    """
    rows, queries, columns = scores.shape
    batch = current.shape[0]
    heads = rows // batch
    tokens = WARPS * config.rows_per_warp(words)
    choose_row = functools.partial(_chosen, block_count, init_blocks, local_blocks)

    def body(scores_ref, current_ref, last_ref, start_ref, words_ref):
        row, tile = lax.axis_index("row"), lax.axis_index("tile")
        b, n = lax.div(row, heads), lax.rem(row, heads)
        first = start_ref[0] + tile * tokens
        own = pl.ds(tile * tokens, tokens)
        current = plgpu.load(current_ref.at[b, pl.ds(first, tokens)], layout=_ROWS, optimized=False)
        needed = lax.div(last_ref[b, lax.div(first, TILE_ROWS)] + LANES, LANES)

        def variant(width):
            def run():
                score = plgpu.load(scores_ref.at[row, own, pl.ds(0, width)], layout=_SCORES, optimized=False)
                chosen = choose_row(score, current)
                words_ref.at[b, own, n, pl.ds(0, width)][...] = chosen
                if width < words:
                    rest = plgpu.layout_cast(jnp.zeros((tokens, words - width), jnp.int32), _SCORES.reduce((2,)))
                    words_ref.at[b, own, n, pl.ds(width, words - width)][...] = rest

            return run

        variants = config.widths(words)
        if len(variants) == 1:
            variant(words)()
        else:
            place = sum((needed > width).astype(jnp.int32) for width in variants[:-1])
            lax.switch(place, [variant(width) for width in variants])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, queries, heads, words), jnp.int32),
        grid=(rows, queries // tokens),
        grid_names=("row", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(scores.reshape(rows, queries, columns // LANES, LANES), current, last, start)


def _chosen(
    places: int, init_blocks: int, local_blocks: int, score: Float32[jax.Array, "rows W 32"], current: jax.Array
) -> Int32[jax.Array, "rows W"]:
    """Bits of the chosen blocks."""
    shape = score.shape
    index, lane = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_SCORES) for axis in (1, 2))
    index = index * LANES + lane
    own = lax.broadcast_in_dim(current, shape, [0])
    forced = (index < init_blocks) | (index > own - local_blocks)
    bits = jnp.where(index <= own, lax.bitcast_convert_type(score, jnp.int32), _NO_CANDIDATE)
    free = jnp.where(forced, _NO_CANDIDATE, bits)
    keys = jnp.where(forced & (index <= own), _FORCED, free)

    def count(holds: jax.Array) -> jax.Array:
        return _over_row(jnp.sum, holds.astype(jnp.int32))

    top = _over_row(jnp.max, free)
    candidates = jnp.minimum(current + 1, shape[1] * LANES)
    mean = _over_row(jnp.sum, lax.bitcast_convert_type(jnp.maximum(free, 0), jnp.float32)) / (
        jnp.maximum(candidates, 1).astype(jnp.float32)
    )
    forced_count = jnp.minimum(candidates, init_blocks + local_blocks)
    threshold, tie_end = _threshold(
        keys, index, count, places, top, lax.bitcast_convert_type(mean, jnp.int32), forced_count, candidates
    )
    reach = jnp.where(index < lax.broadcast_in_dim(tie_end, shape, [0]), 0, 1)
    taken = keys >= lax.broadcast_in_dim(threshold, shape, [0]) + reach
    bit = lax.shift_left(jnp.ones_like(lane), lane)
    return jnp.where(taken, bit, 0).sum(axis=2)


def _over_row(fold: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Folds each thread's values first, then across the warp."""
    by_thread = plgpu.layout_cast(fold(x, axis=1), _SCORES.reduce((1,)))
    return plgpu.layout_cast(fold(by_thread, axis=1), _ROWS)


def _any(x: jax.Array) -> jax.Array:
    return jnp.max(x.astype(jnp.int32)) > 0


def _threshold(
    keys: jax.Array,
    index: jax.Array,
    count: Callable[[jax.Array], jax.Array],
    places: int,
    top: jax.Array,
    mean: jax.Array,
    forced: jax.Array,
    candidates: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Per row the key that a taken block reaches, and the index below which a block of just that key is taken.

    Args:
      keys: [rows, W, 32], bits of importances, _FORCED or _NO_CANDIDATE.
      index: of each block.
      count: how many of a row's blocks hold.
      places: n.
      top: the highest key that is not forced.
      mean: bits of the mean importance, where the search begins.
      forced: how many blocks are forced, at most `places`.
      candidates: how many blocks there are to choose from.
    """

    def reached(threshold: jax.Array) -> jax.Array:
        return count(keys >= lax.broadcast_in_dim(threshold, keys.shape, [0]))

    def searching(state: Any) -> jax.Array:
        low, high, at_low, _, _ = state
        return _any((at_low > places) & (high - low > 1))

    def search(state: Any) -> Any:
        low, high, at_low, at_high, step = state
        guess = _guess(low, high, at_low, at_high, step, places, mean)
        middle = jnp.minimum(jnp.maximum(guess, low + 1), high - 1)
        at_middle = reached(middle)
        active = (at_low > places) & (high - low > 1)
        to_low, to_high = active & (at_middle >= places), active & (at_middle < places)
        return (
            jnp.where(to_low, middle, low),
            jnp.where(to_high, middle, high),
            jnp.where(to_low, at_middle, at_low),
            jnp.where(to_high, at_middle, at_high),
            step + 1,
        )

    # `places` blocks or more reach `low`, fewer reach `high`.
    full = forced >= places
    low, high = jnp.where(full, _FORCED, 0), jnp.where(full, _FORCED, top) + 1
    state = low, high, jnp.where(full, places, candidates), jnp.where(full, 0, forced), jnp.zeros_like(low)
    low, _, at_low, at_high, _ = lax.while_loop(searching, search, state)

    tied = at_low > places
    missing = places - at_high

    def bisecting_place(state: Any) -> jax.Array:
        below, reach = state
        return _any(tied & (reach - below > 1))

    def bisect_place(state: Any) -> Any:
        below, reach = state
        middle = lax.shift_right_logical(below + reach, 1)
        threshold, end = (lax.broadcast_in_dim(x, keys.shape, [0]) for x in (low, middle))
        enough = count((keys == threshold) & (index < end)) >= missing
        return jnp.where(enough, below, middle), jnp.where(enough, middle, reach)

    blocks = keys.shape[1] * LANES
    state = jnp.zeros_like(low), jnp.full_like(low, blocks)
    _, reach = lax.while_loop(bisecting_place, bisect_place, state)
    return low, jnp.where(tied, reach, blocks)


def _guess(
    low: jax.Array,
    high: jax.Array,
    at_low: jax.Array,
    at_high: jax.Array,
    step: jax.Array,
    places: int,
    mean: jax.Array,
) -> jax.Array:
    """Where to look next: the log of the count is taken to fall in a straight line with the log of the importance.

    The first look is at the mean, every fourth and all after the twelfth bisect, so that no scores make it long.
    """
    log_low = jnp.log2(at_low.astype(jnp.float32))
    log_high = jnp.log2(jnp.maximum(at_high.astype(jnp.float32), 0.5))
    share = (log_low - jnp.log2(jnp.float32(places + 0.3))) / (log_low - log_high)
    share = jnp.minimum(jnp.maximum(share, 1 / 64), 63 / 64)
    between = low + ((high - low).astype(jnp.float32) * share).astype(jnp.int32)
    down = jnp.maximum(high - 4 * step * _OCTAVE, lax.shift_right_logical(high, 1))
    guess = jnp.where(low > 0, between, down)
    bisect = (lax.rem(step, 4) == 3) | (step > 12)
    guess = jnp.where(bisect, low + lax.shift_right_logical(high - low, 1), guess)
    return jnp.where(step == 0, mean, guess)
