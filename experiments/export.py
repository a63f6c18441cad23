"""Writes a trained model as a Hugging Face folder, which transformers and `videonsa_jax.load_pretrained` read.

    python -m experiments.export --config=nsa_video --out=DIR
    python -m experiments.generate --model=DIR --video=clip.mp4 --prompt="..."

Reads the last checkpoint of a run of `experiments.train` (the same --config, --set and --workdir). The processor's
files come from the run's `pretrained` folder or else are made from its tokenizer.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import videonsa_jax as vn
from experiments.runs import add_run, named_run
from videonsa_jax.data.pipeline import open_chat
from videonsa_jax.processor import Processor, load_processor, make_processor
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.errors import UsageError, usage_errors
from videonsa_jax.training.pretrained import trained_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the written weights")
    return parser


def _processor(experiment: Experiment) -> Processor:
    if experiment.pretrained:
        return load_processor(experiment.pretrained, experiment.model)
    return make_processor(open_chat(experiment.data).tokenizer, experiment.model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            experiment, workdir = named_run(options)
            model = trained_model(experiment, workdir)
            cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(options.dtype)), nnx.state(model, nnx.Param))
            nnx.update(model, cast)
            vn.save_pretrained(model, _processor(experiment), options.out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
