"""Tile configurations of the Hopper kernels of selected attention."""

import dataclasses

from pallas_kernels.gpu import TILE_ROWS
from pallas_kernels.gpu_table import measured

ROWS = 8
"""Rows of a token in a tile: its query heads, then zero rows."""

TOKENS = 8
"""Tokens of one warpgroup; with 8 rows each they are one 64-row matrix product."""

MASK_BITS = 31
"""Tokens of a tile for which an entry of a list has bits."""

PAIR = 2
"""Warpgroups that compute dk and dv."""

REGISTERS = {2: (232, 40), 3: (160, 32)}
"""Registers per thread of the warpgroups that compute and of the one that fetches, by how many compute."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """The two kernels that walk over the blocks of a tile of queries (forward and dq).

    Attributes:
      stages: blocks of K and V in flight.
      consumers: warpgroups that compute; one more fetches.
      q_registers: columns of the queries (and of dO) that the matrix units read from registers, not shared memory.
      share: tokens of one warpgroup.
      parts: of a block's keys, whose weights are found while the last part's are multiplied (forward).
    """

    stages: int
    consumers: int = 2
    q_registers: int = 0
    share: int = TOKENS
    parts: int = 1

    def __post_init__(self):
        if self.stages < 2 or self.consumers not in REGISTERS:
            raise ValueError(f"{self} is no tile configuration, expected stages of at least 2 and 2 or 3 consumers")
        if not TOKENS <= self.share <= MASK_BITS // self.consumers or self.parts not in (1, 2, 4):
            raise ValueError(f"{self} is no tile configuration, expected masks of {MASK_BITS} bits and 1, 2 or 4 parts")

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.consumers * self.share

    @property
    def rows(self) -> int:
        """Rows of a token: as many of the 64 as each token of the warpgroup can have."""
        return TILE_ROWS // self.share


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The kernel that walks over the queries of a block (dk and dv).

    Attributes:
      stages: groups of 8 tokens in flight; even, for the two warpgroups take turns.
      part: the most tokens that one thread block walks over; longer lists are split and summed in float32.
    """

    stages: int
    part: int

    def __post_init__(self):
        if self.stages < 2 or self.stages % PAIR or self.part < 1 or self.part % TOKENS:
            raise ValueError(f"{self} is no block configuration, expected even stages and part a multiple of 8")


@dataclasses.dataclass(frozen=True)
class Config:
    """How selected attention runs: one configuration per kernel."""

    forward: TileConfig
    dq: TileConfig
    dkdv: BlockConfig

    def shared_memory(self, head_dim: int) -> dict[str, int]:
        """Bytes of shared memory per kernel, less the lists and barriers (under 4 KiB)."""
        tile = TOKENS * ROWS * head_dim * 2
        return {
            "forward": (self.forward.consumers + 2 * self.forward.stages) * tile,
            "dq": (2 * self.dq.consumers + 2 * self.dq.stages) * tile,
            "dkdv": (2 + 2 * self.dkdv.stages + 2) * tile,
        }


def heuristic(queries: int, rows: int, head_dim: int, group: int = ROWS) -> Config:
    """A configuration for T queries of B x N rows: the measured one, or the most stages that shared memory holds.

    Args:
      queries: T.
      rows: B x N.
      head_dim: D.
      group: G, query heads per KV head.

    Returns:
      The configuration; lists are split where few rows would leave one thread block with a sink's whole list.
    """
    wide = head_dim > 64

    def fields(kernel: str, **default: int) -> dict[str, int]:
        return default | measured(f"selected_{kernel}", head_dim, queries)

    dkdv = fields("dkdv", stages=4 if wide else 6, pieces=16)
    # The pieces are those of 4 rows: with n = 32 each of 132 multiprocessors walks over T tokens in all, as many as a
    # sink has.
    pieces = max(1, min(32, 4 * dkdv.pop("pieces") // max(rows, 1)))
    part = max(1024, -(-queries // (pieces * TOKENS)) * TOKENS)
    share = TILE_ROWS // max(group, 1)
    share = share if share <= MASK_BITS // max(REGISTERS) else TOKENS
    narrow = {"stages": 8, "consumers": 3, "q_registers": 0}
    forward = fields("forward", **{"stages": 5, "consumers": 3, "q_registers": 64, "parts": 2} if wide else narrow)
    return Config(
        forward=TileConfig(share=share, **forward),
        dq=TileConfig(**fields("dq", stages=4 if wide else 8, q_registers=64 if wide else 0)),
        dkdv=BlockConfig(part=part, **dkdv),
    )
