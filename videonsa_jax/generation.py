"""Answers to questions about videos and images: prefill, then one token a step, on a cache of both streams."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32
from tokenizers.decoders import DecodeStream

from videonsa_jax.data.chat import Chat
from videonsa_jax.data.media import Media
from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import AttentionOptions, Implementation
from videonsa_jax.models.cache import KVCache, Piece, TextCache, VisualCache, empty_cache
from videonsa_jax.prefill import (
    chunk_width,
    cut,
    embed_media,
    run_pieces,
    text_capacity,
    visual_capacity,
)
from videonsa_jax.processor import (
    Messages,
    Processor,
    ProcessorError,
    Prompt,
    check_visual_ids,
    is_conversation,
)
from videonsa_jax.sampling import Sampling, check_sampling, greedy, sample
from videonsa_jax.streams import Batch

CHUNK_SIZE = 4096  # visual tokens of a prefill piece

type OnToken = Callable[[int, int, str], None]

_told: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class EncodedVisual:
    """The visual stream of a conversation, encoded: any number of questions can be asked on it.

    It holds every layer's keys and values of the visual tokens, 57 344 bytes a token for VideoNSA-7B in bfloat16.

    Attributes:
      keys_values: each `[layers, 1, Sv, N, D]`, in the model's dtype.
      positions: M-RoPE ids of the visual tokens.
      media: what was encoded, in order.
      fingerprint: of the weights, the configuration (with it the dialect) and the dtype it was encoded with.
    """

    keys_values: VisualCache
    positions: Int[np.ndarray, "3 Lv"]
    media: tuple[Media, ...]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Visual tokens."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Device memory it holds, the padding of its last chunk included."""
        return sum(array.nbytes for array in self.keys_values)

    def __repr__(self) -> str:
        shown = ", ".join(item.source for item in self.media)
        return f"EncodedVisual({shown}: {self.num_tokens} tokens, {self.nbytes / 2**20:.1f} MiB)"


class _ByOperation(dict):
    """A choice of implementations that can be part of a program's identity."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))


def _options(kind: str, implementation: Implementation) -> AttentionOptions:
    chosen = _ByOperation(implementation) if isinstance(implementation, Mapping) else implementation
    return AttentionOptions(kind, chosen)


def _is_released(model: VideoNSA) -> bool:
    return model.config.nsa is not None and model.config.nsa.dialect == "released"


@jax.jit
def _leaf_sums(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    """Two sums of every array's bits, each weighted by place, so that a change of one value or of two's order shows."""

    def sums(leaf: Array) -> Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        place = jnp.uint32(1)
        for axis in range(leaf.ndim):
            place = place * jnp.uint32(2_654_435_761) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed = (bits ^ place) * jnp.uint32(2_246_822_519)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3_266_489_917)
        return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed >> 16 ^ place, dtype=jnp.uint32)])

    return [sums(leaf) for leaf in leaves]


def _fingerprint(model: VideoNSA) -> str:
    digest = hashlib.sha256(repr((model.config, np.dtype(model.dtype).name)).encode())
    for sums in jax.device_get(_leaf_sums(jax.tree.leaves(nnx.state(model, nnx.Param)))):
        digest.update(sums.tobytes())
    return digest.hexdigest()


def encode_visual(
    model: VideoNSA,
    processor: Processor,
    messages: Messages,
    *,
    implementation: Implementation = None,
    chunk_size: int = CHUNK_SIZE,
    **options: object,
) -> EncodedVisual:
    """Encodes the videos and images of a conversation once, for `generate(..., visual=)`.

    Exact, because NSA's visual tokens see no text: only their M-RoPE ids depend on it, by its length.

    Args:
      model: with NSA in its dialect "paper".
      processor: the model's.
      messages: one conversation, with the text that will stand before and between its videos and images.
      implementation: backend of the attention operations: None (the best for the device), a name, or a dict per
        operation.
      chunk_size: visual tokens that go through the decoder at a time.
      **options: the processor's: fps, min_pixels, max_pixels, max_frames, total_pixels.

    Raises:
      ValueError: the model's visual tokens see text (no NSA, or the dialect "released"), the conversation shows
        nothing, or what the processor raises.
    """
    if model.config.nsa is None or _is_released(model):
        reason = "is dense (nsa=None)" if model.config.nsa is None else 'has the dialect "released"'
        raise ValueError(
            f"encode_visual: the model {reason}: what its visual tokens hold depends on the question's text"
        )
    if not is_conversation(messages):
        raise ProcessorError("encode_visual takes one conversation, got a list of them")
    (prompt,) = processor.plan(messages, **options)
    if not prompt.num_visual_tokens:
        raise ProcessorError("the conversation shows no video or image, expected at least one to encode")
    batch = processor.collate([prompt], pixels=False)
    cache, pieces, embeddings = _prepare(model, processor, [prompt], batch, chunk_size, 0, interleaved=False)
    visual_pieces = [piece for piece in pieces if piece.visual_positions.shape[2]]
    _, cache = run_pieces(model, visual_pieces, cache, embeddings, _options("nsa", implementation))
    return EncodedVisual(
        keys_values=cache.visual,
        positions=prompt.rows[0].visual_positions,
        media=tuple(dataclasses.replace(item, frames=_no_pixels) for item in prompt.media),
        fingerprint=_fingerprint(model),
    )


def _no_pixels() -> np.ndarray:
    raise ProcessorError("an encoded video's pixels are not kept, expected its encoding to be used")


def _prepare(
    model: VideoNSA,
    processor: Processor,
    prompts: Sequence[Prompt],
    batch: Batch,
    chunk_size: int,
    new_tokens: int,
    *,
    interleaved: bool,
) -> tuple[KVCache, list[Piece], Float[Array, "B S hidden"] | None]:
    """An empty cache, the pieces that fill it, and the visual tokens."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 visual token")
    longest = int(batch.visual_lengths.max())
    width = chunk_width(longest, chunk_size)
    capacity = visual_capacity(longest, width)
    pieces = cut(batch, width, interleaved=interleaved)
    contexts, rows = batch.text_lengths.shape
    text = text_capacity(pieces, new_tokens) if new_tokens else 0
    cache = empty_cache(model.config.text, contexts, rows, capacity, text, model.dtype)
    return cache, pieces, embed_media(model, processor, prompts, capacity) if longest else None


def _check_encoded(model: VideoNSA, visual: EncodedVisual, prompt: Prompt) -> None:
    if visual.fingerprint != _fingerprint(model):
        raise ValueError("visual was encoded with other weights or another configuration, expected this model's")
    shown, expected = ([item.source for item in items] for items in (prompt.media, visual.media))
    if shown != expected:
        raise ProcessorError(f"the messages show {shown}, expected {expected}, which `visual` encodes")
    for index, row in enumerate(prompt.rows):
        check_visual_ids(f"conversation {index}", row.visual_positions, visual.positions)


@functools.partial(jax.jit, static_argnames="is_greedy")
def _choose(
    model: VideoNSA, hidden: Float[Array, "B Q hidden"], sampling: Sampling, step: Int[Array, ""], *, is_greedy: bool
) -> Int[Array, "B Q"]:
    logits = model.logits(hidden)
    return greedy(logits) if is_greedy else sample(logits, sampling, step)


@functools.partial(jax.jit, static_argnames=("options", "is_greedy"), donate_argnames="text")
def _decode_step(
    model: VideoNSA,
    visual: VisualCache,
    text: TextCache,
    tokens: Int[Array, "B Q"],
    first_position: Int[Array, "B Q"],
    visual_lengths: Int[Array, "B"],
    text_lengths: Int[Array, "B Q"],
    step: Int[Array, ""],
    sampling: Sampling,
    *,
    options: AttentionOptions,
    is_greedy: bool,
) -> tuple[Int[Array, "B Q"], Int[Array, ""], TextCache]:
    """Feeds every row's token number `step` and chooses the next; a generated token is text and sees all before it."""
    (contexts, rows), hidden_size = tokens.shape, model.config.text.hidden_size
    nothing = jnp.zeros((3, contexts, 0), jnp.int32)
    piece = Piece(
        visual_positions=nothing,
        visible_text=nothing[0],
        visual_offset=jnp.int32(0),
        visual_lengths=visual_lengths,
        text_tokens=tokens[..., None],
        text_positions=jnp.broadcast_to(first_position + step, (3, contexts, rows))[..., None],
        visible_visual=jnp.broadcast_to(visual_lengths[:, None, None], (contexts, rows, 1)),
        text_offsets=text_lengths + step,
        text_lengths=text_lengths + step + 1,
    )
    no_visual = jnp.zeros((contexts, 0, hidden_size), model.dtype)
    hidden, cache = model.extend(no_visual, piece, KVCache(visual, text), options)
    logits = model.logits(hidden[:, :, 0])
    step = step + 1
    return (greedy(logits) if is_greedy else sample(logits, sampling, step)), step, cache.text


def _decode(
    model: VideoNSA,
    cache: KVCache,
    last: Float[Array, "B Q hidden"],
    batch: Batch,
    max_new_tokens: int,
    sampling: Sampling,
    options: AttentionOptions,
    *,
    is_greedy: bool,
) -> Iterator[Int[np.ndarray, "B Q"]]:
    """Yields the next token of every row, `max_new_tokens` times; the step after it runs meanwhile."""
    is_text = np.arange(batch.text_tokens.shape[-1]) < batch.text_lengths[..., None]
    # Past the row's text, also in the rules that let a video's ids exceed it: so does transformers' generate(),
    # although the `rope_deltas` of 5.x go past the video (tests/parity compares tokens).
    of_text = batch.text_positions.max(axis=(0, 3), where=is_text, initial=-1)
    first_position = jnp.asarray(of_text + 1, jnp.int32)
    lengths = jnp.asarray(batch.visual_lengths), jnp.asarray(batch.text_lengths)
    step = jnp.int32(0)
    tokens, text = _choose(model, last, sampling, step, is_greedy=is_greedy), cache.text
    for index in range(max_new_tokens):
        shown = tokens
        if index == 0:
            yield np.asarray(shown)  # before the next step, which may have to be compiled
        if index + 1 < max_new_tokens:
            tokens, step, text = _decode_step(
                model,
                cache.visual,
                text,
                tokens,
                first_position,
                *lengths,
                step,
                sampling,
                options=options,
                is_greedy=is_greedy,
            )
        if index > 0:
            yield np.asarray(shown)


class _Answer:
    """One row's tokens as they come, and the text that they make."""

    def __init__(self, chat: Chat):
        self.chat, self.tokens, self.is_done = chat, [], False
        self.stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Takes a token; returns the text that it completes (characters may take several tokens)."""
        self.tokens.append(token)
        return self.stream.step(self.chat.tokenizer, token) or ""

    def text(self) -> str:
        """All of it."""
        return self.chat.decode(self.tokens)


def _tell_unread_fields(processor: Processor) -> None:
    fields = processor.unread_generation_fields
    if fields and fields not in _told:
        _told.add(fields)
        warnings.warn(
            f"generation_config.json: {', '.join(fields)} not read; generate's own arguments decide "
            "(temperature, top_p, top_k), EOS ids are honoured",
            stacklevel=3,
        )


def generate(
    model: VideoNSA,
    processor: Processor,
    messages: Messages,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    visual: EncodedVisual | None = None,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    group: bool = False,
    attention: str | None = None,
    implementation: Implementation = None,
    chunk_size: int = CHUNK_SIZE,
    **options: object,
) -> str | list[str]:
    """Answers conversations.

    Args:
      model: the model.
      processor: the model's.
      messages: one conversation, or a list of them, as the processor takes them.
      max_new_tokens: most tokens of an answer.
      temperature: 0 is greedy; else what the logits are divided by before sampling.
      visual: from `encode_visual`: its videos and images are not encoded again. Conversations show the same ones in
        the same places, or {"type": "video"} without a video for them; several are rows of this one visual context.
      top_p: sampling keeps the likeliest tokens that reach this probability together.
      top_k: sampling keeps this many of the likeliest tokens; 0 keeps all.
      seed: of sampling.
      stop_tokens: ids that end an answer; None: the processor's, every EOS id of generation_config.json.
      on_token: called with (row, token id, text that it completes) for every token of an answer, as it comes.
      group: the conversations are rows of one visual context, as in the processor.
      attention: "nsa", "dense" or None, as in `VideoNSA.text_hidden`.
      implementation: backend of the attention operations, as there.
      chunk_size: visual tokens that go through the decoder at a time; bounds the memory of prefill.
      **options: the processor's: fps, min_pixels, max_pixels, max_frames, total_pixels, add_generation_prompt.

    Returns:
      The answer, or a list of them for a list of conversations; without the stop token.

    Raises:
      ValueError: an argument out of range, `visual` of another model or with other M-RoPE ids than these messages
        give it, and what the processor raises.
    """
    if max_new_tokens < 1 or int(max_new_tokens) != max_new_tokens:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected a whole number of at least 1")
    sampling = check_sampling(temperature, top_p, top_k, seed)
    is_single = is_conversation(messages)
    group = group or (visual is not None and not is_single)
    prompts = processor.plan(messages, group=group, encoded=visual and visual.media, **options)
    kind = model.attention_kind(attention, len(prompts[0].rows))
    _tell_unread_fields(processor)
    batch = processor.collate(prompts, pixels=False)
    is_whole = kind == "nsa" and _is_released(model)
    if is_whole:
        chunk_size = max(int(batch.visual_lengths.max()), 1)
    run = _options(kind, implementation)
    if visual is None:
        interleaved = kind == "dense" or is_whole
        cache, pieces, embeddings = _prepare(
            model, processor, prompts, batch, chunk_size, max_new_tokens, interleaved=interleaved
        )
        last, cache = run_pieces(model, pieces, cache, embeddings, run, is_whole=is_whole)
    else:
        if kind != "nsa":
            raise ValueError(f'visual was encoded with NSA, expected attention "nsa" or None, got {attention!r}')
        _check_encoded(model, visual, prompts[0])
        pieces = cut(batch, chunk_width(visual.num_tokens, chunk_size), interleaved=False)[-1:]
        places = text_capacity(pieces, max_new_tokens)
        text = empty_cache(model.config.text, *batch.text_lengths.shape, 0, places, model.dtype).text
        last, cache = run_pieces(model, pieces, KVCache(visual.keys_values, text), None, run)

    stops = frozenset(processor.stop_tokens if stop_tokens is None else stop_tokens)
    answers = [_Answer(processor.chat) for _ in range(batch.text_lengths.size)]
    dense = _options("dense", implementation)  # a generated token is text, in every dialect
    for tokens in _decode(model, cache, last, batch, max_new_tokens, sampling, dense, is_greedy=temperature == 0):
        for row, (answer, token) in enumerate(zip(answers, tokens.reshape(-1).tolist(), strict=True)):
            if answer.is_done:
                continue
            answer.is_done = token in stops
            if not answer.is_done:
                text = answer.add(token)
                if on_token is not None:
                    on_token(row, token, text)
        if all(answer.is_done for answer in answers):
            break
    texts = [answer.text() for answer in answers]
    return texts[0] if is_single else texts
