"""Tile configurations of the Triton kernels of selected attention."""

import dataclasses

from pallas_kernels.selected_attention.gpu_config import TOKENS


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """A kernel that walks over the blocks of a tile of queries (forward and dq).

    Attributes:
      tokens: of a tile, 8 rows each; in the token-major design 1, which has 16 rows.
      warps: of a program; four multiply 64 rows together.
      stages: of the loop's pipeline.
    """

    tokens: int
    warps: int
    stages: int

    def __post_init__(self):
        if self.tokens not in (1, 8, 16) or self.stages < 1:
            raise ValueError(f"{self} is no tile configuration, expected 1, 8 or 16 tokens and stages from 1")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A kernel that walks over the queries of a block (dk and dv).

    Attributes:
      tokens: gathered per step, 8 rows each; in the token-major design 1, which has 16 rows.
      warps: of a program.
      stages: of the loop's pipeline.
      part: the most tokens that one program walks over; longer lists are split and summed in float32.
    """

    tokens: int
    warps: int
    stages: int
    part: int

    def __post_init__(self):
        if self.tokens not in (1, 4, 8, 16) or self.stages < 1 or self.part < 1 or self.part % TOKENS:
            raise ValueError(
                f"{self} is no block configuration, expected 1, 4, 8 or 16 tokens, stages from 1, part a multiple of 8"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """How selected attention runs: one configuration per kernel."""

    forward: TileConfig
    dq: TileConfig
    dkdv: BlockConfig


def part_of(queries: int, rows: int) -> int:
    """The part of a list for T queries of B x N rows: few rows would leave one program with a sink's whole list."""
    pieces = max(1, min(32, 64 // max(rows, 1)))
    return max(1024, -(-queries // (pieces * TOKENS)) * TOKENS)


def heuristic(queries: int, rows: int, head_dim: int) -> Config:
    """A configuration for T queries of B x N rows.

    Args:
      queries: T.
      rows: B x N.
      head_dim: D.

    Returns:
      The configuration.
    """
    wide = head_dim > 64
    return Config(
        forward=TileConfig(tokens=8, warps=4, stages=3),
        dq=TileConfig(tokens=8, warps=4, stages=2 if wide else 3),
        dkdv=BlockConfig(tokens=8, warps=4, stages=2 if wide else 3, part=part_of(queries, rows)),
    )


def token_major_heuristic(queries: int, rows: int, head_dim: int) -> Config:
    """As `heuristic`, for the token-major kernels."""
    del head_dim
    tile = TileConfig(tokens=1, warps=2, stages=2)
    return Config(tile, tile, BlockConfig(tokens=1, warps=4, stages=3, part=part_of(queries, rows)))
