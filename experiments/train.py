"""Trains a named experiment.

    python -m experiments.train --config=nsa_video
    python -m experiments.train --config=nsa_video --set train.steps=100 --set optimizer.learning_rate=1e-3
    python -m experiments.train --config=help

The same command run again goes on from the last checkpoint. Exit status: 0 the last step is done and reported, 1 an
unexpected error, 2 something in the command, the config or the files that you can mend (one sentence says what), 3 a
loss or gradient that is not finite (the state before it is saved), 75 stopped by SIGTERM or Ctrl-C with the state saved
(`--preempt-exit-code` changes it): let the scheduler start the command again on 75 only.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import configs
from experiments.overrides import apply_overrides
from videonsa_jax.data.sources import DataError
from videonsa_jax.training.config import Experiment, MeshConfig
from videonsa_jax.training.errors import UsageError, usage_errors
from videonsa_jax.training.loop import EXIT_DONE, EXIT_PREEMPTED, train
from videonsa_jax.training.processes import join
from videonsa_jax.training.profiling import parse_steps

EXIT_USAGE = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME", help='a registered name, or "help" to list them')
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change one field of the config; repeatable"
    )
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the run; default runs/NAME")
    parser.add_argument(
        "--preempt-exit-code", type=int, default=EXIT_PREEMPTED, metavar="N", help="status after a signal; default 75"
    )
    parser.add_argument(
        "--multihost",
        nargs="?",
        const="",
        metavar="HOST:PORT,COUNT,INDEX",
        help="join these other processes; without it, those that the environment names (docs/training.md), if any; "
        'without a value, there must be some; "off": none',
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="write a trace of these steps (100 or 100-103) into the run's folder, for xprof or TensorBoard",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for errors that you can mend, too")
    return parser


def _experiment(name: str, overrides: Sequence[str]) -> Experiment:
    experiment = apply_overrides(configs.get(name), overrides)
    missing = configs.missing_fields(experiment)
    if missing:
        settings = " ".join(f"--set {path}=..." for path in missing)
        raise ValueError(f"config {name} needs {', '.join(missing)}: add {settings}")
    return experiment


def _choose_gpu_products() -> None:
    """Sends XLA's matrix products to cuBLAS, untimed, where XLA_FLAGS do not say otherwise.

    On an H100 XLA's default, timing Triton kernels for every product while compiling, takes minutes for a 30 M model;
    its untimed Triton tiles are several times slower than cuBLAS over the whole step (docs/kernels.md).
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")
    missing = [flag for flag in wanted if flag.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _use_all_cores(experiment: Experiment) -> None:
    """Splits the CPU into devices that share each batch: XLA runs a small model's step on little more than one core.

    Nothing changes for accelerators, for a mesh that says something else, or where XLA_FLAGS count the devices.
    """
    counted = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if counted or experiment.mesh != MeshConfig() or jax.config.jax_num_cpu_devices > 0:
        return
    contexts, cores = experiment.data.contexts_per_batch, _cores()
    with contextlib.suppress(RuntimeError):  # the devices are in use already, in a caller's process
        jax.config.update("jax_num_cpu_devices", max(math.gcd(contexts, count) for count in range(1, cores + 1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    if options.config == "help":
        for name in configs.names():
            print(f"{name:20} {configs.summary(name)}")
        return EXIT_DONE
    _choose_gpu_products()
    try:
        with usage_errors():
            experiment = _experiment(options.config, options.set)
            profile = parse_steps(options.profile) if options.profile else range(0)
        with usage_errors():
            several = join(options.multihost)
        if not several:
            _use_all_cores(experiment)
        workdir = options.workdir or Path("runs") / options.config
        return train(experiment, workdir, preempt_exit_code=options.preempt_exit_code, profile=profile)
    except (UsageError, DataError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
