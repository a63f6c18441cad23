"""mp4 files as long and as large as LLaVA-Video-178K's, and questions in its layout; nothing is downloaded.

A video is a montage of scenes: a camera that pans over textures, two moving boxes, film grain in every frame. Scenes
are drawn and encoded side by side, once; videos are different orders of them, their packets copied. So a video takes
the decoder what one encoded whole would (H.264 with B frames, 30 frames a second, a keyframe at every cut and every 250
frames), and many are made in seconds.
"""

import itertools
import json
import multiprocessing
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from videonsa_jax.data.tokenizer import train_tokenizer

RATE = 30  # frames a second
SIZES = ((1280, 720), (640, 360))  # width, height
SCENES, SCENE_SECONDS = 15, 7.5  # of a video: 112.5 s, 450 frames at 4 a second
QUALITY = "20"  # x264's constant rate factor
SUBSET = "1_2_m_academic_v0_1"  # a folder of LLaVA-Video-178K
QUESTION_WORDS, ANSWER_WORDS = (6, 24), (4, 60)  # of a question and of its answer, drawn evenly
_WORDS = """what where why who how does is the a person man woman child dog camera room kitchen street table box red
blue moves turns holds opens picks places before after while first then next left right slowly from to with and of in"""
_MARGIN = 256  # pixels that the camera pans over


def make_scene(path: Path, width: int, height: int, seed: int, seconds: float) -> None:
    """Draws and encodes one scene, unless it is there."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    texture = np.zeros((height + _MARGIN, width + _MARGIN, 3), np.float32)
    for scale, strength in ((4, 8), (16, 20), (64, 35)):
        coarse = rng.normal(128, strength, (texture.shape[0] // scale + 2, texture.shape[1] // scale + 2, 3))
        coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        texture += np.asarray(coarse.resize(texture.shape[1::-1], Image.Resampling.BICUBIC), np.float32) - 128
    texture = (texture + 128).clip(0, 255).astype(np.uint8)
    grain = rng.integers(0, 9, (8, height, width, 1), np.uint8)
    start = rng.uniform(0, 100)
    part = path.with_suffix(f".{os.getpid()}.part")
    with av.open(str(part), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": QUALITY}
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.codec_context.thread_count = 1
        for number in range(round(seconds * RATE)):
            now = start + number / RATE
            x, y = (round(_MARGIN / 2 * (1 + wave)) for wave in (np.sin(now / 5), np.cos(now / 7)))
            image = texture[y : y + height, x : x + width] + grain[number % len(grain)]
            for box in range(2):
                left = round((width - height // 4) * (0.5 + 0.5 * np.sin(now * (1 + box))))
                image[height // 4 * (1 + box) :][: height // 5, left : left + height // 4] = (60, 90, 200 - 90 * box)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(stream.encode(None))
    part.replace(path)


def join_scenes(path: Path, scenes: Sequence[Path]) -> None:
    """Writes scenes one after the other as one video, packet by packet."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with av.open(str(part), "w", format="mp4") as out:
        stream, frames = None, 0
        for scene in scenes:
            with av.open(str(scene)) as source:
                own = source.streams.video[0]
                stream = stream or out.add_stream_from_template(own)
                begin = round(frames / (RATE * own.time_base))
                for packet in source.demux(own):
                    if packet.dts is not None:  # the last one is empty
                        packet.pts, packet.dts, packet.stream = packet.pts + begin, packet.dts + begin, stream
                        out.mux(packet)
                        frames += 1
    part.replace(path)


def make_videos(
    paths: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    *,
    scenes: int = SCENES,
    scene_seconds: float = SCENE_SECONDS,
    drawn: int = 16,
    workers: int,
) -> None:
    """Writes videos, those that are there apart.

    Args:
      paths: of the videos, in one folder, which is made if need be; scenes are kept below it.
      sizes: (width, height) of the videos, in turn.
      scenes: of a video.
      scene_seconds: length of each.
      drawn: different scenes of each size.
      workers: processes.
    """
    kept = paths[0].parent / "scenes"
    kept.mkdir(parents=True, exist_ok=True)
    of_size = {size: [kept / f"{size[0]}x{size[1]}_{number}.mp4" for number in range(drawn)] for size in sizes}
    scene_jobs = [
        (path, *size, seed, scene_seconds) for size, files in of_size.items() for seed, path in enumerate(files)
    ]
    scene_jobs.sort(key=lambda job: -job[1] * job[2])  # the longest jobs first
    video_jobs = []
    for number, (path, size) in enumerate(zip(paths, itertools.cycle(sizes), strict=False)):
        order = np.resize(np.random.default_rng(number).permutation(drawn), scenes)
        if not path.exists():
            video_jobs.append((path, [of_size[size][scene] for scene in order]))
    # A fork of a process with JAX's threads may deadlock.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(make_scene, scene_jobs, chunksize=1)
        pool.starmap(join_scenes, video_jobs, chunksize=1)


def sentences(rng: np.random.Generator, count: int, words: tuple[int, int]) -> list[str]:
    """Drawn words, from `words[0]` to `words[1]` of them in each."""
    vocabulary = np.array(_WORDS.split())
    return [" ".join(rng.choice(vocabulary, length)) for length in rng.integers(words[0], words[1] + 1, count)]


def annotation(video: str, question: str, answer: str) -> dict[str, Any]:
    """A question about a video, as LLaVA-Video-178K's files have it: one to a record."""
    turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
    return {"id": Path(video).stem, "data_source": SUBSET, "video": video, "conversations": turns}


def write_annotations(folder: Path, videos: Sequence[Path], questions: int) -> None:
    """Open-ended questions about videos below `folder / SUBSET`, and a tokenizer of their words.

    Qwen's tokenizer is not at hand; which ids tokens have decides no time.
    """
    rng, count = np.random.default_rng(0), len(videos) * questions
    asked, answered = sentences(rng, count, QUESTION_WORDS), sentences(rng, count, ANSWER_WORDS)
    names = [str(video.relative_to(folder / SUBSET)) for video in videos for _ in range(questions)]
    file = folder / SUBSET / f"{SUBSET.removesuffix('_v0_1')}_oe_v0_1_qa_processed.json"
    file.write_text(json.dumps(list(map(annotation, names, asked, answered)), indent=1) + "\n")
    write_tokenizer(folder / "tokenizer.json")


def write_tokenizer(path: Path) -> None:
    """A tokenizer of the drawn words."""
    train_tokenizer([_WORDS, "system user assistant You are a helpful assistant."], path)
