"""Interval attention on Hopper, backward: dq over tiles of queries, dk and dv over tiles of keys."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from pallas_kernels import gpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.gpu import COLUMN_LAYOUT, HIDDEN, ROW_LAYOUT, TILE_ROWS
from pallas_kernels.gpu_flash_config import CONSUMERS, KEY_ROWS, KeyConfig, QueryConfig
from pallas_kernels.gpu_flash_kernels import (
    decode_item,
    drain,
    fetch,
    fetch_keys,
    fetch_tile,
    key_mask,
    launch,
    over_items,
    result_memory,
    share_registers,
    three_loops,
    tile_copies,
    tile_results,
    write_tile,
)
from pallas_kernels.gpu_flash_plan import Tiles


def row_terms(
    tiles: Tiles, lse: Float32[jax.Array, "R tiles 64"], delta: Float32[jax.Array, "B T N G"]
) -> Float32[jax.Array, "R tiles 2 64"]:
    """What each row of a tile subtracts: the base-2 log-sum-exp of its exponents, and delta of its dP.

    Rows that see nothing have HIDDEN, and delta 0.
    """
    # Rows of no query have a log-sum-exp, too: of zeros.
    empty = (lse == EMPTY_LSE) | tiles.absent_rows()
    delta = jnp.where(empty, 0.0, tiles.pack(delta, 0.0))
    return jnp.stack([jnp.where(empty, HIDDEN, lse * gpu.LOG2_E), delta], axis=2)


def query_gradient(
    config: QueryConfig,
    programs: int,
    interpret: Any,
    tiles: Tiles,
    window: int | None,
    q: Float[jax.Array, "B T N G D"],
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    do: Float[jax.Array, "B T N G D"],
    terms: Float32[jax.Array, "R tiles 2 64"],
    ends: Int32[jax.Array, "B stripes 64"],
    items: Int32[jax.Array, "items 5"],
) -> jax.Array:
    """The gradient of q, as `tile_results` says."""
    size = q.shape[4]
    scale = size**-0.5 * gpu.LOG2_E
    consumers, stages = config.consumers, config.stages
    count = items.shape[0]
    programs = min(count, programs)
    bounded = len(k)

    def body(q_ref, do_ref, terms_ref, ends_ref, items_ref, *rest):
        k_refs, v_refs = rest[:bounded], rest[bounded : 2 * bounded]
        dq_ref, q_smem, do_smem, k_smem, v_smem, terms_smem, ends_smem, *rest = rest[2 * bounded :]
        *dq_smem, q_ready, q_free, k_loaded, v_loaded, k_free, v_free = rest
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            share_registers(consumers, "increase")
            q_tile, do_tile = q_smem.at[warpgroup], do_smem.at[warpgroup]

            def differentiate(_, item, about, done):
                begin, steps, whole_from, whole_to, _ = about
                part, b, n, place = decode_item(tiles, config, item)
                tile = tiles.count - 1 - place - warpgroup
                plgpu.barrier_wait(q_ready)
                row_end = plgpu.load(ends_smem.at[warpgroup], layout=ROW_LAYOUT)
                shift, delta = (plgpu.load(terms_smem.at[warpgroup, i], layout=ROW_LAYOUT) for i in range(2))

                def step(i, dq, masked):
                    slot = lax.rem(done + i, stages)
                    shape = (TILE_ROWS, config.keys)
                    plgpu.barrier_wait(k_loaded.at[slot])
                    plgpu.barrier_wait(v_loaded.at[slot])

                    def logits_and_dp(s_ref, dp_ref):
                        plgpu.wgmma(s_ref, q_tile, k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_ref, do_tile, v_smem.at[slot].transpose((1, 0)))
                        # The exponentials run beside the second product.
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        p = jnp.exp2(s * scale - lax.broadcast_in_dim(shift, shape, [0]))
                        if masked:
                            p = jnp.where(key_mask(row_end, begin + i * config.keys, config.keys, window), p, 0.0)
                        return p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)

                    p, dp = pl.run_scoped(logits_and_dp, *[plgpu.ACC(shape, jnp.float32)] * 2)
                    plgpu.barrier_arrive(v_free.at[slot])

                    @pl.when(i + 1 == steps)
                    def _():
                        plgpu.barrier_arrive(q_free)

                    ds = p * (dp - lax.broadcast_in_dim(delta, shape, [0]))
                    dq = gpu.add_product(dq, ds.astype(q_ref.dtype), k_smem.at[slot], interpret)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return dq

                dq = plgpu.layout_cast(jnp.zeros((TILE_ROWS, size), jnp.float32), plgpu.Layout.WGMMA)
                dq = three_loops((0, whole_from, whole_to, steps), step, dq, window is not None)

                @pl.when(steps == 0)
                def _():
                    plgpu.barrier_arrive(q_free)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                # Query and cotangent of a row without keys may be NaN.
                empty = lax.broadcast_in_dim(row_end <= 0, dq.shape, [0])
                dq = jnp.where(empty, 0.0, dq * size**-0.5)
                write_tile(tiles, dq, dq_smem, dq_ref, part, b, n, tile)
                return done + steps

            over_items(count, programs, 5, items_ref, differentiate, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == consumers)
        def _():
            share_registers(consumers, "decrease")

            def fetch_item(i, item, about, done):
                _, b, n, place = decode_item(tiles, config, item)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(q_free)

                for c in range(consumers):
                    tile = jnp.maximum(tiles.count - 1 - place - c, 0)
                    fetch_tile(tiles, q_ref, b, n, tile, q_smem.at[c], q_ready)
                    fetch_tile(tiles, do_ref, b, n, tile, do_smem.at[c], q_ready)
                    stripe = lax.div(tile, tiles.heads_apart)
                    plgpu.copy_gmem_to_smem(ends_ref.at[b, stripe], ends_smem.at[c], q_ready)
                    plgpu.copy_gmem_to_smem(terms_ref.at[b * tiles.heads + n, tile], terms_smem.at[c], q_ready)
                sources = ((k_refs, k_smem, k_loaded, k_free), (v_refs, v_smem, v_loaded, v_free))
                return fetch_keys(config, sources, about, done, b, n)

            done = over_items(count, programs, 5, items_ref, fetch_item, jnp.int32(0))
            plgpu.barrier_wait(q_free)
            drain(stages, done, (k_free, v_free))

    pieces = config.keys // KEY_ROWS
    return plgpu.kernel(
        body,
        out_type=tile_results(config.parts, tiles, q),
        scratch_types=(
            gpu.tile_memory((consumers, TILE_ROWS, size), q.dtype),
            gpu.tile_memory((consumers, TILE_ROWS, size), q.dtype),
            gpu.tile_memory((stages, config.keys, size), q.dtype),
            gpu.tile_memory((stages, config.keys, size), q.dtype),
            plgpu.SMEM((consumers, 2, TILE_ROWS), jnp.float32),
            plgpu.SMEM((consumers, TILE_ROWS), jnp.int32),
            *result_memory(config.parts, consumers, size, q.dtype),
            plgpu.Barrier(num_arrivals=consumers * (2 * tile_copies(tiles) + 2)),
            plgpu.Barrier(num_arrivals=consumers),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ),
        interpret=interpret,
        **launch(count, programs, consumers),
    )(q, do, terms, ends, items, *k, *v)


def key_gradients(
    config: KeyConfig,
    programs: int,
    interpret: Any,
    tiles: Tiles,
    window: int | None,
    q: tuple[jax.Array, ...],
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    do: tuple[jax.Array, ...],
    terms: Float32[jax.Array, "R tiles 2 64"],
    ends: Int32[jax.Array, "B stripes 64"],
    items: Int32[jax.Array, "items 10"],
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v [B, S, N, D]; of parts of the queries, float32 pieces of 64 keys [PR, pieces, 64, D].

    Transposed products keep the probabilities in registers: S^T = K Q^T and dP^T = V dO^T are the left operands of
    dV += P^T dO and dK += dS^T Q.
    """
    keys, size = k[0].shape[1], k[0].shape[3]
    dtype = k[0].dtype
    scale = size**-0.5 * gpu.LOG2_E
    stages = config.stages
    count = items.shape[0]
    programs = min(count, programs)
    bounded, bounded_keys = len(q), len(k)

    def body(terms_ref, ends_ref, items_ref, *rest):
        q_refs, do_refs, rest = rest[:bounded], rest[bounded : 2 * bounded], rest[2 * bounded :]
        k_refs, v_refs, rest = rest[:bounded_keys], rest[bounded_keys : 2 * bounded_keys], rest[2 * bounded_keys :]
        dk_ref, dv_ref, k_smem, v_smem, q_smem, do_smem, terms_smem, ends_smem, *rest = rest
        *out_smem, keys_ready, keys_free, loaded, free = rest
        warpgroup = lax.axis_index("warpgroup")

        def decode(item):
            part = lax.rem(item, config.parts)
            row = lax.rem(lax.div(item, config.parts), tiles.rows)
            key_tile = lax.div(item, config.parts * tiles.rows)
            return part, lax.div(row, tiles.heads), lax.rem(row, tiles.heads), key_tile

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            k_tile, v_tile = k_smem.at[warpgroup], v_smem.at[warpgroup]
            shape = (KEY_ROWS, TILE_ROWS)

            def differentiate(_, item, about, done):
                steps = about[1]
                first, whole_from, whole_to, last = (
                    jnp.where(warpgroup == 0, x, y) for x, y in zip(about[2:6], about[6:], strict=True)
                )
                part, b, n, key_tile = decode(item)
                origin = (key_tile * CONSUMERS + warpgroup) * KEY_ROWS
                plgpu.barrier_wait(keys_ready)

                def sees(end):
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    seen = key < lax.broadcast_in_dim(end - origin, shape, [1])
                    if window is None:
                        return seen
                    return seen & (key >= lax.broadcast_in_dim(end - (origin + window), shape, [1]))

                def skip(i, _):
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                def step(i, carry, masked):
                    dk, dv = carry
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    q_tile, do_tile = q_smem.at[slot], do_smem.at[slot]

                    def logits_and_dp(s_ref, dp_ref):
                        plgpu.wgmma(s_ref, k_tile, q_tile.transpose((1, 0)))
                        plgpu.wgmma(dp_ref, v_tile, do_tile.transpose((1, 0)))
                        shift = plgpu.load(terms_smem.at[slot, 0], layout=COLUMN_LAYOUT)
                        # The exponentials run beside the second product.
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        p = jnp.exp2(s * scale - lax.broadcast_in_dim(shift, shape, [1]))
                        if masked:
                            p = jnp.where(sees(plgpu.load(ends_smem.at[slot], layout=COLUMN_LAYOUT)), p, 0.0)
                        return p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)

                    p, dp = pl.run_scoped(logits_and_dp, *[plgpu.ACC(shape, jnp.float32)] * 2)
                    delta = plgpu.load(terms_smem.at[slot, 1], layout=COLUMN_LAYOUT)

                    def ds():
                        return (p * (dp - lax.broadcast_in_dim(delta, shape, [1]))).astype(dtype)

                    if interpret is None:

                        def accumulate(refs):
                            dk_ref, dv_ref = refs
                            plgpu.wgmma(dv_ref, p.astype(dtype), do_tile)
                            plgpu.wgmma(dk_ref, ds(), q_tile)

                        dk, dv = pl.run_state(accumulate)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                    else:
                        dv = gpu.add_product(dv, p.astype(dtype), do_tile, interpret)
                        dk = gpu.add_product(dk, ds(), q_tile, interpret)
                    plgpu.barrier_arrive(free.at[slot])
                    return dk, dv

                zero = plgpu.layout_cast(jnp.zeros((KEY_ROWS, size), jnp.float32), plgpu.Layout.WGMMA)
                lax.fori_loop(0, first, skip, None)
                # Without a window, too, the first tiles of queries are those that see a part of the keys.
                dk, dv = three_loops((first, whole_from, whole_to, last), step, (zero, zero), True)
                lax.fori_loop(last, steps, skip, None)
                plgpu.barrier_arrive(keys_free)

                for value, target in ((dk * size**-0.5, dk_ref), (dv, dv_ref)):
                    if not out_smem:
                        target[part * tiles.rows + b * tiles.heads + n, key_tile * CONSUMERS + warpgroup] = value
                        continue
                    staged = out_smem[0].at[warpgroup]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staged[...] = value.astype(dtype)
                    plgpu.commit_smem()

                    @pl.when(origin < keys)
                    def _(target=target, staged=staged):
                        rows = pl.ds(pl.multiple_of(origin, KEY_ROWS), KEY_ROWS)
                        plgpu.copy_smem_to_gmem(staged, target.at[b, rows, n])

                return done + steps

            over_items(count, programs, 10, items_ref, differentiate, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def fetch_item(i, item, about, done):
                first, steps = about[:2]
                _, b, n, key_tile = decode(item)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(keys_free)

                for c in range(CONSUMERS):
                    index = key_tile * CONSUMERS + c
                    fetch(k_refs, b, index, (n,), k_smem.at[c], keys_ready)
                    fetch(v_refs, b, index, (n,), v_smem.at[c], keys_ready)

                def step(i, _):
                    place = done + i
                    slot = lax.rem(place, stages)
                    tile = first + i

                    @pl.when(place >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    stripe = lax.div(tile, tiles.heads_apart)
                    for refs, ring in ((q_refs, q_smem), (do_refs, do_smem)):
                        if tiles.tokens == TILE_ROWS:
                            where = (n, lax.rem(tile, tiles.heads_apart))
                            fetch(refs, b, stripe, where, ring.at[slot], loaded.at[slot])
                        else:
                            fetch_tile(tiles, refs[0], b, n, tile, ring.at[slot], loaded.at[slot])
                    plgpu.copy_gmem_to_smem(ends_ref.at[b, stripe], ends_smem.at[slot], loaded.at[slot])
                    terms_of = terms_ref.at[b * tiles.heads + n, tile]
                    plgpu.copy_gmem_to_smem(terms_of, terms_smem.at[slot], loaded.at[slot])

                lax.fori_loop(0, steps, step, None)
                return done + steps

            done = over_items(count, programs, 10, items_ref, fetch_item, jnp.int32(0))
            plgpu.barrier_wait(keys_free)
            drain(stages, done, (free,))

    if config.parts == 1:
        out = jax.ShapeDtypeStruct(k[0].shape, dtype)
    else:
        pieces = count // (config.parts * tiles.rows) * CONSUMERS
        out = jax.ShapeDtypeStruct((config.parts * tiles.rows, pieces, KEY_ROWS, size), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=(out, out),
        scratch_types=(
            gpu.tile_memory((CONSUMERS, KEY_ROWS, size), dtype),
            gpu.tile_memory((CONSUMERS, KEY_ROWS, size), dtype),
            gpu.tile_memory((stages, TILE_ROWS, size), dtype),
            gpu.tile_memory((stages, TILE_ROWS, size), dtype),
            plgpu.SMEM((stages, 2, TILE_ROWS), jnp.float32),
            plgpu.SMEM((stages, TILE_ROWS), jnp.int32),
            *result_memory(config.parts, CONSUMERS, size, dtype),
            plgpu.Barrier(num_arrivals=2 * CONSUMERS),
            plgpu.Barrier(num_arrivals=CONSUMERS),
            plgpu.Barrier(num_arrivals=2 * tile_copies(tiles) + 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        interpret=interpret,
        **launch(count, programs, CONSUMERS),
    )(terms, ends, items, *q, *do, *k, *v)
