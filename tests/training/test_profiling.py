from pathlib import Path

import pytest

from videonsa_jax.training import profiling
from videonsa_jax.training.profiling import StepProfiler, parse_steps


def test_steps_are_named_by_their_numbers() -> None:
    assert parse_steps("100-103") == range(100, 104)
    assert parse_steps("7") == range(7, 8)
    for wrong in ("", "0", "5-4", "a-b", "1-2-3", "-3"):
        with pytest.raises(ValueError, match=f"--profile is '{wrong}', expected the numbers of steps"):
            parse_steps(wrong)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder.name}"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run_steps(profiler: StepProfiler, steps: range, calls: list[str]) -> None:
    for step in steps:
        profiler.begin(step)
        calls.append(str(step))
        profiler.end(step)


def test_a_trace_spans_its_steps(tmp_path: Path, calls: list[str]) -> None:
    run_steps(StepProfiler(range(2, 4), tmp_path), range(1, 6), calls)
    assert calls == ["1", "start profile", "2", "3", "stop", "4", "5"]


def test_a_trace_begins_late_or_ends_early_where_the_run_does(tmp_path: Path, calls: list[str]) -> None:
    resumed = StepProfiler(range(2, 9), tmp_path)
    run_steps(resumed, range(4, 6), calls)
    resumed.close()
    resumed.close()
    assert calls == ["start profile", "4", "5", "stop"]


def test_other_processes_trace_nothing(tmp_path: Path, calls: list[str]) -> None:
    run_steps(StepProfiler(range(1, 3), tmp_path, enabled=False), range(1, 3), calls)
    assert calls == ["1", "2"]
