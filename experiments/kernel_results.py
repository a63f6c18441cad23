"""Files that `experiments.bench_kernels` writes: reading them, making one of several."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A file's content.

    Raises:
      ValueError: it was not written by `experiments.bench_kernels`.
    """
    try:
        result = json.loads(path.read_text())
        result["records"], result["device"]["kind"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no result of experiments.bench_kernels ({error!r})") from error
    return result


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All records under what the first says of commit, versions and device, with every command."""
    records = [record for result in results for record in result["records"]]
    return results[0] | {"command": [result["command"] for result in results], "records": records}
