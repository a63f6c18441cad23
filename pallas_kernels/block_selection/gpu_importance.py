"""Importances of blocks on Hopper: the group's probabilities summed in registers, a tile of queries at a time."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from pallas_kernels import gpu
from pallas_kernels.block_selection.gpu_config import CONSUMERS, Config
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

    A thread block keeps the queries of 64 tokens and all heads of one KV head in shared memory and walks over the block
    means, a tile at a time, up to its tokens' last candidate. Its warpgroups take turns at the tiles.

    Args:
      config: tiles of block means.
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
    width = config.columns
    key_tiles = -(-k_blocks.shape[1] // width)
    stages = config.stages
    scale = size**-0.5 * gpu.LOG2_E

    def body(q_ref, k_ref, lse_ref, last_ref, start_ref, scores_ref, q_smem, k_smem, q_ready, loaded, consumed):
        row, tile = lax.axis_index("row"), lax.axis_index("tile")
        b, n = lax.div(row, heads), lax.rem(row, heads)
        warpgroup = lax.axis_index("warpgroup")
        index = lax.div(start_ref[0], TILE_ROWS) + tile
        tokens = pl.ds(pl.multiple_of(index * TILE_ROWS, TILE_ROWS), TILE_ROWS)
        count = jnp.minimum(lax.div(last_ref[b, index] + width, width), key_tiles)

        @pl.when((warpgroup < CONSUMERS) & (count > 0))
        def _():
            plgpu.set_max_registers(232, action="increase")
            shifts = [plgpu.load(lse_ref.at[b, n, g, tokens], layout=ROW_LAYOUT, optimized=False) for g in range(group)]
            plgpu.barrier_wait(q_ready)

            # A barrier's phase is lost on who skips one: every warpgroup passes every tile.
            @pl.loop(0, count)
            def _(j):
                slot = lax.rem(j, stages)
                turn = lax.rem(j, CONSUMERS)
                plgpu.barrier_wait(loaded.at[slot])

                @pl.when(turn == warpgroup)
                def _():
                    total = _sum_over_heads(q_smem, k_smem.at[slot], shifts, scale, consumed.at[slot])
                    place = (pl.ds(tile * TILE_ROWS, TILE_ROWS), pl.ds(pl.multiple_of(j * width, width), width))
                    scores_ref.at[row][place] = total

                @pl.when(turn != warpgroup)
                def _():
                    plgpu.barrier_arrive(consumed.at[slot])

        @pl.when((warpgroup == CONSUMERS) & (count > 0))
        def _():
            plgpu.set_max_registers(40, action="decrease")
            for g in range(group):
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, n, g], q_smem.at[g], q_ready)

            @pl.loop(0, count)
            def _(j):
                slot = lax.rem(j, stages)

                @pl.when(j >= stages)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                means = pl.ds(pl.multiple_of(j * width, width), width)
                plgpu.copy_gmem_to_smem(k_ref.at[b, means, n], k_smem.at[slot], loaded.at[slot])

            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(j):
                plgpu.barrier_wait(consumed.at[lax.rem(j, stages)])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * heads, queries, columns), jnp.float32),
        scratch_types=(
            gpu.tile_memory((group, TILE_ROWS, size), q.dtype),
            gpu.tile_memory((stages, width, size), q.dtype),
            plgpu.Barrier(num_arrivals=group),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        grid=(batch * heads, queries // TILE_ROWS),
        grid_names=("row", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k_blocks, lse, last, start)


def _sum_over_heads(
    q_smem: gpu.Ref, k_tile: gpu.Ref, shifts: list[jax.Array], scale: float, consumed: gpu.Ref
) -> jax.Array:
    """Sums exp2(Q_g K^T scale - shift_g) over the heads; head g + 1 multiplies while head g takes its exponents."""
    accumulator = plgpu.ACC((TILE_ROWS, k_tile.shape[0]), jnp.float32)

    def start(acc: gpu.Ref, g: int) -> None:
        plgpu.wgmma(acc, q_smem.at[g], k_tile.transpose((1, 0)))

    def add(total: jax.Array, s: jax.Array, g: int) -> jax.Array:
        return total + jnp.exp2(s * scale - lax.broadcast_in_dim(shifts[g], s.shape, [0]))

    def finish(acc: gpu.Ref, g: int, total: jax.Array) -> jax.Array:
        if g + 1 == len(shifts):
            s = plgpu.wgmma_accumulator_load(acc, wait_n=0)
            plgpu.barrier_arrive(consumed)
            return add(total, s, g)

        def with_next(following: gpu.Ref) -> jax.Array:
            start(following, g + 1)
            return finish(following, g + 1, add(total, plgpu.wgmma_accumulator_load(acc, wait_n=1), g))

        return pl.run_scoped(with_next, accumulator)

    def first(acc: gpu.Ref) -> jax.Array:
        start(acc, 0)
        return finish(acc, 0, plgpu.layout_cast(jnp.zeros(accumulator.shape, jnp.float32), plgpu.Layout.WGMMA))

    return pl.run_scoped(first, accumulator)
