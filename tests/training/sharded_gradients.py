"""Prints how far loss and gradients on several meshes of CPU devices lie from those on one device (a script)."""

import json
import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training_fakes import random_batch, tiny_experiment

from videonsa_jax.models import placement
from videonsa_jax.training import mesh as meshes
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.step import Sums, accumulate, init_state, make_losses

placement.MIN_SHARDED_SIZE = 1  # the model is small: shard what can be
VOCAB = 48  # like no other size
MESHES = (
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 2},
    {"context": 4},
    {"context": 8},
    {"fsdp": 2, "context": 4},
)

# Two KV heads; logits of a vocabulary of its own, in two chunks of the text.
experiment = tiny_experiment(loss_chunk=4)
text = dataclasses.replace(
    experiment.model.text, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=False
)
model, train = dataclasses.replace(experiment.model, text=text), experiment.train


shapes = jax.eval_shape(lambda: init_state(model, train, 0, optax.identity())).params
draw = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: 0.2 * draw.standard_normal(leaf.shape, np.float32), shapes)


def on(sizes: dict[str, int], attention: str = "nsa") -> tuple[Sums, bool, bool]:
    """The sums over a batch, whether each axis of the mesh splits something, and whether a device has whole logits."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = meshes.make_mesh(MeshConfig(**({"data": 1} | sizes)), devices)
    shardings = meshes.state_shardings(params, mesh)
    batch = meshes.place_batch(random_batch(0, 8), mesh)
    placed = jax.device_put(params, shardings)
    losses = make_losses(model, dataclasses.replace(train, attention=attention), mesh)
    add = jax.jit(functools.partial(accumulate, losses, train)).lower(placed, None, batch)
    specs = str([array.sharding.spec for array in jax.tree.leaves((placed, batch))])
    compiled = add.compile()
    logits = re.search(rf"f32\[[0-9]+,[0-9]+,{train.loss_chunk},{VOCAB}\]", compiled.as_text()) is not None
    return jax.device_get(compiled(placed, None, batch)[0]), all(axis in specs for axis in sizes), logits


expected_of = {attention: on({"data": 1}, attention)[0] for attention in ("nsa", "dense")}
results = {}
for sizes, attention in [*((sizes, "nsa") for sizes in MESHES), ({"context": 4}, "dense")]:
    sums, split, logits = on(sizes, attention)
    expected = expected_of[attention]
    pairs = zip(jax.tree.leaves(sums.grads), jax.tree.leaves(expected.grads), strict=True)
    distances = [float(jnp.abs(one - other).max() / jnp.maximum(jnp.abs(other).max(), 1e-3)) for one, other in pairs]
    name = " ".join([f"{axis}={size}" for axis, size in sizes.items()] + ["dense"] * (attention == "dense"))
    loss = abs(float(sums.loss / expected.loss) - 1)
    results[name] = {"loss": loss, "gradient": max(distances), "split": split, "whole_logits": logits}
print(json.dumps(results))
