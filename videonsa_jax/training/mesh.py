"""Devices as a mesh, and which array axis lies along which mesh axis."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from videonsa_jax.models import placement
from videonsa_jax.streams import BATCH_AXIS_SECOND
from videonsa_jax.training.config import SHARDING_RULES, MeshConfig, ShardingRule

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
HOST_MEMORY = "pinned_host"

# Axis of a batch's arrays that is split over `context`: frames, and tokens of the visual stream.
CONTEXT_AXES = {"patches": 1, "frame_grids": 1, "visual_source": 1, "visual_positions": 2, "visible_text": 1}
FRAME_FIELDS = ("patches", "frame_grids")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices.

    Args:
      config: devices along each axis; one of them may be -1.
      devices: devices to lay out; None = all of them, over all hosts.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or an axis cannot be used on several hosts yet.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis} is {size}, expected a positive number of devices or -1")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh.{' and mesh.'.join(open_axes)} are both -1, expected at most one such axis")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        shape = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise ValueError(f"mesh {shape} does not fit {len(devices)} device(s)")
    hosts = jax.process_count()
    for axis in ("context", "tensor"):
        # The loader gives each host contexts of its own: hosts that share some would have to read the same.
        if sizes[axis] > 1 and hosts > 1:
            raise ValueError(f"mesh.{axis} is {sizes[axis]} on {hosts} hosts, expected 1 on more than one host so far")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as "params/layers/mlp/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Sequence[ShardingRule]) -> PartitionSpec:
    rule = next((rule for pattern, rule in rules if re.search(pattern, path)), None)
    if rule is None:
        raise ValueError(f'mesh.rules has none for {path}, expected a last one such as (".*", "fsdp")')
    if rule == "replicated" or math.prod(shape) < placement.MIN_SHARDED_SIZE:
        return PartitionSpec()
    if rule != "fsdp" and not -len(shape) <= rule < len(shape):
        raise ValueError(f"mesh.rules splits axis {rule} of {path}, expected one of the {len(shape)} axes that it has")
    names: list[str | tuple[str, ...] | None] = [None] * len(shape)
    taken = ()
    if rule != "fsdp" and mesh.shape["tensor"] > 1 and shape[rule] % mesh.shape["tensor"] == 0:
        names[rule], taken = "tensor", (rule % len(shape),)
    if split := placement.weight_split(shape, mesh, taken):
        axis, over = split
        names[axis] = over[0] if len(over) == 1 else over or None
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, rules: Sequence[ShardingRule] = SHARDING_RULES) -> Any:
    """Shardings of a training state: the optimiser's moments lie as their parameters do.

    Args:
      state: pytree of arrays or of their shapes.
      mesh: from `make_mesh`.
      rules: in order of precedence, as `MeshConfig` describes them.

    Returns:
      The same tree with a `NamedSharding` for each array.

    Raises:
      ValueError: no rule is for an array, or one splits an axis that the array lacks.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf.shape, mesh, rules)), state
    )


def in_host_memory(shapes: Any, shardings: Any) -> Any:
    """The same shardings in the pinned memory of the devices' hosts; scalars stay where they are.

    Args:
      shapes: pytree of arrays or of their shapes.
      shardings: theirs, from `state_shardings`.

    Raises:
      ValueError: the devices have no such memory.
    """
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"train.offload_optimizer is true, but a {device.device_kind} has the memories {', '.join(kinds)}, "
            f"expected one called {HOST_MEMORY}"
        )
    return jax.tree.map(
        lambda leaf, sharding: sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding, shapes, shardings
    )


def batch_sharding(field: str, mesh: Mesh) -> NamedSharding:
    """Sharding of one field of a `Batch`, `TrainBatch` or `EvalBatch`.

    Its contexts are split over data and fsdp, its frames and visual tokens over context.
    """
    names = [*(None,) * (field in BATCH_AXIS_SECOND), BATCH_AXES]
    if mesh.shape["context"] > 1 and field in CONTEXT_AXES:
        names += [*(None,) * (CONTEXT_AXES[field] - len(names)), "context"]
    return NamedSharding(mesh, PartitionSpec(*names))


def place_batch[AnyBatch](batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Puts this process' rows of a batch on its devices, as parts of the global batch.

    Frames and visual tokens are padded to whole parts of `context`, tokens to two stripes each.
    """

    def place(path: tuple[Any, ...], array: np.ndarray) -> jax.Array:
        field = path_name(path[-1:])
        if mesh.shape["context"] > 1 and field in CONTEXT_AXES:
            parts = mesh.shape["context"] * (1 if field in FRAME_FIELDS else 2)
            missing = -array.shape[CONTEXT_AXES[field]] % parts
            if missing:
                array = np.pad(array, [(0, missing * (axis == CONTEXT_AXES[field])) for axis in range(array.ndim)])
        return jax.make_array_from_process_local_data(batch_sharding(field, mesh), array)

    return jax.tree_util.tree_map_with_path(place, batch)


def check_batch_size(contexts_per_batch: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises a ValueError unless a batch's contexts divide over the mesh."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if contexts_per_batch % parts:
        raise ValueError(
            f"data.contexts_per_batch is {contexts_per_batch}, expected a multiple of mesh data x fsdp = {parts}"
        )


def check_model_size(kv_heads: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises a ValueError unless a model's KV heads divide over the mesh."""
    if kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"mesh.tensor is {mesh.shape['tensor']}, expected a divisor of the model's {kv_heads} KV heads"
        )
