"""Tile configurations of the Triton kernels of interval attention (compressed, window and prefix attention)."""

import dataclasses

from pallas_kernels.gpu_flash_config import MULTIPROCESSORS, split


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """A kernel whose tiles are queries (forward and dq).

    Attributes:
      rows: of a tile: as many tokens as fit with all heads of a KV head.
      keys: of one step.
      warps: of a program; 4 multiply 64 rows at a time on Hopper's matrix units.
      stages: steps in flight.
      parts: ways the keys are split, for few queries; float32 results of the parts are merged after the kernel.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class KeyConfig:
    """The kernel whose tiles are keys (dk and dv).

    Attributes:
      keys: of a tile.
      rows: of one step: as many tokens as fit with all heads of a KV head.
      warps: of a program.
      stages: steps in flight.
      parts: ways the queries are split, for few keys; float32 results of the parts are summed after the kernel.
    """

    keys: int
    rows: int
    warps: int
    stages: int
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """How interval attention runs: one configuration per kernel."""

    forward: QueryConfig
    dq: QueryConfig
    dkdv: KeyConfig


def heuristic(queries: int, keys: int, rows: int, group: int, window: int | None) -> Config:
    """A configuration by shape.

    Args:
      queries: T.
      keys: S.
      rows: B x N.
      group: G.
      window: keys that a query sees at most; None: all before its end.

    Returns:
      The configuration.
    """
    tokens = 64 // group
    reach = keys if window is None else min(keys, window + tokens)
    parts = split(rows * -(-queries // tokens), reach // 512)
    # A band is few steps: smaller ones waste fewer keys, and leave registers for a third program per multiprocessor.
    step = 64 if window is None else 32
    return Config(
        forward=QueryConfig(64, step, 4, 3, parts),
        dq=QueryConfig(64, step, 4, 2 if window is None else 3, parts),
        dkdv=KeyConfig(64, 128, 8, 2, key_parts(queries, keys, rows) if window is None else 1),
    )


def key_parts(queries: int, keys: int, rows: int) -> int:
    """Ways to split the queries, for few keys: many programs per multiprocessor, each of some tiles of queries."""
    return max(1, min(32 * MULTIPROCESSORS // (rows * -(-keys // 64)), queries // 256))
