"""Selected blocks of a model, and the unions that neighbouring queries make."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import nsa_attention
from videonsa_jax.analysis.selection import union_sizes, visual_attention
from videonsa_jax.configs import tiny
from videonsa_jax.models import VideoNSA
from videonsa_jax.streams import Batch


def random_batch(lengths: tuple[int, ...] = (52, 37), frames: int = 13) -> Batch:
    """Contexts of 2 x 2 tokens a frame, one text token each."""
    rng, contexts, tokens = np.random.default_rng(1), len(lengths), 4 * frames
    place = np.arange(tokens, dtype=np.int32)
    positions = np.stack([place // 4, place % 4 // 2, place % 2])
    ones = np.ones((contexts, 1, 1), np.int32)
    return Batch(
        patches=rng.integers(0, 256, (contexts, frames, 16, 1176), dtype=np.uint8),
        frame_grids=np.full((contexts, frames, 2), 4, np.int32),
        visual_source=np.tile(place, (contexts, 1)),
        visual_positions=np.tile(positions[:, None], (1, contexts, 1)).astype(np.int32),
        visual_lengths=np.asarray(lengths, np.int32),
        visible_text=np.zeros((contexts, tokens), np.int32),
        text_tokens=ones,
        text_positions=np.full((3, contexts, 1, 1), frames, np.int32),
        text_lengths=ones[..., 0],
        visible_visual=np.asarray(lengths, np.int32)[:, None, None],
    )


def union_by_sets(block_indices: np.ndarray, start: int, m: int) -> int:
    return len({block for row in block_indices[start : start + m] for block in row.tolist() if block >= 0})


def test_unions_are_those_of_sets():
    rng = np.random.default_rng(0)
    length, count, block_size = 118, 3, 4
    block_indices = np.full((length, 2, count), -1, np.int32)
    for t in range(length):
        for head in range(2):
            candidates = np.arange(t // block_size + 1)
            chosen = np.sort(rng.permutation(candidates)[:count])
            block_indices[t, head, count - len(chosen) :] = chosen
    sizes = union_sizes(block_indices, block_size=block_size, neighbours=(1, 8, 16, 64, 128))
    for m in (8, 16):
        starts = [start for start in range(0, length - m + 1, m) if start >= count * block_size]
        unions = [union_by_sets(block_indices[:, head], start, m) for start in starts for head in range(2)]
        assert sizes[m] == pytest.approx(np.mean(unions) / count)
    assert sizes[1] == 1
    assert np.isnan([sizes[64], sizes[128]]).all(), "no tile fits behind the queries that have no choice"


def test_neighbours_that_choose_alike_have_the_union_of_one():
    block_indices = np.tile(np.asarray([0, 2, 5], np.int32), (64, 1, 1))
    assert union_sizes(block_indices, block_size=2, neighbours=(8, 32)) == {8: 1.0, 32: 1.0}


def test_the_blocks_are_those_that_the_model_attends_to():
    config = tiny()
    model, batch = VideoNSA(config, nnx.Rngs(0)), random_batch()
    layers = list(visual_attention(model, batch))
    assert len(layers) == config.text.num_hidden_layers - 1
    nsa = config.nsa
    for layer in layers:
        options = {
            "block_size": nsa.block_size,
            "block_count": nsa.block_count,
            "window_size": nsa.window_size,
            "lengths": jnp.asarray(batch.visual_lengths),
        }
        inputs = (layer.query, layer.key, layer.value, layer.gate_logits)
        own = nsa_attention(*inputs, **options)
        injected = nsa_attention(*inputs, **options, block_indices=layer.block_indices)
        np.testing.assert_array_equal(own, injected)
    other = nsa_attention(*inputs, **options, block_indices=jnp.zeros_like(layer.block_indices).at[..., 1:].set(-1))
    assert not np.allclose(own, other), "the choice matters here"


def test_a_model_without_gates_is_refused():
    config = dataclasses.replace(tiny(), nsa=None)
    with pytest.raises(ValueError, match=r"config\.nsa is None, expected a model with gates"):
        next(visual_attention(VideoNSA(config, nnx.Rngs(0)), random_batch()))
