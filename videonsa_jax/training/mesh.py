"""Devices as a mesh, and which array axis lies along which mesh axis."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from videonsa_jax.streams import BATCH_AXIS_SECOND
from videonsa_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
NOT_YET_SHARDED = ("context", "tensor")

MIN_SHARDED_SIZE = 2**14  # smaller arrays are replicated: gathering them costs more than holding them

type Rule = tuple[str, PartitionSpec | Literal["fsdp"]]

# The first rule whose pattern is found in an array's path decides. "fsdp" splits the largest axis that divides.
RULES: tuple[Rule, ...] = (
    (r"(^|/)(step|count|bias|scale)$", PartitionSpec()),
    (r"", "fsdp"),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices.

    Args:
      config: devices along each axis; one of them may be -1.
      devices: devices to lay out; None = all of them, over all hosts.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or an axis cannot be used yet.
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
    for axis in NOT_YET_SHARDED:
        if sizes[axis] > 1:
            raise ValueError(f"mesh.{axis} is {sizes[axis]}, but only data and fsdp may exceed 1 so far")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as "params/layers/mlp/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(path: str, shape: tuple[int, ...], fsdp: int, rules: Sequence[Rule]) -> PartitionSpec:
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    if spec != "fsdp":
        return spec
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible or np.prod(shape) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    axis = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * axis, "fsdp")


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] = RULES) -> Any:
    """Shardings of a training state: the optimiser's moments lie as their parameters do.

    Args:
      state: pytree of arrays or of their shapes.
      mesh: from `make_mesh`.
      rules: (pattern of the path, spec) in order of precedence.

    Returns:
      The same tree with a `NamedSharding` for each array.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf.shape, mesh.shape["fsdp"], rules)), state
    )


def batch_sharding(field: str, mesh: Mesh) -> NamedSharding:
    """Sharding of one field of a `Batch`, `TrainBatch` or `EvalBatch`: its contexts are split over data and fsdp."""
    before = (None,) * (field in BATCH_AXIS_SECOND)
    return NamedSharding(mesh, PartitionSpec(*before, BATCH_AXES))


def place_batch[AnyBatch](batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Puts this process' rows of a batch on its devices, as parts of the global batch."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: jax.make_array_from_process_local_data(batch_sharding(path_name(path[-1:]), mesh), array),
        batch,
    )


def check_batch_size(contexts_per_batch: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises a ValueError unless a batch's contexts divide over the mesh."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if contexts_per_batch % parts:
        raise ValueError(
            f"data.contexts_per_batch is {contexts_per_batch}, expected a multiple of mesh data x fsdp = {parts}"
        )
