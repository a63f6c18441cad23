"""The two token streams of a sample and their M-RoPE ids.

A conversation's tokens are split once into a visual stream and a text stream (docs/architecture.md, "Two streams").
Data loading and generation both build their inputs here. NumPy only: loader workers import this file.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from videonsa_jax.configs import MropeConvention

type ArrayLike = np.ndarray | Array

BATCH_AXIS_SECOND = ("visual_positions", "text_positions")  # every other field of Batch starts with B


@dataclass(frozen=True)
class Visual:
    """Where a video or image stands in a conversation.

    Attributes:
      grid: (time, height, width) in tokens, that is after temporal patching and spatial merging.
      seconds_per_grid: seconds of video between consecutive temporal positions; 0 for an image.
    """

    grid: tuple[int, int, int]
    seconds_per_grid: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Visual tokens of this item."""
        return int(np.prod(self.grid))


@dataclass(frozen=True)
class SplitRow:
    """One conversation, split into its two streams (unpadded).

    Attributes:
      text_tokens: token ids of the text stream, in order.
      text_positions: M-RoPE ids (time, height, width) of the text tokens.
      visible_visual: how many visual tokens precede each text token.
      visual_positions: M-RoPE ids of the visual tokens.
      visible_text: how many text tokens precede each visual token (used by dense attention only).
    """

    text_tokens: Int[np.ndarray, "Lt"]
    text_positions: Int[np.ndarray, "3 Lt"]
    visible_visual: Int[np.ndarray, "Lt"]
    visual_positions: Int[np.ndarray, "3 Lv"]
    visible_text: Int[np.ndarray, "Lv"]


def _visual_ids(visual: Visual, tokens_per_second: float, convention: MropeConvention) -> Int[np.ndarray, "3 L"]:
    seconds = visual.seconds_per_grid
    if convention in ("int_seconds", "transformers_5_3"):
        seconds = float(int(seconds))
    frames, height, width = visual.grid
    # In float32, as torch multiplies: where the product should be whole, float64 can round to the other side.
    times = np.arange(frames, dtype=np.float32) * np.float32(seconds)
    time_ids = np.floor(times * np.float32(tokens_per_second)).astype(np.int32)
    ids = np.meshgrid(time_ids, np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in ids])


def split_streams(
    parts: Sequence[Sequence[int] | np.ndarray | Visual],
    *,
    tokens_per_second: float,
    mrope: MropeConvention = "qwen2_5_vl",
) -> SplitRow:
    """Splits a conversation into its two streams with their M-RoPE ids.

    Args:
      parts: the conversation in order: runs of text token ids, and a `Visual` where a video or image stands.
      tokens_per_second: M-RoPE temporal ids per second (`TextConfig.tokens_per_second`).
      mrope: which release's rule to follow. "qwen2_5_vl" (transformers 4.49, with which the weights were trained):
        temporal id floor(k x seconds x tokens_per_second), text continues past the largest id of all three axes.
        "int_seconds" (4.57): seconds per grid are truncated to an integer first. "transformers_5_3": truncated
        too, and text continues at start + max(height, width). "transformers_5_21": exact seconds, text as in 5.3.

    Returns:
      The two streams; every array is int32.
    """
    tokens, text_ids, visible_visual, visual_ids, visible_text = [], [], [], [], []
    next_id = text_seen = visual_seen = 0
    for part in parts:
        if isinstance(part, Visual):
            ids = _visual_ids(part, tokens_per_second, mrope)
            visual_ids.append(next_id + ids)
            visible_text.append(np.full(part.num_tokens, text_seen, np.int32))
            visual_seen += part.num_tokens
            if mrope in ("transformers_5_3", "transformers_5_21"):
                next_id += max(part.grid[1:])
            elif part.num_tokens:
                next_id += int(ids.max()) + 1
        else:
            count = len(part)
            tokens.append(np.asarray(part, np.int32))
            text_ids.append(np.tile(next_id + np.arange(count, dtype=np.int32), (3, 1)))
            visible_visual.append(np.full(count, visual_seen, np.int32))
            next_id += count
            text_seen += count

    def join(arrays: list[np.ndarray], empty_shape: tuple[int, ...]) -> np.ndarray:
        return np.concatenate(arrays, axis=-1).astype(np.int32) if arrays else np.zeros(empty_shape, np.int32)

    return SplitRow(
        text_tokens=join(tokens, (0,)),
        text_positions=join(text_ids, (3, 0)),
        visible_visual=join(visible_visual, (0,)),
        visual_positions=join(visual_ids, (3, 0)),
        visible_text=join(visible_text, (0,)),
    )


def register_pytree[Cls: type](cls: Cls) -> Cls:
    """Makes a frozen dataclass of arrays a pytree, each field a child under its name.

    As `jax.tree_util.register_dataclass`, but rebuilding skips `__init__`: jax rebuilds with shapes, shardings or None
    in the place of arrays, which the shape checks of `__init__` (on while tests run) would refuse.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten_with_keys(value):
        return tuple((jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names), None

    def flatten(value):
        return tuple(getattr(value, name) for name in names), None

    def unflatten(_, children):
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@register_pytree
@dataclass(frozen=True)
class Batch:
    """What the model reads: B visual contexts, each with Q text rows. Both streams are right-padded.

    Frames enter the vision tower one temporal grid position at a time: F frames a context, P patches a frame, in
    Qwen's order (the patches of one 2x2 merge group are consecutive), each patch flattened as
    (channel, frame of the pair, row, column). Pixels are uint8; the model rescales and normalises them.

    Attributes:
      patches: pixels of every patch; padding is arbitrary.
      frame_grids: (height, width) of each frame in patches; (0, 0) for padding.
      visual_source: for each visual token its place in the flattened [F * P / 4] merged tokens; 0 for padding.
      visual_positions: M-RoPE ids of the visual stream.
      visual_lengths: valid visual tokens.
      visible_text: text tokens before each visual token (in row 0; for dense attention only).
      text_tokens: token ids of the text stream.
      text_positions: M-RoPE ids of the text stream.
      text_lengths: valid text tokens; 0 for a row that only fills up.
      visible_visual: visual tokens before each text token.
    """

    patches: UInt8[ArrayLike, "B F P patch_dim"]
    frame_grids: Int[ArrayLike, "B F 2"]
    visual_source: Int[ArrayLike, "B Lv"]
    visual_positions: Int[ArrayLike, "3 B Lv"]
    visual_lengths: Int[ArrayLike, "B"]
    visible_text: Int[ArrayLike, "B Lv"]
    text_tokens: Int[ArrayLike, "B Q Lt"]
    text_positions: Int[ArrayLike, "3 B Q Lt"]
    text_lengths: Int[ArrayLike, "B Q"]
    visible_visual: Int[ArrayLike, "B Q Lt"]


@register_pytree
@dataclass(frozen=True)
class TrainBatch:
    """A `Batch` with what the loss needs.

    Attributes:
      inputs: the model's input.
      targets: the token that should follow each text token.
      loss_weights: 1 where the target is an answer token, else 0; a replaced (failed) row is all 0.
      sample_ids: the record index of each text row, -1 where a row only fills up.
    """

    inputs: Batch
    targets: Int[ArrayLike, "B Q Lt"]
    loss_weights: Float[ArrayLike, "B Q Lt"]
    sample_ids: Int[ArrayLike, "B Q"]


def slice_batch(batch: Batch, rows: slice) -> Batch:
    """The contexts `rows` of a batch, every field cut along its batch axis."""
    cut = {}
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        cut[field.name] = value[:, rows] if field.name in BATCH_AXIS_SECOND else value[rows]
    return Batch(**cut)
