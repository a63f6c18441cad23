"""What the data path is told: where the samples are and how they become arrays."""

from dataclasses import dataclass
from typing import Literal

Ablation = Literal["none", "text_only", "single_frame", "shuffled_frames"]
Resize = Literal["pillow", "swscale"]


@dataclass(frozen=True)
class ClipsConfig:
    """The embedded data set: procedurally rendered scenes as H.264 files (see `clips.py`).

    Attributes:
      train_clips: clips of the training split.
      heldout_clips: clips of the held-out split; other seeds, other scenes.
      seed: seeds every scene.
      frame_side: side in pixels of the square with a frame's area; resolutions and aspect ratios vary around it.
      aspects: width to height, dealt evenly like `seconds`.
      seconds: clip lengths in seconds, dealt evenly (a length may stand there twice); multiples of 4 from 8 on.
      short_seconds: further lengths of training clips, dealt with `seconds`: with long clips alone, a model learns to
        read a frame at the price of thousands of tokens an example.
      render_workers: processes that render and encode; 0 = one per core.
    """

    train_clips: int = 2000
    heldout_clips: int = 800
    seed: int = 0
    frame_side: int = 128
    # No wider ones: a token is 28 pixels, so that a small model would see 16:9 at another scale along each axis.
    aspects: tuple[str, ...] = ("1:1", "5:4", "4:5")
    seconds: tuple[int, ...] = (8, 8, 8, 12)
    short_seconds: tuple[int, ...] = ()
    render_workers: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become arrays.

    Attributes:
      source: "clips" (made on first use) or the path of a LLaVA-Video style JSON file.
      heldout: "clips", or the JSON file of the held-out split; empty = none.
      video_root: folder that the JSON's video paths are relative to; empty = the JSON's own folder.
      tokenizer: path of a tokenizer.json; empty = the one trained for `clips`.
      system_prompt: opens conversations that have none; empty = none.
      cache_dir: where made data is kept.
      frame_cache_gigabytes: limit of the folder of decoded frames below `cache_dir`; 0 = decode every time.
      fps: frames sampled per second of video.
      max_frames: upper limit of sampled frames; longer videos are sampled uniformly.
      min_pixels: lower limit of a resized frame's area.
      max_pixels: upper limit of a resized frame's area.
      max_visual_tokens: contexts longer than this are dropped from the index, counted.
      max_text_tokens: longer text rows are dropped likewise.
      buckets: visual lengths that contexts are padded to; empty = chosen from the data (at most 4).
      contexts_per_batch: B, over all hosts.
      questions_per_context: Q, text rows of one video that share its visual context.
      questions_per_row: questions of one video that training joins into one row, as a conversation of several turns.
      workers: loader processes; 0 = threads of this process.
      max_failure_share: share of failed contexts above which the run stops.
      decode_seconds: time limit for decoding one file.
      ablation: removes information from the video: nothing, everything, all but one frame, or the frames' order.
    """

    source: str = "clips"
    heldout: str = "clips"
    video_root: str = ""
    tokenizer: str = ""
    system_prompt: str = "You are a helpful assistant."
    cache_dir: str = "datasets"
    frame_cache_gigabytes: float = 0.0
    clips: ClipsConfig = ClipsConfig()
    fps: float = 4.0
    max_frames: int = 768
    min_pixels: int = 3136
    max_pixels: int = 7_056
    max_visual_tokens: int = 131_072
    max_text_tokens: int = 512
    buckets: tuple[int, ...] = ()
    contexts_per_batch: int = 8
    questions_per_context: int = 4
    questions_per_row: int = 1
    workers: int = 0
    max_failure_share: float = 0.05
    decode_seconds: float = 20.0
    ablation: Ablation = "none"
