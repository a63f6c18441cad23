"""The key/value cache of the two streams, and the decoder run on one piece of a conversation after another.

A piece holds some visual tokens, some text tokens, or both: prefill in chunks, and one text token a row for decoding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from videonsa_jax.configs import TextConfig
from videonsa_jax.models import rope
from videonsa_jax.models.attention import AttentionOptions, TextKV, Visibility, VisualKV
from videonsa_jax.models.decoder import Decoder, DecoderLayer, Hidden
from videonsa_jax.models.layers import scan_stack
from videonsa_jax.streams import ArrayLike, register_pytree

# Keys (after M-RoPE) and values of every layer.
type VisualCache = tuple[Float[Array, "layers B visual_places N D"], Float[Array, "layers B visual_places N D"]]
type TextCache = tuple[Float[Array, "layers B Q text_places N D"], Float[Array, "layers B Q text_places N D"]]


@register_pytree
@dataclass(frozen=True)
class KVCache:
    """Keys (after M-RoPE) and values of every layer; what lies past a stream's length means nothing.

    The Q text rows of a context share its visual keys and values.

    Attributes:
      visual: keys and values, each `[layers, B, Sv, N, D]`.
      text: keys and values, each `[layers, B, Q, St, N, D]`.
    """

    visual: VisualCache
    text: TextCache


@register_pytree
@dataclass(frozen=True)
class Piece:
    """The next tokens of both streams, with what `streams.Batch` says of them; either stream may be of length 0.

    Attributes:
      visual_positions: M-RoPE ids of the visual tokens.
      visible_text: text tokens before each visual token (dense attention only).
      visual_offset: visual tokens in the cache, the same in every context.
      visual_lengths: valid visual tokens of the whole conversation.
      text_tokens: token ids.
      text_positions: M-RoPE ids of the text tokens.
      visible_visual: visual tokens before each text token.
      text_offsets: text tokens in the cache.
      text_lengths: valid text tokens, those in the cache and of this piece.
    """

    visual_positions: Int[ArrayLike, "3 B Lv"]
    visible_text: Int[ArrayLike, "B Lv"]
    visual_offset: Int[ArrayLike, ""]
    visual_lengths: Int[ArrayLike, "B"]
    text_tokens: Int[ArrayLike, "B Q Lt"]
    text_positions: Int[ArrayLike, "3 B Q Lt"]
    visible_visual: Int[ArrayLike, "B Q Lt"]
    text_offsets: Int[ArrayLike, "B Q"]
    text_lengths: Int[ArrayLike, "B Q"]

    def places(self, config: TextConfig) -> Visibility:
        """What attention needs of the piece."""
        return Visibility(
            visual_tables=rope.mrope_tables(self.visual_positions, config.mrope_section, config.rope_theta),
            text_tables=rope.mrope_tables(self.text_positions, config.mrope_section, config.rope_theta),
            ids_differ=jnp.any(self.visual_positions != self.visual_positions[:1], axis=0),
            visual_lengths=self.visual_lengths,
            text_lengths=self.text_lengths,
            visible_visual=self.visible_visual,
            visible_text=self.visible_text,
            visual_offset=self.visual_offset,
            text_offsets=self.text_offsets,
        )


def empty_cache(
    config: TextConfig, contexts: int, rows: int, visual_capacity: int, text_capacity: int, dtype: DTypeLike
) -> KVCache:
    """A zeroed cache with places for so many visual tokens a context and text tokens a row."""

    def pair(*sizes: int) -> tuple[Array, Array]:
        shape = (config.num_hidden_layers, *sizes, config.num_key_value_heads, config.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    return KVCache(pair(contexts, visual_capacity), pair(contexts, rows, text_capacity))


def _write_visual(cached: VisualCache, new: VisualKV, layer: int | Array, offset: Array) -> VisualCache:
    """Puts one layer's keys and values [B, L, N, D] at `offset` of the visual stream."""
    return tuple(
        jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), (layer, 0, offset, 0, 0))
        for whole, part in zip(cached, new, strict=True)
    )


def _write_text(cached: TextCache, new: TextKV, layer: int | Array, offsets: Int[Array, "B Q"]) -> TextCache:
    """Puts one layer's keys and values [B, Q, L, N, D] at each row's own offset of the text stream."""
    place = jax.vmap(jax.vmap(lambda row, part, offset: jax.lax.dynamic_update_slice(row, part, (offset, 0, 0))))

    def write(whole: Array, part: Array) -> Array:
        of_layer = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(whole, place(of_layer, part.astype(whole.dtype), offsets), layer, 0)

    return tuple(write(whole, part) for whole, part in zip(cached, new, strict=True))


def extend(
    decoder: Decoder,
    hidden: Hidden,
    cache: KVCache,
    places: Visibility,
    options: AttentionOptions,
    *,
    is_whole: bool = False,
) -> tuple[Float[Array, "B Q Lt hidden"], KVCache]:
    """Runs the decoder on the next piece of both streams, which sees what is cached and is added to it.

    The visual stream needs keys and values only in the last layer, as in `DecoderLayer`.

    Args:
      decoder: all layers.
      hidden: the piece; either stream may be of length 0. Its offset and length must fit the cache.
      cache: of the pieces before; where the piece leaves a stream alone, that half is only read.
      places: of the piece: its offsets, and each stream's length with the piece.
      options: see `AttentionOptions`.
      is_whole: the piece is all of both streams: its own keys and values are attended to, not the cache's, as a
        dialect must that cannot be cut into pieces.

    Returns:
      The text hidden states of the piece after the last layer, and the cache with the piece.
    """
    writes_visual, writes_text = hidden[0].shape[1] > 0, hidden[1].shape[2] > 0
    # What is only read stays out of the loop's carry: a carry is copied unless it was donated.
    visual = cache.visual if writes_visual else None
    text = cache.text if writes_text else None

    def run(layer: DecoderLayer, carry: tuple, index: int | Array, *, update_visual: bool = True) -> tuple:
        hidden, visual, text = carry
        normed, new_visual, new_text = layer.project(hidden, places)
        if writes_visual:
            # Behind a barrier: XLA would fuse the write into the reads below, and these would then need the cache as it
            # was, that is a copy of all of it in every layer.
            visual = jax.lax.optimization_barrier(_write_visual(visual, new_visual, index, places.visual_offset))
        if writes_text:
            text = _write_text(text, new_text, index, places.text_offsets)
        visual_kv, text_kv = (
            (new_visual, new_text)
            if is_whole
            else (
                tuple(jax.lax.dynamic_index_in_dim(whole, index, keepdims=False) for whole in pair)
                for pair in (visual or cache.visual, text or cache.text)
            )
        )
        hidden = layer.update(hidden, normed, visual_kv, text_kv, places, options, update_visual=update_visual)
        return hidden, visual, text

    last = cache.visual[0].shape[0] - 1
    carry = scan_stack(run, decoder.layers, (hidden, visual, text), jnp.arange(last), remat=decoder.remat)
    (_, hidden_text), visual, text = run(decoder.last_layer, carry, last, update_visual=False)
    return hidden_text, KVCache(visual or cache.visual, text or cache.text)
