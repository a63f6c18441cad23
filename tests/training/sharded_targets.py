"""Prints what meshes exchange for the loss of a text, and how far its gradients lie from one device's (a script)."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.program_reading import read_program
from videonsa_jax.models import placement
from videonsa_jax.training import mesh as meshes
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.cross_entropy import token_losses

CONTEXTS, ROWS, TEXT, HIDDEN, VOCABULARY = 8, 2, 24, 64, 512

draw = np.random.default_rng(0)
hidden = draw.standard_normal((CONTEXTS, ROWS, TEXT, HIDDEN), np.float32)
weights = draw.standard_normal((HIDDEN, VOCABULARY), np.float32)
targets = draw.integers(0, VOCABULARY, (CONTEXTS, ROWS, TEXT), np.int32)


def on(chunk: int, **sizes: int) -> tuple[list[np.ndarray], list[dict]]:
    """Loss and gradients, and what was exchanged."""
    mesh = meshes.make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    of_weights = meshes.state_shardings({"lm_head": {"kernel": weights}}, mesh)["lm_head"]["kernel"]
    of_rows = meshes.batch_sharding("targets", mesh)

    def loss(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        with placement.on_mesh(mesh):
            hidden = placement.split_rows(hidden, "tokens")
            return jnp.sum(token_losses(hidden, weights, targets, chunk=chunk)[0])

    function = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(of_rows, of_weights),
        out_shardings=(None, (of_rows, of_weights)),
    )
    compiled = function.lower(hidden, weights).compile()
    loss, gradients = compiled(jax.device_put(hidden, of_rows), jax.device_put(weights, of_weights))
    return [np.asarray(x) for x in (loss, *gradients)], [
        dataclasses.asdict(one) for one in read_program(compiled.as_text()).collectives
    ]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


results = {}
expected, _ = on(0, data=1)
for chunk, sizes in (
    (0, {"data": 1, "fsdp": 8}),
    (4, {"data": 2, "fsdp": 4}),
    (4, {"data": 1, "fsdp": 4, "context": 2}),
    (4, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}),
):
    found, exchanged = on(chunk, **sizes)
    distances = [distance(*pair) for pair in zip(found, expected, strict=True)]
    name = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    results[name] = {
        "distances": distances,
        "exchanged": exchanged,
        "weights": weights.nbytes // sizes.get("tensor", 1),
    }
print(json.dumps(results))
