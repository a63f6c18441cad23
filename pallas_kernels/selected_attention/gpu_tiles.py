"""What the kernels over tiles of queries share: fetching, masks, stores, launch."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32

from pallas_kernels.gpu import ROW_LAYOUT, TILE_ROWS, Held, Ref
from pallas_kernels.selected_attention.gpu_config import ROWS, TOKENS, TileConfig

BLOCK = 64
"""Keys per block that the kernels cover."""

HALF = 64
"""Columns of queries whose rows lie one after another in shared memory: a swizzled row of 128 bytes."""


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
      share: tokens of one warpgroup.
    """

    entries: Ref
    share: int = TOKENS

    def block(self, i: jax.Array) -> jax.Array:
        """The block of entry i."""
        return self._number(2 * i)

    def mask(self, i: jax.Array, warpgroup: jax.Array) -> jax.Array:
        """Which of the warpgroup's tokens chose the block of entry i."""
        return (self._number(2 * i + 1) >> (warpgroup * self.share)) & (2**self.share - 1)

    def _number(self, i: jax.Array | int) -> jax.Array:
        pieces, width = self.entries.shape
        if pieces == 1:
            return self.entries[0, i]
        return self.entries[i >> 8, i & 255] if width == 256 else self.entries[lax.div(i, width), lax.rem(i, width)]


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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a warpgroup's queries come from.

    Attributes:
      batch: index.
      head: KV head.
      first: its first token.
      warpgroup: index.
      config: of the kernel.
    """

    batch: jax.Array
    head: jax.Array
    first: jax.Array
    warpgroup: jax.Array
    config: TileConfig

    def box(self, source: Ref, half: int) -> Ref:
        """The warpgroup's tokens, heads of the KV head and half of the columns; past the ends there is nothing."""
        tokens, heads = pl.ds(self.first, self.config.share), pl.ds(0, self.config.rows)
        return source.at[self.batch, tokens, self.head, heads, pl.ds(half * HALF, HALF)]

    def token(self, source: Ref, token: jax.Array, half: int) -> Ref:
        """The same of one token."""
        return source.at[self.batch, token, self.head, pl.ds(0, self.config.rows), pl.ds(half * HALF, HALF)]


def in_tiles(x: Float32[jax.Array, "K B T N G"], config: TileConfig, tiles: int) -> Float32[jax.Array, "R W K 64"]:
    """Values of heads as rows of tiles: of each of R = B x N rows, of each of W warpgroups of all tiles."""
    kinds, batch, queries, heads, group = x.shape
    past = tiles * config.tokens - queries
    x = jnp.pad(jnp.moveaxis(x, 3, 2), [(0, 0), (0, 0), (0, 0), (0, past), (0, config.rows - group)])
    x = x.reshape(kinds, batch * heads, tiles * config.consumers, config.share * config.rows)
    return jnp.moveaxis(jnp.pad(x, [(0, 0)] * 3 + [(0, TILE_ROWS - x.shape[-1])]), 0, 2)


def out_of_tiles(
    x: Float32[jax.Array, "R W 64"], q: Float[jax.Array, "B T N G D"], config: TileConfig
) -> Float32[jax.Array, "B T N G"]:
    """One value per row of all tiles as values of heads."""
    batch, queries, heads, group, _ = q.shape
    x = x[..., : config.share * config.rows].reshape(batch, heads, -1, config.rows)
    return jnp.swapaxes(x[:, :, :queries, :group], 1, 2)


def halves(size: int) -> list[slice]:
    """Columns of each half of D."""
    return [slice(i, i + HALF) for i in range(0, size, HALF)]


def fetch_queries(source: Ref, boxes: Any, tile: Ref, ready: Ref, place: Place) -> None:
    """Starts copies of the warpgroup's queries, token after token and row after row without gaps.

    One box [tokens, heads, columns] of the copy engine is that order of rows; `boxes` are such views of the memory that
    the products read as [64, columns] of `tile`. The interpreter knows no second view and copies token by token.
    """
    for i, own in enumerate(boxes):

        @pl.when(place.warpgroup == i)
        def _(i=i, own=own):
            for half, box in enumerate(own):
                plgpu.copy_gmem_to_smem(place.box(source, half), box, ready.at[i])

    if not boxes:
        for t, half, own in _token_tiles(tile, place.config):
            token = jnp.minimum(place.first + t, source.shape[1] - 1)
            plgpu.copy_gmem_to_smem(place.token(source, token, half), own, ready.at[place.warpgroup])


def store_queries(boxes: Any, tile: Ref, target: Ref, place: Place) -> None:
    """Starts copies of the warpgroup's rows to their tokens; what lies past the ends is dropped."""
    for i, own in enumerate(boxes):

        @pl.when((place.warpgroup == i) & (place.first < target.shape[1]))
        def _(own=own):
            for half, box in enumerate(own):
                plgpu.copy_smem_to_gmem(box, place.box(target, half))

    if not boxes:
        for t, half, own in _token_tiles(tile, place.config):

            @pl.when(place.first + t < target.shape[1])
            def _(t=t, half=half, own=own):
                plgpu.copy_smem_to_gmem(own, place.token(target, place.first + t, half))


def _token_tiles(tile: Ref, config: TileConfig) -> list[tuple[int, int, Ref]]:
    """Every (token, half, its rows in shared memory)."""
    return [
        (t, half, tile.at[half, pl.ds(t * config.rows, config.rows)])
        for t in range(config.share)
        for half in range(tile.shape[0])
    ]


def hold(tile: Ref, held: int) -> Held:
    """`gpu.hold` of queries that lie in halves: their first `held` columns in registers."""
    lefts: Held = {}
    for half in range(tile.shape[0]):
        columns = half * HALF
        part = tile.at[half]
        lefts[columns, HALF] = plgpu.load(part, layout=plgpu.Layout.WGMMA) if columns < held else part
    return lefts


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

    def block_of(source: Ref, i: jax.Array) -> Ref:
        return source.at[batch, pl.ds(pl.multiple_of(entries.block(i) * BLOCK, BLOCK), BLOCK), head]

    def fetch(i, slot):
        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(consumed.at[slot])

        for source, ring in tensors:
            plgpu.copy_gmem_to_smem(block_of(source, i), ring.at[slot], loaded.at[slot])
        return next_slot(slot, config.stages)

    lax.fori_loop(0, count, fetch, jnp.int32(0))

    # The ring is handed back empty: no arrival is left for a barrier of a thread block that has ended.
    @pl.loop(jnp.maximum(count - config.stages, 0), count)
    def _(i):
        plgpu.barrier_wait(consumed.at[lax.rem(i, config.stages)])


def token_of_row(rows: int) -> jax.Array:
    """[64]: which of the warpgroup's tokens a row belongs to."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=ROW_LAYOUT) // rows


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """The stage of the ring after this one."""
    return jnp.where(slot == stages - 1, 0, slot + 1)


def chosen_rows(mask: jax.Array, rows: int = ROWS) -> jax.Array:
    """Rows [64] whose token is in the mask, where a token has `rows` rows."""
    return (mask >> token_of_row(rows)) & 1 == 1


def causal_mask(block: jax.Array, start: jax.Array, rows: int = ROWS) -> jax.Array:
    """[64, 64]: the row's token, `start` + row // rows, is at or past the column's key of the block."""
    shape = (TILE_ROWS, BLOCK)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) // rows
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return key + (block * BLOCK - start) <= token
