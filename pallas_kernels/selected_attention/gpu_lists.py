"""Work lists of the Hopper kernels, built by XLA: blocks per tile of queries, queries per block.

A query sees a chosen block when the block starts at or before it and the query lies below its row's length; the lists
hold nothing else, so a kernel never meets a key past `lengths`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from pallas_kernels.block_words import WORD
from pallas_kernels.common import Scalar, block_total, query_indices

SORT_KEYS = 2**32 - 1
"""Rows x blocks x tokens up to which one sort of 32-bit keys covers all rows; beyond, each row is sorted by itself."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["entries", "tiles"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TileLists:
    """The blocks that each tile of queries reads.

    Attributes:
      entries: [R, C, P, W] int32, R = B x N rows of C tiles: a tile's numbers in order, P pieces of W. Numbers 2e and
        2e + 1 are entry e: a block, ascending, and a mask whose bit i is whether the tile's token i chose it.
      tiles: [R, C, 4] int32: number of entries; how many of them every token of the tile sees whole; absolute index
        of the tile's first token; last token of the row that is below its length (0 where there is none).
    """

    entries: Int[jax.Array, "R C P W"]
    tiles: Int[jax.Array, "R C 4"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "items", "places", "row_ends"],
    meta_fields=["parts", "slots"],
)
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The queries that read each block, cut into parts.

    Attributes:
      tokens: [P] int32, every (row, block)'s tokens in ascending order, rows and blocks ascending.
      items: [I, 7] int32, one part each: row (-1: no part), block, first place in `tokens`, end, end of the tokens
        that see the block in part, the slot of its partial sum (-1: the part is the whole list), and the query row
        that stands at the block's first key.
      places: [R, M, 2] int32: first slot of each block and its number of slots (0: written directly).
      row_ends: [R] int32, the place in `tokens` where each row's lists end.
      parts: the most slots that a block can have.
      slots: bound on the slots of all blocks.
    """

    tokens: Int[jax.Array, "P"]
    items: Int[jax.Array, "I 7"]
    places: Int[jax.Array, "R M 2"]
    row_ends: Int[jax.Array, "R"]
    parts: int
    slots: int


def visible_choice(
    block_indices: Int[jax.Array, "B T N n"], length: Int[jax.Array, "B"], q_offset: Scalar, keys: int, block_size: int
) -> Int[jax.Array, "B N T n"]:
    """The chosen blocks in which a query sees a key, -1 for the others."""
    t = query_indices(block_indices.shape[1], q_offset)
    chosen = jnp.swapaxes(block_indices, 1, 2).astype(jnp.int32)
    seen: Bool[jax.Array, "B N T n"] = (
        (chosen >= 0)
        & (chosen < block_total(keys, block_size))
        & (chosen * block_size <= t[:, None])
        & (t < length[:, None])[:, None, :, None]
    )
    return jnp.where(seen, chosen, -1)


def tile_lists(
    chosen: Int[jax.Array, "B N T n"],
    length: Int[jax.Array, "B"],
    q_offset: Scalar,
    keys: int,
    block_size: int,
    tokens: int,
) -> TileLists:
    """Lists the union of the blocks of each tile of queries.

    Args:
      chosen: from `visible_choice`.
      length: valid keys of each batch row.
      q_offset: absolute index of the first query.
      keys: S.
      block_size: keys per block.
      tokens: of a tile; at most 31.

    Returns:
      The lists; memory grows with T x S / (tokens x block_size).
    """
    batch, heads, queries, places = chosen.shape
    blocks = block_total(keys, block_size)
    tiles = -(-queries // tokens)
    rows = batch * heads
    chosen = jnp.pad(chosen, [(0, 0), (0, 0), (0, tiles * tokens - queries), (0, 0)], constant_values=-1)
    chosen = chosen.reshape(rows, tiles, tokens, places)
    row, tile = jnp.arange(rows)[:, None, None, None], jnp.arange(tiles)[:, None, None]
    bit = jnp.broadcast_to(1 << jnp.arange(tokens, dtype=jnp.int32)[:, None], chosen.shape)
    # Each (token, block) occurs once, so that the sum is the union of the bits.
    table = jnp.zeros((rows, tiles, blocks), jnp.int32)
    table = table.at[row, tile, jnp.where(chosen < 0, blocks, chosen)].add(
        bit, mode="drop", wrap_negative_indices=False
    )

    return _lists_of(table, length, q_offset, queries, min(tokens * places, blocks), block_size, tokens)


def work_lists(forward: int, dq: int, build: Callable[[int], TileLists]) -> tuple[TileLists, TileLists]:
    """The lists of the forward kernel and of dq's, built once where both have tiles of as many tokens.

    Args:
      forward: tokens of a tile of the forward kernel.
      dq: likewise of dq's.
      build: gives the lists for a number of tokens.
    """
    lists = {tokens: build(tokens) for tokens in {forward, dq}}
    return lists[forward], lists[dq]


def tile_lists_from_words(
    words: Int[jax.Array, "B T N W"],
    places: int,
    length: Int[jax.Array, "B"],
    q_offset: Scalar,
    keys: int,
    block_size: int,
    tokens: int,
) -> TileLists:
    """`tile_lists` of blocks that are chosen as bit words: elementwise where that scatters.

    Args:
      words: of blocks that each query sees, as `block_selection.mosaic_gpu.block_words` returns them for the same
        lengths; see `pallas_kernels.block_words`.
      places: the most blocks of one query (n).
      length: see `tile_lists`.
      q_offset: see there.
      keys: see there.
      block_size: see there.
      tokens: see there.

    Returns:
      The lists.
    """
    batch, queries, heads, total = words.shape
    blocks = block_total(keys, block_size)
    tiles = -(-queries // tokens)
    words = jnp.pad(words, [(0, 0), (0, tiles * tokens - queries), (0, 0), (0, 0)])
    words = words.reshape(batch, tiles, tokens, heads, total)
    bit = jnp.arange(WORD, dtype=jnp.int32)
    table = jnp.zeros((batch, tiles, heads, total, WORD), jnp.int32)
    for i in range(tokens):
        table = table | (((words[:, :, i, :, :, None] >> bit) & 1) << i)
    table = jnp.swapaxes(table, 1, 2).reshape(batch * heads, tiles, total * WORD)
    table = jnp.pad(table[..., :blocks], [(0, 0), (0, 0), (0, max(0, blocks - total * WORD))])
    return _lists_of(table, length, q_offset, queries, min(tokens * places, blocks), block_size, tokens)


def _lists_of(
    table: Int[jax.Array, "R C M"],
    length: Int[jax.Array, "B"],
    q_offset: Scalar,
    queries: int,
    capacity: int,
    block_size: int,
    tokens: int,
) -> TileLists:
    """The lists of a table that holds, for each tile and block, a bit per token that chose it."""
    rows, tiles, blocks = table.shape
    heads = rows // length.shape[0]
    # Neither compared with 0 here nor with indices below 0: XLA would write a second array of zeros beside the one that
    # bits are scattered to, and read it.
    listed = table >= 1
    count, place = _places(listed)
    width = min(256, -(-2 * capacity // 32) * 32)
    capacity = -(-2 * capacity // width) * width // 2
    block = jnp.arange(blocks, dtype=jnp.int32)
    entries = jnp.zeros((rows, tiles, capacity, 2), jnp.int32)
    entries = entries.at[
        jnp.arange(rows)[:, None, None],
        jnp.arange(tiles)[:, None],
        jnp.where(listed, place, capacity),
    ].set(
        jnp.stack([jnp.broadcast_to(block, table.shape), table], axis=-1),
        mode="drop",
        unique_indices=True,
        wrap_negative_indices=False,
    )

    first = query_indices(tiles * tokens, q_offset)[::tokens]
    whole = listed & (block < ((first + 1) // block_size)[:, None])
    last = jnp.clip(length - jnp.asarray(q_offset, jnp.int32), 1, max(queries, 1)) - 1
    shape = (rows, tiles)
    about = jnp.stack(
        [
            count,
            whole.sum(axis=2, dtype=jnp.int32),
            jnp.broadcast_to(first, shape),
            jnp.broadcast_to(last.repeat(heads)[:, None], shape),
        ],
        axis=-1,
    )
    return TileLists(entries.reshape(rows, tiles, -1, width), about)


def _places(listed: Bool[jax.Array, "R C M"]) -> tuple[Int[jax.Array, "R C"], Int[jax.Array, "R C M"]]:
    """How many of the last axis are listed, and how many before each: sums of 32 at a time are one count of bits."""
    *lead, blocks = listed.shape
    bit = jnp.arange(32, dtype=jnp.uint32)
    words = jnp.pad(listed, [(0, 0), (0, 0), (0, -blocks % 32)]).reshape(*lead, -1, 32).astype(jnp.uint32)
    words = (words << bit).sum(axis=-1, dtype=jnp.uint32)
    ends = jnp.cumsum(jax.lax.population_count(words), axis=-1, dtype=jnp.uint32)
    earlier = words[..., None] & ((jnp.uint32(1) << bit) - 1)
    place = (ends - jax.lax.population_count(words))[..., None] + jax.lax.population_count(earlier)
    return ends[..., -1].astype(jnp.int32), place.reshape(*lead, -1)[..., :blocks].astype(jnp.int32)


def block_lists(
    chosen: Int[jax.Array, "B N T n"], q_offset: Scalar, keys: int, block_size: int, part: int
) -> BlockLists:
    """Lists the queries of each block and cuts lists longer than `part` into parts.

    Args:
      chosen: from `visible_choice`.
      q_offset: absolute index of the first query.
      keys: S.
      block_size: keys per block.
      part: the most tokens of one part.

    Returns:
      The lists. Parts are numbered so that blocks ascend within a row: under causal attention the longest come first.
    """
    batch, heads, queries, places = chosen.shape
    rows, blocks = batch * heads, block_total(keys, block_size)
    tokens, starts = _sorted_tokens(chosen.reshape(rows, queries, places), blocks)
    starts = starts.reshape(rows, blocks + 1)
    begin, sizes = starts[:, :-1], jnp.diff(starts, axis=1)
    # The tokens of a block's own range come first in its list, and only they see it in part.
    first_whole = jnp.arange(blocks, dtype=jnp.int32) * block_size + block_size - 1 - jnp.asarray(q_offset, jnp.int32)
    partial = _count_before(tokens, begin, sizes, first_whole, block_size)

    parts = max(1, -(-queries // part))
    pieces = jnp.maximum(-(-sizes // part), 1)
    slots = jnp.where(pieces > 1, pieces, 0)
    ends = jnp.cumsum(slots.reshape(-1)).reshape(slots.shape)
    first_slot = ends - slots
    split = split_slots(rows, queries, places, blocks, part)

    last = jnp.cumsum(pieces.reshape(-1))
    item = jnp.arange(rows * blocks + split, dtype=jnp.int32)
    owner = jnp.searchsorted(last, item, side="right").astype(jnp.int32)
    inside = owner < rows * blocks
    owner = jnp.minimum(owner, rows * blocks - 1)
    piece = item - (last - pieces.reshape(-1))[owner]

    def take(x: jax.Array) -> jax.Array:
        return x.reshape(-1)[owner]

    start = take(begin) + piece * part
    items = jnp.stack(
        [
            jnp.where(inside, owner // blocks, -1),
            owner % blocks,
            start,
            jnp.minimum(start + part, take(begin) + take(sizes)),
            take(begin) + take(partial),
            jnp.where(take(slots) > 0, take(first_slot) + piece, -1),
            owner % blocks * block_size - jnp.asarray(q_offset, jnp.int32),
        ],
        axis=-1,
    )
    return BlockLists(tokens, items, jnp.stack([first_slot, slots], axis=-1), starts[:, -1], parts, split)


def split_slots(rows: int, queries: int, places: int, blocks: int, part: int) -> int:
    """Bound on the parts of lists that are longer than `part`: each such list has fewer than twice size / part."""
    return min(rows * blocks * -(-queries // part), 2 * rows * queries * places // part) if queries > part else 0


def _sorted_tokens(chosen: Int[jax.Array, "R T n"], blocks: int) -> tuple[jax.Array, jax.Array]:
    """Tokens sorted by (row, block), and where each block's begin: [P] and [R, M + 1]."""
    rows, queries, _ = chosen.shape
    token = jnp.arange(queries, dtype=jnp.uint32)[:, None]

    def by_block(group: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = group.shape[0]
        row = jnp.arange(count, dtype=jnp.uint32)[:, None, None]
        packed = (row * blocks + group.astype(jnp.uint32)) * queries + token
        packed = jnp.sort(jnp.where(group < 0, jnp.uint32(2**32 - 1), packed).reshape(-1))
        bounds = jnp.arange(count * blocks + 1, dtype=jnp.uint32) * queries
        starts = jnp.searchsorted(packed, bounds).astype(jnp.int32)
        starts = jnp.concatenate([starts[:-1].reshape(count, blocks), starts[blocks::blocks, None]], axis=1)
        return (packed % queries).astype(jnp.int32), starts

    if rows * blocks * queries < SORT_KEYS:
        return by_block(chosen)
    tokens, starts = jax.lax.map(by_block, chosen[:, None])
    size = math.prod(chosen.shape[1:])
    return tokens.reshape(-1), starts[:, 0] + jnp.arange(rows, dtype=jnp.int32)[:, None] * size


def _count_before(
    tokens: jax.Array, begin: jax.Array, sizes: jax.Array, first_whole: jax.Array, most: int
) -> jax.Array:
    """How many tokens of each list lie below `first_whole` [M]; at most `most` do."""
    step = jnp.arange(most, dtype=jnp.int32)
    index = jnp.minimum(begin[..., None] + step, tokens.shape[0] - 1)
    below = (step < sizes[..., None]) & (tokens[index] < first_whole[:, None])
    return below.sum(axis=-1, dtype=jnp.int32)
