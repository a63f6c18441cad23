"""Our modules against the outputs of transformers, recorded or made afresh (`make parity`).

Tolerances: float32 on both sides, sums in another order: 2e-5 for a module, 1e-4 for logits of order 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest
from conftest import RELEASES, Recorded, checkpoint
from parity_batch import in_sequence, jit, logits, make_batch, places, split

from videonsa_jax.checkpoints import load_model
from videonsa_jax.models import rope
from videonsa_jax.models.attention import AttentionOptions, visibility

MODULE, LOGITS = 2e-5, 1e-4


@functools.cache
def load(name, release):
    return load_model(checkpoint(name, release), "float32")


@pytest.fixture(params=cases.MODELS)
def recorded(request, release, outputs):
    return Recorded(request.param, RELEASES[release], outputs)


@pytest.fixture
def model(recorded, release):
    return load(recorded.model, release)


@pytest.mark.parametrize("case", cases.CASES)
def test_mrope_ids(recorded, case):
    row = split(case, recorded.mrope)
    ids = in_sequence(row, row.visual_positions.T, row.text_positions.T).T
    np.testing.assert_array_equal(ids, recorded[f"{case}/position_ids"])


def test_rotary_tables(recorded, model):
    row, text = split("videos", recorded.mrope), model.config.text
    ids = in_sequence(row, row.visual_positions.T, row.text_positions.T).T
    tables = rope.mrope_tables(jnp.asarray(ids), text.mrope_section, text.rope_theta)
    np.testing.assert_allclose(np.concatenate(tables, -1), recorded["videos/text_tables"], atol=MODULE)

    (_, height, width), _ = cases.grids("image")[0]
    groups = [(2 * row, 2 * column) for row in range(height) for column in range(width)]
    patches = np.array([(row + i, column + j) for row, column in groups for i in range(2) for j in range(2)])
    vision = model.config.vision
    tables = rope.grid_tables(*jnp.asarray(patches.T), vision.head_dim, vision.rope_theta)
    np.testing.assert_allclose(np.concatenate(tables, -1), recorded["image/vision_tables"], atol=MODULE)


def test_patch_embedding_and_merger(recorded, model):
    embedded = model.visual.patch_embed(jnp.asarray(recorded["image/patch_embed/in"]))
    np.testing.assert_allclose(embedded, recorded["image/patch_embed/out"], atol=MODULE)
    merged = model.visual.merger(jnp.asarray(recorded["image/merger/in"])[None])[0]
    np.testing.assert_allclose(merged, recorded["image/merger/out"], atol=MODULE)


def test_vision_tower(recorded, model):
    """One windowed block, one full block, and three mixed, on two videos of different size: every window is ragged."""
    batch = make_batch(["videos"], recorded.mrope)
    merged = np.asarray(jit(lambda tower, *args: tower(*args))(model.visual, batch.patches[0], batch.frame_grids[0]))
    is_video = [seconds > 0 for (frames, *_), seconds in cases.grids("videos") for _ in range(frames)]
    counts = np.prod(batch.frame_grids[0], -1) // 4
    videos = [merged[frame, : counts[frame]] for frame, video in enumerate(is_video) if video]
    np.testing.assert_allclose(np.concatenate(videos), recorded["videos/merged_videos"], atol=MODULE)


def test_decoder_layer(recorded, model):
    row = split("image", recorded.mrope)
    visual, text = places(row)
    hidden = recorded["image/layer_0/in"]
    layer = jax.tree.map(lambda stacked: stacked[0], model.decoder.layers)
    batch = make_batch(["image"], recorded.mrope)
    pad = functools.partial(np.pad, constant_values=3.0)
    streams = (
        jnp.asarray(pad(hidden[visual], [(0, batch.visual_source.shape[1] - len(visual)), (0, 0)]))[None],
        jnp.asarray(pad(hidden[text], [(0, batch.text_tokens.shape[2] - len(text)), (0, 0)]))[None, None],
    )

    @jit
    def apply(layer, streams, batch):
        return layer(streams, visibility(batch, model.config.text), AttentionOptions("dense"))

    visual_out, text_out = apply(layer, streams, batch)
    out = recorded["image/layer_0/out"]
    np.testing.assert_allclose(visual_out[0, : len(visual)], out[visual], atol=MODULE)
    np.testing.assert_allclose(text_out[0, 0, : len(text)], out[text], atol=MODULE)


def test_logits_in_one_batch(recorded, model):
    """All conversations as one padded batch: text only, an image, two videos and an image."""
    found = np.asarray(logits(model, make_batch(list(cases.CASES), recorded.mrope)))
    for b, case in enumerate(cases.CASES):
        expected = recorded[f"{case}/logits"]
        assert 0.3 < expected.std() < 3
        np.testing.assert_allclose(found[b, 0, : len(expected)], expected, atol=LOGITS)


def test_greedy_tokens(recorded, model):
    """Sixteen tokens of every conversation, each from a whole forward pass."""
    rows = [split(case, recorded.mrope) for case in cases.CASES]
    tokens: list[list[int]] = [[] for _ in rows]
    for _ in range(cases.NEW_TOKENS):
        found = logits(model, make_batch(list(cases.CASES), recorded.mrope, tokens))
        for b, row in enumerate(rows):
            tokens[b].append(int(np.argmax(found[b, 0, len(row.text_tokens) + len(tokens[b]) - 1])))
    assert tokens == [recorded[f"{case}/greedy"].tolist() for case in cases.CASES]


def test_every_release_option_differs_here():
    """The conversation of two videos tells the four rules apart, so agreement above is agreement with the right one."""
    rules = ("qwen2_5_vl", "int_seconds", "transformers_5_3", "transformers_5_21")
    rows = {rule: split("videos", rule) for rule in rules}
    ids = {np.concatenate([row.visual_positions, row.text_positions], -1).tobytes() for row in rows.values()}
    assert len(ids) == 4
