"""Records to contexts, contexts to buckets.

Everything here follows from the JSON, the configuration and (where records do not state them) the videos' headers, so
that all hosts of a run hold the same index.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.buckets import Bucket, choose_buckets
from videonsa_jax.data.chat import Chat
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.frames import VideoError, VideoInfo, frames_at
from videonsa_jax.data.media import Limits, video_grid
from videonsa_jax.data.records import DataError, Record
from videonsa_jax.data.video import probe_video
from videonsa_jax.data.video_index import IndexedVideo
from videonsa_jax.streams import Visual

logger = logging.getLogger("videonsa_jax.data")

LENGTH_MULTIPLE, TEXT_MULTIPLE = 16, 8

type Probe = Callable[[Sequence[str]], Sequence[VideoInfo | str]]


@dataclass(frozen=True)
class Context:
    """A video with the records that share its visual stream.

    Attributes:
      video: path of the video.
      records: indices of its records, at most Q.
      info: what the video should hold; None if it could not be read.
      visual: its token grid and seconds per grid.
      bucket: index into the buckets.
      problem: why it could not be read, if so.
    """

    video: str
    records: tuple[int, ...]
    info: VideoInfo | None
    visual: Visual
    bucket: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Index:
    """Every context of a split with its bucket, and what was left out.

    Attributes:
      records: those that its contexts hold.
      contexts: in file order.
      buckets: by rising visual length.
      text_tokens: Lt, the same for all batches.
      text_tokens_held: the sum of its records' own text lengths.
      dropped: records left out, by reason.
      dropped_videos: videos left out with all their records, by reason.
    """

    records: tuple[Record, ...]
    contexts: tuple[Context, ...]
    buckets: tuple[Bucket, ...]
    text_tokens: int
    text_tokens_held: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_videos: Mapping[str, int] = field(default_factory=dict)


_EMPTY = Visual(grid=(0, 0, 0))


def probe_videos(paths: Sequence[str]) -> list[VideoInfo | str]:
    """Reads the headers of videos; for one that cannot be read, the sentence that says why."""

    def probe(path: str) -> VideoInfo | str:
        try:
            return probe_video(path)
        except VideoError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:  # waiting for files, mostly
        return list(threads.map(probe, paths))


def _visual(info: VideoInfo, config: DataConfig, model: ModelConfig) -> Visual:
    limits = Limits(config.min_pixels, config.max_pixels, config.fps, config.max_frames)
    return video_grid(info, limits, model.vision)


@dataclass(frozen=True)
class Padding:
    """Which share of what batches hold only fills up, over an epoch.

    Attributes:
      visual_tokens: of the visual stream.
      patches: of the vision tower's input.
      text_tokens: of the text stream, questions that a context lacks included.
      rows: of the contexts, where a bucket's last batch is not full.
    """

    visual_tokens: float
    patches: float
    text_tokens: float
    rows: float


def padding(index: Index, config: DataConfig, merged_patches: int) -> Padding:
    """The shares of padding of an index; rows that only fill up are not in the others."""
    tokens, patches, held_tokens, held_patches = 0, 0, 0, 0
    for context in index.contexts:
        bucket = index.buckets[context.bucket]
        tokens, patches = tokens + bucket.visual_tokens, patches + bucket.frames * bucket.patches
        held_tokens += context.visual.num_tokens
        held_patches += math.prod(context.visual.grid) * merged_patches
    sizes = Counter(context.bucket for context in index.contexts)
    rows = sum(-(-size // config.contexts_per_batch) * config.contexts_per_batch for size in sizes.values())
    text_tokens = len(index.contexts) * config.questions_per_context * index.text_tokens
    return Padding(
        visual_tokens=1 - held_tokens / tokens,
        patches=1 - held_patches / patches,
        text_tokens=1 - index.text_tokens_held / text_tokens,
        rows=1 - len(index.contexts) / rows,
    )


def _video_infos(
    groups: Mapping[str, Sequence[Record]], indexed: Mapping[str, IndexedVideo] | None, probe: Probe
) -> dict[str, VideoInfo | str]:
    """What videos hold, by the video index, their records, or a probe; a sentence for one that cannot be read."""
    stated = {video: next((record.info for record in group if record.info), None) for video, group in groups.items()}
    if indexed is not None:
        measured = {video: indexed[video] for video in groups if video in indexed}
        stated |= {video: entry.info or entry.problem for video, entry in measured.items()}
    unknown = [video for video, info in stated.items() if info is None]
    if unknown and indexed is not None:
        raise DataError(
            f"the video index lacks {len(unknown)} of {len(groups)} videos, such as {unknown[0]}: python -m "
            "experiments.index with the same config goes on building it"
        )
    return stated | (dict(zip(unknown, probe(unknown), strict=True)) if unknown else {})


def _left_out(info: VideoInfo | str, entry: IndexedVideo | None, config: DataConfig) -> str:
    """Why a video is none of the split's; empty if it is one, or if its failure is to be counted by the run."""
    if isinstance(info, str):
        return entry.reason if entry is not None else ""
    count = frames_at(info.duration, config.fps)
    if count < config.fewest_frames:
        return f"fewer than {config.fewest_frames} frames at {config.fps:g} a second"
    if 0 < config.most_frames < count:
        return f"more than {config.most_frames} frames at {config.fps:g} a second"
    return ""


def build_index(
    records: Sequence[Record],
    chat: Chat,
    config: DataConfig,
    model: ModelConfig,
    *,
    answered: bool,
    probe: Probe = probe_videos,
    indexed: Mapping[str, IndexedVideo] | None = None,
) -> Index:
    """Groups records by video into contexts of at most Q and gives each a bucket.

    Records that are too long in text, or whose video has too many or too few frames or too many visual tokens, are left
    out and counted, as are those whose video the video index could not read. Without an index, a video that cannot be
    probed keeps its contexts, in the smallest bucket, so that they count as failures of the run.

    Args:
      records: the good records.
      chat: tokenises them.
      config: limits, sampling, buckets, Q.
      model: token sizes and block size.
      answered: rows hold the whole conversation; else the first question and the header of an answer.
      probe: called once, with the videos of which neither the video index nor their records say size and duration.
      indexed: the video index, by path; it wins over what records say.

    Raises:
      DataError: nothing is left, or the video index lacks videos.
    """
    groups: dict[str, list[Record]] = {}
    for number, record in enumerate(records):
        groups.setdefault(record.video, []).append(replace(record, index=number))
    found = _video_infos(groups, indexed, probe)
    dropped, dropped_videos, text_lengths = Counter(), Counter(), {}
    contexts, per_context = [], config.questions_per_context
    for video, group in groups.items():
        info, visual, problem = found[video], _EMPTY, ""
        reason = _left_out(info, (indexed or {}).get(video), config)
        if not reason:
            try:
                if isinstance(info, str):
                    raise ValueError(info)
                visual = _visual(info, config, model)
            except ValueError as error:
                info, problem = None, str(error) if str(error).startswith(video) else f"{video}: {error}"
            if visual.num_tokens > config.max_visual_tokens:
                reason = "more visual tokens than max_visual_tokens"
        if reason:
            dropped[reason] += len(group)
            dropped_videos[reason] += 1
            continue
        short = []
        for record in group:
            text_lengths[record.index] = text_length(record, chat, answered=answered)
            if text_lengths[record.index] > config.max_text_tokens:
                dropped["more text tokens than max_text_tokens"] += 1
            else:
                short.append(record.index)
        for start in range(0, len(short), per_context):
            contexts.append(Context(video, tuple(short[start : start + per_context]), info, visual, problem=problem))
    readable = [context for context in contexts if not context.problem]
    buckets, places = choose_buckets(
        [context.visual.grid for context in readable],
        config.buckets,
        multiple=math.lcm(LENGTH_MULTIPLE, model.nsa.block_size if model.nsa else 1),
        merged_patches=model.vision.spatial_merge_size**2,
        most=config.max_buckets,
    )
    place_of = dict(zip(map(id, readable), places, strict=True))
    kept = []
    for context in contexts:
        place = place_of.get(id(context), 0)
        if place < 0:
            dropped["more visual tokens than the longest bucket"] += len(context.records)
        else:
            kept.append(replace(context, bucket=place))
    for reason, count in dropped.items():
        logger.warning("%d of %d records are left out: %s", count, len(records), reason)
    if not buckets:
        problem = next((context.problem for context in contexts), "; ".join(dropped))
        raise DataError(f"none of {len(records)} records can be used: {problem}")
    numbers = sorted(number for context in kept for number in context.records)
    renumbered = {number: new for new, number in enumerate(numbers)}
    text_tokens = max(text_lengths[number] for number in numbers)
    return Index(
        records=tuple(replace(records[number], index=new) for number, new in renumbered.items()),
        contexts=tuple(replace(c, records=tuple(renumbered[number] for number in c.records)) for c in kept),
        buckets=tuple(buckets),
        text_tokens=-(-text_tokens // TEXT_MULTIPLE) * TEXT_MULTIPLE,
        text_tokens_held=sum(text_lengths[number] for number in numbers),
        dropped=dict(dropped),
        dropped_videos=dict(dropped_videos),
    )


def text_length(record: Record, chat: Chat, *, answered: bool) -> int:
    """Text tokens of a record's row."""
    messages = record.messages(answered=answered)
    return len(chat.render(messages, [_EMPTY], add_generation_prompt=not answered).answer)
