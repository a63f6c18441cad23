"""One context to arrays, and arrays padded and stacked into batches of a bucket's shape."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.chat import Chat
from videonsa_jax.data.config import Ablation, DataConfig
from videonsa_jax.data.frame_cache import FrameCache
from videonsa_jax.data.frames import VideoError, frames_to_patches
from videonsa_jax.data.media import lay_out_frames
from videonsa_jax.data.records import Record
from videonsa_jax.data.sources import Context
from videonsa_jax.data.video import decode_video
from videonsa_jax.streams import BATCH_AXIS_SECOND, ArrayLike, Batch, TrainBatch, Visual, register_pytree, split_streams

type Arrays = dict[str, np.ndarray]

_FILL = {"sample_ids": -1, "option_tokens": -1, "answer_option": -1}  # every other field is filled up with zeros


@register_pytree
@dataclass(frozen=True)
class EvalBatch:
    """A `Batch` of questions, each ending where the answer begins, with what scoring their options needs.

    Attributes:
      inputs: the model's input.
      option_tokens: the first token of each option; -1 where a question has fewer.
      answer_option: which option is right; -1 where a row only fills up.
      answer_position: the text token whose logits predict the answer's first token.
      sample_ids: the record index of each text row, -1 where a row only fills up.
    """

    inputs: Batch
    option_tokens: Int[ArrayLike, "B Q O"]
    answer_option: Int[ArrayLike, "B Q"]
    answer_position: Int[ArrayLike, "B Q"]
    sample_ids: Int[ArrayLike, "B Q"]


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch.

    Attributes:
      contexts: B, rows of this process.
      questions: Q.
      text_tokens: Lt.
      visual_tokens: Lv.
      frames: F.
      patches: P.
      patch_dim: values in a patch.
      options: O of an `EvalBatch`; 0 makes a `TrainBatch`.
    """

    contexts: int
    questions: int
    text_tokens: int
    visual_tokens: int
    frames: int
    patches: int
    patch_dim: int
    options: int = 0


@dataclass(frozen=True)
class TextRow:
    """The text stream of one record.

    Attributes:
      sample_id: its record's index.
      tokens: token ids.
      positions: M-RoPE ids.
      visible_visual: visual tokens before each text token.
      is_answer: tokens that the loss counts.
      option_tokens: first token of each option.
      answer_option: index of the right option, -1 without options.
    """

    sample_id: int
    tokens: Int[np.ndarray, "L"]
    positions: Int[np.ndarray, "3 L"]
    visible_visual: Int[np.ndarray, "L"]
    is_answer: Bool[np.ndarray, "L"]
    option_tokens: tuple[int, ...]
    answer_option: int


@dataclass(frozen=True)
class Example:
    """One context, unpadded.

    Attributes:
      patches: pixels of every patch.
      frame_grid: (height, width) of its frames in patches.
      visual_positions: M-RoPE ids of the visual stream.
      visible_text: text tokens before each visual token, in the first row.
      rows: its records.
    """

    patches: UInt8[np.ndarray, "t P patch_dim"]
    frame_grid: tuple[int, int]
    visual_positions: Int[np.ndarray, "3 L"]
    visible_text: Int[np.ndarray, "L"]
    rows: tuple[TextRow, ...]


def ablate(frames: UInt8[np.ndarray, "F H W 3"], ablation: Ablation, sample_id: str) -> UInt8[np.ndarray, "F H W 3"]:
    """Removes information from sampled frames; what is drawn depends on `sample_id` alone.

    "single_frame" shows one frame, drawn uniformly, throughout; "shuffled_frames" permutes them. Positions stay.
    """
    draw = np.random.default_rng(zlib.crc32(sample_id.encode()))
    if ablation == "single_frame":
        return np.broadcast_to(frames[draw.integers(len(frames))], frames.shape)
    if ablation == "shuffled_frames":
        return frames[draw.permutation(len(frames))]
    return frames


def text_row(
    record: Record, visual: Visual | None, chat: Chat, model: ModelConfig, *, answered: bool
) -> tuple[TextRow, Int[np.ndarray, "3 Lv"], Int[np.ndarray, "Lv"]]:
    """A record's text stream, with the visual stream's M-RoPE ids and its `visible_text`.

    Args:
      record: the record.
      visual: its video's grid; None leaves the video out (its two delimiters stay).
      chat: tokenises.
      model: gives the M-RoPE rule.
      answered: the whole conversation; else the first question and the header of an answer.
    """
    placeholder = visual or Visual(grid=(0, 0, 0))
    rendered = chat.render(record.messages(answered=answered), [placeholder], add_generation_prompt=not answered)
    split = split_streams(rendered.parts, tokens_per_second=model.text.tokens_per_second, mrope=model.mrope)
    row = TextRow(
        sample_id=record.index,
        tokens=split.text_tokens,
        positions=split.text_positions,
        visible_visual=split.visible_visual,
        is_answer=rendered.answer,
        option_tokens=tuple(chat.encode(option)[0] for option in record.options),
        answer_option=record.options.index(record.answer) if record.options else -1,
    )
    return row, split.visual_positions, split.visible_text


def _sampled_frames(context: Context, config: DataConfig, factor: int) -> UInt8[np.ndarray, "F H W 3"]:
    sampling = {
        "fps": config.fps,
        "max_frames": config.max_frames,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "factor": factor,
        "resize": config.resize,
        "expected": context.info,
    }

    def decode() -> UInt8[np.ndarray, "F H W 3"]:
        return decode_video(context.video, seconds_limit=config.decode_seconds, **sampling).frames

    if config.frame_cache_gigabytes == 0:
        return decode()
    cache = _frame_cache(config.cache_dir, config.frame_cache_gigabytes)
    return cache.frames(context.video, tuple(sampling.items()), decode)


@functools.cache
def _frame_cache(cache_dir: str, gigabytes: float) -> FrameCache:
    return FrameCache(Path(cache_dir) / "frames", int(gigabytes * 1e9))


def build_example(
    context: Context, records: Sequence[Record], chat: Chat, config: DataConfig, model: ModelConfig, *, answered: bool
) -> Example:
    """Decodes a context's video and tokenises its records.

    Args:
      context: the context.
      records: all records of the index.
      chat: tokenises.
      config: sampling, limits and ablation; "text_only" does not open the video.
      model: patch sizes and the M-RoPE rule.
      answered: rows hold whole conversations (training) or end where the answer begins (evaluation).

    Raises:
      VideoError: the video cannot be used.
    """
    if context.problem:
        raise VideoError(context.problem)
    vision, shows = model.vision, config.ablation != "text_only"
    built = [
        text_row(records[index], context.visual if shows else None, chat, model, answered=answered)
        for index in context.records
    ]
    patches = np.zeros((0, 0, vision.patch_dim), np.uint8)
    if shows:
        frames = _sampled_frames(context, config, vision.pixels_per_token)
        patches = frames_to_patches(
            ablate(frames, config.ablation, records[context.records[0]].id),
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )
    _, height, width = context.visual.grid
    _, visual_positions, visible_text = built[0]
    return Example(
        patches=patches,
        frame_grid=(height * vision.spatial_merge_size, width * vision.spatial_merge_size),
        visual_positions=visual_positions,
        visible_text=visible_text,
        rows=tuple(row for row, _, _ in built),
    )


def empty_arrays(shape: BatchShape) -> Arrays:
    """Every field of a batch whose rows all fill up: no tokens, no weights."""
    B, Q, Lt, Lv, F = shape.contexts, shape.questions, shape.text_tokens, shape.visual_tokens, shape.frames
    sizes = {
        "frame_grids": (B, F, 2),
        "visual_source": (B, Lv),
        "visual_positions": (3, B, Lv),
        "visual_lengths": (B,),
        "visible_text": (B, Lv),
        "text_tokens": (B, Q, Lt),
        "text_positions": (3, B, Q, Lt),
        "text_lengths": (B, Q),
        "visible_visual": (B, Q, Lt),
        "sample_ids": (B, Q),
    }
    if shape.options:
        sizes |= {"option_tokens": (B, Q, shape.options), "answer_option": (B, Q), "answer_position": (B, Q)}
    else:
        sizes |= {"targets": (B, Q, Lt)}
    arrays = {name: np.full(size, _FILL.get(name, 0), np.int32) for name, size in sizes.items()}
    arrays["patches"] = np.zeros((B, F, shape.patches, shape.patch_dim), np.uint8)
    if not shape.options:
        arrays["loss_weights"] = np.zeros((B, Q, Lt), np.float32)
    return arrays


def _row(arrays: Mapping[str, np.ndarray], row: int) -> Arrays:
    """Views of one context's part of every field."""
    return {name: value[:, row] if name in BATCH_AXIS_SECOND else value[row, ...] for name, value in arrays.items()}


def clear_row(arrays: Mapping[str, np.ndarray], row: int) -> None:
    """Makes row `row` one that only fills up."""
    for name, value in _row(arrays, row).items():
        value[...] = _FILL.get(name, 0)


def clear_context(batch: TrainBatch | EvalBatch, row: int) -> None:
    """Makes context `row` of a batch of NumPy arrays one that only fills up."""
    own = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "inputs"}
    clear_row(vars(batch.inputs) | own, row)


def fill_row(arrays: Mapping[str, np.ndarray], row: int, example: Example) -> None:
    """Writes an example into row `row` of arrays that `empty_arrays` made."""
    target = _row(arrays, row)
    count = example.visual_positions.shape[1]
    patches_per_token = example.patches.shape[0] * example.patches.shape[1] // count if count else 1
    lay_out_frames([(example.patches, example.frame_grid)], patches_per_token, target)
    target["visual_positions"][:, :count] = example.visual_positions
    target["visual_lengths"][...] = count
    target["visible_text"][:count] = example.visible_text
    for q, text in enumerate(example.rows):
        length = len(text.tokens)
        target["text_tokens"][q, :length] = text.tokens
        target["text_positions"][:, q, :length] = text.positions
        target["text_lengths"][q] = length
        target["visible_visual"][q, :length] = text.visible_visual
        target["sample_ids"][q] = text.sample_id
        if "targets" in target:
            target["targets"][q, : length - 1] = text.tokens[1:]
            target["loss_weights"][q, : length - 1] = text.is_answer[1:]
        else:
            target["option_tokens"][q, : len(text.option_tokens)] = text.option_tokens
            target["answer_option"][q] = text.answer_option
            target["answer_position"][q] = length - 1


def as_batch(arrays: Mapping[str, np.ndarray]) -> TrainBatch | EvalBatch:
    """The batch whose fields `arrays` holds."""
    kind = TrainBatch if "targets" in arrays else EvalBatch
    inputs = Batch(**{field.name: arrays[field.name] for field in fields(Batch)})
    return kind(inputs=inputs, **{field.name: arrays[field.name] for field in fields(kind) if field.name != "inputs"})


def pad_and_stack(examples: Sequence[Example | None], shape: BatchShape) -> TrainBatch | EvalBatch:
    """Examples of one bucket as a batch of exactly `shape`; None and missing ones become zero-weight rows.

    Args:
      examples: at most `shape.contexts`; none longer than `shape`.
      shape: the batch's sizes.
    """
    arrays = empty_arrays(shape)
    for row, example in enumerate(examples):
        if example is not None:
            fill_row(arrays, row, example)
    return as_batch(arrays)
