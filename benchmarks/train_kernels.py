"""Trains `nsa_video_small` with two implementations of the attention, the same data and seed: losses side by side.

    python -m benchmarks.train_kernels --json=OUT.json --steps=300 --implementations auto xla

Each run is `python -m experiments.train` in a process of its own; the first one renders the clips, then the others
start and share the device. Few clips of one length, so that rendering and compiling take a minute. What differs between
the runs is rounding: the first losses agree to bfloat16's precision, later ones as two runs of one seed and another
rounding do, so the last tenth's means are compared, not its single steps.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from videonsa_jax.training.environment import environment

CLIPS = 160
SETTINGS = (
    f"data.clips.train_clips={CLIPS}",
    "data.clips.heldout_clips=8",
    "data.clips.seconds=64,96",
    "data.clips.short_seconds=8",
    "data.heldout=",
    "data.buckets=3072",
    "data.workers=4",
    "data.frame_cache_gigabytes=8",
    "train.log_every=1",
    "train.save_every=0",
)


def start(implementation: str, folder: Path, steps: int, extra: list[str]) -> subprocess.Popen[bytes]:
    """Starts one run."""
    settings = (
        *SETTINGS,
        f"train.kernel={implementation}",
        f"train.steps={steps}",
        f"data.cache_dir={folder / 'data'}",
    )
    command = [sys.executable, "-m", "experiments.train", "--config=nsa_video_small"]
    command += [f"--workdir={folder / implementation}", *(f"--set={setting}" for setting in (*settings, *extra))]
    log = (folder / f"{implementation}.log").open("w")
    variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)


def records(folder: Path, implementation: str) -> list[dict[str, Any]]:
    """The train lines of a run so far."""
    path = folder / implementation / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, filter(None, lines)) if record["kind"] == "train"]


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Losses per step, and how far the runs are apart."""
    losses = {name: [record["loss"] for record in lines] for name, lines in runs.items()}
    first, *others = losses
    common = min(map(len, losses.values()))
    tail = max(1, common // 10)
    apart = {}
    for other in others if common else ():
        pairs = list(zip(losses[first][:common], losses[other][:common], strict=True))
        apart[f"{first} and {other}"] = {
            "first_step": abs(pairs[0][0] - pairs[0][1]),
            "first_20_steps_worst": max(abs(a - b) for a, b in pairs[:20]),
            "means_of_last_tenth": [statistics.fmean(losses[name][common - tail : common]) for name in (first, other)],
        }
    # The first steps compile; the median of the rest is free of that.
    seconds = {
        name: statistics.median(record["step_seconds"] for record in lines[5:]) if len(lines) > 5 else None
        for name, lines in runs.items()
    }
    return {"apart": apart, "median_step_seconds": seconds, "losses": losses}


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--implementations", nargs="+", default=["auto", "xla"])
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="S", help="seconds after which the runs are ended"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in experiments.train")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    first, *others = options.implementations
    running = {first: start(first, folder, options.steps, options.set)}
    try:
        while time.monotonic() - began < options.limit and any(run.poll() is None for run in running.values()):
            time.sleep(0.2)
            # Its model is told once the data is there.
            if others and "parameters" in (folder / f"{first}.log").read_text():
                running |= {name: start(name, folder, options.steps, options.set) for name in others}
                others = []
        for run in running.values():
            run.kill()
            run.wait()
        runs = {name: records(folder, name) for name in running}
        # The device is free again; asking it before would have taken its memory.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        result = environment() | {"settings": [*SETTINGS, *options.set], "steps": options.steps}
        result |= {"exit_status": {name: run.returncode for name, run in running.items()}, **summarize(runs)}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        for name, lines in runs.items():
            log = (folder / f"{name}.log").read_text().splitlines()
            picked = [f"{line['loss']:.4f}" for line in lines[:5] + lines[20 :: max(1, len(lines) // 8)]]
            print(f"{name}: {len(lines)} steps, losses {' '.join(picked)}" if lines else f"{name} said: {log[-8:]}")
        print(json.dumps(result["apart"]), json.dumps(result["median_step_seconds"]))
        return int(any(len(lines) < options.steps for lines in runs.values()))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
