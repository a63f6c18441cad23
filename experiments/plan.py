"""Plans a run without its hardware: compiles the real train step ahead of time and says whether it fits, and how fast.

    python -m experiments.plan --config=nsa_video_7b --topology=v5p:4x4x4 --set mesh.fsdp=32 --set mesh.context=2
    python -m experiments.plan --config=nsa_video_7b --topology=local --context=13500

A topology is a TPU's, such as v5e:16x16, v5p:4x4x4 or v6e:16x16: libtpu compiles for chips that are not there
(`requirements-tpu.txt` installs it); "local" is this machine's devices. No weights and no data are read.

In the figures: the loop's two programs, the gradient of a batch and the update, as they would run; the state as the
mesh splits it, and with `train.offload_optimizer` the part of it that waits in the hosts' memory, apart; what the
compiler reports of temporaries, exchanges and cycles. Not in them: what the state's arrays are padded by to whole
tiles; the next batch, on its way; a checkpoint's copy; buckets of other lengths; how long copies between host and
device take. Nothing is timed. docs/training.md says what each figure means.

Exit status: 0 it fits, 1 it does not, 2 something in the command or the config that you can mend.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
)  # before jax: no metadata server is asked about TPUs that are not there

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import configs
from experiments.overrides import apply_overrides
from experiments.plan_figures import Chip, Plan, program_of, shown, to_json, tpu_chip
from pallas_kernels import tpu
from videonsa_jax.configs import ModelConfig
from videonsa_jax.streams import Batch, TrainBatch
from videonsa_jax.training.config import Experiment, TrainConfig
from videonsa_jax.training.errors import UsageError, usage_errors
from videonsa_jax.training.flops import peak_flops_per_second, train_flops, trained_parts
from videonsa_jax.training.frozen import join_params, split_params
from videonsa_jax.training.mesh import (
    HOST_MEMORY,
    batch_shapes,
    check_batch_size,
    check_model_size,
    in_host_memory,
    make_mesh,
    state_shardings,
)
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.step import Params, accumulate, apply_gradients, init_state, make_losses, sums_like

EXIT_FITS, EXIT_DOES_NOT_FIT, EXIT_USAGE = 0, 1, 2
LOCAL = "local"

FRAME_PATCHES = (12, 20)
"""Patches of a 16:9 frame of at most 50,176 pixels."""


def example_batch(model: ModelConfig, mesh: Mesh, contexts: int, rows: int, tokens: int, text: int) -> TrainBatch:
    """A batch of videos, each before its text; arrays that take no memory, whose pixels and positions are all 0.

    Args:
      model: says how frames become tokens.
      mesh: whose `context` axis splits frames and tokens evenly.
      contexts: B.
      rows: Q.
      tokens: visual tokens of a context; rounded up to whole frames, as many for each part of `context`.
      text: Lt.
    """
    height, width = FRAME_PATCHES
    merged = height * width // model.vision.spatial_merge_size**2
    parts = mesh.shape["context"]
    frames = -(-tokens // (merged * parts)) * parts
    visual = -(-frames * merged // (128 * parts)) * 128 * parts

    def full(value: int, *shape: int, dtype: Any = np.int32) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), shape)

    inputs = Batch(
        patches=full(0, contexts, frames, height * width, model.vision.patch_dim, dtype=np.uint8),
        frame_grids=np.broadcast_to(np.asarray(FRAME_PATCHES, np.int32), (contexts, frames, 2)),
        visual_source=full(0, contexts, visual),
        visual_positions=full(0, 3, contexts, visual),
        visual_lengths=full(frames * merged, contexts),
        visible_text=full(0, contexts, visual),
        text_tokens=full(0, contexts, rows, text),
        text_positions=full(0, 3, contexts, rows, text),
        text_lengths=full(text, contexts, rows),
        visible_visual=full(frames * merged, contexts, rows, text),
    )
    return TrainBatch(
        inputs=inputs,
        targets=full(0, contexts, rows, text),
        loss_weights=full(1, contexts, rows, text, dtype=np.float32),
        sample_ids=full(0, contexts, rows),
    )


def _sharded(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def _bytes_per_device(tree: Any, *, on_host: bool = False) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind == HOST_MEMORY) == on_host
    )


def _devices(topology: str) -> tuple[Chip, Sequence[jax.Device]]:
    if topology == LOCAL:
        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
        return Chip(device.device_kind, memory, peak_flops_per_second([device.device_kind])), jax.devices()
    name = topology.partition(":")[0]
    if name not in tpu.CHIPS:
        raise ValueError(f"--topology is {topology!r}, expected {LOCAL} or one of {', '.join(tpu.CHIPS)} with a shape")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu and the topology's own parser each raise what they like
        raise ValueError(f"--topology is {topology!r}, which cannot be had: {str(error).splitlines()[0]}") from error
    return tpu_chip(name), found.devices


def _kept_bytes(losses: Any, train: TrainConfig, params: Params, batch: TrainBatch) -> int:
    """Bytes that the backward pass keeps of the forward pass besides parameters and batch, of all devices together."""

    def residuals(params: Params, batch: TrainBatch) -> Any:
        trained, frozen = split_params(params, train.frozen)
        return jax.vjp(lambda trained: losses(join_params(frozen, trained), batch)[0], trained)[1]

    inputs = [(x.shape, x.dtype) for x in jax.tree.leaves((params, batch))]
    kept = 0
    for x in jax.tree.leaves(jax.eval_shape(residuals, params, batch)):
        if (x.shape, x.dtype) in inputs:
            inputs.remove((x.shape, x.dtype))
        else:
            kept += x.size * x.dtype.itemsize
    return kept


def plan(experiment: Experiment, topology: str, tokens: int, text: int) -> Plan:
    """Compiles the train step of an experiment for a topology.

    Args:
      experiment: what would be trained; its data are not read.
      topology: a TPU's, or "local".
      tokens: visual tokens of a context.
      text: text tokens of a row.

    Raises:
      ValueError: the topology or the mesh cannot be, or its devices lack what `train.offload_optimizer` needs.
    """
    chip, devices = _devices(topology)
    model, train, data = experiment.model, experiment.train, experiment.data
    mesh = make_mesh(experiment.mesh, devices)
    check_batch_size(data.contexts_per_batch, mesh)
    check_model_size(model.text.num_key_value_heads, mesh)
    if train.kernel == "auto" and topology != LOCAL:
        train = dataclasses.replace(train, kernel="mosaic_tpu")

    optimizer = make_optimizer(experiment.optimizer, train.steps, train.param_dtype)
    shapes = jax.eval_shape(functools.partial(init_state, model, train, 0, optimizer))
    of_state = state_shardings(shapes, mesh, experiment.mesh.rules)
    if train.offload_optimizer:
        on_host = in_host_memory(shapes.opt_state, of_state.opt_state)
        of_state = dataclasses.replace(of_state, opt_state=on_host)
    state = _sharded(shapes, of_state)
    example = example_batch(model, mesh, data.contexts_per_batch, data.questions_per_context, tokens, text)
    batch = batch_shapes(example, mesh)
    losses = make_losses(model, train, mesh)
    add_batch = functools.partial(accumulate, losses, train)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_sums = sums_like(split_params(of_state.params, train.frozen)[0], replicated)
    schedule = learning_rate(experiment.optimizer, train.steps)
    update = functools.partial(apply_gradients, optimizer, schedule, offloaded=train.offload_optimizer)

    began = time.monotonic()
    with contextlib.nullcontext() if topology == LOCAL else tpu.compiling_for(chip.name):
        sums = _sharded(jax.eval_shape(add_batch, state.params, None, batch)[0], of_sums)
        jitted = {
            "gradient": (jax.jit(add_batch, out_shardings=(of_sums, replicated)), (state.params, None, batch)),
            "update": (jax.jit(update, donate_argnums=0, out_shardings=(of_state, replicated)), (state, sums)),
        }
        programs = {
            name: program_of(functools.partial(function.lower, *arguments), chip, mesh, sparse_cores=train.sparse_cores)
            for name, (function, arguments) in jitted.items()
        }
        kept = _kept_bytes(losses, train, state.params, batch)
    return Plan(
        config=experiment.name,
        topology=topology,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        visual_tokens=int(example.inputs.visual_lengths[0]),
        text_tokens=text,
        contexts=data.contexts_per_batch,
        accumulation=train.accumulation,
        chip=chip,
        parameter_bytes=_bytes_per_device(state.params),
        optimizer_bytes=_bytes_per_device(state.opt_state),
        host_bytes=_bytes_per_device(state.opt_state, on_host=True),
        gradient_bytes=_bytes_per_device(sums.grads),
        batch_bytes=_bytes_per_device(batch),
        kept_bytes=kept // mesh.size,
        programs=programs,
        flops=train_flops(model, example.inputs, train.attention, trained_parts(state.params, train.frozen)),
        compile_seconds=time.monotonic() - began,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a registered name")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=f"such as v5p:4x4x4, or {LOCAL}")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="visual tokens; default: the config's most")
    parser.add_argument("--text", type=int, default=512, metavar="TOKENS", help="text tokens of a row; default 512")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in experiments.train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            experiment = apply_overrides(configs.get(options.config), options.set)
            tokens = options.context or experiment.data.max_visual_tokens
            made = plan(experiment, options.topology, tokens, options.text)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(shown(made))
    if options.json:
        about = {"command": ["python", "-m", "experiments.plan", *(arguments or sys.argv[1:])], **to_json(made)}
        partial = options.json.with_suffix(".tmp")
        partial.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(partial, options.json)
    return EXIT_FITS if made.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
