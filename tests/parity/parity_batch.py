"""The conversations of parity_cases as our batches."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import parity_cases as cases

from videonsa_jax.models import VideoNSA
from videonsa_jax.streams import Batch, SplitRow, Visual, split_streams

# Every batch is padded to these, so that a model is compiled once.
FRAMES, PATCHES, VISUAL, TEXT = 8, 80, 104, 34


def split(case: str, mrope: str) -> SplitRow:
    visuals = iter([Visual(grid, seconds) for grid, seconds in cases.grids(case)])
    parts = [next(visuals) if run is None else run for run in cases.text_runs(case)]
    return split_streams(parts, tokens_per_second=float(cases.TOKENS_PER_SECOND), mrope=mrope)


def places(row: SplitRow) -> tuple[np.ndarray, np.ndarray]:
    """Where the visual and the text tokens stand in the sequence."""
    visual = np.arange(len(row.visible_text)) + row.visible_text
    text = np.arange(len(row.text_tokens)) + row.visible_visual
    return visual, text


def in_sequence(row: SplitRow, visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Interleaves what the two streams hold along their first axis."""
    visual_places, text_places = places(row)
    sequence = np.zeros((len(visual_places) + len(text_places), *text.shape[1:]), text.dtype)
    sequence[visual_places], sequence[text_places] = visual, text
    return sequence


def make_batch(selected: Sequence[str], mrope: str, generated: Sequence[Sequence[int]] | None = None) -> Batch:
    """A context for each case; each one's `generated` tokens follow its text."""
    B, vision = len(selected), (FRAMES, PATCHES)
    generated = [()] * B if generated is None else generated
    batch = Batch(
        patches=np.full((B, *vision, cases.PATCH_DIM), 77, np.uint8),
        frame_grids=np.zeros((B, FRAMES, 2), np.int32),
        visual_source=np.zeros((B, VISUAL), np.int32),
        visual_positions=np.full((3, B, VISUAL), 5, np.int32),
        visual_lengths=np.zeros(B, np.int32),
        visible_text=np.full((B, VISUAL), 2, np.int32),
        text_tokens=np.full((B, 1, TEXT), 9, np.int32),
        text_positions=np.full((3, B, 1, TEXT), 5, np.int32),
        text_lengths=np.zeros((B, 1), np.int32),
        visible_visual=np.full((B, 1, TEXT), 3, np.int32),
    )
    for b, case in enumerate(selected):
        row, frame, token = split(case, mrope), 0, 0
        for ((frames, height, width), _), pixels in zip(cases.grids(case), cases.pixels(case), strict=True):
            for patches in pixels.reshape(frames, -1, cases.PATCH_DIM):
                batch.patches[b, frame, : len(patches)] = patches
                batch.frame_grids[b, frame] = 2 * height, 2 * width
                merged = height * width
                batch.visual_source[b, token : token + merged] = frame * (PATCHES // 4) + np.arange(merged)
                frame, token = frame + 1, token + merged
        batch.visual_lengths[b] = token
        batch.visual_positions[:, b, :token] = row.visual_positions
        batch.visible_text[b, :token] = row.visible_text
        count, end = len(row.text_tokens), len(row.text_tokens) + len(generated[b])
        batch.text_lengths[b] = end
        batch.text_tokens[b, 0, :count] = row.text_tokens
        batch.text_tokens[b, 0, count:end] = generated[b]
        batch.text_positions[:, b, 0, :count] = row.text_positions
        # Also in 5.x, whose `rope_deltas` would go on past a video that outlasts its text: its generate() does not.
        batch.text_positions[:, b, 0, count:end] = row.text_positions[:, -1:] + 1 + np.arange(len(generated[b]))
        batch.visible_visual[b, 0, :count] = row.visible_visual
        batch.visible_visual[b, 0, count:end] = token
    return batch


# These tests compile much and compute little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def logits(model: VideoNSA, batch: Batch) -> jax.Array:
    return model(batch).logits
