"""Steps whose loss stands out, and the samples that they saw."""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videonsa_jax.training.step import Rows

SPIKES_FILE = "spikes.jsonl"
WINDOW = 128  # steps that the median is over
WARM_UP = 32  # steps before anything can stand out
# A run whose loss hardly varies would report every ripple; so far above the median a step must lie at least.
SMALLEST_SHARE = 0.1
# The standard deviation of a normal distribution, from the median of the distances to its median.
_SIGMAS_PER_MAD = 1.4826


@dataclass(frozen=True)
class Spike:
    """Why a step stands out.

    Attributes:
      median: of the losses before it.
      sigma: their robust standard deviation, 1.4826 times the median distance to the median.
    """

    median: float
    sigma: float


class SpikeDetector:
    """Compares each loss with the running median of those before it.

    A loss is a spike if it exceeds the median of the last `WINDOW` losses by more than `sigmas` robust standard
    deviations, and by more than `SMALLEST_SHARE` of the median. Spikes count among the losses of later steps: where
    many follow each other, the loss has risen.
    """

    def __init__(self, sigmas: float, earlier: Iterable[float] = ()):
        """Begins after the losses `earlier`; with 0 `sigmas` nothing is a spike."""
        self._sigmas = sigmas
        self._losses = deque(earlier, maxlen=WINDOW)

    def add(self, loss: float) -> Spike | None:
        """Counts a step's loss; says why if it is a spike."""
        before = list(self._losses)
        self._losses.append(loss)
        if not self._sigmas or len(before) < WARM_UP:
            return None
        median = statistics.median(before)
        sigma = _SIGMAS_PER_MAD * statistics.median(abs(value - median) for value in before)
        above = loss - median
        return Spike(median, sigma) if above > max(self._sigmas * sigma, SMALLEST_SHARE * median) else None


def spike_record(
    step: int, loss: float, grad_norm: float, spike: Spike, rows: Sequence[Rows], records: Sequence[Any]
) -> dict[str, Any]:
    """What is written of a spike: the step, why it is one, and its samples, those with the highest loss first.

    Args:
      step: the step's number.
      loss: its loss.
      grad_norm: its gradient's norm before clipping.
      spike: from `SpikeDetector`.
      rows: of the step's batches.
      records: of the data, by sample id.
    """
    ids = np.concatenate([np.ravel(batch.sample_ids) for batch in rows])
    losses = np.concatenate([np.ravel(batch.loss) for batch in rows])
    order = [place for place in np.argsort(-losses, kind="stable") if ids[place] >= 0]
    return {
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
        "median": spike.median,
        "sigma": spike.sigma,
        "samples": [
            {"sample": int(ids[place]), "record": records[ids[place]].id, "loss": float(losses[place])}
            for place in order
        ],
    }


def append_spike(workdir: Path, record: dict[str, Any]) -> None:
    """Adds a line to the run's `spikes.jsonl`."""
    with (workdir / SPIKES_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")
