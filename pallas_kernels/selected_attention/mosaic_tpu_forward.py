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
    o_before, lse_before = rest[:2] if carried else (None, None)
    o, lse, state, tops, totals, done_tops, done_totals, shrinks, logits, weights = rest[2 * carried :]
    first_query = scalars[0] + pl.program_id(2) * (TILES * TILE)
    # What the first steps of the pipeline find: weights of 0 for values that no list names.
    for x in (state, tops, totals, shrinks):
        x[...] = jnp.zeros_like(x)
    logits[...] = jnp.full_like(logits, steps_.HIDDEN)
    weights[...] = jnp.zeros_like(weights)

    def finish(place):
        top, total = done_tops[:, :1], jnp.sum(done_totals[...], axis=1, keepdims=True)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        result, top = state[...] / total, jnp.where(empty, EMPTY_LSE, top + jnp.log2(total))
        tokens = steps_.tokens_of(place)
        if carried:
            top_before = steps_.columns(lse_before[0, 0, pl.ds(place.tile, 1), :], plan.rows)
            top_before = jnp.where(top_before > EMPTY_LSE, top_before * tpu.LOG2_E, EMPTY_LSE)
            highest = jnp.maximum(top_before, top)
            share_before, share = jnp.exp2(top_before - highest), jnp.exp2(top - highest)
            both = share_before + share
            result = (share_before * steps_.rows_of(o_before, tokens) + share * result) / both
            top = jnp.where(highest > EMPTY_LSE, highest + jnp.log2(both), EMPTY_LSE)
        o[0, 0, :, tokens, :] = result.astype(o.dtype).reshape(plan.group, TILE, plan.head_dim)
        column = jnp.where(top > EMPTY_LSE, top / tpu.LOG2_E, EMPTY_LSE)
        lse[0, 0, pl.ds(place.tile, 1), :] = steps_.rows_to_lanes(column)

    def step(_, carry):
        """Sums the values of one step, weighs the keys of the next, multiplies queries and keys of the one after."""
        summed, weighed, multiplied = carry
        v_step = steps_.fetch(v, steps_.read_step(entries, summed, plan))
        state[...] = shrinks[:, : plan.head_dim] * state[...] + jnp.dot(
            weights[...], v_step, precision=plan.precision, preferred_element_type=jnp.float32
        )

        next_logits = logits[...]
        starts = weighed.is_first(bounds)
        old_top, old_total = tops[...], totals[...]
        done_tops[...], done_totals[...] = old_top, old_total
        old_top = jnp.where(starts, EMPTY_LSE, old_top)
        new_top = jnp.maximum(old_top, jnp.max(next_logits, axis=1, keepdims=True))
        next_weights = jnp.exp2(next_logits - steps_.over_lanes(new_top, plan))
        shrink = jnp.where(starts, 0.0, jnp.exp2(old_top - new_top))
        tops[...], shrinks[...] = new_top, shrink
        # One sum per lane: those over the lanes wait for the tile's end.
        totals[...] = shrink * old_total + sum(jnp.split(next_weights, plan.step_keys // tpu.LANES, axis=1))
        weights[...] = next_weights.astype(weights.dtype)

        step_entries = steps_.read_step(entries, multiplied, plan)
        bias = steps_.hidden_bias(step_entries, first_query + multiplied.tile * TILE, plan)
        q_tile = steps_.rows_of(q, steps_.tokens_of(multiplied))
        logits[...] = steps_.scaled_logits(q_tile, steps_.fetch(k, step_entries), bias, plan)

        @pl.when(summed.is_last(bounds))
        def _():
            finish(summed)

        return weighed, multiplied, multiplied.next(bounds)

    nowhere = steps_.Place(*map(jnp.int32, steps_.NO_PLACE))
    start = nowhere, nowhere, steps_.first_place(bounds)
    jax.lax.fori_loop(-2, steps_.total_steps(bounds), step, start)


def forward_chunk(scalars, entries, bounds, q, k, v, before, plan: Plan, out_dtype):
    batch, heads, group, tokens, size = q.shape
    carried = before is not None
    q_spec, lse_spec, kv_spec, list_specs = steps_.specs(plan)
    in_specs = [*list_specs, q_spec, kv_spec, kv_spec]
    inputs = [entries, bounds, q, k, v]
    if carried:
        in_specs += [q_spec, lse_spec]
        inputs += list(before)
    pairs = 1.0 * batch * heads * tokens * group * min(plan.places, k.shape[2]) * plan.block_size
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
                *[pltpu.VMEM((plan.rows, tpu.LANES), jnp.float32)] * 5,
                pltpu.VMEM((plan.rows, plan.step_keys), jnp.float32),
                pltpu.VMEM((plan.rows, plan.step_keys), v.dtype),
            ],
        ),
        out_shape=out_shape,
        compiler_params=tpu.compiler_params(("parallel", "parallel", "parallel"), plan.vmem_limit),
        cost_estimate=tpu.cost(4 * pairs * size, pairs, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_forward",
    )(scalars, *inputs)
