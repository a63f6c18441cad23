import itertools
import json
import logging
import math
import multiprocessing
import shutil
import time

import jax
import numpy as np
import pytest
from loader_spy import Spy
from small_videos import grey_frames, record, write_records, write_tokenizer, write_video

from videonsa_jax.configs import tiny
from videonsa_jax.data import pipeline as pipeline_module
from videonsa_jax.data.config import ClipsConfig, DataConfig
from videonsa_jax.data.examples import EvalBatch
from videonsa_jax.data.pipeline import build_pipeline
from videonsa_jax.data.sources import DataError
from videonsa_jax.data.video import probe_video
from videonsa_jax.streams import TrainBatch

OPTIONS = ["red", "blue", "green"]
VIDEOS = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 videos of three sizes with 1 to 4 questions each, read as JSON that states what they hold."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(VIDEOS):
        name, frames = f"{number}.mp4", (4, 8, 12)[number % 3]
        write_video(folder / name, grey_frames(frames, height=56, width=28 * (2 + number % 2)), rate=4)
        stated = {"width": 28 * (2 + number % 2), "height": 56, "duration": frames / 4, "fps": 4}
        for question in range(1 + number % 4):
            records.append(record(name, f"What {number} {question}?", OPTIONS[question % 3], options=OPTIONS, **stated))
    write_records(folder / "data.json", records)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def config_of(folder, **changes):
    defaults = {
        "source": str(folder / "data.json"),
        "heldout": str(folder / "data.json"),
        "tokenizer": str(folder / "tokenizer.json"),
        "max_pixels": 12_544,
        "contexts_per_batch": 4,
        "questions_per_context": 3,
    }
    return DataConfig(**defaults | changes)


def pipeline_of(folder, *, split="train", seed=0, shard_index=0, shard_count=1, probe=None, **changes):
    return build_pipeline(
        config_of(folder, **changes),
        tiny(),
        split=split,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
        probe=probe,
    )


def take(pipeline, count, state=None):
    iterator = pipeline.iterator()
    if state is not None:
        iterator.set_state(state)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def shape_of(batch):
    return jax.tree.map(np.shape, batch)


def broken_copy(folder, target, broken):
    """The same data where some videos are broken in different ways."""
    shutil.copytree(folder, target)
    for place, number in enumerate(broken):
        path = target / f"{number}.mp4"
        if place % 3 == 0:
            path.unlink()
        else:
            path.write_bytes(b"" if place % 3 == 1 else path.read_bytes()[:400])
    return target


# ---- batches


def test_an_epoch_holds_every_record_once(folder):
    pipeline = pipeline_of(folder)
    batches = take(pipeline, 2 * pipeline.steps_per_epoch)
    epochs = batches[: pipeline.steps_per_epoch], batches[pipeline.steps_per_epoch :]
    orders = [[i for batch in epoch for i in batch.sample_ids.ravel().tolist() if i >= 0] for epoch in epochs]
    assert all(sorted(order) == list(range(len(pipeline.records))) for order in orders)
    assert orders[0] != orders[1]
    together = [{frozenset(batch.sample_ids.ravel().tolist()) for batch in epoch} for epoch in epochs]
    assert together[0] != together[1]
    assert all(isinstance(batch, TrainBatch) for batch in batches)


def test_batches_have_the_announced_shapes(folder):
    pipeline = pipeline_of(folder)
    announced = [shape_of(pipeline.empty_batch(shape)) for shape in pipeline.shapes]
    seen = [shape_of(batch) for batch in take(pipeline, pipeline.steps_per_epoch)]
    assert len(announced) == len(pipeline.shapes) <= 4
    assert all(any(shape == other for other in announced) for shape in seen)
    assert all(any(shape == other for other in seen) for shape in announced)


def test_a_row_is_one_video_with_its_questions(folder):
    pipeline = pipeline_of(folder)
    for batch in take(pipeline, pipeline.steps_per_epoch):
        for ids, length in zip(batch.sample_ids, batch.inputs.visual_lengths, strict=True):
            records = [pipeline.records[i] for i in ids if i >= 0]
            assert len({r.video for r in records}) == (1 if length else 0)
            for r in records:
                assert length == math.ceil(r.info.duration * 2) * 2 * (r.info.width // 28)


def test_heldout_is_one_epoch_in_order(folder):
    pipeline = pipeline_of(folder, split="heldout")
    batches = list(pipeline.iterator())
    assert len(batches) == pipeline.steps_per_epoch
    assert all(isinstance(batch, EvalBatch) for batch in batches)
    ids = [i for batch in batches for i in batch.sample_ids.ravel().tolist() if i >= 0]
    assert sorted(ids) == list(range(len(pipeline.records)))
    chosen = {
        i: option for b in batches for i, option in zip(b.sample_ids.ravel(), b.answer_option.ravel(), strict=True)
    }
    assert all(OPTIONS[chosen[r.index]] == r.answer for r in pipeline.records)
    again = pipeline_of(folder, split="heldout", seed=5)
    for one, other in zip(batches, again.iterator(), strict=True):
        assert_same(one, other)


def test_seed_decides_the_order(folder):
    ids = [[batch.sample_ids.tolist() for batch in take(pipeline_of(folder, seed=seed), 4)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_unstated_sizes_are_probed(folder):
    records = json.loads((folder / "data.json").read_text())
    stated = ("width", "height", "duration", "fps")
    bare = [{name: value for name, value in r.items() if name not in stated} for r in records]
    write_records(folder / "bare.json", bare)
    for one, other in zip(
        take(pipeline_of(folder, source=str(folder / "bare.json")), 4), take(pipeline_of(folder), 4), strict=True
    ):
        assert_same(one, other)
    with pytest.raises(DataError, match=r"mp4 and 22 more: their records state no width"):
        pipeline_of(folder, source=str(folder / "bare.json"), shard_count=2)
    asked = pipeline_of(
        folder, source=str(folder / "bare.json"), shard_count=2, probe=lambda videos: [*map(probe_video, videos)]
    )
    assert asked.steps_per_epoch == pipeline_of(folder).steps_per_epoch


# ---- hosts and workers


def test_two_hosts_hold_the_halves_of_one(folder):
    whole = take(pipeline_of(folder), 8)
    halves = [take(pipeline_of(folder, shard_index=i, shard_count=2), 8) for i in range(2)]

    def join(path, first, second):
        return np.concatenate([first, second], axis=1 if "positions" in str(path) and first.ndim > 2 else 0)

    for expected, first, second in zip(whole, *halves, strict=True):
        joined = jax.tree_util.tree_map_with_path(join, first, second)
        assert_same(joined, expected)


def test_broken_files_on_one_host_change_no_shape(folder, tmp_path, caplog):
    broken = broken_copy(folder, tmp_path / "copy", [3, 4, 5, 9])
    lenient = {"max_failure_share": 0.5, "source": str(folder / "data.json")}
    sound, hurt = (
        pipeline_of(folder, shard_index=i, shard_count=2, video_root=str(root), **lenient)
        for i, root in enumerate((folder, broken))
    )
    unhurt = pipeline_of(folder, shard_index=1, shard_count=2, **lenient)
    assert sound.steps_per_epoch == hurt.steps_per_epoch
    count = 2 * sound.steps_per_epoch
    lost = set()
    for one, other, expected in zip(take(sound, count), take(hurt, count), take(unhurt, count), strict=True):
        assert shape_of(one) == shape_of(other)
        for row in range(2):
            if (other.sample_ids[row] != expected.sample_ids[row]).any():
                lost |= {expected_id for expected_id in expected.sample_ids[row].tolist() if expected_id >= 0}
                assert (other.sample_ids[row] == -1).all()
                assert not other.loss_weights[row].any()
                assert other.inputs.visual_lengths[row] == 0
            else:
                np.testing.assert_array_equal(other.inputs.patches[row], expected.inputs.patches[row])
    videos = {hurt.records[i].video.rsplit("/", 1)[1] for i in lost}
    assert videos <= {"3.mp4", "4.mp4", "5.mp4", "9.mp4"}
    assert videos
    for name in videos:
        assert f"{broken / name}: " in caplog.text


@pytest.fixture
def _unset_platform(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")  # what a worker would inherit; the tests' own jax has read it already


@pytest.mark.usefixtures("_unset_platform")
def test_worker_processes_load_the_same_and_touch_no_accelerator(folder, tmp_path, caplog):
    broken = broken_copy(folder, tmp_path / "copy", [4])
    changes = {"max_failure_share": 0.5, "video_root": str(broken), "source": str(folder / "data.json")}
    threaded = pipeline_of(folder, **changes)
    pipeline = pipeline_of(folder, workers=2, **changes)
    object.__setattr__(pipeline, "_loader", Spy(pipeline._loader))
    count = threaded.steps_per_epoch
    iterator = pipeline.iterator()
    try:
        loading = [iterator.loading_seconds]
        for expected in take(threaded, count):
            assert_same(next(iterator), expected)
            loading.append(iterator.loading_seconds)
        assert loading[0] == 0
        assert all(later > earlier for earlier, later in itertools.pairwise(loading))
        assert iterator.failures.counts == {"video": 1}
        state = iterator.get_state()
    finally:
        iterator.close()
    for one, other in zip(take(threaded, 2, state), take(threaded, count + 2)[count:], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("workers", "rows"), [(0, 1), (0, 3), (2, 3)])
def test_large_rows_are_loaded_in_parts(folder, tmp_path, monkeypatch, workers, rows):
    """3 of 4 rows at a time leave a part of one row; a failed row is the same one."""
    broken = broken_copy(folder, tmp_path / "copy", [4])
    changes = {"max_failure_share": 0.5, "video_root": str(broken), "source": str(folder / "data.json")}
    whole = pipeline_of(folder, **changes)
    row_bytes = max(math.prod((s.frames, s.patches, s.patch_dim)) for s in whole.shapes)
    monkeypatch.setattr(pipeline_module, "_PART_BYTES", rows * row_bytes)
    pipeline = pipeline_of(folder, workers=workers, **changes)
    assert pipeline._loader.parts == math.ceil(4 / rows)
    count = 3 if workers else pipeline.steps_per_epoch
    iterator, expected = pipeline.iterator(), whole.iterator()
    for _ in range(count):
        assert_same(next(iterator), next(expected))
    state = iterator.get_state()
    assert state == expected.get_state()
    iterator.close()
    expected.close()
    assert_same(take(pipeline_of(folder, **changes), 1, state), take(whole, count + 1)[count:])


def test_closing_worker_processes_takes_seconds(folder):
    """Also where a worker waits with a batch larger than a pipe holds."""
    pipeline = pipeline_of(folder, workers=2, contexts_per_batch=64)
    batch_bytes = sum(array.nbytes for array in jax.tree.leaves(pipeline.empty_batch(pipeline.shapes[0])))
    assert batch_bytes > 2**16
    iterator = pipeline.iterator()
    for _ in range(5):
        next(iterator)
    assert len(multiprocessing.active_children()) >= 2
    time.sleep(0.5)  # the workers read ahead
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()


# ---- failures


def test_failures_are_counted_and_named_once(folder, tmp_path, caplog):
    broken = broken_copy(folder, tmp_path / "copy", [3, 4, 5])
    pipeline = pipeline_of(broken, max_failure_share=0.5, questions_per_context=4)
    iterator = pipeline.iterator()
    with caplog.at_level(logging.WARNING):
        for _ in range(2 * pipeline.steps_per_epoch):
            next(iterator)
    iterator.close()
    assert iterator.failures.contexts == 2 * VIDEOS
    assert iterator.failures.counts == {"video": 6}
    messages = [r.getMessage() for r in caplog.records if r.name == "videonsa_jax.data"]
    assert len(messages) == 3
    for name, reason in (("3.mp4", "no such file"), ("4.mp4", "0 bytes"), ("5.mp4", "Invalid data")):
        assert any(str(broken / name) in m and reason in m and "contexts failed)" in m for m in messages)
    assert str(broken) in iterator.failures.messages[-1]


def test_too_many_failures_stop_the_run(folder, tmp_path):
    broken = broken_copy(folder, tmp_path / "copy", range(0, VIDEOS, 2))
    sentence = r"\d+ of \d+ contexts failed, expected at most a share of 0\.05.*the last: .*mp4"
    pipeline = pipeline_of(broken)
    with pytest.raises(DataError, match=sentence):
        take(pipeline, 3 * pipeline.steps_per_epoch)


def test_a_video_that_cannot_be_probed_keeps_its_row(folder, tmp_path):
    broken = broken_copy(folder, tmp_path / "copy", [3])
    bare = [record(f"{number}.mp4") for number in range(6)]
    write_records(broken / "bare.json", bare)
    pipeline = pipeline_of(broken, source=str(broken / "bare.json"), max_failure_share=0.5)
    batches = take(pipeline, pipeline.steps_per_epoch)
    ids = [i for batch in batches for i in batch.sample_ids.ravel().tolist() if i >= 0]
    assert sorted(ids) == [0, 1, 2, 4, 5]


# ---- resuming


def test_resuming_goes_on_exactly(folder, tmp_path):
    broken = broken_copy(folder, tmp_path / "copy", [3, 4, 10])
    pipeline = pipeline_of(broken, max_failure_share=0.5)
    middle = pipeline.steps_per_epoch + 3
    iterator = pipeline.iterator()
    for _ in range(middle):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(8)]
    final = iterator.get_state()
    iterator.close()
    assert state["next_step"] == middle

    resumed = pipeline_of(broken, max_failure_share=0.5).iterator()
    resumed.set_state(state)
    for expected in rest:
        assert_same(next(resumed), expected)
    assert resumed.get_state() == final
    resumed.set_state(state)  # once more, now that it has read ahead
    for expected in rest:
        assert_same(next(resumed), expected)
    resumed.close()


def test_skips_are_replayed_where_the_file_is_readable_again(folder, tmp_path):
    broken = broken_copy(folder, tmp_path / "copy", [3, 4, 10])
    pipeline = pipeline_of(broken, max_failure_share=0.5)
    iterator = pipeline.iterator()
    first, failed = [], []
    for _ in range(pipeline.steps_per_epoch):
        first.append(next(iterator))
        failed.append(iterator.failed_rows)
    state = iterator.get_state()
    iterator.close()
    assert len(state["skips"]) == np.sum(failed) == 4  # one video has two contexts
    for number in (3, 4, 10):
        shutil.copy(folder / f"{number}.mp4", broken / f"{number}.mp4")
    again = pipeline_of(broken, max_failure_share=0.5)
    replay = again.iterator()
    replay.set_state(state | {"next_step": 0, "contexts": 0, "failed": {}})
    for expected, rows in zip(first, failed, strict=True):
        assert_same(next(replay), expected)
        np.testing.assert_array_equal(replay.failed_rows, rows)
        assert (expected.sample_ids[rows] == -1).all()
    assert replay.failures.counts == {"replayed": 4}
    assert replay.get_state()["skips"] == state["skips"]
    ids = {i for _ in range(pipeline.steps_per_epoch) for i in next(replay).sample_ids.ravel().tolist()}
    replay.close()
    assert ids - {-1} == set(range(len(pipeline.records)))  # the next epoch has them


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"contexts_per_batch": 8}, {"fps": 2.0}, {"questions_per_context": 1}]
)
def test_a_state_of_other_data_is_refused(folder, changes):
    state = pipeline_of(folder).iterator().get_state()
    with pytest.raises(DataError, match="saved data state has version and data"):
        pipeline_of(folder, **changes).iterator().set_state(state)


def test_a_heldout_state_at_the_end(folder):
    pipeline = pipeline_of(folder, split="heldout")
    iterator = pipeline.iterator()
    assert len(list(iterator)) == pipeline.steps_per_epoch
    resumed = pipeline.iterator()
    resumed.set_state(iterator.get_state())
    assert list(resumed) == []
    iterator.close()
    resumed.close()


# ---- settings


def test_an_empty_system_prompt_drops_the_system_turn(folder):
    texts = {}
    for prompt in ("", "You are a helpful assistant."):
        pipeline = pipeline_of(folder, system_prompt=prompt)
        (batch,) = take(pipeline, 1)
        tokens = batch.inputs.text_tokens[0, 0, : batch.inputs.text_lengths[0, 0]]
        texts[prompt] = pipeline.chat.tokenizer.decode(tokens, skip_special_tokens=False)
    assert texts[""].startswith("<|im_start|>user\n")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert texts["You are a helpful assistant."] == system + texts[""]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fps": 0.0}, "fps is 0.0, expected more than 0"),
        ({"min_pixels": 10**6}, "min_pixels is 1000000, expected 1 to max_pixels"),
        ({"max_frames": 0}, "max_frames is 0, expected at least 1"),
        (
            {"contexts_per_batch": 3, "shard_count": 2},
            "contexts_per_batch is 3, expected a multiple of the 2 shards",
        ),
        ({"workers": -1}, "workers is -1"),
        ({"max_failure_share": 2.0}, "max_failure_share is 2.0"),
        ({"buckets": (0,)}, "buckets is"),
        ({"shard_index": 1}, "shard_index is 1, expected 0 to 0"),
        ({"source": ""}, "train split is empty"),
        ({"source": "none.json"}, "none.json: no such file"),
    ],
)
def test_bad_settings(folder, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        pipeline_of(folder, **changes)


def test_a_tokenizer_larger_than_the_model(folder):
    with pytest.raises(DataError, match=r"tokenizer\.json: \d+ tokens, expected at most the model's vocab_size 100"):
        build_pipeline(config_of(folder), tiny(vocab_size=100), split="train", seed=0)


def test_options_that_begin_alike(folder):
    alike = [record("0.mp4", options=["red ball", "red"], answer="red")]
    write_records(folder / "alike.json", alike)
    with pytest.raises(DataError, match=r"record 0\.mp4-What colour\?: options .* share a first token"):
        pipeline_of(folder, split="heldout", heldout=str(folder / "alike.json"))


# ---- the embedded data set


def test_clips(tmp_path):
    clips = ClipsConfig(train_clips=6, heldout_clips=4, frame_side=64, seconds=(8,), render_workers=1)
    config = DataConfig(clips=clips, cache_dir=str(tmp_path), max_pixels=12_544, contexts_per_batch=2)
    train, heldout = (build_pipeline(config, tiny(), split=split, seed=0) for split in ("train", "heldout"))
    # Every training clip has a description too, which is no question of a family.
    assert sum(not (record.family or record.options) for record in train.records) == 6
    assert all(record.family and record.options for record in heldout.records)
    assert train.vocab_size <= tiny().text.vocab_size
    for batch in take(train, train.steps_per_epoch):
        assert batch.loss_weights.sum() > 0
        assert set(batch.inputs.visual_lengths.tolist()) <= {0, *(16 * n for n in range(1, 17))}
    ids = [i for batch in heldout.iterator() for i in batch.sample_ids.ravel().tolist() if i >= 0]
    assert sorted(ids) == list(range(len(heldout.records)))
