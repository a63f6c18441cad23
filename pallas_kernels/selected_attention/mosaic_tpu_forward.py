"""Forward kernel of selected attention on TPU: a chunk of keys stays in VMEM, tiles of queries walk their lists."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import tpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.selected_attention import mosaic_tpu_steps as steps
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Place, Plan, Ref


def forward_chunk(
    first_query: Int32[Array, "1"],
    entries: Int32[Array, "B N grid 1 entries"],
    bounds: Int32[Array, "B N grid 1 bounds"],
    q: Float[Array, "B N G T D"],
    k: Float[Array, "B N blocks s D"],
    v: Float[Array, "B N blocks s D"],
    before: tuple[Float32[Array, "B N G T D"], Float32[Array, "B N tiles 128"]] | None,
    plan: Plan,
    out_dtype: Any,
) -> tuple[Float[Array, "B N G T D"], Float32[Array, "B N tiles 128"]]:
    """Attends to one chunk of keys and merges the result into that of the chunks before.

    Args:
      first_query: its index, counted from the chunk's first key.
      entries: eight lists per grid step, blocks counted from the chunk's first.
      bounds: see `mosaic_tpu_steps.BOUNDS`.
      q: queries whose products with keys are logits to the base of 2.
      k: the chunk's keys, block by block.
      v: its values.
      before: output and log-sum-exp over earlier chunks.
      plan: see there.
      out_dtype: of the output.

    Returns:
      Output, and the log-sum-exp to the base of 2, a lane per row of each tile: -1e30 where no key was seen.
    """
    batch, heads, _, tokens, size = q.shape
    spec = steps.specs(plan)
    in_specs = [*spec.lists, spec.queries, spec.keys, spec.keys]
    inputs = [entries, bounds, q, k, v]
    if before is not None:
        in_specs += [spec.queries, spec.rows]
        inputs += before
    logits = steps.most_logits(q, plan)
    out_shape = (
        jax.ShapeDtypeStruct(q.shape, out_dtype),
        jax.ShapeDtypeStruct((batch, heads, tokens // TILE, tpu.LANES), jnp.float32),
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, merges=before is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tokens // (TILES * TILE)),
            in_specs=in_specs,
            out_specs=(spec.queries, spec.rows),
            scratch_shapes=[
                pltpu.VMEM((plan.rows, size), jnp.float32),
                *[pltpu.VMEM((plan.rows, tpu.LANES), jnp.float32)] * 5,
                pltpu.VMEM((plan.rows, plan.step_keys), jnp.float32),
                pltpu.VMEM((plan.rows, plan.step_keys), v.dtype),
            ],
        ),
        out_shape=out_shape,
        compiler_params=tpu.compiler_params(("parallel", "parallel", "parallel"), plan.vmem_limit),
        cost_estimate=tpu.cost(4 * logits * size, logits, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_forward",
    )(first_query, *inputs)


def _kernel(
    first: Ref, entries: Ref, bounds: Ref, q: Ref, k: Ref, v: Ref, *rest: Ref, plan: Plan, merges: bool
) -> None:
    o_before, lse_before = rest[:2] if merges else (None, None)
    o, lse, state, tops, totals, done_tops, done_totals, shrinks, logits, weights = rest[2 * merges :]
    first_query = first[0] + pl.program_id(2) * (TILES * TILE)
    # What the first steps of the pipeline find: weights of 0 for values that no list names.
    for x in (state, tops, totals, shrinks):
        x[...] = jnp.zeros_like(x)
    logits[...] = jnp.full_like(logits, steps.HIDDEN)
    weights[...] = jnp.zeros_like(weights)

    def finish(place: Place) -> None:
        top, total = done_tops[:, :1], jnp.sum(done_totals[...], axis=1, keepdims=True)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        result, top = state[...] / total, jnp.where(empty, EMPTY_LSE, top + jnp.log2(total))
        if merges:
            top_before = steps.lanes_to_columns(lse_before[0, 0, pl.ds(place.tile, 1), :], plan.rows)[:, :1]
            highest = jnp.maximum(top_before, top)
            share_before, share = jnp.exp2(top_before - highest), jnp.exp2(top - highest)
            both = share_before + share
            result = (share_before * steps.rows_of(o_before, place.queries) + share * result) / both
            top = jnp.where(highest > EMPTY_LSE, highest + jnp.log2(both), EMPTY_LSE)
        o[0, 0, :, place.queries, :] = result.astype(o.dtype).reshape(plan.group, TILE, plan.head_dim)
        lse[0, 0, pl.ds(place.tile, 1), :] = steps.columns_to_lanes(top)

    def step(summed: Place, weighed: Place, multiplied: Place) -> None:
        v_step = steps.fetch(v, steps.read_step(entries, summed, plan))
        state[...] = shrinks[:, : plan.head_dim] * state[...] + jnp.dot(
            weights[...], v_step, precision=plan.precision, preferred_element_type=jnp.float32
        )

        next_logits = logits[...]
        starts = weighed.is_first(bounds)
        old_top, old_total = tops[...], totals[...]
        done_tops[...], done_totals[...] = old_top, old_total
        old_top = jnp.where(starts, EMPTY_LSE, old_top)
        new_top = jnp.maximum(old_top, jnp.max(next_logits, axis=1, keepdims=True))
        next_weights = jnp.exp2(next_logits - steps.over_keys(new_top, plan))
        shrink = jnp.where(starts, 0.0, jnp.exp2(old_top - new_top))
        tops[...], shrinks[...] = new_top, shrink
        # One sum per lane: those over the lanes wait for the tile's end.
        totals[...] = shrink * old_total + sum(jnp.split(next_weights, plan.step_keys // tpu.LANES, axis=1))
        weights[...] = next_weights.astype(weights.dtype)

        step_entries = steps.read_step(entries, multiplied, plan)
        bias = steps.hidden_bias(step_entries, first_query + multiplied.tile * TILE, plan)
        q_tile = steps.rows_of(q, multiplied.queries)
        logits[...] = steps.step_logits(q_tile, steps.fetch(k, step_entries), bias, plan)

        @pl.when(summed.is_last(bounds))
        def _() -> None:
            finish(summed)

    steps.run_stages(step, bounds)
