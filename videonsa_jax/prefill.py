"""Prefill: from planned conversations to a filled key/value cache, in pieces of bounded memory.

With NSA, visual tokens see no text: the visual stream goes first, in chunks, and the text after it. With dense
attention they see the text before them: a text token goes with the chunk that holds the last visual token it sees, so
that every token finds all that it sees in the cache or in its own piece.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import AttentionOptions
from videonsa_jax.models.cache import KVCache, Piece, TextCache, VisualCache
from videonsa_jax.models.vision import VisionTower
from videonsa_jax.processor import Processor, Prompt
from videonsa_jax.streams import Batch

PATCHES_PER_CALL = 16_384  # of the vision tower: 64 frames of 64 tokens
_PATCH_MULTIPLE = 64
_LEAST_VISUAL, _LEAST_TEXT = 64, 32


def bucket(size: int, least: int) -> int:
    """The smallest of a few sizes, four an octave, that holds `size`: a program is compiled once for each."""
    if size <= least:
        return least
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def chunk_width(visual_tokens: int, chunk_size: int) -> int:
    """Visual tokens of a chunk: `chunk_size`, or less where they all fit into one."""
    if visual_tokens == 0:
        return 0
    return min(bucket(visual_tokens, _LEAST_VISUAL), chunk_size)


def visual_capacity(visual_tokens: int, width: int) -> int:
    """Places for visual tokens in a cache that is filled in chunks of `width`."""
    return bucket(-(-visual_tokens // width), 1) * width if width else 0


def cut(batch: Batch, width: int, *, interleaved: bool) -> list[Piece]:
    """The pieces of a batch, in the order in which they go through the model.

    Args:
      batch: NumPy arrays; patches are not read.
      width: visual tokens of a chunk; 0 where there are none.
      interleaved: each text token goes with the chunk that holds the last visual token it sees (dense attention); else
        all text makes the last piece.
    """
    chunks = -(-int(batch.visual_lengths.max()) // width) if width else 0
    visual_positions, visible_text = (
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(chunks * width - x.shape[-1], 0))])
        for x in (batch.visual_positions, batch.visible_text)
    )
    is_token = np.arange(batch.text_tokens.shape[-1]) < batch.text_lengths[..., None]
    if interleaved and chunks:
        piece_of = np.maximum(batch.visible_visual - 1, 0) // width
    else:
        piece_of = np.full(batch.visible_visual.shape, chunks)
    count = max(chunks, int(piece_of.max(where=is_token, initial=-1)) + 1)
    pieces, start = [], np.zeros_like(batch.text_lengths)
    for index in range(count):
        stop = (is_token & (piece_of <= index)).sum(axis=-1).astype(np.int32)
        longest = int((stop - start).max())
        text = np.minimum(
            start[..., None] + np.arange(bucket(longest, _LEAST_TEXT) if longest else 0),
            batch.text_tokens.shape[-1] - 1,
        )
        visual = slice(index * width, (index + 1) * width if index < chunks else index * width)
        pieces.append(
            Piece(
                visual_positions=visual_positions[:, :, visual],
                visible_text=visible_text[:, visual],
                visual_offset=np.asarray(index * width, np.int32),
                visual_lengths=batch.visual_lengths,
                text_tokens=np.take_along_axis(batch.text_tokens, text, axis=-1),
                text_positions=np.take_along_axis(batch.text_positions, text[None], axis=-1),
                visible_visual=np.take_along_axis(batch.visible_visual, text, axis=-1),
                text_offsets=start,
                text_lengths=stop,
            )
        )
        start = stop
    return pieces


def text_capacity(pieces: Sequence[Piece], new_tokens: int) -> int:
    """Places for text tokens in a cache that takes these pieces, with their padding, and `new_tokens` more."""
    padded = max(int(piece.text_offsets.max()) + piece.text_tokens.shape[-1] for piece in pieces)
    return bucket(max(padded, int(pieces[-1].text_lengths.max()) + new_tokens), 4 * _LEAST_TEXT)


@jax.jit
def _encode_frames(
    tower: VisionTower, patches: UInt8[Array, "F P patch_dim"], frame_grids: Int[Array, "F 2"]
) -> Float[Array, "F merged hidden"]:
    return tower(patches, frame_grids)


def _encoded_media(
    tower: VisionTower, patches: UInt8[np.ndarray, "t P patch_dim"], grid: tuple[int, int, int]
) -> Iterator[Float[Array, "L hidden"]]:
    """One video's or image's tokens, some frames at a time; patches of a frame and frames of a call are padded."""
    merge = tower.config.spatial_merge_size
    frame_grid = (merge * grid[1], merge * grid[2])
    count, used, dim = patches.shape
    padded = -(-used // _PATCH_MULTIPLE) * _PATCH_MULTIPLE
    at_once = min(max(PATCHES_PER_CALL // padded, 1), 1 << (count - 1).bit_length())
    for start in range(0, count, at_once):
        frames = patches[start : start + at_once]
        call = np.zeros((at_once, padded, dim), np.uint8)
        call[: len(frames), :used] = frames
        grids = np.zeros((at_once, 2), np.int32)
        grids[: len(frames)] = frame_grid
        tokens = _encode_frames(tower, call, grids)[: len(frames), : used // merge**2]
        yield tokens.reshape(-1, tokens.shape[-1])


def embed_media(
    model: VideoNSA, processor: Processor, prompts: Sequence[Prompt], capacity: int
) -> Float[Array, "B Lv hidden"]:
    """Reads the pixels of every prompt and encodes them, unpadded sizes first, memory bounded by `PATCHES_PER_CALL`.

    Args:
      model: its vision tower is used.
      processor: reads the pixels.
      prompts: one per context.
      capacity: length of the result; what no token fills is 0.

    Raises:
      MediaError: a file cannot be decoded.
    """
    rows = []
    for prompt in prompts:
        pieces = [
            piece
            for media in prompt.media
            for piece in _encoded_media(model.visual, processor.patches(media), media.visual.grid)
        ]
        filled = sum(len(piece) for piece in pieces)
        pieces.append(jnp.zeros((capacity - filled, model.config.text.hidden_size), model.dtype))
        rows.append(jnp.concatenate(pieces))
    return jnp.stack(rows)


def _last_hidden(
    hidden: Float[Array, "B Q Lt hidden"], piece: Piece, before: Float[Array, "B Q hidden"]
) -> Float[Array, "B Q hidden"]:
    """Each row's last text token so far."""
    if hidden.shape[2] == 0:
        return before
    count = piece.text_lengths - piece.text_offsets
    place = jnp.maximum(count - 1, 0)[..., None, None]
    return jnp.where((count > 0)[..., None], jnp.take_along_axis(hidden, place, axis=2)[:, :, 0], before)


@functools.partial(jax.jit, static_argnames=("options", "is_whole"), donate_argnames="cache")
def _visual_step(
    model: VideoNSA,
    visual: Float[Array, "B S hidden"],
    piece: Piece,
    cache: KVCache,
    last: Float[Array, "B Q hidden"],
    *,
    options: AttentionOptions,
    is_whole: bool,
) -> tuple[Float[Array, "B Q hidden"], KVCache]:
    width = piece.visual_positions.shape[2]
    visual = jax.lax.dynamic_slice_in_dim(visual, piece.visual_offset, width, axis=1)
    hidden, cache = model.extend(visual, piece, cache, options, is_whole=is_whole)
    return _last_hidden(hidden, piece, last), cache


@functools.partial(jax.jit, static_argnames=("options", "is_whole"), donate_argnames="text")
def _text_step(
    model: VideoNSA,
    piece: Piece,
    visual: VisualCache,
    text: TextCache,
    last: Float[Array, "B Q hidden"],
    *,
    options: AttentionOptions,
    is_whole: bool,
) -> tuple[Float[Array, "B Q hidden"], TextCache]:
    # The visual half is not donated: an encoded video is used again.
    nothing = jnp.zeros((len(piece.visual_lengths), 0, model.config.text.hidden_size), model.dtype)
    hidden, cache = model.extend(nothing, piece, KVCache(visual, text), options, is_whole=is_whole)
    return _last_hidden(hidden, piece, last), cache.text


def run_pieces(
    model: VideoNSA,
    pieces: Sequence[Piece],
    cache: KVCache,
    visual: Float[Array, "B S hidden"] | None,
    options: AttentionOptions,
    *,
    is_whole: bool = False,
) -> tuple[Float[Array, "B Q hidden"], KVCache]:
    """Runs pieces in order.

    Args:
      model: the model.
      pieces: from `cut`.
      cache: empty, or filled by the pieces before. Its text half is donated; so is its visual half where a piece holds
        visual tokens.
      visual: `embed_media`'s tokens; None where no piece holds visual tokens.
      options: see `AttentionOptions`.
      is_whole: there is one piece, which is not to be cut (see `cache.extend`).

    Returns:
      Final-normed hidden state of each row's last text token, and the cache.
    """
    rows = pieces[0].text_lengths.shape
    last = jnp.zeros((*rows, model.config.text.hidden_size), model.dtype)
    for piece in pieces:
        if piece.visual_positions.shape[2]:
            last, cache = _visual_step(model, visual, piece, cache, last, options=options, is_whole=is_whole)
        else:
            last, text = _text_step(model, piece, cache.visual, cache.text, last, options=options, is_whole=is_whole)
            cache = KVCache(cache.visual, text)
    return last, cache
