"""Devices as a mesh, and which array axis lies along which mesh axis."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from videonsa_jax.models import placement
from videonsa_jax.streams import BATCH_AXIS_SECOND
from videonsa_jax.training.config import SHARDING_RULES, MeshConfig, ShardingRule

AXES = ("data", "fsdp", "context", "tensor")
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
      ValueError: the sizes do not multiply to the number of devices.
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
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@dataclass(frozen=True)
class LoadingShard:
    """The part of every batch that this process loads.

    Attributes:
      index: among the parts, below `count`; with `count`, what grain calls a shard of the data.
      count: parts that a batch is loaded in.
      processes: that load this part; several where `context` or `tensor` splits contexts over processes.
    """

    index: int
    count: int
    processes: tuple[int, ...]

    @property
    def is_shared(self) -> bool:
        """Whether other processes load the same contexts; true on all processes or on none."""
        return len(self.processes) > 1


@functools.cache
def loading_shard(mesh: Mesh) -> LoadingShard:
    """The part of a batch that this process' devices hold, B lying over data x fsdp.

    Raises:
      ValueError: processes hold contexts that overlap in part, or one holds more than another.
    """
    names = mesh.axis_names
    others = tuple(axis for axis, name in enumerate(names) if name not in placement.DATA_AXES)
    by_context = np.moveaxis(mesh.devices, others, range(-len(others), 0))
    by_context = by_context.reshape(-1, int(np.prod([mesh.devices.shape[axis] for axis in others])))
    held: dict[int, set[int]] = defaultdict(set)
    for context, devices in enumerate(by_context):
        for device in devices:
            held[device.process_index].add(context)
    parts = sorted({tuple(sorted(contexts)) for contexts in held.values()})
    if sum(map(len, parts)) != len(by_context) or len({len(part) for part in parts}) > 1:
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"mesh {sizes} gives its {len(held)} processes the contexts {', '.join(map(str, parts))} of each batch, "
            "expected parts of one size that do not overlap: let data x fsdp, or context x tensor, be a multiple of a "
            "process' devices"
        )
    own = tuple(sorted(held[jax.process_index()]))
    sharing = tuple(sorted(process for process, contexts in held.items() if tuple(sorted(contexts)) == own))
    return LoadingShard(parts.index(own), len(parts), sharing)


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
    names = [*(None,) * (field in BATCH_AXIS_SECOND), placement.DATA_AXES]
    if mesh.shape["context"] > 1 and field in CONTEXT_AXES:
        names += [*(None,) * (CONTEXT_AXES[field] - len(names)), "context"]
    return NamedSharding(mesh, PartitionSpec(*names))


def batch_shapes[AnyBatch](batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Shapes and shardings of a whole batch's arrays on a mesh, for compiling ahead."""

    def shape_of(path: tuple[Any, ...], array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch_sharding(path_name(path[-1:]), mesh))

    return jax.tree_util.tree_map_with_path(shape_of, batch)


def place_batch[AnyBatch](batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Puts this process' contexts of a batch (`loading_shard`) on its devices, as parts of the global batch.

    Frames and visual tokens are padded to whole parts of `context`, tokens to two stripes each.
    """
    shards = loading_shard(mesh).count

    def place(path: tuple[Any, ...], array: np.ndarray) -> jax.Array:
        field = path_name(path[-1:])
        if mesh.shape["context"] > 1 and field in CONTEXT_AXES:
            parts = mesh.shape["context"] * (1 if field in FRAME_FIELDS else 2)
            missing = -array.shape[CONTEXT_AXES[field]] % parts
            if missing:
                array = np.pad(array, [(0, missing * (axis == CONTEXT_AXES[field])) for axis in range(array.ndim)])
        contexts = 1 if field in BATCH_AXIS_SECOND else 0
        shape = tuple(size * (shards if axis == contexts else 1) for axis, size in enumerate(array.shape))
        return jax.make_array_from_process_local_data(batch_sharding(field, mesh), array, shape)

    return jax.tree_util.tree_map_with_path(place, batch)


def check_batch_size(contexts_per_batch: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises a ValueError unless a batch's contexts divide over the mesh."""
    parts = int(np.prod([mesh.shape[axis] for axis in placement.DATA_AXES]))
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
