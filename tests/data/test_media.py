"""Planned media: what headers say before pixels are read, and bad files in one sentence each."""

import numpy as np
import pytest
from PIL import Image
from small_videos import grey_frames, numbers, write_video

from videonsa_jax.configs import VisionConfig
from videonsa_jax.data import media
from videonsa_jax.data.frames import VideoError
from videonsa_jax.data.media import MediaError, make_limits, plan_media

VISION = VisionConfig()
LIMITS = make_limits(min_pixels=3136, max_pixels=50_176)


def plan(content, kind="video", limits=LIMITS, **fields):
    return plan_media({"type": kind, kind: content, **fields}, limits, VISION)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """3.3 s at 10 frames a second, 112 x 168."""
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", grey_frames(33, 112, 168))


def test_a_video_is_sampled_by_its_rate(video):
    planned = plan(str(video))
    assert planned.visual.grid == (7, 4, 6)  # 14 frames at 4 a second
    assert planned.visual.seconds_per_grid == 0.5
    assert planned.source == str(video)
    frames = planned.frames()
    assert frames.shape == (14, 112, 168, 3)
    assert numbers(frames) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32]


def test_limits_beside_an_item_win(video):
    planned = plan(video, fps=2, max_frames=3, max_pixels=56 * 84)
    assert planned.visual.grid == (2, 2, 3)
    assert planned.visual.seconds_per_grid == pytest.approx(2 * 3.3 / 3)
    assert numbers(planned.frames()) == [0, 11, 22, 22]  # an odd count repeats the last


def test_a_total_of_pixels_shrinks_the_frames(video):
    # 7 temporal positions of at most 50 x 784 / 7 pixels: 7 tokens each.
    planned = plan(video, total_pixels=50 * 784)
    assert planned.visual.grid == (7, 2, 3)
    with pytest.raises(MediaError, match="leaves 2240 pixels to each of 14 frames, expected at least min_pixels 3136"):
        plan(video, total_pixels=20 * 784)


def test_frames_are_taken_as_sampled():
    frames = np.ascontiguousarray(grey_frames(5, 56, 84))
    planned = plan(frames, fps=1.0)
    assert planned.visual.grid == (3, 2, 3)
    assert planned.visual.seconds_per_grid == 2.0
    np.testing.assert_array_equal(planned.frames(), frames[[0, 1, 2, 3, 4, 4]])  # not resized
    fewer = plan(frames, fps=1.0, max_frames=2)
    assert fewer.visual.seconds_per_grid == 5.0
    np.testing.assert_array_equal(fewer.frames(), frames[[0, 2]])
    resized = plan(np.ascontiguousarray(grey_frames(2, 60, 90)))
    assert resized.frames().shape == (2, 56, 84, 3)


def picture(height=70, width=90):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_images_of_all_kinds_are_the_same(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    contents = (array, Image.fromarray(array), tmp_path / "a.png", f"file://{tmp_path}/a.png")
    planned = [plan(content, "image") for content in contents]
    for one in planned:
        assert one.visual.grid == (1, 2, 3)
        assert one.visual.seconds_per_grid == 0
        np.testing.assert_array_equal(one.frames(), planned[0].frames())
    first, second = planned[0].frames()
    np.testing.assert_array_equal(first, second)


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(picture(56, 84)).save(tmp_path / "a.png", exif=exif)
    planned = plan(tmp_path / "a.png", "image")
    assert planned.visual.grid == (1, 3, 2)
    np.testing.assert_array_equal(planned.frames()[0], np.rot90(picture(56, 84), -1))


def test_sources_tell_arrays_apart():
    one, other = (plan(np.full((2, 56, 56, 3), value, np.uint8)).source for value in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    ("kind", "content", "fields", "sentence"),
    [
        ("video", "none.mp4", {}, r"none\.mp4: no such file, expected a video"),
        ("video", "https://example.com/a.mp4", {}, "a https address, expected a local path"),
        ("video", None, {}, "a video has no 'video' beside its type"),
        ("video", 5, {}, r"got int of shape \(\).*expected a path or uint8 \[F, H, W, 3\]"),
        ("video", ["a.png", "b.png"], {}, "got list of shape"),
        ("video", np.zeros((0, 56, 56, 3), np.uint8), {}, "holds no pixels"),
        ("video", np.zeros((2, 56, 56, 3)), {}, "dtype float64"),
        ("video", np.zeros((2, 10, 2100, 3), np.uint8), {}, "aspect ratio of at most 200"),
        ("video", picture(), {}, r"shape \(70, 90, 3\).*expected a path or uint8 \[F, H, W, 3\]"),
        ("video", picture()[None], {"nframes": 8}, "the field 'nframes', expected type, video, fps"),
        ("video", picture()[None], {"fps": 0}, "fps is 0, expected"),
        ("video", picture()[None], {"fps": "fast"}, "fps is 'fast', expected"),
        ("video", picture()[None], {"fps": float("inf")}, "fps is inf, expected"),
        ("video", picture()[None], {"max_frames": 0}, "max_frames is 0, expected a whole number"),
        ("video", picture()[None], {"max_pixels": 1.5}, "max_pixels is 1.5, expected a whole number"),
        ("video", picture()[None], {"min_pixels": 10**6}, "min_pixels 1000000 exceeds max_pixels 50176"),
        ("image", picture(), {"fps": 2}, "an? image has the field 'fps', expected type, image"),
        ("image", "none.png", {}, r"none\.png: no such file, expected an image"),
        ("image", picture()[..., 0], {}, "expected a path or uint8"),
        ("image", Image.new("RGB", (1, 300)), {}, "aspect ratio of at most 200"),
        ("image", np.broadcast_to(np.uint8(0), (9000, 9000, 3)), {}, "frames of 9000x9000, expected at most 67108864"),
    ],
)
def test_bad_items(kind, content, fields, sentence):
    with pytest.raises(MediaError, match=sentence):
        plan(content, kind, **fields)


def test_bad_image_files(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(MediaError, match=r"a\.png: not an image, expected one of BMP"):
        plan(tmp_path / "a.png", "image")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(MediaError, match=r"a\.eps: not an image"):
        plan(tmp_path / "a.eps", "image")
    Image.fromarray(picture(300, 300)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"cut\.png: .*expected a readable image"):
        plan(tmp_path / "cut.png", "image").frames()


def test_images_of_absurd_size_are_not_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    with pytest.raises(MediaError, match="an image of 9000x9000, expected 1 to 67108864 pixels"):
        plan(tmp_path / "large.png", "image")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match=r"bomb\.png: .*expected at most 67108864 pixels"):
        plan(tmp_path / "bomb.png", "image")


def test_bad_video_files(tmp_path, video):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(MediaError, match=r"text\.mp4: .*expected a readable video"):
        plan(tmp_path / "text.mp4")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-2000])
    with pytest.raises((MediaError, VideoError), match=r"cut\.mp4: "):
        plan(tmp_path / "cut.mp4").frames()


def test_memory_of_decoded_frames_is_bounded(video, monkeypatch):
    monkeypatch.setattr(media, "MAX_DECODED_BYTES", 2**19)
    with pytest.raises(MediaError, match=r"a\.mp4: 14 frames of 168x112 take 0.0 GiB, expected at most"):
        plan(video)
