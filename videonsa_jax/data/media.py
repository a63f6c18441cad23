"""The videos and images of messages: what they will be is planned from headers, then their pixels are read.

Planning first lets a conversation that would not fit be refused before anything is decoded.
"""

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from videonsa_jax.configs import VisionConfig
from videonsa_jax.data.frames import (
    MAX_PIXELS_IN,
    VideoError,
    VideoInfo,
    resize_frame,
    sample_times,
    smart_resize,
)
from videonsa_jax.streams import Visual

MAX_DECODED_BYTES = 2**33  # resized frames of one video, as RGB
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow opens more, some by other programs

_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 0x0112, (5, 6, 7, 8)

FIELDS = {
    "video": ("type", "video", "fps", "min_pixels", "max_pixels", "max_frames", "total_pixels"),
    "image": ("type", "image", "min_pixels", "max_pixels"),
}


class MediaError(ValueError):
    """A video or image of a message cannot be used: one sentence says which, what was found and what was expected."""


@dataclass(frozen=True)
class Limits:
    """How a video is sampled and how large its frames, or an image, may be.

    Attributes:
      min_pixels: lower limit of a resized frame's area.
      max_pixels: upper limit of a resized frame's area.
      fps: frames sampled per second; of a frames array, the rate at which it was sampled.
      max_frames: upper limit of sampled frames; longer videos are sampled uniformly.
      total_pixels: upper limit of a video's visual tokens x 28 x 28, met by smaller frames; None = none.
      decode_seconds: wall time allowed for reading one file.
    """

    min_pixels: int
    max_pixels: int
    fps: float = 4.0
    max_frames: int = 4096
    total_pixels: int | None = None
    decode_seconds: float = 300.0


@dataclass(frozen=True)
class Media:
    """A video or image of which the pixels are still to be read.

    Attributes:
      source: what it is, for comparing and for error messages: a path, or the shape and checksum of an array.
      visual: its token grid and seconds per grid.
      frames: reads its resized frames; a multiple of the temporal patch size.
    """

    source: str
    visual: Visual
    frames: Callable[[], UInt8[np.ndarray, "F H W 3"]]


def video_grid(info: VideoInfo, limits: Limits, vision: VisionConfig) -> Visual:
    """The token grid of a video sampled under `limits`.

    Raises:
      ValueError: the video has no duration, its aspect ratio is past Qwen's limit, or `total_pixels` is too small.
    """
    if info.duration <= 0:
        raise ValueError(f"lasts {info.duration:g} s, expected more than 0")
    times, rate = sample_times(info.duration, limits.fps, limits.max_frames)
    return _grid(len(times), (info.height, info.width), rate, limits, vision)


def frame_limit(count: int, limits: Limits, vision: VisionConfig) -> int:
    """Largest area of each of `count` frames: `max_pixels`, or what `total_pixels` leaves.

    As qwen-vl-utils counts (`fetch_video`): frames that share a token share their part of the total.

    Raises:
      ValueError: `total_pixels` leaves less than `min_pixels`.
    """
    if limits.total_pixels is None:
        return limits.max_pixels
    share = limits.total_pixels // -(-count // vision.temporal_patch_size)
    if share < limits.min_pixels:
        raise ValueError(
            f"total_pixels {limits.total_pixels} leaves {share} pixels to each of {count} frames, expected at least "
            f"min_pixels {limits.min_pixels}: lower fps or max_frames"
        )
    return min(limits.max_pixels, share)


def _grid(count: int, size: tuple[int, int], rate: float, limits: Limits, vision: VisionConfig) -> Visual:
    side, depth = vision.pixels_per_token, vision.temporal_patch_size
    height, width = smart_resize(*size, side, limits.min_pixels, frame_limit(count, limits, vision))
    decoded = 3 * count * height * width
    if decoded > MAX_DECODED_BYTES:
        raise ValueError(
            f"{count} frames of {width}x{height} take {decoded / 2**30:.1f} GiB, expected at most "
            f"{MAX_DECODED_BYTES / 2**30:.0f} GiB: lower fps, max_frames or max_pixels"
        )
    return Visual(grid=(-(-count // depth), height // side, width // side), seconds_per_grid=depth / rate)


def plan_media(item: Mapping, limits: Limits, vision: VisionConfig) -> Media:
    """Plans one video or image item of a message.

    Args:
      item: {"type": "video", "video": path or frames array [F, H, W, 3] uint8} or {"type": "image", "image": path, PIL
        image or array [H, W, 3] uint8}; its own limits beside it win over `limits`.
      limits: of the call; an image reads only its pixel limits.
      vision: patch sizes.

    Raises:
      MediaError: an unknown field, a value out of range, or a file or array that cannot be used.
    """
    kind = item["type"]
    unknown = [name for name in item if name not in FIELDS[kind]]
    if unknown:
        raise MediaError(f"a {kind} has the field {unknown[0]!r}, expected {', '.join(FIELDS[kind])}")
    if item.get(kind) is None:
        raise MediaError(f"a {kind} has no {kind!r} beside its type, expected a path or an array")
    own = {name: item[name] for name in FIELDS[kind][2:] if item.get(name) is not None}
    limits = make_limits(**(asdict(limits) | own))
    content = item[kind]
    if isinstance(content, str | Path):
        content = _local_path(str(content))
    try:
        if kind == "image":
            return _plan_image(content, limits, vision)
        if isinstance(content, Path):
            return _plan_video(content, limits, vision)
        return _plan_frames(content, limits, vision)
    except MediaError:
        raise
    except (VideoError, ValueError) as error:
        named = isinstance(content, Path) and not str(error).startswith(str(content))
        raise MediaError(f"{content}: {error}" if named else str(error)) from error


def make_limits(**values: object) -> Limits:
    """`Limits` of values from outside.

    Raises:
      MediaError: a value is not a number in its range.
    """
    for name in ("min_pixels", "max_pixels", "max_frames", "total_pixels"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise MediaError(f"{name} is {value!r}, expected a whole number of at least 1")
    fps = values.get("fps", Limits.fps)
    if isinstance(fps, bool) or not isinstance(fps, int | float | np.number) or not 0 < fps < math.inf:
        raise MediaError(f"fps is {fps!r}, expected a number above 0")
    limits = Limits(**values | {"fps": float(fps)})
    if limits.min_pixels > limits.max_pixels:
        raise MediaError(
            f"min_pixels {limits.min_pixels} exceeds max_pixels {limits.max_pixels}, expected at most that"
        )
    return limits


def _local_path(name: str) -> Path:
    scheme, separator, rest = name.partition("://")
    if separator and scheme != "file":
        raise MediaError(f"{name[:80]}: a {scheme} address, expected a local path")
    return Path(rest if separator else name)


def _plan_video(path: Path, limits: Limits, vision: VisionConfig) -> Media:
    from videonsa_jax.data import video  # PyAV, which frames arrays and images do not need

    info = video.probe_video(path, seconds_limit=limits.decode_seconds)
    visual = video_grid(info, limits, vision)
    times, _ = sample_times(info.duration, limits.fps, limits.max_frames)

    def frames() -> UInt8[np.ndarray, "F H W 3"]:
        decoded = video.decode_video(
            path,
            fps=limits.fps,
            max_frames=limits.max_frames,
            min_pixels=limits.min_pixels,
            max_pixels=frame_limit(len(times), limits, vision),
            factor=vision.pixels_per_token,
            seconds_limit=limits.decode_seconds,
            expected=info,
        )
        return decoded.frames

    return Media(str(path), visual, frames)


def _checked_pixels(content: object, axes: str) -> UInt8[np.ndarray, "*F H W 3"]:
    array = np.asarray(content)
    if array.dtype != np.uint8 or array.ndim != axes.count(",") + 1 or array.shape[-1] != 3:
        raise MediaError(
            f"got {type(content).__name__} of shape {array.shape} and dtype {array.dtype}, expected a path or uint8 "
            f"{axes}"
        )
    if 0 in array.shape:
        raise MediaError(f"an array of shape {array.shape} holds no pixels, expected {axes} with at least one of each")
    if array.shape[-3] * array.shape[-2] > MAX_PIXELS_IN:
        raise MediaError(
            f"frames of {array.shape[-2]}x{array.shape[-3]}, expected at most {MAX_PIXELS_IN} pixels a frame"
        )
    return array


def _plan_frames(content: object, limits: Limits, vision: VisionConfig) -> Media:
    array = _checked_pixels(content, "[F, H, W, 3]")
    count, rate = len(array), limits.fps
    if count > limits.max_frames:
        places = np.arange(limits.max_frames) * count // limits.max_frames
        array, rate = array[places], limits.fps * limits.max_frames / count
    visual = _grid(len(array), array.shape[1:3], rate, limits, vision)

    def frames() -> UInt8[np.ndarray, "F H W 3"]:
        return _repeat_last(_resized(array, visual, vision), vision.temporal_patch_size)

    return Media(f"frames {list(content.shape)}, {_checksum(array)}", visual, frames)


def _plan_image(content: object, limits: Limits, vision: VisionConfig) -> Media:
    if isinstance(content, Path):
        source = str(content)
        size = _with_image(content, _upright_size)
        read = lambda: _with_image(content, _upright_pixels)  # noqa: E731
    elif isinstance(content, Image.Image):
        size, pixels = _upright_size(content), _upright_pixels(content)
        source, read = f"image {content.size}, {_checksum(pixels)}", lambda: pixels
    else:
        pixels = _checked_pixels(content, "[H, W, 3]")
        size, source, read = pixels.shape[:2], f"image {pixels.shape}, {_checksum(pixels)}", lambda: pixels
    depth, side = vision.temporal_patch_size, vision.pixels_per_token
    height, width = smart_resize(*size, side, limits.min_pixels, limits.max_pixels)
    visual = Visual(grid=(1, height // side, width // side))
    return Media(source, visual, lambda: _repeat_last(_resized(read()[None], visual, vision), depth))


def _with_image[Result](path: Path, use: Callable[[Image.Image], Result]) -> Result:
    """Applies `use` to an opened image file; every way of failing inside becomes a MediaError."""
    if not path.is_file():
        raise MediaError(f"{path}: no such file, expected an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _upright_size has a stricter limit
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return use(image)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: {error}, expected at most {MAX_PIXELS_IN} pixels") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not an image, expected one of {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, SyntaxError, ArithmeticError, LookupError) as error:  # what Pillow's decoders raise
        raise MediaError(f"{path}: {error}, expected a readable image") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS_IN:
        raise MediaError(f"an image of {width}x{height}, expected 1 to {MAX_PIXELS_IN} pixels")
    transposed = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED
    return (width, height) if transposed else (height, width)


def _upright_pixels(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    _upright_size(image)
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _resized(
    frames: UInt8[np.ndarray, "F h w 3"], visual: Visual, vision: VisionConfig
) -> UInt8[np.ndarray, "F H W 3"]:
    height, width = (side * vision.pixels_per_token for side in visual.grid[1:])
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([resize_frame(frame, height, width) for frame in frames])


def _repeat_last(frames: UInt8[np.ndarray, "f H W 3"], multiple: int) -> UInt8[np.ndarray, "F H W 3"]:
    missing = -len(frames) % multiple
    return np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]) if missing else frames


def _checksum(pixels: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(pixels)):08x}"


def lay_out_frames(
    items: Sequence[tuple[UInt8[np.ndarray, "_ _ patch_dim"], tuple[int, int]]],
    patches_per_token: int,
    target: Mapping[str, np.ndarray],
) -> None:
    """Writes the patches of one context's videos and images into a batch's arrays.

    Args:
      items: patches and (height, width) of a frame in patches, of each in order.
      patches_per_token: patches of a merge group.
      target: views of one context of the fields `patches`, `frame_grids` and `visual_source` of a `Batch`.
    """
    frame = token = 0
    places = target["patches"].shape[1] // patches_per_token  # merged tokens of a frame, padding included
    for patches, frame_grid in items:
        stop = frame + len(patches)
        target["patches"][frame:stop, : patches.shape[1]] = patches
        target["frame_grids"][frame:stop] = frame_grid
        source = np.arange(frame, stop)[:, None] * places + np.arange(patches.shape[1] // patches_per_token)
        target["visual_source"][token : token + source.size] = source.reshape(-1)
        frame, token = stop, token + source.size
