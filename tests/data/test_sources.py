import itertools
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_videos import grey_frames, record, write_records, write_tokenizer, write_video

from videonsa_jax.configs import tiny
from videonsa_jax.data.chat import load_chat
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.sources import (
    Bucket,
    DataError,
    build_index,
    choose_buckets,
    join_turns,
    probe_videos,
    read_records,
    text_length,
    too_many,
)
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


# ---- records


def test_a_record_is_read(tmp_path):
    path = write_records(
        tmp_path / "data.json",
        [record("v/a.mp4", family="colour", options=["red", "blue"], answer="blue", **STATED)],
    )
    (read,), malformed = read_records(path, video_root="/videos")
    assert malformed == 0
    assert read.video == "/videos/v/a.mp4"
    assert read.turns == (("What colour?", "red"),)
    assert (read.family, read.options, read.answer) == ("colour", ("red", "blue"), "blue")
    assert read.info == VideoInfo(128, 128, 8.0, 10.0)


def test_messages_of_several_turns(tmp_path):
    entry = record("a.mp4", "one?", "two")
    entry["conversations"] += [{"from": "human", "value": "three?"}, {"from": "gpt", "value": "four"}]
    (read,), _ = read_records(write_records(tmp_path / "data.json", [entry]))
    first = [{"type": "video"}, {"type": "text", "text": "one?"}]
    assert read.messages(answered=True) == [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "four"},
    ]
    assert read.messages(answered=False) == [{"role": "user", "content": first}]


def test_questions_of_one_video_are_joined_into_turns(tmp_path):
    entries = [record(f"{name}.mp4", f"{name} {n}?", f"{name} {n}", **STATED) for n in range(5) for name in "abcdefgh"]
    read, _ = read_records(write_records(tmp_path / "data.json", entries))
    joined = join_turns(read, 3)
    assert [r.index for r in joined] == list(range(16))
    assert [(Path(r.video).stem, len(r.turns)) for r in joined] == [(name, n) for name in "abcdefgh" for n in (3, 2)]
    for name in "abcdefgh":
        turns = [turn for r in joined for turn in r.turns if Path(r.video).stem == name]
        assert sorted(turns) == [(f"{name} {n}?", f"{name} {n}") for n in range(5)]
    assert len({r.turns[0][0][-2] for r in joined[::2]}) > 2, "any of a video's questions opens its conversation"
    assert all(r.info == VideoInfo(128, 128, 8.0, 10.0) and r.options == () for r in joined)
    assert join_turns(read, 3) == joined


@pytest.mark.parametrize("value", ["What?\n<image>", "<video>\nWhat?\n", "What?<image>\n", "<image>\nWhat?"])
def test_the_video_comes_first_wherever_the_placeholder_stands(tmp_path, value):
    entry = record()
    entry["conversations"][0]["value"] = value
    (read,), _ = read_records(write_records(tmp_path / "data.json", [entry]))
    assert read.turns[0][0].strip() == "What?"


def test_json_lines(tmp_path, caplog):
    lines = [json.dumps(record(question=f"line\u2028{k}?")) for k in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "", "{broken"]) + "\n")
    records, malformed = read_records(tmp_path / "data.jsonl")
    assert ([r.index for r in records], malformed) == ([0, 1, 2], 1)
    assert "record 3 is left out: it is '{broken', expected an object" in caplog.text


def conversation(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "it is 'None', expected an object"),
        ({"video": None}, "video is 'None', expected a text"),
        ({"video": ""}, "video is ''"),
        ({"video": 7}, "video is '7'"),
        ({"conversations": "hi"}, "conversations is 'hi'"),
        ({"conversations": []}, "conversations is 0 entries"),
        ({"conversations": conversation("<image>a")}, "conversations is 1 entries"),
        (
            {"conversations": conversation("<image>a", "b")[::-1]},
            r"conversations\[0\] is .*expected an entry from human",
        ),
        ({"conversations": ["<image>a", "b"]}, r"conversations\[0\] is '<image>a'"),
        ({"conversations": conversation("<image>a", 5)}, r"conversations\[1\].value is '5', expected a text"),
        ({"conversations": conversation("<image>a", "  ")}, r"conversations\[1\].value is '  '"),
        ({"conversations": conversation("a", "b")}, "hold 0 times <image> or <video>"),
        ({"conversations": conversation("<image>a<video>", "b")}, "hold 2 times"),
        ({"conversations": conversation("a", "b <image>")}, "expected once in the first entry"),
        ({"width": "128"}, "width is '128', expected a positive integer"),
        ({"width": 12.5}, "width is '12.5'"),
        ({"height": 0}, "height is '0'"),
        ({"height": True}, "height is 'True'"),
        ({"duration": -1}, "duration is '-1', expected a positive number"),
        ({"duration": math.nan}, "duration is 'nan'"),
        ({"fps": math.inf}, "fps is 'inf'"),
        ({"options": "red"}, "options is 'red', expected a list of texts"),
        ({"options": ["red", 3]}, "options is .*expected a list of texts"),
        ({"options": ["red", ""]}, "options is"),
        ({"options": ["red", "blue"], "answer": "pink"}, "answer is 'pink', expected one of the options"),
        ({"answer": 3}, "answer is '3'"),
        ({"family": 3}, "family is '3', expected a text"),
    ],
)
def test_a_malformed_record_costs_itself(tmp_path, caplog, change, reason):
    bad = None if change is None else record(**STATED) | change
    path = write_records(tmp_path / "data.json", [record(), bad, record()])
    records, malformed = read_records(path)
    assert (len(records), malformed) == (2, 1)
    assert [r.index for r in records] == [0, 1]
    with caplog.at_level(logging.WARNING):
        assert f"{path}: record 1 is left out: " in caplog.text
    assert re.search(reason, caplog.text)


def test_heldout_records_need_options(tmp_path, caplog):
    path = write_records(tmp_path / "data.json", [record(), record(options=["red", "blue"])])
    assert len(read_records(path, needs_options=True)[0]) == 1
    assert "options holds 0 texts, expected at least 2" in caplog.text


def test_too_many_malformed_records_stop(tmp_path):
    good, bad = [record()] * 95, [record(video="")] * 6
    with pytest.raises(DataError, match=r"6 of 101 records are malformed.*0\.05.*the last: .*record 100.*video is ''"):
        read_records(write_records(tmp_path / "data.json", good + bad))
    assert len(read_records(write_records(tmp_path / "data.json", good + bad), max_failure_share=0.1)[0]) == 95


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1, 2", "expected a JSON list of records"),
        (b"7", "holds a int, expected a list of records"),
        (b"[]", "holds no usable record"),
        (b"[5]", "holds no usable record, expected some; .*record 0 is left out"),
        (b"\xff\xfe\x00", "not UTF-8 at byte 0"),
    ],
)
def test_a_bad_file_stops(tmp_path, content, sentence):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.json: .*{sentence}"):
        read_records(tmp_path / "data.json")


def test_a_missing_file_stops(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read_records(tmp_path / "none.json")


def test_too_many():
    assert too_many(1, 1, 0.0)
    assert not too_many(0, 1, 0.0)
    assert too_many(6, 6, 0.05)
    assert not too_many(5, 6, 0.05)
    assert too_many(11, 200, 0.05)
    assert not too_many(10, 200, 0.05)
    assert not too_many(10, 10, 1.0)


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


# ---- buckets


def padding(grids, buckets, places):
    return sum(buckets[place].visual_tokens + buckets[place].frames * buckets[place].patches // 4 for place in places)


def test_chosen_buckets_pad_least():
    grids = [(2, 2, 2), (2, 2, 3), (4, 4, 4), (4, 4, 5), (8, 4, 4), (16, 4, 4), (1, 6, 8), (3, 5, 5)] * 2 + [(2, 2, 2)]
    buckets, places = choose_buckets(grids, (), multiple=16, merged_patches=4)
    assert len(buckets) <= 4
    candidates = sorted({math.ceil(math.prod(grid) / 16) * 16 for grid in grids})
    best = min(
        padding(grids, *choose_buckets(grids, (*lengths, candidates[-1]), multiple=16, merged_patches=4))
        for count in range(4)
        for lengths in itertools.combinations(candidates[:-1], count)
    )
    assert padding(grids, buckets, places) == best


def test_every_grid_fits_its_bucket():
    grids = [(time, height, 3) for time in range(1, 40) for height in range(1, 7)]
    buckets, places = choose_buckets(grids, (), multiple=16, merged_patches=4)
    assert len(buckets) == 4
    for grid, place in zip(grids, places, strict=True):
        bucket = buckets[place]
        assert math.prod(grid) <= bucket.visual_tokens
        assert bucket.visual_tokens % 16 == 0
        assert grid[0] <= bucket.frames
        assert 4 * grid[1] * grid[2] <= bucket.patches


def test_bucket_lengths_are_whole_blocks(tmp_path, chat):
    model = tiny()
    model = replace(model, nsa=replace(model.nsa, block_size=24))
    read, _ = read_records(write_records(tmp_path / "data.json", [record(**STATED)]))
    index = build_index(read, chat, PLAIN, model, answered=True, probe=no_probe)
    assert index.buckets[0].visual_tokens == 288
