"""Forward kernel of selected attention on TPU: a chunk of keys stays in VMEM, tiles of queries walk their lists."""

import functools
from typing import Any, NamedTuple

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
    place: Int32[Array, "2"],
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
      place: the first query's index, counted from the chunk's first key, and the chunk's.
      entries: eight lists per grid step, blocks counted from the chunk's first.
      bounds: see `mosaic_tpu_steps.BOUNDS`.
      q: queries.
      k: keys of all chunks, block by block.
      v: their values.
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
            scratch_shapes=[pltpu.VMEM(spec.queries.block_shape, q.dtype), *[*_buffers(plan, v.dtype)] * body_steps()],
        ),
        out_shape=out_shape,
        compiler_params=tpu.compiler_params(("parallel", "parallel", "parallel"), plan.vmem_limit),
        cost_estimate=tpu.cost(4 * logits * size, logits, *inputs, *out_shape),
        interpret=tpu.interpreted(),
        name="selected_attention_forward",
    )(place, *inputs)


def body_steps() -> int:
    """Steps in the loop's body: four fill v6e's vector slots better than two, elsewhere they gain nothing."""
    return 4 if tpu.target_chip().name == "v6e" else 2


class _Buffers(NamedTuple):
    """What the steps hand on, in VMEM.

    Each step of the loop's body has its own: it reads those of the step before, so that none of its stages waits for
    another.

    Attributes:
      state: weighted sum of the values.
      peaks: maxima of the logits, one per lane.
      tops: running maxima, as the fields up to `shrinks` alike in all lanes.
      done_tops: the same one step earlier, that of the sum.
      shrinks: factors of the next step's sum.
      totals: sums of weights, one per lane.
      done_totals: the same one step earlier.
      logits: to the base of 2.
      weights: their exponentials.
    """

    state: Any
    peaks: Any
    tops: Any
    done_tops: Any
    shrinks: Any
    totals: Any
    done_totals: Any
    logits: Any
    weights: Any


def _buffers(plan: Plan, dtype: Any) -> _Buffers:
    rows, keys = plan.rows, plan.step_keys
    statistics = [pltpu.VMEM((rows, tpu.LANES), jnp.float32)] * 6
    state, logits = (pltpu.VMEM((rows, size), jnp.float32) for size in (plan.head_dim, keys))
    return _Buffers(state, *statistics, logits, pltpu.VMEM((rows, keys), dtype))


def _kernel(
    chunk_place: Ref, entries: Ref, bounds: Ref, q: Ref, k: Ref, v: Ref, *rest: Ref, plan: Plan, merges: bool
) -> None:
    o_before, lse_before = rest[:2] if merges else (None, None)
    o, lse, scaled, *scratch = rest[2 * merges :]
    fields = len(_Buffers._fields)
    slots = [_Buffers(*scratch[i * fields : (i + 1) * fields]) for i in range(len(scratch) // fields)]
    first_query = chunk_place[0] + pl.program_id(2) * (TILES * TILE)
    vectors = plan.step_keys // tpu.LANES

    def finish(slot: int, place: Place) -> None:
        done, size = slots[slot], plan.head_dim
        top, total = done.done_tops[...], jnp.sum(done.done_totals[...], axis=1, keepdims=True)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        result, top = done.state[...] / total, jnp.where(empty, EMPTY_LSE, top + jnp.log2(total))
        if merges:
            top_before = steps.lanes_to_columns(lse_before[0, 0, pl.ds(place.tile, 1), :], plan.rows)
            highest = jnp.maximum(top_before, top)
            share_before, share = jnp.exp2(top_before - highest), jnp.exp2(top - highest)
            both = share_before + share
            o_rows = steps.rows_of(o_before, place.queries)
            result = (share_before[:, :size] * o_rows + share[:, :size] * result) / both[:, :size]
            top = jnp.where(highest > EMPTY_LSE, highest + jnp.log2(both), EMPTY_LSE)
        o[0, 0, :, place.queries, :] = result.astype(o.dtype).reshape(plan.group, TILE, plan.head_dim)
        lse[0, 0, pl.ds(place.tile, 1), :] = steps.columns_to_lanes(top)

    def step(slot: int, summed: Place, weighed: Place, multiplied: Place) -> None:
        before, after = slots[slot - 1], slots[slot]
        step_entries = steps.read_step(entries, multiplied, plan)
        bias = steps.hidden_bias(step_entries, first_query + multiplied.tile * TILE, plan)
        q_tile = steps.rows_of(scaled, multiplied.queries)
        logits = steps.step_logits(q_tile, steps.fetch(k, step_entries), bias, plan)
        after.logits[...] = logits
        after.peaks[...] = functools.reduce(jnp.maximum, jnp.split(logits, vectors, axis=1))

        starts = weighed.is_first(bounds)
        old_top, old_total = before.tops[...], before.totals[...]
        after.done_tops[...], after.done_totals[...] = old_top, old_total
        old_top = jnp.where(starts, EMPTY_LSE, old_top)
        new_top = jnp.maximum(old_top, jnp.max(before.peaks[...], axis=1, keepdims=True))
        shrink = jnp.where(starts, 0.0, jnp.exp2(old_top - new_top))
        after.tops[...], after.shrinks[...] = new_top, shrink
        weights = jnp.exp2(before.logits[...] - steps.over_keys(new_top, plan))
        # One sum per lane: those over the lanes wait for the tile's end.
        after.totals[...] = shrink * old_total + sum(jnp.split(weights, vectors, axis=1))
        after.weights[...] = weights.astype(after.weights.dtype)

        v_step = steps.fetch(v, steps.read_step(entries, summed, plan))
        after.state[...] = before.shrinks[:, : plan.head_dim] * before.state[...] + jnp.dot(
            before.weights[...], v_step, precision=plan.precision, preferred_element_type=jnp.float32
        )

    def walk() -> None:
        scaled[...] = steps.scaled(q[...], plan)
        # What the first steps of the pipeline find: weights of 0 for values that no list names.
        start = slots[-1]
        for x in (start.state, start.tops, start.totals, start.shrinks, start.weights):
            x[...] = jnp.zeros_like(x)
        for x in (start.logits, start.peaks):
            x[...] = jnp.full_like(x, steps.HIDDEN)
        steps.run_stages(step, finish, bounds, slots=len(slots))

    if not merges:
        walk()
        return
    idle = steps.is_idle(bounds)
    pl.when(jnp.logical_not(idle))(walk)

    @pl.when(idle)
    def _() -> None:
        o[...] = o_before[...].astype(o.dtype)
        lse[...] = lse_before[...]
