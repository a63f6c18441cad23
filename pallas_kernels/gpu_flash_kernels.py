"""Interval attention on Hopper: what its kernels share, and the forward kernel, in Mosaic GPU.

Each thread block walks over its share of the items of work: two warpgroups with a tile of 64 query rows each multiply,
a third keeps a ring of keys and values full, across items too. The two take turns: while one computes its softmax, the
other's products run (FlashAttention-3, arXiv 2407.08608, section 3.1). docs/kernels.md draws it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import gpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.gpu import ROW_LAYOUT, TILE_ROWS, Ref
from pallas_kernels.gpu_flash_config import HEAD_ROWS, KEY_ROWS, QueryConfig
from pallas_kernels.gpu_flash_plan import Tiles, edge


def source(x: Float[jax.Array, "B L ..."], length: Int[jax.Array, "B"] | None) -> tuple[jax.Array, ...]:
    """What `fetch` copies x from: with a length, past which x may hold NaN, also its `edge` and the length."""
    return (x,) if length is None else (x, edge(x, length), length.astype(jnp.int32))


def fetch(refs: tuple[Ref, ...], batch: Any, index: Any, where: tuple[Any, ...], to: Ref, ready: Ref) -> None:
    """Starts the copy of the 64 entries from index * 64 on of the arrays of `source`; `where` are the later axes."""
    source, *bounded = refs
    rows = TILE_ROWS

    def copy(source: Ref, first: Any) -> None:
        plgpu.copy_gmem_to_smem(source.at[(batch, pl.ds(pl.multiple_of(first, rows), rows), *where)], to, ready)

    if not bounded:
        copy(source, index * rows)
        return
    across, length = bounded
    past = index - lax.div(length[batch], rows)
    pl.when(past < 0)(lambda: copy(source, index * rows))
    pl.when(past >= 0)(lambda: copy(across, jnp.minimum(past, 1) * rows))


def fetch_tile(tiles: Tiles, source: Ref, batch: Any, head: Any, tile: Any, to: Ref, ready: Ref) -> None:
    """Starts the copies of a tile of queries: one box of 64 tokens, or one of 8 rows per token."""
    stripe, member = _place(tiles, tile)
    if tiles.tokens == TILE_ROWS:
        tokens = pl.ds(pl.multiple_of(stripe * TILE_ROWS, TILE_ROWS), TILE_ROWS)
        plgpu.copy_gmem_to_smem(source.at[batch, tokens, head, member], to, ready)
        return
    for i in range(tiles.tokens):
        # The row of a token past the last one is dropped when it is stored.
        token = jnp.minimum(stripe * tiles.tokens + i, tiles.queries - 1)
        rows = pl.ds(i * HEAD_ROWS, HEAD_ROWS)
        plgpu.copy_gmem_to_smem(source.at[batch, token, head, pl.ds(0, HEAD_ROWS)], to.at[rows], ready)


def store_tile(tiles: Tiles, source: Ref, target: Ref, batch: Any, head: Any, tile: Any) -> None:
    """Starts the copies of a tile to its tokens; rows of no query are dropped."""
    stripe, member = _place(tiles, tile)
    if tiles.tokens == TILE_ROWS:
        tokens = pl.ds(pl.multiple_of(stripe * TILE_ROWS, TILE_ROWS), TILE_ROWS)
        plgpu.copy_smem_to_gmem(source, target.at[batch, tokens, head, member])
        return
    for i in range(tiles.tokens):
        token = stripe * tiles.tokens + i

        @pl.when(token < tiles.queries)
        def _(i=i, token=token):
            rows = pl.ds(i * HEAD_ROWS, HEAD_ROWS)
            plgpu.copy_smem_to_gmem(source.at[rows], target.at[batch, token, head, pl.ds(0, HEAD_ROWS)])


def tile_results(parts: int, tiles: Tiles, like: Any) -> jax.ShapeDtypeStruct:
    """What kernels over tiles of queries return: an array like q; of parts, float32 tiles [PR, tiles, 64, D]."""
    if parts == 1:
        return jax.ShapeDtypeStruct(like.shape, like.dtype)
    return jax.ShapeDtypeStruct((parts * tiles.rows, tiles.count, TILE_ROWS, like.shape[-1]), jnp.float32)


def result_memory(parts: int, consumers: int, size: int, dtype: Any) -> tuple[Any, ...]:
    """Shared memory through which results leave; those of parts, which are few, leave from registers."""
    return (gpu.tile_memory((consumers, TILE_ROWS, size), dtype),) if parts == 1 else ()


def write_tile(
    tiles: Tiles, value: jax.Array, memory: list[Ref], target: Ref, part: Any, batch: Any, head: Any, tile: Any
) -> None:
    """Writes the calling warpgroup's tile to `tile_results`, by a copy that may read the memory until the next one."""
    if not memory:

        @pl.when(tile >= 0)
        def _():
            target[part * tiles.rows + batch * tiles.heads + head, jnp.maximum(tile, 0)] = value

        plgpu.commit_smem()
        return
    staged = memory[0].at[lax.axis_index("warpgroup")]
    staged[...] = value.astype(staged.dtype)
    plgpu.commit_smem()
    pl.when(tile >= 0)(lambda: store_tile(tiles, staged, target, batch, head, tile))


def tile_copies(tiles: Tiles) -> int:
    """Copies that `fetch_tile` starts."""
    return 1 if tiles.tokens == TILE_ROWS else tiles.tokens


def _place(tiles: Tiles, tile: Any) -> tuple[Any, Any]:
    """The range of tokens and the query head of a tile."""
    return lax.div(tile, tiles.heads_apart), lax.rem(tile, tiles.heads_apart)


def over_items(items: int, programs: int, columns: int, items_ref: Ref, body: Callable[..., Any], carry: Any) -> Any:
    """Runs body(round, item, about, carry) over the items of the calling thread block; `about` are the item's columns.

    Every other round goes backwards, so that the first blocks do not always get the longer items.
    """
    program = lax.axis_index("program")

    def item_of(i: Any) -> Any:
        return i * programs + jnp.where(lax.rem(i, 2) == 0, program, programs - 1 - program)

    def about(i: Any) -> tuple[Any, ...]:
        item = jnp.minimum(item_of(i), items - 1)
        return tuple(items_ref[item, column] for column in range(columns))

    rounds = -(-items // programs)
    rounds = rounds - (item_of(jnp.int32(rounds - 1)) >= items).astype(jnp.int32)

    def step(i: Any, state: Any) -> Any:
        columns_of, carry = state
        # Read ahead: by the next item they have arrived.
        following = about(i + 1)
        return following, body(i, item_of(i), columns_of, carry)

    return lax.fori_loop(0, rounds, step, (about(jnp.int32(0)), carry))[1]


def three_loops(steps: tuple[Any, Any, Any, Any], body: Callable[..., Any], carry: Any, windowed: bool) -> Any:
    """Runs body(step, carry, masked) over [a, b) masked, [b, c) unmasked and [c, d) masked; a == b without a window."""
    a, b, c, d = steps
    if windowed:
        carry = lax.fori_loop(a, b, functools.partial(body, masked=True), carry)
    else:
        b = a
    carry = lax.fori_loop(b, c, functools.partial(body, masked=False), carry)
    return lax.fori_loop(c, d, functools.partial(body, masked=True), carry)


def fetch_keys(
    config: QueryConfig,
    sources: tuple[tuple[tuple[Ref, ...], Ref, Ref, Ref], ...],
    about: tuple[Any, ...],
    done: Any,
    batch: Any,
    head: Any,
) -> Any:
    """Fills the ring with the steps of an item, for each (arrays, ring, loaded, free); returns the steps done then."""
    begin, steps = about[:2]
    first = lax.div(begin, KEY_ROWS)
    pieces = config.keys // KEY_ROWS

    def step(i: Any, _: None) -> None:
        place = done + i
        slot = lax.rem(place, config.stages)
        for refs, ring, loaded, free in sources:

            @pl.when(place >= config.stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            for piece in range(pieces):
                to = ring.at[slot, pl.ds(piece * KEY_ROWS, KEY_ROWS)]
                fetch(refs, batch, first + i * pieces + piece, (head,), to, loaded.at[slot])

    lax.fori_loop(0, steps, step, None)
    return done + steps


def drain(slots: int, done: Any, rings: tuple[Ref, ...]) -> None:
    """Waits until the consumers have released all that was fetched: no barrier may complete after its last wait."""

    @pl.loop(jnp.maximum(done - slots, 0), done)
    def _(place):
        for free in rings:
            plgpu.barrier_wait(free.at[lax.rem(place, slots)])


def key_mask(row_end: Any, begin: Any, keys: int, window: int | None) -> Any:
    """[64, keys]: the row's query sees the key `begin` + column."""
    shape = (TILE_ROWS, keys)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen = column < lax.broadcast_in_dim(row_end - begin, shape, [0])
    if window is None:
        return seen
    return seen & (column >= lax.broadcast_in_dim(row_end - (begin + window), shape, [0]))


def decode_item(tiles: Tiles, config: QueryConfig, item: Any) -> tuple[Any, Any, Any, Any]:
    """Part, batch row and KV head of an item of `query_items`, and its first tile's place counted from the last."""
    groups = -(-tiles.count // config.consumers)
    part = lax.rem(item, config.parts)
    group = lax.rem(lax.div(item, config.parts), groups)
    row = lax.div(item, config.parts * groups)
    return part, lax.div(row, tiles.heads), lax.rem(row, tiles.heads), group * config.consumers


def launch(items: int, programs: int, consumers: int) -> dict[str, Any]:
    """Grid and compiler options."""
    return {
        "grid": (min(items, programs),),
        "grid_names": ("program",),
        "num_threads": consumers + 1,
        "thread_name": "warpgroup",
        # Reductions along rows stay within four lanes.
        "compiler_params": plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    }


def share_registers(consumers: int, action: Literal["increase", "decrease"]) -> None:
    """Moves registers from the warpgroup that fetches to two that multiply; one has enough."""
    if consumers > 1:
        plgpu.set_max_registers(232 if action == "increase" else 40, action=action)


def forward(
    config: QueryConfig,
    programs: int,
    interpret: Any,
    tiles: Tiles,
    window: int | None,
    q: Float[jax.Array, "B T N G D"],
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    ends: Int32[jax.Array, "B stripes 64"],
    items: Int32[jax.Array, "items 5"],
) -> tuple[jax.Array, Float32[jax.Array, "PR tiles 64"]]:
    """Runs the forward kernel.

    Args:
      config: its configuration.
      programs: thread blocks.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
      tiles: how the queries are cut.
      window: keys that a query sees at most.
      q: queries.
      k: `source` of the keys.
      v: values, likewise.
      ends: from `Tiles.row_ends`.
      items: from `gpu_flash_plan.query_items`.

    Returns:
      Output, as `tile_results` says, and the natural log-sum-exp of the rows of each tile, part by part.
    """
    size = q.shape[4]
    scale = size**-0.5 * gpu.LOG2_E
    consumers, stages = config.consumers, config.stages
    count = items.shape[0]
    programs = min(count, programs)
    bounded = len(k)

    def body(q_ref, ends_ref, items_ref, *rest):
        k_refs, v_refs = rest[:bounded], rest[bounded : 2 * bounded]
        o_ref, lse_ref, q_smem, k_smem, v_smem, ends_smem, lse_smem, *rest = rest[2 * bounded :]
        *o_smem, q_ready, q_free, k_loaded, v_loaded, k_free, v_free, turn = rest
        warpgroup = lax.axis_index("warpgroup")

        def rendezvous():
            if consumers > 1:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when(warpgroup < consumers)
        def _():
            share_registers(consumers, "increase")
            lse_tile = lse_smem.at[warpgroup]

            def attend(i, item, about, done):
                begin, steps, whole_from, whole_to, full = about
                part, b, n, place = decode_item(tiles, config, item)
                tile = tiles.count - 1 - place - warpgroup
                buffer = lax.rem(i, config.buffers)
                q_tile = q_smem.at[buffer, warpgroup]
                plgpu.barrier_wait(q_ready.at[buffer])
                row_end = plgpu.load(ends_smem.at[buffer, warpgroup], layout=ROW_LAYOUT)

                def step(i, carry, masked, keys=config.keys):
                    acc, top, total = carry
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(k_loaded.at[slot])

                    def logits(s_ref):
                        plgpu.wgmma(s_ref, q_tile, k_smem.at[slot, pl.ds(0, keys)].transpose((1, 0)))
                        rendezvous()
                        return s_ref[...]

                    s = pl.run_scoped(logits, plgpu.ACC((TILE_ROWS, keys), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])

                    @pl.when(i + 1 == steps)
                    def _():
                        plgpu.barrier_arrive(q_free.at[buffer])

                    if masked:
                        s = jnp.where(key_mask(row_end, begin + i * config.keys, keys, window), s, -jnp.inf)
                    new_top = jnp.maximum(top, s.max(axis=1) * scale)
                    p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
                    rescale = jnp.exp2(top - new_top)
                    acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
                    total = total * rescale + p.sum(axis=1)
                    p = p.astype(q_ref.dtype)
                    # The softmax is over before the other warpgroup's starts.
                    acc, new_top, total, p = lax.optimization_barrier((acc, new_top, total, p))
                    if consumers > 1:
                        plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_loaded.at[slot])
                    if consumers > 1:
                        plgpu.barrier_wait(turn)
                    acc = gpu.add_product(acc, p, v_smem.at[slot, pl.ds(0, keys)], interpret)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, new_top, total

                carry = (
                    plgpu.layout_cast(jnp.zeros((TILE_ROWS, size), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((TILE_ROWS,), EMPTY_LSE, jnp.float32), ROW_LAYOUT),
                    plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), ROW_LAYOUT),
                )
                carry = three_loops((0, whole_from, whole_to, full), step, carry, window is not None)
                if config.keys > KEY_ROWS:
                    short = functools.partial(step, masked=True, keys=KEY_ROWS)
                    carry = lax.fori_loop(full, steps, short, carry)
                acc, top, total = carry

                @pl.when(steps == 0)
                def _():
                    # The turns of a step: else the first warpgroup waits for queries that the second, which waits for
                    # the first's next turn, has yet to release.
                    rendezvous()
                    plgpu.barrier_arrive(q_free.at[buffer])
                    rendezvous()

                empty = total == 0.0
                divisor = jnp.where(empty, 1.0, total)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                lse_tile[...] = jnp.where(empty, EMPTY_LSE, top * math.log(2) + jnp.log(divisor))
                o = acc * lax.broadcast_in_dim(1.0 / divisor, acc.shape, [0])
                write_tile(tiles, o, o_smem, o_ref, part, b, n, tile)

                @pl.when(tile >= 0)
                def _():
                    row = part * tiles.rows + b * tiles.heads + n
                    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[row, tile])

                return done + steps

            # The second warpgroup starts half a step after the first.
            pl.when(warpgroup == 1)(rendezvous)
            over_items(count, programs, 5, items_ref, attend, jnp.int32(0))
            pl.when(warpgroup == 0)(rendezvous)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == consumers)
        def _():
            share_registers(consumers, "decrease")

            def fetch_item(i, item, about, carry):
                _, b, n, place = decode_item(tiles, config, item)
                buffer = lax.rem(i, config.buffers)
                ready = q_ready.at[buffer]

                @pl.when(i >= config.buffers)
                def _():
                    plgpu.barrier_wait(q_free.at[buffer])

                for c in range(consumers):
                    tile = jnp.maximum(tiles.count - 1 - place - c, 0)
                    fetch_tile(tiles, q_ref, b, n, tile, q_smem.at[buffer, c], ready)
                    stripe = lax.div(tile, tiles.heads_apart)
                    plgpu.copy_gmem_to_smem(ends_ref.at[b, stripe], ends_smem.at[buffer, c], ready)
                sources = ((k_refs, k_smem, k_loaded, k_free), (v_refs, v_smem, v_loaded, v_free))
                return i + 1, fetch_keys(config, sources, about, carry[1], b, n)

            zero = jnp.int32(0)
            rounds, done = over_items(count, programs, 5, items_ref, fetch_item, (zero, zero))
            drain(config.buffers, rounds, (q_free,))
            drain(stages, done, (k_free, v_free))

    pieces = config.keys // KEY_ROWS
    return plgpu.kernel(
        body,
        out_type=(
            tile_results(config.parts, tiles, q),
            jax.ShapeDtypeStruct((config.parts * tiles.rows, tiles.count, TILE_ROWS), jnp.float32),
        ),
        scratch_types=(
            gpu.tile_memory((config.buffers, consumers, TILE_ROWS, size), q.dtype),
            gpu.tile_memory((stages, config.keys, size), q.dtype),
            gpu.tile_memory((stages, config.keys, size), q.dtype),
            plgpu.SMEM((config.buffers, consumers, TILE_ROWS), jnp.int32),
            plgpu.SMEM((consumers, TILE_ROWS), jnp.float32),
            *result_memory(config.parts, consumers, size, q.dtype),
            plgpu.Barrier(num_arrivals=consumers * (tile_copies(tiles) + 1), num_barriers=config.buffers),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=config.buffers),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers),
        ),
        interpret=interpret,
        **launch(count, programs, consumers),
    )(q, ends, items, *k, *v)
