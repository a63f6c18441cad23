"""Measures how alike neighbouring queries of a trained model select their blocks.

    python -m experiments.measure_selection --config=nsa_video_small

Reads the last checkpoint of a run of `experiments.train` (the same --config, --set and --workdir), runs it on held-out
clips, and writes into the run's folder `selection.json` (union of the selected blocks of 8, 16, 32 and 64 neighbouring
queries, divided by n, by layer) and `selection.npz` (queries, keys, values, gate logits and selected blocks of one
clip, layer by layer: what benchmarks of the kernels take for trained inputs).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.runs import add_run, named_run
from videonsa_jax.analysis.selection import union_sizes, visual_attention
from videonsa_jax.data.pipeline import build_pipeline
from videonsa_jax.data.sources import DataError
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.environment import environment
from videonsa_jax.training.errors import UsageError, usage_errors
from videonsa_jax.training.pretrained import trained_model

NEIGHBOURS = (8, 16, 32, 64)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.measure_selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--clips", type=int, default=16, metavar="N", help="held-out clips to run; default 16")
    return parser


def _mean(sizes: Sequence[float]) -> float | None:
    """None where no clip is long enough; JSON knows no NaN."""
    known = [size for size in sizes if not math.isnan(size)]
    return sum(known) / len(known) if known else None


def measure(experiment: Experiment, workdir: Path, clips: int) -> dict:
    """Writes the two files and returns what `selection.json` holds."""
    model = trained_model(experiment, workdir)
    pipeline = build_pipeline(experiment.data, experiment.model, split="heldout", seed=0)
    sizes: list[list[dict[int, float]]] = []
    iterator = pipeline.iterator()
    run = nnx.jit(lambda model, inputs: list(visual_attention(model, inputs)))
    seen = 0
    for batch in iterator:
        layers = jax.device_get(run(model, batch.inputs))
        if not seen:
            length = int(batch.inputs.visual_lengths[0])
            first = {
                f"layer{index}/{name}": np.asarray(getattr(layer, name)[0, :length])
                for index, layer in enumerate(layers)
                for name in ("query", "key", "value", "gate_logits", "block_indices")
            }
            exact = {name: x if x.dtype == np.int32 else x.astype(np.float32) for name, x in first.items()}
            np.savez_compressed(workdir / "selection.npz", **exact)
        for row, length in enumerate(np.asarray(batch.inputs.visual_lengths)[: clips - seen]):
            options = {"block_size": experiment.model.nsa.block_size, "neighbours": NEIGHBOURS}
            sizes.append([union_sizes(layer.block_indices[row, :length], **options) for layer in layers])
        seen = len(sizes)
        if seen >= clips:
            break
    iterator.close()
    by_layer = [
        {str(m): _mean([clip[layer][m] for clip in sizes]) for m in NEIGHBOURS} for layer in range(len(sizes[0]))
    ]
    result = {
        "config": experiment.name,
        "clips": len(sizes),
        "block_size": experiment.model.nsa.block_size,
        "block_count": experiment.model.nsa.block_count,
        "union_over_n_by_layer": by_layer,
        **environment(),
    }
    (workdir / "selection.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            experiment, workdir = named_run(options)
            if experiment.model.nsa is None or experiment.train.attention != "nsa":
                raise ValueError(f"config {options.config} trains no sparse attention, expected one that does")
            result = measure(experiment, workdir, options.clips)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("layer  " + "  ".join(f"u{m}/n" for m in NEIGHBOURS))
    for index, row in enumerate(result["union_over_n_by_layer"]):
        shown = ("    -" if row[str(m)] is None else f"{row[str(m)]:5.2f}" for m in NEIGHBOURS)
        print(f"{index:5}  " + "  ".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
