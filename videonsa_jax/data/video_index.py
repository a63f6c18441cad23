"""What videos hold, asked once: a file of one JSON line a video, appended to and never rewritten.

Reading 178 K headers takes hours on a slow disk, so it is done once, by many processes, and goes on where it was
stopped. A line holds for the file's size and time of change; of several lines on one video the last counts, and a last
line that a kill cut short is taken off. A file that hangs or crashes its reader costs that reader, not the build.
"""

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from videonsa_jax.data.frames import VideoError, VideoInfo
from videonsa_jax.data.records import DataError
from videonsa_jax.data.video import probe_video

MISSING, EMPTY, UNREADABLE = "video missing", "video empty", "video unreadable"
SLOW, CRASHED = "video takes too long to read", "video crashes its reader"
REASONS = (MISSING, EMPTY, UNREADABLE, SLOW, CRASHED)

_SAVE_SECONDS = 1.0
_GRACE_SECONDS = 1.0  # a reader's own limit, of which it uses two in the worst case, comes first
_STATUS_THREADS = 16  # asking for sizes and times waits for the file system
_NO_FILE = (-1, 0)

type Reader = Callable[..., VideoInfo]


@dataclass(frozen=True)
class IndexedVideo:
    """What the index says about a video.

    Attributes:
      video: path.
      size: bytes; -1 if there is no such file.
      mtime_ns: time of its last change.
      info: what it holds; None if it cannot be used.
      reason: which of `REASONS` is why, else empty.
      problem: the sentence that says so.
    """

    video: str
    size: int
    mtime_ns: int
    info: VideoInfo | None = None
    reason: str = ""
    problem: str = ""

    @property
    def status(self) -> tuple[int, int]:
        """What must be the same of the file for this to hold."""
        return self.size, self.mtime_ns


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
      done: videos in the index, of those asked for.
      total: videos asked for.
      read: videos read in this build.
      seconds: since this build began reading.
      unusable: videos in the index that cannot be used, by reason.
    """

    done: int
    total: int
    read: int
    seconds: float
    unusable: Mapping[str, int]


def _line(entry: IndexedVideo) -> bytes:
    fields = {name: value for name, value in asdict(entry).items() if value not in (None, "")}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> IndexedVideo:
    fields = json.loads(line)
    info = fields.pop("info", None)
    entry = IndexedVideo(**fields, info=VideoInfo(**info) if info else None)
    if (entry.info is None) == (entry.reason == ""):
        raise ValueError("neither info nor a reason")
    return entry


def _parse_lines(path: Path, content: bytes) -> dict[str, IndexedVideo]:
    entries = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = _parse(line)
        except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: line {number} is {line[:60]!r}, expected a line of a video index ({error})"
            ) from error
        entries[entry.video] = entry
    return entries


def read_video_index(path: str | Path) -> dict[str, IndexedVideo]:
    """The entries of an index, by path of the video.

    Raises:
      DataError: there is no such file, or it is not a video index.
    """
    path = Path(path)
    try:
        return _parse_lines(path, path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}, expected a video index; python -m experiments.index builds one"
        ) from error


def _status(video: str) -> tuple[int, int]:
    try:
        status = os.stat(video)
    except OSError:
        return _NO_FILE
    return status.st_size, status.st_mtime_ns


def _read_video(video: str, read: Reader, seconds_limit: float) -> IndexedVideo:
    size, mtime_ns = _status(video)
    if size <= 0:
        reason = MISSING if size < 0 else EMPTY
        return IndexedVideo(video, size, mtime_ns, reason=reason, problem=f"{video}: {reason}")
    start = time.monotonic()
    try:
        info = read(video, seconds_limit=seconds_limit)
        if info.duration <= 0:
            raise VideoError(f"{video}: lasts {info.duration:g} s, expected more than 0")
        return IndexedVideo(video, size, mtime_ns, info=info)
    except VideoError as error:
        reason = SLOW if time.monotonic() - start >= seconds_limit else UNREADABLE
        return IndexedVideo(video, size, mtime_ns, reason=reason, problem=str(error))


def _serve(connection: multiprocessing.connection.Connection, read: Reader, seconds_limit: float) -> None:
    """What a reader process does: None once it has started, then paths in, entries out."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the other end is gone, or the user had enough
        connection.send(None)
        while True:
            connection.send(_read_video(connection.recv(), read, seconds_limit))


class _Readers:
    """Processes that read one video each at a time; one that overruns its time or dies is replaced."""

    def __init__(self, count: int, read: Reader, seconds_limit: float):
        # Forked from a process that has imported this module and has no threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._read, self._limit = read, seconds_limit
        self._processes = [self._start() for _ in range(count)]

    def _start(self) -> tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._read, self._limit), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def entries(self, videos: Iterable[str]) -> Iterator[IndexedVideo | None]:
        """An entry for every video, as they are ready; None now and then where none is."""
        left = iter(videos)
        waiting = {connection: place for place, (_, connection) in enumerate(self._processes)}  # that are starting
        busy: dict[multiprocessing.connection.Connection, tuple[int, str, float]] = {}

        def give(place: int) -> None:
            connection, video = self._processes[place][1], next(left, None)
            if video is not None:
                with contextlib.suppress(OSError):  # it died after its last entry, which waiting for the next shows
                    connection.send(video)
                busy[connection] = place, video, time.monotonic() + 2 * self._limit + _GRACE_SECONDS

        def replaced(connection: multiprocessing.connection.Connection, reason: str) -> IndexedVideo:
            place, video, _ = busy.pop(connection)
            self._processes[place][0].kill()
            connection.close()
            self._processes[place] = self._start()
            waiting[self._processes[place][1]] = place
            return IndexedVideo(video, *_status(video), reason=reason, problem=f"{video}: {reason}")

        while waiting or busy:
            for connection in multiprocessing.connection.wait([*waiting, *busy], timeout=_SAVE_SECONDS):
                try:
                    entry = connection.recv()
                except (EOFError, OSError) as error:
                    if connection in waiting:
                        raise DataError(
                            "a process that reads videos ended before it began, expected it to run"
                        ) from error
                    yield replaced(connection, CRASHED)
                else:
                    give(waiting.pop(connection) if entry is None else busy.pop(connection)[0])
                    if entry is not None:
                        yield entry
            for connection in [c for c, (_, _, until) in busy.items() if time.monotonic() > until]:
                yield replaced(connection, SLOW)
            yield None

    def close(self) -> None:
        for process, connection in self._processes:
            connection.close()
            process.kill()
        for process, _ in self._processes:
            process.join(1.0)


@contextlib.contextmanager
def _opened_alone(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{path}: another process is building it, expected to be the only one") from error
        yield file


def build_video_index(
    path: str | Path,
    videos: Sequence[str],
    *,
    workers: int,
    seconds_limit: float = 20.0,
    report: Callable[[Progress], None] = lambda _: None,
    report_seconds: float = 10.0,
    read: Reader = probe_video,
) -> dict[str, IndexedVideo]:
    """Reads what videos hold and adds it to an index; those that are in it and unchanged are not read again.

    Killed at any moment, what it had saved (all but the last second) is there for the next build. Videos that took too
    long are tried again by the next one.

    Args:
      path: the index; made if need be.
      videos: paths.
      workers: processes that read.
      seconds_limit: wall time allowed for one file.
      report: called at the start, about every `report_seconds`, and at the end.
      report_seconds: see `report`.
      read: reads a header; a function that processes can import.

    Returns:
      The whole index, as `read_video_index`.

    Raises:
      DataError: another process is building it, the file is not an index, or it cannot be written.
    """
    path, wanted = Path(path), list(dict.fromkeys(videos))
    try:
        with _opened_alone(path) as file:
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
            entries = _parse_lines(path, whole)
            with ThreadPoolExecutor(_STATUS_THREADS) as threads:
                known = [video for video in wanted if video in entries and entries[video].reason != SLOW]
                holds = {
                    video
                    for video, status in zip(known, threads.map(_status, known), strict=True)
                    if status == entries[video].status
                }
            todo = [video for video in wanted if video not in holds]
            unusable = Counter(entries[video].reason for video in holds if entries[video].reason)
            start = reported = saved = time.monotonic()
            read_now, unsaved = 0, bytearray()

            def tell() -> None:
                report(Progress(len(holds) + read_now, len(wanted), read_now, time.monotonic() - start, +unusable))

            def save() -> None:
                file.write(unsaved)
                file.flush()
                os.fsync(file.fileno())
                unsaved.clear()

            tell()
            readers = _Readers(min(workers, len(todo)), read, seconds_limit)
            try:
                for entry in readers.entries(todo):
                    if entry is not None:
                        entries[entry.video] = entry
                        unsaved += _line(entry)
                        read_now += 1
                        unusable[entry.reason] += entry.reason != ""
                    if unsaved and time.monotonic() - saved >= _SAVE_SECONDS:
                        save()
                        saved = time.monotonic()
                    if time.monotonic() - reported >= report_seconds:
                        tell()
                        reported = time.monotonic()
            finally:
                readers.close()
                save()
            if todo:
                tell()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}, expected a file that can be written") from error
    return entries
