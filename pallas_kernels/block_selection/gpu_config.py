"""Tile configurations of the Hopper kernels of block selection."""

import dataclasses

from pallas_kernels.gpu import TILE_ROWS

COLUMNS = 128
"""Block means per tile of the importance kernel."""

LANES = 32
"""Threads of a warp: the blocks of one word, and one thread's share of a row."""

ROW_VALUES = 80
"""Scores that a thread of the choosing kernel keeps in registers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How block selection runs.

    Attributes:
      stages: tiles of block means in flight.
      consumers: warpgroups that compute importances; 2 or 3.
      score_bytes: most device memory for the scores of one chunk of queries.
    """

    stages: int
    consumers: int = 2
    score_bytes: int = 1 << 28

    def __post_init__(self):
        if self.stages < 2 or self.consumers not in (2, 3):
            raise ValueError(f"{self} is no configuration, expected stages of at least 2 and 2 or 3 consumers")

    def shared_memory(self, group: int, head_dim: int) -> int:
        """Bytes of shared memory of the importance kernel, less the barriers."""
        return (group * TILE_ROWS + self.stages * COLUMNS) * head_dim * 2

    def chunk(self, queries: int, rows: int, columns: int) -> int:
        """Queries per chunk: whole tiles, all chunks alike, scores within `score_bytes`."""
        tiles = -(-queries // TILE_ROWS)
        most = max(1, self.score_bytes // (4 * rows * columns * TILE_ROWS))
        chunks = -(-tiles // most)
        return -(-tiles // chunks) * TILE_ROWS


def heuristic(head_dim: int) -> Config:
    """A configuration for heads of this size: the most stages that shared memory holds beside 8 heads of queries."""
    return Config(stages=3 if head_dim > 64 else 6)


def words_for(blocks: int) -> int:
    """Words of a row of so many blocks, at least 2: Mosaic infers no layout for rows of a single word."""
    return max(2, -(-blocks // LANES))


def rows_per_warp(words: int) -> int:
    """Queries whose scores one warp of the choosing kernel keeps, for rows of so many words."""
    most = max(1, ROW_VALUES // words)
    return min(1 << (most.bit_length() - 1), TILE_ROWS // 4)
