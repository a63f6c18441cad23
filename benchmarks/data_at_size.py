"""What it takes to start training on as many questions as LLaVA-Video-178K has, and how much its batches would pad.

    taskset -c 0 python -m benchmarks.data_at_size --json=benchmarks/results/data_at_size_cpu.json

Draws annotations of 178,510 videos with 960,792 questions in the published layout and an index of the videos, which are
not there: as many last 350 to 550 frames as the paper's 216 K questions need, in eight sizes drawn evenly, the others
are shorter. Then the pipeline is built as `nsa_video_7b` does at every start, and its buckets are chosen anew for
several `data.max_buckets`. One real file's header is read, too. Words are drawn, so that a tokenizer of theirs knows
them whole; Qwen's takes longer.
"""

import argparse
import dataclasses
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.host_memory import HostMemory
from benchmarks.real_videos import (
    ANSWER_WORDS,
    QUESTION_WORDS,
    SIZES,
    SUBSET,
    annotation,
    make_videos,
    sentences,
    write_tokenizer,
)
from experiments import configs
from videonsa_jax.data.buckets import choose_buckets
from videonsa_jax.data.frames import VideoInfo
from videonsa_jax.data.pipeline import Pipeline, build_pipeline, split_records
from videonsa_jax.data.sources import LENGTH_MULTIPLE
from videonsa_jax.data.video import probe_video
from videonsa_jax.data.video_index import IndexedVideo
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.environment import environment

VIDEOS, QUESTIONS = 178_510, 960_792  # LLaVA-Video-178K's card: captions, and open-ended questions
PAPER_QUESTIONS = 216_000
PIXELS = ((1280, 720), (640, 360), (854, 480), (640, 480), (320, 240), (720, 1280), (360, 640), (480, 480))
LONG, SHORT = (87.5, 137.5), (5.0, 87.0)  # seconds of videos with 350 to 550 frames at 4 a second, and of the others
MOST_BUCKETS = (1, 2, 4, 6, 8, 12)


def write_files(folder: Path, videos: int, questions: int) -> None:
    """Draws annotations, an index of the videos, and a tokenizer."""
    rng = np.random.default_rng(0)
    folder.joinpath(SUBSET).mkdir(parents=True)
    counts = np.full(videos, questions // videos)
    counts[rng.permutation(videos)[: questions % videos]] += 1
    pools = [sentences(rng, 4096, words) for words in (QUESTION_WORDS, ANSWER_WORDS)]
    names = [f"academic_source/{number:06}.mp4" for number in range(videos)]
    with (folder / SUBSET / f"{SUBSET.removesuffix('_v0_1')}_oe_v0_1_qa_processed.json").open("w") as file:
        for number, name in enumerate(np.repeat(names, counts).tolist()):
            asked, answered = (pool[rng.integers(len(pool))] for pool in pools)
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(annotation(name, asked, answered)))
        file.write("\n]\n")
    long = rng.random(videos) < PAPER_QUESTIONS / QUESTIONS
    seconds = np.where(long, rng.uniform(*LONG, videos), rng.uniform(*SHORT, videos))
    with (folder / "index.jsonl").open("w") as file:
        for name, duration, size in zip(names, seconds.tolist(), rng.integers(len(PIXELS), size=videos), strict=True):
            info = VideoInfo(*PIXELS[size], duration=duration, fps=30.0)
            entry = dataclasses.asdict(IndexedVideo(str(folder / SUBSET / name), size=1, mtime_ns=1, info=info))
            file.write(json.dumps({key: value for key, value in entry.items() if value != ""}) + "\n")
    write_tokenizer(folder / "tokenizer.json")


def timed[T](function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the CPU seconds that it took."""
    start = time.process_time()
    return function(), time.process_time() - start


def start_up(experiment: Experiment) -> tuple[Pipeline, dict[str, Any]]:
    """Builds the training pipeline as every host does at every start; what that takes."""
    data = experiment.data
    with HostMemory() as memory:
        pipeline, seconds = timed(lambda: build_pipeline(data, experiment.model, split="train", seed=0))
    (records, _), reading = timed(lambda: split_records(data, "train"))
    return pipeline, {
        "records_read": len(records),
        "records_kept": len(pipeline.records),
        "videos_kept": len({record.video for record in pipeline.records}),
        "cpu_seconds": seconds,
        "of_them_reading_records": reading,
        "peak_bytes": memory.peak,
        "worker_bytes": len(pickle.dumps(pipeline._loader, pickle.HIGHEST_PROTOCOL)),
        "padding": dataclasses.asdict(pipeline.padding),
    }


def bucket_table(pipeline: Pipeline, experiment: Experiment) -> dict[int, dict[str, float]]:
    """Shares of padding and the CPU seconds of choosing, by `data.max_buckets`."""
    grids = [context.visual.grid for context in pipeline._loader.index.contexts]
    merged, block = experiment.model.vision.spatial_merge_size**2, experiment.model.nsa.block_size
    multiple, held = int(np.lcm(LENGTH_MULTIPLE, block)), sum(int(np.prod(grid)) for grid in grids)
    table = {}
    for most in MOST_BUCKETS:
        (buckets, places), seconds = timed(
            lambda most=most: choose_buckets(grids, (), multiple=multiple, merged_patches=merged, most=most)
        )
        tokens = sum(buckets[place].visual_tokens for place in places)
        patches = sum(buckets[place].frames * buckets[place].patches for place in places)
        table[most] = {
            "visual_tokens": 1 - held / tokens,
            "patches": 1 - held * merged / patches,
            "choosing_cpu_seconds": seconds,
        }
    return table


def header_seconds(folder: Path, repeats: int = 200) -> dict[str, float]:
    """CPU seconds of reading the header of one 112.5 s video of each size."""
    paths = [folder / f"{width}x{height}.mp4" for width, height in SIZES]
    make_videos(paths, SIZES, drawn=1, workers=1)
    return {
        path.stem: timed(lambda path=path: [probe_video(path) for _ in range(repeats)])[1] / repeats for path in paths
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--videos", type=int, default=VIDEOS, help=f"default {VIDEOS:,}")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help=f"default {QUESTIONS:,}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = environment() | {"load_before": os.getloadavg()} | {"header_cpu_seconds": header_seconds(folder)}
        write_files(folder / "files", options.videos, options.questions)
        experiment = configs.get("nsa_video_7b")
        files = {"source": str(folder / "files"), "cache_dir": name}
        files |= {"tokenizer": f"{files['source']}/tokenizer.json", "video_index": f"{files['source']}/index.jsonl"}
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **files))
        pipeline, result["start_up"] = start_up(experiment)
        result["by_max_buckets"] = bucket_table(pipeline, experiment)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("header_cpu_seconds", "start_up", "by_max_buckets")}, indent=1))


if __name__ == "__main__":
    main()
