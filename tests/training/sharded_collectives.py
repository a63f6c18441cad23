"""Prints what eight CPU devices exchange in a gradient of a small model on long videos (a script)."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import dataclasses
import functools

import jax
import optax
from training_fakes import tiny_experiment

from experiments import plan
from experiments.program_reading import read_program
from videonsa_jax.models import placement
from videonsa_jax.training import mesh as meshes
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.step import accumulate, init_state, make_losses

CONTEXTS, TOKENS, TEXT, CONTEXT_PARTS = 2, 60 * 256, 8, 4

placement.MIN_SHARDED_SIZE = 1
experiment = tiny_experiment(remat="full")
# Heads beside which keys are few, as in the real model; streams larger than any weight.
text = dataclasses.replace(experiment.model.text, hidden_size=128, num_attention_heads=8, num_key_value_heads=1)
vision = dataclasses.replace(experiment.model.vision, out_hidden_size=128)
nsa = dataclasses.replace(experiment.model.nsa, block_size=64)
model, train = dataclasses.replace(experiment.model, text=text, vision=vision, nsa=nsa), experiment.train

mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, context=CONTEXT_PARTS))
shapes = jax.eval_shape(lambda: init_state(model, train, 0, optax.identity())).params


def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def of_field(path: tuple, leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return placed(leaf, meshes.batch_sharding(meshes.path_name(path[-1:]), mesh))


params = jax.tree.map(placed, shapes, meshes.state_shardings(shapes, mesh))
batch = jax.tree_util.tree_map_with_path(of_field, plan.example_batch(model, mesh, CONTEXTS, 1, TOKENS, TEXT))
add = jax.jit(functools.partial(accumulate, make_losses(model, train, mesh), train))
reading = read_program(add.lower(params, None, batch).compile().as_text())

tokens = batch.inputs.visual_source.shape[1] // CONTEXT_PARTS
frames, patches = batch.inputs.patches.shape[1] // CONTEXT_PARTS, batch.inputs.patches.shape[2]
part = {  # of one device, in bytes of float32
    "visual stream": 4 * tokens * text.hidden_size,
    "tower's stream": 4 * frames * patches * vision.hidden_size,
    "keys": 4 * tokens * text.num_key_value_heads * text.head_dim,
}
exchanged = [dataclasses.asdict(one) for one in reading.collectives]
print(json.dumps({"part": part, "exchanged": exchanged}))
