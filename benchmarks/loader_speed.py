"""How many frames a second one core loads, what bounds it, and whether a training GPU would wait.

    python -m benchmarks.loader_speed --json=benchmarks/results/loader_cpu.json

Makes H.264 files as long and as large as LLaVA-Video-178K's (112 s; 1280x720 and 640x360, 30 frames a second, B frames,
film grain), and loads them as `nsa_video_7b` does: 4 frames a second, at most 50,176 pixels, patches, padded rows.
Times of parts are CPU seconds of one thread. Then the loader runs with workers, against a consumer that takes a sample
of 450 frames every 2 seconds, as one training GPU would.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from experiments import configs
from videonsa_jax.data import video
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.examples import build_example, empty_arrays, fill_row
from videonsa_jax.data.frames import frames_to_patches
from videonsa_jax.data.pipeline import Pipeline, build_pipeline
from videonsa_jax.data.tokenizer import train_tokenizer
from videonsa_jax.data.video_index import build_video_index
from videonsa_jax.training.environment import environment

SIZES = {"1280x720": (1280, 720, "20"), "640x360": (640, 360, "20")}  # width, height, quality (CRF)
RATE, STEP_SECONDS, FRAMES = 30, 2.0, 450


def make_video(path: Path, width: int, height: int, crf: str, seconds: float, seed: int) -> None:
    """A camera that pans over textures, two moving boxes, a cut every 9 seconds, and grain in every frame."""
    rng = np.random.default_rng(seed)
    margin = 256
    texture = np.zeros((height + margin, width + margin, 3), np.float32)
    for scale, strength in ((4, 8), (16, 20), (64, 35)):
        coarse = rng.normal(128, strength, (texture.shape[0] // scale + 2, texture.shape[1] // scale + 2, 3))
        coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        texture += np.asarray(coarse.resize(texture.shape[1::-1], Image.Resampling.BICUBIC), np.float32) - 128
    texture = (texture + 128).clip(0, 255).astype(np.uint8)
    grain = rng.integers(0, 9, (8, height, width, 1), np.uint8)
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": crf}
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(round(seconds * RATE)):
            time_now, cut = number / RATE, number // (9 * RATE)
            x = round(margin / 2 * (1 + np.sin(time_now / 5 + cut)))
            y = round(margin / 2 * (1 + np.cos(time_now / 7 + 2 * cut)))
            image = texture[y : y + height, x : x + width] + grain[number % len(grain)]
            for box in range(2):
                left = round((width - height // 4) * (0.5 + 0.5 * np.sin(time_now * (1 + box) + cut)))
                image[height // 4 * (1 + box) :][: height // 5, left : left + height // 4] = (60, 90, 200 - 90 * box)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(stream.encode(None))
    part.replace(path)


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """CPU seconds of this process, the least of some repeats."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


def decode_every_frame(path: Path, threads: int = 1, kind: str = "SLICE") -> int:
    """Decodes a file and throws it away; the number of its frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = threads, kind
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
    options = {
        "fps": data.fps,
        "max_frames": data.max_frames,
        "max_pixels": data.max_pixels,
        "seconds_limit": 600.0,
        "expected": next(c.info for c in loader.index.contexts if c.video == str(path)),
    }
    context = next(c for c in loader.index.contexts if c.video == str(path))
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
    return {
        "file": {
            "bytes": path.stat().st_size,
            "kilobits_per_second": path.stat().st_size / 125 / context.info.duration,
        },
        "frames": round(RATE * context.info.duration),
        "sampled_frames": len(frames),
        "visual_tokens": context.visual.num_tokens,
        "cpu_seconds": parts,
        "frames_per_second_and_core": {
            "before": len(frames) / parts["sampled, every frame decoded, pillow"],
            "now": len(frames) / parts["sampled, swscale"],
            "whole row": len(frames) / parts["whole row"],
        },
        "wall_seconds_of_two_frame_threads": time.perf_counter() - start,
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


def prepare(folder: Path, seconds: float, copies: int) -> Path:
    """Videos, each under some names, their records, tokenizer and index."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for seed, (name, (width, height, crf)) in enumerate(SIZES.items()):
        made = folder / f"{name}_{seconds:g}s.mp4"
        if not made.exists():
            make_video(made, width, height, crf, seconds, seed)
        for copy in range(copies):
            path = folder / f"{name}_{copy}.mp4"
            path.unlink(missing_ok=True)
            os.link(made, path)
            for question in range(4):
                entries = [("human", f"<image>\nWhat happens {question}?"), ("gpt", "Two boxes move to and fro.")]
                entries = [{"from": speaker, "value": value} for speaker, value in entries]
                records.append({"id": f"{name}-{question}", "video": path.name, "conversations": entries})
    (folder / "records.json").write_text(json.dumps(records))
    train_tokenizer(
        ["What happens? Two boxes move to and fro. You are a helpful assistant."], folder / "tokenizer.json"
    )
    build_video_index(folder / "index.jsonl", [str(folder / record["video"]) for record in records], workers=2)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("datasets/loader_speed"), help="for the videos")
    parser.add_argument("--seconds", type=float, default=112.5, help="length of the videos; default 112.5")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts; default 3")
    parser.add_argument("--samples", type=int, default=12, help="that the loader loads; default 12")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loader processes; default 1 2")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    folder = prepare(options.folder, options.seconds, copies=4)
    experiment = configs.get("nsa_video_7b")
    data = dataclasses.replace(
        experiment.data,
        source=str(folder / "records.json"),
        tokenizer=str(folder / "tokenizer.json"),
        video_index=str(folder / "index.jsonl"),
        cache_dir=str(folder),
        contexts_per_batch=1,
        questions_per_context=4,
        workers=0,
    )
    if options.seconds * data.fps < data.fewest_frames:
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
    for name in SIZES:
        result["parts"][name] = found = parts_of_a_sample(folder / f"{name}_0.mp4", pipeline, options.repeats)
        print(f"{name}: {found['sampled_frames']} of {RATE * options.seconds:.0f} frames")
        for part, seconds in found["cpu_seconds"].items():
            print(f"  {part:40}{seconds:8.3f} CPU s")
        for part, rate in found["frames_per_second_and_core"].items():
            print(f"  {part:40}{rate:8.0f} frames a second and core")
    save()
    paces = (0.0, STEP_SECONDS)
    runs = [(dataclasses.replace(data, workers=workers), pace) for workers in options.workers for pace in paces]
    if options.workers:
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
