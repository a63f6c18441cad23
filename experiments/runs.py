"""What names a run on the command lines that come after its training."""

import argparse
from pathlib import Path

from experiments import configs
from experiments.overrides import apply_overrides
from videonsa_jax.training.config import Experiment


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --set and --workdir, as `experiments.train` was given them."""
    parser.add_argument("--config", required=True, metavar="NAME", help="a registered name")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as the run was given")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the run; default runs/NAME")


def named_run(options: argparse.Namespace) -> tuple[Experiment, Path]:
    """The experiment and the folder of the run that the options name; ValueError where they name none."""
    experiment = apply_overrides(configs.get(options.config), options.set)
    return experiment, options.workdir or Path("runs") / options.config
