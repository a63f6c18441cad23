"""How many frames a second one core loads, what bounds it, and whether a training GPU would wait.

    python -m benchmarks.loader_speed --json=benchmarks/results/loader_cpu.json

Makes H.264 files as long and as large as LLaVA-Video-178K's (112 s; 1280x720 and 640x360; `benchmarks.real_videos`),
and loads them as `nsa_video_7b` does: 4 frames a second, at most 50,176 pixels, patches, padded rows. Times of parts
are CPU seconds of one thread. Then the loader runs with workers, as fast as it goes, and against a consumer that takes
a sample of 450 frames every 2 seconds, as one training GPU would; at last from the cache of decoded frames.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

from benchmarks.real_videos import (
    RATE,
    SCENE_SECONDS,
    SCENES,
    SIZES,
    SUBSET,
    make_videos,
    write_annotations,
)
from experiments import configs
from videonsa_jax.data import video
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.examples import build_example, empty_arrays, fill_row
from videonsa_jax.data.frames import frames_to_patches
from videonsa_jax.data.pipeline import Pipeline, build_pipeline
from videonsa_jax.data.video_index import build_video_index
from videonsa_jax.training.environment import environment

STEP_SECONDS, FRAMES = 2.0, 450  # of a training step, and sampled for it
QUESTIONS, COPIES = 4, 4  # of each video, and videos of each size


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """CPU seconds of this process, the least of some repeats."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


def decode_every_frame(path: Path, threads: int = 1, kind: str = "SLICE", skip: str = "DEFAULT") -> int:
    """Decodes a file, but for frames that `skip` names, and throws it away; the number of frames decoded."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = threads, kind
        stream.codec_context.skip_frame = skip
        return sum(1 for _ in container.decode(stream))


def demux(path: Path) -> int:
    """Reads a file's packets; their number."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.demux(video=0))


def every_packet_shown(reader: video._Reader):
    """Instead of `_Reader._packets`: no frame is left out."""
    return ((packet, True) for packet in reader.container.demux(reader.stream))


def parts_of_a_sample(path: Path, pipeline: Pipeline, repeats: int) -> dict:
    """Where the CPU seconds of one sample go, before and after what makes it fast."""
    loader = pipeline._loader
    data, model = loader.config, loader.model
    context = next(c for c in loader.index.contexts if c.video == str(path))
    options = {
        "fps": data.fps,
        "max_frames": data.max_frames,
        "max_pixels": data.max_pixels,
        "seconds_limit": 600.0,
        "expected": context.info,
    }
    skipping = video._Reader._packets

    def sampled(resize: str) -> np.ndarray:
        return video.decode_video(path, resize=resize, **options).frames

    parts = {"demux": seconds_of(lambda: demux(path), repeats)}
    parts["decode every frame"] = seconds_of(lambda: decode_every_frame(path), repeats)
    video._Reader._packets = every_packet_shown
    try:
        parts["sampled, every frame decoded, pillow"] = seconds_of(lambda: sampled("pillow"), repeats)
    finally:
        video._Reader._packets = skipping
    parts["sampled, pillow"] = seconds_of(lambda: sampled("pillow"), repeats)
    parts["sampled, swscale"] = seconds_of(lambda: sampled("swscale"), repeats)
    frames = sampled("swscale")
    parts["patches"] = seconds_of(lambda: frames_to_patches(frames), repeats)
    shape = dataclasses.replace(pipeline.shapes[context.bucket], contexts=1)

    def whole_row() -> None:
        arrays = empty_arrays(shape)
        example = build_example(context, loader.index.records, loader.chat, data, model, answered=True)
        fill_row(arrays, 0, example)

    parts["whole row"] = seconds_of(whole_row, repeats)
    start = time.perf_counter()
    decode_every_frame(path, threads=2, kind="FRAME")
    wall_of_two_threads = time.perf_counter() - start
    return {
        "file": {
            "bytes": path.stat().st_size,
            "kilobits_per_second": path.stat().st_size / 125 / context.info.duration,
        },
        "frames": round(RATE * context.info.duration),
        "frames_that_others_refer_to": decode_every_frame(path, skip="NONREF"),
        "sampled_frames": len(frames),
        "visual_tokens": context.visual.num_tokens,
        "cpu_seconds": parts,
        "frames_per_second_and_core": {
            "before": len(frames) / parts["sampled, every frame decoded, pillow"],
            "now": len(frames) / parts["sampled, swscale"],
            "whole row": len(frames) / parts["whole row"],
        },
        "wall_seconds_of_two_frame_threads": wall_of_two_threads,
    }


def _cpu_seconds_of_children() -> dict[int, float]:
    seconds = {}
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        seconds[child.pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def loader_rates(pipeline: Pipeline, samples: int, step_seconds: float) -> dict:
    """Runs the loader: as fast as it goes (`step_seconds` 0), or against a consumer that takes so long a sample."""
    iterator = pipeline.iterator()
    frames, waited = 0, 0.0
    try:
        next(iterator)  # workers start
        start, cpu_before = time.perf_counter(), _cpu_seconds_of_children()
        for _ in range(samples):
            asked = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - asked
            # every visual token of a row stands for a temporal position of two frames
            positions = np.asarray(batch.inputs.frame_grids)[..., 0] > 0
            frames += 2 * int(positions.sum())
            time.sleep(step_seconds)
        wall, cpu_after = time.perf_counter() - start, _cpu_seconds_of_children()
        cpu = sum(seconds - cpu_before.get(pid, 0.0) for pid, seconds in cpu_after.items())
    finally:
        iterator.close()
    return {
        "samples": samples,
        "step_seconds": step_seconds,
        "wall_seconds": wall,
        "samples_per_second": samples / wall,
        "frames_per_second": frames / wall,
        "frames_per_cpu_second": frames / cpu if cpu else None,
        "wait_share": waited / wall,
        "failed": dict(iterator.failures.counts),
    }


def prepare(folder: Path, scenes: int) -> dict[str, Path]:
    """Videos, their questions, tokenizer and index; of each size one video, by its name."""
    names = [f"{width}x{height}" for width, height in SIZES]
    source = folder / SUBSET / "academic_source"
    paths = [source / f"{name}_{scenes}_{copy}.mp4" for copy in range(COPIES) for name in names]
    make_videos(paths, SIZES, scenes=scenes, drawn=scenes, workers=os.cpu_count() or 1)
    write_annotations(folder, paths, QUESTIONS)
    build_video_index(folder / "index.jsonl", [str(path) for path in paths], workers=2)
    return dict(zip(names, paths, strict=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("datasets/loader_speed"), help="for the videos")
    parser.add_argument(
        "--scenes", type=int, default=SCENES, help=f"of a video, {SCENE_SECONDS} s each; default {SCENES}"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts; default 3")
    parser.add_argument("--samples", type=int, default=12, help="that the loader loads; default 12")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loader processes; default 1 2")
    parser.add_argument("--only-decoding", action="store_true", help="no slow consumer, and no cache of frames")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = _parser().parse_args(arguments)
    folder, scenes = options.folder, options.scenes
    videos = prepare(folder, scenes)
    experiment = configs.get("nsa_video_7b")
    data = dataclasses.replace(
        experiment.data,
        source=str(folder),
        tokenizer=str(folder / "tokenizer.json"),
        video_index=str(folder / "index.jsonl"),
        cache_dir=str(folder),
        contexts_per_batch=1,
        questions_per_context=QUESTIONS,
        workers=0,
    )
    if scenes * SCENE_SECONDS * data.fps < data.fewest_frames:
        data = dataclasses.replace(data, fewest_frames=1)
    result: dict = {"needed_frames_per_second": FRAMES / STEP_SECONDS, "load_before": os.getloadavg()}
    result |= environment() | {"parts": {}, "loader": []}

    def save() -> None:
        if options.json:
            part = options.json.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(options.json)

    def run_loader(changed: DataConfig, step_seconds: float) -> dict:
        pipeline = build_pipeline(changed, experiment.model, split="train", seed=0)
        return loader_rates(pipeline, options.samples, step_seconds)

    pipeline = build_pipeline(data, experiment.model, split="train", seed=0)
    for name, path in videos.items():
        result["parts"][name] = found = parts_of_a_sample(path, pipeline, options.repeats)
        print(f"{name}: {found['sampled_frames']} of {found['frames']} frames")
        for part, seconds in found["cpu_seconds"].items():
            print(f"  {part:40}{seconds:8.3f} CPU s")
        for part, rate in found["frames_per_second_and_core"].items():
            print(f"  {part:40}{rate:8.0f} frames a second and core")
    save()
    paces = (0.0,) if options.only_decoding else (0.0, STEP_SECONDS)
    runs = [(dataclasses.replace(data, workers=workers), pace) for workers in options.workers for pace in paces]
    if options.workers and not options.only_decoding:
        cached = dataclasses.replace(data, workers=1, frame_cache_gigabytes=4.0)
        run_loader(cached, 0.0)  # fills the cache
        runs.append((cached, 0.0))
    for changed, pace in runs:
        is_cached = changed.frame_cache_gigabytes > 0
        run = {"workers": changed.workers, "cached": is_cached} | run_loader(changed, pace)
        print(
            f"{run['workers']} workers{', cached' if is_cached else ''}, steps of {pace:g} s: "
            f"{run['samples_per_second']:.2f} samples a second, {run['frames_per_second']:.0f} frames a second, "
            f"waited {run['wait_share']:.0%}",
            flush=True,
        )
        result["loader"].append(run)
        save()


if __name__ == "__main__":
    main()
