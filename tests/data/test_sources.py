import math
from dataclasses import replace

import pytest
from small_videos import grey_frames, record, write_records, write_tokenizer, write_video

from videonsa_jax.configs import tiny
from videonsa_jax.data.buckets import Bucket
from videonsa_jax.data.chat import load_chat
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.records import DataError, read_records
from videonsa_jax.data.sources import build_index, probe_videos, text_length
from videonsa_jax.data.video import VideoInfo

STATED = {"width": 128, "height": 128, "duration": 8.0, "fps": 10}
PLAIN = DataConfig(questions_per_context=2, max_pixels=12_544)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def no_probe(videos):
    raise AssertionError(f"probed {videos}")


def index_of(tmp_path, chat, records, config=PLAIN, **options):
    read, _ = read_records(write_records(tmp_path / "data.json", records))
    return build_index(read, chat, config, tiny(), **({"answered": True, "probe": no_probe} | options))


# ---- contexts


def test_questions_of_a_video_share_a_context(tmp_path, chat):
    videos = ["a.mp4", "b.mp4", "a.mp4", "a.mp4", "c.mp4"]
    index = index_of(tmp_path, chat, [record(v, f"What {k}?", **STATED) for k, v in enumerate(videos)])
    assert [context.records for context in index.contexts] == [(0, 2), (3,), (1,), (4,)]
    assert all(context.visual.grid == (16, 4, 4) for context in index.contexts)
    assert all(context.visual.seconds_per_grid == 0.5 for context in index.contexts)
    assert index.buckets == (Bucket(visual_tokens=256, frames=16, patches=64),)


def test_text_length_fits_the_longest_row(tmp_path, chat):
    records = [record("a.mp4", "What colour? " * k, **STATED) for k in (1, 5)]
    index = index_of(tmp_path, chat, records)
    longest = text_length(index.records[1], chat, answered=True)
    assert index.text_tokens == math.ceil(longest / 8) * 8
    assert text_length(index.records[1], chat, answered=False) < longest


def test_long_frames_are_sampled_uniformly(tmp_path, chat):
    index = index_of(tmp_path, chat, [record(**STATED | {"duration": 1000.0})], replace(PLAIN, max_frames=8))
    (context,) = index.contexts
    assert context.visual.grid[0] == 4
    assert context.visual.seconds_per_grid == 250.0


def test_too_long_ones_are_dropped_and_counted(tmp_path, chat, caplog):
    records = [record("a.mp4", **STATED), record("b.mp4", "one " * 200, **STATED)]
    records += [record("c.mp4", f"What {k}?", **STATED | {"duration": 60.0}) for k in range(3)]
    index = index_of(tmp_path, chat, records, replace(PLAIN, max_text_tokens=100, max_visual_tokens=300))
    assert [context.records for context in index.contexts] == [(0,)]
    assert index.dropped == {
        "more text tokens than max_text_tokens": 1,
        "more visual tokens than max_visual_tokens": 3,
    }
    assert "3 of 5 records are left out: more visual tokens than max_visual_tokens" in caplog.text


def test_given_buckets(tmp_path, chat):
    records = [record(f"{k}.mp4", **STATED | {"duration": seconds}) for k, seconds in enumerate((4.0, 8.0, 60.0))]
    index = index_of(tmp_path, chat, records, replace(PLAIN, buckets=(400, 130, 140)))
    assert index.buckets == (Bucket(130, 8, 64), Bucket(400, 16, 64))
    assert [context.bucket for context in index.contexts] == [0, 1]
    assert index.dropped == {"more visual tokens than the longest bucket": 1}


def test_nothing_left_stops(tmp_path, chat):
    with pytest.raises(DataError, match="none of 1 records can be used: more text tokens"):
        index_of(tmp_path, chat, [record(**STATED)], replace(PLAIN, max_text_tokens=3))
    with pytest.raises(DataError, match=r"none of 1 records can be used: .*no such file"):
        index_of(tmp_path, chat, [record()], probe=probe_videos)


def test_only_unstated_videos_are_probed(tmp_path, chat):
    write_video(tmp_path / "b.mp4", grey_frames(40, height=56, width=84))
    (tmp_path / "c.mp4").write_text("broken")
    probed = []

    def probe(videos):
        probed.extend(videos)
        return probe_videos(videos)

    records = [record("c.mp4"), record("a.mp4", **STATED), record("b.mp4"), record("b.mp4", "Why?")]
    index = index_of(tmp_path, chat, records, probe=probe)
    assert probed == [str(tmp_path / "c.mp4"), str(tmp_path / "b.mp4")]
    broken, stated, found = index.contexts
    assert (stated.visual.grid, found.visual.grid) == ((16, 4, 4), (8, 2, 3))
    assert broken.bucket == 0
    assert "c.mp4" in broken.problem
    assert broken.info is None
    assert found.info == VideoInfo(84, 56, 4.0, 10.0)


def test_an_absurd_stated_size_costs_its_contexts(tmp_path, chat):
    index = index_of(tmp_path, chat, [record(**STATED), record("b.mp4", **STATED | {"width": 100_000})])
    assert "b.mp4: frame size 100000x128" in index.contexts[1].problem


def test_bucket_lengths_are_whole_blocks(tmp_path, chat):
    model = tiny()
    model = replace(model, nsa=replace(model.nsa, block_size=24))
    read, _ = read_records(write_records(tmp_path / "data.json", [record(**STATED)]))
    index = build_index(read, chat, PLAIN, model, answered=True, probe=no_probe)
    assert index.buckets[0].visual_tokens == 288
