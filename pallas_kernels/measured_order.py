"""Which implementation was measured fastest, by device and operation: `python -m benchmarks.order_implementations`."""

import functools
import json
from pathlib import Path

FILE = Path(__file__).with_name("measured_order.json")


def measured_order(device_kind: str, operation: str) -> tuple[str, ...]:
    """Implementations, the fastest first.

    Args:
      device_kind: `jax.Device.device_kind`.
      operation: its name, or "nsa_attention" for the whole.

    Returns:
      Their names; empty where nothing was measured.
    """
    return tuple(_table().get(device_kind, {}).get(operation, ()))


@functools.cache
def _table() -> dict[str, dict[str, list[str]]]:
    return json.loads(FILE.read_text())["devices"]
