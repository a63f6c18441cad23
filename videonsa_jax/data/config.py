"""What the data path is told: where the samples are and how they become arrays."""

from dataclasses import dataclass
from typing import Literal

Ablation = Literal["none", "text_only", "single_frame", "shuffled_frames"]
Resize = Literal["pillow", "swscale"]
Kind = Literal["open_ended", "multi_choice", "caption"]


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
      source: "clips" (made on first use), or where LLaVA-Video style records are: a JSON file, a list of such files, a
        folder or a pattern (see `annotations.py`).
      heldout: the held-out split, likewise; empty = none.
      kinds: what is read of a folder, pattern or list of files: "open_ended", "multi_choice" and "caption" files.
      split_turns: whether every turn of a conversation is a training record of its own, a question-answer pair.
      video_root: folder that the records' video paths are relative to; empty = each JSON's own folder.
      video_index: file that `python -m experiments.index` has built of what the videos hold; videos that it could not
        read are left out and counted. Empty = records say it, or headers are read at every start.
      tokenizer: path of a tokenizer.json; empty = the one trained for `clips`.
      system_prompt: opens conversations that have none; empty = none.
      cache_dir: where made data is kept.
      frame_cache_gigabytes: limit of the folder of decoded frames below `cache_dir`; 0 = decode every time.
      fps: frames sampled per second of video.
      max_frames: upper limit of sampled frames; longer videos are sampled uniformly.
      fewest_frames: videos that have fewer frames at `fps` are left out, counted.
      most_frames: likewise those that have more, before `max_frames`; 0 = none are.
      min_pixels: lower limit of a resized frame's area.
      max_pixels: upper limit of a resized frame's area.
      resize: "pillow", as Qwen's processor, or "swscale", several times faster (`video.decode_video`).
      max_visual_tokens: contexts longer than this are dropped from the index, counted.
      max_text_tokens: longer text rows are dropped likewise.
      buckets: visual lengths that contexts are padded to; empty = chosen from the data.
      max_buckets: most buckets chosen: each is compiled once, and fewer leave more padding.
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
    kinds: tuple[Kind, ...] = ("open_ended", "multi_choice")
    split_turns: bool = False
    video_root: str = ""
    video_index: str = ""
    tokenizer: str = ""
    system_prompt: str = "You are a helpful assistant."
    cache_dir: str = "datasets"
    frame_cache_gigabytes: float = 0.0
    clips: ClipsConfig = ClipsConfig()
    fps: float = 4.0
    max_frames: int = 768
    fewest_frames: int = 1
    most_frames: int = 0
    min_pixels: int = 3136
    max_pixels: int = 7_056
    resize: Resize = "pillow"
    max_visual_tokens: int = 131_072
    max_text_tokens: int = 512
    buckets: tuple[int, ...] = ()
    max_buckets: int = 4
    contexts_per_batch: int = 8
    questions_per_context: int = 4
    questions_per_row: int = 1
    workers: int = 0
    max_failure_share: float = 0.05
    decode_seconds: float = 20.0
    ablation: Ablation = "none"
