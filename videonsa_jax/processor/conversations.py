"""The processor: conversations with text, images and videos to the arrays that the model reads.

It holds the tokenizer, chat template and image settings of a Hugging Face model folder, and the folder's files as they
were, so that saving gives them back byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.chat import Chat
from videonsa_jax.data.frames import MAX_PIXELS, MIN_PIXELS, VideoError, frames_to_patches
from videonsa_jax.data.media import Limits, Media, MediaError, lay_out_frames, make_limits, plan_media
from videonsa_jax.streams import Batch, SplitRow, Visual, split_streams

VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 3136, 50_176  # of a frame: VideoNSA's training setting, 64 tokens of 28 x 28
MAX_VISUAL_TOKENS = 131_072  # 128K, the longest context that the paper evaluates

GENERATION_CONFIG = "generation_config.json"
# Its fields that say nothing about how tokens are chosen.
_INERT = ("_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "eos_token_id")

type Messages = Any  # a conversation, or a list of them, from outside: what it holds is checked here


class ProcessorError(ValueError):
    """A folder or a conversation cannot be used: one sentence says what was found and what was expected."""


@dataclass(frozen=True)
class Prompt:
    """One visual context with its text rows, unpadded.

    Attributes:
      rows: the streams of each conversation; their visual halves coincide.
      media: its videos and images, in order, pixels still to be read.
    """

    rows: tuple[SplitRow, ...]
    media: tuple[Media, ...]

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of the visual stream."""
        return self.rows[0].visual_positions.shape[1]


@dataclass(frozen=True)
class Processor:
    """Makes batches of conversations; see `__call__`.

    Attributes:
      chat: tokenizer and chat template.
      config: of the model: patch sizes and the rule for M-RoPE ids.
      files: the model folder's processor files, as they were read.
      image_min_pixels: lower limit of a resized image's area.
      image_max_pixels: upper limit of a resized image's area.
      max_visual_tokens: longer conversations are refused before anything is decoded.
      decode_seconds: wall time allowed for reading one video.
    """

    chat: Chat
    config: ModelConfig
    files: Mapping[str, bytes] = field(repr=False)
    image_min_pixels: int = MIN_PIXELS
    image_max_pixels: int = MAX_PIXELS
    max_visual_tokens: int = MAX_VISUAL_TOKENS
    decode_seconds: float = 300.0

    @cached_property
    def generation_config(self) -> dict:
        """The fields of generation_config.json; empty without one."""
        return json_file(self.files, GENERATION_CONFIG)

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: every EOS id of generation_config.json, or <|im_end|> and <|endoftext|>."""
        ids = self.generation_config.get("eos_token_id")
        if ids is None:
            names = ("<|im_end|>", "<|endoftext|>")
            return tuple(self.chat.special_ids[name] for name in names if name in self.chat.special_ids)
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ProcessorError(f"{GENERATION_CONFIG}: eos_token_id is {ids!r}, expected a token id or a list of them")
        return tuple(ids)

    @property
    def unread_generation_fields(self) -> tuple[str, ...]:
        """Fields of generation_config.json that `generate` leaves alone: what it is called with decides."""
        return tuple(name for name in self.generation_config if name not in _INERT)

    def __call__(
        self,
        messages: Messages,
        group: bool = False,
        fps: float | int = 4.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_frames: int | None = None,
        total_pixels: int | None = None,
        add_generation_prompt: bool = True,
    ) -> Batch:
        """Reads and tokenises conversations.

        Args:
          messages: one conversation, a list of {"role", "content": text or a list of items}, or a list of such. An item
            is {"type": "text", "text"}, {"type": "video", "video": path, or frames [F, H, W, 3] uint8 that are already
            sampled} or {"type": "image", "image": path, PIL image or [H, W, 3] uint8}. Any number of them may stand
            anywhere. An item's own fps, min_pixels, max_pixels, max_frames and total_pixels win over the arguments
            below.
          group: the conversations are the Q text rows of one visual context, which all of them show; else each is a
            context (B).
          fps: frames sampled per second of video; the rate of a frames array.
          min_pixels: least area of a resized frame or image; None: 3136 for videos, preprocessor_config.json's for
            images.
          max_pixels: largest area of a resized frame or image; None: 50176 for videos, preprocessor_config.json's for
            images.
          max_frames: most sampled frames of a video; longer ones are sampled uniformly. None: 4096.
          total_pixels: most visual tokens of a video, times 28 x 28; its frames shrink to fit. None: no such limit.
          add_generation_prompt: end with the header of the assistant's turn.

        Returns:
          A batch of NumPy arrays, padded to its longest row.

        Raises:
          ProcessorError, ChatError, MediaError: (all ValueErrors) the messages, a file or an array cannot be used, or
            the conversation is longer than `max_visual_tokens`.
        """
        options = {"fps": fps, "min_pixels": min_pixels, "max_pixels": max_pixels, "max_frames": max_frames}
        prompts = self.plan(
            messages, group=group, total_pixels=total_pixels, add_generation_prompt=add_generation_prompt, **options
        )
        return self.collate(prompts)

    def plan(
        self,
        messages: Messages,
        *,
        group: bool = False,
        fps: float | int = 4.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_frames: int | None = None,
        total_pixels: int | None = None,
        add_generation_prompt: bool = True,
        encoded: Sequence[Media] | None = None,
    ) -> list[Prompt]:
        """Tokenises conversations and plans their media from headers; no pixels are read.

        Args:
          messages: as in `__call__`; so are the arguments not named here.
          group: see there.
          fps: see there.
          min_pixels: see there.
          max_pixels: see there.
          max_frames: see there.
          total_pixels: see there.
          add_generation_prompt: see there.
          encoded: media that a {"type": "video"} or {"type": "image"} without content stands for, by place.

        Returns:
          One prompt per context.

        Raises:
          ProcessorError, ChatError, MediaError: as `__call__`.
        """
        conversations = _conversations(messages, group)
        given = {
            "fps": fps,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "max_frames": max_frames,
            "total_pixels": total_pixels,
        }
        given = {name: value for name, value in given.items() if value is not None}
        limits = {
            kind: make_limits(**default | given, decode_seconds=self.decode_seconds)
            for kind, default in (
                ("video", {"min_pixels": VIDEO_MIN_PIXELS, "max_pixels": VIDEO_MAX_PIXELS}),
                ("image", {"min_pixels": self.image_min_pixels, "max_pixels": self.image_max_pixels}),
            )
        }
        planned = [
            self._plan_conversation(conversation, limits, add_generation_prompt, encoded)
            for conversation in conversations
        ]
        if not group:
            return [Prompt((row,), media) for row, media in planned]
        for index, (row, media) in enumerate(planned):
            _check_same_context(index, row, media, *planned[0])
        return [Prompt(tuple(row for row, _ in planned), planned[0][1])]

    def _plan_conversation(
        self,
        messages: Messages,
        limits: Mapping[str, Limits],
        add_generation_prompt: bool,
        encoded: Sequence[Media] | None,
    ) -> tuple[SplitRow, tuple[Media, ...]]:
        if not messages:
            raise ProcessorError("messages is empty, expected at least one message")
        media: list[Media] = []
        for place, item in _media_items(messages):
            if encoded is not None and len(media) < len(encoded) and item.keys() == {"type"}:
                media.append(encoded[len(media)])
                continue
            try:
                media.append(plan_media(item, limits[item["type"]], self.config.vision))
            except MediaError as error:
                raise MediaError(f"message {place}: {error}") from error
        visuals = [item.visual for item in media]
        tokens = sum(visual.num_tokens for visual in visuals)
        if tokens > self.max_visual_tokens:
            raise ProcessorError(
                f"the conversation shows {tokens} visual tokens, expected at most {self.max_visual_tokens}: lower fps, "
                "max_frames, max_pixels or total_pixels"
            )
        rendered = self.chat.render(messages, visuals, add_generation_prompt=add_generation_prompt)
        return self._split(rendered.parts), tuple(media)

    def _split(self, parts: list[list[int] | Visual]) -> SplitRow:
        if self.config.nsa is not None and self.config.nsa.dialect == "released":
            # The published evaluation does not pass the rate on: every video counts as one of 2 frames a second.
            seconds = self.config.vision.temporal_patch_size / 2.0
            parts = [
                dataclasses.replace(part, seconds_per_grid=seconds)
                if isinstance(part, Visual) and part.seconds_per_grid
                else part
                for part in parts
            ]
        return split_streams(parts, tokens_per_second=self.config.text.tokens_per_second, mrope=self.config.mrope)

    def patches(self, media: Media) -> UInt8[np.ndarray, "t P patch_dim"]:
        """Reads the pixels of planned media, as patches of every temporal grid position.

        Raises:
          MediaError: the file cannot be decoded.
        """
        vision = self.config.vision
        try:
            frames = media.frames()
        except VideoError as error:
            raise MediaError(str(error)) from error
        return frames_to_patches(
            frames,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    def collate(self, prompts: Sequence[Prompt], *, pixels: bool = True) -> Batch:
        """Pads prompts to a batch; without `pixels` it holds no frames.

        Raises:
          MediaError: a file cannot be decoded.
        """
        vision, merge = self.config.vision, self.config.vision.spatial_merge_size
        B, Q = len(prompts), len(prompts[0].rows)
        Lt = max(len(row.text_tokens) for prompt in prompts for row in prompt.rows)
        Lv = max(prompt.num_visual_tokens for prompt in prompts)
        grids = [[media.visual.grid for media in prompt.media if pixels] for prompt in prompts]
        F = max(sum(t for t, _, _ in of_prompt) for of_prompt in grids)
        P = max((h * w * merge**2 for of_prompt in grids for _, h, w in of_prompt), default=0)

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int32)

        batch = Batch(
            patches=np.zeros((B, F, P, vision.patch_dim), np.uint8),
            frame_grids=zeros(B, F, 2),
            visual_source=zeros(B, Lv),
            visual_positions=zeros(3, B, Lv),
            visual_lengths=zeros(B),
            visible_text=zeros(B, Lv),
            text_tokens=zeros(B, Q, Lt),
            text_positions=zeros(3, B, Q, Lt),
            text_lengths=zeros(B, Q),
            visible_visual=zeros(B, Q, Lt),
        )
        for b, prompt in enumerate(prompts):
            if pixels:
                items = [
                    (self.patches(media), (merge * media.visual.grid[1], merge * media.visual.grid[2]))
                    for media in prompt.media
                ]
                fields = ("patches", "frame_grids", "visual_source")
                lay_out_frames(items, merge**2, {name: getattr(batch, name)[b] for name in fields})
            count = prompt.num_visual_tokens
            batch.visual_lengths[b] = count
            batch.visual_positions[:, b, :count] = prompt.rows[0].visual_positions
            batch.visible_text[b, :count] = prompt.rows[0].visible_text
            for q, row in enumerate(prompt.rows):
                length = len(row.text_tokens)
                batch.text_lengths[b, q] = length
                batch.text_tokens[b, q, :length] = row.text_tokens
                batch.text_positions[:, b, q, :length] = row.text_positions
                batch.visible_visual[b, q, :length] = row.visible_visual
        return batch


def is_conversation(messages: Messages) -> bool:
    """Whether `messages` is one conversation rather than a list of them.

    Raises:
      ProcessorError: it is empty, or neither.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ProcessorError(f"messages is {str(messages)[:60]!r}, expected a list of messages or of conversations")
    if not messages:
        raise ProcessorError("messages is empty, expected at least one message")
    return not isinstance(messages[0], list | tuple)


def _conversations(messages: Messages, group: bool) -> Sequence[Messages]:
    if is_conversation(messages):
        if group:
            raise ProcessorError("group=True needs a list of conversations, got one conversation")
        return [messages]
    mixed = next((entry for entry in messages if not isinstance(entry, list | tuple)), None)
    if mixed is not None:
        raise ProcessorError(f"messages holds {str(mixed)[:60]!r} among conversations, expected conversations only")
    return messages


def _media_items(messages: Messages) -> list[tuple[int, Mapping]]:
    """(message, item) of every video and image; whatever else is wrong with messages, the chat template says."""
    return [
        (place, item)
        for place, message in enumerate(messages)
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        for item in message["content"]
        if isinstance(item, Mapping) and item.get("type") in ("video", "image")
    ]


def _check_same_context(
    index: int, row: SplitRow, media: Sequence[Media], first_row: SplitRow, first_media: Sequence[Media]
) -> None:
    shown, expected = ([item.source for item in items] for items in (media, first_media))
    if shown != expected:
        raise ProcessorError(f"conversation {index} shows {shown}, expected {expected} as conversation 0 of its group")
    check_visual_ids(f"conversation {index}", row.visual_positions, first_row.visual_positions)


def check_visual_ids(name: str, positions: np.ndarray, expected: np.ndarray) -> None:
    """Raises a ProcessorError unless two visual streams have the same M-RoPE ids `[3, Lv]`."""
    if positions.shape != expected.shape:
        raise ProcessorError(
            f"{name} has {positions.shape[1]} visual tokens, expected the {expected.shape[1]} of its context"
        )
    differing = np.flatnonzero((positions != expected).any(axis=0))
    if differing.size:
        first = differing[0]
        raise ProcessorError(
            f"{name} gives visual token {first} the M-RoPE ids {positions[:, first].tolist()}, expected "
            f"{expected[:, first].tolist()}: rows of one visual context need equally long text before it"
        )


def json_file(files: Mapping[str, bytes], name: str) -> dict:
    """The object in one of a folder's JSON files; empty where there is no such file.

    Raises:
      ProcessorError: it is not a JSON object.
    """
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ProcessorError(f"{name}: {error}, expected JSON") from error
    if not isinstance(value, dict):
        raise ProcessorError(f"{name}: holds a {type(value).__name__}, expected a JSON object")
    return value
