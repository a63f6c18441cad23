"""The real loader under the real loop: the whole command on a tiny model, and how its videos and figures are made."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks import train_7b_real
from benchmarks.real_videos import RATE, make_videos
from videonsa_jax.data.video import decode_video


def frames_of(path: Path) -> np.ndarray:
    return decode_video(path, fps=float(RATE), max_frames=1000, max_pixels=None).frames


def test_a_video_is_its_scenes_one_after_the_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    make_videos(paths, [(64, 48)], scenes=3, scene_seconds=0.6, drawn=2, workers=1)
    scenes = [frames_of(tmp_path / "scenes" / f"64x48_{number}.mp4") for number in range(2)]
    assert [len(scene) for scene in scenes] == [18, 18]
    found = {path.name: frames_of(path) for path in paths}
    with av.open(str(paths[0])) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(54) / RATE, atol=1e-3)  # the container rounds to its clock
    one = np.concatenate([scenes[0], scenes[1], scenes[0]])
    other = np.concatenate([scenes[1], scenes[0], scenes[1]])
    assert all((frames == one).all() or (frames == other).all() for frames in found.values())


def line(step: int, seconds: float, wait: float, loading: float) -> dict:
    return {
        "step": step,
        "step_seconds": seconds,
        "wait_seconds": wait,
        "loading_seconds": loading,
        "visual_tokens": 90,
        "text_tokens": 10,
        "flops_per_second": 5.0,
        "mfu": 0.1 * step,
    }


def test_figures_are_those_of_whole_steps() -> None:
    found = train_7b_real.figures([line(2, 1.0, 0.5, 3.0), line(3, 3.0, 0.5, 5.0)], frames=12, questions=2)
    assert found["steps"] == [2, 3]
    assert found["seconds_per_question"] == 1.0
    assert found["gpu_hours_of_216000"] == 60.0
    assert found["wait_share"] == 0.25
    assert found["tokens_per_second"] == 50.0
    assert found["mfu"] == pytest.approx((0.2 * 1 + 0.3 * 3) / 4)
    assert found["frames_per_second_asked"] == 6.0
    assert found["frames_per_second_and_core"] == 3.0
    assert found["cores_busy_loading"] == 2.0


def test_steps_are_told_apart_by_where_their_frames_came_from() -> None:
    lines = [line(step, 1.0, 0.0, 1.0) for step in range(1, 9)]
    parts = train_7b_real.phases(lines, videos=5, decoded_before=3)
    assert {name: [entry["step"] for entry in part] for name, part in parts.items()} == {
        "decoded_while_compiling": [2, 3],
        "decoded_while_training": [4, 5],
        "from_the_cache": [6, 7, 8],
    }
    assert not train_7b_real.phases(lines, videos=5, decoded_before=5)["decoded_while_training"]


def test_the_command_trains_on_files_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--videos=3", "--steps=5", "--workers=1", "--questions=2"]
    assert train_7b_real.main([*arguments, f"--folder={tmp_path / 'files'}", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert [entry["step"] for entry in result["lines"]][:5] == [1, 2, 3, 4, 5]
    assert result["status"] is None  # ended from outside
    assert len(list((tmp_path / "files" / "frames").glob("*.npy"))) == 3
    cached, both = result["parts"]["from_the_cache"], result["parts"]["all"]
    assert cached["steps"][0] == 4
    assert both["steps"][0] == 2
    assert 0 <= both["wait_share"] < 1
    assert 0 < cached["loading_cpu_seconds_per_video"] < result["lines"][0]["loading_seconds"]
    assert result["frames"] == 12
    assert result["padding"]["visual_tokens"] == pytest.approx(1 - 12 / 16)
