"""Which blocks a tile of neighbouring queries reads: the union of their choices, with one bit per query."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Int32

MASK_BITS = 16
"""Low bits of an entry: bit i is set where query i of the tile chose the block, which the high bits name."""

_LAST = jnp.iinfo(jnp.int32).max


class TileLists(NamedTuple):
    """Per tile of queries, its blocks in ascending order.

    Attributes:
      entries: `block << 16 | queries`; 0 past the tile's count.
      counts: entries of each tile.
    """

    entries: Int32[jax.Array, "B N tiles L"]
    counts: Int32[jax.Array, "B N tiles"]

    def before(self, block: Int[jax.Array, ""] | int) -> Int32[jax.Array, "B N tiles"]:
        """Entries of each tile that name a block below `block`."""
        place = jnp.arange(self.entries.shape[-1])
        below = (self.entries >> MASK_BITS) < block
        return (below & (place < self.counts[..., None])).sum(-1, dtype=jnp.int32)


def build(
    block_indices: Int[jax.Array, "B T N n"], readable: Bool[jax.Array, "B T N n"], *, tile: int, blocks: int
) -> TileLists:
    """Lists the union of the blocks that each tile of queries chose.

    Two sorts of `tile * n` integers per tile and shifts between them: memory linear in T, whatever the blocks.

    Args:
      block_indices: chosen blocks, in any order; a block that a query names twice counts once.
      readable: which of them the query reads a key of.
      tile: neighbouring queries per list, at most 16; the last tile is filled up with queries that read nothing.
      blocks: blocks that exist, at most 2**15 - 1.

    Returns:
      Lists of `min(tile * n, blocks)` places.

    Raises:
      ValueError: tile or blocks out of range.
    """
    if not 1 <= tile <= MASK_BITS:
        raise ValueError(f"tile is {tile}, expected 1 to {MASK_BITS}")
    if blocks >= 2**15:
        raise ValueError(f"blocks is {blocks}, expected at most {2**15 - 1}")
    batch, queries, heads, places = block_indices.shape
    tiles = -(-queries // tile)
    key = jnp.where(readable, block_indices * tile + (jnp.arange(queries) % tile)[:, None, None], _LAST)
    key = jnp.pad(key, [(0, 0), (0, tiles * tile - queries), (0, 0), (0, 0)], constant_values=_LAST)
    key = jnp.moveaxis(key.reshape(batch, tiles, tile, heads, places), 3, 1).reshape(batch, heads, tiles, tile * places)
    key = jnp.sort(key.astype(jnp.int32), axis=-1, stable=False)

    block = key // tile
    queries_of_block = jnp.where(key == _LAST, 0, 1 << (key % tile))
    reach = 1
    while reach < tile * places:
        # Doubling: each place ends with the bits of all places before it that name its block.
        same = _shifted(block, reach, -1) == block
        queries_of_block |= jnp.where(same, _shifted(queries_of_block, reach, 0), 0)
        reach *= 2
    last_of_block = jnp.concatenate([block[..., 1:] != block[..., :-1], jnp.ones_like(block[..., :1], bool)], axis=-1)
    kept = last_of_block & (key != _LAST)
    entries = jnp.sort(jnp.where(kept, block << MASK_BITS | queries_of_block, _LAST), axis=-1, stable=False)
    entries = entries[..., : min(tile * places, blocks)]
    return TileLists(entries=jnp.where(entries == _LAST, 0, entries), counts=kept.sum(-1, dtype=jnp.int32))


def _shifted(x: jax.Array, places: int, fill: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(places, 0)], constant_values=fill)[..., : x.shape[-1]]
