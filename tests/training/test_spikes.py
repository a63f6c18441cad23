import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from training_fakes import FakeRecord

from videonsa_jax.training.spikes import WARM_UP, WINDOW, SpikeDetector, append_spike, spike_record
from videonsa_jax.training.step import Rows

# Median 2.05, median distance to it 0.05: a robust standard deviation of 0.07413.
CALM = [2.0, 2.1] * (WARM_UP // 2)


@pytest.mark.parametrize(("sigmas", "loss", "stands_out"), [(6.0, 2.5, True), (6.0, 2.49, False), (0.0, 1e9, False)])
def test_a_loss_far_above_the_running_median_stands_out(sigmas: float, loss: float, stands_out: bool) -> None:
    spike = SpikeDetector(sigmas, CALM).add(loss)
    assert (spike is not None) == stands_out
    if spike is not None:
        assert spike.median == pytest.approx(2.05)
        assert spike.sigma == pytest.approx(0.07413)


def test_nothing_stands_out_before_there_is_a_median_or_below_it() -> None:
    detector = SpikeDetector(6.0, CALM[:-1])
    assert detector.add(100.0) is None  # the last loss of the warm-up
    assert detector.add(0.001) is None
    assert detector.add(100.0) is not None


def test_a_ripple_of_a_calm_loss_does_not_stand_out() -> None:
    detector = SpikeDetector(6.0, [2.0] * WARM_UP)
    assert detector.add(2.19) is None
    assert detector.add(2.21).sigma == 0


def test_a_loss_that_stays_high_becomes_the_median() -> None:
    detector = SpikeDetector(6.0, CALM * (WINDOW // WARM_UP))
    seen = [detector.add(5.0) is not None for _ in range(WINDOW)]
    assert all(seen[: WINDOW // 2 - 1])
    assert not any(seen[WINDOW // 2 + 1 :])


def test_a_record_names_the_samples_the_worst_first(tmp_path: Path) -> None:
    rows = [
        Rows(sample_ids=np.array([[4, 2]], np.int32), loss=jnp.array([[1.5, 0.5]])),
        Rows(sample_ids=np.array([[3, -1]], np.int32), loss=jnp.array([[9.0, 0.0]])),
    ]
    spike = SpikeDetector(6.0, CALM).add(3.5)
    records = [FakeRecord("", id=f"clip {index}") for index in range(5)]
    record = spike_record(7, 3.5, float("inf"), spike, rows, records)
    assert record["samples"] == [
        {"sample": 3, "record": "clip 3", "loss": 9.0},
        {"sample": 4, "record": "clip 4", "loss": 1.5},
        {"sample": 2, "record": "clip 2", "loss": 0.5},
    ]
    append_spike(tmp_path, record)
    append_spike(tmp_path, record)
    assert [json.loads(line)["grad_norm"] for line in (tmp_path / "spikes.jsonl").read_text().splitlines()] == [
        "inf",
        "inf",
    ]
