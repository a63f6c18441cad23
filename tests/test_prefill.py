"""Prefill in pieces gives what one forward pass gives."""

import jax
import numpy as np
import pytest
from conversation_cases import SMALL_PIXELS, ask, clip, config_with, image, little_optimisation, small_processor  # noqa: F401
from model_cases import build

from videonsa_jax.models.attention import AttentionOptions
from videonsa_jax.models.cache import empty_cache
from videonsa_jax.prefill import (
    bucket,
    chunk_width,
    cut,
    embed_media,
    run_pieces,
    text_capacity,
    visual_capacity,
)

# Three contexts of different lengths: 12 + 6 + 24, 18 and 0 visual tokens.
CONVERSATIONS = [
    ask("one", clip(4, 1), "two three", image(2), "red or green", clip(7, 3), "blue?"),
    ask(clip(6, 4), "What colour is the ball?"),
    ask("Options"),
]
GROUP = [ask(clip(9, 5), image(6), question) for question in ("What?", "red or green or blue", "one two")]


@pytest.fixture(scope="module")
def model():
    return build(config_with())


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return small_processor(tmp_path_factory.mktemp("processor"))


def prompts_of(processor, messages, **options):
    return processor.plan(messages, **SMALL_PIXELS, **options)


# Pieces that end where a video ends, and inside a video and a block of four.
@pytest.mark.parametrize(
    ("attention", "group", "chunk_sizes"), [("nsa", False, (18, 10)), ("nsa", True, (10,)), ("dense", False, (18, 10))]
)
def test_pieces_equal_one_forward_pass(model, processor, attention, group, chunk_sizes):
    prompts = prompts_of(processor, GROUP if group else CONVERSATIONS, group=group)
    batch = processor.collate(prompts)
    places = batch.text_lengths[..., None, None] - 1
    logits = np.asarray(jax.jit(model.__call__, static_argnames="attention")(batch, attention=attention).logits)
    expected = np.take_along_axis(logits, places, axis=2)[:, :, 0]
    longest = int(batch.visual_lengths.max())
    for chunk_size in chunk_sizes:
        width = chunk_width(longest, chunk_size)
        capacity = visual_capacity(longest, width)
        pieces = cut(batch, width, interleaved=attention == "dense")
        cache = empty_cache(model.config.text, *batch.text_lengths.shape, capacity, text_capacity(pieces, 1), "float32")
        visual = embed_media(model, processor, prompts, capacity)
        last, _ = run_pieces(model, pieces, cache, visual, AttentionOptions(attention))
        # Logits are of order 1 to 10; float32 sums in another order.
        np.testing.assert_allclose(model.logits(last), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [1, 7, 16, 42])
@pytest.mark.parametrize("interleaved", [True, False])
def test_every_token_finds_what_it_sees(processor, width, interleaved):
    """Each token stands in one piece, and what it sees in this piece or one before."""
    batch = processor.collate(prompts_of(processor, CONVERSATIONS), pixels=False)
    seen = np.zeros_like(batch.text_lengths)
    for piece in cut(batch, width, interleaved=interleaved):
        np.testing.assert_array_equal(piece.text_offsets, seen)
        seen = piece.text_lengths
        offset = int(piece.visual_offset)
        visual = offset + piece.visual_positions.shape[2]
        for b, length in enumerate(batch.visual_lengths):
            first, stop = seen[b, 0] - (seen - piece.text_offsets)[b, 0], seen[b, 0]
            np.testing.assert_array_equal(piece.text_tokens[b, 0, : stop - first], batch.text_tokens[b, 0, first:stop])
            assert (batch.visible_visual[b, 0, first:stop] <= visual).all()
            held = min(visual, length)
            np.testing.assert_array_equal(
                piece.visual_positions[:, b, : max(held - offset, 0)], batch.visual_positions[:, b, offset:held]
            )
            if interleaved:
                assert (batch.visible_text[b, offset:held] <= seen[b, 0]).all()
    np.testing.assert_array_equal(seen, batch.text_lengths)
    assert visual >= batch.visual_lengths.max()


def test_media_are_encoded_as_in_a_padded_batch(model, processor):
    """Frames of other sizes, each encoded unpadded and some at a time."""
    prompts = prompts_of(processor, CONVERSATIONS)
    batch = processor.collate(prompts)
    encoded = np.asarray(embed_media(model, processor, prompts, 50))
    expected = np.asarray(model.embed_visual(batch))
    for row, length in enumerate(batch.visual_lengths):
        # Values of order 1; attention inside a frame sums in another order where padding differs.
        np.testing.assert_allclose(encoded[row, :length], expected[row, :length], atol=1e-5)
        assert not encoded[row, length:].any()


def test_vision_tower_in_several_calls(model, processor, monkeypatch):
    prompts = prompts_of(processor, [ask(clip(14, 1), "one")])
    whole = np.asarray(embed_media(model, processor, prompts, 42))
    monkeypatch.setattr("videonsa_jax.prefill.PATCHES_PER_CALL", 3 * 64)  # of 64 padded patches: three frames
    np.testing.assert_allclose(embed_media(model, processor, prompts, 42), whole, atol=1e-5)


def test_few_sizes():
    sizes = {bucket(size, 32) for size in range(1, 4097)}
    assert len(sizes) <= 1 + 4 * 7  # 32, then four an octave up to 4096
    assert all(size <= bucket(size, 32) <= max(32, 1.25 * size) for size in range(1, 5000))
    assert bucket(33, 32) == 40


@pytest.mark.parametrize(("tokens", "chunk", "width", "capacity"), [(0, 8, 0, 0), (5, 64, 64, 64), (100, 48, 48, 144)])
def test_cache_sizes(tokens, chunk, width, capacity):
    assert chunk_width(tokens, chunk) == width
    assert visual_capacity(tokens, width) == capacity
