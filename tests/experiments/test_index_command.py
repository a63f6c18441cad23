"""From the files of LLaVA-Video-178K, small and with everything that is wrong with such files, to batches."""

import dataclasses
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_videos import conversation, grey_frames, record, write_records, write_tokenizer, write_video

from experiments import configs, index
from experiments.overrides import apply_overrides
from videonsa_jax.data import video_index
from videonsa_jax.data.pipeline import build_pipeline
from videonsa_jax.data.records import DataError
from videonsa_jax.data.sources import Padding
from videonsa_jax.data.video_index import read_video_index

ACADEMIC, YOUTUBE = "1_2_m_academic_v0_1", "2_3_m_youtube_v0_1"
SECONDS = {"c0": 2, "c1": 2.5, "c2": 3, "short": 1, "long": 5, "later": 3}  # 4 frames a second, 8 to 12 are kept


def pairs(video, *questions, **fields):
    values = [text for question in questions for text in (question, f"answer to {question}")]
    values[0] = f"<image>\n{values[0]}"
    return record(video, **fields) | {"id": Path(video).stem, "conversations": conversation(*values)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two folders as published: 6 sound videos (of which 4 fit), one cut short, one empty, one missing."""
    root = tmp_path_factory.mktemp("data") / "LLaVA-Video-178K"
    charades, youtube = "academic_source/Charades", "liwei_youtube_videos/videos/youtube_video_2024"
    for folder in (root / ACADEMIC / charades, root / YOUTUBE / youtube):
        folder.mkdir(parents=True)
    for number, (name, seconds) in enumerate(SECONDS.items()):
        frames = grey_frames(int(10 * seconds), height=60 + 30 * (number % 2), width=100)
        write_video(root / ACADEMIC / charades / f"{name}.mp4", frames)
    whole = (root / ACADEMIC / charades / "c0.mp4").read_bytes()
    (root / ACADEMIC / charades / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / YOUTUBE / youtube / "ytb_empty.mp4").write_bytes(b"")
    write_video(root / YOUTUBE / youtube / "ytb_0.mp4", grey_frames(24))

    write_records(
        root / ACADEMIC / "1_2_m_academic_oe_v0_1_qa_processed.json",
        [
            *(pairs(f"{charades}/{name}.mp4", f"What {name}?", f"Why {name}?", f"When {name}?") for name in SECONDS),
            pairs(f"{charades}/cut.mp4", "What?", "Why?"),
            pairs(f"{charades}/missing.mp4", "What?", "Why?", "When?"),
            pairs(f"{charades}/c0.mp4", "word " * 600),
            {"id": "text", "conversations": conversation("What is two and two?", "Four.")},
            {"id": "broken", "video": f"{charades}/c0.mp4", "conversations": []},
        ],
    )
    write_records(
        root / ACADEMIC / "1_2_m_academic_mc_v0_1_qa_processed.json", [pairs(f"{charades}/c0.mp4", "A or B?")]
    )
    write_records(
        root / ACADEMIC / "1_2_m_academic_v0_1_cap_processed.json", [pairs(f"{charades}/c0.mp4", "Tell.")] * 4
    )
    write_records(
        root / YOUTUBE / "2_3_m_youtube_oe_v0_1_qa_processed.json",
        [pairs(f"{youtube}/ytb_0.mp4", "Who?"), pairs(f"{youtube}/ytb_empty.mp4", "Who?")],
    )
    write_tokenizer(root.parent / "tokenizer.json")
    return root


def overrides(root, index_file):
    return [
        f"data.source={root}/*_v0_1",
        f"data.tokenizer={root.parent / 'tokenizer.json'}",
        f"data.video_index={index_file}",
        "data.fewest_frames=8",
        "data.most_frames=12",
        "data.max_pixels=6272",
        "data.contexts_per_batch=2",
        "data.questions_per_context=2",
        "data.max_failure_share=0.5",
        "data.max_buckets=1",
        "data.workers=0",
    ]


def run(root, index_file, *more):
    sets = [f"--set={override}" for override in (*overrides(root, index_file), *more)]
    return index.main(["--config=nsa_video_7b", "--workers=2", *sets])


def data_of(root, index_file):
    experiment = apply_overrides(configs.get("nsa_video_7b"), overrides(root, index_file))
    return experiment.data, experiment.model


def padding_of(batches):
    """The shares of padding, counted in batches of which every file could be read."""
    held, sizes = np.zeros(4), np.zeros(4)
    for batch in batches:
        used, asked = batch.inputs.visual_lengths > 0, batch.sample_ids >= 0
        patches = batch.inputs.frame_grids.prod(-1).sum(-1)
        held += [batch.inputs.visual_lengths.sum(), patches.sum(), batch.inputs.text_lengths[asked].sum(), used.sum()]
        bucket = batch.inputs.patches[0].shape
        sizes += [
            used.sum() * batch.inputs.visual_source.shape[1],
            used.sum() * bucket[0] * bucket[1],
            used.sum() * asked.shape[1] * batch.inputs.text_tokens.shape[-1],
            len(used),
        ]
    return Padding(*(1 - held / sizes).tolist())


def test_from_the_published_files_to_batches(root, tmp_path, capsys, caplog):
    assert run(root, tmp_path / "index.jsonl") == 0
    printed = capsys.readouterr().out
    assert "10 of 10 videos (100.0 %)" in printed
    assert "1 video empty, 1 video missing, 1 video unreadable" in printed

    summary = json.loads((tmp_path / "index.jsonl.summary.json").read_text())
    assert summary["left_out_of_files"] == {
        "of kind multi_choice": 1,
        "of kind caption": 4,
        "no video, text only": 1,
        "malformed": 1,
    }
    assert summary["left_out"] == {
        "fewer than 8 frames at 4 a second": {"records": 3, "videos": 1},
        "more than 12 frames at 4 a second": {"records": 3, "videos": 1},
        "video unreadable": {"records": 2, "videos": 1},
        "video missing": {"records": 3, "videos": 1},
        "video empty": {"records": 1, "videos": 1},
        "more text tokens than max_text_tokens": {"records": 1, "videos": None},
    }
    assert summary["kept"] == {"records": 13, "videos": 5, "records_per_video": 2.6}
    assert summary["read"] == {"records": 13 + 13 + 7}
    assert sum(bucket["contexts"] for bucket in summary["buckets"]) == 9

    data, model = data_of(root, tmp_path / "index.jsonl")
    pipeline = build_pipeline(data, model, split="train", seed=0)
    assert pipeline.steps_per_epoch == summary["batches_per_epoch"]
    iterator = pipeline.iterator()
    batches = [next(iterator) for _ in range(pipeline.steps_per_epoch)]
    iterator.close()
    assert summary["padding"] == pytest.approx(dataclasses.asdict(padding_of(batches)))
    assert min(summary["padding"].values()) > 0
    (root / ACADEMIC / "academic_source/Charades/later.mp4").rename(tmp_path / "later.mp4")
    try:
        with caplog.at_level(logging.WARNING):
            iterator = pipeline.iterator()
            batches = [next(iterator) for _ in range(pipeline.steps_per_epoch)]
            iterator.close()
    finally:
        (tmp_path / "later.mp4").rename(root / ACADEMIC / "academic_source/Charades/later.mp4")
    assert iterator.failures.counts == {"video": 2}, "a video gone after the index was built costs its two contexts"
    assert "later.mp4: no such file" in caplog.text
    seen = sorted(number for batch in batches for number in batch.sample_ids.ravel().tolist() if number >= 0)
    assert [pipeline.records[number].id for number in seen] == [
        *(f"{name}#{turn}" for name in ("c0", "c1", "c2") for turn in range(3)),
        "ytb_0",
    ]
    for batch in batches:
        for ids, tokens, weights, length in zip(
            batch.sample_ids, batch.inputs.text_tokens, batch.loss_weights, batch.inputs.visual_lengths, strict=True
        ):
            for row in np.flatnonzero(ids >= 0):
                answer = pipeline.chat.decode(tokens[row][1:][weights[row][:-1] > 0]).strip()
                assert answer == pipeline.records[ids[row]].answer
                assert length > 0


def test_the_index_is_built_once_and_missing_videos_stop(root, tmp_path, capsys):
    assert run(root, tmp_path / "index.jsonl") == 0
    first = (tmp_path / "index.jsonl").read_bytes()
    assert run(root, tmp_path / "index.jsonl") == 0
    assert (tmp_path / "index.jsonl").read_bytes() == first
    lines = first.splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:4]))
    data, model = data_of(root, tmp_path / "part.jsonl")
    with pytest.raises(DataError, match=r"the video index lacks 6 of 10 videos, such as .*experiments\.index"):
        build_pipeline(data, model, split="train", seed=0)
    capsys.readouterr()
    assert run(root, "") == 2
    assert "data.video_index is empty" in capsys.readouterr().err
    assert index.main(["--config=nsa_video_7b"]) == 2
    assert "config nsa_video_7b needs data.source, data.tokenizer: add --set" in capsys.readouterr().err


def test_a_stopped_command_goes_on(root, tmp_path, capsys, monkeypatch):
    """SIGTERM saves what was read; 600 files leave the time to send it."""
    monkeypatch.setattr(video_index, "_SAVE_SECONDS", 0.01)
    folder = root.parent / "many"
    folder.mkdir()
    video = next((root / ACADEMIC).rglob("c0.mp4"))
    for number in range(600):
        os.link(video, folder / f"{number}.mp4")
    write_records(folder / "all.json", [pairs(f"{number}.mp4", "What?") for number in range(600)])
    index_file, source = tmp_path / "index.jsonl", f"data.source={folder / 'all.json'}"

    def stop_once_begun():
        while not (index_file.exists() and index_file.stat().st_size):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_begun, daemon=True).start()
    handler = signal.getsignal(signal.SIGTERM)
    assert run(root, index_file, source) == 130
    assert signal.getsignal(signal.SIGTERM) == handler
    assert f"stopped; {index_file} holds what was read" in capsys.readouterr().err
    saved = read_video_index(index_file)
    assert 0 < len(saved) < 600
    assert run(root, index_file, source) == 0
    assert "600 of 600 videos (100.0 %)" in capsys.readouterr().out
    assert saved.items() <= read_video_index(index_file).items()
