"""`benchmarks.killed_run` with three kills of a smaller model; `python -m benchmarks.killed_run` is the whole."""

from pathlib import Path

import pytest

from benchmarks.killed_run import MOMENTS, SHORTER, Kill, compare, draw_kills

SETTINGS = SHORTER | {
    "train.steps": "16",
    "data.clips.train_clips": "8",
    "data.clips.heldout_clips": "8",
    "data.clips.seconds": "8",
    "data.contexts_per_batch": "2",
    "data.questions_per_context": "2",
    "data.buckets": "256",
    "model.vision.depth": "1",
    "model.vision.fullatt_block_indexes": "0",
    "model.text.num_hidden_layers": "2",
}
FAST_COMPILATION = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def test_kills_are_drawn_from_the_seed_and_spread_over_the_run() -> None:
    kills = draw_kills(20, 120, 0)
    assert kills == draw_kills(20, 120, 0) != draw_kills(20, 120, 1)
    assert [kill.after for kill in kills] == sorted(kill.after for kill in kills)
    assert {(kill.signal, kill.moment) for kill in kills} == {
        (signal, moment) for signal in ("SIGKILL", "SIGTERM") for moment in MOMENTS
    }
    assert kills[0].after < 40 < 80 < kills[-1].after < 112


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    kills = [Kill("SIGKILL", "save", 4, 0.005), Kill("SIGTERM", "step", 7, 0.1), Kill("SIGKILL", "step", 11, 0.2)]
    result = compare(tmp_path, kills, SETTINGS, FAST_COMPILATION)
    assert result["same"] == dict.fromkeys(result["same"], True)
    assert [kill["status"] for kill in result["kills"]] == [-9, 75, -9]
    assert result["kills"][0]["saves_under_way"]
