"""Decoded frames kept on disk."""

import os
import pickle

import numpy as np
import pytest

from videonsa_jax.data.frame_cache import FrameCache

SAMPLING = (("fps", 4.0),)


class Decoder:
    def __init__(self, value: int = 7, frames: int = 2):
        self.calls, self.value, self.frames = 0, value, frames

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return np.full((self.frames, 4, 6, 3), self.value, np.uint8)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"first")
    return path


def cache_of(tmp_path, limit: int = 10**6) -> FrameCache:
    return FrameCache(tmp_path / "frames", limit)


def test_a_video_is_decoded_once(tmp_path, video):
    decoder = Decoder()
    first = cache_of(tmp_path).frames(video, SAMPLING, decoder)
    again = pickle.loads(pickle.dumps(cache_of(tmp_path))).frames(video, SAMPLING, decoder)
    np.testing.assert_array_equal(first, again)
    assert (again.dtype, decoder.calls) == (np.uint8, 1)


def test_other_sampling_or_another_file_is_decoded_anew(tmp_path, video):
    cache, decoder = cache_of(tmp_path), Decoder()
    cache.frames(video, SAMPLING, decoder)
    cache.frames(video, (("fps", 2.0),), decoder)
    assert decoder.calls == 2
    video.write_bytes(b"second, longer")
    changed = Decoder(value=9)
    assert cache.frames(video, SAMPLING, changed).max() == 9
    os.utime(video, ns=(1, 1))
    cache.frames(video, SAMPLING, changed)
    assert changed.calls == 2


def test_the_folder_keeps_its_limit(tmp_path):
    decoder = Decoder()
    size = decoder().nbytes
    cache = cache_of(tmp_path, limit=5 * size)
    for index in range(8):
        (tmp_path / f"{index}.mp4").write_bytes(bytes([index]))
        cache.frames(tmp_path / f"{index}.mp4", SAMPLING, decoder)
    kept = list((tmp_path / "frames").iterdir())
    assert len(kept) == 5
    another = FrameCache(tmp_path / "frames", limit=5 * size)
    (tmp_path / "new.mp4").write_bytes(b"new")
    another.frames(tmp_path / "new.mp4", SAMPLING, decoder)
    assert sorted((tmp_path / "frames").iterdir()) == sorted(kept), "what other processes wrote counts"


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"nothing like an array", None])
def test_a_damaged_entry_is_decoded_and_written_anew(tmp_path, video, content):
    cache, decoder = cache_of(tmp_path), Decoder()
    cache.frames(video, SAMPLING, decoder)
    (entry,) = (tmp_path / "frames").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-5] if content is None else content)
    assert cache.frames(video, SAMPLING, decoder).shape == (2, 4, 6, 3)
    assert decoder.calls == 2
    assert entry.read_bytes() == whole


def test_pickled_objects_are_never_loaded(tmp_path, video):
    cache, decoder = cache_of(tmp_path), Decoder()
    cache.frames(video, SAMPLING, decoder)
    (entry,) = (tmp_path / "frames").iterdir()
    with entry.open("wb") as file:
        np.save(file, np.asarray([{"a": 1}], object), allow_pickle=True)
    assert cache.frames(video, SAMPLING, decoder).dtype == np.uint8


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, video):
    (tmp_path / "frames").write_text("a file, not a folder")
    decoder = Decoder()
    for _ in range(2):
        assert cache_of(tmp_path).frames(video, SAMPLING, decoder).shape == (2, 4, 6, 3)
    assert decoder.calls == 2


def test_a_missing_video_is_the_decoders_business(tmp_path):
    def decode():
        raise FileNotFoundError("no such video")

    with pytest.raises(FileNotFoundError, match="no such video"):
        cache_of(tmp_path).frames(tmp_path / "none.mp4", SAMPLING, decode)
