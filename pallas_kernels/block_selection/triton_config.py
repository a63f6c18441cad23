"""Tile configuration of the Triton kernels of block selection."""

import dataclasses

LANES = 32
"""Threads of a warp, and blocks of a word."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How block selection runs.

    Attributes:
      tokens: queries of a tile of the importance kernel.
      columns: block means of a tile.
      warps: of a program of the importance kernel.
      stages: heads in flight.
      row_values: scores that a thread of the choosing kernel keeps in registers.
      variants: lengths of rows that the choosing kernel is compiled for, each twice the one before.
      score_bytes: most device memory for the scores of one chunk of queries.
    """

    tokens: int = 64
    columns: int = 128
    warps: int = 4
    stages: int = 2
    row_values: int = 32
    variants: int = 4
    score_bytes: int = 1 << 29

    def chunk(self, queries: int, rows: int, columns: int) -> int:
        """Queries per chunk: whole tiles, alike, whose scores take at most `score_bytes`."""
        tiles = -(-queries // self.tokens)
        most = max(1, self.score_bytes // (4 * rows * columns * self.tokens))
        chunks = -(-tiles // most)
        return -(-tiles // chunks) * self.tokens

    def rows_per_program(self, columns: int) -> int:
        """Queries whose scores one warp of the choosing kernel keeps."""
        return max(1, self.row_values * LANES // columns)


def power_of_two(count: int) -> int:
    """The least power of two that is no less than `count`."""
    return 1 << max(count - 1, 0).bit_length()
