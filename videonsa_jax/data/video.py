"""Video files to resized frames, with PyAV.

Frames are chosen by presentation time, not by number: at target time t the frame shown is the one with the largest
presentation timestamp <= t, so variable frame rates, late starts and reordered (B) frames need no special case.

At 4 of 30 frames a second most of the work is decoding frames that nobody asked for. Those that no other frame is
predicted from are told by their packets (H.264) and not decoded; the sampled frames are the same bit for bit.
"""

import contextlib
import itertools
import struct
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float, UInt8

from videonsa_jax.data.config import Resize
from videonsa_jax.data.frames import (
    MAX_PIXELS,
    MAX_PIXELS_IN,
    MIN_PIXELS,
    VideoError,
    VideoInfo,
    resize_frame,
    sample_times,
    smart_resize,
)

SEEK_SECONDS = 2.0  # jumping over less than this costs more than decoding through it

# H.264 puts at most 16 frames between a frame's places in decoding and in presentation order.
_REORDERED = 32  # packets
# Without these two flags swscale's bicubic result is 1 to 2 levels too dark; with them its mean is exact.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames of one video.

    Attributes:
      frames: RGB; an even number, the last frame repeated if need be.
      fps: frames per second of video really sampled.
      duration: seconds of the whole video.
    """

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    duration: float


@dataclass(frozen=True)
class _Orientation:
    """How stored pixels become displayed ones: transpose first, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        image = image.swapaxes(0, 1) if self.transpose else image
        return image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@contextlib.contextmanager
def _opened(path: Path, seconds_limit: float, max_pixels_in: int) -> Iterator[tuple]:
    """Opens the file's main video stream; every way of failing inside becomes a VideoError."""
    if not path.is_file():
        raise VideoError(f"{path}: no such file, expected a video")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: 0 bytes, expected a video")
    try:
        # "file:" keeps a path such as "http:..." or "concat:..." from being read as a protocol.
        with av.open(f"file:{path}", timeout=seconds_limit) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(f"{path}: holds no video stream, expected one")
            codec = stream.codec_context
            if not 0 < codec.width * codec.height <= max_pixels_in:
                raise VideoError(
                    f"{path}: frames of {codec.width}x{codec.height}, expected 1 to {max_pixels_in} pixels a frame"
                )
            codec.thread_count = 1  # loaders run many files at once; threads inside one would only contend
            codec.options = {"max_pixels": str(max_pixels_in)}  # a stream may change its size after the header
            yield container, stream
    except av.error.ExitError as error:
        raise VideoError(f"{path}: reading took longer than the limit of {seconds_limit:g} s") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: {reason}, expected a readable video") from error


def _orientation(stream: av.VideoStream) -> _Orientation:
    matrix = stream.codec_context.coded_side_data.get("display_matrix")
    if matrix is None:
        return _Orientation()
    # Row-major 3x3 in fixed point; a stored point (x, y) is displayed at (a x + c y, b x + d y), y pointing down.
    a, b, _, c, d = struct.unpack("<5i", matrix[:20])
    if abs(a) >= abs(b):
        return _Orientation(flip_rows=d < 0, flip_columns=a < 0)
    return _Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def _frame_rate(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _scan_duration(path: Path, seconds_limit: float, max_pixels_in: int) -> float:
    """Duration in seconds from the packets' timestamps, for files whose header has none."""
    deadline = time.monotonic() + seconds_limit
    with _opened(path, seconds_limit, max_pixels_in) as (container, stream):
        first, end, count = None, 0.0, 0
        for packet in container.demux(stream):
            if time.monotonic() > deadline:
                raise VideoError(f"{path}: reading took longer than the limit of {seconds_limit:g} s")
            if packet.size == 0:
                continue
            count += 1
            if packet.pts is not None:
                start = float(packet.pts * stream.time_base)
                shown = float((packet.duration or 0) * stream.time_base) or 1 / _frame_rate(stream)
                first = start if first is None else min(first, start)
                end = max(end, start + shown)
        if count == 0:
            raise VideoError(f"{path}: holds no video packets, expected some")
        return end - first if first is not None else count / _frame_rate(stream)


def _header_duration(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float | None, float]:
    """(seconds or None, how many seconds the last frame may end earlier)."""
    slack = 2 / _frame_rate(stream)
    if stream.duration:
        return float(stream.duration * stream.time_base), slack
    if not container.duration:
        return None, slack
    # Matroska states where the file ends, not how long the video is; its sound may run on for a while.
    seconds = container.duration / av.time_base - max(0.0, float((stream.start_time or 0) * stream.time_base))
    return seconds, max(1.0, 0.02 * seconds) if container.streams.audio else slack


def probe_video(path: str | Path, *, seconds_limit: float = 20.0, max_pixels_in: int = MAX_PIXELS_IN) -> VideoInfo:
    """Reads a video's size, duration and rate from its header (from its packets, where the header has no duration).

    Args:
      path: the file.
      seconds_limit: wall time allowed.
      max_pixels_in: frames with more pixels are refused.

    Raises:
      VideoError: the file is missing, empty, unreadable, too large in pixels or too slow to read.
    """
    path = Path(path)
    with _opened(path, seconds_limit, max_pixels_in) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        if _orientation(stream).transpose:
            size = size[::-1]
        duration, _ = _header_duration(container, stream)
        rate = float(stream.average_rate or 0)
    if duration is None:
        duration = _scan_duration(path, seconds_limit, max_pixels_in)
    return VideoInfo(width=size[0], height=size[1], duration=duration, fps=rate)


class _Reader:
    """Walks a stream in presentation order; `shown` yields the frame shown at each of some ascending timestamps."""

    def __init__(
        self, path: Path, container: av.container.InputContainer, stream: av.VideoStream, seconds_limit: float
    ):
        self.path, self.container, self.stream = path, container, stream
        self.seconds_limit, self.deadline = seconds_limit, time.monotonic() + seconds_limit
        self.keyframes = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        self.end = 0.0  # seconds after the first frame until which frames are known to be shown
        self.targets: list[int] | None = None  # timestamps asked for, ascending; None = all frames are

    def _packets(self) -> Iterator[tuple[av.Packet, bool]]:
        """Packets from the current position on, and whether one may hold a frame that is shown at a target.

        Where the next frame in presentation order is not in sight, a packet counts as one that does.
        """
        ahead: deque[av.Packet] = deque()
        in_sight: deque[int] = deque()  # timestamps as they came, and sorted
        order: list[int] = []

        def is_shown(packet: av.Packet) -> bool:
            if self.targets is None or packet.pts is None:
                return True
            after = bisect_right(order, packet.pts)
            if after == len(order):
                return True
            return bisect_left(self.targets, packet.pts) < bisect_left(self.targets, order[after])

        for packet in self.container.demux(self.stream):
            ahead.append(packet)
            if packet.pts is not None:
                in_sight.append(packet.pts)
                insort(order, packet.pts)
                if len(in_sight) > 2 * _REORDERED:
                    del order[bisect_left(order, in_sight.popleft())]
            if len(ahead) > _REORDERED:
                yield ahead[0], is_shown(ahead.popleft())
        while ahead:
            yield ahead[0], is_shown(ahead.popleft())

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """(timestamp, frame) from the current position on; of frames shown at no target, some are left out."""
        untimed = 1 / (_frame_rate(self.stream) * float(self.stream.time_base))
        codec, count = self.stream.codec_context, 0
        can_skip, skipping = codec.name == "h264", False
        for packet, is_shown in self._packets():
            if packet.is_corrupt:
                raise VideoError(f"{self.path}: a damaged packet at byte {packet.pos}, expected an intact video")
            if can_skip and skipping == is_shown:
                skipping = not is_shown
                codec.skip_frame = "NONREF" if skipping else "DEFAULT"
            for frame in packet.decode():
                # A bare elementary stream has no timestamps: its frames count at the nominal rate.
                yield (round(count * untimed) if frame.pts is None else frame.pts), frame
                count += 1
            if time.monotonic() > self.deadline:
                raise VideoError(f"{self.path}: reading took longer than the limit of {self.seconds_limit:g} s")

    def _jump(self, target: int, position: int) -> Iterator[tuple[int, av.VideoFrame]] | None:
        """Frames from a keyframe well past `position` and shown no later than `target`; None where there is none."""
        nearest = bisect_right(self.keyframes, target) - 1
        threshold = position + SEEK_SECONDS / float(self.stream.time_base)
        if nearest < 0 or self.keyframes[nearest] < threshold:
            return None
        # The index holds decoding times: a keyframe may be shown later than the target, then an earlier one serves. The
        # last resort is one before the current position. (Decoders drop frames whose references were jumped over.)
        behind = max(0, bisect_right(self.keyframes, position) - 2)
        for index in (*(i for i in range(nearest, behind, -1) if self.keyframes[i] >= threshold), behind):
            self.container.seek(self.keyframes[index], stream=self.stream)
            ahead = self.frames()
            first = next(ahead, None)
            if first is not None and (index == behind or first[0] <= target):
                return itertools.chain([first], ahead)
        return iter(())

    def shown(self, times: Float[np.ndarray, "F"]) -> Iterator[av.VideoFrame]:
        """For each of some ascending times, in seconds from the first frame, the frame shown then."""
        tick = float(self.stream.time_base)
        ahead = self.frames()
        pending = next(ahead, None)
        if pending is None:
            return
        (start, current), position = pending, pending[0]  # the header's start time may be a decoding time
        self.end = (current.duration or 0) * tick
        self.targets = [start + round(float(seconds) / tick) for seconds in times]
        for target in self.targets:
            jumped = self._jump(target, position)
            if jumped is not None:
                ahead, pending = jumped, next(jumped, None)
            while pending is not None and pending[0] <= target:
                position, current = pending
                self.end = (position - start + (current.duration or 0)) * tick
                pending = next(ahead, None)
            if pending is not None:
                self.end = (pending[0] - start) * tick
            yield current


def decode_video(
    path: str | Path,
    *,
    fps: float,
    max_frames: int,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int | None = MAX_PIXELS,
    factor: int = 28,
    resize: Resize = "pillow",
    seconds_limit: float = 20.0,
    max_pixels_in: int = MAX_PIXELS_IN,
    expected: VideoInfo | None = None,
) -> DecodedVideo:
    """Samples a video's frames, upright and resized.

    Only sampled frames are converted to RGB and resized, bicubic. Pixels are taken as square.

    Args:
      path: the file.
      fps: frames wanted per second of video.
      max_frames: upper limit of sampled frames (see `sample_times`).
      min_pixels: lower limit of a resized frame's area.
      max_pixels: upper limit of a resized frame's area; None keeps the displayed size.
      factor: both sides of a resized frame are multiples of it.
      resize: "pillow" converts whole frames to RGB and resizes these, as Qwen's processor does; "swscale" does both in
        one step, several times faster and about one level of 255 apart.
      seconds_limit: wall time allowed.
      max_pixels_in: stored frames with more pixels are refused.
      expected: what the file should hold; its duration then decides the sampled times.

    Raises:
      VideoError: the file is missing, empty, unreadable, damaged, cut short, not as expected, too large in pixels or
        too slow to decode.
    """
    path = Path(path)
    info = expected or probe_video(path, seconds_limit=seconds_limit, max_pixels_in=max_pixels_in)
    if info.duration <= 0:
        raise VideoError(f"{path}: lasts {info.duration:g} s, expected more than 0")
    times, rate = sample_times(info.duration, fps, max_frames)
    with _opened(path, seconds_limit, max_pixels_in) as (container, stream):
        orientation = _orientation(stream)
        slack = _check_expected(path, container, stream, orientation, info)
        height, width = info.height, info.width
        if max_pixels is not None:
            height, width = smart_resize(height, width, factor, min_pixels, max_pixels)
        reader = _Reader(path, container, stream, seconds_limit)
        frames = np.empty((len(times) + len(times) % 2, height, width, 3), np.uint8)
        to_rgb, previous, count = VideoReformatter(), None, 0
        for count, frame in enumerate(reader.shown(times), start=1):
            if frame is previous:
                frames[count - 1] = frames[count - 2]
            else:
                frames[count - 1] = _displayed(to_rgb, frame, orientation, height, width, resize)
            previous = frame
        if count == 0 or reader.end + slack < times[-1]:
            raise VideoError(f"{path}: its frames end at {reader.end:.2f} s, expected {info.duration:.2f} s")
        frames[len(times) :] = frames[len(times) - 1]
    return DecodedVideo(frames=frames, fps=rate, duration=info.duration)


def _check_expected(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    orientation: _Orientation,
    info: VideoInfo,
) -> float:
    """Compares the header with `info`; returns how many seconds the last frame may end early."""
    size = stream.codec_context.width, stream.codec_context.height
    size = size[::-1] if orientation.transpose else size
    duration, slack = _header_duration(container, stream)
    if size != (info.width, info.height):
        raise VideoError(f"{path}: frames of {size[0]}x{size[1]}, expected {info.width}x{info.height}")
    if duration is not None and abs(duration - info.duration) > max(0.5, 0.02 * info.duration):
        raise VideoError(f"{path}: lasts {duration:.2f} s, expected {info.duration:.2f} s")
    return slack


def _displayed(
    to_rgb: VideoReformatter, frame: av.VideoFrame, orientation: _Orientation, height: int, width: int, resize: Resize
) -> UInt8[np.ndarray, "H W 3"]:
    stored = (width, height) if orientation.transpose else (height, width)
    size = {}
    if resize == "swscale" and (frame.height, frame.width) != stored:
        size = {"height": stored[0], "width": stored[1], "interpolation": _BICUBIC}
    image = orientation.apply(to_rgb.reformat(frame, format="rgb24", threads=1, **size).to_ndarray())
    return image if image.shape[:2] == (height, width) else resize_frame(image, height, width)
