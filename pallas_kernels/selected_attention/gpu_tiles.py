"""What the kernels over tiles of queries share: fetching, masks, stores, launch."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import ROW_LAYOUT, Ref
from pallas_kernels.selected_attention.gpu_config import ROWS, TOKENS, TileConfig

BLOCK = 64
"""Keys per block that the kernels cover."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A thread block's place in the lists.

    Attributes:
      row: of B x N.
      index: of the tile within its row.
    """

    row: jax.Array
    index: jax.Array

    def about(self, tiles_ref: Ref) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The four numbers of `gpu_lists.TileLists.tiles`."""
        return tuple(tiles_ref[self.row, self.index, i] for i in range(4))


def this_tile() -> Tile:
    """The tile of the calling thread block."""
    return Tile(lax.axis_index("row"), lax.axis_index("tile"))


def launch(config: TileConfig, rows: int, tiles: int) -> dict[str, Any]:
    """Grid and compiler options: rows slowest, so that one KV head's keys stay in the L2 cache."""
    return {
        "grid": (rows, tiles),
        "grid_names": ("row", "tile"),
        "num_threads": config.consumers + 1,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }


@dataclasses.dataclass(frozen=True)
class List:
    """The list of a tile, in shared memory.

    Attributes:
      entries: [P, W].
    """

    entries: Ref

    def block(self, i: jax.Array) -> jax.Array:
        """The block of entry i."""
        return self._number(2 * i)

    def mask(self, i: jax.Array, warpgroup: jax.Array) -> jax.Array:
        """Which of the warpgroup's 8 tokens chose the block of entry i."""
        return (self._number(2 * i + 1) >> (warpgroup * TOKENS)) & (2**TOKENS - 1)

    def _number(self, i: jax.Array) -> jax.Array:
        width = self.entries.shape[1]
        return self.entries[lax.div(i, width), lax.rem(i, width)]


def fetch_tokens(
    source: Ref, target: Ref, ready: Ref, batch: jax.Array, head: jax.Array, first: jax.Array, last: jax.Array
) -> None:
    """Starts copies of 8 tokens from `first` on, none past `last`, as 8 x 8 rows of one KV head.

    The group has at most 8 heads; the copy engine fills the rows past them with zeros. A token past `last`, which may
    hold NaN, is replaced by it: no list lets it see a block.
    """
    for i in range(TOKENS):
        plgpu.copy_gmem_to_smem(
            source.at[batch, jnp.minimum(first + i, last), head, pl.ds(0, ROWS)],
            target.at[pl.ds(i * ROWS, ROWS)],
            ready,
        )


def store_tokens(source: Ref, target: Ref, batch: jax.Array, head: jax.Array, first: jax.Array, queries: int) -> None:
    """Starts copies of the tile's rows to their tokens; rows past the group and tokens past T are dropped."""
    for i in range(TOKENS):

        @pl.when(first + i < queries)
        def _(i=i):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(i * ROWS, ROWS)], target.at[batch, first + i, head, pl.ds(0, ROWS)])


def fetch_blocks(
    config: TileConfig,
    count: jax.Array,
    entries: List,
    tensors: tuple[tuple[Ref, Ref], ...],
    loaded: Ref,
    consumed: Ref,
    batch: jax.Array,
    head: jax.Array,
) -> None:
    """Keeps the ring full: the blocks of the list, in order, of each (global, ring) pair of tensors."""

    @pl.loop(0, count)
    def _(i):
        slot = lax.rem(i, config.stages)
        keys = pl.ds(pl.multiple_of(entries.block(i) * BLOCK, BLOCK), BLOCK)

        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(consumed.at[slot])

        for source, ring in tensors:
            plgpu.copy_gmem_to_smem(source.at[batch, keys, head], ring.at[slot], loaded.at[slot])

    # The ring is handed back empty: no arrival is left for a barrier of a thread block that has ended.
    @pl.loop(jnp.maximum(count - config.stages, 0), count)
    def _(i):
        plgpu.barrier_wait(consumed.at[lax.rem(i, config.stages)])


def chosen_rows(mask: jax.Array) -> jax.Array:
    """Rows [64] whose token is in the mask."""
    token = plgpu.broadcasted_iota(jnp.int32, (TOKENS * ROWS,), 0, layout=ROW_LAYOUT) // ROWS
    return (mask >> token) & 1 == 1


def causal_mask(block: jax.Array, start: jax.Array) -> jax.Array:
    """[64, 64]: the row's token, `start` + row // 8, is at or past the column's key of the block."""
    shape = (TOKENS * ROWS, BLOCK)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) // ROWS
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return key + (block * BLOCK - start) <= token
