import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from videonsa_jax.training.metrics import (
    MetricsWriter,
    Progress,
    StepClock,
    StepTime,
    keep_metrics_until,
    read_metrics,
)

VALUES = {
    "loss": 2.5,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "step_seconds": 0.5,
    "wait_share": 0.25,
    "visual_tokens_per_second": 1000.0,
    "text_tokens_per_second": 200.0,
    "mfu": None,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_readable_as_soon_as_they_are_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write("train", 1, {"loss": 2.5, "grad_norm": float("inf"), "mfu": None})
    line = {"kind": "train", "step": 1, "loss": 2.5, "grad_norm": "inf", "mfu": None}
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]
    writer.close()


def test_lines_past_the_checkpoint_are_dropped_with_the_one_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_metrics_until(path, 2)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=False)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    stream = io.StringIO()
    Progress(10, 0, enabled=False, stream=stream).say("hello")
    assert not list(tmp_path.iterdir())
    assert stream.getvalue() == ""


def test_tensorboard_gets_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = []

    class SummaryWriter:
        def __init__(self, folder: str):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *arguments: object) -> None:
            scalars.append(arguments)

        def flush(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write("train", 3, {"loss": 2.5, "learning_rate": 0.1, "mfu": None})
    writer.close()
    assert scalars == [("train/loss", 2.5, 3), ("train/learning_rate", 0.1, 3)]


def test_the_clock_averages_since_the_last_line() -> None:
    clock = StepClock(lambda own: own[None], 1000.0)
    clock.add(StepTime(1.0, 0.5, 0.75, 4.0), visual_tokens=100, text_tokens=10, flops=300.0)
    clock.add(StepTime(3.0, 0.5, 0.75, 6.0), visual_tokens=300, text_tokens=30, flops=500.0)
    assert clock.read_and_reset() == {
        "step_seconds": 2.0,
        "wait_share": 0.25,
        "wait_seconds": 0.5,
        "loading_seconds": 5.0,
        "straggler": 1.0,
        "straggler_process": 0,
        "straggler_seconds": 0.0,
        "visual_tokens_per_second": 100.0,
        "text_tokens_per_second": 10.0,
        "flops_per_second": 200.0,
        "mfu": 0.2,
    }
    clock.add(StepTime(1.0, 0.0, 0.0, 0.0), visual_tokens=7, text_tokens=0, flops=None)
    figures = clock.read_and_reset()
    assert figures["visual_tokens_per_second"] == 7.0
    assert figures["flops_per_second"] is figures["mfu"] is None
    unknown_device = StepClock(lambda own: own[None], None)
    unknown_device.add(StepTime(2.0, 0.0, 0.0, 0.0), visual_tokens=7, text_tokens=0, flops=8.0)
    assert (figures := unknown_device.read_and_reset())["flops_per_second"] == 4.0
    assert figures["mfu"] is None


def test_the_process_that_keeps_the_others_waiting_is_named() -> None:
    others = [[2.0, 0.1, 0.2, 1.0, 100.0], [2.5, 1.5, 1.75, 3.0, 300.0]]
    clock = StepClock(lambda own: np.array([own, *others]), 1000.0)
    clock.add(StepTime(seconds=2.0, waiting=0.1, host=0.25, loading=0.5), visual_tokens=1, text_tokens=1, flops=200.0)
    figures = clock.read_and_reset()
    assert figures["straggler"] == 1.25
    assert figures["straggler_process"] == 2
    assert figures["straggler_seconds"] == 1.5
    assert figures["wait_seconds"] == 1.5
    assert figures["loading_seconds"] == 4.5
    assert figures["mfu"] == 0.3  # 600 FLOPs of all processes in this one's two seconds


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(110, 0, stream=stream)
    progress.step()
    progress.show(10, VALUES)
    progress.close()
    Progress(110, 10, stream=stream).show(10, VALUES | {"mfu": 0.4})
    first, second = stream.getvalue().splitlines(keepends=True)
    assert "  MFU 40.0%, 1,000+200 tok/s" in second
    assert first == (
        "step 10/110  loss 2.5000  grad norm 1.000  lr 1.00e-03  0.500 s/step  1,000+200 tok/s (visual+text)  "
        "waiting 25%  ETA 0:00:50\n"
    )


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    progress = Progress(4, 1, stream=stream)
    progress.step()
    progress.show(2, VALUES)
    progress.say("saved")
    progress.close()
    assert "2/4" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
