import itertools
import math

import av
import numpy as np
import pytest
from PIL import Image
from small_videos import grey_frames, numbers, write_video

from videonsa_jax.data import video
from videonsa_jax.data.frames import (
    VideoError,
    VideoInfo,
    frames_to_patches,
    resize_frame,
    sample_times,
    smart_resize,
)
from videonsa_jax.data.video import decode_video, probe_video


def decode(path, **options):
    return decode_video(path, **({"fps": 4.0, "max_frames": 64, "max_pixels": None} | options))


def shown_at(times, targets):
    """Brute force: the last frame that starts at or before each target, else the first."""
    return [max([k for k, t in enumerate(times) if t <= target + 1e-6], default=0) for target in targets]


# ---- which frames


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_frames_are_chosen_by_time(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", grey_frames(40), rate=10)
    decoded = decode(path, fps=4.0)
    assert numbers(decoded.frames) == [int(k * 2.5) for k in range(16)]
    assert decoded.fps == 4.0
    assert decoded.duration == pytest.approx(4.0, abs=0.11)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("seed", range(3))
def test_variable_frame_rate(tmp_path, suffix, seed):
    rng = np.random.default_rng(seed)
    times = np.concatenate([[0.0], np.cumsum(rng.choice([0.02, 0.1, 0.35, 0.9], 30))]).round(3)
    path = write_video(tmp_path / f"a{suffix}", grey_frames(31), times=times)
    info = probe_video(path)
    expected = VideoInfo(info.width, info.height, float(times[-1]) + 0.01)
    targets, _ = sample_times(expected.duration, 8.0, 999)
    decoded = decode(path, fps=8.0, max_frames=999, expected=expected)
    assert numbers(decoded.frames)[: len(targets)] == shown_at(times, targets)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_late_start(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", grey_frames(30), start=7.5)
    assert probe_video(path).duration == pytest.approx(3.0, abs=0.05)
    assert numbers(decode(path, fps=5.0).frames) == [*range(0, 30, 2), 28]


def test_reordered_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(40), options={"bf": "3", "preset": "medium", "b-adapt": "0"})
    assert numbers(decode(path, fps=10.0).frames) == list(range(40))


def test_odd_count_repeats_the_last_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(25))
    assert numbers(decode(path, fps=2.0).frames) == [0, 5, 10, 15, 20, 20]


def test_more_frames_than_the_file_has(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(4), rate=2)
    assert numbers(decode(path, fps=4.0).frames) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_max_frames_samples_uniformly(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(40))
    decoded = decode(path, fps=10.0, max_frames=8)
    assert numbers(decoded.frames) == list(range(0, 40, 5))
    assert decoded.fps == 2.0


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(1))
    assert decode(path).frames.shape == (2, 32, 48, 3)


def test_sparse_sampling_jumps_between_keyframes(tmp_path, monkeypatch):
    options = {"g": "10", "keyint_min": "10", "bf": "2", "preset": "medium", "sc_threshold": "0"}
    levels = np.arange(600) % 60  # grey levels repeat, which the spacing of the samples tells apart
    path = write_video(tmp_path / "a.mp4", grey_frames(60)[levels], options=options)
    decoded, read = [], video._Reader.frames

    def counting(reader):
        for item in read(reader):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video._Reader, "frames", counting)
    frames = decode(path, fps=4.0, max_frames=7).frames
    assert numbers(frames)[:7] == levels[[int(k * 600 / 7) for k in range(7)]].tolist()
    assert len(decoded) < 200


def test_jumps_in_a_stream_of_open_groups(tmp_path, monkeypatch):
    """Frames shown before a keyframe but decoded after it refer to the group before."""
    options = {"preset": "medium", "x264-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
    path = write_video(tmp_path / "a.mp4", grey_frames(60), options=options)
    monkeypatch.setattr(video, "SEEK_SECONDS", 0.15)
    for step in (5, 7, 9, 13):
        frames = decode(path, fps=10 / step).frames
        assert numbers(frames)[: math.ceil(60 / step)] == list(range(0, 60, step))


@pytest.mark.parametrize("at", [0, 3, 17, 31])
def test_a_keyframe_shown_later_than_its_index_says(tmp_path, monkeypatch, at):
    path = write_video(tmp_path / "a.mp4", grey_frames(60), options={"g": "5", "keyint_min": "5", "sc_threshold": "0"})
    monkeypatch.setattr(video, "SEEK_SECONDS", 0.05)
    sought = []

    class OneKeyframeLate:
        def __init__(self, container):
            self.container, self.demux = container, container.demux

        def seek(self, timestamp, stream):
            sought.append(timestamp)
            self.container.seek(timestamp + round(0.5 / float(stream.time_base)), stream=stream)

    with video._opened(path, 20.0, 2**26) as (container, stream):
        reader = video._Reader(path, container, stream, 20.0)
        reader.container = OneKeyframeLate(container)
        frames = [frame.to_ndarray(format="rgb24") for frame in reader.shown(np.array([at, at + 7, at + 28]) / 10)]
    assert numbers(np.stack(frames)) == [at, at + 7, at + 28]
    assert len(sought) > 2


def moving_texture(count, height=64, width=96, seed=0):
    """Frames that are predicted from each other: a crop that wanders over smooth noise."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 255, (24, 36, 3), np.uint8)).resize((width + 64, height + 64))
    places = (32 + 31 * np.sin(np.arange(count)[:, None] / (5.0, 7.0))).astype(int)
    return np.stack([np.asarray(noise)[y : y + height, x : x + width] for y, x in places])


@pytest.mark.parametrize(
    "params",
    [
        "bframes=3:b-adapt=0",
        "bframes=3:b-pyramid=none:keyint=20",
        "bframes=16:b-adapt=0:ref=4",
        "bframes=2:open-gop=1:keyint=9:min-keyint=9:scenecut=0",
        "bframes=3:interlaced=1",
        "bframes=0",
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".h264"])
def test_frames_nobody_asked_for_change_nothing(tmp_path, monkeypatch, suffix, params):
    options = {"preset": "medium", "qp": "25", "x264-params": params}
    path = write_video(tmp_path / f"a{suffix}", moving_texture(90), rate=30, options=options)
    for fps, start in ((4.0, 0), (7.3, 1), (30.0, 2)):
        expected = VideoInfo(96, 64, 3.0 - 0.2 * start)
        sampled = decode(path, fps=fps, expected=None if suffix == ".mp4" else expected).frames
        with monkeypatch.context() as patch:
            patch.setattr(video._Reader, "_packets", lambda reader: ((p, True) for p in reader.container.demux(0)))
            every = decode(path, fps=fps, expected=None if suffix == ".mp4" else expected).frames
        np.testing.assert_array_equal(sampled, every)


def test_frames_nobody_asked_for_are_not_decoded(tmp_path, monkeypatch):
    options = {"preset": "medium", "qp": "25", "x264-params": "bframes=3:b-adapt=0:b-pyramid=none"}
    path = write_video(tmp_path / "a.mp4", moving_texture(90), rate=30, options=options)
    decoded, read = [], video._Reader.frames

    def counting(reader):
        for item in read(reader):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video._Reader, "frames", counting)
    assert len(decode(path, fps=2.0).frames) == 6
    assert 23 <= len(decoded) <= 40, "three of four frames are predicted from and not predicted with"


@pytest.mark.parametrize("suffix", [".h264", ".mkv"])
def test_missing_duration(tmp_path, suffix):
    path = write_video(
        tmp_path / f"a{suffix}", grey_frames(50), rate=25, container={"live": "1"} if suffix == ".mkv" else {}
    )
    info = probe_video(path)
    assert info.duration == pytest.approx(2.0, abs=0.05)
    assert numbers(decode(path, fps=5.0).frames) == list(range(0, 50, 5))


def test_sound_longer_than_the_picture(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(20), sound_seconds=9.0)
    assert probe_video(path).duration == pytest.approx(2.0)
    assert numbers(decode(path, fps=5.0).frames) == list(range(0, 20, 2))


def test_sample_times():
    times, rate = sample_times(8.0000001, 4.0, 768)
    assert (len(times), times[-1], rate) == (32, 7.75, 4.0)
    assert len(sample_times(8.01, 4.0, 768)[0]) == 33
    assert len(sample_times(0.1, 4.0, 768)[0]) == 1


# ---- orientation


@pytest.mark.parametrize(("rotation", "hflip"), list(itertools.product((0, 90, 180, -90), (False, True))))
def test_orientation(tmp_path, rotation, hflip):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    frames = np.stack([stored] * 4)
    path = write_video(tmp_path / "a.mp4", frames, rotation=rotation, hflip=hflip)
    expected = np.rot90(stored, rotation // 90)
    expected = expected[:, ::-1] if hflip else expected
    decoded = decode(path)
    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[:2]
    np.testing.assert_allclose(decoded.frames[0].astype(int), expected.astype(int), atol=6)  # colour conversion


def test_rotation_comes_before_resizing(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(4, height=64, width=160), rotation=90)
    assert decode(path, max_pixels=28 * 28 * 6).frames.shape[1:3] == smart_resize(160, 64, 28, 3136, 28 * 28 * 6)


# ---- files that cannot be used


@pytest.mark.parametrize("share", [0.02, 0.2, 0.45, 0.7, 0.95])
@pytest.mark.parametrize("faststart", [False, True])
def test_truncated(tmp_path, share, faststart):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)
    whole = write_video(tmp_path / "a.mp4", noise, container={"movflags": "faststart"} if faststart else {})
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        decode(cut, fps=10.0)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_truncated_against_what_was_expected(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)
    data = write_video(tmp_path / f"a{suffix}", noise).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"cut.*expected 4\.00 s"):
        decode(cut, expected=VideoInfo(48, 32, 4.0))


def test_missing_empty_folder_and_text(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video, however long it may be" * 100)
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    for name, found in (
        ("missing.mp4", "no such file"),
        (".", "no such file"),
        ("empty.mp4", "0 bytes"),
        ("text.mp4", "Invalid data"),
        ("zeros.mp4", "Invalid data"),
    ):
        with pytest.raises(VideoError, match=f"{found}.*, expected") as caught:
            decode(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_sound_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16_000
        out.mux(sound.encode(silence))
        out.mux(sound.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        decode(tmp_path / "a.mp4")


def test_absurd_size(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(2))
    for read in (decode, probe_video):
        with pytest.raises(VideoError, match="48x32, expected 1 to 1000 pixels"):
            read(path, max_pixels_in=1000)


def test_absurd_aspect_ratio(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(2, height=2, width=512))
    with pytest.raises(VideoError, match="aspect ratio"):
        decode(path, max_pixels=12_544)


def test_time_limit(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(40))
    with pytest.raises(VideoError, match="longer than the limit of 1e-09 s"):
        decode(path, seconds_limit=1e-9, expected=VideoInfo(48, 32, 4.0))


@pytest.mark.parametrize(
    ("expected", "found"),
    [(VideoInfo(32, 48, 4.0), "48x32, expected 32x48"), (VideoInfo(48, 32, 9.0), "lasts 4.00 s, expected 9.00 s")],
)
def test_other_than_expected(tmp_path, expected, found):
    path = write_video(tmp_path / "a.mp4", grey_frames(40))
    with pytest.raises(VideoError, match=found):
        decode(path, expected=expected)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_raise_nothing_else(tmp_path, seed):
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    data = bytearray(write_video(tmp_path / "a.mp4", noise).read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(data), 40):
        data[place] = rng.integers(256)
    (tmp_path / "b.mp4").write_bytes(data)
    try:
        frames = decode(tmp_path / "b.mp4", max_pixels=12_544).frames
    except VideoError:
        return
    assert frames.ndim == 4


# ---- sizes and patches


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "tokens"),
    [
        (720, 1280, 50_176, (6, 10)),
        (1080, 1920, 50_176, (6, 10)),
        (480, 640, 50_176, (6, 9)),
        (512, 512, 50_176, (8, 8)),
        (128, 128, 12_544, (4, 4)),
        (56, 84, 12_544, (2, 3)),
        (20, 20, 12_544, (2, 2)),
        (100, 3000, 50_176, (1, 43)),
    ],
)
def test_smart_resize(height, width, max_pixels, tokens):
    assert smart_resize(height, width, 28, 3136, max_pixels) == (28 * tokens[0], 28 * tokens[1])


def test_smart_resize_refuses_a_ratio_above_200():
    assert smart_resize(10, 2000)
    with pytest.raises(ValueError, match="2001x10"):
        smart_resize(10, 2001)
    with pytest.raises(ValueError, match="5x0"):
        smart_resize(0, 5)


def test_frames_in_bounds_are_not_resized(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (56, 84, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", np.stack([picture] * 4))
    np.testing.assert_array_equal(decode(path, max_pixels=12_544).frames, decode(path, max_pixels=None).frames)


def test_resizing_is_pillows_bicubic(tmp_path):
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "a.mp4", rng.integers(0, 255, (4, 96, 128, 3), np.uint8))
    plain = decode(path).frames[0]
    expected = np.asarray(Image.fromarray(plain).resize((140, 84), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode(path, max_pixels=12_544).frames[0], expected)
    np.testing.assert_array_equal(resize_frame(plain, 84, 140), expected)


@pytest.mark.parametrize("rotation", [0, 90])
def test_resizing_in_one_step_is_bicubic_too(tmp_path, rotation):
    """Compared with float pixels resized; up to two levels apart, as the full-size RGB is itself rounded down."""
    frames = moving_texture(4, height=180, width=320)
    path = write_video(tmp_path / "a.mp4", frames, rotation=rotation)
    plain, small = decode(path).frames[0], decode(path, max_pixels=12_544, resize="swscale").frames[0]
    height, width = small.shape[:2]
    assert (height, width) == smart_resize(*plain.shape[:2], 28, max_pixels=12_544)
    channels = [Image.fromarray(plain[..., c].astype(np.float32)) for c in range(3)]
    exact = np.stack([np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in channels], -1)
    difference = small - exact
    assert np.abs(difference).mean() < 2
    assert np.abs(difference.mean()) < 1.5
    np.testing.assert_array_equal(decode(path, resize="swscale").frames[0], plain)


def brute_force_patches(frames, p, T, m):
    F, H, W, C = frames.shape
    out = []
    for t in range(0, F, T):
        row = []
        for group_y, group_x in itertools.product(range(0, H, p * m), range(0, W, p * m)):
            for y, x in itertools.product(range(group_y, group_y + p * m, p), range(group_x, group_x + p * m, p)):
                row.append(
                    [
                        frames[t + f, y + i, x + j, c]
                        for c in range(C)
                        for f in range(T)
                        for i in range(p)
                        for j in range(p)
                    ]
                )
        out.append(row)
    return np.array(out, np.uint8)


@pytest.mark.parametrize(("shape", "p", "T", "m"), [((4, 56, 84, 3), 14, 2, 2), ((6, 18, 12, 1), 2, 3, 3)])
def test_patches(shape, p, T, m):
    frames = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    patches = frames_to_patches(frames, patch_size=p, temporal_patch_size=T, merge_size=m)
    np.testing.assert_array_equal(patches, brute_force_patches(frames, p, T, m))
    F, H, W, C = shape
    whole = patches.reshape(F // T, H // p // m, W // p // m, m, m, C, T, p, p).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    np.testing.assert_array_equal(whole.reshape(shape), frames)


@pytest.mark.parametrize("shape", [(3, 28, 28, 3), (2, 30, 28, 3), (2, 28, 14, 3)])
def test_patches_refuse_what_does_not_divide(shape):
    with pytest.raises(ValueError, match="expected a multiple of 2 frames and sides that are multiples of 28"):
        frames_to_patches(np.zeros(shape, np.uint8))
