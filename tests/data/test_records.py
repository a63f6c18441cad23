import json
import logging
import math
import re
from pathlib import Path

import pytest
from small_videos import conversation, record, write_records

from videonsa_jax.data.frames import VideoInfo
from videonsa_jax.data.records import DataError, join_turns, read_records, split_turns, too_many

STATED = {"width": 128, "height": 128, "duration": 8.0, "fps": 10}


def test_a_record_is_read(tmp_path):
    path = write_records(
        tmp_path / "data.json",
        [record("v/a.mp4", family="colour", options=["red", "blue"], answer="blue", **STATED)],
    )
    (read,), dropped = read_records(path, video_root="/videos")
    assert dropped == {}
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
    records, dropped = read_records(tmp_path / "data.jsonl")
    assert ([r.index for r in records], dropped) == ([0, 1, 2], {"malformed": 1})
    assert "record 3 is left out: it is '{broken', expected an object" in caplog.text


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
    records, dropped = read_records(path)
    assert (len(records), dropped) == (2, {"malformed": 1})
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


def test_records_about_no_video_are_counted(tmp_path, caplog):
    text = {"id": "t", "conversations": conversation("What is two and two?", "Four.")}
    image = {"id": "i", "image": "a.jpg", "conversations": conversation("<image>\nWhat?", "This.")}
    records, dropped = read_records(write_records(tmp_path / "data.json", [record(), text, image, text, image, image]))
    assert len(records) == 1
    assert dropped == {"no video, text only": 2, "no video, but an image": 3}
    assert caplog.text == ""
    with pytest.raises(DataError, match="no usable record, expected some; 2 times no video, text only"):
        read_records(write_records(tmp_path / "data.json", [text, text]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("first:2", [0, 1]),
        ("end:2", [5, 6]),
        ("first:20%", [0, 1]),  # 1.4, rounded up as LLaVA does
        ("end:100%", [0, 1, 2, 3, 4, 5, 6]),
        ("first:100", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_sampling_strategies(tmp_path, sampling, kept):
    path = write_records(tmp_path / "data.json", [record(question=f"{k}?") for k in range(7)])
    records, dropped = read_records(path, sampling=sampling)
    assert [int(r.turns[0][0][0]) for r in records] == kept
    assert sum(dropped.values()) == 7 - len(kept)


def test_random_sampling_is_the_same_everywhere(tmp_path):
    path = write_records(tmp_path / "data.json", [record(question=f"{k}?") for k in range(50)])
    drawn = [r.id for r in read_records(path, sampling="random:20%")[0]]
    assert len(set(drawn)) == 10
    assert drawn == [r.id for r in read_records(path, sampling="random:20%")[0]]
    assert drawn != [r.id for r in read_records(path, sampling="first:20%")[0]]


@pytest.mark.parametrize("sampling", ["some", "first", "first:", "last:3", "first:-1", "first:1.5%", "end:101%"])
def test_a_sampling_strategy_that_is_none_stops(tmp_path, sampling):
    path = write_records(tmp_path / "data.json", [record()])
    with pytest.raises(DataError, match=rf"data\.json: sampling_strategy is '{sampling}', expected all, or first"):
        read_records(path, sampling=sampling)


def test_turns_become_pairs(tmp_path):
    several = record("a.mp4") | {"conversations": conversation("<image>\none?", "1", "two?", "2", "three?", "3")}
    (first, second), _ = read_records(write_records(tmp_path / "data.json", [several | {"id": "x"}, record("b.mp4")]))
    pairs = split_turns([first, second])
    assert [(r.index, r.id, r.video[-5:], r.turns, r.answer) for r in pairs] == [
        (0, "x#0", "a.mp4", (("one?", "1"),), "1"),
        (1, "x#1", "a.mp4", (("two?", "2"),), "2"),
        (2, "x#2", "a.mp4", (("three?", "3"),), "3"),
        (3, second.id, "b.mp4", second.turns, "red"),
    ]
