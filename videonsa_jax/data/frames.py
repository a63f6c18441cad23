"""Frames without files: their number and size, resizing, and patches in Qwen's order."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

MAX_SIDE_RATIO = 200  # Qwen's limit on a frame's aspect ratio
MAX_PIXELS_IN = 2**26  # two 8K frames
MIN_PIXELS, MAX_PIXELS = 3136, 12_845_056  # preprocessor_config.json of Qwen2.5-VL: 4 and 16384 tokens of 28x28


class VideoError(Exception):
    """A video cannot be used: one sentence naming the file, what was found and what was expected."""


@dataclass(frozen=True)
class VideoInfo:
    """What a header says about a video.

    Attributes:
      width: pixels, as displayed (after rotation).
      height: pixels, as displayed.
      duration: seconds.
      fps: average frames per second; 0 if the file does not say.
    """

    width: int
    height: int
    duration: float
    fps: float = 0.0


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Qwen's frame size: multiples of `factor`, area within limits, aspect ratio about kept.

    Source: `smart_resize` of transformers' Qwen2-VL image processor.

    Args:
      height: pixels.
      width: pixels.
      factor: pixels a visual token is wide and high.
      min_pixels: lower limit of the result's area.
      max_pixels: upper limit of the result's area.

    Returns:
      (height, width) in pixels; unchanged where already multiples of `factor` inside the limits.

    Raises:
      ValueError: a side is not positive, or the aspect ratio is past Qwen's limit of 200.
    """
    if min(height, width) < 1 or max(height, width) > MAX_SIDE_RATIO * min(height, width):
        raise ValueError(f"frame size {width}x{height}, expected an aspect ratio of at most {MAX_SIDE_RATIO}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def frames_at(duration: float, fps: float) -> int:
    """How many frames `fps` a second are of a video of `duration` seconds; at least one."""
    return max(1, math.ceil(duration * fps - 1e-6))  # 8.0000001 s at 4 fps are 32 frames


def sample_times(duration: float, fps: float, max_frames: int) -> tuple[Float[np.ndarray, "F"], float]:
    """Target times of the sampled frames.

    Args:
      duration: seconds.
      fps: frames wanted per second; frame k stands at k / fps.
      max_frames: upper limit; a longer video is sampled uniformly, from 0 in steps of duration / max_frames.

    Returns:
      (times in seconds, frames per second really sampled); at least one time.
    """
    count = frames_at(duration, fps)
    if count > max_frames:
        count, fps = max_frames, max_frames / duration
    return np.arange(count) / fps, fps


def resize_frame(frame: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """One RGB frame resized with Pillow's bicubic filter, as Qwen's image processor does."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def frames_to_patches(
    frames: UInt8[np.ndarray, "F H W C"], *, patch_size: int = 14, temporal_patch_size: int = 2, merge_size: int = 2
) -> UInt8[np.ndarray, "t P patch_dim"]:
    """Cuts frames into patches in Qwen's order.

    The patches of one merge group (2x2) are consecutive, groups are row-major; each patch is flattened as (channel,
    frame of the pair, row, column).

    Args:
      frames: F a multiple of `temporal_patch_size`, H and W of `patch_size` x `merge_size`.
      patch_size: pixels a patch is wide and high.
      temporal_patch_size: frames a patch is deep.
      merge_size: patches along each side of a merge group.

    Returns:
      One row of patches per temporal grid position.

    Raises:
      ValueError: a size does not divide.
    """
    count, height, width, channels = frames.shape
    side = patch_size * merge_size
    if count % temporal_patch_size or height % side or width % side:
        raise ValueError(
            f"{count} frames of {width}x{height}, expected a multiple of {temporal_patch_size} frames and sides that "
            f"are multiples of {side}"
        )
    cut = frames.reshape(
        count // temporal_patch_size,
        temporal_patch_size,
        height // side,
        merge_size,
        patch_size,
        width // side,
        merge_size,
        patch_size,
        channels,
    )
    patches = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    patch_dim = channels * temporal_patch_size * patch_size**2
    return np.ascontiguousarray(patches).reshape(count // temporal_patch_size, -1, patch_dim)
