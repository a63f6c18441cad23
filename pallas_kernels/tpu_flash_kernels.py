"""The kernels of `tpu_flash`: sizes and grids of a call, the forward pass, and the gradients in one pass or two."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32, Int32

from pallas_kernels import tpu
from pallas_kernels.common import EMPTY_LSE

_HIDDEN = 2 * EMPTY_LSE  # below the running maximum's start: a hidden key's weight is exp(-1e30) = 0
_BOUNDS = 4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a call is cut.

    Attributes:
      queries: tokens of a tile; all heads of their group are in it.
      keys: keys of one grid step, which are in VMEM together.
      chunk: keys of one product; divides `keys`.
    """

    queries: int
    keys: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Static sizes of one call, and the kernels it makes."""

    name: str
    tiles: Tiles
    window: int | None
    batch: int
    heads: int
    group: int
    size: int
    dtype: Any
    query_tiles: int
    key_tiles: int
    stride: int | None = None
    """Keys in place: a query sees every stride-th one before its end, and the last tile is cut off."""

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, name: str, tiles: Tiles, window: int | None) -> "Call":
        """The call for group-major q [B, N, G, T, D] and k [B, S, N, D]."""
        batch, heads, group, queries, size = q.shape
        query_tiles, key_tiles = -(-queries // tiles.queries), -(-k.shape[1] // tiles.keys)
        return cls(name, tiles, window, batch, heads, group, size, q.dtype, query_tiles, key_tiles)

    @property
    def tokens(self) -> int:
        """T, padded to whole tiles."""
        return self.query_tiles * self.tiles.queries

    @property
    def lanes(self) -> int:
        """Query rows of a tile: its tokens for each head of the group."""
        return self.group * self.tiles.queries

    @property
    def scale(self) -> float:
        """What multiplies the logits."""
        return self.size**-0.5

    @property
    def key_steps(self) -> int:
        """Key tiles that the queries of one tile can see."""
        if self.window is None:
            return self.key_tiles
        return min(self.key_tiles, (self.tiles.queries + self.window - 2) // self.tiles.keys + 2)

    @property
    def query_steps(self) -> int:
        """Query tiles that can see the keys of one tile."""
        if self.window is None:
            return self.query_tiles
        return min(self.query_tiles, (self.tiles.keys + self.window - 2) // self.tiles.queries + 2)

    def keys(self, x: jax.Array) -> jax.Array:
        """Keys or values as the kernels take them, [B, N, S, D]."""
        return tpu.keys_head_major(x, self.key_tiles * self.tiles.keys)

    def ends(self, end: jax.Array) -> Int32[jax.Array, "B 1 T"]:
        """The ends as the kernels take them: padding sees no key."""
        return tpu.pad_axis(end.astype(jnp.int32), 1, self.tokens)[:, None]

    def bounds(self, end: Int32[jax.Array, "B 1 T"]) -> Int32[jax.Array, "scalars"]:
        """Per tile of queries the keys that some query sees [low, high) and that all see [whole_low, whole_high)."""
        end = end.reshape(self.batch * self.query_tiles, self.tiles.queries)
        start = jnp.zeros_like(end) if self.window is None else jnp.maximum(end - self.window, 0)
        low = jnp.min(jnp.where(end > 0, start, jnp.iinfo(jnp.int32).max), axis=1)
        high = jnp.max(end, axis=1)
        low = jnp.where(high > 0, low, 0)
        return jnp.concatenate([low, high, jnp.max(start, axis=1), jnp.min(end, axis=1)])

    def reach(self, bounds: jax.Array) -> Int32[jax.Array, "scalars"]:
        """Per tile of keys the first and the last tile of queries that sees some of it; (0, -1) for none."""
        low, high = bounds.reshape(_BOUNDS, self.batch, 1, self.query_tiles)[:2]
        first_key = (jnp.arange(self.key_tiles) * self.tiles.keys)[:, None]
        sees = (low < first_key + self.tiles.keys) & (high > first_key)
        index = jnp.arange(self.query_tiles)
        first = jnp.min(jnp.where(sees, index, self.query_tiles), axis=-1)
        last = jnp.max(jnp.where(sees, index, -1), axis=-1)
        return jnp.concatenate([jnp.where(last < 0, 0, first).reshape(-1), last.reshape(-1)])

    def query_specs(self, tile: Any) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Blocks of [B, N, G, T, D], [B, N, G, T] and [B, 1, T], at the tile that a function of the step names."""
        count = self.tiles.queries

        def index(*step: Any) -> tuple[Any, ...]:
            return step[0], step[1], 0, tile(*step)

        return (
            pl.BlockSpec((1, 1, self.group, count, self.size), lambda *step: (*index(*step), 0)),
            pl.BlockSpec((1, 1, self.group, count), index),
            pl.BlockSpec((1, 1, count), lambda *step: (step[0], 0, tile(*step))),
        )

    def key_spec(self, tile: Any) -> pl.BlockSpec:
        """Blocks of [B, N, S, D], at the tile that a function of the step names."""
        shape = (1, 1, self.tiles.keys, self.size)
        return pl.BlockSpec(shape, lambda *step: (step[0], step[1], tile(*step), 0))

    def key_tile(self, b: Any, i: Any, j: Any, bounds: Any) -> Any:
        """The j-th key tile that tile i of the queries sees; past the last one, the last."""
        tile = b * self.query_tiles + i
        low, high = bounds[tile], bounds[self.batch * self.query_tiles + tile]
        return jnp.minimum(_quotient(low, self.tiles.keys) + j, _quotient(jnp.maximum(high - 1, 0), self.tiles.keys))

    def chunk_ranges(self, bounds: Any, b: Any, i: Any, first_key: Any) -> tuple[Any, Any, Any, Any]:
        """Chunks [c0, c3) of a key tile that query tile i sees; all its queries see those in [c1, c2) whole."""
        count, chunk = self.batch * self.query_tiles, self.tiles.chunk
        low, high, whole_low, whole_high = (bounds[n * count + b * self.query_tiles + i] - first_key for n in range(4))
        low, high, whole_low, whole_high = (jnp.clip(x, 0, self.tiles.keys) for x in (low, high, whole_low, whole_high))
        c0, c3 = _quotient(low, chunk), _quotient(high + chunk - 1, chunk)
        c1 = jnp.clip(_quotient(whole_low + chunk - 1, chunk), c0, c3)
        c2 = jnp.clip(_quotient(whole_high, chunk), c1, c3)
        if self.stride is not None:
            return c0, c0, c0, c3
        return c0, c1, c2, c3

    def over_chunks(self, ranges: tuple[Any, Any, Any, Any], body: Any) -> None:
        """Runs body(chunk, masked) over the chunks of `chunk_ranges`."""
        c0, c1, c2, c3 = ranges
        if self.window is not None:
            pl.loop(c0, c1)(functools.partial(body, masked=True))
        pl.loop(c1, c2)(functools.partial(body, masked=False))
        pl.loop(c2, c3)(functools.partial(body, masked=True))

    def visible(self, end: Any, first_key: Any) -> Any:
        """The mask [chunk, lanes] of the keys from `first_key` on; `end` is [1, lanes]."""
        key = first_key + jax.lax.broadcasted_iota(jnp.int32, (self.tiles.chunk, end.shape[1]), 0)
        seen = key < end
        if self.stride is not None and self.stride > 1:
            seen &= ((end - 1 - key) & (self.stride - 1)) == 0
        return seen if self.window is None else seen & (key >= end - self.window)

    def per_lane(self, x: Any) -> Any:
        """A block of values per query head or per token as one row over the lanes."""
        parts = [x[0, 0, g : g + 1] for g in range(self.group)] if x.ndim == 4 else [x[0]] * self.group
        return jnp.concatenate(parts, axis=1)

    def head_lanes(self, g: int) -> slice:
        """The lanes of a head's queries."""
        return slice(g * self.tiles.queries, (g + 1) * self.tiles.queries)

    def store_columns(self, ref: Any, x: Float32[jax.Array, "D lanes"]) -> None:
        """Writes a result per query to a block of [B, N, G, T, D]."""
        ref[0, 0] = x.T.reshape(self.group, self.tiles.queries, self.size).astype(ref.dtype)

    def dot(self, x: Any, y: Any, contract: tuple[int, int]) -> Any:
        """Product of two matrices over an axis of each, summed in float32."""
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(
            x, y, dimensions, preferred_element_type=jnp.float32, precision=tpu.dot_precision(self.dtype)
        )

    def _scratch_bytes(self, outputs: int) -> dict[str, int]:
        tile = (self.tiles.chunk, self.lanes)
        rows = self.lanes * self.size * jnp.dtype(self.dtype).itemsize
        return {
            "tiles of queries": 2 * outputs * rows,
            "tiles of keys": tpu.buffer_bytes((self.tiles.keys, self.size), self.dtype, 4),
            "accumulators": 2 * self.lanes * self.size * 4,
            "logits": tpu.buffer_bytes(tile, jnp.float32, 4),
        }

    def _flops(self, products: int) -> float:
        keys = min(self.key_tiles * self.tiles.keys, self.window or math.inf)
        pairs = self.batch * self.heads * self.group * self.tokens * keys * (1 if self.window else 0.5)
        return 2.0 * products * pairs * self.size

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output [B, N, G, T, D] and log-sum-exp [B, N, G, T] of group-major queries."""
        bounds = self.bounds(end)
        rows, per_query, per_token = self.query_specs(lambda b, n, i, j, bounds: i)
        key = self.key_spec(lambda b, n, i, j, bounds: self.key_tile(b, i, j, bounds))
        limit = tpu.vmem_limit(self.name, self._scratch_bytes(2))
        out = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
        products = self._flops(2)
        return pl.pallas_call(
            functools.partial(_forward_kernel, self),
            name=f"{self.name}_forward",
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.batch, self.heads, self.query_tiles, self.key_steps),
                in_specs=[rows, key, key, per_token],
                out_specs=[rows, per_query],
                scratch_shapes=[
                    pltpu.VMEM((1, self.lanes), jnp.float32),
                    pltpu.VMEM((1, self.lanes), jnp.float32),
                    pltpu.VMEM((self.size, self.lanes), jnp.float32),
                ],
            ),
            compiler_params=tpu.compiler_params(("parallel", "parallel", "parallel", "arbitrary"), limit),
            cost_estimate=tpu.cost(products, products / (4 * self.size), q, k, v, *out),
            interpret=tpu.interpreted(),
        )(bounds, q, k, v, end)

    def backward(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dq, dk and dv from group-major queries, keys, values, ends, do, log-sum-exp and delta."""
        q, k = arrays[:2]
        bounds = self.bounds(arrays[3])
        reach = self.reach(bounds)
        dq, dkv = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)
        if self.key_tiles == 1:
            return self._gradient("backward", (dq, dkv, dkv), bounds, reach, arrays)
        (dq,) = self._gradient("dq", (dq, None, None), bounds, reach, arrays)
        return dq, *self._gradient("dkv", (None, dkv, dkv), bounds, reach, arrays)

    def _gradient(
        self, suffix: str, outputs: tuple[Any, ...], bounds: jax.Array, reach: jax.Array, arrays: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """The gradients whose shape is given: with those of keys, key tiles are the outer axis of the grid."""
        with_dq, with_dkv = outputs[0] is not None, outputs[1] is not None
        if with_dkv:
            grid = (self.batch, self.heads, self.key_tiles, self.query_steps)
            semantics = ("parallel", "parallel", "parallel", "arbitrary")

            def query_tile(b: Any, n: Any, j: Any, i: Any, bounds: Any, reach: Any) -> Any:
                tile = b * self.key_tiles + j
                last = reach[self.batch * self.key_tiles + tile]
                # Fused, every tile of queries is visited, as its dq is written whether it sees keys or not.
                return i if with_dq else jnp.clip(reach[tile] + i, 0, jnp.maximum(last, 0))

            def key_tile(b: Any, n: Any, j: Any, i: Any, bounds: Any, reach: Any) -> Any:
                return j
        else:
            grid = (self.batch, self.heads, self.query_tiles, self.key_steps)
            semantics = ("parallel", "parallel", "parallel", "arbitrary")

            def query_tile(b: Any, n: Any, i: Any, j: Any, bounds: Any, reach: Any) -> Any:
                return i

            def key_tile(b: Any, n: Any, i: Any, j: Any, bounds: Any, reach: Any) -> Any:
                return self.key_tile(b, i, j, bounds)

        rows, per_query, per_token = self.query_specs(query_tile)
        key = self.key_spec(key_tile)
        accumulator = pltpu.VMEM((self.tiles.keys, self.size), jnp.float32)
        scratch = [pltpu.VMEM((self.size, self.lanes), jnp.float32)] * with_dq + [accumulator] * (2 * with_dkv)
        budget = self._scratch_bytes(2 + with_dq)
        if with_dkv:
            budget["dk, dv"] = tpu.buffer_bytes((self.tiles.keys, self.size), jnp.float32, 2 + 4)
        limit = tpu.vmem_limit(f"{self.name}'s {suffix}", budget)
        products = self._flops(2 + with_dq + 2 * with_dkv)
        wanted = [x for x in outputs if x is not None]
        return pl.pallas_call(
            functools.partial(_gradient_kernel, self, with_dq, with_dkv),
            name=f"{self.name}_{suffix}",
            out_shape=wanted,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[rows, key, key, per_token, rows, per_query, per_query],
                out_specs=[rows] * with_dq + [key] * (2 * with_dkv),
                scratch_shapes=scratch,
            ),
            compiler_params=tpu.compiler_params(semantics, limit),
            cost_estimate=tpu.cost(products, self._flops(1) / (2 * self.size), *arrays, *wanted),
            interpret=tpu.interpreted(),
        )(bounds, reach, *arrays)


def _quotient(x: Any, y: int) -> Any:
    """x // y for x that is not negative, without the floor that scalar units would spend steps on."""
    return jax.lax.div(x, jnp.int32(y))


def _forward_kernel(
    call: Call, bounds: Any, q_ref: Any, k_ref: Any, v_ref: Any, end_ref: Any, o_ref: Any, lse_ref: Any, *scratch: Any
) -> None:
    top_ref, sum_ref, acc_ref = scratch
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    chunk = call.tiles.chunk
    exponent = call.scale * tpu.LOG2_E

    @pl.when(j == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, EMPTY_LSE)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    end = end_ref[0]
    first_key = (_quotient(bounds[b * call.query_tiles + i], call.tiles.keys) + j) * call.tiles.keys

    def body(c: Any, masked: bool) -> None:
        place = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        k, v = k_ref[0, 0, place], v_ref[0, 0, place]
        visible = call.visible(end, first_key + c * chunk) if masked else None
        if call.stride is not None:
            row = first_key + c * chunk + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(row < bounds[call.batch * call.query_tiles + b * call.query_tiles + i], v, 0)

        def accumulate(g: int, weights: Any, shrink: Any) -> None:
            lanes = call.head_lanes(g)
            acc_ref[:, lanes] = acc_ref[:, lanes] * shrink + call.dot(v, weights, (0, 0))

        # Products a head ahead and a head behind, so that the matrix units work while a softmax is computed.
        ahead, behind = call.dot(k, q_ref[0, 0, 0], (1, 1)), None
        for g in range(call.group):
            lanes = call.head_lanes(g)
            logits = ahead
            if g + 1 < call.group:
                ahead = call.dot(k, q_ref[0, 0, g + 1], (1, 1))
            if masked:
                logits = jnp.where(visible, logits, _HIDDEN)
            before = top_ref[:, lanes]
            top = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
            weights = jnp.exp2((logits - top) * exponent)
            shrink = jnp.exp2((before - top) * exponent)
            top_ref[:, lanes] = top
            sum_ref[:, lanes] = sum_ref[:, lanes] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            if behind is not None:
                accumulate(g - 1, *behind)
            behind = weights.astype(v.dtype), shrink
        accumulate(call.group - 1, *behind)

    call.over_chunks(call.chunk_ranges(bounds, b, i, first_key), body)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        total = sum_ref[...]
        empty = total == 0
        lse = top_ref[...] * call.scale + jnp.log(jnp.where(empty, 1.0, total))
        lse = jnp.where(empty, EMPTY_LSE, lse)
        call.store_columns(o_ref, acc_ref[...] * (1 / jnp.where(empty, 1.0, total)))
        count = call.tiles.queries
        for g in range(call.group):
            lse_ref[0, 0, g : g + 1] = lse[:, g * count : (g + 1) * count]


def _gradient_kernel(call: Call, with_dq: bool, with_dkv: bool, bounds: Any, reach: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, end_ref, do_ref, lse_ref, delta_ref, *refs = refs
    wanted = with_dq + 2 * with_dkv
    out_refs, acc_refs = refs[:wanted], refs[wanted:]
    dq_acc = acc_refs[0] if with_dq else None
    dk_acc, dv_acc = acc_refs[-2:] if with_dkv else (None, None)
    b, step = pl.program_id(0), pl.program_id(3)
    chunk = call.tiles.chunk
    exponent = call.scale * tpu.LOG2_E

    if with_dkv:
        j = pl.program_id(2)
        tile = b * call.key_tiles + j
        i = step if with_dq else reach[tile] + step
        first_key = j * call.tiles.keys
        active = i <= reach[call.batch * call.key_tiles + tile]
    else:
        i = pl.program_id(2)
        first_key = (_quotient(bounds[b * call.query_tiles + i], call.tiles.keys) + step) * call.tiles.keys
        active = True

    @pl.when(step == 0)
    def _() -> None:
        for ref in acc_refs:
            ref[...] = jnp.zeros_like(ref)

    if with_dq and with_dkv:

        @pl.when(step > 0)
        def _() -> None:
            dq_acc[...] = jnp.zeros_like(dq_acc)

    @pl.when(active)
    def _() -> None:
        end = call.per_lane(end_ref)
        lse = call.per_lane(lse_ref) * tpu.LOG2_E
        delta = call.per_lane(delta_ref)

        def body(c: Any, masked: bool) -> None:
            place = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            k, v = k_ref[0, 0, place], v_ref[0, 0, place]
            # Read here: as values of the outer scope they would be copied to other VMEM.
            q, do = (ref[0, 0].reshape(call.lanes, call.size) for ref in (q_ref, do_ref))
            weights = jnp.exp2(call.dot(k, q, (1, 1)) * exponent - lse)
            if masked:
                weights = jnp.where(call.visible(end, first_key + c * chunk), weights, 0.0)
            ds = (weights * (call.dot(v, do, (1, 1)) - delta)).astype(q.dtype)
            if with_dkv:
                dv_acc[place] += call.dot(weights.astype(q.dtype), do, (1, 0))
                dk_acc[place] += call.dot(ds, q, (1, 0))
            if with_dq:
                dq_acc[...] += call.dot(k, ds, (0, 0))

        call.over_chunks(call.chunk_ranges(bounds, b, i, first_key), body)

    last = step == pl.num_programs(3) - 1
    if with_dq:

        @pl.when(jnp.logical_or(last, with_dkv))
        def _() -> None:
            call.store_columns(out_refs[0], dq_acc[...] * call.scale)

    if with_dkv:

        @pl.when(last)
        def _() -> None:
            out_refs[-2][0, 0] = (dk_acc[...] * call.scale).astype(out_refs[-2].dtype)
            out_refs[-1][0, 0] = dv_acc[...].astype(out_refs[-1].dtype)
