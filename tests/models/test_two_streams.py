"""What the two-stream layout promises: shared contexts, padding, independence, causality."""

import jax
import numpy as np
import pytest
from model_cases import (
    assert_close,
    build,
    logits,
    loss_and_gradients,
    make_batch,
    replace,
    small_config,
    visual_hidden,
    words,
)

from videonsa_jax.streams import Visual

# Two layouts of the same sums differ in the order of float32 additions: a few hundred terms of 6e-8 each.
FLOAT32_SUMS = 2e-5

CLIP = Visual((3, 3, 2), seconds_per_grid=1.0)
IMAGE = Visual((1, 2, 4))


@pytest.fixture(scope="module")
def model():
    return build(small_config())


@pytest.fixture(scope="module")
def contexts():
    """Ragged in every length; the text before a video is as long in all rows of a context."""
    return [
        [[words(4, 1), CLIP, words(n, n)] for n in (3, 6, 1)],
        [[words(2, q), IMAGE, words(3, q + 10), CLIP, words(n, n)] for q, n in enumerate((5, 2, 4))],
    ]


def test_questions_on_one_context_equal_separate_samples(model, contexts):
    """Same sum of losses and same gradients, with the visual stream computed once or once a question."""
    shared_loss, shared_gradients = loss_and_gradients(model, make_batch(contexts))
    separate = [[row] for context in contexts for row in context]
    separate_batch = make_batch(separate, pixel_seeds=[0, 0, 0, 1, 1, 1])
    separate_loss, separate_gradients = loss_and_gradients(model, separate_batch)
    np.testing.assert_allclose(shared_loss, separate_loss, rtol=FLOAT32_SUMS)
    assert_close(shared_gradients, separate_gradients, FLOAT32_SUMS)


def test_rows_with_one_prefix_share_a_context_in_dense_attention_too(model):
    """Visual tokens see the text before them; where that is the same in all rows, one row stands for them exactly."""
    contexts = [
        [[words(4, 1), CLIP, words(n, n)] for n in (3, 6, 1)],
        [[words(2, 7), IMAGE, words(3, 8), CLIP, words(n, n)] for n in (5, 2, 4)],
    ]
    shared = loss_and_gradients(model, make_batch(contexts), "dense", True)
    separate = make_batch([[row] for context in contexts for row in context], pixel_seeds=[0, 0, 0, 1, 1, 1])
    assert_close(shared, loss_and_gradients(model, separate, "dense"), FLOAT32_SUMS)


def test_padding_content_changes_nothing(model, contexts):
    """Bit for bit: padded pixels, ids, positions and visibilities are never read into a result."""
    sizes = {"frames": 6, "patches": 48, "visual": 30, "text": 14}
    one, other = (make_batch(contexts, padding_seed=seed, **sizes) for seed in (1, 2))
    other = replace(other, text_tokens=np.where(np.arange(14) < other.text_lengths[..., None], other.text_tokens, 9999))
    one_result, other_result = loss_and_gradients(model, one), loss_and_gradients(model, other)
    jax.tree.map(np.testing.assert_array_equal, one_result, other_result)


def test_padding_length_changes_nothing(model, contexts):
    plain, longer = make_batch(contexts), make_batch(contexts, frames=6, patches=48, visual=30, text=14)
    assert_close(loss_and_gradients(model, longer), loss_and_gradients(model, plain), FLOAT32_SUMS)
    valid = np.arange(plain.text_tokens.shape[2]) < plain.text_lengths[..., None]
    of_longer = logits(model, longer)[:, :, : valid.shape[2]]
    assert_close(of_longer[valid], logits(model, plain)[valid], FLOAT32_SUMS)


def test_contexts_and_rows_are_independent(model, contexts):
    batch = make_batch(contexts)
    before = logits(model, batch)
    tokens = batch.text_tokens.copy()
    tokens[1, 2] = (tokens[1, 2] + 1) % 61
    after = logits(model, replace(batch, text_tokens=tokens))
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1, :2], before[1, :2])
    assert np.abs(after[1, 2] - before[1, 2]).max() > 1e-3

    patches = batch.patches.copy()
    patches[0] = 255 - patches[0]
    after = logits(model, replace(batch, patches=patches))
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).max() > 1e-3


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_causality(model, attention):
    """A change of a token or of a video reaches what follows it, and nothing before."""
    row = [words(3, 1), CLIP, words(4, 2), IMAGE, words(3, 3)]
    batch = make_batch([[row]])
    before = logits(model, batch, attention)[0, 0]

    tokens = batch.text_tokens.copy()
    tokens[0, 0, 5] = (tokens[0, 0, 5] + 1) % 61
    after = logits(model, replace(batch, text_tokens=tokens), attention)[0, 0]
    np.testing.assert_array_equal(after[:5], before[:5])
    assert np.abs(after[5:] - before[5:]).max(axis=-1).min() > 1e-4

    for frames, first_text in ((slice(0, 3), 3), (slice(3, 4), 7)):  # the clip, the image
        patches = batch.patches.copy()
        patches[:, frames] = 255 - patches[:, frames]
        after = logits(model, replace(batch, patches=patches), attention)[0, 0]
        np.testing.assert_array_equal(after[:first_text], before[:first_text])
        assert np.abs(after[first_text:] - before[first_text:]).max(axis=-1).min() > 1e-4


def test_visual_stream_is_causal(model):
    """With NSA a visual token depends on the visual tokens before it, and on no text."""
    batch = make_batch([[[words(3, 1), CLIP, words(4, 2)]]])
    before = visual_hidden(model, batch)
    patches = batch.patches.copy()
    patches[:, 1] = 255 - patches[:, 1]
    after = visual_hidden(model, replace(batch, patches=patches))
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.abs(after[:, 6:] - before[:, 6:]).max(axis=-1).min() > 1e-4
    other_text = replace(batch, text_tokens=(batch.text_tokens + 1) % 61)
    np.testing.assert_array_equal(visual_hidden(model, other_text), before)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_text_only(model, attention):
    """No frames and no visual tokens, padded or not, give the same logits and finite gradients."""
    row = words(5, 1)
    bare = make_batch([[[row]]])
    assert bare.patches.shape[1] == 0
    assert bare.visual_source.shape[1] == 0
    padded = make_batch([[[row]]], frames=2, patches=16, visual=8)
    assert_close(logits(model, padded, attention), logits(model, bare, attention), FLOAT32_SUMS)
    value, gradients = loss_and_gradients(model, bare)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
