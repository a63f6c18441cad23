"""The vision tower against a plain statement of Qwen2.5-VL's, one frame at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import build, jit, small_config

from videonsa_jax.models import vision

# 42 is no multiple of `layers.ALIGNED_FEATURES`, as the released tower's 3,420 is none.
MODEL = dataclasses.replace(small_config(), vision=dataclasses.replace(small_config().vision, intermediate_size=42))
CONFIG = MODEL.vision
MERGE, SIDE = 2, 4  # patches of a merge group and of a window along an axis
GRIDS = [(8, 8), (2, 6), (10, 6), (0, 0)]  # in (10, 6) windows cross blocks of 16 patches


@pytest.fixture(scope="module")
def tower():
    return build(MODEL).visual


def _places(height, width):
    """(row, column) of each patch, in Qwen's order."""
    return [
        (group_row * MERGE + row, group_column * MERGE + column)
        for group_row in range(height // MERGE)
        for group_column in range(width // MERGE)
        for row in range(MERGE)
        for column in range(MERGE)
    ]


def _windows(height, width):
    """Patch indices of each window, as transformers' `get_window_index` walks over the frame."""
    places = _places(height, width)
    return [
        [
            index
            for index, (row, column) in enumerate(places)
            if top <= row < top + SIDE and left <= column < left + SIDE
        ]
        for top in range(0, height, SIDE)
        for left in range(0, width, SIDE)
    ]


@pytest.mark.parametrize("grid", GRIDS)
def test_places_and_windows(grid):
    height, width = grid
    rows, columns, valid = vision.patch_places(jnp.asarray([grid], jnp.int32), 80, MERGE)
    count = height * width
    np.testing.assert_array_equal(valid[0], np.arange(80) < count)
    places = list(zip(rows[0, :count].tolist(), columns[0, :count].tolist(), strict=True))
    assert places == _places(height, width)
    expected = np.zeros((count, count), bool)
    for window in _windows(height, width):
        expected[np.ix_(window, window)] = True
    number = vision.window_numbers(rows, columns, SIDE)[0, :count]
    np.testing.assert_array_equal(number[:, None] == number, expected)


def test_pixels_are_normalised_by_channel():
    patch = np.repeat(np.array([0, 255, 51], np.uint8), 8)[None]
    expected = [(0 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    np.testing.assert_allclose(vision.normalise_pixels(jnp.asarray(patch)), np.repeat(expected, 8)[None], rtol=1e-6)


def _rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def _linear(x, parameters):
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def _plain_tower(parameters, patches, grid):
    """One frame: windows attend one after another, blocks one after another. float64 NumPy."""
    height, width = grid
    count, heads = height * width, CONFIG.num_heads
    mean, std = (np.repeat(values, CONFIG.patch_dim // 3) for values in (vision.PIXEL_MEAN, vision.PIXEL_STD))
    x = _linear((patches[:count] / 255 - mean) / std, parameters["patch_embed"]["proj"])
    inverse = 1 / CONFIG.rope_theta ** (np.arange(CONFIG.head_dim // 4) / (CONFIG.head_dim // 4))
    angles = np.array([[*(row * inverse), *(column * inverse)] for row, column in _places(height, width)])
    for i in range(CONFIG.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], parameters["blocks"])
        windows = [range(count)] if i in CONFIG.fullatt_block_indexes else _windows(height, width)
        qkv = _linear(_rms_norm(x, block["norm1"]["scale"]), block["attn"]["qkv"])
        query, key, value = qkv.reshape(count, 3, heads, -1).transpose(1, 2, 0, 3)
        half = CONFIG.head_dim // 2
        query, key = (
            np.concatenate([turned.real, turned.imag], axis=-1)
            for turned in ((y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angles) for y in (query, key))
        )
        attended = np.zeros((heads, count, CONFIG.head_dim))
        for window in windows:
            weights = np.exp(query[:, window] @ key[:, window].swapaxes(1, 2) / np.sqrt(CONFIG.head_dim))
            attended[:, window] = weights / weights.sum(-1, keepdims=True) @ value[:, window]
        x = x + _linear(attended.swapaxes(0, 1).reshape(count, -1), block["attn"]["proj"])
        normed = _rms_norm(x, block["norm2"]["scale"])
        gate = _linear(normed, block["mlp"]["gate_proj"])
        up = _linear(normed, block["mlp"]["up_proj"])
        x = x + _linear(gate / (1 + np.exp(-gate)) * up, block["mlp"]["down_proj"])
    merger = parameters["merger"]
    joined = _linear(_rms_norm(x, merger["ln_q"]["scale"]).reshape(count // 4, -1), merger["mlp_0"])
    return _linear(np.asarray(jax.nn.gelu(joined, approximate=False)), merger["mlp_2"])


def test_tower_equals_the_plain_one(tower):
    """Ragged frames in one call, each as it comes out alone; a padded frame is finite."""
    patches = np.random.default_rng(0).integers(0, 256, (len(GRIDS), 80, CONFIG.patch_dim), dtype=np.uint8)
    merged = np.asarray(jit(lambda tower, *args: tower(*args))(tower, patches, np.asarray(GRIDS, np.int32)))
    assert merged.shape == (len(GRIDS), 20, CONFIG.out_hidden_size)
    assert np.isfinite(merged).all()
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(tower)))
    for frame, grid in enumerate(GRIDS[:3]):
        expected = _plain_tower(parameters, patches[frame].astype(np.float64), grid)
        # Values are of order 1; float32 through three blocks.
        np.testing.assert_allclose(merged[frame, : len(expected)], expected, atol=2e-5)


def test_frames_do_not_see_each_other(tower):
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 256, (len(GRIDS), 80, CONFIG.patch_dim), dtype=np.uint8)
    encode = jit(lambda tower, *args: tower(*args))
    before = np.asarray(encode(tower, patches, np.asarray(GRIDS, np.int32)))
    patches[1] = 255 - patches[1]
    after = np.asarray(encode(tower, patches, np.asarray(GRIDS, np.int32)))
    np.testing.assert_array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))
    assert np.abs(after[1] - before[1]).max() > 1e-3
