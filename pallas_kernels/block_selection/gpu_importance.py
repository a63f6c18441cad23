"""Importances of blocks on Hopper: the group's probabilities summed in registers, a tile of queries at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from pallas_kernels import gpu
from pallas_kernels.block_selection.gpu_config import REGISTERS, Config
from pallas_kernels.gpu import ROW_LAYOUT, TILE_ROWS


def importance(
    config: Config,
    interpret: Any,
    q: Float[jax.Array, "B T N G D"],
    k_blocks: Float[jax.Array, "B M N D"],
    lse: Float32[jax.Array, "B N G P"],
    last: Int32[jax.Array, "B tiles"],
    start: Int32[jax.Array, "1"],
    queries: int,
    columns: int,
) -> Float32[jax.Array, "R C columns"]:
    """Sums exp(logit - lse) over the heads of each group.

    A thread block stays and walks over its share of the tiles of 64 tokens: the queries of all heads of one KV head are
    in shared memory, and block means pass by, a tile at a time, up to the tokens' last candidate. Its warpgroups take
    turns at the tiles of means, across tiles of queries too; the next tile's queries replace a head's once their last
    product is done.

    Args:
      config: tiles of block means, thread blocks.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
      q: queries.
      k_blocks: mean keys of the blocks.
      lse: base-2 log-sum-exp of the compression branch, P a multiple of 64 and no less than T.
      last: last block of each 64 tokens' candidates, -1 where there is none.
      start: first token of this chunk, a multiple of 64.
      queries: tokens of this chunk (C), a multiple of 64.
      columns: blocks per row of the result.

    Returns:
      Importances, a row per batch row and KV head (R = B x N). Tiles past the last candidate are not written.
    """
    batch, _, heads, group, size = q.shape
    rows, tiles = batch * heads, queries // TILE_ROWS
    programs = min(rows * tiles, config.programs)
    width = config.columns
    key_tiles = -(-k_blocks.shape[1] // width)
    stages, consumers = config.stages, config.consumers
    scale = size**-0.5 * gpu.LOG2_E

    def body(
        q_ref, k_ref, lse_ref, last_ref, start_ref, scores_ref, q_smem, lse_smem, k_smem, q_loaded, q_free, loaded, free
    ):
        warpgroup = lax.axis_index("warpgroup")
        first = lax.div(start_ref[0], TILE_ROWS)

        def place_of(i: Any) -> tuple[Any, Any]:
            """Row and tile of the calling thread block's i-th piece of work: the longest first, back and forth."""
            program = lax.axis_index("program")
            item = i * programs + jnp.where(lax.rem(i, 2) == 0, program, programs - 1 - program)
            return lax.rem(item, rows), tiles - 1 - lax.div(item, rows)

        def means_of(i: Any) -> Any:
            """How many tiles of block means the piece's tokens see; 0 past the last piece."""
            row, tile = place_of(i)
            seen = lax.div(last_ref[lax.div(row, heads), first + jnp.maximum(tile, 0)] + width, width)
            return jnp.where(tile >= 0, jnp.minimum(seen, key_tiles), 0)

        def over_pieces(work: Callable[..., None]) -> Any:
            """Runs work(batch row, KV head, tile, tiles of means, those before); returns the tiles of means in all."""

            def step(i: Any, state: Any) -> Any:
                count, done = state
                # Read ahead: by the next piece it has arrived.
                following = means_of(i + 1)
                row, tile = place_of(i)
                pl.when(count > 0)(lambda: work(lax.div(row, heads), lax.rem(row, heads), tile, count, done))
                return following, done + count

            return lax.fori_loop(0, -(-rows * tiles // programs), step, (means_of(jnp.int32(0)), jnp.int32(0)))[1]

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[consumers][0], action="increase")

            def score(b: Any, n: Any, tile: Any, count: Any, done: Any) -> None:
                own = lax.rem(consumers - lax.rem(done, consumers) + warpgroup, consumers)

                # A barrier's phase is lost on who skips one: every warpgroup passes every tile.
                @pl.loop(0, count)
                def _(j):
                    slot = lax.rem(done + j, stages)
                    turn = lax.rem(j, consumers) == own
                    plgpu.barrier_wait(loaded.at[slot])

                    @pl.when(turn)
                    def _():
                        queries = _Queries(
                            q_smem,
                            lse_smem,
                            lambda g: pl.when(j < consumers)(lambda: plgpu.barrier_wait(q_loaded.at[g])),
                            lambda g: pl.when(j >= count - consumers)(lambda: plgpu.barrier_arrive(q_free.at[g])),
                        )
                        total = _sum_over_heads(queries, k_smem.at[slot], scale, free.at[slot])
                        at = (pl.ds(tile * TILE_ROWS, TILE_ROWS), pl.ds(pl.multiple_of(j * width, width), width))
                        scores_ref.at[b * heads + n][at] = total

                    pl.when(jnp.logical_not(turn))(lambda: plgpu.barrier_arrive(free.at[slot]))

                @pl.when(own >= count)
                def _():
                    for g in range(group):
                        plgpu.barrier_wait(q_loaded.at[g])
                        plgpu.barrier_arrive(q_free.at[g])

            over_pieces(score)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[consumers][1], action="decrease")

            def fetch(b: Any, n: Any, tile: Any, count: Any, done: Any) -> None:
                tokens = pl.ds(pl.multiple_of((first + tile) * TILE_ROWS, TILE_ROWS), TILE_ROWS)

                def fetch_means(j: Any) -> None:
                    slot = lax.rem(done + j, stages)
                    pl.when(done + j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    means = pl.ds(pl.multiple_of(j * width, width), width)
                    plgpu.copy_gmem_to_smem(k_ref.at[b, means, n], k_smem.at[slot], loaded.at[slot])

                for g in range(group):
                    pl.when(done > 0)(lambda g=g: plgpu.barrier_wait(q_free.at[g]))
                    plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, n, g], q_smem.at[g], q_loaded.at[g])
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, n, g, tokens], lse_smem.at[g], q_loaded.at[g])
                    if g == 0:
                        fetch_means(jnp.int32(0))
                pl.loop(1, count)(fetch_means)

            done = over_pieces(fetch)

            # No barrier may complete after its last wait.
            @pl.when(done > 0)
            def _():
                for g in range(group):
                    plgpu.barrier_wait(q_free.at[g])

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(place):
                plgpu.barrier_wait(free.at[lax.rem(place, stages)])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, queries, columns), jnp.float32),
        scratch_types=(
            gpu.tile_memory((group, TILE_ROWS, size), q.dtype),
            plgpu.SMEM((group, TILE_ROWS), jnp.float32),
            gpu.tile_memory((stages, width, size), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=group),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=group),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k_blocks, lse, last, start)


class _Queries(NamedTuple):
    """A tile's queries as a warpgroup reads them.

    Attributes:
      tiles: [G, 64, D].
      lse: [G, 64].
      wait: (head) -> waits until they are there.
      release: (head) -> they may be replaced.
    """

    tiles: gpu.Ref
    lse: gpu.Ref
    wait: Callable[[Any], None]
    release: Callable[[Any], None]


def _sum_over_heads(queries: _Queries, k_tile: gpu.Ref, scale: float, free: gpu.Ref) -> jax.Array:
    """Sums exp2(Q_g K^T scale - lse_g) over the heads; the other warpgroups multiply while this one takes exponents.

    The loop is not unrolled: addresses of seven heads' tiles, known before the loop over the means, would be kept from
    there on, more than there are registers.
    """
    heads, accumulator = queries.tiles.shape[0], plgpu.ACC((TILE_ROWS, k_tile.shape[0]), jnp.float32)

    def add(g: Any, total: jax.Array) -> jax.Array:
        def multiply(acc: gpu.Ref) -> tuple[jax.Array, jax.Array]:
            queries.wait(g)
            plgpu.wgmma(acc, queries.tiles.at[g], k_tile.transpose((1, 0)))
            lse = plgpu.load(queries.lse.at[g], layout=ROW_LAYOUT, optimized=False)
            return acc[...], lse

        s, lse = pl.run_scoped(multiply, accumulator)
        queries.release(g)
        pl.when(g == heads - 1)(lambda: plgpu.barrier_arrive(free))
        return total + jnp.exp2(s * scale - lax.broadcast_in_dim(lse, s.shape, [0]))

    none = plgpu.layout_cast(jnp.zeros(accumulator.shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, heads, add, none)
