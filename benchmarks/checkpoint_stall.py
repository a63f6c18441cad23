"""How long a training loop stands still for a checkpoint, and how much slower it runs while the files are written.

    python -m benchmarks.checkpoint_stall --gigabytes=1 --json=OUT.json

A state of that size on the devices is updated by a jitted step that donates it, as in training, and saved by
`training.checkpoints`. For each save: the seconds until `save` returns (the stall: copying to the host), the seconds
until the files are whole, and the mean step in between beside the mean step without.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.environment import environment

LEAVES = 32


def make_state(gigabytes: float) -> dict[str, jax.Array]:
    """Float32 arrays that add up to the size."""
    side = int((gigabytes * 1e9 / 4 / LEAVES) ** 0.5)
    return {f"w{index}": jnp.full((side, side), index, jnp.float32) for index in range(LEAVES)}


def step_time(step: Any, state: Any, busy: Any) -> tuple[Any, list[float]]:
    """Steps until `busy()` is false; the state after them and the seconds of each."""
    seconds = []
    while busy(len(seconds)):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        seconds.append(time.perf_counter() - start)
    return state, seconds


def measure(workdir: Path, gigabytes: float, saves: int) -> dict[str, Any]:
    """Saves a few times; seconds of each, see the module."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0.999 + 1e-3, state), donate_argnums=0)
    state, _ = step_time(step, make_state(gigabytes), lambda done: done < 2)
    results = []
    with checkpoints.open_checkpoints(workdir, keep=1) as manager:
        for number in range(saves):
            state, calm = step_time(step, state, lambda done: done < 10)
            start = time.perf_counter()
            checkpoints.save(manager, number, state, {}, Experiment())
            stalled = time.perf_counter() - start
            state, saving = step_time(step, state, lambda _: manager.is_saving_in_progress())
            manager.wait_until_finished()
            results.append(
                {
                    "stalled_seconds": stalled,
                    "written_after_seconds": time.perf_counter() - start,
                    "step_seconds": statistics.mean(calm),
                    "step_seconds_while_writing": statistics.mean(saving) if saving else None,
                    "steps_while_writing": len(saving),
                }
            )
    return {"gigabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9, "saves": results}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_stall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, metavar="X", help="of the state")
    parser.add_argument("--saves", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="checkpoint_stall") as folder:
        result = measure(Path(folder), options.gigabytes, options.saves) | environment()
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["saves"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
