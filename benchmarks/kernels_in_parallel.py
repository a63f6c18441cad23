"""What docs/kernels.md has under "Measured", in one command: `experiments.bench_kernels`, many processes, one device.

    python -m benchmarks.kernels_in_parallel --tensors=selection.npz --json=benchmarks/results/h100_kernels_DATE.json

Compiling is most of the time, so that one process per length and group of operations compiles beside the others; each
then has the device to itself until it ends (`--share`). Every process writes its own JSON after each figure into the
folder OUT_parts; what was written when `--limit` seconds are over is merged.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import kernel_results
from experiments.bench_kernels import speedups

LENGTHS = (131072, 65536, 32768, 16384, 16421, 8192, 4096)

GROUPS: dict[str, tuple[str, ...]] = {
    "whole": ("--ops=nsa_attention", "--implementations=mosaic_gpu"),
    "dense": ("--ops=dense_attention", "--implementations=cudnn_dense,mosaic_dense"),
    "whole-triton": ("--ops=nsa_attention", "--implementations=triton,triton_token_major", "--drawn-only"),
    "layer": ("--ops=nsa_layer,dense_layer", "--implementations=mosaic_gpu,triton,cudnn_dense"),
    "parts": (
        "--ops=compressed_attention,block_selection,window_attention,block_means,text_queries,decode",
        "--implementations=mosaic_gpu,triton,xla",
    ),
    "selected": ("--ops=selected_attention", "--implementations=mosaic_gpu,triton,triton_token_major"),
    "xla": (
        "--ops=nsa_attention,selected_attention",
        "--implementations=xla",
        "--drawn-only",
    ),
}
"""Arguments of one process; "xla" is far slower than the others."""

ONLY_AT = {
    "xla": (8192,),
    "whole-triton": (131072, 65536, 32768, 16384, 16421, 8192),
    "layer": (65536, 32768, 16384, 8192, 4096),
    "parts": (131072, 65536, 32768, 16384, 8192),
    "selected": (131072, 65536, 32768, 16384, 8192),
}
"""At 16K + 37 stands attention alone, at 4K what crosses over."""

OWN_CHOICE_AT = (131072, 65536)
"""Lengths at which the whole runs with its own choice, too, on random and on trained tensors."""

OTHER_SIMILARITIES = "65536:0,65536:0.98"
"""Length and rho at which the whole runs besides."""

ONE_INPUT_AT = (131072, 65536)
"""Lengths at which all but the whole keep one set of arrays."""


def jobs(groups: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int]]:
    """(group, length) of every process, the longest first."""
    return [(group, length) for length in lengths for group in groups if length in ONLY_AT.get(group, lengths)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_in_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--groups", default=",".join(GROUPS), metavar="NAME,...", help="default: all of them")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), metavar="T,...")
    parser.add_argument("--tensors", type=Path, metavar="NPZ", help="of experiments.measure_selection, for the whole")
    parser.add_argument("--at-once", type=int, default=20, metavar="N", help="processes; default 20")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="S", help="seconds; default an hour")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.limit
    folder = options.json.with_name(f"{options.json.stem}_parts")
    folder.mkdir(parents=True, exist_ok=True)
    # Each process takes what it needs of the device's memory, not most of it.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    waiting = jobs(options.groups.split(","), tuple(map(int, options.lengths.split(","))))
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < options.at_once:
            job = waiting.pop(0)
            group, length = job
            name = f"{group}-{length}"
            command = [sys.executable, "-m", "experiments.bench_kernels", *GROUPS[group], f"--lengths={length}"]
            command += ["--inputs=1"] if length in ONE_INPUT_AT and group != "whole" else []
            command += [f"--share={folder / 'turns'}", f"--json={folder / name}.json"]
            if group == "whole":
                command += [f"--also={OTHER_SIMILARITIES}"]
                command += [] if length in OWN_CHOICE_AT else ["--drawn-only"]
                command += [f"--tensors={options.tensors}"] if options.tensors else []
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running[group, length] = process
        for job in [job for job, process in running.items() if process.poll() is not None]:
            print(f"{job[0]} at {job[1]}: status {running.pop(job).returncode}", flush=True)
        time.sleep(0.5)
    for job, process in running.items():
        process.kill()
        print(f"{job[0]} at {job[1]}: not done after {options.limit:g} s", flush=True)
    for job in waiting:
        print(f"{job[0]} at {job[1]}: not begun after {options.limit:g} s", flush=True)
    written = sorted(folder.glob("*.json"))
    if not written:
        print(f"error: no process wrote a figure; see {folder}", file=sys.stderr)
        return 2
    result = kernel_results.merged([kernel_results.read(path) for path in written])
    kernel_results.write(result, options.json)
    print("\n".join(speedups(result["records"])))
    return int(bool(running or waiting or any("failed" in record for record in result["records"])))


if __name__ == "__main__":
    sys.exit(main())
