import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from header_readers import by_name
from small_videos import grey_frames, write_video

from videonsa_jax.data.frames import VideoInfo
from videonsa_jax.data.records import DataError
from videonsa_jax.data.video_index import IndexedVideo, build_video_index, read_video_index


def files_of(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"0123456789")
    return [str(folder / name) for name in names]


def calls_of(folder):
    return Counter((folder / "calls").read_text().split()) if (folder / "calls").exists() else Counter()


def build(tmp_path, videos, **options):
    options = {"workers": 2, "seconds_limit": 5.0, "read": by_name} | options
    return build_video_index(tmp_path / "index.jsonl", videos, **options)


def test_real_videos(tmp_path):
    whole = write_video(tmp_path / "a.mp4", grey_frames(40, height=56, width=84))
    (tmp_path / "b.mp4").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "c.mp4").write_bytes(b"")
    videos = [str(tmp_path / f"{name}.mp4") for name in "abcd"]
    build_video_index(tmp_path / "below" / "index.jsonl", videos, workers=2)
    entries = read_video_index(tmp_path / "below" / "index.jsonl")
    assert sorted(entries) == videos
    found, cut, empty, missing = (entries[video] for video in videos)
    status = whole.stat()
    assert found == IndexedVideo(videos[0], status.st_size, status.st_mtime_ns, VideoInfo(84, 56, 4.0, 10.0))
    assert (cut.reason, empty.reason, missing.reason) == ("video unreadable", "video empty", "video missing")
    assert cut.problem.startswith(videos[1])
    assert all(entry.info is None for entry in (cut, empty, missing))
    assert missing.size == -1


def test_unchanged_videos_are_not_read_again(tmp_path):
    videos = files_of(tmp_path, "a", "b", "broken", "d")
    first = build(tmp_path, [*videos, videos[0], str(tmp_path / "missing")])
    assert calls_of(tmp_path) == Counter({"a": 1, "b": 1, "broken": 1, "d": 1})
    assert build(tmp_path, videos) == first
    (tmp_path / "a").write_bytes(b"0123456789" * 2)
    os.utime(tmp_path / "b", ns=(1, 1))
    (new,) = files_of(tmp_path, "missing")
    again = build(tmp_path, [*videos, new])
    assert calls_of(tmp_path) == Counter({"a": 2, "b": 2, "broken": 1, "d": 1, "missing": 1})
    assert (again[videos[0]].info.duration, again[new].info.duration) == (2.0, 1.0)
    assert read_video_index(tmp_path / "index.jsonl") == again


def test_files_that_hang_or_crash_cost_themselves(tmp_path):
    videos = files_of(tmp_path, "a", "hangs", "crashes", "overruns", "b", "c", "crashes-2", "d")
    reports = []
    build(tmp_path, videos, seconds_limit=0.5, report=reports.append, report_seconds=0.1)
    entries = read_video_index(tmp_path / "index.jsonl")
    reasons = {Path(video).name: entry.reason for video, entry in entries.items() if entry.reason}
    assert reasons == {
        "hangs": "video takes too long to read",
        "overruns": "video takes too long to read",
        "crashes": "video crashes its reader",
        "crashes-2": "video crashes its reader",
    }
    assert all(entries[str(tmp_path / name)].info for name in "abcd")
    assert (reports[0].done, reports[-1].done, reports[-1].total) == (0, 8, 8)
    assert reports[-1].unusable == {"video takes too long to read": 2, "video crashes its reader": 2}
    assert len(reports) > 3
    build(tmp_path, videos[3:])
    assert calls_of(tmp_path)["overruns"] == 2, "what took too long may have had a bad day"
    assert calls_of(tmp_path)["crashes-2"] == 1


CODE = """
import sys
from pathlib import Path
from header_readers import by_name
from videonsa_jax.data.video_index import build_video_index
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    videos = [str(folder / f"slow-{k}") for k in range(60)]
    build_video_index(folder / "index.jsonl", videos, workers=2, read=by_name)
"""


def test_a_killed_build_goes_on(tmp_path):
    videos = files_of(tmp_path, *(f"slow-{k}" for k in range(60)))
    (tmp_path / "build.py").write_text(CODE)
    index, paths = tmp_path / "index.jsonl", os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "build.py"), str(tmp_path)], env=os.environ | {"PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 60
    while not (index.exists() and index.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(DataError, match=r"index\.jsonl: another process is building it"):
        build(tmp_path, videos)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = index.read_bytes()
    index.write_bytes(saved + b'{"video": "cut sh')  # as a kill in the middle of a write leaves it
    kept = read_video_index(index)
    assert 4 <= len(kept) < 60
    (tmp_path / "calls").unlink()
    for name in range(60):  # the rest need not be slow
        if str(tmp_path / f"slow-{name}") not in kept:
            videos[name] = files_of(tmp_path, f"fast-{name}")[0]
    entries = build(tmp_path, videos)
    assert all(entries[video].info for video in videos)
    assert set(calls_of(tmp_path)) == {Path(video).name for video in videos if video not in kept}
    lines = index.read_bytes()
    assert lines.startswith(saved)
    assert lines.endswith(b"\n")
    assert all(json.loads(line) for line in lines.splitlines())


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[]", b'{"video": "a"}', b'{"video": "a", "size": 1, "mtime_ns": 2}', b'{"a": 1}', b"\xff"]
)
def test_another_file_is_left_alone(tmp_path, line):
    path = tmp_path / "index.jsonl"
    path.write_bytes(line + b"\n")
    for attempt in (lambda: read_video_index(path), lambda: build(tmp_path, files_of(tmp_path, "a"))):
        with pytest.raises(DataError, match=r"index\.jsonl: line 1 is .*expected a line of a video index"):
            attempt()
    assert path.read_bytes() == line + b"\n"


def test_an_index_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"index\.jsonl: No such file.*python -m experiments\.index builds one"):
        read_video_index(tmp_path / "index.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/index: .*expected a file that can be written"):
        build_video_index(tmp_path / "file" / "index", [], workers=1)
