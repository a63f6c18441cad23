"""Which blocks a tile of neighbouring queries reads: the union of their choices, with one bit per query.

Tiles lie on lanes and a tile's places on sublanes, as XLA sorts them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Bool, Int, Int32

from pallas_kernels import tpu

MASK_BITS = 16
"""Low bits of an entry: bit i is set where query i of the tile chose the block, which the high bits name."""

TILE = MASK_BITS
"""Neighbouring queries of a tile."""

_NAME = "tile_lists"
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


def build(block_indices: Int[jax.Array, "B T N n"], readable: Bool[jax.Array, "B T N n"], *, blocks: int) -> TileLists:
    """Lists the union of the blocks that each tile of queries chose.

    Two sorts of `16 * n` integers per tile and a kernel between them: memory linear in T, whatever the blocks.

    Args:
      block_indices: chosen blocks, in any order; a block that a query names twice counts once.
      readable: which of them the query reads a key of. The last tile is filled up with queries that read nothing.
      blocks: blocks that exist, at most 2**15 - 1.

    Returns:
      Lists of `min(16 * n, blocks)` places.

    Raises:
      ValueError: blocks out of range.
      NotImplementedError: a tile's places exceed VMEM.
    """
    if blocks >= 2**15:
        raise ValueError(f"blocks is {blocks}, expected at most {2**15 - 1}")
    batch, queries, heads, chosen = block_indices.shape
    tiles, places = -(-queries // TILE), TILE * chosen
    key = jnp.where(readable, block_indices * TILE + (jnp.arange(queries) % TILE)[:, None, None], _LAST)
    key = jnp.pad(key, [(0, 0), (0, tiles * TILE - queries), (0, 0), (0, 0)], constant_values=_LAST)
    key = jnp.transpose(key.reshape(batch, tiles, TILE, heads, chosen), (0, 3, 4, 2, 1))
    key = jnp.sort(key.reshape(batch, heads, places, tiles).astype(jnp.int32), axis=2, stable=False)
    entries, counts = _unite(key)
    entries = jnp.sort(entries, axis=2, stable=False)[:, :, : min(places, blocks)]
    return TileLists(entries=jnp.swapaxes(jnp.where(entries == _LAST, 0, entries), 2, 3), counts=counts[:, :, 0])


def _unite(
    key: Int32[jax.Array, "B N places tiles"],
) -> tuple[Int32[jax.Array, "B N places tiles"], Int32[jax.Array, "B N 1 tiles"]]:
    """Of ascending `block * 16 + query`, one entry per block in the place of its last key; how many.

    The other places hold the largest integer.
    """
    batch, heads, places, tiles = key.shape
    lanes = min(tiles, tpu.LANES)
    spec, count_spec = (pl.BlockSpec((1, 1, rows, lanes), lambda b, n, i: (b, n, 0, i)) for rows in (places, 1))
    column = (places, lanes)
    limit = tpu.vmem_limit(
        _NAME,
        {
            "places of 128 tiles": tpu.buffer_bytes(column, jnp.int32, 4),
            "their blocks and queries": tpu.buffer_bytes(column, jnp.int32, 4),
        },
    )
    out = key, jax.ShapeDtypeStruct((batch, heads, 1, tiles), jnp.int32)
    return pl.pallas_call(
        _unite_kernel,
        name=_NAME,
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out),
        grid=(batch, heads, -(-tiles // lanes)),
        in_specs=[spec],
        out_specs=(spec, count_spec),
        compiler_params=tpu.compiler_params(("parallel",) * 3, limit),
        cost_estimate=tpu.cost(0.0, 0.0, key, *out),
        interpret=tpu.interpreted(),
    )(key)


def _unite_kernel(key_ref: Any, entries_ref: Any, counts_ref: Any) -> None:
    key = key_ref[0, 0]
    block = jax.lax.shift_right_logical(key, TILE.bit_length() - 1)
    queries = jnp.where(key == _LAST, 0, 1 << (key & (TILE - 1)))
    reach = 1
    while reach < len(key):
        # Doubling: each place ends with the bits of all places before it that name its block.
        same = _moved_down(block, reach, -1) == block
        queries |= jnp.where(same, _moved_down(queries, reach, 0), 0)
        reach *= 2
    following = jnp.concatenate([block[1:], jnp.full_like(block[:1], -1)])
    kept = (following != block) & (key != _LAST)
    entries_ref[0, 0] = jnp.where(kept, block << MASK_BITS | queries, _LAST)
    counts_ref[0, 0] = jnp.sum(kept.astype(jnp.int32), axis=0, keepdims=True)


def _moved_down(x: jax.Array, places: int, fill: int) -> jax.Array:
    return jnp.concatenate([jnp.full_like(x[:places], fill), x[:-places]])
