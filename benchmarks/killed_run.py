"""A run that is killed again and again, beside one that is left alone: both must end with the same bits.

    python -m benchmarks.killed_run --kills=20 --json=OUT.json

Trains `nsa_video` (its model, optimiser, batches; fewer clips and steps) twice with `experiments.train`. The second
time processes are ended at moments drawn from --seed, half of them by SIGKILL and half by SIGTERM: as they start, at a
step, or while a checkpoint is being written; the same command then starts again. Compared are the losses and gradient
norms of all steps, every array of the last checkpoint, the state of the data, and the held-out answers. Exit status 1
if anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import configs
from experiments.overrides import apply_overrides
from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.environment import environment
from videonsa_jax.training.metrics import METRICS_FILE, read_metrics
from videonsa_jax.training.optimizer import make_optimizer
from videonsa_jax.training.report import REPORT_FILE
from videonsa_jax.training.step import init_state

CONFIG = "nsa_video"
STEPS = 120
SHORTER = {
    "train.log_every": "1",
    "train.save_every": "4",
    "train.keep_every": "40",
    "data.clips.train_clips": "96",
    "data.clips.heldout_clips": "16",
}
MOMENTS = ("start", "step", "save")
_PATIENCE_SECONDS = 900


@dataclass(frozen=True)
class Kill:
    """How a process is ended.

    Attributes:
      signal: "SIGKILL" or "SIGTERM".
      moment: "start" (so many seconds after the process began), "step" or "save" (while a checkpoint is written),
        both at the first opportunity from step `after` on, and so many seconds later.
      after: step.
      delay: the seconds.
    """

    signal: str
    moment: str
    after: int
    delay: float


def draw_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Kills spread over a run of so many steps, in order."""
    draw = random.Random(seed)
    signals = ["SIGKILL", "SIGTERM"] * (count // 2 + 1)
    moments = [MOMENTS[index // 2 % len(MOMENTS)] for index in range(count)]
    draw.shuffle(moments)
    # The last steps are left, so that a process is there to be killed.
    after = sorted(draw.randrange(1, max(steps - 8, 2)) for _ in range(count))
    longest = {"start": 12.0, "step": 0.5, "save": 0.03}
    return [
        Kill(name, moment, step, round(draw.uniform(0, longest[moment]), 4))
        for name, moment, step in zip(signals[:count], moments, after, strict=True)
    ]


def _last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(workdir / METRICS_FILE)), default=0)


def _saves_under_way(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kill(process: subprocess.Popen, workdir: Path, plan: Kill) -> dict[str, Any]:
    """Ends a process as planned.

    Returns:
      The plan and what was seen at the kill: the last step in the metrics, folders of unfinished checkpoints (also
      those that earlier kills left, until the process clears them), and the exit status, 0 if the process ended before.
    """
    began, left = time.monotonic(), set(_saves_under_way(workdir))
    while process.poll() is None and time.monotonic() - began < _PATIENCE_SECONDS:
        reached = plan.moment == "start" or _last_step(workdir) >= plan.after
        left &= set(_saves_under_way(workdir))
        if reached and (plan.moment != "save" or set(_saves_under_way(workdir)) - left):
            break
        time.sleep(0.002 if reached else 0.05)
    time.sleep(plan.delay)
    torn, step = _saves_under_way(workdir), _last_step(workdir)
    process.send_signal(signal.Signals[plan.signal])
    status = process.wait(_PATIENCE_SECONDS)
    return asdict(plan) | {"step": step, "saves_under_way": torn, "status": status}


def saved_state(experiment: Experiment, workdir: Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """All arrays of a run's last checkpoint, and the progress saved with it."""
    train = experiment.train
    optimizer = make_optimizer(experiment.optimizer, train.steps, train.param_dtype)
    shapes = jax.eval_shape(lambda: init_state(experiment.model, train, 0, optimizer))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with checkpoints.open_checkpoints(workdir, train.keep, train.keep_every) as manager:
        state, progress = checkpoints.restore(manager, train.steps, shapes, jax.tree.map(lambda _: here, shapes))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], progress


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def outcome(experiment: Experiment, workdir: Path) -> dict[str, Any]:
    """What a finished run ended with, as far as it must not depend on interruptions."""
    arrays, progress = saved_state(experiment, workdir)
    lines = [line for line in read_metrics(workdir / METRICS_FILE) if line["kind"] == "train"]
    return {
        "final_loss": lines[-1]["loss"],
        "losses": [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
        "arrays": len(arrays),
        "state_sha256": _digest(arrays),
        "data": progress["iterators"],
        "accuracy": json.loads((workdir / REPORT_FILE).read_text())["accuracy"],
    }


def compare(folder: Path, kills: Sequence[Kill], settings: dict[str, str], variables: dict[str, str]) -> dict[str, Any]:
    """Runs both, in `folder`.

    Args:
      folder: for the runs, the clips and the compiled programs.
      kills: what happens to the second run.
      settings: of `experiments.train --set`.
      variables: environment of the processes.

    Returns:
      {"same": ..., "kills": what happened, "undisturbed": ..., "killed": ..., seconds of both}.
    """
    overrides = [f"{path}={value}" for path, value in ({"data.cache_dir": str(folder / "data")} | settings).items()]
    experiment = apply_overrides(configs.get(CONFIG), overrides)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    sets = [argument for override in overrides for argument in ("--set", override)]

    def start(workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}", *sets]
        with (folder / "log.txt").open("a") as log:
            return subprocess.Popen(command, env=os.environ | cache | variables, stderr=log)

    def finish(workdir: Path) -> None:
        status = start(workdir).wait()
        if status:
            raise RuntimeError(f"a run that nothing disturbed ended with {status}:\n{(folder / 'log.txt').read_text()}")

    began = time.monotonic()
    finish(folder / "undisturbed")
    between = time.monotonic()
    happened = []
    for plan in kills:
        happened.append(kill(start(folder / "killed"), folder / "killed", plan))
        print(json.dumps(happened[-1]), flush=True)
        allowed = (-signal.SIGKILL,) if plan.signal == "SIGKILL" else (75, -signal.SIGTERM)
        if happened[-1]["status"] not in allowed:
            raise RuntimeError(
                f"{happened[-1]}: expected status {allowed}:\n{(folder / 'log.txt').read_text()[-4000:]}"
            )
    finish(folder / "killed")
    ended = time.monotonic()
    one, other = (outcome(experiment, folder / name) for name in ("undisturbed", "killed"))
    return {
        "same": {name: one[name] == other[name] for name in one},
        "kills": happened,
        "undisturbed": {name: one[name] for name in ("final_loss", "arrays", "state_sha256")},
        "killed": {name: other[name] for name in ("final_loss", "arrays", "state_sha256")},
        "seconds": {"undisturbed": between - began, "killed": ended - between},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.killed_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    options = parser.parse_args(arguments)
    settings = SHORTER | {"train.steps": str(options.steps)}
    with tempfile.TemporaryDirectory(prefix="killed_run") as folder:
        result = compare(Path(folder), draw_kills(options.kills, options.steps, options.seed), settings, {})
    result = {"config": CONFIG, "settings": settings, "seed": options.seed, **result, **environment()}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("same", "undisturbed", "killed", "seconds")}, indent=1))
    return 0 if all(result["same"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
