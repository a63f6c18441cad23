"""M-RoPE ids and visibilities of `split_streams`, written out by hand."""

import jax
import numpy as np
import pytest

from videonsa_jax.streams import Batch, Visual, slice_batch, split_streams

# Three words, a clip of 3 x 2 x 3 tokens at 1.5 seconds a step, two words, an image of 1 x 2 x 2 tokens, one word;
# two ids a second. Each case: times of the clip's steps, first id of the words after it, of the image, of the last.
CONVENTIONS = {
    "qwen2_5_vl": ((3, 6, 9), 10, 12, 14),  # floor(k * 1.5 * 2) = 0, 3, 6; after the largest id, 9
    "int_seconds": ((3, 5, 7), 8, 10, 12),  # 1.5 -> 1 second: 0, 2, 4
    "transformers_5_3": ((3, 5, 7), 6, 8, 10),  # as before, but the text starts at 3 + max(2, 3)
    "transformers_5_21": ((3, 6, 9), 6, 8, 10),
}


@pytest.mark.parametrize("mrope", CONVENTIONS)
def test_mrope_ids(mrope):
    times, after_clip, image, last = CONVENTIONS[mrope]
    parts = [[5, 6, 7], Visual((3, 2, 3), 1.5), [8, 9], Visual((1, 2, 2)), [10]]
    row = split_streams(parts, tokens_per_second=2.0, mrope=mrope)
    np.testing.assert_array_equal(row.text_tokens, [5, 6, 7, 8, 9, 10])
    text = [0, 1, 2, after_clip, after_clip + 1, last]
    np.testing.assert_array_equal(row.text_positions, [text] * 3)
    np.testing.assert_array_equal(row.visible_visual, [0, 0, 0, 18, 18, 22])
    clip_time = np.repeat(times, 6)
    clip_row, clip_column = 3 + np.tile([0, 0, 0, 1, 1, 1], 3), 3 + np.tile([0, 1, 2], 6)
    expected = [
        [*clip_time, image, image, image, image],
        [*clip_row, image, image, image + 1, image + 1],
        [*clip_column, image, image + 1, image, image + 1],
    ]
    np.testing.assert_array_equal(row.visual_positions, expected)
    np.testing.assert_array_equal(row.visible_text, [3] * 18 + [5] * 4)


def test_fractions_of_a_second_are_floored_after_scaling():
    """At 0.75 seconds a step: 0, 1.5, 3, 4.5 -> 0, 1, 3, 4; truncated first, every step has the same id."""
    exact = split_streams([Visual((4, 1, 1), 0.75)], tokens_per_second=2.0)
    np.testing.assert_array_equal(exact.visual_positions[0], [0, 1, 3, 4])
    truncated = split_streams([Visual((4, 1, 1), 0.75)], tokens_per_second=2.0, mrope="int_seconds")
    np.testing.assert_array_equal(truncated.visual_positions[0], [0, 0, 0, 0])


def test_ids_are_computed_in_float32_as_torch_does():
    """39 x 2 / 1.3 s x 2 is 120: float32 gives that, float64 a little less."""
    ids = split_streams([Visual((40, 1, 1), 2 / 1.3)], tokens_per_second=2.0).visual_positions[0]
    assert ids[39] == 120


def test_streams_without_text_or_without_visuals():
    empty = split_streams([], tokens_per_second=2.0)
    assert empty.text_positions.shape == (3, 0)
    assert empty.visual_positions.shape == (3, 0)
    text = split_streams([[1, 2], [], [3]], tokens_per_second=2.0)
    np.testing.assert_array_equal(text.text_positions, [[0, 1, 2]] * 3)
    visual = split_streams([Visual((1, 1, 2))], tokens_per_second=2.0)
    assert visual.text_tokens.shape == (0,)
    np.testing.assert_array_equal(visual.visible_text, [0, 0])


def _batch(contexts: int) -> Batch:
    return Batch(
        patches=np.zeros((contexts, 1, 4, 24), np.uint8),
        frame_grids=np.full((contexts, 1, 2), 2, np.int32),
        visual_source=np.zeros((contexts, 1), np.int32),
        visual_positions=np.arange(3 * contexts, dtype=np.int32).reshape(3, contexts, 1),
        visual_lengths=np.ones(contexts, np.int32),
        visible_text=np.zeros((contexts, 1), np.int32),
        text_tokens=np.zeros((contexts, 2, 3), np.int32),
        text_positions=np.zeros((3, contexts, 2, 3), np.int32),
        text_lengths=np.arange(2 * contexts, dtype=np.int32).reshape(contexts, 2),
        visible_visual=np.ones((contexts, 2, 3), np.int32),
    )


def test_slice_batch_cuts_every_field_along_its_batch_axis():
    cut = slice_batch(_batch(3), slice(1, 3))
    np.testing.assert_array_equal(cut.visual_positions[:, :, 0], [[1, 2], [4, 5], [7, 8]])
    np.testing.assert_array_equal(cut.text_lengths, [[2, 3], [4, 5]])
    assert cut.text_positions.shape == (3, 2, 2, 3)


def test_batch_is_a_pytree_of_anything():
    """Shapes and specs take the arrays' places, and paths name the fields."""
    batch = _batch(2)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    assert isinstance(shapes, Batch)
    assert shapes.text_tokens.shape == (2, 2, 3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    assert paths[:2] == [".patches", ".frame_grids"]
