"""Selected attention on TPU.

Tiles of 16 neighbouring queries with all heads of their group walk the ascending union of the blocks that they chose,
several blocks per product. The keys and values of one KV head lie in VMEM, as many as fit; longer inputs are taken in
chunks of keys, and each tile's list falls into one range per chunk. Nothing is fetched per block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tile_lists, tpu
from pallas_kernels.common import (
    EMPTY_LSE,
    ArrayLike,
    Scalar,
    block_total,
    query_indices,
    resolve_lengths,
    zero_where,
)
from pallas_kernels.selected_attention.mosaic_tpu_backward import backward_chunk
from pallas_kernels.selected_attention.mosaic_tpu_forward import forward_chunk
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Plan, make_plan

_OPERATION = "selected_attention"
_BLOCK_SIZES = (32, 64, 128)


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the chosen blocks; arguments and results as in `api.selected_attention`.

    Raises:
      NotImplementedError: a dtype, head size, group, block size, number of blocks or of places that is not covered.
    """
    check(q, k, block_size)
    q, k, v, block_indices = (jnp.asarray(x) for x in (q, k, v, block_indices))
    if 0 in (*q.shape, k.shape[1], block_indices.shape[3]):
        return jnp.zeros_like(q), jnp.full(q.shape[:-1], EMPTY_LSE, jnp.float32)
    queries = q.shape[1]
    past = query_indices(queries, q_offset) >= resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None]
    rows = tpu.group_major(zero_where(past, q), -(-queries // (TILE * TILES)) * TILE * TILES)
    results = group_major_attention(
        rows, k, v, block_indices, block_size=block_size, q_offset=q_offset, lengths=lengths
    )
    o, lse = (tpu.from_group_major(x, queries) for x in results)
    return o, lse


def check(q: Float[ArrayLike, "B T N G D"], k: Float[ArrayLike, "B S N D"], block_size: int) -> None:
    """Raises NotImplementedError, with what is covered, unless the shapes are."""
    tpu.check_arrays(_OPERATION, q)
    tpu.check_block_size(_OPERATION, block_size, _BLOCK_SIZES)
    blocks = block_total(k.shape[1], block_size)
    if blocks >= 2**15:
        raise NotImplementedError(f"{_OPERATION} on TPU has {blocks} blocks of keys, supported are at most {2**15 - 1}")


def group_major_attention(
    q: Float[jax.Array, "B N G padded D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    block_indices: Int[jax.Array, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B N G padded D"], Float32[jax.Array, "B N G padded"]]:
    """`selected_attention` of queries that lie as the kernels take them, zeros past the lengths, T padded to 128s."""
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None]
    t = query_indices(block_indices.shape[1], q_offset)
    past = t >= length
    k, v = (zero_where(jnp.arange(k.shape[1]) >= length, x) for x in (k, v))
    readable = (block_indices >= 0) & (block_indices * block_size <= t[:, None, None]) & ~past[..., None, None]
    lists = tile_lists.build(block_indices, readable, blocks=block_total(k.shape[1], block_size))
    return _attend(block_size, q, k, v, lists, jnp.asarray(q_offset, jnp.int32), past)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    block_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: tile_lists.TileLists,
    q_offset: jax.Array,
    past: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(block_size, q, k, v, lists, q_offset, past)[0]


def _attend_forward(
    block_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: tile_lists.TileLists,
    q_offset: jax.Array,
    past: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    plan = _plan(q, k, lists, block_size, backward=False)
    keys = _blocks(plan, k), _blocks(plan, v)

    def attend(before: Any, chunk: jax.Array, out_dtype: Any) -> Any:
        place = jnp.stack([q_offset - chunk * plan.chunk_keys, chunk])
        entries, bounds = _lists_of_chunk(lists, q.shape[3], chunk, plan)
        return forward_chunk(place, entries, bounds, q, *keys, before, plan, out_dtype)

    before = None
    if plan.chunks > 1:
        before, _ = _over_chunks(lambda before, chunk: (attend(before, chunk, jnp.float32), None), plan.chunks - 1)
    o, lse_tiles = attend(before, jnp.int32(plan.chunks - 1), q.dtype)
    lse = _from_tiles(lse_tiles, plan.group)
    lse = jnp.where(lse > EMPTY_LSE, lse / tpu.LOG2_E, EMPTY_LSE)
    return (o, lse), (q, k, v, lists, q_offset, past, o, lse_tiles)


def _attend_backward(block_size: int, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    q, k, v, lists, q_offset, past, o, lse_tiles = saved
    hidden = tpu.pad_axis(past, 1, q.shape[3], 1.0)[:, None, None]
    do, dlse = (jnp.where(mask, 0, x) for mask, x in zip((hidden[..., None], hidden), cotangents, strict=True))
    plan = _plan(q, k, lists, block_size, backward=True)
    delta = _to_tiles((do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - dlse)
    keys = _blocks(plan, k), _blocks(plan, v)

    def chunk_body(dq: Any, chunk: jax.Array) -> tuple[Any, Any]:
        place = jnp.stack([q_offset - chunk * plan.chunk_keys, chunk])
        entries, bounds = _lists_of_chunk(lists, q.shape[3], chunk, plan)
        dq, dk, dv = backward_chunk(place, entries, bounds, q, *keys, do, lse_tiles, delta, dq, plan)
        return dq, ((dk * plan.scale).astype(q.dtype), dv.astype(q.dtype))

    dq, gradients = _over_chunks(chunk_body, plan.chunks)
    dk, dv = (_from_chunks(x, k.shape[1]) for x in gradients)
    return dq.astype(q.dtype), dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _plan(q: jax.Array, k: jax.Array, lists: tile_lists.TileLists, block_size: int, *, backward: bool) -> Plan:
    # The plan reads the last two axes, G and D.
    rows = jnp.swapaxes(q, 2, 3)
    return make_plan(_OPERATION, rows, k.shape[1], lists.entries.shape[-1], block_size, backward=backward)


def _over_chunks(body: Callable[[Any, jax.Array], tuple[Any, Any]], chunks: int) -> tuple[Any, Any]:
    """As `jax.lax.scan` over 0 to chunks - 1, whose first step starts from None."""
    carry, first = body(None, jnp.int32(0))
    first = jax.tree.map(lambda x: x[None], first)
    if chunks == 1:
        return carry, first
    carry, later = jax.lax.scan(body, carry, jnp.arange(1, chunks, dtype=jnp.int32))
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, later)


def _blocks(plan: Plan, x: Float[jax.Array, "B S N D"]) -> Float[jax.Array, "B N blocks s D"]:
    """Keys or values block by block, no fewer than a chunk's; what the last chunk lacks is never read."""
    keys = -(-max(x.shape[1], plan.chunk_keys) // plan.block_size) * plan.block_size
    x = tpu.keys_head_major(x, keys)
    return x.reshape(*x.shape[:2], -1, plan.block_size, x.shape[3])


def _from_chunks(x: Float[jax.Array, "chunks B N blocks s D"], keys: int) -> Float[jax.Array, "B S N D"]:
    x = jnp.moveaxis(x, 0, 2)
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :keys], 1, 2)


def _lists_of_chunk(
    lists: tile_lists.TileLists, queries: int, chunk: jax.Array, plan: Plan
) -> tuple[Int[jax.Array, "B N steps 1 places"], Int[jax.Array, "B N steps 1 bounds"]]:
    """The lists with blocks counted from the chunk's first, 0 outside it; each tile's first step and their number."""
    entries = lists.entries
    if plan.chunks == 1:
        start, end = jnp.zeros_like(lists.counts), lists.counts
    else:
        start, end = (lists.before((chunk + i) * plan.chunk_blocks) for i in (0, 1))
        place = jnp.arange(entries.shape[-1])
        inside = (place >= start[..., None]) & (place < end[..., None])
        entries = jnp.where(inside, entries - (chunk * plan.chunk_blocks << tile_lists.MASK_BITS), 0)
    first_step = start // plan.step_blocks
    # A tile without entries takes one step, whose keys are hidden from all: it writes the tile's results. Eight such
    # tiles take none in a later chunk, as they have results.
    end_step = jnp.maximum(-(-end // plan.step_blocks), first_step + 1)
    first_step, end_step = (
        tpu.pad_axis(x, 2, queries // TILE, value).reshape(*x.shape[:2], -1, TILES)
        for x, value in ((first_step, 0.0), (end_step, 1.0))
    )
    total = (end_step - first_step).sum(-1, dtype=jnp.int32)
    if plan.chunks > 1:
        places = tpu.pad_axis(end - start, 2, queries // TILE).reshape(*total.shape, TILES)
        total = jnp.where((chunk == 0) | (places.max(-1) > 0), total, 0)
    bounds = jnp.stack([first_step, end_step], axis=-1).reshape(*total.shape, 2 * TILES)
    past_the_last = jnp.broadcast_to(jnp.array([0, jnp.iinfo(jnp.int32).max], jnp.int32), (*total.shape, 2))
    bounds = jnp.concatenate([bounds, past_the_last, total[..., None]], axis=-1)
    entries = tpu.pad_axis(tpu.pad_axis(entries, 2, queries // TILE), 3, plan.places)
    return (
        entries.reshape(*entries.shape[:2], -1, 1, TILES * plan.places),
        bounds[..., None, :],
    )


def _to_tiles(x: Float32[jax.Array, "B N G T"]) -> Float32[jax.Array, "B N tiles 128"]:
    x = jnp.moveaxis(x.reshape(*x.shape[:3], -1, TILE), 2, 3)
    return tpu.pad_axis(x.reshape(*x.shape[:3], -1), 3, tpu.LANES)


def _from_tiles(x: Float32[jax.Array, "B N tiles 128"], group: int) -> Float32[jax.Array, "B N G T"]:
    x = x[..., : group * TILE].reshape(*x.shape[:3], group, TILE)
    return jnp.moveaxis(x, 3, 2).reshape(*x.shape[:2], group, -1)
