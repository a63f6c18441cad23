"""What the forward and the backward kernel of selected attention on TPU share.

A grid step holds eight tiles of 16 queries. Each tile's list is taken in steps of several blocks; the kernels run one
loop over the steps of all eight tiles, in which neighbouring steps overlap.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import tile_lists, tpu

TILE = tile_lists.TILE
TILES = 8
BOUNDS = 2 * (TILES + 1) + 1
"""Numbers per grid step: each tile's first step and one past its last, those of a tile past the last, their total.

The total is 0 in a later chunk of keys that none of the tiles reads: `is_idle`.
"""

STEP_KEYS = 1024
HIDDEN = -2e38
"""Added to logits that are not to be seen; less than any running maximum by more than exp2 can tell from 0."""

_CHUNK_MULTIPLE = 128

# A kernel's view of an array in VMEM or SMEM, and a scalar inside a kernel.
Ref = Any
Index = Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
      group: G.
      head_dim: D.
      block_size: s.
      step_blocks: blocks per product.
      places: entries of a tile's list, padded.
      chunk_keys: keys in VMEM at a time; the last chunk may hold fewer.
      chunks: of them.
      vmem_limit: bytes.
      precision: of products.
    """

    group: int
    head_dim: int
    block_size: int
    step_blocks: int
    places: int
    chunk_keys: int
    chunks: int
    vmem_limit: int
    precision: jax.lax.Precision

    @property
    def rows(self) -> int:
        """Rows of a tile: 16 queries by G heads."""
        return self.group * TILE

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk of keys."""
        return self.chunk_keys // self.block_size

    @property
    def step_keys(self) -> int:
        """Keys per product."""
        return self.step_blocks * self.block_size

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return 1 / math.sqrt(self.head_dim)


def make_plan(operation: str, q: jax.Array, keys: int, places: int, block_size: int, *, backward: bool) -> Plan:
    """Divides the keys into as few chunks as VMEM takes beside the rest.

    Forward, all but the last are as large as VMEM takes: the later a boundary, the fewer tiles read on both its sides.
    Backward they are equal, as a chunk's gradients are cleared and stored whole.

    Args:
      operation: named in messages.
      q: [B, T, N, G, D].
      keys: S.
      places: of a tile's list.
      block_size: s.
      backward: whether the gradients of a chunk's keys lie beside them.

    Raises:
      NotImplementedError: what a kernel needs whatever the chunk exceeds VMEM, or the lists exceed SMEM.
    """
    *_, group, size = q.shape
    step_blocks = STEP_KEYS // block_size
    # The loop's stages look up to two steps past a list.
    places = -(-(places + 3 * step_blocks) // tpu.LANES) * tpu.LANES
    chip, lists = tpu.target_chip(), 2 * TILES * places * 4
    if lists > chip.smem_bytes // 2:
        raise NotImplementedError(
            f"{operation} on TPU needs {lists} bytes of SMEM for twice {TILES} lists of {places} places, "
            f"{chip.name} has {chip.smem_bytes}, of which lists may use half"
        )
    queries, logits = (group, TILES * TILE, size), (group * TILE, STEP_KEYS)
    buffers = {
        "queries and outputs": tpu.buffer_bytes(queries, q.dtype, 4) + tpu.buffer_bytes(queries, jnp.float32, 4),
        "a step": tpu.buffer_bytes(logits, jnp.float32, 12),
    }
    per_key = {q.dtype: 2} if not backward else {q.dtype: 2, jnp.dtype(jnp.float32): 4 if q.dtype == jnp.float32 else 2}
    key_bytes = sum(tpu.buffer_bytes((32, size), dtype, copies) for dtype, copies in per_key.items()) // 32
    room = tpu.vmem_limit(operation, buffers) - sum(buffers.values())
    most = max(room // (key_bytes * _CHUNK_MULTIPLE), 1) * _CHUNK_MULTIPLE
    parts = -(-keys // most) if backward else 1
    chunk_keys = min(most, -(-keys // (parts * _CHUNK_MULTIPLE)) * _CHUNK_MULTIPLE)
    return Plan(
        group=group,
        head_dim=size,
        block_size=block_size,
        step_blocks=step_blocks,
        places=places,
        chunk_keys=chunk_keys,
        chunks=-(-keys // chunk_keys),
        vmem_limit=tpu.vmem_limit(operation, buffers | {"a chunk of keys": chunk_keys * key_bytes}),
        precision=tpu.dot_precision(q.dtype),
    )


class Place(NamedTuple):
    """A step of one tile's list.

    Attributes:
      tile: 0 to 7, and 8 past the last.
      step: of the tile's list, counted from the list's beginning.
    """

    tile: Index
    step: Index

    def is_first(self, bounds: Ref) -> jax.Array:
        """Whether the tile's steps start here."""
        return self.step == bounds[0, 0, 0, 0, 2 * self.tile]

    def is_last(self, bounds: Ref) -> jax.Array:
        """Whether they end here."""
        return self.step + 1 >= bounds[0, 0, 0, 0, 2 * self.tile + 1]

    def next(self, bounds: Ref) -> "Place":
        """The step after it, which may be the next tile's first."""
        done = self.is_last(bounds)
        tile = self.tile + jnp.where(done, 1, 0)
        return Place(tile, jnp.where(done, bounds[0, 0, 0, 0, 2 * tile], self.step + 1))

    @property
    def held_tile(self) -> Index:
        """The tile, or the last one past it: the loop's early stages run ahead."""
        return jnp.minimum(self.tile, TILES - 1)

    @property
    def queries(self) -> Any:
        """The tile's place among the queries of the grid step."""
        return pl.ds(pl.multiple_of(self.held_tile * TILE, TILE), TILE)


def run_stages(step: Any, finish: Any, bounds: Ref, *, slots: int = 1) -> None:
    """Runs `step(slot, third, second, first)` over all steps of the grid step, a stage per place.

    The three places follow each other; a place before the first step is neither a tile's first nor its last, nor is
    one past the last tile.

    Args:
      step: three stages; `slot` counts 0 to slots - 1 over and over.
      finish: `finish(slot, third)` follows where the third place is its tile's last, after all steps of the loop's
        body: a branch between two steps would part the schedule.
      bounds: of the tiles' steps.
      slots: steps in the loop's body; the last body may run past the last step.
    """
    nowhere = Place(jnp.int32(0), jnp.int32(-1))

    def body(_: Any, places: tuple[Place, Place, Place]) -> tuple[Place, Place, Place]:
        ended = []
        for slot in range(slots):
            step(slot, *places)
            third, second, first = places
            ended.append(third)
            places = second, first, first.next(bounds)
        for slot, place in enumerate(ended):
            pl.when(place.is_last(bounds))(functools.partial(finish, slot, place))
        return places

    start = nowhere, nowhere, Place(jnp.int32(0), bounds[0, 0, 0, 0, 0])
    count = bounds[0, 0, 0, 0, BOUNDS - 1] + 2
    jax.lax.fori_loop(0, jax.lax.div(count + slots - 1, slots), body, start)


def is_idle(bounds: Ref) -> jax.Array:
    """Whether what earlier chunks of keys gave is the grid step's result: with causal lists, before the chunk."""
    return bounds[0, 0, 0, 0, BOUNDS - 1] == 0


def read_step(entries: Ref, place: Place, plan: Plan) -> list[Index]:
    """Entries of one step; one past the list's last is 0: block 0, which no query reads."""
    first = place.held_tile * plan.places + jnp.maximum(place.step, 0) * plan.step_blocks
    return [entries[0, 0, 0, 0, first + j] for j in range(plan.step_blocks)]


def block_of(entry: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The block's place in the chunk."""
    return jax.lax.shift_right_logical(entry, tile_lists.MASK_BITS)


def fetch(ref: Ref, step_entries: Sequence[Index]) -> Float[Array, "keys D"]:
    """The blocks of a step below each other."""
    return jnp.concatenate([ref[0, 0, block_of(entry)] for entry in step_entries], axis=0)


def rows_of(ref: Ref, queries: Any) -> Float[Array, "rows D"]:
    """One tile's rows, head after head."""
    x = ref[0, 0, :, queries, :]
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def hidden_bias(step_entries: Sequence[Index], first_query: Index, plan: Plan) -> Float32[Array, "16 keys"]:
    """0 where a query of the tile reads a key, `HIDDEN` elsewhere.

    Args:
      step_entries: of the step.
      first_query: the tile's first, counted from the chunk's first key.
      plan: see there.
    """
    s, half = plan.block_size, tpu.SUBLANES
    lane, query = (jax.lax.broadcasted_iota(jnp.int32, (half, tpu.LANES), axis) for axis in (1, 0))
    in_tile = query, query + half
    # An entry below `past` names a block whose key in the lane's place is no later than the query.
    # Blocks are below 2**15.
    blocks = [
        jax.lax.shift_right_arithmetic(first_query + t - (lane & (s - 1)), s.bit_length() - 1) + 1 for t in in_tile
    ]
    past = [jax.lax.shift_left(jnp.clip(x, 0, 2**15 - 1), tile_lists.MASK_BITS) for x in blocks]
    per_vector = tpu.LANES // s
    pieces = []
    for j in range(0, plan.step_blocks, per_vector):
        entry = jnp.full((half, tpu.LANES), step_entries[j + per_vector - 1], jnp.int32)
        for i in reversed(range(per_vector - 1)):
            entry = jnp.where(lane < (i + 1) * s, step_entries[j + i], entry)
        halves = []
        for t, limit in zip(in_tile, past, strict=True):
            chosen = jax.lax.shift_left(entry, 31 - t) < 0
            halves.append(jnp.where(chosen & (entry < limit), 0.0, HIDDEN))
        pieces.append(jnp.concatenate(halves, axis=0))
    return jnp.concatenate(pieces, axis=1)


def scaled(q: Float[Array, "*shape D"], plan: Plan) -> Float[Array, "*shape D"]:
    """Queries whose products with keys are logits to the base of 2: a rounding each instead of a product per logit."""
    return (q.astype(jnp.float32) * (plan.scale * tpu.LOG2_E)).astype(q.dtype)


def step_logits(
    q: Float[Array, "rows D"], k: Float[Array, "keys D"], bias: Float32[Array, "16 keys"], plan: Plan
) -> Float32[Array, "rows keys"]:
    """Logits of scaled queries, all heads of a query under one bias."""
    logits = jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=plan.precision, preferred_element_type=jnp.float32
    )
    return (logits.reshape(plan.group, TILE, plan.step_keys) + bias).reshape(plan.rows, plan.step_keys)


def lanes_to_columns(row: Float32[Array, "1 128"], rows: int) -> Float32[Array, "rows 128"]:
    """A value per lane to a value per row, alike in all lanes."""
    return jnp.broadcast_to(row, (tpu.LANES, tpu.LANES)).T[:rows]


def columns_to_lanes(columns: Float32[Array, "rows 128"]) -> Float32[Array, "1 128"]:
    """Inverse of `lanes_to_columns`, filled up with zeros."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, columns.shape, axis) for axis in (0, 1))
    return jnp.sum(jnp.where(row == lane, columns, 0.0), axis=0, keepdims=True)


def over_keys(x: Float32[Array, "rows 128"], plan: Plan) -> Float32[Array, "rows keys"]:
    """Repeats what is alike in all lanes for the keys of a step."""
    return jnp.concatenate([x] * (plan.step_keys // tpu.LANES), axis=1)


@dataclasses.dataclass(frozen=True)
class Specs:
    """Blocks that a grid step of (row, KV head, eight tiles) sees.

    Attributes:
      lists: entries and bounds.
      queries: [G, queries, D].
      rows: a value per row of each tile, [8, 128].
      keys: a chunk of them, fetched once per KV head.
    """

    lists: tuple[pl.BlockSpec, pl.BlockSpec]
    queries: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec


def specs(plan: Plan) -> Specs:
    """The blocks of both kernels."""

    def scalars(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, 1, count), lambda b, n, i, _: (b, n, i, 0, 0), memory_space=pltpu.SMEM)

    keys = (1, 1, plan.chunk_blocks, plan.block_size, plan.head_dim)
    queries = (1, 1, plan.group, TILES * TILE, plan.head_dim)
    return Specs(
        lists=(scalars(TILES * plan.places), scalars(BOUNDS)),
        queries=pl.BlockSpec(queries, lambda b, n, i, _: (b, n, 0, i, 0)),
        rows=pl.BlockSpec((1, 1, TILES, tpu.LANES), lambda b, n, i, _: (b, n, i, 0)),
        keys=pl.BlockSpec(keys, lambda b, n, i, place: (b, n, place[1], 0, 0), pipeline_mode=pl.Buffered(1)),
    )


def most_logits(q: jax.Array, plan: Plan) -> float:
    """Logits of a call in which every tile's list is full, for the cost estimate."""
    batch, heads, group, queries, _ = q.shape
    return float(batch * heads * group * queries * min(plan.places * plan.block_size, plan.chunk_keys))
