"""Attention among patches against plain softmax attention under a mask, with its gradient."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import assert_close, jit

from pallas_kernels import chunked
from pallas_kernels.masked_attention import masked_attention
from videonsa_jax.models.patch_attention import PADDING, Windows, attend_patches

SIZE = 8
# Windows of each frame in order of their patches, by their numbers of patches: frames of 32 patches.
FULL = [[8, 8, 8, 8], [8, 8, 4], []]
SHARING = [[4, 4, 8, 2, 6], [8, 8, 4], []]  # none crosses a border of 8 patches
CROSSING = [[8, 4, 8, 4, 8], [4, 8, 2], []]
UNEVEN = [[8, 4, 8, 4, 6], [8, 8, 4], []]
LONGER_THAN_FRAME = [[2, 4, 1], [6], []]


def _numbers(frames, patches):
    rows = [np.repeat(np.arange(len(windows)) * 3, windows) for windows in frames]
    return np.array([np.pad(row, (0, patches - len(row)), constant_values=PADDING) for row in rows], np.int32)


def _expected(q, k, v, number, is_full):
    valid = number != PADDING
    seen = valid[:, :, None] & valid[:, None, :]
    if not is_full:
        seen &= number[:, :, None] == number[:, None, :]
    return masked_attention(q[:, :, :, None], k, v, seen[:, :, None, :])[0][:, :, :, 0]


@pytest.mark.parametrize(
    ("frames", "patches", "stays"),
    [(FULL, 32, True), (SHARING, 32, True), (CROSSING, 32, False), (UNEVEN, 30, False), (LONGER_THAN_FRAME, 7, True)],
    ids=["full", "sharing", "crossing", "no whole number of tiles", "smaller than a window"],
)
@pytest.mark.parametrize("tile_elements", [chunked.TILE_ELEMENTS, 600], ids=["one chunk", "chunks of frames"])
def test_values_and_gradients_are_those_of_the_mask(frames, patches, stays, tile_elements):
    number = _numbers(frames, patches)
    windows = Windows(jnp.asarray(number), SIZE)
    assert bool(windows.stay_in_blocks()) == stays
    q, k, v, do = jnp.asarray(np.random.default_rng(0).standard_normal((4, len(frames), patches, 2, 4)), jnp.float32)

    def run(q, k, v, is_full):
        return attend_patches(q, k, v, windows, is_full)

    def with_gradient(function, is_full):
        o, pull = jax.vjp(lambda q, k, v: function(q, k, v, is_full), q, k, v)
        return o, pull(do)

    for is_full in (False, True):
        with mock.patch.object(chunked, "TILE_ELEMENTS", tile_elements):
            actual = jit(lambda is_full: with_gradient(run, is_full))(jnp.asarray(is_full))
        expected = with_gradient(lambda *args: _expected(*args[:3], number, args[3]), is_full)
        assert_close(actual, expected, 1e-5)  # some hundred roundings of float32
