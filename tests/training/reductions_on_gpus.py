"""Compiles for two H100 that are not there, and prints the sums over both that mix data types (a script)."""

import json
import os

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
os.environ["JAX_PLATFORMS"] = ""  # the plugin is loaded for its compiler

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from training_fakes import random_batch, tiny_experiment

from benchmarks.gpu_resources import TARGET
from benchmarks.real_samples import one_question
from videonsa_jax.models import placement
from videonsa_jax.training import compiling
from videonsa_jax.training import mesh as meshes
from videonsa_jax.training.step import accumulate, init_state, make_losses


def smallest(video: jax.Array, text: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A norm's gradient from two streams, and a loss."""
    of_text = jnp.sum(jnp.sin(text.astype(jnp.float32)), (0, 2)).astype(jnp.bfloat16).reshape(512)
    of_video = jnp.sum(video.astype(jnp.float32), (0, 1)).astype(jnp.bfloat16)
    return of_text + of_video, jnp.sum(numbers)


def lower_smallest(mesh: Mesh) -> jax.stages.Lowered:
    def over_devices(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    shapes = (
        over_devices((2, 64, 512), jnp.bfloat16),
        over_devices((2, 1, 64, 512), jnp.bfloat16),
        over_devices((2, 128), jnp.float32),
    )
    return jax.jit(smallest, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*shapes)


def lower_step(mesh: Mesh) -> jax.stages.Lowered:
    """A batch's gradient as it is trained on two GPUs: bfloat16, a context each, one question a context."""
    placement.MIN_SHARDED_SIZE = 1  # the model is small: shard what can be
    experiment = tiny_experiment(dtype="bfloat16", param_dtype="bfloat16", kernel="xla")
    model, train = experiment.model, experiment.train
    params = jax.eval_shape(lambda: init_state(model, train, 0, optax.identity())).params
    shardings = meshes.state_shardings(params, mesh)
    params = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), params, shardings)
    batch = meshes.batch_shapes(one_question(random_batch(0, 2), 0), mesh)
    add = functools.partial(accumulate, make_losses(model, train, mesh), train)
    return jax.jit(add, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(params, None, batch)


topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x2")
mesh = Mesh(np.array(topology.devices).reshape(1, 2, 1, 1), meshes.AXES)
results = {}
for name, lower in (("smallest", lower_smallest), ("step", lower_step)):
    lowered = lower(mesh)
    results[name] = {
        "as XLA likes": compiling.mixed_reductions(lowered.compile().as_text()),
        "as the loop compiles": compiling.mixed_reductions(compiling.compile_program(lowered, mesh).as_text()),
    }
print(json.dumps(results))
