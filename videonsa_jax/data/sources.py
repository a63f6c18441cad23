"""LLaVA-Video style JSON to records, records to contexts, contexts to buckets.

Everything here follows from the JSON, the configuration and (where records do not state them) the videos' headers, so
that all hosts of a run hold the same index.
"""

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.chat import Chat
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.media import Limits, video_grid
from videonsa_jax.data.video import VideoError, VideoInfo, probe_video
from videonsa_jax.streams import Visual

logger = logging.getLogger("videonsa_jax.data")

PLACEHOLDERS = ("<image>", "<video>")
MAX_BUCKETS = 4
LENGTH_MULTIPLE, TEXT_MULTIPLE = 16, 8
WARNINGS_PER_KIND = 10
MIN_COUNTED = 100

type Probe = Callable[[Sequence[str]], Sequence[VideoInfo | str]]


class DataError(Exception):
    """The data cannot be used: one sentence says what was found and what was expected."""


def too_many(failed: int, total: int, share: float) -> bool:
    """Whether failures exceed their allowed share; that of fewer than `MIN_COUNTED` would be chance, so these count
    as so many."""
    return failed > share * max(total, MIN_COUNTED)


@dataclass(frozen=True)
class Record:
    """One question, or a conversation of several turns, about one video.

    Attributes:
      index: place in the list of good records; the sample id of batches.
      id: the file's own name for it.
      video: path of the video.
      turns: (question, answer) pairs; the first question follows the video.
      family: kind of question; empty if not stated.
      options: choices of a multiple-choice question, as an answer would say them.
      answer: the right one; the last turn's answer where not stated.
      info: size, duration and rate of the video, if the record states them.
    """

    index: int
    id: str
    video: str
    turns: tuple[tuple[str, str], ...]
    family: str = ""
    options: tuple[str, ...] = ()
    answer: str = ""
    info: VideoInfo | None = None

    def messages(self, *, answered: bool) -> list[dict]:
        """The conversation in Qwen's format; not `answered`: the first question alone."""
        turns = self.turns if answered else self.turns[:1]
        content: list | str = [{"type": "video"}, {"type": "text", "text": turns[0][0]}]
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": content if not messages else question})
            if answered:
                messages.append({"role": "assistant", "content": answer})
        return messages


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
class Bucket:
    """One shape that contexts are padded to.

    Attributes:
      visual_tokens: Lv.
      frames: F, temporal grid positions.
      patches: P, patches a frame.
    """

    visual_tokens: int
    frames: int
    patches: int


@dataclass(frozen=True)
class Index:
    """Every context of a split with its bucket, and what was left out.

    Attributes:
      records: the good records.
      contexts: in file order.
      buckets: by rising visual length.
      text_tokens: Lt, the same for all batches.
      dropped: records left out, by reason.
    """

    records: tuple[Record, ...]
    contexts: tuple[Context, ...]
    buckets: tuple[Bucket, ...]
    text_tokens: int
    dropped: Mapping[str, int] = field(default_factory=dict)


_EMPTY = Visual(grid=(0, 0, 0))


class _Malformed(Exception):
    """A record's defect."""


def _text(record: Mapping, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise _Malformed(f"{name} is {str(value)[:60]!r}, expected a text")
    return value


def _turns(record: Mapping) -> tuple[tuple[str, str], ...]:
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        size = f"{len(conversation)} entries" if isinstance(conversation, list) else repr(conversation)[:60]
        raise _Malformed(f"conversations is {size}, expected a list of human and gpt entries in turn")
    values = []
    for place, entry in enumerate(conversation):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(entry, dict) or entry.get("from") != speaker:
            raise _Malformed(f"conversations[{place}] is {str(entry)[:60]!r}, expected an entry from {speaker}")
        value = entry.get("value")
        if not isinstance(value, str) or not value.strip():
            raise _Malformed(f"conversations[{place}].value is {str(value)[:60]!r}, expected a text")
        values.append(value)
    held = sum(value.count(mark) for value in values for mark in PLACEHOLDERS)
    if held != 1 or not any(mark in values[0] for mark in PLACEHOLDERS):
        raise _Malformed(f"conversations hold {held} times <image> or <video>, expected once in the first entry")
    for mark in PLACEHOLDERS:  # the video comes first wherever the placeholder stands, as in LLaVA's own loader
        values[0] = values[0].replace(f"{mark}\n", "").replace(mark, "")
    return tuple(zip(values[::2], values[1::2], strict=True))


def _info(record: Mapping) -> VideoInfo | None:
    stated = {name: record.get(name) for name in ("width", "height", "duration", "fps")}
    for name, value in stated.items():
        if value is None:
            continue
        integral = name in ("width", "height")
        number = isinstance(value, int if integral else int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise _Malformed(
                f"{name} is {str(value)[:60]!r}, expected a positive {'integer' if integral else 'number'}"
            )
    if any(stated[name] is None for name in ("width", "height", "duration")):
        return None
    return VideoInfo(stated["width"], stated["height"], float(stated["duration"]), float(stated["fps"] or 0))


def _options(record: Mapping) -> tuple[str, ...]:
    options = record.get("options") or ()
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) and option for option in options):
        raise _Malformed(f"options is {str(options)[:60]!r}, expected a list of texts")
    return tuple(options)


def _parse(record: object, index: int, root: Path, *, needs_options: bool) -> Record:
    if not isinstance(record, dict):
        raise _Malformed(f"it is {str(record)[:60]!r}, expected an object")
    turns, options = _turns(record), _options(record)
    answer = record.get("answer", turns[-1][1])
    if needs_options and len(options) < 2:
        raise _Malformed(f"options holds {len(options)} texts, expected at least 2 in a held-out record")
    if not isinstance(answer, str) or (options and answer not in options):
        raise _Malformed(f"answer is {str(answer)[:60]!r}, expected one of the options")
    family = record.get("family", "")
    if not isinstance(family, str):
        raise _Malformed(f"family is {str(family)[:60]!r}, expected a text")
    return Record(
        index=index,
        id=str(record.get("id", index)),
        video=str(root / _text(record, "video")),
        turns=turns,
        family=family,
        options=options,
        answer=answer,
        info=_info(record),
    )


def _raw_records(path: Path) -> list[object]:
    """The file's records; a line of a JSONL file that is not JSON stays text, which the parser then refuses."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a JSON list of records")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}, expected a JSON list of records") from error
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        records = []
        for line in filter(str.strip, text.split("\n")):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                records.append(line)
        return records
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: {error}, expected a JSON list of records") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}, expected a list of records")
    return records


def read_records(
    path: str | Path, *, video_root: str = "", needs_options: bool = False, max_failure_share: float = 0.05
) -> tuple[list[Record], int]:
    """Reads a LLaVA-Video style file: a JSON list of records, or one record a line.

    A malformed record is left out and counted, with a warning that says which and why.

    Args:
      path: the file.
      video_root: folder of the videos; empty = the file's own.
      needs_options: a record without options is malformed.
      max_failure_share: a larger share of malformed records stops.

    Returns:
      (the good records, the number of malformed ones).

    Raises:
      DataError: the file is missing or not JSON, holds no good record, or too many malformed ones.
    """
    path = Path(path)
    root = Path(video_root) if video_root else path.parent
    raw = _raw_records(path)
    records, malformed = [], 0
    for place, entry in enumerate(raw):
        try:
            records.append(_parse(entry, len(records), root, needs_options=needs_options))
        except _Malformed as defect:
            malformed += 1
            reason = f"{path}: record {place} is left out: {defect}"
            if malformed <= WARNINGS_PER_KIND:
                logger.warning("%s", reason)
    if malformed:
        logger.warning("%s: %d of %d records are malformed", path, malformed, len(raw))
    if too_many(malformed, len(raw), max_failure_share):
        raise DataError(
            f"{path}: {malformed} of {len(raw)} records are malformed, expected at most a share of "
            f"{max_failure_share:g} (max_failure_share); the last: {reason}"
        )
    if not records:
        raise DataError(f"{path}: holds no usable record, expected some" + (f"; {reason}" if malformed else ""))
    return records, malformed


def join_turns(records: Sequence[Record], questions: int) -> list[Record]:
    """Joins records of one video into conversations of several turns, as LLaVA-Video's own files have them.

    Which questions come first is drawn per video, so that every kind of question also opens conversations, as it does
    when it is asked alone.

    Args:
      records: the good records.
      questions: records that one conversation takes up at most.

    Returns:
      The conversations, videos in order of their first record. A conversation of several records has the first one's
      id and no options.
    """
    by_video: dict[str, list[Record]] = {}
    for record in records:
        by_video.setdefault(record.video, []).append(record)
    joined: list[Record] = []
    for video, group in by_video.items():
        order = np.random.default_rng(zlib.crc32(Path(video).name.encode())).permutation(len(group))
        for start in range(0, len(group), questions):
            part = [group[place] for place in order[start : start + questions]]
            turns = tuple(turn for record in part for turn in record.turns)
            alone = part[0] if len(part) == 1 else replace(part[0], family="", options=(), answer=turns[-1][1])
            joined.append(replace(alone, index=len(joined), turns=turns))
    return joined


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


def choose_buckets(
    grids: Sequence[tuple[int, int, int]], lengths: Sequence[int], *, multiple: int, merged_patches: int
) -> tuple[list[Bucket], list[int]]:
    """Buckets for token grids, and the bucket of each grid (-1: longer than every given length).

    Args:
      grids: (time, height, width) in tokens.
      lengths: visual lengths of the buckets; empty = at most 4, chosen to pad the least in the vision tower and in
        the visual stream together.
      multiple: chosen lengths are multiples of it.
      merged_patches: patches in a visual token.
    """

    def rounded(length: int) -> int:
        return -(-length // multiple) * multiple

    if not grids:
        return [], []
    counts = Counter(grids)
    lengths = sorted(lengths) or _best_lengths(counts, rounded)
    by_length: dict[int, list[tuple[int, int, int]]] = {length: [] for length in lengths}
    fits = {}
    for grid in counts:
        fits[grid] = next((length for length in lengths if math.prod(grid) <= length), None)
        if fits[grid] is not None:
            by_length[fits[grid]].append(grid)
    used = [length for length in lengths if by_length[length]]
    buckets = [
        Bucket(
            length, max(g[0] for g in by_length[length]), merged_patches * max(g[1] * g[2] for g in by_length[length])
        )
        for length in used
    ]
    place = {length: number for number, length in enumerate(used)}
    return buckets, [place[fits[grid]] if fits[grid] is not None else -1 for grid in grids]


def _best_lengths(counts: Mapping[tuple[int, int, int], int], rounded: Callable[[int], int]) -> list[int]:
    """At most `MAX_BUCKETS` lengths that leave the least padding, by dynamic programming over candidate lengths."""
    candidates = sorted({rounded(math.prod(grid)) for grid in counts})
    thinning = -(-len(candidates) // 64)
    candidates = candidates[::-1][::thinning][::-1]  # the longest stays
    groups: list[list[tuple[tuple[int, int, int], int]]] = [[] for _ in candidates]
    for grid, count in counts.items():
        groups[next(i for i, length in enumerate(candidates) if math.prod(grid) <= length)].append((grid, count))
    best: list[list[tuple[float, list[int]]]] = [[(0.0, [])] + [(math.inf, [])] * len(candidates)]
    for _ in range(MAX_BUCKETS):
        row = list(best[-1])
        for end in range(1, len(candidates) + 1):
            number, frames, area = 0, 0, 0
            for start in range(end - 1, -1, -1):
                for (time, height, width), count in groups[start]:
                    number, frames, area = number + count, max(frames, time), max(area, height * width)
                cost, chosen = best[-1][start]
                cost += number * (candidates[end - 1] + frames * area)
                if cost < row[end][0]:
                    row[end] = cost, [*chosen, candidates[end - 1]]
        best.append(row)
    return best[-1][-1][1]


def build_index(
    records: Sequence[Record],
    chat: Chat,
    config: DataConfig,
    model: ModelConfig,
    *,
    answered: bool,
    probe: Probe = probe_videos,
) -> Index:
    """Groups records by video into contexts of at most Q and gives each a bucket.

    Records that are too long in text or in visual tokens are dropped and counted. A video that cannot be probed keeps
    its contexts, in the smallest bucket, so that they count as failures of the run.

    Args:
      records: the good records.
      chat: tokenises them.
      config: limits, sampling, buckets, Q.
      model: token sizes and block size.
      answered: rows hold the whole conversation; else the first question and the header of an answer.
      probe: called once, with the videos whose records do not state size and duration.

    Raises:
      DataError: nothing is left.
    """
    by_video: dict[str, list[Record]] = {}
    dropped, text_tokens = Counter(), 1
    for record in records:
        length = text_length(record, chat, answered=answered)
        if length > config.max_text_tokens:
            dropped["more text tokens than max_text_tokens"] += 1
            continue
        text_tokens = max(text_tokens, length)
        by_video.setdefault(record.video, []).append(record)
    found: dict[str, VideoInfo | str] = {
        video: next((record.info for record in group if record.info), "") for video, group in by_video.items()
    }
    unknown = [video for video, info in found.items() if not info]
    if unknown:
        found.update(zip(unknown, probe(unknown), strict=True))
    contexts, per_context = [], config.questions_per_context
    for video, group in by_video.items():
        visual, info, problem = _EMPTY, found[video], ""
        try:
            if isinstance(info, str):
                raise ValueError(info)
            visual = _visual(info, config, model)
        except ValueError as error:
            info, problem = None, str(error) if str(error).startswith(video) else f"{video}: {error}"
        if visual.num_tokens > config.max_visual_tokens:
            dropped["more visual tokens than max_visual_tokens"] += len(group)
            continue
        for start in range(0, len(group), per_context):
            ids = tuple(record.index for record in group[start : start + per_context])
            contexts.append(Context(video, ids, info, visual, problem=problem))
    readable = [context for context in contexts if not context.problem]
    buckets, places = choose_buckets(
        [context.visual.grid for context in readable],
        config.buckets,
        multiple=math.lcm(LENGTH_MULTIPLE, model.nsa.block_size if model.nsa else 1),
        merged_patches=model.vision.spatial_merge_size**2,
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
    return Index(
        records=tuple(records),
        contexts=tuple(kept),
        buckets=tuple(buckets),
        text_tokens=-(-text_tokens // TEXT_MULTIPLE) * TEXT_MULTIPLE,
        dropped=dict(dropped),
    )


def text_length(record: Record, chat: Chat, *, answered: bool) -> int:
    """Text tokens of a record's row."""
    messages = record.messages(answered=answered)
    return len(chat.render(messages, [_EMPTY], add_generation_prompt=not answered).answer)
