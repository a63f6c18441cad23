"""Backward kernel of selected attention on TPU: one walk over the lists gives dq, dk and dv.

The gradients of a chunk's keys stay in VMEM beside the keys and are added up in the order of the queries, so that no
list by key is needed, a block that every query chose costs no more than others, and the sums have the same bits
whenever the kernel runs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import tpu
from pallas_kernels.selected_attention import mosaic_tpu_steps as steps
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Place, Plan, Ref


def backward_chunk(
    place: Int32[Array, "2"],
    entries: Int32[Array, "B N grid 1 entries"],
    bounds: Int32[Array, "B N grid 1 bounds"],
    q: Float[Array, "B N G T D"],
    k: Float[Array, "B N blocks s D"],
    v: Float[Array, "B N blocks s D"],
    do: Float[Array, "B N G T D"],
    lse: Float32[Array, "B N tiles 128"],
    delta: Float32[Array, "B N tiles 128"],
    dq_before: Float32[Array, "B N G T D"] | None,
    plan: Plan,
) -> tuple[Float32[Array, "B N G T D"], Float32[Array, "B N chunk s D"], Float32[Array, "B N chunk s D"]]:
    """Gradients through one chunk of keys.

    Args:
      place: as in `forward_chunk`, and so are those up to v.
      entries: see there.
      bounds: see there.
      q: see there.
      k: see there.
      v: see there.
      do: cotangent of the output.
      lse: log-sum-exp to the base of 2, a lane per row of each tile.
      delta: sum of do * o, less the cotangent of the log-sum-exp, likewise.
      dq_before: sum over earlier chunks, whose memory the result takes.
      plan: see there.

    Returns:
      The gradients of the queries, summed up to this chunk; of the keys, still to be scaled as logits are; of the
      values.
    """
    batch, heads, _, tokens, size = q.shape
    spec = steps.specs(plan)
    in_specs = [*spec.lists, spec.queries, spec.keys, spec.keys, spec.queries, spec.rows, spec.rows]
    inputs = [entries, bounds, q, k, v, do, lse, delta]
    if dq_before is not None:
        in_specs.append(spec.queries)
        inputs.append(dq_before)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    logits = steps.most_logits(q, plan)
    chunk = plan.chunk_blocks, plan.block_size, size
    shapes = q.shape, (batch, heads, *chunk), (batch, heads, *chunk)
    out_shape = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, adds=dq_before is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tokens // (TILES * TILE)),
            in_specs=in_specs,
            out_specs=(spec.queries, hbm, hbm),
            scratch_shapes=[
                pltpu.VMEM((plan.rows, size), jnp.float32),
                *[pltpu.VMEM(chunk, jnp.float32)] * 2,
                *[pltpu.VMEM((TILES, plan.rows, tpu.LANES), jnp.float32)] * 2,
                pltpu.VMEM((2, plan.rows, plan.step_keys), jnp.float32),
                pltpu.VMEM((2 * plan.rows, plan.step_keys), q.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=out_shape,
        # The scalars count as the first input.
        input_output_aliases={len(inputs): 0} if dq_before is not None else {},
        compiler_params=tpu.compiler_params(("parallel", "parallel", "arbitrary"), plan.vmem_limit),
        cost_estimate=tpu.cost(10 * logits * size, logits, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_backward",
    )(place, *inputs)


def _kernel(
    chunk_place: Ref,
    entries: Ref,
    bounds: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    *rest: Ref,
    plan: Plan,
    adds: bool,
) -> None:
    dq_before = rest[0] if adds else None
    dq, dk, dv, dq_state, dk_state, dv_state, tops, shifts, products, factors, semaphores = rest[adds:]
    rows, s = plan.rows, plan.block_size
    b, n, i = (pl.program_id(axis) for axis in range(3))
    last = pl.num_programs(2) - 1
    first_query = chunk_place[0] + i * (TILES * TILE)
    dot = functools.partial(jax.lax.dot_general, precision=plan.precision, preferred_element_type=jnp.float32)

    @pl.when(i == 0)
    def _() -> None:
        def clear(block: jax.Array, _: Any) -> int:
            dk_state[block] = dv_state[block] = jnp.zeros((s, plan.head_dim), jnp.float32)
            return 0

        jax.lax.fori_loop(0, plan.chunk_blocks, clear, 0)

    def finish(_: int, place: Place) -> None:
        result = dq_state[...] * plan.scale
        if adds:
            result += steps.rows_of(dq_before, place.queries)
        dq[0, 0, :, place.queries, :] = result.reshape(plan.group, TILE, plan.head_dim)

    def step(_: int, summed: Place, weighed: Place, multiplied: Place) -> None:
        step_entries = steps.read_step(entries, summed, plan)
        q_tile, do_tile = (steps.rows_of(ref, summed.queries) for ref in (q, do))
        kept = jnp.where(summed.is_first(bounds), 0.0, 1.0)
        dlogits = factors[rows:]
        dq_state[...] = kept * dq_state[...] + dot(dlogits, steps.fetch(k, step_entries), (((1,), (0,)), ((), ())))
        dv_step = dot(factors[:rows], do_tile, (((0,), (0,)), ((), ())))
        dk_step = dot(dlogits, q_tile, (((0,), (0,)), ((), ())))
        for j, entry in enumerate(step_entries):
            block = steps.block_of(entry)
            dv_state[block] += dv_step[j * s : (j + 1) * s]
            dk_state[block] += dk_step[j * s : (j + 1) * s]

        tile = weighed.held_tile
        next_weights = jnp.exp2(products[0] - steps.over_keys(tops[tile], plan))
        factors[:rows] = next_weights.astype(factors.dtype)
        factors[rows:] = (next_weights * (products[1] - steps.over_keys(shifts[tile], plan))).astype(factors.dtype)

        next_entries = steps.read_step(entries, multiplied, plan)
        bias = steps.hidden_bias(next_entries, first_query + multiplied.tile * TILE, plan)
        k_step, v_step = steps.fetch(k, next_entries), steps.fetch(v, next_entries)
        q_tile = steps.scaled(steps.rows_of(q, multiplied.queries), plan)
        products[0] = steps.step_logits(q_tile, k_step, bias, plan)
        products[1] = dot(steps.rows_of(do, multiplied.queries), v_step, (((1,), (1,)), ((), ())))

    def spread(tile: jax.Array, _: Any) -> int:
        for lanes, spread_out in ((lse, tops), (delta, shifts)):
            row = lanes[0, 0, pl.ds(tile, 1), :]
            spread_out[tile] = steps.lanes_to_columns(row, rows)
        return 0

    def walk() -> None:
        jax.lax.fori_loop(0, TILES, spread, 0)
        # What the first steps find, whose gradients are 0.
        dq_state[...] = jnp.zeros_like(dq_state)
        products[...] = jnp.full_like(products, steps.HIDDEN)
        factors[...] = jnp.zeros_like(factors)
        steps.run_stages(step, finish, bounds)

    if adds:
        idle = steps.is_idle(bounds)
        pl.when(jnp.logical_not(idle))(walk)

        @pl.when(idle)
        def _() -> None:
            dq[...] = dq_before[...]
    else:
        walk()

    @pl.when(i == last)
    def _() -> None:
        copies = [
            pltpu.make_async_copy(state, out.at[b, n], semaphores.at[i])
            for i, (state, out) in enumerate(((dk_state, dk), (dv_state, dv)))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
