"""Selected attention on Hopper: the forward kernel and the operation's gradient rule, in Mosaic GPU.

A thread block owns neighbouring tokens of one KV head (27 where each has 7 query heads) and reads the union of their
blocks once: three warpgroups of 64 rows multiply, a fourth keeps a ring of K and V blocks full. docs/kernels.md draws
it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu
from pallas_kernels.common import EMPTY_LSE, ArrayLike, Scalar, block_total, resolve_lengths, zero_where
from pallas_kernels.gpu import HIDDEN, ROW_LAYOUT, TILE_ROWS
from pallas_kernels.selected_attention import gpu_config
from pallas_kernels.selected_attention import gpu_tiles as tiling
from pallas_kernels.selected_attention import mosaic_gpu_backward as backward
from pallas_kernels.selected_attention.gpu_lists import TileLists, block_lists, tile_lists, visible_choice, work_lists
from pallas_kernels.selected_attention.gpu_tiles import BLOCK

SAVED = ("selected_output", "selected_lse")
"""Names of what the gradient keeps besides its inputs, for `jax.checkpoint_policies.save_only_these_names`."""

SLACK = 8.0
"""What a row's exponents subtract follows their maximum only when it falls behind by more: weights stay below 2^8."""


class Gated(NamedTuple):
    """What the output of the forward kernel is summed with.

    Attributes:
      gates: of the output and of each of the others, float32.
      others: outputs of other branches, in the dtype of the output.
    """

    gates: tuple[Float32[jax.Array, "B T N G"], ...]
    others: tuple[Float[jax.Array, "B T N G D"], ...]


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: gpu_config.Config | None = None,
    interpret: Any = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the chosen blocks; arguments and results as in `api.selected_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      block_indices: see there.
      block_size: see there; 64.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `gpu_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size, group or block size that the kernels do not cover.
    """
    q, k, v, block_indices = (jnp.asarray(x) for x in (q, k, v, block_indices))
    check_covered(q, k, block_size)
    if 0 in (*q.shape, *k.shape, block_indices.shape[3]):
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], EMPTY_LSE, jnp.float32)
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])
    config = config or gpu_config.heuristic(q.shape[1], q.shape[0] * q.shape[2], q.shape[4], q.shape[3])
    chosen = visible_choice(block_indices, length, q_offset, k.shape[1], block_size)
    k, v = (whole_blocks(x, length if lengths is not None else None) for x in (k, v))
    return _attend(config, interpret, q, k, v, chosen, length, jnp.asarray(q_offset, jnp.int32))


def whole_blocks(x: Float[jax.Array, "B S N D"], length: Int[jax.Array, "B"] | None) -> Float[jax.Array, "B P N D"]:
    """Pads keys or values to whole blocks and zeros what lies past `length`: a probability of 0 times NaN is NaN."""
    keys = x.shape[1]
    if length is not None:
        x = zero_where(jnp.arange(keys) >= length[:, None], x)
    return jnp.pad(x, [(0, 0), (0, block_total(keys, BLOCK) * BLOCK - keys), (0, 0), (0, 0)])


def check_covered(q: jax.Array, k: jax.Array, block_size: int, kernel: str = "Mosaic GPU") -> None:
    """Raises NotImplementedError for a dtype, head size, group, block size or number of keys that is not covered."""
    gpu.check_covered(q.dtype, *q.shape[3:], kernel)
    if block_size != BLOCK:
        raise NotImplementedError(f"the {kernel} kernel takes block_size {BLOCK}, not {block_size}")
    if block_total(k.shape[1], BLOCK) >= 2**15:
        raise NotImplementedError(f"the {kernel} kernel takes fewer than {2**15 * BLOCK} keys, not {k.shape[1]}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    config: gpu_config.Config,
    interpret: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(config, interpret, q, k, v, chosen, length, q_offset)[0]


def _attend_forward(
    config: gpu_config.Config,
    interpret: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    build = functools.partial(tile_lists, chosen, length, q_offset, k.shape[1], BLOCK)
    forward_lists, dq_lists = work_lists(config.forward.tokens, config.dq.tokens, build)
    results = forward(config.forward, interpret, q, k, v, forward_lists)
    o, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED, strict=True))
    return (o, lse), (q, k, v, chosen, q_offset, dq_lists, o, lse)


def _attend_backward(
    config: gpu_config.Config,
    interpret: Any,
    saved: tuple[Any, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    q, k, v, chosen, q_offset, lists, o, lse = saved
    do, dlse = cotangents
    delta = gpu.delta_of(o, do, dlse)
    gradients = backward_from(config, interpret, q, k, v, do, lse, delta, chosen, q_offset, lists)
    return *gradients, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def backward_from(
    config: gpu_config.Config,
    interpret: Any,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
    chosen: Int[jax.Array, "B N T n"],
    q_offset: Scalar,
    lists: TileLists,
) -> tuple[Float[jax.Array, "B T N G D"], Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """dq, dk and dv with p = exp(logits - lse) and ds = p (do v^T - delta).

    Args:
      config: tile configurations.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
      q: queries.
      k: keys in whole blocks.
      v: values, likewise.
      do: cotangent of the output.
      lse: log-sum-exps.
      delta: sums of do x output, less the cotangent of the log-sum-exp.
      chosen: from `gpu_lists.visible_choice`.
      q_offset: absolute index of the first query.
      lists: of dq's kernel, from `work_lists`.
    """
    shift, delta = backward.row_terms(lse, delta)
    dq = backward.query_gradient(config.dq, interpret, q, k, v, do, shift, delta, lists)
    queries_of = block_lists(chosen, q_offset, k.shape[1], BLOCK, config.dkdv.part)
    dk, dv = backward.key_gradients(config.dkdv, interpret, q, k, v, do, shift, delta, queries_of)
    return dq, dk, dv


def forward(
    config: gpu_config.TileConfig,
    interpret: Any,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    lists: TileLists,
    gated: Gated | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Runs the forward kernel.

    Args:
      config: how the kernel runs; `lists` must be built for its tokens.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
      q: queries.
      k: keys in whole blocks.
      v: values, likewise.
      lists: from `gpu_lists.tile_lists`.
      gated: what the output is summed with before it is written.

    Returns:
      Output, or the gated sum, and log-sum-exp.
    """
    heads, size = q.shape[2], q.shape[4]
    rows, tiles, pieces, width = lists.entries.shape
    consumers, stages, share = config.consumers, config.stages, config.share
    scale = size**-0.5 * gpu.LOG2_E
    if interpret is None and config.q_registers == size == tiling.HALF:
        raise NotImplementedError("q_registers 64 at head size 64: ptxas 13.0 overwrites these registers in the loop")
    others = gated.others if gated else ()
    gates = (tiling.in_tiles(jnp.stack(gated.gates), config, tiles),) if gated else ()

    kinds = len(gated.gates) if gated else 0

    def body(q_ref, k_ref, v_ref, entries_ref, tiles_ref, *rest):
        rest = iter(rest)
        gates_refs, other_refs = ([next(rest) for _ in x] for x in (gates, others))
        o_ref, lse_ref, q_smem, k_smem, v_smem, entries_smem, lse_smem, gates_smem, *barriers = rest
        q_ready, other_ready, list_ready, loaded, consumed = barriers
        q_boxes, q_smem = q_smem if interpret is None else ((), q_smem)
        tile = tiling.this_tile()
        b, n = lax.div(tile.row, heads), lax.rem(tile.row, heads)
        warpgroup = lax.axis_index("warpgroup")
        count, whole, start, last = tile.about(tiles_ref)
        entries = tiling.List(entries_smem, share)

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(gpu_config.REGISTERS[consumers][0], action="increase")
            q_tile = q_smem.at[warpgroup]
            offset = warpgroup * share
            first = tile.index * config.tokens + offset
            in_order = tile.index * consumers + warpgroup
            place = tiling.Place(b, n, first, warpgroup, config)
            tiling.fetch_queries(q_ref, q_boxes, q_tile, q_ready, place)
            for source in gates_refs:
                own = gates_smem.at[warpgroup]
                plgpu.copy_gmem_to_smem(source.at[tile.row, in_order], own, q_ready.at[warpgroup])
            plgpu.barrier_wait(list_ready)
            plgpu.barrier_wait(q_ready.at[warpgroup])
            left = tiling.hold(q_tile, config.q_registers)

            def hide_later_keys(i, s):
                return jnp.where(tiling.causal_mask(entries.block(i), start + offset, config.rows), s, -HIDDEN)

            def attend(i, slot, mask, carry):
                acc, shift, total = carry
                keys = k_smem.at[slot]
                s = gpu.sum_of_products(gpu.times_transpose(left, keys), BLOCK, interpret)
                s = lax.cond(i < whole, lambda s: s, functools.partial(hide_later_keys, i), s)
                seen = tiling.chosen_rows(mask, config.rows)
                # Until a row's exponents outgrow their shift, no thread asks another and nothing is rescaled.
                tops = gpu.fold_columns(jnp.maximum, s) * scale
                bound = jnp.where(seen, shift + SLACK, jnp.inf)
                excess = tops - lax.broadcast_in_dim(bound, tops.shape, [0])

                def raise_shift(carry):
                    acc, shift, total = carry
                    higher = jnp.where(seen, jnp.maximum(shift, tops.max(axis=1)), shift)
                    rescale = jnp.exp2(shift - higher)
                    acc, total = (x * lax.broadcast_in_dim(rescale, x.shape, [0]) for x in (acc, total))
                    return acc, higher, total

                acc, shift, total = lax.cond(
                    gpu.any_positive(excess, interpret), raise_shift, lambda carry: carry, (acc, shift, total)
                )
                row_shift = jnp.where(seen, shift, HIDDEN)
                values = v_smem.at[slot]

                def weigh(total, keys):
                    part = s[:, keys]
                    p = jnp.exp2(part * scale - lax.broadcast_in_dim(row_shift, part.shape, [0]))
                    return total + gpu.fold_columns(jnp.add, p), p.astype(v_ref.dtype)

                acc, total = gpu.add_products(acc, weigh, total, values, config.parts, interpret)
                return acc, shift, total

            def step(i, carry):
                slot, mask, *carry = carry
                plgpu.barrier_wait(loaded.at[slot])
                following = entries.mask(jnp.minimum(i + 1, count - 1), warpgroup)
                carry = lax.cond(mask != 0, functools.partial(attend, i, slot, mask), lambda carry: carry, tuple(carry))
                plgpu.barrier_arrive(consumed.at[slot])
                return tiling.next_slot(slot, stages), following, *carry

            carry = (
                jnp.int32(0),
                entries.mask(jnp.int32(0), warpgroup),
                plgpu.layout_cast(jnp.zeros((TILE_ROWS, size), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((TILE_ROWS,), EMPTY_LSE, jnp.float32), ROW_LAYOUT),
                plgpu.layout_cast(jnp.zeros((TILE_ROWS, 8), jnp.float32), plgpu.Layout.WGMMA),
            )
            _, _, acc, shift, total = lax.fori_loop(0, count, step, carry)

            # A query past the last may hold NaN; no list lets it see a block.
            past = tiling.token_of_row(config.rows) > last - first
            total = total.sum(axis=1)
            empty = past | (total == 0.0)
            divisor = jnp.where(empty, 1.0, total)
            own_gates = [plgpu.load(gates_smem.at[warpgroup, i], layout=ROW_LAYOUT) for i in range(kinds)]
            weight = (own_gates[0] if gated else 1.0) / divisor
            o = acc * lax.broadcast_in_dim(weight, acc.shape, [0])
            o = jnp.where(lax.broadcast_in_dim(past, acc.shape, [0]), 0.0, o)
            o = [o[:, columns] for columns in tiling.halves(size)]
            for source, gate in zip(other_refs, own_gates[1:], strict=True):
                plgpu.commit_smem()
                tiling.fetch_queries(source, q_boxes, q_tile, other_ready, place)
                plgpu.barrier_wait(other_ready.at[warpgroup])
                for half, value in enumerate(o):
                    other = plgpu.load(q_tile.at[half], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    o[half] = value + other * lax.broadcast_in_dim(gate, value.shape, [0])
            for half, value in enumerate(o):
                q_tile.at[half][...] = value.astype(o_ref.dtype)
            lse_tile = lse_smem.at[warpgroup]
            lse_tile[...] = jnp.where(empty, EMPTY_LSE, shift * math.log(2) + jnp.log(divisor))
            plgpu.commit_smem()
            tiling.store_queries(q_boxes, q_tile, o_ref, place)
            plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[tile.row, in_order])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(gpu_config.REGISTERS[consumers][1], action="decrease")
            plgpu.copy_gmem_to_smem(entries_ref.at[tile.row, tile.index], entries_smem, list_ready)
            plgpu.barrier_wait(list_ready)
            tensors = ((k_ref, k_smem), (v_ref, v_smem))
            tiling.fetch_blocks(config, count, entries, tensors, loaded, consumed, b, n)

    halves = (consumers, size // tiling.HALF)
    q_memory = gpu.tile_memory((*halves, TILE_ROWS, tiling.HALF), q.dtype)
    if interpret is None:
        box = plgpu.SMEM((share, config.rows, tiling.HALF), q.dtype, transforms=(plgpu.SwizzleTransform(128),))
        q_memory = plgpu.RefUnion([[box] * halves[1] for _ in range(consumers)], q_memory)
    copies = halves[1] * (1 if interpret is None else share)
    o, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, tiles * consumers, TILE_ROWS), jnp.float32),
        ),
        scratch_types=(
            q_memory,
            gpu.tile_memory((stages, BLOCK, size), q.dtype),
            gpu.tile_memory((stages, BLOCK, size), q.dtype, 128 // config.parts),
            plgpu.SMEM((pieces, width), jnp.int32),
            plgpu.SMEM((consumers, TILE_ROWS), jnp.float32),
            plgpu.SMEM((consumers, max(kinds, 1), TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=copies + len(gates), num_barriers=consumers),
            plgpu.Barrier(num_arrivals=copies, num_barriers=consumers),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ),
        interpret=interpret,
        **tiling.launch(config, rows, tiles),
    )(q, k, v, lists.entries, lists.tiles, *gates, *others)
    return o, tiling.out_of_tiles(lse, q, config)
