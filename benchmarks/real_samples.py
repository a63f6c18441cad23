"""Training batches of the paper's shape without files: videos that move, questions of drawn words."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from videonsa_jax.configs import ModelConfig
from videonsa_jax.models.vision import patch_places
from videonsa_jax.streams import Batch, TrainBatch, Visual, split_streams

FRAMES, GRID = 225, (12, 20)  # grid steps, and patches of each along its height and width
TEXT_TOKENS, TEXT_BEFORE, ANSWER_TOKENS = 128, 24, 32


def moving_pattern(frames: int, grid: tuple[int, int], model: ModelConfig, seed: int) -> np.ndarray:
    """Patches [F, P, patch_dim] of a video of drifting gratings, with a little noise; uint8."""
    vision, draw = model.vision, np.random.default_rng(seed)
    patches = grid[0] * grid[1]
    rows, columns, _ = (np.asarray(x) for x in patch_places(jnp.asarray(grid), patches, vision.spatial_merge_size))
    inside = np.arange(vision.patch_size)
    y = (rows[:, None, None] * vision.patch_size + inside[:, None]).astype(np.float32)
    x = (columns[:, None, None] * vision.patch_size + inside).astype(np.float32)
    shape = (patches, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    video = np.empty((frames, *shape), np.uint8)
    waves = draw.uniform(-1, 1, (6, 4, vision.in_channels)).astype(np.float32)
    for frame in range(frames):
        for place in range(vision.temporal_patch_size):
            seconds = (frame * vision.temporal_patch_size + place) / 4
            for channel in range(vision.in_channels):
                a, b, c, d = waves[..., channel].T
                value = sum(np.sin(0.1 * (a[i] * x + b[i] * y) + c[i] * seconds + 6 * d[i]) for i in range(len(waves)))
                video[frame, :, channel, place] = np.clip(128 + 30 * value, 0, 255)
    noise = draw.integers(0, 8, video.shape[1:], dtype=np.uint8)
    return (video // 2 + noise).reshape(frames, patches, vision.patch_dim)


def real_shaped_batch(
    model: ModelConfig, contexts: int, questions: int, frames: int = FRAMES, grid: tuple[int, int] = GRID
) -> TrainBatch:
    """Contexts of one video each, with as many questions; the visual stream padded to whole blocks of 64."""
    vision, merge = model.vision, model.vision.spatial_merge_size
    tokens = frames * grid[0] * grid[1] // merge**2
    padded = -(-tokens // 64) * 64
    visual = Visual((frames, grid[0] // merge, grid[1] // merge), seconds_per_grid=vision.temporal_patch_size / 4)
    draw = np.random.default_rng(0)
    words = draw.integers(0, model.text.vocab_size, TEXT_TOKENS).tolist()
    split = split_streams(
        [words[:TEXT_BEFORE], visual, words[TEXT_BEFORE:]],
        tokens_per_second=model.text.tokens_per_second,
        mrope=model.mrope,
    )

    def visual_row(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - tokens)])[..., None, :]
        return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:-2], contexts, padded)), np.int32)

    def text_rows(x: np.ndarray) -> np.ndarray:
        x = x[..., None, None, :]
        return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:-3], contexts, questions, TEXT_TOKENS)), np.int32)

    # Rows of a context share what stands before their video.
    text_tokens = draw.integers(0, model.text.vocab_size, (contexts, questions, TEXT_TOKENS)).astype(np.int32)
    text_tokens[..., :TEXT_BEFORE] = text_tokens[:, :1, :TEXT_BEFORE]
    rows = (contexts, questions)
    videos = [moving_pattern(frames, grid, model, seed) for seed in range(contexts)]
    inputs = Batch(
        patches=np.stack(videos),
        frame_grids=np.broadcast_to(np.asarray(grid, np.int32), (contexts, frames, 2)).copy(),
        visual_source=visual_row(np.arange(tokens)),
        visual_positions=visual_row(split.visual_positions),
        visual_lengths=np.full(contexts, tokens, np.int32),
        visible_text=visual_row(split.visible_text),
        text_tokens=text_tokens,
        text_positions=text_rows(split.text_positions),
        text_lengths=np.full(rows, TEXT_TOKENS, np.int32),
        visible_visual=text_rows(split.visible_visual),
    )
    is_answer = np.arange(TEXT_TOKENS) >= TEXT_TOKENS - ANSWER_TOKENS
    return TrainBatch(
        inputs=inputs,
        targets=np.roll(text_tokens, -1, axis=-1),
        loss_weights=np.broadcast_to(is_answer, (*rows, TEXT_TOKENS)).astype(np.float32),
        sample_ids=np.arange(contexts * questions, dtype=np.int32).reshape(rows),
    )


def one_question(batch: TrainBatch, q: int) -> TrainBatch:
    """The same contexts with question `q` alone."""
    own = slice(q, q + 1)
    inputs = {name: getattr(batch.inputs, name)[:, own] for name in ("text_tokens", "text_lengths", "visible_visual")}
    inputs["text_positions"] = batch.inputs.text_positions[:, :, own]
    rows = {name: getattr(batch, name)[:, own] for name in ("targets", "loss_weights", "sample_ids")}
    return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, **inputs), **rows)
