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

_OCTAVE = 1 << 23  # a factor of two, in a float's bits

COLUMNS = 2
"""Keys per thread and rank that are left of a row when its words are folded."""

KEPT = 4
"""Ranks: the best keys of each column."""

_SCORES = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, 1, LANES), (1,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
"""[rows, words, 32]: a row belongs to one warp, a block of each of its words to one thread."""

_ROWS = _SCORES.reduce((1, 2))
"""[rows]: one value per row."""

_WORDS = _SCORES.reduce((0, 2))
"""[words]: the same in every thread, so that a word's index is a constant of its register."""

_LANES = _SCORES.reduce((0, 1))
"""[32]: one value per thread of a warp."""


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

        def write(place, values):
            words_ref.at[b, own, n, place][...] = plgpu.layout_cast(values, _SCORES.reduce((2,)))

        def variant(width):
            def run():
                if width:
                    score = plgpu.load(scores_ref.at[row, own, pl.ds(0, width)], layout=_SCORES, optimized=False)
                    write(pl.ds(0, width), choose_row(score, current))
                if width < words:
                    write(pl.ds(width, words - width), jnp.zeros((tokens, words - width), jnp.int32))

            return run

        widths = (0, *config.widths(words))
        lax.switch(
            sum((needed > width).astype(jnp.int32) for width in widths[:-1]), [variant(width) for width in widths]
        )

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
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LANES)
    word = plgpu.broadcasted_iota(jnp.int32, (shape[1],), 0, layout=_WORDS)
    first = lax.broadcast_in_dim(word * -LANES, shape, [1])

    def below(end: jax.Array) -> jax.Array:
        """Blocks whose index is less than each row's `end`: one comparison with a constant."""
        return lax.broadcast_in_dim(lane, shape, [2]) - lax.broadcast_in_dim(end, shape, [0]) < first

    candidates = jnp.minimum(current + 1, shape[1] * LANES)
    end = current + (1 - local_blocks)
    free = below(end)
    initial = below(jnp.full_like(current, init_blocks)) if init_blocks else None
    keys = jnp.where(free, lax.bitcast_convert_type(score, jnp.int32), 0)
    if init_blocks:
        keys = jnp.where(initial, 0, keys)

    forced_count = jnp.minimum(candidates, init_blocks + local_blocks)
    threshold, tie_end = _threshold(keys, below, initial, places - forced_count, candidates - forced_count)
    least = _wide(threshold, keys)

    def words_of(taken: jax.Array) -> jax.Array:
        forced = below(current + 1) & (below(end) == False)  # noqa: E712
        if local_blocks == 1:
            forced = lax.broadcast_in_dim(lane, shape, [2]) - _wide(current, keys) == first
        if init_blocks:
            forced = forced | (initial & below(current + 1))
        bit = lax.broadcast_in_dim(lax.shift_left(jnp.ones_like(lane), lane), shape, [2])
        return jnp.where(taken | forced, bit, 0).sum(axis=2)

    def among_equals() -> jax.Array:
        # Blocks that are not free have the key 0; where that is the threshold, none past the free ones is taken.
        return words_of(keys >= least + jnp.where(below(jnp.minimum(tie_end, end)), 0, 1))

    plain = (tie_end >= shape[1] * LANES) & (threshold > 0)
    return lax.cond(_any(plain == False), among_equals, lambda: words_of(keys >= least))  # noqa: E712


def _over_row(fold: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Folds each thread's values first, then across the warp."""
    by_thread = plgpu.layout_cast(fold(x, axis=1), _SCORES.reduce((1,)))
    return plgpu.layout_cast(fold(by_thread, axis=1), _ROWS)


def _count(holds: jax.Array) -> jax.Array:
    """How many of each row's blocks hold."""
    return _over_row(jnp.sum, holds.astype(jnp.int32))


def _any(x: jax.Array) -> jax.Array:
    return jnp.max(x.astype(jnp.int32)) > 0


def _threshold(
    keys: jax.Array,
    below: Callable[[jax.Array], jax.Array],
    initial: jax.Array | None,
    places: jax.Array,
    candidates: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Per row the key that a taken block reaches, and the index below which a block of just that key is taken.

    Args:
      keys: [rows, W, 32], bits of the importances of the free candidates, 0 for all other blocks.
      below: which blocks' index is less than a row's value.
      initial: blocks that are forced though their index is less than a free one's; None: there are none.
      places: how many free candidates to take.
      candidates: how many there are.
    """

    few = _best_of_columns(keys)
    best = few[:, : few.shape[1] // KEPT]
    top = _over_row(jnp.max, best)
    mean = _over_row(jnp.sum, lax.bitcast_convert_type(best, jnp.float32)) / (best.shape[1] * LANES)
    bounds = jnp.where(places <= 0, top + 1, 0), top + 2, jnp.where(places <= 0, 0, candidates)
    guess, _, _ = _narrow(few, places, bounds, (lax.bitcast_convert_type(mean, jnp.int32),))
    # Mostly the few hold the row's best, and one look is enough. Just above lies the answer to equal keys.
    low, at_low, at_high = _narrow(keys, places, bounds, (guess, guess + 1))

    tied = at_low > places
    missing = places - at_high

    def bisecting_place(state: Any) -> jax.Array:
        under, reach = state
        return _any(tied & (reach - under > 1))

    def bisect_place(state: Any) -> Any:
        under, reach = state
        middle = lax.shift_right_logical(under + reach, 1)
        alike = (keys == _wide(low, keys)) & below(middle)
        if initial is not None:
            alike = alike & (initial == False)  # noqa: E712
        enough = _count(alike) >= missing
        return jnp.where(enough, under, middle), jnp.where(enough, middle, reach)

    blocks = keys.shape[1] * LANES
    state = jnp.zeros_like(low), jnp.full_like(low, blocks)
    _, reach = lax.while_loop(bisecting_place, bisect_place, state)
    return low, jnp.where(tied, reach, blocks)


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value per row, for every block of the row."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _best_of_columns(keys: jax.Array) -> jax.Array:
    """The `KEPT` best of each column of words, descending, the columns of one rank beside each other.

    Words are folded onto each other, elementwise, until few columns are left.
    """
    ranked = [_with_words(keys, max(keys.shape[1], COLUMNS * KEPT))]
    while ranked[0].shape[1] > COLUMNS:
        half = (ranked[0].shape[1] + 1) // 2
        ranked = [_with_words(x, 2 * half) for x in ranked]
        ranked = _merge([x[:, :half] for x in ranked], [x[:, half:] for x in ranked])
    return jnp.concatenate(ranked, axis=1)


def _with_words(keys: jax.Array, words: int) -> jax.Array:
    """Zeros past the last word, which no key is below."""
    missing = words - keys.shape[1]
    if not missing:
        return keys
    return jnp.concatenate([keys, jnp.zeros((keys.shape[0], missing, LANES), keys.dtype)], axis=1)


def _merge(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    """The best of two descending lists, descending, at most `KEPT`; of one length, a power of two."""
    b = b[::-1]
    best = [jnp.maximum(*pair) for pair in zip(a, b, strict=True)]
    if len(a) == KEPT:
        return _in_order(best)
    return _in_order(best) + _in_order([jnp.minimum(*pair) for pair in zip(a, b, strict=True)])


def _in_order(bitonic: list[jax.Array]) -> list[jax.Array]:
    """A list that rises and falls, or falls and rises, descending."""
    half = len(bitonic) // 2
    if not half:
        return bitonic
    pairs = list(zip(bitonic[:half], bitonic[half:], strict=True))
    return _in_order([jnp.maximum(*pair) for pair in pairs]) + _in_order([jnp.minimum(*pair) for pair in pairs])


def _narrow(
    keys: jax.Array, places: jax.Array, bounds: tuple[jax.Array, jax.Array, jax.Array], looks: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Searches each row for the threshold that `places` keys reach, or the highest one that more reach.

    Args:
      keys: [rows, W, 32].
      places: a value per row.
      bounds: a threshold that `places` keys or more reach, one that fewer reach, and how many reach the former.
      looks: where to look first.

    Returns:
      The threshold, how many keys reach it, and how many the next higher one.
    """

    def searching(state: Any) -> jax.Array:
        low, high, at_low, _, _ = state
        return _any((at_low > places) & (high - low > 1))

    def search(state: Any) -> Any:
        low, high, at_low, at_high, step = state
        guess = _guess(low, high, at_low, at_high, step, places)
        for i, look in enumerate(looks):
            guess = jnp.where(step == i, look, guess)
        middle = jnp.minimum(jnp.maximum(guess, low + 1), high - 1)
        at_middle = _count(keys >= _wide(middle, keys))
        active = (at_low > places) & (high - low > 1)
        to_low, to_high = active & (at_middle >= places), active & (at_middle < places)
        return (
            jnp.where(to_low, middle, low),
            jnp.where(to_high, middle, high),
            jnp.where(to_low, at_middle, at_low),
            jnp.where(to_high, at_middle, at_high),
            step + 1,
        )

    zero = jnp.zeros_like(bounds[0])
    low, _, at_low, at_high, _ = lax.while_loop(searching, search, (*bounds, zero, zero))
    return low, at_low, at_high


def _guess(
    low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array, step: jax.Array, places: jax.Array
) -> jax.Array:
    """Where to look next: the log of the count is taken to fall in a straight line with the log of the importance.

    Every fourth look and all after the twelfth bisect, so that no scores make it long.
    """
    log_low = jnp.log2(at_low.astype(jnp.float32))
    log_high = jnp.log2(jnp.maximum(at_high.astype(jnp.float32), 0.5))
    share = (log_low - jnp.log2(places.astype(jnp.float32) + 0.3)) / (log_low - log_high)
    share = jnp.minimum(jnp.maximum(share, 1 / 64), 63 / 64)
    between = low + ((high - low).astype(jnp.float32) * share).astype(jnp.int32)
    down = jnp.maximum(high - 4 * step * _OCTAVE, lax.shift_right_logical(high, 1))
    guess = jnp.where(low > 0, between, down)
    bisect = (lax.rem(step, 4) == 3) | (step > 12)
    return jnp.where(bisect, low + lax.shift_right_logical(high - low, 1), guess)
