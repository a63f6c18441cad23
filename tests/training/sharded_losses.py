"""Prints the losses of a short run on eight CPU devices, for each mesh named on the command line (a script).

Of two meshes joined by ">", the second takes over after two of the three steps.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import dataclasses

import jax
from training_fakes import (
    FakePipeline,
    random_batch,
    tiny_experiment,
    toy_init_state,
    toy_make_forward,
    toy_make_losses,
)

from videonsa_jax.models import placement
from videonsa_jax.training import loop, mesh
from videonsa_jax.training.config import MeshConfig

placement.MIN_SHARDED_SIZE = 1  # the model is small: shard what can be
loop.build_pipeline = lambda *_, split, **__: FakePipeline(split, lambda index: random_batch(index, 8), 8)
# `sharded_gradients` has the model; here are the loop, the optimiser and where its state lies.
loop.init_state, loop.make_forward, loop.make_losses = toy_init_state, toy_make_forward, toy_make_losses
make_mesh = mesh.make_mesh
results = {}
for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        for sizes in name.split(">"):
            config = MeshConfig(
                **({"data": 1} | {axis: int(size) for axis, size in (x.split("=") for x in sizes.split())})
            )
            devices = jax.devices()[: config.data * config.fsdp]
            loop.make_mesh = lambda config, devices=devices: make_mesh(config, devices)
            experiment = tiny_experiment(steps=3, save_every=1, keep=3)
            experiment = dataclasses.replace(
                experiment,
                mesh=config,
                data=dataclasses.replace(experiment.data, contexts_per_batch=8, heldout=""),
            )
            (workdir / "report.json").unlink(missing_ok=True)
            shutil.rmtree(workdir / "checkpoints" / "3", ignore_errors=True)
            assert loop.train(experiment, workdir) == 0
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results[name] = [(line["loss"], line["grad_norm"]) for line in lines]
print(json.dumps(results))
