"""Measured configurations of GPU kernels: `python -m benchmarks.tune_gpu` writes them, the heuristics read them."""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("gpu_table.json")

NEAR = 2.0
"""A length for which a configuration was measured serves up to this factor above and below."""


def measured(kernel: str, head_dim: int, queries: int) -> dict[str, Any]:
    """The fields of the configuration that was measured fastest.

    Args:
      kernel: its name in the table, such as "selected_forward".
      head_dim: D.
      queries: T.

    Returns:
      Fields to construct the kernel's configuration from, of the nearest length that was measured; empty where there is
      none within a factor of `NEAR`.
    """
    near = [
        (max(entry["queries"], queries) / max(min(entry["queries"], queries), 1), entry["fields"])
        for entry in _entries()
        if entry["kernel"] == kernel and entry["head_dim"] == head_dim
    ]
    ratio, fields = min(near, key=lambda item: item[0], default=(NEAR + 1, {}))
    return fields if ratio <= NEAR else {}


@functools.cache
def _entries() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())["entries"]
