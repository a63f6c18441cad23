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
    dq, dk, dv, dq_state, dk_state, dv_state, semaphores = rest[carried:]
    rows, s = plan.rows, plan.block_size
    b, n, i = (pl.program_id(axis) for axis in range(3))
    last = pl.num_programs(2) - 1
    first_query = scalars[0] + i * (TILES * TILE)

    @pl.when(i == 0)
    def _():
        def clear(block, _):
            dk_state[block] = dv_state[block] = jnp.zeros((s, plan.head_dim), jnp.float32)
            return 0

        jax.lax.fori_loop(0, plan.chunk_blocks, clear, 0)

    def tile_body(tile, _):
        place = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        first_step, steps = bounds[0, 0, 0, 0, 2 * tile], bounds[0, 0, 0, 0, 2 * tile + 1]
        q_tile, do_tile = steps_.rows_of(q, place), steps_.rows_of(do, place)
        top = steps_.columns(lse[0, 0, pl.ds(tile, 1), :], rows) * tpu.LOG2_E
        shift = steps_.columns(delta[0, 0, pl.ds(tile, 1), :], rows)
        dq_state[...] = jnp.zeros_like(dq_state)
        dot = functools.partial(jax.lax.dot_general, precision=plan.precision, preferred_element_type=jnp.float32)

        def step(i, _):
            step_entries = steps_.read_step(entries, tile, first_step + i, plan)
            bias = steps_.hidden_bias(step_entries, first_query + tile * TILE, plan)
            k_step, v_step = steps_.fetch(k, step_entries), steps_.fetch(v, step_entries)
            weights = jnp.exp2(steps_.scaled_logits(q_tile, k_step, bias, plan) - top)
            dweights = dot(do_tile, v_step, (((1,), (1,)), ((), ())))
            dlogits = (weights * (dweights - shift)).astype(q_tile.dtype)
            dq_state[...] += dot(dlogits, k_step, (((1,), (0,)), ((), ())))
            dv_step = dot(weights.astype(do_tile.dtype), do_tile, (((0,), (0,)), ((), ())))
            dk_step = dot(dlogits, q_tile, (((0,), (0,)), ((), ())))
            for j, entry in enumerate(step_entries):
                block = steps_.block_of(entry)
                dv_state[block] += dv_step[j * s : (j + 1) * s]
                dk_state[block] += dk_step[j * s : (j + 1) * s]
            return 0

        jax.lax.fori_loop(0, steps, step, 0)
        result = dq_state[...] * plan.scale
        if carried:
            result += steps_.rows_of(dq_before, place)
        dq[0, 0, :, place, :] = result.astype(dq.dtype).reshape(plan.group, TILE, plan.head_dim)
        return 0

    jax.lax.fori_loop(0, TILES, tile_body, 0)

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
    q_spec, lse_spec, kv_spec, list_specs = steps_.specs(plan, entries.shape[-1])
    in_specs = [*list_specs, q_spec, kv_spec, kv_spec, q_spec, lse_spec, lse_spec]
    inputs = [entries, bounds, q, k, v, do, lse, delta]
    if carried:
        in_specs.append(q_spec)
        inputs.append(dq_before)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    pairs = 1.0 * batch * heads * tokens * group * min(entries.shape[-1], plan.chunk_blocks) * plan.block_size
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
