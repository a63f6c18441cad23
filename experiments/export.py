"""Writes a trained model as a Hugging Face folder, which transformers and `videonsa_jax.load_pretrained` read.

    python -m experiments.export --config=nsa_video --out=DIR
    python -m experiments.generate --model=DIR --video=clip.mp4 --prompt="..."

Reads the last checkpoint of a run of `experiments.train` (the same --config, --set and --workdir). The processor's
files come from the run's `pretrained` folder or else are made from its tokenizer. A run that is told --set
train.export=bfloat16 (or float32) does this at its end, in its folder `export`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.runs import add_run, named_run
from videonsa_jax.training.errors import UsageError, usage_errors
from videonsa_jax.training.export import export_model
from videonsa_jax.training.pretrained import trained_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the written weights")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            experiment, workdir = named_run(options)
            export_model(experiment, trained_model(experiment, workdir), options.out, options.dtype)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
