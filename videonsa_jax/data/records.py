"""LLaVA-Video style JSON to records: one question, or a conversation of several turns, about one video each."""

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from videonsa_jax.data.frames import VideoInfo

logger = logging.getLogger("videonsa_jax.data")

PLACEHOLDERS = ("<image>", "<video>")
WARNINGS_PER_KIND = 10
MIN_COUNTED = 100
MALFORMED, TEXT_ONLY, IMAGES = "malformed", "no video, text only", "no video, but an image"


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


class _Malformed(Exception):
    """A record's defect."""


class _LeftOut(Exception):
    """Why a sound record is none of ours."""


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
    if record.get("video") is None and record.get("image") is not None:
        raise _LeftOut(IMAGES)
    if record.get("video") is None and not any(mark in str(record.get("conversations", "")) for mark in PLACEHOLDERS):
        raise _LeftOut(TEXT_ONLY)
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


def raw_records(path: Path) -> list[object]:
    """A file's records, unchecked; a line of a JSONL file that is not JSON stays text, which the parser then refuses.

    Raises:
      DataError: the file is missing, not UTF-8 or not JSON.
    """
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


def _sampled(entries: list[object], sampling: str, path: Path) -> list[object]:
    """The share of a file that LLaVA's `sampling_strategy` names; "random" draws the same ones on every host."""
    order, _, amount = sampling.partition(":")
    percent = amount.endswith("%")
    number = amount.removesuffix("%")
    if sampling == "all":
        return entries
    if order not in ("first", "end", "random") or not number.isdecimal() or (percent and int(number) > 100):
        raise DataError(
            f"{path}: sampling_strategy is {sampling!r}, expected all, or first, end or random with a number or a "
            "percentage, such as first:1000 or random:10%"
        )
    count = min(len(entries), math.ceil(int(number) * len(entries) / 100) if percent else int(number))
    if order == "random":
        draw = np.random.default_rng(zlib.crc32(path.name.encode()))
        return [entries[place] for place in np.sort(draw.permutation(len(entries))[:count])]
    return entries[:count] if order == "first" else entries[len(entries) - count :]


def read_records(
    path: str | Path,
    *,
    video_root: str = "",
    needs_options: bool = False,
    max_failure_share: float = 0.05,
    sampling: str = "all",
) -> tuple[list[Record], Counter[str]]:
    """Reads a LLaVA-Video style file: a JSON list of records, or one record a line.

    A malformed record is left out and counted, with a warning that says which and why; one about no video likewise,
    without.

    Args:
      path: the file.
      video_root: folder of the videos; empty = the file's own.
      needs_options: a record without options is malformed.
      max_failure_share: a larger share of malformed records stops.
      sampling: which of the file's records count, as LLaVA's `sampling_strategy`.

    Returns:
      (the good records, the number of others by reason).

    Raises:
      DataError: the file is missing or not JSON, holds no good record, or too many malformed ones.
    """
    path = Path(path)
    root = Path(video_root) if video_root else path.parent
    raw = raw_records(path)
    chosen = _sampled(raw, sampling, path)
    records, dropped, reason = [], Counter(), ""
    if len(chosen) < len(raw):
        dropped[f"not of {sampling}"] = len(raw) - len(chosen)
    for place, entry in enumerate(chosen):
        try:
            records.append(_parse(entry, len(records), root, needs_options=needs_options))
        except _LeftOut as other:
            dropped[str(other)] += 1
        except _Malformed as defect:
            dropped[MALFORMED] += 1
            reason = f"{path}: record {place} is left out: {defect}"
            if dropped[MALFORMED] <= WARNINGS_PER_KIND:
                logger.warning("%s", reason)
    malformed = dropped[MALFORMED]
    if malformed:
        logger.warning("%s: %d of %d records are malformed", path, malformed, len(chosen))
    if too_many(malformed, len(chosen), max_failure_share):
        raise DataError(
            f"{path}: {malformed} of {len(chosen)} records are malformed, expected at most a share of "
            f"{max_failure_share:g} (max_failure_share); the last: {reason}"
        )
    if not records:
        seen = reason or ", ".join(f"{count} times {why}" for why, count in dropped.items())
        raise DataError(f"{path}: holds no usable record, expected some" + (f"; {seen}" if seen else ""))
    return records, +dropped


def split_turns(records: Sequence[Record]) -> list[Record]:
    """Makes every turn of a conversation a record of its own, named ID#0, ID#1 and so on: question-answer pairs."""
    pairs: list[Record] = []
    for record in records:
        if len(record.turns) == 1:
            pairs.append(replace(record, index=len(pairs)))
            continue
        for place, turn in enumerate(record.turns):
            alone = replace(
                record, index=len(pairs), id=f"{record.id}#{place}", turns=(turn,), options=(), answer=turn[1]
            )
            pairs.append(alone)
    return pairs


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
