"""Forward kernel of selected attention on TPU: a chunk of keys stays in VMEM, tiles of queries walk their lists."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.selected_attention import mosaic_tpu_steps as steps_
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Plan


def _kernel(scalars, entries, bounds, q, k, v, *rest, plan: Plan, carried: bool):
    if carried:
        o_before, lse_before, o, lse, state, logits, weights = rest
    else:
        o, lse, state, logits, weights = rest
        o_before = lse_before = None
    rows = plan.rows
    first_query = scalars[0] + pl.program_id(2) * (TILES * TILE)

    def tile_body(tile, _):
        place = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        first_step, steps = bounds[0, 0, 0, 0, 2 * tile], bounds[0, 0, 0, 0, 2 * tile + 1]
        q_tile = steps_.rows_of(q, place)
        if carried:
            top = steps_.columns(lse_before[0, 0, pl.ds(tile, 1), :], rows) * tpu.LOG2_E
            total = jnp.where(top > EMPTY_LSE, 1.0, 0.0)
            state[...] = steps_.rows_of(o_before, place)
        else:
            top = jnp.full((rows, 1), EMPTY_LSE, jnp.float32)
            total = jnp.zeros((rows, 1), jnp.float32)
            state[...] = jnp.zeros_like(state)

        logits[...] = jnp.full_like(logits, steps_.HIDDEN)
        weights[...] = jnp.zeros_like(weights)

        def step(i, here, carry):
            """Sums the values of step i, weighs the keys of the next, multiplies queries with those of the one after."""
            top, total, shrink = carry
            v_step = steps_.fetch(v, steps_.read_step(entries, tile, jnp.maximum(i, 0), plan))
            state[...] = shrink * state[...] + jnp.dot(
                weights[here], v_step, precision=plan.precision, preferred_element_type=jnp.float32
            )

            next_logits = logits[1 - here]
            new_top = jnp.maximum(top, jnp.max(next_logits, axis=1, keepdims=True))
            next_weights = jnp.exp2(next_logits - new_top)
            shrink = jnp.exp2(top - new_top)
            total = shrink * total + jnp.sum(next_weights, axis=1, keepdims=True)
            weights[1 - here] = next_weights.astype(weights.dtype)

            step_entries = steps_.read_step(entries, tile, i + 2, plan)
            bias = steps_.hidden_bias(step_entries, first_query + tile * TILE, plan)
            logits[here] = steps_.scaled_logits(q_tile, steps_.fetch(k, step_entries), bias, plan)
            return new_top, total, shrink

        def two_steps(i, carry):
            i = first_step + 2 * i - 2
            return step(i + 1, 1, step(i, 0, carry))

        top, total, _ = jax.lax.fori_loop(0, pl.cdiv(steps + 2, 2), two_steps, (top, total, jnp.ones_like(top)))
        empty = total == 0.0
        safe = jnp.where(empty, 1.0, total)
        o[0, 0, :, place, :] = (state[...] / safe).astype(o.dtype).reshape(plan.group, TILE, plan.head_dim)
        column = jnp.where(empty, EMPTY_LSE, (top + jnp.log2(safe)) / tpu.LOG2_E)
        lse[0, 0, pl.ds(tile, 1), :] = steps_.rows_to_lanes(column)
        return 0

    jax.lax.fori_loop(0, TILES, tile_body, 0)


def forward_chunk(scalars, entries, bounds, q, k, v, before, plan: Plan, out_dtype):
    batch, heads, group, tokens, size = q.shape
    carried = before is not None
    q_spec, lse_spec, kv_spec, list_specs = steps_.specs(plan, entries.shape[-1])
    in_specs = [*list_specs, q_spec, kv_spec, kv_spec]
    inputs = [entries, bounds, q, k, v]
    if carried:
        in_specs += [q_spec, lse_spec]
        inputs += list(before)
    pairs = 1.0 * batch * heads * tokens * group * min(entries.shape[-1], k.shape[2]) * plan.block_size
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, out_dtype),
        jax.ShapeDtypeStruct((batch, heads, tokens // TILE, tpu.LANES), jnp.float32),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, carried=carried),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tokens // (TILES * TILE)),
            in_specs=in_specs,
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[
                pltpu.VMEM((plan.rows, size), jnp.float32),
                pltpu.VMEM((2, plan.rows, plan.step_keys), jnp.float32),
                pltpu.VMEM((2, plan.rows, plan.step_keys), v.dtype),
            ],
        ),
        out_shape=out_shape,
        compiler_params=tpu.compiler_params(("parallel", "parallel", "parallel"), plan.vmem_limit),
        cost_estimate=tpu.cost(4 * pairs * size, pairs, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_forward",
    )(scalars, *inputs)
