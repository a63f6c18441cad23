"""Selected attention on Hopper, backward: dq over tiles of queries, dk and dv over the queries of a block."""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32

from pallas_kernels import gpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.gpu import COLUMN_LAYOUT, HIDDEN, ROW_LAYOUT, WARPS
from pallas_kernels.selected_attention import gpu_tiles as tiling
from pallas_kernels.selected_attention.gpu_config import (
    PAIR,
    REGISTERS,
    ROWS,
    TOKENS,
    BlockConfig,
    TileConfig,
)
from pallas_kernels.selected_attention.gpu_lists import BlockLists, TileLists
from pallas_kernels.selected_attention.gpu_tiles import BLOCK


def row_terms(
    lse: Float32[jax.Array, "B T N G"], delta: Float32[jax.Array, "B T N G"]
) -> tuple[Float32[jax.Array, "R P"], Float32[jax.Array, "R P"]]:
    """What each row of a tile subtracts: the base-2 log-sum-exp of its exponents and delta of its dP.

    Both are laid out as 8 rows per token; rows of no query have HIDDEN and 0.
    """
    batch, queries, heads, group = lse.shape
    empty = lse == EMPTY_LSE
    past = padded_tokens(queries) - queries

    def in_rows(x: jax.Array, fill: float) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, past), (0, 0), (0, ROWS - group)], constant_values=fill)
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, -1)

    shift = jnp.where(empty, HIDDEN, lse * gpu.LOG2_E)
    return in_rows(shift, HIDDEN), in_rows(jnp.where(empty, 0.0, delta), 0.0)


def padded_tokens(queries: int) -> int:
    """Tokens of `row_terms`' arrays: whole tiles of any number of warpgroups."""
    whole = math.lcm(*(consumers * TOKENS for consumers in REGISTERS))
    return -(-queries // whole) * whole


def query_gradient(
    config: TileConfig,
    interpret: Any,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    shift: Float32[jax.Array, "R P"],
    delta: Float32[jax.Array, "R P"],
    lists: TileLists,
) -> Float[jax.Array, "B T N G D"]:
    """The gradient of q: the forward's walk over the blocks of a tile, with the probabilities from the log-sum-exp."""
    queries, heads, size = q.shape[1], q.shape[2], q.shape[4]
    rows, tiles, pieces, width = lists.entries.shape
    consumers, stages = config.consumers, config.stages
    scale = size**-0.5 * gpu.LOG2_E

    def body(q_ref, k_ref, v_ref, do_ref, shift_ref, delta_ref, entries_ref, tiles_ref, dq_ref, *scratch):
        q_smem, do_smem, k_smem, v_smem, shift_smem, delta_smem, entries_smem = scratch[:7]
        tile_ready, list_ready, loaded, consumed = scratch[7:]
        tile = tiling.this_tile()
        entries = tiling.List(entries_smem)
        b, n = lax.div(tile.row, heads), lax.rem(tile.row, heads)
        warpgroup = lax.axis_index("warpgroup")
        count, whole, start, last = tile.about(tiles_ref)

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[consumers][0], action="increase")
            q_tile, do_tile, ready = q_smem.at[warpgroup], do_smem.at[warpgroup], tile_ready.at[warpgroup]
            offset = warpgroup * TOKENS
            first = tile.index * config.tokens + offset
            tiling.fetch_tokens(q_ref, q_tile, ready, b, n, first, last)
            tiling.fetch_tokens(do_ref, do_tile, ready, b, n, first, last)
            terms = pl.ds(first * ROWS, TOKENS * ROWS)
            plgpu.copy_gmem_to_smem(shift_ref.at[tile.row, terms], shift_smem.at[warpgroup], ready)
            plgpu.copy_gmem_to_smem(delta_ref.at[tile.row, terms], delta_smem.at[warpgroup], ready)
            plgpu.barrier_wait(list_ready)
            plgpu.barrier_wait(ready)
            own_shift = plgpu.load(shift_smem.at[warpgroup], layout=ROW_LAYOUT)
            own_delta = plgpu.load(delta_smem.at[warpgroup], layout=ROW_LAYOUT)
            q_left, do_left = (gpu.hold(x, config.q_registers) for x in (q_tile, do_tile))

            def step(i, dq, causal):
                slot = lax.rem(i, stages)
                mask = entries.mask(i, warpgroup)
                plgpu.barrier_wait(loaded.at[slot])

                def attend(dq):
                    def logits_gradient(s, dp):
                        if causal:
                            s = jnp.where(tiling.causal_mask(entries.block(i), start + offset), s, -HIDDEN)
                        row_shift = jnp.where(tiling.chosen_rows(mask), own_shift, HIDDEN)
                        p = jnp.exp2(s * scale - lax.broadcast_in_dim(row_shift, s.shape, [0]))
                        return p * (dp() - lax.broadcast_in_dim(own_delta, s.shape, [0]))

                    parts = (
                        gpu.times_transpose(q_left, k_smem.at[slot]),
                        gpu.times_transpose(do_left, v_smem.at[slot]),
                    )
                    ds = gpu.products_in_flight(*parts, BLOCK, logits_gradient, interpret)
                    return gpu.add_product(dq, ds.astype(k_ref.dtype), k_smem.at[slot], interpret)

                dq = lax.cond(mask != 0, attend, lambda dq: dq, dq)
                plgpu.barrier_arrive(consumed.at[slot])
                return dq

            dq = plgpu.layout_cast(jnp.zeros((TOKENS * ROWS, size), jnp.float32), plgpu.Layout.WGMMA)
            dq = lax.fori_loop(0, whole, functools.partial(step, causal=False), dq)
            dq = lax.fori_loop(whole, count, functools.partial(step, causal=True), dq)
            # The cotangent of a query without keys may be NaN.
            empty = lax.broadcast_in_dim(own_shift >= HIDDEN, dq.shape, [0])
            q_tile[...] = jnp.where(empty, 0.0, dq * size**-0.5).astype(dq_ref.dtype)
            plgpu.commit_smem()
            tiling.store_tokens(q_tile, dq_ref, b, n, first, queries)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[consumers][1], action="decrease")
            plgpu.copy_gmem_to_smem(entries_ref.at[tile.row, tile.index], entries_smem, list_ready)
            plgpu.barrier_wait(list_ready)
            tensors = ((k_ref, k_smem), (v_ref, v_smem))
            tiling.fetch_blocks(config, count, entries, tensors, loaded, consumed, b, n)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            gpu.tile_memory((consumers, TOKENS * ROWS, size), q.dtype),
            gpu.tile_memory((consumers, TOKENS * ROWS, size), q.dtype),
            gpu.tile_memory((stages, BLOCK, size), q.dtype),
            gpu.tile_memory((stages, BLOCK, size), q.dtype),
            plgpu.SMEM((consumers, TOKENS * ROWS), jnp.float32),
            plgpu.SMEM((consumers, TOKENS * ROWS), jnp.float32),
            plgpu.SMEM((pieces, width), jnp.int32),
            plgpu.Barrier(num_arrivals=2 * TOKENS + 2, num_barriers=consumers),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ),
        interpret=interpret,
        **tiling.launch(config, rows, tiles),
    )(q, k, v, do, shift, delta, lists.entries, lists.tiles)


def key_gradients(
    config: BlockConfig,
    interpret: Any,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    shift: Float32[jax.Array, "R P"],
    delta: Float32[jax.Array, "R P"],
    lists: BlockLists,
) -> tuple[Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """The gradients of k and v: each block gathers the tokens that chose it, 8 at a time, and wastes no product.

    Two warpgroups take turns at the groups of 8 and add up their sums; the parts of a split list are added in float32
    after the kernel. Both orders are fixed, so the same inputs give the same bits.
    """
    queries, heads, size = q.shape[1], q.shape[2], q.shape[4]
    scale = size**-0.5 * gpu.LOG2_E
    stages = config.stages
    terms = terms_in_lists(shift, delta, lists, queries)

    def body(q_ref, k_ref, v_ref, do_ref, terms_ref, tokens_ref, items_ref, dk_ref, dv_ref, *rest):
        partial_refs = rest[: 2 * (lists.slots > 0)]
        k_smem, v_smem, q_smem, do_smem, terms_smem, sum_smem = rest[len(partial_refs) :][:6]
        block_ready, loaded, consumed, full, free = rest[len(partial_refs) + 6 :]
        item = lax.axis_index("item")
        row, block, begin, end, partial_end, slot, origin = (items_ref[item, i] for i in range(7))
        b, n = lax.div(row, heads), lax.rem(row, heads)
        warpgroup = lax.axis_index("warpgroup")
        keys = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
        steps = lax.div(end - begin + TOKENS - 1, TOKENS)

        def token_at(place):
            return tokens_ref[jnp.maximum(jnp.minimum(begin + place, end - 1), 0)]

        @pl.when((warpgroup < PAIR) & (row >= 0))
        def _():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(block_ready)

            def turn(j, carry, causal):
                dk, dv = carry
                i = j * PAIR + warpgroup
                stage = lax.rem(i, stages)
                plgpu.barrier_wait(loaded.at[stage])
                q_tile, do_tile = q_smem.at[stage], do_smem.at[stage]
                there = _column_token() < end - begin - i * TOKENS
                row_shift = jnp.where(there, plgpu.load(terms_smem.at[stage, 0], layout=COLUMN_LAYOUT), HIDDEN)
                row_delta = plgpu.load(terms_smem.at[stage, 1], layout=COLUMN_LAYOUT)

                s = gpu.product(k_smem, q_tile.transpose((1, 0)), TOKENS * ROWS)
                if causal:
                    group = tuple(token_at(i * TOKENS + t) for t in range(TOKENS))
                    s = jnp.where(_sees(group, origin), s, -HIDDEN)
                p = jnp.exp2(s * scale - lax.broadcast_in_dim(row_shift, s.shape, [1]))
                dv, dp = gpu.add_two_products(
                    (dv, plgpu.layout_cast(jnp.zeros(s.shape, jnp.float32), plgpu.Layout.WGMMA)),
                    (p.astype(q_ref.dtype), v_smem),
                    (do_tile, do_tile.transpose((1, 0))),
                    interpret,
                )
                ds = p * (dp - lax.broadcast_in_dim(row_delta, s.shape, [1]))
                dk = gpu.add_product(dk, ds.astype(q_ref.dtype), q_tile, interpret)
                plgpu.barrier_arrive(consumed.at[stage])
                return dk, dv

            def turns(steps):
                return lax.div(steps - warpgroup + PAIR - 1, PAIR)

            seen_in_part = lax.div(jnp.clip(partial_end - begin, 0, end - begin) + TOKENS - 1, TOKENS)
            zero = plgpu.layout_cast(jnp.zeros((BLOCK, size), jnp.float32), plgpu.Layout.WGMMA)
            carry = lax.fori_loop(0, turns(seen_in_part), functools.partial(turn, causal=True), (zero, zero))
            carry = lax.fori_loop(turns(seen_in_part), turns(steps), functools.partial(turn, causal=False), carry)
            dk, dv = carry[0] * size**-0.5, carry[1]

            outputs = ((dk, k_smem, dk_ref), (dv, v_smem, dv_ref))

            @pl.when(warpgroup == 1)
            def _():
                for i, (mine, _, _) in enumerate(outputs):
                    if i > 0:
                        plgpu.barrier_wait(free)
                    sum_smem[...] = mine
                    plgpu.barrier_arrive(full)

            @pl.when(warpgroup == 0)
            def _():
                for i, (mine, tile, target) in enumerate(outputs):
                    plgpu.barrier_wait(full)
                    total = mine + sum_smem[...]

                    @pl.when(slot < 0)
                    def _(total=total, tile=tile, target=target):
                        tile[...] = total.astype(target.dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(tile, target.at[b, keys, n])

                    if partial_refs:

                        @pl.when(slot >= 0)
                        def _(total=total, i=i):
                            sum_smem[...] = total
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(sum_smem, partial_refs[i].at[slot])
                            plgpu.wait_smem_to_gmem(0)

                    if i == 0:
                        plgpu.barrier_arrive(free)
                plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == PAIR) & (row >= 0))
        def _():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, n], k_smem, block_ready)
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, n], v_smem, block_ready)

            # A group of 8 tokens is 16 small copies and one of its terms; four warps start them at once.
            @plgpu.warp_map
            def _(warp):
                own = tuple(warp * (TOKENS // WARPS) + t for t in range(TOKENS // WARPS))

                def fetch(i, tokens):
                    stage = lax.rem(i, stages)
                    # Read ahead: by the next step they have arrived.
                    following = tuple(token_at((i + 1) * TOKENS + t) for t in own)

                    @pl.when(i >= stages)
                    def _():
                        plgpu.barrier_wait(consumed.at[stage])

                    for t, token in zip(own, tokens, strict=True):
                        tile = pl.ds(t * ROWS, ROWS)
                        heads_of = (b, token, n, pl.ds(0, ROWS))
                        plgpu.copy_gmem_to_smem(q_ref.at[heads_of], q_smem.at[stage, tile], loaded.at[stage])
                        plgpu.copy_gmem_to_smem(do_ref.at[heads_of], do_smem.at[stage, tile], loaded.at[stage])

                    @pl.when(warp == 0)
                    def _():
                        columns = pl.ds((begin + i * TOKENS) * ROWS, TOKENS * ROWS)
                        plgpu.copy_gmem_to_smem(terms_ref.at[:, columns], terms_smem.at[stage], loaded.at[stage])

                    return following

                lax.fori_loop(0, steps, fetch, tuple(token_at(t) for t in own))

                @pl.loop(jnp.maximum(steps - stages, 0), steps)
                def _(i):
                    plgpu.barrier_wait(consumed.at[lax.rem(i, stages)])

    partial = jax.ShapeDtypeStruct((lists.slots, BLOCK, size), jnp.float32)
    dk, dv, *partials = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            *([partial] * 2 * (lists.slots > 0)),
        ),
        scratch_types=(
            gpu.tile_memory((BLOCK, size), k.dtype),
            gpu.tile_memory((BLOCK, size), k.dtype),
            gpu.tile_memory((stages, TOKENS * ROWS, size), k.dtype),
            gpu.tile_memory((stages, TOKENS * ROWS, size), k.dtype),
            plgpu.SMEM((stages, 2, TOKENS * ROWS), jnp.float32),
            gpu.tile_memory((BLOCK, size), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 * TOKENS + 1, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ),
        grid=(lists.items.shape[0],),
        grid_names=("item",),
        num_threads=PAIR + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, do, terms, lists.tokens, lists.items)
    if partials:
        dk, dv = (with_parts(x, parts, lists, heads) for x, parts in zip((dk, dv), partials, strict=True))
    return dk, dv


def _column_token() -> jax.Array:
    """[64]: which of a group's 8 tokens a column belongs to."""
    return plgpu.broadcasted_iota(jnp.int32, (TOKENS * ROWS,), 0, layout=COLUMN_LAYOUT) // ROWS


def _sees(tokens: tuple[jax.Array, ...], origin: jax.Array) -> jax.Array:
    """[64, 64]: the column's token, tokens[column // 8], is at or past the row's key of the block at `origin`."""
    column = _column_token()
    place = jnp.full(column.shape, tokens[0] - origin, jnp.int32)
    for i, token in enumerate(tokens[1:], 1):
        place = jnp.where(column == i, token - origin, place)
    shape = (BLOCK, TOKENS * ROWS)
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    return key <= lax.broadcast_in_dim(place, shape, [1])


def terms_in_lists(shift: jax.Array, delta: jax.Array, lists: BlockLists, queries: int) -> jax.Array:
    """Shift and delta of the 8 rows of each token of the lists [2, P * 8], and one group's more, which is never seen.

    A copy to shared memory must begin at a multiple of 128 bytes there, and a token's terms have 32: laid out in the
    order of the lists, those of 8 tokens are one copy.
    """
    rows = shift.shape[0]
    # Lists of one row after another; what follows the last row's belongs to no block.
    row = jnp.searchsorted(lists.row_ends, jnp.arange(lists.tokens.shape[0], dtype=jnp.int32), side="right")
    place = (jnp.minimum(row, rows - 1), jnp.minimum(lists.tokens, queries - 1))
    terms = jnp.stack([x.reshape(rows, -1, ROWS)[place].reshape(-1) for x in (shift, delta)])
    return jnp.pad(terms, [(0, 0), (0, TOKENS * ROWS)])


def with_parts(x: jax.Array, parts: jax.Array, lists: BlockLists, heads: int) -> jax.Array:
    """x [B, S, N, D] with the sums of the blocks whose lists were split."""
    first, slots = lists.places[..., 0], lists.places[..., 1]
    total = jnp.zeros((*first.shape, *parts.shape[1:]), jnp.float32)
    for i in range(lists.parts):
        there = i < slots
        part = parts[jnp.where(there, first + i, 0)]
        total = total + jnp.where(there[..., None, None], part, 0.0)
    batch, keys, _, size = x.shape
    blocks = x.reshape(batch, keys // BLOCK, BLOCK, heads, size)
    by_block = (batch, heads, keys // BLOCK)
    total = jnp.moveaxis(total.reshape(*by_block, BLOCK, size), 1, 3)
    split = jnp.swapaxes(slots.reshape(by_block) > 0, 1, 2)[:, :, None, :, None]
    return jnp.where(split, total.astype(x.dtype), blocks).reshape(x.shape)
