"""Writes the table from which `implementation=None` chooses, out of what `experiments.bench_kernels` measured.

    python -m benchmarks.order_implementations benchmarks/results/h100_kernels_2026-11-23.json

Per operation, implementations are ordered by the geometric mean of their times over the lengths and passes at which all
of them were timed; one that was not timed wherever the others were comes after those that were, in the order it had.
The table (pallas_kernels/measured_order.json) keeps what it holds of other devices.
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
    most = max(len(cases) for cases in times.values())
    complete = {name: cases for name, cases in times.items() if len(cases) == most}
    shared = set.intersection(*(set(cases) for cases in complete.values()))
    mean = {name: sum(math.log(cases[case]) for case in shared) for name, cases in complete.items()}
    return [*sorted(mean, key=lambda name: mean[name]), *(name for name in NAMES if name in times.keys() - mean.keys())]


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
