"""Tile configurations of the Hopper kernels of block selection."""

import dataclasses
import math

from pallas_kernels.gpu import TILE_ROWS, WARPS

COLUMNS = 128
"""Scores per row come in whole tiles of so many, the widest that the importance kernel has."""

REGISTERS = {2: (232, 40), 3: (160, 24)}
"""By the number of the importance kernel's warpgroups that compute: registers of their threads, and of the one that
fetches."""

LANES = 32
"""Threads of a warp: the blocks of one word, and one thread's share of a row."""


MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); each runs one thread block of the importance kernel."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How block selection runs.

    Attributes:
      stages: tiles of block means in flight.
      columns: block means per tile; 64 or 128.
      consumers: warpgroups that share the tiles; 2 or 3.
      programs: thread blocks of the importance kernel, each of which walks over its share of the queries.
      row_values: scores that a thread of the choosing kernel keeps in registers.
      variants: lengths of rows that the choosing kernel is compiled for: a query's row is as long as its past.
      score_bytes: most device memory for the scores of one chunk of queries.
    """

    stages: int
    columns: int = COLUMNS
    consumers: int = 3
    programs: int = MULTIPROCESSORS
    row_values: int = 40
    variants: int = 3
    score_bytes: int = 1 << 29

    def __post_init__(self):
        if self.stages < 2 or self.columns not in (64, COLUMNS) or self.consumers not in REGISTERS:
            raise ValueError(
                f"{self} is no configuration, expected stages of at least 2, columns 64 or 128 and 2 or 3 consumers"
            )

    def shared_memory(self, group: int, head_dim: int) -> int:
        """Bytes of shared memory of the importance kernel, less the barriers."""
        return (group * TILE_ROWS + self.stages * self.columns) * head_dim * 2 + group * TILE_ROWS * 4

    def chunk(self, queries: int, rows: int, columns: int) -> int:
        """Queries per chunk: whole tiles, scores within `score_bytes`, thread blocks that fill the device evenly."""
        tiles = -(-queries // TILE_ROWS)
        most = max(1, self.score_bytes // (4 * rows * columns * TILE_ROWS))
        if tiles <= most:
            return tiles * TILE_ROWS
        wave = MULTIPROCESSORS // math.gcd(MULTIPROCESSORS, rows)
        even = -(-tiles // -(-tiles // most))
        up = -(-even // wave) * wave
        return (up if up <= most else most // wave * wave or even) * TILE_ROWS

    def rows_per_warp(self, words: int) -> int:
        """Queries whose scores one warp of the choosing kernel keeps, for rows of so many words."""
        most = max(1, self.row_values // words)
        return min(1 << (most.bit_length() - 1), TILE_ROWS // WARPS)

    def widths(self, words: int) -> tuple[int, ...]:
        """Words per row of the choosing kernel's variants."""
        parts = range(1, self.variants + 1)
        return tuple(sorted({words_for(-(-words * part // self.variants) * LANES) for part in parts}))


def heuristic(head_dim: int) -> Config:
    """A configuration for heads of this size: the most stages that shared memory holds beside 8 heads of queries."""
    return Config(stages=3 if head_dim > 64 else 6)


def words_for(blocks: int) -> int:
    """Words of a row of so many blocks, at least 2: Mosaic infers no layout for rows of a single word."""
    return max(2, -(-blocks // LANES))
