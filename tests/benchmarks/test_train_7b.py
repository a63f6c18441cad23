"""The shapes that the 7B benchmark makes up, and its arithmetic; no model runs."""

import jax
import numpy as np
import pytest

from benchmarks.real_samples import TEXT_BEFORE, TEXT_TOKENS, moving_pattern, one_question, real_shaped_batch
from benchmarks.train_7b import hours
from videonsa_jax.configs import tiny


def test_a_batch_has_the_shapes_of_videos_with_questions() -> None:
    batch = real_shaped_batch(tiny(), contexts=2, questions=3, frames=5, grid=(4, 6))
    inputs = batch.inputs
    assert inputs.patches.shape[:3] == (2, 5, 24)
    assert inputs.visual_source.shape == (2, 64)  # 5 x 6 tokens, padded to a whole block
    assert inputs.visual_lengths.tolist() == [30, 30]
    np.testing.assert_array_equal(inputs.visual_source[:, :30], np.tile(np.arange(30), (2, 1)))
    assert inputs.text_tokens.shape == (2, 3, TEXT_TOKENS)
    assert (inputs.text_tokens[:, :, :TEXT_BEFORE] == inputs.text_tokens[:, :1, :TEXT_BEFORE]).all()
    assert not (inputs.text_tokens[:, 0] == inputs.text_tokens[:, 1]).all()
    assert (inputs.visible_visual[..., [TEXT_BEFORE - 1, TEXT_BEFORE]] == [0, 30]).all()


def test_a_question_can_stand_alone() -> None:
    both = real_shaped_batch(tiny(), contexts=2, questions=2, frames=3, grid=(4, 4))
    alone = real_shaped_batch(tiny(), contexts=2, questions=1, frames=3, grid=(4, 4))
    second = one_question(both, 1)
    assert jax.tree.map(np.shape, second) == jax.tree.map(np.shape, alone)
    np.testing.assert_array_equal(second.inputs.text_tokens[:, 0], both.inputs.text_tokens[:, 1])
    np.testing.assert_array_equal(second.inputs.patches, both.inputs.patches)


def test_its_videos_change_little_from_frame_to_frame() -> None:
    video = moving_pattern(4, (4, 6), tiny(), seed=0).astype(float)
    noise = np.abs(video[0] - video[0, ::-1]).mean()
    assert 0 < np.abs(np.diff(video, axis=0)).mean() < noise / 2


def test_hours_share_an_update_among_the_papers_batch() -> None:
    parts = {"nsa 1": {"gpu_seconds_per_sample": 2.0}, "update": {"seconds": 3.2}, "vision f": {"seconds": 1.0}}
    assert hours(parts, devices=2) == {"nsa 1": pytest.approx(216_000 * (2.0 + 0.2) / 3600)}
