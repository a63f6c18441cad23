"""Tile configurations of the Hopper kernels of interval attention (compressed, window and prefix attention)."""

import dataclasses

from pallas_kernels.gpu import TILE_ROWS

MULTIPROCESSORS = 132
"""Thread blocks that run at once on an H100 or H200, of the shared memory that these kernels take."""

HEAD_ROWS = 8
"""Rows of a token in a tile of few tokens: its query heads, then zero rows."""

KEY_ROWS = TILE_ROWS
"""Keys of one warpgroup of the kernel of dk and dv."""

CONSUMERS = 2
"""Warpgroups that share the queries in the kernel of dk and dv."""


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """A kernel whose tiles are queries (forward and dq).

    Attributes:
      keys: of one step, a multiple of 64.
      stages: steps whose keys and values are in shared memory.
      consumers: warpgroups, each with 64 rows of queries, which share the keys; 1 or 2.
      parts: ways the keys are split, for few queries; float32 results of the parts are merged after the kernel.
      buffers: tiles of queries per warpgroup in shared memory; with 2, the next ones are read ahead.
    """

    keys: int
    stages: int
    consumers: int = 2
    parts: int = 1
    buffers: int = 1

    def __post_init__(self):
        if self.keys % KEY_ROWS or not 0 < self.keys <= 256 or self.stages < 2 or self.consumers not in (1, 2):
            raise ValueError(
                f"{self} is no tile configuration, expected keys a multiple of 64 up to 256, stages of at least 2 and "
                "1 or 2 consumers"
            )


@dataclasses.dataclass(frozen=True)
class KeyConfig:
    """The kernel whose tiles are keys (dk and dv): 64 per warpgroup.

    Attributes:
      stages: tiles of 64 query rows in shared memory.
      parts: ways the queries are split, for few keys; float32 results of the parts are summed after the kernel.
    """

    stages: int
    parts: int = 1

    def __post_init__(self):
        if self.stages < 2 or self.parts < 1:
            raise ValueError(f"{self} is no tile configuration, expected stages of at least 2")


@dataclasses.dataclass(frozen=True)
class Config:
    """How interval attention runs.

    Attributes:
      tokens: of a tile's 64 rows: 64 of one head, or 8 with 8 rows for the heads of each.
      forward: configuration of the forward kernel.
      dq: of the gradient of q.
      dkdv: of the gradients of k and v.
      programs: thread blocks, each of which walks over its share of the tiles.
    """

    tokens: int
    forward: QueryConfig
    dq: QueryConfig
    dkdv: KeyConfig
    programs: int = MULTIPROCESSORS

    def __post_init__(self):
        if self.tokens not in (TILE_ROWS, TILE_ROWS // HEAD_ROWS):
            raise ValueError(f"{self} is no configuration, expected tiles of 64 or 8 tokens")

    def shared_memory(self, head_dim: int) -> dict[str, int]:
        """Bytes of shared memory per kernel, less barriers and row statistics (under 3 KiB)."""
        tile = TILE_ROWS * head_dim * 2

        def results(parts: int) -> int:
            return tile if parts == 1 else 0

        def ring(config: QueryConfig) -> int:
            return 2 * config.stages * config.keys * head_dim * 2

        return {
            "forward": self.forward.consumers * (self.forward.buffers * tile + results(self.forward.parts))
            + ring(self.forward),
            "dq": self.dq.consumers * (2 * tile + results(self.dq.parts)) + ring(self.dq),
            "dkdv": CONSUMERS * (2 * tile + results(self.dkdv.parts)) + 2 * self.dkdv.stages * tile,
        }


def heuristic(
    queries: int, keys: int, rows: int, group: int, head_dim: int, window: int | None, few_rows: bool = True
) -> Config:
    """A configuration by shape.

    Args:
      queries: T.
      keys: S.
      rows: B x N.
      group: G.
      head_dim: D.
      window: keys that a query sees at most; None: all before its end.
      few_rows: whether tiles of 8 tokens may be used.

    Returns:
      The configuration.
    """
    wide = head_dim > 64
    few = few_rows and queries * group <= TILE_ROWS and queries <= TILE_ROWS // HEAD_ROWS
    tokens = TILE_ROWS // HEAD_ROWS if few else TILE_ROWS
    units = -(-queries // tokens) * (1 if few else group)
    consumers = min(2, units)
    items = rows * -(-units // consumers)
    reach = keys if window is None else min(keys, window + tokens)
    parts = split(items, reach // 512)
    key_items = rows * -(-keys // (CONSUMERS * KEY_ROWS))
    key_parts = split(key_items, units if window is None else 1)
    double = 1 if wide else 2
    return Config(
        tokens=tokens,
        forward=QueryConfig(2 * KEY_ROWS, 2 * double, consumers, parts, buffers=2 if parts == 1 else 1),
        dq=QueryConfig(KEY_ROWS, (2 if window is None else 4) * double, consumers, parts),
        dkdv=KeyConfig(2 * double, key_parts),
    )


def split(items: int, most: int) -> int:
    """Ways to split each of `items` tiles so that the multiprocessors share the work evenly; at most `most`."""
    if items >= 8 * MULTIPROCESSORS:
        return 1
    # Few parts suffice once hardly a multiprocessor waits in the last round.
    choices = range(1, max(1, min(most, MULTIPROCESSORS)) + 1)
    idle = {parts: -(-items * parts // MULTIPROCESSORS) * MULTIPROCESSORS / (items * parts) for parts in choices}
    best = min(idle.values())
    return next(parts for parts in choices if idle[parts] <= 1.03 * best)
