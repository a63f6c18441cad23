"""Backward kernel of selected attention on TPU: one walk over the lists gives dq, dk and dv.

The gradients of a chunk's keys stay in VMEM beside the keys and are added up in the order of the queries, so that no
list by key is needed, a block that every query chose costs no more than others, and the sums have the same bits
whenever the kernel runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.selected_attention import mosaic_tpu_steps as steps_
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Plan


def _kernel(scalars, entries, bounds, q, k, v, do, lse, delta, *rest, plan: Plan, carried: bool):
    dq_before = rest[0] if carried else None
    dq, dk, dv, dq_state, dk_state, dv_state, tops, shifts, products, factors, semaphores = rest[carried:]
    rows, s = plan.rows, plan.block_size
    b, n, i = (pl.program_id(axis) for axis in range(3))
    last = pl.num_programs(2) - 1
    first_query = scalars[0] + i * (TILES * TILE)
    dot = functools.partial(jax.lax.dot_general, precision=plan.precision, preferred_element_type=jnp.float32)

    @pl.when(i == 0)
    def _():
        def clear(block, _):
            dk_state[block] = dv_state[block] = jnp.zeros((s, plan.head_dim), jnp.float32)
            return 0

        jax.lax.fori_loop(0, plan.chunk_blocks, clear, 0)

    def spread(tile, _):
        for lanes, spread_out in ((lse, tops), (delta, shifts)):
            row = lanes[0, 0, pl.ds(tile, 1), :]
            spread_out[tile] = jnp.broadcast_to(row, (tpu.LANES, tpu.LANES)).T[:rows]
        return 0

    jax.lax.fori_loop(0, TILES, spread, 0)
    # What the first step of the pipeline finds.
    dq_state[...] = jnp.zeros_like(dq_state)
    products[...] = jnp.full_like(products, steps_.HIDDEN)
    factors[...] = jnp.zeros_like(factors)

    def finish(place):
        tokens = steps_.tokens_of(place)
        result = dq_state[...] * plan.scale
        if carried:
            result += steps_.rows_of(dq_before, tokens)
        dq[0, 0, :, tokens, :] = result.reshape(plan.group, TILE, plan.head_dim)

    def step(_, carry):
        """Adds up the gradients of one step, weighs the keys of the next, multiplies rows and keys of the one after."""
        summed, weighed, multiplied = carry
        step_entries = steps_.read_step(entries, summed, plan)
        tokens = steps_.tokens_of(summed)
        q_tile, do_tile = steps_.rows_of(q, tokens), steps_.rows_of(do, tokens)
        kept = jnp.where(summed.is_first(bounds), 0.0, 1.0)
        dlogits = factors[rows:]
        dq_state[...] = kept * dq_state[...] + dot(dlogits, steps_.fetch(k, step_entries), (((1,), (0,)), ((), ())))
        dv_step = dot(factors[:rows], do_tile, (((0,), (0,)), ((), ())))
        dk_step = dot(dlogits, q_tile, (((0,), (0,)), ((), ())))
        for j, entry in enumerate(step_entries):
            block = steps_.block_of(entry)
            dv_state[block] += dv_step[j * s : (j + 1) * s]
            dk_state[block] += dk_step[j * s : (j + 1) * s]

        tile = jnp.minimum(jnp.maximum(weighed.tile, 0), TILES - 1)
        next_weights = jnp.exp2(products[0] - steps_.over_lanes(tops[tile], plan))
        factors[:rows] = next_weights.astype(factors.dtype)
        factors[rows:] = (next_weights * (products[1] - steps_.over_lanes(shifts[tile], plan))).astype(factors.dtype)

        next_entries = steps_.read_step(entries, multiplied, plan)
        bias = steps_.hidden_bias(next_entries, first_query + multiplied.tile * TILE, plan)
        tokens = steps_.tokens_of(multiplied)
        k_step, v_step = steps_.fetch(k, next_entries), steps_.fetch(v, next_entries)
        products[0] = steps_.scaled_logits(steps_.rows_of(q, tokens), k_step, bias, plan)
        products[1] = dot(steps_.rows_of(do, tokens), v_step, (((1,), (1,)), ((), ())))

        @pl.when(summed.is_last(bounds))
        def _():
            finish(summed)

        return weighed, multiplied, multiplied.next(bounds)

    nowhere = steps_.Place(*map(jnp.int32, steps_.NO_PLACE))
    start = nowhere, nowhere, steps_.first_place(bounds)
    jax.lax.fori_loop(-2, steps_.total_steps(bounds), step, start)

    @pl.when(i == last)
    def _():
        copies = [
            pltpu.make_async_copy(state, out.at[b, n], semaphores.at[i])
            for i, (state, out) in enumerate(((dk_state, dk), (dv_state, dv)))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()


def backward_chunk(scalars, entries, bounds, q, k, v, do, lse, delta, dq_before, plan: Plan):
    batch, heads, group, tokens, size = q.shape
    carried = dq_before is not None
    q_spec, lse_spec, kv_spec, list_specs = steps_.specs(plan)
    in_specs = [*list_specs, q_spec, kv_spec, kv_spec, q_spec, lse_spec, lse_spec]
    inputs = [entries, bounds, q, k, v, do, lse, delta]
    if carried:
        in_specs.append(q_spec)
        inputs.append(dq_before)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    pairs = 1.0 * batch * heads * tokens * group * min(plan.places, plan.chunk_blocks) * plan.block_size
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        *[jax.ShapeDtypeStruct(k.shape, jnp.float32)] * 2,
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, carried=carried),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tokens // (TILES * TILE)),
            in_specs=in_specs,
            out_specs=[q_spec, hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((plan.rows, size), jnp.float32),
                *[pltpu.VMEM(k.shape[2:], jnp.float32)] * 2,
                *[pltpu.VMEM((TILES, plan.rows, tpu.LANES), jnp.float32)] * 2,
                pltpu.VMEM((2, plan.rows, plan.step_keys), jnp.float32),
                pltpu.VMEM((2 * plan.rows, plan.step_keys), q.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=out_shape,
        input_output_aliases={len(inputs): 0} if carried else {},
        compiler_params=tpu.compiler_params(("parallel", "parallel", "arbitrary"), plan.vmem_limit),
        cost_estimate=tpu.cost(10 * pairs * size, pairs, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_backward",
    )(scalars, *inputs)
