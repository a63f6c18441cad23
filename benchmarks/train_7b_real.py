"""Trains VideoNSA-7B on mp4 files through the real command: what a question takes where a loader feeds the GPU.

    python -m benchmarks.train_7b_real --json=benchmarks/results/train_7b_real_h200.json     # one GPU with 139 GiB
    python -m benchmarks.train_7b_real --tiny --json=/tmp/tiny.json                          # a CPU, to test the script

`benchmarks.train_7b` times the two programs of a step on arrays that are there. This makes videos of the paper's shape
(112.5 s of 16:9: 450 frames at 4 a second, 13,500 visual tokens), half of them 1280x720 and half 640x360, with four
questions each in LLaVA-Video-178K's layout (`benchmarks.real_videos`), indexes them, and runs `experiments.train`, with
random weights, until it has written so many metric lines. One epoch decodes; the next reads the decoded frames from
disk. Then the run is ended by SIGKILL, for its last step would write a checkpoint of 87 GB.

A question's seconds are those of whole steps of one video: waiting, the passes over it, the update, metrics.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_videos import SCENE_SECONDS, SCENES, SIZES, SUBSET, make_videos, write_annotations
from benchmarks.train_7b import PAPER_SAMPLES, set_up_xla
from experiments import index
from videonsa_jax.training.environment import environment
from videonsa_jax.training.metrics import METRICS_FILE, read_metrics

type Lines = list[dict[str, Any]]

TINY_SIZES = ((96, 64), (64, 96))
# As docs/scale.md has it on one GPU; every line of metrics is one step.
ON_ONE_GPU = (
    "train.param_dtype=bfloat16",
    "optimizer.moment_dtype=bfloat16",
    "data.contexts_per_batch=1",
    "train.accumulation=1",
)
TINY = (
    "data.heldout=",
    "data.buckets=",
    "data.contexts_per_batch=1",
    "optimizer.name=adamw",
    "model.vision.depth=1",
    "model.vision.fullatt_block_indexes=0",
    "model.text.num_hidden_layers=2",
)


def settings(options: argparse.Namespace) -> list[str]:
    """What `experiments.index` and `experiments.train` are told after `--set`."""
    folder: Path = options.folder
    told = {
        "data.source": folder,
        "data.tokenizer": folder / "tokenizer.json",
        "data.video_index": folder / "index.jsonl",
        "data.cache_dir": folder,
        "data.questions_per_context": options.questions,
        "data.workers": options.workers,
        "data.frame_cache_gigabytes": 40,
        "train.steps": 2 * options.steps,  # never reached
        "train.log_every": 1,
        "train.save_every": 0,
        "pretrained": "",
    }
    return [*(TINY if options.tiny else ON_ONE_GPU), *(f"{path}={value}" for path, value in told.items()), *options.set]


def train(config: str, told: Sequence[str], folder: Path, steps: int, deadline: float) -> dict[str, Any]:
    """Runs the command until it has taken so many steps or `deadline` (of `time.monotonic`), and ends it.

    Returns:
      The metric lines, and what was seen from outside: seconds until the first line, how many videos had been decoded
      by then, and the exit status of a run that ended by itself.
    """
    workdir, began = folder / "run", time.monotonic()
    command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--set={setting}" for setting in told]
    seen: dict[str, Any] = {}
    lines: Lines = []
    with (folder / "train.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < deadline and len(lines) < steps:
                time.sleep(0.05)
                lines = [line for line in read_metrics(workdir / METRICS_FILE) if line["kind"] == "train"]
                if lines and not seen:
                    seen["seconds_to_first_line"] = time.monotonic() - began
                    seen["videos_decoded_by_then"] = len(list((folder / "frames").glob("*.npy")))
            seen["status"] = process.poll()
        finally:
            _end(process)
    return seen | {"lines": lines}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, then its loader workers; Python's tracker of shared memory outlives them to free it."""
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        for _ in range(100):
            os.killpg(process.pid, signal.SIGTERM)  # which the tracker ignores
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def figures(lines: Lines, frames: int, questions: int) -> dict[str, Any]:
    """What some steps of one video each amount to.

    Args:
      lines: their metrics.
      frames: sampled ones of a video.
      questions: on each.
    """
    count, seconds = len(lines), sum(line["step_seconds"] for line in lines)
    loading = sum(line["loading_seconds"] for line in lines)
    flops = [line["flops_per_second"] * line["step_seconds"] for line in lines if line["flops_per_second"]]
    mfu = [line["mfu"] * line["step_seconds"] for line in lines if line["mfu"] is not None]
    return {
        "steps": [lines[0]["step"], lines[-1]["step"]],
        "step_seconds": seconds / count,
        "median_step_seconds": statistics.median(line["step_seconds"] for line in lines),
        "seconds_per_question": seconds / (count * questions),
        "gpu_hours_of_216000": PAPER_SAMPLES * seconds / (count * questions) / 3600,
        "wait_share": sum(line["wait_seconds"] for line in lines) / seconds,
        "longest_wait_seconds": max(line["wait_seconds"] for line in lines),
        "tokens_per_second": sum(line["visual_tokens"] + line["text_tokens"] for line in lines) / seconds,
        "model_flops_per_second": sum(flops) / seconds if len(flops) == count else None,
        "mfu": sum(mfu) / seconds if len(mfu) == count else None,
        "frames_per_second_asked": frames * count / seconds,
        "loading_cpu_seconds_per_video": loading / count,
        "frames_per_second_and_core": frames * count / loading,
        "cores_busy_loading": loading / seconds,
    }


def phases(lines: Lines, videos: int, decoded_before: int) -> dict[str, Lines]:
    """The steps after the first, which compiles: those of the first epoch whose videos were decoded while it did, those
    whose were decoded while the device worked, and those whose frames came from the cache."""
    decoded_before = min(decoded_before, videos)
    steady = [line for line in lines if line["step"] > 1]
    return {
        "decoded_while_compiling": [line for line in steady if line["step"] <= decoded_before],
        "decoded_while_training": [line for line in steady if decoded_before < line["step"] <= videos],
        "from_the_cache": [line for line in steady if line["step"] > videos],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for everything measured")
    parser.add_argument("--folder", type=Path, default=Path("datasets/real_videos"), help="for videos, cache and run")
    parser.add_argument("--videos", type=int, default=20, help="default 20")
    parser.add_argument("--questions", type=int, default=4, help="of each video, all in one batch; default 4")
    parser.add_argument("--steps", type=int, default=32, help="videos trained on; default 32: an epoch and 12 more")
    parser.add_argument("--workers", type=int, default=4, help="loader processes; default 4")
    parser.add_argument("--seconds", type=float, default=1e9, help="end the run when the whole command took so many")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in experiments.train")
    parser.add_argument("--tiny", action="store_true", help="nsa_video's model and short small videos")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if the run took fewer steps than two."""
    options = _parser().parse_args(arguments)
    began, folder, told = time.monotonic(), options.folder, settings(options)
    set_up_xla()  # for the run, which inherits it
    result: dict[str, Any] = {"videos": options.videos, "questions_per_video": options.questions, "settings": told}
    result["seconds"] = {}

    def stage(name: str) -> None:
        result["seconds"][name] = time.monotonic() - began - sum(result["seconds"].values())

    scenes, scene_seconds = (3, 1.0) if options.tiny else (SCENES, SCENE_SECONDS)
    paths = [folder / SUBSET / "academic_source" / f"{number:03}.mp4" for number in range(options.videos)]
    make_videos(
        paths,
        TINY_SIZES if options.tiny else SIZES,
        scenes=scenes,
        scene_seconds=scene_seconds,
        workers=os.cpu_count() or 1,
    )
    write_annotations(folder, paths, options.questions)
    stage("encoding")
    config = "nsa_video" if options.tiny else "nsa_video_7b"
    if status := index.main([f"--config={config}", *(f"--set={setting}" for setting in told), "--workers=2"]):
        return status
    summary = json.loads((folder / "index.jsonl.summary.json").read_text())
    frames = round(scenes * scene_seconds * summary["data"]["fps"])
    megabits = [8e-6 * path.stat().st_size / (scenes * scene_seconds) for path in paths]
    result |= {"frames": frames, "megabits_per_second": megabits[: len(SIZES)]}
    result |= {name: summary[name] for name in ("buckets", "text_tokens", "padding")}
    stage("index")
    seen = train(config, told, folder, options.steps, began + options.seconds)
    stage("training")
    lines = seen.pop("lines")
    log = (folder / "train.log").read_text()
    if len(lines) < 2:
        print(log[-4000:], file=sys.stderr)
        return 1
    # The GPU is free again; asking it before would have taken its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    parts = phases(lines, options.videos, seen["videos_decoded_by_then"])
    parts["all"] = lines[1:]
    result |= environment() | seen | {"peak_gigabytes": lines[-1]["peak_gigabytes"]}
    result["parts"] = {name: figures(part, frames, options.questions) for name, part in parts.items() if part}
    result["lines"] = lines
    options.json.parent.mkdir(parents=True, exist_ok=True)
    partial = options.json.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(options.json)
    for name, part in result["parts"].items():
        shown = {key: value for key, value in part.items() if isinstance(value, int | float)}
        print(f"{name}, steps {part['steps']}: " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    print(f"padding {result['padding']}, peak {result['peak_gigabytes']} GB, {result['seconds']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
