"""The embedded data set `clips`: procedurally rendered scenes as H.264 files, with LLaVA-Video style JSON beside them.

Eight families of multiple-choice questions mirror what the paper's benchmarks ask of video models: needle colour,
needle time, event order, text in a frame, event count, motion speed, motion direction, spatial relation. `scenes.py`
says why order, time, speed and direction cannot be read from one frame or from shuffled frames; sample at 4 fps.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
from tqdm import tqdm

from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.questions import DESCRIBE, SPLITS, Clip, Split, aspect_ratio, corpus, draw_clips
from videonsa_jax.data.scenes import SLOTS_PER_SECOND, Mark, Scene, paint
from videonsa_jax.data.tokenizer import train_tokenizer

# Raise it when the same configuration would give other files.
_VERSION = 9

_MIN_SIDE = 64
_CLIPS_PER_WORKER = 16


@dataclass(frozen=True)
class ClipsPaths:
    """Where a made data set lies; the JSON's video paths are relative to `root`."""

    train_json: Path
    heldout_json: Path
    tokenizer_json: Path
    root: Path


def clips_long(seconds: int) -> ClipsConfig:
    """The data set with every clip `seconds` long, for testing beyond the lengths trained on."""
    return ClipsConfig(train_clips=400, seconds=(seconds,))


def _check(config: ClipsConfig) -> None:
    def require(holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"ClipsConfig: {field} is {getattr(config, field)}, expected {expected}")

    require(config.train_clips >= 1, "train_clips", "at least 1")
    require(config.heldout_clips >= 1, "heldout_clips", "at least 1")
    require(config.seed >= 0, "seed", "a non-negative number")
    require(config.frame_side >= _MIN_SIDE, "frame_side", f"at least {_MIN_SIDE} pixels")
    require(config.render_workers >= 0, "render_workers", "a number of processes, or 0 for one per core")
    require(_are_ratios(config.aspects), "aspects", "one width:height or more, each from 1:4 to 4:1")
    require(len(config.seconds) > 0, "seconds", "one length or more")
    for name in ("seconds", "short_seconds"):
        multiples = all(length >= 8 and length % 4 == 0 for length in getattr(config, name))
        require(multiples, name, "lengths that are multiples of 4 from 8 on")


def _are_ratios(aspects: Sequence[str]) -> bool:
    try:
        return len([aspect_ratio(aspect) for aspect in aspects]) > 0
    except ValueError:
        return False


def write_video(scene: Scene, path: Path) -> None:
    """Renders a scene into an H.264 mp4 file, whole or not at all.

    Every slot opens with a keyframe and the quantiser is constant, so that a slot's decoded pixels depend on that
    slot alone: prediction from earlier slots would leave traces of them, and with them of the order.
    """
    # A worker that outlives its killed parent for a moment must not share a file with the next run's.
    part = path.with_suffix(f".{os.getpid()}.part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264",
            rate=scene.fps,
            options={
                "preset": "ultrafast",
                "qp": "30",
                "x264-params": "ipratio=3",
                "g": str(scene.frames_per_slot),
                "keyint_min": str(scene.frames_per_slot),
                "sc_threshold": "0",
                "bf": "0",
            },
        )
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, scene.fps)
        pictures: dict[tuple[Mark, ...], av.VideoFrame] = {}
        for slot in range(scene.slots):
            marks = scene.marks(slot)
            if marks not in pictures:
                pictures[marks] = av.VideoFrame.from_ndarray(paint(scene, marks)).reformat(format="yuv420p")
            for index in range(slot * scene.frames_per_slot, (slot + 1) * scene.frames_per_slot):
                frame = pictures[marks]
                frame.pts, frame.time_base = index, Fraction(1, scene.fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    part.replace(path)


def _write_clip(clip: Clip, root: Path) -> None:
    path = root / clip.video
    if not path.exists():
        write_video(clip.scene, path)


def _records(clip: Clip, split: Split) -> Iterator[dict]:
    """A clip's questions and, for training, its description."""
    scene = clip.scene
    conversations = [(q.prompt, q.answer, {"family": q.family, "options": list(q.options)}) for q in clip.questions]
    if split == "train":
        conversations.append((DESCRIBE, clip.description, {}))
    for number, (prompt, answer, choice) in enumerate(conversations):
        yield {
            "id": f"{Path(clip.video).with_suffix('')}-{number}",
            "video": clip.video,
            "conversations": [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": answer},
            ],
            "data_source": "clips",
            **choice,
            "answer": answer,
            "width": scene.width,
            "height": scene.height,
            "fps": scene.fps,
            "duration": scene.slots / SLOTS_PER_SECOND,
            "num_frames": scene.slots * scene.frames_per_slot,
        }


def _progress(done: Iterable[None], total: int) -> None:
    if sys.stderr.isatty():
        for _ in tqdm(done, total=total, desc="making clips", unit="clip"):
            pass
        return
    for number, _ in enumerate(done, 1):
        if number * 10 // total > (number - 1) * 10 // total:
            print(f"making clips: {number} of {total}", file=sys.stderr, flush=True)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render(clips: list[Clip], root: Path, workers: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, -(-len(clips) // _CLIPS_PER_WORKER))
    write = partial(_write_clip, root=root)
    if workers == 1:
        _progress(map(write, clips), len(clips))
        return
    # A fork of a process with JAX's threads may deadlock.
    with multiprocessing.get_context("spawn").Pool(workers, _ignore_interrupts) as pool:
        _progress(pool.imap_unordered(write, clips, chunksize=8), len(clips))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(config: ClipsConfig, root: Path) -> None:
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    clips = {split: draw_clips(config, split) for split in SPLITS}
    _render([clip for split in SPLITS for clip in clips[split]], root, config.render_workers)
    for left_by_a_killed_run in root.rglob("*.part"):
        left_by_a_killed_run.unlink(missing_ok=True)
    for split in SPLITS:
        records = [record for clip in clips[split] for record in _records(clip, split)]
        (root / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")
    chat = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n"]
    train_tokenizer([*corpus(), *chat], root / "tokenizer.json")


def make_clips(config: ClipsConfig, cache_dir: str | os.PathLike[str]) -> ClipsPaths:
    """Makes the data set under `cache_dir` unless it is there, with a progress bar, and says where it is.

    The folder appears under its name once it is complete. An interrupted run leaves a hidden one that the next run
    goes on with; a second process waits for the first.

    Args:
      config: what to make; `render_workers` does not change the result. With several workers the calling script
        guards its entry point with `if __name__ == "__main__"`, as every use of multiprocessing's spawn does.
      cache_dir: the folder for made data.

    Raises:
      ValueError: a field of `config` is out of range.
    """
    _check(config)
    content = {name: value for name, value in asdict(config).items() if name != "render_workers"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    name = f"clips-v{_VERSION}-{digest}"
    root = Path(cache_dir) / name
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root.with_name(f".{name}.lock")):
            if not root.exists():
                partial_root = root.with_name(f".{name}.partial")
                _make(config, partial_root)
                partial_root.rename(root)
    return ClipsPaths(root / "train.json", root / "heldout.json", root / "tokenizer.json", root)
