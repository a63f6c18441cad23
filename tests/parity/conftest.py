"""Where the outputs of transformers lie: committed, or made afresh by `make parity`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

FOLDER = Path(os.environ.get("PARITY_FIXTURES", Path(__file__).parents[1] / "fixtures"))
# Release -> the rule for M-RoPE ids that follows it.
RELEASES = {"transformers-4.49.0": "qwen2_5_vl", "transformers-5.23.0": "transformers_5_21"}


@dataclass(frozen=True)
class Recorded:
    """What one release gave for one model."""

    model: str
    mrope: str
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[f"{self.model}/{name}"]


def checkpoint(model: str, release: str | None = None) -> Path:
    """A model's checkpoint as `release`, or else whichever release made one, has written it."""
    folders = [FOLDER / name / model for name in ([release] if release else []) + list(RELEASES)]
    return next(folder for folder in folders if folder.is_dir())


@pytest.fixture(scope="session", params=RELEASES)
def release(request):
    return request.param


@pytest.fixture(scope="session")
def outputs(release):
    with np.load(FOLDER / release / "outputs.npz") as file:
        return dict(file)
