"""Writes the table from which `implementation=None` chooses, out of what `experiments.bench_kernels` measured.

    python -m benchmarks.order_implementations benchmarks/results/h100_kernels_2026-11-23.json

Those that were timed in most cases (length, pass, choice) come first, then the others; within each, by the geometric
mean of their times over those of one that has most cases, in the cases that both have. The table
(pallas_kernels/measured_order.json) keeps what it holds of other devices.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import kernel_results
from experiments.kernel_operations import PARTS
from pallas_kernels.measured_order import FILE
from pallas_kernels.registry import NAMES

OPERATIONS = ("nsa_attention", *PARTS)


def order(records: Sequence[dict[str, Any]], operation: str) -> list[str]:
    """The implementations of an operation, the fastest first.

    Args:
      records: of `experiments.bench_kernels`.
      operation: its name.

    Returns:
      Names out of `NAMES`; empty where nothing was timed.
    """
    times: dict[str, dict[tuple[Any, ...], float]] = {}
    for record in records:
        if record["operation"] == operation and "median_ms" in record and record["implementation"] in NAMES:
            case = record["length"], record["pass"], record["choice"]
            times.setdefault(record["implementation"], {})[case] = record["median_ms"]
    if not times:
        return []
    most = max(times.values(), key=len)

    def place(name: str) -> tuple[bool, float]:
        shared = times[name].keys() & most.keys()
        ratios = [math.log(times[name][case] / most[case]) for case in shared]
        return len(times[name]) < len(most), math.fsum(ratios) / len(ratios) if ratios else math.inf

    return sorted(times, key=place)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.order_implementations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, metavar="JSON", help="written by experiments.bench_kernels")
    parser.add_argument("--table", type=Path, default=FILE, metavar="FILE", help="default: the package's own")
    options = parser.parse_args(arguments)
    try:
        result = kernel_results.read(options.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind, records = result["device"]["kind"], result["records"]
    table = json.loads(options.table.read_text()) if options.table.exists() else {"devices": {}}
    table["devices"][kind] = {name: found for name in OPERATIONS if (found := order(records, name))}
    kernel_results.write(table, options.table)
    for name, found in table["devices"][kind].items():
        print(f"{kind}: {name}: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
