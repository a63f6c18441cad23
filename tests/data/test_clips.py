"""Rendering, encoding and writing the `clips` data set."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from videonsa_jax.data import clips, scenes
from videonsa_jax.data.clips import ClipsPaths, clips_long, make_clips, write_video
from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.questions import draw_clips

SMALL = ClipsConfig(train_clips=14, heldout_clips=10, frame_side=96, render_workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> ClipsPaths:
    return make_clips(SMALL, tmp_path_factory.mktemp("datasets"))


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_records_are_llava_video_style(made):
    for path, config_clips, descriptions in ((made.train_json, 14, 14), (made.heldout_json, 10, 0)):
        records = json.loads(path.read_text())
        assert len({record["id"] for record in records}) == len(records)
        assert len({record["video"] for record in records}) == config_clips
        for record in records:
            human, gpt = record["conversations"]
            assert human["from"] == "human"
            assert human["value"].startswith("<image>\n")
            assert all(option in human["value"].split("\n") for option in record.get("options", ()))
            assert gpt == {"from": "gpt", "value": record["answer"]}
            assert record["data_source"] == "clips"
            assert (made.root / record["video"]).is_file()
        assert sum("family" not in record for record in records) == descriptions
    assert made.tokenizer_json.is_file()


def test_videos_are_h264_and_show_the_scene(made):
    records = {record["video"]: record for record in json.loads(made.heldout_json.read_text())}
    for clip in draw_clips(SMALL, "heldout"):
        scene, record = clip.scene, records[clip.video]
        with av.open(str(made.root / clip.video)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == scene.fps == record["fps"]
            assert stream.pix_fmt == "yuv420p"
        frames = decode(made.root / clip.video)
        assert len(frames) == record["num_frames"] == record["duration"] * record["fps"]
        assert frames[0].shape == (record["height"], record["width"], 3)
        for slot in range(scene.slots):
            # With its chroma at half resolution, as the file has it; what is left is the quantiser's.
            picture = av.VideoFrame.from_ndarray(scenes.paint(scene, scene.marks(slot))).reformat(format="yuv420p")
            shown = picture.to_ndarray(format="rgb24").astype(int)
            difference = np.abs(frames[slot * scene.frames_per_slot] - shown).max(-1)
            assert np.median(difference) <= 4
            assert difference.max() <= 40


def test_a_slot_decodes_the_same_wherever_it_stands(tmp_path):
    """No trace of earlier slots in a slot's pixels: decoded frames keep the twins' equal multisets."""
    for index in range(3):  # flashes, a ball, a box
        scene = draw_clips(SMALL, "train")[index].scene
        write_video(scene, tmp_path / "clip.mp4")
        frames = decode(tmp_path / "clip.mp4")
        seen: dict[tuple, bytes] = {}
        for number, frame in enumerate(frames):
            marks = scene.marks(number // scene.frames_per_slot)
            assert seen.setdefault(marks, frame.tobytes()) == frame.tobytes()
        assert 1 < len(seen) <= scene.slots


def test_same_config_same_files(made, tmp_path):
    again = make_clips(SMALL, tmp_path)
    assert again.root.name == made.root.name
    files = sorted(path.relative_to(made.root) for path in made.root.rglob("*.*"))
    assert files == sorted(path.relative_to(again.root) for path in again.root.rglob("*.*"))
    assert all((made.root / file).read_bytes() == (again.root / file).read_bytes() for file in files)


def test_a_made_set_is_found_again(made, monkeypatch, capfd):
    monkeypatch.setattr(clips, "write_video", None)
    assert make_clips(replace(SMALL, render_workers=2), made.root.parent) == made
    assert capfd.readouterr().err == ""


def test_worker_processes_write_the_same_files(tmp_path, capfd):
    config = replace(SMALL, train_clips=20)
    one, two = (make_clips(replace(config, render_workers=workers), tmp_path / str(workers)).root for workers in (1, 2))
    assert one.name == two.name
    for path in one.rglob("*.mp4"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    # Plain lines where stderr is not a terminal.
    assert "making clips: 30 of 30\n" in capfd.readouterr().err


KILLED = """
import os, signal, sys
from videonsa_jax.data import clips
from videonsa_jax.data.config import ClipsConfig
write, written = clips.write_video, []
def write_five(scene, path):
    if len(written) == 5:
        path.with_suffix(".part").write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    write(scene, path)
    written.append(path)
clips.write_video = write_five
clips.make_clips(ClipsConfig(train_clips=14, heldout_clips=10, frame_side=96, render_workers=1), sys.argv[1])
"""


def test_a_killed_run_leaves_nothing_complete_and_is_resumed(made, tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not list(tmp_path.glob("clips-*"))
    written: list[Path] = []

    def write(scene, path):
        written.append(path)
        write_video(scene, path)

    monkeypatch.setattr(clips, "write_video", write)
    again = make_clips(SMALL, tmp_path)
    assert len(written) == 24 - 5
    assert not list(again.root.rglob("*.part"))
    assert again.train_json.read_bytes() == made.train_json.read_bytes()


def test_an_interrupted_run_leaves_nothing_complete(tmp_path, monkeypatch):
    def interrupt(scene, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "write_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_clips(SMALL, tmp_path)
    assert not list(tmp_path.glob("clips-*"))


def test_racing_makers_make_it_once(tmp_path, monkeypatch):
    written: list[Path] = []

    def write(scene, path):
        written.append(path)
        write_video(scene, path)

    monkeypatch.setattr(clips, "write_video", write)
    found: list[ClipsPaths] = []
    threads = [threading.Thread(target=lambda: found.append(make_clips(SMALL, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(written) == 24


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"seconds": (10,)},
            r"ClipsConfig: seconds is \(10,\), expected lengths that are multiples of 4 from 8 on",
        ),
        (
            {"seconds": (8, 4)},
            r"ClipsConfig: seconds is \(8, 4\), expected lengths that are multiples of 4 from 8 on",
        ),
        ({"seconds": (4,)}, r"ClipsConfig: seconds is \(4,\), expected"),
        ({"seconds": ()}, r"ClipsConfig: seconds is \(\), expected one length or more"),
        ({"short_seconds": (9,)}, r"ClipsConfig: short_seconds is \(9,\), expected lengths that are multiples of 4"),
        ({"train_clips": 0}, "ClipsConfig: train_clips is 0, expected at least 1"),
        ({"heldout_clips": 0}, "ClipsConfig: heldout_clips is 0, expected at least 1"),
        ({"frame_side": 20}, "ClipsConfig: frame_side is 20, expected at least 64 pixels"),
        ({"aspects": ()}, r"ClipsConfig: aspects is \(\), expected one width:height or more"),
        ({"aspects": ("4/3",)}, r"ClipsConfig: aspects is \('4/3',\), expected one width:height or more"),
        ({"aspects": ("1:1", "5:1")}, r"ClipsConfig: aspects is .*, expected .* each from 1:4 to 4:1"),
        ({"aspects": ("0:0",)}, r"ClipsConfig: aspects is .*, expected"),
        ({"render_workers": -1}, "ClipsConfig: render_workers is -1, expected"),
        ({"seed": -1}, "ClipsConfig: seed is -1, expected"),
    ],
)
def test_bad_configs_get_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        make_clips(replace(SMALL, **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_clips_are_rendered_too(tmp_path):
    config = replace(clips_long(64), train_clips=2, heldout_clips=1, frame_side=64, render_workers=1)
    records = json.loads(make_clips(config, tmp_path).train_json.read_text())
    assert {record["duration"] for record in records} == {64.0}
    assert (
        len(decode(tmp_path / make_clips(config, tmp_path).root.name / records[0]["video"])) == records[0]["num_frames"]
    )
