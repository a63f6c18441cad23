"""Keeps what the tests read of the complete recording: `python reduce.py FOLDER` (README.md says what that is)."""

import sys
from pathlib import Path

import numpy as np

KEPT = ("position_ids", "is_vision", "rows", "heads28", "bi_rows", "block_indices_", "mixed_")


def main() -> None:
    complete, here = Path(sys.argv[1]), Path(__file__).parent
    for name in ("f32", "grad"):
        with np.load(complete / f"golden_{name}.npz") as file:
            kept = {key: file[key] for key in file.files if key.rsplit("/", 1)[1].startswith(KEPT)}
        np.savez_compressed(here / f"released_{name}.npz", **kept)


if __name__ == "__main__":
    main()
