import dataclasses
import zlib

import jax
import numpy as np
import pytest
from small_videos import grey_frames, numbers, record, write_records, write_tokenizer, write_video

from videonsa_jax.configs import tiny
from videonsa_jax.data.chat import load_chat
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.examples import (
    BatchShape,
    ablate,
    build_example,
    clear_row,
    empty_arrays,
    fill_row,
    pad_and_stack,
)
from videonsa_jax.data.frames import VideoError, frames_to_patches
from videonsa_jax.data.records import read_records
from videonsa_jax.data.sources import build_index
from videonsa_jax.data.video import decode_video
from videonsa_jax.streams import Visual, split_streams

QUESTIONS = (("What colour?", "red"), ("What is one plus two?", "three"), ("Is the ball blue?", "no"))
OPTIONS = ["red", "three", "no"]
SHAPE = BatchShape(
    contexts=2, questions=4, text_tokens=64, visual_tokens=64, frames=6, patches=32, patch_dim=1176, options=0
)


@dataclasses.dataclass
class Scene:
    """A video of 7 frames at 2x3 tokens with three records, in one context."""

    chat: object
    index: object
    config: DataConfig

    def example(self, *, answered=True, **changes):
        config = dataclasses.replace(self.config, **changes)
        return build_example(self.index.contexts[0], self.index.records, self.chat, config, tiny(), answered=answered)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    write_video(folder / "a.mp4", grey_frames(7, height=56, width=84), rate=4)
    records = [record("a.mp4", q, a, width=84, height=56, duration=1.75, options=OPTIONS) for q, a in QUESTIONS]
    read, _ = read_records(write_records(folder / "data.json", records))
    chat = load_chat(write_tokenizer(folder / "tokenizer.json"))
    config = DataConfig(fps=4.0, max_pixels=12_544, questions_per_context=4)
    return Scene(chat, build_index(read, chat, config, tiny(), answered=True), config)


def shown(patches):
    """Which grey frame each frame of the pairs in patches is."""
    return numbers(patches.reshape(len(patches), -1, 3, 2, 196).transpose(0, 3, 1, 2, 4).reshape(2 * len(patches), -1))


def test_an_example_is_the_video_and_its_rows(scene):
    example = scene.example()
    (context,) = scene.index.contexts
    decoded = decode_video(context.video, fps=4.0, max_frames=768, max_pixels=12_544)
    np.testing.assert_array_equal(example.patches, frames_to_patches(decoded.frames))
    assert shown(example.patches) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert example.frame_grid == (4, 6)
    for row, (question, answer) in zip(example.rows, QUESTIONS, strict=True):
        messages = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        rendered = scene.chat.render(messages, [Visual((4, 2, 3), 0.5)])
        split = split_streams(rendered.parts, tokens_per_second=2.0)
        np.testing.assert_array_equal(row.tokens, split.text_tokens)
        np.testing.assert_array_equal(row.positions, split.text_positions)
        np.testing.assert_array_equal(row.visible_visual, split.visible_visual)
        np.testing.assert_array_equal(example.visual_positions, split.visual_positions)
        np.testing.assert_array_equal(example.visible_text, split.visible_text)
        assert scene.chat.decode(row.tokens[row.is_answer]) == answer


def test_frames_in_the_cache_are_not_decoded_again(scene, tmp_path, monkeypatch):
    expected = scene.example()
    cached = {"cache_dir": str(tmp_path), "frame_cache_gigabytes": 0.1}
    np.testing.assert_array_equal(scene.example(**cached).patches, expected.patches)
    monkeypatch.setattr("videonsa_jax.data.examples.decode_video", None)
    np.testing.assert_array_equal(scene.example(**cached).patches, expected.patches)


def test_batch_rows_hold_the_example(scene):
    example = scene.example()
    batch = pad_and_stack([None, example], SHAPE)
    inputs = batch.inputs
    np.testing.assert_array_equal(inputs.patches[1, :4, :24], example.patches)
    np.testing.assert_array_equal(inputs.frame_grids[1], [[4, 6]] * 4 + [[0, 0]] * 2)
    # Frame t's merged tokens start at t x P / 4 = 8t.
    np.testing.assert_array_equal(inputs.visual_source[1, :24], [8 * t + k for t in range(4) for k in range(6)])
    assert inputs.visual_lengths.tolist() == [0, 24]
    np.testing.assert_array_equal(inputs.visual_positions[:, 1, :24], example.visual_positions)
    np.testing.assert_array_equal(inputs.visible_text[1, :24], example.visible_text)
    assert batch.sample_ids.tolist() == [[-1] * 4, [0, 1, 2, -1]]
    for q, row in enumerate(example.rows):
        length = len(row.tokens)
        assert inputs.text_lengths[1, q] == length
        np.testing.assert_array_equal(inputs.text_tokens[1, q, :length], row.tokens)
        np.testing.assert_array_equal(inputs.text_positions[:, 1, q, :length], row.positions)
        np.testing.assert_array_equal(inputs.visible_visual[1, q, :length], row.visible_visual)
        learnt = batch.loss_weights[1, q] > 0
        assert scene.chat.tokenizer.decode(batch.targets[1, q][learnt], skip_special_tokens=False) == (
            f"{QUESTIONS[q][1]}<|im_end|>"
        )
        np.testing.assert_array_equal(batch.targets[1, q, : length - 1], row.tokens[1:])
    assert batch.loss_weights[1, 3].sum() == 0


def test_rows_that_fill_up_are_empty(scene):
    batch = pad_and_stack([None], SHAPE)
    assert not batch.inputs.text_lengths.any()
    assert not batch.inputs.visual_lengths.any()
    assert not batch.loss_weights.any()
    assert (batch.sample_ids == -1).all()


@pytest.mark.parametrize("options", [0, 3])
def test_a_cleared_row_is_one_that_fills_up(scene, options):
    shape = dataclasses.replace(SHAPE, options=options)
    arrays = empty_arrays(shape)
    fill_row(arrays, 1, scene.example(answered=not options))
    assert (arrays["sample_ids"][1] >= 0).any()
    clear_row(arrays, 1)
    for name, value in empty_arrays(shape).items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


def test_evaluation_rows_end_where_the_answer_begins(scene):
    batch = pad_and_stack([scene.example(answered=False)], dataclasses.replace(SHAPE, options=3))
    for q, (_, answer) in enumerate(QUESTIONS):
        length = batch.inputs.text_lengths[0, q]
        text = scene.chat.tokenizer.decode(batch.inputs.text_tokens[0, q, :length], skip_special_tokens=False)
        assert text.endswith("?<|im_end|>\n<|im_start|>assistant\n")
        assert batch.answer_position[0, q] == length - 1
        assert batch.option_tokens[0, q].tolist() == [scene.chat.encode(option)[0] for option in OPTIONS]
        assert OPTIONS[batch.answer_option[0, q]] == answer
        whole = scene.example().rows[q].tokens
        np.testing.assert_array_equal(whole[:length], batch.inputs.text_tokens[0, q, :length])
        assert whole[length] == batch.option_tokens[0, q, batch.answer_option[0, q]]
    assert batch.answer_option[0, 3] == -1
    assert (batch.answer_option[1] == -1).all()
    assert (batch.option_tokens[1] == -1).all()
    assert len(jax.tree.leaves(batch)) == 14


def test_a_video_that_cannot_be_read(scene, tmp_path):
    (context,) = scene.index.contexts
    broken = tmp_path / "broken.mp4"
    broken.write_text("broken")
    for bad, sentence in (
        (dataclasses.replace(context, video=str(broken)), "broken.mp4: Invalid data"),
        (dataclasses.replace(context, problem="a.mp4: gone"), "a.mp4: gone"),
    ):
        with pytest.raises(VideoError, match=sentence):
            build_example(bad, scene.index.records, scene.chat, scene.config, tiny(), answered=True)


# ---- ablations


def test_text_only_holds_no_video(scene):
    batch = pad_and_stack([scene.example(ablation="text_only")], SHAPE)
    plain = pad_and_stack([scene.example()], SHAPE)
    assert batch.inputs.visual_lengths[0] == 0
    assert not batch.inputs.patches.any()
    assert not batch.inputs.visible_visual.any()
    np.testing.assert_array_equal(batch.inputs.text_tokens, plain.inputs.text_tokens)
    np.testing.assert_array_equal(batch.loss_weights, plain.loss_weights)
    length = batch.inputs.text_lengths[0, 0]
    np.testing.assert_array_equal(batch.inputs.text_positions[:, 0, 0, :length], np.tile(np.arange(length), (3, 1)))


def test_single_frame_repeats_one(scene):
    example, plain = scene.example(ablation="single_frame"), scene.example()
    seen = shown(example.patches)
    assert len(set(seen)) == 1
    assert seen[0] in range(7)
    np.testing.assert_array_equal(example.visual_positions, plain.visual_positions)


def test_shuffled_frames_move_pixels_alone(scene):
    example, plain = scene.example(ablation="shuffled_frames"), scene.example()
    seen = shown(example.patches)
    assert seen != sorted(seen)
    assert sorted(seen) == [0, 1, 2, 3, 4, 5, 6, 6]
    np.testing.assert_array_equal(example.visual_positions, plain.visual_positions)
    assert seen == shown(scene.example(ablation="shuffled_frames").patches)


def test_ablations_draw_by_sample_id():
    frames = grey_frames(16)
    orders = [tuple(numbers(ablate(frames, "shuffled_frames", name))) for name in ("a", "b", "a")]
    assert orders[0] == orders[2] != orders[1]
    expected = np.random.default_rng(zlib.crc32(b"a")).permutation(16)
    assert orders[0] == tuple(expected.tolist())
    drawn = {numbers(ablate(frames, "single_frame", str(name)))[0] for name in range(200)}
    assert drawn == set(range(16))
