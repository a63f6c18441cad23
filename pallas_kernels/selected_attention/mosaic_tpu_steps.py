"""What the forward and the backward kernel of selected attention on TPU share: one step over a few blocks."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

TILE = 16
TILES = 8
HIDDEN = -2e38
STEP_KEYS = 1024
CHUNK_MULTIPLE = 128
BOUNDS = 2 * (TILES + 1) + 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
      group: G.
      head_dim: D.
      block_size: s.
      step_blocks: blocks per product.
      places: entries of a tile's list, padded.
      chunk_keys: keys in VMEM at a time.
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


def make_plan(
    operation: str, q: jax.Array, keys: int, places: int, block_size: int, *, backward: bool
) -> Plan:
    """Divides the keys into as few equal chunks as leave room for the rest."""
    *_, group, size = q.shape
    step_keys = STEP_KEYS
    step_blocks = step_keys // block_size
    places = -(-(places + 4 * step_blocks) // tpu.LANES) * tpu.LANES
    lists = 2 * TILES * places * 4
    if lists > tpu.target_chip().smem_bytes // 2:
        raise NotImplementedError(
            f"{operation} on TPU needs {lists} bytes of SMEM for the lists of {TILES} tiles of up to {places} blocks, "
            f"{tpu.target_chip().name} has {tpu.target_chip().smem_bytes}, of which half may be used"
        )
    block = (group, TILE * TILES, size)
    row = (group * TILE, step_keys)
    buffers = {
        "queries and outputs": tpu.buffer_bytes(block, q.dtype, 4) + tpu.buffer_bytes(block, jnp.float32, 4),
        "a step": tpu.buffer_bytes(row, jnp.float32, 12 if backward else 8),
    }
    per_key = [(q.dtype, 2)] + [(jnp.float32, 2)] * backward
    key_bytes = sum(tpu.buffer_bytes((STEP_KEYS, size), dtype, copies) for dtype, copies in per_key) // STEP_KEYS
    room = tpu.vmem_limit(operation, buffers) - sum(buffers.values())
    most = room // (key_bytes * CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    chunks = -(-keys // max(most, CHUNK_MULTIPLE))
    chunk_keys = -(-keys // (chunks * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE
    buffers["a chunk of keys"] = chunk_keys * key_bytes
    return Plan(
        group=group,
        head_dim=size,
        block_size=block_size,
        step_blocks=step_blocks,
        places=places,
        chunk_keys=chunk_keys,
        chunks=chunks,
        vmem_limit=tpu.vmem_limit(operation, buffers),
        precision=tpu.dot_precision(q.dtype),
    )


def rows_of(ref, place):
    x = ref[0, 0, :, place, :]
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def columns(lanes, rows):
    """[1, 128] -> [rows, 1]."""
    square = jnp.broadcast_to(lanes, (tpu.LANES, tpu.LANES)).T
    return square[:rows, :1]


class Place(NamedTuple):
    """A step of one tile's list."""

    tile: jax.Array
    step: jax.Array

    def bounds(self, bounds) -> tuple[jax.Array, jax.Array]:
        """The tile's first step, and one past its last."""
        return bounds[0, 0, 0, 0, 2 * self.tile], bounds[0, 0, 0, 0, 2 * self.tile + 1]

    def is_first(self, bounds) -> jax.Array:
        """Whether the tile's list starts here."""
        return self.step == self.bounds(bounds)[0]

    def is_last(self, bounds) -> jax.Array:
        """Whether it ends here."""
        return self.step + 1 >= self.bounds(bounds)[1]

    def next(self, bounds) -> "Place":
        """The step after it, of the next tile after a tile's last."""
        done = self.is_last(bounds)
        tile = self.tile + jnp.where(done, 1, 0)
        return Place(tile, jnp.where(done, bounds[0, 0, 0, 0, 2 * tile], self.step + 1))


def first_place(bounds) -> Place:
    """Where the first tile's list starts."""
    return Place(jnp.int32(0), bounds[0, 0, 0, 0, 0])


NO_PLACE = (0, -1)
"""A place before the first, which is neither a tile's first nor its last."""


def total_steps(bounds):
    """Steps of all tiles."""
    return bounds[0, 0, 0, 0, BOUNDS - 1]


def read_step(entries, place, plan):
    """Entries of one step; past the tile's last an entry is 0: block 0, which no query reads."""
    # A pipelined loop looks past the last tile.
    tile = jnp.minimum(place.tile, TILES - 1)
    first = tile * plan.places + jnp.maximum(place.step, 0) * plan.step_blocks
    return [entries[0, 0, 0, 0, first + j] for j in range(plan.step_blocks)]


def tokens_of(place):
    """Queries of a place's tile within the grid step."""
    tile = jnp.minimum(place.tile, TILES - 1)
    return pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)


def block_of(entry):
    """The block's place in the chunk."""
    return jax.lax.shift_right_logical(entry, TILE)


def fetch(ref, step_entries):
    """The step's blocks below each other."""
    return jnp.concatenate([ref[0, 0, block_of(entry)] for entry in step_entries], axis=0)


def hidden_bias(step_entries, first_query, plan):
    """0 where a query reads a key, `HIDDEN` elsewhere; first_query counts from the chunk's first key."""
    s, half = plan.block_size, tpu.SUBLANES
    lane, query = (jax.lax.broadcasted_iota(jnp.int32, (half, tpu.LANES), axis) for axis in (1, 0))
    per_vector = tpu.LANES // s
    pieces = []
    for j in range(0, plan.step_blocks, per_vector):
        entry = jnp.full((half, tpu.LANES), step_entries[j + per_vector - 1], jnp.int32)
        for i in reversed(range(per_vector - 1)):
            entry = jnp.where(lane < (i + 1) * s, step_entries[j + i], entry)
        key = block_of(entry) * s + (lane & (s - 1))
        halves = []
        for query_in_tile in (query, query + half):
            chosen = (jax.lax.shift_right_logical(entry, query_in_tile) & 1) != 0
            halves.append(jnp.where(chosen & (key <= first_query + query_in_tile), 0.0, HIDDEN))
        pieces.append(jnp.concatenate(halves, axis=0))
    return jnp.concatenate(pieces, axis=1)


def scaled_logits(q, k, bias, plan):
    logits = jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=plan.precision, preferred_element_type=jnp.float32
    )
    return (logits.reshape(plan.group, TILE, plan.step_keys) + bias[None]).reshape(plan.rows, plan.step_keys)


def specs(plan):
    """Block specs: q-like, lse-like, k-like, (lists, bounds)."""
    group, size = plan.group, plan.head_dim
    return (
        pl.BlockSpec((1, 1, group, TILES * TILE, size), lambda b, n, i, _: (b, n, 0, i, 0)),
        pl.BlockSpec((1, 1, TILES, tpu.LANES), lambda b, n, i, _: (b, n, i, 0)),
        pl.BlockSpec(
            (1, 1, plan.chunk_blocks, plan.block_size, size),
            lambda b, n, i, _: (b, n, 0, 0, 0),
            pipeline_mode=pl.Buffered(1),
        ),
        (
            pl.BlockSpec((1, 1, 1, 1, TILES * plan.places), lambda b, n, i, _: (b, n, i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, 1, 1, BOUNDS), lambda b, n, i, _: (b, n, i, 0, 0), memory_space=pltpu.SMEM),
        ),
    )


def over_lanes(x: jax.Array, plan) -> jax.Array:
    """[rows, 128], alike in all lanes, -> [rows, keys of a step]."""
    return jnp.concatenate([x] * (plan.step_keys // tpu.LANES), axis=1)


def rows_to_lanes(column: jax.Array) -> jax.Array:
    """[rows, 1] -> [1, 128]."""
    missing = tpu.LANES - column.shape[0]
    if missing:
        column = jnp.concatenate([column, jnp.zeros((missing, 1), column.dtype)])
    return jnp.broadcast_to(column, (tpu.LANES, tpu.LANES)).T[:1]
