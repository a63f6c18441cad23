"""Work lists of the Hopper kernels of interval attention: what each thread block reads and which keys need a mask.

A tile is 64 rows: 64 tokens of one query head, or, where there are few, 8 tokens with 8 rows for their heads. The tiles
of one KV head are numbered; those of the same tokens and different heads are neighbours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from pallas_kernels.gpu import TILE_ROWS
from pallas_kernels.gpu_flash_config import CONSUMERS, HEAD_ROWS, KEY_ROWS, KeyConfig, QueryConfig

_FAR = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the queries of a call are cut.

    Attributes:
      batch: B.
      queries: T.
      heads: N.
      group: G.
      tokens: of a tile, 64 or 8.
    """

    batch: int
    queries: int
    heads: int
    group: int
    tokens: int

    @property
    def stripes(self) -> int:
        """Ranges of `tokens` tokens."""
        return -(-self.queries // self.tokens)

    @property
    def heads_apart(self) -> int:
        """Tiles of a range of tokens: one per query head, or one for all."""
        return self.group if self.tokens == TILE_ROWS else 1

    @property
    def count(self) -> int:
        """Tiles of one KV head."""
        return self.stripes * self.heads_apart

    @property
    def rows(self) -> int:
        """B x N."""
        return self.batch * self.heads

    def pack(self, x: Float32[jax.Array, "B T N G"], fill: float) -> Float32[jax.Array, "rows tiles 64"]:
        """One value per query as the tiles' rows hold them; `fill` where there is no query."""
        pad = [(0, 0), (0, self.stripes * self.tokens - self.queries), (0, 0), (0, 0)]
        if self.tokens < TILE_ROWS:
            pad[3] = (0, HEAD_ROWS - self.group)
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(self.batch, self.stripes, self.tokens, self.heads, x.shape[3])
        order = (0, 3, 1, 4, 2) if self.tokens == TILE_ROWS else (0, 3, 1, 2, 4)
        return x.transpose(order).reshape(self.rows, self.count, TILE_ROWS)

    def absent_rows(self) -> Bool[jax.Array, "tiles 64"]:
        """The rows of each tile that belong to no query."""
        row = jnp.arange(TILE_ROWS) * self.tokens // TILE_ROWS
        stripe = jnp.arange(self.count) // self.heads_apart
        absent = stripe[:, None] * self.tokens + row >= self.queries
        if self.tokens < TILE_ROWS:
            absent |= jnp.arange(TILE_ROWS) % HEAD_ROWS >= self.group
        return absent

    def unpack(self, x: Float32[jax.Array, "rows tiles 64 ..."]) -> Float32[jax.Array, "B T N G ..."]:
        """The inverse of `pack`, for any number of values per row."""
        rest = x.shape[3:]
        if self.tokens == TILE_ROWS:
            x = x.reshape(self.batch, self.heads, self.stripes, self.group, self.tokens, -1)
            x = x.transpose(0, 2, 4, 1, 3, 5)
        else:
            x = x.reshape(self.batch, self.heads, self.stripes, self.tokens, HEAD_ROWS, -1)
            x = x.transpose(0, 2, 3, 1, 4, 5)
        x = x.reshape(self.batch, -1, self.heads, x.shape[4], *rest)
        return x[:, : self.queries, :, : self.group]

    def row_ends(self, end: Int[jax.Array, "B T"]) -> Int32[jax.Array, "B stripes 64"]:
        """The end of each row of a tile, the same for all heads; what follows the last query repeats it."""
        end = jnp.pad(end.astype(jnp.int32), [(0, 0), (0, self.stripes * self.tokens - self.queries)], mode="edge")
        return jnp.repeat(end, TILE_ROWS // self.tokens, axis=1).reshape(self.batch, self.stripes, TILE_ROWS)


def bounds(ends: Int32[jax.Array, "B stripes rows"], window: int | None) -> tuple[Int32[jax.Array, "B stripes"], ...]:
    """Keys that some row of a tile sees [low, high) and that all of them see [whole_low, whole_high)."""
    start = jnp.zeros_like(ends) if window is None else jnp.maximum(ends - window, 0)
    high = jnp.max(ends, axis=-1)
    low = jnp.where(high > 0, jnp.min(jnp.where(ends > 0, start, _FAR), axis=-1), 0)
    return low, high, jnp.max(start, axis=-1), jnp.min(ends, axis=-1)


def query_items(
    config: QueryConfig, tiles: Tiles, ends: Int32[jax.Array, "B stripes 64"], window: int | None
) -> Int32[jax.Array, "items 5"]:
    """The steps of each item of work: `consumers` tiles, the last ones first, and a part of the keys they see.

    An item is the first key, the number of steps, the steps [from, to) that need no mask, and the number of whole
    steps: one less where the last one needs only its first 64 keys. Items go row by row, from the last tiles, which
    see the most keys, to the first, and part by part.
    """
    groups = -(-tiles.count // config.consumers)
    tile = tiles.count - 1 - np.arange(groups * config.consumers).reshape(groups, config.consumers)
    stripe = np.maximum(tile, 0) // tiles.heads_apart
    low, high, whole_low, whole_high = (x[:, stripe] for x in bounds(ends, window))
    low, high = low.min(axis=-1), high.max(axis=-1)
    whole_low, whole_high = whole_low.max(axis=-1), whole_high.min(axis=-1)
    first = low // KEY_ROWS * KEY_ROWS
    steps = jnp.maximum(-(-(high - first) // config.keys), 0)
    whole_from = -(-(whole_low - first) // config.keys)
    whole_to = (whole_high - first) // config.keys

    short = (steps > 0) & (high - first <= (steps - 1) * config.keys + KEY_ROWS) & (config.keys > KEY_ROWS)

    part = jnp.arange(config.parts)
    first, steps, whole_from, whole_to, short = (x[..., None] for x in (first, steps, whole_from, whole_to, short))
    begin, end = steps * part // config.parts, steps * (part + 1) // config.parts
    full = end - begin - (short & (end == steps))
    whole_from = jnp.clip(whole_from - begin, 0, full)
    whole_to = jnp.clip(whole_to - begin, whole_from, full)
    items = jnp.stack([first + begin * config.keys, end - begin, whole_from, whole_to, full], axis=-1)
    items = jnp.broadcast_to(items[:, None], (tiles.batch, tiles.heads, *items.shape[1:]))
    return items.reshape(-1, items.shape[-1])


def key_items(
    config: KeyConfig, tiles: Tiles, ends: Int32[jax.Array, "B stripes 64"], window: int | None, keys: int
) -> Int32[jax.Array, "items 10"]:
    """The tiles of queries that each item of work visits: 128 keys of a KV head and a part of the queries.

    An item is the first tile and their number, then for each of the two warpgroups four places among them: it takes
    those from the first place to the fourth, and between the second and the third it needs no mask. Items go from the
    first keys to the last, row by row, part by part.
    """
    count = -(-keys // (CONSUMERS * KEY_ROWS)) * CONSUMERS
    low, high, whole_low, whole_high = (x[:, None] for x in bounds(ends, window))
    origin = (jnp.arange(count) * KEY_ROWS)[:, None]
    sees = (low < origin + KEY_ROWS) & (high > origin)
    whole = (whole_low <= origin) & (whole_high >= origin + KEY_ROWS)
    stripe = jnp.arange(tiles.stripes)
    first = jnp.min(jnp.where(sees, stripe, tiles.stripes), axis=-1)
    end = jnp.max(jnp.where(sees, stripe + 1, 0), axis=-1)
    # The last run of stripes that see the keys whole; rows past the lengths may end it early.
    whole_to = jnp.max(jnp.where(whole, stripe + 1, 0), axis=-1)
    broken = ~whole & (stripe < whole_to[..., None])
    whole_from = jnp.max(jnp.where(broken, stripe + 1, 0), axis=-1)
    places = jnp.stack([first, whole_from, whole_to, jnp.maximum(end, first)], axis=-1) * tiles.heads_apart
    places = places.reshape(tiles.batch, count // CONSUMERS, CONSUMERS, 4)

    first, length = places[..., 0].min(axis=-1), places[..., 3].max(axis=-1)
    length = jnp.maximum(jnp.where(places[..., 3] > places[..., 0], places[..., 3], 0).max(axis=-1) - first, 0)
    part = jnp.arange(config.parts)
    begin = first[..., None] + length[..., None] * part // config.parts
    steps = first[..., None] + length[..., None] * (part + 1) // config.parts - begin
    places = places[:, :, None] - begin[..., None, None]
    places = jnp.clip(places, 0, steps[..., None, None])
    places = jax.lax.cummax(places, axis=places.ndim - 1)
    places = places.reshape(*steps.shape, CONSUMERS * 4)
    items = jnp.concatenate([begin[..., None], steps[..., None], places], axis=-1)
    items = jnp.moveaxis(items, 0, 1)[:, :, None]
    return jnp.broadcast_to(
        items, (count // CONSUMERS, tiles.batch, tiles.heads, config.parts, items.shape[-1])
    ).reshape(-1, items.shape[-1])


def edge(x: Float[jax.Array, "B L ..."], length: Int[jax.Array, "B"]) -> Float[jax.Array, "B 128 ..."]:
    """What a kernel reads where x goes past `length`: the 64 entries across it, zeros past it, and 64 zeros."""
    rows = TILE_ROWS
    place = length[:, None] // rows * rows + jnp.arange(rows)
    shape = (*place.shape, *(1,) * (x.ndim - 2))
    across = jnp.take_along_axis(x, jnp.minimum(place, x.shape[1] - 1).reshape(shape), axis=1)
    across = jnp.where((place < length[:, None]).reshape(shape), across, jnp.zeros((), x.dtype))
    return jnp.concatenate([across, jnp.zeros_like(across)], axis=1)
